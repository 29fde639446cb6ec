import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mmf_fast.training.ema import move_average

NO, YES = torch.tensor(False), torch.tensor(True)


def test_it_is_the_average_of_torch_and_of_the_closed_form(float64: None) -> None:
    """After a long past the decay is constant: torch's AveragedModel, and sum_i (1 - d) d^(n - i) theta_i."""
    net = nn.Linear(3, 2)
    ours = [parameter.detach().clone() for parameter in net.parameters()]
    torchs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    torchs.update_parameters(net)  # its first update copies
    closed = 0.9**20 * ours[0]
    for i in range(20):
        nn.init.normal_(net.weight)
        move_average(ours, [parameter.data for parameter in net.parameters()], 0.9, step=10_000 + i, skip=NO)
        torchs.update_parameters(net)
        closed = closed + 0.1 * 0.9 ** (19 - i) * net.weight
    torch.testing.assert_close(ours[0], torchs.module.weight.data, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours[0], closed.detach(), rtol=1e-12, atol=1e-15)


def test_the_decay_warms_up(float64: None) -> None:
    """d_n = min(decay, (1 + n) / (10 + n)): 1/10, 2/11, 3/12, ... on weights that jump from 0 to 1."""
    average, weights = [torch.zeros(1)], [torch.ones(1)]
    distance = 1.0
    for step, decay in enumerate((1 / 10, 2 / 11, 3 / 12)):
        move_average(average, weights, 0.999, step, skip=NO)
        distance *= decay
        assert abs(1 - average[0].item() - distance) < 1e-15


def test_a_skipped_update_changes_no_bit() -> None:
    average: list[Tensor] = [torch.randn(5, 5), torch.randn(3)]
    before = copy.deepcopy(average)
    move_average(average, [torch.randn(5, 5), torch.randn(3)], 0.99, 4, skip=YES)
    assert all(map(torch.equal, average, before))
