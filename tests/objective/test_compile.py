"""The compiled loss step: one graph, no recompilation, and gradients as good as eager ones of the same precision."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.small_networks import KINDS, batch, network
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from mmf_fast import LambdaSchedule, MeanFlowLoss, TimeSampler, jvp
from mmf_fast.forward.interception import Interception
from mmf_fast.models import DiT, UNet
from mmf_fast.objective.compiled import better_by_block, blocks_of, compile_blocks

pytestmark = pytest.mark.filterwarnings("ignore:conditional tangents")


LEFT_TO_TEST_ALL = [("sequence", True), ("unet", False)]  # a sequence's blocks are those of dit; both take long


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kind", "paired"),
    [
        pytest.param(kind, paired, marks=pytest.mark.slow if (kind, paired) in LEFT_TO_TEST_ALL else ())
        for kind in KINDS
        for paired in (False, True)
    ],
)
def test_nothing_recompiles_when_lambda_step_or_times_change(kind: str, paired: bool) -> None:
    """A curriculum is two graphs: lambda = 0, where the tangent is detached, and lambda > 0."""
    net = network(kind).float()
    schedule = LambdaSchedule(kind="linear", start=2, warmup=10)
    loss_fn = MeanFlowLoss(net, lam=schedule, times=TimeSampler(share=0.5), paired=paired)
    counter = CompileCounter()
    loss_fn.compile(backend=counter)
    frames = []
    for step in range(6):
        x = batch(kind, size=8)[0].float()
        loss_fn(x, step=step).loss.backward()
        frames.append(counter.frame_count)
    assert frames == [1, 1, 1, 2, 2, 2]  # lambda = 0 up to step 2


def test_flow_matching_first_is_one_graph_more() -> None:
    counter = CompileCounter()
    loss_fn = MeanFlowLoss(network("mlp").float(), times=TimeSampler(share=0.5, start=2), lam=0.0, paired=True)
    loss_fn.compile(backend=counter)
    frames = []
    for step in range(5):
        loss_fn(torch.randn(8, 3), step=step).loss.backward()
        frames.append(counter.frame_count)
    assert frames == [1, 1, 2, 2, 2]


def test_stochastic_lambda_compiles_few_graphs() -> None:
    net = network("mlp").float()
    loss_fn = MeanFlowLoss(
        net, lam=LambdaSchedule(kind="linear", warmup=60), times=TimeSampler(share=0.5), stochastic=True
    )
    counter = CompileCounter()
    loss_fn.compile(backend=counter)
    for step in range(64):
        loss_fn(torch.randn(32, 3), step=step)
    assert counter.frame_count == 5  # 0, 1, ..., 4 quarters of the intervals


def gradients(net: nn.Module, backend: str | None, lam: float, dtype: torch.dtype) -> list[Tensor]:
    kind = type(net).__name__.lower()
    x, noise, (r, t) = batch(kind, size=6, instants=2)
    net = copy.deepcopy(net).to(dtype)
    loss_fn = MeanFlowLoss(net, lam=lam, tangent="predicted")
    if backend:
        loss_fn.compile(backend=backend)
    loss_fn(x.to(dtype), noise=noise.to(dtype), times=(r, t)).loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]


# Inductor's C++ kernels of the UNet take minutes to build: that case is left to make test-all.
@pytest.mark.parametrize(
    ("kind", "lam", "backend"),
    [
        ("mlp", 0.0, "inductor"),
        ("mlp", 0.5, "inductor"),
        ("dit", 0.5, "inductor"),
        ("unet", 0.0, "aot_eager"),
        ("unet", 0.5, "aot_eager"),
        pytest.param("dit", 0.0, "inductor", marks=pytest.mark.slow),
        pytest.param("unet", 0.5, "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_gradients_are_as_good_as_eager_ones(kind: str, lam: float, backend: str) -> None:
    """Both in float32, against eager float64 (inductor has had wrong adaLN gradients, pytorch #193061). How far eager
    ones are off depends on luck and on the CPU, so it is the most they are at these weights and at others nearby."""
    net = network(kind)
    around = [net, *(nearby(net, seed) for seed in range(1, 4))]
    eager = max(error(each, None, lam) for each in around)
    assert 0 < eager < 1e-4
    assert error(net, backend, lam) < 2 * eager


def error(net: nn.Module, backend: str | None, lam: float) -> float:
    """Of the gradient in float32, relative to its norm."""
    exact = torch.cat([g.flatten() for g in gradients(net, None, lam, torch.float64)])
    found = torch.cat([g.flatten() for g in gradients(net, backend, lam, torch.float32)])
    return float((found - exact).norm() / exact.norm())


def nearby(net: nn.Module, seed: int) -> nn.Module:
    """The network with each weight changed by up to a hundredth of it."""
    generator = torch.Generator().manual_seed(seed)
    net = copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1 + 0.01 * (2 * torch.rand(p.shape, generator=generator, dtype=p.dtype) - 1))
    return net


def test_batches_of_many_sizes_are_normal() -> None:
    """The ninth size ended a run once. What a size gives does not depend on how it is compiled."""
    net = network("dit").float()
    plain, compiled = (MeanFlowLoss(net, lam=0.5, times=TimeSampler(share=0.25)) for _ in range(2))
    counter = CompileCounter()
    compiled.compile(backend=counter)
    sizes = [16, 12, *range(20, 32, 2), 16, 7, 3, 1, 2]
    for step, size in enumerate(sizes):
        x = torch.randn(size, 2, 4, 4)
        found = []
        for loss_fn in (plain, compiled):
            torch.manual_seed(step)
            output = loss_fn(x, step=step)
            found.append([output.loss, *torch.autograd.grad(output.loss, list(net.parameters()), allow_unused=True)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert counter.frame_count < len(set(sizes))


def test_what_cannot_be_compiled_for_more_sizes_runs_eagerly_after_one_warning() -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        if any(isinstance(x, torch.SymInt) for x in inputs):
            raise NotImplementedError("numbers for sizes only")
        return graph.forward

    loss_fn = MeanFlowLoss(network("mlp").float(), times=TimeSampler(share=0.0))
    loss_fn.compile(backend=backend)
    with pytest.warns(UserWarning, match="run without torch.compile: .*numbers for sizes only") as found:
        for size in (4, 5, 6, 7, 8, 4):
            assert loss_fn(torch.randn(size, 3)).loss.isfinite()
    assert len([each for each in found if "run without" in str(each.message)]) == 1


def test_a_copy_of_a_compiled_loss_trains_its_own_network() -> None:
    loss_fn = MeanFlowLoss(network("mlp").float())
    loss_fn.compile(backend="eager")
    loss_fn(torch.randn(4, 3))
    twin = copy.deepcopy(loss_fn)
    twin(torch.randn(4, 3)).loss.backward()
    assert any(p.grad is not None for p in twin.net.parameters())
    assert all(p.grad is None for p in loss_fn.net.parameters())


def test_blocks_are_found_by_name_once() -> None:
    net = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1), nn.ModuleDict({"blocks": nn.Linear(2, 2)})])})
    assert blocks_of(net, ["blocks"]) == list(net["blocks"])
    assert blocks_of(nn.Linear(1, 1), ["blocks"]) == []
    unet = UNet(8, base_channels=8, channel_mults=(1, 2), blocks=1, attention_resolutions=())
    assert blocks_of(unet, ["blocks"]) == [*unet.down, *unet.middle, *unet.up]
    assert set(blocks_of(nn.Sequential(unet), ["blocks", "middle"])) == set(unet.blocks)
    assert blocks_of(unet, ["down", "middle", "up"]) == [*unet.down, *unet.middle, *unet.up]  # a flag, too
    nested = nn.ModuleList([nn.ModuleList([nn.Linear(1, 1), nn.SiLU()]), nn.Linear(1, 1)])
    assert blocks_of(nn.ModuleDict({"levels": nested}), ["levels"]) == [*nested[0], nested[1]]
    repeated, other = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1), nn.SiLU())
    assert blocks_of(nn.ModuleDict({"blocks": repeated}), ["blocks"]) == [*repeated]
    assert blocks_of(nn.ModuleDict({"blocks": other}), ["blocks"]) == [other]


def test_blocks_that_are_alike_share_graphs_in_which_the_mode_of_a_pass_sees_nothing(monkeypatch) -> None:
    made, seen = [], []

    def compile_nothing(graph: torch.fx.GraphModule, inputs: Any, options: Any) -> Any:
        made.append(graph)
        return graph.forward

    def look(self: Any, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not torch.compiler.is_compiling():
            seen.append(func.__name__)
        return watched(self, func, types, args, kwargs)

    watched = Interception.__torch_function__
    monkeypatch.setattr(Interception, "__torch_function__", look)
    monkeypatch.setattr(torch._inductor, "compile", compile_nothing)
    net = DiT(8, channels=3, patch_size=4, width=32, depth=3, heads=2)
    x, (r, t) = torch.randn(2, 3, 8, 8), (torch.rand(2), torch.ones(2))

    def derivative() -> tuple[Tensor, Tensor]:
        return jvp(lambda z, t: net(z, r, t), (x, t), (x, torch.ones(2)), tangent_grad=False)

    eager = derivative()
    assert "gelu" in seen
    compile_blocks(blocks_of(net, ["blocks"]))
    seen.clear()
    for ours, right in zip(derivative(), eager, strict=True):
        torch.testing.assert_close(ours, right)
    assert len(made) == 1 and "linear" in seen and "gelu" not in seen
    net(x, r, t)
    assert len(made) == 2

    other = DiT(8, channels=3, patch_size=4, width=32, depth=2, heads=2)
    right = other(x, r, t)
    compile_blocks(blocks_of(other, ["blocks"]))
    torch.testing.assert_close(other(x, r, t), right)
    assert len(made) == 2


def test_a_copy_of_compiled_blocks_has_weights_of_its_own(monkeypatch) -> None:
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph.forward)
    net = DiT(8, channels=3, patch_size=4, width=32, depth=1, heads=2)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    compile_blocks(net.blocks)
    tokens, c = torch.randn(2, 4, 32), torch.randn(2, 32)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        for parameter in copied.parameters():
            nn.init.zeros_(parameter)
        assert torch.equal(copied.blocks[0](tokens, c), tokens)
        assert not torch.equal(net.blocks[0](tokens, c), tokens)


def test_many_large_blocks_that_are_alike_are_compiled_one_by_one() -> None:
    def blocks(width: int, depth: int) -> list[nn.Module]:
        return blocks_of(DiT(8, width=width, depth=depth, heads=4), ["blocks"])

    with torch.device("meta"):
        assert better_by_block(blocks(768, 12))
        assert not better_by_block(blocks(768, 4))
        assert not better_by_block(blocks(64, 12))
        assert not better_by_block(UNet(8, base_channels=256, channel_mults=(1, 2), attention_resolutions=()).blocks)
        assert not better_by_block([])
