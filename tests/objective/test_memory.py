"""At lambda = 0 the tangent half runs without a graph, so the step keeps for backward what flow matching keeps."""

from __future__ import annotations

import pytest
from support.small_networks import KINDS, batch, network, saved_bytes

from mmf_fast import MeanFlowLoss


@pytest.mark.filterwarnings("ignore:conditional tangents")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tangent", ["predicted", "conditional"])
def test_lambda_zero_keeps_no_more_than_flow_matching(kind: str, tangent: str) -> None:
    net = network(kind)
    x, noise, (r, t) = batch(kind, size=32, instants=0)
    flow_matching = saved_bytes(MeanFlowLoss(net), x, noise=noise, times=(t, t), net=net)
    meanflow = saved_bytes(MeanFlowLoss(net, lam=0.0, tangent=tangent), x, noise=noise, times=(r, t), net=net)
    assert meanflow <= 1.05 * flow_matching
    exact = saved_bytes(MeanFlowLoss(net, lam=1.0, tangent=tangent), x, noise=noise, times=(r, t), net=net)
    assert exact > 1.3 * flow_matching  # the count does see a tangent that is kept, little as fused operators keep
