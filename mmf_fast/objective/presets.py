"""The members of the family, as arguments of the one loss."""

from __future__ import annotations

from typing import Any

from mmf_fast.objective.schedule import LambdaSchedule
from mmf_fast.objective.times import TimeSampler

__all__ = ["preset"]

PRESETS: dict[str, dict[str, Any]] = {
    "flow_matching": {"times": TimeSampler(share=0.0), "lam": 0.0},
    "meanflow": {
        "times": TimeSampler(share=0.25, t="logit_normal", t_mean=-0.4, t_std=1.0, r="sorted"),
        "lam": 0.0,
        "tangent": "conditional",
    },
    "imf": {
        "times": TimeSampler(share=0.5, t="logit_normal", t_mean=-0.4, t_std=1.0, r="sorted"),
        "lam": 0.0,
        "tangent": "predicted",
        "paired": True,
        "c": 0.01,
    },
    "mmf": {
        "times": TimeSampler(share=0.25),
        "lam": LambdaSchedule(kind="linear", warmup=10_000),
        "tangent": "predicted",
        "paired": True,
    },
    "consistency": {"times": TimeSampler(share=1.0, r="zero"), "lam": 0.0, "tangent": "conditional"},
}


def preset(name: str, **overrides: Any) -> dict[str, Any]:
    """Arguments of MeanFlowLoss for one of PRESETS, with those given in place of its own:
    MeanFlowLoss(net, **preset("meanflow", p=0.75)). Raises ValueError for another name.

    "imf" is improved MeanFlow (arXiv 2512.02012) without the auxiliary head; its guidance is a range of scales, as
    guidance=Guidance(omega=(1, 8), t_min=(0, 0.5), t_max=(0.5, 1)).
    """
    if name not in PRESETS:
        raise ValueError(f"unknown objective {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name] | overrides
