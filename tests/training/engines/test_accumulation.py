"""A batch in parts: the steps are those of the whole, and each part has what all samples share."""

from typing import Any

import pytest
import torch
from support.regression import OPTIMIZER, Regression, batch, make_net
from torch import Tensor, nn

from mmf_fast.config import Train
from mmf_fast.models import MLP
from mmf_fast.objective import MeanFlowLoss, TimeSampler
from mmf_fast.training.engines.local import LocalEngine
from mmf_fast.training.settings import ConfigError


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_steps_are_those_of_the_whole_batch(accumulate: int, float64: None) -> None:
    def losses(accumulate: int) -> list[Tensor]:
        torch.manual_seed(1)
        loss_fn = MeanFlowLoss(MLP(2, width=8, depth=1), lam=0.5, p=0.5)  # a quarter of the 16 rows has r < t
        engine = LocalEngine(loss_fn, OPTIMIZER, Train(batch=16, accumulate=accumulate, device="cpu"), seed=5)
        x = torch.linspace(-1, 1, 32).reshape(16, 2)
        return [engine.step(x, step).metrics["loss"] for step in range(4)]

    torch.testing.assert_close(losses(accumulate), losses(1), rtol=1e-10, atol=0)


class Banked(nn.Module):
    """A network that looks its rows up in a table that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.seen = nn.Linear(2, 2), set()

    def forward(self, z: Tensor, r: Tensor, t: Tensor, text: Any) -> Tensor:
        assert len(text["ids"]) == len(z)
        self.seen.add(tuple(text["bank"].shape))
        return self.fc(z) + text["bank"][text["ids"]]


@pytest.mark.parametrize("accumulate", [1, 2, 4, 8])
@pytest.mark.parametrize("shared", [(), ("bank",)])
def test_what_all_samples_share_stays_whole_in_each_part(accumulate: int, shared: tuple[str, ...]) -> None:
    """A part sees its own rows alone, and 4 rows of a table are no longer told from those of 4 samples."""
    net = Banked()
    loss_fn = MeanFlowLoss(net, times=TimeSampler(share=0.5), shared=shared)
    engine = LocalEngine(loss_fn, OPTIMIZER, Train(batch=8, accumulate=accumulate, device="cpu"))
    text = {"ids": torch.arange(8) % 4, "bank": torch.randn(4, 2)}
    if accumulate == 2 and not shared:
        with pytest.raises(ConfigError, match=r"the condition bank .* 4 rows, .*\(loss.shared=\[bank\]\)") as caught:
            engine.step(torch.randn(8, 2), 0, text=text)
        assert "\n" not in str(caught.value)
    else:
        engine.step(torch.randn(8, 2), 0, text=text)
        assert net.seen == {(4, 2)}


def test_a_part_of_one_sample_shares_what_has_one_row() -> None:
    net = Banked()
    engine = LocalEngine(MeanFlowLoss(net), OPTIMIZER, Train(batch=4, accumulate=4, device="cpu"))
    engine.step(torch.randn(4, 2), 0, text={"ids": torch.zeros(4, dtype=torch.long), "bank": torch.randn(1, 2)})
    assert net.seen == {(1, 2)}


def test_of_a_step_all_parts_are_kept_where_graphs_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a part leaves, its gradients too, is lost where PyTorch is told that a new step begins."""
    seen = []

    class Told(Regression):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append("part")
            return super().forward(*args, **kwargs)

    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: seen.append("begins"))
    engine = LocalEngine(Told(make_net()), OPTIMIZER, Train(batch=8, accumulate=2, device="cpu"))
    engine.cuda_graphs = True
    for step in range(2):
        engine.step(step=step, **batch(step))
    assert seen == 2 * ["begins", "part", "part"]
