"""Reads a whole source, as the tests of formats compare it."""

from pathlib import Path
from typing import Any

import numpy as np

from mmf_fast.data.formats import Source, detect, open_source


def read(path: Path, expected_format: str, **options: Any) -> tuple[np.ndarray, list[int | None] | None, Source]:
    """Samples, labels or None, and the source, the format being detected."""
    assert detect(path) == expected_format
    source = open_source(path, **options)
    items = list(source.items())
    assert source.count in (None, len(items))
    assert len({item.name for item in items}) == len(items)
    labels = [item.label for item in items]
    return np.stack([item.load() for item in items]), None if labels[0] is None else labels, source
