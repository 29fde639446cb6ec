"""Small float64 networks of each kind, with weights that leave no branch at zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmf_fast.models import MLP, DiT, UNet

KINDS = ("mlp", "dit", "sequence", "unet")


def network(kind: str, num_classes: int = 0) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module
    if kind == "mlp":
        net = MLP(dim=3, width=8, depth=2, num_classes=num_classes)
    elif kind == "dit":
        net = DiT(4, channels=2, patch_size=2, width=8, depth=2, heads=2, num_classes=num_classes, qk_norm=True)
    elif kind == "sequence":
        net = DiT(6, channels=2, patch_size=3, width=8, depth=2, heads=2, num_classes=num_classes, dims=1)
    else:
        net = UNet(
            4, channels=2, base_channels=8, channel_mults=(1, 2), blocks=1, attention_resolutions=(2,),
            num_classes=num_classes,
        )  # fmt: skip
    net = net.double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net


def saved_bytes(function: Callable[..., Any], *args: Any, net: nn.Module, **kwargs: Any) -> int:
    """Bytes of the distinct storages that autograd saves in a call, the parameters of `net` left out."""
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # a freed storage's address could come back
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*args, **kwargs)
    return sum(storages.values())


def sample_shape(kind: str) -> tuple[int, ...]:
    return {"mlp": (3,), "sequence": (6, 2)}.get(kind, (2, 4, 4))


def batch(kind: str, size: int = 6, instants: int = 2) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """x, noise and times of `size` samples, the r = t ones in between the others."""
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, size, *sample_shape(kind), generator=generator, dtype=torch.float64)
    t = 0.2 + 0.8 * torch.rand(size, generator=generator, dtype=torch.float64)
    r = t * torch.rand(size, generator=generator, dtype=torch.float64)
    places = torch.randperm(size, generator=generator)[:instants]
    r[places] = t[places]
    return x, noise, (r, t)
