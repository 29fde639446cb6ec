"""A small classifier of a labelled image dataset: its features and its labels judge samples of that dataset."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmf_fast.data import Dataset

__all__ = ["Classifier", "train_classifier"]


class Classifier(nn.Module):
    """Two convolutions and one hidden layer: images (B, C, H, W) in [-1, 1] -> logits (B, classes); for tiny images."""

    def __init__(self, shape: tuple[int, ...], classes: int, channels: int = 16, width: int = 64):
        super().__init__()
        colours, height, columns = shape
        self.body = nn.Sequential(
            nn.Conv2d(colours, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(2 * channels * (height // 2) * (columns // 2), width),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    @torch.no_grad()
    def judge(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) -> penultimate features (N, width) and labels (N,) int64, on the CPU."""
        features = torch.cat([self.body(part.float().cpu()) for part in x.split(1000)])
        return features, self.head(features).argmax(dim=1)


def train_classifier(
    dataset: Dataset, epochs: int = 30, batch: int = 64, lr: float = 3e-3, seed: int = 0, most: int = 8_000
) -> Classifier:
    """A classifier trained on the training split alone, the same at every call; in evaluation mode, on the CPU.

    Adam with a cosine schedule, and a little noise on the images; `epochs` passes, but at most `most` steps. Takes
    seconds for thousands of 8x8 images; leaves the caller's random state alone.
    Raises ValueError for a dataset without labels or without images.
    """
    x, y = dataset.split("train")
    if y is None or len(dataset.shape) != 3:
        raise ValueError(f"dataset {dataset.name} has no labelled images to train a classifier on")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(dataset.shape, dataset.num_classes)
        optimizer = torch.optim.Adam(net.parameters(), lr=lr)
        steps = min(epochs * len(x) // batch, most)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        rows = torch.cat([torch.randperm(len(x)) for _ in range(-(-steps * batch // len(x)))])
        for step in range(steps):
            i = rows[step * batch : (step + 1) * batch]
            optimizer.zero_grad()
            F.cross_entropy(net(x[i] + 0.2 * torch.randn_like(x[i])), y[i]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()
