"""Latents of an autoencoder, one numpy file per image: a folder, or a zip of one.

    EDM2        00000/img-mean-std-00000000.npy [2C, h, w]: mean and standard deviation, with dataset.json
    fast-DiT    imagenet256_features/{i}.npy [1, C, h, w]: drawn already and times 0.18215,
                imagenet256_labels/{i}.npy [1]
    moments     *.npy [2C, h, w], or *.npz with `moments` and perhaps `moments_flip` (of the mirrored image), in class
                folders or with dataset.json. The second half is the log-variance for diffusers' SD-VAE (and MAR's and
                zhuyu-cs/MeanFlow's caches), the standard deviation for JAX MeanFlow: which, the user has to say.

What is written: mean and standard deviation [2C, h, w] ([4C, h, w] with the mirrored image's behind), or what was
drawn [C, h, w]; the manifest tells.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Literal, get_args

import numpy as np

from mmf_fast.data.formats.layout import Layout, lay_out, left_out
from mmf_fast.data.formats.sources import DataError, Item, Options, SampleError, Source
from mmf_fast.data.formats.trees import Tree

__all__ = ["LATENT_ENDINGS", "SD_SCALE", "Contents", "open_latents"]

LATENT_ENDINGS = (".npy", ".npz")
Contents = Literal["mean-std", "mean-logvar", "sample", "scaled-sample"]
SD_SCALE = 0.18215  # the factor that brings latents of the SD-VAE to about unit variance
_FAST_DIT = re.compile(r"_features/\d+\.npy$")
_LOGVAR_RANGE = (-30.0, 20.0)  # diffusers clips to it before it takes the exponential


def open_latents(tree: Tree, options: Options) -> Source:
    """Raises DataError, also where what the files hold cannot be told and is not said."""
    contents = options.latents
    features = sorted((name for name in tree.names if _FAST_DIT.search(name)), key=lambda name: (len(name), name))
    if features:  # in the order of their numbers
        used = [*features, *(re.sub(r"_features/(\d+\.npy)$", r"_labels/\1", name) for name in features)]
        found = Layout(features, None, None, "labels of fast-DiT", left_out(tree, used))
        contents = contents or "scaled-sample"
    else:
        found = lay_out(tree, LATENT_ENDINGS, options)
        contents = contents or ("mean-std" if all("img-mean-std-" in name for name in found.names) else None)
    if contents is None:
        raise DataError(
            f"{tree.path}: what the files hold cannot be told; pass --latents {'|'.join(get_args(Contents))}"
        )
    flipped = found.names[0].endswith(".npz") and _has_flip(tree, found.names[0])
    facts = {
        "holds": "mean-std" if contents.startswith("mean") else "sample",
        "scaled_by": SD_SCALE if contents == "scaled-sample" else 1.0,
        "flipped": flipped,
    }

    def items() -> Iterator[Item]:
        for i, name in enumerate(found.names):
            label = None if found.labels is None else int(found.labels[i])
            label = _fast_dit_label(tree, name) if features else label
            yield Item(tree.label(name), label, partial(_load, tree, name, contents, flipped))

    return Source("latents", "latents", items, tree.identity(), len(found.names), facts=facts, **found.described())


def _fast_dit_label(tree: Tree, name: str) -> int:
    value = _array(tree, re.sub(r"_features/(\d+\.npy)$", r"_labels/\1", name))
    if value.shape not in ((), (1,)) or value.dtype.kind not in "iu" or value.min() < 0:
        raise DataError(
            f"{tree.label(name)}: its label is {value.dtype} {value.shape}, not one number; extract it again"
        )
    return int(value.reshape(()))


def _load(tree: Tree, name: str, contents: str, flipped: bool) -> np.ndarray:
    if not name.endswith(".npz"):
        return _decoded(_array(tree, name), contents, tree.label(name))
    keys = ("moments", "moments_flip") if flipped else ("moments",)
    return np.concatenate([_decoded(_array(tree, name, key), contents, tree.label(name)) for key in keys])


def _decoded(value: np.ndarray, contents: str, name: str) -> np.ndarray:
    """(2C, h, w) moments or (C, h, w) sample, of a leading 1 freed, as float32; the second half of moments is std."""
    if value.ndim == 4 and value.shape[0] == 1:
        value = value[0]
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


def _has_flip(tree: Tree, name: str) -> bool:
    try:
        with zipfile.ZipFile(io.BytesIO(tree.read(name))) as archive:
            return "moments_flip.npy" in archive.namelist()
    except zipfile.BadZipFile:
        return False  # reading it will tell


def _array(tree: Tree, name: str, key: str | None = None) -> np.ndarray:
    """A numpy file, without pickles. Raises SampleError."""
    data = tree.read(name)
    try:
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        return loaded if key is None else loaded[key]
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise SampleError(f"{tree.label(name)}: cannot be read as numpy ({reason})") from error
