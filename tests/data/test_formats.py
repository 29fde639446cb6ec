"""Every format yields the arrays its archive was made from."""

import io
import json
import pickle
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image
from support.archives import (
    as_npz,
    cifar100,
    cifar_batches,
    edm,
    encoded,
    imagenet_batches,
    pictures,
    png,
    write_folder,
    write_tar,
    write_zip,
)
from support.sources import read

from mmf_fast.data.formats import DataError, SampleError, open_source

# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tar", "folder", "folder above"])
def test_cifar10(kind, tmp_path):
    files, images, labels = cifar_batches()
    if kind == "tar":
        path = write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    else:
        path = write_folder(tmp_path / "cifar-10-batches-py", files)
        path = tmp_path if kind == "folder above" else path
    found, found_labels, source = read(path, "cifar10")
    assert np.array_equal(found, images) and found.dtype == np.uint8
    assert found_labels == labels.tolist()
    assert source.num_classes == 10 and source.classes[3] == "cat"
    test, test_labels, _ = read(path, "cifar10", split="validation")
    assert np.array_equal(test, pictures(3, seed=1)) and test_labels == [3, 8, 8]


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_cifar100_by_fine_and_by_coarse_labels(kind, tmp_path):
    files, images, fine, coarse = cifar100()
    if kind == "tar":
        path = write_tar(tmp_path / "cifar-100-python.tar.gz", files, "cifar-100-python/")
    else:
        path = write_folder(tmp_path / "cifar-100-python", files)
    found, labels, source = read(path, "cifar100")
    assert np.array_equal(found, images) and labels == fine
    assert source.num_classes == 100 and source.classes[99] == "fine 99"
    _, labels, source = read(path, "cifar100", label_column="coarse_labels")
    assert labels == coarse and source.num_classes == 20 and source.classes[4] == "coarse 4"
    assert read(path, "cifar100", split="validation")[1] == [1, 2]
    with pytest.raises(DataError, match="no labels 'labels'; pass --label-column fine_labels or coarse_labels"):
        open_source(path, label_column="labels")


@pytest.mark.parametrize("kind", [2, 3, 4, "npz"])
def test_downsampled_imagenet(kind, tmp_path):
    files, images, labels = imagenet_batches(protocol=3 if kind == "npz" else kind)
    path = write_folder(tmp_path / "part", as_npz(files) if kind == "npz" else files)
    found, found_labels, source = read(path, "imagenet")
    assert np.array_equal(found, images)  # batch 10 behind batch 9, not behind batch 1
    assert found_labels == (labels - 1).tolist() and min(found_labels) == 0 and max(found_labels) == 999
    assert source.num_classes == 1000 and source.count == (30 if kind == "npz" else None)


def test_downsampled_imagenet_in_two_folders_and_its_validation_set(tmp_path):
    files, images, _ = imagenet_batches(each=1, side=32)
    files = as_npz(files)
    for i, (name, content) in enumerate(files.items()):
        write_folder(tmp_path / f"part{i % 2}", {name: content})
    write_folder(tmp_path, {"val_data": next(iter(imagenet_batches(each=2, side=32)[0].values()))})
    assert np.array_equal(read(tmp_path, "imagenet")[0], images)
    assert len(read(tmp_path, "imagenet", split="validation")[0]) == 2


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[4, 0, 2, 2], None])
@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_edm(kind, labels, tmp_path):
    images = pictures(4, 64)
    write = write_zip if kind == "zip" else write_folder
    path = write(tmp_path / ("imagenet-64x64" + ".zip" * (kind == "zip")), edm(images, labels))
    found, found_labels, _ = read(path, "images")
    assert np.array_equal(found, images) and found_labels == labels


def test_edm_without_dataset_json_has_no_labels(tmp_path):
    files = edm(pictures(3), None)
    del files["dataset.json"]
    assert read(write_zip(tmp_path / "a.zip", files), "images")[1] is None


def test_class_folders_are_numbered_in_sorted_order(tmp_path):
    images = pictures(4)
    names = ["n01440764/b.png", "n01440764/a.png", "n09/deep.png", "n001/a.png"]
    files = {name: png(image) for name, image in zip(names, images, strict=True)}
    files |= {"n09/readme.txt": b"x", ".DS_Store": b"x", "n001/._a.png": b"x"}
    for path in (write_folder(tmp_path / "set", files), write_zip(tmp_path / "set.zip", files)):
        found, labels, source = read(path, "images")
        assert source.classes == ["n001", "n01440764", "n09"] and labels == [0, 1, 1, 2]
        assert np.array_equal(found, images[[3, 1, 0, 2]])


def test_train_and_val_folders(tmp_path):
    images = pictures(2)
    write_folder(tmp_path, {"train/cat/1.png": png(images[0]), "val/cat/1.png": png(images[1])})
    for split, expected in (("train", images[:1]), ("validation", images[1:])):
        with pytest.raises(DataError, match="cat: all samples lie in this folder: a class, or no labels"):
            open_source(tmp_path, split=split)
        root = {"train": "train", "validation": "val"}[split]
        found, labels, source = read(tmp_path, "images", root=root)
        assert np.array_equal(found, expected) and labels == [0] and source.classes == ["cat"]


def test_a_class_may_be_called_train(tmp_path):
    images = pictures(2)
    write_folder(tmp_path, {"train/1.png": png(images[0]), "aeroplane/1.png": png(images[1])})
    with pytest.raises(DataError, match=r"are train of aeroplane, train splits, or classes.*--root '\.' for classes"):
        open_source(tmp_path)
    assert read(tmp_path, "images", root=".")[1] == [0, 1]


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("1", 1), ("LA", 1), ("P", 3), ("RGBA", 3), ("CMYK", 3)])
def test_every_eight_bit_mode_becomes_grey_or_rgb(mode, channels, tmp_path):
    image = Image.new("RGB", (8, 8), (255, 0, 0) if channels == 3 else (255, 255, 255)).convert(mode)
    write_folder(tmp_path, {"a.png": encoded(image, "tiff" if mode == "CMYK" else "png")})
    found, labels, _ = read(tmp_path, "images")
    assert found.shape == (1, channels, 8, 8) and labels is None
    assert (found[0, 0] > 250).all() and (found[0, 1:] < 5).all()


def test_sixteen_bits_are_refused(tmp_path):
    write_folder(tmp_path, {"a.png": encoded(Image.fromarray(np.full((8, 8), 40000, np.uint16)))})
    with pytest.raises(SampleError, match="8 bits"):
        read(tmp_path, "images")


def adm(image, size):
    """guided-diffusion's center_crop_arr, statement by statement."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(300, 200), (131, 500), (64, 65), (20, 31), (128, 128)])
def test_sizes_are_reached_as_adm_does(shape, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)).resize(shape)
    write_folder(tmp_path, {"a.png": encoded(image)})
    found, _, _ = read(tmp_path, "images", size=64)
    assert np.array_equal(found[0].transpose(1, 2, 0), adm(image, 64))


# ---- parquet ---------------------------------------------------------------------------------------------------------


def write_parquet(path, images, labels, names=None, column="image"):
    """As the `datasets` library writes it: struct {bytes, path}, and its features in the schema's metadata."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    cells = [{"bytes": png(image), "path": None} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({column: pa.array(cells, kind), "label": pa.array(labels, pa.int64())})
    if names:
        features = {column: {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def test_parquet(tmp_path):
    images = pictures(5)
    folder = tmp_path / "plain_text"
    write_parquet(folder / "train-00000-of-00002.parquet", images[:3], [1, 0, 2], ["a", "b", "c"], "img")
    write_parquet(folder / "train-00001-of-00002.parquet", images[3:], [2, 2], ["a", "b", "c"], "img")
    write_parquet(folder / "test-00000-of-00001.parquet", images[:1], [1], ["a", "b", "c"], "img")
    found, labels, source = read(tmp_path, "parquet")
    assert np.array_equal(found, images) and labels == [1, 0, 2, 2, 2] and source.classes == ["a", "b", "c"]
    assert np.array_equal(read(tmp_path, "parquet", split="validation")[0], images[:1])
    assert np.array_equal(read(folder / "train-00001-of-00002.parquet", "parquet")[0], images[3:])
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    write_zip(tmp_path / "hub.zip", {f"data/{name}": content for name, content in files.items()})
    write_tar(tmp_path / "hub.tar.gz", files, "data/")
    for archive in ("hub.zip", "hub.tar.gz"):  # a table is read from its end
        found, labels, _ = read(tmp_path / archive, "parquet")
        assert np.array_equal(found, images) and labels == [1, 0, 2, 2, 2]
        assert read(tmp_path / archive, "parquet", split="validation")[1] == [1]
        (tmp_path / archive).unlink()
    (folder / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="1 shards"):
        open_source(tmp_path)


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, pictures(3), [0, 1, None])
    with pytest.raises(DataError, match=r"a.parquet: column label: some labels are missing"):
        read(path, "parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged or truncated"):
        open_source(path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        open_source(tmp_path / "a.parquet")


# ---- damage ----------------------------------------------------------------------------------------------------------


def cut(path, share=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    return path


def cifar_tar(tmp_path, **changes):
    return write_tar(tmp_path / "cifar-10-python.tar.gz", cifar_batches()[0] | changes)


def npz_folder(tmp_path, **arrays):
    files = as_npz(imagenet_batches(each=2)[0])
    if arrays:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        files["train_data_batch_4.npz"] = buffer.getvalue()
    return write_folder(tmp_path, files)


def with_pickle(tmp_path, table):

    return write_folder(tmp_path, imagenet_batches(each=2)[0] | {"train_data_batch_7": pickle.dumps(table)})


def without(tmp_path, name):
    files = cifar_batches()[0]
    del files[name]
    return write_folder(tmp_path, files)


def edm_with(tmp_path, **files):
    return write_zip(tmp_path / "a.zip", edm(pictures(3), [0, 1, 2]) | {k: v for k, v in files.items()})


def json_with(tmp_path, text):
    return write_zip(tmp_path / "a.zip", edm(pictures(3), [0, 1, 2]) | {"dataset.json": text})


ROWS = np.zeros((2, 12288), np.uint8)
DAMAGED = {
    "truncated tar.gz": (lambda p: cut(cifar_tar(p)), "cifar-10-python.tar.gz.*damaged or truncated"),
    "tar.gz with a wrong checksum": (
        lambda p: flip_bit(cifar_tar(p), -6),
        "cifar-10-python.tar.gz: damaged or truncated.*CRC",
    ),
    "not a gzip": (lambda p: write_folder(p, {"a.tar.gz": b"x" * 999}) / "a.tar.gz", "damaged or truncated"),
    "tar without a batch": (
        lambda p: write_tar(p / "a.tar.gz", {"data_batch_1": b""}),
        "has no data_batch_2, data_batch_3",
    ),
    "tar that climbs out": (
        lambda p: write_tar(p / "a.tar.gz", cifar_batches()[0], "../../"),
        r"'\.\./\.\./test_batch' points out of the archive",
    ),
    "truncated pickle in a tar": (
        lambda p: cifar_tar(p, data_batch_3=cifar_batches()[0]["data_batch_3"][:-3000]),
        "cifar-10-python.tar.gz:cifar-10-batches-py/data_batch_3: damaged or truncated",
    ),
    "truncated pickle": (
        lambda p: cut(write_folder(p, cifar_batches()[0]) / "data_batch_5").parent,
        "data_batch_5: damaged or truncated",
    ),
    "missing batch": (lambda p: without(p, "data_batch_2"), "has no data_batch_2; the set is incomplete"),
    "label out of range": (
        lambda p: with_pickle(p, {"data": ROWS, "labels": [1, 1001]}),
        r"train_data_batch_7: label 1001 of image 1 is outside 1 \.\. 1000",
    ),
    "label 0 where they start at 1": (lambda p: with_pickle(p, {"data": ROWS, "labels": [0, 1]}), "label 0 of image 0"),
    "fewer labels than images": (lambda p: with_pickle(p, {"data": ROWS, "labels": [1]}), "2 images, but labels"),
    "no labels": (lambda p: with_pickle(p, {"data": ROWS}), "train_data_batch_7: has no labels"),
    "data is a list": (lambda p: with_pickle(p, {"data": [1], "labels": [1]}), "data is a list"),
    "wrong row length": (lambda p: with_pickle(p, {"data": ROWS[:, :-3], "labels": [1, 2]}), "not uint8"),
    "float images": (lambda p: with_pickle(p, {"data": ROWS.astype("f4"), "labels": [1, 2]}), "data is float32"),
    "truncated npz": (
        lambda p: cut(npz_folder(p) / "train_data_batch_2.npz").parent,
        "train_data_batch_2.npz: damaged",
    ),
    "npz with a flipped bit": (
        lambda p: flip_bit(npz_folder(p) / "train_data_batch_2.npz", 9000).parent,
        "train_data_batch_2.npz: damaged or truncated.*CRC",
    ),
    "npz without data": (
        lambda p: npz_folder(p, images=ROWS),
        "train_data_batch_4.npz: has no data.npy, but images.npy",
    ),
    "npz with a wrong label": (lambda p: npz_folder(p, data=ROWS, labels=[1, 0]), "label 0 of image 1"),
    "npz with wrong rows": (lambda p: npz_folder(p, data=ROWS[:, 1:], labels=[1, 2]), "not uint8"),
    "npz of one dimension": (
        lambda p: npz_folder(p, data=ROWS[0], labels=[1, 2]),
        r"data is uint8 \(12288,\), not uint8 \(n, 3",
    ),
    "truncated zip": (lambda p: cut(edm_with(p)), "a.zip: is no zip.*or a truncated one"),
    "zip that climbs out": (lambda p: edm_with(p, **{"../evil.png": b""}), r"'\.\./evil\.png' points out"),
    "zip with an absolute name": (lambda p: edm_with(p, **{"/etc/x.png": b""}), "points out of the archive"),
    "zip with a flipped bit": (lambda p: flip_bit(edm_with(p), 1000), r"img00000000\.png: cannot be read.*CRC"),
    "image that does not decode": (
        lambda p: edm_with(p, **{"00000/img00000001.png": png(pictures(1)[0])[:300]}),
        r"a.zip:00000/img00000001\.png: does not decode",
    ),
    "image that is none": (lambda p: edm_with(p, **{"00000/img00000001.png": b"x"}), "not an image that PIL can read"),
    "dataset.json is no json": (lambda p: json_with(p, b"{"), r"a.zip:dataset\.json: is not"),
    "dataset.json without labels": (lambda p: json_with(p, b"{}"), r"dataset\.json: is not"),
    "dataset.json misses an image": (
        lambda p: json_with(p, b'{"labels": [["00000/img00000000.png", 1]]}'),
        r"no label for 00000/img00000001\.png and 1 others",
    ),
    "dataset.json with a vector": (
        lambda p: json_with(p, b'{"labels": [["00000/img00000000.png", [0, 1]]]}'),
        r"00000/img00000000\.png: label is \[0, 1\], not a number from 0 but a list of 2",
    ),
    "dataset.json with a negative label": (
        lambda p: json_with(p, b'{"labels": [["00000/img00000000.png", -1]]}'),
        "is -1, not a number from 0",
    ),
    "empty folder": (lambda p: p, "holds nothing of a known format"),
    "folder of texts": (lambda p: write_folder(p, {"a.txt": b"x"}), "holds nothing of a known format"),
    "no such path": (lambda p: p / "none", "does not exist"),
    "image beside class folders": (
        lambda p: write_folder(p, {"a.png": png(pictures(1)[0]), "cat/b.png": png(pictures(1)[0])}),
        r"a\.png: lies beside class folders",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case, tmp_path):
    make, message = DAMAGED[case]
    path = make(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        for item in open_source(path).items():
            item.load()
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_nothing_is_unpacked(tmp_path):
    """Names in an archive never become paths on disk."""
    path = edm_with(tmp_path, **{"..\\evil.png": b""})
    with pytest.raises(DataError, match="points out"):
        open_source(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": 16}, "leave --size out"), ({"latents": "sample"}, "leave --latents out")],
)
def test_options_of_another_format(options, message, tmp_path):
    write_folder(tmp_path, cifar_batches()[0])
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, **options)


def test_a_zip_of_deflated_images_reads_the_same(tmp_path):
    images = pictures(2)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in edm(images, [0, 1]).items():
            archive.writestr(name, content)
    assert np.array_equal(read(tmp_path / "a.zip", "images")[0], images)
