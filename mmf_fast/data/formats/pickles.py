"""Pickled dictionaries of numpy arrays and lists, read without running anything they ask for.

A pickle is a program: it may import any function and call it. Here it gets stand-ins for the few names that arrays
are pickled with, and every other name is refused. Not even numpy's own unpickling is called, which trusts what it is
given; the stand-ins also share the bytes of the pickle, so that a large array is held once and not twice.
"""

from __future__ import annotations

import pickle
from typing import Any, BinaryIO

import numpy as np

from mmf_fast.data.formats.sources import DataError

__all__ = ["load_dict"]


def load_dict(file: BinaryIO, name: str) -> dict[str, Any]:
    """The pickled dict in `file`, also one written by Python 2: keys as str, arrays read-only.

    name: what errors call the file. Raises DataError for a damaged pickle, for one that would run code, and for one
    that holds something else.
    """
    try:
        value = _Unpickler(file, encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except Exception as error:  # damaged bytes are a random program: any exception may come out of it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name}: damaged or truncated, or no pickle ({reason}); fetch it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{name}: holds a {type(value).__name__}, not a dict with data and labels; pass another file")
    return _plain(value, depth=2)


class _Unpickler(pickle._Unpickler):  # not the one in C, which may allocate any size for a damaged index
    def find_class(self, module: str, name: str) -> Any:
        found = _NAMES.get((module.replace("numpy._core", "numpy.core"), name))
        if found is None:
            raise DataError(
                f"asks for {module}.{name}; refused, for a pickle may run code that way; fetch the file from its origin"
            )
        return found


class _DType:
    """Stands in for numpy.dtype: plain numbers only."""

    def __init__(self, text: str | bytes, *flags: Any) -> None:
        self.value = np.dtype(_text(text))
        if self.value.kind not in "biuf":
            raise DataError(f"holds an array of dtype {self.value}; only numbers are read")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.value = self.value.newbyteorder(_text(state[1]))  # type: ignore[arg-type]  # refuses what it does not know


class _Array:
    """Stands in for numpy.ndarray; `value` is the array."""

    value: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _array(raw, dtype, shape, "F" if fortran else "C").value


def _array(raw: bytes, dtype: _DType, shape: tuple[int, ...], order: str | bytes = "C") -> _Array:
    result = _Array()
    result.value = np.frombuffer(raw, dtype.value).reshape(shape, order="F" if _text(order) == "F" else "C")
    return result


def _reconstruct(*arguments: Any) -> _Array:
    return _Array()


def _scalar(dtype: _DType, raw: bytes) -> Any:
    return np.frombuffer(raw, dtype.value, count=1)[0].item()


def _encode(text: str, encoding: str | bytes = "latin1") -> bytes:
    """Python 3 writes bytes this way into pickles of protocol 2."""
    if _text(encoding) not in ("latin1", "latin-1"):
        raise DataError(f"asks for the codec {encoding!r}; refused, fetch the file from its origin")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Stands in for the type bytes, which is called for an empty one."""
    return b""


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _array,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
}


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _plain(value: Any, depth: int) -> Any:
    """depth: how many levels of dicts are converted. A pickle may hold a dict that contains itself."""
    if isinstance(value, dict) and depth:
        return {_text(key): _plain(item, depth - 1) for key, item in value.items()}
    return value.value if isinstance(value, _Array) else value
