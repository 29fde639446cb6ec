"""The Jacobian-vector product of a function, in one of three ways: `jvp`.

Duals are the fast one. The others are for networks that Duals cannot run (isinstance checks, kernels of their own):
`func_jvp` is torch.func.jvp made right: the gradient that PyTorch returns through the tangent of layer, batch and
instance norm is silently wrong, so these are decomposed, and so is attention, which has no forward derivative.
`finite_difference_jvp` needs two evaluations of any function and is biased by its step.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmf_fast.forward.dual import DetachedDual, Dual, primal, tangent
from mmf_fast.forward.interception import intercepted
from mmf_fast.forward.replay import RandomState, on_copies_of_buffers
from mmf_fast.forward.rules.by_pytorch import WITHOUT_GRAPH
from mmf_fast.forward.rules.families import spellings
from mmf_fast.forward.rules.sdpa import multi_head_attention_forward, plain_mask

__all__ = ["JVP_MODES", "FiniteDifference", "check_mode", "jvp"]

JVP_MODES = ("dual", "func", "finite_difference")
_WRONG_GRADIENTS = {*WITHOUT_GRAPH, torch.native_batch_norm, torch.native_layer_norm}


class FiniteDifference(NamedTuple):
    """How differences stand for a derivative; "finite_difference" means these defaults.

    step: the distance h along the tangents. The rounding error of the result is about eps / h times the value.
    order: 1, (f(x + h dx) - f(x)) / h, two evaluations with a bias of order h; or 2, the central difference
        (f(x + h dx) - f(x - h dx)) / 2h, three evaluations with a bias of order h^2.
    """

    step: float = 1e-3
    order: int = 1


def jvp(
    fn: Callable[..., Any],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    tangent_grad: bool = True,
    mode: str | FiniteDifference = "dual",
) -> tuple[Tensor, Tensor]:
    """The value of `fn` at `primals` and its directional derivative along `tangents`.

    fn: maps tensors to one tensor (or Duals to one Dual).
    tangents: one per primal, of its shape and dtype; None is a symbolic zero.
    tangent_grad: whether gradients flow through the tangent (SG_1) or not (SG_0, cheaper: nothing is saved for it).
    mode: "dual" runs fn on Duals; "func" is torch.func.jvp with exact norms and attention; "finite_difference", or
        a FiniteDifference, evaluates fn twice or three times on the same random numbers and is biased by its step.
    Raises ValueError for tangents that do not fit and for an unknown mode; MissingRuleError for an operation without
    a rule; TypeError when fn does not return one tensor.
    """
    check_mode(mode)
    if len(primals) != len(tangents):
        raise ValueError(
            f"jvp got {len(primals)} primals and {len(tangents)} tangents: give one tangent (or None) each"
        )
    for i, (x, dx) in enumerate(zip(primals, tangents, strict=True)):
        if dx is not None and dx.shape != x.shape:
            raise ValueError(
                f"tangent {i} has shape {tuple(dx.shape)}, its primal {tuple(x.shape)}: they must be equal"
            )

    if mode == "dual":
        kind = Dual if tangent_grad else DetachedDual
        given = [dx if dx is None or tangent_grad else dx.detach() for dx in tangents]
        duals = [x if dx is None else kind(*_in_own_memory(x, dx)) for x, dx in zip(primals, given, strict=True)]
        with intercepted(primals) as buffers:
            out = buffers.of(fn(*duals))
        y, dy = primal(out), tangent(out)
    elif mode == "func":
        y, dy = func_jvp(fn, primals, tangents, tangent_grad)
    else:
        way = mode if isinstance(mode, FiniteDifference) else FiniteDifference()
        y, dy = finite_difference_jvp(fn, primals, tangents, way, tangent_grad)
    if not isinstance(y, Tensor):
        raise TypeError(f"jvp needs a function that returns one tensor, not {type(y).__name__}: wrap it to pick one")
    dy = torch.zeros_like(y) if dy is None else dy  # no operation carried a tangent: fn is constant in its arguments
    return y, dy if tangent_grad else dy.detach()


def _in_own_memory(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """x and a copy of dx in the strides of x: the network may write into its input, and the tangents are the caller's.

    An x with gaps, or expanded, has no copy of its strides: it is copied too, so that a view of one is one of both.
    """
    own = torch.empty_like(x).copy_(dx)
    return x if x.stride() == own.stride() else x.clone(), own


def check_mode(mode: Any) -> None:
    """Raises ValueError for what is not a mode of `jvp`."""
    if isinstance(mode, FiniteDifference):
        if not mode.step > 0 or mode.order not in (1, 2):
            raise ValueError(f"{mode}: the step must be positive, the order 1 or 2")
    elif mode not in JVP_MODES:
        raise ValueError(f"jvp is {mode!r}: choose one of {', '.join(JVP_MODES)}")


def func_jvp(
    fn: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    tangent_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """(fn(*primals), its tangent) by torch.func.jvp; a tangent of None is a constant argument."""
    moving = [i for i, dx in enumerate(tangents) if dx is not None]

    def of_moving(*values: Tensor) -> Tensor:
        arguments = list(primals)
        for i, value in zip(moving, values, strict=True):
            arguments[i] = value
        return fn(*arguments)

    with _ExactDerivatives(tangent_grad):
        pair = torch.func.jvp(of_moving, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving))
    return pair[0], pair[1]


def finite_difference_jvp(
    fn: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    way: FiniteDifference,
    tangent_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """(f(x), its difference quotient along the tangents), on the same random numbers and buffers in every evaluation.

    Compiled code cannot begin its generators again: there, a network that draws random numbers is refused, and one that
    changes its buffers changes them at each evaluation.
    """
    compiling = torch.compiler.is_compiling()
    random = None if compiling else RandomState(primals[0].device)

    def at(shift: float, *, graph: bool) -> Tensor:
        shifted = [x if dx is None or not shift else x + shift * dx for x, dx in zip(primals, tangents, strict=True)]
        with torch.set_grad_enabled(graph), _NoRandomNumbers() if random is None else _as_at_first(random):
            return fn(*shifted)

    graph, h = torch.is_grad_enabled(), way.step
    # The last evaluation leaves generators and buffers as one run of the network does.
    above = at(h, graph=graph and tangent_grad)
    below = at(-h, graph=graph and tangent_grad) if way.order == 2 else None
    y = at(0.0, graph=graph) if random is None else fn(*primals)
    if y.dtype in (torch.bfloat16, torch.float16) and not compiling:
        warnings.warn(
            f"finite differences of {y.dtype} err by about {torch.finfo(y.dtype).eps / h:.0g} times the value, from "
            'rounding: compute the network in float32, or use jvp="dual"',
            stacklevel=2,
        )
    return y, (above - y) / h if below is None else (above - below) / (2 * h)


@contextlib.contextmanager
def _as_at_first(random: RandomState) -> Iterator[None]:
    with random.replayed(), on_copies_of_buffers():
        yield


class _NoRandomNumbers(TorchFunctionMode):
    """Refuses what draws random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS or (func in _DROPOUTS and _drops(*args, **kwargs)) or kwargs.get("dropout_p"):
            raise NotImplementedError(
                'compiled, jvp="finite_difference" cannot give a network the same random numbers twice (here in '
                f'{func.__name__}): use jvp="dual", or do not compile'
            )
        return func(*args, **kwargs)


_DROPOUTS = set(spellings("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"))
_DRAWS = {
    *spellings(
        "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli"
    ),
    *spellings("multinomial", "poisson", "normal_", "uniform_", "bernoulli_", "exponential_", "random_"),
}


def _drops(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool = True) -> bool:
    return p > 0 and training and train


class _ExactDerivatives(TorchFunctionMode):
    """Replace the operations whose derivatives torch.func gets wrong or lacks by compositions that it gets right."""

    def __init__(self, tangent_grad: bool = True) -> None:
        super().__init__()
        self.tangent_grad = tangent_grad

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _COMPOSITIONS:
            with self:  # compositions may call each other
                return _COMPOSITIONS[func](*args, **kwargs)
        if self.tangent_grad and func in _WRONG_GRADIENTS:
            raise NotImplementedError(
                f'the gradient through the tangent of {func.__name__} is wrong in PyTorch, so jvp="func" has it at '
                "lambda = 0 only: compute it outside the network, or keep lambda at 0"
            )
        if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) and _is_custom(func):
            raise NotImplementedError(
                f'jvp="func" returns a zero tangent through the custom operator {func}; use jvp="dual"'
            )
        return func(*args, **kwargs)


def _is_custom(operator: Any) -> bool:
    packet = getattr(operator, "overloadpacket", operator)
    return packet._qualified_op_name.split("::")[0] not in ("aten", "prim", "prims")


def _standardise(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def _affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    y = x_hat if weight is None else x_hat * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    shape = tuple(normalized_shape)
    return _affine(_standardise(input, tuple(range(-len(shape), 0)), eps), weight, bias, shape)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    if training and running_mean is not None:
        raise NotImplementedError('jvp="func" cannot update the running statistics of batch_norm; use jvp="dual"')
    return _from_statistics(input, (0, *range(2, input.ndim)), running_mean, running_var, weight, bias, training, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    if use_input_stats and running_mean is not None:
        raise NotImplementedError('jvp="func" cannot update the running statistics of instance_norm; use jvp="dual"')
    dims = tuple(range(2, input.ndim))
    return _from_statistics(input, dims, running_mean, running_var, weight, bias, use_input_stats, eps)


def _from_statistics(
    x: Tensor,
    dims: tuple[int, ...],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    eps: float,
) -> Tensor:
    shape = (1, x.shape[1], *[1] * (x.ndim - 2))
    if use_input_stats or running_mean is None or running_var is None:
        return _affine(_standardise(x, dims, eps), weight, bias, shape)
    return _affine((x - running_mean.view(shape)) * torch.rsqrt(running_var + eps).view(shape), weight, bias, shape)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    attn_mask = plain_mask(attn_mask)
    logits = scale * query @ key.mT
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        bias = attn_mask
        logits = logits.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else logits + bias
    nothing = (logits == -math.inf).all(-1, keepdim=True)  # such a row is 0; twice, since softmax of it has no gradient
    weights = torch.softmax(logits.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
    return F.dropout(weights, dropout_p) @ value


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    # PyTorch's own takes views, which channels_last tensors do not have.
    groups = input.reshape(input.shape[0], num_groups, -1)
    x_hat = _standardise(groups, (-1,), eps).reshape(input.shape)
    return _affine(x_hat, weight, bias, (1, -1, *[1] * (input.ndim - 2)))


def _multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    # PyTorch's own calls attention where no TorchFunctionMode sees it.
    return multi_head_attention_forward(*args, **kwargs)[0]


_COMPOSITIONS: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    torch.instance_norm: _instance_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
}
