import copy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mmf_fast.training.ema import EMA

NO, YES = torch.tensor(False), torch.tensor(True)


def test_it_is_the_average_of_torch_and_of_the_closed_form(float64: None) -> None:
    """After a long past the decay is constant: torch's AveragedModel, and sum_i (1 - d) d^(n - i) theta_i."""
    net = nn.Linear(3, 2)
    start = copy.deepcopy(net)
    ours = EMA(net, decay=0.9)
    torchs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    torchs.update_parameters(net)  # its first update copies
    closed = 0.9**20 * start.weight
    for i in range(20):
        nn.init.normal_(net.weight)
        ours.update(net, step=10_000 + i, skip=NO)
        torchs.update_parameters(net)
        closed = closed + 0.1 * 0.9 ** (19 - i) * net.weight
    torch.testing.assert_close(ours.net.weight, torchs.module.weight, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.net.weight, closed, rtol=1e-12, atol=1e-15)


def test_the_decay_warms_up(float64: None) -> None:
    """d_n = min(decay, (1 + n) / (10 + n)): 1/10, 2/11, 3/12, ... on weights that jump from 0 to 1."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    ema = EMA(net, decay=0.999)
    nn.init.ones_(net.weight)
    distance = 1.0
    for step, decay in enumerate((1 / 10, 2 / 11, 3 / 12)):
        ema.update(net, step, skip=NO)
        distance *= decay
        assert abs(1 - ema.net.weight.item() - distance) < 1e-15


def test_a_skipped_update_changes_no_bit() -> None:
    net = nn.Linear(5, 5)
    ema = EMA(net, decay=0.99)
    nn.init.normal_(net.weight)
    ema.update(net, 3, skip=NO)
    before = copy.deepcopy(ema.net.state_dict())
    nn.init.normal_(net.weight)
    ema.update(net, 4, skip=YES)
    assert all(torch.equal(value, before[key]) for key, value in ema.net.state_dict().items())


def test_it_is_a_frozen_copy_in_eval_mode_and_buffers_follow() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5)).train()
    ema = EMA(net, decay=0.9)
    net(torch.randn(8, 2))
    ema.update(net, 0, skip=NO)
    assert not ema.net.training and net.training
    assert not any(parameter.requires_grad for parameter in ema.net.parameters())
    assert torch.equal(ema.net[0].running_mean, net[0].running_mean)
    assert ema.net[0].running_mean.data_ptr() != net[0].running_mean.data_ptr()
