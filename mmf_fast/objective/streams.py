"""Random numbers of the rows of a batch: from torch's global generator, or numbered, so that each row has its own.

A numbered stream is a function of (seed, step, row, place): whoever holds a row draws its numbers alone, and finds on a
CPU what it finds on a GPU (to the rounding of erfinv). The 64 bits of a place are a hash of its number, by the first
two rounds of the finaliser of SplitMix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number
generators", with the constants of Stafford's variant 13; its last shift is for the low bits, of which no use is made):

    mix(h) = xorshift_27((xorshift_30(h)) C_1) C_2
    row key = mix(hash(seed, step) + row G),   bits of place i = mix(row key + i G)

As signed numbers divided by 2^63 they are uniform on (-1, 1), and sqrt(2) erfinv of that is normal. All numbers of a
step are made at once: a GPU starts 16 kernels for them, whatever the number of rows and ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmf_fast.contract import sent

__all__ = ["GlobalStream", "NumberedStream", "hashed"]

_G, _C1, _C2 = (int(x, 16) - 2**64 for x in ("9E3779B97F4A7C15", "BF58476D1CE4E5B9", "94D049BB133111EB"))  # as int64
_PLACES = 6  # of a row before those of its noise, for what else a row draws: label dropped, t, r, and its guidance
_FIRST = -2  # the number of the first of them, so that those of the noise begin at 4


class GlobalStream:
    """Numbers for `rows` rows, and noise of `shape` for each, from torch's global generator of the device."""

    def __init__(
        self,
        rows: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        shape: Sequence[int] = (),
    ) -> None:
        self.rows, self.shape, self.options = rows, shape, {"device": device, "dtype": dtype}

    def uniform(self) -> Tensor:
        """(rows,) in [0, 1]."""
        return torch.rand(self.rows, **self.options)  # type: ignore[call-overload]

    def normal(self) -> Tensor:
        """(rows,), standard normal."""
        return torch.randn(self.rows, **self.options)  # type: ignore[call-overload]

    def noise(self) -> Tensor:
        """(rows, *shape), standard normal."""
        return torch.randn(self.rows, *self.shape, **self.options)  # type: ignore[call-overload]


class NumberedStream:
    """The same of rows first, first + 1, ... of the global batch of a step; six calls of uniform and normal in all."""

    @torch.no_grad()
    def __init__(
        self, seed: int, step: int, first: int, rows: int, device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32, shape: Sequence[int] = (),
    ) -> None:  # fmt: skip
        base = int.from_bytes(hashed(seed, step), "little", signed=True)
        keys = sent(_mix(torch.arange(first, first + rows) * _G + base), device)
        places = torch.arange(_FIRST, _FIRST + _PLACES + math.prod(shape), device=device)
        bits = _mix(torch.add(keys[:, None], places, alpha=_G))
        below_one = 1 - torch.finfo(dtype).eps / 2  # the largest number below 1, since the bits round to 2^63
        signed = bits * torch.tensor(below_one * 2.0**-63, dtype=dtype)
        self._uniform = _in_turn(signed[:, :_PLACES].mul(0.5).add_(0.5))
        normal = signed.erfinv_().mul_(math.sqrt(2))
        self._normal = _in_turn(normal[:, :_PLACES])
        self._noise = normal[:, _PLACES:].reshape(rows, *shape)

    def uniform(self) -> Tensor:
        next(self._normal)
        return next(self._uniform)

    def normal(self) -> Tensor:
        next(self._uniform)
        return next(self._normal)

    def noise(self) -> Tensor:
        return self._noise


def _in_turn(columns: Tensor) -> Iterator[Tensor]:
    """The columns, from the place 0 on; the negative ones are the last."""
    found = columns.unbind(1)
    return iter(found[-_FIRST:] + found[:-_FIRST])


def hashed(seed: int, step: int) -> bytes:
    """8 bytes. Seeds that differ in one bit have nothing in common."""
    return hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest()


def _mix(h: Tensor) -> Tensor:
    """Of int64, whose products wrap around; h is used up."""
    h = h.bitwise_xor_(_shifted(h, 30)).mul_(_C1)
    return h.bitwise_xor_(_shifted(h, 27)).mul_(_C2)


def _shifted(h: Tensor, by: int) -> Tensor:
    """The bits of int64 moved right, zeros following: >> would repeat the sign."""
    return (h >> by).bitwise_and_(2 ** (64 - by) - 1)
