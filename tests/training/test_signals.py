"""A signal ends a run, which goes on. Of several ranks without the other ranks: what they answer is made up."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_runs import records, stopping_at, tiny
from torch import Tensor

from mmf_fast import models
from mmf_fast.train import build_trainer
from mmf_fast.training.signals import Signals


def test_one_that_comes_while_ranks_ask_each_other_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    signals = Signals()
    before = signal.getsignal(signal.SIGTERM)

    def gather(value: Any) -> list[Any]:
        signal.raise_signal(signal.SIGTERM)  # this question is on its way already
        signal.raise_signal(signal.SIGTERM)  # the launcher's copy
        return [None, value]

    monkeypatch.setattr("mmf_fast.training.signals.rank_and_count", lambda: (1, 2))
    monkeypatch.setattr("mmf_fast.training.signals.gather", gather)
    with signals.caught():
        assert not signals.end(1, every=1)
        assert signals.came == signal.SIGTERM and signals.end(2, every=1)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("every", "asked"), [(1, 20), (4, 5), (100, 2)])
def test_the_answer_of_another_rank_ends_this_one(every: int, asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = []
    monkeypatch.setattr("mmf_fast.training.signals.rank_and_count", lambda: (0, 2))
    monkeypatch.setattr("mmf_fast.training.signals.gather", lambda value: questions.append(value) or [value, None])
    signals = Signals()
    assert not any(signals.end(step, every) for step in range(20))
    assert len(questions) == asked
    monkeypatch.setattr("mmf_fast.training.signals.gather", lambda value: [value, signal.SIGINT])
    assert signals.end(20, every) and signals.came == signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_the_run(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    trainer = build_trainer(tiny(train={"checkpoint_every": 1000}), tmp_path / "run")
    real = trainer.engine.step

    def engine_step(x: Tensor, step: int, **cond: Tensor) -> Any:
        if step == 6:
            signal.raise_signal(number)
            assert signal.getsignal(number) is before  # a second one is not caught
        return real(x, step, **cond)

    trainer.engine.step = engine_step  # type: ignore[method-assign]
    assert not trainer.fit()
    assert trainer.stopped_by == number and trainer.step == 7
    assert signal.getsignal(number) is before
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("*.pt")] == ["step_0000007.pt"]
    build_trainer(tiny(), tmp_path / "run", resume=True).fit()
    build_trainer(tiny(), tmp_path / "whole").fit()
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_fit_goes_on_after_a_signal_as_if_none_had_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also in a run that was resumed, which has rows from before it."""
    build_trainer(tiny(), tmp_path / "whole").fit()
    build_trainer(tiny(train={"steps": 3}), tmp_path / "run").fit()
    trainer = build_trainer(tiny(), tmp_path / "run", resume=True)
    stopping_at(trainer, 5, 8)
    assert not trainer.fit() and (trainer.step, trainer.stopped_by) == (6, signal.SIGINT)
    assert not trainer.fit() and (trainer.step, trainer.stopped_by) == (9, signal.SIGINT)
    assert trainer.fit() and trainer.stopped_by is None
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert "it was changed" not in capsys.readouterr().err
    one, other = (models.load_pretrained(tmp_path / name)[0].state_dict() for name in ("whole", "run"))
    assert all(map(torch.equal, one.values(), other.values()))
