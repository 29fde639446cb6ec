import math
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from support.archives import edm, edm2, pictures, write_zip
from support.tiny_runs import TINY, Poisoned, records, stopping_at, tiny
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mmf_fast import config, models
from mmf_fast.config import Config, ConfigError
from mmf_fast.data import as_dataset
from mmf_fast.data.prepare import prepare
from mmf_fast.sampling import sample
from mmf_fast.train import build_loss, build_trainer
from mmf_fast.training import CheckpointError, NonFiniteError, RunFolderError
from mmf_fast.training.checkpoint import read as read_checkpoint
from mmf_fast.training.record import read as read_metrics


def digits(**sections: Any) -> Config:
    model = {"name": "dit", "patch_size": 4, "width": 16, "depth": 1, "heads": 2}
    return config.from_tree({**TINY, "data": {"name": "digits"}, "model": model, **sections})


def test_a_run_leaves_everything_it_promises(tmp_path: Path) -> None:
    run = tmp_path / "run"
    cfg = tiny(train={"sample_every": 5})
    assert build_trainer(cfg, run).fit()
    assert [record["step"] for record in records(run)] == list(range(1, 13))
    assert {"loss", "mse", "lam", "grad_norm", "lr", "skipped", "mse_instant", "mse_interval"} <= records(run)[0].keys()
    assert config.load(run / "config.yaml") == cfg
    assert sorted(path.name for path in (run / "samples").iterdir()) == [f"step_{s:07d}.png" for s in (5, 10, 12)]
    assert imread(run / "curves.png").ndim == 3
    assert list((run / "tensorboard").iterdir())
    kept = sorted(path.name for path in (run / "checkpoints").glob("*.pt"))
    assert kept == ["step_0000004.pt", "step_0000008.pt", "step_0000012.pt"]
    net, extra = models.load_pretrained(run)
    assert extra["step"] == 12 and extra["data"]["name"] == "two_moons"
    state = read_checkpoint(run / "checkpoints" / "step_0000012.pt")
    saved = state["engine"]["fragments"]
    assert all(torch.equal(value.flatten(), saved[f"net.{key}"]["average"]) for key, value in net.named_parameters())
    assert any(not torch.equal(value.flatten(), saved[f"net.{key}"]["weight"]) for key, value in net.named_parameters())


def test_training_learns(tmp_path: Path) -> None:
    """On data of unit variance the best linear prediction of v = eps - x from z_t leaves, with s = 2t - 1,

        E_t[2 - (2t - 1)^2 / ((1 - t)^2 + t^2)] = 2 - int_0^1 2 s^2 / (1 + s^2) ds = pi / 2

    per coordinate, and no prediction at all leaves 2. A network must come below the linear one (p = 0: mean square).
    """
    cfg = tiny(
        model={"width": 64, "depth": 2},
        loss={"objective": "flow_matching", "lam": 0.0, "paired": False, "p": 0.0},
        train={"steps": 800, "batch": 128, "log_every": 2, "checkpoint_every": 800},
    )
    build_trainer(cfg, tmp_path / "run").fit()
    mse = [record["mse"] for record in records(tmp_path / "run")]
    assert mse[0] == pytest.approx(2.0, rel=0.3)
    assert sum(mse[-100:]) / 100 < math.pi / 2


@pytest.mark.parametrize("stop", [1, 4, 6, 11])
def test_resuming_is_exact(tmp_path: Path, stop: int) -> None:
    """Also from between checkpoints, with sampling and logging in between, and with other interval settings."""
    build_trainer(tiny(), tmp_path / "whole").fit()
    cut = tmp_path / "cut"
    trainer = build_trainer(tiny(), cut)
    steps = iter(range(stop))
    real = trainer._one_step

    def one_step(*batch: Any) -> Any:
        if next(steps, None) is None:
            raise KeyboardInterrupt  # as hard as it gets inside one process: nothing is saved
        return real(*batch)

    trainer._one_step = one_step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    torch.manual_seed(12345)
    resumed = build_trainer(tiny(train={"sample_every": 3, "checkpoint_every": 5, "keep": 1}), cut, resume=True)
    assert resumed.step == stop - stop % 4
    assert resumed.fit()
    assert records(cut) == records(tmp_path / "whole")
    one, other = (read_checkpoint(run / "checkpoints" / "step_0000012.pt") for run in (tmp_path / "whole", cut))
    for name, fragment in one["engine"]["fragments"].items():
        assert fragment.keys() == {"start", "steps", "weight", "average", "exp_avg", "exp_avg_sq"}
        again = other["engine"]["fragments"][name]
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(again[key])) for key, value in fragment.items())


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path: Path) -> None:
    build_trainer(tiny(), tmp_path / "whole").fit()
    build_trainer(tiny(train={"steps": 7}), tmp_path / "grown").fit()
    build_trainer(tiny(), tmp_path / "grown", resume=True).fit()
    assert records(tmp_path / "grown") == records(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    build_trainer(tiny(), run).fit()
    kept = [run / "metrics.jsonl", run / "model.safetensors", *(run / "checkpoints").iterdir()]
    before = {path: path.read_bytes() for path in kept}
    assert build_trainer(tiny(), run, resume=True).fit()
    assert {path: path.read_bytes() for path in kept} == before


def test_resuming_nothing_starts_at_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_trainer(tiny(), tmp_path / "new", resume=True).step == 0
    assert "no checkpoint yet" in capsys.readouterr().err


def test_drawing_disturbs_no_generator_and_uses_the_same_noise(tmp_path: Path) -> None:
    trainer = build_trainer(digits(), tmp_path / "run")
    before = torch.get_rng_state()
    trainer.draw()
    assert torch.equal(torch.get_rng_state(), before)
    first = (tmp_path / "run" / "samples" / "step_0000000.png").read_bytes()
    trainer.draw()
    assert (tmp_path / "run" / "samples" / "step_0000000.png").read_bytes() == first


def test_drawing_takes_one_evaluation_of_the_averaged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(net: Any, shape: Any, **options: Any) -> Tensor:
        seen.append((net, tuple(shape), options["y"]))
        assert options.get("steps", 1) == 1
        return sample(net, shape, **options)

    monkeypatch.setattr("mmf_fast.training.drawing.sample", spy)
    trainer = build_trainer(digits(), tmp_path / "run")
    trainer.draw()
    net, shape, y = seen[0]
    assert net is trainer.engine.averaged() and shape == (80, 1, 8, 8)
    assert y.view(8, 10).eq(torch.arange(10)).all()  # one class per column


def test_a_picture_that_fails_comes_after_the_checkpoint_of_its_step(tmp_path: Path) -> None:
    """Or each restart would fail at the same place again."""

    def fail() -> None:
        raise RuntimeError("no picture")

    for start in (0, 4, 8):
        trainer = build_trainer(tiny(train={"sample_every": 4}), tmp_path / "run", resume=start > 0)
        assert trainer.step == start
        trainer.draw = fail  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="no picture"):
            trainer.fit()
    build_trainer(tiny(), tmp_path / "whole").fit()
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_non_finite_steps_are_skipped_and_counted(tmp_path: Path) -> None:
    trainer = build_trainer(tiny(train={"max_bad_steps": 4}), tmp_path / "run")
    trainer.dataset = Poisoned(trainer.dataset, range(5, 8))
    assert trainer.fit()
    found = records(tmp_path / "run")
    assert [record["skipped"] for record in found] == [0] * 5 + [1, 2, 3] + [3] * 4
    assert [record["loss"] is None for record in found] == [False] * 5 + [True] * 3 + [False] * 4


@pytest.mark.parametrize("log_every", [1, 100])
def test_too_many_in_a_row_stop_the_run_and_the_last_good_checkpoint_stays(tmp_path: Path, log_every: int) -> None:
    run = tmp_path / "run"
    trainer = build_trainer(tiny(train={"max_bad_steps": 3, "log_every": log_every, "steps": 40}), run)
    healthy = trainer.dataset
    trainer.dataset = Poisoned(healthy, range(9, 1000))
    with pytest.raises(NonFiniteError, match=r"the data are not finite.*step_00000\d+\.pt") as caught:
        trainer.fit()
    assert "\n" not in str(caught.value)
    assert trainer.step <= 9 + 2 * 3
    good = read_checkpoint(run / "checkpoints" / "step_0000008.pt")
    assert all(torch.isfinite(fragment["weight"]).all() for fragment in good["engine"]["fragments"].values())
    # every checkpoint that is there holds the weights from before the first bad step, and the run can go on
    assert build_trainer(tiny(train={"max_bad_steps": 3, "steps": 20}), run, resume=True).fit()


def test_bad_steps_in_a_row_are_counted_across_a_resumption(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"max_bad_steps": 6, "checkpoint_every": 1}
    trainer = build_trainer(tiny(train={**settings, "steps": 4}), run)
    trainer.dataset = Poisoned(trainer.dataset, range(1000))
    assert trainer.fit()
    trainer = build_trainer(tiny(train=settings), run, resume=True)
    trainer.dataset = Poisoned(trainer.dataset, range(1000))
    with pytest.raises(NonFiniteError, match="6 steps in a row"):
        trainer.fit()


def test_training_works_in_a_thread_where_signals_cannot_be_caught(tmp_path: Path) -> None:
    done = []
    thread = threading.Thread(target=lambda: done.append(build_trainer(tiny(), tmp_path / "run").fit()))
    thread.start()
    thread.join()
    assert done == [True]


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="--resume"):
        build_trainer(tiny(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("run", ["file", "file/below", "/proc/run"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, run: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="--run") as caught:
        build_trainer(tiny(), tmp_path / run)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_configuration_is_refused_and_kept(tmp_path: Path) -> None:
    build_trainer(tiny(), tmp_path / "run").fit()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other = tiny(model={"width": 9}, optimizer={"lr": 2e-2}, train={"steps": 99})
    with pytest.raises(CheckpointError, match=r"model\.width \(8 -> 9\), optimizer\.lr \(0\.01 -> 0\.02\);") as caught:
        build_trainer(other, tmp_path / "run", resume=True)
    assert "\n" not in str(caught.value) and "steps" not in str(caught.value)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def prepared_set(folder: Path, seed: int = 0) -> Path:
    archive = folder.with_suffix(".zip")
    prepare(write_zip(archive, edm(pictures(24, 8, seed), [i % 3 for i in range(24)])), folder)
    return folder


def test_a_run_goes_on_where_its_data_were_moved_and_not_with_others(tmp_path: Path) -> None:
    old, validation = prepared_set(tmp_path / "here"), prepared_set(tmp_path / "held", seed=2)

    def images(path: Path, **options: Any) -> Config:
        return digits(data={"name": "images", "path": str(path), **options})

    run = tmp_path / "run"
    build_trainer(images(old), run).fit()
    moved = old.rename(tmp_path / "there")
    for options in ({}, {"validation": str(validation)}, {"verify": True}):
        assert build_trainer(images(moved, **options), run, resume=True).step == 12
    again = prepared_set(tmp_path / "again")  # the same samples, prepared once more
    assert build_trainer(images(again), run, resume=True).step == 12

    other = prepared_set(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"data\.path \(sha256 \w{16} -> sha256 \w{16}\); set") as caught:
        build_trainer(images(other), run, resume=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"data\.flip \(default -> True\);"):
        build_trainer(images(moved, flip=True), run, resume=True)


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_trainer(tiny(), tmp_path / "whole").fit()
    run = tmp_path / "run"
    build_trainer(tiny(train={"steps": 9}), run).fit()
    path = run / "checkpoints" / "step_0000009.pt"
    path.write_bytes(path.read_bytes()[:1000])
    trainer = build_trainer(tiny(), run, resume=True)
    assert trainer.step == 8
    assert "step_0000009.pt: damaged" in capsys.readouterr().err
    trainer.fit()
    assert records(run) == records(tmp_path / "whole")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"dim": 3}}, r"model\.dim is 3.*is 2; leave model\.dim out"),
        ({"data": {"name": "digits"}}, r"model\.name=mlp does not take samples of shape \(1, 8, 8\)"),
        ({"train": {"device": "nonsense"}}, "nonsense"),
        ({"data": {"name": "two_moons", "seed": -1}}, "seed"),
    ],
)
def test_pieces_that_do_not_fit_together(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_trainer(tiny(**sections), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch size 100000"):
        build_trainer(digits(train={"batch": 100_000, "device": "cpu"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_shapes_and_classes_come_from_the_data(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = build_trainer(digits(train={**TINY["train"], "steps": 2}), tmp_path / "run")
        assert trainer.fit()
    net, _ = models.load_pretrained(tmp_path / "run")
    assert (net.shape, net.num_classes) == ((1, 8, 8), 10)


@pytest.mark.parametrize(("start", "warned"), [(11, False), (12, True)])
def test_a_run_that_ends_before_its_first_interval_says_so(
    start: int, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_trainer(tiny(loss={"times": {"start": start}}), tmp_path / "run").fit()
    said = "warning: the first intervals would come at step 12 of 12" in capsys.readouterr().err
    assert said == warned
    logged = ["mse_interval" in record for record in records(tmp_path / "run")]
    assert logged == [step >= start for step in range(12)]


def test_sequences_become_a_transformer_of_one_dimension() -> None:
    dataset = as_dataset(torch.randn(20, 6, 2))
    small = ["model.patch_size=2", "model.width=16", "model.depth=1"]
    loss_fn = build_loss(config.load("digits", small), dataset)
    assert loss_fn.net.shape == (6, 2)
    assert loss_fn(dataset.batch(0, 4)[0], step=0).loss.isfinite()
    with pytest.raises(ValueError, match=r"model\.name=unet does not take samples of shape \(6, 2\)"):
        build_loss(config.load("fashion"), dataset)


def test_classes_of_own_data_are_those_of_their_labels_or_as_the_model_says() -> None:
    """A tensor of labels tells how many there are; of a torch Dataset or a DataLoader, model.num_classes decides."""
    x, y = torch.randn(20, 1, 8, 8), torch.arange(20) % 3
    small = ["model.width=16", "model.depth=1"]
    rows = TensorDataset(x, y)
    for source, said in (((x, y), []), (rows, ["model.num_classes=3"]), (DataLoader(rows, 4), ["model.num_classes=3"])):
        dataset = as_dataset(source)
        loss_fn = build_loss(config.load("digits", [*small, *said]), dataset)
        batch, labels = dataset.batch(0, 4)
        assert loss_fn.net.num_classes == 3 and loss_fn(batch, step=0, y=labels).loss.isfinite()
    with pytest.raises(ConfigError, match=r"model\.num_classes is 4, but that of data\.name=tensor is 3"):
        build_loss(config.load("digits", [*small, "model.num_classes=4"]), as_dataset((x, y)))


def test_two_rates_of_the_same_seed_differ_only_where_they_should(tmp_path: Path) -> None:
    """The seed decides weights and draws: at another learning rate the first loss is the same, at another seed not."""
    losses = {}
    for name, sections in {"a": {}, "b": {"optimizer": {"lr": 1e-3}}, "c": {"seed": 1}}.items():
        build_trainer(tiny(**sections), tmp_path / name).fit()
        losses[name] = [record["loss"] for record in records(tmp_path / name)]
    assert losses["a"][0] == losses["b"][0] != losses["c"][0]
    assert losses["a"][-1] != losses["b"][-1]


def test_unknown_sections_are_refused() -> None:
    with pytest.raises(ConfigError, match="optimiser; did you mean optimizer"):
        tiny(optimiser={"lr": 1.0})


def test_samples_that_are_not_finite_do_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = build_trainer(tiny(), tmp_path / "run")
    with torch.no_grad():
        next(trainer.engine.averaged().parameters()).fill_(math.nan)
    trainer.draw()
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "run" / "samples").exists()


class Slow:
    """A dataset whose batches take their time, and one of which may fail."""

    def __init__(self, dataset: Any, seconds: float, fails_at: int | None = None) -> None:
        self.dataset, self.seconds, self.fails_at = dataset, seconds, fails_at
        self.shape, self.num_classes, self.name = dataset.shape, dataset.num_classes, dataset.name

    def batch(self, step: int, *rest: int) -> tuple[Tensor, Tensor | None]:
        if step == self.fails_at:
            raise OSError("samples.npy: the disk is gone")
        time.sleep(self.seconds)
        return self.dataset.batch(step, *rest)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


def test_the_next_batch_is_made_while_a_step_runs(tmp_path: Path) -> None:
    """Both take 50 ms, one after the other 100: without it each step would wait 50 ms for its data."""
    trainer = build_trainer(tiny(), tmp_path / "run")
    trainer.dataset = Slow(trainer.dataset, 0.05)
    real = trainer.engine.step

    def slow_step(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return real(*arguments, **options)

    trainer.engine.step = slow_step  # type: ignore[method-assign]
    assert trainer.fit()
    waits = [record["data_seconds"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert sum(waits[1:]) / len(waits[1:]) < 0.025 and waits[0] > 0.04  # nothing was made before the first
    assert not threads()


def test_an_error_of_the_data_comes_through_and_the_run_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = build_trainer(tiny(), run)
    trainer.dataset = Slow(trainer.dataset, 0.0, fails_at=6)
    with pytest.raises(OSError, match="^samples.npy: the disk is gone$"):
        trainer.fit()
    assert trainer.step == 6 and not threads()
    assert [record["step"] for record in records(run)] == list(range(1, 7))  # the batches before it were used
    resumed = build_trainer(tiny(), run, resume=True)
    assert resumed.step == 4 and resumed.fit()
    build_trainer(tiny(), tmp_path / "whole").fit()
    assert records(run) == records(tmp_path / "whole")


def test_no_thread_outlives_a_run_however_it_ends(tmp_path: Path) -> None:
    trainer = build_trainer(tiny(), tmp_path / "signal")
    stopping_at(trainer, 2)
    assert not trainer.fit() and not threads()

    trainer = build_trainer(tiny(), tmp_path / "error")

    def fails(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("out of memory")

    trainer.engine.step = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit()
    assert not threads()


def test_latents_train_and_are_not_drawn(tmp_path: Path) -> None:
    made = np.concatenate([np.zeros((8, 4, 8, 8)), np.ones((8, 4, 8, 8))], 1).astype(np.float32)
    prepare(write_zip(tmp_path / "a.zip", edm2(made, [0, 1] * 4)), tmp_path / "set")
    train = {**TINY["train"], "steps": 3, "batch": 4, "sample_every": 1}
    trainer = build_trainer(
        digits(data={"name": "latents", "path": str(tmp_path / "set")}, train=train), tmp_path / "run"
    )
    assert trainer.fit()
    assert not (tmp_path / "run" / "samples").exists()
    assert "no picture, as samples of shape (4, 8, 8) need" in (tmp_path / "run" / "logs" / "rank_0.log").read_text()
