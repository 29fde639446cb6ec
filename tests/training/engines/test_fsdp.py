"""FSDP2 on two ranks against one process on the same global batch, and all engines on one run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.engine_cases import check_against_one_process, loss_function, on_two_ranks, optimizer, train
from support.launch import SUPPORT, environment, two_ranks

from mmf_fast.models import load_pretrained
from mmf_fast.training.engines.fsdp import FSDPEngine
from mmf_fast.training.settings import ConfigError

CASES = {
    "full": {"zero": "fsdp", "lam": 1.0, "paired": True, "steps": 10},
    "accumulated": {"zero": "fsdp", "lam": "curriculum", "paired": False, "steps": 10, "accumulate": 2},
    "recomputed": {"zero": "fsdp", "lam": 0.0, "paired": True, "steps": 5, "recompute": True},
    "scaled": {"zero": "fsdp", "lam": 0.5, "paired": True, "steps": 10, "scaled": True, "accumulate": 2},
    "unet": {"zero": "fsdp", "lam": 0.5, "paired": True, "steps": 5, "unet": True},
    "bad": {"zero": "fsdp", "lam": 0.5, "paired": True, "steps": 4, "bad_step": 2},
}
COMPILED = {"compiled": {"zero": "fsdp", "lam": 1.0, "paired": True, "steps": 5, "compile": "blocks"}}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return on_two_ranks(CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [name for name in CASES if name != "bad"])
def test_two_ranks_train_as_one_process(name: str, found: dict[str, dict]) -> None:
    check_against_one_process(found[name], CASES[name])


def test_a_bad_sample_on_one_rank_skips_the_step_on_all(found: dict[str, dict]) -> None:
    assert found["bad"]["skipped"] == [False, False, True, False]
    assert all(torch.isfinite(average).all() for average in found["bad"]["average"].values())


@pytest.mark.slow  # compiles for a minute
def test_compiled_blocks_train_alike(tmp_path: Path) -> None:
    check_against_one_process(on_two_ranks(COMPILED, tmp_path)["compiled"], COMPILED["compiled"])


@pytest.mark.slow  # four starts
def test_one_run_goes_on_with_every_engine(tmp_path: Path) -> None:
    """Its loss module has a parameter of its own, a frozen part, and a buffer that every call changes."""
    script = str(SUPPORT / "own_run.py")

    def alone(folder: Path, steps: int) -> None:
        words = [sys.executable, script, str(folder), str(steps), ""]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    def losses(folder: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    alone(tmp_path / "one", 16)
    alone(tmp_path / "many", 4)
    for zero, steps in (("zero3.json", 8), ("fsdp", 12)):
        done = two_ranks(script, str(tmp_path / "many"), str(steps), zero)
        assert done.returncode == 0, done.stderr[-3000:]
    alone(tmp_path / "many", 16)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    sys.path.insert(0, str(SUPPORT))
    try:
        from own_run import Net
    finally:
        sys.path.remove(str(SUPPORT))
    one, many = (load_pretrained(tmp_path / name, Net())[0].state_dict() for name in ("one", "many"))
    assert one["calls"] == many["calls"] > 16
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["full"]
    monkeypatch.setattr("mmf_fast.training.engines.fsdp.join", lambda name: torch.device("cpu"))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 5)
    with pytest.raises(ConfigError, match="train.batch=32 is not divisible by 5 processes"):
        FSDPEngine(loss_function(case), optimizer(), train(case))
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="train.compile=blocks"):
        FSDPEngine(loss_function(case), optimizer(), train({**case, "compile": True}))
