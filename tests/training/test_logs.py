import warnings
from pathlib import Path

import pytest
from support.launch import ROOT, two_ranks
from support.tiny_runs import Poisoned, tiny

from mmf_fast.train import build_trainer
from mmf_fast.training import NonFiniteError
from mmf_fast.training.logs import RankLog


def test_a_log_tells_what_a_rank_did(tmp_path: Path) -> None:
    run = tmp_path / "run"
    build_trainer(tiny(), run).fit()
    text = (run / "logs" / "rank_0.log").read_text()
    assert "INFO rank 0 of 1 " in text and "on cpu" in text and "steps 0 to 12, batch 16, data two_moons" in text
    for step in (4, 8, 12):
        assert f"INFO step {step}: checkpoint written" in text
    assert "step 7: loss " in text and "data_seconds" in text
    build_trainer(tiny(train={"steps": 14}), run, resume=True).fit()
    more = (run / "logs" / "rank_0.log").read_text()
    assert more.startswith(text)
    assert "going on from step_0000012.pt" in more and "steps 12 to 14" in more.split("going on from")[1]


def test_a_refused_run_leaves_no_log(tmp_path: Path) -> None:
    log = RankLog(0, terminal=False)
    log.say("only said")
    assert not list(tmp_path.iterdir())
    with log.recording(tmp_path):
        log.info("now")
    log.say("after")  # waits for the next recording
    lines = (tmp_path / "logs" / "rank_0.log").read_text().splitlines()
    assert [line.split(" INFO ")[1] for line in lines] == ["only said", "now"]


def test_only_the_main_rank_talks_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        log = RankLog(rank, terminal=rank == 0)
        with log.recording(tmp_path):
            log.say(f"from {rank}")
    assert capsys.readouterr().err == "from 0\n"
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank_0.log", "rank_1.log"]


def test_warnings_and_the_error_that_ends_a_run_are_in_its_log(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = build_trainer(tiny(train={"max_bad_steps": 3}), run)
    trainer.dataset = Poisoned(trainer.dataset, range(5, 1000))
    real = trainer.engine.step

    def step(*arguments: object, **options: object) -> object:
        warnings.warn("a strange step", stacklevel=1)
        return real(*arguments, **options)  # type: ignore[arg-type]

    trainer.engine.step = step  # type: ignore[assignment, method-assign]
    with pytest.warns(UserWarning, match="a strange step"), pytest.raises(NonFiniteError):
        trainer.fit()
    text = (run / "logs" / "rank_0.log").read_text()
    assert "WARNING UserWarning: a strange step" in text
    assert "ERROR ended by NonFiniteError" in text and "Traceback" in text


def test_two_ranks_have_two_logs_and_one_progress_bar(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    small = ["train.batch=16", "train.steps=13", "train.log_every=4", "train.sample_every=0", "model.width=8"]
    command = [str(ROOT / "mmf_fast" / "train.py"), "--config", str(ROOT / "configs" / "two_moons.yaml"), "--profile"]
    run = tmp_path / "run"
    done = two_ranks(*command, "--run-folder", str(run), "train.zero=zero1.json", *small)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        text = (run / "logs" / f"rank_{rank}.log").read_text()
        assert f"rank {rank} of 2" in text and "step 13: checkpoint written" in text
        assert (run / "profile" / f"rank_{rank}.json").stat().st_size > 1000
    assert done.stdout.count("13 steps done") == 1
    assert done.stderr.count("13/13 [") == 1


def test_a_full_disk_does_not_end_a_log_with_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/full takes every open and refuses every write."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_0.log").symlink_to("/dev/full")
    log = RankLog(0, terminal=True)
    with log.recording(tmp_path):
        log.say("training goes on")
    assert capsys.readouterr().err == "training goes on\n"


def test_a_log_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with (
        pytest.raises(OSError, match=r"rank_0.log: cannot be written .*go on with --resume$"),
        RankLog(0, True).recording(tmp_path),
    ):
        pass
