"""Two ranks on CPUs against one process on the same global batch: losses, gradient norms and the averaged weights."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.engine_cases import check_against_one_process, loss_function, on_two_ranks, optimizer, train
from support.launch import ROOT, environment, two_ranks

from mmf_fast.training.engines.local import LocalEngine
from mmf_fast.training.settings import ConfigError, read_zero

pytest.importorskip("deepspeed")

FEW = {  # each stage, each lambda, each kind of tangent, accumulation: what a change is likely to break
    "zero0": {"stage": 0, "lam": 0.0, "paired": False, "steps": 20},
    "zero1": {"stage": 1, "lam": "curriculum", "paired": True, "steps": 20},
    "zero2": {"stage": 2, "lam": 1.0, "paired": False, "steps": 20, "accumulate": 2},
    "zero3": {"stage": 3, "lam": 1.0, "paired": True, "steps": 20},
    "zero2-recompute": {"stage": 2, "lam": 0.0, "paired": False, "steps": 5, "recompute": True},
    "zero3-recompute": {"stage": 3, "lam": "curriculum", "paired": True, "steps": 5, "recompute": True},
    "zero1-scaled": {"stage": 1, "lam": 0.5, "paired": True, "steps": 5, "scaled": True},
    "bad0": {"stage": 0, "lam": 0.5, "paired": True, "steps": 4, "bad_step": 2},
    "bad2": {"stage": 2, "lam": 0.5, "paired": True, "steps": 4, "bad_step": 2},
    "bad3": {"stage": 3, "lam": 0.5, "paired": True, "steps": 4, "bad_step": 2},
    "bad0-loss": {"stage": 0, "lam": 0.5, "paired": True, "steps": 4, "bad_loss": 2},
    "bad1-loss": {"stage": 1, "lam": 0.5, "paired": True, "steps": 4, "bad_loss": 2},
}
MATRIX = {
    f"zero{stage}-{lam}-{'paired' if paired else 'predicted'}": {
        "stage": stage, "lam": lam, "paired": paired, "steps": 20
    }
    for stage, lam, paired in itertools.product(range(4), (0.0, "curriculum", 1.0), (False, True))
}  # fmt: skip

OFFLOAD = {
    "zero1-cpu": {"stage": 1, "lam": 0.0, "paired": True, "steps": 10, "kind": "deepspeed_cpu"},
    "zero2-offload": {"stage": 2, "lam": 1.0, "paired": True, "steps": 10, "zero": "zero2_offload.json"},
    "zero3-offload": {"stage": 3, "lam": "curriculum", "paired": True, "steps": 10, "zero": "zero3_offload.json"},
    "zero2-fused": {"stage": 2, "lam": 1.0, "paired": True, "steps": 10, "kind": "deepspeed_fused"},
    "bad2-offload": {"stage": 2, "lam": 0.5, "paired": True, "steps": 4, "bad_step": 2, "zero": "zero2_offload.json"},
    "bad3-offload": {"stage": 3, "lam": 0.5, "paired": True, "steps": 4, "bad_step": 2, "zero": "zero3_offload.json"},
}
SMALL = [
    "optimizer.schedule=constant",
    "train.batch=64",
    "train.log_every=1",
    "train.checkpoint_every=100",
    "train.sample_every=0",
    "model.width=16",
]
compiles = pytest.mark.skipif(not (shutil.which("g++") and shutil.which("ninja")), reason="needs g++ and ninja")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return on_two_ranks(FEW, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [name for name in FEW if name.startswith("zero")])
def test_two_ranks_train_as_one_process(name: str, few: dict[str, dict]) -> None:
    check_against_one_process(few[name], FEW[name])


def check_skipped(found: dict) -> None:
    assert found["skipped"] == [False, False, True, False]
    assert math.isfinite(found["loss"][3])
    assert all(torch.isfinite(average).all() for average in found["average"].values())


@pytest.mark.parametrize("name", [name for name in FEW if name.startswith("bad")])
def test_a_bad_sample_on_one_rank_skips_the_step_on_all(name: str, few: dict[str, dict]) -> None:
    check_skipped(few[name])


@pytest.mark.slow  # DeepSpeed compiles its optimizers at first use: two minutes each
@compiles
def test_the_optimizers_of_deepspeed_with_and_without_offload(tmp_path: Path) -> None:
    cases = {name: {"kind": "deepspeed_cpu", **case} for name, case in OFFLOAD.items()}
    found = on_two_ranks(cases, tmp_path)
    for name, case in cases.items():
        if "bad_step" in case:
            check_skipped(found[name])
        else:
            check_against_one_process(found[name], case)


@pytest.mark.slow
def test_every_stage_lambda_and_tangent(tmp_path: Path) -> None:
    found = on_two_ranks(MATRIX, tmp_path)
    for name, case in MATRIX.items():
        check_against_one_process(found[name], case)


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


@pytest.mark.slow
def test_a_run_goes_on_with_another_stage_and_number_of_ranks(tmp_path: Path) -> None:
    common = [str(ROOT / "mmf_fast" / "train.py"), "--config", str(ROOT / "configs" / "two_moons.yaml"), *SMALL]
    one = subprocess.run([sys.executable, *common, "--run", str(tmp_path / "one"), "train.steps=16"], env=environment())
    assert one.returncode == 0
    for processes, stage, steps in ((2, 1, 4), (1, 3, 8), (2, 0, 12), (2, 2, 16)):
        options = [f"train.steps={steps}", f"train.zero=zero{stage}.json", "--resume"]
        done = two_ranks(*common, "--run-folder", str(tmp_path / "many"), *options, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    want, found = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert found == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
@compiles
def test_a_run_goes_on_with_and_without_offload(tmp_path: Path) -> None:
    common = [str(ROOT / "mmf_fast" / "train.py"), "--config", str(ROOT / "configs" / "two_moons.yaml"), *SMALL]
    one = subprocess.run([sys.executable, *common, "--run", str(tmp_path / "one"), "train.steps=16"], env=environment())
    assert one.returncode == 0
    parts = (("zero2_offload", "deepspeed_cpu"), ("zero1", "adamw"), ("zero3_offload", "deepspeed_cpu"))
    parts += (("zero2", "deepspeed_fused"),)
    for part, (zero, kind) in enumerate(parts, start=1):
        options = [f"train.steps={4 * part}", f"train.zero={zero}.json", f"optimizer.kind={kind}", "--resume"]
        done = two_ranks(*common, "--run-folder", str(tmp_path / "many"), *options)
        assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 3, 7])
def test_of_what_was_saved_only_what_is_asked_for_is_read(ranks: int) -> None:
    """Tensors on the meta device have no content: reading one of them raises."""
    from mmf_fast.training.fragments import Saved

    values = {"a": torch.randn(5, 4), "b": torch.randn(3)}  # b: the last ranks own nothing of it
    shapes = {name: value.shape for name, value in values.items()}
    cuts = {name: torch.linspace(0, value.numel(), ranks + 1).long().tolist() for name, value in values.items()}

    def share(rank: int, readable: bool) -> dict:
        fragments = {}
        for name, value in values.items():
            low, high = cuts[name][rank], cuts[name][rank + 1]
            if low < high:
                part = value.flatten()[low:high]
                fragments[name] = {"start": low, "steps": 3.0, "weight": part if readable else part.to("meta")}
        return {"fragments": fragments, "buffers": {}}

    every = [share(rank, True) for rank in range(ranks)]
    saved = Saved(every, shapes)
    for name, value in values.items():
        assert torch.equal(saved.whole(name, "weight"), value)
        padded = torch.cat([value.flatten(), torch.zeros(9)])
        for start, size in ((0, 2), (1, value.numel()), (2, 0), (value.numel() - 1, 6), (value.numel() + 2, 3)):
            assert torch.equal(saved.part(name, "weight", start, size), padded[start : start + size])
    for rank in range(ranks):
        own = Saved([share(other, other == rank) for other in range(ranks)], shapes)
        for name, fragment in every[rank]["fragments"].items():
            size = fragment["weight"].numel()
            assert torch.equal(own.part(name, "weight", fragment["start"], size), fragment["weight"])
        if ranks > 1:
            with pytest.raises(NotImplementedError, match="meta"):
                own.whole("a", "weight")
            with pytest.raises(ValueError, match="only a part of a"):
                Saved(every[:rank] + every[rank + 1 :], shapes)


def test_a_parameter_without_a_dimension_at_stage_3_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmf_fast.training.engines import deepspeed

    monkeypatch.setattr(deepspeed, "_join", lambda name: torch.device("cpu"))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    case = {**FEW["zero3"], "scaled": True}
    with pytest.raises(ConfigError, match="stage 3 cannot share log_scale, .* give it one row, or use stage 2"):
        deepspeed.DeepSpeedEngine(
            loss_function(case),
            optimizer(),
            train(case),
            {"zero_optimization": {"stage": 3, "memory_efficient_linear": False}},
        )


def test_settings_that_do_not_fit_are_one_line_errors() -> None:
    from mmf_fast.training.engines.deepspeed import _settings

    for settings, words in (
        ({"train": train({"steps": 1}), "world_size": 5}, "train.batch=32"),
        ({"zero": {"gradient_clipping": 1.0}}, "gradient_clipping"),
        ({"zero": {"zero_optimization": {"stage": 3}}, "stage": 3}, "memory_efficient_linear"),
        ({"zero": read_zero("zero2_offload.json")}, "set optimizer.kind=deepspeed_cpu"),
        ({"optimizer": optimizer("deepspeed_cpu"), "device": torch.device("cuda")}, "zero2_offload.json"),
        ({"optimizer": optimizer("deepspeed_fused"), "stage": 0}, "stage 1, 2 or 3"),
    ):
        options = {"zero": {}, "stage": 1, "optimizer": optimizer(), "train": train({"steps": 1}), "world_size": 2}
        options["device"] = torch.device("cpu")
        with pytest.raises(ConfigError, match=words):
            _settings(**{**options, **settings})


def test_an_optimizer_that_is_not_here_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmf_fast.training.engines import deepspeed

    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("Ninja is required\nto load C++ extensions")

    monkeypatch.setattr(deepspeed, "FusedAdam", fail)
    for kind, words in (("deepspeed_fused", "Ninja is required to load"), ("apex", "github.com/NVIDIA/apex")):
        with pytest.raises(ConfigError, match=words) as caught:
            deepspeed._build_optimizer([torch.nn.Parameter(torch.zeros(2))], optimizer(kind))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="train.zero=zero1.json"):
        LocalEngine(loss_function(FEW["zero0"]), optimizer("deepspeed_fused"), train(FEW["zero0"]))


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage is 'auto'"),
        ({"zero_optimization": {"stage": 1}, "train_batch_size": "auto"}, "train_batch_size is 'auto'"),
        ({"fp16": {"enabled": True}}, "fp16 is not trained in here"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4"),
    ],
)
def test_a_file_of_another_trainer_is_refused_by_the_name_of_its_key(zero: dict, words: str) -> None:
    from mmf_fast.training.engines.deepspeed import _stage

    with pytest.raises(ConfigError, match=words) as caught:
        _stage(zero)
    assert "\n" not in str(caught.value)
