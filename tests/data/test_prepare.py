"""Preparing: what comes out, what a kill at any moment leaves, and what is refused."""

import json
import os
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from support.archives import as_npz, cifar_batches, edm, edm2, imagenet_batches, pictures, png, write_folder, write_zip
from support.prepare_child import (
    in_child,
    prepare_and_die_at_the_manifest,
    prepare_in_small_steps,
    prepare_on_a_full_disk,
)

from mmf_fast.cli import main
from mmf_fast.data import load, writer
from mmf_fast.data.formats import FORMATS, DataError
from mmf_fast.data.prepare import parser, prepare
from mmf_fast.data.prepared import open_prepared, verify


def contents(folder):
    """{file: bytes} of a set, without the source's path in the manifest."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["manifest.json"] = {**json.loads(files["manifest.json"]), "source": None}
    return files


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A zip of 3,000 small images in the EDM format, image i being number i % 251 of a few."""
    few = [png(image) for image in pictures(251, side=8)]
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(3000)]
    files = {name: few[i % 251] for i, name in enumerate(names)}
    files["dataset.json"] = json.dumps({"labels": [[name, i % 7] for i, name in enumerate(names)]}).encode()
    return write_zip(tmp_path_factory.mktemp("source") / "many.zip", files)


@pytest.fixture(scope="module")
def whole(many, tmp_path_factory):
    """The set of `many` as one uninterrupted run leaves it."""
    out = tmp_path_factory.mktemp("whole")
    prepare(many, out, workers=1)
    return contents(out)


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_a_set_is_two_plain_arrays_and_a_manifest(tmp_path):
    files, images, labels = cifar_batches()
    manifest = prepare(write_folder(tmp_path / "src", files), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["labels.npy", "manifest.json", "samples.npy"]
    assert np.array_equal(np.load(tmp_path / "out" / "samples.npy"), images)
    assert np.array_equal(np.load(tmp_path / "out" / "labels.npy"), labels)
    assert (manifest.kind, manifest.count, manifest.shape, manifest.dtype) == ("images", 20, (3, 32, 32), "uint8")
    assert (manifest.num_classes, manifest.classes[9], manifest.skipped) == (10, "truck", [])
    assert manifest.source["format"] == "cifar10" and manifest.source["path"] == str(tmp_path / "src")
    for name in ("samples.npy", "labels.npy"):
        found = subprocess.run(["sha256sum", tmp_path / "out" / name], capture_output=True, text=True, check=True)
        assert manifest.files[name]["sha256"] == found.stdout.split()[0]
    assert verify(tmp_path / "out") == manifest == open_prepared(tmp_path / "out", "images").manifest


def test_without_labels_there_is_no_label_file(tmp_path):
    prepare(write_zip(tmp_path / "a.zip", edm(pictures(3), None)), tmp_path / "out")
    data = load("images", path=str(tmp_path / "out"))
    assert not (tmp_path / "out" / "labels.npy").exists()
    assert data.num_classes == 0 and data.batch(0, 2)[1] is None


def test_latents_are_float16(tmp_path):
    values = np.abs(np.random.default_rng(0).normal(size=(3, 8, 4, 4))).astype(np.float32)
    manifest = prepare(write_zip(tmp_path / "a.zip", edm2(values, [0, 1, 5])), tmp_path / "out")
    assert np.array_equal(np.load(tmp_path / "out" / "samples.npy"), values.astype(np.float16))
    assert manifest.dtype == "float16" and manifest.num_classes == 6 and manifest.facts["holds"] == "mean-std"


def test_the_second_call_does_nothing_and_another_set_is_refused(tmp_path):
    source, other = tmp_path / "a.zip", tmp_path / "b.zip"
    write_zip(source, edm(pictures(3), [0, 1, 2]))
    write_zip(other, edm(pictures(4, seed=1), [0, 1, 2, 3]))
    first = prepare(source, tmp_path / "out")
    date = (tmp_path / "out" / "samples.npy").stat().st_mtime_ns
    assert prepare(source, tmp_path / "out") == first
    assert (tmp_path / "out" / "samples.npy").stat().st_mtime_ns == date
    for changed in ({"source": other}, {"source": source, "size": 16}):
        with pytest.raises(DataError, match="holds another prepared set; pass another OUT, or --overwrite"):
            prepare(out=tmp_path / "out", **changed)
    assert prepare(other, tmp_path / "out", overwrite=True).count == 4
    assert np.array_equal(np.load(tmp_path / "out" / "samples.npy"), pictures(4, seed=1))


def test_more_threads_keep_the_order(many, whole, tmp_path):
    prepare(many, tmp_path / "eight", workers=8)
    assert contents(tmp_path / "eight") == whole
    assert np.array_equal(np.load(tmp_path / "eight" / "samples.npy"), pictures(251, side=8)[np.arange(3000) % 251])
    assert np.array_equal(np.load(tmp_path / "eight" / "labels.npy"), np.arange(3000) % 7)


@pytest.mark.parametrize(("kind", "bound"), [("npz", 0.2), ("pickle", 0.25), ("zip", 0.25)])
def test_memory_is_bounded(kind, bound, tmp_path):
    """Peak of all allocations as a share of the whole set, of which one file is a tenth and one read of npz less."""
    files, images, _ = imagenet_batches(each=300, side=64)
    if kind == "zip":
        images = images[:1500]
        source = write_zip(tmp_path / "a.zip", edm(images, [0] * len(images)))
    else:
        source = write_folder(tmp_path / "src", as_npz(files) if kind == "npz" else files)
    tracemalloc.start()
    prepare(source, tmp_path / "out", workers=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(np.load(tmp_path / "out" / "samples.npy"), images)
    assert peak < bound * images.nbytes


# ---- kills -----------------------------------------------------------------------------------------------------------


def seen(out):
    try:
        return json.loads((out / "progress.json").read_text())["seen"]
    except OSError:
        return 0


def test_kills_at_random_moments_cost_nothing_but_time(many, whole, tmp_path):
    out, rng, killed, status = tmp_path / "out", random.Random(0), 0, -9
    while status == -9:
        goal, start = seen(out) + rng.choice([0, 1, 200, 700]), time.monotonic()
        status = in_child(
            prepare_in_small_steps,
            *(many, out, 2),
            until=lambda goal=goal, start=start: seen(out) >= goal and time.monotonic() > start + rng.random() * 0.05,
        )
        killed += status == -9
        if status == -9:
            assert not (out / "manifest.json").exists()
            with pytest.raises(DataError, match="is no prepared set"):
                open_prepared(out, "images")
    assert status == 0 and killed >= 4
    assert contents(out) == whole


@pytest.mark.parametrize("written", [True, False])
def test_a_kill_while_the_manifest_is_written(written, many, whole, tmp_path):
    assert in_child(prepare_and_die_at_the_manifest, many, tmp_path / "out", written) == 9
    assert (tmp_path / "out" / "manifest.json").exists() == written
    prepare(many, tmp_path / "out")
    found = contents(tmp_path / "out")
    found.pop("progress.json", None)
    assert found == whole


def test_the_command_goes_on_after_a_kill(many, whole, tmp_path):
    """As a user meets it: kill -9, the same command again, the progress bar from where it was."""
    command = [sys.executable, "-m", "mmf_fast", "prepare", str(many), str(tmp_path / "out"), "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not seen(tmp_path / "out"):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -9
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "going on after" in again.stderr and "3000/3000" in again.stderr
    assert again.stdout == f"{tmp_path / 'out'}: 3000 images 3x8x8, 7 classes\n"
    assert contents(tmp_path / "out") == whole


def interrupted(source, out):
    """Prepares until the first flush, and no further."""
    assert in_child(prepare_in_small_steps, source, out, until=lambda: seen(out) > 0) == -9
    assert seen(out) > 0


def test_another_source_or_option_starts_anew(many, tmp_path, capsys):
    out = tmp_path / "out"
    interrupted(many, out)
    other = write_zip(tmp_path / "b.zip", edm(pictures(300, side=8, seed=5), [1] * 300))
    assert prepare(other, out).count == 300
    assert np.array_equal(np.load(out / "samples.npy"), pictures(300, side=8, seed=5))
    out = tmp_path / "out2"
    interrupted(many, out)
    assert prepare(many, out, size=4).shape == (3, 4, 4)
    assert "going on" not in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["shorter", "missing", "progress"])
def test_remains_that_do_not_fit_are_not_used(damage, many, whole, tmp_path):
    out = tmp_path / "out"
    interrupted(many, out)
    if damage == "shorter":
        os.truncate(out / "samples.npy", 1000)
    elif damage == "missing":
        (out / "labels.npy").unlink()
    else:
        (out / "progress.json").write_text("{")
    prepare(many, out)
    assert contents(out) == whole


def test_a_full_disk(many, whole, tmp_path):
    """No room beyond 400 kB, by a limit on the size of files; with room, the same call goes on."""
    out = tmp_path / "out"
    assert in_child(prepare_on_a_full_disk, many, out) == 7
    assert seen(out) > 1000 and not (out / "manifest.json").exists()
    prepare(many, out)
    assert contents(out) == whole


def test_a_disk_known_to_be_too_small(many, tmp_path, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: os.terminal_size((0, 0)) and Usage)

    class Usage:
        free = 100_000

    with pytest.raises(DataError, match=r"needs 0\.0 GB, 0\.0 are free; make room"):
        prepare(many, tmp_path / "out")


def test_two_processes_do_not_write_into_one_folder(many, tmp_path):
    source = writer.Source("images", "images", lambda: iter(()), "")
    with (
        writer.Writer(tmp_path / "out", source, {}),
        pytest.raises(DataError, match="another process prepares a set there"),
    ):
        prepare(many, tmp_path / "out")


# ---- bad samples -----------------------------------------------------------------------------------------------------


def with_bad(tmp_path, bad, count=20):
    files = edm(pictures(count), list(range(count)))
    for i in bad:
        files[f"00000/img{i:08d}.png"] = files[f"00000/img{i:08d}.png"][:200]
    return write_zip(tmp_path / "a.zip", files)


def test_a_bad_image_is_named_and_stops(tmp_path):
    with pytest.raises(DataError, match=r"img00000003\.png: does not decode.*--skip-bad SHARE"):
        prepare(with_bad(tmp_path, [3]), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_share_of_bad_images_is_left_out(tmp_path, capsys):
    manifest = prepare(with_bad(tmp_path, [0, 7]), tmp_path / "out", skip_bad=0.1)
    kept = [i for i in range(20) if i not in (0, 7)]
    assert np.array_equal(np.load(tmp_path / "out" / "samples.npy"), pictures(20)[kept])
    assert np.array_equal(np.load(tmp_path / "out" / "labels.npy"), kept)
    assert [name.rpartition("/")[2] for name in manifest.skipped] == ["img00000000.png", "img00000007.png"]
    assert capsys.readouterr().err.count("left out:") == 2


def test_more_than_the_share_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"3 of 20 samples cannot be read, more than --skip-bad 0\.1; the last .*0012"):
        prepare(with_bad(tmp_path, [0, 7, 12]), tmp_path / "out", skip_bad=0.1)


def test_all_bad(tmp_path):
    with pytest.raises(DataError, match="no sample could be read"):
        prepare(with_bad(tmp_path, range(20)), tmp_path / "out", skip_bad=1.0)


REFUSED = {
    "mixed sizes": (
        lambda: {"a.png": png(pictures(1, 8)[0]), "b.png": png(pictures(1, 9)[0])},
        {},
        r"b\.png: is 3x9x9, those before are 3x8x8; pass --size",
    ),
    "label beyond --num-classes": (
        lambda: edm(pictures(3), [0, 1, 5]),
        {"num_classes": 5},
        r"img00000002\.png: label 5 is outside 0 \.\. 4",
    ),
    "latents of two sizes": (
        lambda: {
            "a/img-mean-std-0.npy": edm2(np.ones((1, 8, 4, 4), "f4"), [0])["00000/img-mean-std-00000000.npy"],
            "a/img-mean-std-1.npy": edm2(np.ones((1, 8, 2, 2), "f4"), [0])["00000/img-mean-std-00000000.npy"],
        },
        {"root": "."},
        r"img-mean-std-1\.npy: is 8x2x2, those before are 8x4x4; encode them alike",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_samples_that_do_not_fit_each_other(case, tmp_path):
    files, options, message = REFUSED[case]
    with pytest.raises(DataError, match=message):
        prepare(write_folder(tmp_path / "src", files()), tmp_path / "out", **options)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_number_of_classes_that_have_names_is_told_by_the_source(tmp_path):
    """Otherwise all samples were written before the names did not suffice."""
    source = write_folder(tmp_path / "src", {f"{name}/1.png": png(pictures(1, 8)[0]) for name in "ab"})
    for count in (1, 5):
        with pytest.raises(DataError, match=f"src: names 2 classes, --num-classes says {count}; leave it out") as error:
            prepare(source, tmp_path / "out", num_classes=count)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    assert prepare(source, tmp_path / "out", num_classes=2).classes == ["a", "b"]


# ---- command line ----------------------------------------------------------------------------------------------------


def test_command_line(tmp_path, capsys):
    source = write_zip(tmp_path / "a.zip", edm(pictures(3, 32), [0, 1, 5]))
    out = str(tmp_path / "out")
    assert main(["prepare", str(source), out, "--size", "16", "--num-classes", "10"]) == 0
    assert capsys.readouterr().out == f"{out}: 3 images 3x16x16, 10 classes\n"
    assert main(["prepare", out, "--check"]) == 0
    assert capsys.readouterr().out == f"{out}: 3 images 3x16x16, 10 classes, whole\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/none", "{}/out"], "error: {}/none: does not exist; pass the archive or folder as it was downloaded"),
        (["{}", "{}/../{name}"], "error: {}/../{name}: is the source itself, which stays as it is; pass another OUT"),
        (
            ["{}", "{}/out", "--check"],
            "error: --check is for one prepared set: mmf prepare {}/out --check, without SRC",
        ),
        (["{}/none"], "error: OUT is missing: the folder to write to"),
        (["{}", "--check"], "error: {}: is no prepared set (manifest.json: No such file or directory); make one: "),
    ],
)
def test_command_line_errors_are_one_line(arguments, message, tmp_path, capsys):
    assert main(["prepare", *(argument.format(tmp_path, name=tmp_path.name) for argument in arguments)]) == 2
    found = capsys.readouterr()
    assert (
        found.err.startswith(message.format(tmp_path, name=tmp_path.name))
        and found.err.count("\n") == 1
        and not found.out
    )


def test_the_documentation_names_every_option_and_format():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    options = {option for action in parser()._actions for option in action.option_strings if option.startswith("--")}
    assert {option for option in options - {"--help"} if option not in text} == set()
    assert {name for name in FORMATS if f"`{name}`" not in text} == set()
