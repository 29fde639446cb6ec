"""One training step against the flow-matching step of the same network: what the step benchmarks share.

A step is loss, backward and a fused AdamW. Each case is timed in turn with flow matching in the same process, by blocks
of a few steps (flow matching, case, flow matching, ...): benchmarks.measure.ratio. Flow matching is the same network on
plain tensors with PyTorch's fused attention, in the same mode. Nothing is timed before its loss and gradient agree with
those of an independent implementation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import FLOW_MATCHING, OURS, Case, Network
from benchmarks.measure import (
    BLOCK,
    Run,
    Stopwatch,
    count_flops,
    loss_of,
    peak_bytes,
    ratio,
    reason,
    repeat,
    take_gradient,
    training_step,
)
from mmf_fast.objective.compiled import blocks_of, compile_blocks

COUNTED = 16  # samples on which FLOPs are counted and gradients compared: their quarter still splits at lambda = 0.5
EAGER, COMPILED, BY_BLOCK = "eager", "compiled", "compiled by block"  # modes


class Workload(NamedTuple):
    """A network and its data, the step of flow matching on them, and what that one needs.

    eager: the same network with the same parameters, in which nothing is compiled.
    """

    net: nn.Module
    eager: nn.Module
    x: Tensor
    device: str
    mode: str
    precision: str  # "fp32" or "bf16"
    baseline: Run
    flops: float
    bytes: int

    @staticmethod
    def of(network: Network, device: str, mode: str, precision: str) -> Workload:
        torch.compiler.reset()
        net, x = network.make(device), network.data(device)
        if device == "cuda" and isinstance(net.input, nn.Conv2d):  # faster there; on the CPU it is not
            net, x = (value.to(memory_format=torch.channels_last) for value in (net, x))
        eager = copy.deepcopy(net, {id(p): p for p in net.parameters()})
        if mode == BY_BLOCK:
            compile_blocks(blocks_of(net, ["blocks"]))
        baseline = training_step(net, build(FLOW_MATCHING, net, mode), x, precision)
        baseline()
        needs = flops(eager, FLOW_MATCHING, x, precision), peak_bytes(baseline, device)
        return Workload(net, eager, x, device, mode, precision, baseline, *needs)

    def tolerance(self) -> float:
        """Relative, of loss and gradient."""
        return 5e-2 if self.precision == "bf16" else 2e-3 if self.device == "cuda" else 1e-4


def measure(case: Case, workload: Workload, length: float, repeat: Callable[..., Any] = repeat) -> dict[str, Any]:
    """What the step of a case takes over flow matching, timed for about `length` seconds.

    repeat(run, setup=, rounds=): calls both in turn; pytest-benchmark's `pedantic`, or a plain loop.
    Raises ValueError where our loss or gradient is wrong. A way of the field that fails is a row with its error.
    """
    net, eager, x, device, mode, precision, baseline, *_ = workload
    row = {"batch": list(x.shape), "parameters": sum(p.numel() for p in net.parameters()), "bound": case.bound()}
    row |= {"share": case.share, "way": case.way, "loss": case.loss}
    loss_fn = build(case, net, mode)
    run = training_step(net, loss_fn, x, precision)
    try:
        row["errors"] = errors(case, loss_fn, workload)
        run()
    except Exception as error:
        if case.way == OURS:
            raise
        return row | {"error": reason(error)}
    if case.way == OURS and not max(row["errors"].values()) <= workload.tolerance():
        raise ValueError(f"loss or gradient is wrong, so it is not timed: {row['errors']}")

    peak = peak_bytes(run, device)
    cost = flops(eager, case, x, precision)
    ours, theirs = Stopwatch(run, device), Stopwatch(baseline, device)
    theirs(), theirs(), ours(), ours()
    pair = ours.times.pop() + theirs.times.pop()
    ours.times.clear(), theirs.times.clear()
    blocks = round(min(max(length / ((BLOCK + 1) * pair), 2), 30))

    def take_turns() -> None:
        """Before each block the baseline has its own, and each first an untimed run: in training a step follows its
        like, and finds memory as that left it."""
        if len(ours.times) % BLOCK == 0:
            for timed in (baseline, *[theirs] * BLOCK, run):
                timed()

    repeat(ours, setup=take_turns, rounds=blocks * BLOCK)
    for timed in (baseline, *[theirs] * BLOCK):
        timed()
    row |= ratio(ours.times, theirs.times)
    return row | {
        "share of bound": case.bound() / row["ratio"],
        "flops": cost,
        "flops over flow matching": cost / workload.flops,
        "FLOP/s": cost / row["seconds"],
        "peak bytes": peak,
        "peak over flow matching": peak / workload.bytes,
    }


def build(case: Case, net: nn.Module, mode: str) -> nn.Module:
    """The loss module of a case; compiled whole, if the mode is so."""
    loss_fn = case.build(net)
    if mode == COMPILED:
        loss_fn.compile()
    return loss_fn


def errors(case: Case, loss_fn: nn.Module, workload: Workload) -> dict[str, float]:
    """Relative errors of loss and gradient. Truth: for eager code, MeanFlowLoss over torch.func.jvp with the norms
    decomposed, in float32; for compiled code, the same case in eager mode."""
    net, eager, x, _, mode, precision, *_ = workload
    if mode == EAGER:
        x = x[:COUNTED]
        truth, precise = Case(case.share, case.loss).build(eager, jvp="func"), "fp32"
    else:
        truth, precise = case.build(eager), precision
    value, gradient = _value_and_gradient(net, loss_fn, x, precision)
    true_value, true_gradient = _value_and_gradient(net, truth, x, precise)
    return {
        "loss": abs(value - true_value) / abs(true_value),
        "gradient": float((gradient - true_gradient).norm() / true_gradient.norm()),
    }


def flops(net: nn.Module, case: Case, x: Tensor, precision: str) -> float:
    """FLOPs of a step on x, counted on its first samples and scaled up."""
    few = x[:COUNTED]
    return count_flops(training_step(net, case.build(net), few, precision)) * len(x) / len(few)


def _value_and_gradient(net: nn.Module, loss_fn: nn.Module, x: Tensor, precision: str) -> tuple[float, Tensor]:
    """Loss and gradient for the noise and times that seed 0 draws."""
    torch.manual_seed(0)
    value = loss_of(loss_fn, x, precision)
    value.backward()
    return value.item(), take_gradient(net)
