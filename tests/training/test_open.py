"""The trainer with a network, a loss and data that are not of this package."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mmf_fast import MeanFlowLoss, Optimizer, TimeSampler, Train, Trainer, sample
from mmf_fast.evaluation.samples import evaluate_run
from mmf_fast.models import load_pretrained
from mmf_fast.sampling import draw_run
from mmf_fast.training import ConfigError
from mmf_fast.training.record import read


class Net(nn.Module):
    """u(z, r, t, y) without any attribute of the networks of this package; the last layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Embedding(3, 4)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Dropout(0.1), nn.Linear(16, 2))
        self.last = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.last(self.body(torch.cat([z, r[:, None], t[:, None], self.label(y)], 1))) * self.scale


SETTINGS = Train(batch=8, steps=10, log_every=1, sample_every=0, checkpoint_every=4, device="cpu")
X, Y = torch.randn(24, 2, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3


def trainer(run: Path, data: Any = (X, Y), steps: int = 10, wrap: Any = lambda net: net, **options: Any) -> Trainer:
    torch.manual_seed(1)
    loss_fn = MeanFlowLoss(wrap(Net()), times=TimeSampler(share=0.5), lam=0.5, paired=True, null_label=2)
    train = Train(**{**vars(SETTINGS), "steps": steps})
    return Trainer(loss_fn, data, run, train=train, optimizer=Optimizer(warmup=2, ema=0.5), **options)


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
def test_a_wrapped_network_is_trained_and_saved_as_itself(wrap: Any, tmp_path: Path) -> None:
    trainer(tmp_path / "bare", steps=3).fit()
    trainer(tmp_path / "wrapped", steps=3, wrap=wrap).fit()
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


def test_a_loss_without_a_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loss_fn.net must be the network"):
        Trainer(nn.Linear(2, 2), X, tmp_path / "run")
    with pytest.raises(ConfigError, match="loss_fn.net must be the network"):
        Trainer(MeanFlowLoss(lambda z, r, t: z), X, tmp_path / "run")
    assert not (tmp_path / "run").exists()
