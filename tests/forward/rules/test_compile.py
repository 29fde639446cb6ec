"""Which operators a compiled graph calls, and which are left to the compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmf_fast.forward.dual import DetachedDual, Dual
from mmf_fast.ops import native

RULES: dict[str, tuple[Callable[[Any], Any], bool]] = {  # does the graph call the operator?
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), True),
    "group_norm_silu": (lambda x: F.group_norm(x, 2), True),
    "modulated_layer_norm": (lambda x: F.layer_norm(x, x.shape[-1:]), False),
    "activation": (F.silu, False),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.skipif(not native.available(), reason=native.reason() or "-")
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", [Dual, DetachedDual])
def test_what_inductor_cannot_fuse_as_well_stays_an_operator_in_one_graph(name: str, kind: type[Dual]) -> None:
    function, stays = RULES[name]
    x, dx = torch.randn(2, 2, 4, 9, 8)
    nodes: list[str] = []

    def run(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        y = function(kind(x, dx))
        return y.primal, y.tangent

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x, dx), run(x, dx))
    assert (f"mmf_fast.{name}.default" in nodes) == stays
