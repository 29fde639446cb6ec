"""The engine of many processes: DeepSpeed ZeRO. The only file that imports deepspeed.

    deepspeed mmf_fast/train.py --config configs/imagenet64.yaml      one process per GPU (or CPU rank)
    torchrun --nproc-per-node 8 mmf_fast/train.py --config ...        the same
    python mmf_fast/train.py --config ...                             one process

The JVP is an ordinary forward call of the wrapped loss module, so ZeRO's hooks see every parameter it uses. Each rank
owns a fragment of each parameter, in float32, with its optimizer moments and its moving average: what ZeRO gives it, or
an even share where ZeRO shards nothing (stage 0). Checkpoints hold such fragments by name and position, so that a run
goes on with another number of ranks or another stage.
"""

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

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

from mmf_fast.devices import choose_device
from mmf_fast.training.ema import move_average
from mmf_fast.training.engines.base import StepResult
from mmf_fast.training.engines.local import parts
from mmf_fast.training.optimizers import adam_options, build_optimizer, clip_or_skip
from mmf_fast.training.settings import ConfigError, Optimizer, Train, learning_rate
from mmf_fast.training.timing import Phases

MOMENTS = ("exp_avg", "exp_avg_sq")


class Fragment(NamedTuple):
    """What this rank owns of a parameter: elements start, start + 1, ... of it flattened, as a float32 tensor that is
    (or stands for) the optimizer's own."""

    start: int
    value: Tensor


class Saved:
    """The shares of all ranks that saved. They lie in mapped files, of which only what is asked for is read.

    Raises ValueError where they are not the whole of the parameters of these names and shapes.
    """

    def __init__(self, shares: list[dict[str, Any]], shapes: Mapping[str, torch.Size]) -> None:
        self.steps, self.shapes = shares[0]["steps"], shapes
        self.fragments: dict[str, list[dict[str, Any]]] = {name: [] for name in shapes}
        for share in shares:
            for name, fragment in share["fragments"].items():
                self.fragments[name].append(fragment)
        for name, shape in shapes.items():
            if sum(fragment["weight"].numel() for fragment in self.fragments[name]) != shape.numel():
                raise ValueError(f"it holds only a part of {name}")

    def part(self, name: str, key: str, start: int, size: int) -> Tensor:
        """Elements start, start + 1, ... of a parameter's "weight", "average" or moment, (size,); zeros beyond it."""
        result = torch.zeros(size)
        for fragment in self.fragments[name]:
            first, value = fragment["start"] - start, fragment[key]
            low, high = max(0, first), min(size, first + value.numel())
            if low < high:
                result[low:high] = value[low - first : high - first]
        return result

    def whole(self, name: str, key: str) -> Tensor:
        shape = self.shapes[name]
        return self.part(name, key, 0, shape.numel()).view(shape)


class DeepSpeedEngine:
    """Implements `mmf_fast.training.engines.Engine` on DeepSpeed.

    loss_fn: as for LocalEngine.  zero: a DeepSpeed configuration, of which "zero_optimization" and options of
    communication are taken; what the YAML file sets (batch, accumulation, clipping, precision) must not be in it.
    Raises ConfigError for settings that do not fit together.
    """

    def __init__(
        self, loss_fn: nn.Module, optimizer: Optimizer, train: Train, zero: Mapping[str, Any], seed: int = 0
    ) -> None:
        self.config, self.steps, self.accumulate, self.seed = optimizer, train.steps, train.accumulate, seed
        self.stage = int(zero.get("zero_optimization", {}).get("stage", 0))
        self.device = _join(train.device)
        self.phases = Phases(self.device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        settings = _settings(zero, self.stage, optimizer, train, self.world_size, self.device)
        loss_fn = loss_fn.to(self.device).train()
        if train.compile:
            loss_fn.compile()
        base = _build_optimizer(loss_fn.parameters(), optimizer)
        net: nn.Module = loss_fn.net  # type: ignore[assignment]
        self.shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
        self.whole = copy.deepcopy(net).cpu().eval().requires_grad_(False) if self.rank == 0 else None
        self.engine, *_ = deepspeed.initialize(model=loss_fn, optimizer=base, config=settings)
        self.net: nn.Module = self.engine.module.net
        self.ema = {name: fragment.value.clone() for name, fragment in self._fragments()}

    # ---- one step ----------------------------------------------------------------------------------------------------

    def step(self, x: Tensor, step: int, **cond: Tensor) -> StepResult:
        with self.phases("data"):
            x = x.to(self.device, non_blocking=True)
            cond = {key: value.to(self.device, non_blocking=True) for key, value in cond.items()}
        lr = learning_rate(step, self.config, self.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        found: list[dict[str, Tensor]] = []
        for part, rows in parts(len(x), self.accumulate, self.rank, self.world_size, self.seed):
            with self.phases("loss"):
                output = self.engine(x[rows], step=step, part=part, **{key: y[rows] for key, y in cond.items()})
            with self.phases("backward"):
                self.engine.backward(output.loss)
            found.append({**output.metrics, "loss": output.loss.detach()})
            with self.phases("optimizer"):
                if self.stage == 0 and len(found) == self.accumulate:  # DeepSpeed's own skip would wait for the host
                    norm, skipped = clip_or_skip(
                        self.engine.module.parameters(), self.engine.optimizer, self.config.clip
                    )
                self.engine.step()
        with self.phases("optimizer"):
            if self.stage > 0:
                norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)
                norm = torch.where(norm < 0, torch.inf, norm)  # DeepSpeed writes -1 for a norm that is not finite
                skipped = ~torch.isfinite(norm)
            self._move_average(step, skipped)
            metrics = self._mean(found)
        return StepResult(metrics | {"grad_norm": norm, "lr": torch.tensor(lr, dtype=torch.float64)}, skipped)

    def _move_average(self, step: int, skipped: Tensor) -> None:
        fragments = dict(self._fragments())
        average, values = [self.ema[name] for name in fragments], [fragment.value for fragment in fragments.values()]
        if average:  # a rank may own nothing; what an offloaded optimizer owns is on the CPU
            move_average(average, values, self.config.ema, step, skipped.to(average[0].device))

    def _mean(self, found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Metrics over accumulation steps and ranks, in one reduction."""
        values = torch.stack(
            [torch.stack([m.detach().float().to(self.device) for m in each.values()]) for each in found]
        )
        mean = values.mean(0) / self.world_size
        dist.all_reduce(mean)
        return dict(zip(found[0], mean, strict=True))

    # ---- fragments ---------------------------------------------------------------------------------------------------

    def _fragments(self, key: str | None = None) -> Iterator[tuple[str, Fragment]]:
        """This rank's fragments of the float32 weights, or of a moment of the optimizer; none where it owns nothing."""
        parameter: Any  # DeepSpeed's attributes are on it
        for name, parameter in self.net.named_parameters():
            if self.stage == 3:
                get = safe_get_local_fp32_param if key is None else safe_get_local_optimizer_state
                value = get(parameter) if key is None else get(parameter, key)
                start = self.rank * value.numel()
                value = value[: max(0, self.shapes[name].numel() - start)]  # the last partition is padded
            elif self.stage > 0:
                mapping = parameter._hp_mapping
                if mapping is None:
                    continue
                start, value = mapping.lp_fragment_address.start, mapping.get_hp_fragment(key)
            else:
                whole = parameter.data if key is None else self.engine.optimizer.state[parameter][key]
                size = -(-whole.numel() // self.world_size)
                start = self.rank * size
                value = whole.flatten()[start : start + size]
            if value.numel():
                yield name, Fragment(start, value)

    def averaged(self) -> nn.Module:
        """The network with averaged weights on rank 0; on the others, the network as it is, which nobody should use."""
        starts = {name: fragment.start for name, fragment in self._fragments()}
        state = {}
        for name, shape in self.shapes.items():
            flat = torch.zeros(shape.numel(), device=self.device)
            if name in self.ema:
                flat[starts[name] : starts[name] + self.ema[name].numel()] = self.ema[name]
            dist.reduce(flat, dst=0)
            state[name] = flat.view(shape)
        if self.whole is None:
            return self.net
        self.whole.load_state_dict(state, strict=False)  # buffers do not train
        return self.whole.to(self.device)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        moments = {key: dict(self._fragments(key)) for key in MOMENTS} if self._moments() else {}
        share = {
            name: {"start": start, "weight": value, "average": self.ema[name]}
            | {key: moments[key][name].value for key in moments}
            for name, (start, value) in self._fragments()
        }
        steps = [float(state["step"]) for state in self._moments().values()]
        return {"fragments": share, "steps": max(steps, default=0.0)}

    @torch.no_grad()
    def load_state_dict(self, shares: list[dict[str, Any]]) -> None:
        """Takes the shares of all ranks that saved, however many they were."""
        saved = Saved(shares, self.shapes)
        self._set_weights(saved)
        if saved.steps:
            self._make_moments(saved.steps)
            for key in MOMENTS:
                self._set(saved, key)
        for name, (start, value) in self._fragments():
            self.ema[name].copy_(saved.part(name, "average", start, value.numel()))

    def _set_weights(self, saved: Saved) -> None:
        for name, parameter in self.net.named_parameters():
            if self.stage == 3:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if self.rank == 0:
                        parameter.data.copy_(saved.whole(name, "weight"))
            else:
                parameter.data.copy_(saved.whole(name, "weight"))
        if self.stage > 0:  # at stage 0 the optimizer steps on the parameters themselves
            self._set(saved, None)

    def _set(self, saved: Saved, key: str | None) -> None:
        """Writes this rank's fragments of the float32 weights, or of a moment; at stage 0 it has them whole."""
        parameter: Any
        of = key or "weight"
        if self.stage == 0:
            for name, parameter in self.net.named_parameters():
                self.engine.optimizer.state[parameter][key].copy_(saved.whole(name, of))
            return
        if self.stage < 3:
            for name, (start, value) in self._fragments(key):
                value.copy_(saved.part(name, of, start, value.numel()))
            return
        for name, parameter in self.net.named_parameters():
            size = parameter.ds_tensor.numel()
            padded = saved.part(name, of, self.rank * size, size).to(self.device)
            if key is None:
                safe_set_local_fp32_param(parameter, padded)
            else:
                safe_set_local_optimizer_state(parameter, padded, key)

    def _owned(self) -> list[Tensor]:
        """The float32 tensors that the inner optimizer steps on."""
        optimizer = self.engine.optimizer
        if self.stage == 0:
            return list(self.net.parameters())
        return optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups

    def _moments(self) -> dict[Tensor, dict[str, Any]]:
        """The states of the inner optimizer; empty before its first step."""
        optimizer = self.engine.optimizer if self.stage == 0 else self.engine.optimizer.optimizer
        return {tensor: optimizer.state[tensor] for tensor in self._owned() if optimizer.state.get(tensor)}

    def _make_moments(self, steps: float) -> None:
        optimizer = self.engine.optimizer if self.stage == 0 else self.engine.optimizer.optimizer
        counts = isinstance(optimizer, torch.optim.Optimizer) and "fused" in optimizer.defaults  # as a tensor
        for tensor in self._owned():
            step = torch.tensor(steps, device=tensor.device) if counts else int(steps)
            optimizer.state[tensor] = {"step": step, **{key: torch.zeros_like(tensor) for key in MOMENTS}}
        if self.stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()


def _join(device: str) -> torch.device:
    """Joins the processes of the launcher (or starts a group of one) and takes this rank's device."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    else:
        # Its all-reduce through shared memory would be compiled for minutes; gloo serves ranks on CPUs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    if not dist.is_initialized() and "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    return chosen


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
    if train.batch % (world_size * train.accumulate):
        raise ConfigError(
            f"train.batch={train.batch} is not divisible by {world_size} processes x train.accumulate="
            f"{train.accumulate}: choose another batch"
        )
    if train.compile and stage == 3:
        raise ConfigError(
            "train.compile: ZeRO stage 3 fetches weights within the step, which cannot be one graph; "
            "use stage 2, or train.compile=false"
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
    doubled = sorted(ours.keys() & zero.keys())
    if doubled:
        raise ConfigError(f"train.zero: {doubled[0]} is set by the YAML file; remove it from the ZeRO file")
    return {"steps_per_print": 2**62, "zero_allow_untested_optimizer": True, **zero, **ours}
