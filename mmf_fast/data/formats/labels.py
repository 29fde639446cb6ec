"""From what files state as labels to numbers 0, 1, 2, ...: numbers stay, names are numbered in sorted order."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mmf_fast.data.formats.sources import DataError

__all__ = ["LABELS", "NOT_LABELS", "alike", "in_order", "json_labels", "numbering"]

# What a column or an array of labels is called, and what one that holds something else.
LABELS = re.compile(
    r"(.*_)?(labels?|cls|class|classes|category|targets?|y)(_?(id|idx|index|name|label))?", re.IGNORECASE
)
NOT_LABELS = re.compile(
    r"(image_|img_)?(id|idx|index|key|name|path|url|width|height|size|file_?name|file_?path|text|captions?|prompt|"
    r"md5|sha256|hash|license|source|mode|format)s?|__index_level_\d+__|__key__|__url__|image_file_path",
    re.IGNORECASE,
)

_IDS = 100_000  # labels above this are ids, unless most numbers below them are labels too


def numbering(values: Iterable[Any], where: str) -> tuple[Callable[[Any], int], list[str] | None]:
    """(stated value -> label, class names or None) for all distinct values that a set states.

    Whole numbers from 0 stay what they are, written as 3, 3.0 or "3"; names and booleans are numbered in sorted order.
    where: what errors call their place. Raises DataError for values that are no classes.
    """
    distinct = list(dict.fromkeys(_scalar(value, where) for value in values))
    if not distinct or distinct == [None]:
        raise DataError(f"{where}: states no label; pass another split, or --labels none")
    if None in distinct:
        raise DataError(f"{where}: some labels are missing; leave those samples out, or pass --labels none")
    kinds = {type(value) for value in distinct}
    if kinds == {str} and not all(value.isascii() and value.isdigit() for value in distinct):
        names = in_order(distinct)
        return {name: i for i, name in enumerate(names)}.__getitem__, names
    if kinds == {bool}:
        return int, ["False", "True"]
    if len(kinds - {int, float}) and kinds != {str}:
        raise DataError(f"{where}: labels are {_some(distinct)}, of several kinds; write them all alike")
    if len({float(value) for value in distinct}) < len(distinct):
        raise DataError(f"{where}: labels {_some(distinct)} write one number in several ways; write them all alike")
    for value in distinct:
        if float(value) != int(float(value)):
            raise DataError(f"{where}: label {value!r} is no class but a measure; pass --labels none, or other labels")
        if float(value) < 0:
            hint = (
                "-1 stands for no label in many test splits: pass another split" if value == -1 else "write them anew"
            )
            raise DataError(f"{where}: label is {value!r}, not a number from 0; {hint}, or pass --labels none")
    highest = max(int(float(value)) for value in distinct)
    if highest >= max(_IDS, 100 * len(distinct)):
        raise DataError(
            f"{where}: {len(distinct)} labels up to {highest} are ids, not classes; number them from 0, or write names"
        )
    return (lambda value: int(float(value))), None


def in_order(names: Iterable[str]) -> list[str]:
    """Class names, sorted; by value where all are numbers, so that 10 does not stand before 2."""
    found = sorted(names)
    return sorted(found, key=int) if all(name.isascii() and name.isdigit() for name in found) else found


def alike(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs that differ in case, blanks, the coding of accents, or leading zeros alone."""
    seen: dict[str, str] = {}
    found = []
    for name in names:
        key = unicodedata.normalize("NFKC", name).casefold().strip()
        key = str(int(key)) if key.isascii() and key.isdigit() else key
        other = seen.setdefault(key, name)
        if other != name:
            found.append((other, name))
    return found


def json_labels(text: bytes, where: str) -> Mapping[str, Any] | None:
    """dataset.json of EDM -> {file: what it states}; None where it says that there are no labels. Raises DataError."""
    try:
        labels = json.loads(text)["labels"]
        table = None if labels is None else {str(file): label for file, label in labels}
        if table is not None and len(table) != len(labels):
            raise ValueError("a file is there twice")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{where}: is not {{"labels": [[name, int], ...]}} ({error}); write it anew') from error
    return table


def _scalar(value: Any, where: str) -> Any:
    if isinstance(value, (list, tuple, dict)):
        kind = "dict" if isinstance(value, dict) else f"list of {len(value)}"
        raise DataError(
            f"{where}: label is {_some([value])}, not a number from 0 but a {kind}: several labels or a vector each; "
            "write one number or name each, or pass --labels none"
        )
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if value is not None and not isinstance(value, (str, int, float)):
        raise DataError(f"{where}: label is a {type(value).__name__}; write numbers or names, or pass --labels none")
    return None if value is None or value != value or value == "" else value


def _some(values: list[Any]) -> str:
    text = ", ".join(repr(value) for value in values[:3])
    return text if len(text) < 60 else text[:60] + " ..."
