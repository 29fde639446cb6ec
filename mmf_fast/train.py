"""The training by configuration: here, and nowhere else, a configuration becomes objects.

    python mmf_fast/train.py --config configs/digits.yaml [key=value ...]

An own network, loss or dataset needs no configuration: see `mmf_fast.training.Trainer`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmf_fast import data, models
from mmf_fast.config import Config, ConfigError, load
from mmf_fast.data.adapt import IndexedDataset, StreamedDataset
from mmf_fast.objective import MeanFlowLoss
from mmf_fast.registry import parameters_of
from mmf_fast.training import Trainer
from mmf_fast.training.run_folder import seed_everything

__all__ = ["build_loss", "build_trainer", "main"]


# By the axes of a sample, points (D,), sequences (T, C) or images (C, Y, X): arguments by which a network says so.
_SAYS = {1: {"dim"}, 2: {"dims"}, 3: {"channels", "input_size"}}


def _arguments_of(shape: tuple[int, ...]) -> dict[str, Any]:
    """What such arguments are for samples of this shape."""
    if len(shape) == 1:
        return {"dim": shape[0]}
    if len(shape) == 2:
        return {"input_size": shape[0], "channels": shape[1], "dims": 1}
    return {"channels": shape[0], "input_size": shape[-1]}


def build_loss(config: Config, dataset: data.Dataset) -> MeanFlowLoss:
    """Network and loss of a configuration; shape and class count come from the data where the model has none.

    Raises ConfigError where the model's contradict the data.
    """
    shape = dataset.shape
    implied = {"num_classes": dataset.num_classes} | _arguments_of(shape)
    name = config.model["name"]
    accepted, _ = parameters_of(models.NETWORKS.find(name))
    if not accepted.keys() & _SAYS.get(len(shape), set()) and accepted.keys() & set().union(*_SAYS.values()):
        raise ConfigError(
            f"model.name={name} does not take samples of shape {shape} (data.name={dataset.name}); choose another model"
        )
    if isinstance(dataset, (IndexedDataset, StreamedDataset)):  # labels in batches do not tell how many
        implied["num_classes"] = config.model.get("num_classes", 0)
    for key in implied.keys() & config.model.keys():
        if config.model[key] != implied[key]:
            unlabelled = key == "num_classes" and not config.model[key]
            without = ", or prepare the data with --labels none" if unlabelled else ""
            raise ConfigError(
                f"model.{key} is {config.model[key]}, but that of data.name={dataset.name} is {implied[key]}; "
                f"leave model.{key} out{without}"
            )
    loss = {key: value for key, value in config.loss.items() if key != "objective"}
    told = loss.get("guidance") is not None and bool(loss["guidance"].told)
    implied |= {"guided": True} if told else {}
    net = models.build(**{key: value for key, value in implied.items() if key in accepted} | config.model)
    return MeanFlowLoss(net, **loss)


def build_trainer(config: Config, run: str | Path, **options: Any) -> Trainer:
    """The trainer of a configuration; options: resume, allow_changes, profile, callbacks, as of `Trainer`.

    Raises what that raises.
    """
    seed_everything(config.seed)  # of the weights, and of dropout: what the loss draws has a generator of its own
    dataset = data.load(**config.data)
    return Trainer(
        build_loss(config, dataset),
        dataset,
        run,
        train=config.train,
        optimizer=config.optimizer,
        seed=config.seed,
        record=config.tree(),
        identity=config.identity(dataset.identity),
        extra={"data": config.tree()["data"]},
        **options,
    )


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
    result.add_argument(
        "--allow-changes", action="store_true", help="with --resume: another optimizer, loss, precision or batch"
    )
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
        raise ConfigError("--config is missing; for instance --config configs/digits.yaml")
    if options.allow_changes and not options.resume:
        raise ConfigError("--allow-changes is of a run that goes on: add --resume, or leave it out")
    path = options.config or options.run / "config.yaml"
    run = options.run or Path("runs") / path.stem
    trainer = build_trainer(
        load(path, options.overrides),
        run,
        resume=options.resume,
        allow_changes=options.allow_changes,
        profile=options.profile,
    )
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
