"""NumPy's numbers as settings, and what no checkpoint can hold."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.open_runs import trainer
from torch import nn

from mmf_fast import Optimizer
from mmf_fast.training.record import read


def test_numbers_of_numpy_are_settings_as_those_of_python(tmp_path: Path) -> None:
    """As np.logspace and np.arange give them."""

    def sgd(lr: Any) -> Any:
        return lambda named: torch.optim.SGD([p for _, p in named], lr=lr, momentum=lr / lr - 0.5)

    def options(real: Any, whole: Any) -> dict[str, Any]:
        optimizer = Optimizer(lr=real(1e-3), betas=(real(0.9), real(0.99)), warmup=whole(0))
        record = {"optimizer": {"lr": real(1e-3)}, "seed": whole(1)}
        extra = {"identity": {"a": real(0.5)}, "extra": {"b": real(0.25)}, "record": record}
        return {"optimizer": optimizer, "seed": whole(1), "settings": {"batch": whole(8)}, **extra}

    for name, real, whole in (("numpy", np.float64, np.int64), ("python", float, int)):
        for steps in (4, 6):
            given = options(real, whole)
            run = tmp_path / name
            assert trainer(run, steps=steps, make_optimizer=sgd(real(0.1)), resume=steps > 4, **given).fit()
    for name in ("config.yaml", "model.json"):
        assert (tmp_path / "numpy" / name).read_text() == (tmp_path / "python" / name).read_text()
    found = [[row["loss"] for row in read(tmp_path / name / "metrics.jsonl")] for name in ("numpy", "python")]
    assert found[0] == found[1] and len(found[0]) == 6
    # they are the same settings
    assert trainer(tmp_path / "numpy", make_optimizer=sgd(0.1), resume=True, **options(float, int)).step == 6


def test_what_no_checkpoint_can_hold_is_named_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="identity.a is of PosixPath, which no checkpoint can hold: give a number"):
        trainer(tmp_path / "run", identity={"a": Path("x")})

    def made(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [p for _, p in named], "name": Path("x")}], lr=0.1)

    with pytest.raises(ValueError, match=r"SGD.param_groups\[0\].name is of PosixPath, which no checkpoint can hold"):
        trainer(tmp_path / "run", make_optimizer=made)
    assert not (tmp_path / "run").exists()
