"""mmf doctor module:function: what of a network runs as a Dual, what does not and why, and how exact it is.

The function builds the network u(z, r, t), an nn.Module; --shape is that of one sample. Or name a class and give the
call: --call "lambda net, z, r, t: net(z, t)".
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmf_fast.contract import check_network, check_output
from mmf_fast.forward import jvp
from mmf_fast.registry import import_object

__all__ = ["examine", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 where the network runs as a Dual and is exact, else 1. Raises ValueError for what cannot be built."""
    parser = argparse.ArgumentParser(prog="mmf doctor", description=__doc__)
    parser.add_argument("network", metavar="MODULE:FUNCTION", help="builds the network, without arguments")
    parser.add_argument("--shape", required=True, help="of one sample: 3,32,32")
    parser.add_argument(
        "--call",
        help="how a batch of 2 is given to the network, where it is called otherwise, or has labels: "
        "'lambda net, z, r, t: net(z, r, t, y=torch.zeros(2, dtype=torch.long))'",
    )
    parser.add_argument("--no-compile", action="store_true", help="do not try torch.compile, which takes a while")
    options = parser.parse_args(arguments)
    net = _built(options.network)
    try:
        shape = tuple(int(size) for size in options.shape.split(","))
        call = eval(options.call) if options.call else None  # the user's own command line
    except (ValueError, SyntaxError, NameError) as error:
        raise ValueError(f"--shape is like 3,32,32 and --call like lambda net, z, r, t: net(z, t): {error}") from None
    findings = examine(net, shape, call, compiling=not options.no_compile)
    for name, verdict in findings.items():
        print(f"{name:36} {verdict}")
    return 0 if all(verdict.startswith(("yes", "exact")) for verdict in findings.values()) else 1


def _built(name: str) -> nn.Module:
    build = import_object(name)
    try:
        net = build()
    except Exception as error:
        way_out = "; name a function without arguments" if isinstance(error, TypeError) else ""
        raise ValueError(f"{name} builds no network: {_line(error)}{way_out}") from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"{name} returned a {type(net).__name__}, not an nn.Module")
    return net


class _Precision(NamedTuple):
    """dtype: of the examination.  bound: of relative errors, and `rough` against differences over h: these see the
    rounding of an embedding of time in float32."""

    dtype: torch.dtype
    bound: float
    rough: float
    h: float

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")


_PRECISIONS = (_Precision(torch.float64, 1e-6, 1e-2, 1e-5), _Precision(torch.float32, 1e-3, 5e-2, 3e-4))


def examine(
    net: nn.Module, shape: tuple[int, ...], call: Callable[..., Any] | None = None, compiling: bool = True
) -> dict[str, str]:
    """What a network u(z, r, t), or call(net, z, r, t), answers to each question; "yes" and "exact" are good answers.

    The network is moved to float64, or float32 where it does not run in that, and to evaluation mode where it stands,
    and its parameters stay what they are.
    """
    findings: dict[str, str] = {}
    if call is None:
        try:
            check_network(net)
        except ValueError as error:
            return {"is called as u(z, r, t)": f"no: {error}; here with --call"}
    call = call or (lambda net, z, r, t: net(z, r, t))
    for precision in _PRECISIONS:
        net = net.to(precision.dtype).eval()
        generator = torch.Generator().manual_seed(0)
        z, w = (torch.randn(2, *shape, dtype=torch.float64, generator=generator).to(precision.dtype) for _ in range(2))
        t = torch.tensor([0.5, 0.9], dtype=precision.dtype)
        r = 0.3 * t
        question = f"runs on tensors, in {precision}"
        try:
            with torch.no_grad():
                plain = call(net, z, r, t)
        except Exception as error:
            way_out = "; say how it is called with --call" if isinstance(error, TypeError) else ""
            findings[question] = f"no: {_line(error)}{way_out}"
            continue
        failed = "".join(f"; examined in it, as float64 fails: {verdict[4:]}" for verdict in findings.values())
        findings = {question: f"yes{failed}"}
        break
    else:
        return findings
    try:
        check_output(plain, z)
    except ValueError as error:
        return findings | {question: f"no: {error}"}

    def u_of(z: Any, t: Any) -> Any:
        return call(net, z, r, t)

    def differentiated(mode: str = "dual", tangent_grad: bool = True) -> tuple[Tensor, Tensor]:
        return jvp(u_of, (z, t), (w, torch.ones_like(t)), tangent_grad, mode)

    try:
        u, du = differentiated()
    except Exception as error:
        findings["runs as a Dual"] = f"no: {_line(error)}"
        if getattr(error, "rule", ""):
            findings["a rule for it"] = "\n" + error.rule  # type: ignore[attr-defined]
        findings['jvp="func" instead'] = _answer(lambda: differentiated("func"))
        findings['jvp="finite_difference" instead'] = _answer(lambda: differentiated("finite_difference"))
        return findings
    findings["runs as a Dual"] = "yes"
    findings["primal"] = _exact(u, plain, precision.bound)
    gradient = _gradient(net, du)
    try:
        right = differentiated("func")[1]
        findings["tangent"] = _exact(du, right, precision.bound)
        findings["gradient through the tangent"] = _exact(gradient, _gradient(net, right), precision.bound)
    except (NotImplementedError, RuntimeError):  # torch.func does not serve every network
        h = precision.h
        above, below = (u_of(z + k * w, t + k) for k in (h, -h))
        slope = (_gradient(net, above) - _gradient(net, below)) / (2 * h)
        findings["tangent"] = _exact(du, (above - below) / (2 * h), precision.rough)
        findings["gradient through the tangent"] = _exact(gradient, slope, precision.rough)
    findings["also without a graph (lambda = 0)"] = _answer(lambda: differentiated(tangent_grad=False))
    if compiling:
        findings["compiles whole"] = _answer(lambda: _compiled(differentiated, (u, du), precision.bound))
    return findings


def _gradient(net: nn.Module, y: Tensor) -> Tensor:
    """d sum(y) / d theta."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    if not parameters:
        return y.new_zeros(1)
    grads = torch.autograd.grad(y.sum(), parameters, allow_unused=True, retain_graph=True)
    pairs = zip(parameters, grads, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def _compiled(differentiated: Callable[[], tuple[Tensor, Tensor]], eager: tuple[Tensor, Tensor], bound: float) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(differentiated, fullgraph=True, dynamic=False, backend="aot_eager")()
    if any(_off(found, right) >= bound for found, right in zip(compiled, eager, strict=True)):
        raise ArithmeticError("the compiled values differ from the eager ones")


def _off(found: Tensor, right: Tensor) -> float:
    """|found - right| / |right|"""
    scale = right.norm().clamp_min(torch.finfo(right.dtype).tiny)
    return float(((found - right).norm() / scale).detach())


def _exact(found: Tensor, right: Tensor, bound: float) -> str:
    error = _off(found, right)
    return f"exact: off by {error:.1e}, relative" if error < bound else f"NO: off by {error:.1e}, relative"


def _answer(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except Exception as error:
        return f"no: {_line(error)}"
    return "yes"


def _line(error: Exception) -> str:
    text = " ".join(str(error).partition("\n@mmf_fast")[0].split())  # the rule has a line of its own
    return f"{type(error).__name__}: {text[:400]}{' ...' if len(text) > 400 else ''}"
