"""Builds AdamW, of PyTorch or Apex (DeepSpeed's are built in its engine); clips or skips before its step."""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmf_fast.training.plain import plain, readable
from mmf_fast.training.settings import ConfigError, Optimizer

__all__ = ["MakeOptimizer", "adam_options", "build_optimizer", "clip_or_skip", "made", "options_of"]

# One's own optimizers, of the trained parameters and their names in the loss module, which begin with "net.".
MakeOptimizer: TypeAlias = Callable[
    [list[tuple[str, nn.Parameter]]], torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
]


def adam_options(config: Optimizer) -> dict[str, Any]:
    """What all kinds take, under the same names."""
    return {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}


def build_optimizer(parameters: Iterable[Tensor], config: Optimizer) -> torch.optim.Optimizer:
    """PyTorch's AdamW or Apex's, by `config.kind`. Raises ConfigError, naming what to install, if it is not here."""
    if config.kind == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **adam_options(config))
    try:
        from apex.optimizers import FusedAdam  # NVIDIA's; the "apex" of PyPI is another project
    except ImportError as error:
        raise ConfigError(
            "optimizer.kind=apex needs NVIDIA Apex, built from github.com/NVIDIA/apex (the PyPI package apex is "
            "another project); or take optimizer.kind=adamw"
        ) from error
    return FusedAdam(parameters, adam_w_mode=True, **adam_options(config))


def made(make: MakeOptimizer, parameters: dict[str, Tensor]) -> list[torch.optim.Optimizer]:
    """One's own optimizers, the numbers of their groups as Python's. Raises ConfigError where they are none, or do not
    step on each of these tensors once, and ValueError where no checkpoint could hold them."""
    found: Any = make(list(parameters.items()))  # type: ignore[arg-type]
    optimizers = list(found) if isinstance(found, (list, tuple)) else [found]
    for each in optimizers:
        if not isinstance(each, torch.optim.Optimizer):
            raise ConfigError(
                f"make_optimizer gave a {type(each).__name__}: return torch.optim.Optimizers, one or more"
            )
        closure = inspect.signature(each.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ConfigError(
                f"make_optimizer gave a {type(each).__name__}, whose step computes the loss again by a closure: take "
                "one that steps on the gradients as they are, such as torch.optim.AdamW"
            )
    taken = Counter(each for optimizer in optimizers for group in optimizer.param_groups for each in group["params"])
    for name, each in parameters.items():
        if taken[each] != 1:
            raise ConfigError(f"make_optimizer: {name} is in {taken[each]} groups of its optimizers; put it into one")
    if len(taken) > len(parameters):
        raise ConfigError("make_optimizer: its optimizers step on tensors that it was not given; leave them out")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group |= plain(group) | {"lr": float(group["lr"])}
        readable(optimizer.state_dict(), type(optimizer).__name__)
    return optimizers


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    """The numbers and words among the options of a parameter group, also in tuples."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(map(is_plain, value))
        return value is None or isinstance(value, (bool, int, float, str))

    return {key: each for key, each in group.items() if key not in ("params", "param_names") and is_plain(each)}


def clip_or_skip(
    parameters: Iterable[Tensor],
    optimizer: torch.optim.Optimizer | None,
    largest: float,
    *losses: Tensor,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scales the whole gradient down to the norm `largest` (0: leaves it), or has the fused AdamW skip its next step
    (None: the caller does).

    Returns the norm before, and whether it or one of `losses` is not finite: 0-d tensors, float and bool. The decision
    stays on the device: AdamW leaves weights and moments alone where found_inf is 1 (the protocol of
    torch.amp.GradScaler), so no step waits for the host to look.
    shared: each rank has other parameters, and the norm is that of all.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None]).detach()
    if shared:
        square = norm.double().square().to(losses[0].device)
        dist.all_reduce(square)
        norm = square.sqrt().float()
    nn.utils.clip_grads_with_norm_(parameters, largest or math.inf, norm)
    bad = ~torch.stack([x.isfinite() for x in (norm, *losses)]).all()
    if optimizer is not None:
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
    return norm, bad
