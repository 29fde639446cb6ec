"""Images that were published as arrays: IDX files of the MNIST family, npz and npy."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from support.archives import npy, npz, write_folder, write_tar, write_zip

from mmf_fast.data.formats import DataError, detect, open_source
from mmf_fast.data.prepare import prepare

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 7, 5), np.uint8)
DIGITS = np.array([3, 0, 9, 1, 1, 2], np.uint8)


def idx(array, kind=0x08):
    array = np.asarray(array)
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape) + array.tobytes()


def mnist(pack=lambda data: data, ending="", prefix=""):
    return {
        f"{prefix}train-images-idx3-ubyte{ending}": pack(idx(IMAGES)),
        f"{prefix}train-labels-idx1-ubyte{ending}": pack(idx(DIGITS)),
        f"{prefix}t10k-images-idx3-ubyte{ending}": pack(idx(IMAGES[:2])),
        f"{prefix}t10k-labels-idx1-ubyte{ending}": pack(idx(DIGITS[:2])),
    }


def loaded(path, format, **options):
    assert detect(path) == format
    source = open_source(path, **options)
    items = list(source.items())
    return np.stack([item.load() for item in items]), [item.label for item in items], source


# ---- IDX -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [
        mnist(),
        mnist(gzip.compress, ".gz"),
        mnist(gzip.compress, ""),  # N2D2 #118, adagan #1: packed, whatever the name says
        {name.replace("-idx", ".idx"): data for name, data in mnist().items()},  # python-mnist #19: 7-zip's names
        {f"MNIST/raw/{name}": data for name, data in (mnist() | mnist(gzip.compress, ".gz")).items()},  # torchvision's
    ],
    ids=["plain", "gz", "gz without its ending", "other names", "both"],
)
def test_mnist(files, tmp_path):
    for path in (write_folder(tmp_path / "set", files), write_zip(tmp_path / "set.zip", files)):
        found, labels, source = loaded(path, "idx")
        assert np.array_equal(found, IMAGES[:, None]) and labels == DIGITS.tolist() and source.num_classes is None
        found, labels, _ = loaded(path, "idx", split="validation")
        assert np.array_equal(found, IMAGES[:2, None]) and labels == [3, 0]


def test_emnist_is_turned_upright(tmp_path):
    """Its files hold columns before rows; torchvision's users see letters on their sides."""
    path = write_folder(tmp_path, mnist(gzip.compress, ".gz", "emnist-letters-"))
    found, labels, _ = loaded(path, "idx")
    assert np.array_equal(found, IMAGES.transpose(0, 2, 1)[:, None]) and labels == DIGITS.tolist()


def test_emnist_holds_several_sets(tmp_path):
    path = write_tar(tmp_path / "a.tar", mnist(prefix="emnist-letters-") | mnist(prefix="emnist-digits-"), "")
    with pytest.raises(DataError, match="which set is meant of emnist-.*pass --ignore"):
        open_source(path)
    assert loaded(path, "idx", ignore=("emnist-d*",))[1] == DIGITS.tolist()


def test_qmnist_states_more_than_the_class(tmp_path):
    """https://github.com/facebookresearch/qmnist/issues/1: eight columns of int32."""
    table = np.concatenate([DIGITS[:, None], np.arange(42).reshape(6, 7)], 1).astype(">i4")
    files = {"qmnist-train-images-idx3-ubyte.gz": gzip.compress(idx(IMAGES))}
    files["qmnist-train-labels-idx2-int.gz"] = gzip.compress(idx(table, 0x0C))
    assert loaded(write_folder(tmp_path, files), "idx")[1] == DIGITS.tolist()


def test_fashion_mnist_as_debian_packs_it(tmp_path):
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("needs the package dataset-fashion-mnist")
    manifest = prepare(folder, tmp_path / "out")
    assert (manifest.count, manifest.shape, manifest.num_classes) == (60000, (1, 28, 28), 10)
    assert manifest.report["classes"] == {str(i): 6000 for i in range(10)}
    content = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())
    expected = np.frombuffer(content, np.uint8, offset=16).reshape(60000, 1, 28, 28)
    assert np.array_equal(np.load(tmp_path / "out" / "samples.npy"), expected)


def replaced(name, data):
    return mnist() | {f"train-{name}-ubyte": data}


DAMAGED = {
    "cut": (replaced("images-idx3", idx(IMAGES)[:-5]), "data ends early"),
    "longer": (replaced("images-idx3", idx(IMAGES) + b"x"), "goes on behind its 6 images"),
    "packed and cut": (replaced("images-idx3", gzip.compress(idx(IMAGES))[:-9]), "damaged or truncated|ends early"),
    "no idx": (replaced("images-idx3", b"<html>"), "does not begin as an IDX file does"),
    "floats": (replaced("images-idx3", idx(IMAGES.astype(">f4"), 0x0D)), "not uint8"),
    "fewer labels": (replaced("labels-idx1", idx(DIGITS[:5])), "not the labels of 6 images"),
    "labels cut": (replaced("labels-idx1", idx(DIGITS)[:-1]), "ends early"),
    "swapped": (replaced("labels-idx1", idx(IMAGES)), "not the labels of 6 images"),
    "no labels": (
        {k: v for k, v in mnist().items() if k != "train-labels-idx1-ubyte"},
        "no labels file.*--labels none",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_idx(case, tmp_path):
    files, message = DAMAGED[case]
    with pytest.raises(DataError, match=message) as error:
        for item in open_source(write_folder(tmp_path, files)).items():
            item.load()
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


# ---- npz, npy --------------------------------------------------------------------------------------------------------

COLOUR = np.random.default_rng(1).integers(0, 256, (6, 8, 9, 3), np.uint8)
TRAIN = {"x_train": COLOUR, "y_train": DIGITS[:, None], "x_test": COLOUR[:2], "y_test": DIGITS[:2, None]}
MED = {
    f"{s}_{what}": a for s in ("train", "val", "test") for what, a in (("images", COLOUR), ("labels", DIGITS[:, None]))
}
ARRAYS = {
    "Keras": {"cifar10.npz": npz(**TRAIN)},
    "MedMNIST": {"bloodmnist.npz": npz(**MED)},
    "KMNIST": {
        f"kmnist-{split}-{what}.npz": npz(arr_0=array)
        for split in ("train", "test")
        for what, array in (("imgs", COLOUR), ("labels", DIGITS))
    },
    "guided-diffusion": {"samples_6x8x9x3.npz": npz(arr_0=COLOUR, arr_1=DIGITS.astype(np.int64))},
    "channels first": {"a.npz": npz(images=COLOUR.transpose(0, 3, 1, 2).copy(), labels=DIGITS)},
    "npy": {"images.npy": npy(COLOUR), "labels.npy": npy(DIGITS)},
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_of_images(case, tmp_path):
    files = ARRAYS[case]
    paths = [write_folder(tmp_path / "set", files), write_tar(tmp_path / "a.tar.gz", files, "x/")]
    paths += [tmp_path / "set" / next(iter(files))] if len(files) == 1 else []
    for path in paths:
        found, labels, _ = loaded(path, "arrays")
        assert np.array_equal(found, COLOUR.transpose(0, 3, 1, 2)) and labels == DIGITS.tolist()
    if case in ("Keras", "MedMNIST", "KMNIST"):
        found, labels, _ = loaded(paths[0], "arrays", split="validation")
        assert labels == DIGITS.tolist()[: len(found)] and len(found) == (2 if case == "Keras" else 6)


def test_grey_arrays_keep_one_channel(tmp_path):
    found, _, _ = loaded(write_folder(tmp_path, {"mnist.npz": npz(x_train=IMAGES, y_train=DIGITS)}), "arrays")
    assert np.array_equal(found, IMAGES[:, None])


def test_names_as_labels_of_arrays(tmp_path):
    names = np.array(["b", "a", "b", "b", "a", "a"])
    _, labels, source = loaded(write_folder(tmp_path, {"a.npz": npz(x=COLOUR, y=names)}), "arrays")
    assert labels == [1, 0, 1, 1, 0, 0] and source.classes == ["a", "b"]


REFUSED = {
    "labels of several kinds": (npz(x=COLOUR, fine=DIGITS, coarse=DIGITS // 5), "labels: fine, coarse.*--label-column"),
    "several labels each": (npz(x=COLOUR, y=np.eye(6, dtype=np.int64)), "a list of 6: several labels or a vector each"),
    "two arrays of images": (npz(a=COLOUR, b=COLOUR), r"holds the images: a, b\?"),
    "channels that cannot be told": (npz(x=COLOUR[:, :3]), "which are the 1 or 3 channels cannot be told"),
    "pickled labels": (npz(x=COLOUR, y=np.array([{}] * 6, object)), "pickled"),
    "a name that tells nothing": (npz(x=COLOUR, time=np.arange(6.0)), r"labels: time\? pass --label-column NAME, or"),
    "labels of a name of one's own": (npz(x=COLOUR, breed=DIGITS), r"labels: breed\? pass --label-column"),
    "labels of other images": (
        npz(x=COLOUR, labels=DIGITS[:5]),
        r"labels is of shape \(5,\), not a label for each of 6",
    ),
    "labels with axes": (
        npz(x=COLOUR, y=DIGITS[:, None, None]),
        r"y is of shape \(6, 1, 1\).*save it as \(6,\), or pass",
    ),
    "labels of another split": (npz(x_train=COLOUR, x_test=COLOUR, labels=DIGITS[:2]), r"labels is of shape \(2,\)"),
    "labels of two kinds": (npz(x=COLOUR, y=DIGITS, fine_label=DIGITS), r"labels: y, fine_label\?"),
    "Fortran order": (npz(x=np.asfortranarray(COLOUR)), "Fortran order"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arrays_that_leave_a_doubt(case, tmp_path):
    content, message = REFUSED[case]
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        list(open_source(tmp_path / "a.npz", "arrays").items())
    assert "\n" not in str(error.value)


def test_an_order_that_is_not_read_is_named_and_matters_in_the_images_alone(tmp_path):
    fortran = np.asfortranarray(COLOUR)
    (tmp_path / "a.npz").write_bytes(npz(x=fortran, y=DIGITS))
    with pytest.raises(DataError, match=r"Fortran order; save it with numpy\.ascontiguousarray"):
        open_source(tmp_path / "a.npz")  # the format is found nevertheless
    (tmp_path / "b.npz").write_bytes(npz(x=COLOUR, y=DIGITS, features=np.asfortranarray(np.ones((6, 2, 3)))))
    assert loaded(tmp_path / "b.npz", "arrays")[1] == DIGITS.tolist()


def test_what_is_called_otherwise_becomes_no_labels(tmp_path):
    """Numbers and names of files had become classes, one for each image."""
    others = {"ids": np.arange(6), "filename": np.array(list("abcdef"))}
    (tmp_path / "a.npz").write_bytes(npz(x=COLOUR, **others))
    (tmp_path / "b.npz").write_bytes(npz(x=COLOUR, labels=DIGITS, time=np.arange(6.0), classes=np.arange(10), **others))
    (tmp_path / "c.npz").write_bytes(npz(x_train=COLOUR, labels=DIGITS, x_test=COLOUR[:2], y_test=DIGITS[:2]))
    assert loaded(tmp_path / "a.npz", "arrays")[1] == [None] * 6
    for name in ("b", "c"):
        assert loaded(tmp_path / f"{name}.npz", "arrays")[1] == DIGITS.tolist()
    assert loaded(tmp_path / "b.npz", "arrays", label_column="ids")[1] == list(range(6))


def test_the_array_of_labels_that_was_named(tmp_path):
    (tmp_path / "a.npz").write_bytes(npz(x=COLOUR, fine=DIGITS, coarse=DIGITS // 5))
    assert loaded(tmp_path, "arrays", label_column="coarse")[1] == (DIGITS // 5).tolist()
    assert set(loaded(tmp_path, "arrays", labels="none")[1]) == {None}
    with pytest.raises(DataError, match=r"has no array 'kind' of labels, but fine, coarse; pass --label-column NAME"):
        open_source(tmp_path, label_column="kind")
