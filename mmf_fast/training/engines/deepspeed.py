"""The engine of many processes: DeepSpeed ZeRO. The only file that imports deepspeed.

    deepspeed mmf_fast/train.py --config configs/imagenet64.yaml      one process per GPU (or CPU rank)
    torchrun --nproc-per-node 8 mmf_fast/train.py --config ...        the same
    python mmf_fast/train.py --config ...                             one process

The JVP is an ordinary forward call of the wrapped loss module, so ZeRO's hooks see every parameter it uses. Each rank
owns a fragment of each parameter, in float32, with its optimizer moments and its moving average: what ZeRO gives it, or
an even share where ZeRO shards nothing (stage 0). Checkpoints hold such fragments by name and position, so that a run
goes on with another number of ranks or another stage.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from mmf_fast.distributed import join
from mmf_fast.training.engines.base import Engine
from mmf_fast.training.fragments import MOMENTS, Fragment, Saved
from mmf_fast.training.optimizers import adam_options, build_optimizer, clip_or_skip
from mmf_fast.training.settings import ConfigError, Optimizer, Train, check_ranks

__all__ = ["DeepSpeedEngine"]

TESTED = "0.19"  # the versions that `Internals` below was tested with


class DeepSpeedEngine(Engine):
    """`Engine` on DeepSpeed.

    zero: a DeepSpeed configuration, of which "zero_optimization" and options of communication are taken; what the YAML
    file sets (batch, accumulation, clipping, precision) must not be in it.
    Raises ConfigError for settings that do not fit together.
    """

    def __init__(
        self, loss_fn: nn.Module, optimizer: Optimizer, train: Train, zero: Mapping[str, Any], seed: int = 0
    ) -> None:
        stage = _stage(zero)
        device = _join(train.device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        settings = _settings(zero, stage, optimizer, train, self.world_size, device)
        single = next((name for name, each in loss_fn.named_parameters() if stage == 3 and each.ndim == 0), None)
        if single:
            raise ConfigError(
                f"train.zero: stage 3 cannot share {single}, a parameter of no dimension; give it one row, or use "
                "stage 2 or train.zero=fsdp"
            )
        super().__init__(loss_fn, optimizer, train, device, seed)
        self.stage, self.autocast = stage, False  # bf16: the weights are bfloat16, the optimizer's are float32
        base = _build_optimizer([p for p in loss_fn.parameters() if p.requires_grad], optimizer)
        self.model, *_ = deepspeed.initialize(model=loss_fn, optimizer=base, config=settings)
        self.zero = Internals(self.model, stage, {name: p for name, p in self._parameters()})
        self.start_average()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.model.optimizer.param_groups
        return groups

    def _parameters(self) -> Iterator[tuple[str, Any]]:
        """The trained ones."""
        return ((name, p) for name, p in self.model.module.named_parameters() if name in self.shapes)

    def backward(self, loss: Tensor, last: bool) -> None:
        # Where the loss is not finite its gradient shall not be either, as that decides whether a step is left out.
        self.model.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))
        if not last:
            self.model.step()

    def update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        if self.stage == 0:  # DeepSpeed's own skip would wait for the host
            parameters = [parameter for _, parameter in self._parameters()]
            norm, skipped = clip_or_skip(parameters, self.model.optimizer, self.config.clip)
            self.model.step()
            return norm, skipped
        self.model.step()
        norm = torch.as_tensor(self.model.get_global_grad_norm(), dtype=torch.float32, device=self.device)
        norm = torch.where(norm < 0, torch.inf, norm)  # DeepSpeed writes -1 for a norm that is not finite
        return norm, ~torch.isfinite(norm)

    def fragments(self, key: str | None = None) -> Iterator[tuple[str, Fragment]]:
        if key is not None and not self.zero.moments():
            return
        for name, parameter in self._parameters():
            if self.stage > 0:
                fragment = self.zero.fragment(name, parameter, key, self.rank)
                if fragment is None:
                    continue
                start, value = fragment
            else:  # ZeRO shares nothing: an even share
                whole = parameter.data if key is None else self.model.optimizer.state[parameter][key]
                size = -(-whole.numel() // self.world_size)
                start = self.rank * size
                value = whole.flatten()[start : start + size]
            if self.stage == 3:
                value = value[: max(0, self.shapes[name].numel() - start)]  # the last partition is padded
            if value.numel():
                yield name, Fragment(start, value)

    def steps_of(self, name: str) -> float:
        return max((float(state["step"]) for state in self.zero.moments().values()), default=0.0)

    def write(self, saved: Saved) -> None:
        for name, parameter in self._parameters():
            if self.stage == 3:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if self.rank == 0:
                        parameter.data.copy_(saved.whole(name, "weight"))
            else:
                parameter.data.copy_(saved.whole(name, "weight"))
        if self.stage > 0:  # at stage 0 the optimizer steps on the parameters themselves
            self._write(saved, None)
        if steps := saved.steps():
            self.zero.make_moments(steps)
            for key in MOMENTS:
                self._write(saved, key)

    def _write(self, saved: Saved, key: str | None) -> None:
        """Sets this rank's fragments of the float32 weights, or of a moment; at stage 0 it has them whole."""
        of = key or "weight"
        if 0 < self.stage < 3:
            for name, (start, value) in self.fragments(key):
                value.copy_(saved.part(name, of, start, value.numel()))
            return
        for name, parameter in self._parameters():
            if self.stage == 0:
                self.model.optimizer.state[parameter][key].copy_(saved.whole(name, of))
            else:
                start, size = self.zero.partition(parameter)
                self.zero.set_partition(parameter, key, saved.part(name, of, start, size))


class Internals:
    """What is asked of DeepSpeed beyond its public interface: the float32 tensors its optimizer steps on, their states,
    and where in the parameters they lie. All its private names are in this class, in `_join`, and in its tests."""

    def __init__(self, engine: Any, stage: int, trained: Mapping[str, Any]) -> None:
        version = importlib.metadata.version("deepspeed")
        if not version.startswith(TESTED + "."):
            raise ConfigError(
                f"train.zero works with deepspeed {TESTED}, here is {version}: pip install deepspeed~={TESTED}.0"
            )
        self.engine, self.stage, self.trained = engine, stage, trained

    @property
    def inner(self) -> Any:
        """The optimizer within ZeRO's."""
        return self.engine.optimizer if self.stage == 0 else self.engine.optimizer.optimizer

    def owned(self) -> list[Tensor]:
        """The float32 tensors that the inner optimizer steps on."""
        optimizer = self.engine.optimizer
        if self.stage == 0:
            return list(self.trained.values())
        return optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups

    def moments(self) -> dict[Tensor, dict[str, Any]]:
        """The states of the inner optimizer; empty before its first step."""
        return {tensor: self.inner.state[tensor] for tensor in self.owned() if self.inner.state.get(tensor)}

    def make_moments(self, steps: float) -> None:
        inner = self.inner
        counts = isinstance(inner, torch.optim.Optimizer) and "fused" in inner.defaults  # as a tensor
        for tensor in self.owned():
            step = torch.tensor(steps, device=tensor.device) if counts else int(steps)
            inner.state[tensor] = {"step": step, **{key: torch.zeros_like(tensor) for key in MOMENTS}}
        if self.stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def fragment(self, name: str, parameter: Any, key: str | None, rank: int) -> Fragment | None:
        """What a rank owns of a parameter at stage 1, 2 or 3 (there with the padding of the last partition)."""
        if self.stage == 3:
            get = safe_get_local_fp32_param if key is None else safe_get_local_optimizer_state
            value = get(parameter) if key is None else get(parameter, key)
            return Fragment(rank * value.numel(), value)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        return Fragment(mapping.lp_fragment_address.start, mapping.get_hp_fragment(key))

    def partition(self, parameter: Any) -> tuple[int, int]:
        """At stage 3, where this rank's share of a flattened parameter starts and its size, which may go beyond it."""
        size = parameter.ds_tensor.numel()
        return dist.get_rank() * size, size

    def set_partition(self, parameter: Any, key: str | None, value: Tensor) -> None:
        value = value.to(parameter.ds_tensor.device)
        if key is None:
            safe_set_local_fp32_param(parameter, value)
        else:
            safe_set_local_optimizer_state(parameter, value, key)


def _join(name: str) -> torch.device:
    device = join(name)
    if device.type == "cpu":
        # Its all-reduce through shared memory would be compiled for minutes; gloo serves ranks on CPUs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # All ranks have the first one's weights already (engines/base.py), and this fails at a parameter of no dimension.
    deepspeed.DeepSpeedEngine._broadcast_model = lambda engine: None
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return device


def _stage(zero: Mapping[str, Any]) -> int:
    """Raises ConfigError for a file that was written for another trainer."""
    for key, value in _leaves(zero):
        if value == "auto":
            raise ConfigError(
                f"train.zero: {key} is 'auto', which another trainer fills in; write the value, or remove it"
            )
    if "fp16" in zero:
        raise ConfigError(
            "train.zero: fp16 is not trained in here (no loss scaling); remove it, set train.precision=bf16"
        )
    stage = zero.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"train.zero: zero_optimization.stage is {stage!r}; it is 0, 1, 2 or 3")
    return int(stage)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _build_optimizer(parameters: Iterable[nn.Parameter], config: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of `config.kind`. Raises ConfigError for one that is not here or cannot be built."""
    try:
        if config.kind == "deepspeed_cpu":
            return DeepSpeedCPUAdam(parameters, adamw_mode=True, **adam_options(config))
        if config.kind == "deepspeed_fused":
            return FusedAdam(parameters, adam_w_mode=True, **adam_options(config))
    except Exception as error:  # of all kinds: no compiler, no ninja, no CUDA toolkit, another version of it, ...
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise ConfigError(
            f"optimizer.kind={config.kind}: DeepSpeed cannot build it here ({reason}); it takes ninja and a compiler, "
            "on GPUs nvcc of PyTorch's version; or take optimizer.kind=adamw, without offload"
        ) from error
    return build_optimizer(parameters, config)


def _settings(
    zero: Mapping[str, Any], stage: int, optimizer: Optimizer, train: Train, world_size: int, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's configuration: the ZeRO file and what the YAML file says."""
    check_ranks(train, world_size)
    if train.compile and stage == 3:
        raise ConfigError(
            "train.compile: ZeRO stage 3 fetches weights within the step, which cannot be one graph, nor one a block; "
            "use stage 2, train.zero=fsdp, or train.compile=false"
        )
    if train.precision == "bf16" and stage == 0:
        raise ConfigError(
            "train.precision=bf16 needs the float32 weights of ZeRO stage 1, 2 or 3; take configs/zero1.json"
        )
    offloads = zero.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    if optimizer.kind != "adamw" and stage == 0:  # it could not skip a step whose gradient is not finite
        raise ConfigError(f"optimizer.kind={optimizer.kind} needs ZeRO stage 1, 2 or 3; take configs/zero1.json")
    if offloads and optimizer.kind != "deepspeed_cpu":
        raise ConfigError("train.zero: it offloads the optimizer to the CPU; set optimizer.kind=deepspeed_cpu")
    if optimizer.kind == "deepspeed_cpu" and not offloads and device.type != "cpu":
        raise ConfigError(
            "optimizer.kind=deepspeed_cpu steps on the CPU: take a ZeRO file that offloads, as zero2_offload.json"
        )
    if stage == 3 and zero["zero_optimization"].get("memory_efficient_linear", True):
        raise ConfigError("train.zero: its linear layer knows no dual numbers; set memory_efficient_linear to false")
    ours = {
        "train_batch_size": train.batch,
        "train_micro_batch_size_per_gpu": train.batch // (world_size * train.accumulate),
        "gradient_accumulation_steps": train.accumulate,
        "gradient_clipping": optimizer.clip if stage else 0.0,
        "bf16": {"enabled": train.precision == "bf16"},
    }
    doubled = sorted((ours.keys() | {"optimizer", "scheduler", "amp"}) & zero.keys())
    if doubled:
        raise ConfigError(f"train.zero: {doubled[0]} is set by the YAML file; remove it from the ZeRO file")
    return {"steps_per_print": 2**62, "zero_allow_untested_optimizer": True, **zero, **ours}
