"""What a checkpoint holds, whichever engine wrote it: fragments of the trained parameters, and buffers.

    share of a rank   {"fragments": {name: fragment}, "buffers": {name: tensor}, "constants": {name: tensor}, "earlier"}
    fragment          {"start", "weight", "average", "steps", "exp_avg", "exp_avg_sq"}

A fragment is elements start, start + 1, ... of a parameter of the loss module, flattened: what one rank owns of it. One
process owns each as a whole, ZeRO a piece of a flat partition, FSDP2 some rows. As only names and places are written, a
run goes on with any engine, ZeRO stage and number of ranks. "steps": how many the optimizer has made on it; with none
there are no moments. "earlier": steps of the run from whose moving average this one began. "own" and "own_identity", of
optimizers of one's own alone: their states as they give them, their classes and the options that they began with.

"constants" are what of the network no optimizer changes and no state dict may hold: frozen parameters and buffers that
are not persistent, such as random Fourier features. Larger ones than CONSTANT, as of a pretrained network, are those
that the run was built with.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["MOMENTS", "Fragment", "Saved", "constants_of", "set_constants"]

MOMENTS = ("exp_avg", "exp_avg_sq")
CONSTANT = 2**20  # numbers


class Fragment(NamedTuple):
    """What this rank owns of a parameter: elements start, start + 1, ... of it flattened, as a tensor of any shape that
    is (or stands for) the optimizer's own."""

    start: int
    value: Tensor


class Saved:
    """The shares of all ranks that saved. They lie in mapped files, of which only what is asked for is read.

    Raises ValueError where they are not the whole of the parameters of these names and shapes.
    """

    def __init__(self, shares: list[dict[str, Any]], shapes: Mapping[str, torch.Size]) -> None:
        self.shapes = shapes
        self.buffers: dict[str, Tensor] = shares[0]["buffers"]
        self.earlier: float = shares[0].get("earlier", 0.0)
        self.fragments: dict[str, list[dict[str, Any]]] = {name: [] for name in shapes}
        for share in shares:
            for name, fragment in share["fragments"].items():
                if name not in shapes:
                    raise ValueError(f"{name} is not a trained parameter here")
                self.fragments[name].append(fragment)
        for name, shape in shapes.items():
            if sum(fragment["weight"].numel() for fragment in self.fragments[name]) != shape.numel():
                raise ValueError(f"it holds only a part of {name}, or one of another shape")

    def steps(self, name: str | None = None) -> float:
        """Of the optimizer on a parameter, or the most of all."""
        names = self.shapes if name is None else [name]
        return max((fragment["steps"] for each in names for fragment in self.fragments[each]), default=0.0)

    def part(self, name: str, key: str, start: int, size: int) -> Tensor:
        """Elements start, start + 1, ... of a parameter's "weight", "average" or moment, (size,); zeros beyond it, and
        where it has no moments."""
        fragments = [fragment for fragment in self.fragments[name] if key in fragment]
        result = torch.zeros(size, dtype=fragments[0][key].dtype if fragments else torch.float32)
        for fragment in fragments:
            first, value = fragment["start"] - start, fragment[key]
            low, high = max(0, first), min(size, first + value.numel())
            if low < high:
                result[low:high] = value[low - first : high - first]
        return result

    def whole(self, name: str, key: str) -> Tensor:
        shape = self.shapes[name]
        return self.part(name, key, 0, shape.numel()).view(shape)


def constants_of(net: nn.Module, trained: Collection[str]) -> dict[str, Tensor]:
    """The constants of a network.  trained: names of parameters of the loss module around it."""
    saved = net.state_dict().keys()
    frozen = {name: each.detach() for name, each in net.named_parameters() if f"net.{name}" not in trained}
    found = frozen | {name: each for name, each in net.named_buffers() if name not in saved}
    return {name: each for name, each in found.items() if each.numel() <= CONSTANT}


@torch.no_grad()
def set_constants(net: nn.Module, constants: Mapping[str, Tensor]) -> None:
    """Those that a network has in the same shape: others, as caches that grow, are its own affair."""
    own = dict(net.named_parameters()) | dict(net.named_buffers())
    for name, value in constants.items():
        if name in own and own[name].shape == value.shape:
            own[name].copy_(value)
