"""What is particular to the UNet: where it attends and how far it sees."""

import pytest
import torch

from mmf_fast.models import UNet
from mmf_fast.models.unet import Resample, SpatialAttention, group_norm


def attending(net):
    return sorted({layer.size for layer in net.modules() if isinstance(layer, SpatialAttention)})


@pytest.mark.parametrize(("resolutions", "expected"), [((), []), ((8,), [2, 8]), ((4, 2), [2, 4])])
def test_attention_is_where_it_was_asked_for_and_in_the_middle(resolutions, expected):
    net = UNet(8, base_channels=4, channel_mults=(1, 1, 1), blocks=1, attention_resolutions=resolutions, heads=2)
    assert attending(net) == expected


def test_the_middle_connects_all_pixels():
    torch.manual_seed(0)
    net = UNet(8, channels=1, base_channels=8, channel_mults=(1, 2), blocks=1, attention_resolutions=(4,), heads=2)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    net = net.double()
    z, t = torch.randn(1, 1, 8, 8, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    other = z.clone()
    other[0, 0, 0, 0] += 1
    assert ((net(other, t, t) - net(z, t, t)).abs() > 0).all()


def test_resample_halves_and_doubles():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    down, up = Resample(1, 2, up=False), Resample(1, 8, up=True)
    for layer in (down, up):
        torch.nn.init.zeros_(layer.conv.bias)
        torch.nn.init.zeros_(layer.conv.weight)
        layer.conv.weight.data[0, 0, 1, 1] = 1  # the convolution copies its centre
    assert down(x, None)[0, 0].tolist() == [[0, 2], [8, 10]]
    assert up(x, None).equal(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("channels", [4, 8, 12, 36, 96, 128, 192, 384, 1024])
def test_group_norm_has_groups_of_at_least_four_channels(channels):
    groups = group_norm(channels).num_groups
    assert groups <= 32 and channels % groups == 0 and channels // groups >= 4
