"""How right du/dt and the gradient are: pytest benchmarks/test_accuracy.py. Speed never stands without it.

Relative errors against float64, where the truth is MeanFlowLoss over torch.func.jvp with the norms decomposed: another
implementation than the dual numbers, and one that agrees with central differences (tests/objective/test_loss.py).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.cases import OURS, Case, Network, dit, unet
from benchmarks.field import WAYS
from benchmarks.measure import take_gradient
from mmf_fast import jvp
from mmf_fast.models import MLP
from mmf_fast.objective.draws import column

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NETWORKS = {
    "MLP": Network(MLP, 256, (2,)),
    "DiT": dit(batch=4, tokens=64, width=128, depth=4, heads=2),
    "UNet": unet(2, 16, base_channels=32, channel_mults=(1, 2), blocks=1),
}
PRECISIONS = ["fp32", "bf16", *(["tf32"] if DEVICE == "cuda" else []), "fp64"]
EXACT = [OURS, "torch.func.jvp", "double backward"]  # the others have no gradient through du/dt


def parameters() -> list[Any]:
    rows = [(name, p, way, lam) for name in NETWORKS for p in PRECISIONS for way in (OURS, *WAYS) for lam in (0.0, 1.0)]
    rows = [row for row in rows if row[2] in EXACT or row[3] == 0]
    quick = [row for row in rows if row[0] == "DiT" and row[1] != "fp64"]
    marks = {row: [] if row in quick else [pytest.mark.full] for row in rows}
    return [pytest.param(*row, id=" | ".join(map(str, row)), marks=marks[row]) for row in rows]


class Inputs(NamedTuple):
    """Data, noise and 0 <= r <= t <= 1, the same for every row."""

    x: Tensor
    noise: Tensor
    r: Tensor
    t: Tensor

    @staticmethod
    def of(network: Network) -> Inputs:
        x = network.data(DEVICE, torch.float64)
        generator = torch.Generator().manual_seed(2)
        noise, t, r = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (x.shape, len(x), len(x)))
        t = t.sigmoid()
        return Inputs(x, noise.to(DEVICE), (r.sigmoid() * t).to(DEVICE), t.to(DEVICE))


@functools.cache
def truth(name: str, lam: float) -> tuple[Tensor, Tensor]:
    net = NETWORKS[name].make(DEVICE, torch.float64)
    return measured(net, Case(1.0, {"lam": lam}).build(net, jvp="func"), "func", Inputs.of(NETWORKS[name]))


@pytest.mark.parametrize(("network", "precision", "way", "lam"), parameters())
def test_accuracy(benchmark: Any, network: str, precision: str, way: str, lam: float) -> None:
    dtype = torch.float64 if precision == "fp64" else torch.float32
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    net = NETWORKS[network].make(DEVICE, dtype)  # drawn in float32 for both: the same weights
    inputs = Inputs(*(value.to(dtype) for value in Inputs.of(NETWORKS[network])))
    loss_fn = Case(1.0, {"lam": lam}, way).build(net)

    def run() -> tuple[Tensor, Tensor]:
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=precision == "bf16"):
            return measured(net, loss_fn, way, inputs)

    row = benchmark.extra_info
    row |= {"network": network, "precision": precision, "way": way, "lambda": lam}
    benchmark.group = f"accuracy, {network}, {precision}"
    try:
        found = benchmark.pedantic(run, rounds=1)
    except RuntimeError as error:
        if way == OURS:
            raise
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        benchmark.pedantic(lambda: None)
        return
    names = ("du/dt", "gradient")
    pairs = zip(names, found, truth(network, lam), strict=True)
    row["errors"] = errors = {name: float((a - b).norm() / b.norm()) for name, a, b in pairs}
    print(f"\n{network}, {precision}, {way}, lambda {lam:g}: {errors}")
    if way == OURS:
        limit = {"fp64": 1e-10, "fp32": 1e-4, "tf32": 1e-2, "bf16": 1e-1}[precision]
        assert max(errors.values()) < limit, f"{errors} exceed {limit}"


def measured(net: nn.Module, loss_fn: nn.Module, way: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """du/dt along the conditional velocity, and the gradient of the loss in all weights; float64."""
    x, noise, r, t = inputs
    z, v = x + column(t, x) * (noise - x), noise - x

    def u(z: Any, t: Any) -> Any:
        return net(z, r, t)

    if way in WAYS:
        _, du = WAYS[way](u, z, t, v, False)
    else:
        _, du = jvp(u, (z, t), (v, torch.ones_like(t)), False, "func" if way == "func" else "dual")
    loss_fn(x, noise=noise, times=(r, t)).loss.backward()
    return du.detach().double(), take_gradient(net).double()
