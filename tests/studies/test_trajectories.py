"""Exact solutions, and the figures that compare ensembles with them, against closed forms."""

import numpy as np
import pytest

from studies import trajectories
from studies.rows import Rows
from studies.trajectories import SYSTEMS, energy_score, residual, solve


def test_solutions_of_an_oscillator_are_sines():
    times = np.array([0.3, 2.0, 11.0])
    starts = np.array([[1.0, 0.0], [0.0, 2.0], [-0.5, 0.5]])
    found = solve(lambda state: np.stack([state[1], -state[0]]), starts, times)
    position, speed = starts.T[:, :, None]
    np.testing.assert_allclose(found[:, :, 0], position * np.cos(times) + speed * np.sin(times), atol=1e-7)
    np.testing.assert_allclose(found[:, :, 1], speed * np.cos(times) - position * np.sin(times), atol=1e-7)


def test_trajectories_begin_one_step_after_their_start():
    system = SYSTEMS["pendulum"]
    starts = system.starts(np.random.default_rng(0), 3)
    found = trajectories.trajectories(system, starts)
    assert found.shape == (3, trajectories.LENGTH, 2)
    np.testing.assert_allclose(found[:, 0], solve(system.derivative, starts, np.array([system.step]))[:, 0], atol=1e-7)


def test_a_damped_pendulum_loses_energy_and_lorenz_keeps_to_its_attractor():
    rng = np.random.default_rng(0)
    for name, system in SYSTEMS.items():
        found = trajectories.trajectories(system, system.starts(rng, 20))
        if name == "pendulum":
            assert (np.diff(system.energy(found), axis=1) < 1e-9).all()
        else:
            assert (np.abs(found[..., 0]) < 25).all() and (found[..., 2] > 0).all() and (found[..., 2] < 55).all()


def test_the_energy_score_is_least_for_the_true_law():
    """y ~ N(0, 1): E|X - y| - E|X - X'| / 2 is 1 / sqrt(pi) for X ~ N(0, 1) and sqrt(2 / pi) for X = 0."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(4000, 1))
    scores = {deviation: energy_score(deviation * rng.normal(size=(8, 4000, 1)), truth) for deviation in (0, 0.5, 1, 2)}
    error = 3 / np.sqrt(4000)
    assert scores[1].mean() == pytest.approx(1 / np.sqrt(np.pi), abs=error)
    assert scores[0].mean() == pytest.approx(np.sqrt(2 / np.pi), abs=error)
    assert min(scores, key=lambda deviation: scores[deviation].mean()) == 1


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_residual_is_zero_for_solutions_and_one_for_states_without_order(name):
    system, rng = SYSTEMS[name], np.random.default_rng(0)
    exact = trajectories.trajectories(system, system.starts(rng, 30))
    assert residual(system, exact) < 1e-6
    shuffled = rng.permuted(exact.reshape(-1, exact.shape[-1]), axis=0).reshape(exact.shape)
    assert residual(system, shuffled) == pytest.approx(1, abs=0.1)


def test_what_is_likely_lies_around_what_was_seen(monkeypatch):
    """Starts uniform around 0: their posterior is the Gaussian of the observation's noise."""
    rng = np.random.default_rng(0)
    starts = rng.uniform(-3, 3, (200_000, 2))
    monkeypatch.setattr(trajectories, "ENSEMBLE", 4000)
    noise = 0.3
    drawn = trajectories.likely(starts, starts[:, None], noise, np.array([[0.5, -0.2]]), rng)
    assert drawn.shape == (4000, 1, 1, 2)
    np.testing.assert_allclose(drawn.mean((0, 1, 2)), [0.5, -0.2], atol=5 * noise / np.sqrt(4000))
    np.testing.assert_allclose(drawn.std((0, 1, 2)), noise, rtol=5 / np.sqrt(2 * 4000))


def test_the_full_gradient_is_advised_where_it_gains_beyond_the_error_bars():
    def rows(**errors):
        return Rows(
            {
                "setting": {"system": name, "start": "known", "method": "mmf_fast", "lam": lam},
                "seed": seed,
                "figures": {"1: error at 16": error + 0.01 * seed},
            }
            for name, of_both in errors.items()
            for lam, error in zip((0.0, 1.0), of_both, strict=True)
            for seed in range(3)
        )

    advice = trajectories.recommend(rows(pendulum=(0.10, 0.11), lorenz=(0.9, 0.5)))
    assert advice.startswith("for trajectories of lorenz from") and "0.51 ± 0.01; 0.91 ± 0.01" in advice
    assert trajectories.recommend(rows(pendulum=(0.1, 0.2), lorenz=(0.51, 0.5))) == ""
    assert trajectories.recommend(Rows()) == ""
