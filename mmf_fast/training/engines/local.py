"""The engine of one process and one device: AdamW or an optimizer of one's own, clipping, moving average, mixed
precision, torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmf_fast.devices import choose_device
from mmf_fast.training.engines.base import Engine
from mmf_fast.training.fragments import MOMENTS, Fragment, Saved
from mmf_fast.training.optimizers import MakeOptimizer, build_optimizer, clip_or_skip, made, options_of
from mmf_fast.training.settings import ConfigError, Optimizer, Train

__all__ = ["LocalEngine"]


class LocalEngine(Engine):
    """`Engine` of one process, which owns every parameter as a whole.

    make_optimizer: makes what takes the place of AdamW. The groups keep their learning rates, times the schedule of
        `optimizer.lr`; what they remember is saved as they give it, and their options are part of the identity of the
        run. Each step waits until it is known to be finite.
    """

    def __init__(
        self,
        loss_fn: nn.Module,
        optimizer: Optimizer,
        train: Train,
        seed: int = 0,
        device: torch.device | None = None,
        make_optimizer: MakeOptimizer | None = None,
    ) -> None:
        if optimizer.kind != "adamw":  # the others cannot skip a step without waiting for the host
            raise ConfigError(
                f"optimizer.kind={optimizer.kind} is for DeepSpeed's engine: take train.zero=zero1.json, or "
                "optimizer.kind=adamw"
            )
        super().__init__(loss_fn, optimizer, train, device or choose_device(train.device), seed)
        self.owned = self._own(train)
        owned = {name: each.value for name, each in self.owned.items()}
        self.own = [] if make_optimizer is None else made(make_optimizer, owned)
        self.optimizers = self.own or [build_optimizer(owned.values(), optimizer)]
        self.moments: dict[Tensor, dict[str, Any]] = {} if self.own else self.optimizers[0].state
        if self.own:
            self.options = [options_of(group) for group in self.param_groups]  # before a step changes any
            self.identity = {"optimizer.made": " + ".join(type(each).__name__ for each in self.own)}
            for i, options in enumerate(self.options):
                self.identity |= {f"optimizer.made[{i}].{key}": value for key, value in options.items()}
            self._set_options(self.identity)
        self.start_average()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for each in self.optimizers for group in each.param_groups]

    def _own(self, train: Train) -> dict[str, Fragment]:
        """The trained parameters, which the optimizer steps on."""
        return {name: Fragment(0, each) for name, each in self.model.named_parameters() if name in self.shapes}

    def start_average(self) -> None:
        """Where one process has it all, that of the network lies in the network that is drawn from and saved."""
        if self.world_size > 1 or self.whole is None:
            super().start_average()
            return
        drawn = {f"net.{name}": each.data for name, each in self.whole.named_parameters()}
        self.average = {
            name: drawn[name] if name in drawn else fragment.value.clone() for name, fragment in self.fragments()
        }

    def averaged(self) -> nn.Module:
        if self.world_size > 1 or self.whole is None:
            return super().averaged()
        return self._with_buffers(self.whole)

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss / self.accumulate).backward()

    def update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        owned = [each.value for each in self.owned.values()]
        skips = None if self.own else self.optimizers[0]
        norm, bad = clip_or_skip(owned, skips, self.config.clip, loss, shared=self.world_size > 1)
        left_out = bool(self.own) and bool(bad)  # AdamW leaves a bad step out by itself
        for each in self.optimizers:
            if not left_out:
                each.step()
            each.zero_grad(set_to_none=True)
        return norm, bad

    def fragments(self, key: str | None = None) -> Iterator[tuple[str, Fragment]]:
        for name, (start, value) in self.owned.items():
            if key is None:
                yield name, Fragment(start, value.data)
            elif self.moments.get(value):
                yield name, Fragment(start, self.moments[value][key])

    def steps_of(self, name: str) -> float:
        return float(self.moments.get(self.owned[name].value, {}).get("step", 0.0))

    def state_dict(self) -> dict[str, Any]:
        own = {"own": [each.state_dict() for each in self.own], "own_identity": self.identity} if self.own else {}
        return super().state_dict() | own

    def load_state_dict(self, shares: list[dict[str, Any]]) -> None:
        super().load_state_dict(shares)
        before = shares[0].get("own_identity", {})
        if self.own and before.get("optimizer.made") == self.identity["optimizer.made"]:  # others remember other things
            for each, saved in zip(self.own, shares[0]["own"], strict=True):
                each.load_state_dict(saved)  # which replaces the options, too
            self._set_options(before)

    def _set_options(self, before: dict[str, Any]) -> None:
        """Sets the options of the groups that make_optimizer gave otherwise than `before`. The others stay as they
        are: some optimizers keep in them what they count and estimate."""
        for i, (group, options) in enumerate(zip(self.param_groups, self.options, strict=True)):
            named = {key: f"optimizer.made[{i}].{key}" for key in options}
            group |= {key: value for key, value in options.items() if before.get(named[key], ...) != value}
            group["relative_lr"] = options["lr"] / self.config.lr

    def write(self, saved: Saved) -> None:
        for each in self.optimizers:
            each.state.clear()
        for name, (start, value) in self.owned.items():

            def part(key: str, name: str = name, start: int = start, value: Tensor = value) -> Tensor:
                return saved.part(name, key, start, value.numel()).view_as(value)

            value.data.copy_(part("weight"))
            if not self.own and (steps := saved.steps(name)):
                moments = {key: torch.zeros_like(value.data).copy_(part(key)) for key in MOMENTS}
                self.moments[value] = {"step": torch.tensor(steps, device=value.device), **moments}
