"""Launches of training steps and of single operators with the stand-in driver, as one line of JSON. Run by
test_launches.py in a process of its own: TRITON_INTERPRET and the binder cannot share one.

python launch_cases.py steps|layouts|ones|time
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent.parent)]  # this is a script
from support import stand_in_driver  # noqa: E402

from mmf_fast import MeanFlowLoss  # noqa: E402
from mmf_fast.models import DiT, UNet  # noqa: E402
from mmf_fast.ops import attention, attention_triton, group_norm, layer_norm, pointwise, sg_loss  # noqa: E402

launches, variants = stand_in_driver.install(compiling=sys.argv[1] == "ones")


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def step(net: nn.Module, samples: int, lam: float) -> dict:
    """Launches of one eager step in bf16 with half of the samples at r = t, and variants that a second one adds."""
    loss_fn = MeanFlowLoss(net, lam=lam, paired=True)
    x = torch.randn(samples, *net.shape)  # type: ignore[arg-type]
    variants.clear()
    counts = []
    for index in range(2):
        launches.clear()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(x, step=index).loss
        loss.backward()
        counts.append((Counter(launch.kernel for launch in launches), len(variants)))
    (first, found), (second, after) = counts
    return {"launches": first, "again": second, "variants": found, "added": after - found}


def steps() -> dict:
    torch.manual_seed(0)
    sizes = {"channels": 4, "patch_size": 4, "width": 128, "heads": 2}  # heads of 64 columns, as in DiT-B
    unet = UNet(16, channels=3, base_channels=64, channel_mults=(1, 2), blocks=1, attention_resolutions=(8,))
    return {
        f"{name}, lam {lam}": step(net, 4, lam)
        for name, net in (
            ("DiT, 1 block", DiT(32, depth=1, **sizes)), ("DiT, 3 blocks", DiT(32, depth=3, **sizes)), ("UNet", unet),
        )
        for lam in (0.0, 0.5)
    }  # fmt: skip


def layouts() -> dict:
    """What the compiler is told of tensors that start at an odd address or have odd strides."""

    def attend(make: Callable[[], Tensor]) -> list[str]:
        variants.clear()
        backward(*attention.attention(*(make() for _ in range(6))))
        return [text for text in variants if "forward" in text]

    def odd_strides() -> Tensor:
        return torch.zeros(1, 2, 33, 67, dtype=torch.bfloat16)[..., :64].requires_grad_()

    def odd_address() -> Tensor:
        return torch.zeros(1 + 2 * 32 * 64, dtype=torch.bfloat16)[1:].view(1, 2, 32, 64).requires_grad_()

    def aligned() -> Tensor:
        return zeros(1, 2, 32, 64)

    return {"aligned": attend(aligned), "odd address": attend(odd_address), "odd strides": attend(odd_strides)}


def ones() -> dict:
    """Every operator at sizes of 1, compiled: Triton makes constants of ones, in strides too."""
    backward(*attention.attention(*(zeros(1, 1, 1, 16) for _ in range(6))))
    wide = [zeros(1, 1, 1, dtype=torch.float32) for _ in range(6)]
    backward(*layer_norm.modulated_layer_norm(*wide))
    image, d_image = (zeros(1, 1, 1, 1, dtype=torch.float32) for _ in range(2))
    gain = zeros(1, dtype=torch.float32)
    backward(*group_norm.group_norm_silu(image, d_image, 1, gain, None, gain, None))
    backward(*pointwise.activation(gain, gain, "silu"))
    backward(sg_loss.sg_loss(image, d_image, torch.zeros(1), 0.5, image.detach()).loss)
    return {"launches": Counter(launch.kernel for launch in launches)}


def seconds() -> dict:
    """Time of this thread for one launch of the widest kernel: by the package, and by Triton alone."""
    tensors = [zeros(1, 2, 32, 64).detach() for _ in range(6)]
    o, d_o = torch.zeros(1, 2, 32, 64, dtype=torch.bfloat16), torch.zeros(1, 2, 32, 64, dtype=torch.bfloat16)
    lse, mu = torch.zeros(1, 2, 32), torch.zeros(1, 2, 32)
    call = attention_triton._forward_call(*tensors, None, o, d_o, lse, mu, False, 0.125)
    arguments = call.arguments | call.constants | {"BLOCK_M": 128, "BLOCK_N": 64}

    def package() -> None:
        attention_triton.forward(*tensors, None, False, 0.125, True)

    def triton() -> None:
        call.kernel[(1,)](**arguments, num_warps=8, num_stages=2)

    def best(function: Callable[[], None]) -> float:
        found = []
        for _ in range(20):
            started = time.thread_time()
            for _ in range(20):
                function()
            found.append((time.thread_time() - started) / 20)
        return min(found)

    return {"package": best(package), "triton": best(triton)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"steps": steps, "layouts": layouts, "ones": ones, "time": seconds}[sys.argv[1]]()))
