"""Solves, factors and eigenvalues, by hand where the gradient through PyTorch's own tangent is wrong: it keeps the
saved factors as constants. Here every tangent is made of functions that autograd differentiates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmf_fast.forward.dual import Value, primal, register_rule, tangent, tangent_scope
from mmf_fast.forward.rules.families import add_tangents, rule


def _minus_product(dA: Tensor | None, X: Tensor, left: bool) -> Tensor | None:
    return None if dA is None else -(dA @ X if left else X @ dA)


def _solve(function: Any, A: Value, B: Value, left: bool, **kwargs: Any) -> tuple[Any, Any, Any]:
    """A X = B:  dX = A^-1 (dB - dA X).  (what function returns, X, dX)"""
    a, b = primal(A), primal(B)
    out = function(a, b, left=left, **kwargs)
    X = out if isinstance(out, Tensor) else out[0]
    is_vector = b.ndim == 1 or (b.ndim == a.ndim - 1 and b.shape == a.shape[:-1])
    with tangent_scope(A, B):
        columns, dB = (X[..., None] if is_vector else X), tangent(B)
        if dB is not None and is_vector:
            dB = dB[..., None]
        right = add_tangents(dB, _minus_product(tangent(A), columns, left))
        dX = torch.linalg.solve(a, right, left=left)
        return out, X, dX[..., 0] if is_vector else dX


@register_rule(torch.linalg.solve)
def solve(A: Value, B: Value, *, left: bool = True) -> tuple[Any, Any]:
    _, X, dX = _solve(torch.linalg.solve, A, B, left)
    return X, dX


@register_rule(torch.linalg.solve_ex)
def solve_ex(A: Value, B: Value, *, left: bool = True, check_errors: bool = False) -> tuple[Any, Any]:
    out, _, dX = _solve(torch.linalg.solve_ex, A, B, left, check_errors=check_errors)
    return out, (dX, None)


@register_rule(torch.linalg.tensorsolve)
def tensorsolve(A: Value, B: Value, dims: Any = None) -> Any:
    if dims is not None:
        A = A.movedim(tuple(dims), tuple(range(-len(dims), 0)))
    shape = A.shape[B.ndim :]
    return torch.linalg.solve(A.reshape(shape.numel(), -1), B.flatten()).reshape(shape)


@rule("triangular_solve")
def triangular_solve(
    input: Value, A: Value, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> tuple[Any, Any]:
    T, coefficient = (A.mT if transpose else A), A.clone()
    X = torch.linalg.solve_triangular(T, input, upper=upper != transpose, unitriangular=unitriangular)
    both = torch.return_types.triangular_solve((primal(X), primal(coefficient)))
    return both, (tangent(X), tangent(coefficient))


# -- Cholesky factors --------------------------------------------------------------------------------------------------


def _factor_tangent(L: Tensor, dA: Tensor) -> Tensor:
    """A = L L^H:  dL = L phi(L^-1 dA L^-H), phi the lower triangle with half of its diagonal."""
    M = torch.linalg.solve_triangular(L, dA, upper=False)
    M = torch.linalg.solve_triangular(L.mH, M, upper=True, left=False)
    return L @ (M.tril() - 0.5 * M.diagonal(dim1=-2, dim2=-1).diag_embed())


@rule("cholesky")
def cholesky(input: Value, upper: bool = False) -> tuple[Any, Any]:
    L = torch.linalg.cholesky(input.primal)
    with tangent_scope(input):
        dL = _factor_tangent(L, input.tangent)
    return (L.mH, dL.mH) if upper else (L, dL)


@register_rule(torch.linalg.cholesky_ex)
def cholesky_ex(input: Value, *, upper: bool = False, check_errors: bool = False) -> tuple[Any, Any]:
    out = torch.linalg.cholesky_ex(input.primal, upper=upper, check_errors=check_errors)
    with tangent_scope(input):
        dL = _factor_tangent(out[0].mH if upper else out[0], input.tangent)
        return out, (dL.mH if upper else dL, None)


@rule("cholesky_solve")
def cholesky_solve(input: Value, input2: Value, upper: bool = False) -> Any:
    L = input2.mH if upper else input2
    return torch.linalg.solve_triangular(L.mH, torch.linalg.solve_triangular(L, input, upper=False), upper=True)


@rule("cholesky_inverse")
def cholesky_inverse(input: Value, upper: bool = False) -> Any:
    return cholesky_solve(torch.eye(input.shape[-1], dtype=input.dtype, device=input.device), input, upper)


# -- determinants, eigenvalues, pseudoinverse --------------------------------------------------------------------------


def _log_tangent(A: Value) -> Tensor:
    """d log det A = tr(A^-1 dA)."""
    return (torch.linalg.inv_ex(A.primal)[0].mT * A.tangent).sum((-2, -1))


@rule("logdet")
def logdet(input: Value) -> tuple[Any, Any]:
    y = torch.logdet(input.primal)
    with tangent_scope(input):
        return y, _log_tangent(input)


@rule("slogdet")
def slogdet(A: Value) -> tuple[Any, Any]:
    y = torch.linalg.slogdet(A.primal)
    with tangent_scope(A):
        d = _log_tangent(A)
        return y, (y[0] * 1j * d.imag, d.real) if d.is_complex() else (None, d)


@register_rule(torch.linalg.eigh)
def eigh(A: Value, UPLO: str = "L") -> tuple[Any, Any]:
    """M = V^H dA V:  d lambda = diag(M),  dV = V (M_ij / (lambda_j - lambda_i))."""
    out = values, V = torch.linalg.eigh(A.primal, UPLO)
    with tangent_scope(A):
        M = V.mH @ A.tangent @ V
        gaps = values[..., None, :] - values[..., :, None]
        on_diagonal = torch.eye(values.shape[-1], dtype=torch.bool, device=values.device)
        turn = torch.where(on_diagonal, 0.0, M / torch.where(on_diagonal, 1.0, gaps))
        d_values = M.diagonal(dim1=-2, dim2=-1)
        return out, (d_values.real if M.is_complex() else d_values, V @ turn)


@register_rule(torch.linalg.eigvalsh)
def eigvalsh(A: Value, UPLO: str = "L") -> tuple[Any, Any]:
    values, V = torch.linalg.eigh(A.primal, UPLO)
    with tangent_scope(A):
        d = (V.conj() * (A.tangent @ V)).sum(-2)
        return values, d.real if d.is_complex() else d


@rule("pinv", "pinverse")
def pinv(input: Value, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """P = A^+:  dP = -P dA P + P P^H dA^H (1 - A P) + (1 - P A) dA^H P^H P."""
    A, dA = input.primal, input.tangent
    P = torch.linalg.pinv(A, *args, **{"rtol" if name == "rcond" else name: x for name, x in kwargs.items()})
    with tangent_scope(input):
        right, left = dA.mH - (dA.mH @ A) @ P, dA.mH - P @ (A @ dA.mH)
        return P, -P @ dA @ P + P @ (P.mH @ right) + left @ (P.mH @ P)
