"""A sweep of block sizes, warps and stages of the attention kernels: first one size of each head size, every
configuration, then what did best there at other sizes. benchmarks/gpu/defaults.py makes the table of defaults of it."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.rows import Rows
from benchmarks.measure import environment, seconds
from benchmarks.results import Row
from mmf_fast.ops import attention_triton, autotune, reference
from mmf_fast.ops.gpu import triton

# Products of a kernel, each 2 N^2 d FLOPs for a head; the backward kernels both compute the logits and tangents again.
PRODUCTS = {"forward": 6, "key": 12, "query": 9}
TOLERANCE = 3e-2  # relative, of what bfloat16 products make of bfloat16 inputs
FINALISTS = 3


class Size(NamedTuple):
    batch: int
    heads: int
    tokens: int


SWEEP, OTHERS = Size(16, 16, 1024), (Size(64, 16, 256), Size(2, 16, 4096))
HEADS = (64, 128, 72, 80)
TOY_SWEEP, TOY_OTHERS, TOY_HEADS = Size(1, 1, 16), (Size(1, 1, 20),), (16,)


def run(rows: Rows, device: str, toy: bool) -> None:
    sweep, others, heads = (TOY_SWEEP, TOY_OTHERS, TOY_HEADS) if toy else (SWEEP, OTHERS, HEADS)
    rounds = 1 if toy else 7
    kernels = {(name, d): Kernel.of(name, sweep, d, device) for d in heads for name in PRODUCTS}
    order = [  # the likeliest configurations of every kernel first: a sweep that is ended early has seen all kernels
        (kernel, config)
        for group in itertools.zip_longest(*(candidates(k.call, toy) for k in kernels.values()))
        for kernel, config in zip(kernels.values(), group, strict=True)
        if config is not None
    ]
    for some in _batches(order, 4 * (os.cpu_count() or 1)):
        compile_ahead([pair for pair in some if rows.find(pair[0].key(pair[1])) is None], device)
        for kernel, config in some:
            rows.measure(kernel.key(config), lambda kernel=kernel, config=config: kernel.time(config, rounds))
    kernels.clear()
    for size, d, name in itertools.product(others, heads, PRODUCTS):
        kernel = Kernel.of(name, size, d, device)
        finalists = best(rows.rows, name, d, sweep.tokens)
        compile_ahead([(kernel, config) for config in finalists], device)
        for config in finalists:
            rows.measure(kernel.key(config), lambda kernel=kernel, config=config: kernel.time(config, rounds))


def best(rows: list[Row], kernel: str, d: int, tokens: int, count: int = FINALISTS) -> list[autotune.Config]:
    """The fastest configurations of a kernel at one size."""
    found = [r for r in rows if (r["kernel"], r["d"], r["tokens"]) == (kernel, d, tokens) and "error" not in r]
    return [autotune.Config(*r["config"]) for r in sorted(found, key=lambda r: r["seconds"])[:count]]


def candidates(call: autotune.Call, toy: bool) -> list[autotune.Config]:
    """Every configuration worth a launch, those of today's table first. A tile of 64 rows has one warpgroup's work,
    one of 128 that of two; more stages than three exceed the shared memory that two blocks could have."""
    known = [config._replace(since=80) for config in call.configs]
    if toy:
        return known[:2]
    tiles = itertools.product((64, 128, 32), (64, 128, 32), (4, 8), (2, 3, 1))
    made = [autotune.Config(*tile) for tile in tiles]
    fits = [c for c in made if c.block_m * c.block_n <= 128 * 128 and c.warps * 16 <= max(c.block_m, c.block_n)]
    return list(dict.fromkeys(known + fits))


class Kernel(NamedTuple):
    """One launch of an attention kernel: the call, what it writes, and what that should be (its first sample)."""

    name: str
    d: int
    size: Size
    call: autotune.Call
    written: list[Tensor]
    expected: list[Tensor]

    @staticmethod
    def of(name: str, size: Size, d: int, device: str) -> Kernel:
        """As a network has them: q, k, v are views of one projection, and every tangent and cotangent is there."""
        dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter has no bfloat16 products
        generator = torch.Generator().manual_seed(0)

        def draw(count: int) -> list[Tensor]:
            shape = (size.batch, size.tokens, count, size.heads, d)
            return list(torch.randn(shape, generator=generator).to(device, dtype).permute(2, 0, 3, 1, 4).unbind(0))

        (q, k, v), (dq, dk, dv), (g, h) = draw(3), draw(3), draw(2)
        scale, inputs = d**-0.5, (q, dq, k, dk, v, dv, None)
        outputs, (forward,) = recorded(attention_triton.forward, *inputs, False, scale, True)
        grads, backward = recorded(attention_triton.backward, g, h, *inputs, *outputs, False, scale)
        call = {_name(c): c for c in (forward, *backward)}[name]
        first = [None if x is None else x[:1].float() for x in inputs]
        true = reference.attention(*first, False, scale, True)
        if name == "forward":
            return Kernel(name, d, size, call, list(outputs), list(true))
        true = reference.attention_backward(g[:1].float(), h[:1].float(), *first, *true, False, scale)
        part = slice(0, 2) if name == "query" else slice(2, 6)
        return Kernel(name, d, size, call, list(grads[part]), list(true[part]))

    def key(self, config: autotune.Config) -> Row:
        numbers = "16 bits" if self.written[0].dtype == torch.bfloat16 else "32 bits"
        sizes = {"d": self.d, "batch": self.size.batch, "heads": self.size.heads, "tokens": self.size.tokens}
        return {"kernel": self.name, "numbers": numbers, **sizes, "config": list(config[:4])}

    def launch(self, config: autotune.Config) -> None:
        autotune.run(self.call._replace(configs=[config]))

    def time(self, config: autotune.Config, rounds: int) -> Row:
        """Raises ValueError where the kernel writes something else than the reference, or less."""
        for y in self.written:
            y.fill_(torch.nan)
        self.launch(config)
        pairs = zip(self.written, self.expected, strict=True)
        error = max(float((y[:1].double() - t.double()).norm() / t.double().norm()) for y, t in pairs)
        if not error < TOLERANCE or any(y.isnan().any() for y in self.written):
            raise ValueError(f"is wrong by {error:.1e}; not timed")
        device = self.written[0].device.type
        took = statistics.median([seconds(lambda: self.launch(config), device) for _ in range(rounds + 1)][1:])
        flops = 2 * PRODUCTS[self.name] * self.size.batch * self.size.heads * self.size.tokens**2 * self.d
        return {"seconds": took, "TFLOP/s": flops / took / 1e12, "error of values": error} | self.resources(config)

    def resources(self, config: autotune.Config) -> Row:
        """What the compiler made of it; nothing in the interpreter."""
        compiled = warm(self.call, config)
        if not hasattr(compiled, "n_regs"):
            return {}
        return {"registers": compiled.n_regs, "spills": compiled.n_spills, "shared": compiled.metadata.shared}


def _name(call: autotune.Call) -> str:
    return call.kernel.__name__.removesuffix("_kernel")


def recorded(function: Any, *arguments: Any) -> tuple[Any, list[autotune.Call]]:
    """What a launcher returns, and the kernels it launches."""
    calls: list[autotune.Call] = []

    def run(call: autotune.Call) -> None:
        calls.append(call)
        autotune.run(call)

    with mock.patch.object(attention_triton, "run", run), environment(MMF_FAST_AUTOTUNE="0"):
        return function(*arguments), calls


def warm(call: autotune.Call, config: autotune.Config) -> Any:
    """The compiled kernel, not launched."""
    if not hasattr(call.kernel, "warmup"):
        return None
    options = {"num_warps": config.warps, "num_stages": config.stages, "grid": (1,)}
    return call.kernel.warmup(**call.arguments, **call.constants, **config.constants(call.kernel), **options)


def compile_ahead(pairs: list[tuple[Kernel, autotune.Config]], device: str) -> None:
    """All of them at once, on all processors: compilation takes far longer than what is timed. A configuration that
    does not compile fails again, and in its own row, when it is launched."""
    if device == "cpu":
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for kernel, config in pairs:
            warm(kernel.call, config)


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for i in range(0, len(items), size):
        yield items[i : i + size]
