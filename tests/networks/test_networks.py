"""Other people's networks, unmodified, as Duals. make test-networks runs them all, every test run the quick ones."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from networks import checks
from networks.collection import NETWORKS, Entry

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages
every_network = pytest.mark.parametrize(
    "entry",
    [pytest.param(entry, id=name, marks=[] if entry.quick else pytest.mark.slow) for name, entry in NETWORKS.items()],
)


@every_network
def test_primal_tangent_and_the_gradient_through_it_are_exact(entry: Entry) -> None:
    assert checks.exactness(entry) < 1e-6


@every_network
def test_the_paired_loss_in_float32_is_the_one_in_float64(entry: Entry) -> None:
    assert checks.in_float32(entry) < 1e-4  # 1,000 roundings of float32


@every_network
def test_primal_and_tangent_are_dropped_alike_in_training(entry: Entry) -> None:
    assert checks.with_dropout(entry) < 1e-2  # two masks differ by about 1; an embedding in float32 costs 1e-3


@every_network
def test_bf16_autocast_errs_as_little_as_that_of_torch_func(entry: Entry) -> None:
    found, other = checks.in_bf16(entry)
    assert found < max(0.05, 2 * other)  # a dozen roundings of bfloat16


@every_network
def test_the_compiled_step_is_the_eager_one(entry: Entry) -> None:
    if not entry.compiles:
        with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
            checks.compiled_alone(entry)
        return
    assert checks.compiled(entry) < (1e-6 if entry.float32_parts else 1e-9)
