"""One training step against the flow-matching step of the same network: pytest benchmarks/test_step.py

A step is loss, backward and a fused AdamW. Each case is timed in turn with flow matching in the same process, by blocks
of a few steps (flow matching, case, flow matching, ...): benchmarks.measure.ratio. Flow matching is the same network on
plain tensors with PyTorch's fused attention, eager or compiled. Before a case is timed, its loss and gradient are
compared with those of an independent implementation; a way of the field that fails here is a row with its error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.cases import (
    CASES,
    CPU_NETWORKS,
    FLOW_MATCHING,
    GPU_NETWORKS,
    OURS,
    TOKENS,
    WIDTHS,
    Case,
    Network,
)
from benchmarks.measure import (
    BLOCK,
    Run,
    Stopwatch,
    count_flops,
    loss_of,
    peak_bytes,
    ratio,
    take_gradient,
    training_step,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NETWORKS = {**(CPU_NETWORKS if DEVICE == "cpu" else GPU_NETWORKS), **TOKENS, **WIDTHS}
TOLERANCE = {"fp32": 2e-3 if DEVICE == "cuda" else 1e-4, "bf16": 5e-2}  # relative, of loss and gradient
COUNTED = 16  # samples on which FLOPs are counted and gradients compared: their quarter still splits at lambda = 0.5


def value_and_gradient(net: nn.Module, loss_fn: nn.Module, x: Tensor, precision: str) -> tuple[float, Tensor]:
    """Of what the first seed draws."""
    torch.manual_seed(0)
    value = loss_of(loss_fn, x, precision)
    value.backward()
    return value.item(), take_gradient(net)


def errors(net: nn.Module, case: Case, loss_fn: nn.Module, x: Tensor, mode: str, precision: str) -> dict[str, float]:
    """Relative errors of loss and gradient. Truth: for eager code, MeanFlowLoss over torch.func.jvp with the norms
    decomposed, in float32; for compiled code, the same case in eager mode."""
    if mode == "eager":
        x = x[:COUNTED]
        truth, precise = Case(case.share, case.loss).build(net, jvp="func"), "fp32"
    else:
        truth, precise = case.build(net), precision
    value, gradient = value_and_gradient(net, loss_fn, x, precision)
    true_value, true_gradient = value_and_gradient(net, truth, x, precise)
    return {
        "loss": abs(value - true_value) / abs(true_value),
        "gradient": float((gradient - true_gradient).norm() / true_gradient.norm()),
    }


def flops(net: nn.Module, case: Case, x: Tensor, precision: str) -> float:
    """Of a step on x, by those of its first samples."""
    few = x[:COUNTED]
    return count_flops(training_step(net, case.build(net), few, precision)) * len(x) / len(few)


def reason(error: Exception) -> str:
    """Kind and message in a line. Dynamo's own messages tell where; why is what they quote."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    quoted = re.search(r": got (\w+)\(['\"](.*)", said)
    return (f"{quoted[1]}: {quoted[2]}" if quoted else said)[:200]


@pytest.fixture(scope="module")
def workloads() -> Callable[..., tuple[nn.Module, Tensor, Run, dict[str, float]]]:
    """Network, data, the step of flow matching and what it needs, made once per (network, mode, precision)."""
    made: dict[tuple[str, str, str], Any] = {}

    def get(name: str, mode: str, precision: str) -> Any:
        key = (name, mode, precision)
        if key not in made:
            made.clear()  # one after the other: two do not fit where one is large
            torch.compiler.reset()
            network: Network = NETWORKS[name]
            net, x = network.make(DEVICE), network.data(DEVICE)
            if DEVICE == "cuda" and isinstance(net.input, nn.Conv2d):  # faster there; on the CPU it is not
                net, x = (value.to(memory_format=torch.channels_last) for value in (net, x))
            loss_fn = FLOW_MATCHING.build(net)
            if mode == "compiled":
                loss_fn.compile()
            baseline = training_step(net, loss_fn, x, precision)
            baseline()
            base = {"flops": flops(net, FLOW_MATCHING, x, precision), "bytes": peak_bytes(baseline, DEVICE)}
            made[key] = net, x, baseline, base
        return made[key]

    return get


def parameters() -> list[Any]:
    """(network, mode, precision, case): what the quick profile measures, and what --full adds."""
    main = list(CPU_NETWORKS if DEVICE == "cpu" else GPU_NETWORKS)
    exact = ["lambda 0, 100 %", "lambda 1, 100 %"]
    quarter = ["lambda 0, 25 %", "lambda 0, 25 %, paired", "lambda 1, 25 %", "lambda 0.5 stochastic, 25 %, paired"]
    field = [name for name, case in CASES.items() if case.way != OURS]
    at_zero = [name for name in field if CASES[name].lam == 0]
    if DEVICE == "cpu":
        quick = [
            (main[0], "compiled", "fp32", [*exact, "lambda 0, 25 %, paired"]),
            (main[0], "eager", "fp32", [*exact, *quarter, *field]),
            (main[1], "eager", "fp32", [*exact, field[0]]),
        ]
        more = [
            (main[0], "eager", "fp32", list(CASES)),
            (main[0], "compiled", "fp32", [*exact, *quarter, "lambda 0, 25 %, predicted", *field]),
            (main[1], "eager", "fp32", [*exact, *quarter, *field]),
            (main[1], "compiled", "fp32", [*exact, *quarter, *at_zero]),
            (main[0], "eager", "bf16", [*exact, *quarter]),
            *((*row, "bf16", exact) for row in ((main[0], "compiled"), (main[1], "eager"))),
        ]
    else:  # the claim is about bfloat16 there
        quick = [(name, "compiled", "bf16", [*exact, *quarter, *field]) for name in main]
        more = [(name, mode, "bf16", list(CASES)) for name in main for mode in ("compiled", "eager")]
    more += [(name, "eager", "fp32", [*exact, field[0]]) for name in (*TOKENS, *WIDTHS)]
    wanted = {(*row[:3], name): profile for profile in (more, quick) for row in profile for name in row[3]}
    order = list(dict.fromkeys(row[:3] for row in quick + more))  # rows of one baseline together
    return [
        pytest.param(*row, id=" | ".join(row), marks=[] if wanted[row] is quick else [pytest.mark.full])
        for row in sorted(wanted, key=lambda row: (order.index(row[:3]), list(CASES).index(row[3])))
    ]


@pytest.mark.parametrize(("network", "mode", "precision", "name"), parameters())
def test_step(
    benchmark: Any, workloads: Any, length: float, network: str, mode: str, precision: str, name: str
) -> None:
    case = CASES[name]
    net, x, baseline, base = workloads(network, mode, precision)
    row = benchmark.extra_info
    row |= {"batch": list(x.shape), "parameters": sum(p.numel() for p in net.parameters()), "bound": case.bound()}
    row |= {"share": case.share, "way": case.way, "loss": case.loss}
    benchmark.group = f"{network}, {mode}, {precision}"

    loss_fn = case.build(net)
    if mode == "compiled":
        loss_fn.compile()
    run = training_step(net, loss_fn, x, precision)
    try:
        row["errors"] = errors(net, case, loss_fn, x, mode, precision)
        run()
    except Exception as error:
        if case.way == OURS:
            raise
        row["error"] = reason(error)
        benchmark.pedantic(lambda: None)
        return
    if case.way == OURS and max(row["errors"].values()) > TOLERANCE[precision]:
        pytest.fail(f"loss or gradient is wrong, so it is not timed: {row['errors']}")

    peak = peak_bytes(run, DEVICE)
    cost = flops(net, case, x, precision)
    ours, theirs = Stopwatch(run, DEVICE), Stopwatch(baseline, DEVICE)
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

    benchmark.pedantic(ours, setup=take_turns, rounds=blocks * BLOCK)
    for timed in (baseline, *[theirs] * BLOCK):
        timed()
    row |= ratio(ours.times, theirs.times)
    row |= {
        "share of bound": case.bound() / row["ratio"],
        "flops": cost,
        "flops over flow matching": cost / base["flops"],
        "FLOP/s": cost / row["seconds"],
        "peak bytes": peak,
        "peak over flow matching": peak / base["bytes"],
    }
    print(f"\n{benchmark.group}: {name}: {row['ratio']:.3f} (bound {row['bound']:.3f})")
