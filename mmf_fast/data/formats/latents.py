"""Latents of an autoencoder, in a folder or an archive.

    EDM2           00000/img-mean-std-00000000.npy [2C, h, w]: mean and standard deviation, with dataset.json
    fast-DiT       imagenet256_features/{i}.npy [1, C, h, w]: drawn already and times 0.18215,
                   imagenet256_labels/{i}.npy [1]
    LightningDiT   *.safetensors with latents [N, C, h, w], latents_flip, labels [N]; latents_stats.pt with mean and std
    one per file   .npy, .npz, .pt, .safetensors in class folders or with dataset.json: [2C, h, w] moments or [C, h, w]
                   latents, perhaps with a key: moments and moments_flip (MAR), latents, mean and std, mean and logvar;
                   perhaps with a label

The second half of moments is the log-variance for diffusers' SD-VAE (and in MAR's caches), the standard deviation for
JAX MeanFlow: which, the user has to say. Statistics are stated by a file latents_stats.pt (or stats.npz, ...) with mean
and std, or by a VAE's config.json of diffusers.

What is written: mean and standard deviation [2C, h, w] ([4C, h, w] with the mirrored image's behind), or what was
drawn [C, h, w]; the manifest tells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from mmf_fast.data.formats.layout import Layout, lay_out
from mmf_fast.data.formats.sources import DataError, Item, Options, SampleError, Source
from mmf_fast.data.formats.tensors import TENSOR_ENDINGS, read_tensors
from mmf_fast.data.formats.trees import Tree, ending

__all__ = ["LATENT_ENDINGS", "SD_SCALE", "Contents", "open_latents"]

Contents = Literal["mean-std", "mean-logvar", "sample", "scaled-sample"]
LATENT_ENDINGS = TENSOR_ENDINGS
SD_SCALE = 0.18215  # the factor that brings latents of the SD-VAE to about unit variance
_FAST_DIT = re.compile(r"_features/\d+\.npy$")
_STATISTICS = re.compile(r"(latents?[-_])?(stats|statistics)\.(pt|npz|safetensors)")
_LOGVAR_RANGE = (-30.0, 20.0)  # diffusers clips to it before it takes the exponential
_ONE = ("moments", "latents", "latent", "z", "x", "samples", "features", "")  # keys of what is the latent
_LABEL = ("labels", "label", "y", "cls", "class")


class _Keys(NamedTuple):
    """Where in a file the latent is.

    parts: its keys: one, or mean and deviation.  flip: those of the mirrored image's.  label: None where none is there.
    many: the file holds many latents.  contents: where the keys tell it.
    """

    parts: tuple[str, ...]
    flip: tuple[str, ...]
    label: str | None
    many: bool
    contents: str | None


def open_latents(tree: Tree, options: Options) -> Source:
    """Raises DataError, also where what the files hold cannot be told and is not said."""
    stats = [name for name in tree.names if _STATISTICS.fullmatch(name.rpartition("/")[2])]
    features = sorted((name for name in tree.names if _FAST_DIT.search(name)), key=lambda name: (len(name), name))
    files = features or [name for name in tree.names if ending(name) in LATENT_ENDINGS and name not in stats]
    if not files:
        raise DataError(f"{tree.path}: holds no latents; pass a folder or archive with {', '.join(LATENT_ENDINGS)}")
    first = read_tensors(tree, files[0])
    if any(value.dtype == np.uint8 and value.ndim >= 3 for value in first.values()):
        raise DataError(f"{tree.label(files[0])}: holds bytes, as images do; save them as PNG, or all in one npz")
    keys = _keys_of(first, tree.label(files[0]))
    shape = first[keys.parts[0]].shape
    if keys.many and shape[1] > 3 >= shape[3]:
        raise DataError(f"{tree.label(files[0])}: {shape} are images as floats; save them as uint8, 0 .. 255")
    if features:  # in the order of their numbers
        used = [*features, *map(_fast_dit_name, features)]
        found = Layout(features, None, None, "labels of fast-DiT", tree.left_out(used))
        contents: str | None = options.latents or "scaled-sample"
    else:
        inside = keys.label is not None and options.labels is None
        found = lay_out(
            tree, LATENT_ENDINGS, replace(options, labels="none") if inside or keys.many else options, stats
        )
        if keys.many and not inside and options.labels != "none":
            raise DataError(f"{tree.label(files[0])}: has many latents and no labels; pass --labels none")
        found = replace(found, rule=f"labels in the files ({keys.label})") if inside else found
        named = all("img-mean-std-" in name for name in found.names)
        contents = options.latents or ("mean-std" if named else keys.contents)
    if contents is None:
        raise DataError(
            f"{tree.path}: what the files hold cannot be told; pass --latents {'|'.join(get_args(Contents))}"
        )
    facts = {
        "holds": "mean-std" if contents.startswith("mean") else "sample",
        "scaled_by": SD_SCALE if contents == "scaled-sample" else 1.0,
        "flipped": bool(keys.flip),
    }
    statistics = _stated(tree, stats, contents)
    one = partial(_items_of_one, tree, found, keys, contents, bool(features))
    return Source(
        "latents",
        "latents",
        partial(_items_of_many, tree, found, keys, contents) if keys.label is not None or keys.many else one,
        count=None if keys.many else len(found.names),
        facts=facts,
        statistics=statistics,
        **found.described(),
    )


def _items_of_one(tree: Tree, found: Layout, keys: _Keys, contents: str, fast_dit: bool) -> Iterator[Item]:
    """A latent per file, its label told by the layout."""
    for i, name in enumerate(found.names):
        label = None if found.labels is None else int(found.labels[i])
        label = _fast_dit_label(tree, name) if fast_dit else label
        yield Item(tree.label(name), label, partial(_load, tree, name, keys, contents))


def _items_of_many(tree: Tree, found: Layout, keys: _Keys, contents: str) -> Iterator[Item]:
    """Many latents per file, or their label in it: a file is read whole, before its first latent."""
    use_labels = keys.label is not None and found.rule.startswith("labels in")
    for file, name in enumerate(found.names):
        tensors, place = read_tensors(tree, name), tree.label(name)
        views = _views(tensors, keys, place)
        count = len(views[0][0]) if keys.many else 1
        labels = _labels(tensors, keys.label, count, place) if use_labels else None
        for i in range(count):
            rows = [[part[i] if keys.many else part for part in view] for view in views]
            label = labels[i] if labels is not None else None
            label = int(found.labels[file]) if found.labels is not None else label
            item = f"{place}[{i}]" if keys.many else place
            yield Item(item, label, partial(_joined, rows, contents, item))


# ---- what is in a file -----------------------------------------------------------------------------------------------


def _keys_of(tensors: Mapping[str, np.ndarray], place: str) -> _Keys:
    floats = {key: value for key, value in tensors.items() if value.dtype.kind == "f" and value.ndim >= 3}
    label = next((key for key in _LABEL if key in tensors), None)
    contents: str | None = None
    parts: tuple[str, ...]
    if {"mean", "std"} <= floats.keys():
        parts, contents = ("mean", "std"), "mean-std"
    elif {"mean", "logvar"} <= floats.keys():
        parts, contents = ("mean", "logvar"), "mean-logvar"
    else:
        known = [key for key in _ONE if key in floats] or [key for key in floats if "flip" not in key]
        if len(known) != 1:
            if len(tensors) == 1:  # it is no latent; the error comes when it is read
                known = list(tensors)
            else:
                raise DataError(f"{place}: which of {', '.join(tensors)} is the latent? save it alone, or as `latents`")
        parts = (known[0],)
        contents = "sample" if parts[0] in ("latents", "latent") else None
    flip = tuple(key for part in parts for key in (f"{part}_flip", f"{part}_flipped") if key in floats)
    many = tensors[parts[0]].ndim == 4 and (len(tensors[parts[0]]) > 1 or _is_table(tensors, label))
    return _Keys(parts, flip if len(flip) == len(parts) else (), label, many, contents)


def _is_table(tensors: Mapping[str, np.ndarray], label: str | None) -> bool:
    return label is not None and label.endswith("s") and tensors[label].ndim == 1


def _views(tensors: Mapping[str, np.ndarray], keys: _Keys, place: str) -> list[list[np.ndarray]]:
    missing = [key for key in (*keys.parts, *keys.flip) if key not in tensors]
    if missing:
        raise SampleError(f"{place}: cannot be read as the others: it has no {', '.join(missing)}")
    return [[tensors[key] for key in part] for part in (keys.parts, keys.flip) if part]


def _labels(tensors: Mapping[str, np.ndarray], key: str | None, count: int, place: str) -> list[int]:
    value = tensors.get(key or "")
    if value is None or value.size != count or value.dtype.kind not in "iu" or (value < 0).any():
        what = "missing" if value is None else f"{value.dtype} {value.shape}"
        raise DataError(f"{place}: its labels are {what}, not {count} numbers from 0; write them anew")
    return [int(v) for v in value.reshape(-1)]


def _load(tree: Tree, name: str, keys: _Keys, contents: str) -> np.ndarray:
    place = tree.label(name)
    return _joined(_views(read_tensors(tree, name), keys, place), contents, place)


def _joined(views: list[list[np.ndarray]], contents: str, name: str) -> np.ndarray:
    decoded = []
    for view in views:
        parts = [part[0] if part.ndim == 4 and len(part) == 1 else part for part in view]
        decoded.append(_decoded(np.concatenate(parts) if len(parts) > 1 else parts[0], contents, name))
    return np.concatenate(decoded)


def _decoded(value: np.ndarray, contents: str, name: str) -> np.ndarray:
    """(2C, h, w) moments or (C, h, w) sample as float32; the second half of moments becomes the standard deviation."""
    if value.ndim != 3 or value.dtype.kind != "f" or 0 in value.shape:
        raise SampleError(f"{name}: is {value.dtype} {value.shape}, not a latent (channels, h, w) of floats")
    value = value.astype(np.float32)
    if contents.startswith("mean"):
        if len(value) % 2:
            raise SampleError(f"{name}: has {len(value)} channels, which are not means and as many deviations")
        mean, second = np.split(value, 2)
        std = np.exp(0.5 * np.clip(second, *_LOGVAR_RANGE)) if contents == "mean-logvar" else second
        if (std < 0).any():
            raise SampleError(f"{name}: has negative standard deviations; perhaps --latents mean-logvar")
        value = np.concatenate([mean, std])
    if not (np.abs(value) <= np.finfo(np.float16).max).all():  # also catches nan
        raise SampleError(f"{name}: has values that are not finite in float16")
    return value


# ---- what lies beside ------------------------------------------------------------------------------------------------


def _fast_dit_name(name: str) -> str:
    return re.sub(r"_features/(\d+\.npy)$", r"_labels/\1", name)


def _fast_dit_label(tree: Tree, name: str) -> int:
    value = read_tensors(tree, _fast_dit_name(name))[""]
    if value.shape not in ((), (1,)) or value.dtype.kind not in "iu" or value.min() < 0:
        raise DataError(
            f"{tree.label(name)}: its label is {value.dtype} {value.shape}, not one number; extract it again"
        )
    return int(value.reshape(()))


def _stated(tree: Tree, stats: list[str], contents: str) -> dict[str, Any] | None:
    """mean, std and where they come from; of the latents as they are stored. None where nothing states them."""
    if contents == "scaled-sample":
        return {"mean": [0.0], "std": [1.0], "from": f"the format: times {SD_SCALE} already"}
    if len(stats) > 1:
        raise DataError(f"{tree.path}: has statistics in {stats[0]} and {stats[1]}; pass --ignore for one")
    if stats:
        place, table = tree.label(stats[0]), read_tensors(tree, stats[0])
        if not {"mean", "std"} <= table.keys():
            raise DataError(f"{place}: has {', '.join(table)}, not mean and std; mend it, or --ignore it")
        return _checked(table["mean"], table["std"], place)
    configs = [name for name in tree.names if name.rpartition("/")[2] == "config.json"]
    for name in configs:
        try:
            config = json.loads(tree.read(name))
            factor = float(config.get("scaling_factor") or 1.0)
            if not {"scaling_factor", "latents_std"} & config.keys():
                continue  # of something else than a VAE
        except (ValueError, AttributeError, TypeError):
            continue
        std = np.asarray(config.get("latents_std") or [1.0], np.float64) / factor
        mean = np.asarray(config.get("latents_mean") or [config.get("shift_factor") or 0.0], np.float64)
        return _checked(mean, std, tree.label(name))
    return None


def _checked(mean: Any, std: Any, place: str) -> dict[str, Any]:
    mean, std = (np.asarray(value, np.float64).reshape(-1) for value in (mean, std))
    if mean.shape != std.shape and 1 not in (len(mean), len(std)):
        raise DataError(f"{place}: mean is of {len(mean)} channels, std of {len(std)}; mend it, or --ignore it")
    mean, std = np.broadcast_arrays(mean, std)
    if not (np.isfinite(mean) & np.isfinite(std) & (std > 0)).all():
        raise DataError(f"{place}: mean and std must be finite, and std positive; mend it, or --ignore it")
    return {"mean": mean.tolist(), "std": std.tolist(), "from": place}
