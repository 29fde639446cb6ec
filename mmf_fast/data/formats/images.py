"""Images as files, in any format that PIL decodes: a folder or an archive, see layout.py.

All become 8-bit RGB. A size asked for is reached by ADM's centre crop (guided-diffusion, `center_crop_arr`).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from functools import partial

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmf_fast.data.formats.layout import lay_out
from mmf_fast.data.formats.sources import Item, Options, SampleError, Source
from mmf_fast.data.formats.trees import Tree

__all__ = ["IMAGE_ENDINGS", "centre_crop", "decode_image", "open_images"]

IMAGE_ENDINGS = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".tga", ".qoi"),
)
_EIGHT_BITS = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}


def open_images(tree: Tree, options: Options) -> Source:
    """Raises DataError for a layout that can be read in more than one way."""
    found = lay_out(tree, IMAGE_ENDINGS, options)

    def items() -> Iterator[Item]:
        for i, name in enumerate(found.names):
            label = None if found.labels is None else int(found.labels[i])
            yield Item(tree.label(name), label, partial(_load, tree, name, options.size))

    return Source("images", "images", items, tree.identity(), len(found.names), **found.described())


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
