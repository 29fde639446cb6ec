"""A scaling plan on paper: memory, communication and time of a training step, by ZeRO stage and number of GPUs.

    mmf plan --config configs/imagenet64.yaml --gpus 64 data=synthetic
    mmf plan --config configs/latents256.yaml --gpus 256 --device A100 --nvlink 300 data=synthetic \
        data.shape=[4,32,32]

What is counted and what is assumed: docs/scaling.md. Nothing is allocated or trained: the network is made on the meta
device, where tensors have a shape and no content.
"""

import argparse
import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmf_fast import config, data
from mmf_fast.devices import PEAK_FLOPS, peak_flops
from mmf_fast.forward.dual import Dual
from mmf_fast.objective import BatchShare, LambdaSchedule, MeanFlowLoss
from mmf_fast.train import build_loss

__all__ = ["Cluster", "Job", "activations", "communication", "job", "main", "memory", "report", "step_time", "table"]

COUNTS = (1, 8, 64, 256, 1024)
STAGES = (0, 1, 2, 3)
LAUNCH = 5e-6  # seconds of the host for one eager operation, its Python included
RELEASED = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance, by default


@dataclass(frozen=True)
class Cluster:
    """What the plan assumes of the machine. nvlink, network: bytes/s that a GPU sends within its node and out of it."""

    device: str = "H100"
    utilisation: float = 0.4  # share of the peak that the matrix products of a whole step reach
    node: int = 8  # GPUs
    nvlink: float = 450e9
    network: float = 50e9
    reached: float = 0.8  # share of a bandwidth that a collective reaches


@dataclass(frozen=True)
class Job:
    """One training step. flops: of the global batch. calls: of the network, in forward and in backward, per pass.
    launches: of kernels, by a rank in an eager step. eager: whether it is one, so that the host may take longer than
    the device. weight: bytes of a weight that the network computes with."""

    parameters: int
    batch: int
    accumulate: int
    precision: str
    flops: float
    forwards: float
    calls: tuple[int, int]
    launches: int = 0
    eager: bool = False

    def divides(self, batch: int, ranks: int) -> bool:
        """Whether ranks and accumulated passes can share a batch equally."""
        return batch % (ranks * self.accumulate) == 0

    @property
    def weight(self) -> int:
        return 2 if self.precision == "bf16" else 4


def memory(parameters: int, weight: int, ranks: int, stage: int) -> dict[str, float]:
    """Bytes that a rank holds between backward and the optimizer's step (training/engines/deepspeed.py).

    weights: those computed with, of `weight` bytes each. master: float32 weights, of which the optimizer's moments are
    two and the moving average one more copy. Stage 0 trains in float32 only, without a master copy.
    """
    whole, share = float(parameters), parameters / ranks
    if stage == 0:
        return {"weights": 4 * whole, "master": 0.0, "gradients": 4 * whole, "moments": 8 * whole, "average": 4 * share}
    return {
        "weights": weight * (share if stage == 3 else whole),
        "master": 4 * share,
        "gradients": weight * share,
        "moments": 8 * share,
        "average": 4 * share,
    }


def communication(job: Job, ranks: int, stage: int) -> float:
    """Bytes that a rank sends in a step, by rings: (n - 1) / n of the tensor to gather or to reduce-scatter it, twice
    that to all-reduce it. DeepSpeed all-reduces gradients also at stages 1 and 2, at stage 2 after each backward."""
    ring = (ranks - 1) / ranks * job.parameters * (4 if stage == 0 else job.weight)
    if stage < 3:
        return {0: 2, 1: 2 + 1, 2: 2 * job.accumulate + 1}[stage] * ring
    gathers = 1 if job.parameters <= RELEASED else sum(job.calls)
    return job.accumulate * (gathers + 1) * ring


def step_time(job: Job, cluster: Cluster, ranks: int, stage: int) -> tuple[float, float]:
    """Seconds of computation, an eager step's launches at least, and of communication. Raises ConfigError for a device
    of unknown peak.

    Between nodes a ring leaves each node once, and NCCL lays one ring for each network card, so that a collective has
    the bandwidth of all cards of a node.
    """
    peak = peak_flops(cluster.device, "fp32" if stage == 0 and job.precision == "bf16" else job.precision)
    if peak is None:
        known = ", ".join(PEAK_FLOPS)
        raise config.ConfigError(f"--device {cluster.device}: its peak is not known; take one of {known}")
    bandwidth = cluster.nvlink if ranks <= cluster.node else min(cluster.nvlink, cluster.node * cluster.network)
    compute = max(job.flops / (ranks * peak * cluster.utilisation), job.eager * job.launches * LAUNCH)
    return compute, communication(job, ranks, stage) / (bandwidth * cluster.reached)


# ---- what the step is ------------------------------------------------------------------------------------------------


def job(settings: config.Config, lam: float) -> Job:
    """The step of a configuration at this lambda. Raises ValueError of the component that refuses its arguments."""
    train = settings.train
    loss_fn, shape = _loss(settings, lam)
    net: Any = loss_fn.net
    forwards = loss_fn.forwards(train.batch) / train.batch
    if getattr(net, "config", {}).get("recompute"):  # in backward: the primals again, at lambda > 0 the tangents too
        forwards += 1 + (lam > 0) * loss_fn.times.intervals(train.batch, 0) / train.batch
    counted = _Calls(net)
    with _Launches() as launched:
        _on_meta(loss_fn, shape, train.batch)
    return Job(
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        batch=train.batch,
        accumulate=train.accumulate,
        precision=train.precision,
        flops=forwards * net.flops(train.batch),
        forwards=forwards,
        calls=(counted.all, counted.with_graph),
        launches=train.accumulate * launched.count,
        eager=train.compile is False,
    )


def activations(settings: config.Config, lam: float, rows: int) -> int:
    """Bytes that autograd keeps for backward of the loss of `rows` samples, without torch.compile: the distinct
    storages it saves, weights left out, with fused norms and attention."""
    loss_fn, shape = _loss(settings, lam)
    if settings.train.precision == "bf16":
        loss_fn.bfloat16()
    weights = {parameter.untyped_storage()._cdata for parameter in loss_fn.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # keeps the storage alive, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _on_meta(loss_fn, shape, rows)
    return sum(storage.nbytes() for storage in kept.values())


def _loss(settings: config.Config, lam: float) -> tuple[MeanFlowLoss, tuple[int, ...]]:
    try:
        dataset = data.load(**settings.data)
    except (OSError, ValueError) as error:
        raise config.ConfigError(
            f"{' '.join(str(error).split())}; a plan needs only the shape: add data=synthetic data.shape=[3,64,64]"
        ) from error
    loss = {**settings.loss, "lam": LambdaSchedule(value=lam)}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a lambda that the configuration does not have
        loss_fn = build_loss(dataclasses.replace(settings, loss=loss), dataset).train()
    loss_fn.times = dataclasses.replace(loss_fn.times, start=0)  # a step with intervals needs the most
    return loss_fn, tuple(dataset.shape)


def _on_meta(loss_fn: MeanFlowLoss, shape: tuple[int, ...], rows: int) -> None:
    x = torch.empty(rows, *shape, device="meta")
    cond = {"y": torch.zeros(rows, dtype=torch.int64, device="meta")} if loss_fn.null_label is not None else {}
    with _fused_operators(), _FlashAttention():
        loss_fn(x, part=BatchShare(seed=0), **cond)  # as runs draw; it leaves the global generators alone


@contextmanager
def _fused_operators() -> Iterator[None]:
    """The operators of the GPU; on the meta device they give shapes only."""
    with mock.patch.dict(os.environ, MMF_FAST_OPS="triton"):
        yield


class _FlashAttention(TorchFunctionMode):
    """Attention of tensors keeps what flash attention keeps, not the N x N weights of PyTorch's composition."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention and not any(isinstance(x, Dual) for x in args):
            return _Flash.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, o, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return o


class _Launches(TorchDispatchMode):
    """How many operations a step dispatches to the device; views start no kernel, a backward takes two for one."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        out = func(*args, **(kwargs or {}))
        on_host = isinstance(out, Tensor) and out.device.type == "cpu"  # which rows have r < t is decided there
        self.count += 0 if views or on_host else 3 if torch.is_grad_enabled() else 1
        return out


class _Calls:
    """How often a network is called, and how often with a graph."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.all = self.with_graph = 0
        net.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.all += 1
        self.with_graph += torch.is_grad_enabled()


# ---- the report ------------------------------------------------------------------------------------------------------


def report(settings: config.Config, ranks: int, cluster: Cluster) -> str:
    """The plan as Markdown. Raises ConfigError."""
    steps = {lam: job(settings, lam) for lam in (0.0, 1.0)}
    one, train = steps[0.0], settings.train
    counts = sorted({*COUNTS, ranks})
    if not one.divides(train.batch, ranks):
        raise config.ConfigError(
            f"{ranks} GPUs x train.accumulate={train.accumulate} cannot share train.batch={train.batch} equally: "
            "choose another batch"
        )
    rows = train.batch // (ranks * train.accumulate)
    kept = {lam: activations(settings, lam, rows) for lam in steps}
    per_sample = one.flops / one.batch / one.forwards
    text = [
        f"{settings.model['name']}, {one.parameters / 1e6:.1f} million parameters, {per_sample / 1e9:.1f} GFLOPs a "
        f"forward and sample; {one.forwards:.2f} forwards a sample at lambda 0, {steps[1.0].forwards:.2f} above; batch "
        f"{train.batch}, {train.precision}.",
        f"Assumed: {cluster.device} at {cluster.utilisation:.0%} of its peak, nodes of {cluster.node}, "
        f"{cluster.nvlink / 1e9:.0f} GB/s within and {cluster.network / 1e9:.0f} GB/s out of them a GPU, at "
        f"{cluster.reached:.0%}.",
        f"\nMemory of one of {ranks} GPUs in GB, {rows} samples at a time (kept: activations, estimated):\n",
        table(
            ["ZeRO", "weights", "master", "gradients", "moments", "average", "gathered",
             "kept lambda 0", "lambda > 0", "sum lambda 0", "lambda > 0"],
            [_memory_row(one, ranks, stage, kept) for stage in STAGES],
        ),
        f"\nA step on {ranks} GPUs, lambda 0 (time: computation, communication, and the step with and without overlap, "
        "ms):\n",
        table(
            ["ZeRO", "sent GB", "computation", "communication", "overlapped", "in turn"],
            [[_stage(stage), f"{communication(one, ranks, stage) / 1e9:.3f}", *_times(one, cluster, ranks, stage)]
             for stage in STAGES],
        ),
        _launches(one, steps[1.0]),
        "\nWithout activations, GB of one GPU by ZeRO stage:\n",
        table(
            ["GPUs", *map(_stage, STAGES)],
            [[str(count)] + [f"{_held(one, count, stage) / 1e9:.3f}" for stage in STAGES] for count in counts],
        ),
        "\nScaling with ZeRO-1; step in ms (overlapped to in turn) and images/s (in turn):\n",
        table(
            ["GPUs", "batch", "lambda 0", "images/s", "lambda > 0", "images/s"],
            [row for count in counts for row in _scaling_rows(steps, cluster, ranks, count)],
        ),
    ]  # fmt: skip
    return "\n".join(text)


def _launches(zero: Job, above: Job) -> str:
    counts = [round(job.launches, -3) or round(job.launches, -2) for job in (zero, above)]
    least = [f"{1e3 * LAUNCH * count:.0f}" for count in counts]
    eager = ", and no step of these tables is shorter: train.compile=true starts fewer"
    then = eager if zero.eager else ": train.compile is for steps that are shorter"
    return (
        f"\nAn eager step starts about {' and '.join(map(str, counts))} kernels at lambda 0 and above, which takes the "
        f"host at least {' and '.join(least)} ms at {1e6 * LAUNCH:.0f} us each{then}."
    )


def _memory_row(one: Job, ranks: int, stage: int, kept: dict[float, int]) -> list[str]:
    parts = memory(one.parameters, one.weight, ranks, stage).values()
    gathered = one.weight * min(one.parameters, RELEASED) if stage == 3 else 0  # within a pass
    scale = 4 / one.weight if stage == 0 else 1  # stage 0 computes in float32
    used = [scale * size for size in kept.values()]
    sums = [_held(one, ranks, stage) + gathered + size for size in used]
    return [_stage(stage)] + [f"{size / 1e9:.3f}" for size in (*parts, gathered, *used, *sums)]


def _held(one: Job, ranks: int, stage: int) -> float:
    return sum(memory(one.parameters, one.weight, ranks, stage).values())


def _times(one: Job, cluster: Cluster, ranks: int, stage: int) -> list[str]:
    compute, sent = step_time(one, cluster, ranks, stage)
    return [f"{1e3 * x:.1f}" for x in (compute, sent, max(compute, sent), compute + sent)]


def _scaling_rows(steps: dict[float, Job], cluster: Cluster, ranks: int, count: int) -> list[list[str]]:
    """The batch as it is, where that many GPUs can share it, and a batch that grows with them."""
    batch = steps[0.0].batch
    grown_batch = max(count, batch * count // ranks)
    result = []
    for each in dict.fromkeys(n for n in (batch, grown_batch) if steps[0.0].divides(n, count)):
        row = [str(count), str(each)]
        for one in steps.values():
            grown = dataclasses.replace(one, batch=each, flops=one.flops * each / batch)
            compute, sent = step_time(grown, cluster, count, 1)
            row += [
                f"{1e3 * max(compute, sent):.1f} to {1e3 * (compute + sent):.1f}",
                f"{each / (compute + sent):,.0f}",
            ]
        result.append(row)
    return result


def _stage(stage: int) -> str:
    return f"{stage} (fp32)" if stage == 0 else str(stage)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *rows))


def main(arguments: Sequence[str] | None = None) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(Cluster)}
    parser = argparse.ArgumentParser(prog="mmf plan", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()), help="default: those here, or 1")
    parser.add_argument("--device", default=fields["device"], help="as the driver names it (default: %(default)s)")
    parser.add_argument("--utilisation", type=float, default=fields["utilisation"], help="share of the peak reached")
    parser.add_argument("--node", type=int, default=fields["node"], help="GPUs of a node (default: %(default)s)")
    parser.add_argument("--nvlink", type=float, default=450, help="GB/s a GPU sends within a node")
    parser.add_argument("--network", type=float, default=50, help="GB/s a GPU sends between nodes")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for instance data=synthetic train.batch=1024"
    )
    options = parser.parse_intermixed_args(arguments)
    if min(options.gpus, options.node, options.utilisation, options.nvlink, options.network) <= 0:
        raise config.ConfigError("--gpus, --node, --utilisation, --nvlink and --network must be positive")
    if options.utilisation > 1:
        raise config.ConfigError(f"--utilisation {options.utilisation:g}: is a share of the peak, at most 1; as 0.4")
    cluster = Cluster(options.device, options.utilisation, options.node, options.nvlink * 1e9, options.network * 1e9)
    print(report(config.load(options.config, options.overrides), options.gpus, cluster))
