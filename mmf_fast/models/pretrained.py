"""Networks by name, and on disk: a folder with model.safetensors (weights) and model.json (what they are).

Both are one thing, though they are two files: the weights hold the text of model.json too, which is there for people.
It has a checksum of every tensor and of itself, so that a flipped bit is found when they are loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mmf_fast.contract import bare
from mmf_fast.files import write_text, writing
from mmf_fast.models.dit import DiT
from mmf_fast.models.mlp import MLP
from mmf_fast.models.unet import UNet
from mmf_fast.registry import Registry

__all__ = ["NETWORKS", "Network", "build", "exported_step", "load_pretrained", "register_network", "save_pretrained"]

Network: TypeAlias = MLP | DiT | UNet

NETWORKS: Registry[Any] = Registry("model", "argument", "model", {"mlp": MLP, "dit": DiT, "unet": UNet})

register_network = NETWORKS.register  # register_network("mine", MyUNet): model={"name": "mine", ...}


def build(name: str, **arguments: Any) -> Any:
    """The network called `name`: "mlp", "dit", "unet", a registered one, or "package.module:Class".

    It remembers the arguments, those of its class, so that a saved one can be rebuilt. Raises ValueError.
    """
    net = NETWORKS.build(name, **arguments)
    net.__dict__["_built_with"] = {"name": name, **arguments}
    return net


def description(net: nn.Module) -> dict[str, Any] | None:
    """{"name", **arguments} from which `build` makes the network again; None where it does not say (a class of one's
    own, made by itself)."""
    config = getattr(net, "config", None)
    return dict(config) if isinstance(config, Mapping) and "name" in config else net.__dict__.get("_built_with")


def save_pretrained(
    folder: str | Path,
    net: nn.Module,
    extra: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write folder/model.safetensors and folder/model.json, each whole or not at all.

    net: of this package or one's own, wrapped or not.
    extra: JSON-able facts to keep beside the weights (data, step).
    state_dict: weights to save in place of the network's own, such as their moving average.
    Raises ValueError when the weights are not this network's or the folder cannot be written.
    """
    from safetensors import SafetensorError  # here, as below: networks alone do without it
    from safetensors.torch import save_file

    folder, net = Path(folder), bare(net)
    state = net.state_dict() if state_dict is None else state_dict
    config = description(net)
    if problem := _difference(net.state_dict(), state):
        name = config["name"] if config else type(net).__name__
        raise ValueError(f"state_dict does not belong to this {name}: {problem}")
    weights = {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}  # no two share memory
    try:
        facts = {"config": config, "extra": dict(extra or {})}
        text = json.dumps({**facts, "sha256": _digest(weights, facts)}, indent=2) + "\n"
    except TypeError as error:
        raise ValueError(f"extra must be JSON-able (numbers, strings, lists, dictionaries): {error}") from error
    try:
        with writing(folder / "model.safetensors") as draft:
            save_file(weights, draft, metadata={"model.json": text})
        write_text(folder / "model.json", text)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot write a model to {folder} ({getattr(error, 'strerror', None) or error}); choose a writable folder"
        ) from error


def load_pretrained(folder: str | Path, net: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
    """(network on the CPU, in evaluation mode and in the saved dtype; the `extra` it was saved with).

    net: takes the weights, in place of a network built from what was saved; a class of one's own needs it.
    Draws nothing from the caller's random state. Raises ValueError when a file is missing, damaged, or not ours.
    """
    path = Path(folder) / "model.safetensors"
    state, facts = _read(path)
    try:
        config, extra = facts["config"], dict(facts["extra"])
        name = None if config is None else str(config.pop("name"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its description is damaged; save the model again from a checkpoint") from error
    if net is None:
        if name is None:
            raise ValueError(
                f"{path} holds weights of a network that is not of this package: pass it, or --net package.module:make"
            )
        try:
            with torch.random.fork_rng(devices=[]):
                net = build(name, **config)
            net.to(next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), None))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path.with_name('model.json')}: {error}") from error
    net = bare(net)
    if problem := _difference(net.state_dict(), state):
        raise ValueError(f"{path} does not fit {name or type(net).__name__}: {problem}; save the model again")
    net.load_state_dict(state)
    return net.eval(), extra


def exported_step(folder: str | Path) -> int | None:
    """The training step of the weights in a folder; None where they, or model.json beside them, are not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            text = (file.metadata() or {})["model.json"]
        return json.loads(text)["extra"]["step"] if (Path(folder) / "model.json").read_text() == text else None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights, and what model.json says of them, compared with their checksum."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path} is missing; give the folder of a run that has saved its model")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); save the model again from a checkpoint") from error
    if "model.json" not in metadata:
        raise ValueError(f"{path} was not written by save_pretrained: load it with safetensors into a network")
    try:
        facts = json.loads(metadata["model.json"])
        whole = facts.pop("sha256") == _digest(state, facts)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged (its checksum differs); save the model again from a checkpoint")
    return state, facts


def _digest(state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """sha256 of what is said of the weights, and of their names and contents."""
    result = hashlib.sha256(json.dumps(facts).encode())
    for name in sorted(state):
        result.update(name.encode())
        result.update(state[name].cpu().reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


def _difference(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """The first way in which two state dicts differ in names or shapes."""
    for name, tensor in expected.items():
        if name not in given:
            return f"{name} is missing"
        if given[name].shape != tensor.shape:
            return f"{name} has shape {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
    surplus = [name for name in given if name not in expected]
    return f"{surplus[0]} is unknown" if surplus else None
