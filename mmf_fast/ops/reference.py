"""The specification of the fused operators: each in plain PyTorch, as its formula is written."""

from __future__ import annotations

import math
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


# -- group norm and SiLU -----------------------------------------------------------------------------------------------


def group_norm_silu(
    x: Tensor,
    dx: Tensor | None,
    gain: Tensor | None,
    dgain: Tensor | None,
    bias: Tensor | None,
    dbias: Tensor | None,
    groups: int,
    eps: float,
    act: str,
    tangent_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """y = f(u) and y' = f'(u) u' with u = x^ a + b, u' = x^' a + x^ a' + b'; x^ and x^' as in modulated_layer_norm,
    over the channels of a group and all pixels.

    x, dx (B, C, ...), contiguous or channels-last; gain a, bias b and their tangents (1 or B, C). act: "silu" or
    "none". y' is empty (0,) when no tangent is given.
    """
    x_hat, d_hat, _, _ = _grouped_standardised(x, dx, groups, eps)
    a, da, b, db = _channels(x, gain, dgain, bias, dbias)
    u, du = _affine(x_hat, d_hat, a, da, b, db, x_hat.dtype)
    y, slope, _ = value_and_slopes(u, act)
    some = dx is not None or dgain is not None or dbias is not None
    return _like(y, x), _like(slope * du, x) if some else x.new_empty(0)


def group_norm_silu_backward(
    g: Tensor | None,
    h: Tensor | None,
    x: Tensor,
    dx: Tensor | None,
    gain: Tensor | None,
    dgain: Tensor | None,
    bias: Tensor | None,
    dbias: Tensor | None,
    groups: int,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the arguments receive: u gets f' g + f'' u' h and u' gets f' h; from there as in modulated_layer_norm."""
    x_hat, d_hat, r, m2 = _grouped_standardised(x, dx, groups, eps)
    a, da, b, db = _channels(x, gain, dgain, bias, dbias)
    u, du = _affine(x_hat, d_hat, a, da, b, db, x_hat.dtype)
    _, slope, curvature = value_and_slopes(u, act)
    of_u = _times(_wide(g), slope, _wide(h), curvature * du if h is not None and du.shape == u.shape else None)
    of_du = _times(_wide(h), slope)

    def grouped(v: Tensor | None) -> Any:
        return None if v is None else v.reshape(len(x), groups, x.shape[1] // groups * math.prod(x.shape[2:]))

    G, H = _times(of_u, a, of_du, da), _times(of_du, a)
    g_x, g_dx = _standardised_backward(grouped(G), grouped(H), grouped(x_hat), grouped(d_hat), r, m2, False)

    def to_channels(of: Tensor | None, like: Tensor | None) -> Tensor:
        if like is None or of is None:
            return x.new_empty(0)
        sums = of.flatten(2).sum(2)
        return (sums if len(like) == len(x) else sums.sum(0, keepdim=True)).to(x.dtype)

    return (
        x.new_zeros(x.shape) if g_x is None else _like(g_x.view(x.shape), x),
        x.new_empty(0) if dx is None or g_dx is None else _like(g_dx.view(x.shape), x),
        to_channels(_times(of_u, x_hat, of_du, d_hat), gain),
        to_channels(_times(of_du, x_hat), dgain),
        to_channels(of_u if of_u is not None else torch.zeros_like(x_hat), bias),
        to_channels(of_du, dbias),
    )


def _grouped_standardised(x: Tensor, dx: Tensor | None, groups: int, eps: float) -> tuple[Tensor, Any, Tensor, Any]:
    shape = (x.shape[0], groups, x.shape[1] // groups * math.prod(x.shape[2:]))
    x_hat, d_hat, r, m2 = _standardised(x.reshape(shape), None if dx is None else dx.reshape(shape), False, eps)
    return x_hat.view(x.shape), None if d_hat is None else d_hat.view(x.shape), r, m2


def _channels(x: Tensor, *parameters: Any) -> Any:
    """(1 or B, C) as (1 or B, C, 1, ...), to multiply x."""
    return (None if p is None else _wide(p).view(*p.shape, *[1] * (x.ndim - 2)) for p in parameters)


def _like(y: Tensor, x: Tensor) -> Tensor:
    """y in the dtype and the memory layout of x."""
    return torch.empty_like(x).copy_(y)


# -- activations -------------------------------------------------------------------------------------------------------


def activation(x: Tensor, dx: Tensor, act: str, tangent_grad: bool = True) -> tuple[Tensor, Tensor]:
    """y = f(x) and y' = f'(x) x', elementwise. act: "silu", "gelu" or "gelu_tanh"."""
    y, slope, _ = value_and_slopes(_wide(x), act)
    return y.to(x.dtype), (slope * _wide(dx)).to(x.dtype)


def activation_backward(g: Tensor | None, h: Tensor, x: Tensor, dx: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """g_x = f' g + f'' x' h,   g_x' = f' h."""
    _, slope, curvature = value_and_slopes(_wide(x), act)
    g_x = curvature * _wide(dx) * _wide(h)
    return (g_x if g is None else g_x + slope * _wide(g)).to(x.dtype), (slope * _wide(h)).to(x.dtype)


def value_and_slopes(x: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """f, f', f'' of SiLU, GELU and its tanh approximation.

    f = x s(q), s the sigmoid:   f' = s + x s (1 - s) q',   f'' = s (1 - s) (2 q' + x ((1 - 2 s) q'^2 + q''))
    silu: q = x.   gelu_tanh: q = 2 sqrt(2 / pi) (x + 0.044715 x^3), since (1 + tanh z) / 2 = s(2 z).
    gelu: f = x Phi(x),   f' = Phi + x phi,   f'' = phi (2 - x^2).
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
    q: Tensor,
    dq: Tensor | None,
    k: Tensor,
    dk: Tensor | None,
    v: Tensor,
    dv: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    tangent_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """O = P v and O' = (P (S' - mu)) v + P v', with P = softmax(S), S = s q k^T + mask, S' = s (q' k^T + q k'^T) and
    mu = rowsum(P S').

    q, q' (B, H, N, D); k, k' (B, H, M, D); v, v' (B, H, M, E); mask (B, H, N, M), boolean (True: attend) or additive.
    A row that attends to nothing is 0. Returns O and O', the logarithm LSE of the sum of exp(S) (inf for a row that
    attends to nothing) and mu, both (B, H, N) in at least float32; O' and mu are empty (0,) when no tangent asks for
    them.
    """
    logits, d_logits = _logits(q, dq, k, dk, mask, causal, scale)
    lse = torch.logsumexp(logits, -1)
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    p = torch.exp(logits - lse[..., None])
    o = p @ _wide(v)
    d_o, mu = None, lse.new_empty(0)
    if d_logits is not None:
        mu = (p * d_logits).sum(-1)
        d_o = (p * (d_logits - mu[..., None])) @ _wide(v)
    if dv is not None:
        d_o = p @ _wide(dv) if d_o is None else d_o + p @ _wide(dv)
    return _heads(o, q), q.new_empty(0) if d_o is None else _heads(d_o, q), lse, mu


def attention_backward(
    g: Tensor | None,
    h: Tensor | None,
    q: Tensor,
    dq: Tensor | None,
    k: Tensor,
    dk: Tensor | None,
    v: Tensor,
    dv: Tensor | None,
    mask: Tensor | None,
    o: Tensor,
    d_o: Tensor | None,
    lse: Tensor,
    mu: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """What q, q', k, k', v, v' receive from the cotangents g of O and h of O' (empty (0,) for absent ones), with
    G = g v^T + h v'^T,  G' = h v^T,  H = P (S' - mu),  gam = rowsum(h O),  del = rowsum(g O + h O'):

        dS' = P (G' - gam),   dS = P (G + (G' - gam) (S' - mu) - del)
        g_q = s (dS k + dS' k'),     g_k = s (dS^T q + dS'^T q'),     g_v = P^T g + H^T h
        g_q' = s dS' k,              g_k' = s dS'^T q,                g_v' = P^T h
    """
    if h is None:
        dq = dk = dv = None
    logits, d_logits = _logits(q, dq, k, dk, mask, causal, scale)
    p, like = torch.exp(logits - lse[..., None]), o
    g, h, q, dq, k, dk, v, dv, o, d_o = map(_wide, (g, h, q, dq, k, dk, v, dv, o, d_o))

    def mm(a: Tensor | None, b: Tensor | None) -> Any:
        return 0 if a is None or b is None else a @ b

    def t(x: Tensor | None) -> Any:
        return None if x is None else x.mT

    d_p = mm(g, v.mT) + mm(h, t(dv))
    for cotangent, output in ((g, o), (h, d_o)):
        d_p = d_p if cotangent is None else d_p - (cotangent * output).sum(-1, keepdim=True)
    d_ds = p_h = None
    if d_logits is not None and h is not None and mu is not None:
        centred = d_logits - mu[..., None]
        d_ds = h @ v.mT - (h * o).sum(-1, keepdim=True)
        d_p, d_ds, p_h = d_p + d_ds * centred, p * d_ds, p * centred
    d_s = p * d_p
    grads = (
        scale * (d_s @ k + mm(d_ds, dk)),
        None if dq is None else scale * mm(d_ds, k),
        scale * (d_s.mT @ q + mm(t(d_ds), dq)),
        None if dk is None else scale * mm(t(d_ds), q),
        mm(p.mT, g) + mm(t(p_h), h) + torch.zeros_like(v),
        None if dv is None else mm(p.mT, h),
    )
    return tuple(like.new_empty(0) if x is None else _heads(x, like) for x in grads)


def _logits(
    q: Tensor, dq: Tensor | None, k: Tensor, dk: Tensor | None, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor | None]:
    q, dq, k, dk = map(_wide, (q, dq, k, dk))
    logits = (scale * q) @ k.mT
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    if causal:
        logits = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), -math.inf)
    terms = [a @ b.mT for a, b in ((dq, k), (q, dk)) if a is not None and b is not None]
    return logits, scale * sum(terms[1:], start=terms[0]) if terms else None


def _heads(x: Tensor, like: Tensor) -> Tensor:
    """x (B, H, N, D) in the dtype of `like`, laid out as (B, N, H, D): what follows merges the heads."""
    return x.to(like.dtype).transpose(1, 2).contiguous().transpose(1, 2)


# -- the loss ----------------------------------------------------------------------------------------------------------


def sg_loss(
    u: Tensor,
    du: Tensor | None,
    x: Tensor | None,
    noise: Tensor,
    interval: Tensor,
    lam: Tensor,
    p: float,
    c: float,
    tangent_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """e = u + (t - r) SG_lam[du] - (noise - x),   s_b = ||e_b||^2,   loss = mean_b s_b / stopgrad(s_b + c)^p.

    u, du (B, K); x, noise (B, K), interval t - r (B,) in at least float32; without x, `noise` is the target itself.
    Returns the loss (0-d), its terms (B,), s (B,) and e (B, K). lam acts in the backward pass only.
    """
    e = _wide(u) - noise
    e = e if x is None else e + x
    e = e if du is None else e + interval[:, None] * _wide(du)
    square = e.square().sum(1)
    per_sample = square * (square + c) ** -p
    return per_sample.mean(), per_sample, square, e


def sg_loss_backward(
    g: Tensor,
    error: Tensor,
    square: Tensor,
    interval: Tensor,
    lam: Tensor,
    p: float,
    c: float,
    tangent_grad: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """g_u = 2 g e_b / (B (s_b + c)^p),   g_du = lam (t - r) g_u."""
    scale = 2 * g / max(len(square), 1) * (square + c) ** -p
    g_u = scale[:, None] * error
    g_du = ((lam * interval * scale)[:, None] * error).to(dtype) if tangent_grad else error.new_empty(0, dtype=dtype)
    return g_u.to(dtype), g_du


# -- the path ----------------------------------------------------------------------------------------------------------


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """z_t = (1 - t) x + t noise = x + t v and v = noise - x, for x (B, K) in [-1, 1], or uint8 from 0 to 255, which is
    scaled: x / 127.5 - 1. noise (B, K) gives the dtype; t (B,)."""
    x = x.to(noise.dtype) / 127.5 - 1 if x.dtype == torch.uint8 else x.to(noise.dtype)
    v = noise - x
    return x + t.to(noise.dtype)[:, None] * v, v
