"""The tangent of softmax attention.

S = s q k^T,  P = softmax(S + mask),  S' = s (q' k^T + q k'^T),  mu = rowsum(P * S')
O = P v,      O' = (P * (S' - mu)) v + P v' = (P * S') v - mu O + P v'
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """O' of O = softmax(s q k^T + mask) v for tangents of q, k, v (None: zero).

    q: (..., N, D). k: (..., M, D). v: (..., M, E). mask: boolean (True: attend) or additive, broadcast to (..., N, M).
    Returns (..., N, E). scale: s, by default 1/sqrt(D).
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    logits = scale * q @ k.mT
    if is_causal:
        allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        logits = logits.masked_fill(~allowed, -math.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    p = torch.softmax(logits, -1)
    if mask is not None and mask.dtype == torch.bool:
        p = p.masked_fill(~mask.any(-1, keepdim=True), 0.0)  # a row that attends to nothing is 0, as in SDPA

    parts = []
    if dq is not None or dk is not None:
        d_logits = None if dq is None else scale * dq @ k.mT
        if dk is not None:
            from_k = scale * q @ dk.mT
            d_logits = from_k if d_logits is None else d_logits + from_k
        d_p = torch.ops.aten._softmax_backward_data(d_logits, p, -1, p.dtype)
        parts.append(d_p @ v)
    if dv is not None:
        parts.append(p @ dv)
    return sum(parts[1:], start=parts[0])
