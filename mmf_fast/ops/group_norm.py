"""Group norm with gain and bias, optionally followed by SiLU, and its tangent.

    x^ = (x - mean) r over the channels of a group and all pixels,   x^' = J x'   (r and J as in ops/layer_norm.py)
    u = x^ a + b,   u' = x^' a + x^ a' + b',        y = f(u),   y' = f'(u) u'

For cotangents g of y and h of y', u receives f' g + f'' u' h and u' receives f' h; from there it is the backward pass
of ops/layer_norm.py, with sums over pixels for gain and bias.

Shape legend:  B batch   C channels   P pixels   G groups
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmf_fast.ops import reference
from mmf_fast.ops.arguments import Arguments
from mmf_fast.ops.dispatch import (
    define,
    empty_or,
    has_flags,
    is_channels_last,
    layout_of,
    one_dtype,
    register_affine_norm,
)
from mmf_fast.ops.gpu import jit, tl, triton
from mmf_fast.ops.pointwise import check_activation, value_and_slopes

__all__ = ["group_norm_silu"]

_SECTOR = 32  # bytes that a GPU reads at least


def group_norm_silu(
    x: Tensor,
    dx: Tensor | None,
    groups: int,
    gain: Tensor | None = None,
    dgain: Tensor | None = None,
    bias: Tensor | None = None,
    dbias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    silu: bool = True,
    tangent_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(y, y') of the formulas above, differentiable in every tensor argument.

    x, dx: (B, C, ...), contiguous or channels-last (kept), float32, float64, bfloat16 or float16. gain, bias and their
    tangents, of x's dtype: (C,), or (B, C, 1, ...) as in scale-shift conditioning; None stands for 1 (gain) or 0.
    tangent_grad=False detaches y' and saves nothing for it. y' is None when no tangent is given.
    Raises ValueError for channels that do not divide into groups and for a gain or bias of another shape.
    """
    if x.ndim < 2 or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"x {tuple(x.shape)} has no channels (dimension 1) that divide into {groups} groups")
    some = dx is not None or dgain is not None or dbias is not None
    x = layout_of(x)
    dx = None if dx is None else layout_of(dx, x)
    parameters = [_per_channel(p, x) for p in (gain, dgain, bias, dbias)]
    y, dy = _operator(x, dx, *parameters, groups, eps, "silu" if silu else "none", tangent_grad and some)
    return y, None if not some else dy if tangent_grad else dy.detach()


def _per_channel(p: Tensor | None, x: Tensor) -> Tensor | None:
    if p is None:
        return None
    if p.shape != x.shape[1:2] and p.shape != (*x.shape[:2], *[1] * (x.ndim - 2)):
        raise ValueError(f"gain and bias are (C,) or (B, C, 1, ...) for x {tuple(x.shape)}, not {tuple(p.shape)}")
    return p.reshape(-1, x.shape[1]).contiguous()


# -- Triton: one program per image and group, on tiles of (channels, pixels) -------------------------------------------
#
# Channels-last a program takes so many groups that what it reads of a pixel fills a sector of memory. Where one tile
# holds all (WHOLE), the loops have one turn, and the compiler merges their loads, since no store is between them.


@jit
def load_tile(ptr, at, inside, wide: tl.constexpr):
    return tl.load(ptr + at, mask=inside, other=0.0).to(wide)


@jit
def load_parameter(ptr, at, inside, HAS: tl.constexpr, absent: tl.constexpr, wide: tl.constexpr):
    if HAS:
        return tl.load(ptr + at, mask=inside, other=0.0).to(wide)[:, None]
    return tl.full((at.shape[0], 1), absent, wide)


@jit
def place(C, CPG: tl.constexpr, GROUPS: tl.constexpr):
    """Image and first channel of this program. Programs that run side by side have channels side by side."""
    programs = C // (CPG * GROUPS)
    return tl.program_id(0) // programs, tl.program_id(0) % programs * (CPG * GROUPS)


@jit
def tile(
    image, first, start, C, P, CPG: tl.constexpr, GROUPS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of the pixels from `start` on of the groups of this program."""
    channel, pixel = tl.arange(0, BLOCK_C), start + tl.arange(0, BLOCK_P)
    base = image.to(tl.int64) * C * P
    if CHANNELS_LAST:
        at = base + pixel[None, :].to(tl.int64) * C + (first + channel)[:, None]
    else:
        at = base + (first + channel)[:, None].to(tl.int64) * P + pixel[None, :]
    return at, (channel < CPG * GROUPS)[:, None] & (pixel < P)[None, :]


@jit
def over_group(x, CPG: tl.constexpr, GROUPS: tl.constexpr):
    """The sum over pixels and the channels of a group: one number, or one for each channel, (BLOCK_C, 1)."""
    if GROUPS == 1:
        sums = tl.sum(x)
    else:
        of_channel, group = tl.sum(x, 1)[:, None], (tl.arange(0, x.shape[0]) // CPG)[:, None]
        sums = tl.zeros_like(of_channel)
        for g in tl.static_range(GROUPS):
            sums = tl.where(group == g, tl.sum(tl.where(group == g, of_channel, 0.0)), sums)
    return sums


@jit
def statistics(
    x_ptr, dx_ptr, image, first, C, P, eps: tl.constexpr, HAS_DX: tl.constexpr, CPG: tl.constexpr,
    GROUPS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    WHOLE: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """mean, r, mean(x') and mean(x^ x') of the group, as over_group has them.

    One pass, in which nothing cancels: each place of the tile has its own running mean, around which it sums, and the
    places are merged around the mean of the group (Welford; Chan, Golub and LeVeque).
    """
    at, inside = tile(image, first, 0, C, P, CPG, GROUPS, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    m, xx = load_tile(x_ptr, at, inside, wide), tl.zeros((BLOCK_C, BLOCK_P), wide)
    m_dx, xd = load_tile(dx_ptr, at, inside, wide) if HAS_DX else xx, xx
    turn = tl.full((1, 1), 1.0, wide)
    for start in range(BLOCK_P, BLOCK_P if WHOLE else P, BLOCK_P):
        at, inside = tile(image, first, start, C, P, CPG, GROUPS, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        turn += 1.0
        share = 1.0 / turn
        off = tl.where(inside, load_tile(x_ptr, at, inside, wide) - m, 0.0)
        m += share * off
        xx += (1.0 - share) * off * off
        if HAS_DX:
            d_off = tl.where(inside, load_tile(dx_ptr, at, inside, wide) - m_dx, 0.0)
            m_dx += share * d_off
            xd += (1.0 - share) * off * d_off
    channel, pixel = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    seen = tl.where((channel < CPG * GROUPS)[:, None], ((P - pixel + BLOCK_P - 1) // BLOCK_P)[None, :], 0).to(wide)
    count = CPG * P
    mean, mean_dx = over_group(seen * m, CPG, GROUPS) / count, over_group(seen * m_dx, CPG, GROUPS) / count
    off, d_off = m - mean, m_dx - mean_dx
    r = 1.0 / tl.sqrt(over_group(xx + seen * off * off, CPG, GROUPS) / count + eps)
    return mean, r, mean_dx, r * over_group(xd + seen * off * d_off, CPG, GROUPS) / count


@jit
def forward_kernel(
    x_ptr, dx_ptr, gain_ptr, dgain_ptr, bias_ptr, dbias_ptr, y_ptr, dy_ptr, C, P, gain_rows, eps: tl.constexpr,
    HAS_DX: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_DGAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DBIAS: tl.constexpr, ACT: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    image, first = place(C, CPG, GROUPS)
    mean, r, mean_dx, m2 = statistics(
        x_ptr, dx_ptr, image, first, C, P, eps, HAS_DX, CPG, GROUPS, CHANNELS_LAST, BLOCK_C, BLOCK_P, WHOLE, wide
    )
    channel = tl.arange(0, BLOCK_C)
    here, owned = image % gain_rows * C + first + channel, channel < CPG * GROUPS
    a = load_parameter(gain_ptr, here, owned, HAS_GAIN, 1.0, wide)
    da = load_parameter(dgain_ptr, here, owned, HAS_DGAIN, 0.0, wide)
    b = load_parameter(bias_ptr, here, owned, HAS_BIAS, 0.0, wide)
    db = load_parameter(dbias_ptr, here, owned, HAS_DBIAS, 0.0, wide)
    for start in range(0, BLOCK_P if WHOLE else P, BLOCK_P):
        at, inside = tile(image, first, start, C, P, CPG, GROUPS, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        x_hat = (load_tile(x_ptr, at, inside, wide) - mean) * r
        if HAS_DX:
            d_off = load_tile(dx_ptr, at, inside, wide) - mean_dx
        value, slope, _ = value_and_slopes(x_hat * a + b, ACT)
        tl.store(y_ptr + at, value.to(y_ptr.dtype.element_ty), mask=inside)
        if HAS_DX or HAS_DGAIN or HAS_DBIAS:
            du = x_hat * da + db
            if HAS_DX:
                du += r * (d_off - x_hat * m2) * a
            tl.store(dy_ptr + at, (slope * du).to(dy_ptr.dtype.element_ty), mask=inside)


@jit
def cotangents(
    g_ptr, h_ptr, x_ptr, dx_ptr, at, inside, mean, r, mean_dx, m2, a, da, b, db,
    HAS_G: tl.constexpr, HAS_H: tl.constexpr, HAS_DX: tl.constexpr, ACT: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """x^, x^' and the cotangents of u and u' on a tile; zero outside."""
    x_hat = tl.where(inside, (load_tile(x_ptr, at, inside, wide) - mean) * r, 0.0)
    d_hat = tl.zeros_like(x_hat)
    if HAS_DX:
        d_hat = tl.where(inside, r * (load_tile(dx_ptr, at, inside, wide) - mean_dx - x_hat * m2), 0.0)
    _, slope, curvature = value_and_slopes(x_hat * a + b, ACT)
    of_u, of_du = tl.zeros_like(x_hat), tl.zeros_like(x_hat)
    if HAS_G:
        of_u = slope * load_tile(g_ptr, at, inside, wide)
    if HAS_H:
        h = load_tile(h_ptr, at, inside, wide)
        of_u += curvature * (d_hat * a + x_hat * da + db) * h
        of_du = slope * h
    return x_hat, d_hat, of_u, of_du


@jit
def backward_kernel(
    g_ptr, h_ptr, x_ptr, dx_ptr, gain_ptr, dgain_ptr, bias_ptr, dbias_ptr, g_x_ptr, g_dx_ptr, sums_ptr,
    B, C, P, gain_rows, eps: tl.constexpr,
    HAS_G: tl.constexpr, HAS_H: tl.constexpr, HAS_DX: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_DGAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DBIAS: tl.constexpr, ACT: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    image, first = place(C, CPG, GROUPS)
    mean, r, mean_dx, m2 = statistics(
        x_ptr, dx_ptr, image, first, C, P, eps, HAS_DX, CPG, GROUPS, CHANNELS_LAST, BLOCK_C, BLOCK_P, WHOLE, wide
    )
    channel = tl.arange(0, BLOCK_C)
    here, owned = image % gain_rows * C + first + channel, channel < CPG * GROUPS
    a = load_parameter(gain_ptr, here, owned, HAS_GAIN, 1.0, wide)
    da = load_parameter(dgain_ptr, here, owned, HAS_DGAIN, 0.0, wide)
    b = load_parameter(bias_ptr, here, owned, HAS_BIAS, 0.0, wide)
    db = load_parameter(dbias_ptr, here, owned, HAS_DBIAS, 0.0, wide)

    zero = tl.zeros((BLOCK_C, BLOCK_P), wide)
    su, sux, sd, sdx, sdd = zero, zero, zero, zero, zero
    for start in range(0, BLOCK_P if WHOLE else P, BLOCK_P):
        at, inside = tile(image, first, start, C, P, CPG, GROUPS, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        x_hat, d_hat, of_u, of_du = cotangents(
            g_ptr, h_ptr, x_ptr, dx_ptr, at, inside, mean, r, mean_dx, m2, a, da, b, db, HAS_G, HAS_H, HAS_DX, ACT, wide
        )
        su += of_u
        sux += of_u * x_hat
        if HAS_H:
            sd += of_du
            sdx += of_du * x_hat
            sdd += of_du * d_hat
    of_b, of_a = tl.sum(su, 1), tl.sum(sux, 1)
    of_db, of_da, dot = tl.sum(sd, 1), tl.sum(sdx, 1), tl.sum(sdd, 1)
    count = CPG * P  # from u to x^: G = a (cotangent of u) + a' (that of u'), H = a (that of u')
    mean_G = over_group(a * of_b[:, None] + da * of_db[:, None], CPG, GROUPS) / count
    dot_G = over_group(a * of_a[:, None] + da * of_da[:, None], CPG, GROUPS) / count
    mean_H = over_group(a * of_db[:, None], CPG, GROUPS) / count
    dot_H = over_group(a * of_da[:, None], CPG, GROUPS) / count
    dot_Hd = over_group(a * dot[:, None], CPG, GROUPS) / count
    for start in range(0, BLOCK_P if WHOLE else P, BLOCK_P):
        at, inside = tile(image, first, start, C, P, CPG, GROUPS, CHANNELS_LAST, BLOCK_C, BLOCK_P)
        x_hat, d_hat, of_u, of_du = cotangents(
            g_ptr, h_ptr, x_ptr, dx_ptr, at, inside, mean, r, mean_dx, m2, a, da, b, db, HAS_G, HAS_H, HAS_DX, ACT, wide
        )
        g_x = r * (of_u * a + of_du * da - mean_G - x_hat * dot_G)
        if HAS_H and HAS_DX:
            g_dx = r * (of_du * a - mean_H - x_hat * dot_H)
            g_x -= r * (m2 * g_dx + dot_H * d_hat + dot_Hd * x_hat)
            tl.store(g_dx_ptr + at, g_dx.to(g_dx_ptr.dtype.element_ty), mask=inside)
        tl.store(g_x_ptr + at, g_x.to(g_x_ptr.dtype.element_ty), mask=inside)

    column = image * C + first + channel
    tl.store(sums_ptr + column, of_a + dot, mask=owned)
    tl.store(sums_ptr + B * C + column, of_da, mask=owned)
    tl.store(sums_ptr + 2 * B * C + column, of_b, mask=owned)
    tl.store(sums_ptr + 3 * B * C + column, of_db, mask=owned)


def _launch(x: Tensor, groups: int, act: str, gain_rows: int, eps: float, tile_size: int) -> tuple[tuple, tuple, dict]:
    """Grid, sizes and constants of both kernels."""
    batch, channels = x.shape[:2]
    per_group, pixels = channels // groups, x.numel() // (batch * channels)
    together, channels_last = 1, is_channels_last(x)
    if channels_last and _SECTOR // x.element_size() % per_group == 0:
        together = math.gcd(groups, _SECTOR // x.element_size() // per_group)
    block_c, block_p = triton.next_power_of_2(per_group * together), triton.next_power_of_2(pixels)
    whole = block_c * block_p * x.element_size() <= 8 * tile_size  # x and x' fit in registers, for two programs at once
    if not whole:
        block_p = max(tile_size // block_c, 1)
    warps = min(max(block_c * block_p // 256, 1), 8)
    constants = {"ACT": act, "CPG": per_group, "GROUPS": together, "CHANNELS_LAST": channels_last}
    constants |= {"BLOCK_C": block_c, "BLOCK_P": block_p, "WHOLE": whole, "num_warps": warps}
    return (batch * groups // together,), (channels, pixels, gain_rows, eps), constants


def _gain_rows(*parameters: Tensor | None) -> int:
    return max((p.shape[0] for p in parameters if p is not None), default=1)


def _rows_alike(*parameters: Tensor | None) -> list[Tensor | None]:
    rows = _gain_rows(*parameters)
    return [None if p is None else p.expand(rows, -1).contiguous() for p in parameters]


def _forward_triton(
    x: Tensor, dx: Any, gain: Any, dgain: Any, bias: Any, dbias: Any, groups: int, eps: float, act: str,
    tangent_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, dy = _fake(x, dx, gain, dgain, bias, dbias)
    if x.numel():
        parameters = _rows_alike(gain, dgain, bias, dbias)
        grid, sizes, constants = _launch(x, groups, act, _gain_rows(*parameters), eps, 2048)
        flags = has_flags(DX=dx, GAIN=gain, DGAIN=dgain, BIAS=bias, DBIAS=dbias)
        forward_kernel[grid](x, dx, *parameters, y, dy, *sizes, **flags, **constants)
    return y, dy


def _backward_triton(
    g: Any, h: Any, x: Tensor, dx: Any, gain: Any, dgain: Any, bias: Any, dbias: Any, groups: int, eps: float, act: str
) -> tuple[Tensor, ...]:
    outputs = _fake_backward(g, h, x, dx, gain, dgain, bias, dbias)
    if x.numel() == 0:
        return tuple(out.zero_() for out in outputs)
    sums = x.new_empty((4, *x.shape[:2]), dtype=torch.promote_types(x.dtype, torch.float32))
    parameters = _rows_alike(gain, dgain, bias, dbias)
    grid, sizes, constants = _launch(x, groups, act, _gain_rows(*parameters), eps, 1024)
    flags = has_flags(G=g, H=h, DX=dx, GAIN=gain, DGAIN=dgain, BIAS=bias, DBIAS=dbias)
    backward_kernel[grid](g, h, x, dx, *parameters, *outputs[:2], sums, x.shape[0], *sizes, **flags, **constants)
    columns = (
        out if out.numel() == 0 else (s if out.shape[0] == x.shape[0] else s.sum(0, keepdim=True)).to(out.dtype)
        for out, s in zip(outputs[2:], sums, strict=True)
    )
    return (*outputs[:2], *columns)


# -- registration ------------------------------------------------------------------------------------------------------


def _fake(x: Tensor, dx: Any, gain: Any, dgain: Any, bias: Any, dbias: Any, *_: Any) -> tuple[Tensor, Tensor]:
    some = dx is not None or dgain is not None or dbias is not None
    return torch.empty_like(x), torch.empty_like(x) if some else x.new_empty(0)


def _fake_backward(
    g: Any, h: Any, x: Tensor, dx: Any, gain: Any, dgain: Any, bias: Any, dbias: Any, *_: Any
) -> tuple[Tensor, ...]:
    of_tangents = (dx, dgain, dbias) if h is not None else (None, None, None)
    g_dx, g_dgain, g_dbias = (empty_or(p, x) for p in of_tangents)
    return torch.empty_like(x), g_dx, empty_or(gain, x), g_dgain, empty_or(bias, x), g_dbias


def _check(
    x: Tensor, dx: Any, gain: Any, dgain: Any, bias: Any, dbias: Any, groups: int, eps: float, act: str, *_: Any,
    name: str = "group_norm_silu",
) -> Arguments:  # fmt: skip
    arguments = Arguments(name, x)
    arguments.holds(x.ndim > 1, f"x {tuple(x.shape)} must have the dimensions (B, C, ...)")
    arguments.holds(x.is_contiguous() or is_channels_last(x), "x must be contiguous or channels-last")
    arguments.like(dx=dx)
    check_activation(arguments, act)
    divides = groups > 0 and x.shape[1] % groups == 0
    arguments.holds(divides, f"{x.shape[1]} channels do not divide into {groups} groups")
    wide = torch.promote_types(x.dtype, torch.float32)
    for key, p in {"gain": gain, "dgain": dgain, "bias": bias, "dbias": dbias}.items():
        if p is not None:
            rows = x.shape[0] if p.ndim == 2 and p.shape[0] == x.shape[0] else 1
            arguments.tensors((rows, x.shape[1]), wide if p.dtype == wide else None, True, **{key: p})
    return arguments


def _check_backward(g: Any, h: Any, x: Tensor, *rest: Any) -> None:
    _check(x, *rest, name="group_norm_silu_backward").like(g=g, h=h)


def _takes(kind: str, x: Tensor, dx: Any, *parameters: Any) -> bool:
    """One dtype; Triton's kernels take gain, bias and their tangents in float32 too."""
    if kind != "triton":
        return one_dtype(kind, x, dx, *parameters)
    known = (x.dtype, torch.promote_types(x.dtype, torch.float32))
    return one_dtype(kind, x, dx) and all(p.dtype in known for p in parameters if isinstance(p, Tensor))


def _takes_backward(kind: str, g: Any, h: Any, *rest: Any) -> bool:
    return one_dtype(kind, g, h, rest[0]) and _takes(kind, *rest)


_PARAMETERS = (
    "Tensor x, Tensor? dx, Tensor? gain, Tensor? dgain, Tensor? bias, Tensor? dbias, int groups, float eps, str act"
)
_operator = define(
    f"group_norm_silu({_PARAMETERS}, bool tangent_grad) -> (Tensor, Tensor)",
    reference.group_norm_silu,
    _fake,
    _forward_triton,
    check=_check,
    takes=_takes,
)
_backward_operator = define(
    f"group_norm_silu_backward(Tensor? g, Tensor? h, {_PARAMETERS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.group_norm_silu_backward,
    _fake_backward,
    _backward_triton,
    check=_check_backward,
    takes=_takes_backward,
)


register_affine_norm(_operator, _backward_operator)
