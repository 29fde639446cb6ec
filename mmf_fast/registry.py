"""Datasets and networks by the names that a configuration gives them: those of the package and the user's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

__all__ = ["Registry", "import_object", "is_path", "nearest", "parameters_of"]

_Made = TypeVar("_Made")


class Registry(Mapping[str, Callable[..., _Made]], Generic[_Made]):
    """{name: function or class}, and errors that say what is meant. Beside the names that are entered, "package.module:
    attribute" (without the space) names what it imports.

    kind, argument: what messages call an entry and what it takes, such as "dataset" and "option".
    section: of a configuration, which names an entry and holds its arguments.
    """

    def __init__(self, kind: str, argument: str, section: str, entries: Mapping[str, Callable[..., _Made]]) -> None:
        self.kind, self.argument, self.section, self._entries = kind, argument, section, dict(entries)

    def __getitem__(self, name: str) -> Callable[..., _Made]:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def register(self, name: str, make: Callable[..., Any]) -> None:
        """Enters a function or class under a name of one's own. Raises ValueError for a name that is taken."""
        if self._entries.get(name, make) is not make:
            raise ValueError(f"{self.kind} {name!r} is registered already: choose another name")
        self._entries[name] = make

    def find(self, name: str) -> Callable[..., _Made]:
        """The entry of that name, or what the import path names. Raises ValueError."""
        if is_path(name):
            return import_object(name)
        if name not in self:
            raise ValueError(f"unknown {self.kind} {name!r}; {_hint(name, self)}")
        return self[name]

    def build(self, name: str, **arguments: Any) -> _Made:
        """What the entry `name` returns for these arguments.

        Raises ValueError for an unknown name, an unknown or a missing argument, or a value that the entry refuses.
        """
        make = self.find(name)
        parameters, takes_any = parameters_of(make)
        for argument in arguments:
            if argument not in parameters and not takes_any:
                hint = _hint(argument, parameters)
                raise ValueError(f"{self.kind} {name!r} has no {self.argument} {argument!r}; {hint}")
        for argument, parameter in parameters.items():
            if parameter.default is parameter.empty and argument not in arguments:
                key = f"{self.section}.{argument}"
                raise ValueError(f"{self.kind} {name!r} needs the {self.argument} {argument!r}: {key}=...")
        return make(**arguments)


def parameters_of(make: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The named parameters of a function or class, and whether it takes any other keyword (**kwargs)."""
    found = inspect.signature(make).parameters
    open_ended = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = {name: parameter for name, parameter in found.items() if parameter.kind not in open_ended}
    return named, any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in found.values())


def is_path(name: Any) -> bool:
    """Whether a name is an import path, "package.module:attribute"."""
    return isinstance(name, str) and ":" in name


def import_object(path: str) -> Any:
    """What "package.module:attribute" names; modules are looked for in the working directory too. Raises ValueError."""
    module, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # `python -m` adds it; launchers and installed commands do not
    try:
        found: Any = importlib.import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path!r} cannot be imported ({error}); write package.module:attribute") from error
    return found


def nearest(name: Any, valid: Iterable[Any]) -> str | None:
    """The one of `valid` that a misspelt name resembles most, if one does."""
    return next(iter(difflib.get_close_matches(str(name), map(str, valid), n=1, cutoff=0.5)), None)


def _hint(name: str, valid: Iterable[str]) -> str:
    names = list(valid)
    found = nearest(name, names)
    return f"did you mean {found!r}?" if found else f"valid are {', '.join(names)}"
