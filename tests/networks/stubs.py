"""Stand-ins for what the packages of the collection import and no network of it uses.

torchvision brings a torch of its own, and the others are image tools, metrics and loggers. An attribute of a stand-in
is a class that does nothing, so that `from torchvision.ops.misc import FrozenBatchNorm2d` succeeds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAMES = ("torchvision", "skimage", "cleanfid", "clip", "dctorch", "jsonmerge", "accelerate", "torchdiffeq", "torchsde")
NAMES += ("ema_pytorch", "ot", "pytorch_fid", "loguru", "wandb")


class Anything(type):
    """A class that has every attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class Stub(ModuleType):
    __path__: Sequence[str] = ()
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {"__init__": lambda self, *args, **kwargs: None})


class Stubs(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.missing else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: a stand-in is empty."""

    def __init__(self) -> None:
        self.missing = {name for name in NAMES if importlib.util.find_spec(name) is None}


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """The scope of an import. Afterwards nothing is left: transformers looks which packages there are."""
    finder = Stubs()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name, module in list(sys.modules.items()):
            if isinstance(module, Stub):
                del sys.modules[name]
