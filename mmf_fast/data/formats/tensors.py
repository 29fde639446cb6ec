"""Named arrays of one file: .npy, .npz, .safetensors, .pt. None is read in a way that could run code."""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from mmf_fast.data.formats.sources import SampleError
from mmf_fast.data.formats.trees import Tree, ending

__all__ = ["TENSOR_ENDINGS", "read_tensors"]

TENSOR_ENDINGS = (".npy", ".npz", ".safetensors", ".pt", ".pth")


def read_tensors(tree: Tree, name: str) -> dict[str, np.ndarray]:
    """{key: array} of a file, the key being empty where it holds one array without a name; bfloat16 becomes float32.

    Raises SampleError for a damaged file, and for a pickle that asks for more than tensors, numbers and text.
    """
    data, place = tree.read(name), tree.label(name)
    kind = ending(name)
    try:
        if kind in (".npy", ".npz"):
            loaded = np.load(io.BytesIO(data), allow_pickle=False)
            return {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        if kind == ".safetensors":
            return {key: _array(value) for key, value in load_safetensors(data).items()}
        return _named(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        asked = reason[reason.find("GLOBAL") :][:60] if "GLOBAL" in reason else reason[:60]
        raise SampleError(
            f"{place}: asks for more than tensors ({asked}), refused, for it may run code; save tensors alone"
        ) from error
    except (ValueError, EOFError, OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise SampleError(f"{place}: cannot be read as {_KINDS[kind]} ({_line(error)})") from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise SampleError(f"{place}: cannot be read as {_KINDS[kind]} ({_line(error)})") from error


_KINDS = {".npy": "numpy", ".npz": "numpy", ".safetensors": "safetensors", ".pt": "torch", ".pth": "torch"}


def _named(value: Any) -> dict[str, np.ndarray]:
    if isinstance(value, dict):
        kept = {str(key): entry for key, entry in value.items() if isinstance(entry, (torch.Tensor, int, float, str))}
        return {key: _array(entry) for key, entry in kept.items()}
    if isinstance(value, (list, tuple)) and value and all(isinstance(entry, torch.Tensor) for entry in value):
        value = torch.stack(list(value))
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"holds a {type(value).__name__}, not tensors")
    return {"": _array(value)}


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    value = value.detach()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
