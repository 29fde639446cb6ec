"""A network that is told its guidance, from the configuration to the commands that draw and judge its samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_runs import TINY
from torch import Tensor, nn

from mmf_fast import Guidance, MeanFlowLoss, Train, Trainer, config, data, models, sample
from mmf_fast.cli import main
from mmf_fast.evaluation.distances import sliced_wasserstein
from mmf_fast.evaluation.fid import sample_statistics
from mmf_fast.train import build_trainer

MODEL = {"name": "dit", "patch_size": 4, "width": 16, "depth": 1, "heads": 2}
LOSS = {"objective": "imf", "guidance": {"omega": [1, 4], "t_max": [0.5, 1]}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for a moment; then with weights that leave no branch at zero."""
    folder = tmp_path_factory.mktemp("guided") / "run"
    train = TINY["train"] | {"steps": 4, "sample_every": 4}
    tree = TINY | {"data": {"name": "digits"}, "model": MODEL, "loss": LOSS, "train": train}
    assert build_trainer(config.from_tree(tree), folder).fit()
    net, extra = models.load_pretrained(folder)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    models.save_pretrained(folder, net, extra)
    return folder


def test_the_configuration_builds_a_network_that_is_told(run: Path) -> None:
    assert json.loads((run / "model.json").read_text())["config"]["guided"] is True
    assert (run / "samples" / "step_0000004.png").is_file()
    assert main(["train", "--run", str(run), "--resume", "train.steps=5"]) == 0


def test_a_scale_is_chosen_when_samples_are_drawn(run: Path, tmp_path: Path) -> None:
    net, _ = models.load_pretrained(run)
    drawn = {}
    for options in ((), ("--omega", "3"), ("--omega", "3", "--t-min", "0.2", "--t-max", "0.9")):
        path = tmp_path / f"{len(options)}.npz"
        assert main(["sample", "--run", str(run), "--out", str(path), "--count", "6", *options]) == 0
        told = {
            name.strip("-").replace("-", "_"): float(value)
            for name, value in zip(options[::2], options[1::2], strict=True)
        }
        found = torch.from_numpy(np.load(path)["x"])
        expected = sample(net, (6, 1, 8, 8), seed=0, y=torch.arange(6), **told)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        drawn[len(options)] = found
    assert not torch.allclose(drawn[0], drawn[2]) and not torch.allclose(drawn[2], drawn[6])


def test_pictures_of_a_run_have_rising_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def spy(net: Any, shape: Any, **options: Any) -> Tensor:
        told.append(options["omega"])
        return sample(net, shape, **options)

    monkeypatch.setattr("mmf_fast.training.drawing.sample", spy)
    tree = TINY | {"data": {"name": "digits"}, "model": MODEL, "loss": LOSS}
    build_trainer(config.from_tree(tree), tmp_path / "run").draw()
    rows = told[0].view(8, 10)
    assert (rows == rows[:, :1]).all()
    torch.testing.assert_close(rows[:, 0], 4.0 ** (torch.arange(8) / 7))


def test_samples_are_judged_with_a_scale(tmp_path: Path) -> None:
    net = models.build("mlp", width=16, depth=1, guided=True)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    models.save_pretrained(tmp_path, net, extra={"data": {"name": "circles"}, "step": 12})
    assert main(["evaluate", "--run", str(tmp_path), "--steps", "1", "--omega", "2.5"]) == 0
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    expected = sliced_wasserstein(sample(net, (10_000, 2), seed=0, omega=2.5), data.load("circles").split("train")[0])
    assert saved["guidance"] == {"omega": 2.5}
    assert saved["figures"]["sliced_wasserstein"]["1"] == pytest.approx(expected, rel=1e-5)


def test_statistics_are_of_a_scale() -> None:
    heard = []

    def net(z: Tensor, r: Tensor, t: Tensor, **told: Any) -> Tensor:
        heard.append(told)
        return z

    class Features:
        dim, device = 3, torch.device("cpu")

        def __call__(self, images: Tensor) -> Tensor:
            return images.double().mean((2, 3))

    guidance = {"omega": 2.0, "t_min": 0.1}
    sample_statistics(net, Features(), count=6, batch=4, shape=(3, 4, 4), guidance=guidance)  # type: ignore[arg-type]
    assert [{name: x.tolist() for name, x in told.items()} for told in heard] == [
        {"omega": [2.0] * rows, "t_min": [pytest.approx(0.1)] * rows} for rows in (4, 2)
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--omega", "0.5"], "omega is 0.5: a scale of guidance is 1 (no guidance) or more"),
        (["--t-min", "0.8", "--t-max", "0.5"], "t_min and t_max are 0.8 and 0.5: the limits must rise within [0, 1]"),
    ],
)
def test_refused(run: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    for command in (["sample", "--out", "x.png"], ["evaluate"], ["fid", "--reference", "none.npz"]):
        assert main([command[0], "--run", str(run), *command[1:], *options]) == 2
        assert capsys.readouterr().err == f"error: {words}\n"


def test_a_network_that_is_not_told_refuses_a_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.save_pretrained(tmp_path, models.build("mlp", width=16, depth=1), extra={"data": {"name": "two_moons"}})
    assert main(["sample", "--run", str(tmp_path), "--out", str(tmp_path / "x.png"), "--omega", "2"]) == 2
    assert "a network that is not told its guidance was given one" in capsys.readouterr().err


class Points(nn.Module):
    """A network of one's own, which cannot do without what training tells it."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)

    def forward(self, z: Any, r: Any, t: Any, y: Any, omega: Any) -> Any:
        return self.last(torch.cat([z, t[:, None], omega[:, None]], 1))


def test_pictures_of_points_are_told_the_lowest_scale(tmp_path: Path) -> None:
    loss_fn = MeanFlowLoss(Points(), guidance=Guidance(omega=(1, 4)))
    pairs, settings = (torch.randn(60, 2), torch.arange(60) % 3), Train(batch=8, steps=2, sample_every=2)
    assert Trainer(loss_fn, pairs, tmp_path / "run", train=settings).fit()
    assert (tmp_path / "run" / "samples" / "step_0000002.png").is_file()


def test_pictures_take_a_coupling_of_another_precision_as_the_loss_does(tmp_path: Path) -> None:
    data = torch.randn(60, 2), {"noise": torch.randn(60, 2).double()}
    settings = Train(batch=8, steps=2, sample_every=2)
    assert Trainer(MeanFlowLoss(models.MLP(2, width=8, depth=1)), data, tmp_path / "run", train=settings).fit()
    assert (tmp_path / "run" / "samples" / "step_0000002.png").is_file()
