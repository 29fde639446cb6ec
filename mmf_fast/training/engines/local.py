"""The engine of one process and one device: AdamW, clipping, moving average, mixed precision, torch.compile."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmf_fast.config import Optimizer, Train
from mmf_fast.sampling import choose_device
from mmf_fast.training.ema import EMA
from mmf_fast.training.engines import StepResult


def learning_rate(step: int, config: Optimizer, steps: int) -> float:
    """lr * min(1, (step + 1) / warmup) [* (1 + cos(pi (step - warmup) / (steps - warmup))) / 2 after the warm-up].

    A function of the step alone, so it needs no state in a checkpoint.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class LocalEngine:
    """Implements `mmf_fast.training.engines.Engine` for one process.

    loss_fn: the loss module around `.net`; called as loss_fn(x, step=step, **cond) -> object with .loss and .metrics.
    """

    rank = 0
    world_size = 1

    def __init__(self, loss_fn: nn.Module, optimizer: Optimizer, train: Train) -> None:
        self.config = optimizer
        self.steps = train.steps
        self.device = choose_device(train.device)
        self.loss_fn = loss_fn.to(self.device).train()
        self.net: nn.Module = loss_fn.net  # type: ignore[assignment]
        self.ema = EMA(self.net, optimizer.ema)
        self.optimizer = torch.optim.AdamW(
            loss_fn.parameters(),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self.autocast = train.precision == "bf16"
        if train.precision != "fp32" and self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        if train.compile:
            loss_fn.compile()

    def step(self, x: Tensor, step: int, **cond: Tensor) -> StepResult:
        x = self._move(x)
        cond = {key: self._move(value) for key, value in cond.items()}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            output = self.loss_fn(x, step=step, **cond)
        output.loss.backward()
        norm = nn.utils.clip_grad_norm_(self.loss_fn.parameters(), self.config.clip or math.inf)
        loss = output.loss.detach()
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))

        # The decision to skip stays on the device: fused AdamW leaves weights and moments alone where found_inf is 1
        # (the protocol of torch.amp.GradScaler), so no step waits for the host to look at the loss.
        lr = learning_rate(step, self.config, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.net, step, skip=bad)

        metrics = {key: value.detach() for key, value in output.metrics.items()}
        metrics |= {"loss": loss, "grad_norm": norm.detach(), "lr": torch.tensor(lr, dtype=torch.float64)}
        return StepResult(metrics, bad)

    def _move(self, x: Tensor) -> Tensor:
        if self.device.type == "cuda" and not x.is_cuda:
            x = x.pin_memory()  # a copy from pageable memory would wait for the device
        return x.to(self.device, non_blocking=True)

    def averaged(self) -> nn.Module:
        return self.ema.net

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "ema": self.ema.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.ema.net.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
