"""What the inner loops of a compiled kernel do, read off its machine code: nothing here needs a GPU.

ptxas makes a cubin of Triton's PTX, nvdisasm prints its instructions (SASS). A loop is what a backward branch closes;
innermost loops do nearly all of the work of a kernel, so registers that spill elsewhere cost next to nothing.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;")
LABEL = re.compile(r"(\.L\w+):")
BRANCH = re.compile(r"BRA\b.*`\((\.L\w+)\)")
# Multiply-adds of one instruction: HGMMA (a warpgroup of four warps), HMMA and its older shapes (a warp)
PRODUCT = re.compile(r"(H|Q)GMMA\.(\d+)x(\d+)x(\d+)|HMMA\.(16816|1688|16832)\b")
MULTIPLY_ADDS = {"16832": 16 * 8 * 32, "16816": 16 * 8 * 16, "1688": 16 * 8 * 8}
SPILL = re.compile(r"(?:STL|LDL)\b")  # to and from local memory


@dataclass(frozen=True)
class Assembled:
    registers: int
    spilled: int  # bytes, of the whole kernel
    serialized: bool  # ptxas could not keep wgmma products in flight (C75xx)
    loops: list[list[str]]  # instructions of the innermost loops


def assemble(ptx: str, architecture: str, look_inside: bool) -> Assembled:
    """architecture: as ptxas names it, sm_90a. look_inside: find the loops, which takes about as long again."""
    ptxas = TOOLS / "ptxas-blackwell"
    ptxas = ptxas if architecture.startswith("sm_1") and ptxas.exists() else TOOLS / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        report = _run(ptxas, "-v", f"--gpu-name={architecture}", source, "-o", cubin).stderr
        sass = _run(TOOLS / "nvdisasm", "-c", cubin).stdout if look_inside else ""
    registers = re.search(r"Used (\d+) registers", report)
    assert registers is not None, report
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
    return Assembled(int(registers[1]), spilled, "(C75" in report, innermost_loops(sass))


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)


def innermost_loops(sass: str) -> list[list[str]]:
    """The instructions of every loop that contains no other, in order of address."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := INSTRUCTION.match(line):
            code.append(instruction[1])
    branches = [(labels.get(to[1], len(code)), at) for at, text in enumerate(code) if (to := BRANCH.match(text))]
    spans = {(start, end) for start, end in branches if start < end}  # an endless loop of one closes every kernel
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [code[start : end + 1] for start, end in sorted(inner)]


def tensor_core_flops(loop: list[str], warps: int) -> float:
    """FLOPs of one iteration on mma.sync and wgmma; those of tcgen05 (Blackwell) have no sizes in their text."""
    total = 0.0
    for text in loop:
        if not (product := PRODUCT.match(text)):
            continue
        if product[5]:
            total += 2 * MULTIPLY_ADDS[product[5]] * warps
        else:
            m, n, k = map(int, product.groups()[1:4])
            total += 2 * m * n * k * warps / 4
    return total


def spills(loop: list[str]) -> int:
    """Instructions that spill registers, or read them back."""
    return sum(bool(SPILL.match(text)) for text in loop)


# Shapes of a product a (M, K) b (K, N) of Blackwell's tensor cores, issued once for a whole block of threads
BLACKWELL = re.compile(r"ttng\.tc_gen5_mma .*?:\s*!ttg\.memdesc<(\d+)x(\d+)x\w+.*?!ttg\.memdesc<\d+x(\d+)x")


def blackwell_flops(ttgir: str) -> list[float]:
    """FLOPs of one iteration of each innermost loop with products, of Triton's last own representation."""
    totals, open_loops = [], []
    for line in ttgir.splitlines():
        if "scf.for" in line:
            open_loops.append([len(line) - len(line.lstrip()), 0.0])
        elif open_loops and line.startswith(" " * int(open_loops[-1][0]) + "}"):
            totals.append(open_loops.pop()[1])
        elif open_loops and (product := BLACKWELL.search(line)):
            m, k, n = map(int, product.groups())
            open_loops[-1][1] += 2 * m * n * k
    return [total for total in totals if total]
