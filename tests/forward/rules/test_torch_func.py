"""Agreement with torch.func.jvp where it is right, and the places where it is wrong, so that a repair is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.rule_cases import CASES
from support.rule_harness import Case, normal, tangents
from torch import Tensor

from mmf_fast.forward.dual import Dual, tangent

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NO_FORWARD_DERIVATIVE = {"scaled_dot_product_attention", "multi_head_attention_forward", "grid_sample"}
ROUNDS_TO_FLOAT32 = {"hardsigmoid", "celu"}  # a constant of the derivative is kept in single precision
DROPS_THE_TANGENT = {"view"}  # of x.view(dtype), whose tangent comes out as zero


def func_jvp(case: Case) -> list[Tensor]:
    def results(*xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(case.call(list(xs)))

    return list(torch.func.jvp(results, tuple(case.variables), tuple(case.directions()))[1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_tangents_agree(case: Case) -> None:
    xs, dxs = case.variables, case.directions()
    if any(y.dtype != torch.float64 for y in case.call(xs)):
        pytest.skip("a conversion to low precision")
    name = case.label.rpartition("-")[0]
    try:
        expected = func_jvp(case)
    except NotImplementedError:
        assert name in NO_FORWARD_DERIVATIVE
        return
    tolerance = 1e-7 if name in ROUNDS_TO_FLOAT32 else 1e-12
    for dy, reference in zip(
        tangents(case.call([Dual(x, dx) for x, dx in zip(xs, dxs, strict=True)])), expected, strict=True
    ):
        if name in DROPS_THE_TANGENT and not reference.any():
            continue
        assert (dy - reference).abs().max() <= tolerance * max(1.0, reference.abs().max().item())


IMAGES = normal(4, 3, 5)
NORMS = {
    "layer_norm": lambda x: F.layer_norm(x, (5,)),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "instance_norm": lambda x: F.instance_norm(x),
}


@pytest.mark.parametrize("name", NORMS)
def test_gradient_through_the_tangent_of_a_norm_is_wrong_in_torch_func(name: str) -> None:
    """pytorch #196700. The same functional's gradient through Duals equals central differences (see test_table)."""
    norm, dx, h = NORMS[name], normal(4, 3, 5), normal(4, 3, 5)

    def gradient(tangent_of: Callable[[Tensor], Tensor | None]) -> Tensor:
        x = IMAGES.clone().requires_grad_()
        return torch.autograd.grad((h * tangent_of(x)).sum(), x)[0]

    right = gradient(lambda x: tangent(norm(Dual(x, dx))))
    func = gradient(lambda x: torch.func.jvp(norm, (x,), (dx,))[1])
    assert (func - right).norm() > 0.1 * right.norm(), (
        f"torch.func.jvp now differentiates {name} rightly: foreign.py need not decompose it for this torch"
    )
