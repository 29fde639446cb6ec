"""Starting a new run from weights that are there: those of another run, or of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mmf_fast.models import load_pretrained
from mmf_fast.training.checkpoint import Checkpoints
from mmf_fast.training.checkpoint import read as read_checkpoint
from mmf_fast.training.fragments import Saved
from mmf_fast.training.settings import ConfigError

__all__ = ["start_from"]


def start_from(
    loss_fn: nn.Module, source: str | Path, part: Literal["average", "weights", "state"]
) -> list[dict[str, Any]] | None:
    """Gives the loss module the weights of `source`: a run folder, or a safetensors file with the network's state dict.

    part: of a run, "average": the exported moving average of the network; "weights": those of its newest checkpoint, of
        the whole loss module; "state": these, their moving average and the optimizer's moments, which are returned for
        the engine to take.
    Raises ConfigError where there is nothing of the kind, or it does not fit.
    """
    source = Path(source)
    net: Any = loss_fn.net
    try:
        if source.is_file():
            net.load_state_dict(load_file(source))
        elif part == "average":
            load_pretrained(source, net)
        else:
            found = Checkpoints(source / "checkpoints").newest_whole()
            if found is None:
                raise ValueError("it has no checkpoint")
            state = read_checkpoint(found, check=False)
            shares = [state["engine"], *state["shares"]]
            return shares if part == "state" else _take_weights(loss_fn, shares)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"train.init={source}: {' '.join(str(error).split())}; give a run folder, or a safetensors "
            "file with the state dict of this network"
        ) from error
    return None


@torch.no_grad()
def _take_weights(loss_fn: nn.Module, shares: list[dict[str, Any]]) -> None:
    trained = {name: each for name, each in loss_fn.named_parameters() if each.requires_grad}
    saved = Saved(shares, {name: each.shape for name, each in trained.items()})
    for name, parameter in trained.items():
        parameter.copy_(saved.whole(name, "weight"))
    for name, buffer in loss_fn.named_buffers():
        if name in saved.buffers:
            buffer.copy_(saved.buffers[name])
