"""The engine of one process and one device: AdamW, clipping, moving average, mixed precision, torch.compile."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmf_fast.devices import choose_device
from mmf_fast.objective import BatchShare
from mmf_fast.training.ema import EMA
from mmf_fast.training.engines.base import StepResult
from mmf_fast.training.optimizers import adam_options, clip_or_skip
from mmf_fast.training.settings import ConfigError, Optimizer, Train, learning_rate
from mmf_fast.training.timing import Phases


def parts(rows: int, accumulate: int, rank: int, world_size: int, seed: int) -> Iterator[tuple[BatchShare, slice]]:
    """The parts of a global batch that rank `rank` takes in turn, and where they lie in its own rows of it."""
    own = rows // accumulate
    for i in range(accumulate):
        yield BatchShare(rank * accumulate + i, world_size * accumulate, seed), slice(i * own, (i + 1) * own)


class LocalEngine:
    """Implements `mmf_fast.training.engines.Engine` for one process.

    loss_fn: the loss module around `.net`; called as loss_fn(x, step=step, part=part, **cond) -> object with .loss and
    .metrics.  seed: of what the loss draws.
    """

    rank = 0
    world_size = 1

    def __init__(self, loss_fn: nn.Module, optimizer: Optimizer, train: Train, seed: int = 0) -> None:
        if optimizer.kind != "adamw":  # the others cannot skip a step without waiting for the host
            raise ConfigError(f"optimizer.kind={optimizer.kind} needs train.zero, for instance train.zero=zero1.json")
        self.config = optimizer
        self.steps, self.accumulate, self.seed = train.steps, train.accumulate, seed
        self.device = choose_device(train.device)
        self.phases = Phases(self.device)
        self.loss_fn = loss_fn.to(self.device).train()
        self.net: nn.Module = loss_fn.net  # type: ignore[assignment]
        self.ema = EMA(self.net, optimizer.ema)
        self.optimizer = torch.optim.AdamW(loss_fn.parameters(), fused=True, **adam_options(optimizer))
        self.autocast = train.precision == "bf16"
        if train.precision != "fp32" and self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        if train.compile:
            loss_fn.compile()

    def step(self, x: Tensor, step: int, **cond: Tensor) -> StepResult:
        with self.phases("data"):
            x = x.to(self.device, non_blocking=True)
            cond = {key: value.to(self.device, non_blocking=True) for key, value in cond.items()}
        found: list[dict[str, Tensor]] = []
        for part, rows in parts(len(x), self.accumulate, 0, 1, self.seed):
            with self.phases("loss"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                output = self.loss_fn(x[rows], step=step, part=part, **{key: y[rows] for key, y in cond.items()})
            with self.phases("backward"):
                (output.loss / self.accumulate).backward()
            found.append({**output.metrics, "loss": output.loss.detach()})
        with self.phases("optimizer"):
            return self._update(found, step)

    def _update(self, found: list[dict[str, Tensor]], step: int) -> StepResult:
        metrics = {key: torch.stack([each[key].detach() for each in found]).mean() for key in found[0]}
        norm, bad = clip_or_skip(self.loss_fn.parameters(), self.optimizer, self.config.clip, metrics["loss"])
        lr = learning_rate(step, self.config, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.net, step, skip=bad)

        metrics |= {"grad_norm": norm, "lr": torch.tensor(lr, dtype=torch.float64)}
        return StepResult(metrics, bad)

    def averaged(self) -> nn.Module:
        return self.ema.net

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "ema": self.ema.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, shares: list[dict[str, Any]]) -> None:
        (state,) = shares
        self.net.load_state_dict(state["net"])
        self.ema.net.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
