"""What a run is told beside the loss and the data: the optimizer, how long, on what, and what is recorded."""

from __future__ import annotations

import dataclasses
import json
import math
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from mmf_fast.training.plain import plain

__all__ = [
    "FREE",
    "ConfigError",
    "Optimizer",
    "Train",
    "check_ranks",
    "differences",
    "find",
    "fixed",
    "learning_rate",
    "read_zero",
]


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line that names the key and the way out."""


# A field so marked may differ between a run and its resumption: it says how long and where to run and what to record,
# and no training step depends on it. An argument of a network says the same by Annotated[type, "free"].
FREE = {"free": True}

CompileMode: TypeAlias = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW, its learning rate, gradient clipping and the moving average of the weights."""

    # The same AdamW from PyTorch (fused), NVIDIA Apex, or DeepSpeed: on GPUs, or on the CPU where the
    # ZeRO file offloads the optimizer. All but the first are for DeepSpeed's engine.
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
        _check_kinds(self)
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
    # fp32 rounds no factor of a product or convolution, tf32 to 10 bits on a GPU; bf16: autocast, weights stay float32.
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    steps: int = field(default=2000, metadata=FREE)
    # What shares the work among processes: a DeepSpeed configuration such as zero1.json, or fsdp, PyTorch's FSDP2.
    zero: str = field(default="", metadata=FREE)
    init: str = field(default="", metadata=FREE)  # a run folder or a safetensors file whose weights to start from,
    init_from: Literal["average", "weights", "state"] = field(default="average", metadata=FREE)  # and what of a run
    device: str = field(default="auto", metadata=FREE)  # auto: cuda where there is one, else cpu
    # true: the whole loss as one graph; blocks: each block of the network, two graphs whatever its depth; auto: blocks
    # where a network has many large ones that are alike, else true.
    compile: bool | Literal["auto", "blocks"] = field(default=False, metadata=FREE)
    # What torch.compile may spend: max-autotune tries other kernels for products, minutes long; reduce-overhead replays
    # CUDA graphs, so that a step has few launches; max-autotune does both, unless -no-cudagraphs is added.
    compile_mode: CompileMode = field(default="default", metadata=FREE)
    blocks: tuple[str, ...] = field(default=("blocks",), metadata=FREE)  # names in the network
    log_every: int = field(default=10, metadata=FREE)
    sample_every: int = field(default=500, metadata=FREE)  # 0: only at the end
    checkpoint_every: int = field(default=500, metadata=FREE)
    keep: int = field(default=3, metadata=FREE)  # checkpoints kept
    max_bad_steps: int = field(default=20, metadata=FREE)  # non-finite steps in a row before the run stops

    def __post_init__(self) -> None:
        _check_kinds(self)
        for name in ("batch", "accumulate", "steps", "log_every", "checkpoint_every", "keep", "max_bad_steps"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        _require(
            self.batch % self.accumulate == 0, f"accumulate must divide the batch of {self.batch}", self.accumulate
        )
        _require(self.sample_every >= 0, "sample_every must be at least 0 (0: only at the end)", self.sample_every)


def check_ranks(train: Train, world_size: int) -> None:
    """Raises ConfigError where so many processes cannot share the batch."""
    if train.batch % (world_size * train.accumulate):
        raise ConfigError(
            f"train.batch={train.batch} is not divisible by {world_size} processes x train.accumulate="
            f"{train.accumulate}: choose another batch"
        )


def learning_rate(step: int, config: Optimizer, steps: int) -> float:
    """lr * min(1, (step + 1) / warmup) [* (1 + cos(pi (step - warmup) / (steps - warmup))) / 2 after the warm-up].

    A function of the step alone, so it needs no state in a checkpoint.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def fixed(optimizer: Optimizer, train: Train) -> dict[str, Any]:
    """Flat {"optimizer.lr": value, ...} of the settings a training step depends on: all but those marked free. The
    number of steps is one of them where the learning rate falls until the last."""
    found = {
        f"{section}.{each.name}": _plain(getattr(settings, each.name))
        for section, settings in (("optimizer", optimizer), ("train", train))
        for each in dataclasses.fields(settings)
        if not each.metadata.get("free")
    }
    return found if optimizer.schedule == "constant" else found | {"train.steps": train.steps}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The keys in which two flat configurations differ, as "key (value of one -> value of other)". Where key differs,
    parts of it (key[0].lr) are not named beside it."""
    found = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    keys = [key for key in found if "[" not in key or key.partition("[")[0] not in found]
    return [f"{key} ({one.get(key, 'default')} -> {other.get(key, 'default')})" for key in keys]


def find(path: str | Path, ending: str = ".yaml") -> Path:
    """A file that is there, or of a bare name (digits, zero1.json) the one shipped with the package.

    Raises ConfigError where there is neither; a path with a folder in it is never looked for elsewhere.
    """
    path = Path(path)
    if path.is_file():
        return path
    folders = [Path(__file__).parents[2] / "configs", Path(sysconfig.get_path("data"), "share", "mmf_fast", "configs")]
    shipped = {each.name: each for folder in reversed(folders) for each in sorted(folder.glob(f"*{ending}"))}
    if path.parent == Path() and (name := path.name.removesuffix(ending) + ending) in shipped:
        return shipped[name]
    names = ", ".join(name.removesuffix(".yaml") for name in sorted(shipped)) or "none"
    raise ConfigError(f"{path}: there is no such file; pass a path, or the name of a shipped one: {names}")


def read_zero(path: str | Path) -> dict[str, Any]:
    """The DeepSpeed configuration (JSON) that train.zero names. Raises ConfigError."""
    try:
        path = find(path, ".json")
        tree = json.loads(path.read_text())
    except ConfigError as error:
        raise ConfigError(f"train.zero={error}") from error
    except OSError as error:
        raise ConfigError(f"train.zero={path}: {error.strerror or error}; pass another file") from error
    except ValueError as error:
        raise ConfigError(f"train.zero={path}: is not JSON ({error})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"train.zero={path}: must be a mapping of keys to values, is {tree!r}")
    return tree


def _check_kinds(settings: Any) -> None:
    """Makes NumPy's numbers Python's.

    Raises ConfigError for a word that is none of those of its field, and for a number that should be whole.
    """
    for name, hint in get_type_hints(type(settings)).items():
        object.__setattr__(settings, name, plain(getattr(settings, name)))  # the settings are frozen
        value, kinds = getattr(settings, name), get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        if words:
            words = [False, True] * (bool in kinds) + words
            _require(value in words, f"{name} must be one of {', '.join(map(str, words))}", value)
        elif hint is int:
            _require(type(value) is int, f"{name} must be a whole number", value)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _require(holds: bool, rule: str, value: Any) -> None:
    if not holds:
        raise ConfigError(f"{rule}, is {value}")
