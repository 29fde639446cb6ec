"""train.precision: what it computes in, and the switches of PyTorch that it sets for a GPU."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.regression import OPTIMIZER, Regression, batch, make_net, weights
from torch import nn

from mmf_fast.config import Train
from mmf_fast.training.engines.local import LocalEngine


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights() -> None:
    seen = []
    net = make_net()
    net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    engine = LocalEngine(Regression(net), OPTIMIZER, Train(steps=5, device="cpu", precision="bf16"))
    result = engine.step(step=0, **batch(0))
    assert seen == [torch.bfloat16]
    assert weights(net).dtype == torch.float32 and math.isfinite(result.metrics["loss"])


@pytest.fixture
def switches() -> Iterator[Callable[..., tuple[str, bool]]]:
    """Reads the two switches of the process for TF32, or sets them; they are as before in the end."""

    def now(*values: Any) -> tuple[str, bool]:
        if values:
            torch.set_float32_matmul_precision(values[0])
            torch.backends.cudnn.allow_tf32 = values[1]
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = now()
    yield now
    now(*before)


@pytest.mark.parametrize("before", [("highest", True), ("high", True), ("highest", False)])
def test_a_precision_on_a_gpu_does_not_depend_on_what_was_set_before(
    before: tuple[str, bool], switches: Callable[..., tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(precision: Any, device: str) -> tuple[str, bool]:
        LocalEngine(Regression(make_net()), OPTIMIZER, Train(precision=precision), device=torch.device(device))
        return switches()

    switches(*before)
    for precision in ("fp32", "tf32", "bf16"):
        assert engine(precision, "cpu") == before
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)  # there need be no such device
    for precision in ("fp32", "bf16", "fp32", "tf32", "fp32"):
        assert engine(precision, "cuda") == (("highest", False) if precision == "fp32" else ("high", True))
