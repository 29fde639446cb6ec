"""Plans of a linear plant by one evaluation: start and goal are given, experts are optimal, the plans are executed.

The plant is a double integrator in the plane, state x = (position, velocity), action a = acceleration, held for dt:

    x_{k+1} = A x_k + B a_k,    A = [[1, dt], [0, 1]],  B = [dt^2 / 2, dt]    for each axis

"free": the expert is the linear-quadratic regulator that minimises sum_k |x_k - goal|_Q^2 + |a_k|_R^2, so there is
one best plan. "gates": a wall at 0 has two gates, and experts take either; of all actions that pass the middle of their
gate halfway and rest at the goal at the end they spend the least sum_k |a_k|^2. There are two good plans, and their
mean hits the wall. A plan (T, 6) is T states with the action taken in each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import solve_discrete_are
from torch import Tensor, nn

from mmf_fast import Optimizer, sample
from mmf_fast.data.dataset import Batch, Identity, Split, SplitName
from mmf_fast.models import DiT
from mmf_fast.sampling import Sampler
from studies.methods import EVALUATIONS, METHODS, loss_of, sampler_of, steps_within, title
from studies.rows import Rows, Setting, table
from studies.runner import Study, main
from studies.training import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH, FORWARDS = 64, 64 * 6000  # of one sample: 2,000 steps of flow matching
RATE = 4e-3  # as for trajectories
DT, HORIZON = 0.1, 40
STATE, ACTION = 4, 2
TARGET = 0.95  # success that is asked for
REACHED = 0.1  # of the goal, in distance and speed: success; the workspace is [-1, 1]^2
GATES, HALF_WIDTH = (-0.5, 0.5), 0.2  # middles of the gates along the wall, and half of what is open
EXECUTIONS = {"free": ("open loop", "tracked", "replanned"), "gates": ("open loop", "tracked")}
SETTINGS: tuple[dict[str, Any], ...] = tuple({"task": task, **method} for task in EXECUTIONS for method in METHODS)
EVERY = 8  # steps of a plan that are executed before the next one, where it is replanned


# ---- plant and experts -----------------------------------------------------------------------------------------------


@cache
def plant() -> tuple[np.ndarray, np.ndarray]:
    """A (4, 4), B (4, 2)"""
    eye = np.eye(2)
    return np.block([[eye, DT * eye], [0 * eye, eye]]), np.vstack([DT**2 / 2 * eye, DT * eye])


@cache
def costs() -> tuple[np.ndarray, np.ndarray]:
    """Q (4, 4), R (2, 2) of the regulator"""
    return np.diag([1.0, 1.0, 0.1, 0.1]), 0.05 * np.eye(ACTION)


@cache
def gain() -> np.ndarray:
    """K (2, 4) of the optimal a = -K (x - goal), from the discrete Riccati equation."""
    (a, b), (q, r) = plant(), costs()
    p = solve_discrete_are(a, b, q, r)
    return np.linalg.solve(r + b.T @ p @ b, b.T @ p @ a)


def rest(goals: np.ndarray) -> np.ndarray:
    """(N, 2) -> states (N, 4) that stand still there"""
    return np.concatenate([goals, np.zeros_like(goals)], axis=1)


def regulated(starts: np.ndarray, goals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The regulator's states (N, T + 1, 4) and actions (N, T, 2) from states (N, 4) to positions (N, 2)."""
    return rollout(starts, lambda k, x: -(x - rest(goals)) @ gain().T)


def rollout(starts: np.ndarray, policy: Callable[[int, np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """States (N, T + 1, 4) and actions (N, T, 2) of the plant under a = policy(k, x)."""
    a, b = plant()
    states, actions = [starts], []
    for k in range(HORIZON):
        actions.append(policy(k, states[-1]))
        states.append(states[-1] @ a.T + actions[-1] @ b.T)
    return np.stack(states, axis=1), np.stack(actions, axis=1)


@cache
def response() -> tuple[np.ndarray, np.ndarray]:
    """x_k = F_k x_0 + G_k a, with all actions in one row a: F (T + 1, 4, 4), G (T + 1, 4, 2 T)"""
    a, b = plant()
    f, g = [np.eye(STATE)], [np.zeros((STATE, ACTION * HORIZON))]
    for k in range(HORIZON):
        f.append(a @ f[-1])
        g.append(a @ g[-1])
        g[-1][:, ACTION * k : ACTION * (k + 1)] += b
    return np.stack(f), np.stack(g)


def through_gate(starts: np.ndarray, goals: np.ndarray, gates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """States (N, T + 1, 4) and actions (N, T, 2) of least sum |a|^2 that pass (0, gate) at T / 2 and rest at the goal
    at T: the least-norm solution of linear equations. gates: (N,)"""
    f, g = response()
    half = HORIZON // 2
    equations = np.vstack([g[half][:2], g[HORIZON]])  # of position halfway and state at the end
    points = np.stack([np.zeros_like(gates), gates], axis=1)
    wanted = np.concatenate([points - starts @ f[half][:2].T, rest(goals) - starts @ f[HORIZON].T], axis=1)
    actions = (wanted @ np.linalg.pinv(equations).T).reshape(-1, HORIZON, ACTION)
    return rollout(starts, lambda k, x: actions[:, k])


class Problem(NamedTuple):
    """starts (N, 4), goals (N, 2), and the expert's states (N, T + 1, 4) and actions (N, T, 2)."""

    starts: np.ndarray
    goals: np.ndarray
    states: np.ndarray
    actions: np.ndarray


def problems(task: str, rng: np.random.Generator, count: int) -> Problem:
    """Random starts and goals, and an expert's way. free: everywhere in the workspace, at speeds up to 1. gates: from
    rest on the left to the right, through either gate."""
    if task == "free":
        starts, goals = rng.uniform(-1, 1, (count, STATE)), rng.uniform(-1, 1, (count, 2))
        return Problem(starts, goals, *regulated(starts, goals))
    starts = rest(rng.uniform((-1, -0.8), (-0.8, 0.8), (count, 2)))
    goals = rng.uniform((0.8, -0.8), (1, 0.8), (count, 2))
    return Problem(starts, goals, *through_gate(starts, goals, rng.choice(GATES, count)))


class Demonstrations:
    """A dataset (`mmf_fast.data.Dataset`) of experts' plans (T, 6) in units of `scale`, given start and goal (6,)."""

    name, num_classes = "demonstrations", 0
    shape: tuple[int, ...] = (HORIZON, STATE + ACTION)
    identity: Identity = {}

    def __init__(self, task: str, seed: int, count: int) -> None:
        found = problems(task, np.random.default_rng((0, seed)), count)
        plans = np.concatenate([found.states[:, :-1], found.actions], axis=2)
        self.scale = torch.from_numpy(plans.std(axis=(0, 1))).float()
        self.plans = torch.from_numpy(plans).float() / self.scale
        self.context = torch.from_numpy(np.concatenate([found.starts, found.goals], axis=1)).float()
        self.seed = seed

    def batch(self, step: int, size: int, rank: int = 0, world_size: int = 1) -> Batch:
        rows = np.random.default_rng((1, self.seed, step)).integers(len(self.plans), size=size)
        return self.plans[rows], {"context": self.context[rows]}

    def split(self, name: SplitName) -> Split:
        return self.plans, None


# ---- plans, executed -------------------------------------------------------------------------------------------------


class Planner:
    """Plans by `evaluations` calls of a network, each from noise of its own."""

    def __init__(self, net: nn.Module, scale: Tensor, evaluations: int, sampler: Sampler, seed: int = 0) -> None:
        self.net, self.scale, self.evaluations, self.sampler = net, scale, evaluations, sampler
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, states: np.ndarray, goals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """From states (N, 4) and goals (N, 2): states (N, T, 4) and actions (N, T, 2)."""
        context = torch.from_numpy(np.concatenate([states, goals], axis=1)).float()
        noise = torch.randn(len(states), HORIZON, STATE + ACTION, generator=self.generator)
        options: dict[str, Any] = {"sampler": self.sampler, "context": context}
        plan = sample(self.net, tuple(noise.shape), self.evaluations, noise, **options) * self.scale
        return plan.double().numpy()[:, :, :STATE], plan.double().numpy()[:, :, STATE:]


def execute(plan: Planner, problem: Problem, how: str) -> tuple[np.ndarray, np.ndarray]:
    """States and actions of the plant. open loop: the actions of one plan. tracked: those, corrected by the regulator
    where the state leaves the planned one. replanned: the first steps of a plan, then another from where that led."""
    states, actions = plan(problem.starts, problem.goals)

    def policy(k: int, x: np.ndarray) -> np.ndarray:
        nonlocal states, actions
        if how == "replanned":
            if k and k % EVERY == 0:
                states, actions = plan(x, problem.goals)
            k = k % EVERY
        correction = (x - states[:, k]) @ gain().T if how == "tracked" else 0.0
        return actions[:, k] - correction

    return rollout(problem.starts, policy)


def succeeded(task: str, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """Whether the last state is at the goal and slow, and the way leads through a gate where there is a wall: (N,)"""
    at_goal = np.linalg.norm(states[:, -1, :2] - goals, axis=1) < REACHED
    slow = np.linalg.norm(states[:, -1, 2:], axis=1) < REACHED
    return at_goal & slow & (through_a_gate(states) if task == "gates" else True)


def through_a_gate(states: np.ndarray) -> np.ndarray:
    """Whether every crossing of the wall, the line x = 0, lies in a gate: (N,)"""
    x, y = states[:, :, 0], states[:, :, 1]
    crosses = (x[:, :-1] < 0) != (x[:, 1:] < 0)
    share = np.where(crosses, x[:, :-1] / np.where(crosses, x[:, :-1] - x[:, 1:], 1), 0)
    where = y[:, :-1] + share * (y[:, 1:] - y[:, :-1])
    open_ = np.min([np.abs(where - gate) for gate in GATES], axis=0) < HALF_WIDTH
    return np.all(open_ | ~crosses, axis=1) & crosses.any(axis=1)


def cost(task: str, states: np.ndarray, actions: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """What the experts of the task spend least of: (N,)"""
    q, r = costs()
    if task == "gates":
        return np.square(actions).sum(axis=(1, 2))
    away = states - rest(goals)[:, None]
    return np.einsum("nki,ij,nkj->n", away, q, away) + np.einsum("nki,ij,nkj->n", actions, r, actions)


def milliseconds(plan: Planner, problem: Problem, repeats: int) -> float:
    """For one plan at a time: the median."""
    taken = []
    for i in range(repeats):
        start = time.perf_counter()
        plan(problem.starts[i : i + 1], problem.goals[i : i + 1])
        taken.append(1000 * (time.perf_counter() - start))
    return float(np.median(taken))


# ---- the study -------------------------------------------------------------------------------------------------------


def network() -> DiT:
    return DiT(
        HORIZON, channels=STATE + ACTION, patch_size=4, width=64, depth=3, heads=4, dims=1, context_dim=STATE + 2
    )


def run(setting: Setting, seed: int, quick: bool) -> Mapping[str, float]:
    torch.manual_seed(seed)
    task = setting["task"]
    data = Demonstrations(task, seed, 200 if quick else 20_000)
    loss_fn = loss_of(setting, network())
    steps = 10 if quick else steps_within(loss_fn, BATCH, FORWARDS)
    net = train(loss_fn, data, steps=steps, batch=BATCH, seed=seed, optimizer=Optimizer(lr=RATE, schedule="cosine"))
    sampler = sampler_of(setting)

    test = problems(task, np.random.default_rng((2, seed)), 20 if quick else 1000)
    best = expert_cost(task, test)
    figures = {"steps": float(steps)}
    for evaluations in EVALUATIONS[setting["method"]]:
        for how in EXECUTIONS[task]:
            states, actions = execute(Planner(net, data.scale, evaluations, sampler, seed), test, how)
            name = f"{evaluations}, {how}"
            figures[f"{name}: success"] = float(succeeded(task, states, test.goals).mean())
            figures[f"{name}: cost"] = float(cost(task, states, actions, test.goals).sum() / best.sum())
        planner = Planner(net, data.scale, evaluations, sampler)
        figures[f"{evaluations}: ms"] = milliseconds(planner, test, 5 if quick else 100)
    return figures


def expert_cost(task: str, problem: Problem) -> np.ndarray:
    """Of the regulator, or of the better gate: (N,)"""
    if task == "free":
        return cost(task, problem.states, problem.actions, problem.goals)
    ways = [through_gate(problem.starts, problem.goals, np.full(len(problem.goals), gate)) for gate in GATES]
    return np.min([cost(task, states, actions, problem.goals) for states, actions in ways], axis=0)


def answer(rows: Rows) -> str:
    tables, sentences = [], []
    for task, ways in EXECUTIONS.items():
        of_task = rows.where(task=task)
        lines = {
            f"{title(method)}, {count}": [
                *(found.spread(f"{count}, {how}: {what}") for what in ("success", "cost") for how in ways),
                found.spread(f"{count}: ms"),
            ]
            for method in METHODS
            if (found := of_task.where(**method))
            for count in EVALUATIONS[method["method"]]
        }
        if lines:
            head = [f"{how}: {what}" for what in ("success", "cost") for how in ways]
            tables.append(table(f"{task}: method, evaluations", [*head, "ms a plan"], lines))
        for method in METHODS:
            if found := of_task.where(**method):
                reached, how = max((found.spread(f"1, {how}: success"), how) for how in ways)
                enough = "at least" if reached.mean >= TARGET else "less than"
                sentences.append(
                    f"{task}: one evaluation of {title(method)} reaches {reached:.3f} of the goals at best ({how}), "
                    f"{enough} the {TARGET:.2f} that are asked for."
                )
    leverage = (HORIZON * DT) ** 2 / 2
    sentences.append(
        f"In an open loop a constant error of the acceleration moves the end of the way by {leverage:g} times as much: "
        f"to end within {REACHED:g} it has to be below {REACHED / leverage:.3f}. Any feedback removes that."
    )
    return "\n\n".join([" ".join(sentences), *tables])


def draw(rows: Rows) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    for axes, (task, ways) in zip(figure.subplots(1, 2, sharey=True), EXECUTIONS.items(), strict=True):
        for setting, color in zip(METHODS, ("#8C8C8C", "#4C72B0", "#C44E52"), strict=True):
            found = rows.where(task=task, **setting)
            for how, style in zip(ways, ("-", "--", ":"), strict=False):
                if found:
                    counts = EVALUATIONS[setting["method"]]
                    values = [found.spread(f"{count}, {how}: success") for count in counts]
                    axes.errorbar(
                        counts, [100 * each.mean for each in values], color=color, ls=style, marker="o", ms=3,
                        yerr=100 * np.nan_to_num([each.deviation for each in values]), capsize=2,
                        label=f"{title(setting)}, {how}",
                    )  # fmt: skip
        axes.axhline(100 * TARGET, color="k", lw=0.5)
        axes.set(title=task, xscale="log", xlabel="evaluations of the network")
        axes.set_xticks((1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32))
    figure.axes[0].set_ylabel("success, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return figure


STUDY = Study(
    name="control",
    title="Plans of a linear plant",
    question="Does one evaluation give plans that reach their goal when they are executed?",
    settings=SETTINGS,
    run=run,
    rehearsal=(SETTINGS[1], SETTINGS[3]),
    seconds=lambda setting: 120,
    method=(
        "A double integrator in the plane (state: position and velocity, action: acceleration, steps of 0.1), plans of "
        f"{HORIZON} steps given start and goal, demonstrated by 20,000 plans of experts. free: linear-quadratic "
        "regulators from random states to random goals, so each task has one best plan. gates: least-effort control "
        "through one of two gates in a wall, taken at random, so there are two best plans and their mean hits the "
        "wall. 1,000 other starts and goals: success is to be within 0.1 of the goal at a speed below 0.1 after the "
        "last step, through a gate where there is a wall. open loop: the planned actions; tracked: corrected by the "
        f"regulator's gain where the state leaves the planned one; replanned: {EVERY} steps of a plan, then another "
        "from there. Cost: the sum over all starts over the sum of the best expert's. One sequence DiT (width 64, 3 "
        "blocks, patches of 4 steps) for every method, trained at equal cost (MeanFlowLoss.forwards), Adam at "
        f"{RATE:g}, p = 0; ms for one plan at a time on one core, which others used too."
    ),
    draw=draw,
    answer=answer,
    doubt=(
        "Longer training, since the error of a plan accumulates twice over in an open loop; limits on the actions; a "
        "plant that is unstable without control."
    ),
)

if __name__ == "__main__":
    main(STUDY)
