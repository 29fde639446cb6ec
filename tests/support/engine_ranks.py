"""One rank of test_deepspeed.py and test_fsdp.py: trains each case it is given and leaves what it saw in a file.

torchrun --nproc-per-node 2 engine_ranks.py '{"case": {"stage": 1, "lam": 1.0, ...}, ...}' FOLDER
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from support.engine_cases import data, loss_function, optimizer, train
from torch import nn

from mmf_fast.objective import LossOutput
from mmf_fast.training.engines import build_engine


def run(case: dict, folder: Path, name: str) -> None:
    loss_fn = loss_function(case)

    def spoil(module: nn.Module, arguments: tuple, options: dict, output: LossOutput) -> LossOutput:
        """A loss that is not finite on one rank, though its gradient is."""
        bad = options["step"] == case.get("bad_loss") and os.environ["RANK"] == "1"
        return output._replace(loss=output.loss + torch.nan) if bad else output

    loss_fn.register_forward_hook(spoil, with_kwargs=True)
    engine = build_engine(loss_fn, optimizer(case.get("kind", "adamw")), train(case), 3)
    x, y = data()
    own = len(x) // engine.world_size
    rows = slice(engine.rank * own, (engine.rank + 1) * own)
    found: dict[str, list] = {"loss": [], "grad_norm": [], "skipped": []}
    for step in range(case["steps"]):
        bad = float("nan") if step == case.get("bad_step") and engine.rank == 1 else 1.0  # on one rank only
        result = engine.step(x[rows] * bad, step, y=y[rows])
        for key in ("loss", "grad_norm"):
            found[key].append(float(result.metrics[key]))
        found["skipped"].append(bool(result.skipped))
    fragments = engine.state_dict()["fragments"]
    found["owned"] = sum(fragment["exp_avg"].numel() for fragment in fragments.values())
    average = engine.averaged()
    if engine.rank == 0:
        torch.save({**found, "average": average.state_dict()}, folder / f"{name}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name, case in json.loads(sys.argv[1]).items():
        run(case, Path(sys.argv[2]), name)
