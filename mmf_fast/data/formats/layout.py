"""Which files of a tree are its samples, and what their labels are: one rule must fit, or the layout is refused.

    dataset.json     {"labels": [[name, label], ...]} or {"labels": null}, as EDM and StyleGAN write it
    x.cls            beside each x.png, as WebDataset writes it
    class folders    cat/1.png, dog/2.png; numbered in sorted order
    no labels        all files in one folder that nothing says is a class

Above these may lie folders that hold everything, and folders train and val (or their kin), of which one is read; of
WebDataset's shards train-000000, train-000001, ... all are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmf_fast.data.formats.labels import alike, in_order, json_labels, numbering
from mmf_fast.data.formats.sources import DataError, Options
from mmf_fast.data.formats.splits import are_splits, check_no_other_split, is_shard, may_be_splits, pick_split, split_of
from mmf_fast.data.formats.trees import Tree, ending, some

__all__ = ["LABELS", "Layout", "lay_out"]

LABELS = ("none", "parents")  # values of the option

_DOCUMENTS = {
    *(".txt", ".md", ".rst", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".html", ".htm", ".pdf", ".yaml", ".yml"),
    *(".py", ".ipynb", ".sh", ".log", ".mat", ".cls"),
}
_TABLES = {".csv", ".tsv", ".json", ".jsonl", ".xml", ".mat", ".xlsx", ".parquet", ".pkl", ".txt", ".data"}
_PLAIN_TEXT = re.compile(r"(readme|licen[cs]e|copying|citation|changelog|md5|sha)", re.IGNORECASE)
_EDM = re.compile(r"\d{5}/img[-\w]*\d{8}\.\w+")
_CHUNK = re.compile(r"\d{4,}")
_PREFIX = re.compile(r"(.*?[^\W\d_].*?)[-_. ]*\d+\.\w+")  # cat.0.jpg, n01440764_18.JPEG


@dataclass(frozen=True)
class Layout:
    """names: of the samples, sorted.  labels: (N,) int64.  rule: what decided, in words.  left_out: {kind: files}."""

    names: Sequence[str]
    labels: np.ndarray | None
    classes: list[str] | None
    rule: str
    left_out: dict[str, int] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """As arguments of `Source`."""
        count = len(self.classes) if self.classes else None
        return {"num_classes": count, "classes": self.classes, "rule": self.rule, "left_out": self.left_out}


def lay_out(tree: Tree, endings: Iterable[str], options: Options, besides: Sequence[str] = ()) -> Layout:
    """The samples are the files of these endings. Raises DataError, which names the option that decides.

    besides: files that are none.  options: of which split, root ("." is the source itself), labels and allow_empty.
    """
    known, root, labels = tuple(endings), options.root, options.labels
    samples = [name for name in tree.names if ending(name) in known and name not in besides]
    if not samples:
        raise DataError(f"{tree.path}: holds no files {', '.join(known[:4])}, ...; {_kinds(tree.left_out([]))}")
    if root is None:
        at, within, story = _descend(tree, samples, options.split, labels)
    else:
        at, story = "" if root.strip("./") == "" else root.strip("/").removeprefix("./") + "/", []
        within = (at,)
    names = [name for name in samples if name.startswith(within)]
    if not names:
        raise DataError(f"{tree.path}: has no samples in {root}; pass --root FOLDER as it is called in there")
    if root is None:
        check_no_other_split(tree, [name[len(at) :] for name in names], at, options.split)
    found, classes, rule = _labelled(tree, names, at, root is not None, labels, options.allow_empty)
    others = len(samples) - len(names)
    used = [*names, at + "dataset.json"] if rule.startswith("dataset.json") else names
    missed = tree.left_out([*used, *besides], within)
    if others:
        missed[f"outside {some(folder[:-1] for folder in within)}"] = others
    return Layout(names, found, classes, "; ".join([*story, rule]), missed)


# ---- where the samples lie -------------------------------------------------------------------------------------------


def _descend(
    tree: Tree, samples: Sequence[str], split: str, labels: str | None
) -> tuple[str, tuple[str, ...], list[str]]:
    """The folder that holds the class folders, with a / at its end; where in it the samples lie; how it was found."""
    at, alone, story, shards = "", None, list[str](), list[str]()
    while not (at + "dataset.json" in tree.names and labels is None):
        here = [name[len(at) :] for name in samples if name.startswith(at)]
        splits = {top: split_of(top) for top in sorted({name.split("/")[0] for name in here if "/" in name})}
        loose = [name for name in here if "/" not in name]
        if loose and splits and (labels != "none" or any(splits.values())):
            raise DataError(
                f"{tree.label(at + loose[0])}: lies beside class folders or splits ({some(splits)}); "
                f"move it into one, or pass --ignore '{loose[0]}', or --root FOLDER"
            )
        if not splits or loose:
            break
        if not story and are_splits(splits):
            chosen, *others = pick_split(tree, at, splits, split, _has_cls(tree, at))
            if others:
                shards = [chosen, *others]
                story.append(f"split {split}, {len(shards)} shards")
                break
            alone = (at or ".") if len(splits) == 1 else alone
            at += chosen + "/"
            story.append(f"split {chosen}")
            continue
        if may_be_splits(splits):
            named = [top for top in splits if splits[top]]
            raise DataError(
                f"{tree.place(at)}: are {some(named)} of {some(splits)} splits, or classes? "
                f"pass --root '{at}{named[0]}' for a split, --root '{at or '.'}' for classes"
            )
        if len(splits) > 1 or labels is not None or all(map(_EDM.fullmatch, here)):
            break
        alone = at or "."
        at += next(iter(splits)) + "/"
        _check_gone(tree, alone.removeprefix("."), splits, f"pass --root '{at[:-1]}'")
    flat = alone and not any("/" in name[len(at) :] for name in samples if name.startswith(at))
    if flat and labels is None and at + "dataset.json" not in tree.names and not _has_cls(tree, at):
        raise DataError(
            f"{tree.place(at)}: all samples lie in this folder: a class, or no labels? "
            f"pass --root '{alone}' for one class, --labels none for no labels"
        )
    if split == "validation" and not story:
        raise DataError(f"{tree.path}: has no folder val; pass the validation set itself, without --split")
    return at, tuple(f"{at}{shard}/" for shard in shards) or (at,), story


# ---- what their labels are -------------------------------------------------------------------------------------------

_Found = tuple[np.ndarray | None, list[str] | None, str]


def _labelled(tree: Tree, names: Sequence[str], at: str, told: bool, labels: str | None, allow_empty: bool) -> _Found:
    """Labels, classes, and the rule. told: the user said that the classes lie at `at`."""
    inner = [name[len(at) :] for name in names]
    if _has_cls(tree, at) and at + "dataset.json" not in tree.names:
        _check_keys(tree, names)
    if labels == "none":
        return None, None, "no labels, as told"
    if labels == "parents":
        return _by_parent(tree, inner, at)
    if at + "dataset.json" in tree.names:
        return _by_json(tree, inner, at)
    if _has_cls(tree, at):
        return _by_cls(tree, names)
    tops = {name.split("/")[0] for name in inner if "/" in name}
    if not (told and tops):
        _check_beside(tree, names, at, bool(tops))
    if not tops:
        _check_flat(tree, inner, at)
        return None, None, "no labels: all files lie in one folder"
    if all(_EDM.fullmatch(name) for name in inner):
        return None, None, "no labels: names of EDM, without a dataset.json"
    nested = [name for name in tree.names if name.startswith(at) and name.endswith("/dataset.json")]
    if nested:
        raise DataError(
            f"{tree.label(nested[0])}: lies in one of several folders ({some(tops)}); "
            f"pass --root '{nested[0].rpartition('/')[0]}' to read that, or --ignore dataset.json"
        )
    if not told:
        _check_depth(tree, inner, at)
    if not told and (pairs := alike(sorted(tops))):
        one, other = pairs[0]
        raise DataError(
            f"{tree.place(at)}: are {one!r} and {other!r} one class? "
            f"give them one name, or pass --root '{at or '.'}' for two"
        )
    if not told and len(tops) > 1 and all(_CHUNK.fullmatch(top) or is_shard(top) for top in tops):
        raise DataError(
            f"{tree.place(at)}: folders {some(tops)} are classes, or chunks of one set? "
            f"pass --root '{at or '.'}' for classes, --labels none for chunks"
        )
    if not allow_empty:
        _check_gone(tree, at, tops, "pass --allow-empty to keep its number")
    classes = in_order([*tops, *_gone(tree, at, tops)])
    index = {name: i for i, name in enumerate(classes)}
    rule = f"class folders{' in ' + at[:-1] if at else ''}"
    return np.array([index[name.split("/")[0]] for name in inner], np.int64), classes, rule


def _by_parent(tree: Tree, inner: Sequence[str], at: str) -> _Found:
    folders = {name: name.rpartition("/")[0] for name in inner}
    last = {folder: folder.rpartition("/")[2] for folder in set(folders.values())}
    if "" in last or len(set(last.values())) < len(last):
        twice = next((f for f in sorted(last) if f == "" or list(last.values()).count(last[f]) > 1), "")
        raise DataError(f"{tree.place(at)}: {twice or 'a file'} has no folder name of its own; rename it")
    classes = in_order(last.values())
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[last[folders[name]]] for name in inner], np.int64), classes, "the folder of each file"


def _by_json(tree: Tree, inner: Sequence[str], at: str) -> _Found:
    where = tree.label(at + "dataset.json")
    table = json_labels(tree.read(at + "dataset.json"), where)
    if table is None:
        tops = {name.split("/")[0] for name in inner if "/" in name}
        if len(tops) > 1 and not all(top.isdigit() for top in tops):
            raise DataError(f"{where}: says no labels, but folders {some(tops)} do; pass --labels none|parents")
        return None, None, "dataset.json says no labels"
    table = {name.replace("\\", "/").removeprefix("./"): value for name, value in table.items()}
    for name, value in table.items():
        if type(value) is not str and (type(value) is not int or value < 0):
            numbering([value], f"{where}: {name}")  # raises for what is no label, and can name the file
    missing = [name for name in inner if name not in table]
    if missing:
        raise DataError(f"{where}: has no label for {missing[0]} and {len(missing) - 1} others; write it anew")
    number, classes = numbering((table[name] for name in table), where)
    gone = len(table) - len(inner)
    rule = "dataset.json" + (f" ({gone} of its files are not there)" if gone else "")
    return np.array([number(table[name]) for name in inner], np.int64), classes, rule


def _has_cls(tree: Tree, at: str) -> bool:
    return any(name.startswith(at) and name.endswith(".cls") for name in tree.names)


def _by_cls(tree: Tree, names: Sequence[str]) -> _Found:
    """WebDataset: the key of a sample is its name up to the first dot."""
    texts = {_key(name): name for name in tree.names if name.endswith(".cls")}
    missing = [name for name in names if _key(name) not in texts]
    if missing:
        raise DataError(f"{tree.label(missing[0])}: has no .cls file, {len(texts)} others have; pack the set anew")
    stated = [tree.read(texts[_key(name)]).decode(errors="replace").strip() for name in names]
    number, classes = numbering(stated, f"{tree.path}: .cls files")
    return np.array([number(text) for text in stated], np.int64), classes, ".cls files"


def _check_keys(tree: Tree, names: Sequence[str]) -> None:
    """Raises DataError where WebDataset's samples hold two images each, of which one is a mask perhaps."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(_key(name), name)
        if other != name:
            one, two = (each.rpartition("/")[2] for each in (other, name))
            long, short = sorted((each.partition(".")[2] for each in (one, two)), key=len, reverse=True)
            or_else = "" if long.endswith(f".{short}") else f", or '*.{short}'"  # *.png would leave out x.seg.png too
            raise DataError(
                f"{tree.label(other)}: {one} and {two} are of one sample: which is its image? "
                f"pass --ignore '*.{long}'{or_else}"
            )


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".")[0]


# ---- doubts ----------------------------------------------------------------------------------------------------------


def _check_beside(tree: Tree, names: Sequence[str], at: str, folders: bool) -> None:
    """Raises DataError where each file has a .json of its name, which may hold its label: WebDataset's shards, which
    would be taken for classes else, or for one set without labels."""
    tables = {_key(name): name for name in tree.names if ending(name) == ".json"}
    if tables.keys() >= {_key(name) for name in names}:
        classes = f", --root '{at or '.'}' for class folders" if folders else ""
        raise DataError(
            f"{tree.label(tables[_key(names[0])])}: may hold a label, as WebDataset has it, and is not read; write "
            f"each label to a .cls file beside it, or pass --labels none{classes}"
        )


def _check_flat(tree: Tree, inner: Sequence[str], at: str) -> None:
    """Raises DataError where a table beside the files, or their names, may hold labels."""
    tables = [name for name in tree.names if name.startswith(at) and ending(name) in _TABLES]
    tables = [name for name in tables if not _PLAIN_TEXT.match(name.rpartition("/")[2])]
    prefixes = Counter(found[1] for name in inner if (found := _PREFIX.fullmatch(name)))
    if tables:
        where, what = tree.label(tables[0]), "may hold the labels of the files beside it, which is not read"
    elif 1 < len(prefixes) <= len(inner) / 2 and sum(prefixes.values()) == len(inner):
        where, what = tree.place(at), f"names begin with {some(prefixes)}, perhaps their classes"
    else:
        return
    raise DataError(f"{where}: {what}; pass --labels none, or sort the files into class folders or a dataset.json")


def _check_depth(tree: Tree, inner: Sequence[str], at: str) -> None:
    """Raises DataError where folders below the first might be the classes: not if all hold one of the same name."""
    levels = {name.count("/") for name in inner}
    below = {tuple(name.split("/")[1:-1]) for name in inner}
    if len(levels) > 1 or len(below) > 1:
        deep = next(name for name in inner if name.count("/") == max(levels)).rpartition("/")[0]
        raise DataError(
            f"{tree.place(at)}: is the class of {deep} its first folder or its last? "
            f"pass --root '{at or '.'}' for the first, --labels parents for the last"
        )


def _gone(tree: Tree, at: str, tops: Iterable[str]) -> list[str]:
    """Folders beside `tops` without a sample, and not for documents either: classes that would be lost."""
    held: dict[str, set[str]] = {}
    for name in tree.folders:
        if name.startswith(at) and name != at[:-1]:
            held.setdefault(name[len(at) :].split("/")[0], set())
    for name in tree.names:
        if name.startswith(at) and "/" in name[len(at) :]:
            held.setdefault(name[len(at) :].split("/")[0], set()).add(ending(name))
    return sorted(top for top in held.keys() - set(tops) if not held[top] or held[top] - _DOCUMENTS)


def _check_gone(tree: Tree, at: str, tops: Iterable[str], way_out: str) -> None:
    gone = _gone(tree, at, tops)
    if gone:
        inside = Counter(ending(n) or "no ending" for n in tree.names if n.startswith(f"{at}{gone[0]}/"))
        raise DataError(
            f"{tree.place(at)}/{gone[0]}: holds no sample that is read "
            f"({_kinds(dict(inside))}) beside {some(tops)}; {way_out}, or --ignore '{gone[0]}'"
        )


def _kinds(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "it is empty"
