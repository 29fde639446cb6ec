"""What a step draws."""

import pytest
import torch

from mmf_fast import TimeSampler
from mmf_fast.objective import BatchShare
from mmf_fast.objective.draws import draw


@pytest.mark.parametrize("seed", [None, 5])
def test_every_row_is_equally_often_among_the_first(seed: int | None) -> None:
    """The rows whose tangent back-propagates are the first; 8 rows with r < t, 4000 draws: 500 +- 21 each."""
    x = torch.arange(10.0).view(10, 1)
    counts = torch.zeros(8)
    for step in range(4000):
        part = BatchShare(seed=seed)
        drawn = draw(x, None, None, {}, TimeSampler(share=0.8), shuffled=True, part=part,
                     generator=part.generator(step, x.device))  # fmt: skip
        first = drawn.x[2:, 0].long()
        assert sorted(first.tolist()) == list(range(2, 10))
        counts[first[0] - 2] += 1
    assert counts.min() > 410 and counts.max() < 590
