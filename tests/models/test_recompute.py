"""Recomputed blocks: the same gradients from less memory, and no tangent computed again where backward uses none."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from support.small_networks import batch, network, saved_bytes
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmf_fast import MeanFlowLoss
from mmf_fast.models import build
from mmf_fast.models.dit import Block
from mmf_fast.models.unet import ResBlock

pytestmark = pytest.mark.filterwarnings("ignore:conditional tangents")
both_networks = pytest.mark.parametrize("kind", ["dit", "unet"])
every_lambda = pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])


def variant(kind: str, recompute: bool, **changes: Any) -> nn.Module:
    """The small network with the same weights each time."""
    net = network(kind)
    other = build(**{**net.config, "recompute": recompute, **changes}).double()
    if changes.keys() <= {"dropout"}:
        other.load_state_dict(net.state_dict())
    return other


def loss(net: nn.Module, kind: str, lam: float, instants: int = 2, backend: Any = None, **settings: Any) -> Tensor:
    loss_fn = MeanFlowLoss(net, lam=lam, **settings)
    if backend is not None:
        loss_fn.compile(backend=backend)
    x, noise, times = batch(kind, size=6, instants=instants)
    torch.manual_seed(5)  # of dropout
    return loss_fn(x, noise=noise, times=times).loss


def gradients(net: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    loss(net, *args, **kwargs).backward()
    return [p.grad for p in net.parameters()]


def assert_equal_gradients(found: list[Tensor], expected: list[Tensor]) -> None:
    for g, h in zip(found, expected, strict=True):
        assert (g - h).abs().max() <= 1e-12 * h.abs().max()


@both_networks
@every_lambda
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_the_same(kind: str, lam: float, dropout: float) -> None:
    kept, again = (gradients(variant(kind, recompute, dropout=dropout), kind, lam) for recompute in (False, True))
    assert_equal_gradients(again, kept)


@both_networks
def test_what_comes_after_draws_the_same(kind: str) -> None:
    """Backward leaves the generator where forward left it."""
    loss(variant(kind, True, dropout=0.3), kind, 0.0).backward()
    after = torch.rand(())
    loss(variant(kind, False, dropout=0.3), kind, 0.0).backward()
    assert after == torch.rand(())


@both_networks
def test_a_frozen_parameter_gets_no_gradient(kind: str) -> None:
    frozen = "blocks.0.fc_in.weight" if kind == "dit" else "down.0.conv1.weight"

    def found(recompute: bool) -> dict[str, Tensor | None]:
        net = variant(kind, recompute)
        net.get_parameter(frozen).requires_grad_(False)
        loss(net, kind, 0.0).backward()
        return {name: parameter.grad for name, parameter in net.named_parameters()}

    again, kept = found(True), found(False)
    assert again.pop(frozen) is None and kept.pop(frozen) is None
    assert_equal_gradients(list(again.values()), list(kept.values()))


def backward_flops(net: nn.Module, kind: str, lam: float) -> int:
    value = loss(net, kind, lam, instants=0, tangent="conditional")  # one call of the network, with Duals
    with FlopCounterMode(display=False) as counter:
        value.backward()
    return counter.get_total_flops()


@both_networks
def test_at_lambda_zero_only_the_primal_is_computed_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch does not count the FLOPs of fused attention, ours included."""
    monkeypatch.setenv("MMF_FAST_OPS", "reference")
    net = variant(kind, True)
    blocks = [layer for layer in net.modules() if isinstance(layer, (Block, ResBlock))]
    one_forward = 6 * sum(block.flops(net.grid**2) if kind == "dit" else block.flops() for block in blocks)
    with sdpa_kernel(SDPBackend.MATH):
        extra = [backward_flops(variant(kind, True), kind, lam) - backward_flops(variant(kind, False), kind, lam)
                 for lam in (0.0, 1.0)]  # fmt: skip
    assert extra[0] == one_forward
    assert extra[1] > 1.2 * one_forward  # the tangents too; PyTorch's checkpoint stops before the last product


@both_networks
@every_lambda
def test_less_is_kept(kind: str, lam: float) -> None:
    deeper = {"depth": 6} if kind == "dit" else {"blocks": 3}
    kept, again = (
        saved_bytes(loss, net, kind, lam, net=net)
        for net in (variant(kind, recompute, **deeper) for recompute in (False, True))
    )
    assert again < 0.4 * kept


def test_the_weights_have_the_same_names() -> None:
    for kind in ("dit", "unet"):
        assert list(variant(kind, True).state_dict()) == list(variant(kind, False).state_dict())


@both_networks
def test_hooks_on_gradients_run_once_a_step(kind: str) -> None:
    """DDP and ZeRO reduce a gradient when autograd has added up all uses of its parameter."""
    net = variant(kind, True)
    calls = collections.Counter[str]()
    for name, parameter in net.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.update([name]))
    loss(net, kind, 0.0).backward()  # the network is called three times
    assert calls == dict.fromkeys(dict(net.named_parameters()), 1)


@both_networks
@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_blocks_run_in_bfloat16_again_where_they_did(kind: str, lam: float) -> None:
    def found(recompute: bool) -> tuple[Tensor, set[torch.dtype]]:
        net, dtypes = variant(kind, recompute).float(), set[torch.dtype]()
        layer = net.get_submodule("blocks.0.fc_in" if kind == "dit" else "down.0.conv1")
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(net, kind, lam, instants=0)
        layer.register_forward_hook(lambda _, inputs, output: dtypes.add(output.dtype))
        value.backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()]), dtypes

    (again, dtypes), (kept, nothing) = found(True), found(False)
    assert (again - kept).norm() < 0.03 * kept.norm()
    assert dtypes == {torch.bfloat16} and not nothing


@pytest.mark.parametrize(
    ("kind", "lam", "backend"),
    [
        ("dit", 0.5, "aot_eager"),
        pytest.param("unet", 0.0, "aot_eager", marks=pytest.mark.slow),
        pytest.param("unet", 0.5, "aot_eager", marks=pytest.mark.slow),
        pytest.param("dit", 0.0, "inductor", marks=pytest.mark.slow),
        pytest.param("dit", 0.5, "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_gradients_are_the_same(kind: str, lam: float, backend: str) -> None:
    torch._dynamo.reset()
    compiled = gradients(variant(kind, True), kind, lam, backend=backend)
    assert_equal_gradients(compiled, gradients(variant(kind, False), kind, lam))


def test_compiled_at_lambda_zero_no_tangent_is_computed_again() -> None:
    """A linear layer is an addmm of its primal, an mm of its tangent, and two mm in backward: one for the two layers
    of the data and the times."""
    torch._dynamo.reset()
    products = collections.Counter[str]()

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        products.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=count,
        partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    net = variant("dit", True)
    compiled = gradients(net, "dit", 0.0, instants=0, backend=backend, tangent="conditional")
    assert products["aten.addmm.default"] == sum(isinstance(layer, nn.Linear) for layer in net.blocks.modules())
    assert products["aten.mm.default"] == 2 * sum(isinstance(layer, nn.Linear) for layer in net.modules()) - 2
    assert products["mmf_fast.attention.default"] == 0
    assert_equal_gradients(compiled, gradients(variant("dit", False), "dit", 0.0, instants=0, tangent="conditional"))


def test_under_torch_func_it_is_refused_in_one_line() -> None:
    with pytest.raises(RuntimeError, match="recompute=False") as caught:
        loss(variant("dit", True), "dit", 0.5, jvp="func")
    assert "\n" not in str(caught.value)
    assert_equal_gradients(*(gradients(variant("dit", r), "dit", 0.0, jvp="finite_difference") for r in (True, False)))
