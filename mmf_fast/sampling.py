"""Drawing samples: from a network, and from a run folder on the command line.

mmf sample --run runs/digits --steps 1 --out grid.png --classes 0 1 2

A network knows three ways from z_t to z_r, nearer to the data (t = 1 is noise, t = 0 is data):

    average      z_r = z_t - (t - r) u(z_t, r, t)                               MeanFlow, arXiv 2505.13447, section 4.2
    euler        z_r = z_t - (t - r) u(z_t, t, t)                               flow matching: velocities alone
    consistency  z_r = (1 - r) (z_t - t u(z_t, 0, t)) + r eps, new eps ~ N(0, 1)  arXiv 2303.01469, algorithm 1
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from mmf_fast.contract import GUIDANCE, check_cond, check_network, check_output, per_sample, take, to_device
from mmf_fast.devices import choose_device, device_of
from mmf_fast.files import writing
from mmf_fast.models import load_pretrained
from mmf_fast.pictures import save_grid
from mmf_fast.registry import import_object

__all__ = ["Sampler", "draw_run", "evaluating", "noises_of", "sample", "sample_in_chunks"]

Sampler: TypeAlias = Literal["average", "euler", "consistency"]
DECODED = 16  # latents that a decoder gets at a time


@torch.no_grad()
def sample(
    net: Callable[..., Tensor],
    shape: Sequence[int],
    steps: int | Sequence[float] = 1,
    noise: Tensor | Sequence[Tensor] | None = None,
    *,
    sampler: Sampler = "average",
    seed: int | None = None,
    generator: torch.Generator | None = None,
    **cond: Any,
) -> Tensor:
    """Samples x (B, *shape) of an average-velocity network, from noise at t = 1 to data at t = 0.

        one step: x = e - u(e, 0, 1)

    net: u(z, r, t, **cond), called once for each step, in evaluation mode; the mode of every submodule is restored.
    shape: of the result, batch first.
    steps: how many, all equal; or the times themselves, from 1 down to 0, such as [1, 0.6, 0] or an array.
    noise: of that shape, floating point; the result has its dtype. Of "consistency", which draws anew before each
        further step, also a sequence: those draws in turn.
    sampler: what a step uses, see the top of this file. "average" needs all intervals asked for to have been trained;
        "consistency" those that end at the data alone; "euler" velocities alone.
    seed, generator: where the noise is drawn that is not given (float32, at most one of the two and of noise, by
        default torch's global generator). A seed draws on the CPU, so that it means the same noise on every device.
    cond: conditions such as y (B,) int64; tensors in them are moved to the device of the network. Of a network that is
        told its guidance omega, t_min, t_max, each (B,) or a number, which becomes (B,).

    Raises ValueError for steps below 1 or times that do not fall from 1 to 0, an unknown sampler, a noise of another
    shape, noise given twice, a network with another call, and an output that is no tensor like z.
    """
    if isinstance(shape, int):
        raise ValueError(f"shape is {shape}: give that of the result, batch first, such as ({shape}, 3, 32, 32)")
    shape = tuple(shape)
    check_network(net)
    given = {"noise": noise, "seed": seed, "generator": generator}
    check_cond(net, given | _given(steps, sampler), "sample")
    if (noise is not None) + (seed is not None) + (generator is not None) > 1:
        raise ValueError("give only one of noise, seed and generator: each of them decides the noise")
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
    return _integrated(net, noises_of(noise, shape, steps, sampler, generator), steps, sampler, cond)


@torch.no_grad()
def sample_in_chunks(
    net: Callable[..., Tensor],
    noise: Tensor | Sequence[Tensor],
    steps: int | Sequence[float] = 1,
    chunk: int | None = None,
    *,
    sampler: Sampler = "average",
    **cond: Any,
) -> Tensor:
    """`sample` from noise (N, *shape), `chunk` rows at a time; leaves of cond with N rows are cut as the noise is.

    By default a chunk has about a million numbers and at most 4,096 rows. Returns x on the device of the network.
    Raises ValueError as `sample` does.
    """
    check_network(net)
    check_cond(net, {"noise": noise} | _given(steps, sampler), "sample")
    shape = tuple(noise.shape if isinstance(noise, Tensor) else noise[0].shape)
    noises = noises_of(noise, shape, steps, sampler)
    count, size = shape[0], noises[0][0].numel()
    paths = per_sample(cond, count)
    parts = []
    for rows in torch.arange(count).split(chunk or min(4096, max(1, 2**20 // size))):
        part: dict[str, Any] = take(cond, rows, paths)
        parts.append(_integrated(net, [eps[rows] for eps in noises], steps, sampler, part))
    return torch.cat(parts)


def noises_of(
    noise: Tensor | Sequence[Tensor] | None,
    shape: tuple[int, ...],
    steps: int | Sequence[float],
    sampler: Sampler,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """The noise that each step begins with: one of `shape` for the first, and for every further one where the sampler
    draws anew. What `noise` does not hold is drawn. Raises ValueError as `sample` does.
    """
    evaluations = len(_times(steps)) - 1
    if sampler not in get_args(Sampler):
        raise ValueError(f"sampler is {sampler!r}: choose one of {', '.join(get_args(Sampler))}")
    given = [] if noise is None else [noise] if isinstance(noise, Tensor) else list(noise)
    count = evaluations if sampler == "consistency" else 1
    if len(given) > count:
        raise ValueError(f"noise has {len(given)} draws, but {evaluations} steps of {sampler!r} take {count}")
    for each in given:
        if tuple(each.shape) != shape:
            raise ValueError(f"noise has shape {tuple(each.shape)}, but shape is {shape}: they must agree")
    device = None if generator is None else generator.device
    return given + [torch.randn(shape, generator=generator, device=device) for _ in range(count - len(given))]


def _given(steps: Any, sampler: Sampler) -> dict[str, Any]:
    """What of these was given, for a network with conditions of these names."""
    default = isinstance(steps, int) and steps == 1
    return {"steps": None if default else steps, "sampler": sampler if sampler != "average" else None}


def _times(steps: int | Sequence[float]) -> list[float]:
    """The times of the points from noise to data."""
    steps = steps.tolist() if isinstance(steps, (Tensor, np.ndarray)) else steps
    if not isinstance(steps, Sequence):
        if steps < 1:
            raise ValueError(f"steps is {steps}: sampling needs at least 1 evaluation of the network")
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    times = [float(time) for time in steps]
    falling = all(later < earlier for earlier, later in itertools.pairwise(times))
    if not falling or times[:1] != [1.0] or times[-1:] != [0.0]:
        raise ValueError(f"steps are {times}: give a number of steps, or times that fall from 1 to 0, as [1, 0.6, 0]")
    return times


def _integrated(
    net: Callable[..., Tensor],
    noises: Sequence[Tensor],
    steps: int | Sequence[float],
    sampler: Sampler,
    cond: dict[str, Any],
) -> Tensor:
    """x at t = 0, from noises[0] at t = 1, by the steps written at the top of this file."""
    device = device_of(net)
    z = noises[0].to(device or noises[0].device)
    cond = to_device(told_rows(cond, len(z), z.device), z.device)
    time_dtype = torch.promote_types(z.dtype, torch.float32)  # half precision would move the times
    with evaluating(net):
        for step, (t, r) in enumerate(itertools.pairwise(_times(steps)), 1):
            end = {"average": r, "euler": t, "consistency": 0.0}[sampler]
            end_B, t_B = (z.new_full(z.shape[:1], time, dtype=time_dtype) for time in (end, t))
            u = check_output(net(z, end_B, t_B, **cond), z)
            if sampler == "consistency":
                x = z - t * u
                z = x if r == 0 else (1 - r) * x + r * noises[step].to(z)
            else:
                z = z - (t - r) * u
    return z


def told_rows(cond: Mapping[str, Any], count: int, device: torch.device) -> dict[str, Any]:
    """cond, its numbers that say how to guide as (B,) tensors, which is how training gives them."""
    numbers = {name: cond[name] for name in GUIDANCE if isinstance(cond.get(name), (int, float))}
    check_guidance(numbers)
    return {**cond, **{name: torch.full((count,), float(value), device=device) for name, value in numbers.items()}}


def check_guidance(told: Mapping[str, float]) -> None:
    """Raises ValueError for a scale below 1, or limits that do not rise within [0, 1]."""
    omega, t_min, t_max = (told.get(name, default) for name, default in zip(GUIDANCE, (1, 0, 1), strict=True))
    if not omega >= 1:
        raise ValueError(f"omega is {omega}: a scale of guidance is 1 (no guidance) or more")
    if not 0 <= t_min <= t_max <= 1:
        raise ValueError(f"t_min and t_max are {t_min} and {t_max}: the limits must rise within [0, 1]")


@contextmanager
def evaluating(net: Callable[..., Tensor]) -> Iterator[None]:
    """Evaluation mode; afterwards every submodule has its own mode again, frozen ones included."""
    modules = list(net.modules()) if isinstance(net, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


# ---- command line ----------------------------------------------------------------------------------------------------


def draw_run(
    run: str | Path,
    *,
    steps: int | Sequence[float] = 1,
    sampler: Sampler = "average",
    classes: Sequence[int] | None = None,
    count: int | None = None,
    seed: int = 0,
    device: str = "auto",
    net: nn.Module | None = None,
    decoder: Callable[[Tensor], Tensor] | None = None,
    normalized: bool = False,
    guidance: Mapping[str, float] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Samples x (N, *shape) of the network in a run folder, on the CPU, and their labels y (N,), None without classes.

    Latents come as the autoencoder of the training data knows them, unless `normalized` leaves them as the network
    draws them; decoder: (n, *shape) -> what it decodes them to, for instance images in [-1, 1].

    steps, sampler: as of `sample`.
    classes: the labels, repeated in turn up to `count`; by default all of them, or the first 10.
    count: by default 8 per class, 64 images without classes, 2,000 points of a toy.
    device: "auto" is CUDA where there is one.  net: takes the weights of the run, for a network of one's own.
    guidance: of GUIDANCE, for a network that is told it: {"omega": 2.5}.
    Raises ValueError for a missing or damaged run, an unknown class or device, steps or count below 1, samples that are
    not finite.
    """
    net, extra = load_pretrained(run, net)
    shape, num_classes = samples_of(net, extra, run)
    if classes and not num_classes:
        raise ValueError(f"the network of {run} has no classes: leave --classes out")
    for label in classes or ():
        if not 0 <= label < num_classes:
            raise ValueError(
                f"class {label} is unknown to the network of {run}: its classes are 0 to {num_classes - 1}"
            )
    labels = list(classes or range(min(num_classes, 10)))
    if count is None:
        count = 8 * len(labels) or (2000 if len(shape) == 1 else 64)
    if count < 1:
        raise ValueError(f"count is {count}: ask for at least 1 sample")
    net.to(choose_device(device))
    noise = noises_of(None, (count, *shape), steps, sampler, torch.Generator().manual_seed(seed))
    y = torch.tensor(labels)[torch.arange(count) % len(labels)] if labels else None
    cond: dict[str, Any] = dict(guidance or {}) | ({} if y is None else {"y": y})
    x = sample_in_chunks(net, noise, steps, sampler=sampler, **cond).cpu()
    if not torch.isfinite(x).all():
        raise ValueError(f"the network of {run} gives samples that are not finite: its training has diverged")
    if not normalized:
        x = _undo_normalization(x, extra, run)
    if decoder is not None:
        with torch.no_grad():
            x = torch.cat([decoder(part).float().cpu() for part in x.split(DECODED)])
    return x, y


def _undo_normalization(x: Tensor, extra: Mapping[str, Any], run: str | Path) -> Tensor:
    """Latents as they were before training normalised them; other samples as they are."""
    stated = extra.get("data")
    if not isinstance(stated, Mapping) or stated.get("name") != "latents":
        return x
    from mmf_fast.data import load  # sampling alone needs no dataset

    try:
        latents: Any = load(**stated)
        return latents.to_latents(x)
    except ValueError as error:
        raise ValueError(
            f"{run}: its samples are latents, and only the training set knows their mean and deviation: {error}; "
            "or pass --normalized to have them as the network draws them"
        ) from error


def samples_of(net: Any, extra: Mapping[str, Any], run: str | Path) -> tuple[tuple[int, ...], int]:
    """Shape of a sample and number of classes, as the network says, or else what was saved beside its weights."""
    shape = getattr(net, "shape", extra.get("shape"))
    if shape is None:
        raise ValueError(f"{run} does not say which shape its samples have: give the network an attribute `shape`")
    return tuple(shape), int(getattr(net, "num_classes", extra.get("num_classes")) or 0)


def network_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--net", metavar="MODULE:MAKE", help="network of one's own: the class or function that makes it"
    )


def sampler_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sampler",
        choices=get_args(Sampler),
        default="average",
        help="of a step: by the average velocity (default), by velocities alone (euler, for flow matching), or to the "
        "data and back (consistency, for networks that learned r = 0)",
    )


def guidance_options(parser: argparse.ArgumentParser) -> None:
    told = "of a network that was trained with a range of it"
    parser.add_argument("--omega", type=float, help=f"guidance scale, {told} (default: 1, no guidance)")
    parser.add_argument("--t-min", type=float, help=f"guidance from this t on, {told} (default: 0)")
    parser.add_argument("--t-max", type=float, help=f"guidance up to this t, {told} (default: 1)")


def guidance_of(options: argparse.Namespace) -> dict[str, float]:
    """What of GUIDANCE was given, taken out of the options. Raises ValueError as `check_guidance` does."""
    given = {name: value for name in GUIDANCE if (value := vars(options).pop(name)) is not None}
    check_guidance(given)
    return given


def import_made(path: str | None) -> Any:
    """What the function or class at an import path returns; nothing of None. Raises ValueError."""
    return None if path is None else import_object(path)()


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="mmf sample", description="Draw samples from a trained run.", allow_abbrev=False
    )
    result.add_argument("--run", type=Path, required=True, help="run folder with model.safetensors and model.json")
    result.add_argument("--out", type=Path, required=True, help=".png: a grid or scatter plot; .npz: arrays x, y")
    result.add_argument("--steps", type=int, default=1, help="evaluations of the network per sample (default: 1)")
    sampler_option(result)
    guidance_options(result)
    result.add_argument("--classes", type=int, nargs="+", metavar="LABEL", help="labels (default: the first 10)")
    result.add_argument("--count", type=int, help="samples in all (default: 8 per class, or 64 images, or 2000 points)")
    result.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    result.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    network_option(result)
    result.add_argument(
        "--decoder", metavar="MODULE:MAKE", help="of latents: what makes the function that turns them into images"
    )
    result.add_argument("--normalized", action="store_true", help="latents as the network draws them")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    out: Path = options.out
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out {out}: the name must end in .png or .npz")
    x, y = draw_run(
        options.run,
        steps=options.steps,
        sampler=options.sampler,
        classes=options.classes,
        count=options.count,
        seed=options.seed,
        device=options.device,
        net=import_made(options.net),
        decoder=import_made(options.decoder),
        normalized=options.normalized,
        guidance=guidance_of(options),
    )
    if out.suffix == ".png" and x.ndim == 4 and x.shape[1] not in (1, 3):
        raise ValueError(
            f"{out}: samples of {x.shape[1]} channels are no picture; if they are latents, pass --decoder MODULE:MAKE "
            "(what makes a function from latents to images), or --out FILE.npz"
        )
    if out.suffix == ".png":
        columns = len(options.classes) if options.classes else 0 if y is None else len(y.unique())
        save_grid(x, out, columns if columns > 1 else 8)
    else:
        arrays: dict[str, Any] = {"x": x.numpy()} | ({} if y is None else {"y": y.numpy()})
        with writing(out) as draft, open(draft, "wb") as file:
            np.savez_compressed(file, **arrays)
    print(f"{out}: {len(x)} samples, {options.steps} evaluation{'s' if options.steps > 1 else ''} of the network each")
