"""Typed configuration: a YAML file, dot-list overrides, and errors that name the key and the nearest valid one.

Three sections name a component and hold its arguments; their keys and types are read from the signature of that
component, so that a new model or dataset is configurable as soon as it exists:

    data   {name, **options of the dataset}           model  {name, **arguments of the network}
    loss   {objective, **arguments of MeanFlowLoss}   (an objective is a preset; what is written beside it overrides)

The other two, `optimizer` and `train`, are dataclasses of training/settings.py.
"""

import dataclasses
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mmf_fast import data, models, objective
from mmf_fast.registry import Registry, is_path, nearest, parameters_of
from mmf_fast.training.settings import ConfigError, Optimizer, Train, find


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run. `data`, `model` and `loss` hold the converted keyword arguments of the component they name."""

    data: dict[str, Any]
    model: dict[str, Any]
    loss: dict[str, Any]
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    seed: int = 0

    def tree(self) -> dict[str, Any]:
        """The whole configuration as plain dicts, lists and scalars: what config.yaml holds and `from_tree` reads."""
        return _plain(self)

    def identity(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Flat {dotted key: value} of the data, the network and the loss, without what a network marks free.

        data: identity of the dataset; it replaces the options of `data` that it names.
        """
        hints = _hints(models.NETWORKS.find(self.model["name"]), include_extras=True)
        free = {name for name, hint in hints.items() if "free" in getattr(hint, "__metadata__", ())}
        tree = self.tree()
        tree["data"] |= data
        tree["model"] = {key: value for key, value in tree["model"].items() if key not in free}
        return dict(_flatten({section: tree[section] for section in ("data", "model", "loss")}))


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, or the shipped configuration of that name, and applies `key=value` overrides.

    Keys are dotted. `model=mlp` is short for `model.name=mlp`; `model={name: mlp, width: 8}` replaces the file's model.
    Raises ConfigError.
    """
    path = find(path)
    try:
        tree = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; pass a YAML file with --config") from error
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise _damaged(path, error) from error
    return from_tree(_overridden(tree, overrides, path))


def data_options(saved: Mapping[str, Any], overrides: Sequence[str], path: str | Path) -> dict[str, Any]:
    """The section `data` that a run saved at `path`, by `data.key=value` overrides. Raises ConfigError."""
    tree = _mapping(_overridden(OmegaConf.create({"data": dict(saved)}), overrides, path), "")
    _known(tree, ["data"], "")
    return _component(tree["data"], "data", data.DATASETS)


def _overridden(tree: Any, overrides: Sequence[str], path: str | Path) -> Any:
    """The plain tree of a file, overridden. path: of the file, for messages."""
    for override in overrides:
        if "=" not in override or override.startswith(("=", "-")):
            raise ConfigError(f"override {override!r}: write it as key=value, for instance train.steps=100")
    try:
        if not OmegaConf.is_dict(tree):
            raise ConfigError("must be a mapping of keys to values")
        for override in overrides:
            key, _, value = override.partition("=")
            if key in ("data", "model", "loss") and value.startswith("{"):
                tree[key] = {}
        for override in overrides:
            tree = _merged(tree, override)
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str | Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path}: " + " ".join(str(error).split()))


def _merged(tree: Any, override: str) -> Any:
    try:
        return OmegaConf.merge(tree, OmegaConf.from_dotlist([_expand(override)]))
    except TypeError as error:  # a list where the file has a mapping, or the other way round
        raise ConfigError(f"{override}: is of another kind than what the file has there") from error


def from_tree(tree: Any) -> Config:
    """Plain nested dicts -> Config: unknown keys and ill-typed values raise ConfigError."""
    tree = _mapping(tree, "")
    _known(tree, [f.name for f in dataclasses.fields(Config)], "")
    for section in ("data", "model", "loss"):
        if section not in tree:
            raise ConfigError(f"{section}: missing; every configuration needs the sections data, model and loss")
    return Config(
        data=_component(tree["data"], "data", data.DATASETS),
        model=_component(tree["model"], "model", models.NETWORKS),
        loss=_loss(tree["loss"]),
        **{key: convert(tree[key], hint, key) for key, hint in _OTHERS.items() if key in tree},
    )


_OTHERS: dict[str, Any] = {"optimizer": Optimizer, "train": Train, "seed": int}


# ---- components: keys and types from the signature -------------------------------------------------------------------


def _component(tree: Any, section: str, known: Registry[Any]) -> dict[str, Any]:
    tree = _mapping(tree, section)
    name = tree.get("name", "unset")
    if not is_path(name):
        _one_of(name, known, f"{section}.name")
    try:
        target = known.find(name)
    except ValueError as error:
        raise ConfigError(f"{section}.name: {error}") from error
    options = {key: value for key, value in tree.items() if key != "name"}
    return {"name": name, **_arguments(target, options, section, extra=("name",))}


def _loss(tree: Any) -> dict[str, Any]:
    given = _mapping(tree, "loss")
    name = convert(given.pop("objective", "mmf"), str, "loss.objective")
    try:
        preset = _plain(objective.preset(name))
    except ValueError as error:
        raise ConfigError(f"loss.objective: {error}") from error
    preset = {key: value for key, value in preset.items() if isinstance(given.get(key, value), type(value))}
    merged = _mapping(OmegaConf.to_container(OmegaConf.merge(preset, given)), "loss")
    target = objective.MeanFlowLoss
    return {
        "objective": name,
        **_arguments(target, merged, "loss", extra=("objective",), without=("net", "null_label", "null", "teacher")),
    }


def _arguments(
    target: Callable[..., Any],
    given: Mapping[str, Any],
    section: str,
    extra: Iterable[str] = (),
    without: Iterable[str] = (),
) -> dict[str, Any]:
    """Converts `given` to keyword arguments of `target` by its signature's annotations."""
    parameters, takes_any = parameters_of(target)
    hints = _hints(target)
    if not takes_any:
        _known(given, [*extra, *(name for name in parameters if name not in without)], section)
    return {key: convert(value, hints.get(key, Any), f"{section}.{key}") for key, value in given.items()}


def _hints(target: Callable[..., Any], include_extras: bool = False) -> dict[str, Any]:
    """{argument: annotation}; nothing of a function that is not ours and whose annotations cannot be evaluated."""
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=include_extras)
    except (NameError, TypeError):
        return {}


# ---- conversion ------------------------------------------------------------------------------------------------------


def convert(value: Any, hint: Any, key: str) -> Any:
    """A YAML value -> the annotated type: scalars, Literal, unions, tuples, lists, sets, dicts and dataclasses.

    A whole float is an int where an int is asked for (steps=1e4), an int is a float; nothing else is coerced.
    Raises ConfigError naming `key`.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, key)
    if origin is Literal:
        return _one_of(value, args, key)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _convert_dataclass(value, hint, key)
    kind = origin or hint  # Collection of Collection[str]
    if made := _collection(kind):
        return _convert_collection(value, kind, made, args, key)
    if hint is dict or origin in (dict, Mapping):
        return _mapping(value, key)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{key}: must be a number, is nan")
    if inspect.isclass(kind) and (not isinstance(value, kind) or (isinstance(value, bool) and hint is not bool)):
        raise ConfigError(f"{key}: must be {_named(hint)}, is {value!r}")
    return value


def _convert_union(value: Any, args: tuple[Any, ...], key: str) -> Any:
    if value is None and type(None) in args:
        return None
    choices = [arg for arg in args if arg is not type(None)]
    if isinstance(value, Mapping):  # a mapping means the dataclass of the union, and its own error is the useful one
        choices = [arg for arg in choices if dataclasses.is_dataclass(arg)] or choices
    if len(choices) == 1:
        return convert(value, choices[0], key)
    for choice in choices:
        try:
            return convert(value, choice, key)
        except ConfigError:
            continue
    raise ConfigError(f"{key}: must be {' or '.join(map(_named, args))}, is {value!r}")


def _convert_dataclass(value: Any, hint: type, key: str) -> Any:
    hints = get_type_hints(hint)
    given = _mapping(value, key)
    _known(given, [f.name for f in dataclasses.fields(hint)], key)
    given = {name: "" if item is None and hints[name] is str else item for name, item in given.items()}  # train.zero=
    arguments = {name: convert(item, hints[name], f"{key}.{name}") for name, item in given.items()}
    try:
        return hint(**arguments)
    except (TypeError, ValueError) as error:  # a component may name the key itself: "times.share is -1: ..."
        section, _, leaf = key.rpartition(".")
        text = f"{section}.{error}" if str(error).startswith(f"{leaf}.") else f"{key}: {error}"
        raise ConfigError(text) from error


def _collection(kind: Any) -> type | None:
    """What a list becomes where `kind` is asked for: a tuple for Sequence, Collection or Iterable, a set for Set; None
    where `kind` is no collection of single items."""
    if not inspect.isclass(kind) or not issubclass(kind, Iterable):
        return None
    return next((made for made in (tuple, list, set, frozenset) if issubclass(made, kind)), None)


def _convert_collection(value: Any, kind: Any, made: type, args: tuple[Any, ...], key: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{key}: must be a list, is {value!r}")
    fixed = kind is tuple and args and args[-1] is not Ellipsis
    if fixed and len(value) != len(args):
        raise ConfigError(f"{key}: must be a list of {len(args)}, is {list(value)!r}")
    hints = args if fixed else [args[0] if args else Any] * len(value)
    items = [convert(item, hint, f"{key}[{i}]") for i, (item, hint) in enumerate(zip(value, hints, strict=True))]
    return made(items)


# ---- small pieces ----------------------------------------------------------------------------------------------------


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key or 'the configuration'}: must be a mapping of keys to values, is {value!r}")
    return {str(name): item for name, item in value.items()}


def _one_of(value: Any, valid: Iterable[Any], key: str) -> Any:
    names = list(valid)
    if value not in names or type(value) not in map(type, names):
        raise ConfigError(f"{key}: {value!r} is not one of {', '.join(map(str, names))}{_nearest(value, names)}")
    return value


def _known(given: Mapping[str, Any], valid: Sequence[str], section: str) -> None:
    for name in given:
        if name not in valid:
            dotted = f"{section}.{name}" if section else name
            prefix = f"{section}." if section else ""
            hint = _nearest(name, valid, prefix) or f"; valid keys: {', '.join(sorted(valid))}"
            raise ConfigError(f"unknown key {dotted}{hint}")


def _nearest(value: Any, valid: Iterable[Any], prefix: str = "") -> str:
    found = nearest(value, valid)
    return f"; did you mean {prefix}{found}?" if found else ""


def _named(hint: Any) -> str:
    if get_origin(hint) is tuple and Ellipsis not in get_args(hint):
        return f"list of {len(get_args(hint))}"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _expand(override: str) -> str:
    """model=mlp -> model.name=mlp"""
    key, value = override.split("=", 1)
    short = {"data": "data.name", "model": "model.name", "loss": "loss.objective"}
    return f"{short[key]}={value}" if key in short and not value.startswith("{") else override


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value), key=repr)  # in one order, since the run compares what it saves
    return value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
