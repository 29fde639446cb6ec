"""A sweep of block sizes, warps and stages of the attention kernels: first one size of each head size, every
configuration, then what did best there at other sizes. benchmarks/gpu/defaults.py makes the table of defaults of it."""

from __future__ import annotations

import functools
import itertools
import os
import statistics
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
from mmf_fast.ops.tiles import Config

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
    if device == "cuda":  # the kernels that make what the others are checked with and start from
        launches = [call for d in heads for call in recorded(draw(sweep, d, device), launch=False)[2].values()]
        compile_ahead([(call, configs_of(call)[0]) for call in launches])
    kernels = [kernel for d in heads for kernel in ready(rows, sweep, d, device)]
    order = [  # the likeliest configurations of every kernel first: a sweep that is ended early has seen all kernels
        (kernel, config)
        for group in itertools.zip_longest(*(candidates(kernel.call, toy) for kernel in kernels))
        for kernel, config in zip(kernels, group, strict=True)
        if config is not None
    ]
    for i in range(0, len(order), step := 4 * (os.cpu_count() or 1)):
        time_all(rows, order[i : i + step], rounds)
    del kernels, order
    for size, d in itertools.product(others, heads):
        found = ready(rows, size, d, device)
        time_all(rows, [(k, config) for k in found for config in best(rows.rows, k.name, d, sweep.tokens)], rounds)


def time_all(rows: Rows, pairs: list[tuple[Kernel, Config]], rounds: int) -> None:
    todo = [(kernel, config) for kernel, config in pairs if rows.find(kernel.key(config)) is None]
    if todo and todo[0][0].written[0].is_cuda:
        compile_ahead([(kernel.call, config) for kernel, config in todo])
    for kernel, config in todo:
        rows.measure(kernel.key(config), functools.partial(kernel.time, config, rounds))


def best(rows: list[Row], kernel: str, d: int, tokens: int, count: int = FINALISTS) -> list[Config]:
    """The fastest configurations of a kernel at one size."""
    found = [r for r in rows if (r["kernel"], r["d"], r["tokens"]) == (kernel, d, tokens) and "error" not in r]
    return [Config(*r["config"]) for r in sorted(found, key=lambda r: r["seconds"])[:count]]


def candidates(call: autotune.Call, toy: bool) -> list[Config]:
    """Every configuration worth a launch, those of today's table first and tiles of 16 last. A tile of 64 rows has one
    warpgroup's work, one of 128 that of two; more stages than three exceed the shared memory that two blocks have."""
    known = configs_of(call)
    if toy:
        return known[:2]
    made = [Config(*tile) for tile in itertools.product((64, 128, 32, 16), (64, 128, 32, 16), (4, 8), (2, 3, 1))]
    fits = [c for c in made if c.warps * 16 <= max(c.block_m, c.block_n) and c.block_m * c.block_n >= 1024]
    return list(dict.fromkeys([*known, *sorted(fits, key=lambda c: min(c.block_m, c.block_n) == 16)]))


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

    def key(self, config: Config) -> Row:
        numbers = "16 bits" if self.call.arguments["q_ptr"].dtype == torch.bfloat16 else "tf32"
        sizes = {"d": self.d, "batch": self.size.batch, "heads": self.size.heads, "tokens": self.size.tokens}
        return {"kernel": self.name, "numbers": numbers, **sizes, "config": list(config[:4])}

    def launch(self, config: Config) -> None:
        autotune.run(self.call._replace(configs=lambda chip: [config]))

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


def draw(size: Size, d: int, device: str) -> Inputs:
    """As a network has them: q, k, v are views of one projection, and every tangent and cotangent is there."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter has no bfloat16 products
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(size.batch, size.tokens, count, size.heads, d) for count in (3, 3, 2)]
    made = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]
    return [list(x.permute(2, 0, 3, 1, 4).unbind(0)) for x in made]


def ready(rows: Rows, size: Size, d: int, device: str) -> list[Kernel]:
    """The kernels of one size, to be timed; none where they fail, which is a row."""
    key = {"kernel": "all", "d": d, "tokens": size.tokens, "config": None}
    return rows.attempt(key, functools.partial(kernels_of, size, d, device)) or []


def kernels_of(size: Size, d: int, device: str) -> list[Kernel]:
    inputs = draw(size, d, device)
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
    """What the two passes of an implementation return."""
    (q, k, v), (dq, dk, dv), (g, h) = inputs
    arguments, scale = (q, dq, k, dk, v, dv, None), q.shape[-1] ** -0.5
    outputs = forward(*arguments, False, scale, True)
    return outputs, backward(g, h, *arguments, *outputs, False, scale)


def warm(call: autotune.Call, config: Config) -> Any:
    """The compiled kernel, not launched."""
    options = {"num_warps": config.warps, "num_stages": config.stages, "grid": (1,)}
    return call.kernel.warmup(**call.arguments, **call.constants, **autotune.blocks(config, call.kernel), **options)


def compile_ahead(pairs: list[tuple[autotune.Call, Config]]) -> None:
    """All of them at once, on all processors: compilation takes far longer than what is timed. A configuration that
    does not compile fails again, and in its own row, when it is launched."""
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for call, config in pairs:
            warm(call, config)
