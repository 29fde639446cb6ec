"""Every test runs on one thread, from the same seed, and leaves the default dtype as it found it."""

import os
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the package is imported: kernels run on CPU tensors


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def float64() -> None:
    """Tensors and modules made in the test are float64."""
    torch.set_default_dtype(torch.float64)
