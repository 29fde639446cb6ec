"""Networks as other people write them, run on Duals: exact, checkpointed, under autocast and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmf_fast import jvp
from mmf_fast.forward.dual import DetachedDual, Dual
from mmf_fast.forward.teaching import teach

STEP = 1e-5
KINDS = (Dual, DetachedDual)


class BasicBlock(nn.Module):
    """After torchvision's ResNet, down-sampling, with ReLUs that are not in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.downsample = nn.Sequential(nn.Conv2d(3, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6))
        self.relu = nn.ReLU()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(6, 4))

    def forward(self, x: Any) -> Any:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return self.head(self.relu(out))


class Attention(nn.Module):
    """After timm's vision transformer."""

    def __init__(self, dim: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.LayerNorm(dim // heads), nn.RMSNorm(dim // heads)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 16), nn.GELU(approximate="tanh"), nn.Linear(16, dim))
        self.gamma = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: Any) -> Any:
        B, N, C = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.training:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            # torch.matmul: Dynamo does not trace @ between two objects that are not tensors
            y = torch.matmul(torch.matmul(q * (C // self.heads) ** -0.5, k.transpose(-2, -1)).softmax(dim=-1), v)
        x = x + self.gamma * self.proj(y.transpose(1, 2).reshape(B, N, C))
        return x + self.mlp(x)


class ConvNet(nn.Module):
    """Group norm, up- and down-sampling and skips, as in diffusion UNets."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.enter, self.leave, self.up = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 3, 1), nn.ConvTranspose2d(4, 4, 2, 2)

    def forward(self, x: Any) -> Any:
        x = self.enter(x)
        h = self.inner(F.avg_pool2d(x, 2))
        h = torch.cat([self.up(h), F.interpolate(h, scale_factor=2.0, mode="nearest")[:, :, :, :]], dim=1)
        a, b = self.leave(torch.where(h > 0, h, 0.1 * h)).unsqueeze(0).split([1, 2], dim=2)
        return torch.stack([a.mean(dim=2), b.amax(dim=2)], dim=-1).flatten(1).clamp(-5, 5)


def transformer(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet block": (BasicBlock, (4, 3, 6, 6)),
    "timm attention": (Attention, (2, 5, 8)),
    "conv net": (ConvNet, (2, 3, 4, 4)),
    "post-norm transformer": (transformer, (3, 4, 8)),
    "pre-norm transformer": (lambda: transformer(norm_first=True, activation="gelu", dropout=0.3), (3, 4, 8)),
    "transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16), (3, 2, 8)),
}


def network(name: str, training: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Callable, nn.Module, Tensor]:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    net = build().to(dtype).train(training)

    def call(x: Any) -> Any:
        torch.manual_seed(1)  # dropout draws alike in every call
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d) and training:
                module.reset_running_stats()
        return net(x, x * 0.5) if name == "transformer" else net(x)

    return call, net, torch.randn(shape, dtype=dtype)


every_network = pytest.mark.parametrize("name", NETWORKS)


@every_network
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_exact(name: str, training: bool) -> None:
    """Tangent, and gradient of <g, y> + <h, dy> in input and parameters, against central differences."""
    call, net, x = network(name, training)
    dx = torch.randn_like(x)
    out = call(Dual(x, dx))
    with torch.no_grad():
        expected = (call(x + STEP * dx) - call(x - STEP * dx)) / (2 * STEP)
    assert torch.allclose(out.primal, call(x), rtol=1e-12, atol=1e-12)
    assert (out.tangent - expected).abs().max() <= 1e-6 * expected.abs().max()

    g, h = torch.randn_like(expected), torch.randn_like(expected)
    detached = call(DetachedDual(x, dx))
    assert torch.allclose(detached.tangent, out.tangent, rtol=1e-10, atol=1e-12) and not detached.tangent.requires_grad
    leaves = [x.requires_grad_(), *net.parameters()]
    ordinary = torch.autograd.grad((g * call(x)).sum(), leaves)
    through_detached = torch.autograd.grad((g * call(DetachedDual(x, dx)).primal).sum(), leaves)
    for a, b in zip(ordinary, through_detached, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)

    def functional() -> Tensor:
        out = call(Dual(x, dx))
        return (g * out.primal).sum() + (h * out.tangent).sum()

    gradients = torch.autograd.grad(functional(), leaves)
    ways = [torch.randn_like(leaf) for leaf in leaves]
    values = []
    with torch.no_grad():
        for step in (STEP, -2 * STEP):
            for leaf, way in zip(leaves, ways, strict=True):
                leaf += step * way
            values.append(functional())
    slope = (values[0] - values[1]) / (2 * STEP)
    actual = sum((a * b).sum() for a, b in zip(gradients, ways, strict=True))
    assert abs(slope - actual) <= 1e-6 * max(abs(slope), torch.cat([a.flatten() for a in gradients]).norm())


def gradients(loss: Tensor, net: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters())))


def functional(out: Any) -> Tensor:
    """Of DetachedDuals, the tangent acts as a constant factor, as in MeanFlow's loss."""
    return (out.primal * out.tangent).sum() + out.primal.square().sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["timm attention", "conv net", "pre-norm transformer"])
def test_checkpointing_is_exact(name: str, kind: type[Dual]) -> None:
    call, net, x = network(name)
    x = kind(x, torch.randn_like(x))
    torch.manual_seed(1)
    checkpointed = checkpoint(net, x, use_reentrant=False)
    assert type(checkpointed) is kind
    for a, b in zip(gradients(functional(checkpointed), net), gradients(functional(call(x)), net), strict=True):
        assert torch.equal(a, b)


def test_reentrant_checkpointing_is_loud() -> None:
    """It returns a plain tuple, without a graph, which no later operation takes."""
    _, net, x = network("timm attention")
    with pytest.warns(UserWarning, match="requires_grad"):
        out = checkpoint(net, Dual(x, x), use_reentrant=True)
    for then in (net, lambda y: y + 1, lambda y: Dual(x, x) + y, lambda y: y.primal):
        with pytest.raises((TypeError, AttributeError)):
            then(out)


@pytest.mark.parametrize("kind", KINDS)
@every_network
def test_autocast(name: str, kind: type[Dual]) -> None:
    """The primal is autocast's up to a rounding of bfloat16; the tangent deviates from float64 as the primal does."""
    training = name == "resnet block"
    exact_call, exact_net, x = network(name, training)
    call, net, _ = network(name, training, torch.float32)
    dx = torch.randn_like(x)
    exact = exact_call(kind(x, dx))
    g = torch.randn_like(exact.primal).float()
    with torch.autocast("cpu", torch.bfloat16):
        plain = call(x.float())
        plain_gradients = gradients((g * plain).sum(), net)
        out = call(kind(x.float(), dx.float()))
        primal_gradients = gradients((g * out.primal).sum(), net)
    with torch.autocast("cpu", torch.bfloat16):
        dual_gradients = gradients(functional(call(kind(x.float(), dx.float()))).float(), net)
    torch.testing.assert_close(out.primal, plain, rtol=2e-2, atol=1e-2)  # a rounding to bfloat16, grown by two layers
    assert out.tangent.dtype == plain.dtype

    def flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([a.flatten() for a in tensors])

    def error(a: Tensor, b: Tensor) -> float:
        return ((a - b).norm() / b.norm()).item()

    assert error(flat(primal_gradients), flat(plain_gradients)) < 3e-2
    assert error(out.tangent, exact.tangent) <= 10 * error(plain, exact.primal) + 0.02
    assert error(flat(dual_gradients), flat(gradients(functional(exact), exact_net))) < 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["resnet block", "timm attention", "conv net", "post-norm transformer"])
def test_compiles_whole(name: str, kind: type[Dual]) -> None:
    _, net, x = network(name, training=False)
    dx = torch.randn_like(x)
    torch._dynamo.reset()
    teach()  # as a pass does: here the network is called without one

    def loss(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        out = net(kind(x, dx))
        return functional(out), out.tangent

    compiled, dy = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, dx)
    eager, expected = loss(x, dx)
    assert torch.allclose(dy, expected, rtol=1e-10) and dy.requires_grad == (kind is Dual)
    for a, b in zip(gradients(compiled, net), gradients(eager, net), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("left", [True, False], ids=["left", "scattered"])
def test_a_padded_encoder_in_eval_is_asked_for_its_fast_path(left: bool) -> None:
    """With a padding mask PyTorch asks whether nested tensors would do, and finds that a Dual does not allow them."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).double().eval()
    padding = torch.tensor([[False, False, False, False], [False, not left, left, left]])
    x, dx, step = torch.randn(2, 4, 8).double(), torch.randn(2, 4, 8).double(), 1e-6
    for tangent_grad in (True, False):
        y, dy = jvp(lambda x: net(x, src_key_padding_mask=padding), (x,), (dx,), tangent_grad)
        with torch.enable_grad():  # or PyTorch takes its fast path, which gives zeros where there is padding
            above, below = (net(x + h * dx, src_key_padding_mask=padding) for h in (step, -step))
        torch.testing.assert_close(y, net(x, src_key_padding_mask=padding))
        torch.testing.assert_close(dy, (above - below) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.LayerNorm(4)], ids=str)
def test_vmap_within_a_network(activation: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 4)).double()
    parameters, (x, dx) = list(net.parameters()), torch.randn(2, 2, 5, 4).double()

    def squares(fn: Callable) -> tuple[Tensor, ...]:
        y, dy = jvp(fn, (x,), (dx,))
        return y, dy, *torch.autograd.grad((y + dy).square().sum(), parameters)

    torch.testing.assert_close(squares(torch.vmap(net)), squares(net))
    assert not jvp(torch.vmap(net), (x,), (dx,), tangent_grad=False)[1].requires_grad


def test_an_error_names_operation_module_and_ways_out() -> None:
    class Histogram(nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.histc(x)

    net = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"count": Histogram()})["count"])
    pattern = (
        r"^no forward-mode rule for histc in 1 \(Histogram\): teach it with mmf_fast.register_rule, or try "
        r"jvp=\"func\", else \"finite_difference\", for the network\n@mmf_fast.register_rule"
    )
    with pytest.raises(NotImplementedError, match=pattern):
        net(Dual(torch.ones(3, 3), torch.ones(3, 3)))
