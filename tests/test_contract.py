"""What is refused of a network, and what the message says: its signature, its output, a name taken twice."""

from __future__ import annotations

import functools
import warnings
from collections import namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from mmf_fast import Adapter, MeanFlowLoss, TimeSampler, sample


def returning(make: Callable[[Tensor], Any]) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, z: Any, r: Tensor, t: Tensor) -> Any:
            return make(z * self.weight)

    return Net()


Pair = namedtuple("Pair", ["u", "v"])
OUTPUTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "learned variance": (lambda u: torch.cat([u, u], 1), r"\(5, 8, 6, 6\).*\(5, 4, 6, 6\).*\[:, :4\]"),
    "one channel": (lambda u: u[:, :1], r"\(5, 1, 6, 6\).*\(5, 4, 6, 6\)"),
    "other size": (lambda u: u[..., :3], r"\(5, 4, 6, 3\)"),
    "flattened": (lambda u: u.flatten(1), r"\(5, 144\)"),
    "half the batch": (lambda u: u[:2], r"\(2, 4, 6, 6\)"),
    "a number": (lambda u: u.mean(), r"shape \(\)"),
    "tuple": (lambda u: (u, u), r"tuple of 2.*Adapter\(net, lambda net, z, r, t, \*\*c: net\(z, r, t, \*\*c\)\[0\]\)"),
    "list": (lambda u: [u], r"list of 1.*\[0\]"),
    "named tuple": (lambda u: Pair(u, u), r"Pair of 2.*\[0\]"),
    "dict": (lambda u: {"sample": u}, r"dict with 'sample'.*\['sample'\]"),
    "diffusers' output": (lambda u: SimpleNamespace(sample=u), r"SimpleNamespace.*\.sample"),
    "nothing": (lambda u: None, "None.*must return a tensor"),
    "integers": (lambda u: torch.zeros(5, 4, 6, 6, dtype=torch.int64), "int64.*floating-point"),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("jvp", ["dual", "func", "finite_difference"])
def test_the_loss_refuses_what_is_not_like_z(name: str, share: float, jvp: str) -> None:
    make, words = OUTPUTS[name]
    loss_fn = MeanFlowLoss(returning(make), times=TimeSampler(share=share), lam=0.5, jvp=jvp)
    with pytest.raises(ValueError, match=words) as error:
        loss_fn(torch.randn(5, 4, 6, 6))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_sampler_refuses_what_is_not_like_z(name: str) -> None:
    make, words = OUTPUTS[name]
    with pytest.raises(ValueError, match=words):
        sample(returning(make), (5, 4, 6, 6), steps=2)


def test_the_way_out_of_a_learned_variance_works() -> None:
    net = returning(lambda u: torch.cat([u, u], 1))
    adapted = Adapter(net, lambda net, z, r, t, **c: net(z, r, t, **c)[:, :4])
    MeanFlowLoss(adapted, lam=0.5)(torch.randn(5, 4, 6, 6)).loss.backward()
    assert net.weight.grad is not None
    assert sample(adapted, (5, 4, 6, 6)).shape == (5, 4, 6, 6)


def z_t_y(z: Any, t: Any, y: Any = None) -> Any: ...
def z_t_r(z: Any, t: Any, r: Any, y: Any = None) -> Any: ...
def x_t_h(x: Any, t: Any, h: Any) -> Any: ...
def diffusers(sample: Any, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any: ...
def edm(x: Any, noise_labels: Any, class_labels: Any, augment_labels: Any = None) -> Any: ...
def guided(x: Any, timesteps: Any, y: Any = None) -> Any: ...
def condition(x: Any, time: Any, cond: Any) -> Any: ...
def one_time(x: Any, t: Any) -> Any: ...
def no_time(x: Any) -> Any: ...
def fastgen(x: Any, t: Any, condition: Any = None, r: Any = None) -> Any: ...
def z_r_t(z: Any, r: Any, t: Any, y: Any = None) -> Any: ...
def x_s_t(x: Any, s: Any, t: Any) -> Any: ...
def start_end(x: Any, t_start: Any, t_end: Any, **cond: Any) -> Any: ...
def anything(*args: Any, **kwargs: Any) -> Any: ...
def letters(a: Any, b: Any, c_: Any) -> Any: ...


@pytest.mark.parametrize(
    "call",
    [z_t_y, z_t_r, x_t_h, diffusers, edm, guided, condition, one_time, no_time, fastgen],
    ids=lambda f: f.__name__,
)
def test_another_signature_is_refused_with_the_adapter(call: Callable[..., Any]) -> None:
    for net in (call, functools.partial(call)):
        with pytest.raises(ValueError, match=r"not as u\(z, r, t, \*\*cond\).*mmf_fast.Adapter\(net, lambda") as error:
            MeanFlowLoss(net)
        assert "\n" not in str(error.value)
        knows_one_time = call in (z_t_y, diffusers, edm, guided, condition, one_time, no_time)
        assert ("net(z, t, **c)); it knows no r then" in str(error.value)) == knows_one_time
        with pytest.raises(ValueError, match="mmf_fast.Adapter"):
            sample(net, (2, 3))


@pytest.mark.parametrize("call", [z_r_t, x_s_t, start_end, anything, letters], ids=lambda f: f.__name__)
def test_the_contracts_signature_passes(call: Callable[..., Any]) -> None:
    MeanFlowLoss(call)


def test_the_signature_of_a_wrapped_module_is_that_of_the_module() -> None:
    class OneTime(nn.Module):
        def forward(self, z: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            return z

    for wrapped in (OneTime(), torch.compile(OneTime()), DataParallel(OneTime())):
        with pytest.raises(ValueError, match=r"OneTime is called as \(z, t, y\)"):
            MeanFlowLoss(wrapped)


def test_everything_after_x_has_a_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        MeanFlowLoss(returning(lambda u: u))(torch.randn(4, 3), torch.arange(4))  # type: ignore[misc]


class Noisy(nn.Module):
    """A network with conditions whose names are those of the loss and of the sampler."""

    def forward(self, z: Any, r: Any, t: Any, noise: Any = 0.0, step: Any = 0.0, steps: Any = 0.0) -> Any:
        return z + noise + step + steps


def test_a_condition_with_a_name_of_the_loss_is_refused() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"noise= is an argument of loss_fn, and Noisy has a condition.*net_noise"):
        MeanFlowLoss(Noisy())(x, noise=torch.randn(4, 3))
    with pytest.raises(ValueError, match="step= is an argument of loss_fn"):
        MeanFlowLoss(Noisy())(x, step=3)
    with pytest.raises(ValueError, match="steps= is an argument of sample"):
        sample(Noisy(), (4, 3), steps=3)
    MeanFlowLoss(Noisy())(x)  # nothing is ambiguous here


def test_the_adapter_gives_such_a_condition_another_name() -> None:
    net = Adapter(Noisy(), lambda net, z, r, t, **c: net(z, r, t, noise=c.pop("net_noise"), **c))
    x, noise, mine = torch.randn(3, 4, 3)
    t = torch.full((4,), 0.5)
    found = MeanFlowLoss(net, p=0.0)(x, noise=noise, times=(t, t), net_noise=mine)
    expected = ((x + noise) / 2 + mine - (noise - x)).square().sum(1)
    torch.testing.assert_close(found.per_sample, expected)


MODULE = returning(lambda u: u)


@pytest.mark.parametrize(
    "hiding",
    [
        lambda z, r, t: MODULE(z, r, t),
        functools.partial(MODULE.forward),
        functools.partial(lambda net, z, r, t: net(z, r, t), MODULE),
        MODULE.forward,
        (lambda net: lambda z, r, t: net(z, r, t))(MODULE),
    ],
    ids=["global", "method in a partial", "partial", "method", "closure"],
)
def test_a_function_that_hides_a_module_is_warned_about(hiding: Any) -> None:
    with pytest.warns(UserWarning, match=r"hides the module Net.*mmf_fast\.Adapter"):
        MeanFlowLoss(hiding)
    with pytest.warns(UserWarning, match=r"hides the module Net"):
        sample(hiding, (2, 3))


def test_a_plain_function_and_a_module_are_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MeanFlowLoss(lambda z, r, t: torch.sin(z))
        MeanFlowLoss(MODULE)
        MeanFlowLoss(Adapter(MODULE, lambda MODULE, z, r, t: MODULE(z, r, t)))
