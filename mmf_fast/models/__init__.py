"""Networks u(z, r, t, y), each written once and callable on tensors and on `Dual`s.

    net = build("dit", input_size=8, channels=1, patch_size=2, width=128, depth=4, heads=4, num_classes=10)
    u = net(z, r, t, y)          z (B, *shape), r and t (B,), y (B,) int64 or None -> u (B, *shape)

A network remembers the arguments it was built with in `net.config`, so that a saved one can be rebuilt.
"""

from mmf_fast.models.adapter import Adapter, DiffusersAdapter
from mmf_fast.models.dit import DiT
from mmf_fast.models.mlp import MLP
from mmf_fast.models.pretrained import (
    NETWORKS,
    Network,
    build,
    exported_step,
    load_pretrained,
    register_network,
    save_pretrained,
)
from mmf_fast.models.unet import UNet

__all__ = [
    "MLP",
    "NETWORKS",
    "Adapter",
    "DiT",
    "DiffusersAdapter",
    "Network",
    "UNet",
    "build",
    "exported_step",
    "load_pretrained",
    "register_network",
    "save_pretrained",
]
