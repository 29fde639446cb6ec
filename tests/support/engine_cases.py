"""The problem that engines of all kinds are compared on: a small DiT (or UNet) with classes, guidance and a share of
r < t."""

import json
from pathlib import Path
from typing import Any

import torch
from support.launch import SUPPORT, two_ranks
from torch import Tensor, nn

from mmf_fast import Guidance, LambdaSchedule, MeanFlowLoss, TimeSampler
from mmf_fast.config import Optimizer, Train
from mmf_fast.models import DiT, UNet
from mmf_fast.objective import LossOutput
from mmf_fast.training.engines.local import LocalEngine


class Scaled(MeanFlowLoss):
    """With a parameter of its own, which has no dimension."""

    def __init__(self, net: nn.Module, **options: Any) -> None:
        super().__init__(net, **options)
        self.log_scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, **options: Any) -> LossOutput:  # type: ignore[override]
        output = super().forward(x, **options)
        return output._replace(loss=(-self.log_scale).exp() * output.loss + self.log_scale)


def loss_function(case: dict) -> MeanFlowLoss:
    torch.manual_seed(0)
    common: dict[str, Any] = {"channels": 1, "heads": 2, "num_classes": 3, "recompute": case.get("recompute", False)}
    net: nn.Module
    if case.get("unet"):
        net = UNet(4, base_channels=8, channel_mults=(1, 2), blocks=1, attention_resolutions=(2,), **common)
    else:
        net = DiT(4, patch_size=2, width=16, depth=2, **common)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    lam = LambdaSchedule(kind="linear", warmup=10) if case["lam"] == "curriculum" else case["lam"]
    return (Scaled if case.get("scaled") else MeanFlowLoss)(
        net, times=TimeSampler(share=0.25, start=case.get("start", 0)), lam=lam, paired=case["paired"], p=0.5,
        guidance=Guidance(omega=1.5), weight=case.get("weight", "sample"),
    )  # fmt: skip


def optimizer(kind: Any = "adamw") -> Optimizer:
    # eps: without it Adam blows rounding up to whole steps where the gradient is zero, as that of the keys' bias is.
    return Optimizer(kind=kind, lr=0.01, warmup=3, clip=0.5, weight_decay=0.1, ema=0.8, eps=1e-4)


def train(case: dict) -> Train:
    """zero: of the case, or the file of its stage; without one of them the engine of one process."""
    zero = case.get("zero", f"zero{case['stage']}.json" if "stage" in case else "")
    options = {"accumulate": case.get("accumulate", 1), "compile": case.get("compile", False)}
    return Train(batch=32, steps=case["steps"], device="cpu", zero=zero, **options)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 1, 4, 4, generator=generator), torch.randint(3, (32,), generator=generator)


def on_two_ranks(cases: dict[str, dict], folder: Path) -> dict[str, dict]:
    """What each case left, see engine_ranks.py."""
    done = two_ranks(str(SUPPORT / "engine_ranks.py"), json.dumps(cases), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in cases}


def check_against_one_process(found: dict, case: dict) -> None:
    """Losses, gradient norms and averaged weights of one process on the same global batch; each rank owns a half.

    Sums in another order differ by rounding, which a training amplifies: the bound is twice what rounding the first
    weights once more does to the same training, times the root of the number of steps, for each of them rounds anew.
    """
    engine, whole = _alone(case, rounding=0.0)
    _, twin = _alone(case, rounding=2.0**-24)
    for key in ("loss", "grad_norm"):
        bound = 1e-6 + 2 * case["steps"] ** 0.5 * ((twin[key] - whole[key]) / whole[key]).abs().max()
        torch.testing.assert_close(torch.tensor(found[key]), whole[key], rtol=float(bound), atol=0)
    for name, average in engine.averaged().named_parameters():
        torch.testing.assert_close(found["average"][name], average.data, rtol=1e-4, atol=1e-6)
    count = sum(shape.numel() for shape in engine.shapes.values())
    # at stage 0 moments are whole on each rank, and a checkpoint has a share of them; FSDP2 cuts between rows
    assert case.get("stage") == 0 or abs(found["owned"] / count - 0.5) < 0.1


def _alone(case: dict, rounding: float) -> tuple[LocalEngine, dict[str, Tensor]]:
    """One process, with weights that are off by so much: the engine, and loss and gradient norm of each step."""
    plain = {**case, "recompute": False, "accumulate": 1, "compile": False}
    loss_fn = loss_function(plain)
    with torch.no_grad():
        for parameter in loss_fn.parameters():
            parameter *= 1 + rounding * torch.randn_like(parameter)
    engine = LocalEngine(loss_fn, optimizer(), train(plain), 3)
    x, y = data()
    metrics = [engine.step(x, step, y=y).metrics for step in range(case["steps"])]
    return engine, {key: torch.tensor([float(each[key]) for each in metrics]) for key in ("loss", "grad_norm")}
