"""Every operator refuses what it would read outside of, whoever calls it: the dispatcher, or a program directly."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mmf_fast.ops import attention, dispatch, gpu, group_norm, layer_norm, native, pointwise, sg_loss

DEFINED_IN = (attention, group_norm, layer_norm, pointwise, sg_loss)


def calls() -> dict[str, list[Any]]:
    """Arguments that each operator takes; all sizes differ."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape)

    rows = [draw(6, 5), draw(6, 5), *(draw(2, 5) for _ in range(4))]
    image = [draw(2, 4, 3, 7), draw(2, 4, 3, 7), draw(2, 4), *(draw(1, 4) for _ in range(3))]
    q, k, v = (draw(2, 3, 5, 16), draw(2, 3, 5, 16)), (draw(2, 3, 7, 16), draw(2, 3, 7, 16)), (draw(2, 3, 7, 8),) * 2
    o, lse = draw(2, 3, 5, 8), draw(2, 3, 5)
    mask = torch.ones(2, 3, 5, 7) > 0
    scalar, loss = torch.tensor(0.5), [draw(3, 7), draw(3, 7), draw(3, 7)]
    return {
        "modulated_layer_norm": [*rows, False, 1e-5, True],
        "modulated_layer_norm_backward": [draw(6, 5), draw(6, 5), *rows, False, 1e-5],
        "group_norm_silu": [*image, 2, 1e-5, "silu", True],
        "group_norm_silu_backward": [draw(2, 4, 3, 7), draw(2, 4, 3, 7), *image, 2, 1e-5, "silu"],
        "activation": [draw(3, 7), draw(3, 7), "gelu", True],
        "activation_backward": [draw(3, 7), draw(3, 7), draw(3, 7), draw(3, 7), "gelu"],
        "sg_loss": [*loss, draw(3), scalar, 1.0, 1e-3, True],
        "sg_loss_backward": [scalar, *loss, draw(3).abs(), draw(3), scalar, 1.0, 1e-3, True],
        "attention": [*q, *k, *v, mask, False, 0.25, True],
        "attention_backward": [o, o.clone(), *q, *k, *v, mask, o.clone(), o.clone(), lse, lse.clone(), False, 0.25],
    }


def kinds(name: str) -> list[tuple[str, Callable[..., Any]]]:
    """Its implementations here, each as it is found, and the operator that chooses among them."""
    found: list[tuple[str, Callable[..., Any]]] = [("operator", getattr(torch.ops.mmf_fast, name))]
    for kind in dispatch.KINDS:
        if kind == "triton" and (not gpu.available() or torch.cuda.is_available()):
            continue
        if kind == "native" and native.op(name) is None:
            continue
        found.append((kind, dispatch.implementation(name, kind)))
    return found


WRONG: dict[str, Callable[[Tensor], Tensor | None]] = {
    "a row more": lambda t: torch.cat([t, t[:1]]) if t.ndim else t[None],
    "a row less": lambda t: t[:-1].clone() if t.ndim and len(t) > 1 else None,
    "a column more": lambda t: torch.cat([t, t[..., :1]], -1) if t.ndim else None,
    "a column less": lambda t: t[..., :-1].clone() if t.ndim and t.shape[-1] > 1 else None,
    "flattened": lambda t: t.flatten() if t.ndim > 1 else None,
    "a dimension more": lambda t: t[None].expand(3, *t.shape),
    "empty": lambda t: t.new_empty(0),
    "no rows": lambda t: t[:0] if t.ndim else None,
    "a number": lambda t: t.new_zeros(()) if t.ndim else None,
    "integers": lambda t: t.int(),
    "half precision": lambda t: t.half(),
    "double precision": lambda t: t.double(),
    "complex": lambda t: torch.complex(t.float(), t.float()),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse() if t.ndim else None,
    "expanded": lambda t: t[:1].expand(t.shape) if t.ndim and len(t) > 1 else None,
    "transposed in memory": lambda t: t.mT.contiguous().mT if t.ndim > 1 and min(t.shape[-2:]) > 1 else None,
    "with gaps": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]] if t.ndim > 1 and len(t) > 1 else None,
}
ANY_STRIDES = ("expanded", "transposed in memory", "with gaps")  # attention takes them


def cases() -> Iterator[tuple[str, int, str]]:
    for name, args in calls().items():
        for i, arg in enumerate(args):
            if isinstance(arg, Tensor):
                for wrong, change in WRONG.items():
                    if change(arg) is not None:
                        yield name, i, wrong


def takes(name: str, i: int, wrong: str) -> bool:
    """Whether the operator takes the changed argument too."""
    if name.startswith("attention"):  # any strides, but for LSE and mu
        return wrong in ANY_STRIDES and not (name == "attention_backward" and i in (11, 12))
    parameters = {"group_norm_silu": 2, "group_norm_silu_backward": 4}
    return i >= parameters.get(name, 99) and wrong in ("a row more", "a row less")  # (1, C) or (B, C)


@pytest.mark.parametrize("name", calls())
def test_what_is_given_here_is_taken(name: str) -> None:
    for _, run in kinds(name):
        assert all(out.isfinite().all() for out in run(*calls()[name]))


@pytest.mark.parametrize("name", calls())
def test_a_wrong_argument_is_an_error_of_one_line(name: str) -> None:
    tried = 0
    for case, i, wrong in cases():
        if case != name:
            continue
        args = calls()[name]
        args[i] = WRONG[wrong](args[i])
        if takes(name, i, wrong):
            continue
        for kind, run in kinds(name):
            if kind == "operator" and wrong == "meta":
                continue  # which is answered by shapes alone
            with pytest.raises((ValueError, NotImplementedError)) as error:
                run(*args)
                pytest.fail(f"{name} ({kind}) took argument {i}: {wrong}")
            message = str(error.value).splitlines()[0]
            assert message, (kind, i, wrong)
            tried += 1
    assert tried > 30


NUMBERS: dict[str, list[tuple[int, Any]]] = {
    "group_norm_silu": [(6, 0), (6, -1), (6, 3), (8, "relu")],
    "group_norm_silu_backward": [(8, 0), (8, 3), (10, "relu")],
    "activation": [(2, "relu")],
    "activation_backward": [(4, "relu")],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_wrong_number_or_name_is_an_error(name: str) -> None:
    for i, value in NUMBERS[name]:
        args = calls()[name]
        args[i] = value
        for kind, run in kinds(name):
            with pytest.raises((ValueError, RuntimeError)):
                run(*args)
                pytest.fail(f"{name} ({kind}) took {value!r}")


@pytest.mark.parametrize("name", [name for name in calls() if name.startswith("attention_b")])
def test_what_a_cotangent_needs_must_be_there(name: str) -> None:
    for i in (10, 12):  # d_o, mu
        args = calls()[name]
        args[i] = None
        for _, run in kinds(name):
            with pytest.raises(ValueError, match="must be given"):
                run(*args)


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize("which", ["first", "last"])
def test_tensors_without_elements_give_what_the_reference_gives(name: str, which: str) -> None:
    """No rows, or rows of nothing, in every argument at once, where the sizes still agree."""
    sizes = {"first": {2: 0, 3: 0, 6: 0}, "last": {5: 0, 7: 0}}[which]

    def emptied(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.ndim:
            return t
        if which == "first":
            return t[:0] if len(t) > 1 or not name.startswith("group") else t
        return t[..., :0] if t.shape[-1] in sizes and t.ndim > 1 else t

    args = [emptied(t) for t in calls()[name]]
    reference = dispatch.implementation(name, "reference")
    try:
        expected = reference(*args)
    except (ValueError, RuntimeError, ZeroDivisionError):
        for kind, run in kinds(name):
            if kind == "native":
                with contextlib.suppress(ValueError, RuntimeError):
                    run(*args)  # refused or empty, but not a fault
        return
    for _, run in kinds(name):
        for a, b in zip(run(*args), expected, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, equal_nan=True)


def test_the_loss_reads_no_further_than_its_target() -> None:
    """u (B, 8, H, W) for a target (B, 4, H, W) was read past its end, and gave another value at each run."""
    u, target = torch.randn(3, 8), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"sg_loss: .*shape|sg_loss: .* must be"):
        sg_loss.sg_loss(u, None, torch.zeros(3), 0.0, target)
