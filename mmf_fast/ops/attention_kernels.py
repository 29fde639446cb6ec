"""The Triton kernels of the attention operator; the formulas are in mmf_fast/ops/attention.py.

forward_kernel      a block of queries per program, one pass over the keys (6 products)
delta_kernel        gam and del of every row
key_kernel          what a block of keys and values receives, one pass over the queries (6 products again, and 6)
query_kernel        what a block of queries receives, one pass over the keys (6 products again, and 3)

Every program sums alone and in order, so the result is deterministic. Logits are kept in units of log 2. Strides, but
those of a mask, come in units of 8 elements (ops/head_rows.py).
"""

from __future__ import annotations

from mmf_fast.ops.gpu import jit, tl
from mmf_fast.ops.head_rows import at_head, cross, dot, inner, load_rows, plus, scaled, store_rows, zero_rows

__all__ = ["delta_kernel", "forward_kernel", "key_kernel", "query_kernel"]


@jit
def masked(s, mask_ptr, mask_strides, row, key, N, M, MASK: tl.constexpr, CAUSAL: tl.constexpr, CHECK: tl.constexpr):
    """Logits s with the mask added. row and key are vectors that broadcast to the shape of s."""
    inside = (row < N) & (key < M)
    if MASK != "none":
        at = mask_ptr + row.to(tl.int64) * mask_strides[2] + key.to(tl.int64) * mask_strides[3]
        if MASK == "bool":
            s = tl.where(tl.load(at, mask=inside, other=0) != 0, s, -float("inf"))
        else:
            s += tl.load(at, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
    if CAUSAL:
        s = tl.where(key <= row, s, -float("inf"))
    if CHECK:
        s = tl.where(key < M, s, -float("inf"))
    return s


# -- forward -----------------------------------------------------------------------------------------------------------


@jit
def forward_sweep(
    acc, dacc, m, total, mu, q, dq, k_ptr, dk_ptr, v_ptr, dv_ptr, mask_ptr,
    k_strides, dk_strides, v_strides, dv_strides, mask_strides, first, begin, end, N, M, scale,
    HAS_DQ: tl.constexpr, HAS_DK: tl.constexpr, HAS_DV: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    CHECK: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BLOCK_M)
    for start in range(begin, end, BLOCK_N):
        k = load_rows(k_ptr, k_strides, start, M, BLOCK_N, D)
        s = cross(q, k, None, False, PRECISION) * (scale * 1.4426950408889634)
        key = start + tl.arange(0, BLOCK_N)
        s = masked(s, mask_ptr, mask_strides, row[:, None], key[None, :], N, M, MASK, CAUSAL and CHECK, CHECK)
        if HAS_DQ:
            t = cross(dq, k, None, False, PRECISION)
        if HAS_DK:
            dk = load_rows(dk_ptr, dk_strides, start, M, BLOCK_N, D)
            t = cross(q, dk, t if HAS_DQ else None, False, PRECISION)

        top = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(top == -float("inf"), 0.0, top) if MASK != "none" else top
        p = tl.exp2(s - shift[:, None])
        fade = tl.exp2(m - shift)
        m = top
        before = total * fade
        total = before + tl.sum(p, 1)
        v = load_rows(v_ptr, v_strides, start, M, BLOCK_N, E)
        acc = scaled(acc, fade[:, None])
        if HAS_DQ or HAS_DK or HAS_DV:
            dacc = scaled(dacc, fade[:, None])
        if HAS_DQ or HAS_DK:
            t *= scale
            mean = (mu * before + tl.sum(p * t, 1)) / (tl.where(total == 0, 1.0, total) if MASK != "none" else total)
            dacc = plus(dacc, acc, (mu - mean)[:, None])
            mu = mean
            dacc = dot(p * (t - mean[:, None]), v, dacc, PRECISION)
        acc = dot(p, v, acc, PRECISION)
        if HAS_DV:
            dv = load_rows(dv_ptr, dv_strides, start, M, BLOCK_N, E)
            dacc = dot(p, dv, dacc, PRECISION)
    return acc, dacc, m, total, mu


@jit
def forward_kernel(
    q_ptr, dq_ptr, k_ptr, dk_ptr, v_ptr, dv_ptr, mask_ptr, o_ptr, do_ptr, lse_ptr, mu_ptr,
    q_strides, dq_strides, k_strides, dk_strides, v_strides, dv_strides, mask_strides, o_strides, H, N, M, scale,
    HAS_DQ: tl.constexpr, HAS_DK: tl.constexpr, HAS_DV: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_M)
    head, first = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BLOCK_M
    k_ptr, v_ptr = at_head(k_ptr, k_strides, head, H), at_head(v_ptr, v_strides, head, H)
    if HAS_DK:
        dk_ptr = at_head(dk_ptr, dk_strides, head, H)
    if HAS_DV:
        dv_ptr = at_head(dv_ptr, dv_strides, head, H)
    if MASK != "none":
        mask_ptr = at_head(mask_ptr, mask_strides, head, H, 1)
    q = load_rows(at_head(q_ptr, q_strides, head, H), q_strides, first, N, BLOCK_M, D)
    dq = q
    if HAS_DQ:
        dq = load_rows(at_head(dq_ptr, dq_strides, head, H), dq_strides, first, N, BLOCK_M, D)

    acc, dacc = zero_rows(BLOCK_M, E), zero_rows(BLOCK_M, E)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total, mu = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    whole = (tl.minimum(first, M) if CAUSAL else M) // BLOCK_N * BLOCK_N  # keys of blocks that need no check
    end = tl.minimum(first + BLOCK_M, M) if CAUSAL else M
    acc, dacc, m, total, mu = forward_sweep(
        acc, dacc, m, total, mu, q, dq, k_ptr, dk_ptr, v_ptr, dv_ptr, mask_ptr,
        k_strides, dk_strides, v_strides, dv_strides, mask_strides, first, 0, whole, N, M, scale,
        HAS_DQ, HAS_DK, HAS_DV, MASK, CAUSAL, False, D, E, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    acc, dacc, m, total, mu = forward_sweep(
        acc, dacc, m, total, mu, q, dq, k_ptr, dk_ptr, v_ptr, dv_ptr, mask_ptr,
        k_strides, dk_strides, v_strides, dv_strides, mask_strides, first, whole, end, N, M, scale,
        HAS_DQ, HAS_DK, HAS_DV, MASK, CAUSAL, True, D, E, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip

    row = first + tl.arange(0, BLOCK_M)
    at = head.to(tl.int64) * N + row
    empty = total == 0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    lse = tl.where(empty, float("inf"), (m + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    tl.store(lse_ptr + at, lse, mask=row < N)
    inverse = inverse[:, None]
    store_rows(at_head(o_ptr, o_strides, head, H), o_strides, acc, inverse, first, N, BLOCK_M, E)
    if HAS_DQ or HAS_DK:
        tl.store(mu_ptr + at, mu, mask=row < N)
    if HAS_DQ or HAS_DK or HAS_DV:
        store_rows(at_head(do_ptr, o_strides, head, H), o_strides, dacc, inverse, first, N, BLOCK_M, E)


# -- backward ----------------------------------------------------------------------------------------------------------


@jit
def delta_kernel(
    g_ptr, h_ptr, o_ptr, do_ptr, gam_ptr, del_ptr, g_strides, h_strides, o_strides, do_strides, H, N,
    HAS_H: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_M)
    head, first = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    at = head.to(tl.int64) * N + row
    o = load_rows(at_head(o_ptr, o_strides, head, H), o_strides, first, N, BLOCK_M, E)
    g = load_rows(at_head(g_ptr, g_strides, head, H), g_strides, first, N, BLOCK_M, E)
    delta = inner(g, o)
    if HAS_H:
        h = load_rows(at_head(h_ptr, h_strides, head, H), h_strides, first, N, BLOCK_M, E)
        do = load_rows(at_head(do_ptr, do_strides, head, H), do_strides, first, N, BLOCK_M, E)
        delta += inner(h, do)
        tl.store(gam_ptr + at, inner(h, o), mask=row < N)
    tl.store(del_ptr + at, delta, mask=row < N)


@jit
def tiles(
    q, dq, k, dk, g, h, v, dv, lse, mu, gam, delta, mask_ptr, mask_strides, row, key, N, M, scale,
    HAS_DQ: tl.constexpr, HAS_DK: tl.constexpr, HAS_DV: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, CHECK: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P, H, dS, dS' (queries x keys, or keys x queries if TRANSPOSED); those that need no tangent repeat P."""
    s = cross(q, k, None, TRANSPOSED, PRECISION) * (scale * 1.4426950408889634)
    s = masked(s, mask_ptr, mask_strides, row, key, N, M, MASK, CAUSAL, CHECK)
    p = tl.exp2(s - lse * 1.4426950408889634)
    d = cross(g, v, None, TRANSPOSED, PRECISION)
    if HAS_DV:
        d = cross(h, dv, d, TRANSPOSED, PRECISION)
    d -= delta
    p_h, u = p, p
    if HAS_DQ or HAS_DK:
        if HAS_DQ:
            t = cross(dq, k, None, TRANSPOSED, PRECISION)
        if HAS_DK:
            t = cross(q, dk, t if HAS_DQ else None, TRANSPOSED, PRECISION)
        t = t * scale - mu
        u = cross(h, v, None, TRANSPOSED, PRECISION) - gam
        d += u * t
        p_h, u = p * t, p * u
    return p, p_h, p * d, u


@jit
def key_kernel(
    q_ptr, dq_ptr, k_ptr, dk_ptr, v_ptr, dv_ptr, mask_ptr, g_ptr, h_ptr, lse_ptr, mu_ptr, gam_ptr, del_ptr,
    g_k_ptr, g_dk_ptr, g_v_ptr, g_dv_ptr,
    q_strides, dq_strides, k_strides, dk_strides, v_strides, dv_strides, mask_strides, g_strides, h_strides,
    g_k_strides, g_v_strides, H, N, M, scale,
    HAS_H: tl.constexpr, HAS_DQ: tl.constexpr, HAS_DK: tl.constexpr, HAS_DV: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(M, BLOCK_N)
    head, first = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BLOCK_N
    key = first + tl.arange(0, BLOCK_N)
    k = load_rows(at_head(k_ptr, k_strides, head, H), k_strides, first, M, BLOCK_N, D)
    v = load_rows(at_head(v_ptr, v_strides, head, H), v_strides, first, M, BLOCK_N, E)
    dk, dv = k, v
    if HAS_DK:
        dk = load_rows(at_head(dk_ptr, dk_strides, head, H), dk_strides, first, M, BLOCK_N, D)
    if HAS_DV:
        dv = load_rows(at_head(dv_ptr, dv_strides, head, H), dv_strides, first, M, BLOCK_N, E)
    q_ptr = at_head(q_ptr, q_strides, head, H)
    if HAS_DQ:
        dq_ptr = at_head(dq_ptr, dq_strides, head, H)
    g_ptr = at_head(g_ptr, g_strides, head, H)
    if HAS_H:
        h_ptr = at_head(h_ptr, h_strides, head, H)
    if MASK != "none":
        mask_ptr = at_head(mask_ptr, mask_strides, head, H, 1)
    g_k, g_v = zero_rows(BLOCK_N, D), zero_rows(BLOCK_N, E)
    if HAS_DK:
        g_dk = zero_rows(BLOCK_N, D)
    if HAS_DV:
        g_dv = zero_rows(BLOCK_N, E)

    for start in range(first // BLOCK_M * BLOCK_M if CAUSAL else 0, N, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        at = head.to(tl.int64) * N + row
        q = load_rows(q_ptr, q_strides, start, N, BLOCK_M, D)
        lse = tl.load(lse_ptr + at, mask=row < N, other=float("inf"))  # P = 0 in rows that are not there
        delta = tl.load(del_ptr + at, mask=row < N, other=0.0)
        g = load_rows(g_ptr, g_strides, start, N, BLOCK_M, E)
        dq, h, mu, gam = q, g, lse, lse
        if HAS_DQ:
            dq = load_rows(dq_ptr, dq_strides, start, N, BLOCK_M, D)
        if HAS_H:
            h = load_rows(h_ptr, h_strides, start, N, BLOCK_M, E)
        if HAS_DQ or HAS_DK:
            mu = tl.load(mu_ptr + at, mask=row < N, other=0.0)
            gam = tl.load(gam_ptr + at, mask=row < N, other=0.0)
        p, p_h, d, u = tiles(
            q, dq, k, dk, g, h, v, dv, lse[None, :], mu[None, :], gam[None, :], delta[None, :], mask_ptr, mask_strides,
            row[None, :], key[:, None], N, M, scale, HAS_DQ, HAS_DK, HAS_DV, MASK, CAUSAL, False, True,
            PRECISION,
        )  # fmt: skip
        g_v = dot(p, g, g_v, PRECISION)
        if HAS_DV:
            g_dv = dot(p, h, g_dv, PRECISION)
        if HAS_DQ or HAS_DK:
            g_v = dot(p_h, h, g_v, PRECISION)
        g_k = dot(d, q, g_k, PRECISION)
        if HAS_DQ:
            g_k = dot(u, dq, g_k, PRECISION)
        if HAS_DK:
            g_dk = dot(u, q, g_dk, PRECISION)

    store_rows(at_head(g_k_ptr, g_k_strides, head, H), g_k_strides, g_k, scale, first, M, BLOCK_N, D)
    store_rows(at_head(g_v_ptr, g_v_strides, head, H), g_v_strides, g_v, 1.0, first, M, BLOCK_N, E)
    if HAS_DK:
        store_rows(at_head(g_dk_ptr, g_k_strides, head, H), g_k_strides, g_dk, scale, first, M, BLOCK_N, D)
    if HAS_DV:
        store_rows(at_head(g_dv_ptr, g_v_strides, head, H), g_v_strides, g_dv, 1.0, first, M, BLOCK_N, E)


@jit
def query_sweep(
    g_q, g_dq, q, dq, g, h, lse, mu, gam, delta, k_ptr, dk_ptr, v_ptr, dv_ptr, mask_ptr,
    k_strides, dk_strides, v_strides, dv_strides, mask_strides, first, begin, end, N, M, scale,
    HAS_DQ: tl.constexpr, HAS_DK: tl.constexpr, HAS_DV: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, CHECK: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BLOCK_M)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, k_strides, start, M, BLOCK_N, D)
        v = load_rows(v_ptr, v_strides, start, M, BLOCK_N, E)
        dk, dv = k, v
        if HAS_DK:
            dk = load_rows(dk_ptr, dk_strides, start, M, BLOCK_N, D)
        if HAS_DV:
            dv = load_rows(dv_ptr, dv_strides, start, M, BLOCK_N, E)
        _, _, d, u = tiles(
            q, dq, k, dk, g, h, v, dv, lse[:, None], mu[:, None], gam[:, None], delta[:, None], mask_ptr, mask_strides,
            row[:, None], key[None, :], N, M, scale, HAS_DQ, HAS_DK, HAS_DV, MASK, CAUSAL and CHECK,
            CHECK, False, PRECISION,
        )  # fmt: skip
        g_q = dot(d, k, g_q, PRECISION)
        if HAS_DK:
            g_q = dot(u, dk, g_q, PRECISION)
        if HAS_DQ:
            g_dq = dot(u, k, g_dq, PRECISION)
    return g_q, g_dq


@jit
def query_kernel(
    q_ptr, dq_ptr, k_ptr, dk_ptr, v_ptr, dv_ptr, mask_ptr, g_ptr, h_ptr, lse_ptr, mu_ptr, gam_ptr, del_ptr,
    g_q_ptr, g_dq_ptr,
    q_strides, dq_strides, k_strides, dk_strides, v_strides, dv_strides, mask_strides, g_strides, h_strides,
    g_q_strides, H, N, M, scale,
    HAS_H: tl.constexpr, HAS_DQ: tl.constexpr, HAS_DK: tl.constexpr, HAS_DV: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_M)
    head, first = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    at = head.to(tl.int64) * N + row
    lse = tl.load(lse_ptr + at, mask=row < N, other=float("inf"))
    delta = tl.load(del_ptr + at, mask=row < N, other=0.0)
    q = load_rows(at_head(q_ptr, q_strides, head, H), q_strides, first, N, BLOCK_M, D)
    g = load_rows(at_head(g_ptr, g_strides, head, H), g_strides, first, N, BLOCK_M, E)
    dq, h, mu, gam = q, g, lse, lse
    if HAS_DQ:
        dq = load_rows(at_head(dq_ptr, dq_strides, head, H), dq_strides, first, N, BLOCK_M, D)
    if HAS_H:
        h = load_rows(at_head(h_ptr, h_strides, head, H), h_strides, first, N, BLOCK_M, E)
    if HAS_DQ or HAS_DK:
        mu = tl.load(mu_ptr + at, mask=row < N, other=0.0)
        gam = tl.load(gam_ptr + at, mask=row < N, other=0.0)
    k_ptr, v_ptr = at_head(k_ptr, k_strides, head, H), at_head(v_ptr, v_strides, head, H)
    if HAS_DK:
        dk_ptr = at_head(dk_ptr, dk_strides, head, H)
    if HAS_DV:
        dv_ptr = at_head(dv_ptr, dv_strides, head, H)
    if MASK != "none":
        mask_ptr = at_head(mask_ptr, mask_strides, head, H, 1)

    g_q, g_dq = zero_rows(BLOCK_M, D), zero_rows(BLOCK_M, D)
    whole = (tl.minimum(first, M) if CAUSAL else M) // BLOCK_N * BLOCK_N
    end = tl.minimum(first + BLOCK_M, M) if CAUSAL else M
    g_q, g_dq = query_sweep(
        g_q, g_dq, q, dq, g, h, lse, mu, gam, delta, k_ptr, dk_ptr, v_ptr, dv_ptr, mask_ptr,
        k_strides, dk_strides, v_strides, dv_strides, mask_strides, first, 0, whole, N, M, scale,
        HAS_DQ, HAS_DK, HAS_DV, MASK, CAUSAL, False, D, E, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    g_q, g_dq = query_sweep(
        g_q, g_dq, q, dq, g, h, lse, mu, gam, delta, k_ptr, dk_ptr, v_ptr, dv_ptr, mask_ptr,
        k_strides, dk_strides, v_strides, dv_strides, mask_strides, first, whole, end, N, M, scale,
        HAS_DQ, HAS_DK, HAS_DV, MASK, CAUSAL, True, D, E, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    store_rows(at_head(g_q_ptr, g_q_strides, head, H), g_q_strides, g_q, scale, first, N, BLOCK_M, D)
    if HAS_DQ:
        store_rows(at_head(g_dq_ptr, g_q_strides, head, H), g_q_strides, g_dq, scale, first, N, BLOCK_M, D)
