"""The objective: times, lambda curriculum, guidance and the one loss of the MeanFlow family."""

from mmf_fast.objective.draws import BatchShare
from mmf_fast.objective.guidance import Guidance
from mmf_fast.objective.loss import LossOutput, MeanFlowLoss, sg_lambda
from mmf_fast.objective.presets import preset
from mmf_fast.objective.schedule import LambdaSchedule
from mmf_fast.objective.times import TimeSampler

__all__ = [
    "Guidance",
    "LambdaSchedule",
    "LossOutput",
    "MeanFlowLoss",
    "BatchShare",
    "TimeSampler",
    "preset",
    "sg_lambda",
]
