"""One optimisation step, the moving average and the state, as they are for every engine."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmf_fast.contract import Paths, per_sample, take, to_device
from mmf_fast.objective import BatchShare
from mmf_fast.objective.compiled import better_by_block, blocks_of, compile_blocks
from mmf_fast.training.ema import move_average
from mmf_fast.training.fragments import MOMENTS, Fragment, Saved, constants_of
from mmf_fast.training.settings import ConfigError, Optimizer, Train, learning_rate
from mmf_fast.training.timing import Phases

__all__ = ["Engine", "StepResult"]


class StepResult(NamedTuple):
    """What one step gave. Reading a tensor waits for the device, so the trainer does it only where it logs.

    metrics: detached 0-d tensors, at least "loss" (before the step), "grad_norm" (before clipping) and "lr".
    skipped: 0-d bool tensor: the loss or its gradient was not finite, and nothing was changed.
    """

    metrics: dict[str, Tensor]
    skipped: Tensor


class Engine:
    """One process' share of the training. Every rank calls every method, in the same order.

    loss_fn: the loss module around `.net`; called as loss_fn(x, step=step, part=part, **cond) -> object with .loss and
    .metrics.  seed: of what the loss draws.

    An engine of a kind wraps `self.model`, calls `start_average`, and says how it goes backward and steps (`backward`,
    `update`, `param_groups`) and what it owns (`fragments`, `steps_of`, `write`).
    """

    rank = 0
    world_size = 1
    identity: dict[str, Any] = {}  # flat, of what a run that goes on must agree in, beside its settings
    cuda_graphs = False  # whether the loss is replayed, and each step writes where the last one did
    gathers = False  # whether it fetches weights between the blocks of the network, so that no graph can hold them all

    def __init__(self, loss_fn: nn.Module, optimizer: Optimizer, train: Train, device: torch.device, seed: int) -> None:
        check_trainable(loss_fn)
        self.config, self.steps, self.accumulate, self.seed = optimizer, train.steps, train.accumulate, seed
        self.device, self.phases = device, Phases(device)  # phases: `step` times its share of each
        self.autocast = train.precision == "bf16"
        set_precision(train.precision, device)
        self.model: Any = loss_fn.to(device).train()
        self.earlier = 0.0  # steps of the run whose moving average this one goes on with
        self.shared: tuple[str, ...] = getattr(loss_fn, "shared", ())
        self.net: nn.Module = loss_fn.net  # type: ignore[assignment]
        if self.world_size > 1:  # all begin as the first does
            for tensor in [*loss_fn.parameters(), *loss_fn.buffers()]:
                whole = tensor.data.contiguous()
                dist.broadcast(whole, src=0)
                tensor.data.copy_(whole)
        self.shapes = {name: each.shape for name, each in loss_fn.named_parameters() if each.requires_grad}
        saved = loss_fn.state_dict().keys()
        buffers = {name: buffer for name, buffer in loss_fn.named_buffers() if name in saved}
        self.holders = {name: loss_fn.get_submodule(name.rpartition(".")[0]) for name in buffers}
        self.good = {name: buffer.clone() for name, buffer in buffers.items()}  # of the last step that was finite
        self.whole = copied(self.net).eval().requires_grad_(False) if self.rank == 0 else None
        if self.whole is not None and self.world_size > 1:  # until it is drawn from
            self.whole.cpu()
        if train.compile:
            self._compile(loss_fn, train)

    def _compile(self, loss_fn: Any, train: Train) -> None:
        blocks, mode = blocks_of(self.net, train.blocks), train.compile_mode
        self.cuda_graphs = self.device.type == "cuda" and mode in ("reduce-overhead", "max-autotune")
        if train.compile is True or (train.compile == "auto" and not self.gathers and not better_by_block(blocks)):
            loss_fn.compile(mode=mode)
        elif blocks:
            compile_blocks(blocks, mode=mode)
        else:
            raise ConfigError(
                f"train.compile={train.compile}: {type(self.net).__name__} has no {' or '.join(train.blocks)}; name "
                "its modules by train.blocks, or set train.compile=true"
            )

    @property
    def buffers(self) -> dict[str, Tensor]:
        """As they are now: a network may put others in their place. Those of another shape, as caches that grow, are
        its own affair."""
        now = {name: getattr(holder, name.rpartition(".")[2]) for name, holder in self.holders.items()}
        return {name: buffer for name, buffer in now.items() if buffer.shape == self.good[name].shape}

    def start_average(self) -> None:
        self.average = {name: fragment.value.clone() for name, fragment in self.fragments()}

    # ---- one step ----------------------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of its optimizers."""
        raise NotImplementedError

    def step(self, x: Tensor, step: int, **cond: Tensor) -> StepResult:
        """One update on this rank's samples x (B, *shape), which follow those of the rank before it in the global
        batch, with their rows of cond; `step` counts from 0 and sets learning rate, lambda, noise and times."""
        with self.phases("data"):
            x = x.to(self.device, non_blocking=True)
            cond = to_device(cond, self.device)
        paths = per_sample(cond, len(x), self.shared)
        if self.accumulate > 1:
            check_parts(cond, paths, len(x) // self.accumulate, self.shared)
        lr = learning_rate(step, self.config, self.steps)
        for group in self.param_groups:
            group["lr"] = lr * group.get("relative_lr", 1.0)
        found: list[dict[str, Tensor]] = []
        if self.cuda_graphs:  # once: what a part gives, gradients too, must not be written over before the step is made
            torch.compiler.cudagraph_mark_step_begin()
        for part, rows in parts(len(x), self.accumulate, self.rank, self.world_size, self.seed):
            with self.phases("loss"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                output = self.model(x[rows], step=step, part=part, **take(cond, rows, paths))
            if not (hasattr(output, "loss") and hasattr(output, "metrics")):
                raise ConfigError(
                    f"the loss module returned a {type(output).__name__}: return an object with .loss (0-d) and "
                    ".metrics ({name: number}), such as mmf_fast.objective.LossOutput"
                )
            named = {**output.metrics, "loss": output.loss}
            found.append({key: torch.as_tensor(value).detach() for key, value in named.items()})
            with self.phases("backward"):
                self.backward(output.loss, last=len(found) == self.accumulate)
        with self.phases("optimizer"):
            metrics = self._mean(found)
            norm, skipped = self.update(metrics["loss"])
            self._move_average(step, skipped)
        lr = self.param_groups[0]["lr"]
        return StepResult(metrics | {"grad_norm": norm, "lr": torch.tensor(lr, dtype=torch.float64)}, skipped)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of loss / accumulate; last: of the passes of a step."""
        raise NotImplementedError

    def update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the optimizer, or none where gradient or loss is not finite; the norm before clipping, and
        whether it was left out (0-d tensors, the same on all ranks)."""
        raise NotImplementedError

    def _mean(self, found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Metrics over accumulation steps and ranks, in one reduction."""
        stacks = {key: torch.stack([each[key] for each in found]) for key in found[0]}
        metrics = {key: (each if each.is_floating_point() else each.float()).mean() for key, each in stacks.items()}
        if self.world_size == 1:
            return metrics
        mean = torch.stack([value.float().to(self.device) for value in metrics.values()]) / self.world_size
        dist.all_reduce(mean)
        return dict(zip(metrics, mean, strict=True))

    @torch.no_grad()
    def _move_average(self, step: int, skipped: Tensor) -> None:
        """Of the weights; buffers are as they are, or as they were before a step that is left out."""
        owned = dict(self.fragments())
        average, values = [self.average[name] for name in owned], [fragment.value for fragment in owned.values()]
        if average:  # a rank may own nothing; what an offloaded optimizer owns is on the CPU
            move_average(average, values, self.config.ema, step + self.earlier, skipped.to(average[0].device))
        for name, buffer in self.buffers.items():
            buffer.copy_(torch.where(skipped, self.good[name], buffer))
            self.good[name].copy_(buffer)

    def averaged(self) -> nn.Module:
        """The network with its averaged weights, in eval mode, on rank 0; on the others, the network as it is, which
        nobody should use."""
        starts = {name: fragment.start for name, fragment in self.fragments()}
        own = {} if self.whole is None else dict(self.whole.named_parameters())
        for name, shape in self.shapes.items():
            if not name.startswith("net."):
                continue
            flat = torch.zeros(shape.numel(), device=self.device)
            if name in self.average:
                start, value = starts[name], self.average[name].flatten()
                flat[start : start + value.numel()] = value
            dist.reduce(flat, dst=0)
            if self.whole is not None:
                own[name.removeprefix("net.")].data.copy_(flat.view(shape))
        return self.net if self.whole is None else self._with_buffers(self.whole)

    def _with_buffers(self, whole: nn.Module) -> nn.Module:
        for name, buffer in whole.named_buffers():
            if f"net.{name}" in self.good:
                buffer.copy_(self.good[f"net.{name}"])
        return whole.to(self.device)

    # ---- state: see training/fragments.py ----------------------------------------------------------------------------

    def fragments(self, key: str | None = None) -> Iterator[tuple[str, Fragment]]:
        """This rank's fragments of the trained weights, or of a moment of the optimizer, of which it has made a step;
        none where it owns nothing."""
        raise NotImplementedError

    def steps_of(self, name: str) -> float:
        """How many steps the optimizer has made on a parameter."""
        raise NotImplementedError

    def write(self, saved: Saved) -> None:
        """Sets this rank's weights and moments."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """This rank's share, as tensors and plain containers only: it must load with weights_only=True."""
        share = {
            name: {
                "start": start,
                "weight": value.flatten(),
                "average": self.average[name].flatten(),
                "steps": self.steps_of(name),
            }
            for name, (start, value) in self.fragments()
        }
        for key in MOMENTS:
            for name, fragment in self.fragments(key):
                share[name][key] = fragment.value.flatten()
        found = {"fragments": share, "buffers": {}, "constants": {}, "earlier": self.earlier}
        if self.whole is not None:
            found |= {"buffers": dict(self.good), "constants": constants_of(self.whole, self.shapes)}
        return found

    @torch.no_grad()
    def load_state_dict(self, shares: list[dict[str, Any]]) -> None:
        """Takes what all ranks returned from state_dict, in their order, however many they were and of any engine.
        Raises ValueError where they are of another loss module."""
        saved = Saved(shares, self.shapes)
        if saved.buffers.keys() != self.good.keys():
            raise ValueError(f"buffers {sorted(saved.buffers.keys() ^ self.good.keys())} are not in both")
        self.earlier = saved.earlier
        self.write(saved)
        for name, (start, value) in self.fragments():
            self.average[name].copy_(saved.part(name, "average", start, value.numel()).view_as(value))
        for name, buffer in self.buffers.items():
            buffer.copy_(saved.buffers[name])
            self.good[name].copy_(buffer)


def set_precision(precision: str, device: torch.device) -> None:
    """Whether a GPU may round the float32 factors of products and convolutions to TF32. Both switches belong to the
    process: PyTorch lets cuDNN round unless it is told, and an engine before this one may have left them otherwise."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"


def check_trainable(loss_fn: nn.Module) -> None:
    """Raises ConfigError for a network that no optimizer can step on."""
    parameters = dict(loss_fn.named_parameters())
    for name, each in parameters.items():
        if isinstance(each, nn.parameter.UninitializedParameter):
            raise ConfigError(f"{name} has no shape yet: call the network once, for instance on zeros, before training")
        if each.requires_grad and each.dtype in (torch.float16, torch.bfloat16):
            raise ConfigError(f"{name} is {each.dtype}: give the network in float32, and set train.precision=bf16")
    for name, module in loss_fn.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            raise ConfigError(f"{name} has sparse gradients, which cannot be clipped: build it with sparse=False")
    if not any(each.requires_grad for each in parameters.values()):
        raise ConfigError("nothing to train: no parameter of loss_fn has requires_grad")


def copied(net: nn.Module) -> nn.Module:
    """Raises ConfigError for a network that cannot be copied."""
    try:
        return copy.deepcopy(net)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"{type(net).__name__} cannot be copied for its moving average ({' '.join(str(error).split())[:150]}): use "
            "torch.nn.utils.parametrizations in place of old weight_norm, and keep locks and handles out of it"
        ) from error


def parts(rows: int, accumulate: int, rank: int, world_size: int, seed: int) -> Iterator[tuple[BatchShare, slice]]:
    """The parts of a global batch that rank `rank` takes in turn, and where they lie in its own `rows` of it."""
    own = rows // accumulate
    for i in range(accumulate):
        yield BatchShare(rank * accumulate + i, world_size * accumulate, seed), slice(i * own, (i + 1) * own)


def check_parts(cond: Any, paths: Paths, rows: int, shared: Collection[str]) -> None:
    """Raises ConfigError where the loss, which sees a part of the batch alone, would give each of its `rows` samples a
    row of what belongs to all. A part of one sample has the same row either way."""
    found = per_sample(take(cond, slice(rows), paths), rows, shared)
    for path in found if rows > 1 else ():
        if path not in paths:
            name = next(key for key in reversed(path) if isinstance(key, str))
            raise ConfigError(
                f"the condition {name} belongs to all samples, but has {rows} rows, as a part of the batch has: name "
                f"it in shared= of the loss (loss.shared=[{name}]), or set another train.accumulate"
            )
