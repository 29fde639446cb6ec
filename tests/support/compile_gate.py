"""Compiles every Triton kernel of the package for GPUs that are not here. Run by test_compile_gate.py in a process of
its own, since the interpreter (TRITON_INTERPRET) and the compiler cannot share one. Prints one JSON line per kernel,
configuration and chip: of the default configurations, with --all also of those that autotuning may choose, and of more
head sizes.

The operators are called on CPU tensors, with launches recorded instead of run: what is compiled is what their
launchers would launch, arguments, constants, warps and stages included.
"""

import importlib
import json
import pkgutil
import re
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

import mmf_fast.ops
from mmf_fast.ops import autotune
from mmf_fast.ops.tiles import Config

sys.path[:0] = [str(Path(__file__).parent.parent)]  # this is a script
from support import disassembly  # noqa: E402

CHIPS = {80: ("sm_80", 166_912), 90: ("sm_90a", 232_448), 100: ("sm_100a", 232_448)}  # shared memory of a block, bytes
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.bool: "i1",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
TENSOR_CORE_PRODUCT = re.compile(r"tt\.dot .*(tf32|f16|bf16|f8)")  # IEEE float32 has no tensor cores
LOADED_TILE = re.compile(r"tt\.load .*: tensor<\d+x\d+x!tt\.ptr")
TENSOR_CORES = re.compile(r"mma\.sync|wgmma|tcgen05\.mma")

EVERYTHING = "--all" in sys.argv
launches: dict[str, tuple] = {}
seen: set[str] = set()


def record(
    kernel: JITFunction,
    *args: object,
    grid: object,
    warmup: bool,
    chips: tuple = tuple(CHIPS),
    default_on: tuple = tuple(CHIPS),
    **options: object,
) -> None:
    """One launch as (kernel, signature, constants, attributes, options); launches that compile alike are kept once."""
    names = kernel.arg_names
    arguments = dict(zip(names, args, strict=False)) | {name: options.pop(name) for name in names if name in options}
    constant = {p.name for p in kernel.params if p.is_constexpr}
    constants, attributes = {}, {}

    def kind(value: object, path: tuple[int, ...], is_constant: bool = False) -> object:
        """Triton's name of an argument's type; tuples of arguments have a tuple of names."""
        if isinstance(value, tuple) and not is_constant:
            return tuple(kind(v, (*path, i)) for i, v in enumerate(value))
        if is_constant or value is None or (type(value) is int and value == 1):  # Triton specialises on 1
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return f"*{TYPES[value.dtype]}"
        if type(value) is int and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "fp32" if isinstance(value, float) else "i32"

    signature = {name: kind(arguments[name], (i,), name in constant) for i, name in enumerate(names)}
    name = f"{kernel.fn.__module__.rsplit('.', 1)[-1]}.{kernel.fn.__name__}"
    seen.add(name)
    types = [t for t in signature.values() if str(t).startswith("*")]
    key = f"{name} {types} {sorted(constants.items(), key=str)} {options}"
    launches[key] = (name, kernel, signature, constants, attributes, options, chips, default_on)


def record_every_configuration(tuner: Autotuner, *args: object, **options: object) -> None:
    for i, config in enumerate(tuner.configs):
        tuner.fn.run(*args, **options, **config.all_kwargs(), default_on=() if i else tuple(CHIPS))


def record_every_choice(call: autotune.Call, _: Config) -> None:
    chips_of: dict[Config, list[int]] = {}
    for chip in CHIPS:
        for config in call.configs(chip):
            chips_of.setdefault(config, []).append(chip)
    for config, chips in chips_of.items():
        call.kernel.run(
            **call.arguments, **call.constants, **autotune.blocks(config, call.kernel),
            num_warps=config.warps, num_stages=config.stages, grid=None, warmup=False,
            chips=tuple(chips), default_on=tuple(chip for chip in chips if call.configs(chip)[0] == config),
        )  # fmt: skip


def needed_flops(name: str, c: dict) -> float:
    """FLOPs of an iteration of an attention kernel by the formulas of mmf_fast/ops/attention.py; 0 for other kernels.

    S and S' are 1 + (q') + (k') products over a head of q, O and O' are 1 + (S') + (v') over one of v; the backward
    kernels compute S, S', G and G' anew, which takes as many.
    """
    module, _, kernel = name.partition(".")
    sides = {"forward_kernel": (1, 1), "key_kernel": (2, 2), "query_kernel": (2, 1)}
    if module != "attention_kernels" or kernel not in sides:
        return 0.0
    of_q, of_v = sides[kernel]
    dq, dk, dv = (c[f"HAS_{x}"] for x in ("DQ", "DK", "DV"))
    products = of_q * (1 + dq + dk) * c["D"] + of_v * (1 + (dq or dk) + dv) * c["E"]
    return 2.0 * products * c["BLOCK_M"] * c["BLOCK_N"]


def compile_for(chip: int, launch: tuple) -> dict:
    name, kernel, signature, constants, attributes, options, _, default_on = launch
    arch, limit = CHIPS[chip]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    matmul = bool(TENSOR_CORE_PRODUCT.search(compiled.asm["ttir"]))
    code = disassembly.assemble(compiled.asm["ptx"], arch, look_inside=matmul)
    loops = [
        (disassembly.tensor_core_flops(loop, options["num_warps"]), disassembly.spills(loop)) for loop in code.loops
    ]
    flops = max([of_loop for of_loop, _ in loops] + disassembly.blackwell_flops(compiled.asm["ttgir"]), default=0.0)
    constants = {kernel.arg_names[k[0]]: v for k, v in constants.items() if v is not None}
    needed = needed_flops(name, constants)
    return {
        "kernel": name,
        "chip": arch,
        "default": chip in default_on,
        "constants": constants,
        "options": options,
        "loads": len(LOADED_TILE.findall(compiled.asm["ttgir"])),
        "registers": code.registers,
        "spills": code.spilled,
        "spills_in_loops": sum(spills for _, spills in loops),
        "serialized": code.serialized,
        "executed": flops / needed if needed else None,
        "shared": compiled.metadata.shared,
        "shared_limit": limit,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        "matmul": matmul,
        "tensor_cores": bool(TENSOR_CORES.search(compiled.asm["ptx"])),
    }


def kernels() -> set[str]:
    """All kernels of the package: jitted functions that take pointers and are launched, so named."""
    found = set()
    for module in pkgutil.iter_modules(mmf_fast.ops.__path__):
        if module.name != "__main__":
            for name, value in vars(importlib.import_module(f"mmf_fast.ops.{module.name}")).items():
                value = value.fn if isinstance(value, Autotuner) else value
                if isinstance(value, JITFunction) and name.endswith("kernel"):
                    found.add(f"{value.fn.__module__.rsplit('.', 1)[-1]}.{name}")
    return found


def backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(
        [y for y in outputs if y is not None], [torch.ones_like(y) for y in outputs if y is not None]
    )


def call_operators() -> None:
    """Every operator forward and backward, at sizes of real networks."""
    from mmf_fast.ops import attention, group_norm, layer_norm, pointwise, sg_loss

    def draw(*shapes: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.zeros(s, dtype=dtype, requires_grad=True) for s in shapes]

    for dtype in (torch.float32, torch.bfloat16):
        x, dx, *p = draw((2, 4, 1152), (2, 4, 1152), *[(2, 1, 1152)] * 4, dtype=dtype)
        backward(*layer_norm.modulated_layer_norm(x, dx, *p))
        backward(layer_norm.modulated_layer_norm(x, None, p[0], None, p[2], None, rms=True)[0])
        for channels, pixels in ((512, 32), (128, 16)):  # a group of several tiles, and of one
            image = (1, channels, pixels, pixels)
            x, dx, a, b = draw(image, image, (channels,), (channels,), dtype=dtype)
            backward(*group_norm.group_norm_silu(x, dx, 32, a, None, b, None))
            x, dx = (v.to(memory_format=torch.channels_last) for v in (x, dx))
            backward(*group_norm.group_norm_silu(x, dx, 32, a, None, b, None, silu=False))
        u, du, target = draw(*[(2, 3, 64, 64)] * 3, dtype=dtype)
        for act in ("silu", "gelu", "gelu_tanh"):
            backward(*pointwise.activation(u, du, act))
        tau = torch.zeros(2)
        backward(sg_loss.sg_loss(u, du, tau, 0.5, target).loss)
        backward(sg_loss.sg_loss(u, None, tau, 0.5, target).loss)
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # attention has no kernels for exact float32
        short = dtype == torch.bfloat16
        few, many = ((64, 72), (32, 64, 72, 80, 96, 128)) if short else ((64,), (32, 64, 72, 128))
        for width in many if EVERYTHING else few:
            backward(*attention.attention(*draw(*[(1, 2, 256, width)] * 6, dtype=dtype)))
        q, k, v, *d = draw(*[(1, 2, 256, 64)] * 6, dtype=dtype)
        backward(attention.attention(q, k, v, *d, tangent_grad=False)[0])
        mask = torch.zeros(256, 256, dtype=dtype)
        if dtype == torch.bfloat16:
            backward(*attention.attention(q, k, v, *d, mask=mask.bool()))
            backward(*attention.attention(q, k, v, *d, mask=mask, is_causal=True))


def main() -> None:
    JITFunction.run = record
    Autotuner.run = record_every_configuration
    autotune.launch = record_every_choice
    call_operators()
    print(json.dumps({"missing": sorted(kernels() - seen)}))
    for launch in launches.values():
        for chip in launch[6] if EVERYTHING else launch[7]:
            print(json.dumps(compile_for(chip, launch)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
