import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_runs import tiny

from mmf_fast.config import ConfigError
from mmf_fast.devices import PEAK_FLOPS
from mmf_fast.models import MLP
from mmf_fast.train import build_trainer
from mmf_fast.training import timing
from mmf_fast.training.record import read
from mmf_fast.training.timing import PHASES, Phases, Speed

CPU = torch.device("cpu")


class Device:
    """A CUDA device on paper: its clock moves where `works` says, and the host is ahead of it until it waits."""

    def __init__(self) -> None:
        self.queue: list[Any] = []
        self.now = 0.0
        self.waits = 0

    def works(self, milliseconds: float) -> None:
        self.queue.append(milliseconds)

    def pass_until(self, event: Any) -> None:
        while not event.passed:
            done = self.queue.pop(0)
            if isinstance(done, float):
                self.now += done
            else:
                done.passed, done.at = True, self.now

    def event(self, enable_timing: bool = False) -> Any:
        device = self

        class Event:
            passed, at = False, 0.0

            def record(self, stream: Any) -> None:
                device.queue.append(self)

            def query(self) -> bool:
                return self.passed

            def synchronize(self) -> None:
                device.waits += not self.passed
                device.pass_until(self)

            def elapsed_time(self, other: Any) -> float:
                assert enable_timing and self.passed and other.passed
                return other.at - self.at

        return Event()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    found = Device()
    monkeypatch.setattr(torch.cuda, "Event", found.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    yield found


def test_on_cuda_the_device_is_timed_and_not_waited_for(device: Device) -> None:
    clock = Phases(torch.device("cuda"))
    for milliseconds in (3.0, 5.0):
        with clock("data"):
            pass
        with clock("loss"):
            device.works(milliseconds)
        device.works(100.0)  # between phases
        with clock("backward"):
            device.works(2 * milliseconds)
    assert device.waits == 0
    found = clock.read()
    assert device.waits > 0
    assert found == pytest.approx({"data": 0.0, "loss": 0.008, "backward": 0.016, "optimizer": 0.0})
    assert clock.read() == dict.fromkeys(PHASES, 0.0)


def test_events_that_have_passed_do_not_pile_up(device: Device) -> None:
    clock = Phases(torch.device("cuda"))
    for _ in range(50):
        with clock("loss"):
            device.works(1.0)
        device.pass_until(clock._pending[-1][2])  # the device keeps up, one phase behind
        assert len(clock._pending) == 1
    assert device.waits == 0 and clock.read()["loss"] == pytest.approx(0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_phases_of_a_gpu_add_up_to_its_time() -> None:
    clock = Phases(torch.device("cuda"))
    a = torch.randn(4096, 4096, device="cuda")
    a @ a  # the first product starts cuBLAS
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        with clock("loss"):
            a @ a
        with clock("backward"):
            a @ a @ a
    found = clock.read()
    assert found["loss"] + found["backward"] == pytest.approx(time.perf_counter() - start, rel=0.1)
    assert found["backward"] == pytest.approx(2 * found["loss"], rel=0.2)


def test_on_a_cpu_the_clock_is_the_hosts() -> None:
    clock = Phases(CPU)
    for _ in range(2):
        with clock("data"):
            time.sleep(0.02)
    with clock("optimizer"):
        time.sleep(0.01)
    found = clock.read()
    assert 0.04 <= found["data"] < 1 and 0.01 <= found["optimizer"] < 1
    assert found["loss"] == found["backward"] == 0


def test_ranges_for_nsight_are_those_of_the_phases(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = []

    class Nvtx:
        @staticmethod
        def annotate(name: str, domain: str) -> Any:
            ranges.append((name, domain))
            return torch.no_grad()  # any context manager

    monkeypatch.setattr(timing, "nvtx", Nvtx)
    with Phases(torch.device("cuda"))("loss"):
        pass
    with Phases(CPU)("loss"):
        pass
    monkeypatch.setattr(timing, "nvtx", None)  # not installed
    with Phases(torch.device("cuda"))("loss"):
        pass
    assert ranges == [("loss", "mmf_fast")]


def test_utilisation_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 samples of 22 GFLOPs a forward; 3.25 forwards each, as lambda = 0 on a quarter of the rows takes."""
    now = iter([10.0, 10.5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    speed = Speed(Phases(CPU), batch=64, peak=2 * PEAK_FLOPS["A100"]["bf16"])
    for _ in range(4):
        speed.count(64 * 3.25 * 22e9)
    found = speed.read()
    assert found["mfu"] == pytest.approx(4 * 64 * 3.25 * 22e9 / 0.5 / (2 * 312e12))
    assert found["images_per_second"] == pytest.approx(512) and found["step_seconds"] == pytest.approx(0.125)


def test_a_run_says_where_its_time_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of this device is set to 1 GFLOP/s, and what the network needs is counted by hand."""
    monkeypatch.setattr("mmf_fast.training.trainer.peak_flops", lambda device, precision: 1e9)
    loss = {"objective": "mmf", "lam": {"kind": "step", "value": 1.0, "start": 6}}
    settings = {"steps": 12, "log_every": 3, "batch": 64, "checkpoint_every": 12}
    build_trainer(tiny(model={"width": 128, "depth": 4}, loss=loss, train=settings), tmp_path / "run").fit()
    found = read(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in found] == [3, 6, 9, 12]
    for record in found:
        parts = sum(record[f"{name}_seconds"] for name in PHASES)
        assert 0.8 * record["step_seconds"] < parts <= record["step_seconds"]
        assert record["images_per_second"] == pytest.approx(64 / record["step_seconds"])
        assert all(record[f"{name}_seconds"] > 0 for name in PHASES)
        assert 0.05 < record["peak_memory_gib"] < 64
        # paired: 3 forwards for three quarters of the rows, 4 for the rest at lambda = 0 (steps 0 to 5), then 6
        forwards = 48 * 3 + 16 * (4 if record["step"] <= 6 else 6)
        flops = MLP(2, width=128, depth=4).flops() * forwards
        assert record["mfu"] == pytest.approx(flops / record["step_seconds"] / 1e9)


def test_an_unknown_device_has_no_utilisation(tmp_path: Path) -> None:
    build_trainer(tiny(), tmp_path / "run").fit()
    assert not any("mfu" in record for record in read(tmp_path / "run" / "metrics.jsonl"))


def test_a_profile_is_a_trace_that_names_the_phases(tmp_path: Path) -> None:
    run = tmp_path / "run"
    build_trainer(tiny(train={"steps": 16, "checkpoint_every": 100}), run, profile=True).fit()
    assert [path.name for path in (run / "profile").iterdir()] == ["rank_0.json"]
    events = json.loads((run / "profile" / "rank_0.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for name in PHASES:  # data has two parts: the batch, and its way to the device
        assert names.count(name) == timing.TRACED * (2 if name == "data" else 1), name
    assert any(event.get("name") == "aten::linear" or "addmm" in event.get("name", "") for event in events)


def test_a_profile_of_too_few_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--profile records 3 steps after 10 others, train.steps=12 leaves 12"):
        build_trainer(tiny(), tmp_path / "run", profile=True)
    assert not (tmp_path / "run").exists()
