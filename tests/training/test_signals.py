"""Several ranks and a signal to one of them, without the other ranks: what they answer is made up."""

import signal
from typing import Any

import pytest

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
