"""The loss module in PyTorch's DDP and FSDP2: two ranks leave the gradients of one process on the same global batch."""

import itertools
import json

import pytest
import torch
from support.engine_cases import loss_function
from support.launch import SUPPORT, two_ranks
from support.parallel_ranks import SEED, STEPS, steps

from mmf_fast.objective import BatchShare

CASES = (
    {
        f"{wrapper}-{lam}-{'paired' if paired else 'predicted'}": {"wrapper": wrapper, "lam": lam, "paired": paired}
        for wrapper, lam, paired in itertools.product(("ddp", "fsdp2"), (0.0, 1.0), (False, True))
    }
    | {
        f"{wrapper}-{lam}-recompute": {"wrapper": wrapper, "lam": lam, "paired": True, "recompute": True}
        for wrapper, lam in itertools.product(("ddp", "fsdp2"), (0.0, 1.0))
    }
    | {
        f"{wrapper}-times": {"wrapper": wrapper, "lam": 1.0, "paired": True, "weight": "times"}
        for wrapper in ("ddp", "fsdp2")
    }
    | {
        f"{wrapper}-start": {"wrapper": wrapper, "lam": 1.0, "paired": False, "start": 1}
        for wrapper in ("ddp", "fsdp2")
    }
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("ranks")
    done = two_ranks(str(SUPPORT / "parallel_ranks.py"), json.dumps(CASES), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_leave_the_gradients_of_one_process(name: str, found: dict[str, dict], float64: None) -> None:
    loss_fn = loss_function({**CASES[name], "recompute": False})
    expected = steps(loss_fn, loss_fn.net, BatchShare(seed=SEED))
    assert len(found[name]["steps"]) == STEPS
    assert found[name]["kinds"] == (["DTensor"] if name.startswith("fsdp2") else ["Parameter"])
    for one, two in zip(expected, found[name]["steps"], strict=True):
        torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-12, atol=0)
        scale = torch.stack([gradient.norm() for gradient in one["gradients"].values()]).norm()
        assert scale > 0.1
        for parameter, gradient in one["gradients"].items():
            torch.testing.assert_close(two["gradients"][parameter], gradient, rtol=1e-9, atol=1e-12 * float(scale))
