"""What a step draws: how many rows are intervals, which, and that every part of a batch draws its own rows alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from support.small_networks import network
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmf_fast import Guidance, LambdaSchedule, MeanFlowLoss, TimeSampler
from mmf_fast.objective import BatchShare
from mmf_fast.objective.counts import Counts
from mmf_fast.objective.draws import draw_kinds


class Spy(nn.Module):
    """Notes the rows it is called with, by their number in x, and which of them are intervals."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor, Any]] = []

    def forward(self, z: Any, r: Tensor, t: Any, y: Any = None) -> Any:
        self.calls.append((getattr(z, "primal", z).detach(), r, getattr(t, "primal", t), y))
        return z * 0.5

    def intervals(self) -> int:
        return sum(int((r < t).sum()) for _, r, t, _ in self.calls)


@pytest.mark.parametrize(
    ("rows", "share", "paired"),
    [
        (1, 0.25, False),
        (1, 0.25, True),
        (2, 0.25, True),
        (3, 0.5, True),
        (3, 0.75, False),
        (5, 0.1, True),
        (7, 0.33, False),
    ],
)
@pytest.mark.parametrize("told", ["step", "chance"])
def test_the_share_holds_over_the_steps(rows: int, share: float, paired: bool, told: str) -> None:
    torch.manual_seed(0)
    net = Spy()
    loss_fn = MeanFlowLoss(net, times=TimeSampler(share=share), paired=paired, lam=0.5)
    found = []
    for step in range(400):
        net.calls.clear()
        loss_fn(torch.randn(rows, 2), **({"step": step} if told == "step" else {}))
        found.append(net.intervals())
    expected = min(share * rows, max(1, rows // 2)) if paired else share * rows
    assert set(found) <= {int(expected), int(expected) + 1}  # two counts at most, so two graphs
    spread = 0.01 if told == "step" else 4 * 0.5 / 400**0.5
    assert sum(found) / 400 == pytest.approx(expected, abs=spread)
    if told == "step":
        assert all(loss_fn.forwards(rows, step) >= 3 * rows + found[step] for step in range(400))


def test_a_stochastic_lambda_holds_over_the_steps() -> None:
    """1 or 2 of 6 rows are intervals, so the chance by which one is rounded up must not know that of the other."""
    counts = Counts(TimeSampler(share=0.25), LambdaSchedule(value=0.3), paired=False, stochastic=True)
    found = torch.tensor([counts.of_batch(6, step) for step in range(2000)], dtype=torch.float64).sum(0)
    assert float(found[0]) / 2000 == pytest.approx(1.5, abs=0.003)
    assert float(found[1] / found[0]) == pytest.approx(0.3, abs=0.003)


def test_a_last_batch_of_any_size_is_paired() -> None:
    loss_fn = MeanFlowLoss(Spy(), times=TimeSampler(share=0.5), paired=True, lam=1.0)
    for rows in range(1, 20):
        for step in range(3):
            assert loss_fn(torch.randn(rows, 2), step=step).per_sample.shape == (rows,)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 12, 24])
@pytest.mark.parametrize("paired", [False, True])
def test_parts_agree_on_the_kinds_of_all_rows(count: int, paired: bool) -> None:
    rows = 24 // count
    if paired and rows % 2:
        with pytest.raises(ValueError, match=f"each of the {count} parts of this batch has {rows}; choose an even"):
            draw_kinds(rows, BatchShare(0, count, seed=1), 0, 5, 0, paired)
        return
    for step in range(40):
        intervals, graphs = [5, 6, 9][step % 3], step % 5
        whole = draw_kinds(24, BatchShare(seed=1), step, intervals, graphs, paired)
        parts = [draw_kinds(rows, BatchShare(i, count, seed=1), step, intervals, graphs, paired) for i in range(count)]
        for name in ("instants", "with_graph", "without_graph"):
            joined = [row + i * rows for i, part in enumerate(parts) for row in getattr(part, name).tolist()]
            assert sorted(joined) == getattr(whole, name).tolist()
        sizes = {len(part.instants) for part in parts}
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("seed", [None, 5])
def test_every_row_is_equally_often_an_interval_and_one_with_a_graph(seed: int | None) -> None:
    torch.manual_seed(0)
    intervals, graphs = torch.zeros(10), torch.zeros(10)
    for step in range(4000):
        kinds = draw_kinds(10, BatchShare(seed=seed), step, 4, 1, paired=False)
        intervals[kinds.with_graph] += 1
        graphs[kinds.with_graph] += 1
        intervals[kinds.without_graph] += 1
        assert len(kinds.with_graph) == 1 and len(kinds.without_graph) == 3
    assert (intervals - 1600).abs().max() < 5 * 31  # binomial(4000, 0.4): 31
    assert (graphs - 400).abs().max() < 5 * 19


class Drawn(TorchDispatchMode):
    """Counts calls and results of torch's generators, and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.launches += any(word in str(func) for word in ("rand", "normal_", "uniform_", "bernoulli"))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("count", [1, 4, 64, 256])
def test_a_part_draws_its_own_rows_alone(count: int) -> None:
    """Times, noise and dropped labels of a row do not depend on the parts, and nothing is made for rows of others."""
    rows = 256 // count
    x, y = torch.randn(256, 6), torch.arange(256) % 7
    loss_fn = MeanFlowLoss(Spy(), guidance=Guidance(dropout=0.5), null_label=9, times=TimeSampler(share=0.25))

    def seen(part: BatchShare) -> Counter:
        net: Any = loss_fn.net
        net.calls.clear()
        with Drawn() as drawn:
            loss_fn(part.of(x), step=3, part=part, y=part.of(y))
        assert drawn.launches <= 16 and drawn.largest <= 2 * 6 * (256 // part.count) + 8
        return Counter(
            (tuple(z.tolist()), float(r), float(t), int(label))
            for zs, rs, ts, ys in net.calls
            for z, r, t, label in zip(zs, rs, ts, ys, strict=True)
        )

    whole = seen(BatchShare(seed=2))
    parts: Counter = Counter()
    for index in range(count):
        parts += seen(BatchShare(index, count, seed=2))
    assert parts == whole
    assert rows * count == 256


@pytest.mark.parametrize(("rows", "count"), [(8, 8), (8, 4), (6, 2), (12, 4)])
@pytest.mark.parametrize("stochastic", [False, True])
def test_small_parts_add_up_to_the_batch(rows: int, count: int, stochastic: bool) -> None:
    net = network("mlp")
    x = torch.randn(rows, 3, dtype=torch.float64)
    loss_fn = MeanFlowLoss(net, times=TimeSampler(share=0.3), lam=0.5, stochastic=stochastic, p=0.5)
    for step in range(6):

        def run(part: BatchShare, step: int = step) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
            output = loss_fn(part.of(x), step=step, part=part)
            grads = torch.autograd.grad(output.loss, list(net.parameters()), allow_unused=True)
            return output.loss.detach(), output.metrics, [torch.zeros(()) if g is None else g for g in grads]

        loss, metrics, grads = run(BatchShare(seed=4))
        parts = [run(BatchShare(i, count, seed=4)) for i in range(count)]
        torch.testing.assert_close(sum(part[0] for part in parts) / count, loss, rtol=1e-12, atol=0)
        for name, value in metrics.items():
            mean = sum(part[1][name] for part in parts) / count
            tolerance = 1e-10 if value.dtype == torch.float64 else 1e-6  # lambda is a float32
            torch.testing.assert_close(mean, value, rtol=tolerance, atol=1e-12, msg=name)
        scale = max(float(g.abs().max()) for g in grads)
        for i, g in enumerate(grads):
            mean = sum(part[2][i] for part in parts) / count
            torch.testing.assert_close(mean + torch.zeros_like(g), g, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("rows", "paired"), [(1, False), (2, False), (3, False), (2, True), (4, True)])
def test_ranks_call_the_network_alike(paired: bool, stochastic: bool, rows: int, monkeypatch: Any) -> None:
    """ZeRO-3 and FSDP gather weights at each call. A rank without a kind of row evaluates one that does not count."""
    net = network("mlp")
    loss_fn = MeanFlowLoss(net, times=TimeSampler(share=0.3), lam=0.5, paired=paired, stochastic=stochastic)
    calls: list[bool] = []
    net.register_forward_pre_hook(lambda module, args: calls.append(torch.is_grad_enabled()))
    x = torch.randn(4 * rows, 3, dtype=torch.float64)
    for step in range(8):
        alone, together = [], []
        for index in range(4):
            part = BatchShare(index, 4, seed=1)
            calls.clear()
            alone.append(loss_fn(part.of(x), step=step, part=part))
            with monkeypatch.context() as patch:
                patch.setattr("torch.distributed.is_initialized", lambda: True)
                patch.setattr("torch.distributed.get_world_size", lambda: 4)
                calls.clear()
                output = loss_fn(part.of(x), step=step, part=part)
            together.append(list(calls))
            torch.testing.assert_close(output.loss, alone[-1].loss)
            torch.testing.assert_close(output.per_sample, alone[-1].per_sample)
        assert together.count(together[0]) == 4
