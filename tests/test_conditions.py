"""Conditions that are not one tensor: leaves of B rows follow their samples, through the loss and the sampler."""

from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmf_fast import Guidance, MeanFlowLoss, TimeSampler, sample
from mmf_fast.contract import per_sample, take, to_device
from mmf_fast.sampling import sample_in_chunks

B = 6
Text = namedtuple("Text", ["ids", "length"])


class Encoding(UserDict):
    """As tokenizers give."""


CONDITIONS: dict[str, Any] = {
    "tensor": torch.arange(B),
    "array": np.arange(B),
    "prompts": [f"prompt {i}" for i in range(B)],
    "tuple of prompts": tuple(f"prompt {i}" for i in range(B)),
    "dict": {"ids": torch.arange(B), "scale": 7.5},
    "nested": {"text": [{"ids": torch.arange(B)}, (np.arange(B), "shared")], "prompts": [str(i) for i in range(B)]},
    "encoding": Encoding(ids=torch.arange(B), mask=torch.ones(B, 4)),
    "named tuple": Text(torch.arange(B), 9),
    "images, one by one": [torch.full((1, 3), i) for i in range(B)],
    "pair of tensors": (torch.arange(B), torch.arange(B) * 10),
}


def rows_of(value: Any) -> int:
    """How many rows the leaves have that a network would look at."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return len(value)
    if isinstance(value, (dict, UserDict)):
        return rows_of(next(iter(value.values())))
    one_by_one = isinstance(value[0], str) or getattr(value[0], "ndim", 0) == 2
    return len(value) if one_by_one else rows_of(value[0])


class Reading(nn.Module):
    """z and its condition: the rows of the two have to agree."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, Any]] = []

    def forward(self, z: Any, r: Any, t: Any, c: Any = None) -> Any:
        self.calls.append((z.shape[0], c))
        assert rows_of(c) == z.shape[0]
        return z * 1.0


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("name", CONDITIONS)
def test_they_follow_their_samples_in_the_loss(name: str, paired: bool) -> None:
    net = Reading()
    MeanFlowLoss(net, times=TimeSampler(share=0.5), lam=0.5, paired=paired, stochastic=True)(
        torch.randn(B, 2), step=1, c=CONDITIONS[name]
    )
    assert len(net.calls) >= 2
    assert all(type(c) is type(CONDITIONS[name]) for _, c in net.calls)


@pytest.mark.parametrize("name", CONDITIONS)
def test_they_follow_their_samples_in_chunks(name: str) -> None:
    net = Reading()
    assert sample_in_chunks(net, torch.randn(B, 2), chunk=4, c=CONDITIONS[name]).shape == (B, 2)
    assert [rows for rows, _ in net.calls] == [4, 2]


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_cut_takes_the_rows_it_names(name: str) -> None:
    """By an index, then by a slice of what that left; row i is told by the number in it."""
    paths = per_sample(CONDITIONS[name], B)
    order = torch.tensor([5, 0, 3])
    found = take(take(CONDITIONS[name], order, paths), slice(1, 3), paths)

    def numbers(value: Any) -> list[int]:
        if isinstance(value, (torch.Tensor, np.ndarray)):
            return [int(v) for v in value.reshape(len(value), -1)[:, 0]]
        if isinstance(value, (dict, UserDict)):
            return numbers(next(iter(value.values())))
        if isinstance(value[0], str):
            return [int(text.split()[-1]) for text in value]
        if name == "images, one by one":
            return [int(v[0, 0]) for v in value]
        return numbers(value[0])

    assert numbers(found) == [0, 3]
    assert rows_of(CONDITIONS[name]) == B  # what was given is as it was


RAGGED = [[4], [0, 2], [1], [3, 5], [], [0, 1, 2, 3, 4, 5]]  # one has as many items as there are samples


@pytest.mark.parametrize(
    ("cond", "paths"),
    [
        ({"img": torch.zeros(B, 3), "txt": list("abcdef")}, (("img",), ("txt",))),  # pytorch #75442
        (RAGGED, ((),)),  # Lightning #1508: lists of labels
        ({"captions": [["a cat", "a pet"]] * B}, (("captions",),)),
        ([{"caption": "a", "box": (1, 2, 3, 4, 5, 6)}] * B, ((),)),
        ((list("abcdef"), list("ghijkl")), ((0,), (1,))),  # prompts and negative prompts
        (  # diffusers #4401, HCP-Diffusion #62: SDXL's sizes follow the samples as the texts do
            {"added_cond_kwargs": {"text_embeds": torch.zeros(B, 8), "time_ids": torch.zeros(B, 6)}},
            (("added_cond_kwargs", "text_embeds"), ("added_cond_kwargs", "time_ids")),
        ),
        (  # diffusers #6967: one row for all
            {"text_embeds": torch.zeros(B, 8), "time_ids": torch.zeros(1, 6)},
            (("text_embeds",),),
        ),
    ],
)
def test_conditions_that_public_reports_describe(cond: Any, paths: Any) -> None:
    assert per_sample(cond, B) == paths
    rows = take(cond, torch.tensor([5, 0]), paths)
    if cond is RAGGED:
        assert rows == [RAGGED[5], RAGGED[0]]


def test_what_is_shared_stays_whole() -> None:
    table, text = torch.randn(B, 5), {"table": torch.randn(B, 5), "ids": torch.arange(B)}

    class Net(nn.Module):
        def forward(self, z: Any, r: Any, t: Any, table: Any, text: Any, scale: Any) -> Any:
            assert table.shape == (B, 5) and text["table"].shape == (B, 5)
            assert len(text["ids"]) == z.shape[0] and scale == 2.0
            return z * 1.0

    loss_fn = MeanFlowLoss(Net(), times=TimeSampler(share=0.5), shared=("table",))
    loss_fn(torch.randn(B, 2), table=table, text=text, scale=2.0)


def test_a_named_share_is_not_cut_by_coincidence_of_a_group() -> None:
    """Which leaves follow is decided once, for the batch: a table of as many rows as there are intervals stays."""

    class Net(nn.Module):
        def forward(self, z: Any, r: Any, t: Any, table: Any) -> Any:
            assert table.shape == (3, 2)
            return z * 1.0

    MeanFlowLoss(Net(), times=TimeSampler(share=0.5))(torch.randn(B, 2), table=torch.randn(3, 2))


@pytest.mark.parametrize("null", [0, 3])
def test_zero_is_a_null_label(null: int) -> None:
    seen = []

    class Net(nn.Module):
        def forward(self, z: Any, r: Any, t: Any, y: Any) -> Any:
            seen.append(y)
            return z * 1.0

    loss_fn = MeanFlowLoss(Net(), guidance=Guidance(omega=2.0, dropout=1.0), null_label=null)
    loss_fn(torch.randn(B, 2), y=torch.arange(B))
    assert all((y == null).all() for y in seen)


class Prompted(nn.Module):
    """u(z, r, t, text, y), with a gradient to train."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2).double()

    def forward(self, z: Any, r: Any, t: Any, text: Any, y: Any) -> Any:
        return z * (1 + y[:, None]) + self.fc(text.mean(1)) * t[:, None]


def test_guidance_drops_any_condition_that_has_a_null_value() -> None:
    """Text and labels together; rows that are null by themselves keep v."""
    net, guidance = Prompted(), Guidance(omega=1.5, kappa=0.3, dropout=0.0)
    nothing = torch.full((4, 3), 0.25)  # float32, as somebody's encoder gives it
    x, noise, t = torch.randn(B, 2).double(), torch.randn(B, 2).double(), torch.rand(B).double()
    text, y = torch.randn(B, 4, 3).double(), torch.arange(B)
    text[0], y[0] = nothing, 9  # null in both
    y[1] = 9  # in one of them: that row is guided
    options = {"null_label": 9, "null": {"text": nothing}, "p": 0.0}
    found = MeanFlowLoss(net, guidance=guidance, **options)(x, noise=noise, times=(t, t), text=text, y=y)
    with torch.no_grad():
        v = noise - x
        z = x + t[:, None] * v
        u = net(z, t, t, text, y)
        u_null = net(z, t, t, nothing.double().expand(B, 4, 3), torch.full((B,), 9))
        target = 1.5 * v + 0.3 * u + (1 - 1.5 - 0.3) * u_null
        target[0] = v[0]
    torch.testing.assert_close(found.per_sample, (u - target).square().sum(1))

    dropping = MeanFlowLoss(net, guidance=Guidance(omega=1.5, dropout=1.0), **options)
    dropped = dropping(x, noise=noise, times=(t, t), text=text, y=y)
    torch.testing.assert_close(dropped.per_sample, (u_null - v).square().sum(1))
    assert not dropping.state_dict().keys() - {"net.fc.weight", "net.fc.bias"}
    with pytest.raises(ValueError, match=r"guidance needs text, one row per sample: call loss_fn\(x, text=text\)"):
        dropping(x, text=["a prompt"] * B, y=y)


def test_tensors_move_through_any_nesting() -> None:
    moved = to_device({"a": [torch.zeros(2), "text", (torch.ones(1), 3)], "b": None}, "meta")
    assert moved["a"][0].is_meta and moved["a"][2][0].is_meta
    assert moved["a"][1] == "text" and moved["a"][2][1] == 3 and moved["b"] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_of_any_strides_go_to_a_gpu_and_back() -> None:
    image = torch.arange(24.0).view(1, 2, 3, 4)
    last = image.to(memory_format=torch.channels_last)
    for x in (torch.tensor(3).expand(8), image[..., ::2], last, image.to_sparse()):
        there = to_device(x, "cuda")
        assert there.is_cuda and torch.equal(to_device(there, "cpu").to_dense(), x.to_dense())
    there = to_device(image, "cuda")
    pinned = torch.cuda.host_memory_stats().get("num_host_alloc")
    to_device([there] * 9, "cpu")  # into pinned memory it would be a copy that nobody waits for
    assert torch.cuda.host_memory_stats().get("num_host_alloc") == pinned


def test_the_sampler_passes_them_on() -> None:
    class Net(nn.Module):
        def forward(self, z: Any, r: Any, t: Any, text: Any) -> Any:
            assert text["prompts"] == ["a", "b"]
            return z + text["ids"][:, None]

    x = sample(Net(), (2, 3), noise=torch.zeros(2, 3), text={"ids": torch.arange(2.0), "prompts": ["a", "b"]})
    assert x[:, 0].tolist() == [0.0, -1.0]
