"""mmf doctor: what it says of a network that runs, of one that does not, and of one that cannot be built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmf_fast import cli
from mmf_fast.doctor import examine
from mmf_fast.forward import jvp


class Velocity(nn.Module):
    """A network that runs as it is, but for what `spoil` does to it."""

    def __init__(self, spoil: Any = None) -> None:
        super().__init__()
        self.linear, self.norm, self.spoil = nn.Linear(3, 3), nn.LayerNorm(3), spoil

    def forward(self, z: Any, r: Any, t: Any) -> Any:
        u = self.norm(self.linear(z)) * torch.cos(t - r)[:, None]
        return self.spoil(u) if self.spoil else u


def good() -> nn.Module:
    return Velocity()


def test_a_network_that_runs_is_exact_and_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", f"{__name__}:good", "--shape", "3"]) == 0
    said = capsys.readouterr().out
    for question in ("runs as a Dual", "tangent", "gradient through the tangent", "compiles whole"):
        assert question in said
    assert "no" not in said.split()


@torch.library.custom_op("mmf_fast_doctor::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return 2 * x


@pytest.mark.parametrize(
    ("spoil", "names"),
    [(double, "double"), (lambda u: u + torch.histc(u)[0], "histc"), (lambda u: u.tolist() and u, "tolist")],
)
def test_what_is_in_the_way_is_named_with_the_ways_out(spoil: Any, names: str) -> None:
    said = examine(Velocity(spoil), (3,))
    assert said["runs as a Dual"].startswith("no: ") and names in said["runs as a Dual"]
    assert 'jvp="finite_difference" instead' in said and "tangent" not in said


class Single(nn.Module):
    """A network that casts what it is given to float32."""

    def __init__(self, spoil: Any = None) -> None:
        super().__init__()
        self.inner = Velocity(spoil)

    def forward(self, z: Any, r: Any, t: Any) -> Any:
        return self.inner(z.float(), r.float(), t.float())


def test_a_network_of_float32_is_examined_in_it() -> None:
    said = examine(Single(), (3,))
    assert said.pop("runs on tensors, in float32").startswith("yes; examined in it, as float64 fails: RuntimeError: ")
    assert {"tangent", "gradient through the tangent", "compiles whole"} < said.keys()
    assert all(verdict.startswith(("yes", "exact")) for verdict in said.values())


def test_in_float32_too_what_is_wrong_or_known_by_differences_alone_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strict(Single):
        def forward(self, z: Any, r: Any, t: Any) -> Any:
            return super().forward(z, r, t) * (1 if type(z) is Tensor else 1.01)

    said = examine(Strict(), (3,), compiling=False)
    assert said["primal"].startswith("NO: ")

    def no_func(f: Any, primals: Any, tangents: Any, tangent_grad: bool, mode: str) -> Any:
        if mode == "func":
            raise NotImplementedError
        return jvp(f, primals, tangents, tangent_grad, mode)

    monkeypatch.setattr("mmf_fast.doctor.jvp", no_func)
    said = examine(Single(), (3,), compiling=False)
    assert said["tangent"].startswith("exact: ") and said["gradient through the tangent"].startswith("exact: ")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda u: (u, u), "no: the network returned a tuple of 2 ((2, 3), (2, 3)) for z (2, 3)"),
        (lambda u: u[:, :2], "no: the network returned u of shape (2, 2) for z of shape (2, 3)"),
    ],
)
def test_what_is_no_velocity_is_said_as_the_loss_says_it(spoil: Any, sentence: str) -> None:
    said = examine(Velocity(spoil), (3,))
    assert list(said) == ["runs on tensors, in float64"] and said["runs on tensors, in float64"].startswith(sentence)


def test_a_network_that_does_something_else_with_a_dual_is_noticed() -> None:
    class Strict(Velocity):
        def forward(self, z: Any, r: Any, t: Any) -> Any:
            return super().forward(z, r, t) + (0 if type(z) is Tensor else 1)

    assert examine(Strict(), (3,), compiling=False)["primal"].startswith("NO: ")


def test_a_call_of_another_form(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["doctor", "torch.nn:Identity", "--shape", "4", "--no-compile"]
    assert cli.main(arguments) == 1 and "Identity is called as (input)" in capsys.readouterr().out
    assert cli.main([*arguments, "--call", "lambda net, z, r, t: net(z) * t[:, None]"]) == 0


def test_a_call_that_the_loss_refuses_is_refused() -> None:
    class OneTime(nn.Linear):
        def forward(self, x: Any, t: Any, y: Any = None) -> Any:
            return super().forward(x)

    said = examine(OneTime(3, 3), (3,))
    assert list(said) == ["is called as u(z, r, t)"]
    assert said["is called as u(z, r, t)"].startswith("no: OneTime is called as (x, t, y), not as u(z, r, t, **cond)")
    assert examine(OneTime(3, 3), (3,), lambda net, z, r, t: net(z, t), compiling=False)["primal"].startswith("exact")


def broken() -> nn.Module:
    raise RuntimeError("no weights here")


@pytest.mark.parametrize(
    "name",
    [
        "no_such_module:f",
        "torch:no_such_function",
        "torch.nn:Linear",
        "torch:tensor",
        "os:getcwd",
        f"{__name__}:broken",
    ],
)
def test_what_builds_no_network_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", name, "--shape", "3"]) == 2
    assert name in capsys.readouterr().err
