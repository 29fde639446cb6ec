"""PyTorch's own database of operators, with sample arguments, and what central differences say about a rule on them.

A sample is a function of its floating-point tensors xs. Of a rule that gives (y, dy) at (xs, dxs) three things are
judged: y equals the plain call's; dy equals the difference quotient of the plain call along dxs; the gradient of
<g, y> + <h, dy> equals the difference quotient of that functional. Entries where two step sizes disagree are kinks,
which differences cannot judge, and are left out.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_unflatten

from mmf_fast.forward import dual
from mmf_fast.forward.dual import DetachedDual, Dual, primal, tangent
from mmf_fast.forward.missing import MissingRuleError

# Importing PyTorch's test tools forbids the whole process to set its switches, as our engines do on a GPU.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

STEP = 1e-4
TOLERANCE = 1e-6
DTYPES = (torch.float64, torch.complex128)
_SKIPPED = ("empty", "new_empty", "jiterator")  # values of memory that nothing has written, kernels of a GPU


def name_of(op: Any) -> str:
    return f"{op.name}:{op.variant_test_name}" if op.variant_test_name else op.name


def supports(op: Any, dtype: torch.dtype) -> bool:
    return op.supports_dtype(dtype, "cpu")


OPERATORS = [op for op in op_db if any(supports(op, d) for d in DTYPES) and not name_of(op).startswith(_SKIPPED)]


def is_float(x: Any) -> bool:
    return isinstance(primal(x), Tensor) and (primal(x).is_floating_point() or primal(x).is_complex())


@dataclass
class Sample:
    """One call of an operator; `function` may stand for op.op, with the same arguments."""

    op: Any
    leaves: list[Any]
    spec: Any
    post: Callable[[Any], Any]
    moving: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.moving = [i for i, leaf in enumerate(self.leaves) if is_float(leaf) and leaf.layout == torch.strided]

    def call(self, xs: list[Any], function: Any = None) -> list[Any]:
        """The floating-point results, flat; random functions draw alike in each call."""
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        for i, x in zip(self.moving, xs, strict=False):
            leaves[i] = x
        (input, args, kwargs) = tree_unflatten(leaves, self.spec)
        torch.default_generator.manual_seed(0)  # torch.manual_seed formats a traceback for each kind of accelerator
        function = function or self.op.op
        if getattr(Tensor, getattr(function, "__name__", ""), None) is function and isinstance(input, Dual):
            function = getattr(type(input), function.__name__)  # a method of Tensor is looked up on the Dual
        result = self.op.gradcheck_wrapper(function, input, *args, **kwargs)
        if self.op.name != "linalg.eigvalsh":  # it would take a Dual for a tuple
            result = self.post(result)
        return [y for y in tree_flatten(result, is_leaf=lambda x: isinstance(x, Dual))[0] if is_float(y)]


def samples(op: Any, dtype: torch.dtype, limit: int | None) -> Iterator[Sample]:
    for seed in (torch.default_generator.manual_seed, random.seed, numpy.random.seed):  # they draw from all three
        seed(0)
    # op.sample_inputs looks up in the stack which test asks, once a sample: most of the time of this gate.
    for sample in list(itertools.islice(op.sample_inputs_func(op, "cpu", dtype, False), limit)):
        leaves, spec = tree_flatten((sample.input, tuple(sample.args), sample.kwargs))
        yield Sample(op, leaves, spec, sample.output_process_fn_grad)


def directions(xs: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in xs]


def moved(xs: list[Tensor], dxs: list[Tensor], step: float) -> list[Tensor]:
    return [x + step * dx for x, dx in zip(xs, dxs, strict=True)]


def slopes(f: Callable[[float], list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """f'(0) of each result of f, by differences of fourth order, and where two steps agree on it."""
    out = []
    for at, a, b, c, d in zip(*(f(i * STEP) for i in (0, 1, -1, 2, -2)), strict=True):
        near, far = (a - b) / (2 * STEP), (c - d) / (4 * STEP)
        scale = max(1e-2, near[near.isfinite()].abs().max().item() if near.isfinite().any() else 0)
        continuous = ((a + b) / 2 - at).abs() <= 1e-2 * STEP * scale
        smooth = near.isfinite() & continuous & ((near - far).abs() <= 1e-4 * scale)
        out.append(((4 * near - far) / 3, smooth))
    return out


def inner(g: list[Tensor], ys: list[Tensor]) -> Tensor:
    return sum(
        ((a.conj() * y).sum().real for a, y in zip(g, ys, strict=True)), start=torch.zeros((), dtype=torch.float64)
    )


def tangents(ys: list[Any]) -> list[Tensor]:
    return [torch.zeros_like(primal(y)) if tangent(y) is None else tangent(y) for y in ys]


def judge(sample: Sample, kind: type[Dual], count: int | None = None, function: Any = None) -> str:
    """What becomes of a sample whose first `count` variables (by default all) are Duals of this kind.

    "right", "wrong: what", "refused: why"; "plain" (nothing floating in or out), "kink" or "conversion" (to fewer
    digits), where differences say nothing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _judge(sample, kind, count, function)


def _judge(sample: Sample, kind: type[Dual], count: int | None, function: Any) -> str:
    xs = [sample.leaves[i].clone() for i in sample.moving[:count]]
    dxs = directions(xs, 1)
    try:
        plain = sample.call(xs)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return "plain"
    if not xs or not plain:
        return "plain"
    if any(torch.finfo(y.dtype).eps > torch.finfo(x.dtype).eps for y in plain for x in xs):
        return "conversion"
    leaves = [x.requires_grad_(i < len(xs) or kind is Dual) for i, x in enumerate((*xs, *dxs))]
    n = len(xs)
    try:
        out = sample.call([kind(x, dx) for x, dx in zip(leaves[:n], leaves[n:], strict=True)], function)
    except MissingRuleError as error:
        return f"refused: {error.args[0].partition(': ')[2]}"
    except (TypeError, AttributeError):
        return "refused: it is looked up on tensors only"
    except Exception as error:
        return f"wrong: raises {type(error).__name__} {error}"
    if [primal(y).shape for y in out] != [y.shape for y in plain] or [y.dtype for y in out] != [y.dtype for y in plain]:
        return "wrong: shape or dtype of the primal"
    if any(
        tangent(y) is not None and (y.tangent.shape != y.primal.shape or y.tangent.dtype != y.primal.dtype) for y in out
    ):
        return "wrong: shape or dtype of the tangent"
    if any(_error(primal(y).detach(), p) > 1e-10 for y, p in zip(out, plain, strict=True)):
        return "wrong: primal"
    first = sample.call([kind(xs[0], dxs[0]), *xs[1:]], function) if n > 1 else out
    if not all(stored_alike(list(zip(xs, dxs, strict=True)), ys) for ys in (out, first)):
        return "wrong: the primal is fresh and the tangent a view, or the other way round"
    with torch.no_grad():
        truth = slopes(lambda h: sample.call(moved(xs, dxs, h)))
    dys = tangents(out)
    tolerance = TOLERANCE + _rounding(xs)
    for dy, (expected, smooth) in zip(dys, truth, strict=True):
        if (error := _error(dy.detach()[smooth], expected[smooth], expected[smooth])) > tolerance:
            return f"wrong: tangent {error:.1e}"
    if sum(y.numel() for y in plain) and not any(smooth.any() for _, smooth in truth):
        return "kink"
    if kind is DetachedDual:
        return _judge_detached(sample, out, leaves[:n])
    smooth = [smooth for _, smooth in truth]
    g, h = ([w * s for w, s in zip(directions(plain, seed), smooth, strict=True)] for seed in (2, 3))

    def functional(out: list[Any]) -> Tensor:
        return inner(g, [primal(y) for y in out]) + inner(h, tangents(out))

    def shifted(step: float) -> list[Tensor]:
        at = moved(leaves, ways, step)
        return [functional(sample.call([kind(x, dx) for x, dx in zip(at[:n], at[n:], strict=True)], function))]

    loss, ways = functional(out), directions(leaves, 4)
    if not loss.requires_grad:
        return "right"  # constant
    try:
        gradients = _gradients(loss, leaves)
    except (RuntimeError, NotImplementedError) as error:
        return "right" if all(tangent(y) is None for y in out) else f"wrong: no backward, {error}"
    with torch.no_grad():
        ((expected, smooth),) = slopes(shifted)
    if not smooth:
        return "right, the gradient at a kink"
    actual = inner(gradients, ways)
    scale = max(1e-2, expected.abs().item(), *(a.norm().item() for a in gradients))
    if not abs(actual - expected) <= tolerance * scale:
        if not _autograd_differentiates(sample, leaves[:n], g):
            return "right, as far as autograd is"
        return f"wrong: gradient {actual.item():.4g} for {expected.item():.4g}"
    return "right"


def _gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Dense: that of embedding(sparse=True) is not."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [g if g.layout == torch.strided else g.to_dense() for g in found]


def _rounding(xs: list[Tensor]) -> float:
    """What rounding x + STEP dx alone does to a difference quotient: 4e-6 of it where |x| is 2e6."""
    largest = max((x.detach().abs().max().item() for x in xs if x.numel()), default=0.0)
    return torch.finfo(torch.float64).eps * largest / STEP if largest < float("inf") else 0.0


def _autograd_differentiates(sample: Sample, xs: list[Tensor], g: list[Tensor]) -> bool:
    """Whether the gradient of the plain call is its derivative: scale_grad_by_freq, indices that occur twice, ..."""
    ways = directions(xs, 4)
    gradients = _gradients(inner(g, sample.call(xs)), xs)
    with torch.no_grad():
        ((expected, _),) = slopes(lambda h: [inner(g, sample.call(moved(xs, ways, h)))])
    return bool((inner(gradients, ways) - expected).abs() <= 1e-5 * max(1e-2, expected.abs().item()))


def _judge_detached(sample: Sample, out: list[Any], xs: list[Tensor]) -> str:
    """SG_0: no graph behind the tangent, and autograd's own gradient of the primal."""
    if any(dy.requires_grad for dy in tangents(out)):
        return "wrong: the tangent is in the graph"
    try:
        plain = sample.call(xs)
    except RuntimeError:  # autograd has no gradient of an argument, such as the weight of binary_cross_entropy
        return "right"
    if [y.requires_grad for y in plain] != [primal(y).requires_grad for y in out]:
        return "wrong: what requires a gradient"
    g = directions([y.detach() for y in plain], 2)
    pairs = []
    for ys in (plain, [primal(y) for y in out]):
        loss = inner(g, ys)
        if not loss.requires_grad:
            return "right"
        try:
            pairs.append(_gradients(loss, xs))
        except (RuntimeError, NotImplementedError):  # no backward at all
            return "right"
    if any(_error(b, a) > 1e-10 for a, b in zip(*pairs, strict=True)):
        return "wrong: gradient of the primal"
    return "right"


def stored_alike(inputs: list[tuple[Tensor, Tensor]], out: list[Any]) -> bool:
    """A fresh primal has a fresh tangent, and a view of an input's primal the same view of its tangent."""

    def memory(x: Tensor) -> int:
        return x.untyped_storage().data_ptr()

    for y, dy in ((y.primal, y.tangent) for y in out if tangent(y) is not None and y.primal.numel()):
        for x, dx in inputs:
            if (memory(y) == memory(x)) != (memory(dy) == memory(dx)) or memory(dy) == memory(x):
                return False
            if memory(y) == memory(x) and (y.stride() != dy.stride() or y.storage_offset() != dy.storage_offset()):
                return False
    return True


def _error(a: Tensor, b: Tensor, scale: Tensor | None = None) -> float:
    """Largest deviation over largest entry, where b is finite; infinite where a is not."""
    finite = b.isfinite()
    a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0
    if not a.isfinite().all():
        return float("inf")
    return ((a - b).abs().max() / max(1e-2, b.abs().max().item())).item()


# -- what becomes of an operator ---------------------------------------------------------------------------------------


@dataclass
class Row:
    name: str
    way: str  # own rule, PyTorch's, constant, or composed of other functions
    graph: str  # SG_1: right, right in its first argument, refused: why, takes no Dual, or wrong: what
    detached: str  # SG_0

    @property
    def wrong(self) -> list[str]:
        return [
            f"{kind} {what}"
            for kind, what in (("SG_1", self.graph), ("SG_0", self.detached))
            if what.startswith("wrong")
        ]


def row(op: Any, limit: int | None) -> Row:
    """An operator's row, from the first `limit` samples of each dtype."""
    rule = dual._RULES.get(op.op)
    way = "own rule" if rule else "constant" if op.op in dual._NO_TANGENT else "composed"
    if rule is not None and rule.__name__ == "rule_of_pytorch":
        way = "PyTorch's"
    return Row(name_of(op), way, *(_status(op, kind, limit) for kind in (Dual, DetachedDual)))


def _status(op: Any, kind: type[Dual], limit: int | None) -> str:
    found = [(s, judge(s, kind)) for dtype in DTYPES if supports(op, dtype) for s in samples(op, dtype, limit)]
    found += [(s, judge(s, kind, 1)) for s, verdict in found if verdict.startswith("refused") and len(s.moving) > 1]
    verdicts = [verdict for _, verdict in found]
    wrong = [v for v in verdicts if v.startswith("wrong")]
    refused = [v for v in verdicts if v.startswith("refused")]
    if wrong:
        return wrong[0]
    if any(v.startswith("right") for v in verdicts):
        return "right in some arguments" if refused else "right"
    return refused[0] if refused else "takes no Dual" if "plain" in verdicts or not verdicts else verdicts[0]


# -- the page ----------------------------------------------------------------------------------------------------------

SAMPLES = 3
_WAYS = {
    "own rule": "Right in both kinds, by a rule of our own",
    "PyTorch's": "Right in both kinds, by PyTorch's forward derivative",
    "composed": "Right in both kinds, made of others",
    "constant": "Results that carry no tangent",
}
_PREFACE = """# What becomes of PyTorch's operators

Written by `make operators` with torch 2.13 from PyTorch's own database of operators: each entry runs on Duals in
float64 and complex128; its value, tangent and gradient through the tangent are held against differences. A star marks
those that refuse some of their arguments or options.
"""


def section(row: Row) -> str:
    """The title under which the page has an operator, and a star if it refuses some arguments."""
    star = " *" if "some" in row.graph + row.detached else ""
    if row.way == "constant" or row.graph.startswith("right"):
        return _WAYS[row.way] + star
    if row.detached.startswith("right"):
        return "Right without a graph only (SG_0): PyTorch's gradient through its tangent is wrong or missing" + star
    if row.graph.startswith("refused"):
        return f"Refused: {row.graph.partition(': ')[2]}"
    return "Not judged: no Dual goes in, or differences say nothing of what comes out"


def page(rows: list[Row]) -> str:
    """docs/operators.md."""
    titles = {row.name: section(row) for row in rows}
    lines = [_PREFACE]
    for title in sorted({title.removesuffix(" *") for title in titles.values()}, key=lambda t: ("Right" not in t, t)):
        names = [f"`{name}`" + t.removeprefix(title) for name, t in titles.items() if t.removesuffix(" *") == title]
        lines += [f"## {title} ({len(names)})", "", ", ".join(sorted(names)), ""]
    return "\n".join(lines)


def read_page(text: str) -> dict[str, str]:
    """The section of each operator on a page, as `section` says it."""
    found = {}
    for part in text.split("\n## ")[1:]:
        title, _, names = part.partition("\n")
        for name in names.strip().split(", "):
            found[name.strip("` *")] = title.rpartition(" (")[0] + (" *" if name.endswith("*") else "")
    return found


if __name__ == "__main__":
    print(page([row(op, SAMPLES) for op in OPERATORS]), end="")
