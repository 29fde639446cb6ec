"""Things that a configuration builds by name: datasets, networks."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

__all__ = ["Registry", "nearest"]

_Made = TypeVar("_Made")


class Registry(Mapping[str, Callable[..., _Made]], Generic[_Made]):
    """{name: function or class}, and errors that say what is meant.

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

    def build(self, name: str, **arguments: Any) -> _Made:
        """What the entry `name` returns for these arguments.

        Raises ValueError for an unknown name, an unknown or a missing argument, or a value that the entry refuses.
        """
        if name not in self:
            raise ValueError(f"unknown {self.kind} {name!r}; {_hint(name, self)}")
        parameters = inspect.signature(self[name]).parameters
        for argument in arguments:
            if argument not in parameters:
                hint = _hint(argument, parameters)
                raise ValueError(f"{self.kind} {name!r} has no {self.argument} {argument!r}; {hint}")
        for argument, parameter in parameters.items():
            if parameter.default is parameter.empty and argument not in arguments:
                key = f"{self.section}.{argument}"
                raise ValueError(f"{self.kind} {name!r} needs the {self.argument} {argument!r}: {key}=...")
        return self[name](**arguments)


def nearest(name: Any, valid: Iterable[Any]) -> str | None:
    """The one of `valid` that a misspelt name resembles most, if one does."""
    return next(iter(difflib.get_close_matches(str(name), map(str, valid), n=1, cutoff=0.5)), None)


def _hint(name: str, valid: Iterable[str]) -> str:
    names = list(valid)
    found = nearest(name, names)
    return f"did you mean {found!r}?" if found else f"valid are {', '.join(names)}"
