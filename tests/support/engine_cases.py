"""The problem that engines of all kinds are compared on: a small DiT with classes, guidance and a share of r < t."""

from typing import Any

import torch
from torch import Tensor

from mmf_fast import Guidance, LambdaSchedule, MeanFlowLoss, TimeSampler
from mmf_fast.config import Optimizer, Train
from mmf_fast.models import DiT


def loss_function(case: dict) -> MeanFlowLoss:
    torch.manual_seed(0)
    net = DiT(
        4, channels=1, patch_size=2, width=16, depth=2, heads=2, num_classes=3, recompute=case.get("recompute", False)
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    lam = LambdaSchedule(kind="linear", warmup=10) if case["lam"] == "curriculum" else case["lam"]
    return MeanFlowLoss(
        net, times=TimeSampler(share=0.25), lam=lam, paired=case["paired"], p=0.5, guidance=Guidance(omega=1.5),
        weight=case.get("weight", "sample"),
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
