"""Every test runs on one thread, from the same seed, and leaves the default dtype as it found it."""

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def float64() -> None:
    """Tensors and modules made in the test are float64."""
    torch.set_default_dtype(torch.float64)
