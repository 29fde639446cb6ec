"""Random numbers of the rows of a batch: from torch's global generator, or numbered, so that each row has its own.

A numbered stream is a function of (seed, step, row, place): whoever holds a row draws its numbers alone, in the same
few launches for any number of rows, and finds on a CPU what it finds on a GPU (to the rounding of log and cos). They
are hashes of their number by the finaliser of SplitMix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom
number generators", with the constants of Stafford's variant 13):

    mix(h) = xorshift_31((xorshift_27((xorshift_30(h)) C_1)) C_2)
    row key = mix(mix(seed, step) + row G),   64 bits of place i = mix(row key xor i G)

The halves of the 64 bits make two uniform numbers or, by Box and Muller, two normal ones.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["GlobalStream", "NumberedStream", "hashed"]

_G, _C1, _C2 = (int(x, 16) - 2**64 for x in ("9E3779B97F4A7C15", "BF58476D1CE4E5B9", "94D049BB133111EB"))  # as int64


class GlobalStream:
    """Numbers for `rows` rows from torch's global generator of the device."""

    def __init__(self, rows: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.rows, self.options = rows, {"device": device, "dtype": dtype}

    def uniform(self) -> Tensor:
        """(rows,) in [0, 1]."""
        return torch.rand(self.rows, **self.options)  # type: ignore[call-overload]

    def normal(self, shape: Sequence[int] = ()) -> Tensor:
        """(rows, *shape), standard normal."""
        return torch.randn(self.rows, *shape, **self.options)  # type: ignore[call-overload]


class NumberedStream:
    """The same of rows first, first + 1, ... of the global batch of a step. What is drawn later has other places."""

    def __init__(
        self, seed: int, step: int, first: int, rows: int, device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.dtype, self.place = dtype, 0
        numbers = torch.arange(first, first + rows, device=device)
        self.keys = _mix(numbers * _G + int.from_bytes(hashed(seed, step), "little", signed=True))

    def uniform(self) -> Tensor:
        return self._two(1)[0][:, 0]

    def normal(self, shape: Sequence[int] = ()) -> Tensor:
        count = math.prod(shape)
        u, v = self._two((count + 1) // 2)
        radius, angle = u.log_().mul_(-2).sqrt_(), v.mul_(2 * math.pi)
        pair = torch.cat([angle.cos().mul_(radius), angle.sin_().mul_(radius)], 1)
        return pair[:, :count].reshape(len(self.keys), *shape)

    def _two(self, count: int) -> tuple[Tensor, Tensor]:
        """Two uniform numbers in (0, 1] of 32 bits for the next `count` places of each row: (rows, count)."""
        places = torch.arange(self.place, self.place + count, device=self.keys.device)
        self.place += count
        bits = _mix(self.keys[:, None] ^ (places * _G))
        return tuple(half.to(self.dtype).add_(0.5).mul_(2.0**-32) for half in (_shifted(bits, 32), bits & (2**32 - 1)))  # type: ignore[return-value]


def hashed(seed: int, step: int) -> bytes:
    """8 bytes. Seeds that differ in one bit have nothing in common."""
    return hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest()


def _mix(h: Tensor) -> Tensor:
    """Of int64, whose products wrap around; h is used up."""
    h = h.bitwise_xor_(_shifted(h, 30)).mul_(_C1)
    h = h.bitwise_xor_(_shifted(h, 27)).mul_(_C2)
    return h.bitwise_xor_(_shifted(h, 31))


def _shifted(h: Tensor, by: int) -> Tensor:
    """The bits of int64 moved right, zeros following: >> would repeat the sign."""
    return (h >> by).bitwise_and_(2 ** (64 - by) - 1)
