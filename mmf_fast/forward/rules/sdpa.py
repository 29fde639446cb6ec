"""Attention: scaled_dot_product_attention and nn.MultiheadAttention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmf_fast.forward.dual import Value, primal, register_rule, tangent, tangent_scope
from mmf_fast.forward.missing import missing_rule_error
from mmf_fast.forward.rules.families import autocasts, keeps_tangent
from mmf_fast.ops.attention import attention as dual_attention
from mmf_fast.ops.attention import attention_tangent
from mmf_fast.ops.dispatch import serve

__all__ = ["attention", "plain_mask"]


def attention(
    q: Value, k: Value, v: Value, attn_mask: Value = None, is_causal: bool = False, scale: float | None = None
) -> Any:
    """softmax(scale q k^T + attn_mask) v, of tensors or Duals: the drop-in for the attention of any network.

    q: (..., N, D). k: (..., M, D). v: (..., M, E). attn_mask: boolean (True: attend) or additive, broadcast to
    (..., N, M). scale: by default 1/sqrt(D). Returns (..., N, E), a Dual if one of q, k, v has a tangent.

    It is F.scaled_dot_product_attention, which serves Duals as well, with the fused operator of mmf_fast.ops.attention
    where there is one: a network that calls that already needs no change. This name is for networks whose attention is
    einops, flash_attn, xformers or an einsum, none of which know a Dual.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale)


@register_rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    attn_mask = plain_mask(attn_mask)
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    if dropout_p > 0 or tangent(attn_mask) is not None:
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        weights = torch.ops.aten._safe_softmax.default(_logits(query, key, attn_mask, scale), -1)
        return torch.matmul(F.dropout(weights, dropout_p), value)
    q, k, v, mask = (_as_autocast(primal(x)) for x in (query, key, value, attn_mask))
    dq, dk, dv = (_as_autocast(tangent(x)) for x in (query, key, value))
    if serve("attention", q, dq, k, dk, v, dv, mask):
        tangent_grad = keeps_tangent(query, key, value)
        return dual_attention(
            q, k, v, dq, dk, dv, mask=mask, is_causal=is_causal, scale=scale, tangent_grad=tangent_grad
        )  # fmt: skip
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
    with tangent_scope(query, key, value):
        return y, attention_tangent(q, k, v, dq, dk, dv, mask=mask, is_causal=is_causal, scale=scale)


def plain_mask(mask: Value) -> Value:
    """The mask; of a CausalBias, whose own memory holds no numbers, the boolean mask that it stands for.

    It is known by its module, which is not imported for its sake: it brings Dynamo with it.
    """
    if type(mask).__module__ != "torch.nn.attention.bias":
        return mask
    diagonal = mask.seq_len_kv - mask.seq_len_q if mask.variant.name == "LOWER_RIGHT" else 0
    return torch.ones(mask.seq_len_q, mask.seq_len_kv, dtype=torch.bool, device=mask.device).tril(diagonal)


def _as_autocast(x: Value) -> Any:
    """x as PyTorch's attention takes it where autocast is on: in the dtype of autocast, unless it is float64."""
    if x is None or x.dtype in (torch.bool, torch.float64) or not autocasts(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _logits(query: Value, key: Value, mask: Value, scale: float | None = None) -> Any:
    """s q k^T + mask, where the weights themselves are needed."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = scale * query @ key.transpose(-2, -1)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    return logits


@register_rule(F.multi_head_attention_forward)
def multi_head_attention_forward(
    query: Value,
    key: Value,
    value: Value,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Value,
    in_proj_bias: Value,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Value,
    out_proj_bias: Value,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """query (N, B, E), key and value (M, B, E), or the same without B. Returns (N, B, E) and (B, N, M) or None."""
    if any(x is not None for x in (bias_k, bias_v, static_k, static_v)) or add_zero_attn:
        raise missing_rule_error(
            F.multi_head_attention_forward,
            "add_bias_kv, add_zero_attn, static_k and static_v have no rule, leave them off",
        )
    if is_causal and attn_mask is None:
        raise ValueError("is_causal is a hint that attn_mask is causal: pass attn_mask as well")
    batched = query.ndim == 3
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)

    biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    if not use_separate_proj_weight and query is key and key is value:
        q, k, v = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        separate = (q_proj_weight, k_proj_weight, v_proj_weight)
        weights = separate if use_separate_proj_weight else in_proj_weight.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    # (N, B, H D) -> (B, H, N, D)
    q, k, v = (x.reshape(*x.shape[:2], num_heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))

    dropout_p = dropout_p if training else 0.0
    mask = _additive_mask(attn_mask, key_padding_mask, q)
    if need_weights:
        weights = F.dropout(torch.softmax(_logits(q, k, mask), -1), dropout_p)  # nan in rows of -inf, as PyTorch's
        out = torch.matmul(weights, v)
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        weights = None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    out = F.linear(out.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    out = out if batched else out.squeeze(1)
    return (primal(out), primal(weights)), (tangent(out), tangent(weights))


def _additive_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Value) -> Tensor | None:
    # (N, M) or (B H, N, M), and (B, M). A boolean mask of nn.MultiheadAttention says where NOT to attend.
    def additive(mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask.to(q.dtype)
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf)

    masks = []
    if attn_mask is not None:
        masks.append(additive(attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, q.shape[:2])))
    if key_padding_mask is not None:
        masks.append(
            additive(key_padding_mask if key_padding_mask.ndim == 2 else key_padding_mask[None])[:, None, None]
        )
    return sum(masks[1:], start=masks[0]) if masks else None
