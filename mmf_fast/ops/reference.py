"""The specification of the fused operators: each in plain PyTorch, as its formula is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


# -- modulated layer norm --------------------------------------------------------------------------------------------


def modulated_layer_norm(
    x: Tensor,
    dx: Tensor | None,
    gain: Tensor | None,
    dgain: Tensor | None,
    bias: Tensor | None,
    dbias: Tensor | None,
    rms: bool,
    eps: float,
    tangent_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """y = x^ a + b and y' = x^' a + x^ a' + b', with x^ = (x - mean) r over the last dimension (mean = 0 if rms),
    r = 1 / sqrt(mean((x - mean)^2) + eps), x^' = r (x' - mean(x') - x^ mean(x^ x')).

    x, dx (R, D); gain a, bias b and their tangents (G, D), each for R / G consecutive rows; None is 1 for the gain and
    0 for all else. y' is empty (0,) when no tangent is given.
    """
    x_hat, d_hat, _, _ = _standardised(x, dx, rms, eps)
    a, da, b, db = (_rows(p, x) for p in (gain, dgain, bias, dbias))
    return _affine(x_hat, d_hat, a, da, b, db, x.dtype)


def modulated_layer_norm_backward(
    g: Tensor | None,
    h: Tensor | None,
    x: Tensor,
    dx: Tensor | None,
    gain: Tensor | None,
    dgain: Tensor | None,
    bias: Tensor | None,
    dbias: Tensor | None,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What x, dx, gain, dgain, bias and dbias receive from the cotangents g of y and h of y'; empty (0,) for absent
    ones. With J = r (I - 1 1^T / D - x^ x^^T / D), G = g a + h a' and H = h a:

        g_x' = J H,   g_x = J G - r (mean(x^ x') J H + mean(x^ H) x^' + mean(H x^') x^)
        g_a = sum(g x^ + h x^'),   g_a' = sum(h x^),   g_b = sum(g),   g_b' = sum(h)      (sums over rows)
    """
    x_hat, d_hat, r, m2 = _standardised(x, dx, rms, eps)
    a, da = _rows(gain, x), _rows(dgain, x)
    g, h = _wide(g), _wide(h)
    g_x, g_dx = _standardised_backward(_times(g, a, h, da), _times(h, a), x_hat, d_hat, r, m2, rms)

    def to_rows(of: Tensor | None, like: Tensor | None) -> Tensor:
        if like is None or of is None:
            return x.new_empty(0)
        return of.view(len(like), -1, of.shape[-1]).sum(1).to(x.dtype)

    return (
        x.new_zeros(x.shape) if g_x is None else g_x.to(x.dtype),
        x.new_empty(0) if dx is None or g_dx is None else g_dx.to(x.dtype),
        to_rows(_times(g, x_hat, h, d_hat), gain),
        to_rows(_times(h, x_hat), dgain),
        to_rows(g if g is not None else torch.zeros_like(x_hat), bias),
        to_rows(h, dbias),
    )


def _standardised(x: Tensor, dx: Tensor | None, rms: bool, eps: float) -> tuple[Tensor, Any, Tensor, Any]:
    """x^, x^', r and mean(x^ x') over the last dimension, at least in float32."""
    x, dx = _wide(x), _wide(dx)
    centred = x if rms else x - x.mean(-1, keepdim=True)
    r = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    x_hat = centred * r
    if dx is None:
        return x_hat, None, r, None
    m2 = (x_hat * dx).mean(-1, keepdim=True)
    dx = dx if rms else dx - dx.mean(-1, keepdim=True)
    return x_hat, r * (dx - x_hat * m2), r, m2


def _standardised_backward(
    G: Tensor | None, H: Tensor | None, x_hat: Tensor, d_hat: Tensor | None, r: Tensor, m2: Tensor | None, rms: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(g_x, g_x') from the cotangents G of x^ and H of x^'."""

    def jacobian(v: Tensor | None) -> Any:
        if v is None:
            return None
        return r * (v - (0 if rms else v.mean(-1, keepdim=True)) - x_hat * (x_hat * v).mean(-1, keepdim=True))

    g_x, g_dx = jacobian(G), jacobian(H)
    if H is not None and d_hat is not None:
        second = m2 * g_dx + (x_hat * H).mean(-1, keepdim=True) * d_hat + (H * d_hat).mean(-1, keepdim=True) * x_hat
        g_x = -r * second if g_x is None else g_x - r * second
    return g_x, g_dx


def _affine(x_hat: Tensor, d_hat: Any, a: Any, da: Any, b: Any, db: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    y, dy = x_hat if a is None else x_hat * a, d_hat
    if d_hat is not None and a is not None:
        dy = d_hat * a
    for term in (None if da is None else x_hat * da, db):
        dy = term if dy is None else dy if term is None else dy + term
    y = y if b is None else y + b
    return y.to(dtype), x_hat.new_empty(0, dtype=dtype) if dy is None else dy.expand_as(y).contiguous().to(dtype)


def _times(a: Tensor | None, b: Tensor | None, c: Tensor | None = None, d: Tensor | None = None) -> Tensor | None:
    """a b + c d; an absent b is 1, any other absent factor 0."""
    first = None if a is None else a if b is None else a * b
    second = None if c is None or d is None else c * d
    return first if second is None else second if first is None else first + second


def _wide(x: Any) -> Any:
    return None if x is None else x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(p: Tensor | None, x: Tensor) -> Tensor | None:
    """(G, D) repeated for the rows of x (R, D)."""
    return None if p is None else _wide(p).repeat_interleave(x.shape[0] // len(p), 0)
