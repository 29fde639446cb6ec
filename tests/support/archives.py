"""Tiny archives in every format, byte for byte as their publishers write them, from arrays the tests know."""

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def pictures(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    """(count, 3, side, side) uint8, all different."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), np.uint8)


def png(image: np.ndarray) -> bytes:
    """(3, H, W) uint8 -> PNG."""
    return encoded(Image.fromarray(image.transpose(1, 2, 0)))


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


# ---- CIFAR-10: pickles of Python 2's cPickle, protocol 2 ----


def _text(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text  # SHORT_BINSTRING


def _int(value: int) -> bytes:
    return b"K" + bytes([value]) if value < 256 else b"J" + value.to_bytes(4, "little")


def cifar_batch(
    images: np.ndarray, labels: list[int], title: bytes = b"training batch 1 of 5", key: bytes = b"labels", **more: list
) -> bytes:
    """The opcodes of the published files: str keys and strings, a list of ints, an array of rows."""
    raw = images.reshape(len(images), -1).tobytes()
    row = images[0].size
    array = b"".join(
        [
            b"cnumpy.core.multiarray\n_reconstruct\n",
            b"cnumpy\nndarray\n",
            b"K\x00\x85" + _text(b"b") + b"\x87R",  # (ndarray, (0,), 'b')
            b"(K\x01" + _int(len(images)) + _int(row) + b"\x86",
            b"cnumpy\ndtype\n" + _text(b"u1") + b"K\x00K\x01\x87R",
            b"(K\x03" + _text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb",
            b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb",  # not Fortran order, BINSTRING
        ]
    )
    names = b"](" + b"".join(_text(b"leptodactylus_%06d.png" % i) for i in range(len(images))) + b"e"
    items = {
        b"batch_label": _text(title),
        key: b"](" + b"".join(_int(label) for label in labels) + b"e",
        **{name.encode(): b"](" + b"".join(map(_int, each)) + b"e" for name, each in more.items()},
        b"data": array,
        b"filenames": names,
    }
    return b"\x80\x02}(" + b"".join(_text(key) + value for key, value in items.items()) + b"u."


def cifar_batches(each: int = 4) -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    """{file: content}, and images and labels of the five training batches in their order."""
    images = pictures(5 * each)
    labels = np.arange(5 * each) % 10
    files = {
        f"data_batch_{i + 1}": cifar_batch(
            images[i * each : (i + 1) * each], labels[i * each : (i + 1) * each].tolist()
        )
        for i in range(5)
    }
    files["test_batch"] = cifar_batch(pictures(3, seed=1), [3, 8, 8], b"testing batch 1 of 1")
    files["batches.meta"] = pickle.dumps({"num_vis": 3072, "label_names": ["airplane"]}, 2)
    return files, images, labels


def cifar100() -> tuple[dict[str, bytes], np.ndarray, list[int], list[int]]:
    """{file: content}, and images, fine and coarse labels of the training set."""
    images, fine, coarse = pictures(6), [0, 99, 7, 50, 3, 99], [0, 19, 4, 11, 4, 19]
    meta = {
        b"fine_label_names": [f"fine {i}".encode() for i in range(100)],
        b"coarse_label_names": [f"coarse {i}".encode() for i in range(20)],
    }
    files = {
        "train": cifar_batch(images, fine, key=b"fine_labels", coarse_labels=coarse),
        "test": cifar_batch(pictures(2, seed=1), [1, 2], key=b"fine_labels", coarse_labels=[0, 1]),
        "meta": pickle.dumps(meta, 2),
        "file.txt~": b"",
    }
    return files, images, fine, coarse


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def write_tar(path: Path, files: dict[str, bytes], folder: str = "cifar-10-batches-py/") -> Path:
    """In the order of CIFAR-10's archive, which is not that of the numbers; packed where the name says so."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w:") as archive:
        for name in sorted(files, reverse=True):
            member = tarfile.TarInfo(folder + name)
            member.size = len(files[name])
            archive.addfile(member, io.BytesIO(files[name]))
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


# ---- downsampled ImageNet ----


def imagenet_batches(
    each: int = 3, side: int = 64, protocol: int = 3
) -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    """{file: pickle}, images, and labels as published (1 .. 1000)."""
    images = pictures(10 * each, side)
    labels = np.linspace(1, 1000, 10 * each).astype(int)
    files = {}
    for i in range(10):
        part = slice(i * each, (i + 1) * each)
        rows = images[part].reshape(each, -1)
        table = {"data": rows, "labels": labels[part].tolist(), "mean": rows.mean(axis=0)}
        files[f"train_data_batch_{i + 1}"] = pickle.dumps(table, protocol)
    return files, images, labels


def as_npz(files: dict[str, bytes]) -> dict[str, bytes]:
    result = {}
    for name, content in files.items():
        table = pickle.loads(content)
        buffer = io.BytesIO()
        np.savez(buffer, **{key: np.asarray(value) for key, value in table.items()})
        result[name + ".npz"] = buffer.getvalue()
    return result


# ---- EDM, EDM2 ----


def edm(images: np.ndarray, labels: list[int] | None) -> dict[str, bytes]:
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(images))]
    table = None if labels is None else [[name, label] for name, label in zip(names, labels, strict=True)]
    files = {name: png(image) for name, image in zip(names, images, strict=True)}
    return {**files, "dataset.json": json.dumps({"labels": table}).encode()}


def edm2(moments: np.ndarray, labels: list[int]) -> dict[str, bytes]:
    names = [f"{i // 1000:05d}/img-mean-std-{i:08d}.npy" for i in range(len(moments))]
    files = {name: npy(value) for name, value in zip(names, moments, strict=True)}
    table = [[name, label] for name, label in zip(names, labels, strict=True)]
    return {**files, "dataset.json": json.dumps({"labels": table}).encode()}
