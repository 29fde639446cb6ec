"""Peak memory of a training step over that of flow matching: pytest benchmarks/test_memory.py

Bytes that tensors held at once in loss, backward and optimizer, beyond weights and moments; eager, for sequences of 64
to 4,096 tokens (4,096 tokens in all), where attention written out keeps whole maps of logits and their tangents.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from benchmarks.cases import CASES, FLOW_MATCHING, TOKENS
from benchmarks.measure import peak_bytes, training_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["lambda 0, 100 %", "lambda 1, 100 %", *(name for name, case in CASES.items() if case.way == "torch.func.jvp")]


@functools.cache
def of_flow_matching(network: str) -> int:
    return peak(network, FLOW_MATCHING)


def peak(network: str, case: Any) -> int:
    net = TOKENS[network].make(DEVICE)
    run = training_step(net, case.build(net), TOKENS[network].data(DEVICE), "fp32")
    run()  # the first step allocates the optimizer's moments
    return peak_bytes(run, DEVICE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "network", [pytest.param(name, marks=[pytest.mark.full] if " 4096 " in name else []) for name in TOKENS]
)
def test_memory(benchmark: Any, network: str, name: str) -> None:
    benchmark.group = f"memory, {network}"
    found = benchmark.pedantic(peak, args=(network, CASES[name]), rounds=1)
    row = {
        "network": network,
        "name": name,
        "peak bytes": found,
        "over flow matching": found / of_flow_matching(network),
    }
    benchmark.extra_info |= row
    print(f"\n{network}, {name}: {found / 1e6:.0f} MB, {row['over flow matching']:.2f}")
