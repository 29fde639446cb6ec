"""Networks with a call of their own as u(z, r, t, **cond): modules, so parameters, modes, devices and DDP reach them.

net = Adapter(theirs, lambda net, z, r, t, **c: net(z, t, r, **c))      arguments in another order
net = Adapter(theirs, lambda net, z, r, t, **c: net(z, (t, t - r), **c))   the interval instead of its end
net = Adapter(theirs, lambda net, z, r, t, **c: net(z, r, t, **c)[0])   it returns (u, v)
net = DiffusersAdapter(UNet2DModel(...))                                a network of one time: it gets a second
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mmf_fast.contract import hidden_modules
from mmf_fast.models.layers import sinusoids, zero_init

__all__ = ["Adapter", "DiffusersAdapter"]


class Adapter(nn.Module):
    """u(z, r, t, **cond) = call(net, z, r, t, **cond).

    net: any nn.Module.  call: a function of the network and of z (B, ...), r and t (B,), t = 1 being noise, that
    returns u like z. It must reach the network through its first argument: a copy or a moving average passes
    another one. num_classes is the network's, where it has one.
    """

    def __init__(self, net: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        if not isinstance(net, nn.Module) or not callable(call):
            raise ValueError("Adapter takes a module and a function: Adapter(net, lambda net, z, r, t, **c: ...)")
        hidden = hidden_modules(call)
        if hidden:
            warnings.warn(
                f"the function given to Adapter calls the module {hidden[0]} from outside: use its first argument, the "
                "network, or copies of the adapter will share that module",
                stacklevel=2,
            )
        self.net, self.call = net, call
        if hasattr(net, "num_classes"):
            self.num_classes = net.num_classes

    def forward(self, z: Tensor, r: Tensor, t: Tensor, **cond: Any) -> Any:
        return self.call(self.net, z, r, t, **cond)

    @property
    def __signature__(self) -> inspect.Signature:
        """What the function takes after the network: its conditions have names that the loss can look at."""
        return inspect.Signature(list(inspect.signature(self.call).parameters.values())[1:])


class DiffusersAdapter(Adapter):
    """A UNet or transformer of diffusers, which knows one time, as u(z, r, t, y=None, **cond).

    t goes through the network's own embedding as timestep = scale * t. t - r goes through a second one beside it, whose
    output is added and is zero at first, so that a pretrained network begins as it is. y are its class_labels (give the
    loss `null_label`); other conditions are passed by name (encoder_hidden_states=...). A learned variance is left out.

    scale: not the 1000 of diffusion: MeanFlow regresses on d_t u, which grows with it. One UNet2DModel, errors of the
    intervals at steps 50, 200 and 350: 8.4, 2.5, 1.1 with 1000 and 0.74, 0.44, 0.47 with 50; those of r = t were equal.
    Transformers that multiply by 1000 themselves (Flux) want 0.05.
    Raises ValueError for a network without an embedding of the time that is known here.
    """

    EMBEDDINGS = ("time_embedding", "timestep_embedder", "time_embedder")

    def __init__(self, net: nn.Module, scale: float = 50.0) -> None:
        found = [(parent, name) for parent in net.modules() for name in self.EMBEDDINGS if hasattr(parent, name)]
        if not found:
            raise ValueError(
                f"{type(net).__name__} has none of {', '.join(self.EMBEDDINGS)}: write mmf_fast.Adapter(net, call)"
            )
        super().__init__(net, functools.partial(_call_diffusers, scale))
        for parent, name in found:
            setattr(parent, name, TwoTimes(getattr(parent, name)))


class TwoTimes(nn.Module):
    """A TimestepEmbedding of diffusers and its twin for the interval t - r, which the adapter puts here for a call."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.of_t, self.of_interval = embedding, copy.deepcopy(embedding)
        zero_init(self.of_interval.linear_2)
        self.interval: Any = None

    def forward(self, features: Tensor, *args: Any) -> Tensor:
        if self.interval is None:
            raise RuntimeError("the time is embedded outside of a call of the adapter: turn gradient checkpointing off")
        of_interval = sinusoids(self.interval, features.shape[-1] // 2).to(features.dtype)
        return self.of_t(features, *args) + self.of_interval(of_interval)


def _call_diffusers(
    scale: float, net: nn.Module, z: Tensor, r: Tensor, t: Tensor, y: Tensor | None = None, **cond: Any
) -> Any:
    labels = {} if y is None else {"class_labels": y}
    embeddings = [module for module in net.modules() if isinstance(module, TwoTimes)]
    for embedding in embeddings:
        embedding.interval = t - r
    try:
        u = net(z, timestep=scale * t, return_dict=False, **labels, **cond)[0]
    finally:
        for embedding in embeddings:
            embedding.interval = None
    return u[:, : z.shape[1]] if u.shape[1] == 2 * z.shape[1] else u
