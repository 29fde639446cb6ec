"""Attention: scaled_dot_product_attention and nn.MultiheadAttention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from mmf_fast.dual import missing_rule, primal, register_rule, tangent, tangent_scope
from mmf_fast.ops.attention import attention_tangent


@register_rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Any, Any]:
    if dropout_p > 0:
        raise missing_rule(F.scaled_dot_product_attention, "dropout on attention weights has no rule, use dropout_p=0")
    if enable_gqa:
        raise missing_rule(F.scaled_dot_product_attention, "enable_gqa has no rule, repeat key and value heads instead")
    if tangent(attn_mask) is not None:
        raise missing_rule(F.scaled_dot_product_attention, "a mask with a tangent has no rule")
    q, k, v, mask = primal(query), primal(key), primal(value), primal(attn_mask)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
    with tangent_scope(query, key, value):
        dy = attention_tangent(
            q, k, v, tangent(query), tangent(key), tangent(value), mask=mask, is_causal=is_causal, scale=scale
        )
        return y, dy.to(y.dtype)
