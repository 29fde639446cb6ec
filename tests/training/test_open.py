"""The trainer with a network, a loss and data that are not of this package."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.open_runs import SETTINGS, Net, X, Y, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mmf_fast import MeanFlowLoss, Optimizer, TimeSampler, Train, Trainer, sample
from mmf_fast.evaluation.samples import evaluate_run
from mmf_fast.models import MLP, load_pretrained
from mmf_fast.objective import LossOutput
from mmf_fast.sampling import draw_run
from mmf_fast.training import CheckpointError, ConfigError, RunFolderError, checkpoint, drawing
from mmf_fast.training import trainer as trainer_module
from mmf_fast.training.record import read


@pytest.mark.parametrize("kind", ["tensors", "dataset", "loader"])
def test_it_trains_stops_goes_on_and_leaves_what_it_promises(kind: str, tmp_path: Path) -> None:
    def data() -> Any:
        rows = TensorDataset(X, Y)
        return {"tensors": (X, Y), "dataset": rows, "loader": DataLoader(rows, batch_size=8, shuffle=True)}[kind]

    rows: list[tuple[int, float]] = []
    assert trainer(tmp_path / "whole", data(), callbacks=[lambda step, row: rows.append((step, row["loss"]))]).fit()
    trainer(tmp_path / "cut", data(), steps=6).fit()
    assert trainer(tmp_path / "cut", data(), resume=True).fit()
    found = [
        [(row["step"], row["loss"]) for row in read(tmp_path / name / "metrics.jsonl")] for name in ("whole", "cut")
    ]
    assert found[0] == found[1] == rows and len(rows) == 10
    assert (tmp_path / "whole" / "samples" / "step_0000010.png").exists()
    assert not any("mfu" in row for row in read(tmp_path / "cut" / "metrics.jsonl"))

    net, extra = load_pretrained(tmp_path / "cut", Net())
    again, _ = load_pretrained(tmp_path / "whole", Net())
    assert all(map(torch.equal, net.state_dict().values(), again.state_dict().values()))
    assert extra["step"] == 10 and extra["shape"] == [2]
    noise, y = torch.randn(5, 2), torch.arange(5) % 3
    x = sample(net, (5, 2), noise=noise, y=y)
    torch.testing.assert_close(x, noise - net(noise, torch.zeros(5), torch.ones(5), y))


@pytest.mark.parametrize("wrap", [torch.compile, torch.optim.swa_utils.AveragedModel], ids=["compiled", "averaged"])
def test_a_wrapped_network_is_trained_and_saved_as_itself(wrap: Any, tmp_path: Path, capsys: Any) -> None:
    trainer(tmp_path / "bare", steps=3).fit()
    assert "around it" not in capsys.readouterr().err
    trainer(tmp_path / "wrapped", steps=3, wrap=wrap).fit()
    wrapper = type(wrap(Net())).__name__
    assert f"trained as Net, without the {wrapper} around it: train.compile compiles it" in capsys.readouterr().err
    nets = [load_pretrained(tmp_path / name, wrap(Net()))[0] for name in ("bare", "wrapped")]
    assert all(map(torch.equal, nets[0].state_dict().values(), nets[1].state_dict().values()))


class Points(nn.Module):
    """Without labels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return self.fc(torch.cat([z, r[:, None], t[:, None]], 1))


def test_samples_and_figures_of_a_run_take_the_network_and_the_data(tmp_path: Path) -> None:
    from mmf_fast import data

    loss_fn = MeanFlowLoss(Points(), times=TimeSampler(share=0.25), paired=True)
    Trainer(loss_fn, data.load("two_moons"), tmp_path, train=Train(**{**vars(SETTINGS), "steps": 2})).fit()
    with pytest.raises(ValueError, match="--net package.module:make"):
        draw_run(tmp_path)
    x, y = draw_run(tmp_path, net=Points(), count=7)
    assert x.shape == (7, 2) and y is None
    with pytest.raises(ValueError, match="--data package.module:make"):
        evaluate_run(tmp_path, net=Points())
    result = evaluate_run(tmp_path, (1,), net=Points(), dataset=data.load("two_moons"), pictures=False)
    assert result["step"] == 2 and result["figures"]["sliced_wasserstein"]["1"] > 0


def test_a_coupling_is_trained_and_drawn_from_the_noise_that_it_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = X + 3
    drawn: list[Tensor] = []
    monkeypatch.setattr(drawing, "save_grid", lambda x, path, columns: drawn.append(x))
    loss_fn = MeanFlowLoss(Points(), times=TimeSampler(share=0.5), paired=True)
    made = Trainer(
        loss_fn, (X, {"noise": source}), tmp_path, train=Train(**{**vars(SETTINGS), "steps": 2, "sample_every": 1})
    )
    assert made.fit() and len(drawn) == 2
    net, _ = load_pretrained(tmp_path, Points())
    noise = made._example[1]["noise"]
    assert {tuple(row) for row in noise.tolist()} <= {tuple(row) for row in source.tolist()}
    torch.testing.assert_close(drawn[-1], noise - net(noise, torch.zeros(len(noise)), torch.ones(len(noise))))


def test_a_loss_without_a_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loss_fn.net must be the network"):
        Trainer(nn.Linear(2, 2), X, tmp_path / "run")
    with pytest.raises(ConfigError, match="loss_fn.net must be the network"):
        Trainer(MeanFlowLoss(lambda z, r, t: z), X, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Features(nn.Module):
    """On random features that are never trained, one kind of them frozen, the other in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.randn(2, 8), requires_grad=False)
        self.register_buffer("hidden", torch.randn(2, 8), persistent=False)
        self.fc = nn.Linear(18, 2)

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        features = torch.cat([(z @ self.frozen).sin(), (z @ self.hidden).sin(), r[:, None], t[:, None]], 1)
        return self.fc(features)


@pytest.mark.parametrize("zero", ["", "fsdp"])
def test_a_run_goes_on_with_the_features_that_it_drew(zero: str, tmp_path: Path) -> None:
    """A script without a seed draws others when it is started again."""

    def made(run: str, seed: int, steps: int) -> Trainer:
        torch.manual_seed(seed)
        loss_fn = MeanFlowLoss(Features(), times=TimeSampler(share=0.5), paired=True)
        train = Train(**{**vars(SETTINGS), "steps": steps, "zero": zero})
        return Trainer(loss_fn, X, tmp_path / run, train=train, resume=True)

    whole, cut = made("whole", 1, 8), made("cut", 1, 4)
    assert whole.fit() and cut.fit()
    again = made("cut", 2, 8)
    assert again.fit()
    nets = [each.engine.averaged() for each in (whole, again)]
    for name in ("frozen", "hidden"):
        assert torch.equal(*(getattr(net, name) for net in nets))
    assert all(map(torch.equal, *(net.state_dict().values() for net in nets)))
    fresh = made("other", 3, 1)  # starts from that state, features included
    fresh.engine.load_state_dict([again.engine.state_dict()])


def test_a_moving_average_goes_on_where_the_run_it_is_of_ended(tmp_path: Path) -> None:
    source = trainer(tmp_path / "source", steps=6, optimizer=Optimizer(lr=0.05, warmup=0, ema=0.9))
    source.fit()
    settings = {"init": str(tmp_path / "source"), "init_from": "state"}
    again = trainer(tmp_path / "again", settings=settings, optimizer=Optimizer(lr=1e-12, warmup=0, ema=0.9))
    name = "net.body.0.weight"
    average, weight = again.engine.average[name].clone(), dict(again.engine.model.named_parameters())[name].detach()
    again.engine.step(X[:8], 0, y=Y[:8])
    decay = min(0.9, (1 + 6) / (10 + 6))
    torch.testing.assert_close(again.engine.average[name], average + (1 - decay) * (weight - average))
    assert not torch.allclose(average, weight)
    assert again.engine.state_dict()["earlier"] == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Points().bfloat16(), "net.fc.weight is torch.bfloat16: give the network in float32"),
        (lambda: Points().requires_grad_(False), "nothing to train"),
        (lambda: Lazy(), "net.fc.weight has no shape yet: call the network once"),
        (lambda: Locked(), "Locked cannot be copied for its moving average"),
    ],
    ids=["half", "frozen", "lazy", "locked"],
)
def test_a_network_that_cannot_be_trained_is_one_line(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(MeanFlowLoss(make()), X, tmp_path / "run", train=SETTINGS)


class Lazy(Points):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.LazyLinear(2)


class Locked(Points):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Plain(nn.Module):
    """A loss that returns a tensor, or a metric that is a number."""

    def __init__(self, wraps: Any) -> None:
        super().__init__()
        self.net, self.wraps = Points(), wraps

    def forward(self, x: Tensor, step: int, part: Any) -> Any:
        u = self.net(x, torch.zeros(len(x)), torch.ones(len(x)))
        return self.wraps(u.square().mean())


def test_own_losses_give_numbers_of_any_kind_and_what_is_no_output_is_named(tmp_path: Path) -> None:
    def with_numbers(loss: Tensor) -> LossOutput:
        return LossOutput(loss, loss.detach()[None], {"one": 1.5, "two": torch.tensor(2)})  # type: ignore[dict-item]

    made = Trainer(Plain(with_numbers), X, tmp_path / "run", train=SETTINGS)
    assert made.fit()
    assert read(tmp_path / "run" / "metrics.jsonl")[-1]["one"] == 1.5
    assert read(tmp_path / "run" / "metrics.jsonl")[-1]["two"] == 2.0
    with pytest.raises(ConfigError, match="the loss module returned a Tensor: return an object with .loss"):
        Trainer(Plain(lambda loss: loss), X, tmp_path / "bad", train=SETTINGS).fit()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Optimizer(schedule="linear"), "schedule must be one of constant, cosine, is linear"),  # type: ignore[arg-type]
        (lambda: Train(precision="fp16"), "precision must be one of fp32, tf32, bf16, is fp16"),  # type: ignore[arg-type]
        (lambda: Train(init_from="ema"), "init_from must be one of"),  # type: ignore[arg-type]
        (lambda: Train(compile="always"), "compile must be one of False, True, auto, blocks"),  # type: ignore[arg-type]
        (lambda: Train(steps=5.0), "steps must be a whole number, is 5.0"),  # type: ignore[arg-type]
    ],
)
def test_words_and_numbers_that_a_setting_does_not_know_are_named(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_ranks_with_equal_batches_are_warned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(trainer_module, "gather", lambda value: [value, value])
    trainer(tmp_path / "alike")
    assert "ranks have equal first batches" in capsys.readouterr().err
    monkeypatch.setattr(trainer_module, "gather", lambda value: [value, "another"])
    trainer(tmp_path / "apart")
    assert "equal" not in capsys.readouterr().err


def test_a_falling_rate_fixes_the_number_of_steps(tmp_path: Path) -> None:
    """Going on for longer would let it rise again."""
    cosine = {"optimizer": Optimizer(warmup=2, ema=0.5, schedule="cosine")}
    trainer(tmp_path / "run", steps=6, **cosine).fit()
    with pytest.raises(CheckpointError, match=r"train.steps \(6 -> 12\); .*--allow-changes"):
        trainer(tmp_path / "run", steps=12, resume=True, **cosine)
    assert trainer(tmp_path / "run", steps=12, resume=True, allow_changes=True, **cosine).fit()
    assert "train.steps (6 -> 12)" in (tmp_path / "run" / "history.jsonl").read_text()


# ---- starting from weights, and going on with changes ----------------------------------------------------------------


def test_a_run_starts_from_the_weights_of_another_or_of_a_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    trainer(source, steps=6).fit()
    state = checkpoint.read(source / "checkpoints" / "step_0000006.pt")["engine"]["fragments"]
    averaged, _ = load_pretrained(source, Net())
    save_file(averaged.state_dict(), tmp_path / "mine.safetensors")

    def weights(init: Path, part: str) -> dict[str, Tensor]:
        made = trainer(tmp_path / f"{init.name}-{part}", settings={"init": str(init), "init_from": part})
        assert made.step == 0
        if part == "state":
            name = "net.body.0.weight"
            assert torch.equal(made.engine.state_dict()["fragments"][name]["exp_avg"], state[name]["exp_avg"])
            assert torch.equal(made.engine.average[name].flatten(), state[name]["average"])
        assert made.fit()
        return {name: value["weight"] for name, value in made.engine.state_dict()["fragments"].items()}

    for init, part, key in (
        (source, "average", "average"),
        (source, "weights", "weight"),
        (source, "state", "weight"),
        (tmp_path / "mine.safetensors", "average", "average"),
    ):
        fresh = trainer(tmp_path / f"fresh-{init.name}-{part}", settings={"init": str(init), "init_from": part})
        for name, parameter in fresh.engine.net.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(parameter.flatten(), state[f"net.{name}"][key])
        weights(init, part)
    # going on, a run has its own weights
    again = trainer(tmp_path / "source-state", resume=True, settings={"init": str(source), "init_from": "state"})
    assert again.step == 10
    for wrong in (tmp_path / "nowhere", tmp_path / "source" / "metrics.jsonl"):
        with pytest.raises(ConfigError, match=f"train.init={wrong}: .*give a run folder, or a safetensors file"):
            trainer(tmp_path / "wrong", settings={"init": str(wrong)})


def test_a_run_goes_on_with_what_it_is_told_to_change(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer(run, steps=6).fit()
    half = {"optimizer": Optimizer(warmup=2, ema=0.5, lr=5e-4)}
    with pytest.raises(CheckpointError, match=r"optimizer\.lr \(0\.001 -> 0\.0005\); .*--allow-changes"):
        trainer(run, resume=True, **half)
    assert trainer(run, resume=True, allow_changes=True, **half).fit()
    rows = read(run / "metrics.jsonl")
    assert [row["lr"] for row in rows[5:7]] == pytest.approx([1e-3, 5e-4]) and len(rows) == 10
    assert json.loads((run / "history.jsonl").read_text()) == {"step": 6, "changes": ["optimizer.lr (0.001 -> 0.0005)"]}

    seen: list[Tensor] = []
    made = trainer(run, steps=14, resume=True, allow_changes=True, settings={"batch": 4}, **half)
    real = made.engine.step
    made.engine.step = lambda x, step, **cond: seen.append(x) or real(x, step, **cond)  # type: ignore[func-returns-value]
    assert made.fit() and made.step == 14
    # 10 steps of 8 samples are 20 batches of 4: the next is the twenty-first of the stream
    assert all(torch.equal(x, made.dataset.batch(20 + i, 4)[0]) for i, x in enumerate(seen)) and len(seen) == 4
    assert len((run / "history.jsonl").read_text().splitlines()) == 2
    trainer(run, steps=16, resume=True, settings={"batch": 4}, **half).fit()  # as it is now, it needs no leave
    with pytest.raises(CheckpointError, match=r"seed \(0 -> 1\); set these back, or"):
        trainer(run, resume=True, allow_changes=True, seed=1, settings={"batch": 4}, **half)


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_its_own_loss(tmp_path: Path) -> None:
    def run(steps: int, resume: bool = True, allow_changes: bool = False, **loss: Any) -> Trainer:
        loss_fn = MeanFlowLoss(Points(), **loss)
        train = Train(batch=8, steps=steps, sample_every=0)
        return Trainer(loss_fn, X, tmp_path / "run", train=train, resume=resume, allow_changes=allow_changes)

    assert run(2, resume=False, lam=0.5).fit()
    assert run(4, lam=0.5).fit()
    for other, named in (({"lam": 0.25}, "loss.lam"), ({"lam": 0.5, "p": 0.0}, r"loss.p \(1.0 -> 0.0\)"),
                         ({"lam": 0.5, "times": TimeSampler(share=0.5)}, "loss.times")):  # fmt: skip
        with pytest.raises(CheckpointError, match=f"of another configuration: {named}"):
            run(6, **other)
    assert run(6, lam=0.25, allow_changes=True).fit()


def test_labels_that_the_network_does_not_know_are_refused(tmp_path: Path) -> None:
    """Counted from 1, the last class would be no class to the network."""
    for y in (torch.tensor([1, 2, 3] * 4), torch.tensor([0, 7] * 6)):
        loss_fn = MeanFlowLoss(MLP(dim=2, width=8, depth=1, num_classes=3))
        with pytest.raises(ConfigError, match=f"go up to {int(y.max())}, but the network has 3 classes, 0 to 2"):
            Trainer(loss_fn, (torch.randn(12, 2), y), tmp_path / "run", train=Train(batch=4, steps=1))


def test_a_run_killed_between_its_checkpoint_and_its_export_exports_when_it_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer(run).fit()
    files = {name: (run / name).read_bytes() for name in ("model.safetensors", "model.json")}
    trainer(tmp_path / "old", steps=4).fit()
    for stale in (["model.safetensors", "model.json"], ["model.json"], ["model.safetensors"]):
        for name in stale:
            shutil.copy(tmp_path / "old" / name, run / name)
        assert trainer(run, resume=True).fit()
        assert {name: (run / name).read_bytes() for name in files} == files


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda lines: lines[:3], "holds 3 of the 8 rows"),
        (lambda lines: [], "holds 0 of the 8 rows"),
        (lambda lines: [lines[0], "{nonsense", *lines[2:]], "holds 7 of the 8 rows"),
        (lambda lines: [lines[0].replace("loss", "lass"), *lines[1:]], "does not hold the rows"),
    ],
    ids=["truncated", "emptied", "a line", "exchanged"],
)
def test_rows_that_are_lost_are_named(damage: Any, found: str, tmp_path: Path, capsys: Any) -> None:
    trainer(tmp_path, steps=8).fit()
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in damage(path.read_text().splitlines())))
    assert trainer(tmp_path, resume=True).fit()
    assert f"{found} that this run wrote up to step 8" in capsys.readouterr().err
    assert trainer(tmp_path, steps=11, resume=True).fit()  # said once
    assert "that this run wrote" not in capsys.readouterr().err


def test_a_name_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="File name too long.*another --run"):
        trainer(tmp_path / ("x" * 300))
