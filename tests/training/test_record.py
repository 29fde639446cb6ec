import json
import math
from pathlib import Path

from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmf_fast.training.drawing import draw_curves
from mmf_fast.training.record import MetricsLog, Rows, TensorBoard, read


def write(run: Path, steps: range, resumed: int = 0, offset: float = 0.0) -> None:
    with Rows(MetricsLog(run, resumed), TensorBoard(run, resumed)) as log:
        for step in steps:
            log(step, {"loss": step + offset, "mse": 1 / step, "lam": 0.0, "grad_norm": 2.0})


def test_each_step_stands_once_after_a_resumption(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # cut off by a crash
    write(tmp_path, range(6, 11), resumed=5, offset=100.0)
    records = read(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 11))
    assert [record["loss"] for record in records] == [1, 2, 3, 4, 5, 106, 107, 108, 109, 110]

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(r["step"], r["loss"]) for r in records]


def test_a_line_is_on_disk_when_it_is_written(tmp_path: Path) -> None:
    with Rows(MetricsLog(tmp_path, 0)) as log:
        log(1, {"loss": 0.1 + 0.2})
        assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.1 + 0.2}]


def test_non_finite_values_are_null_in_valid_json(tmp_path: Path) -> None:
    with Rows(MetricsLog(tmp_path, 0)) as log:
        log(1, {"loss": math.nan, "mse": math.inf, "lam": 0.5})

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "mse": None, "lam": 0.5}


def test_curves_are_drawn_also_from_gaps_and_from_nothing(tmp_path: Path) -> None:
    with Rows(MetricsLog(tmp_path, 0)) as log:
        empty = imread(draw_curves(tmp_path))
        for step in range(1, 100):
            log(step, {"loss": math.nan if step % 7 == 0 else 1 / step, "mse": 1 / step, "lam": 1.0, "grad_norm": 0})
    drawn = imread(draw_curves(tmp_path))
    assert drawn.shape == empty.shape
    assert (drawn != empty).any(axis=-1).mean() > 0.01


def test_callbacks_receive_each_row_and_are_closed(tmp_path: Path) -> None:
    class Logger:
        closed = False

        def __call__(self, step: int, row: dict[str, float]) -> None:
            seen.append((step, dict(row)))
            row.clear()  # each has its own

        def close(self) -> None:
            self.closed = True

    seen: list[tuple[int, dict[str, float]]] = []
    logger = Logger()
    with Rows(MetricsLog(tmp_path, 0), logger, lambda step, row: seen.append((step, row))) as log:
        log(3, {"loss": 0.5})
    assert seen == [(3, {"loss": 0.5})] * 2 and logger.closed
    assert read(tmp_path / "metrics.jsonl") == [{"step": 3, "loss": 0.5}]
