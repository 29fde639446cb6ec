"""The folder of a run: what lies in it, and when it can be used.

config.yaml  metrics.jsonl  tensorboard/  curves.png     the record
logs/rank_0.log  profile/rank_0.json                     what each process did; its trace, with --profile
history.jsonl                                            changes of a run that went on with others
samples/step_0000500.png                                 one-step samples of the averaged weights, fixed noise
checkpoints/                                             see checkpoint.py
model.safetensors  model.json                            the averaged weights, for sampling and evaluation
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from mmf_fast.files import remove_drafts, write_text
from mmf_fast.training.plain import plain

__all__ = ["RunFolderError", "check_run_folder", "prepare_run_folder", "seed_everything"]


class RunFolderError(ValueError):
    """The run folder cannot be used; the message is one line that names it and the way out."""


def check_run_folder(run: Path, resume: bool) -> None:
    try:
        there = run.exists()
        filled = run.is_dir() and any(run.iterdir())
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise RunFolderError(f"{run}: cannot be used ({error.strerror}); pass another --run") from error
    if there and not run.is_dir():
        raise RunFolderError(f"{run}: is a file, not a folder; pass another --run")
    if not resume and filled:
        raise RunFolderError(f"{run}: holds a run already; go on with --resume, or start another with --run FOLDER")


def prepare_run_folder(run: Path, record: Mapping[str, Any]) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
        remove_drafts(run)
        write_text(run / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain(dict(record)))))
    except OSError as error:
        raise RunFolderError(f"{run}: cannot be written ({error.strerror}); pass another --run") from error


def seed_everything(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
