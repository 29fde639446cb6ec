"""modulated_layer_norm and group_norm_silu: values, tangents, gradients through both, for every implementation."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.operator_harness import check, distance

from mmf_fast.ops.group_norm import group_norm_silu
from mmf_fast.ops.layer_norm import modulated_layer_norm

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
PRESENT = list(itertools.product([False, True], repeat=3))  # which tangents: of x, gain, bias
SETTINGS = dict(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def layer_norm(x, gain, bias, rms=False):
    centred = x if rms else x - x.mean(-1, keepdim=True)
    y = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + 1e-3)
    y = y if gain is None else y * gain
    return y if bias is None else y + bias


def group_norm(x, gain, bias, groups, silu):
    grouped = x.reshape(x.shape[0], groups, x.shape[1] // groups * math.prod(x.shape[2:]))
    centred = grouped - grouped.mean(-1, keepdim=True)
    u = (centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + 1e-3)).reshape(x.shape)

    def column(p):
        return p.reshape(-1, x.shape[1], *[1] * (x.ndim - 2))

    u = u if gain is None else u * column(gain)
    u = u if bias is None else u + column(bias)
    return u * torch.sigmoid(u) if silu else u


def draw(shape, parameter, tangents=(True, True, True), gain=True, bias=True):
    """Primals and tangents of x, gain and bias; a tangent of an absent parameter is that of its default."""
    shapes = (shape, parameter, parameter)
    primals = [torch.randn(s, dtype=torch.float64) for s in shapes]
    directions = [torch.randn(s, dtype=torch.float64) if on else None for s, on in zip(shapes, tangents, strict=True)]
    primals = [p if on else None for p, on in zip(primals, (True, gain, bias), strict=True)]
    return primals, [None if p is None else d for p, d in zip(primals, directions, strict=True)]


def check_layer_norm(primals, tangents, dtype, device, rms=False, use=(True, True), tiny=1e-3):
    def operator(p, d):
        return modulated_layer_norm(p[0], d[0], p[1], d[1], p[2], d[2], rms=rms, eps=1e-3)

    check(operator, lambda x, a, b: layer_norm(x, a, b, rms), primals, tangents, dtype, device, use, tiny)


def check_group_norm(primals, tangents, dtype, device, groups, silu=True, channels_last=False, use=(True, True)):
    def operator(p, d):
        x, dx = p[0], d[0]
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
            dx = None if dx is None else dx.contiguous(memory_format=torch.channels_last)
        y, dy = group_norm_silu(x, dx, groups, p[1], d[1], p[2], d[2], eps=1e-3, silu=silu)
        if channels_last and min(x.shape) > 1:
            assert y.is_contiguous(memory_format=torch.channels_last)
        return y, dy

    check(operator, lambda x, a, b: group_norm(x, a, b, groups, silu), primals, tangents, dtype, device, use)


# -- layer norm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 48), (1, 1, 1), (3, 7, 17), (2, 2, 49), (1, 5, 196), (2, 1023), (4, 33)], ids=str
)
def test_layer_norm_of_any_shape(device, shape, dtype):
    modulated = (shape[0], *[1] * (len(shape) - 2), shape[-1])
    floor = 1e-3
    if shape[-1] == 1 and device == "cuda":  # fuses multiply-adds: zeros are differences of numbers of size r and r^2
        floor = [floor, 32.0, 1e3, 32.0, floor, 32.0, 32.0, floor]
    check_layer_norm(*draw(shape, modulated), dtype, device, tiny=floor)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("tangents", PRESENT, ids=str)
def test_layer_norm_with_every_subset_of_tangents(device, tangents, rms):
    check_layer_norm(*draw((2, 3, 20), (2, 1, 20), tangents), torch.float64, device, rms)
    check_layer_norm(*draw((2, 3, 20), (20,), tangents), torch.float64, device, rms)


@pytest.mark.parametrize("use", [(True, False), (False, True)], ids=["primal", "tangent"])
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_with_one_cotangent_and_absent_parameters(device, gain, bias, use):
    check_layer_norm(*draw((2, 3, 20), (2, 1, 20), gain=gain, bias=bias), torch.float64, device, use=use)


def test_layer_norm_of_an_empty_batch(device):
    for shape in [(0, 3, 8), (2, 0, 8)]:
        check_layer_norm(*draw(shape, (8,)), torch.float32, device)


def test_layer_norm_of_strided_and_expanded_arguments(device):
    primals, tangents = draw((4, 3, 20), (4, 1, 20))

    def operator(p, d):
        x = p[0].transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous
        return modulated_layer_norm(x, d[0], p[1], d[1], p[2], d[2].expand(4, 1, 20), eps=1e-3)

    tangents[2] = tangents[2][:1]
    check(
        operator,
        layer_norm,
        primals,
        [*tangents[:2], tangents[2].expand(4, 1, 20)],
        torch.float64,
        device,
    )


def test_layer_norm_far_from_zero_is_as_exact_as_the_composition(device):
    primals, tangents = draw((2, 3, 64), (64,))
    primals[0] = primals[0] + 100
    check_layer_norm(primals, tangents, torch.float32, device)


def test_layer_norm_refuses_a_gain_it_cannot_broadcast():
    with pytest.raises(ValueError, match=r"gain and bias are \(D,\) or"):
        modulated_layer_norm(torch.zeros(2, 3, 4), gain=torch.zeros(2, 3, 1))


@settings(**SETTINGS)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 70), st.booleans(), st.booleans())
def test_layer_norm_of_drawn_shapes(batch, tokens, size, affine, rms):
    parameter = (size,) if affine else (batch, 1, size)
    check_layer_norm(*draw((batch, tokens, size), parameter), torch.float64, "cpu", rms)


# -- group norm --------------------------------------------------------------------------------------------------------

IMAGES = [
    ((2, 8, 5, 5), 2),
    ((1, 2, 1, 2), 1),
    ((3, 6, 7), 3),
    ((2, 24, 4, 3), 4),
    ((2, 20, 1, 3), 5),
    ((2, 6, 33), 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), IMAGES, ids=str)
def test_group_norm_of_any_shape(device, shape, groups, dtype, channels_last):
    check_group_norm(*draw(shape, shape[1:2]), dtype, device, groups, channels_last=channels_last and len(shape) == 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), [((1, 12, 37, 41), 2), ((1, 16, 29, 33), 4), ((2, 16, 5, 7), 8)], ids=str)
def test_group_norm_of_several_tiles_and_of_several_groups_in_one(device, shape, groups, dtype, channels_last):
    """Of Triton: groups of many tiles, the last one in part; programs of several groups, channels-last."""
    check_group_norm(*draw(shape, shape[1:2]), dtype, device, groups, channels_last=channels_last)


def test_group_norm_of_a_group_far_from_zero(device):
    """No sum of squares from which another is taken, nor a first tile that stands for the rest."""
    (x, *parameters), tangents = draw((1, 4, 60, 50), (4,))
    x[:, :, 30:] += 1000
    check_group_norm([x, *parameters], tangents, torch.float32, device, 1)
    check_group_norm([x + 1000, *parameters], tangents, torch.float32, device, 1)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("tangents", PRESENT, ids=str)
def test_group_norm_with_every_subset_of_tangents(device, tangents, silu):
    check_group_norm(*draw((2, 6, 3, 3), (6,), tangents), torch.float64, device, 2, silu)
    check_group_norm(*draw((2, 6, 3, 3), (2, 6, 1, 1), tangents), torch.float64, device, 2, silu, channels_last=True)


@pytest.mark.parametrize("use", [(True, False), (False, True)], ids=["primal", "tangent"])
@pytest.mark.parametrize("gain", [False, True])
def test_group_norm_with_one_cotangent_and_absent_parameters(device, gain, use):
    check_group_norm(*draw((2, 6, 3, 3), (6,), gain=gain, bias=not gain), torch.float64, device, 3, use=use)


def test_group_norm_of_an_empty_batch(device):
    check_group_norm(*draw((0, 6, 3, 3), (6,)), torch.float32, device, 2)


def test_group_norm_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="divide into 4 groups"):
        group_norm_silu(torch.zeros(2, 6, 3), None, 4)
    with pytest.raises(ValueError, match=r"gain and bias are \(C,\) or"):
        group_norm_silu(torch.zeros(2, 6, 3), None, 2, gain=torch.zeros(3))


@settings(**SETTINGS)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 40), st.booleans(), st.booleans())
def test_group_norm_of_drawn_shapes(batch, groups, per_group, pixels, channels_last, silu):
    shape = (batch, groups * per_group, 1, pixels)
    check_group_norm(*draw(shape, shape[1:2]), torch.float64, "cpu", groups, silu, channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_group_norm_of_16_bits_beside_parameters_in_float32(device, rows, layout):
    """As under autocast: what the network keeps in float32 stays so, and so do its gradients."""
    given = [torch.randn(2, 8, 5, 3, dtype=torch.bfloat16).contiguous(memory_format=layout) for _ in range(2)]
    shape = (8,) if rows == 1 else (2, 8, 1, 1)
    given += [torch.randn(shape) for _ in range(4)]

    def run(dtype, device):
        leaves = [a.to(device, dtype or a.dtype).requires_grad_() for a in given]
        x, dx, gain, dgain, bias, dbias = leaves
        y, dy = group_norm_silu(x, dx, 4, gain, dgain, bias, dbias)
        return [y, dy, *torch.autograd.grad(y.square().sum() + 2 * dy.square().sum(), leaves)]

    for ours, right, like in zip(run(None, device), run(torch.float64, "cpu"), given[:2] + given, strict=True):
        assert ours.dtype == like.dtype
        assert distance(ours, right) < 4 * 2**-8  # what is summed was rounded to 16 bits before and after


# -- derivatives against differences -----------------------------------------------------------------------------------


def test_gradients_agree_with_differences(device):
    """gradcheck compares the backward pass with central differences of the operator's own values."""
    primals, tangents = draw((2, 2, 5), (2, 1, 5))
    arguments = [p.to(device).requires_grad_() for pair in zip(primals, tangents, strict=True) for p in pair]
    assert torch.autograd.gradcheck(lambda *a: modulated_layer_norm(*a, eps=1e-2), arguments, fast_mode=True)
    primals, tangents = draw((2, 4, 3), (4,))
    arguments = [p.to(device).requires_grad_() for pair in zip(primals, tangents, strict=True) for p in pair]
    assert torch.autograd.gradcheck(
        lambda x, dx, *a: group_norm_silu(x, dx, 2, *a, eps=1e-2), arguments, fast_mode=True
    )


def test_a_detached_tangent_saves_nothing_and_has_no_gradient(device):
    saved = []
    x, dx = (torch.randn(2, 3, 8, device=device, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y, dy = modulated_layer_norm(x, dx, tangent_grad=False)
        group_norm_silu(x, dx, 3, tangent_grad=False)
    assert not dy.requires_grad
    assert dx.data_ptr() not in saved and dy.data_ptr() not in saved
    assert torch.autograd.grad(y.sum(), [x, dx], allow_unused=True)[1] is None
