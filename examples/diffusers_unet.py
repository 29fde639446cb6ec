"""A UNet2DModel of diffusers, as it is (pip install diffusers): the adapter gives it a second time, t - r.

python examples/diffusers_unet.py --steps 300
"""

import argparse

import torch
from diffusers import UNet2DModel

from mmf_fast import DiffusersAdapter, MeanFlowLoss, sample
from mmf_fast.data import load


def main(steps: int) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        layers_per_block=1,
        num_class_embeds=11,
    )
    loss_fn = MeanFlowLoss(DiffusersAdapter(unet), null_label=10, paired=True)
    optimizer = torch.optim.AdamW(loss_fn.parameters(), lr=1e-3)
    digits = load("digits")
    for step in range(steps):
        x, y = digits.batch(step, size=64)
        out = loss_fn(x, step=step, y=y)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: error {out.metrics['mse']:.4f}")
    x = sample(loss_fn.net, (10, 1, 8, 8), steps=1, seed=0, y=torch.arange(10))
    print("samples lie in", [round(float(v), 2) for v in (x.min(), x.max())])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
