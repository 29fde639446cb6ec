"""Every rule against central differences in float64: tangent, gradient, and gradient through the tangent."""

from __future__ import annotations

import pytest
import torch
from support.operator_database import stored_alike
from support.rule_cases import CASES
from support.rule_harness import Case, tangents
from torch import Tensor

from mmf_fast.forward.dual import DetachedDual, Dual, primal

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
STEP = 1e-5
EXACT = 1e-12
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)


def close(a: list[Tensor], b: list[Tensor], tolerance: float) -> bool:
    """Largest deviation over largest entry, all results together; low-precision results by their own rounding."""
    assert [x.shape for x in a] == [x.shape for x in b] and [x.dtype for x in a] == [x.dtype for x in b]
    for x, y in zip(a, b, strict=True):
        rounding = max(tolerance, 10 * torch.finfo(x.dtype).eps if x.dtype != torch.float64 else 0)
        scale = y.abs().max().item() if y.numel() else 0.0
        if y.numel() and not (x - y).abs().max().item() <= rounding * max(scale, 1e-2):
            return False
    return True


def moved(xs: list[Tensor], dxs: list[Tensor], step: float) -> list[Tensor]:
    return [x + step * dx for x, dx in zip(xs, dxs, strict=True)]


def duals(kind: type[Dual], xs: list[Tensor], dxs: list[Tensor], chosen: tuple[bool, ...]) -> list:
    return [kind(x, dx) if carries else x for x, dx, carries in zip(xs, dxs, chosen, strict=True)]


def central_difference(case: Case, xs: list[Tensor], dxs: list[Tensor]) -> list[Tensor]:
    plus, minus = case.call(moved(xs, dxs, STEP)), case.call(moved(xs, dxs, -STEP))
    return [(p - m) / (2 * STEP) for p, m in zip(plus, minus, strict=True)]


def in_float64(case: Case) -> bool:
    return all(y.dtype == torch.float64 for y in case.call(case.variables))


@every_case
def test_primal_and_tangent(case: Case) -> None:
    xs, dxs = case.variables, case.directions()
    plain = case.call(xs)
    for chosen in case.subsets():
        direction = [dx * carries for dx, carries in zip(dxs, chosen, strict=True)]
        for kind in (Dual, DetachedDual):
            out = case.call(duals(kind, xs, dxs, chosen))
            assert close([primal(y) for y in out], plain, EXACT)
            assert all(type(y) in (kind, Tensor) for y in out)
            assert stored_alike([(x, dx) for x, dx, carries in zip(xs, dxs, chosen, strict=True) if carries], out)
            if in_float64(case):
                assert close(tangents(out), central_difference(case, xs, direction), 1e-6)
            else:  # a conversion: the tangent is the converted direction
                assert close(tangents(out), case.call(direction), 1e-6)


@every_case
def test_spellings_agree(case: Case) -> None:
    assert case.functions
    xs, dxs = case.variables, case.directions()
    everything = (True,) * len(xs)
    first = tangents(case.call(duals(Dual, xs, dxs, everything)))
    for function in case.functions[1:]:
        out = case.call(duals(Dual, xs, dxs, everything), function)
        assert close([primal(y) for y in out], case.call(xs, function), EXACT)
        assert close(tangents(out), first, EXACT)


@every_case
def test_gradient_through_the_tangent(case: Case) -> None:
    """The gradient of <g, y> + <h, dy> with respect to primals and tangents, against central differences of it."""
    if not in_float64(case):
        pytest.skip("a conversion to low precision: finite differences cannot see it")
    g = [torch.randn_like(y) for y in case.call(case.variables)]
    h = [torch.randn_like(y) for y in g]

    def functional(xs: list[Tensor], dxs: list[Tensor], chosen: tuple[bool, ...]) -> Tensor:
        out = case.call(duals(Dual, xs, dxs, chosen))
        value = sum((g_i * primal(y)).sum() for g_i, y in zip(g, out, strict=True))
        return value + sum((h_i * dy).sum() for h_i, dy in zip(h, tangents(out), strict=True))

    for chosen in case.subsets():
        leaves = [t.requires_grad_() for t in (*case.variables, *case.directions())]
        n = len(leaves) // 2
        loss = functional(leaves[:n], leaves[n:], chosen)
        if not loss.requires_grad:
            continue  # a piecewise constant result
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            ways = [*case.directions(1), *case.directions(2)]
            plus, minus = (moved(leaves, ways, sign * STEP) for sign in (1, -1))
            expected = (functional(plus[:n], plus[n:], chosen) - functional(minus[:n], minus[n:], chosen)) / (2 * STEP)
            actual = sum((a * b).sum() for a, b in zip(gradients, ways, strict=True))
            scale = torch.cat([a.flatten() for a in gradients]).norm()
        assert abs(actual - expected) <= 1e-6 * max(abs(expected), scale)


@every_case
def test_detached_tangent_leaves_the_primal_gradient_alone(case: Case) -> None:
    """SG_0: the tangent has no graph; the gradient of the primal is the ordinary one, to the last bit but rounding."""
    xs = [x.requires_grad_() for x in case.variables]
    out = case.call(duals(DetachedDual, xs, case.directions(), (True,) * len(xs)))
    assert not any(dy.requires_grad for dy in tangents(out))
    plain = case.call(xs)
    g = [torch.randn_like(y) for y in plain]
    used = [i for i, y in enumerate(plain) if y.requires_grad]
    assert used == [i for i, y in enumerate(out) if primal(y).requires_grad]
    if not used:
        return
    through_dual, ordinary = (
        torch.autograd.grad(
            [results[i] for i in used], xs, [g[i] for i in used], allow_unused=True, materialize_grads=True
        )
        for results in ([primal(y) for y in out], plain)
    )
    assert close(list(through_dual), list(ordinary), EXACT)
