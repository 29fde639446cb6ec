"""Images as files, in any format that PIL decodes: in a folder or an archive.

Which are samples, and their labels: layout.py. Their pixels: pixels.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from mmf_fast.data.formats.layout import lay_out
from mmf_fast.data.formats.pixels import Pixels, survey
from mmf_fast.data.formats.sources import Item, Options, Source
from mmf_fast.data.formats.trees import Tree

__all__ = ["IMAGE_ENDINGS", "open_images"]

IMAGE_ENDINGS = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".tga", ".qoi"),
)


def open_images(tree: Tree, options: Options) -> Source:
    """Raises DataError for a layout or pixels that can be read in more than one way."""
    found = lay_out(tree, IMAGE_ENDINGS, options)
    count = len(found.names)
    opened = ((tree.label(name), partial(tree.open, name)) for name in found.names)
    pixels, looks = survey(opened, count, options)

    def items() -> Iterator[Item]:
        for i, name in enumerate(found.names):
            label = None if found.labels is None else int(found.labels[i])
            yield Item(tree.label(name), label, partial(_load, tree, name, pixels))

    return Source("images", "images", items, count=count, looks=looks, **found.described())


def _load(tree: Tree, name: str, pixels: Pixels) -> np.ndarray:
    return pixels.decode(tree.read(name), tree.label(name))
