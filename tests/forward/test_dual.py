"""Dual as a data type: a tuple to containers, a tensor to torch, symbolic zeros, errors; and the public jvp."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import mmf_fast
from mmf_fast import MissingRuleError, jvp, register_rule
from mmf_fast.forward import dual
from mmf_fast.forward.dual import DetachedDual, Dual, primal, tangent, tangent_scope

KINDS = (Dual, DetachedDual)
every_kind = pytest.mark.parametrize("kind", KINDS)


def tensor(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


@pytest.fixture
def no_new_rules() -> Iterator[None]:
    """Forget what a test registers."""
    rules, constants = dict(dual._RULES), set(dual._NO_TANGENT)
    yield
    dual._RULES.clear()
    dual._RULES.update(rules)
    dual._NO_TANGENT.clear()
    dual._NO_TANGENT.update(constants)


# -- a tuple to containers ---------------------------------------------------------------------------------------------


@every_kind
def test_containers_find_the_tensors(kind: type[Dual]) -> None:
    x, dx = tensor(2, 3), tensor(2, 3)
    assert kind(x, dx).primal is x and kind(x, dx).tangent is dx
    leaves, spec = pytree.tree_flatten({"x": kind(x, dx)})
    assert [id(leaf) for leaf in leaves] == [id(x), id(dx)]
    assert type(pytree.tree_unflatten(leaves, spec)["x"]) is kind
    doubled = pytree.tree_map(lambda t: 2 * t, kind(x, dx))
    assert type(doubled) is kind and torch.equal(doubled.tangent, 2 * dx)


@every_kind
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(kind: type[Dual], duplicate: Callable[[Any], Any]) -> None:
    x = kind(tensor(3), None)
    same = duplicate(x)
    assert type(same) is kind and torch.equal(same.primal, x.primal) and same.tangent is None


@every_kind
def test_repr_names_both_parts(kind: type[Dual]) -> None:
    assert repr(kind(torch.zeros(1), None)) == f"{kind.__name__}(primal=tensor([0.]), tangent=None)"


def test_a_number_is_formatted_as_the_primal() -> None:
    x = torch.tensor(1.25)
    assert f"{Dual(x, x):.1f}" == f"{x:.1f}" and "tangent" in f"{Dual(x, x)}"
    with pytest.raises(TypeError):
        f"{Dual(x[None], x[None]):.1f}"


def test_duals_can_be_members_of_sets_and_keys() -> None:
    x = Dual(tensor(2), tensor(2))
    assert {x: 1}[x] == 1


# -- a tensor to torch -------------------------------------------------------------------------------------------------


@every_kind
def test_metadata_is_the_primals(kind: type[Dual]) -> None:
    x = kind(tensor(2, 3), tensor(2, 3))
    assert (x.shape, x.ndim, x.dtype, x.device) == ((2, 3), 2, torch.float64, torch.device("cpu"))
    assert x.size(-1) == 3 and x.dim() == 2 and x.numel() == 6 and x.is_floating_point() and not x.requires_grad
    assert not x.is_cuda and not x.is_nested and not x.is_sparse
    assert torch.is_floating_point(x) and torch.numel(x) == 6
    assert torch.equal(x.T.tangent, x.tangent.T) and torch.equal(x.mT.primal, x.primal.mT)


def test_hasattr_probing() -> None:
    x = Dual(tensor(2), tensor(2))
    assert hasattr(x, "reshape") and hasattr(x, "shape")
    assert not hasattr(x, "is_no_attribute") and not hasattr(x, "keys") and not hasattr(x, "histc")
    assert getattr(x, "grad_fn", "default") == "default"


@every_kind
@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        None,
        ...,
        slice(1, None),
        (..., None),
        (slice(None), 1),
        (None, 0, ..., slice(None, None, 2)),
        ([0, 1], [2, 0]),
    ],
)
def test_indexing(kind: type[Dual], index: Any) -> None:
    x = kind(tensor(2, 3, 4), tensor(2, 3, 4))
    out = x[index]
    assert type(out) is kind
    assert torch.equal(out.primal, x.primal[index]) and torch.equal(out.tangent, x.tangent[index])


def test_boolean_masks() -> None:
    x = Dual(tensor(3, 4), tensor(3, 4))
    out = x[x > 0]
    assert torch.equal(out.primal, x.primal[x.primal > 0]) and torch.equal(out.tangent, x.tangent[x.primal > 0])


ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.truediv)


@every_kind
@pytest.mark.parametrize("function", ARITHMETIC)
@pytest.mark.parametrize("other", [2, 0.5, torch.tensor(3.0, dtype=torch.float64), tensor(3), tensor(4, 1)])
def test_arithmetic_broadcasts_tangents_to_the_full_shape(kind: type[Dual], function: Any, other: Any) -> None:
    for x in (kind(tensor(3) + 3, tensor(3)), kind(tensor() + 3, tensor())):
        for out, plain in (
            (function(x, other), function(x.primal, other)),
            (function(other, x), function(other, x.primal)),
        ):
            assert type(out) is kind
            assert out.shape == plain.shape == out.tangent.shape and torch.equal(out.primal, plain)
            assert out.tangent.dtype == plain.dtype


def test_mixed_dtypes_promote() -> None:
    single, double = Dual(torch.ones(3), torch.ones(3)), tensor(3)
    for out in (single + double, double * single, single @ double.float(), torch.cat([single, Dual(double, double)])):
        assert out.tangent.dtype == out.primal.dtype
    assert (single + double).dtype == torch.float64
    assert (Dual(torch.ones(3).bfloat16(), torch.ones(3).bfloat16()) * torch.ones(3)).tangent.dtype == torch.float32


# -- symbolic zeros ----------------------------------------------------------------------------------------------------


@every_kind
def test_a_symbolic_zero_dissolves(kind: type[Dual]) -> None:
    x = kind(tensor(2, 3), None)
    for out in (
        x + 1,
        torch.exp(x),
        x.view(3, 2),
        torch.cat([x, x]),
        nn.Linear(3, 2).double()(x),
        x[0],
        -x,
        x @ tensor(3),
    ):
        assert type(out) is Tensor
    assert type(torch.histc(kind(torch.eye(2), None))) is Tensor  # no rule is needed


class Count(TorchDispatchMode):
    """Counts the matrix products that run."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("carriers", "products"), [("", 1), ("a", 2), ("b", 2), ("ab", 3)])
def test_symbolic_zeros_skip_work(carriers: str, products: int) -> None:
    a, b = (Dual(tensor(3, 3), tensor(3, 3) if name in carriers else None) for name in "ab")
    for function in (torch.matmul, torch.mm, nn.functional.linear):
        with Count() as count:
            function(a, b)
        assert count.products == products


def test_of_two_detached_or_attached_duals_the_detached_wins() -> None:
    w = torch.ones(3, requires_grad=True)
    attached, detached = Dual(w, w), DetachedDual(w, w)
    for out in (attached * detached, detached * attached):
        assert not out.tangent.requires_grad


# -- rules -------------------------------------------------------------------------------------------------------------


def test_a_registered_rule_serves_functions_methods_and_operators(no_new_rules: None) -> None:
    @torch.library.custom_op("mmf_fast_tests::cube", mutates_args=())
    def cube(x: Tensor) -> Tensor:
        return x**3

    x = Dual(tensor(3), tensor(3))
    with pytest.raises(MissingRuleError, match="cube"):
        cube(x)

    @register_rule(torch.ops.mmf_fast_tests.cube.default)
    def rule(x: Any) -> tuple[Any, Any]:
        with tangent_scope(x):
            return cube(x.primal), 3 * x.primal**2 * x.tangent

    assert torch.equal(cube(x).tangent, 3 * x.primal**2 * x.tangent)

    @register_rule(torch.histc, Tensor.histc)
    def histc(x: Any, bins: int) -> tuple[Any, Any]:
        return x.primal.histc(bins), x.primal.new_ones(())  # broadcast to the shape of the result

    assert torch.equal(x.histc(3).tangent, torch.ones(3)) and torch.equal(torch.histc(x, 3).tangent, torch.ones(3))


class Inner(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.histc(3)


def test_the_error_names_operation_module_and_ways_out_in_one_line() -> None:
    net = nn.Sequential(nn.Identity(), nn.ModuleDict({"a": Inner()})["a"])
    with pytest.raises(MissingRuleError) as caught:
        net(Dual(tensor(3), tensor(3)))
    message, _, rule = str(caught.value).partition("\n")
    assert message.startswith("no forward-mode rule for histc in 1 (Inner): ")
    assert "register_rule" in message and 'jvp="func"' in message
    assert rule.startswith("@mmf_fast.register_rule(torch.Tensor.histc)") and rule == caught.value.rule


def test_the_rule_that_an_error_prints_serves(no_new_rules: None) -> None:
    del dual._RULES[torch.exp]
    with pytest.raises(MissingRuleError) as caught:
        torch.exp(Dual(tensor(3), tensor(3)))
    exec(caught.value.rule, {"torch": torch, "mmf_fast": mmf_fast})
    y, dy = jvp(torch.exp, (tensor(3),), (tensor(3),))
    torch.testing.assert_close((y, dy), (tensor(3).exp(), tensor(3).exp() * tensor(3)))


@every_kind
def test_the_length_is_the_primals(kind: type[Dual]) -> None:
    x = kind(tensor(5, 2), tensor(5, 2))
    assert len(x) == 5 and torch.equal((x.sum(0) / len(x)).tangent, x.tangent.sum(0) / 5)
    assert type(x._replace(tangent=None)) is kind and len(pytree.tree_leaves(x)) == 2  # a tuple of two to containers
    with pytest.raises(TypeError, match="0-d"):
        len(kind(tensor(), tensor()))


def test_truth_value_and_number_do_not_pass_for_a_tensors() -> None:
    with pytest.raises(MissingRuleError, match=r"x\.primal"):
        bool(Dual(torch.ones(()), torch.ones(())))
    with pytest.raises(TypeError):
        float(Dual(torch.ones(()), torch.ones(())))  # type: ignore[arg-type]


def test_a_rule_may_not_give_a_real_result_a_complex_tangent(no_new_rules: None) -> None:
    """It would lose its imaginary part without a word."""
    register_rule(torch.histc)(lambda x: (x.primal, x.primal * 1j))
    with pytest.raises(MissingRuleError, match="histc.*real part"):
        torch.histc(Dual(tensor(3), tensor(3)))


# -- compilation -------------------------------------------------------------------------------------------------------


def many_operations(x: Any, a: Tensor) -> Any:
    x = torch.cat([x, a], dim=0).reshape(2, -1, 4)
    x = torch.where(x > 0, x, 0.2 * x).transpose(1, 2).unflatten(1, (2, 2)).flatten(1, 2)
    x = (2 - x) / (1 + x**2) + x.softmax(-1) * a.mean() - 2**x
    x = torch.matmul(torch.einsum("bij,bkj->bik", x, x[:, :2]), a[:2, :2])
    left, right = x.chunk(2, dim=1)
    return torch.stack([left.amax(1), right.var(1), left.norm(dim=1)], -1).sum(-1).clamp(-3, 3)


@every_kind
def test_compiles_whole_and_without_a_second_graph(kind: type[Dual]) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x, dx, a: many_operations(kind(x, dx), a), fullgraph=True, backend=backend)
    for seed in range(3):
        torch.manual_seed(seed)
        x, dx, a = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
        out, expected = compiled(x, dx, a), many_operations(kind(x, dx), a)
        assert type(out) is kind and out.tangent.requires_grad == (kind is Dual)
        assert torch.allclose(out.primal, expected.primal) and torch.allclose(out.tangent, expected.tangent)
    assert len(graphs) == 1


@every_kind
@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv", "pow", "mod", "floordiv", "lt", "ge", "eq", "ne"])
@pytest.mark.parametrize("order", ["dual tensor", "tensor dual", "dual dual", "number dual", "dual number"])
def test_operators_compile(kind: type[Dual], name: str, order: str) -> None:
    torch._dynamo.reset()
    function, operands = getattr(operator, name), {"dual": kind(tensor(2, 2).abs() + 1, tensor(2, 2))}
    operands |= {"tensor": tensor(2, 2).exp() + 0.2, "number": 2.0}  # type: ignore[dict-item]
    a, b = (operands[operand] for operand in order.split())
    expected = function(a, b)
    out = torch.compile(lambda a, b: function(a, b), fullgraph=True, backend="eager")(a, b)
    assert type(out) is type(expected) and torch.equal(primal(out), primal(expected))
    assert tangent(out) is None or torch.equal(tangent(out), tangent(expected))


@pytest.mark.parametrize("spelling", [operator.matmul, torch.matmul])
@pytest.mark.parametrize("operands", [(0, 1), (1, 0), (0, 0)])
def test_matrix_products_compile_outside_a_pass_or_are_refused(spelling: Any, operands: tuple[int, int]) -> None:
    """Until jvp has taught it better, Dynamo traces `dual @ tensor` with operands swapped, as matmul(tensor, dual)."""
    torch._dynamo.reset()
    pair = Dual(tensor(2, 2), tensor(2, 2) + 1), tensor(2, 2) - 3
    a, b = (pair[i] for i in operands)
    try:
        out = torch.compile(lambda a, b: spelling(a, b), fullgraph=True, backend="eager")(a, b)
    except torch._dynamo.exc.TorchDynamoException as error:
        assert "matmul" in str(error) and spelling is operator.matmul
    else:
        assert torch.equal(out.tangent, torch.matmul(a, b).tangent)


def test_where_dynamo_does_not_see_the_dual_compilation_refuses() -> None:
    """Outside a pass Dynamo would put such a call into its graph and split the result by rows."""
    torch._dynamo.reset()
    x = Dual(tensor(2, 2), tensor(2, 2) + 1)

    def function(x: Any) -> Any:
        return torch.cat((x, x))

    with pytest.raises(Exception, match="does not see this Dual"):
        torch.compile(function, fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()
    out = torch.compile(function, backend="eager")(x)  # runs this call outside the graph
    assert type(out) is Dual and torch.equal(out.tangent, function(x).tangent)


# -- jvp ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dual", "func"])
def test_jvp_modes_agree_with_the_derivative(mode: str) -> None:
    x, dx = tensor(3), tensor(3)
    y, dy = jvp(lambda x, c: c * torch.sin(x), (x, tensor(3)), (dx, None), mode=mode)
    assert torch.allclose(y, tensor(3) * x.sin()) and torch.allclose(dy, tensor(3) * x.cos() * dx)


def test_jvp_by_finite_differences_is_near() -> None:
    x, dx = tensor(3), tensor(3)
    assert torch.allclose(jvp(torch.sin, (x,), (dx,), mode="finite_difference")[1], x.cos() * dx, atol=1e-2)


@pytest.mark.parametrize("tangent_grad", [True, False])
def test_jvp_of_a_constant_is_zero_and_gradients_are_optional(tangent_grad: bool) -> None:
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    y, dy = jvp(lambda x: w * 1.0, (tensor(3),), (tensor(3),), tangent_grad=tangent_grad)
    assert torch.equal(dy, torch.zeros(3)) and y.requires_grad
    assert jvp(lambda x: w * x, (tensor(3),), (tensor(3),), tangent_grad)[1].requires_grad == tangent_grad


@pytest.mark.parametrize(("arguments", "options", "message"), [
    (((tensor(3),), (tensor(2),)), {}, "shape"),
    (((tensor(3),), ()), {}, "one tangent"),
    (((tensor(3),), (tensor(3),)), {"mode": "reverse"}, "choose one of dual, func, finite_difference"),
])  # fmt: skip
def test_jvp_refuses_what_does_not_fit(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jvp(torch.sin, *arguments, **options)
    with pytest.raises(TypeError, match="one tensor"):
        jvp(lambda x: (x.sin(), x), (tensor(3),), (tensor(3),))
