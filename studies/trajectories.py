"""Trajectories of differential equations by one evaluation, given where they start: a damped pendulum and Lorenz 63.

The network makes the whole trajectory at once, as a sequence of T states. Where the start is known the trajectory is
too: then the velocity of flow matching, (z - x) / t for the one possible x, is constant along each path, one Euler step
of flow matching is exact regression, and nothing is left for an average velocity to do. Where the start is observed
with noise there are many trajectories, and one Euler step of flow matching gives their mean, which is none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.stats import wasserstein_distance
from torch import Tensor

from mmf_fast import Optimizer
from mmf_fast.data.dataset import Batch, Identity, Split, SplitName
from mmf_fast.models import DiT
from mmf_fast.sampling import sample_in_chunks
from studies.methods import EVALUATIONS, FLOW_MATCHING, METHODS, loss_of, sampler_of, steps_within, title
from studies.rows import Rows, Setting, compared, table
from studies.runner import Study, main
from studies.training import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH, FORWARDS = 64, 64 * 12000  # of one sample: 4,000 steps of flow matching
RATE = 4e-3  # at 0.001 no method had learned what the start says of Lorenz' trajectories
LENGTH = 64  # states of a trajectory, the start not among them
TRAINED, TESTED = 20_000, 256  # trajectories
ENSEMBLE = 8  # trajectories per observed start
MEASURE = {"known": "error", "observed": "score"}  # of what is drawn beside what came
STARTS = tuple(MEASURE)
SAVED = (1, 4, 8, 16, 24, 32, 40, 48, 56, 64)  # states whose error is kept


# ---- systems ---------------------------------------------------------------------------------------------------------


class System(NamedTuple):
    """derivative: of states (D, N) -> (D, N).  step: time between two states of a trajectory.
    starts: (rng, count) -> (count, D).  noise: deviation of an observed start.  energy: of states (..., D)."""

    names: tuple[str, ...]
    derivative: Callable[[np.ndarray], np.ndarray]
    step: float
    starts: Callable[[np.random.Generator, int], np.ndarray]
    noise: float
    energy: Callable[[np.ndarray], np.ndarray]


def pendulum(state: np.ndarray) -> np.ndarray:
    """theta'' = -sin(theta) - 0.1 theta'"""
    angle, speed = state
    return np.stack([speed, -np.sin(angle) - 0.1 * speed])


def lorenz(state: np.ndarray) -> np.ndarray:
    """Lorenz (1963) with sigma = 10, rho = 28, beta = 8 / 3."""
    x, y, z = state
    return np.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


def on_attractor(rng: np.random.Generator, count: int) -> np.ndarray:
    """Where random starts have come to after 20 units of time."""
    return solve(lorenz, rng.normal((0, 0, 25), 5, (count, 3)), np.array([20.0]))[:, 0]


def swung(rng: np.random.Generator, count: int) -> np.ndarray:
    """Any angle, and speeds at which some go over the top."""
    return rng.uniform((-np.pi, -2.5), (np.pi, 2.5), (count, 2))


SYSTEMS = {
    "pendulum": System(
        ("angle", "speed"), pendulum, 0.2, swung, 0.3, lambda s: s[..., 1] ** 2 / 2 + 1 - np.cos(s[..., 0])
    ),
    "lorenz": System(("x", "y", "z"), lorenz, 0.05, on_attractor, 1.0, lambda s: np.square(s).sum(-1) / 2),
}


def solve(derivative: Callable[[np.ndarray], np.ndarray], starts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The exact trajectories (N, T, D) from starts (N, D) at `times` (T,): Runge-Kutta of order 8 to 1e-9, together."""
    count, dim = starts.shape

    def stacked(t: float, state: np.ndarray) -> np.ndarray:
        return derivative(state.reshape(dim, count)).ravel()

    solution = solve_ivp(stacked, (0, times[-1]), starts.T.ravel(), method="DOP853", t_eval=times, rtol=1e-9, atol=1e-9)
    return solution.y.reshape(dim, count, len(times)).transpose(1, 2, 0)


def trajectories(system: System, starts: np.ndarray) -> np.ndarray:
    return solve(system.derivative, starts, system.step * np.arange(1, LENGTH + 1))


@cache
def training_set(name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts (N, D) and their trajectories (N, T, D), the same for every seed."""
    system = SYSTEMS[name]
    starts = system.starts(np.random.default_rng(0), count)
    return starts, trajectories(system, starts)


class Trajectories:
    """A dataset (`mmf_fast.data.Dataset`) of standardised trajectories (T, D), given their start, or what was seen of
    it: the start with noise that is drawn afresh for every batch."""

    num_classes = 0
    identity: Identity = {}

    def __init__(self, name: str, noisy: bool, seed: int, count: int = TRAINED) -> None:
        self.name, self.seed = name, seed
        starts, found = training_set(name, count)
        self.noise = SYSTEMS[name].noise if noisy else 0.0
        self.mean, self.std = found.mean((0, 1)), found.std((0, 1))
        self.starts, self.x = starts, torch.from_numpy((found - self.mean) / self.std).float()
        self.shape = tuple(self.x.shape[1:])

    def batch(self, step: int, size: int, rank: int = 0, world_size: int = 1) -> Batch:
        rng = np.random.default_rng((self.seed, step))
        rows = rng.integers(len(self.x), size=size)
        return self.x[rows], {"context": self.seen(self.starts[rows], rng)}

    def seen(self, starts: np.ndarray, rng: np.random.Generator) -> Tensor:
        """(N, D) -> the context of the network (N, D)"""
        observed = starts + self.noise * rng.standard_normal(starts.shape)
        return torch.from_numpy((observed - self.mean) / self.std).float()

    def split(self, name: SplitName) -> Split:
        return self.x, None


# ---- what is measured ------------------------------------------------------------------------------------------------


def energy_score(drawn: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How well ensembles (M, N, D) foretell what came (N, D): E|X - y| - E|X - X'| / 2 for each of N, least for the
    true law (Gneiting and Raftery, J. Am. Stat. Assoc. 102, 2007)."""
    members = len(drawn)
    away = np.linalg.norm(drawn - truth, axis=-1).mean(0)
    apart = sum(np.linalg.norm(drawn - one, axis=-1).sum(0) for one in drawn) / (members * (members - 1))
    return away - apart / 2


def residual(system: System, drawn: np.ndarray) -> float:
    """How far trajectories (..., T, D) are from solutions: the distance of each state from where the exact flow leads
    from the state before it, root mean square, over the same for a trajectory whose states are in random order."""
    flat = drawn.reshape(-1, *drawn.shape[-2:])[:256]
    before, after = flat[:, :-1].reshape(-1, flat.shape[-1]), flat[:, 1:].reshape(-1, flat.shape[-1])
    led = solve(system.derivative, before, np.array([system.step]))[:, 0]
    order = np.random.default_rng(0).permutation(len(after))
    return float(np.sqrt(np.square(led - after).sum(1).mean() / np.square(led - after[order]).sum(1).mean()))


def attractor_distance(system: System, drawn: np.ndarray, truth: np.ndarray, std: np.ndarray) -> float:
    """1-Wasserstein distance of each coordinate, in deviations of it, over all states: the mean over coordinates."""
    flat, exact = (each.reshape(-1, each.shape[-1]) / std for each in (drawn, truth))
    return float(np.mean([wasserstein_distance(a, b) for a, b in zip(flat.T, exact.T, strict=True)]))


def likely(
    starts: np.ndarray, found: np.ndarray, noise: float, observed: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Ensembles (M, N, T, D) of the true law given observed starts (N, D): of the trajectories `found` (L, T, D), each
    as often as its start (L, D) explains the observation. Importance sampling: these starts occur as any do."""
    rows = []
    for seen in observed:
        far = np.square(starts - seen).sum(1) / (2 * noise**2)
        weight = np.exp(far.min() - far)
        rows.append(rng.choice(len(starts), ENSEMBLE, p=weight / weight.sum()))
    return found[np.stack(rows, axis=1)]


# ---- the study -------------------------------------------------------------------------------------------------------


def network(dim: int) -> DiT:
    return DiT(LENGTH, channels=dim, patch_size=8, width=64, depth=3, heads=4, dims=1, context_dim=dim)


def run(setting: Setting, seed: int, quick: bool) -> Mapping[str, float]:
    torch.manual_seed(seed)
    name, noisy, method = setting["system"], setting["start"] == "observed", setting["method"]
    system, rng = SYSTEMS[name], np.random.default_rng((2, seed))
    count = 200 if quick else TRAINED
    data = Trajectories(name, noisy, seed, count)
    starts = system.starts(rng, 8 if quick else TESTED)
    truth = trajectories(system, starts)
    context = data.seen(starts, rng)
    if method == "true law":
        observed = context.double().numpy() * data.std + data.mean
        return figures_of("", system, likely(*training_set(name, count), data.noise, observed, rng), truth, data.std)

    loss_fn = loss_of(setting, network(len(system.names)))
    steps = 10 if quick else steps_within(loss_fn, BATCH, FORWARDS)
    net = train(loss_fn, data, steps=steps, batch=BATCH, seed=seed, optimizer=Optimizer(lr=RATE, schedule="cosine"))
    members = ENSEMBLE if noisy else 1
    noise = torch.randn(members * len(starts), *data.shape, generator=torch.Generator().manual_seed(seed))
    figures = {"steps": float(steps)}
    for evaluations in EVALUATIONS[method]:
        x = sample_in_chunks(net, noise, evaluations, sampler=sampler_of(setting), context=context.repeat(members, 1))
        drawn = x.double().numpy().reshape(members, *truth.shape) * data.std + data.mean
        figures |= figures_of(f"{evaluations}: ", system, drawn, truth, data.std)
    return figures


def figures_of(prefix: str, system: System, drawn: np.ndarray, truth: np.ndarray, std: np.ndarray) -> dict[str, float]:
    """Of ensembles (M, N, T, D) beside what came (N, T, D)."""
    energy, exact = system.energy(drawn).ravel(), system.energy(truth).ravel()
    figures = {
        "residual": residual(system, drawn),
        "attractor": attractor_distance(system, drawn, truth, std),
        "energy": wasserstein_distance(energy, exact) / exact.std(),
    }
    for state in SAVED:
        ensemble, came = drawn[:, :, state - 1] / std, truth[:, state - 1] / std
        if len(drawn) > 1:
            figures[f"score at {state}"] = energy_score(ensemble, came).mean()
        figures[f"error at {state}"] = np.sqrt(np.square(ensemble - came).mean())
    return {prefix + key: float(value) for key, value in figures.items()}


SETTINGS: tuple[dict[str, Any], ...] = (
    *({"system": name, "start": start, **method} for start in STARTS for name in SYSTEMS for method in METHODS),
    *({"system": name, "start": "observed", "method": "true law"} for name in SYSTEMS),
)


def answer(rows: Rows) -> str:
    tables, sentences = [], []
    for name in SYSTEMS:
        for start in STARTS:
            found, what = rows.where(system=name, start=start), MEASURE[start]
            late = f"{what} at {SAVED[-1]}"
            figures = (f"{what} at {SAVED[3]}", late, "residual", "attractor", "energy")
            lines = {label: [of.spread(prefix + figure) for figure in figures] for label, prefix, of in ways(found)}
            if lines:
                tables.append(table(f"{name}, start {start}", list(figures), lines))
            euler = found.where(**FLOW_MATCHING)
            for method in METHODS[1:]:
                if euler and (ours := found.where(**method)):
                    one, (first, last) = ours.spread(f"1: {late}"), (euler.spread(f"{n}: {late}") for n in (1, 32))
                    sentences.append(
                        f"- {name}, start {start}: the {late} of one evaluation of {title(method)} is {one:.3f}, "
                        f"{compared(one, first)} one Euler step of flow matching ({first:.3f}) and "
                        f"{compared(one, last)} 32 steps ({last:.3f}); residuals "
                        f"{ours.spread('1: residual'):.3f}, {euler.spread('1: residual'):.3f}, "
                        f"{euler.spread('32: residual'):.3f}."
                    )
    words = (
        "Where the start is known, one Euler step of flow matching is regression already, and there is nothing to "
        "gain; where it is observed with noise, the step gives a mean of trajectories, which is no trajectory."
    )
    return "\n\n".join([words if sentences else "", "\n".join(sentences), *tables])


def recommend(rows: Rows) -> str:
    """Where the full gradient is worth its cost."""
    clauses = []
    for name in SYSTEMS:
        none, full = (
            rows.spread(f"1: error at {SAVED[3]}", system=name, start="known", method="mmf_fast", lam=lam)
            for lam in (0.0, 1.0)
        )
        if full.below(none):
            clauses.append(
                f"for trajectories of {name} from a known start lambda 1 (error at state {SAVED[3]} of {LENGTH}: "
                f"{full:.2f}; {none:.2f} with lambda 0)"
            )
    return "; ".join(clauses)


def ways(found: Rows) -> list[tuple[str, str, Rows]]:
    """(label, prefix of its figures, rows) of every method and number of evaluations, and of the true law."""
    result = [
        (f"{title(setting)}, {count}", f"{count}: ", found.where(**setting))
        for setting in METHODS
        for count in EVALUATIONS[setting["method"]]
        if found.where(**setting)
    ]
    true = found.where(method="true law")
    return [*result, ("true law", "", true)] if true else result


def draw(rows: Rows) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, 2)
    shown = {"flow matching, 1": ("#8C8C8C", "--"), "flow matching, 32": ("#8C8C8C", "-"),
             "mmf_fast, lambda 0, 1": ("#4C72B0", "-"), "mmf_fast, lambda 1, 1": ("#C44E52", "-"),
             "true law": ("k", ":")}  # fmt: skip
    for line, name in zip(panels, SYSTEMS, strict=True):
        for axes, start in zip(line, STARTS, strict=True):
            what = MEASURE[start]
            for label, prefix, method in ways(rows.where(system=name, start=start)):
                if label in shown:
                    values = [method.spread(f"{prefix}{what} at {state}") for state in SAVED]
                    mean = np.array([each.mean for each in values])
                    bar = np.nan_to_num([each.deviation for each in values])
                    times = SYSTEMS[name].step * np.array(SAVED)
                    color, style = shown[label]
                    axes.plot(times, mean, color=color, ls=style, label=label)
                    axes.fill_between(times, mean - bar, mean + bar, color=color, alpha=0.2, lw=0)
            axes.set(title=f"{name}, start {start}", xlabel="time", yscale="log")
            axes.set_ylabel("energy score" if what == "score" else "error, in deviations")
            if axes.lines:
                axes.legend(fontsize=7)
    return figure


STUDY = Study(
    name="trajectories",
    title="Trajectories of differential equations",
    question="Can one evaluation give the trajectory of a system, or one of those that an observation allows?",
    settings=SETTINGS,
    run=run,
    rehearsal=(SETTINGS[0], SETTINGS[11], SETTINGS[-1]),
    seconds=lambda setting: 20 if setting["method"] == "true law" else 200,
    method=(
        f"{LENGTH} states at once of a damped pendulum (12.8 units of time, 20,000 starts at any angle) and of Lorenz "
        "63 (3.2 units, starts on the attractor), exact by scipy's DOP853 to 1e-9. start known: the network is given "
        "it. start observed: it is given the start with Gaussian noise (0.3 and 1.0), so that many trajectories are "
        f'possible; {ENSEMBLE} are drawn for each of {TESTED} observations. "true law": exact trajectories weighted by '
        "how well their starts explain the observation. error: root mean square in deviations of each coordinate, at "
        f"state n of {LENGTH}. score: the energy score E|X - y| - E|X - X'| / 2, which is least for the true law and "
        "punishes an ensemble that is only its mean. residual: distance of each state from where the exact flow leads "
        "from the one before it, over the same for states in random order (a true trajectory: 0). attractor, energy: "
        "1-Wasserstein distance of the coordinates and of the energy over all states, in deviations. A sequence DiT "
        "(width 64, 3 blocks, patches of 8 states) for every method, at equal cost (MeanFlowLoss.forwards: "
        f"{FORWARDS // BATCH // 3:,} steps of {BATCH} of flow matching), Adam at {RATE:g}, p = 0."
    ),
    recommend=recommend,
    draw=draw,
    answer=answer,
    doubt=(
        "Longer training and a larger network, where the error of a known start is the network's, not the method's; a "
        "longer horizon, over which the trajectory of Lorenz forgets its start altogether."
    ),
)

if __name__ == "__main__":
    main(STUDY)
