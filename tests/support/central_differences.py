"""du/dt of a network by central differences: no forward mode of any kind."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def column(time: Tensor, like: Tensor) -> Tensor:
    return time.reshape(-1, *[1] * (like.ndim - 1))


def central_tangent(net: Callable[..., Tensor], z: Tensor, r: Tensor, t: Tensor, w: Tensor, h: float = 5e-4) -> Tensor:
    """du/dt along (w, 0, 1) by the sixth-order central difference."""

    def at(k: int) -> Tensor:
        return net(z + k * h * w, r, t + k * h)

    return (45 * (at(1) - at(-1)) - 9 * (at(2) - at(-2)) + (at(3) - at(-3))) / (60 * h)
