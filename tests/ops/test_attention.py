"""The attention operator: values, tangents and gradients through both, for every implementation."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.operator_harness import check, distance

from mmf_fast.ops import gpu, native
from mmf_fast.ops.attention import attention
from mmf_fast.ops.head_rows import head_columns, tail_columns

SUBSETS = list(itertools.product([False, True], repeat=3))  # which tangents: of q, k, v
EVERY = (True, True, True)


def composed(q, k, v, mask=None, causal=False, scale=None):
    """softmax(s q k^T + mask) v in primitive steps; a row that attends to nothing is 0."""
    logits = (q @ k.mT) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        logits = logits + mask.to(q.dtype)
        allowed = allowed & (mask > -math.inf)
    logits = torch.where(allowed, logits, torch.zeros_like(logits))
    top = torch.where(allowed, logits, torch.full_like(logits, -math.inf)).amax(-1, keepdim=True).detach()
    top = torch.where(top == -math.inf, torch.zeros_like(top), top)
    e = torch.where(allowed, torch.exp(torch.where(allowed, logits - top, -1)), torch.zeros_like(logits))
    total = e.sum(-1, keepdim=True)
    return (e / torch.where(total == 0, torch.ones_like(total), total)) @ v


def normal(*shape, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64)


def draw(lead, n, m, d, e=None, tangents=EVERY):
    """Primals and tangents of q (*lead, n, d), k (*lead, m, d), v (*lead, m, e)."""
    shapes = [(*lead, n, d), (*lead, m, d), (*lead, m, e or d)]
    return [normal(*s) for s in shapes], [normal(*s) if on else None for s, on in zip(shapes, tangents, strict=True)]


def check_attention(primals, tangents, dtype, device, use=(True, True), mask=None, causal=False, scale=None, **bounds):
    skip_what_is_not_here(device, dtype)

    def operator(p, d):
        here = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
        here = None if here is None else here.to(device)
        return attention(*p, *d, mask=here, is_causal=causal, scale=scale)

    check(
        operator,
        lambda q, k, v: composed(q, k, v, mask, causal, scale),
        primals,
        tangents,
        dtype,
        device,
        use,
        **bounds,
    )


def interpreted(device):
    return device == "cpu" and os.environ["MMF_FAST_OPS"] == "triton"


def skip_what_is_not_here(device, dtype):
    kind = os.environ.get("MMF_FAST_OPS")
    if kind == "native" and dtype == torch.float16:
        pytest.skip("the C++ kernels take no float16")
    if kind == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels take no float64")
    if kind == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16 products")


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 16), (7, 7, 24), (49, 49, 72), (5, 33, 32), (33, 5, 80), (20, 17, 96), (18, 18, 128)]
LONG = [(196, 196, 72), (256, 256, 64), (1023, 1023, 16), (130, 300, 40)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_self_and_cross_attention_of_any_head_size(device, shape, dtype):
    tiny = 1.0 if shape[1] == 1 else 1e-3  # of one key, what q and k receive is exactly 0
    check_attention(*draw((2, 1), *shape), dtype, device, tiny=tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_attention_of_long_sequences(device, shape, dtype):
    if interpreted(device):
        pytest.skip("the interpreter is slow")
    check_attention(*draw((1, 2 if shape[0] < 1000 else 1), *shape), dtype, device)


def test_a_long_sequence_crosses_blocks_in_the_interpreter(device):
    check_attention(*draw((1, 1), 70, 90, 16), torch.float32, device)


@pytest.mark.parametrize("tangents", SUBSETS, ids=str)
def test_every_subset_of_tangents(device, tangents):
    check_attention(*draw((1, 2), 9, 19, 16, 24, tangents), torch.float32, device)


@pytest.mark.parametrize("tangents", SUBSETS[1:], ids=str)
@pytest.mark.parametrize("use", [(True, False), (False, True)], ids=["primal", "tangent"])
def test_one_cotangent(device, use, tangents):
    check_attention(*draw((1, 2), 9, 19, 16, tangents=tangents), torch.float32, device, use)


MASKS = {
    "boolean": torch.rand(2, 1, 20, 33, generator=torch.Generator().manual_seed(0)) < 0.6,
    "padding": (torch.arange(33) < torch.tensor([[33], [4]]))[:, None, None],
    "keys": torch.arange(33) % 3 > 0,
    "additive": 3 * torch.randn(1, 2, 20, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "additive with -inf": torch.zeros(20, 33, dtype=torch.float64).masked_fill(
        torch.ones(20, 33).triu(9) > 0, -math.inf
    ),
}


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("name", [None, *MASKS])
def test_masks(device, name, causal):
    mask = None if name is None else MASKS[name]
    for dtype in (torch.float32, torch.bfloat16) if os.environ["MMF_FAST_OPS"] == "native" else (torch.float32,):
        check_attention(*draw((2, 2), 20, 33, 16), dtype, device, mask=mask, causal=causal)


QUICK = {(72, 72): "causal", (88, 40): "boolean", (16, 80): "additive"}  # a mask knows nothing of columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("d", "e", "kind"),
    [
        pytest.param(d, e, kind, marks=() if kind in ("plain", QUICK.get((d, e))) else pytest.mark.slow)
        for d, e in [(72, 72), (80, 80), (96, 96), (88, 40), (16, 80)]
        for kind in ("plain", "causal", "boolean", "additive")
    ],
)
def test_heads_of_two_tiles_of_columns(device, d, e, kind, dtype):
    """Sizes that the Triton kernels split, with odd numbers of tokens and every mask."""
    mask = {"boolean": torch.rand(37, 37) < 0.6, "additive": normal(37, 37)}.get(kind)
    check_attention(*draw((1, 2), 37, 37, d, e), dtype, device, mask=mask, causal=kind == "causal")


def test_two_tiles_hold_a_head_with_little_to_spare():
    """Columns computed over columns needed; where the tiles would be alike, one holds the head."""
    if not gpu.available():
        pytest.skip("Triton is not installed")
    tiles = {d: (int(head_columns(d)), int(tail_columns(d))) for d in range(8, 129, 8)}
    assert {d: tiles[d] for d in (64, 72, 80, 96, 104, 128)} == {
        64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 104: (128, 0), 128: (128, 0),
    }  # fmt: skip
    for d, (head, tail) in tiles.items():
        assert head + tail >= d and head & (head - 1) == 0 and tail & (tail - 1) == 0 and tail < head
    assert max((head + tail) / d for d, (head, tail) in tiles.items() if d >= 64 and d != 104) <= 1.15


@pytest.mark.parametrize(("n", "m"), [(40, 40), (50, 20), (20, 50)])
def test_causal_over_several_blocks(device, n, m):
    check_attention(*draw((1, 1), n, m, 16), torch.float32, device, causal=True)


def test_rows_that_attend_to_nothing_are_zero_and_receive_nothing(device):
    mask = torch.ones(6, 9, dtype=torch.bool)
    mask[2] = False
    for full in (mask, torch.zeros(6, 9, dtype=torch.float64).masked_fill(~mask, -math.inf)):
        check_attention(*draw((1, 2), 6, 9, 16), torch.float32, device, mask=full)


def test_the_scale_is_an_argument(device):
    check_attention(*draw((1, 2), 6, 9, 16), torch.float32, device, scale=0.7)


def rounding_of_logits(size: float) -> float:
    """The backward pass has P = exp(S - LSE) of logits S that it computes again. S, LSE, their difference are rounded
    to eps / 2 of their size, S twice as it is scaled: P is off by up to 2 eps |S|, relatively."""
    return 2 * size * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_huge_logits_that_all_keys_share(device, size, causal):
    shared = torch.full((12, 40), size, dtype=torch.float64)
    rounding = rounding_of_logits(abs(size))
    check_attention(*draw((1, 1), 12, 40, 16), torch.float32, device, mask=shared, causal=causal, rounding=rounding)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_huge_logits_of_which_one_wins(device, size, causal):
    """What q, k and their tangents receive is exactly 0 then, of terms 1e5 in size."""
    zero = 10 * abs(size)
    primals, tangents = draw((1, 1), 12, 40, 16)
    largest = float((primals[0] @ primals[1].mT).abs().max()) * abs(size) / 4
    bounds = {"tiny": [1e-3, 1e-3, zero, zero, 1e-3, zero, zero, 1e-3], "rounding": rounding_of_logits(largest)}
    check_attention(primals, tangents, torch.float32, device, scale=size / 4, causal=causal, **bounds)


def test_logit_tangents_with_a_large_common_part_do_not_cancel(device):
    primals, tangents = draw((1, 1), 12, 40, 16)
    tangents[0] = 1e3 * tangents[0].abs()
    primals[1] = primals[1] * 0.01 + 1
    check_attention(primals, tangents, torch.float32, device)


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (0, 1, 0, 3)], ids=str)
def test_an_empty_batch(device, shape):
    check_attention(*draw(shape[:2], *shape[2:], 16), torch.float32, device)


@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3)], ids=str)
def test_leading_dimensions(device, lead):
    check_attention(*draw(lead, 6, 9, 16), torch.float32, device)


def test_leading_dimensions_broadcast(device):
    primals, tangents = draw((2, 1), 6, 9, 16)
    primals[1:], tangents[1:] = [p[0] for p in primals[1:]], [d[0] for d in tangents[1:]]
    check_attention(primals, tangents, torch.float32, device)


@pytest.mark.parametrize("d", [16, 72])
def test_strided_queries_keys_and_values(device, d):
    """The layout of models/layers.py: one projection, split into heads; and one with strided rows."""

    def split(qkv):
        return qkv.reshape(*qkv.shape[:2], 3, 2, d).permute(2, 0, 3, 1, 4).unbind(0)

    def operator(p, tangents):
        return attention(*split(p[0]), *split(tangents[0]))

    def columns(p, tangents):
        return attention(*(x.mT for x in p), *(x.mT for x in tangents))

    check(operator, lambda x: composed(*split(x)), [normal(2, 9, 6 * d)], [normal(2, 9, 6 * d)], torch.float32, device)
    primals, tangents = ([normal(1, 2, d, 9) for _ in range(3)] for _ in range(2))
    check(columns, lambda *x: composed(*(y.mT for y in x)), primals, tangents, torch.float32, device)


def test_values_wider_than_keys(device):
    check_attention(*draw((1, 2), 6, 9, 16, 40), torch.float32, device)
    check_attention(*draw((1, 2), 6, 9, 40, 16), torch.float32, device)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 140), st.integers(1, 140), st.integers(1, 40),
    st.integers(1, 40), st.booleans(), st.tuples(st.booleans(), st.booleans(), st.booleans()),
)  # fmt: skip
def test_drawn_shapes(batch, heads, n, m, d, e, causal, tangents):
    check_attention(*draw((batch, heads), n, m, d, e, tangents), torch.float64, "cpu", causal=causal)


def test_gradients_agree_with_differences(device):
    """gradcheck compares the backward pass with central differences of the operator's own values."""
    skip_what_is_not_here(device, torch.float64)
    primals, tangents = draw((1, 2), 5, 7, 6)
    arguments = [x.to(device).requires_grad_() for x in (*primals, *tangents)]
    assert torch.autograd.gradcheck(attention, arguments, fast_mode=True)


def test_several_threads_share_few_heads(device):
    primals, tangents = draw((1, 1), 300, 70, 16)
    torch.set_num_threads(2)
    try:
        check_attention(primals, tangents, torch.float32, device) if not interpreted(device) else None
    finally:
        torch.set_num_threads(1)


def test_a_detached_tangent_saves_nothing_and_has_no_gradient(device):
    saved = []
    arguments = [torch.randn(1, 2, 5, 16, device=device, requires_grad=True) for _ in range(6)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y, dy = attention(*arguments, tangent_grad=False)
    assert not dy.requires_grad
    assert len(saved) == 5  # q, k, v, O, LSE
    assert not {x.data_ptr() for x in (*arguments[3:], dy)} & set(saved)
    received = torch.autograd.grad(y.sum(), arguments, allow_unused=True)
    assert [x is None for x in received] == 3 * [False] + 3 * [True]
    full = torch.autograd.grad(attention(*arguments)[0].sum(), arguments[:3])
    assert all(distance(a, b) < 1e-6 for a, b in zip(received[:3], full, strict=True))


PEAK = """
import torch
from mmf_fast.ops.attention import attention

def peak():  # of this program in kB; getrusage starts from that of the process that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def run(tokens):
    arguments = [torch.randn(1, 1, tokens, 64, requires_grad=True) for _ in range(6)]
    before = peak()
    torch.autograd.backward(attention(*arguments), [torch.ones(1, 1, tokens, 64)] * 2)
    return peak() - before

torch.set_num_threads(1)
run(16)  # loads libraries
print(run(4096))
"""


@pytest.mark.skipif(not native.available() or sys.platform != "linux", reason="needs the C++ kernels and Linux")
def test_peak_memory_of_a_long_sequence_is_a_tenth_of_the_references():
    def peak(kind):
        environment = os.environ | {"MMF_FAST_OPS": kind}
        run = subprocess.run([sys.executable, "-c", PEAK], env=environment, capture_output=True, text=True, check=True)
        return int(run.stdout)

    fused, composed = peak("native"), peak("reference")
    assert composed > 4096**2 * 4 * 2 / 1024  # kB: two matrices of 4096 x 4096 at the least
    assert fused < 0.1 * composed, f"{fused} kB against {composed} kB"


def test_arguments_that_do_not_fit_are_refused():
    q, k = torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 7, 8)
    with pytest.raises(ValueError, match="the mask of attention gets no gradient: detach it"):
        attention(q, k, k, mask=torch.zeros(5, 7, requires_grad=True))
    with pytest.raises(ValueError, match="must have one dtype, torch.float32 here"):
        attention(q, k.double(), k)
    with pytest.raises(
        ValueError, match=r"takes q \(..., N, D\), k \(..., M, D\), v \(..., M, E\), not \(1, 2, 5, 8\)"
    ):
        attention(q, k[..., :4], k)
    with pytest.raises(ValueError, match=r"the shape of its primal, \(1, 2, 5, 8\), not \(1, 2, 7, 8\)"):
        attention(q, k, k, k)
