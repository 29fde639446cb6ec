"""The gate: every operator of PyTorch's own database, on Duals, against differences. None may be wrong.

docs/operators.md says what becomes of each with the pinned PyTorch; `make operators` writes it. Other versions may add
and lose operators: of them only wrong answers are errors.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.operator_database import OPERATORS, SAMPLES, name_of, read_page, row, section
from support.rule_cases import CASES
from torch import Tensor

from mmf_fast.forward import dual

PAGE = Path(__file__).parents[3] / "docs" / "operators.md"
PINNED = "2.13"
ON_PAGE = read_page(PAGE.read_text())
is_pinned = torch.__version__.startswith(PINNED)

# PyTorch differentiates them forward, and we refuse them: in both kinds, or in the graph.
REFUSED = {
    *("_batch_norm_with_update", "_native_batch_norm_legit", "native_batch_norm"),  # F.batch_norm has a rule
    *("max_pool2d_with_indices_backward", "linalg.lstsq:grad_oriented", "nn.functional.linear_cross_entropy"),
    "nn.functional.multi_head_attention_forward",  # some options of it
}
ONLY_WITHOUT_GRAPH = {"linalg.det", "linalg.eig", "linalg.householder_product"}


@pytest.mark.parametrize("op", OPERATORS, ids=name_of)
def test_an_operator_is_right_or_refused_as_the_page_says(op) -> None:  # type: ignore[no-untyped-def]
    found = row(op, SAMPLES)
    assert not found.wrong
    if is_pinned:
        assert section(found) == ON_PAGE.get(found.name), "run `make operators`"


@pytest.mark.skipif(not is_pinned, reason=f"the page is of PyTorch {PINNED}")
def test_the_page_lists_every_operator() -> None:
    assert set(ON_PAGE) == {name_of(op) for op in OPERATORS}


@pytest.mark.skipif(not is_pinned, reason=f"the page is of PyTorch {PINNED}")
def test_what_pytorch_differentiates_and_duals_do_not_is_a_short_list() -> None:
    ours = {name_of(op): ON_PAGE[name_of(op)] for op in OPERATORS if op.supports_forward_ad}
    assert {name for name, title in ours.items() if title.startswith("Refused")} == REFUSED
    assert {name for name, title in ours.items() if "without a graph only" in title} == ONLY_WITHOUT_GRAPH
    assert len(REFUSED | ONLY_WITHOUT_GRAPH) <= 10


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATORS, ids=name_of)
def test_on_all_its_samples(op) -> None:  # type: ignore[no-untyped-def]
    found = row(op, None)
    assert not found.wrong


def test_every_rule_is_tested_here_or_in_the_table() -> None:
    tested = {_stem(f) for case in CASES for f in case.functions}
    tested |= {_stem(f) for op in OPERATORS for f in (op.op, op.method_variant, *op.aliases) if f is not None}
    tested |= {name_of(op).rpartition(".")[2].partition(":")[0] for op in OPERATORS}  # some are lambdas
    tested |= {alias.name.rpartition(".")[2] for op in OPERATORS for alias in op.aliases}
    unreachable = {F.sigmoid, F.tanh, Tensor.unflatten, Tensor.norm, Tensor.split, Tensor.pow}  # lead to torch.*
    tested |= {"copy", "zero", "__setitem__"}  # in test_in_place.py, as are all that write what these give
    missed = {_stem(f) for f in set(dual._RULES) - unreachable - {Tensor.cuda, Tensor.pin_memory}} - tested
    assert not missed, f"rules that no test reaches: {missed}"


def _stem(function: object) -> str:
    name = getattr(function, "__name__", str(function))
    name = name if name.startswith("__") else name.removesuffix("_")  # add_ writes what add gives
    return name.removeprefix("special_").removeprefix("linalg_").removeprefix("fft_")
