"""The measure of repetition, where the answer is known."""

from __future__ import annotations

import pytest
import torch

from studies.little_data import few, repeated


def test_copies_repeat_and_what_lies_between_images_does_not() -> None:
    images = torch.eye(4).view(4, 1, 2, 2)  # all at a distance of 2^(1/2) from each other
    between = images.mean(0, keepdim=True)
    near = images[:1] + 0.1 * torch.tensor([0.0, 1, 1, 1]).view(1, 1, 2, 2)
    assert repeated(images, images) == 1
    assert repeated(between, images) == 0
    assert repeated(torch.cat([near, between]), images) == 0.5


def test_every_seed_has_images_of_its_own_and_the_same_test_images() -> None:
    one, same, other = (few(50, seed, quick=True) for seed in (0, 0, 1))
    assert one.shape == (1, 14, 14) and len(one.split("train")[0]) == 50
    assert torch.equal(one.split("train")[0], same.split("train")[0])
    assert not torch.equal(one.split("train")[0], other.split("train")[0])
    torch.testing.assert_close(one.split("validation")[0], other.split("validation")[0], rtol=0, atol=0)


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_the_line_is_at_a_third_of_the_distance_to_the_second_image(share: float) -> None:
    images = torch.tensor([0.0, 4.0]).view(2, 1, 1, 1)
    x = torch.full((1, 1, 1, 1), share)  # at 1 the distances are 1 and 3
    assert repeated(x, images) == (share < 1)
