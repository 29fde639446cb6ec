"""How good samples are: figures of toys and small labelled images, the Frechet Inception distance of the others."""

from mmf_fast.evaluation.samples import evaluate, evaluate_run

__all__ = ["evaluate", "evaluate_run"]
