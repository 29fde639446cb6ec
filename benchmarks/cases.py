"""What is measured: networks, ways to train them, and the least that each way must cost.

In network evaluations per sample, a backward being two of them, and a share rho of samples with r < t:

    r = t: 3        lambda = 0: 4        lambda > 0: 6        a predicted tangent without a partner: + 1
    bound over flow matching:  1 + rho (1 + 2 [lambda > 0] + [predicted, not paired]) / 3
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.field import FieldLoss
from mmf_fast import MeanFlowLoss, TimeSampler
from mmf_fast.models import DiT, UNet

OURS = "mmf_fast"


@dataclass(frozen=True)
class Case:
    """A way to train.

    share: of samples with r < t; what others do runs the derivative on the whole batch at any share.
    way: "mmf_fast", or one of benchmarks.field.WAYS.  loss: arguments of MeanFlowLoss; of the others only lam, 0 or 1.
    """

    share: float
    loss: dict[str, Any] = field(default_factory=dict)
    way: str = OURS

    @property
    def lam(self) -> float:
        return self.loss.get("lam", 0.0)

    @property
    def predicted(self) -> bool:
        """Whether it needs an evaluation more per sample with r < t, for its tangent."""
        return self.share > 0 and self.loss.get("tangent") == "predicted" and not self.loss.get("paired")

    def evaluations(self) -> float:
        """Network evaluations per sample that the algorithm needs for a step, whatever the way."""
        carried = self.lam if self.loss.get("stochastic") else float(self.lam > 0)
        return 3 + self.share * (1 + 2 * carried + self.predicted)

    def bound(self) -> float:
        """Least time over flow matching."""
        return self.evaluations() / 3

    def build(self, net: nn.Module, **options: Any) -> nn.Module:
        """Its loss module; options override those of MeanFlowLoss."""
        times = TimeSampler(share=self.share)
        if self.way != OURS:
            return FieldLoss(net, self.way, times, exact=self.lam > 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # conditional tangents at lambda > 0 are biased, but cost the same
            return MeanFlowLoss(net, times=times, **{"tangent": "conditional", **self.loss, **options})


PREDICTED: dict[str, Any] = {"tangent": "predicted"}
PAIRED: dict[str, Any] = {"tangent": "predicted", "paired": True}
FLOW_MATCHING = Case(0.0)
CASES = {
    "lambda 0, 100 %": Case(1.0),
    "lambda 0.5, 100 %": Case(1.0, {"lam": 0.5}),
    "lambda 1, 100 %": Case(1.0, {"lam": 1.0}),
    "lambda 0, 50 %": Case(0.5),
    "lambda 1, 50 %": Case(0.5, {"lam": 1.0}),
    "lambda 0, 25 %": Case(0.25),
    "lambda 1, 25 %": Case(0.25, {"lam": 1.0}),
    "lambda 0, 25 %, predicted": Case(0.25, PREDICTED),
    "lambda 0, 25 %, paired": Case(0.25, PAIRED),
    "lambda 0.5 stochastic, 25 %, paired": Case(0.25, {**PAIRED, "lam": 0.5, "stochastic": True}),
    "lambda 1, 25 %, paired": Case(0.25, {**PAIRED, "lam": 1.0}),
    "torch.func.jvp, lambda 0, 100 %": Case(1.0, way="torch.func.jvp"),
    "torch.func.jvp, lambda 1, 100 %": Case(1.0, {"lam": 1.0}, "torch.func.jvp"),
    "second forward, lambda 0, 100 %": Case(1.0, way="second forward"),
    "double backward, lambda 0, 100 %": Case(1.0, way="double backward"),
    "double backward, lambda 1, 100 %": Case(1.0, {"lam": 1.0}, "double backward"),
    "finite differences, lambda 0, 100 %": Case(1.0, way="finite differences"),
}


@dataclass(frozen=True)
class Network:
    """What is trained, on batches of `batch` samples."""

    build: Callable[[], Any]
    batch: int
    shape: tuple[int, ...]

    def make(self, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """With no branch at its zero initialisation, where gradients would not see what goes through it."""
        torch.manual_seed(seed)
        net = self.build()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return net.to(device, dtype)

    def data(self, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.batch, *self.shape, generator=generator).to(device, dtype)


def dit(batch: int, tokens: int, width: int, depth: int, heads: int, patch: int = 2) -> Network:
    """A DiT on square images of `tokens` patches."""
    size = patch * round(tokens**0.5)
    build = functools.partial(DiT, size, channels=3, patch_size=patch, width=width, depth=depth, heads=heads)
    return Network(build, batch, (3, size, size))


def unet(batch: int, size: int, **options: Any) -> Network:
    return Network(
        functools.partial(UNet, size, channels=3, attention_resolutions=(16,), **options), batch, (3, size, size)
    )


CPU_NETWORKS = {
    "DiT": dit(batch=32, tokens=64, width=256, depth=6, heads=4),
    "UNet": unet(batch=8, size=32, base_channels=64, channel_mults=(1, 2), blocks=1),
}
GPU_NETWORKS = {
    "DiT-B/4": dit(batch=256, tokens=256, width=768, depth=12, heads=12, patch=4),
    "DiT-XL/4": dit(batch=128, tokens=256, width=1152, depth=28, heads=16, patch=4),
    "DiT-L, 1024 tokens": dit(batch=32, tokens=1024, width=1024, depth=24, heads=16),
    "UNet": unet(batch=128, size=64, base_channels=128, channel_mults=(1, 2, 3, 4), blocks=2),
}
# Cost against tokens (4,096 in all) and against width (64 tokens), two blocks; heads of 64.
TOKENS = {
    f"DiT, {n} tokens": dit(batch=4096 // n, tokens=n, width=256, depth=2, heads=4) for n in (64, 256, 1024, 4096)
}
WIDTHS = {f"DiT, width {w}": dit(batch=32, tokens=64, width=w, depth=2, heads=w // 64) for w in (128, 512, 1024)}
