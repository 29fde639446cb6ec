import hashlib
import os
import random
import re
import subprocess
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from mmf_fast.training.checkpoint import CheckpointError, Checkpoints, read, rng_state, set_rng_state


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((300,), float(step)), "nested": [{"a": (1, 2.5, None, "x")}]}


def load(checkpoints: Checkpoints) -> tuple[Path, dict[str, Any]] | None:
    path = checkpoints.newest_whole()
    return None if path is None else (path, read(path, check=False))


@pytest.fixture
def three(tmp_path: Path) -> Checkpoints:
    """Checkpoints of steps 10, 20, 30."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (10, 20, 30):
        checkpoints.save(state(step), step)
    return checkpoints


def test_what_is_saved_is_loaded(three: Checkpoints) -> None:
    found = load(three)
    assert found is not None
    path, loaded = found
    assert path.name == "step_0000030.pt"
    assert (three.folder / "latest").read_text() == "step_0000030.pt\n"
    assert loaded["step"] == 30 and loaded["nested"] == state(30)["nested"]
    assert torch.equal(loaded["weights"], state(30)["weights"])


def test_the_checksum_is_that_of_sha256sum(three: Checkpoints) -> None:
    path = three.folder / "step_0000020.pt"
    line = (three.folder / "step_0000020.pt.sha256").read_text()
    assert line == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
    assert subprocess.run(["sha256sum", "--check", "--status", f"{path.name}.sha256"], cwd=three.folder).returncode == 0


def test_none_where_there_is_none(tmp_path: Path) -> None:
    assert load(Checkpoints(tmp_path / "absent")) is None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(9_999_998, 10_000_003):  # the names outgrow their padding here, so text order is not step order
        checkpoints.save(state(step), step)
    assert {path.name for path in tmp_path.glob("*.pt")} == {"step_10000001.pt", "step_10000002.pt"}
    assert len(list(tmp_path.iterdir())) == 5  # two files, two checksums, latest
    assert checkpoints.newest() == tmp_path / "step_10000002.pt"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 4
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lose_checksum(path: Path) -> None:
    path.with_name(path.name + ".sha256").unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, lose_checksum])
def test_a_damaged_one_is_named_and_the_one_before_it_is_used(
    three: Checkpoints, damage: Callable[[Path], None]
) -> None:
    damage(three.folder / "step_0000030.pt")
    with pytest.warns(UserWarning, match=r"step_0000030\.pt.*(damaged|missing)"):
        found = load(three)
    assert found is not None and found[1]["step"] == 20
    three.save(state(25), 25)  # going on from 20: the damaged one must not come back as the newest
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load(three)
    assert found is not None and found[1]["step"] == 25


def save_both(checkpoints: Checkpoints, step: int) -> None:
    """As two ranks do."""
    name, digest = checkpoints.save_share({"rank": 1, "weights": torch.full((300,), -float(step))}, step, 1)
    checkpoints.save(state(step), step, {name: digest})


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, Path.unlink])
def test_a_damaged_share_is_named_and_the_checkpoint_before_it_is_used(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20):
        save_both(checkpoints, step)
    damage(tmp_path / "step_0000020.rank1.pt")
    with pytest.warns(UserWarning, match=r"step_0000020\.rank1\.pt: (damaged|missing)"):
        found = load(checkpoints)
    assert found is not None and found[1]["step"] == 10
    assert [share["rank"] for share in found[1]["shares"]] == [1]
    assert torch.equal(found[1]["shares"][0]["weights"], torch.full((300,), -10.0))
    save_both(checkpoints, 20)  # the same step again, over the damaged one
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load(checkpoints)
    assert found is not None and found[1]["step"] == 20


def test_shares_go_with_their_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30):
        save_both(checkpoints, step)
    assert {path.name for path in tmp_path.glob("*rank*")} == {"step_0000020.rank1.pt", "step_0000030.rank1.pt"}


def test_the_system_says_why_a_file_cannot_be_written(tmp_path: Path) -> None:
    """torch.save complains about its archive instead."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / f"step_0000001.pt.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        Checkpoints(tmp_path).save({"weights": torch.zeros(10**6)}, 1)


def test_all_damaged_is_an_error_and_not_a_fresh_start(three: Checkpoints) -> None:
    for path in three.folder.glob("*.pt"):
        truncate(path)
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match="no checkpoint can be used: .*10.pt: damaged"):
        warnings.simplefilter("ignore")
        load(three)


def test_an_object_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return (exec, ("raise SystemExit('ran')",))

    path = tmp_path / "step_0000001.pt"
    torch.save({"x": Harmful()}, path)
    lines = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
    path.with_name(f"{path.name}.sha256").write_text(lines)
    with pytest.raises(CheckpointError, match=r"cannot be read \(it holds exec, which could run code\)"):
        read(path)
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match="no checkpoint can be used: ") as caught:
        warnings.simplefilter("ignore")
        Checkpoints(tmp_path).newest_whole()
    assert "damaged" not in str(caught.value) and "\n" not in str(caught.value)  # it is whole


class Pair(NamedTuple):
    one: int
    two: int


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Path("x"), "the checkpoint.nested[0].a is of PosixPath"),
        (np.zeros(3), "the checkpoint.nested[0].a is of ndarray"),
        (lambda: 1, "the checkpoint.nested[0].a is of function"),
        (Pair(1, 2), "the checkpoint.nested[0].a is of Pair"),
        ({Path("x"): 1}, "a key of the checkpoint.nested[0].a is of PosixPath"),
        (np.longdouble(1), "the checkpoint.nested[0].a is of longdouble"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(three: Checkpoints, value: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(named)}, which no checkpoint can hold: give a number, a word,"):
        three.save({"weights": torch.zeros(2), "nested": [{"a": value}]}, 40)
    with pytest.raises(ValueError, match="the share.a is of .*|a key of the share.a is of"):
        three.save_share({"a": value}, 40, 1)
    found = load(three)
    assert found is not None and found[1]["step"] == 30


def test_numbers_of_numpy_are_read_as_those_of_python(tmp_path: Path) -> None:
    written = {"a": np.float64(0.1), "b": (np.int64(3), [np.bool_(True)]), np.int32(7): np.array(2.5)}
    found = read(Checkpoints(tmp_path).save(written, 1))
    del found["shares"]
    assert found == {"a": 0.1, "b": (3, [True]), 7: 2.5}
    kinds = [type(each) for each in (found["a"], found["b"][0], found["b"][1][0], found[7])]
    assert kinds == [float, int, bool, float]


def test_all_that_torch_reads_is_written(tmp_path: Path) -> None:
    """As an optimizer of one's own may remember it."""
    others = [torch.float32, torch.Size([2]), {1, 2}, b"x", 1j, torch.device("cpu"), OrderedDict(a=1)]
    assert read(Checkpoints(tmp_path).save({"others": others}, 1))["others"] == others


class Crash(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize("moment", range(8))
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_crash_at_any_moment_of_a_save_leaves_a_whole_checkpoint(
    three: Checkpoints, monkeypatch: pytest.MonkeyPatch, call: str, moment: int
) -> None:
    """Crashes before the n-th rename or flush; what is on disk then must load without a complaint."""
    calls = 0
    real = getattr(os, call)

    def crash(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > moment:
            raise Crash
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, crash)
        try:
            three.save(state(40), 40)
            crashed = False
        except Crash:
            crashed = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load(three)
    assert found is not None
    assert found[1]["step"] in ((30, 40) if crashed else (40,))
    assert torch.equal(found[1]["weights"], state(found[1]["step"])["weights"])
    three.save(state(50), 50)
    assert not list(three.folder.glob("*.tmp"))


def test_a_full_disk_is_one_line_and_loses_nothing(three: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"step_0000040\.pt.*No space left") as caught:
        three.save(state(40), 40)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    found = load(three)
    assert found is not None and found[1]["step"] == 30
    assert not list(three.folder.glob("*.tmp"))


def draws() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.randn()),
        float(torch.randn(())),
        float(torch.rand(())),
    ]


def test_all_generators_go_on_where_they_were(tmp_path: Path) -> None:
    np.random.seed(3)
    random.seed(3)
    draws()  # an odd number of normals: the second of the pair that NumPy and random.gauss keep is part of the state
    path = Checkpoints(tmp_path).save(rng_state(), 1)
    expected = [draws() for _ in range(3)]
    draws()
    set_rng_state(read(path))
    assert [draws() for _ in range(3)] == expected
