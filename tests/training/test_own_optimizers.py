"""Optimizers of one's own in the place of AdamW: their steps, their options, and going on with them."""

import copy
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.open_runs import trainer
from support.regression import OPTIMIZER, TRAIN, Regression, batch, make_net, weights
from torch import nn

from mmf_fast.config import Optimizer
from mmf_fast.training import CheckpointError, ConfigError
from mmf_fast.training.engines.local import LocalEngine
from mmf_fast.training.record import read


def heavy_balls(parameters: list[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
    """One for the weights, one for the biases, at rates of their own."""

    def sgd(ending: str, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD([each for name, each in parameters if name.endswith(ending)], lr=lr, momentum=0.9)

    return [sgd("weight", 0.5), sgd("bias", 0.1)]


def test_optimizers_of_ones_own_step_at_their_own_rates(float64: None) -> None:
    """v <- 0.9 v + g, theta <- theta - lr v, with the warm-up and the clipping of the settings."""
    net = make_net().double()
    theta = {name: each.detach().clone() for name, each in net.named_parameters()}
    v = {name: torch.zeros_like(each) for name, each in theta.items()}
    engine = LocalEngine(Regression(net), OPTIMIZER, TRAIN, make_optimizer=heavy_balls)
    for step in range(5):
        data = {key: value.double() for key, value in batch(step).items()}
        if step == 2:  # is left out
            data["x"][0, 0] = math.nan
        else:
            at = {name: each.clone().requires_grad_() for name, each in theta.items()}
            loss = (torch.func.functional_call(net, at, (data["x"],)) - data["y"]).square().mean()
            grads = dict(zip(at, torch.autograd.grad(loss, list(at.values())), strict=True))
            norm = torch.cat([each.flatten() for each in grads.values()]).norm()
            for name, grad in grads.items():
                v[name] = 0.9 * v[name] + grad * min(1.0, 0.05 / (norm.item() + 1e-6))
                rate = (0.5 if name.endswith("weight") else 0.1) * min(1.0, (step + 1) / 3)
                theta[name] = theta[name] - rate * v[name]
        assert engine.step(step=step, **data).skipped == (step == 2)
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(parameter.detach(), theta[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda named: dict(named), "make_optimizer gave a dict: return torch.optim.Optimizers, one or more"),
        (lambda named: torch.optim.SGD(named[1:]), "make_optimizer: net.0.weight is in 0 groups of its optimizers"),
        (lambda named: 2 * [torch.optim.SGD(named)], "net.0.weight is in 2 groups of its optimizers; put it into one"),
        (lambda named: torch.optim.SGD([*(p for _, p in named), torch.zeros(1)]), "tensors that it was not given"),
        (lambda named: torch.optim.LBFGS(named), "make_optimizer gave a LBFGS, .* by a closure: take one that"),
    ],
)
def test_an_optimizer_of_other_parameters_is_one_line(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LocalEngine(Regression(make_net()), OPTIMIZER, TRAIN, make_optimizer=make)


def test_an_optimizer_made_anew_keeps_its_options_and_takes_the_state(float64: None) -> None:
    """v <- mu v + g, theta <- theta - lr (v + ...), with v of the options before and mu, lr of those after."""

    def engine(net: nn.Module, base: float, lr: float, mu: float, decay: float) -> LocalEngine:
        def make(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for _, p in named], lr=lr, momentum=mu, weight_decay=decay)

        return LocalEngine(Regression(net), Optimizer(lr=base, clip=0.0, warmup=4), TRAIN, make_optimizer=make)

    net = make_net().double()
    theta = [each.detach().clone() for each in net.parameters()]
    v = [torch.zeros_like(each) for each in theta]
    now = engine(net, 1e-3, 0.5, 0.9, 0.0)
    for step in range(6):
        lr, mu, decay = (0.5, 0.9, 0.0) if step < 3 else (0.2, 0.6, 0.1)
        if step == 3:
            state = copy.deepcopy(now.state_dict())
            net = make_net().double()
            now = engine(net, 1e-4, lr, mu, decay)
            now.load_state_dict([state])
        data = {key: value.double() for key, value in batch(step).items()}
        at = dict(zip(dict(net.named_parameters()), [each.clone().requires_grad_() for each in theta], strict=True))
        loss = (torch.func.functional_call(net, at, (data["x"],)) - data["y"]).square().mean()
        grads = torch.autograd.grad(loss, list(at.values()))
        for i, grad in enumerate(grads):
            v[i] = mu * v[i] + grad + decay * theta[i]
            theta[i] = theta[i] - lr * min(1.0, (step + 1) / 4) * v[i]
        now.step(step=step, **data)
        for found, expected in zip(net.parameters(), theta, strict=True):
            torch.testing.assert_close(found.detach(), expected, rtol=1e-9, atol=1e-12)


class Counting(torch.optim.Optimizer):
    """theta <- theta - lr / n g: it counts its steps n in the options of its group."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "n": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["n"] += 1
            for each in group["params"]:
                each.sub_(each.grad * group["lr"] / group["n"])


def test_what_an_optimizer_keeps_among_its_options_goes_on() -> None:
    def engine(lr: float) -> LocalEngine:
        return LocalEngine(
            Regression(make_net()), OPTIMIZER, TRAIN, make_optimizer=lambda named: Counting([p for _, p in named], lr)
        )

    one = engine(0.1)
    identity = dict(one.identity)
    for step in range(3):
        one.step(step=step, **batch(step))
    assert one.identity == identity == engine(0.1).identity
    assert identity == {"optimizer.made": "Counting", "optimizer.made[0].lr": 0.1, "optimizer.made[0].n": 0}
    for lr in (0.1, 0.4):
        other = engine(lr)
        other.load_state_dict([copy.deepcopy(one.state_dict())])
        assert other.param_groups[0]["n"] == 3
        before = weights(other.net).clone()
        norm = other.step(step=3, **batch(3)).metrics["grad_norm"]
        moved = (weights(other.net) - before).norm()  # the gradient is clipped to a norm of 0.05
        torch.testing.assert_close(moved, norm.clamp(max=0.05) * lr / 4, rtol=1e-4, atol=0)


# ---- in a run --------------------------------------------------------------------------------------------------------


def test_a_run_with_optimizers_of_ones_own_goes_on_exactly(tmp_path: Path) -> None:
    def matrices_apart(named: list[tuple[str, nn.Parameter]], rest: Any = torch.optim.NAdam) -> Any:
        matrices, others = ([p for _, p in named if (p.ndim == 2) == yes] for yes in (True, False))
        return [torch.optim.Muon(matrices, lr=0.02), rest(others, lr=0.01)]

    trainer(tmp_path / "whole", make_optimizer=matrices_apart).fit()
    trainer(tmp_path / "cut", steps=6, make_optimizer=matrices_apart).fit()
    assert trainer(tmp_path / "cut", make_optimizer=matrices_apart, resume=True).fit()
    found = [[row["loss"] for row in read(tmp_path / name / "metrics.jsonl")] for name in ("whole", "cut")]
    assert found[0] == found[1] and len(found[0]) == 10
    assert [row["lr"] for row in read(tmp_path / "whole" / "metrics.jsonl")][:3] == pytest.approx([0.01, 0.02, 0.02])

    other = functools.partial(matrices_apart, rest=torch.optim.SGD)
    for make, name in ((other, r"Muon \+ SGD"), (None, "default")):
        with pytest.raises(
            CheckpointError, match=rf"optimizer.made \(Muon \+ NAdam -> {name}\); set these back, go on with"
        ):
            trainer(tmp_path / "cut", steps=12, make_optimizer=make, resume=True)
    assert trainer(tmp_path / "cut", steps=12, make_optimizer=other, resume=True, allow_changes=True).fit()
    with pytest.raises(ConfigError, match="train.zero=fsdp shares parameters out, and make_optimizer would get pieces"):
        trainer(tmp_path / "many", make_optimizer=other, settings={"zero": "fsdp"})
    engine = trainer(tmp_path / "other").engine
    with pytest.raises(ConfigError, match="engine and make_optimizer do not go together"):
        trainer(tmp_path / "both", make_optimizer=other, engine=engine)


def balls(lr: float = 0.1, momentum: float = 0.9) -> Any:
    return lambda named: torch.optim.SGD([p for _, p in named], lr=lr, momentum=momentum)


def test_other_options_of_ones_own_optimizers_need_leave_and_are_recorded(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer(run, steps=6, make_optimizer=balls()).fit()
    changes = r"optimizer.made\[0\].lr \(0.1 -> 0.01\), optimizer.made\[0\].momentum \(0.9 -> 0.5\)"
    with pytest.raises(CheckpointError, match=f"of another configuration: {changes}; set these back, go on with"):
        trainer(run, make_optimizer=balls(0.01, 0.5), resume=True)
    made = trainer(run, make_optimizer=balls(0.01, 0.5), resume=True, allow_changes=True)
    assert made.fit()
    assert [row["lr"] for row in read(run / "metrics.jsonl")][5:7] == pytest.approx([0.1, 0.01])
    assert made.engine.param_groups[0]["momentum"] == 0.5
    assert json.loads((run / "history.jsonl").read_text())["changes"] == [
        "optimizer.made[0].lr (0.1 -> 0.01)",
        "optimizer.made[0].momentum (0.9 -> 0.5)",
    ]
    assert trainer(run, steps=12, make_optimizer=balls(0.01, 0.5), resume=True).fit()  # as it is now, it needs no leave
    # with another base, the groups go on at their own rates, as in a fresh run
    base = {"optimizer": Optimizer(warmup=2, ema=0.5, lr=1e-4), "make_optimizer": balls(0.01, 0.5)}
    trainer(run, steps=13, resume=True, allow_changes=True, **base).fit()
    assert read(run / "metrics.jsonl")[-1]["lr"] == pytest.approx(0.01)


def test_a_run_starts_from_another_with_optimizers_of_ones_own(tmp_path: Path) -> None:
    source = trainer(tmp_path / "source", steps=6, make_optimizer=balls())
    source.fit()

    def started(part: str) -> Any:
        settings = {"init": str(tmp_path / "source"), "init_from": part}
        return trainer(tmp_path / part, settings=settings, make_optimizer=balls(0.01, 0.5)).engine

    name, before = "net.body.0.weight", source.engine.state_dict()["fragments"]
    weights, state = started("weights"), started("state")
    for engine in (weights, state):
        assert torch.equal(engine.owned[name].value.detach().flatten(), before[name]["weight"])
        assert [engine.param_groups[0][key] for key in ("lr", "momentum")] == [0.01, 0.5]
    assert not weights.own[0].state and weights.earlier == 0  # the optimizer and the average begin
    momenta = [engine.own[0].state[engine.owned[name].value]["momentum_buffer"] for engine in (source.engine, state)]
    assert torch.equal(*momenta) and state.earlier == 6
    assert torch.equal(state.average[name].flatten(), before[name]["average"])
