"""Starting a new run from weights that are there: those of another run, or of a file."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mmf_fast.models import load_pretrained
from mmf_fast.training.checkpoint import CheckpointError, Checkpoints
from mmf_fast.training.checkpoint import read as read_checkpoint
from mmf_fast.training.fragments import set_constants
from mmf_fast.training.settings import ConfigError

__all__ = ["start_from", "take_constants"]


def start_from(
    loss_fn: nn.Module, source: str | Path, part: Literal["average", "weights", "state"]
) -> list[dict[str, Any]] | None:
    """Gives the network the weights of `source`, a run folder or a safetensors file with its state dict; or returns
    what the engine is to take of a run.

    part: of a run, "average": the exported moving average of the network; "weights": those of its newest checkpoint, of
        the whole loss module; "state": these, their moving average and the optimizer's moments. The latter two are for
        the engine.
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
            set_constants(net, shares[0].get("constants", {}))
            if part == "weights":
                return [_weights_alone(share) for share in shares]
            # The moving average goes on as after so many steps: at a start it would forget what it holds.
            return [{**share, "earlier": share.get("earlier", 0.0) + state["step"]} for share in shares]
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"train.init={source}: {' '.join(str(error).split())}; give a run folder, or a safetensors "
            "file with the state dict of this network"
        ) from error
    return None


def _weights_alone(share: dict[str, Any]) -> dict[str, Any]:
    """As at a start: the moving average begins with them, and the optimizer has made no step."""
    fragments = {
        name: {"start": each["start"], "weight": each["weight"], "average": each["weight"], "steps": 0.0}
        for name, each in share["fragments"].items()
    }
    return {"fragments": fragments, "buffers": share["buffers"], "earlier": 0.0}


def take_constants(net: nn.Module, checkpoints: Checkpoints) -> None:
    """Of the newest checkpoint that can be read, before an engine shares the network out. All have the same."""
    path = checkpoints.newest()
    with suppress(CheckpointError):  # a damaged one: `newest_whole` finds another, and says so
        if path is not None:
            set_constants(net, read_checkpoint(path, check=False)["engine"].get("constants", {}))
