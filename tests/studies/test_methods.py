"""What is compared, at which cost."""

import pytest
import torch
from torch import nn

from mmf_fast import sample
from studies.methods import EVALUATIONS, FLOW_MATCHING, METHODS, loss_of, sampler_of, steps_within, title


class Times(nn.Module):
    """u = t - r, with a parameter to train."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z, r, t):
        return self.scale * ((t - r)[:, None] + 0 * z)


@pytest.mark.parametrize("method", METHODS, ids=title)
def test_flow_matching_is_asked_for_velocities_alone(method):
    noise = torch.zeros(3, 2)
    drawn = sample(Times(), (3, 2), steps=2, noise=noise, sampler=sampler_of(method))
    assert drawn.unique().tolist() == [0.0 if method == FLOW_MATCHING else -0.5]  # u(z, t, t) = 0; 2 x 0.5 x 0.5
    assert 1 in EVALUATIONS[method["method"]]


def test_every_method_costs_the_same():
    """Of 64 rows: flow matching 3 forwards each; with half of them intervals 3 and 4, or 3 and 6 at lambda 1."""
    steps = [steps_within(loss_of(method, Times()), 64, 64 * 6300) for method in METHODS]
    assert steps == [2100, 1800, 1400]
