"""The table of rules: calls that reach every rule of mmf_fast, in the shapes and spellings that networks use.

A floating-point tensor is a variable of its case unless it is `Fixed`. A name stands for all its spellings
(torch.exp, Tensor.exp, torch.special.exp), called alike.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from support.rule_harness import Fixed, Table, integers, normal, uniform
from torch import Tensor

table = Table()
CASES = table.cases

x, y = normal(3, 5), normal(3, 5)
row, column, scalar = normal(5), normal(3, 1), normal()
unit, positive = uniform(3, 5), uniform(3, 5, low=0.5, high=3)
mask = integers(2, 3, 5).bool()
spread = 4 * normal(4, 7)  # reaches all branches of piecewise functions

# -- elementwise -------------------------------------------------------------------------------------------------------

table.each("exp exp2 expm1 sin cos tan atan arctan sinh cosh asinh arcsinh erf erfc square", x)
table.each("abs absolute deg2rad rad2deg frac sinc", spread)
table.each("log log2 log10 log1p sqrt rsqrt reciprocal lgamma gammaln digamma psi", positive)
table.each("asin arcsin acos arccos atanh arctanh erfinv logit", unit)
table.each("acosh arccosh", 1 + positive)
table("sinc", torch.tensor([0.0, 1e-4, -9e-3, 1.1e-2], dtype=torch.float64))
table("logit", unit, eps=0.3)
table("nan_to_num", x)
table.each("clamp clip", spread, min=-1)
table.each("clamp clip", spread, max=0.5)
table.each("clamp clip", spread, -1, 2.0)
table("clamp", x, min=Fixed(y), max=Fixed(y + 1))
table.each("clamp_min clamp_max", spread, 0.3)

# -- activations -------------------------------------------------------------------------------------------------------

table.each("relu relu6 silu mish sigmoid expit tanh gelu elu celu selu softplus logsigmoid leaky_relu rrelu", spread)
table.each("hardtanh hardsigmoid hardswish hardshrink softshrink softsign tanhshrink", spread)
table("gelu", spread, approximate="tanh")
table("silu", normal(2, 3, 4), inplace=False)
table("leaky_relu", spread, 0.3)
table("elu", spread, alpha=0.5)
table("celu", spread, 1.7)
table("softplus", spread, beta=2.0, threshold=3.0)
table("hardtanh", spread, min_val=-0.5, max_val=0.25)
table("hardshrink", spread, 1.5)
table("softshrink", spread, 1.5)
table("threshold", spread, 0.1, 20.0)
table("rrelu", spread, 0.1, 0.4, True)
table("prelu", normal(2, 4, 3), normal(4))
table("prelu", spread, normal(1))
table("glu", normal(3, 6))
table("glu", normal(2, 6, 3), 1)
table.each("softmax log_softmax softmin", x, dim=-1)
table.each("softmax log_softmax softmin", normal(2, 3, 4), 1)
table("softmax", x, -2, dtype=torch.float64)

# -- arithmetic --------------------------------------------------------------------------------------------------------

table.each("neg negative positive", x)
for other in (y, row, column, scalar, 2.5, Fixed(y)):
    table.each("add sub subtract mul multiply div divide true_divide", x, other)
    for function in (operator.add, operator.sub, operator.mul, operator.truediv):
        table(function, x, other)
        table(function, other, x)
    table.each("maximum minimum" if not isinstance(other, float) else "rsub", x, other)
table.each("add sub", x, other=y, alpha=-3)
table("rsub", x, y, alpha=2)
table("div", x, 0.3, rounding_mode="floor")
table.each("remainder fmod", spread, 1.3)
table.each("remainder fmod", spread, uniform(4, 7, low=1, high=2))
table(operator.mod, spread, 1.3)
table(operator.mod, Fixed(7 * unit), positive)
for exponent in (2, 3.0, 0.5, -1, 0, y, row):
    table("pow", positive, exponent)
    table(operator.pow, positive, exponent)
table("pow", x, exponent=3)
table(operator.pow, x, 2)
table("pow", 2.0, x)
table(operator.pow, 2.0, x)
table(operator.pow, Fixed(positive), x)
table.each("addcmul addcdiv", x, y, positive, value=0.7)
table.each("addcmul", row, x, column)
table("lerp", x, y, 0.3)
table("lerp", x, row, unit)
table.each("atan2 arctan2 hypot logaddexp", x, y)
table.each("atan2 hypot", x, row)
table("xlogy", x, positive)
table("xlogy", 2.0, positive)

# -- products ----------------------------------------------------------------------------------------------------------

a, b, batch = normal(3, 4), normal(4, 2), normal(2, 3, 4)
table.each("mm matmul", a, b)
table("mm", a, mat2=b)
table("matmul", batch, b)
table("matmul", row, normal(5))
table("matmul", a, other=normal(4))
table.each("bmm matmul", batch, normal(2, 4, 5))
table("bmm", batch, mat2=normal(2, 4, 1))
table(operator.matmul, a, b)
table(operator.matmul, Fixed(a), normal(2, 4, 1))
table("mv", a, normal(4))
table.each("dot vdot inner", row, normal(5))
table("vecdot", x, y)
table("vecdot", x, y, dim=0)
table("inner", a, normal(2, 4))
table.each("outer ger", row, normal(3))
table("kron", normal(2, 3), normal(2, 2))
table("cross", normal(4, 3), normal(4, 3), dim=-1)
table(torch.linalg.cross, normal(3, 3), normal(3, 3))
table("chain_matmul", a, b, normal(2, 2))
table("multi_dot", [a, b, normal(2, 3)])
table("einsum", "ij,jk->ik", a, b)
table("einsum", "bij,jk,bkl->il", batch, b, normal(2, 2, 3))
table("einsum", "...ij->...ji", batch)
table("einsum", "ij,ij", [x, y])
table("tensordot", batch, normal(4, 3, 2), dims=([1, 2], [1, 0]))
table("tensordot", a, b, 1)
table("addmm", normal(3, 2), a, b)
table("addmm", normal(2), a, mat2=b, beta=0.5, alpha=-2)
table("addmv", normal(3), a, normal(4), alpha=2)
table("addr", normal(3, 5), normal(3), row)
table("baddbmm", normal(2, 3, 5), batch, normal(2, 4, 5), beta=0, alpha=0.5)
table("baddbmm", normal(1, 3, 5), batch, normal(2, 4, 5))
table("addbmm", normal(3, 5), batch, normal(2, 4, 5), beta=2)

# -- shapes ------------------------------------------------------------------------------------------------------------

block = normal(2, 3, 4)
table.each("view reshape", block, (6, -1))
table.each("view reshape", block, -1, 4)
table("view", block, torch.float64)
table("flatten", block, -2)
table("flatten", block, start_dim=0, end_dim=1)
table("unflatten", block, -1, (2, 2))
table.each("ravel t adjoint diag diagflat", a)
table.each("contiguous clone float double half bfloat16 cpu alias", a)
table("squeeze", normal(2, 1, 3, 1))
table("squeeze", normal(2, 1, 3, 1), -3)
table("squeeze", normal(2, 1, 3, 1), dim=(1, 3))
table("unsqueeze", block, -2)
table.each("transpose swapaxes swapdims", block, -1, 0)
table.each("permute", block, (2, 0, 1))
table(Tensor.permute, block, -1, 0, 1)
table.each("movedim moveaxis", block, 0, -1)
table("flip", block, (0, -1))
table(Tensor.__reversed__, block)
table.each("fliplr flipud rot90", block)
table("roll", block, 2, 1)
table("roll", block, shifts=(1, -1), dims=(0, 2))
table("expand", column, 2, 3, 4)
table("broadcast_to", column, (2, 3, 4))
table(Tensor.repeat, a, 2, 1, 3)
table.each("tile", a, (2, 3))
table("repeat_interleave", a, 2, dim=-1)
table("repeat_interleave", a, torch.tensor([1, 0, 2]), 0)
table.each("chunk tensor_split unsafe_chunk", block, 2, -1)
table.each("split unsafe_split", block, 3, dim=-1)
table("split", block, [1, 3], -1)
table.each("split_with_sizes unsafe_split_with_sizes", block, [1, 2], 1)
table.each("hsplit", block, 3)
table.each("vsplit", block, 2)
table.each("dsplit", block, (1, 2))
table("unbind", block, 1)
table("as_strided", a, (2, 2), (1, 2), 1)
table(Tensor.unfold, normal(2, 7), -1, 3, 2)
table(F.unfold, normal(2, 3, 5, 4), (2, 3), padding=1, stride=2)
table(F.fold, normal(2, 12, 6), (3, 4), kernel_size=2)
table("diagonal", block, dim1=-2, dim2=-1)
table("diag_embed", block)
table.each("tril triu", block, diagonal=-1)
table("sum_to_size", block, 1, 3, 1)
table.each("atleast_1d atleast_2d atleast_3d", row)
table.each("pixel_shuffle", normal(2, 8, 3, 2), 2)
table.each("pixel_unshuffle", normal(2, 2, 4, 6), 2)
table.each("channel_shuffle", normal(2, 6, 2, 2), 3)
table.each("view_as reshape_as", block, Fixed(normal(6, 4)))
table.each("expand_as", column, normal(3, 4))
table.each("type_as", a, normal(2))
table("to", a, torch.float32)
table("to", a, "cpu", dtype=torch.float64, copy=True)
table("to", a, normal(2))
table("type", a, torch.float32)
table("pad", block, (1, 2))
table("pad", block, (0, 0, 1, 1), mode="constant", value=3.0)
for mode in ("reflect", "replicate", "circular"):
    table("pad", normal(2, 3, 4, 5), (1, 2, 2, 1), mode)
table("broadcast_tensors", column, row, scalar)
table("meshgrid", row, normal(3), indexing="xy")
table("meshgrid", [row, normal(3)], indexing="ij")

# -- indexing ----------------------------------------------------------------------------------------------------------

for index in (0, -1, slice(1, None), slice(None, None, 2), None, ..., mask, torch.tensor([2, 0, 2])):
    table(operator.getitem, x, index, label="getitem")
for indices in ((..., None, 1), (slice(None), [0, 3]), (torch.tensor([0, 2]), torch.tensor([1, 1])), (None, 1, ..., 0)):
    table(lambda t, indices=indices: t[indices], x, label="getitem")
table("narrow", x, -1, 1, 3)
table("select", x, 1, -2)
table("index_select", x, -1, torch.tensor([4, 0, 0]))
table("gather", x, 1, integers(5, 3, 2))
table("take", x, integers(15, 4))
table("take_along_dim", x, integers(5, 3, 2), dim=-1)
table("masked_select", x, mask)
table.each("cat concat concatenate", [x, y, column], dim=-1)
table("cat", (x, Fixed(y)), axis=0)
table("stack", [x, y, Fixed(y)], -1)
table.each("hstack vstack dstack column_stack row_stack", [x, y])
table(torch.where, mask, x, row)
table(torch.where, mask, x, 0.0)
table(torch.where, mask, Fixed(x), y)
table(Tensor.where, x, mask, y)
table("masked_fill", x, mask, -2.0)
table("masked_fill", x, mask, scalar)
permuted = torch.stack([torch.randperm(5) for _ in range(3)])[:, :4]
table.each("scatter scatter_add", x, 1, permuted, normal(3, 4))
table("scatter_add", x, 1, integers(5, 3, 4), normal(3, 4))
table("scatter", x, 0, torch.tensor([[2, 0, 1, 1, 0]]), 7.0)
table("scatter", x, -1, torch.tensor([[1], [2], [3]]), value=7.0)
table("scatter", x, dim=-1, index=torch.tensor([[1], [2], [3]]), src=normal(3, 1))
table("index_add", x, -1, torch.tensor([0, 3, 0]), normal(3, 3))
table("index_add", x, 0, torch.tensor([1, 1]), source=normal(2, 5), alpha=-2)
table("index_copy", x, 0, torch.tensor([2, 0]), normal(2, 5))
table("index_fill", x, 1, torch.tensor([2, 0]), 3.0)
table("index_put", x, (torch.tensor([0, 1, 0]), torch.tensor([1, 1, 1])), normal(3), True)
table("index_put", x, [torch.tensor([0, 2])], row)
table("masked_scatter", x, mask, normal(20))
table("select_scatter", x, row, 0, 1)
table("slice_scatter", x, normal(3, 2), dim=1, start=2, end=4)
table("diagonal_scatter", x, normal(3), 1)

# -- reductions --------------------------------------------------------------------------------------------------------

for name in ("sum", "mean"):
    table(name, block)
    table(name, block, -1, keepdim=True)
    table(name, block, dim=(0, 2), dtype=torch.float64)
table("cumsum", block, -2)
table("trace", a)
for name in ("var", "std", "var_mean", "std_mean"):
    table(name, block)
    table(name, block, False)
    table(name, block, -1, True, True)
    table(name, block, (0, 2), correction=0, keepdim=True)
    table(name, block, dim=1, unbiased=False)
table("prod", a)
table("prod", block, -1, keepdim=True, dtype=torch.float64)
table("prod", torch.tensor([[2.0, 0.0, 3.0], [0.0, 0.0, 1.0]], dtype=torch.float64), 1)
table("logsumexp", block, (0, -1))
table("logsumexp", block, 1, keepdim=True)
for name in ("max", "min", "median", "nanmedian"):
    table(name, block)
    table(name, block, -1)
    table(name, block, dim=1, keepdim=True)
table.each("max min", x, y)
table.each("amax amin", block)
table.each("amax amin", block, (0, -1), keepdim=True)
table.each("amax amin", block, dim=1)
table("kthvalue", block, 2)
table("kthvalue", block, k=1, dim=0, keepdim=True)
table("sort", block)
table("sort", block, dim=1, descending=True)
table("topk", block, 2)
table("topk", block, 2, dim=0, largest=False)
table.each("cummax cummin", block, -1)
for p in (2, 1, 3, float("inf"), float("-inf")):
    for norm in (torch.norm, Tensor.norm):
        table(norm, spread, p)
        table(norm, spread, p, dim=-1, keepdim=True)
    table(torch.linalg.norm, row, ord=p)
    table(torch.linalg.norm, spread, p, dim=-1)
    table("vector_norm", spread, p, (0, 1))
table(torch.norm, x)
table(Tensor.norm, x, dim=(0, 1), dtype=torch.float64)
table(torch.linalg.norm, x)
table(torch.linalg.norm, block, dim=(0, 1), keepdim=True)
table("vector_norm", block, dim=1)
table("normalize", block)
table("normalize", block, p=1, dim=-1)
table("cosine_similarity", x, y, dim=-1)
table("cosine_similarity", block, normal(1, 3, 4))
table("pairwise_distance", x, y)
table("pairwise_distance", x, y, p=3, keepdim=True)

# -- layers ------------------------------------------------------------------------------------------------------------

table("linear", batch, normal(5, 4))
table("linear", row, normal(2, 5), normal(2))
table("linear", input=a, weight=normal(1, 4), bias=normal(1))
for dims, size in ((1, (7,)), (2, (5, 4)), (3, (3, 4, 3))):
    ones = (1,) * dims
    table(f"conv{dims}d", normal(2, 4, *size), normal(6, 2, *[3] * dims), normal(6), padding=1, stride=2, groups=2)
    table(f"conv{dims}d", normal(1, 2, *size), normal(3, 2, *[2] * dims), None, 1, "same")
    table(f"conv{dims}d", normal(2, *size), normal(3, 2, *ones), normal(3))  # no batch
    table(f"conv_transpose{dims}d", normal(2, 4, *size), normal(4, 3, *[2] * dims), normal(6), 2, groups=2)
    table(f"conv_transpose{dims}d", normal(4, *size), normal(4, 3, *ones), normal(3))
table("bilinear", normal(2, 3), normal(2, 4), normal(5, 3, 4), normal(5))
table(F.embedding, integers(5, 2, 3), normal(6, 4))
table(F.embedding, torch.tensor([[0, 2], [2, 1]]), normal(4, 3), padding_idx=3)
for name, shape in {
    "dropout": (6, 7),
    "dropout1d": (4, 5, 3),
    "dropout2d": (4, 5, 2, 2),
    "dropout3d": (4, 5, 2, 2, 2),
    "feature_dropout": (4, 5, 2),
}.items():
    table(name, normal(*shape), 0.4, True)
    table(name, normal(*shape), 0.4, False)
table("dropout2d", normal(4, 3, 3))
table("dropout", x, p=0.0)
table("affine_grid", normal(2, 2, 3), [2, 3, 4, 5], align_corners=False)
table(F.grid_sample, normal(2, 3, 4, 5), Fixed(uniform(2, 3, 3, 2, low=-1, high=1)), align_corners=False)
table(F.grid_sample, normal(1, 2, 4, 5), Fixed(uniform(1, 2, 2, 2, low=-1.5, high=1.5)), "nearest", "border", True)

# -- norms -------------------------------------------------------------------------------------------------------------

for shape, normalized in (((3, 5), (5,)), ((2, 3, 4, 2), (4, 2)), ((2, 3, 1), (3, 1))):
    table("layer_norm", normal(*shape), normalized)
    table("layer_norm", normal(*shape), normalized, normal(*normalized), normal(*normalized), 1e-3)
    table("rms_norm", normal(*shape), normalized)
    table("rms_norm", normal(*shape), list(normalized), normal(*normalized), eps=1e-3)
table(F.layer_norm, x, (5,), bias=row)
for shape in ((3, 6), (2, 6, 5), (2, 6, 3, 2), (1, 6, 2, 2, 2)):
    table("group_norm", normal(*shape), 3)
    table("group_norm", normal(*shape), 2, normal(6), normal(6), eps=1e-3)
    running = Fixed(normal(6)), Fixed(uniform(6))
    images = normal(3, *shape[1:])
    for training in (True, False):
        table(F.batch_norm, images, *running, normal(6), normal(6), training, 0.2, 1e-3)
        table(F.batch_norm, images, *running, training=training)
        table(torch.batch_norm, images, normal(6), normal(6), *running, training, 0.1, 1e-5, False)
    table(F.batch_norm, images, None, None, training=True)
    if len(shape) > 2:
        table(F.instance_norm, images)
        table(F.instance_norm, images, *running, normal(6), normal(6), use_input_stats=True, momentum=0.2, eps=1e-3)
        table(F.instance_norm, images, *running, use_input_stats=False)
        table(torch.instance_norm, images, normal(6), normal(6), *running, True, 0.1, 1e-5, False)

# -- pooling and resampling --------------------------------------------------------------------------------------------

for dims, size in ((1, (7,)), (2, (6, 5)), (3, (5, 4, 4))):
    image = normal(2, 3, *size)
    table(f"avg_pool{dims}d", image, 2)
    table(f"avg_pool{dims}d", image, kernel_size=3, stride=2, padding=1, count_include_pad=False)
    table(f"adaptive_avg_pool{dims}d", image, 2)
    table(f"adaptive_avg_pool{dims}d", image[0], (3,) * dims)
    table(f"max_pool{dims}d", image, 2)
    table(f"max_pool{dims}d", image, 3, stride=2, padding=1, ceil_mode=True)
    table(f"max_pool{dims}d", image[0], 2, stride=1, dilation=2)
    table(f"max_pool{dims}d", image, 2, return_indices=True)
    table(f"max_pool{dims}d_with_indices", image, 2)
    table(f"adaptive_max_pool{dims}d", image, 2)
    table(f"adaptive_max_pool{dims}d_with_indices", image, 3)
    table(f"adaptive_max_pool{dims}d", image, 2, return_indices=True)
    table(f"lp_pool{dims}d", image, 2.0, 2)
    table(f"lp_pool{dims}d", image.abs(), 3.0, 2 if dims == 1 else (2,) * dims, stride=1)
    table(f"lp_pool{dims}d", image, float("inf"), 2)
    windows = torch.arange(4).view(1, 1, *(4 if d == 0 else 1 for d in range(dims))) * 2
    table(f"max_unpool{dims}d", normal(1, 1, *windows.shape[2:]), windows, 2, output_size=(8, *[2] * (dims - 1)))
    for mode in ("nearest", "nearest-exact", "area"):
        table(F.interpolate, image, scale_factor=2, mode=mode)
    smooth = {1: "linear", 2: "bilinear", 3: "trilinear"}[dims]
    table(F.interpolate, image, size=[s + 2 for s in size], mode=smooth, align_corners=True)
    table(F.interpolate, image, None, 0.5, smooth)
table(F.interpolate, normal(1, 2, 4, 5), scale_factor=(2.0, 1.5), mode="bicubic")
table(F.interpolate, normal(1, 2, 9, 8), size=(3, 4), mode="bilinear", antialias=True)
table(F.upsample, normal(1, 2, 3, 3), scale_factor=2)
table(F.upsample_nearest, normal(1, 2, 3, 3), scale_factor=2)
table(F.upsample_bilinear, normal(1, 2, 3, 3), size=(5, 5))
table("local_response_norm", normal(2, 5, 4), 3)
table("local_response_norm", normal(2, 5, 3, 2), size=2, alpha=0.1, beta=0.5, k=2.0)

# -- attention ---------------------------------------------------------------------------------------------------------

attention = F.scaled_dot_product_attention
q, k, v = normal(2, 3, 5, 4), normal(2, 3, 5, 4), normal(2, 3, 5, 4)
long_k, long_v = normal(2, 3, 7, 4), normal(2, 3, 7, 6)
attends = integers(2, 5, 7).bool() | torch.eye(5, 7).bool()
table(attention, q, k, v)
table(attention, q, long_k, long_v, scale=0.3)
table(attention, q, k, v, is_causal=True)
table(attention, q, long_k, long_v, attends)
table(attention, q, long_k, long_v, attn_mask=Fixed(normal(2, 1, 5, 7)))
table(attention, q, long_k, long_v, attn_mask=normal(5, 7))
table(attention, normal(2, 1, 4), normal(2, 1, 4), normal(2, 1, 4))  # one token
table(attention, normal(5, 4), normal(7, 4), normal(7, 4))
table(attention, q, k, v, None, 0.3, True)
table(attention, q, long_k, long_v, attends, dropout_p=0.3)
table(attention, normal(2, 4, 3, 4), normal(2, 2, 5, 4), normal(2, 2, 5, 4), enable_gqa=True)

tokens, context = normal(5, 2, 6), normal(7, 2, 6)
projections = (normal(18, 6), normal(18), None, None, False)
output = (normal(6, 6), normal(6))
padding = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
heads = F.multi_head_attention_forward
table(heads, tokens, context, context, 6, 2, *projections, 0.0, *output)
table(heads, tokens, context, context, 6, 3, *projections, 0.4, *output, key_padding_mask=padding, need_weights=False)
table(heads, tokens, tokens, tokens, 6, 2, *projections, 0.4, *output, attn_mask=~attends[:, :5], training=False)
table(
    heads, tokens, tokens, tokens, 6, 2, *projections, 0.0, *output, need_weights=False, is_causal=True,
    attn_mask=torch.ones(5, 5).triu(1).bool(),
)  # fmt: skip
table(
    heads, tokens[:, 0], context[:, 0], context[:, 0], 6, 2, None, None, None, None, False, 0.0, normal(6, 6), None,
    use_separate_proj_weight=True, q_proj_weight=normal(6, 6), k_proj_weight=normal(6, 6), v_proj_weight=normal(6, 6),
    average_attn_weights=False, attn_mask=Fixed(normal(2, 5, 7)),
)  # fmt: skip

# -- recurrent layers --------------------------------------------------------------------------------------------------

sequence = normal(3, 2, 3)  # (N, B, C)


def recurrent(
    gates: int, inputs: tuple[int, ...], biases: bool = True, hidden: int = 4, project: int = 0
) -> list[Tensor]:
    """The weights of a layer for each width of input."""
    h = project or hidden
    sizes = [[(gates * hidden, i), (gates * hidden, h)] for i in inputs]
    return [
        0.5 * normal(*size)
        for pair in sizes
        for size in (*pair, *([(gates * hidden,)] * 2 if biases else []), *([(project, hidden)] if project else []))
    ]


state = (normal(1, 2, 4), normal(1, 2, 4))
four_states = (normal(4, 2, 4), normal(4, 2, 4))
table("lstm", sequence, state, recurrent(4, (3,)), True, 1, 0.0, True, False, False)
table(
    "lstm",
    normal(2, 3, 3),
    (normal(2, 2, 4), normal(2, 2, 4)),
    recurrent(4, (3, 4), False),
    False,
    2,
    0.3,
    True,
    False,
    True,
)
table("lstm", sequence, four_states, recurrent(4, (3, 3, 8, 8)), True, 2, 0.3, False, True, False)
table(
    "lstm",
    sequence,
    (normal(1, 2, 2), normal(1, 2, 4)),
    recurrent(4, (3,), project=2),
    True,
    1,
    0.0,
    True,
    False,
    False,
)
table("gru", sequence, four_states[0], recurrent(3, (3, 3, 8, 8)), True, 2, 0.0, True, True, False)
table.each("rnn_tanh rnn_relu", sequence, state[0], recurrent(1, (3,)), True, 1, 0.0, True, False, False)
table("lstm_cell", sequence[0], (normal(2, 4), normal(2, 4)), *recurrent(4, (3,)))
table("gru_cell", sequence[0], normal(2, 4), *recurrent(3, (3,), False))
table("gru_cell", sequence[0], normal(2, 4), *recurrent(3, (3,)))
table.each("rnn_tanh_cell rnn_relu_cell", sequence[0], normal(2, 4), *recurrent(1, (3,)))
