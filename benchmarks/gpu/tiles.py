"""A sweep of block sizes, warps and stages of the attention kernels: first one size of each head size, every
configuration, then what did best there at other sizes; bfloat16 before TF32, which fewer train in.
benchmarks/gpu/defaults.py makes the table of defaults of it."""

from __future__ import annotations

import functools
import itertools
import os
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.rows import Rows
from benchmarks.measure import environment, seconds
from benchmarks.results import Row
from mmf_fast.ops import attention_triton, autotune, reference
from mmf_fast.ops.gpu import triton
from mmf_fast.ops.tiles import Config

# Products of a kernel, each 2 N^2 d FLOPs for a head; the backward kernels both compute the logits and tangents again.
PRODUCTS = {"forward": 6, "key": 12, "query": 9}
# What a kernel sums in registers, each as wide as a head: P v, P v' and (P S') v; the gradients that it writes.
SUMS = {"forward": 3, "key": 4, "query": 2}
REGISTERS = 1.15 * 255  # of a thread; a little beyond them spills outside of the inner loop, which costs little
TOLERANCE = 3e-2  # relative, of what bfloat16 products make of bfloat16 inputs
FINALISTS = 3


class Size(NamedTuple):
    batch: int
    heads: int
    tokens: int


SWEEP, OTHERS = Size(16, 16, 1024), (Size(64, 16, 256), Size(2, 16, 4096))
HEADS = {torch.bfloat16: (64, 128, 72, 80), torch.float32: (64, 128)}
TOY_SWEEP, TOY_OTHERS = Size(1, 1, 16), (Size(1, 1, 20),)
TOY_HEADS = {torch.float32: (16,)}  # the interpreter has no bfloat16 products


def run(rows: Rows, device: str, toy: bool) -> None:
    sizes, all_heads = ((TOY_SWEEP, TOY_OTHERS), TOY_HEADS) if toy else ((SWEEP, OTHERS), HEADS)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with processors() as pool:
            for dtype, heads in all_heads.items():
                sweep(rows, pool, *sizes, [(d, dtype) for d in heads], device, toy)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def sweep(
    rows: Rows, pool: ThreadPoolExecutor, one: Size, others: Sequence[Size], heads: list[tuple[int, torch.dtype]],
    device: str, toy: bool,
) -> None:  # fmt: skip
    """Of one kind of numbers: every configuration at one size, then the best at the others."""
    rounds = 1 if toy else 7
    if device == "cuda":  # the kernels that make what the others are checked with and start from
        launches = [call for d, of in heads for call in recorded(draw(one, d, of, device), launch=False)[2].values()]
        compile_ahead(pool, [(call, configs_of(call)[0]) for call in launches])
    kernels = [kernel for d, of in heads for kernel in ready(rows, one, d, of, device)]
    order = [  # the likeliest configurations of every kernel first: a sweep that is ended early has seen all kernels
        (kernel, config)
        for group in itertools.zip_longest(*(candidates(kernel, toy) for kernel in kernels))
        for kernel, config in zip(kernels, group, strict=True)
        if config is not None
    ]
    time_all(rows, pool, order, rounds)
    del kernels, order
    for size, (d, of) in itertools.product(others, heads):
        found = ready(rows, size, d, of, device)
        fastest = [(kernel, config) for kernel in found for config in best(rows.rows, kernel, one.tokens)]
        time_all(rows, pool, fastest, rounds)


def time_all(rows: Rows, pool: ThreadPoolExecutor, pairs: list[tuple[Kernel, Config]], rounds: int) -> None:
    """In batches, the next of which is compiled while one is timed: the device need not wait for the compiler."""
    todo = [(kernel, config) for kernel, config in pairs if rows.find(kernel.key(config)) is None]
    size = 4 * (os.cpu_count() or 1)
    batches = [todo[i : i + size] for i in range(0, len(todo), size)]
    cuda = bool(todo) and todo[0][0].written[0].is_cuda
    with processors(1) as ahead:

        def compiled(batch: list[tuple[Kernel, Config]]) -> Any:
            return ahead.submit(compile_ahead, pool, [(kernel.call, config) for kernel, config in batch if cuda])

        coming = compiled(batches[0]) if batches else None
        for batch, following in itertools.zip_longest(batches, batches[1:], fillvalue=[]):
            if coming:
                coming.result()
            coming = compiled(following)
            for kernel, config in batch:
                rows.measure(kernel.key(config), functools.partial(kernel.time, config, rounds))


@contextmanager
def processors(count: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads, by default one for each processor; what they have not begun when the time is up is left."""
    pool = ThreadPoolExecutor(count or os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def best(rows: list[Row], kernel: Kernel, tokens: int, count: int = FINALISTS) -> list[Config]:
    """The fastest configurations of a kernel for so many tokens."""
    wanted = (kernel.name, kernel.d, kernel.numbers, tokens)
    found = [r for r in rows if (r["kernel"], r["d"], r.get("numbers"), r["tokens"]) == wanted and "error" not in r]
    return [Config(*r["config"]) for r in sorted(found, key=lambda r: r["seconds"])[:count]]


def candidates(kernel: Kernel, toy: bool) -> list[Config]:
    """Every configuration worth a launch, those of today's table first and tiles of 16 last. A tile of 64 rows has one
    warpgroup's work, one of 128 that of two; more stages than three exceed the shared memory that two blocks have; and
    what a program sums, with the two logits of a tile, must lie in the registers of its threads."""
    known = configs_of(kernel.call)
    if toy:
        return known[:2]
    made = [Config(*tile) for tile in itertools.product((64, 128, 32, 16), (64, 128, 32, 16), (4, 8), (2, 3, 1))]

    def fits(c: Config) -> bool:
        rows = c.block_n if kernel.name == "key" else c.block_m
        numbers = SUMS[kernel.name] * rows * kernel.d + 2 * c.block_m * c.block_n
        small = c.warps * 16 <= max(c.block_m, c.block_n) and c.block_m * c.block_n >= 1024
        return small and numbers <= REGISTERS * 32 * c.warps

    return list(dict.fromkeys([*known, *sorted(filter(fits, made), key=lambda c: min(c.block_m, c.block_n) == 16)]))


def configs_of(call: autotune.Call) -> list[Config]:
    """Those of today's table, the default first; of Hopper where there is no GPU."""
    return call.configs(autotune.chip(torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)))


class Kernel(NamedTuple):
    """One launch of an attention kernel: the call, what it writes, and what that should be (its first sample)."""

    name: str
    d: int
    size: Size
    call: autotune.Call
    written: list[Tensor]
    expected: list[Tensor]

    @property
    def numbers(self) -> str:
        """As mmf_fast.ops.tiles names them."""
        return "16 bits" if self.call.arguments["q_ptr"].dtype == torch.bfloat16 else "tf32"

    def key(self, config: Config) -> Row:
        sizes = {"d": self.d, "batch": self.size.batch, "heads": self.size.heads, "tokens": self.size.tokens}
        return {"kernel": self.name, "numbers": self.numbers, **sizes, "config": list(config[:4])}

    def launch(self, config: Config) -> None:
        autotune.launch(self.call, config)

    def time(self, config: Config, rounds: int) -> Row:
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

    def resources(self, config: Config) -> Row:
        """What the compiler made of it; nothing in the interpreter."""
        if not self.written[0].is_cuda:
            return {}
        compiled = warm(self.call, config)
        return {"registers": compiled.n_regs, "spills": compiled.n_spills, "shared": compiled.metadata.shared}


Inputs = list[list[Tensor]]  # [q, k, v], their tangents, and the cotangents [g, h]


def draw(size: Size, d: int, dtype: torch.dtype, device: str) -> Inputs:
    """As a network has them: q, k, v are views of one projection, and every tangent and cotangent is there."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(size.batch, size.tokens, count, size.heads, d) for count in (3, 3, 2)]
    made = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]
    return [list(x.permute(2, 0, 3, 1, 4).unbind(0)) for x in made]


def ready(rows: Rows, size: Size, d: int, dtype: torch.dtype, device: str) -> list[Kernel]:
    """The kernels of one size, to be timed; none where they fail, which is a row."""
    key = {"kernel": "all", "d": d, "dtype": str(dtype), "tokens": size.tokens, "config": None}
    return rows.attempt(key, functools.partial(kernels_of, size, d, dtype, device)) or []


def kernels_of(size: Size, d: int, dtype: torch.dtype, device: str) -> list[Kernel]:
    inputs = draw(size, d, dtype, device)
    outputs, grads, calls = recorded(inputs)
    true_outputs, true_grads = both(reference.attention, reference.attention_backward, _first(inputs))
    written = {
        "forward": (outputs, true_outputs),
        "key": (grads[2:], true_grads[2:]),
        "query": (grads[:2], true_grads[:2]),
    }
    return [Kernel(name, d, size, calls[name], *map(list, pair)) for name, pair in written.items()]


def _first(inputs: Inputs) -> Inputs:
    """The first sample, in float32."""
    return [[x[:1].float() for x in group] for group in inputs]


def recorded(inputs: Inputs, launch: bool = True) -> tuple[Any, Any, dict[str, autotune.Call]]:
    """What the launchers return, and their launches by the names of the kernels."""
    calls: dict[str, autotune.Call] = {}

    def run(call: autotune.Call) -> None:
        calls[call.kernel.__name__.removesuffix("_kernel")] = call
        if launch:
            autotune.run(call)

    with mock.patch.object(attention_triton, "run", run), environment(MMF_FAST_AUTOTUNE="0"):
        return *both(attention_triton.forward, attention_triton.backward, inputs), calls


def both(forward: Any, backward: Any, inputs: Inputs) -> tuple[Any, Any]:
    """What the two passes of an implementation return.

    The backward pass reads copies: a forward kernel that is timed next to it has its outputs filled with NaN, and if it
    is refused they remain so.
    """
    (q, k, v), (dq, dk, dv), (g, h) = inputs
    arguments, scale = (q, dq, k, dk, v, dv, None), q.shape[-1] ** -0.5
    outputs = forward(*arguments, False, scale, True)
    return outputs, backward(g, h, *arguments, *(x.clone() for x in outputs), False, scale)


def warm(call: autotune.Call, config: Config) -> Any:
    """The compiled kernel, not launched."""
    options = {"num_warps": config.warps, "num_stages": config.stages, "grid": (1,)}
    return call.kernel.warmup(**call.arguments, **call.constants, **autotune.blocks(config, call.kernel), **options)


def compile_ahead(pool: ThreadPoolExecutor, pairs: list[tuple[autotune.Call, Config]]) -> None:
    """All of them at once: compilation takes far longer than what is timed. A configuration that does not compile
    fails again, and in its own row, when it is launched."""
    if pairs:
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            for call, config in pairs:
                warm(call, config)
