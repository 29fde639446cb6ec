"""What the kernel benchmarks share: a case, and its timing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import Stopwatch, head_start, reason, repeat

Outputs = Sequence[Tensor]


class Case(NamedTuple):
    """One operator at one size. fused and composed compute the same, and return all they computed.

    bytes: the least that must move through memory (each input read once, each output written once).
    flops: multiply-adds counted as 2; 0 where memory is the limit.
    others: timed beside them, without a comparison of results, since they compute something else.
    compiles: whether torch.compile of `composed` means anything; not of a backward pass alone.
    """

    op: str
    shape: str
    mode: str  # "dual" (primal and tangent), "dual + backward", ...
    fused: Callable[[], Outputs]
    composed: Callable[[], Outputs]
    bytes: int = 0
    flops: int = 0
    tolerance: float = 1e-4
    others: dict[str, Callable[[], Outputs]] = {}
    compiles: bool = True


def measure(
    case: Case, device: str, length: float, compiled: bool, repeat: Callable[..., Any] = repeat
) -> dict[str, Any]:
    """Medians of interleaved runs over `length` seconds, five at the least (two at 0, where a figure means nothing).
    Nothing is timed before both versions agree.

    repeat(run, setup=, rounds=): calls both in turn; pytest-benchmark's `pedantic`, or a plain loop.
    Raises ValueError where the versions do not agree. Of the others, those that fail are named with their error.
    """
    versions = {"fused": case.fused, "composed": case.composed}
    if compiled and case.compiles:
        versions["composed, compiled"] = torch.compile(case.composed)
    results = {name: [y.detach().double() for y in run()] for name, run in versions.items()}
    error = max(
        float((a - b).norm() / b.norm().clamp(min=1e-30))
        for a, b in zip(results["fused"], results["composed"], strict=True)
    )
    if not error < case.tolerance:
        raise ValueError(f"{case.op} {case.shape}: fused and composed differ by {error:.1e}; not timed")
    del results
    failed = _failing(case.others)
    versions |= {name: run for name, run in case.others.items() if name not in failed}
    fused, *others = watches = [Stopwatch(run, device) for run in versions.values()]

    def time_others() -> None:
        for watch in others:
            watch.run()  # untimed: the run before was another version's, whose freed memory and caches are not its own
            watch()
        fused.run()

    time_others(), fused()  # warm up
    once = sum(2 * watch.times.pop() + head_start(device) for watch in watches)
    repeat(fused, setup=time_others, rounds=round(min(max(length / once, 5 if length else 2), 2000)))
    times = {name: watch.times for name, watch in zip(versions, watches, strict=True)}
    took = statistics.median(fused.times)
    return {
        "op": case.op,
        "shape": case.shape,
        "mode": case.mode,
        "seconds": {name: statistics.median(t) for name, t in times.items()},
        "speedup over": {name: _faster(fused.times, t) for name, t in times.items() if name != "fused"},
        "bytes": case.bytes,
        "flops": case.flops,
        "bytes/s": case.bytes / took,
        "FLOP/s": case.flops / took,
        "error against composed": error,
        "rounds": len(fused.times),
        **({"failed": failed} if failed else {}),
    }


def _failing(runs: dict[str, Callable[[], Outputs]]) -> dict[str, str]:
    """Those that do not run here, and why."""
    found = {}
    for name, run in runs.items():
        try:
            run()
        except Exception as error:
            found[name] = reason(error)
    return found


def _faster(fused: list[float], other: list[float]) -> dict[str, Any]:
    pairs = [b / a for a, b in zip(fused, other, strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4)
    return {"ratio": middle, "quartiles": [low, high]}


def backward(outputs: Iterable[Any], inputs: Sequence[Tensor], cotangents: Outputs) -> list[Tensor]:
    """The outputs and what the inputs receive; the outputs alone where no gradient is recorded."""
    outputs = list(outputs)
    if not torch.is_grad_enabled():
        return outputs
    return [*outputs, *torch.autograd.grad(outputs, list(inputs), list(cotangents))]
