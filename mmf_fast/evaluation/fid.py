"""Frechet Inception distance of a run's samples to reference statistics, alone or under torchrun or deepspeed.

    mmf fid --run runs/imagenet64 --reference imagenet-64x64.npz --inception inception-2015-12-05.pt
    torchrun --nproc-per-node 8 -m mmf_fast fid --run-folder runs/imagenet64 --reference data/imagenet64 ...

prints the figure and writes fid.json, with all it depends on, into the run folder. The reference is a file of
statistics (mmf_fast/evaluation/statistics.py names the formats) or a prepared set of images, whose statistics
`--save-reference` keeps. Nothing is downloaded.

Noise and label of sample i are functions of (seed, i) alone, labels are balanced: the figure depends neither on the
number of ranks nor on the batch. Images are rounded to uint8 as other projects do it, which matters:

    round    trunc(127.5 x + 128)         to the nearest: NVlabs (EDM), DiT
    floor    trunc((x + 1) / 2 * 255)     downwards: ADM

No kept library computes this: torchmetrics takes its reference as a stream of images only, ends in float32 and gathers
the D x D sums of all ranks on each; pytorch-fid and clean-fid know no ranks and fetch their weights.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from mmf_fast.data.dataset import row_noise
from mmf_fast.data.prepared import MANIFEST, SAMPLES, PreparedSet, open_prepared
from mmf_fast.devices import choose_device
from mmf_fast.distributed import agree, join, rank_and_count
from mmf_fast.evaluation.distances import gaussian_frechet
from mmf_fast.evaluation.statistics import Statistics, Sums, read_statistics, write_statistics
from mmf_fast.files import digest, write_text
from mmf_fast.models import load_pretrained
from mmf_fast.sampling import (
    Sampler,
    guidance_of,
    guidance_options,
    import_made,
    network_option,
    sample,
    sampler_option,
    samples_of,
)

__all__ = ["Inception", "evaluate_fid", "sample_statistics", "set_statistics", "to_uint8"]

Rounding = Literal["round", "floor"]
ROUNDINGS: dict[str, str] = {"round": "trunc(127.5 x + 128)", "floor": "trunc((x + 1) / 2 * 255)"}

# Random keys are (seed, this), and of a later draw (seed, less): training data use small numbers and 2**64 - 1 there.
_NOISE_KEY = 2**64 - 2


class Inception:
    """Features of images by a TorchScript file that is called as NVlabs' inception-2015-12-05.pt is:

        net(images (N, 3, H, W) uint8, return_features=True) -> (N, D); it resizes by itself

    .dim: D.  .file: {"file", "sha256"}. Raises ValueError for a file that is missing or not of this kind.
    """

    def __init__(self, path: str | Path, device: torch.device) -> None:
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"{path}: missing; bring inception-2015-12-05.pt, the TorchScript Inception-v3 of NVlabs' "
                "stylegan2-ada-pytorch, which clean-fid uses too, and name it with --inception: nothing is downloaded"
            )
        self.path, self.device = path, device
        self.file = {"file": path.name, "sha256": digest(path)}
        try:
            self._net = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{path}: is no TorchScript file ({_line(error)}); pass inception-2015-12-05.pt"
            ) from error
        self.dim = 0
        self.dim = self(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device)).shape[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """images (N, 1 or 3, H, W) uint8 -> (N, D); a single channel is repeated, as NVlabs does."""
        try:
            features = self._net(images.to(self.device).expand(-1, 3, -1, -1), return_features=True)
        except RuntimeError as error:
            reason = _line(error)
            raise ValueError(
                f"{self.path}: cannot be called as net(images, return_features=True) ({reason}); "
                "pass inception-2015-12-05.pt"
            ) from error
        shape = tuple(features.shape) if isinstance(features, Tensor) else ()
        if len(shape) != 2 or len(features) != len(images) or self.dim not in (0, shape[1]):
            raise ValueError(f"{self.path}: gives {shape} for {len(images)} images, not (N, D); pass another file")
        return features


def to_uint8(x: Tensor, rounding: Rounding) -> Tensor:
    """x in [-1, 1] -> uint8, rounded by one of ROUNDINGS; values outside of [-1, 1] are clamped."""
    levels = x * 127.5 + 128 if rounding == "round" else (x + 1) / 2 * 255
    return levels.clamp(0, 255).to(torch.uint8)


def sample_statistics(
    net: Callable[..., Tensor],
    features: Inception,
    count: int = 50_000,
    steps: int = 1,
    seed: int = 0,
    batch: int = 64,
    rounding: Rounding = "round",
    shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    sampler: Sampler = "average",
    guidance: Mapping[str, float] | None = None,
) -> Statistics:
    """Statistics of `count` samples of `net`. Each rank draws the samples rank, rank + ranks, ...; all get the result.

    shape, num_classes: of a sample, where the network has no attributes of these names.
    sampler: what a step uses, see `mmf_fast.sample`.  guidance: omega, t_min, t_max of a network that is told them.
    Raises ValueError for samples that are not finite.
    """
    shape, classes = samples_of(net, {"shape": shape, "num_classes": num_classes}, "the network")

    keys = [(seed, _NOISE_KEY - step) for step in range(steps if sampler == "consistency" else 1)]

    def draw(rows: range) -> Tensor:
        noise = [torch.from_numpy(row_noise(key, rows, (len(rows), *shape))) for key in keys]
        cond: dict[str, Any] = dict(guidance or {}) | ({"y": torch.tensor(rows) % classes} if classes else {})
        x = sample(net, noise[0].shape, steps, noise, sampler=sampler, **cond)
        if not torch.isfinite(x).all():
            raise ValueError("the network gives samples that are not finite: its training has diverged")
        return to_uint8(x, rounding)

    return _statistics(draw, count, batch, features, "samples")


def set_statistics(images: PreparedSet, features: Inception, batch: int = 64) -> Statistics:
    """Statistics of all images of a prepared set. Each rank reads its share of them; all get the result."""

    def read(rows: range) -> Tensor:
        return torch.from_numpy(images.samples[rows.start : rows.stop : rows.step].copy())

    return _statistics(read, len(images.samples), batch, features, "reference images")


def _statistics(
    images: Callable[[range], Tensor], count: int, batch: int, features: Inception, title: str
) -> Statistics:
    """images(rows) -> (len(rows), C, H, W) uint8, called for the rows of this rank, `batch` at a time."""
    rank, ranks = rank_and_count()
    sums = Sums(features.dim, features.device)
    rows = range(rank, count, ranks)
    with tqdm(total=count, desc=title, unit="image", disable=rank > 0) as bar:

        def add_all() -> None:
            for first in range(0, len(rows), batch):
                part = rows[first : first + batch]
                sums.add(features(images(part)))
                bar.update(min(len(part) * ranks, count - bar.n))

        agree(add_all)
    return sums.reduce()


def evaluate_fid(
    run: str | Path,
    reference: str | Path,
    inception: str | Path,
    count: int = 50_000,
    batch: int = 64,
    steps: int = 1,
    seed: int = 0,
    device: str = "auto",
    rounding: Rounding = "round",
    save_reference: str | Path | None = None,
    net: nn.Module | None = None,
    sampler: Sampler = "average",
    guidance: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The FID of a run's samples with all it depends on; rank 0 writes it to fid.json in the run folder.

    net: takes the weights of the run, for a network of one's own.  sampler, guidance: as of `sample_statistics`.
    Every rank of a process group calls it and gets {"fid", "samples", ...}, on ranks above 0 without "fid".
    Raises ValueError, on all ranks where it fails on one.
    """
    target = choose_device(device)

    def prepare() -> tuple[nn.Module, dict[str, Any], Inception, Statistics | PreparedSet, str]:
        _check_numbers(count, batch, steps, seed)
        loaded, extra = load_pretrained(run, net)
        extra["shape"], extra["num_classes"] = samples_of(loaded, extra, run)
        _check_images(extra, run)
        features = Inception(inception, target)
        found = _open(reference, extra["shape"], features, save_reference)
        return loaded.to(target), extra, features, found, _checksum(reference, found)

    network, extra, features, found, checksum = agree(prepare)
    real = found if isinstance(found, Statistics) else set_statistics(found, features, batch)
    rank, ranks = rank_and_count()
    if save_reference is not None:
        agree(lambda: write_statistics(save_reference, real) if rank == 0 else None)
    fake = sample_statistics(
        network, features, count, steps, seed, batch, rounding, extra["shape"], extra["num_classes"], sampler,
        guidance,
    )  # fmt: skip
    result = {
        "samples": count,
        "steps": steps,
        "sampler": sampler,
        "guidance": dict(guidance or {}),
        "seed": seed,
        "rounding": f"{rounding}: {ROUNDINGS[rounding]}",
        "features": {**features.file, "dimension": features.dim, "backend": f"TorchScript, torch {torch.__version__}"},
        "reference": {"path": str(reference), "sha256": checksum},
        "batch": batch,
        "ranks": ranks,
        "device": target.type,
        "training_step": extra.get("step"),
    }
    if rank == 0:
        result = {"fid": gaussian_frechet(fake.mean, real.mean, fake.cov, real.cov), **result}
        write_text(Path(run) / "fid.json", json.dumps(result, indent=2) + "\n")
    return result


def _check_numbers(count: int, batch: int, steps: int, seed: int) -> None:
    if count < 2 or batch < 1 or steps < 1 or not 0 <= seed < 2**63:
        raise ValueError(f"count {count}, batch {batch}, steps {steps}, seed {seed}: at least 2, 1, 1 and 0 are needed")


def _check_images(extra: dict[str, Any], run: str | Path) -> None:
    data, shape = extra.get("data"), extra["shape"]
    if isinstance(data, dict) and data.get("name") == "latents":
        raise ValueError(f"{run}: its samples are latents; decode them to images first, there is no decoder here")
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"{run}: its samples have shape {shape}; images of 1 or 3 channels have an FID")


def _open(
    reference: str | Path, shape: tuple[int, ...], features: Inception, save_reference: str | Path | None
) -> Statistics | PreparedSet:
    """Statistics, or a prepared set of which they are to be computed; it must fit network and features."""
    path = Path(reference)
    if (path / MANIFEST).is_file():
        images = open_prepared(path, "images")
        if images.manifest.shape != shape or images.manifest.count < 2:
            raise ValueError(
                f"{path}: {images.manifest.count} images of shape {images.manifest.shape}, the network draws "
                f"{shape}; prepare a set of that shape"
            )
        return images
    if path.is_dir():
        raise ValueError(f"{path}: is no prepared set; pass one, or a file of statistics")
    if save_reference is not None:
        raise ValueError(
            "--save-reference keeps the statistics of a prepared set, but --reference is a file of statistics"
        )
    statistics = read_statistics(path)
    if len(statistics.mean) != features.dim:
        raise ValueError(
            f"{path}: has {len(statistics.mean)} features, {features.path} gives {features.dim}; "
            "take statistics of the same network"
        )
    return statistics


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Joins the processes that torchrun or deepspeed started, if any."""
    if "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    join(device)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _line(error: Exception) -> str:
    """The last line of a message: TorchScript puts its reason there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _checksum(reference: str | Path, found: Statistics | PreparedSet) -> str:
    """sha256 of a file of statistics; for a prepared set, the sha256 of its samples, which its manifest holds."""
    return found.manifest.files[SAMPLES]["sha256"] if isinstance(found, PreparedSet) else digest(Path(reference))


# ---- command line ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="mmf fid", description="Frechet Inception distance of a trained run.", allow_abbrev=False
    )
    add = result.add_argument
    # torchrun takes --run for an abbreviation of an option of its own, even behind the module.
    add("--run", "--run-folder", type=Path, dest="run", required=True, help="run folder; fid.json goes there")
    add("--reference", type=Path, required=True, help="statistics (.npz, .pkl), or a prepared set of images")
    add("--inception", type=Path, default=Path("inception-2015-12-05.pt"), help="TorchScript weights (NVlabs)")
    add("--count", type=int, default=50_000, help="samples (default: 50000)")
    add("--batch", type=int, default=64, help="samples at a time on each rank (default: 64)")
    add("--steps", type=int, default=1, help="evaluations of the network per sample (default: 1)")
    sampler_option(result)
    guidance_options(result)
    add("--seed", type=int, default=0, help="of the noise (default: 0)")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--rounding", choices=list(ROUNDINGS), default="round", help="to uint8 (default: round)")
    add("--save-reference", type=Path, metavar="NPZ", help="keep the statistics of a prepared set")
    add("--local_rank", "--local-rank", type=int, help="set by launchers; the environment decides")
    network_option(result)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    guidance, net = guidance_of(given), import_made(given.net)
    options = vars(given) | {"guidance": guidance, "net": net}
    del options["local_rank"]  # launchers set it; the environment decides
    with process_group(options["device"]):
        result = evaluate_fid(**options)
    if "fid" in result:
        print(json.dumps(result, indent=2))
        print(f"FID {result['fid']:.4f} of {result['samples']} samples; written: {options['run']}/fid.json")
