"""What only a GPU shows of a training step."""

from __future__ import annotations

import pytest
import torch

from mmf_fast import MeanFlowLoss
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
