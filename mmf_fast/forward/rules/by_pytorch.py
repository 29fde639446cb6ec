"""The functions whose tangent is PyTorch's own forward derivative.

A name is here because tests/forward/rules/test_operator_database.py found the tangent and the gradient through it
right, against differences in float64 and complex128, or found the tangent right and the gradient through it wrong: then
it serves SG_0 only. What is in no list is refused.
"""

from __future__ import annotations

from typing import Any

import torch

from mmf_fast.forward.dual import Value
from mmf_fast.forward.missing import missing_rule_error
from mmf_fast.forward.rules.families import by_pytorch, constant_arguments, forward_derivative, rule, spellings

# -- right in the graph ------------------------------------------------------------------------------------------------

_ELEMENTWISE = """
    exp2 expm1 log2 log10 log1p tan asin acos atan sinh cosh asinh acosh atanh arcsin arccos arctan arcsinh arccosh
    arctanh erf erfc erfcx erfinv ndtr ndtri log_ndtr lgamma gammaln digamma psi polygamma mvlgamma multigammaln i0 i0e
    i1 i1e entr logit deg2rad rad2deg nan_to_num angle sgn copysign frexp ldexp nextafter fill
    maximum minimum fmax fmin clamp clip clamp_min clamp_max addcmul addcdiv lerp atan2 arctan2 hypot logaddexp2 xlogy
    xlog1py complex polar conj_physical constant_pad_nd
"""
_ACTIVATIONS = """
    relu6 hardtanh mish celu selu logsigmoid hardswish softsign tanhshrink hardshrink softshrink threshold prelu rrelu
    softmin alpha_dropout feature_alpha_dropout
"""
_REDUCTIONS = """
    var var_mean prod logsumexp max min amax amin aminmax median nanmedian mode kthvalue sort msort topk
    cummax cummin nanmean nansum quantile nanquantile matrix_norm renorm
    dist trapz trapezoid cumulative_trapezoid diff gradient corrcoef
"""
_PRODUCTS = """
    dot vdot vecdot mv inner outer ger kron cross chain_matmul multi_dot tensordot addmm addmv addr addbmm baddbmm
    bilinear matrix_power matrix_exp vander cartesian_prod combinations block_diag
"""
_WRITES = """
    scatter scatter_add index_add index_copy index_fill index_put masked_scatter select_scatter slice_scatter
    diagonal_scatter put
"""
_POOLING = """
    max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices
    max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices
    adaptive_max_pool3d_with_indices fractional_max_pool2d fractional_max_pool3d lp_pool1d lp_pool2d lp_pool3d
    local_response_norm
"""
_LOSSES = """
    mse_loss l1_loss smooth_l1_loss huber_loss kl_div cross_entropy nll_loss binary_cross_entropy gaussian_nll_loss
    binary_cross_entropy_with_logits poisson_nll_loss soft_margin_loss multilabel_soft_margin_loss margin_ranking_loss
    hinge_embedding_loss cosine_embedding_loss triplet_margin_loss triplet_margin_with_distance_loss
"""
_FOURIER = """
    fft ifft fft2 ifft2 fftn ifftn rfft irfft rfft2 irfft2 rfftn irfftn hfft ihfft hfft2 ihfft2 hfftn ihfftn stft istft
"""
_BEHIND_OTHERS = """
    as_strided_scatter native_group_norm _unsafe_masked_index _unsafe_masked_index_put_accumulate
"""
_LINEAR_ALGEBRA = """
    inv inv_ex inverse tensorinv eigvals svd svdvals svd_lowrank pca_lowrank qr lu lu_factor lu_factor_ex lu_solve
    lu_unpack solve_triangular cond
"""
for _names in (
    _ELEMENTWISE,
    _ACTIVATIONS,
    _REDUCTIONS,
    _PRODUCTS,
    _WRITES,
    _POOLING,
    _LOSSES,
    _FOURIER,
    _BEHIND_OTHERS,
    _LINEAR_ALGEBRA,
):
    by_pytorch(*spellings(*_names.split()))
_aten = torch.ops.aten
by_pytorch(_aten._softmax_backward_data, _aten.slice.Tensor, _aten._upsample_bilinear2d_aa)
by_pytorch(_aten.max_pool2d_with_indices_backward)

# -- right without a graph only: saved factors count as constants, or there is no second derivative --------------------

_NAMES_WITHOUT_GRAPH = """
    det slogdet logdet solve solve_ex tensorsolve triangular_solve cholesky cholesky_ex cholesky_inverse cholesky_solve
    eigh eigvalsh householder_product orgqr pinv pinverse eig
"""
WITHOUT_GRAPH = spellings(*_NAMES_WITHOUT_GRAPH.split())
by_pytorch(*WITHOUT_GRAPH, in_graph=False)  # linear_algebra.py, which is imported later, has rules of most

# -- right for some arguments only -------------------------------------------------------------------------------------


@rule("cov")
def cov(input: Value, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    constant_arguments(torch.cov, (*args, *kwargs.values()))  # aweights count as constants in their own normalisation
    return forward_derivative(torch.cov, (input, *args), kwargs)


@rule("scatter_reduce")
def scatter_reduce(input: Value, dim: int, index: Any, src: Value, reduce: str, **kwargs: Any) -> tuple[Any, Any]:
    if reduce == "prod":
        raise missing_rule_error(torch.scatter_reduce, "PyTorch gives a zero tangent to reduce='prod'")
    return forward_derivative(torch.scatter_reduce, (input, dim, index, src, reduce), kwargs)
