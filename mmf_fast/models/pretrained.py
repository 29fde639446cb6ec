"""Networks by name, and on disk: a folder with model.safetensors (weights) and model.json (how to rebuild it)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmf_fast.files import write_text, writing
from mmf_fast.models.dit import DiT
from mmf_fast.models.mlp import MLP
from mmf_fast.models.unet import UNet
from mmf_fast.registry import Registry

__all__ = ["NETWORKS", "Network", "build", "load_pretrained", "save_pretrained"]

Network: TypeAlias = MLP | DiT | UNet

NETWORKS: Registry[Network] = Registry("model", "argument", "model", {"mlp": MLP, "dit": DiT, "unet": UNet})


def build(name: str, **arguments: Any) -> Network:
    """The network called `name` ("mlp", "dit", "unet") with the arguments of its class. Raises ValueError."""
    return NETWORKS.build(name, **arguments)


def save_pretrained(
    folder: str | Path,
    net: Network,
    extra: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write folder/model.safetensors and folder/model.json, each whole or not at all.

    extra: JSON-able facts to keep beside the weights (data, step).
    state_dict: weights to save in place of the network's own, such as their moving average.
    Raises ValueError when the weights are not this network's or the folder cannot be written.
    """
    folder = Path(folder)
    state = net.state_dict() if state_dict is None else state_dict
    if problem := _difference(net.state_dict(), state):
        raise ValueError(f"state_dict does not belong to this {net.config['name']}: {problem}")
    weights = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    try:
        description = json.dumps({"config": net.config, "extra": dict(extra or {})}, indent=2) + "\n"
    except TypeError as error:
        raise ValueError(f"extra must be JSON-able (numbers, strings, lists, dictionaries): {error}") from error
    try:
        with writing(folder / "model.safetensors") as draft:
            save_file(weights, draft)
        write_text(folder / "model.json", description)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot write a model to {folder} ({getattr(error, 'strerror', None) or error}); choose a writable folder"
        ) from error


def load_pretrained(folder: str | Path) -> tuple[Network, dict[str, Any]]:
    """(network on the CPU, in evaluation mode and in the saved dtype; the `extra` it was saved with).

    Draws nothing from the caller's random state. Raises ValueError when a file is missing, damaged, or not ours.
    """
    weights_path, description_path = Path(folder) / "model.safetensors", Path(folder) / "model.json"
    for path in (description_path, weights_path):
        if not path.is_file():
            raise ValueError(f"{path} is missing; give the folder of a run that has saved its model")
    try:
        description = json.loads(description_path.read_text())
        config, extra = dict(description["config"]), dict(description["extra"])
        name = str(config.pop("name"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{description_path} is damaged; save the model again from a checkpoint") from error
    try:
        state = load_file(weights_path)
    except SafetensorError as error:
        raise ValueError(f"{weights_path} is damaged ({error}); save the model again from a checkpoint") from error
    try:
        with torch.random.fork_rng(devices=[]):
            net = build(name, **config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{description_path}: {error}") from error
    if problem := _difference(net.state_dict(), state):
        raise ValueError(f"{weights_path} does not fit {description_path.name}: {problem}; save the model again")
    net.to(next(iter(state.values())).dtype).load_state_dict(state)
    return net.eval(), extra


def _difference(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """The first way in which two state dicts differ in names or shapes."""
    for name, tensor in expected.items():
        if name not in given:
            return f"{name} is missing"
        if given[name].shape != tensor.shape:
            return f"{name} has shape {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
    surplus = [name for name in given if name not in expected]
    return f"{surplus[0]} is unknown" if surplus else None
