"""From encoded images to (C, H, W) uint8: what a whole set decides, and how one is decoded.

All images are looked at before the first is decoded, by their headers: a set of several sizes, of greyscale and colour
images, or with transparent pixels is refused at once, not after an hour, unless an option decides.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from mmf_fast.data.formats.sources import DataError, Options, SampleError

__all__ = ["Pixels", "centre_crop", "survey"]

_GREY = {"1", "L", "LA", "La"}
_EIGHT_BITS = _GREY | {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
_ORIENTATION = 0x0112  # the EXIF tag: 1 is upright, from 5 on height and width change places
_LOOKED_AT = 512  # images handed to the threads at once
_FEW = 2048  # fewer need no bar


class Pixels(NamedTuple):
    """What all images of a set become.

    channels: 1 or 3.  size: side of ADM's centre crop (guided-diffusion, `center_crop_arr`), None: as it is.
    background: RGB below transparent pixels; None: the colours that are stored there, which no viewer shows.
    """

    channels: int = 3
    size: int | None = None
    background: tuple[int, int, int] | None = None

    def decode(self, data: bytes, name: str) -> np.ndarray:
        """Encoded bytes -> (channels, H, W) uint8, upright by EXIF. Raises SampleError."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of doubtful metadata, and of sizes that PIL would still decode
                image: Image.Image = Image.open(io.BytesIO(data))
                if image.mode not in _EIGHT_BITS:
                    raise SampleError(f"{name}: has more than 8 bits per channel (mode {image.mode}); convert it first")
                image = ImageOps.exif_transpose(image)
                if self.background is not None and _may_be_transparent(image):
                    below = Image.new("RGBA", image.size, (*self.background, 255))
                    image = Image.alpha_composite(below, image.convert("RGBA"))
                image = image.convert("L" if self.channels == 1 else "RGB")
        except SampleError:
            raise
        except UnidentifiedImageError as error:
            raise SampleError(f"{name}: is not an image that PIL can read") from error
        except Exception as error:  # PIL's decoders raise many kinds; all of them mean this
            raise SampleError(f"{name}: does not decode ({' '.join(str(error).split())})") from error
        if self.size is not None:
            image = centre_crop(image, self.size)
        array = np.asarray(image)
        return array[None].copy() if self.channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """As ADM does it: halves with a box filter while the image is twice too large, resizes the short side to `size` by
    bicubic interpolation, and cuts out the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# ---- looking ---------------------------------------------------------------------------------------------------------


class _Look(NamedTuple):
    """size: (width, height), upright.  clear: some pixel is not opaque.  moves: it has several frames."""

    size: tuple[int, int]
    grey: bool
    turned: bool
    clear: bool
    moves: bool


def survey(
    images: Iterable[tuple[str, Callable[[], BinaryIO]]], count: int, options: Options
) -> tuple[Pixels, dict[str, int]]:
    """What all images of the set become (`Pixels`), and {kind: how many images are of it}, from all their headers.

    Raises DataError where they differ in what an option has to decide. What cannot be read is passed over here.
    """
    looks: Counter[str] = Counter()
    first: dict[str, str] = {}
    sizes: dict[tuple[int, int], str] = {}
    for name, look in _looks(images, count):
        if look is None:
            continue
        kinds = {
            "greyscale" if look.grey else "colour": True,
            "turned upright": look.turned,
            "with transparent pixels": look.clear,
            "of several frames, of which the first is taken": look.moves,
        }
        for kind in (kind for kind, holds in kinds.items() if holds):
            looks[kind] += 1
            first.setdefault(kind, name)
        sizes.setdefault(look.size, name)
    channels = options.channels or (1 if looks["greyscale"] and not looks["colour"] else 3)
    if options.channels is None and looks["greyscale"] and looks["colour"]:
        few = min("greyscale", "colour", key=looks.__getitem__)
        raise DataError(
            f"{first[few]}: is {few}, as {looks[few]} of {count} images are; pass --channels 3 (or 1) for all"
        )
    if options.size is None and len(sizes) > 1:
        (one, _), (other, name) = list(sizes.items())[:2]
        raise DataError(
            f"{name}: is {channels}x{other[1]}x{other[0]}, those before are {channels}x{one[1]}x{one[0]}; "
            f"pass --size to crop and resize all (there are {len(sizes)} sizes)"
        )
    if options.background is None and (clear := looks["with transparent pixels"]):
        raise DataError(
            f"{first['with transparent pixels']}: has transparent pixels, as {clear} of {count} images have; "
            "pass --background white (or another colour), or none for the colours hidden there"
        )
    shown = {kind: number for kind, number in looks.items() if number}
    return Pixels(channels, options.size, background(options.background)), shown


def background(text: str | None) -> tuple[int, int, int] | None:
    """RGB of a colour's name or #rrggbb; None for none. Raises DataError."""
    if text is None or text == "none":
        return None
    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise DataError(f"--background {text}: is no colour; pass a name, #rrggbb, or none") from error


def _looks(images: Iterable[tuple[str, Callable[[], BinaryIO]]], count: int) -> Iterator[tuple[str, _Look | None]]:
    source = iter(images)
    bar = tqdm(total=count, desc="looking at the images", unit="image", disable=count < _FEW, file=sys.stderr)
    with bar, ThreadPoolExecutor(min(os.cpu_count() or 1, 32)) as pool:
        while some := list(islice(source, _LOOKED_AT)):
            yield from zip((name for name, _ in some), pool.map(lambda entry: _look(entry[1]), some), strict=True)
            bar.update(len(some))


def _look(opened: Callable[[], BinaryIO]) -> _Look | None:
    """Reads the header alone, except of images that may be transparent or have a palette. None if it cannot be read."""
    try:
        with warnings.catch_warnings(), opened() as file:
            warnings.simplefilter("ignore")
            image = Image.open(file)
            if image.mode not in _EIGHT_BITS:
                return None
            orientation = _orientation(image)
            size = image.size
            if orientation >= 5:  # newer versions of PIL turn TIFF themselves
                turned = image.format == "TIFF"
                size = ImageOps.exif_transpose(image).size if turned else (size[1], size[0])
            grey = image.mode in _GREY or (image.mode == "P" and _is_grey_palette(image))
            clear = _may_be_transparent(image) and bool((np.asarray(image.convert("RGBA"))[..., 3] < 255).any())
            return _Look(size, grey, orientation > 1, clear, getattr(image, "is_animated", False))
    except Exception:  # the pass that decodes it will say what is wrong
        return None


def _may_be_transparent(image: Image.Image) -> bool:
    return image.mode in _ALPHA or "transparency" in image.info


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # PIL would decode the whole image to look for a chunk that follows it
    return int(image.getexif().get(_ORIENTATION, 1) or 1)


def _is_grey_palette(image: Image.Image) -> bool:
    colours = np.array(image.getpalette("RGB")).reshape(-1, 3)
    used = np.unique(np.asarray(image))
    return bool((colours[used] == colours[used, :1]).all())
