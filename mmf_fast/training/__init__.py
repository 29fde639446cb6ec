"""Training: the trainer, its engines, checkpoints, the moving average of the weights, and the record of a run."""

from mmf_fast.training.checkpoint import CheckpointError
from mmf_fast.training.run_folder import RunFolderError
from mmf_fast.training.settings import ConfigError, Optimizer, Train
from mmf_fast.training.skipping import NonFiniteError
from mmf_fast.training.trainer import Trainer

__all__ = ["CheckpointError", "ConfigError", "NonFiniteError", "Optimizer", "RunFolderError", "Train", "Trainer"]
