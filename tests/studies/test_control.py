"""The plant, its experts, and what counts as success."""

import numpy as np
import pytest

from studies import control


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_the_response_is_that_of_the_plant(rng):
    """One matrix for all actions agrees with stepping, and with constant acceleration: p = v t + a t^2 / 2."""
    starts, actions = rng.normal(size=(3, 4)), rng.normal(size=(3, control.HORIZON, 2))
    f, g = control.response()
    states, _ = control.rollout(starts, lambda k, x: actions[:, k])
    at_once = np.einsum("kij,nj->nki", f, starts) + np.einsum("kij,nj->nki", g, actions.reshape(3, -1))
    np.testing.assert_allclose(states, at_once, atol=1e-10)
    falling, _ = control.rollout(np.zeros((1, 4)), lambda k, x: np.array([[0.0, -2.0]]))
    time = control.DT * np.arange(control.HORIZON + 1)
    np.testing.assert_allclose(falling[0, :, 1], -(time**2), atol=1e-10)


def test_no_other_gain_costs_less_than_the_regulators(rng):
    starts, goals = rng.uniform(-1, 1, (5, 4)), rng.uniform(-1, 1, (5, 2))

    def spent(gain):
        states, actions = [starts], []
        a, b = control.plant()
        for _ in range(400):  # the regulator minimises the sum without end
            actions.append(-(states[-1] - control.rest(goals)) @ gain.T)
            states.append(states[-1] @ a.T + actions[-1] @ b.T)
        return control.cost("free", np.stack(states, 1), np.stack(actions, 1), goals)

    best = spent(control.gain())
    for _ in range(8):
        assert (spent(control.gain() + 0.05 * rng.normal(size=(2, 4))) > best).all()


def test_the_regulator_arrives_within_the_horizon(rng):
    problem = control.problems("free", rng, 1000)
    assert control.succeeded("free", problem.states, problem.goals).all()


def test_the_way_through_a_gate_meets_its_conditions_at_least_effort(rng):
    problem = control.problems("gates", rng, 50)
    middle = problem.states[:, control.HORIZON // 2, :2]
    np.testing.assert_allclose(middle[:, 0], 0, atol=1e-9)
    np.testing.assert_allclose(np.abs(middle[:, 1]), 0.5, atol=1e-9)
    np.testing.assert_allclose(problem.states[:, -1], control.rest(problem.goals), atol=1e-9)
    assert control.succeeded("gates", problem.states, problem.goals).all()
    f, g = control.response()
    equations = np.vstack([g[control.HORIZON // 2][:2], g[-1]])
    null = np.linalg.svd(equations)[2][len(equations) :]  # other actions that meet them too
    others = problem.actions.reshape(50, -1) + 0.1 * rng.normal(size=(50, len(null))) @ null
    assert (np.square(others).sum(1) > np.square(problem.actions).sum((1, 2))).all()


def test_the_mean_of_two_ways_hits_the_wall(rng):
    starts, goals = control.rest(np.array([[-0.9, 0.1]])), np.array([[0.9, -0.1]])
    both = [control.through_gate(starts, goals, np.array([gate]))[0] for gate in control.GATES]
    assert all(control.through_a_gate(states).all() for states in both)
    assert not control.through_a_gate(sum(both) / 2).any()


def test_a_gate_is_where_the_wall_is_open():
    def straight(y):
        return np.stack([[[-1, y, 0, 0], [1, y, 0, 0]]]).astype(float)

    assert [bool(control.through_a_gate(straight(y))[0]) for y in (-0.5, 0.35, 0.69, 0.0, 0.71, 5.0)] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    never = np.zeros((1, 3, 4)) - 1
    assert not control.through_a_gate(never)[0]


class Expert:
    """Plans as the regulator does."""

    def __call__(self, states, goals):
        states, actions = control.regulated(states, goals)
        return states[:, :-1], actions


@pytest.mark.parametrize("how", control.EXECUTIONS["free"])
def test_an_experts_plan_is_executed_at_the_experts_cost(how, rng):
    problem = control.problems("free", rng, 20)
    states, actions = control.execute(Expert(), problem, how)
    np.testing.assert_allclose(states, problem.states, atol=1e-9)
    np.testing.assert_allclose(actions, problem.actions, atol=1e-9)


class Wrong(Expert):
    """Actions that are a little too strong, beside right states."""

    def __call__(self, states, goals):
        states, actions = super().__call__(states, goals)
        return states, actions + 0.1


def test_feedback_corrects_what_an_open_loop_adds_up(rng):
    problem = control.problems("free", rng, 20)

    def miss(how):
        states, _ = control.execute(Wrong(), problem, how)
        return np.linalg.norm(states[:, -1, :2] - problem.goals, axis=1)

    assert (miss("open loop") > 0.5).all()  # 0.1 t^2 / 2 in each axis
    assert (miss("tracked") < 0.2).all() and (miss("replanned") < 0.3).all()
