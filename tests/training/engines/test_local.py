import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.regression import OPTIMIZER, TRAIN, Output, Regression, batch, make_net, weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmf_fast.config import Optimizer, Train
from mmf_fast.models import MLP, DiT
from mmf_fast.objective import MeanFlowLoss, TimeSampler
from mmf_fast.training.engines.local import LocalEngine
from mmf_fast.training.settings import ConfigError, learning_rate


class Suspicious(nn.Module):
    """A block that asks what it is given, and is computed again in backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if not (isinstance(x, Tensor) and torch.is_tensor(x)) or isinstance(x, tuple):
            raise TypeError(f"x is a {type(x)}")
        return checkpoint(self.block, x, c, use_reentrant=False)  # type: ignore[no-any-return]


def test_steps_are_those_of_adamw_written_out(float64: None) -> None:
    """Loshchilov & Hutter, arXiv 1711.05101, algorithm 2, with clipping and warm-up, on one flat vector."""
    net = make_net().double()
    reference = copy.deepcopy(net)
    engine = LocalEngine(Regression(net), OPTIMIZER, TRAIN)
    theta = weights(reference)
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for step in range(6):
        data = {key: value.double() for key, value in batch(step).items()}
        nn.utils.vector_to_parameters(theta, reference.parameters())
        loss = (reference(data["x"]) - data["y"]).square().mean()
        g = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(reference.parameters()))])
        norm = g.norm()
        g = g * min(1.0, 0.05 / (norm.item() + 1e-6))
        lr = 0.02 * min(1.0, (step + 1) / 3)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
        theta = theta - lr * 0.1 * theta - lr * m_hat / (v_hat.sqrt() + 1e-8)

        result = engine.step(step=step, **data)
        torch.testing.assert_close(result.metrics["grad_norm"], norm, rtol=1e-10, atol=0)
        torch.testing.assert_close(result.metrics["loss"], loss.detach(), rtol=1e-10, atol=0)
        assert result.metrics["lr"].item() == pytest.approx(lr, rel=1e-12)
        assert not result.skipped
    torch.testing.assert_close(weights(net), theta, rtol=1e-9, atol=1e-12)


def everything(engine: LocalEngine) -> list[Tensor]:
    def leaves(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value.clone()]
        children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return [leaf for child in children for leaf in leaves(child)]

    return leaves(engine.state_dict())


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])  # 1e30: the loss is finite, its gradient's norm is not
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_that_is_not_finite_changes_no_bit(poison: float, clip: float) -> None:
    optimizer = Optimizer(clip=clip, weight_decay=0.1, warmup=0)
    engine = LocalEngine(Regression(make_net()), optimizer, TRAIN)
    for step in range(3):
        engine.step(step=step, **batch(step))
    before = everything(engine)
    bad = batch(3)
    if poison == 1e30:
        next(engine.net.parameters()).register_hook(lambda grad: grad * 1e30)
    else:
        bad["x"][2, 1] = poison
    assert engine.step(step=3, **bad).skipped
    after = everything(engine)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("make_optimizer", [None, lambda named: torch.optim.SGD([p for _, p in named], lr=0.1)])
def test_a_loss_that_is_not_finite_is_left_out_even_where_its_gradient_is_finite(make_optimizer: Any) -> None:
    class Shifted(Regression):
        shift = 0.0

        def forward(self, *args: Any, **kwargs: Any) -> Output:
            output = super().forward(*args, **kwargs)
            return output._replace(loss=output.loss + self.shift)

    loss_fn = Shifted(make_net())
    engine = LocalEngine(loss_fn, OPTIMIZER, TRAIN, make_optimizer=make_optimizer)
    engine.step(step=0, **batch(0))
    before, loss_fn.shift = everything(engine), math.inf
    result = engine.step(step=1, **batch(1))
    assert result.skipped and result.metrics["grad_norm"].isfinite()
    assert all(map(torch.equal, before, everything(engine)))


def test_a_skipped_step_does_not_disturb_the_ones_after_it() -> None:
    with_bad = LocalEngine(Regression(make_net()), OPTIMIZER, TRAIN)
    without = LocalEngine(Regression(make_net()), OPTIMIZER, TRAIN)
    for step in range(8):
        if step == 4:
            bad = batch(step)
            bad["y"][0, 0] = math.nan
            with_bad.step(step=step, **bad)
            continue
        with_bad.step(step=step, **batch(step))
        without.step(step=step, **batch(step))
    assert torch.equal(weights(with_bad.net), weights(without.net))
    assert torch.equal(weights(with_bad.averaged()), weights(without.averaged()))


def test_no_clipping_leaves_the_gradient_alone() -> None:
    engines = [LocalEngine(Regression(make_net()), Optimizer(clip=clip), TRAIN) for clip in (0.0, 1e9)]
    for step in range(3):
        norms = [engine.step(step=step, **batch(step)).metrics["grad_norm"] for engine in engines]
    assert norms[0] == norms[1] > 0
    assert torch.equal(weights(engines[0].net), weights(engines[1].net))


def test_the_state_is_complete() -> None:
    one = LocalEngine(Regression(make_net()), OPTIMIZER, TRAIN)
    for step in range(5):
        one.step(step=step, **batch(step))
    torch.manual_seed(99)
    other = LocalEngine(Regression(nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2))), OPTIMIZER, TRAIN)
    other.load_state_dict([copy.deepcopy(one.state_dict())])
    for step in range(5, 9):
        losses = [engine.step(step=step, **batch(step)).metrics["loss"] for engine in (one, other)]
        assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(everything(one), everything(other), strict=True))


@pytest.mark.parametrize("kind", ["apex", "deepspeed_fused", "deepspeed_cpu"])
def test_the_optimizers_of_another_engine_are_one_line(kind: Any) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.kind={kind} is for DeepSpeed's engine: take train.zero=zero1"):
        LocalEngine(Regression(make_net()), Optimizer(kind=kind), TRAIN)


def test_sparse_gradients_are_one_line() -> None:
    net = nn.Sequential(nn.Embedding(3, 4, sparse=True), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match="net.0 has sparse gradients, .*: build it with sparse=False"):
        LocalEngine(Regression(net), OPTIMIZER, TRAIN)
    net[0].weight.requires_grad_(False)  # has no gradient at all
    LocalEngine(Regression(net), OPTIMIZER, TRAIN)


def test_learning_rate() -> None:
    constant = Optimizer(lr=2.0, warmup=4)
    assert [learning_rate(step, constant, 10) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    cosine = Optimizer(lr=2.0, warmup=4, schedule="cosine")
    assert learning_rate(4, cosine, 10) == 2.0
    assert learning_rate(7, cosine, 10) == pytest.approx(1.0)
    assert learning_rate(10, cosine, 10) == pytest.approx(0.0)
    assert learning_rate(10_000, cosine, 10) == pytest.approx(0.0)
    assert learning_rate(0, Optimizer(lr=2.0, warmup=0), 10) == 2.0


def test_a_device_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ValueError, match="nonsense") as caught:
        LocalEngine(Regression(make_net()), OPTIMIZER, Train(device="nonsense"))
    assert "\n" not in str(caught.value)


class Normed(nn.Module):
    """A network with buffers, and a loss with a parameter of its own and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Linear(2, 2).requires_grad_(False))
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, y: Tensor, **rest: Any) -> Output:
        loss = (self.scale * self.net(x) - y).square().mean()
        return Output(loss, {})


def test_the_state_holds_what_trains_and_what_is_counted_and_nothing_that_is_frozen() -> None:
    torch.manual_seed(0)
    engine = LocalEngine(Normed(), OPTIMIZER, TRAIN)
    for step in range(3):
        engine.step(step=step, **batch(step))
    state = engine.state_dict()
    assert list(state["fragments"]) == ["scale", "net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias"]
    assert list(state["buffers"]) == ["net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"]
    assert all(fragment["steps"] == 3 for fragment in state["fragments"].values())
    torch.manual_seed(0)
    other = LocalEngine(Normed(), OPTIMIZER, TRAIN)
    other.load_state_dict([copy.deepcopy(state)])
    for step in range(3, 6):
        one, two = (each.step(step=step, **batch(step)).metrics["loss"] for each in (engine, other))
        assert one == two
    assert all(map(torch.equal, everything(engine), everything(other)))
    with pytest.raises(ValueError, match="is not a trained parameter here"):
        LocalEngine(Regression(make_net()), OPTIMIZER, TRAIN).load_state_dict([state])


def test_a_step_that_is_not_finite_leaves_buffers_as_they_were() -> None:
    engine = LocalEngine(Normed(), OPTIMIZER, TRAIN)
    engine.step(step=0, **batch(0))
    before = {name: buffer.clone() for name, buffer in engine.net.named_buffers()}
    bad = batch(1)
    bad["x"][0, 0] = math.nan
    assert engine.step(step=1, **bad).skipped
    for net in (engine.net, engine.averaged()):
        assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


class Rebinding(nn.Module):
    """Puts another tensor in the place of its buffer at each step, and one of another shape in that of its cache."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("cache", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            self.cache = torch.zeros(len(x))
        return self.fc(x - self.mean)


def test_a_buffer_that_is_rebound_is_kept_as_it_is_now() -> None:
    engine = LocalEngine(Regression(Rebinding()), OPTIMIZER, TRAIN)
    mean = torch.zeros(4)
    for step in range(4):
        data = batch(step)
        if step == 2:  # is left out
            data["x"][0, 0] = math.nan
        else:
            mean = 0.9 * mean + 0.1 * data["x"].mean(0)
        engine.step(step=step, **data)
        saved = engine.state_dict()["buffers"]["net.mean"]
        for found in (engine.net.mean, engine.averaged().mean, saved):
            torch.testing.assert_close(found, mean)
    other = LocalEngine(Regression(Rebinding()), OPTIMIZER, TRAIN)
    other.step(step=0, **batch(7))
    other.load_state_dict([copy.deepcopy(engine.state_dict())])
    assert torch.equal(other.net.mean, engine.net.mean)
    one, two = (each.step(step=4, **batch(4)).metrics["loss"] for each in (engine, other))
    assert one == two


@pytest.mark.parametrize("lam", [0.0, 0.7])
@pytest.mark.parametrize("block", [None, Suspicious])
def test_compiled_blocks_train_as_eager_ones(block: Any, lam: float) -> None:
    def losses(compile: Any) -> list[float]:
        torch.manual_seed(1)
        net = MLP(2, width=8, depth=3)
        if block:
            net.blocks = nn.ModuleList(map(block, net.blocks))
        loss_fn = MeanFlowLoss(net, lam=lam, p=0.5, paired=True)
        engine = LocalEngine(loss_fn, OPTIMIZER, Train(batch=16, device="cpu", compile=compile), seed=5)
        assert all(("forward" in vars(block)) == bool(compile) for block in loss_fn.net.blocks)
        assert not any("forward" in vars(block) for block in engine.averaged().blocks)  # a copy calls itself
        x = torch.linspace(-1, 1, 32).reshape(16, 2)
        return [float(engine.step(x, step).metrics["loss"]) for step in range(4)]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert losses("blocks") == pytest.approx(losses(False), rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # on tensors and as duals, at any depth


@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_compiled_blocks_are_computed_again(lam: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own, without inductor, which takes long; it has nothing to do with this."""
    eager = torch._dynamo.lookup_backend("aot_eager")
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: eager(graph, inputs))
    x = torch.linspace(-1, 1, 64).reshape(4, 1, 4, 4)

    def step(compile: Any) -> Tensor:
        torch.manual_seed(1)
        net = DiT(4, channels=1, patch_size=2, width=16, depth=2, heads=2, recompute=True)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        loss_fn = MeanFlowLoss(net, times=TimeSampler(share=0.5), lam=lam, p=0.5, paired=True)
        engine = LocalEngine(loss_fn, OPTIMIZER, Train(batch=4, device="cpu", compile=compile), seed=5)
        return torch.stack([engine.step(x, step).metrics["grad_norm"] for step in range(2)])

    torch._dynamo.reset()
    torch.testing.assert_close(step("blocks"), step(False), rtol=1e-4, atol=0)


def test_a_network_without_blocks_is_not_compiled_by_block() -> None:
    with pytest.raises(ConfigError, match="train.compile=blocks: Sequential has no blocks; name its modules"):
        LocalEngine(Regression(make_net()), OPTIMIZER, Train(compile="blocks", device="cpu"))


def test_auto_compiles_the_whole_loss_of_a_small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """And blocks where weights are fetched between them."""
    for gathers in (False, True):
        monkeypatch.setattr(LocalEngine, "gathers", gathers)
        loss_fn = MeanFlowLoss(MLP(2, width=8, depth=3))
        LocalEngine(loss_fn, OPTIMIZER, Train(batch=16, device="cpu", compile="auto"))
        assert (loss_fn.compiled is None) == gathers
        assert all(("forward" in vars(block)) == gathers for block in loss_fn.net.blocks)


@pytest.mark.parametrize("compile", [True, "blocks"])
def test_the_mode_of_compilation_reaches_torch(compile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        seen.append(options["mode"] if "mode" in options else options["backend"].mode)
        return function

    monkeypatch.setattr(torch, "compile", record)
    train = Train(batch=16, device="cpu", compile=compile, compile_mode="max-autotune")
    LocalEngine(MeanFlowLoss(MLP(2, width=8, depth=3)), OPTIMIZER, train)
    assert seen and set(seen) == {"max-autotune"}
