"""Which split a name speaks of, and which of the folders that lie side by side are the split asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from mmf_fast.data.formats.sources import DataError
from mmf_fast.data.formats.trees import Tree, some

__all__ = ["are_splits", "check_no_other_split", "is_shard", "may_be_splits", "pick_split", "split_of"]

Splits: TypeAlias = Mapping[str, str | None]  # folder -> the split that its name says

_SPLITS = {
    "train": {"train", "training"},
    "validation": {"val", "valid", "validation", "dev", "test", "testing", "eval"},
}
_FIRST = ("val", "valid", "validation", "dev", "eval", "test", "testing")  # which is the validation split, of several
_SHARD = re.compile(r"[^\W\d_]+[-_]\d{4,}")


def split_of(name: str) -> str | None:
    """train or validation, where the first word of a name says it: train, val, test2017, train-00000-of-00005."""
    word = _first_word(name)
    return next((split for split, words in _SPLITS.items() if word in words), None)


def _first_word(name: str) -> str:
    return re.match(r"[^\W\d_]*", name.lower())[0]  # type: ignore[index]  # it always matches


def is_shard(top: str) -> bool:
    """train-000000, as WebDataset numbers the archives of a split."""
    return split_of(top) is not None and _SHARD.fullmatch(top) is not None


def are_splits(splits: Splits) -> bool:
    """train and val; train2017 and val2017; but not train_station and test_tube."""
    return all(splits.values()) and len({re.sub(r"\d", "", top[len(_first_word(top)) :]) for top in splits}) == 1


def may_be_splits(splits: Splits) -> bool:
    """Whether some folders may be splits and others classes; train_station alone is no sign of a split."""
    exact = any(top.lower() in words for top in splits for words in _SPLITS.values())
    return exact or all(splits.values()) or len(set(splits.values()) - {None}) > 1


def pick_split(tree: Tree, at: str, splits: Splits, split: str, keyed: bool) -> list[str]:
    """The folder of a split, or all its shards. Raises DataError where there is none, or any of several.

    keyed: each sample has its label beside it, so that all folders together may be the set.
    """
    found = [top for top in splits if splits[top] == split]
    if split == "validation":  # val and test may both be there
        for word in _FIRST:
            those = [top for top in found if _first_word(top) == word]
            if those:
                found = those
                break
    if not found:
        raise DataError(f"{tree.place(at)}: has no {split} split, but {some(splits)}; pass --split, or --root FOLDER")
    numbered = all(map(is_shard, found)) and any(re.search("[-_]0", top) for top in found)  # train_2014 is a year
    if len(found) > 1 and not numbered:
        together = f", --root '{at or '.'}' for all folders as one set" if keyed else ""
        raise DataError(
            f"{tree.place(at)}: {some(found)} all look like the {split} split; "
            f"pass --root '{at}{found[0]}' for that one alone{together}"
        )
    return found


def check_no_other_split(tree: Tree, inner: Sequence[str], at: str, split: str) -> None:
    """Raises DataError where samples of another split lie among those of this one, in each class for instance."""
    first = 0 if at + "dataset.json" in tree.names else 1  # the first folders are classes or known
    folders = {part for name in inner for part in name.split("/")[first:-1]}
    words = {part: found for part in folders if (found := split_of(part))}
    if set(words.values()) - {split} or len({*words}) > 1:
        other = next((part for part in sorted(words) if words[part] != split), min(words))
        raise DataError(
            f"{tree.place(at)}: has folders {some(words)} within others: splits? "
            f"pass --ignore '{other}' (and others) to leave them out, --root '{at or '.'}' to take all"
        )
