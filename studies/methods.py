"""Flow matching and average velocities side by side, at the same cost: what the studies beyond images compare."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmf_fast import MeanFlowLoss, TimeSampler
from mmf_fast.sampling import Sampler
from studies.rows import Setting

__all__ = ["EVALUATIONS", "FLOW_MATCHING", "METHODS", "loss_of", "sampler_of", "steps_within", "title"]

FLOW_MATCHING: dict[str, Any] = {"method": "flow matching"}
METHODS: tuple[dict[str, Any], ...] = (
    FLOW_MATCHING,
    {"method": "mmf_fast", "lam": 0.0},
    {"method": "mmf_fast", "lam": 1.0},
)
EVALUATIONS = {"flow matching": (1, 2, 4, 8, 16, 32), "mmf_fast": (1, 2, 4)}  # of the network, for a sample


def title(setting: Setting) -> str:
    return "flow matching" if setting["method"] == "flow matching" else f"mmf_fast, lambda {setting['lam']:g}"


def loss_of(setting: Setting, net: nn.Module) -> MeanFlowLoss:
    """Flow matching is all instants; mmf_fast has half of the rows as intervals, paired with the others."""
    if setting["method"] == "flow matching":
        return MeanFlowLoss(net, times=TimeSampler(share=0.0), p=0.0)
    return MeanFlowLoss(net, times=TimeSampler(share=0.5), lam=setting["lam"], paired=True, p=0.0)


def steps_within(loss_fn: MeanFlowLoss, batch: int, forwards: int) -> int:
    """How many steps cost as much as so many evaluations of one sample, backward included: the same computer time for
    every method, whatever else the computer does meanwhile (see MeanFlowLoss.forwards)."""
    return round(forwards / loss_fn.forwards(batch))


def sampler_of(setting: Setting) -> Sampler:
    """Flow matching knows velocities alone, so its steps are Euler's."""
    return "euler" if setting["method"] == "flow matching" else "average"
