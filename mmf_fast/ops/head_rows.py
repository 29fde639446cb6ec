"""Blocks of rows of one attention head in Triton: loading, storing, and products over their columns.

The width of a tile of Triton is a power of two, so D columns are one tile or two, (head,) or (head, tail):

    a b^T = a_head b_head^T + a_tail b_tail^T,      p b = (p b_head, p b_tail)

72 and 80 columns are 64 + 16, 88 and 96 are 64 + 32: 1.11, 1.00, 1.09 and 1.00 times the work of D columns, where one
tile of 128 does 1.78, 1.60, 1.45 and 1.33 times. Where head and tail would be equal (104, 112, 120) one tile is both.

Rows are read 16 bytes at a time: strides come in units of 8 elements.
"""

from __future__ import annotations

from mmf_fast.ops.gpu import constexpr_function, jit, tl

__all__ = [
    "at_head",
    "cross",
    "dot",
    "head_columns",
    "inner",
    "load_rows",
    "plus",
    "scaled",
    "store_rows",
    "tail_columns",
    "zero_rows",
]


@constexpr_function
def head_columns(D):
    """Columns of the first tile: the largest power of two in D, or the next one if no smaller tile holds the rest."""
    largest = max(16, 1 << (D.bit_length() - 1))
    return largest if largest >= D or tail_width(D - largest) < largest else 2 * largest


@constexpr_function
def tail_columns(D):
    """Columns of the second tile; 0: there is none."""
    rest = D - head_columns(D)
    return tail_width(rest) if rest > 0 else 0


@constexpr_function
def tail_width(rest):
    return max(16, 1 << (rest - 1).bit_length())


@jit
def at_head(pointer, strides, program, H, UNIT: tl.constexpr = 8):
    return pointer + ((program // H).to(tl.int64) * strides[0] + (program % H).to(tl.int64) * strides[1]) * UNIT


@jit
def load_block(pointer, strides, first, size, at: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """Columns [at, at + W) of load_rows."""
    row, column = first + tl.arange(0, BLOCK), at + tl.arange(0, W)
    inside = row[:, None] < size
    if at + W > D:
        inside = inside & (column[None, :] < D)
    return tl.load(pointer + row[:, None] * (strides[2] * 8) + column[None, :], mask=inside, other=0.0)


@jit
def load_rows(pointer, strides, first, size, BLOCK: tl.constexpr, D: tl.constexpr):
    """Rows [first, first + BLOCK) of one head, zero outside (size, D). Offsets within a head fit into 32 bits."""
    HEAD: tl.constexpr = head_columns(D)
    TAIL: tl.constexpr = tail_columns(D)
    head = load_block(pointer, strides, first, size, 0, BLOCK, D, HEAD)
    return (head, load_block(pointer, strides, first, size, HEAD, BLOCK, D, TAIL)) if TAIL > 0 else (head,)


@jit
def store_block(
    pointer, strides, x, first, size, at: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, W: tl.constexpr
):
    row, column = first + tl.arange(0, BLOCK), at + tl.arange(0, W)
    inside = (row[:, None] < size) & (column[None, :] < D)
    where = pointer + row[:, None] * (strides[2] * 8) + column[None, :]
    tl.store(where, x.to(pointer.dtype.element_ty), mask=inside)


@jit
def store_rows(pointer, strides, rows, factor, first, size, BLOCK: tl.constexpr, D: tl.constexpr):
    """The rows times a factor, of which there may be one a row."""
    HEAD: tl.constexpr = head_columns(D)
    TAIL: tl.constexpr = tail_columns(D)
    store_block(pointer, strides, rows[0] * factor, first, size, 0, BLOCK, D, HEAD)
    if TAIL > 0:
        store_block(pointer, strides, rows[1] * factor, first, size, HEAD, BLOCK, D, TAIL)


@jit
def zero_rows(BLOCK: tl.constexpr, D: tl.constexpr):
    HEAD: tl.constexpr = head_columns(D)
    TAIL: tl.constexpr = tail_columns(D)
    head = tl.zeros((BLOCK, HEAD), tl.float32)
    return (head, tl.zeros((BLOCK, TAIL), tl.float32)) if TAIL > 0 else (head,)


@jit
def scaled(rows, factor):
    return (rows[0] * factor, rows[1] * factor) if len(rows) > 1 else (rows[0] * factor,)


@jit
def plus(rows, others, factor):
    """rows + factor * others"""
    head = rows[0] + factor * others[0]
    return (head, rows[1] + factor * others[1]) if len(rows) > 1 else (head,)


@jit
def inner(a, b):
    """rowsum(a * b) in float32"""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if len(a) > 1:
        total += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return total


@jit
def dot(p, b, acc, PRECISION: tl.constexpr):
    """acc + p b"""
    p = p.to(b[0].dtype)
    head = tl.dot(p, b[0], acc[0], input_precision=PRECISION)
    return (head, tl.dot(p, b[1], acc[1], input_precision=PRECISION)) if len(b) > 1 else (head,)


@jit
def cross(a, b, acc, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b^T, or its transpose acc + b a^T."""
    if TRANSPOSED:
        a, b = b, a
    product = tl.dot(a[0], tl.trans(b[0]), acc, input_precision=PRECISION)
    if len(a) > 1:
        product = tl.dot(a[1], tl.trans(b[1]), product, input_precision=PRECISION)
    return product
