"""The shared layers against formulas written out another way."""

import math

import pytest
import torch
from torch import nn

from mmf_fast import jvp
from mmf_fast.models.layers import (
    Attention,
    Conditioning,
    check_positive,
    modulate,
    modulated_norm,
    norm_silu,
    sinusoids,
    zero_init,
)


def test_sinusoids_are_those_of_the_formula():
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    embedded = sinusoids(t, 5)
    for row, time in zip(embedded.tolist(), t.tolist(), strict=True):
        angles = [time * 2 ** (j / 4) for j in range(5)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert row == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    ("given", "returned"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_sinusoids_have_at_least_single_precision(given, returned):
    assert sinusoids(torch.rand(3, dtype=given), 4).dtype is returned


def test_sinusoids_vary_slowly_in_time():
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    derivative = (sinusoids(t[1:], 128) - sinusoids(t[:-1], 128)) * 1000
    assert derivative.pow(2).mean().sqrt() < 1.5 / math.sqrt(2)
    assert derivative.abs().max() <= 2


def test_modulate_broadcasts_over_tokens():
    x = torch.ones(2, 3, 4)
    shift, scale = torch.tensor([1.0, 2.0]).view(2, 1, 1), torch.tensor([0.0, 3.0]).view(2, 1, 1)
    assert modulate(x, shift, scale)[:, 0, 0].tolist() == [2.0, 6.0]
    assert modulate(x, torch.zeros(()), torch.zeros(())).equal(x)


class Doubled(nn.LayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


class DoubledGroups(nn.GroupNorm):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("layer", ["modulated", "silu"])
def test_a_norm_with_a_forward_of_its_own_is_called_on_duals_too(layer):
    x, shift, scale = torch.randn(2, 4, 4), torch.randn(2, 1, 4), torch.randn(2, 1, 4)
    norm = DoubledGroups(2, 4) if layer == "silu" else Doubled(4, elementwise_affine=False)

    def net(x):
        return norm_silu(norm, x) if layer == "silu" else modulated_norm(norm, x, shift, scale)

    torch.testing.assert_close(jvp(net, (x,), (x,))[0], net(x))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_equals_loops_over_heads_and_queries(qk_norm):
    torch.manual_seed(0)
    layer = Attention(6, heads=2, qk_norm=qk_norm).double()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    if qk_norm:
        torch.nn.init.uniform_(layer.q_norm.weight)
        torch.nn.init.uniform_(layer.k_norm.weight)
    expected = torch.empty(2, 4, 6, dtype=torch.float64)
    for b in range(2):
        q, k, v = (x[b] @ layer.qkv.weight.T + layer.qkv.bias).split(6, dim=-1)
        for head in range(2):
            at_head = slice(3 * head, 3 * head + 3)
            for n in range(4):
                query, keys = q[n, at_head], k[:, at_head]
                if qk_norm:
                    query = query / (query.pow(2).mean() + 1e-6).sqrt() * layer.q_norm.weight
                    keys = keys / (keys.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * layer.k_norm.weight
                weights = torch.exp(keys @ query / math.sqrt(3))
                expected[b, n, at_head] = weights / weights.sum() @ v[:, at_head]
    expected = expected @ layer.out.weight.T + layer.out.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_attention_with_heads_that_do_not_fit():
    with pytest.raises(ValueError, match="width 10 is not divisible by heads 4"):
        Attention(10, heads=4)


def test_conditioning_separates_the_time_from_the_interval():
    layer = Conditioning(8)
    one, half = torch.tensor([1.0]), torch.tensor([0.5])
    whole = layer(0 * one, one, None)
    same_time = layer(half, one, None)
    same_interval = layer(0.2 * one, 1.2 * one, None)
    assert (whole - same_time).abs().max() > 1e-3
    assert (whole - same_interval).abs().max() > 1e-3


def test_conditioning_of_a_bfloat16_network_casts_after_the_sinusoids():
    layer, reference = Conditioning(8).bfloat16(), []
    layer.fc_in.register_forward_pre_hook(lambda module, inputs: reference.append(inputs[0]))
    t = torch.tensor([0.5, 0.5001])
    assert layer(0.5 * t, t, None).dtype is torch.bfloat16
    expected = torch.cat((sinusoids(t, 128), sinusoids(0.5 * t, 128)), dim=-1).bfloat16()
    assert reference[0].equal(expected)
    assert not expected[0].equal(expected[1]), "times that bfloat16 cannot tell apart must stay apart"


def test_conditioning_without_labels_uses_the_null_label():
    layer, t = Conditioning(8, num_classes=3), torch.tensor([0.7, 0.7])
    assert layer(t, t, None).equal(layer(t, t, torch.tensor([3, 3])))
    assert not layer(t, t, None).equal(layer(t, t, torch.tensor([0, 1])))


def test_conditioning_refuses_what_it_was_not_built_for():
    t = torch.tensor([0.7])
    with pytest.raises(ValueError, match="unconditional network was given labels; pass y=None"):
        Conditioning(8)(t, t, torch.tensor([0]))
    with pytest.raises(ValueError, match="num_classes must be 0"):
        Conditioning(8, num_classes=-1)
    for labels, given in (
        (torch.tensor([0.0]), "torch.float32"),
        (torch.tensor([True]), "torch.bool"),
        (["a"], "a list"),
    ):
        with pytest.raises(ValueError, match=f"labels y are {given}: give class numbers 0 .. 2 as integers"):
            Conditioning(8, num_classes=3)(t, t, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_may_be_any_integers(dtype):
    layer, t, labels = Conditioning(8, num_classes=3), torch.tensor([0.7, 0.7]), torch.tensor([2, 0])
    assert layer(t, t, labels.to(dtype)).equal(layer(t, t, labels))


def test_zero_init_zeroes_every_parameter_and_returns_the_layer():
    layer = torch.nn.Linear(2, 3)
    assert zero_init(layer) is layer
    assert all(parameter.count_nonzero() == 0 for parameter in layer.parameters())


def test_check_positive_names_the_size():
    check_positive(width=1)
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        check_positive(width=1, depth=0)
