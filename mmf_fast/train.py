"""Command line of the training: python mmf_fast/train.py --config configs/digits.yaml [key=value ...]."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmf_fast import config
from mmf_fast.training import Trainer


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="mmf train", description="Train a one-step generative model.", allow_abbrev=False
    )
    result.add_argument("--config", type=Path, help="YAML file; with --resume by default the run's own config.yaml")
    # torchrun takes --run for an abbreviation of an option of its own, even behind the script.
    result.add_argument(
        "--run", "--run-folder", type=Path, dest="run", help="run folder (default: runs/<name of the configuration>)"
    )
    result.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run folder")
    result.add_argument("--profile", action="store_true", help="leave a trace of a few steps in RUN/profile/")
    result.add_argument("--local_rank", "--local-rank", type=int, help="set by launchers; the environment decides")
    result.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for instance train.steps=100 loss.lam.kind=linear"
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 128 + n on signal n. Raises what the Trainer raises."""
    options = parser().parse_intermixed_args(arguments)
    if options.config is None and not (options.resume and options.run):
        raise config.ConfigError("--config is missing; for instance --config configs/digits.yaml")
    path = options.config or options.run / "config.yaml"
    run = options.run or Path("runs") / path.stem
    trainer = Trainer(config.load(path, options.overrides), run, options.resume, options.profile)
    finished = trainer.fit()
    if finished or trainer.stopped_by is None:
        if trainer.is_main:
            print(f"{run}: {trainer.step} steps done")
        return 0
    if trainer.is_main:
        print(f"{run}: saved at step {trainer.step} on {trainer.stopped_by.name}; go on with --resume", file=sys.stderr)
    return 128 + trainer.stopped_by


if __name__ == "__main__":  # deepspeed and torchrun start this file
    from mmf_fast import cli

    sys.exit(cli.main(["train", *sys.argv[1:]]))
