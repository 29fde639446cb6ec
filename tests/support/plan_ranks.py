"""One rank of test_plan.py: what it holds before the optimizer's step, and what it sends in a step, case by case.

torchrun --nproc-per-node 2 plan_ranks.py '{"case": {"stage": 1, "precision": "bf16"}, ...}' FOLDER
"""

import collections
import gc
import json
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from mmf_fast import MeanFlowLoss
from mmf_fast.models import DiT
from mmf_fast.training.engines.deepspeed import DeepSpeedEngine
from mmf_fast.training.settings import Optimizer, Train, read_zero

BUCKET = 10_000  # elements: what lies in DeepSpeed's buckets, and small weights that stay gathered, are not planned
SHARES = {"all_reduce": 2, "reduce_scatter_tensor": 1, "all_gather_into_tensor": 1}  # x (n - 1) / n of the tensor
sent: collections.Counter[str] = collections.Counter()


def count_calls() -> None:
    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent[name] += max(x.nbytes for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            return function(*args, **kwargs)

        return call

    for name in SHARES:
        function = counted(name, getattr(dist, name))
        setattr(dist, name, function)
        setattr(distributed_c10d, name, function)


def storages(tensors: Iterable[Any]) -> dict[int, Any]:
    found = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return {storage._cdata: storage for storage in found}


def size(tensors: Iterable[Any]) -> int:
    return sum(storage.nbytes() for storage in storages(tensors).values())


def alive() -> dict[int, Any]:
    gc.collect()
    return storages([x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.device.type == "cpu"])


def gradients(engine: DeepSpeedEngine) -> list[Any]:
    if engine.stage == 0:
        return [parameter.grad for parameter in engine.net.parameters()]
    groups = engine.model.optimizer.averaged_gradients.values()
    return [gradient for group in groups for gradient in group]


def run(case: dict) -> dict[str, Any]:
    before = alive()  # held here, so that no address is used again
    torch.manual_seed(0)
    net = DiT(4, channels=1, patch_size=2, width=64, depth=8, heads=2)
    count = sum(parameter.numel() for parameter in net.parameters())
    zero = read_zero(f"zero{case['stage']}.json")
    zero["zero_optimization"] |= {"reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0}
    train = Train(batch=16, steps=10, device="cpu", precision=case["precision"], accumulate=case.get("accumulate", 1))
    loss_fn = MeanFlowLoss(net, lam=0.0, paired=True)
    engine = DeepSpeedEngine(loss_fn, Optimizer(), train, zero, seed=0)
    x = torch.randn(8, 1, 4, 4)
    engine.step(x, 0)  # makes the moments

    found: dict[str, Any] = {"count": count}
    take_step = engine.model.step

    def measure_and_step() -> None:
        if engine.model.is_gradient_accumulation_boundary():
            weights = [getattr(p, "ds_tensor", p) for p in engine.net.parameters()]
            moments = [state[key] for state in engine.zero.moments().values() for key in ("exp_avg", "exp_avg_sq")]
            found.update(
                weights=size(weights),
                master=size(engine.zero.owned()) if engine.stage else 0,
                gradients=size(gradients(engine)),
                moments=size(moments),
                average=size(engine.average.values()),
                all=sum(storage.nbytes() for key, storage in alive().items() if key not in before),
            )
        take_step()

    engine.model.step = measure_and_step
    sent.clear()
    engine.step(x, 1)
    found["sent"] = sum(sent[name] * share / 2 for name, share in SHARES.items())  # (n - 1) / n = 1 / 2
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    count_calls()
    results = {name: run(case) for name, case in json.loads(sys.argv[1]).items()}
    if dist.get_rank() == 1:  # rank 0 has the averaged network besides
        (Path(sys.argv[2]) / "found.json").write_text(json.dumps(results))
