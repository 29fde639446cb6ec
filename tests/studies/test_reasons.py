"""The network whose times are embedded with other frequencies."""

from __future__ import annotations

import torch
from torch import Tensor

from mmf_fast.models import MLP
from mmf_fast.models.layers import HIGHEST
from studies.reasons import Times


def test_at_the_frequency_of_networks_it_is_theirs_and_at_16_it_hears_sin_16_t() -> None:
    torch.manual_seed(0)
    net, heard = MLP(width=8, depth=1), list[Tensor]()
    own, (r, t) = net.conditioning, torch.rand(2, 5).sort(dim=0).values
    assert torch.equal(Times(own, HIGHEST)(r, t), own(r, t, None))
    net.add_module("conditioning", Times(own, 16.0))
    assert [*net.state_dict()] == [*MLP(width=8, depth=1).state_dict()]
    own.fc_in.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0]))
    net(torch.zeros(5, 2), r, t)
    highest_B4 = heard[0][:, 127::128]  # sin and cos of t, then of t - r
    angles_B2 = 16 * torch.stack([t, t - r], dim=1)
    expected_B22 = torch.stack([angles_B2.sin(), angles_B2.cos()], dim=2)
    torch.testing.assert_close(highest_B4, expected_B22.flatten(1))
