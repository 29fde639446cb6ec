"""What lambda and the choice of tangent do to one-step samples: python -m benchmarks.lambda_table [--data two_moons]

Trains configs/<data>.yaml once for each lambda in {0, 0.5, 1, curriculum} and each tangent, all else equal, and
measures the sliced Wasserstein distance of one-step samples to the training data, beside that of fresh data. Writes
benchmarks/results/cpu/lambda_<data>.json and docs/lambda_<data>.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from mmf_fast import config, sample
from mmf_fast.data import load
from mmf_fast.evaluation.distances import sliced_wasserstein
from mmf_fast.models import load_pretrained
from mmf_fast.train import build_trainer

ROOT = Path(__file__).parent.parent
LAMBDAS = {"0": ["loss.lam=0"], "0.5": ["loss.lam=0.5"], "1": ["loss.lam=1"], "curriculum": []}
TANGENTS = {
    "conditional": ["loss.tangent=conditional", "loss.paired=false"],
    "predicted": ["loss.tangent=predicted", "loss.paired=true"],
}
POINTS = 10_000


def train(data: str, lam: str, tangent: str, overrides: list[str]) -> torch.Tensor:
    """One-step samples (POINTS, 2) of one cell."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options = [*LAMBDAS[lam], *TANGENTS[tangent], "train.sample_every=0", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        build_trainer(config.load(ROOT / "configs" / f"{data}.yaml", options), Path(folder) / "run").fit()
        net, _ = load_pretrained(Path(folder) / "run")
    noise = torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(1))
    return sample(net, (POINTS, 2), noise=noise)


def draw(path: Path, samples: dict[tuple[str, str], torch.Tensor], distances: dict[str, dict[str, float]]) -> None:
    figure = Figure(figsize=(3 * len(LAMBDAS), 6.4), layout="constrained")
    axes = figure.subplots(len(TANGENTS), len(LAMBDAS), sharex=True, sharey=True)
    for (tangent, lam), x in samples.items():
        ax = axes[list(TANGENTS).index(tangent)][list(LAMBDAS).index(lam)]
        ax.scatter(*x[:4000].T, s=1, alpha=0.5, linewidths=0)
        name = "lambda 0 to 1" if lam == "curriculum" else f"lambda {lam}"
        ax.set(
            title=f"{tangent}, {name}: {distances[tangent][lam]:.3f}",
            xlim=(-2.6, 2.6),
            ylim=(-2.6, 2.6),
            aspect="equal",
        )
    figure.suptitle("One-step samples; sliced Wasserstein distance to the data")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Table of lambda against tangent.")
    parser.add_argument("--data", default="two_moons")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all cells, such as train.steps=1000")
    options = parser.parse_args()
    with ProcessPoolExecutor(2) as pool:
        jobs = {
            (tangent, lam): pool.submit(train, options.data, lam, tangent, options.overrides)
            for tangent in TANGENTS
            for lam in LAMBDAS
        }
        samples = {cell: job.result() for cell, job in jobs.items()}

    dataset = load(options.data)
    data = dataset.split("train")[0]
    distances: dict[str, dict[str, float]] = {tangent: {} for tangent in TANGENTS}
    for (tangent, lam), x in samples.items():
        distances[tangent][lam] = sliced_wasserstein(x, data)
    result: dict[str, Any] = {
        "distances": distances,
        "fresh data": sliced_wasserstein(dataset.split("validation")[0], data),
        "configuration": config.load(ROOT / "configs" / f"{options.data}.yaml", options.overrides).tree(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    path = ROOT / "benchmarks" / "results" / "cpu" / f"lambda_{options.data}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(ROOT / "docs" / f"lambda_{options.data}.png", samples, distances)
    print(json.dumps(result["distances"], indent=1))


if __name__ == "__main__":
    main()
