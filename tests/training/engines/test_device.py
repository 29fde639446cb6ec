"""What only a GPU shows of a training step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmf_fast import MeanFlowLoss, TimeSampler
from mmf_fast.models import DiT
from mmf_fast.training.engines.local import LocalEngine
from mmf_fast.training.settings import Optimizer, Train


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "options",
    [{}, {"lam": 1.0}, {"lam": 0.5, "stochastic": True, "tangent": "predicted", "paired": True}],
    ids=lambda options: ",".join(options) or "default",
)
def test_a_step_does_not_wait_for_the_device(options: dict) -> None:
    """Else the host could not run ahead, and the device would be idle while the next step is launched."""
    net = DiT(8, channels=3, patch_size=4, width=64, depth=1, heads=2)
    train = Train(steps=9, batch=8, precision="bf16")
    engine = LocalEngine(MeanFlowLoss(net, **options), Optimizer(), train, device=torch.device("cuda", 0))
    x = torch.randn(8, 3, 8, 8).pin_memory()
    for step in range(4):  # kernels are compiled, and their tiles chosen, when they are first met
        engine.step(x, step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(4):
            engine.step(x, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("compile", [True, "blocks"])
def test_replayed_parts_of_a_batch_train_as_eager_ones(compile: bool | str, share: float) -> None:
    """Graphs write their results, gradients too, where they did before: the parts of a step must not meet there."""
    x = torch.randn(24, 3, 8, 8)

    def found(**options: Any) -> torch.Tensor:
        torch.manual_seed(1)
        net = DiT(8, channels=3, patch_size=4, width=64, depth=2, heads=1)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        train = Train(steps=9, batch=24, accumulate=3, **options)
        loss_fn = MeanFlowLoss(net, times=TimeSampler(share=share))
        engine = LocalEngine(loss_fn, Optimizer(), train, device=torch.device("cuda", 0))
        metrics = [engine.step(x, step).metrics for step in range(4)]  # run, recorded, replayed
        return torch.tensor([[float(each[key]) for key in ("loss", "grad_norm")] for each in metrics])

    replayed = found(compile=compile, compile_mode="reduce-overhead")
    torch.testing.assert_close(replayed, found(), rtol=1e-3, atol=0)
