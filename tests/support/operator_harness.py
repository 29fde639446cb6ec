"""An operator (primals, tangents) -> (y, y') against torch.func.jvp of the same function, written in primitive steps.

torch.func.jvp of means, products and exponentials is exact, also when differentiated again (that of layer_norm and
batch_norm is not, which is why the truth is not written with them).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Maybe = Tensor | None
NEARBY = 2
SLACK = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # 4 to 16 roundings


def truth(
    function: Callable[..., Tensor], primals: Sequence[Maybe], tangents: Sequence[Maybe]
) -> tuple[Tensor, Tensor]:
    here = [i for i, p in enumerate(primals) if p is not None]

    def of_present(*present: Tensor) -> Tensor:
        full = [None] * len(primals)
        for i, p in zip(here, present, strict=True):
            full[i] = p
        return function(*full)

    directions = [torch.zeros_like(primals[i]) if tangents[i] is None else tangents[i] for i in here]
    return torch.func.jvp(of_present, tuple(primals[i] for i in here), tuple(directions))


def nearby(x: Maybe, place: int) -> Maybe:
    """x, each element changed by up to a hundredth of it; place 0 is x itself."""
    if x is None or place == 0:
        return x
    generator = torch.Generator().manual_seed(place)
    return x * (1 + 0.01 * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1)).to(x.device)


def leaf(x: Maybe, dtype: torch.dtype, device: str) -> Maybe:
    return None if x is None else x.detach().to(device, dtype).requires_grad_()


def gradients(outputs: Sequence[Maybe], inputs: Sequence[Maybe], cotangents: Sequence[Maybe]) -> list[Maybe]:
    """What every input receives; None stays None; an output or cotangent of None is left out."""
    pairs = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if y is not None and g is not None]
    wanted = [x for x in inputs if x is not None]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in pairs],
            wanted,
            [g.to(y.device, y.dtype) for y, g in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    )
    return [None if x is None else next(found) for x in inputs]


def distance(a: Tensor, b: Tensor, tiny: float = 1e-3) -> float:
    """||a - b|| / ||b||, absolute where b is tiny."""
    assert a.shape == b.shape, (a.shape, b.shape)
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=tiny)) if b.numel() else 0.0


def check(
    operator: Callable[..., tuple[Tensor, Maybe]],
    function: Callable[..., Tensor],
    primals: Sequence[Maybe],
    tangents: Sequence[Maybe],
    dtype: torch.dtype,
    device: str,
    use: tuple[bool, bool] = (True, True),
    tiny: float | Sequence[float] = 1e-3,
    rounding: float = 0.0,
) -> None:
    """operator(primals, tangents) -> (y, y') in `dtype`: values, and gradients for cotangents of those outputs that
    `use` names, at most twice as far from the float64 truth as the plain composition in the same dtype is.

    How far that is depends on luck and on the CPU, so it is the largest of its errors at these arguments and at
    NEARBY others. tiny: norms below it, of every result or of each, count as that much. rounding: what gradients may
    be off besides.
    """

    def run(dtype: torch.dtype, device: str, fused: bool, place: int = 0) -> list[Maybe]:
        p, d = ([leaf(nearby(x, place), dtype, device) for x in xs] for xs in (primals, tangents))
        y, dy = operator(p, d) if fused else truth(function, p, d)
        if all(x is None for x in d):
            dy = None
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(y.shape, generator=generator, dtype=torch.float64) if on else None for on in use]
        return [y, dy, *gradients([y, dy], [*p, *d], cotangents if dy is not None else [cotangents[0], None])]

    places = [run(torch.float64, "cpu", False, place) for place in range(1 if dtype == torch.float64 else 1 + NEARBY)]
    plain = [run(dtype, "cpu", False, place) for place in range(len(places))]
    floors = [tiny] * len(places[0]) if isinstance(tiny, float) else tiny
    for i, (ours, floor) in enumerate(zip(run(dtype, device, True), floors, strict=True)):
        right = places[0][i]
        assert (ours is None) == (right is None), i
        if ours is not None:
            assert ours.dtype == dtype
            composed = max(distance(a[i], b[i], floor) for a, b in zip(plain, places, strict=True))
            error, allowed = distance(ours, right, floor), 2 * composed + SLACK[dtype]
            allowed += rounding if i > 1 else 0
            assert error <= allowed, f"output {i}: error {error:.2e}, allowed {allowed:.2e}"
