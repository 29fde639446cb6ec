"""Folders, archives and tables of one set give one result; what can be read in two ways is refused, with a way out."""

import io
import json
import random
import re
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from support.archives import edm, encoded, pictures, png, write_folder, write_tar, write_zip

from mmf_fast.data.formats import DataError, open_source
from mmf_fast.data.formats.trees import Tree
from mmf_fast.data.prepare import prepare


def taken(path, **options):
    """{name within the source: class name or number}, and the source."""
    source = open_source(path, **options)
    names = {}
    for item in source.items():
        name = item.name.removeprefix(str(path)).lstrip(":/")
        names[name] = source.classes[item.label] if source.classes and item.label is not None else item.label
    return names, source


def images(*names):
    return {name: png(image) for name, image in zip(names, pictures(len(names), 8), strict=True)}


# ---- one set, every container ----------------------------------------------------------------------------------------


def parquet_of(path, files, classes):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    names = sorted(files)
    table = pa.table(
        {
            "image": [{"bytes": files[name], "path": name} for name in names],
            "label": [classes.index(name.split("/")[-2]) for name in names],
        }
    )
    features = {"label": {"names": classes, "_type": "ClassLabel"}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path)
    return path


def test_a_folder_a_zip_a_tar_and_a_parquet_of_the_same_images_are_one_set(tmp_path):
    classes = ["10 euro", "Katze", "dog", "zebra"]
    names = [f"set/train/{label}/{i}{kind}" for label in classes for i, kind in enumerate([".png", ".jpeg", ".bmp"])]
    files = {
        name: encoded(Image.fromarray(image.transpose(1, 2, 0)), name.rpartition(".")[2])
        for name, image in zip(names, pictures(len(names), 16), strict=True)
    }
    junk = {"set/train/.DS_Store": b"x", "__MACOSX/set/train/dog/._0.png": b"x", "set/readme.txt": b"x"}
    everything = files | junk | images("set/val/dog/7.png", "set/.ipynb_checkpoints/0.png")
    (tmp_path / "zipped").mkdir()
    write_zip(tmp_path / "zipped" / "inner.zip", everything)
    sources = {
        "folder": write_folder(tmp_path / "folder", everything),
        "zip": write_zip(tmp_path / "a.zip", everything),
        "tar": write_tar(tmp_path / "a.tar", everything, ""),
        "tar.gz": write_tar(tmp_path / "a.tar.gz", everything, "./"),
        "zip in a folder": tmp_path / "zipped",
        "zip in a tar": write_tar(tmp_path / "b.tar", {"inner.zip": (tmp_path / "zipped/inner.zip").read_bytes()}, ""),
        "parquet": parquet_of(tmp_path / "a.parquet", files, classes),
    }
    table = (tmp_path / "a.parquet").read_bytes()
    sources["parquet in a zip"] = write_zip(tmp_path / "table.zip", {"set/train/a.parquet": table})
    sources["parquet in a tar"] = write_tar(tmp_path / "table.tar", {"a.parquet": table}, "")
    found = {}
    for kind, source in sources.items():
        manifest = prepare(source, tmp_path / "out" / kind)
        arrays = [(tmp_path / "out" / kind / name).read_bytes() for name in ("samples.npy", "labels.npy")]
        found[kind] = (*arrays, manifest.classes, manifest.count, manifest.report["classes"])
    assert found["folder"][2:] == (classes, 12, dict.fromkeys(classes, 3))
    for kind in sources:
        assert found[kind] == found["folder"], kind


def test_a_tar_of_tars_as_imagenet_is_published(tmp_path):
    inner = {}
    for label in ("n01440764", "n01443537"):
        write_tar(tmp_path / "x.tar", images(f"{label}_1.JPEG", f"{label}_2.JPEG"), "")
        inner[f"{label}.tar"] = (tmp_path / "x.tar").read_bytes()
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", inner, "")
    found, source = taken(tmp_path / "ILSVRC2012_img_train.tar")
    assert found == {f"{label}.tar:{label}_{i}.JPEG": label for label in ("n01440764", "n01443537") for i in (1, 2)}
    assert np.array_equal(next(source.items()).load(), pictures(2, 8)[0])


# ---- layouts that have one reading -----------------------------------------------------------------------------------

CATS = images("cat/1.png", "cat/2.png", "dog/1.png")
ONE_READING = {
    "folders": (CATS, {}),
    "below a common folder": ({f"a/b/{name}": data for name, data in CATS.items()}, {}),
    "a hidden folder (mmpretrain #507)": (
        CATS | images(".ipynb_checkpoints/1.png", "cat/.ipynb_checkpoints/1-checkpoint.png"),
        {},
    ),
    "what a Mac leaves (udacity #217)": (
        CATS | {"__MACOSX/cat/._1.png": b"x", ".DS_Store": b"x", "cat/._1.png": b"x"},
        {},
    ),
    "a folder called .DS_Store (gluon-cv #1300)": (CATS | images(".DS_Store/1.png"), {}),
    "train and val": ({f"train/{name}": data for name, data in CATS.items()} | images("val/cat/1.png"), {}),
    "train and val beside a hidden folder": (
        {f"train/{name}": data for name, data in CATS.items()}
        | images("val/cat/1.png", ".ipynb_checkpoints/1.png", "test/cat/3.png"),
        {},
    ),
    "train2017 in a folder": ({f"x/train2017/{n}": d for n, d in CATS.items()} | images("x/val2017/cat/1.png"), {}),
    "a folder in each class": (images("cat/images/1.png", "cat/images/2.png", "dog/images/1.png"), {}),
    "texts beside the classes": (CATS | {"annotations/1.xml": b"x", "readme.md": b"x", "cat/1.txt": b"x"}, {}),
    "told where they are": (CATS | images("junk.png"), {"ignore": ("junk*",)}),
    "told their root": ({f"a/{n}": d for n, d in CATS.items()} | images("b/1.png", "b/c/1.png"), {"root": "a"}),
    "told that the last folder counts": (
        images("a/cat/1.png", "a/cat/2.png", "dog/1.png"),
        {"labels": "parents"},
    ),
    "nested dataset.json": (
        {
            **{f"set/{name}": data for name, data in CATS.items()},
            "set/dataset.json": json.dumps({"labels": [[name, name[:3]] for name in CATS]}).encode(),
        },
        {},
    ),
    "dataset.json with names of Windows": (
        {**CATS, "dataset.json": json.dumps({"labels": [[n.replace("/", "\\"), n[:3]] for n in CATS]}).encode()},
        {},
    ),
    "WebDataset": (
        images("00000/1.png", "00000/2.png", "00001/3.png")
        | {"00000/1.cls": b"cat", "00000/2.cls": b"cat\n", "00001/3.cls": b"dog"},
        {},
    ),
}


@pytest.mark.parametrize("case", ONE_READING)
def test_layouts_with_one_reading(case, tmp_path):
    files, options = ONE_READING[case]
    for kind, path in {
        "folder": write_folder(tmp_path / "set", files),
        "zip": write_zip(tmp_path / "set.zip", files),
        "tar": write_tar(tmp_path / "set.tgz", files, ""),
    }.items():
        found, source = taken(path, **options)
        assert list(found.values()) == ["cat", "cat", "dog"], kind
        assert source.classes == ["cat", "dog"] and source.num_classes == 2, kind
        assert "val" not in " ".join(found) and "checkpoint" not in " ".join(found)


def test_shards_without_labels_are_one_set_as_told(tmp_path):
    write_folder(tmp_path, images("train-000000/1.png", "train-000001/2.png", "val-000000/3.png"))
    assert taken(tmp_path, labels="none")[0] == {"train-000000/1.png": None, "train-000001/2.png": None}


def test_splits_without_classes_are_no_classes(tmp_path):
    """https://github.com/huggingface/datasets/issues/7880: train/ and test/ became the labels."""
    found, source = taken(write_folder(tmp_path, images("train/1.png", "train/2.png", "test/3.png")))
    assert found == {"train/1.png": None, "train/2.png": None} and source.left_out == {"outside train": 1}


def test_names_of_files_tell_no_split(tmp_path):
    """https://github.com/huggingface/datasets/issues/5021: a photo of a train was the training split."""
    names = ["photo of a cat.png", "photo of a train.png", "photo of test tubes.png"]
    write_folder(tmp_path, images(*names) | {"metadata.jsonl": b"{}"})
    with pytest.raises(DataError, match=r"metadata\.jsonl: may hold the labels"):
        open_source(tmp_path)
    assert set(taken(tmp_path, labels="none")[0]) == set(names)


def test_classes_within_archives_of_a_folder(tmp_path):
    """https://github.com/huggingface/datasets/pull/8419: labelled by the folder the archive lies in."""
    (tmp_path / "zdir").mkdir()
    write_zip(tmp_path / "zdir" / "data.zip", images("class0/a.png", "class1/b.png"))
    assert list(taken(tmp_path / "zdir")[0].values()) == ["class0", "class1"]


def test_folders_called_by_numbers_stand_in_their_order(tmp_path):
    """Sorted as text, 10 would become class 2: https://github.com/modestyachts/ImageNetV2/issues/10."""
    found, _ = taken(write_folder(tmp_path, images(*(f"{i}/a.png" for i in range(12)))))
    source = open_source(tmp_path)
    assert [item.label for item in source.items()] == [int(name.split("/")[0]) for name in found]


def test_a_zip_made_on_windows_has_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in CATS.items():
            info = zipfile.ZipInfo("x")
            info.filename = name.replace("/", "\\")
            archive.writestr(info, data)
    found, source = taken(tmp_path / "a.zip")
    assert list(found.values()) == ["cat", "cat", "dog"] and [item.load().shape for item in source.items()]


def test_an_archive_is_told_by_its_content_too(tmp_path):
    for path in (write_zip(tmp_path / "a.zip", CATS), write_tar(tmp_path / "b.tgz", CATS, "")):
        path = path.rename(tmp_path / path.stem)
        assert list(taken(path)[0].values()) == ["cat", "cat", "dog"]


def test_a_link_to_nothing_is_named(tmp_path):
    write_folder(tmp_path / "set", CATS)
    (tmp_path / "set" / "dog" / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"dog/2\.png: cannot be read \(No such file.*--skip-bad"):
        prepare(tmp_path / "set", tmp_path / "out")
    assert prepare(tmp_path / "set", tmp_path / "out", skip_bad=0.3).count == 3


def test_links_in_a_tar_are_followed(tmp_path):
    write_folder(tmp_path / "set", CATS)
    (tmp_path / "set" / "dog" / "2.png").symlink_to("../cat/1.png")
    (tmp_path / "set" / "dog" / "3.png").hardlink_to(tmp_path / "set" / "cat" / "2.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "set", "set")
    arrays = [
        np.stack([item.load() for item in open_source(p).items()]) for p in (tmp_path / "set", tmp_path / "a.tar")
    ]
    assert len(arrays[0]) == 5 and np.array_equal(*arrays)


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    write_folder(tmp_path, CATS)
    (tmp_path / "cat" / "again").symlink_to(tmp_path)
    assert len(Tree(tmp_path).names) == 3


def test_what_was_taken_and_left_out_is_told(tmp_path, capsys):
    files = CATS | {"cat/a.heic": b"x", "cat/b.heic": b"x", "notes.txt": b"x", ".DS_Store": b"x"}
    manifest = prepare(write_folder(tmp_path / "set", files), tmp_path / "out")
    left_out = {".heic": 2, ".txt": 1, "hidden or ignored": 1}
    assert manifest.report == {
        "rule": "class folders",
        "left_out": left_out,
        "images": {"colour": 3},
        "classes": {"cat": 2, "dog": 1},
    }
    assert "class folders; images: 3 colour; not taken: 2 .heic, 1 .txt, 1 hidden or ignored" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["jfif", "avif", "JPE", "tga", "webp"])
def test_endings_that_are_seldom(kind, tmp_path):
    """Left out, their class would vanish and the labels behind it would shift."""
    format = {"jfif": "jpeg", "JPE": "jpeg"}.get(kind, kind)
    seldom = encoded(Image.new("RGB", (8, 8), (200, 100, 50)), format)
    files = images("aa/1.png", "zz/1.png") | {f"mm/1.{kind}": seldom}
    found, source = taken(write_folder(tmp_path, files))
    assert found == {"aa/1.png": "aa", f"mm/1.{kind}": "mm", "zz/1.png": "zz"}
    assert abs(list(source.items())[1].load().mean((1, 2)) - [200, 100, 50]).max() < 6


# ---- layouts that have several, or none ------------------------------------------------------------------------------

JSON = json.dumps({"labels": [["1.png", 0]]}).encode()
REFUSED = {
    "a class that would vanish": (
        CATS | {"bird/1.heic": b"x"},
        r"bird: holds no sample.*1 \.heic.*--allow-empty.*--ignore",
    ),
    "an image beside the classes": (CATS | images("a.png"), r"a\.png: lies beside class folders.*--ignore"),
    "an image beside the splits": (images("train/a.png", "val/a.png", "b.png"), r"b\.png: lies beside .*--root"),
    "one folder": (
        images("cat/1.png", "cat/2.png"),
        r"cat: all samples lie in this folder: a class, or no labels\?.*--root '\.' for.*--labels none",
    ),
    "test among the classes": (CATS | images("test/1.png"), r"are test of cat, dog, test splits.*--root 'test'"),
    "splits beside extra": (images("train/1.png", "test/1.png", "extra/1.png"), "splits, or classes"),
    "two of a split": (images("train_a/1.png", "train_b/1.png"), "splits, or classes|all look like"),
    "no training split": (images("val/cat/1.png", "val/dog/1.png"), "has no train split, but val; pass --split"),
    "classes in classes": (images("pet/cat/1.png", "pet/dog/1.png", "wild/fox/1.png"), "first folder or its last"),
    "a level for one class": (images("more/cat/1.png", "dog/1.png"), r"class of more/cat.*--labels parents"),
    "splits in classes": (
        images("cat/train/1.png", "cat/val/1.png", "dog/train/1.png"),
        r"folders train, val within others.*--ignore 'val'",
    ),
    "one folder that may be a split": (images("train/1.png", "train/2.png"), "a class, or no labels"),
    "another split in classes": (images("cat/x/val/1.png", "dog/x/val/1.png"), r"folders val within others: splits\?"),
    "splits in a split": (images("train/2/train/1.png", "train/2/val/1.png"), "splits, or classes"),
    "chunks of a set": (images("00000/00001.png", "01000/01001.png"), "are classes, or chunks of one set"),
    "two spellings": (images("Cat/1.png", "cat/2.png"), "are 'Cat' and 'cat' one class"),
    "two numbers": (images("1/1.png", "01/2.png"), "one class"),
    "a table of labels": (images("1.png", "2.png") | {"train.csv": b"id,label"}, r"train\.csv: may hold the labels"),
    "a .json beside each file": (
        images("1.png", "2.png") | {"1.json": b"{}", "2.json": b"{}"},
        r"1\.json: may hold a label.*to a \.cls file beside it, or pass --labels none$",
    ),
    "shards with a .json beside each file": (
        images("a-000000/1.png", "a-000001/2.png") | {"a-000000/1.json": b"{}", "a-000001/2.json": b"{}"},
        r"a-000000/1\.json: may hold a label.*to a \.cls file.*--root '\.' for class folders",
    ),
    "metadata of Hugging Face": (images("1.png") | {"metadata.jsonl": b"{}"}, "may hold the labels"),
    "labels in the names": (images("cat.0.jpg", "cat.1.jpg", "dog.0.jpg", "dog.1.jpg"), "names begin with cat, dog"),
    "several dataset.json": (
        images("a/1.png", "b/1.png") | {"a/dataset.json": JSON, "b/dataset.json": JSON},
        r"a/dataset\.json: lies in one of several folders.*--root 'a'",
    ),
    "dataset.json of two splits": (
        images("train/1.png", "val/1.png") | {"dataset.json": b'{"labels": [["train/1.png", 0], ["val/1.png", 1]]}'},
        "folders train, val within others: splits",
    ),
    "folders against dataset.json": (
        CATS | {"dataset.json": b'{"labels": null}'},
        "says no labels, but folders cat, dog",
    ),
    "a measure": (
        images("1.png") | {"dataset.json": b'{"labels": [["1.png", 0.5]]}'},
        "label 0.5 is no class but a measure",
    ),
    "several kinds": (
        images("1.png", "2.png") | {"dataset.json": b'{"labels": [["1.png", 1], ["2.png", "cat"]]}'},
        "of several kinds",
    ),
    "one number, two ways": (
        images("1.png", "2.png") | {"dataset.json": b'{"labels": [["1.png", "1"], ["2.png", "01"]]}'},
        "one number in several ways",
    ),
    "ids": (
        images("1.png", "2.png") | {"dataset.json": b'{"labels": [["1.png", 7], ["2.png", 1000000]]}'},
        "2 labels up to 1000000 are ids, not classes",
    ),
    "parquet and images": (images("1.png") | {"a.parquet": b"x"}, "holds parquet and image files; pass --format"),
    "a sample without .cls": (images("1.png", "2.png") | {"1.cls": b"0"}, r"2\.png: has no \.cls file"),
    "shards without labels": (
        images("train-000000/1.png", "train-000001/2.png", "val-000000/3.png"),
        r"train-000000, train-000001 are classes, or chunks of one set\?.*--labels none for chunks",
    ),
    "years of a split": (
        images("train_2014/1.png", "train_2017/2.png"),
        r"train_2014, train_2017 all look like the train split; pass --root 'train_2014' for that one alone$",
    ),
    "two images of one sample": (
        images("1.jpg", "1.seg.png") | {"1.cls": b"0"},
        r"1\.jpg and 1\.seg\.png are of one sample: which is its image\? pass --ignore '\*\.seg\.png', or '\*\.jpg'$",
    ),
    "two images of one sample and one ending": (
        images("1.png", "1.seg.png") | {"1.cls": b"0"},
        r"1\.png and 1\.seg\.png are of one sample: which is its image\? pass --ignore '\*\.seg\.png'$",
    ),
    "an archive beside what it holds": (
        CATS | {"cat.zip": None},
        r"cat\.zip: lies beside cat, perhaps the same twice; pass --ignore cat\.zip",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_doubt_is_refused_with_a_way_out(case, tmp_path):
    files, message = REFUSED[case]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("1.png", png(pictures(1, 8)[0]))
    files = {name: buffer.getvalue() if data is None else data for name, data in files.items()}
    for path in (write_folder(tmp_path / "set", files), write_tar(tmp_path / "set.tar", files, "")):
        with pytest.raises(DataError, match=message) as error:
            prepare(path, tmp_path / "out")
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_class_folders_with_a_json_beside_each_file_are_read_as_told(tmp_path):
    write_folder(tmp_path, CATS | {name.replace(".png", ".json"): b"{}" for name in CATS})
    assert len(open_source(tmp_path, root=".").classes) == 2
    assert open_source(tmp_path, labels="none").classes is None


@pytest.mark.parametrize("folder", ["", "shards/"])
def test_shards_of_a_split_are_one_set(folder, tmp_path):
    """train-000000.tar, train-000001.tar, ...: none was taken, or one for all."""
    (tmp_path / folder).mkdir(exist_ok=True)
    for i, shard in enumerate(["train-000000", "train-000001", "val-000000", "val-000001"]):
        write_tar(
            tmp_path / folder / f"{shard}.tar", images(f"{i}.png") | {f"{i}.cls": b"dog" if i % 2 else b"cat"}, ""
        )
    for split, word, numbers in (("train", "train", (0, 1)), ("validation", "val", (2, 3))):
        found, source = taken(tmp_path, split=split)
        assert [re.search(r"(\d)\.png$", name)[1] for name in found] == [str(i) for i in numbers]
        assert list(found.values()) == ["cat", "dog"] and source.rule == f"split {split}, 2 shards; .cls files"
        assert source.left_out == {".cls": 2, f"outside {folder}{word}-000000, {folder}{word}-000001": 2}
    assert len(taken(tmp_path, root=f"{folder}train-000001")[0]) == 1


def test_masks_of_a_webdataset_are_left_out_as_told(tmp_path):
    masked = {"1.cls": b"cat", "2.cls": b"dog"} | images("1.jpg", "1.seg.png", "2.jpg", "2.seg.png")
    write_tar(tmp_path / "a.tar", masked, "")
    assert taken(tmp_path / "a.tar", ignore=("*.seg.png",))[0] == {"1.jpg": "cat", "2.jpg": "dog"}
    for labels in (None, "none"):
        with pytest.raises(DataError, match="which is its image"):
            open_source(tmp_path / "a.tar", labels=labels)


def test_an_empty_class_folder(tmp_path):
    write_folder(tmp_path, CATS)
    (tmp_path / "bird").mkdir()
    named = rf"^{re.escape(str(tmp_path))}/bird: holds no sample that is read \(it is empty\).*--allow-empty"
    with pytest.raises(DataError, match=named):
        open_source(tmp_path)
    assert [item.label for item in open_source(tmp_path, allow_empty=True).items()] == [1, 1, 2]
    assert [item.label for item in open_source(tmp_path, ignore=("bird",)).items()] == [0, 0, 1]


def test_a_name_that_an_archive_holds_twice(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("cat/1.png", "cat/1.png", "dog/1.png"):
            archive.writestr(name, png(pictures(1, 8)[0]))
    with pytest.raises(DataError, match=r"cat/1\.png: is there twice"):
        open_source(tmp_path / "a.zip")


def test_string_labels_of_dataset_json_are_numbered(tmp_path):
    table = json.dumps({"labels": [["1.png", "dog"], ["2.png", "cat"]]}).encode()
    found, source = taken(write_folder(tmp_path, images("1.png", "2.png") | {"dataset.json": table}))
    assert found == {"1.png": "dog", "2.png": "cat"} and source.classes == ["cat", "dog"]


# ---- columns of a table ----------------------------------------------------------------------------------------------


def table(path, **columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    count = len(next(iter(columns.values())))
    cells = [{"bytes": png(image), "path": f"{i}.png"} for i, image in enumerate(pictures(count, 8))]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": cells, **columns}), path)
    return path


@pytest.mark.parametrize(
    "name", ["label", "labels", "cls", "class", "coarse_label", "fine_label", "class_id", "target"]
)
def test_a_label_column_is_found_by_its_name(name, tmp_path):
    source = open_source(
        table(tmp_path / "a.parquet", **{name: [2, 0, 1], "caption": ["x", "y", "z"], "id": [7, 8, 9]})
    )
    assert [item.label for item in source.items()] == [2, 0, 1] and source.rule == f"column {name}"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"fine_label": [1, 2], "coarse_label": [0, 1]},
            r"fine_label \(int64\), coarse_label .*--label-column fine_label",
        ),
        ({"label": [1, 2], "label_name": ["a", "b"]}, "which of the columns holds the labels"),
        ({"breed": ["a", "b"]}, r"breed \(string\): whether this column holds the labels\?"),
        ({"label": [[0, 1], [1, 0]]}, r"label is \[0, 1\], not a number from 0 but a list of 2.*--labels none"),
        ({"label": [0.5, 1.5]}, "0.5 is no class but a measure"),
        ({"label": [-1, -1]}, "-1, not a number from 0; -1 stands for no label in many test splits"),
        ({"label": [None, 1]}, "some labels are missing"),
    ],
)
def test_columns_that_leave_a_doubt(columns, message, tmp_path):
    path = table(tmp_path / "a.parquet", **columns)
    with pytest.raises(DataError, match=message):
        open_source(path)
    assert {item.label for item in open_source(path, labels="none").items()} == {None}


def test_the_label_column_that_was_named(tmp_path):
    path = table(tmp_path / "a.parquet", fine_label=[5, 6], coarse_label=[1, 0], breed=["pug", "boxer"])
    assert [item.label for item in open_source(path, label_column="coarse_label").items()] == [1, 0]
    named = open_source(path, label_column="breed")
    assert [item.label for item in named.items()] == [1, 0] and named.classes == ["boxer", "pug"]
    with pytest.raises(DataError, match="has no column 'kind'; pass --label-column, one of fine_label"):
        open_source(path, label_column="kind")


@pytest.mark.parametrize("values", [["3", "0"], [3.0, 0.0], [np.uint8(3), np.uint8(0)]])
def test_numbers_written_as_something_else(values, tmp_path):
    assert [item.label for item in open_source(table(tmp_path / "a.parquet", label=values)).items()] == [3, 0]


def test_shards_whose_folders_tell_the_split(tmp_path):
    """As the Hub converts them: default/train/0000.parquet."""
    table(tmp_path / "default" / "train" / "0000.parquet", label=[1, 0])
    table(tmp_path / "default" / "test" / "0000.parquet", label=[1, 1])
    assert [item.label for item in open_source(tmp_path).items()] == [1, 0]
    assert [item.label for item in open_source(tmp_path, split="validation").items()] == [1, 1]
    table(tmp_path / "other" / "train" / "0000.parquet", label=[1, 1])
    with pytest.raises(DataError, match=r"parquet files of 2 sets \(default/train, other/train\); pass one"):
        open_source(tmp_path)


# ---- anything --------------------------------------------------------------------------------------------------------

NAMES = [
    "cat",
    "Cat",
    "dog",
    "train",
    "test",
    "images",
    "1",
    "2",
    "10",
    "01",
    "n01440764",
    "00001",
    "a b",
    "é",
    "x.zip",
]


def colour(i):
    """Of image i: told apart after any lossy encoding."""
    return (i % 8 * 32 + 16, i // 8 % 8 * 32 + 16, 128)


def number_of(array):
    red, green, _ = array.reshape(3, -1).mean(1)
    return int(red // 32 + 8 * (green // 32))


def random_layout(rng):
    """({file: content}, folders, {image: class}) of a labelled set of at most 60 images; the training split alone."""
    count, files, folders, truth = 0, {}, set(), {}
    base = "".join(f"{rng.choice(['data', 'set', 'images', 'x'])}/" for _ in range(rng.choice([0, 0, 1, 2])))
    splits = rng.choice([[""], [""], [""], ["train/", "val/"], ["train/", "test/", "val/"], ["Train/", "Test/"]])
    labels = rng.choice(["folders", "folders", "folders", "json", "cls", "inner splits"])
    classes = rng.sample(NAMES, rng.randint(1, 4)) if rng.random() < 0.5 else rng.sample(["cat", "dog", "fox"], 2)
    inner = rng.choice(["", "", "", "images/"])
    table = {split: [] for split in splits}
    for split in splits:
        for label in classes:
            extra = rng.choice(["", "more/"]) if rng.random() < 0.1 else ""
            for i in range(rng.randint(0 if rng.random() < 0.2 else 1, 3)):
                kind = rng.choice(["png", "PNG", "jpg", "jfif", "bmp", "avif", "gif", "heic"][: rng.choice([2, 7, 8])])
                folder = f"{extra}{label}/{inner}" if labels in ("folders", "inner splits") else f"{i:05d}/"
                if labels == "inner splits":
                    folder += rng.choice(["train/", "val/"])
                name = f"{folder}{rng.choice(['', label])}{count}.{kind}"
                format = {"jpg": "jpeg", "jfif": "jpeg", "heic": "png"}.get(kind.lower(), kind.lower())
                files[base + split + name] = encoded(Image.new("RGB", (16, 16), colour(count)), format)
                if split.lower() in ("", "train/") and "/val/" not in name:
                    truth[count] = label
                if labels == "cls":
                    files[f"{base}{split}{folder}{name.rpartition('/')[2].rpartition('.')[0]}.cls"] = label.encode()
                table[split].append([name, label])
                count += 1
            folders.add(f"{base}{split}{label}")
    if labels == "json":
        for split, entries in table.items():
            files[f"{base}{split}dataset.json"] = json.dumps({"labels": entries}).encode()
        if rng.random() < 0.3:  # one for all splits
            entries = [[split + name, label] for split in splits for name, label in table[split]]
            files[f"{base}dataset.json"] = json.dumps({"labels": entries}).encode()
    intruder = encoded(Image.new("RGB", (16, 16), colour(63)))
    for where, content in [
        (".ipynb_checkpoints/1.png", intruder),
        ("__MACOSX/cat/._1.png", b"x"),
        (".DS_Store", b"x"),
        (f"{classes[0]}/.ipynb_checkpoints/1.png", intruder),
        ("readme.txt", b"x"),
        ("annotations/1.xml", b"x"),
        ("labels.csv", b"x"),
        ("preview.png", intruder),
    ]:
        if rng.random() < 0.15:
            files[rng.choice(["", base, base + rng.choice(splits)]) + where] = content
    return files, folders if rng.random() < 0.5 else set(), truth


def pack(rng, path, files, folders):
    kind = rng.choice(["folder", "zip", "tar", "tgz", "archives"])
    if kind == "folder":
        for folder in folders:
            (path / folder).mkdir(parents=True, exist_ok=True)
        return write_folder(path, files)
    if kind == "zip":
        return write_zip(path.with_suffix(".zip"), {**{f"{folder}/": b"" for folder in folders}, **files})
    if kind == "archives":  # what lies in one top folder becomes an archive of that name
        tops = {name.split("/")[0] for name in files if "/" in name}
        write_folder(path, {name: content for name, content in files.items() if "/" not in name} or {".x": b""})
        for top in tops:
            inner = {n[len(top) + 1 :]: content for n, content in files.items() if n.startswith(top + "/")}
            rng.choice([write_zip, lambda p, f: write_tar(p.with_suffix(".tar"), f, "")])(path / f"{top}.zip", inner)
        return path
    return write_tar(path.with_suffix("." + kind), files, rng.choice(["", "./"]))


def test_any_layout_ends_in_the_right_labels_or_a_refusal(tmp_path):
    """300 random layouts of a labelled set: never another label, a lost class, or an image of another split."""
    read = refused = 0
    for seed in range(300):
        rng = random.Random(seed)
        files, folders, truth = random_layout(rng)
        path = pack(rng, tmp_path / str(seed), files, folders)
        try:
            source = open_source(path)
            found = [(number_of(item.load()), item.label) for item in source.items()]
        except DataError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
            refused += 1
            continue
        read += 1
        left_out = source.left_out.get(".heic", 0)
        assert source.classes or len(set(truth.values())) <= 1 or set(truth.values()) <= set(map(str, range(99))), seed
        for image, label in found:
            assert image in truth, (seed, image)
            stated = truth[image]
            assert (source.classes[label] if source.classes else str(label)) == (
                stated if source.classes else str(int(stated))
            ), (seed, image)
        assert len(found) == len(set(found)) and len(truth) - left_out <= len(found) <= len(truth), seed
    assert read > 75 and refused > 75  # both happen; seed by seed the same


def test_edm_zip_has_its_labels_wherever_it_lies(tmp_path):
    (tmp_path / "downloads").mkdir()
    write_zip(tmp_path / "downloads" / "cifar10-32x32.zip", edm(pictures(3), [2, 0, 1]))
    assert [item.label for item in open_source(tmp_path).items()] == [2, 0, 1]
