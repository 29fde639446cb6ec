"""Images as files: a folder, or a zip of one, in any format PIL decodes.

    EDM            00000/img00000000.png, and dataset.json {"labels": [[name, int], ...]} or {"labels": null}
    class folders  n01440764/*.JPEG, one class per folder, in sorted order
    plain          images in the folder itself, without labels

All become 8-bit RGB. A size asked for is reached by ADM's centre crop (guided-diffusion, `center_crop_arr`).
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmf_fast.data.formats.sources import DataError, Item, SampleError, Source
from mmf_fast.data.formats.trees import Tree, open_tree

__all__ = ["IMAGE_ENDINGS", "centre_crop", "decode_image", "json_labels", "labels_of", "open_images", "split_folder"]

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")
_SPLIT_FOLDERS = {"train": ["train"], "validation": ["val", "validation", "valid", "test"]}
_EIGHT_BITS = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}


def open_images(path: Path, split: str, size: int | None) -> Source:
    """A folder or a zip of images; of a folder with train and val below it, the one of the split. Raises DataError."""
    tree = open_tree(split_folder(path, split))
    names = [name for name in tree.names if name.lower().endswith(IMAGE_ENDINGS)]
    if not names:
        raise DataError(f"{tree.path}: holds no images; pass a folder or zip with {', '.join(IMAGE_ENDINGS[:4])} files")
    labels, classes = labels_of(tree, names)

    def items() -> Iterator[Item]:
        for name, label in zip(names, [None] * len(names) if labels is None else labels.tolist(), strict=True):
            yield Item(tree.label(name), label, partial(_load, tree, name, size))

    return Source("images", "images", items, tree.identity(), len(names), len(classes) if classes else None, classes)


def split_folder(path: Path, split: str) -> Path:
    """path/train or path/val where path holds such folders and no others, else path for training. Raises DataError."""
    folders = {entry.name for entry in path.iterdir() if entry.is_dir()} if path.is_dir() else set()
    if folders <= {name for names in _SPLIT_FOLDERS.values() for name in names}:  # else `train` may be a class
        for name in _SPLIT_FOLDERS[split]:
            if name in folders:
                return path / name
    if split == "validation":
        raise DataError(f"{path}: has no folder val; pass the validation set itself, without --split")
    return path


def labels_of(tree: Tree, names: Sequence[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels (N,) int64 and class names, each None where there are none. Raises DataError."""
    if "dataset.json" in tree.names:
        table = json_labels(tree.read("dataset.json"), tree.label("dataset.json"))
        return (None if table is None else _from_table(table, names, tree.label("dataset.json"))), None
    folders = [name.split("/")[0] if "/" in name else "" for name in names]
    if not any(folders) or all(re.fullmatch(r"\d{5}/img[-\w]*\d{8}\.\w+", name) for name in names):
        return None, None
    if not all(folders):
        loose = names[folders.index("")]
        raise DataError(f"{tree.label(loose)}: lies beside class folders; move it into one, or away")
    classes = sorted(set(folders))
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[folder] for folder in folders], np.int64), classes


def json_labels(text: bytes, name: str) -> dict[str, int] | None:
    """dataset.json of EDM -> {file: label}; None where it says that there are no labels. Raises DataError."""
    try:
        labels = json.loads(text)["labels"]
        table = None if labels is None else {str(file): label for file, label in labels}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{name}: is not {{"labels": [[name, int], ...]}} ({error}); write it anew') from error
    for file, label in (table or {}).items():
        if type(label) is not int or label < 0:
            raise DataError(f"{name}: label of {file} is {label!r}, not a number from 0; write it anew")
    return table


def _from_table(table: Mapping[str, int], names: Sequence[str], label: str) -> np.ndarray:
    missing = [name for name in names if name not in table]
    if missing:
        raise DataError(f"{label}: has no label for {missing[0]} and {len(missing) - 1} others; write it anew")
    return np.array([table[name] for name in names], np.int64)


# ---- decoding --------------------------------------------------------------------------------------------------------


def _load(tree: Tree, name: str, size: int | None) -> np.ndarray:
    return decode_image(tree.read(name), tree.label(name), size)


def decode_image(data: bytes, name: str, size: int | None = None) -> np.ndarray:
    """Encoded bytes -> (3, H, W) uint8 RGB; transparency is dropped. Raises SampleError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of doubtful metadata, and of sizes that PIL would still decode
            image: Image.Image = Image.open(io.BytesIO(data))
            if image.mode not in _EIGHT_BITS:
                raise SampleError(f"{name}: has more than 8 bits per channel (mode {image.mode}); convert it first")
            image = image.convert("RGB")
    except SampleError:
        raise
    except UnidentifiedImageError as error:
        raise SampleError(f"{name}: is not an image that PIL can read") from error
    except Exception as error:  # PIL's decoders raise many kinds; all of them mean this
        raise SampleError(f"{name}: does not decode ({' '.join(str(error).split())})") from error
    if size is not None:
        image = centre_crop(image, size)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's: halve with a box filter while twice too large, bicubic so that the short side fits, cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
