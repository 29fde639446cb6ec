"""The specification of the fused operators, each written in plain PyTorch as its formula is.

A prime marks a tangent. An absent argument (None) has no effect: a gain is then 1, everything else 0. Arithmetic is in
float32 at least; results have the dtype of x, and what belongs to an absent argument is empty, (0,). g and h are the
cotangents of y and y'; g_x is what x receives from them, the gradient of sum(g y) + sum(h y') in x.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# -- layer norm and RMS norm -------------------------------------------------------------------------------------------


def modulated_layer_norm(
    x: Tensor, dx: Tensor | None, gain: Tensor | None, dgain: Tensor | None, bias: Tensor | None, dbias: Tensor | None,
    rms: bool, eps: float, tangent_grad: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = x^ a + b,   y' = x^' a + x^ a' + b'            with x^ and x^' of `standardise`, over the last dimension.

    x, dx (R, D); gain a, bias b and their tangents (G, D), each for R / G consecutive rows.
    """
    x_hat, d_hat, _, _ = standardise(_wide(x), _or_zero(dx, x), rms, eps)
    a, da, b, db = (_for_rows(p, x, absent) for p, absent in ((gain, 1), (dgain, 0), (bias, 0), (dbias, 0)))
    y = x_hat * a + b
    dy = d_hat * a + x_hat * da + db
    return y.to(x.dtype), _present(dy.to(x.dtype), dx, dgain, dbias)


def modulated_layer_norm_backward(
    g: Tensor | None, h: Tensor | None, x: Tensor, dx: Tensor | None, gain: Tensor | None, dgain: Tensor | None,
    bias: Tensor | None, dbias: Tensor | None, rms: bool, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """g_a = sum(g x^ + h x^'),   g_a' = sum(h x^),   g_b = sum(g),   g_b' = sum(h)    (sums over the rows of a group)

    g_x and g_x' are those of `standardise_backward` for G = g a + h a' and H = h a. Returns what x, dx, gain, dgain,
    bias and dbias receive.
    """
    if h is None:
        dx = dgain = dbias = None
    x_hat, d_hat, r, m = standardise(_wide(x), _or_zero(dx, x), rms, eps)
    a, da = _for_rows(gain, x, 1), _for_rows(dgain, x, 0)
    g, h = _or_zero(g, x), _or_zero(h, x)
    g_x, g_dx = standardise_backward(g * a + h * da, h * a, x_hat, d_hat, r, m, rms)

    def summed(rows: Tensor, p: Tensor | None) -> Tensor:
        groups = 1 if p is None else len(p)
        return _present(rows.unflatten(0, (groups, len(x) // groups)).sum(1).to(x.dtype), p)

    of_gain, of_dgain = summed(g * x_hat + h * d_hat, gain), summed(h * x_hat, dgain)
    return g_x.to(x.dtype), _present(g_dx.to(x.dtype), dx), of_gain, of_dgain, summed(g, bias), summed(h, dbias)


def standardise(x: Tensor, dx: Tensor, rms: bool, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r  = 1 / sqrt(mean((x - mean(x))^2) + eps)            means over the last dimension; mean(x) is 0 for RMS norm
    x^  = r (x - mean(x))
    x^' = r (x' - mean(x') - x^ mean(x^ x'))

    Returns x^, x^', r and m = mean(x^ x').
    """
    centred = x - _mean(x, rms)
    r = torch.rsqrt(_mean(centred * centred) + eps)
    x_hat = r * centred
    m = _mean(x_hat * dx)
    return x_hat, r * (dx - _mean(dx, rms) - x_hat * m), r, m


def standardise_backward(
    G: Tensor, H: Tensor, x_hat: Tensor, d_hat: Tensor, r: Tensor, m: Tensor, rms: bool
) -> tuple[Tensor, Tensor]:
    """J v  = r (v - mean(v) - x^ mean(x^ v))
    g_x' = J H
    g_x  = J G - r (m J H + mean(x^ H) x^' + mean(H x^') x^)        for the cotangents G of x^ and H of x^'
    """

    def J(v: Tensor) -> Tensor:
        return r * (v - _mean(v, rms) - x_hat * _mean(x_hat * v))

    return J(G) - r * (m * J(H) + _mean(x_hat * H) * d_hat + _mean(H * d_hat) * x_hat), J(H)


def _mean(v: Tensor, rms: bool = False) -> Tensor:
    return torch.zeros_like(v[..., :1]) if rms else v.mean(-1, keepdim=True)


def _for_rows(p: Tensor | None, x: Tensor, absent: float) -> Tensor:
    """(G, D) repeated for the rows of x (R, D)."""
    if p is None:
        return torch.full_like(_wide(x), absent)
    return _wide(p).repeat_interleave(len(x) // len(p), 0)


# -- group norm and SiLU -----------------------------------------------------------------------------------------------


def group_norm_silu(
    x: Tensor, dx: Tensor | None, gain: Tensor | None, dgain: Tensor | None, bias: Tensor | None, dbias: Tensor | None,
    groups: int, eps: float, act: str, tangent_grad: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """u = x^ a + b,   u' = x^' a + x^ a' + b',   y = f(u),   y' = f'(u) u'

    with x^ and x^' of `standardise`, over the channels of a group and all pixels. x, dx (B, C, ...), contiguous or
    channels-last; gain a, bias b and their tangents (1 or B, C). f: act, "silu" or "none".
    """
    x_hat, d_hat, _, _ = _standardise_groups(x, dx, groups, eps)
    a, da, b, db = (_for_pixels(p, x, absent) for p, absent in ((gain, 1), (dgain, 0), (bias, 0), (dbias, 0)))
    y, slope, _ = value_and_slopes(x_hat * a + b, act)
    dy = slope * (d_hat * a + x_hat * da + db)
    return _like(y, x), _present(_like(dy, x), dx, dgain, dbias)


def group_norm_silu_backward(
    g: Tensor | None, h: Tensor | None, x: Tensor, dx: Tensor | None, gain: Tensor | None, dgain: Tensor | None,
    bias: Tensor | None, dbias: Tensor | None, groups: int, eps: float, act: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """g_u = f' g + f'' u' h,   g_u' = f' h

    From there as in `modulated_layer_norm_backward`, with sums over pixels.
    """
    if h is None:
        dx = dgain = dbias = None
    x_hat, d_hat, r, m = _standardise_groups(x, dx, groups, eps)
    a, da, b, db = (_for_pixels(p, x, absent) for p, absent in ((gain, 1), (dgain, 0), (bias, 0), (dbias, 0)))
    _, slope, curvature = value_and_slopes(x_hat * a + b, act)
    g, h = _or_zero(g, x), _or_zero(h, x)
    of_u = slope * g + curvature * (d_hat * a + x_hat * da + db) * h
    of_du = slope * h
    G, H, x_hat_g, d_hat_g = (_grouped(v, groups) for v in (of_u * a + of_du * da, of_du * a, x_hat, d_hat))
    g_x, g_dx = (_like(v.view(x.shape), x) for v in standardise_backward(G, H, x_hat_g, d_hat_g, r, m, False))

    def summed(of_channel: Tensor, p: Tensor | None) -> Tensor:
        sums = of_channel.flatten(2).sum(2)
        sums = sums if p is None or len(p) == len(x) else sums.sum(0, keepdim=True)
        return _present(sums.to(x.dtype if p is None else p.dtype), p)

    of_gain, of_dgain = summed(of_u * x_hat + of_du * d_hat, gain), summed(of_du * x_hat, dgain)
    return g_x, _present(g_dx, dx), of_gain, of_dgain, summed(of_u, bias), summed(of_du, dbias)


def _standardise_groups(x: Tensor, dx: Tensor | None, groups: int, eps: float) -> tuple[Tensor, ...]:
    """`standardise` over channels and pixels of a group: x^ and x^' like x, r and m (B, groups, 1)."""
    rows, d_rows = _grouped(_wide(x), groups), _grouped(_or_zero(dx, x), groups)
    x_hat, d_hat, r, m = standardise(rows, d_rows, False, eps)
    return x_hat.view(x.shape), d_hat.view(x.shape), r, m


def _grouped(v: Tensor, groups: int) -> Tensor:
    """(B, C, ...) as (B, groups, elements of a group)."""
    return v.reshape(len(v), groups, v.shape[1] // groups * math.prod(v.shape[2:]))


def _for_pixels(p: Tensor | None, x: Tensor, absent: float) -> Tensor:
    """(1 or B, C) as (1 or B, C, 1, ...), to multiply x."""
    p = _wide(x).new_full((1, x.shape[1]), absent) if p is None else _wide(p)
    return p.view(*p.shape, *[1] * (x.ndim - 2))


# -- activations -------------------------------------------------------------------------------------------------------


def activation(x: Tensor, dx: Tensor, act: str, tangent_grad: bool = True) -> tuple[Tensor, Tensor]:
    """y = f(x),   y' = f'(x) x'        elementwise. f: act, "silu", "gelu" or "gelu_tanh"."""
    y, slope, _ = value_and_slopes(_wide(x), act)
    return y.to(x.dtype), (slope * _wide(dx)).to(x.dtype)


def activation_backward(g: Tensor | None, h: Tensor, x: Tensor, dx: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """g_x = f' g + f'' x' h,   g_x' = f' h"""
    _, slope, curvature = value_and_slopes(_wide(x), act)
    g_x = slope * _or_zero(g, x) + curvature * _wide(dx) * _wide(h)
    return g_x.to(x.dtype), (slope * _wide(h)).to(x.dtype)


def value_and_slopes(x: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """gelu:              f = x Phi(x),   f' = Phi + x phi,           f'' = phi (2 - x^2)
    silu, gelu_tanh:   f = x s(q),     f' = s + x s (1 - s) q',    f'' = s (1 - s) (2 q' + x ((1 - 2 s) q'^2 + q''))

    s is the sigmoid; q = x for silu, 2 sqrt(2 / pi) (x + 0.044715 x^3) for gelu_tanh, since (1 + tanh z) / 2 = s(2 z).
    Returns f, f', f''.
    """
    if act == "none":
        return x, torch.ones_like(x), torch.zeros_like(x)
    near = x.clamp(-40, 40) if act != "silu" else x  # beyond, f' is constant and the powers of x must not overflow
    if act == "gelu":
        cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        pdf = torch.exp(-0.5 * near * near) / math.sqrt(2 * math.pi)
        return x * cdf, cdf + near * pdf, pdf * (2 - near * near)
    if act == "silu":
        q, q1, q2 = x, torch.ones_like(x), torch.zeros_like(x)
    elif act == "gelu_tanh":
        k, a = 2 * math.sqrt(2 / math.pi), 0.044715
        q, q1, q2 = k * (near + a * near**3), k * (1 + 3 * a * near * near), 6 * a * k * near
    else:
        raise ValueError(f"unknown activation {act!r}: choose silu, gelu, gelu_tanh or none")
    s = torch.sigmoid(q)
    ss = s * (1 - s)
    return x * s, s + near * ss * q1, ss * (2 * q1 + near * ((1 - 2 * s) * q1 * q1 + q2))


# -- attention ---------------------------------------------------------------------------------------------------------


def attention(
    q: Tensor, dq: Tensor | None, k: Tensor, dk: Tensor | None, v: Tensor, dv: Tensor | None, mask: Tensor | None,
    causal: bool, scale: float, tangent_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """S = s q k^T + mask,   P = softmax(S) = exp(S - LSE),   O = P v
    S' = s (q' k^T + q k'^T),   mu = rowsum(P S'),   H = P (S' - mu),   O' = H v + P v'

    q, q' (B, H, N, D); k, k' (B, H, M, D); v, v' (B, H, M, E); mask (B, H, N, M), boolean (True: attend) or additive.
    A row that attends to nothing is 0, and its LSE is inf. Returns O, O', LSE and mu, the last two (B, H, N).
    """
    S, dS = _logits(q, dq, k, dk, mask, causal, scale)
    lse = torch.logsumexp(S, -1)
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    P = torch.exp(S - lse[..., None])
    mu = (P * dS).sum(-1)
    H = P * (dS - mu[..., None])
    o = P @ _wide(v)
    d_o = H @ _wide(v) + P @ _or_zero(dv, v)
    return _heads(o, q), _present(_heads(d_o, q), dq, dk, dv), lse, _present(mu, dq, dk)


def attention_backward(
    g: Tensor | None, h: Tensor | None, q: Tensor, dq: Tensor | None, k: Tensor, dk: Tensor | None, v: Tensor,
    dv: Tensor | None, mask: Tensor | None, o: Tensor, d_o: Tensor | None, lse: Tensor, mu: Tensor | None,
    causal: bool, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """G = g v^T + h v'^T,   G' = h v^T,   gam = rowsum(h O),   del = rowsum(g O + h O')

    dS' = P (G' - gam),          dS = P (G + (G' - gam) (S' - mu) - del)
    g_q = s (dS k + dS' k'),     g_k = s (dS^T q + dS'^T q'),     g_v = P^T g + H^T h
    g_q' = s dS' k,              g_k' = s dS'^T q,                g_v' = P^T h

    Returns what q, q', k, k', v, v' receive.
    """
    if h is None:
        dq = dk = dv = None
    S, dS = _logits(q, dq, k, dk, mask, causal, scale)
    P = torch.exp(S - lse[..., None])
    centred = dS - (0 if dq is None and dk is None else mu[..., None])  # type: ignore[index]
    H = P * centred
    given, like = (dq, dk, dv), o
    g, h, d_o, dq, dk, dv = (_or_zero(a, b) for a, b in ((g, o), (h, o), (d_o, o), (dq, q), (dk, k), (dv, v)))
    q, k, v, o = map(_wide, (q, k, v, o))

    gam, delta = (h * o).sum(-1, keepdim=True), (g * o + h * d_o).sum(-1, keepdim=True)
    of_dS = P * (h @ v.mT - gam)
    of_S = P * (g @ v.mT + h @ dv.mT + (h @ v.mT - gam) * centred - delta)
    return (
        _heads(scale * (of_S @ k + of_dS @ dk), like),
        _present(_heads(scale * of_dS @ k, like), given[0]),
        _heads(scale * (of_S.mT @ q + of_dS.mT @ dq), like),
        _present(_heads(scale * of_dS.mT @ q, like), given[1]),
        _heads(P.mT @ g + H.mT @ h, like),
        _present(_heads(P.mT @ h, like), given[2]),
    )


def _logits(
    q: Tensor, dq: Tensor | None, k: Tensor, dk: Tensor | None, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """S = s q k^T + mask and S' = s (q' k^T + q k'^T)."""
    S = scale * _wide(q) @ _wide(k).mT
    if mask is not None:
        S = S.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else S + mask
    if causal:
        S = S.masked_fill(~torch.ones_like(S, dtype=torch.bool).tril(), -math.inf)
    return S, scale * (_or_zero(dq, q) @ _wide(k).mT + _wide(q) @ _or_zero(dk, k).mT)


def _heads(x: Tensor, like: Tensor) -> Tensor:
    """x (B, H, N, D) in the dtype of `like`, in memory as (B, N, H, D): what follows attention merges the heads."""
    return x.to(like.dtype).transpose(1, 2).contiguous().transpose(1, 2)


# -- the loss ----------------------------------------------------------------------------------------------------------


def sg_loss(
    u: Tensor, du: Tensor | None, target: Tensor, interval: Tensor, lam: Tensor, p: float, c: float,
    tangent_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """e = u + (t - r) SG_lam[du] - target,   s_b = ||e_b||^2,   loss = mean_b s_b / stopgrad(s_b + c)^p

    u, du (B, K); target (B, K), interval t - r (B,) in at least float32. Returns the loss (0-d), its terms (B,) and
    s (B,). lam acts in the backward pass only.
    """
    square = _loss_error(u, du, target, interval).square().sum(1)
    per_sample = square * (square + c) ** -p
    return per_sample.mean(), per_sample, square


def sg_loss_backward(
    g: Tensor, u: Tensor, du: Tensor | None, target: Tensor, square: Tensor, interval: Tensor, lam: Tensor, p: float,
    c: float, tangent_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """g_u = 2 g e_b / (B (s_b + c)^p),   g_du = lam (t - r) g_u"""
    weight = 2 * g / max(len(square), 1) * (square + c) ** -p
    g_u = weight[:, None] * _loss_error(u, du, target, interval)
    g_du = (lam * interval)[:, None] * g_u
    return g_u.to(u.dtype), g_du.to(u.dtype) if tangent_grad else u.new_empty(0)


def _loss_error(u: Tensor, du: Tensor | None, target: Tensor, interval: Tensor) -> Tensor:
    return _wide(u) - target + interval[:, None] * _or_zero(du, u)


# -- absent arguments, precision, layout -------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _or_zero(x: Tensor | None, like: Tensor) -> Tensor:
    return _wide(torch.zeros_like(like) if x is None else x)


def _present(result: Tensor, *arguments: Any) -> Tensor:
    """The result, if one of the arguments that it belongs to is there; else an empty one."""
    return result.new_empty(0) if all(x is None for x in arguments) else result


def _like(y: Tensor, x: Tensor) -> Tensor:
    """y in the dtype and the memory layout of x."""
    return torch.empty_like(x).copy_(y)
