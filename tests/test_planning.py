"""The scaling plan against hand calculations, and against what two CPU ranks hold and send."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launch import SUPPORT, two_ranks
from support.small_networks import saved_bytes

from mmf_fast import MeanFlowLoss, config, planning
from mmf_fast.cli import main
from mmf_fast.models import build

HERE = Path(__file__).parent
CASES: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0, "precision": "fp32"},
    "zero1": {"stage": 1, "precision": "bf16"},
    "zero1-fp32": {"stage": 1, "precision": "fp32"},
    "zero2": {"stage": 2, "precision": "bf16", "accumulate": 2},
    "zero3": {"stage": 3, "precision": "bf16"},
}
PARTS = ("weights", "master", "gradients", "moments", "average")


def tree(**sections: Any) -> config.Config:
    model = {"name": "dit", "patch_size": 2, "width": 32, "depth": 2, "heads": 2}
    data = {"name": "synthetic", "shape": [1, 8, 8], "num_classes": 3, "count": 1}
    base: dict[str, Any] = {"data": data, "model": model, "loss": {"objective": "meanflow"}}
    return config.from_tree({key: {**base.get(key, {}), **sections.get(key, {})} for key in {*base, *sections}})


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("ranks")
    done = two_ranks(str(SUPPORT / "plan_ranks.py"), json.dumps(CASES), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_memory_is_what_a_rank_holds(name: str, ranks: dict[str, dict]) -> None:
    found, case = ranks[name], CASES[name]
    weight = 2 if case["precision"] == "bf16" else 4
    planned = planning.memory(found["count"], weight, 2, case["stage"])
    for part in PARTS:  # parameters that lie in two partitions have their whole gradient in both
        assert found[part] == pytest.approx(planned[part], rel=0.06 if part == "gradients" else 0.01, abs=1)
    held = sum(found[part] for part in PARTS)
    assert held <= found["all"] < 1.05 * held  # nothing is forgotten


@pytest.mark.parametrize("name", CASES)
def test_communication_is_what_a_rank_sends(name: str, ranks: dict[str, dict]) -> None:
    case, count = CASES[name], ranks[name]["count"]
    step = planning.Job(count, 16, case.get("accumulate", 1), case["precision"], 0.0, 0.0, (2, 2))
    assert ranks[name]["sent"] == pytest.approx(planning.communication(step, 2, case["stage"]), rel=0.02)


def test_memory_by_hand() -> None:
    """1000 parameters on 4 ranks in bf16: 2 bytes of weights and gradients, 4 + 8 + 4 of the optimizer and average."""
    assert planning.memory(1000, 4, 4, 0) == dict(weights=4000, master=0, gradients=4000, moments=8000, average=1000)
    zero2 = dict(weights=2000, master=1000, gradients=500, moments=2000, average=1000)
    assert planning.memory(1000, 2, 4, 1) == planning.memory(1000, 2, 4, 2) == zero2
    assert planning.memory(1000, 2, 4, 3) == {**zero2, "weights": 500}


def test_communication_by_hand() -> None:
    """A ring of 4 sends 3/4 of a tensor to gather it."""
    step = planning.Job(1000, 8, 2, "bf16", 0.0, 0.0, (3, 2))
    assert planning.communication(step, 4, 0) == 2 * 0.75 * 4000
    assert planning.communication(step, 4, 1) == (2 + 1) * 0.75 * 2000
    assert planning.communication(step, 4, 2) == (2 * 2 + 1) * 0.75 * 2000
    assert planning.communication(step, 4, 3) == 2 * (1 + 1) * 0.75 * 2000
    assert planning.communication(step, 1, 1) == 0
    large = planning.Job(
        2_000_000_000, 8, 1, "bf16", 0.0, 0.0, (3, 2)
    )  # fetched at each call, as DeepSpeed lets go of it
    assert planning.communication(large, 4, 3) == (3 + 2 + 1) * 0.75 * 4e9


def test_time_by_hand() -> None:
    cluster = planning.Cluster(device="H100", utilisation=0.5, nvlink=400e9, network=40e9, reached=0.5)
    step = planning.Job(100_000_000, 256, 1, "bf16", 989.5e12, 0.0, (2, 2))
    compute, sent = planning.step_time(step, cluster, 8, 1)
    assert compute == pytest.approx(1 / (8 * 0.5))
    assert sent == pytest.approx(3 * 7 / 8 * 200e6 / 200e9)
    assert planning.step_time(step, cluster, 16, 1)[1] == pytest.approx(3 * 15 / 16 * 200e6 / (8 * 20e9))
    with pytest.raises(config.ConfigError, match="abacus"):
        planning.step_time(step, planning.Cluster(device="abacus"), 8, 1)


def test_the_step_is_counted_in_forwards_of_the_network() -> None:
    settings = tree(train={"batch": 32}, loss={"times": {"share": 0.25}})
    net = build(**settings.model, input_size=8, channels=1, num_classes=3)
    for lam, forwards in ((0.0, 0.75 * 3 + 0.25 * 4), (0.5, 0.75 * 3 + 0.25 * 6)):
        step = planning.job(settings, lam)
        assert step.forwards == pytest.approx(forwards)
        assert step.flops == pytest.approx(forwards * net.flops(32))
        assert step.parameters == sum(parameter.numel() for parameter in net.parameters())
        assert step.calls == (2, 2)
    later = tree(train={"batch": 32}, loss={"times": {"share": 0.25, "start": 1000}})
    assert planning.job(later, 0.0).forwards == pytest.approx(0.75 * 3 + 0.25 * 4)  # of a step with intervals
    again = tree(train={"batch": 32}, loss={"times": {"share": 0.25}}, model={"recompute": True})
    assert planning.job(again, 0.0).forwards == pytest.approx(0.75 * 4 + 0.25 * 5)
    assert planning.job(again, 0.5).forwards == pytest.approx(0.75 * 4 + 0.25 * 8)
    assert planning.activations(again, 0.5, 16) < 0.5 * planning.activations(settings, 0.5, 16)


@pytest.mark.parametrize("lam", [0.0, 0.5])
@pytest.mark.filterwarnings("ignore:conditional tangents")
def test_activations_are_what_autograd_keeps(lam: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loss on a real device, with the kernels of a GPU (interpreted)."""
    pytest.importorskip("triton")
    monkeypatch.setenv("MMF_FAST_OPS", "triton")
    settings = tree()
    net = build(**settings.model, input_size=8, channels=1, num_classes=3)
    loss_fn = MeanFlowLoss(net, lam=lam, tangent="conditional", times=settings.loss["times"])
    kept = saved_bytes(loss_fn, torch.randn(8, 1, 8, 8), net=net, y=torch.zeros(8, dtype=torch.int64))
    assert planning.activations(settings, lam, 8) == pytest.approx(kept, rel=0.05)


def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture) -> None:
    arguments = ["--config", "configs/imagenet64.yaml", "--gpus", "8", "data=synthetic", "data.count=1"]
    assert main(["plan", *arguments]) == 0
    text = capsys.readouterr().out
    assert "130.6 million parameters" in text and "| 1024 | 32768 |" in text
    assert text in (HERE.parent / "docs" / "scaling.md").read_text()  # or print it there again


def test_the_gpus_that_were_asked_for_have_rows() -> None:
    text = planning.report(tree(train={"batch": 32}), 2, planning.Cluster())
    assert text.count("\n| 2 | ") == 2 + 1 + 1  # ZeRO-2 twice, held by 2 GPUs, the step of 2 GPUs


def test_an_eager_step_takes_the_host_its_launches() -> None:
    """The small network is done in microseconds; each kernel takes the host 5."""
    for compiled in (False, True, "blocks"):
        step = planning.job(tree(train={"batch": 32, "compile": compiled}), 0.0)
        compute, _ = planning.step_time(step, planning.Cluster(), 8, 1)
        least = planning.LAUNCH * step.launches
        assert compute == least if compiled is False else 0 < compute < 0.1 * least
    large = planning.Job(1000, 8, 1, "bf16", 989.5e12, 0.0, (3, 2), launches=100, eager=True)
    assert planning.step_time(large, planning.Cluster(utilisation=1.0), 1, 1)[0] == pytest.approx(1)
    text = planning.report(tree(train={"batch": 32}), 1, planning.Cluster())
    assert "no step of these tables is shorter" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "7", "data=synthetic", "data.count=1"], "cannot share train.batch=256"),
        (["--gpus", "8"], "data=synthetic"),
        (["--gpus", "0"], "--gpus"),
        (["--gpus", "8", "--device", "abacus", "data=synthetic", "data.count=1"], "take one of GB200, B200, "),
        (["--gpus", "8", "--utilisation", "40", "data=synthetic"], "--utilisation 40: is a share of the peak"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--config", "configs/imagenet64.yaml", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_the_meta_device_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMF_FAST_OPS", raising=False)
    before = torch.get_rng_state()
    planning.job(tree(), 0.5)
    assert torch.equal(torch.get_rng_state(), before)
