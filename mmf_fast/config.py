"""Typed configuration: a YAML file, dot-list overrides, and errors that name the key and the nearest valid one.

Three sections name a component and hold its arguments; their keys and types are read from the signature of that
component, so that a new model or dataset is configurable as soon as it exists:

    data   {name, **options of the dataset}           model  {name, **arguments of the network}
    loss   {objective, **arguments of MeanFlowLoss}   (an objective is a preset; what is written beside it overrides)

The other two, `optimizer` and `train`, are the dataclasses below.
"""

import dataclasses
import inspect
import json
import math
import sysconfig
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mmf_fast import data, models, objective
from mmf_fast.registry import nearest


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line that names the key and the way out."""


# A field so marked may differ between a run and its resumption: it says how long and where to run and what to record,
# and no training step depends on it. An argument of a network says the same by Annotated[type, "free"].
FREE = {"free": True}


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW, its learning rate, gradient clipping and the moving average of the weights."""

    # The same AdamW from PyTorch (fused), NVIDIA Apex, or DeepSpeed: on GPUs, or on the CPU where the
    # ZeRO file offloads the optimizer. All but the first need train.zero.
    kind: Literal["adamw", "apex", "deepspeed_fused", "deepspeed_cpu"] = field(default="adamw", metadata=FREE)
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    warmup: int = 100  # steps of linear warm-up
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine ends at 0 after train.steps
    ema: float = 0.999  # largest decay of the moving average of the weights

    def __post_init__(self) -> None:
        _require(self.lr > 0, "lr must be positive", self.lr)
        _require(all(0 <= beta < 1 for beta in self.betas), "betas must lie in [0, 1)", self.betas)
        _require(self.eps > 0, "eps must be positive", self.eps)
        _require(self.weight_decay >= 0, "weight_decay must be at least 0", self.weight_decay)
        _require(self.clip >= 0, "clip must be at least 0 (0: no clipping)", self.clip)
        _require(self.warmup >= 0, "warmup must be at least 0", self.warmup)
        _require(0 <= self.ema < 1, "ema must lie in [0, 1)", self.ema)


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long, on what, and what is recorded. Intervals are in steps."""

    batch: int = 128  # samples per step, over all processes and accumulation steps
    accumulate: int = field(default=1, metadata=FREE)  # backward passes per step, each on its part of the batch
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # bf16: autocast, weights stay float32
    steps: int = field(default=2000, metadata=FREE)
    zero: str = field(default="", metadata=FREE)  # a DeepSpeed configuration such as zero1.json; empty: no DeepSpeed
    device: str = field(default="auto", metadata=FREE)  # auto: cuda where there is one, else cpu
    compile: bool = field(default=False, metadata=FREE)
    log_every: int = field(default=10, metadata=FREE)
    sample_every: int = field(default=500, metadata=FREE)  # 0: only at the end
    checkpoint_every: int = field(default=500, metadata=FREE)
    keep: int = field(default=3, metadata=FREE)  # checkpoints kept
    max_bad_steps: int = field(default=20, metadata=FREE)  # non-finite steps in a row before the run stops

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "steps", "log_every", "checkpoint_every", "keep", "max_bad_steps"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        _require(
            self.batch % self.accumulate == 0, f"accumulate must divide the batch of {self.batch}", self.accumulate
        )
        _require(self.sample_every >= 0, "sample_every must be at least 0 (0: only at the end)", self.sample_every)


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

    def fingerprint(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Flat {dotted key: value} of everything a training step depends on (all but what is marked free).

        identity: of the dataset; it replaces the options of `data` that it names.
        """
        free = {
            f"{section}.{f.name}"
            for section, kind in (("optimizer", Optimizer), ("train", Train))
            for f in dataclasses.fields(kind)
            if f.metadata.get("free")
        } | {
            f"model.{name}"
            for name, hint in _hints(models.NETWORKS[self.model["name"]], include_extras=True).items()
            if get_origin(hint) is Annotated and "free" in hint.__metadata__
        }
        tree = self.tree()
        tree["data"] |= identity
        return {key: value for key, value in _flatten(tree) if key not in free}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `key=value` overrides (dotted keys; `model=mlp` is short for `model.name=mlp`).

    A file that does not exist is looked for among the configurations installed with the package.
    Raises ConfigError.
    """
    path = find(path)
    for override in overrides:
        if "=" not in override or override.startswith(("=", "-")):
            raise ConfigError(f"override {override!r}: write it as key=value, for instance train.steps=100")
    try:
        tree = OmegaConf.load(path)
        if not isinstance(tree, Mapping):
            raise ConfigError("must be a mapping of keys to values")
        given = OmegaConf.from_dotlist([_expand(override) for override in overrides])
        merged = OmegaConf.to_container(OmegaConf.merge(tree, given), resolve=True, throw_on_missing=True)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; pass a YAML file with --config") from error
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: " + " ".join(str(error).split())) from error
    return from_tree(merged)


def find(path: str | Path) -> Path:
    """The file at `path`, or else the one of that name beside this checkout's or installation's configurations."""
    path = Path(path)
    checkout = Path(__file__).parent.parent / "configs" / path.name
    installed = Path(sysconfig.get_path("data"), "share", "mmf_fast", "configs", path.name)
    return next((each for each in (path, checkout, installed) if each.exists()), path)


def read_zero(path: str | Path) -> dict[str, Any]:
    """The DeepSpeed configuration (JSON) that train.zero names. Raises ConfigError."""
    path = find(path)
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"train.zero={path}: {error.strerror or error}; zero1.json to zero3.json are there"
        ) from error
    except ValueError as error:
        raise ConfigError(f"train.zero={path}: is not JSON ({error})") from error
    return _mapping(tree, "train.zero")


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


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys in which two fingerprints differ, as "key (value of one -> value of other)"."""
    keys = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    return [f"{key} ({one.get(key, 'default')} -> {other.get(key, 'default')})" for key in keys]


# ---- components: keys and types from the signature -------------------------------------------------------------------


def _component(tree: Any, section: str, known: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    tree = _mapping(tree, section)
    name = _one_of(tree.get("name", "unset"), known, f"{section}.name")
    options = {key: value for key, value in tree.items() if key != "name"}
    return {"name": name, **_arguments(known[name], options, section, extra=("name",))}


def _loss(tree: Any) -> dict[str, Any]:
    given = _mapping(tree, "loss")
    name = convert(given.pop("objective", "mmf"), str, "loss.objective")
    try:
        preset = _plain(objective.preset(name))
    except ValueError as error:
        raise ConfigError(f"loss.objective: {error}") from error
    merged = _mapping(OmegaConf.to_container(OmegaConf.merge(preset, given)), "loss")
    target = objective.MeanFlowLoss
    return {
        "objective": name,
        **_arguments(target, merged, "loss", extra=("objective",), without=("net", "null_label")),
    }


def _arguments(
    target: Callable[..., Any],
    given: Mapping[str, Any],
    section: str,
    extra: Iterable[str] = (),
    without: Iterable[str] = (),
) -> dict[str, Any]:
    """Converts `given` to keyword arguments of `target` by its signature's annotations."""
    parameters = [name for name in inspect.signature(target).parameters if name not in without]
    hints = _hints(target)
    _known(given, [*extra, *parameters], section)
    return {key: convert(value, hints.get(key, Any), f"{section}.{key}") for key, value in given.items()}


def _hints(target: Callable[..., Any], include_extras: bool = False) -> dict[str, Any]:
    return get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=include_extras)


# ---- conversion ------------------------------------------------------------------------------------------------------


def convert(value: Any, hint: Any, key: str) -> Any:
    """A YAML value -> the annotated type: scalars, Literal, unions, tuples, lists, dicts and dataclasses.

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
    if origin in (tuple, list, Sequence):
        return _convert_sequence(value, origin, args, key)
    if hint is dict or origin in (dict, Mapping):
        return _mapping(value, key)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{key}: must be a number, is nan")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
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
    arguments = {name: convert(item, hints[name], f"{key}.{name}") for name, item in given.items()}
    try:
        return hint(**arguments)
    except (TypeError, ValueError) as error:  # a component may name the key itself: "times.share is -1: ..."
        section, _, leaf = key.rpartition(".")
        text = f"{section}.{error}" if str(error).startswith(f"{leaf}.") else f"{key}: {error}"
        raise ConfigError(text) from error


def _convert_sequence(value: Any, origin: Any, args: tuple[Any, ...], key: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{key}: must be a list, is {value!r}")
    fixed = origin is tuple and args and args[-1] is not Ellipsis
    if fixed and len(value) != len(args):
        raise ConfigError(f"{key}: must be a list of {len(args)}, is {list(value)!r}")
    hints = args if fixed else [args[0] if args else Any] * len(value)
    items = [convert(item, hint, f"{key}[{i}]") for i, (item, hint) in enumerate(zip(value, hints, strict=True))]
    return items if origin is list else tuple(items)


# ---- small pieces ----------------------------------------------------------------------------------------------------


def _require(holds: bool, rule: str, value: Any) -> None:
    if not holds:
        raise ConfigError(f"{rule}, is {value}")


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
    return value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
