"""One training step against the flow-matching step of the same network: pytest benchmarks/step --benchmark-only

Each case is timed in turn with flow matching in the same process (baseline, case, baseline, case, ...), so that a noisy
machine disturbs both alike; the ratio is the median of the pairs. Both run the same code with the same batch, eager or
compiled, and a step is loss and backward. The bound counts network evaluations (a backward is 2 forwards):

    r = t: 3        lambda = 0: 4        lambda > 0: 6        a predicted tangent without a partner: + 1
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from mmf_fast import MeanFlowLoss, TimeSampler
from mmf_fast.models import DiT, UNet

ROUNDS = 10


@dataclass(frozen=True)
class Case:
    """A way to train: the share of r < t and the arguments of MeanFlowLoss."""

    share: float
    loss: dict[str, Any] = field(default_factory=dict)

    def bound(self) -> float:
        """Network evaluations per sample over those of flow matching."""
        lam = self.loss.get("lam", 0.0)
        carried = lam if self.loss.get("stochastic") else float(lam > 0)
        predicted = self.loss["tangent"] == "predicted" and not self.loss.get("paired")
        return 1 + self.share * (1 + 2 * carried + predicted) / 3


CONDITIONAL = {"tangent": "conditional"}
PREDICTED = {"tangent": "predicted"}
PAIRED = {"tangent": "predicted", "paired": True}
CASES = {
    "lambda 0, 100 %": Case(1.0, CONDITIONAL),
    "lambda 1, 100 %": Case(1.0, {**CONDITIONAL, "lam": 1.0}),
    "lambda 0, 25 %": Case(0.25, CONDITIONAL),
    "lambda 1, 25 %": Case(0.25, {**CONDITIONAL, "lam": 1.0}),
    "lambda 0, 25 %, predicted": Case(0.25, PREDICTED),
    "lambda 0, 25 %, paired": Case(0.25, PAIRED),
    "lambda 1, 25 %, paired": Case(0.25, {**PAIRED, "lam": 1.0}),
    "lambda 0.5 stochastic, 25 %, paired": Case(0.25, {**PAIRED, "lam": 0.5, "stochastic": True}),
    "torch.func.jvp, lambda 0, 100 %": Case(1.0, {**CONDITIONAL, "jvp": "func"}),
    "torch.func.jvp, lambda 1, 100 %": Case(1.0, {**CONDITIONAL, "lam": 1.0, "jvp": "func"}),
}
# Compiling takes about a minute a case, so the quick profile compiles those that carry the claim.
COMPILED = [name for name in CASES if "predicted" not in name and "stochastic" not in name and "func" not in name]


def dit() -> nn.Module:
    return DiT(16, channels=3, patch_size=2, width=256, depth=6, heads=4)  # 64 tokens


def unet() -> nn.Module:
    return UNet(32, channels=3, base_channels=64, channel_mults=(1, 2), blocks=1, attention_resolutions=(16,))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "DiT": (dit, 32, (3, 16, 16)),
    "UNet": (unet, 4, (3, 32, 32)),
}


def step(net: nn.Module, x: torch.Tensor, case: Case, compiled: bool) -> Callable[[], None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # conditional tangents at lambda > 0 are biased, but cost the same
        loss_fn = MeanFlowLoss(net, times=TimeSampler(share=case.share), **case.loss)
    if compiled:
        loss_fn.compile()
    counter = iter(range(10**9))

    def run() -> None:
        net.zero_grad(set_to_none=True)
        loss_fn(x, step=next(counter)).loss.backward()
        if x.is_cuda:
            torch.cuda.synchronize()

    return run


@pytest.fixture(scope="module")
def workloads() -> dict[str, Any]:
    """Network, data and baseline of each kind, made once."""
    made: dict[str, Any] = {}

    def get(kind: str, compiled: bool) -> tuple[nn.Module, torch.Tensor, Callable[[], None]]:
        if (kind, compiled) not in made:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            build, batch, shape = NETWORKS[kind]
            torch.manual_seed(0)
            net = build().to(device)
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))  # no branch at its zero initialisation
            x = torch.randn(batch, *shape, device=device)
            made[kind, compiled] = net, x, step(net, x, Case(0.0, CONDITIONAL), compiled)
        return made[kind, compiled]

    return get  # type: ignore[return-value]


def parameters() -> list[Any]:
    eager = [(kind, "eager", name) for kind in NETWORKS for name in CASES]
    compiled = [("DiT", "compiled", name) for name in COMPILED]
    return [pytest.param(*row, id=" | ".join(row)) for row in eager + compiled]


@pytest.mark.parametrize(("kind", "mode", "name"), parameters())
def test_step(benchmark: Any, workloads: Any, kind: str, mode: str, name: str) -> None:
    net, x, baseline = workloads(kind, mode == "compiled")
    case = CASES[name]
    run = step(net, x, case, mode == "compiled")
    for warm_up in (baseline, run, run, baseline):
        warm_up()
    flow_matching: list[float] = []

    def timed_baseline() -> None:
        start = time.perf_counter()
        baseline()
        flow_matching.append(time.perf_counter() - start)

    benchmark.group = f"{kind}, {mode}"
    benchmark.pedantic(run, setup=timed_baseline, rounds=ROUNDS)
    pairs = [ours / theirs for ours, theirs in zip(benchmark.stats.stats.data, flow_matching, strict=True)]
    benchmark.extra_info |= {
        "ratio to flow matching": statistics.median(pairs),
        "quartiles of the ratio": statistics.quantiles(pairs, n=4),
        "bound": case.bound(),
        "flow matching, median s": statistics.median(flow_matching),
        "network": net.config,
        "batch": list(x.shape),
        "loss": {"share": case.share, **case.loss},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if x.is_cuda else "cpu",
    }
    print(f"\n{kind}, {mode}: {name}: {statistics.median(pairs):.2f} (bound {case.bound():.2f})")
