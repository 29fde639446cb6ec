"""At lambda = 0 the tangent half runs without a graph, so the step keeps for backward what flow matching keeps."""

from __future__ import annotations

import pytest
import torch
from small_networks import KINDS, batch, network
from torch import Tensor

from mmf_fast import MeanFlowLoss


def saved_bytes(loss_fn: MeanFlowLoss, *args: object, **kwargs: object) -> int:
    """Bytes of the distinct storages that autograd saves, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in loss_fn.parameters()}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # a freed storage's address could come back
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_fn(*args, **kwargs)
    return sum(storages.values())


@pytest.mark.filterwarnings("ignore:conditional tangents")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tangent", ["predicted", "conditional"])
def test_lambda_zero_keeps_no_more_than_flow_matching(kind: str, tangent: str) -> None:
    net = network(kind)
    x, noise, (r, t) = batch(kind, size=32, instants=0)
    flow_matching = saved_bytes(MeanFlowLoss(net), x, noise=noise, times=(t, t))
    meanflow = saved_bytes(MeanFlowLoss(net, lam=0.0, tangent=tangent), x, noise=noise, times=(r, t))
    assert meanflow <= 1.05 * flow_matching
    exact = saved_bytes(MeanFlowLoss(net, lam=1.0, tangent=tangent), x, noise=noise, times=(r, t))
    assert exact > 1.5 * flow_matching  # the count does see a tangent that is kept
