"""A training of a network of diffusers, as a user writes it: torchrun ... diffusers_run.py FOLDER STEPS ZERO."""

import sys

import torch
from diffusers import UNet2DModel

import mmf_fast

if __name__ == "__main__":
    folder, steps, zero = sys.argv[1:]
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, num_class_embeds=4,
    )  # fmt: skip
    images, labels = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
    net = mmf_fast.DiffusersAdapter(unet)
    loss_fn = mmf_fast.MeanFlowLoss(
        net, times=mmf_fast.TimeSampler(share=0.25), lam=0.1, paired=True, p=0.0, null_label=3
    )
    blocks = ("down_blocks", "mid_block", "up_blocks")
    train = mmf_fast.Train(
        batch=16, steps=int(steps), zero=zero, blocks=blocks, device="cpu", log_every=1, checkpoint_every=3
    )
    optimizer = mmf_fast.Optimizer(lr=1e-3, warmup=2, ema=0.9)
    mmf_fast.Trainer(loss_fn, (images, labels), folder, train=train, optimizer=optimizer, resume=True).fit()
