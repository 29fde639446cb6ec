"""The contract with a network: u(z, r, t, **cond) gives the average velocity over [r, t], a tensor like z.

The loss and the sampler take any callable and check here what can be known of it: its signature when it is handed
over, what it returns at each call. Whatever does not fit is adapted in one line, by `mmf_fast.Adapter`.

Conditions are what users have: nested dicts, lists and tuples of tensors, arrays, prompts and numbers. A leaf of B rows
has one row for each of the B samples, and is cut when they are cut; all samples share everything else.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = [
    "GUIDANCE",
    "Paths",
    "bare",
    "check_cond",
    "check_network",
    "check_output",
    "hidden_modules",
    "names_refused",
    "names_taken",
    "per_sample",
    "sent",
    "take",
    "to_device",
]

Paths: TypeAlias = tuple[tuple[Any, ...], ...]  # each path is the keys and indices that lead to one leaf

GUIDANCE = ("omega", "t_min", "t_max")  # conditions by which a network is told its guidance, see mmf_fast.Guidance

ADAPT = "mmf_fast.Adapter(net, lambda net, z, r, t, **c: {call})"

# How public networks name the time of z (their second argument, where r should stand), and times in general.
_PRESENT = re.compile(
    r"(ts?|times?|timesteps?|sigmas?|noise_(label|level)s?|c_noise|log_snr)(_(cond|emb|embedding)s?)?"
)
_SOME_TIME = re.compile(r"(.*_)?(ts?|t\d|times?|timesteps?|tau|end|stop|later)")
_CONDITION = re.compile(
    r"y|aug.*|cond.*|context.*|.*labels?|class.*|encoder.*|text.*|emb.*|prompt.*|mask.*|return_dict"
)
_NO_TIME = re.compile(rf"h|dt|d|c|{_CONDITION.pattern}")


def check_network(net: Any) -> None:
    """Raises ValueError where the signature shows another call than u(z, r, t, **cond), for instance net(z, t, y=None),
    which would take r for t and t for labels; warns about a function that hides the module it calls."""
    if not callable(net):
        raise ValueError(f"net is a {type(net).__name__}: give a callable u(z, r, t, **cond), usually an nn.Module")
    hidden = hidden_modules(net)
    if hidden:
        warnings.warn(
            f"net is a function that hides the module {hidden[0]}: its parameters, modes and devices are out of reach; "
            "give mmf_fast.Adapter(net, lambda net, z, r, t, **c: ...), with what your function does in place of ...",
            stacklevel=3,
        )
    parameters = _parameters(net)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind == p.VAR_POSITIONAL for p in parameters) or not parameters:
        return  # *args take anything
    fits = len(positional) > 2 and not _PRESENT.fullmatch(positional[1].name)
    if fits and not _SOME_TIME.fullmatch(positional[2].name):
        third = positional[2]
        fits = third.default is third.empty and not _NO_TIME.fullmatch(third.name)
    if not fits:
        names = ", ".join(p.name for p in positional)
        one_time = all(_CONDITION.fullmatch(p.name) for p in positional[2:])
        way = ADAPT.format(call="net(z, t, **c)" if one_time else "net(z, t, r, **c)")
        more = "; it knows no r then, which examples/finetune.py gives to such a network" if one_time else ""
        raise ValueError(
            f"{_name(net)} is called as ({names}), not as u(z, r, t, **cond), where t is the time of z and r < t the "
            f"other end of the interval: adapt it, for instance {way}{more}"
        )


def names_taken(net: Any, own: Iterable[str]) -> list[str]:
    """Which of these names are conditions of the network too."""
    theirs = {p.name for p in _parameters(net)[3:]}
    return [name for name in own if name in theirs]


def names_refused(net: Any, names: Iterable[str]) -> list[str]:
    """For which of these names the network has no condition."""
    parameters = _parameters(net)
    takes_any = not parameters or any(p.kind == p.VAR_KEYWORD for p in parameters)
    theirs = {p.name for p in parameters[3:]}
    return [name for name in names if not (takes_any or name in theirs)]


def check_cond(net: Any, own: Mapping[str, Any], caller: str) -> None:
    """Raises ValueError for an argument that `caller` (the loss, the sampler) and the network both call by one name.

    own: the caller's own arguments, None where they were not given.
    """
    for name in names_taken(net, [name for name, value in own.items() if value is not None]):
        call = f"net(z, r, t, {name}=c.pop('net_{name}'), **c)"
        raise ValueError(
            f"{name}= is an argument of {caller}, and {_name(net)} has a condition of that name: call that net_{name}, "
            f"by {ADAPT.format(call=call)}"
        )


def check_output(u: Any, z: Tensor) -> Any:
    """u, where it is a floating-point tensor (or Dual) of the shape and on the device of z. Raises ValueError."""
    u_of = getattr(u, "primal", u)  # of a Dual
    z = getattr(z, "primal", z)
    if not isinstance(u_of, Tensor):
        raise ValueError(f"the network returned {_described(u)} for z {tuple(z.shape)}: {_way_out(u)}")
    if u_of.shape != z.shape:
        raise ValueError(
            f"the network returned u of shape {tuple(u_of.shape)} for z of shape {tuple(z.shape)}: they must be equal"
            + _channels_way_out(u_of, z)
        )
    if not u_of.is_floating_point():
        raise ValueError(
            f"the network returned {u_of.dtype} for z of {z.dtype}: the velocity is a floating-point tensor"
        )
    if u_of.device != z.device:
        raise ValueError(f"the network returned u on {u_of.device} for z on {z.device}: move one to the other's device")
    return u


# ---- what a network looks like from outside --------------------------------------------------------------------------


def bare(net: Any) -> Any:
    """The network itself, without what torch.compile, DDP or AveragedModel put around it."""
    while True:
        if isinstance(net, nn.Module) and "_orig_mod" in net._modules:
            net = net._orig_mod
        elif isinstance(net, (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)):
            net = net.module
        else:
            return net


def _parameters(net: Any) -> list[inspect.Parameter]:
    net = bare(net)
    try:
        own = isinstance(net, nn.Module) and not hasattr(net, "__signature__")
        call = net.forward if own else net
        if inspect.ismethod(call):
            return _parameters_of_function(call.__func__)[1:]
        return list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):  # a builtin
        return []


@functools.lru_cache(maxsize=64)
def _parameters_of_function(function: Any) -> list[inspect.Parameter]:
    """Kept, as every call of the sampler asks; of a function, so that no network is kept alive."""
    return list(inspect.signature(function).parameters.values())


def _name(net: Any) -> str:
    net = bare(net)
    return type(net).__name__ if isinstance(net, nn.Module) else getattr(net, "__name__", type(net).__name__)


def hidden_modules(net: Any) -> list[str]:
    """Names of the modules that a callable, without being one, calls: in a closure, a global, a partial or a method."""
    if isinstance(net, nn.Module):
        return []
    deeper: list[str] = []
    if isinstance(net, functools.partial):
        held = [net.func, *net.args, *net.keywords.values()]
        deeper = hidden_modules(net.func)
    elif inspect.isfunction(net):
        found = inspect.getclosurevars(net)
        held = [*found.nonlocals.values(), *found.globals.values()]
    else:
        held = [getattr(net, "__self__", None), *getattr(net, "__dict__", {}).values()]
    return [type(x).__name__ for x in held if isinstance(x, nn.Module)] + deeper


# ---- what a network returned -----------------------------------------------------------------------------------------


def _described(u: Any) -> str:
    def of(x: Any) -> str:
        return str(tuple(x.shape)) if hasattr(x, "shape") else type(x).__name__

    if isinstance(u, Mapping):
        return f"a {type(u).__name__} with " + ", ".join(f"{key!r} {of(x)}" for key, x in u.items())
    if isinstance(u, (tuple, list)):
        return f"a {type(u).__name__} of {len(u)} ({', '.join(map(of, u))})"
    return "None" if u is None else f"a {type(u).__name__}"


def _way_out(u: Any) -> str:
    call = "net(z, r, t, **c)"
    if hasattr(u, "sample"):
        call += ".sample"
    elif isinstance(u, Mapping):
        call += f"[{next(iter(u), 'u')!r}]"
    elif isinstance(u, (tuple, list)):
        call += "[0]"
    else:
        return "it must return a tensor like z, the average velocity u"
    return f"it must return one tensor like z; pick it by {ADAPT.format(call=call)}"


def _channels_way_out(u: Tensor, z: Tensor) -> str:
    alike = u.ndim == z.ndim > 1 and u.shape[0] == z.shape[0] and u.shape[2:] == z.shape[2:]
    if not alike or u.shape[1] < z.shape[1]:
        return ""
    call = f"net(z, r, t, **c)[:, :{z.shape[1]}]"
    return f"; if the first {z.shape[1]} channels are u (the others a learned variance), {ADAPT.format(call=call)}"


# ---- conditions ------------------------------------------------------------------------------------------------------


def per_sample(cond: Any, batch: int, shared: Collection[str] = ()) -> Paths:
    """Where the leaves lie that have one row for each of `batch` samples: tensors and arrays of that length, and lists
    of that length without tensors and arrays, of prompts or of labels; also tuples, unless their items are such leaves.

    shared: names of what belongs to all samples, whatever its length, at any depth.
    """
    if _is_array(cond):
        return ((),) if cond.ndim and len(cond) == batch else ()
    whole = isinstance(cond, (list, tuple)) and len(cond) == batch
    if whole and isinstance(cond, list) and not _holds_array(cond):
        return ((),)  # whatever its items are, one of which may have B items of its own
    found = tuple(
        (key, *path)
        for key, value in _children(cond)
        if not (isinstance(key, str) and key in shared)
        for path in per_sample(value, batch, shared)
    )
    return ((),) if whole and not found else found


def take(cond: Any, rows: slice | Tensor, paths: Paths) -> Any:
    """The conditions of these rows: the leaves at `paths` are cut, the others are as they were."""
    if not paths:
        return cond
    if paths == ((),):
        if isinstance(cond, Tensor) or isinstance(rows, slice):
            return cond[rows]
        if _is_array(cond):
            return cond[rows.cpu().numpy()]
        return _like(cond, [cond[i] for i in rows.tolist()])
    cut = {}
    for key in dict.fromkeys(path[0] for path in paths):
        cut[key] = take(cond[key], rows, tuple(path[1:] for path in paths if path[0] == key))
    return _replaced(cond, cut)


def to_device(cond: Any, device: torch.device | str) -> Any:
    """The conditions with every tensor moved to the device, as `sent` moves one."""
    return _mapped(cond, lambda x: sent(x, device))


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """x on the device. A copy from pageable memory would wait until a GPU has done all that it was asked before, and
    the host could not run ahead of it. One to the host does wait, or it would be read too early."""
    if x.device.type != "cpu" or torch.device(device).type != "cuda":
        return x.to(device)
    if x.layout is torch.strided and not x.is_contiguous():
        x = x.clone()  # what was expanded cannot be pinned
    return x.pin_memory().to(device, non_blocking=True)


def _mapped(cond: Any, move: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(cond, Tensor):
        return move(cond)
    return _replaced(cond, {key: _mapped(value, move) for key, value in _children(cond)})


def _is_array(cond: Any) -> bool:
    """A tensor, or an array of numpy, which need not be here."""
    return isinstance(cond, Tensor) or (hasattr(cond, "ndim") and type(cond).__module__.startswith("numpy"))


def _holds_array(cond: Any) -> bool:
    return _is_array(cond) or any(_holds_array(value) for _, value in _children(cond))


def _children(cond: Any) -> list[tuple[Any, Any]]:
    if isinstance(cond, Mapping):
        return list(cond.items())
    return list(enumerate(cond)) if isinstance(cond, (list, tuple)) else []


def _replaced(cond: Any, by: dict[Any, Any]) -> Any:
    """A container of the same type with some of its items replaced."""
    if not by:
        return cond
    if isinstance(cond, (list, tuple)):
        return _like(cond, [by.get(i, x) for i, x in enumerate(cond)])
    if type(cond) is dict:
        return {**cond, **by}
    result = copy.copy(cond)  # a mapping of a class of its own, as tokenizers give
    for key, value in by.items():
        result[key] = value
    return result


def _like(cond: Any, items: list[Any]) -> Any:
    return type(cond)._make(items) if hasattr(cond, "_make") else type(cond)(items)
