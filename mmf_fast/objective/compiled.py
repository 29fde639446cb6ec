"""The work of a step, compiled: as one graph, for batches of any size, or block by block of the network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Compiled", "better_by_block", "blocks_of", "compile_blocks"]

OWN_SHAPES = 2  # whose graphs have numbers for sizes: those of a full batch and of a last one
GRAPHS = 64  # lambda zero or positive, two counts of intervals, five of those with a graph, for several losses


class Compiled:
    """function(*args) by torch.compile (fullgraph). The first two shapes of data have graphs of their own; all others,
    such as buckets, share graphs whose sizes are symbols. Where such a graph cannot be had, or there are too many, the
    function runs as it is, after one warning. A copy compiles anew.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self.function, self.options = function, options
        self.shapes: set[torch.Size] = set()
        self.fixed = torch.compile(function, fullgraph=True, dynamic=False, **options)
        self.free = torch.compile(function, fullgraph=True, dynamic=None, **options)  # True: numbers are symbols too

    def __reduce__(self) -> tuple[Any, ...]:
        return Compiled, (self.function, self.options)

    def __call__(self, data: Tensor, *args: Any) -> Any:
        """function(*args); data: whose shape decides."""
        from torch._dynamo.exc import FailOnRecompileLimitHit  # takes longer than importing torch, often for nothing

        own = data.shape in self.shapes or len(self.shapes) < OWN_SHAPES
        if own:
            self.shapes.add(data.shape)
        expected = FailOnRecompileLimitHit if own else Exception  # a compiler can raise anything here
        try:
            with torch._dynamo.config.patch(recompile_limit=GRAPHS):
                return (self.fixed if own else self.free)(*args)
        except expected as error:
            reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"batches of shape {tuple(data.shape)} and of new ones run without torch.compile: {reason}", stacklevel=4
        )
        self.free = self.function
        self.fixed = self.function if own else self.fixed
        return self.function(*args)


def blocks_of(net: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The modules of a network that follow each other: those which it, or a module in it, has as attributes of these
    names, alone, in lists, or in a Sequential of one class. Numbers and words of such a name are no modules."""

    def modules(value: Any) -> Iterator[nn.Module]:
        repeats = isinstance(value, nn.Sequential) and len(set(map(type, value))) == 1
        if repeats or isinstance(value, (nn.ModuleList, list, tuple)):
            for each in value:
                yield from modules(each)
        elif isinstance(value, nn.Module):
            yield value

    found = {each: None for module in net.modules() for name in names for each in modules(getattr(module, name, None))}
    inner = {each for block in found for each in block.modules() if each is not block}
    return [block for block in found if block not in inner]


def compile_blocks(blocks: Sequence[nn.Module], mode: str = "default") -> None:
    """Compiles the forward of each in place (fullgraph). Blocks that are alike share their graphs: one on tensors, one
    on duals with a graph, one without, whatever the depth. A copy of a block is compiled too. mode: of torch.compile.
    """
    limit = GRAPHS + 8 * len(blocks)  # the graphs of all blocks of a class count together
    torch._dynamo.config.recompile_limit = max(limit, torch._dynamo.config.recompile_limit)
    for block in blocks:
        method = block.forward
        function = method.__func__ if isinstance(method, MethodType) else method
        compiled = torch.compile(function, backend=Unseen(mode), fullgraph=True, dynamic=False)
        # Bound anew: a method is copied as that of the copy, a function that has it within would stay with this block.
        block.forward = MethodType(compiled, method.__self__) if isinstance(method, MethodType) else compiled


@dataclass(frozen=True)
class Unseen:
    """Inductor, with torch function modes switched off while its code runs: the mode of the pass in which a block is
    called would otherwise be asked about each of its hundred calls on plain tensors. Equal instances share graphs."""

    mode: str

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        from torch import _inductor as inductor  # takes longer than importing torch

        run = inductor.compile(graph, inputs, inductor.list_mode_options(self.mode))

        def unseen(*args: Any) -> Any:
            with torch._C.DisableTorchFunction():
                return run(*args)

        return unseen


def better_by_block(blocks: Sequence[nn.Module]) -> bool:
    """Whether compiling by block spares much and costs little: where they are at least 6, all alike, of a million
    weights each. Others have many graphs, and what lies between small ones, not compiled then, is a part that shows.
    """
    kinds = {tuple(each.shape for each in block.parameters()) for block in blocks}
    return len(blocks) >= 6 and len(kinds) == 1 and sum(shape.numel() for shape in next(iter(kinds))) >= 10**6
