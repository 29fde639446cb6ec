"""Networks with a call of their own, as modules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmf_fast import Adapter, DiffusersAdapter, MeanFlowLoss, TimeSampler, sample
from mmf_fast.models import MLP


class Swapped(nn.Module):
    """net(z, t, r, y=None) -> (u, v), with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.dropout = MLP(dim=3, width=8, depth=1, num_classes=4), nn.Dropout(0.5)
        self.num_classes = 4

    def forward(self, z: Any, t: Any, r: Any, y: Tensor | None = None) -> Any:
        u = self.inner(self.dropout(z), r, t, y)
        return u, u


def swap(net: nn.Module, z: Any, r: Any, t: Any, **c: Any) -> Any:
    return net(z, t, r, **c)[0]


def test_it_is_a_module_in_every_respect() -> None:
    net = Adapter(Swapped(), swap)
    loss_fn = MeanFlowLoss(net, lam=0.5, times=TimeSampler(share=0.5))
    assert {id(p) for p in loss_fn.parameters()} == {id(p) for p in net.net.parameters()}
    assert loss_fn.null_label == 4
    loss_fn.eval()
    assert not net.net.dropout.training
    assert next(loss_fn.double().parameters()).dtype == next(net.net.parameters()).dtype == torch.float64
    loss_fn.train()(torch.randn(8, 3, dtype=torch.float64), y=torch.arange(8) % 4).loss.backward()
    assert all(p.grad is not None for p in net.net.inner.parameters())
    one, other = (sample(net, (4, 3), seed=1) for _ in range(2))
    assert torch.equal(one, other)  # no dropout while sampling
    assert net.net.dropout.training


def test_copies_have_their_own_network() -> None:
    net = Adapter(Swapped(), swap)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with torch.no_grad():
            list(twin.parameters())[-1].fill_(1.0)
        z, t = torch.randn(2, 3), torch.ones(2)
        assert not torch.equal(twin.eval()(z, t, t), net.eval()(z, t, t))


def test_what_is_called_past_the_first_argument_is_warned_about() -> None:
    theirs = Swapped()
    with pytest.warns(UserWarning, match="calls the module Swapped from outside"):
        Adapter(theirs, lambda net, z, r, t: theirs(z, t, r)[0])
    with pytest.raises(ValueError, match="a module and a function"):
        Adapter(lambda z: z, swap)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"called as \(z, t, y\)"):
        MeanFlowLoss(Adapter(theirs, lambda net, z, t, y=None: net(z, t, t)))


# ---- diffusers -------------------------------------------------------------------------------------------------------


def unet(**options: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **options,
    )  # fmt: skip


def transformer() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5, norm_num_groups=1,
    )  # fmt: skip


NETWORKS = {"unet": lambda: unet(num_class_embeds=5), "transformer": transformer}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_diffusers_begins_as_it_is_and_learns_the_interval(name: str) -> None:
    theirs = NETWORKS[name]().eval()
    z, t, y = torch.randn(4, 3, 8, 8), torch.rand(4), torch.arange(4)
    with torch.no_grad():
        before = theirs(z, timestep=50 * t, class_labels=y, return_dict=False)[0][:, :3].clone()
    net = DiffusersAdapter(theirs)
    with torch.no_grad():
        torch.testing.assert_close(net(z, t, t, y=y), before)
        torch.testing.assert_close(net(z, 0 * t, t, y=y), before)
        for module in net.modules():
            if type(module).__name__ == "TwoTimes":
                module.of_interval.linear_2.weight.normal_()
        assert not torch.allclose(net(z, 0 * t, t, y=y), net(z, t, t, y=y), atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("jvp", ["dual", "func"])
def test_the_loss_of_a_network_of_diffusers_trains_all_of_it(name: str, lam: float, jvp: str) -> None:
    net = DiffusersAdapter(NETWORKS[name]())
    loss_fn = MeanFlowLoss(net, lam=lam, null_label=4, jvp=jvp, times=TimeSampler(share=0.5))
    loss_fn(torch.randn(4, 3, 8, 8), y=torch.arange(4)).loss.backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    assert sample(net, (2, 3, 8, 8), steps=2, y=torch.tensor([0, 1])).isfinite().all()


def test_a_copy_of_an_adapted_network_embeds_its_own_interval() -> None:
    net = DiffusersAdapter(unet()).eval()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for module in twin.modules():
            if type(module).__name__ == "TwoTimes":
                module.of_interval.linear_2.weight.normal_()
        z, t = torch.randn(2, 3, 8, 8), torch.ones(2)
        assert not torch.allclose(twin(z, 0 * t, t), net(z, 0 * t, t), atol=1e-4)


def test_a_network_without_a_time_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has none of time_embedding"):
        DiffusersAdapter(nn.Linear(2, 2))
