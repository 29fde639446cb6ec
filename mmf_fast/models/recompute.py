"""Activation checkpointing of a network's blocks: keep what goes into a block, compute the rest again in backward.

    memory   the inputs of all blocks and the activations of one, instead of the activations of all
    time     one more forward of the blocks; at lambda = 0 of their primal half only

PyTorch's checkpoint serves tensors, and Duals whose tangent is in the graph. Where the tangent is outside it
(DetachedDual, lambda = 0) that would compute the tangent again as well, which backward has no use for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mmf_fast.forward.dual import DetachedDual, Dual, primal, tangent
from mmf_fast.forward.replay import RandomState
from mmf_fast.forward.rules.families import autocasts

__all__ = ["recomputed"]


def recomputed(block: nn.Module, compute: Callable[..., Any], *inputs: Any) -> Any:
    """compute(*inputs), the forward of `block`, without keeping its activations for backward.

    inputs: tensors and Duals. compute: returns one tensor or Dual and uses no parameters but those of `block`; what it
    draws from the global generators is drawn alike when it runs again. Call this within the forward of `block`, so
    that wrappers which fetch parameters for a module (FSDP, ZeRO-3) have done so.
    Raises RuntimeError under torch.func, which does not run anything a second time.
    """
    if not torch.is_grad_enabled():
        return compute(*inputs)
    if torch.compiler.is_compiling():
        return _checkpoint(compute, inputs)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError('recompute does not work under torch.func: set recompute=False, or jvp="dual" in the loss')
    if not any(isinstance(x, DetachedDual) for x in inputs):
        return _checkpoint(compute, inputs)
    primals, parameters = [primal(x) for x in inputs], [p for p in block.parameters() if p.requires_grad]
    again = _Again(compute, primals[0].device)
    with torch.no_grad():
        out = compute(*inputs)
    return DetachedDual(_Recomputed.apply(again, len(inputs), primal(out), *primals, *parameters), tangent(out))


def _checkpoint(compute: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """torch.utils.checkpoint, given tensors only, because Dynamo does not let a Dual into it."""
    kinds = [type(x) if isinstance(x, Dual) else None for x in inputs]

    def run(*tensors: Tensor) -> Any:
        left = iter(tensors)
        out = compute(*(next(left) if kind is None else kind(next(left), next(left)) for kind in kinds))
        return (out.primal, out.tangent) if isinstance(out, Dual) else out

    tensors = [t for x in inputs for t in ((x.primal, x.tangent) if isinstance(x, Dual) else (x,))]
    if DetachedDual in kinds:
        out = checkpoint(run, *tensors, use_reentrant=False, context_fn=_keep_attention)
    else:
        out = checkpoint(run, *tensors, use_reentrant=False)
    return out if isinstance(out, Tensor) else next(kind for kind in kinds if kind is not None)(*out)


def _keep_attention() -> Any:
    """Only what backward uses is computed again in a compiled graph, so at lambda = 0 no tangent. The operator of
    attention is an exception, since it gives both at once: its results are kept."""
    return create_selective_checkpoint_contexts([torch.ops.mmf_fast.attention.default])


class _Recomputed(torch.autograd.Function):
    """y = compute(*inputs), known already, as a node that finds its derivative by computing it again.

    Parameters are arguments, so that autograd adds up their gradients over all uses before hooks of DDP or ZeRO see
    them; a backward() within backward would run these at every use.
    """

    @staticmethod
    def forward(ctx: Any, again: Callable[..., Tensor], count: int, y: Tensor, *tensors: Tensor) -> Tensor:
        ctx.again, ctx.count = again, count
        ctx.save_for_backward(*tensors[:count])
        ctx.parameters = tensors[count:]  # not by save_for_backward, which objects when ZeRO-3 changes them
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        inputs = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed, strict=False)]
        y = ctx.again(*inputs)
        sources = [x for x, need in zip((*inputs, *ctx.parameters), needed, strict=True) if need]
        grads = iter(torch.autograd.grad(y, sources, g))
        return (None, None, None, *(next(grads) if need else None for need in needed))


class _Again:
    """Calls a function with gradients and with the generators and autocast as they were when this was made."""

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self.function, self.device = function, device
        self.autocast = torch.get_autocast_dtype(device.type) if autocasts(device.type) else None
        self.random = RandomState(device)

    def __call__(self, *args: Tensor) -> Tensor:
        autocast = torch.autocast(self.device.type, self.autocast, self.autocast is not None)
        with self.random.replayed(), torch.enable_grad(), autocast:
            return self.function(*(x.view_as(x) for x in args))  # hooks on gradients of leaves refuse autograd.grad
