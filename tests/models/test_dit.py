"""What is particular to the DiT: published sizes, patches, positions."""

import math

import pytest
import torch

from mmf_fast.models import DiT
from mmf_fast.models.dit import positions_2d

# Table 4 of arXiv 2212.09748, at patch size 2 on 32 x 32 x 4 latents: parameters and multiply-adds of a forward.
PUBLISHED = {"S": (33e6, 6.06e9), "B": (130e6, 23.01e9), "L": (458e6, 80.71e9), "XL": (675e6, 118.64e9)}


@pytest.mark.parametrize("size", PUBLISHED)
def test_presets_have_the_published_size(size):
    with torch.device("meta"):
        net = DiT.preset(f"{size}/2", input_size=32, channels=4, num_classes=1000)
    parameters, multiply_adds = PUBLISHED[size]
    assert sum(parameter.numel() for parameter in net.parameters()) == pytest.approx(parameters, rel=0.005)
    assert net.flops() / 2 == pytest.approx(multiply_adds, rel=0.002)


def test_a_preset_takes_its_patch_size_and_other_arguments():
    with torch.device("meta"):
        net = DiT.preset("B/4", input_size=64, depth=1, qk_norm=True)
    assert net.config["patch_size"] == 4 and net.config["width"] == 768
    assert net.config["depth"] == 1 and net.config["qk_norm"] is True


@pytest.mark.parametrize("name", ["B", "B/", "B/x", "b/4", "XXL/2", ""])
def test_an_unknown_preset_is_refused(name):
    with pytest.raises(ValueError, match="unknown DiT preset .* give S, B, L or XL and a patch size, such as"):
        DiT.preset(name, input_size=32)


def test_a_patch_is_a_square_of_the_image():
    """A DiT without blocks' influence (they start as the identity) maps each patch to itself alone."""
    torch.manual_seed(0)
    net = DiT(input_size=6, channels=2, patch_size=2, width=16, depth=1, heads=2)
    torch.nn.init.normal_(net.output.weight)
    z, t = torch.randn(1, 2, 6, 6), torch.ones(1)
    other = z.clone()
    other[0, 1, 3, 4] += 1
    changed = (net(other, t, t) - net(z, t, t)).abs().amax(dim=(0, 1)) > 0
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[2:4, 4:6] = True
    assert changed.equal(expected)


def test_the_output_puts_patch_elements_back_where_they_came_from():
    """With a width of one patch's elements and identity maps at both ends, u is the image after layer norm."""
    net = DiT(input_size=4, channels=1, patch_size=2, width=4, depth=1, heads=1)
    torch.nn.init.eye_(net.input.weight)
    torch.nn.init.eye_(net.output.weight)
    net.positions_ND = torch.zeros_like(net.positions_ND)
    z, t = torch.randn(2, 1, 4, 4), torch.ones(2)
    u = net(z, t, t)
    for y in (0, 2):
        for x in (0, 2):
            square, result = z[:, 0, y : y + 2, x : x + 2], u[:, 0, y : y + 2, x : x + 2]
            mean, variance = square.mean((1, 2), keepdim=True), square.var((1, 2), unbiased=False, keepdim=True)
            torch.testing.assert_close(result, (square - mean) / (variance + 1e-6).sqrt())


def test_a_patch_of_a_sequence_is_a_run_of_its_steps():
    torch.manual_seed(0)
    net = DiT(input_size=6, channels=3, patch_size=2, width=16, depth=1, heads=2, dims=1)
    torch.nn.init.normal_(net.output.weight)
    z, t = torch.randn(1, 6, 3), torch.ones(1)
    other = z.clone()
    other[0, 3, 1] += 1
    changed = (net(other, t, t) - net(z, t, t)).abs().amax(dim=(0, 2)) > 0
    assert changed.tolist() == [False, False, True, True, False, False]
    assert net.from_patches(net.to_patches(z)).equal(z)


def test_a_sequence_knows_the_places_of_its_steps():
    """Without positions a transformer of a reversed sequence is the reversed result; with them it is not."""
    torch.manual_seed(0)
    net = DiT(input_size=4, channels=2, patch_size=1, width=8, depth=1, heads=2, dims=1).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    z, t = torch.randn(1, 4, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert (net(z.flip(1), t, t).flip(1) - net(z, t, t)).abs().max() > 1e-3
    net.positions_ND = torch.zeros_like(net.positions_ND)
    torch.testing.assert_close(net(z.flip(1), t, t).flip(1), net(z, t, t), rtol=1e-10, atol=1e-10)


def test_positions_are_the_sin_cos_of_row_and_column():
    grid, width = 3, 8
    positions = positions_2d(grid, width)
    for y in range(grid):
        for x in range(grid):
            expected = [f(at / 10000 ** (j / 2)) for at in (y, x) for f in (math.sin, math.cos) for j in range(2)]
            assert positions[y * grid + x].tolist() == pytest.approx(expected, abs=1e-6)
