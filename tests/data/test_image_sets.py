"""Prepared and made images as a training stream: values, flips, and what a damaged set is refused with."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support.archives import edm, edm2, pictures, write_zip

from mmf_fast import config
from mmf_fast.data import DataError, load, prepared
from mmf_fast.data.prepare import prepare

COUNT = 40


@pytest.fixture
def folder(tmp_path):
    """A set of 40 random images; the label of image i is i, so a label tells which it is."""
    out = tmp_path / "prepared"
    prepare(write_zip(tmp_path / "a.zip", edm(pictures(COUNT, 16), list(range(COUNT)))), out)
    return str(out)


def centred(images):
    return torch.from_numpy(images).float() / 127.5 - 1


def test_a_batch_is_the_images_of_its_labels(folder):
    data = load("images", path=folder)
    assert (data.name, data.shape, data.num_classes) == ("images", (3, 16, 16), COUNT)
    for step in range(5):
        x, y = data.batch(step, 24)
        assert x.dtype == torch.uint8 and y.dtype == torch.int64 and len(set(y.tolist())) >= 12
        assert torch.equal(x, torch.from_numpy(pictures(COUNT, 16)[y.numpy()]))


def test_the_identity_is_that_of_the_samples(folder, tmp_path):
    def identity(out, **changes):
        options = {"images": pictures(COUNT, 16), "labels": list(range(COUNT)), **changes}
        prepare(write_zip(tmp_path / f"{out}.zip", edm(**options)), tmp_path / out)
        found = load("images", path=str(tmp_path / out), verify=True, seed=1).identity
        assert found.keys() == {"path", "validation", "verify"} and found["validation"] is found["verify"] is None
        return found["path"]

    labels = [*range(1, COUNT), 0]
    found = [
        identity("same"),
        identity("pixels", images=pictures(COUNT, 16, seed=1)),
        identity("labels", labels=labels),
    ]
    assert load("images", path=folder).identity["path"] == found[0]
    assert len(set(found)) == 3
    assert set(load("synthetic", count=4, path="nowhere").identity.values()) == {None}


def test_the_array_is_not_read_into_memory(folder):
    """What is on disk afterwards is what a batch holds: the set is mapped."""
    data = load("images", path=folder)
    before = data.batch(0, COUNT)[0]
    with open(os.path.join(folder, "samples.npy"), "r+b") as file:
        file.seek(128)
        file.write(bytes(COUNT * 3 * 16 * 16))
    after = data.batch(0, COUNT)[0]
    assert not torch.equal(before, after) and (after == 0).all()


def test_flips_are_fair_and_drawn_anew(folder):
    data = load("images", path=folder, flip=True, seed=4)
    images = torch.from_numpy(pictures(COUNT, 16))
    mirrored = {i: [] for i in range(COUNT)}
    for step in range(100):
        for x, y in zip(*data.batch(step, 20), strict=True):
            is_plain, is_mirrored = torch.equal(x, images[y]), torch.equal(x, images[y].flip(-1))
            assert is_plain != is_mirrored
            mirrored[int(y)].append(is_mirrored)
    counts = np.array([sum(drawn) for drawn in mirrored.values()])
    assert all(len(drawn) == 50 for drawn in mirrored.values())
    assert 930 < counts.sum() < 1070  # 2000 fair coins: 1000 +- 22
    assert counts.min() > 5 and counts.max() < 45 and counts.std() > 1.5  # binomial(50, 1/2): 25 +- 3.5
    assert torch.equal(data.split("train")[0], centred(images.numpy()))


def test_validation_is_another_prepared_set(folder, tmp_path):
    data = load("images", path=folder)
    with pytest.raises(ValueError, match="images has no validation split; prepare one and name its folder"):
        data.split("validation")
    other = tmp_path / "other"
    held = pictures(3, 16, seed=1)
    prepare(write_zip(tmp_path / "b.zip", edm(held, [5, 1, 2])), other, num_classes=COUNT)
    x, y = load("images", path=folder, validation=str(other)).split("validation")
    assert torch.equal(x, centred(held)) and y.tolist() == [5, 1, 2]
    prepare(tmp_path / "b.zip", other, overwrite=True)
    with pytest.raises(DataError, match="num_classes is 6, that of .* is 40; prepare both alike"):
        load("images", path=folder, validation=str(other))


def test_a_split_that_is_too_large_is_refused(folder, monkeypatch):
    monkeypatch.setattr("mmf_fast.data.dataset._WHOLE_BYTES", COUNT * 3 * 16 * 16 * 4 - 1)
    with pytest.raises(ValueError, match=r"split train of images takes 0 GiB of memory as float32; read it by batch"):
        load("images", path=folder).split("train")


# ---- damaged sets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["path", "validation"])
def test_a_set_that_has_moved_can_be_named_anew(folder, key):
    way_out = rf"^/nowhere: does not exist; make it: mmf prepare SRC /nowhere, or .* moved: data\.{key}=FOLDER$"
    with pytest.raises(ValueError, match=way_out):
        load("images", **{"path": folder, key: "/nowhere"})


def edit(folder, **changes):
    path = os.path.join(folder, "manifest.json")
    with open(path) as file:
        manifest = json.load(file)
    with open(path, "w") as file:
        json.dump({**manifest, **changes}, file)


def write(folder, name, content):
    with open(os.path.join(folder, name), "wb") as file:
        file.write(content)


DAMAGED = {
    "no manifest": (
        lambda f: os.unlink(f + "/manifest.json"),
        "is no prepared set .*mmf prepare SRC",
    ),
    "manifest cut": (lambda f: os.truncate(f + "/manifest.json", 100), "manifest.json: damaged"),
    "manifest is a list": (lambda f: write(f, "manifest.json", b"[]"), "manifest.json: damaged"),
    "newer version": (lambda f: edit(f, version=3), "is of version 3, this program reads up to 2"),
    "unknown key": (lambda f: edit(f, colour="red"), "manifest.json: damaged"),
    "unknown kind": (lambda f: edit(f, kind="sounds"), "manifest.json: damaged"),
    "latents": (lambda f: edit(f, kind="latents", dtype="float16"), "manifest.json: damaged .facts"),
    "no samples": (lambda f: os.unlink(f + "/samples.npy"), "samples.npy: is not what its manifest says"),
    "samples cut": (lambda f: os.truncate(f + "/samples.npy", 9000), "samples.npy: .*9000 bytes, not 30848"),
    "labels cut": (lambda f: os.truncate(f + "/labels.npy", 200), "labels.npy: .*200 bytes, not 448"),
    "another shape": (
        lambda f: edit(f, shape=[3, 8, 32]),
        r"samples.npy: .*\(40, 3, 16, 16\), not uint8 \(40, 3, 8, 32\)",
    ),
    "fewer classes": (lambda f: edit(f, num_classes=39), r"labels.npy: labels 0 \.\. 39 of 39 classes"),
    "header damaged": (
        lambda f: write(f, "samples.npy", b"\x93NUMPX" + Path(f, "samples.npy").read_bytes()[6:]),
        "samples.npy: is not what its manifest says",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_set_is_refused(case, folder):
    damage, message = DAMAGED[case]
    load("images", path=folder)
    damage(folder)
    with pytest.raises(DataError, match=message) as error:
        load("images", path=folder)
    assert "\n" not in str(error.value) and folder in str(error.value)


@pytest.mark.parametrize("name", ["samples.npy", "labels.npy"])
def test_a_flipped_bit_is_found_by_the_checksums(name, folder):
    content = bytearray(Path(folder, name).read_bytes())
    content[300] ^= 1
    write(folder, name, content)
    with pytest.raises(DataError, match=f"{name}: damaged, its sha256 is not the one in manifest.json; prepare"):
        load("images", path=folder, verify=True)
    with pytest.raises(DataError, match="sha256"):
        prepared.verify(folder)


def test_a_set_of_the_other_kind_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match="holds images; use data.name=images"):
        load("latents", path=folder)
    prepare(write_zip(tmp_path / "l.zip", edm2(np.ones((2, 8, 4, 4), "f4"), [0, 1])), tmp_path / "l")
    with pytest.raises(DataError, match="holds latents; use data.name=latents"):
        load("images", path=str(tmp_path / "l"))


def test_the_path_is_needed():
    with pytest.raises(ValueError, match=r"dataset 'images' needs the option 'path': data.path=\.\.\."):
        load("images")


# ---- made images -----------------------------------------------------------------------------------------------------


def test_made_images_depend_on_the_seed_alone():
    options = {"shape": (3, 16, 16), "num_classes": 10, "count": 64}
    one, same, other = (load("synthetic", **options, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.batch(3, 32)[0], same.batch(3, 32)[0])
    assert not torch.equal(one.split("train")[0], other.split("train")[0])
    assert one.shape == (3, 16, 16) and one.num_classes == 10
    assert len(one.split("train")[0]) == 64 and len(one.split("validation")[0]) == 8


def test_classes_of_made_images_can_be_told_apart():
    """The spectrum of an image does not see its shift: the nearest one of another sample has the same class."""
    data = load("synthetic", shape=(3, 16, 16), num_classes=5, count=200)
    (x, y), (held, labels) = data.split("train"), data.split("validation")
    spectrum, other = (torch.fft.fft2(images).abs().flatten(1) for images in (x, held))
    assert (y[torch.cdist(other, spectrum).argmin(1)] == labels).float().mean() > 0.9


def test_made_images_replace_prepared_ones_in_a_configuration(tmp_path):
    path = tmp_path / "images.yaml"
    path.write_text(
        "data: {name: images, path: data/imagenet64, validation: data/val, flip: true}\n"
        "model: {name: dit, patch_size: 8, width: 16, depth: 1, heads: 2}\nloss: {objective: mmf}\n"
    )
    assert config.load(path).data["path"] == "data/imagenet64"
    made = load(**config.load(path, ["data=synthetic", "data.shape=[3, 8, 8]", "data.count=16"]).data)
    assert made.flip and made.batch(0, 4)[0].shape == (4, 3, 8, 8)


def test_unlabelled_made_images():
    data = load("synthetic", shape=(1, 8, 8), num_classes=0, count=4)
    assert data.num_classes == 0 and data.batch(0, 4)[1] is None


@pytest.mark.parametrize("options", [{"count": 0}, {"num_classes": -1}, {"shape": (3, 0, 8)}])
def test_numbers_of_made_images_are_positive(options):
    with pytest.raises(ValueError, match="give positive numbers"):
        load("synthetic", **options)


# ---- cost ------------------------------------------------------------------------------------------------------------


def anonymous_memory():
    """Bytes of this process that no file backs."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_memory_is_flat_over_an_epoch(tmp_path):
    """2,000 images of 64 x 64: 24 MB as uint8, 98 MB as float32."""
    files = edm(pictures(40, 64), [0] * 40)
    few = [content for name, content in files.items() if name.endswith(".png")]
    prepare(write_zip(tmp_path / "a.zip", {f"{i:04d}.png": few[i % 40] for i in range(2000)}), tmp_path / "out")
    data = load("images", path=str(tmp_path / "out"), flip=True)
    for step in range(5):
        data.batch(step, 100)
    before = anonymous_memory()
    for step in range(5, 45):
        data.batch(step, 100)
    assert anonymous_memory() - before < 4e6


def test_random_access_of_steps_is_the_stream(folder):
    data, again = load("images", path=folder, flip=True), load("images", path=folder, flip=True)
    stream = [data.batch(step, 12) for step in range(20)]
    for step in random.Random(0).sample(range(20), 20):
        x, y = again.batch(step, 12)
        assert torch.equal(x, stream[step][0]) and torch.equal(y, stream[step][1])
