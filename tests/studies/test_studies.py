"""The studies: every one runs from end to end, its page is what its rows make, and a killed one goes on."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from mmf_fast import MeanFlowLoss, Optimizer, Train
from mmf_fast.models import MLP
from studies import STUDIES, report
from studies.mixture import one_step_error, three_gaussians
from studies.rows import Rows, Setting, Spread, cheapest, compared, table
from studies.runner import Study, all_studies, go_on, main, missing, read, rehearse
from studies.training import sgd_engine

SETTINGS = [{"lam": 0.0}, {"lam": 1.0, "curve": "linear"}]


class Stopped(Exception):
    pass


def study(calls: list[tuple[float, int]], stop_after: int = 99, **options: object) -> Study:
    """Its one figure is lambda + seed; it is killed in the run after `stop_after` others."""

    def run(setting: Setting, seed: int, quick: bool) -> Mapping[str, float]:
        if len(calls) == stop_after:
            raise Stopped
        calls.append((setting["lam"], seed))
        return {"error": setting["lam"] + seed}

    found = Study(
        name="made_up", title="Made up", question="Why?", settings=SETTINGS, run=run, seconds=lambda setting: 30.0,
        method="None.", draw=lambda rows: pytest.fail("not drawn"), doubt="Much.",
        answer=lambda rows: f"It is {rows.spread('error', lam=1.0):.1f}.",
    )  # fmt: skip
    return dataclasses.replace(found, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs_from_end_to_end(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = (each for each in all_studies() if each.name == name)
    rehearse(found)
    text = capsys.readouterr().out
    assert found.title in text and found.question in text
    assert all(f" seed {seed}:" in text for seed in (0, 1))
    assert all(found.seconds(setting) <= 3600 for setting in found.settings)  # no run of more than an hour
    assert all(setting == json.loads(json.dumps(setting)) for setting in found.settings)
    assert all(found.settings.count(setting) == 1 for setting in found.settings)


def test_the_page_is_what_the_rows_make() -> None:
    """python -m studies.report writes it again."""
    assert report.PAGE.read_text() == report.page()
    for found in all_studies():
        assert (report.FIGURES / f"{found.name}.png").exists() == bool(read(found))


def test_a_study_that_was_killed_goes_on(tmp_path: Path) -> None:
    calls: list[tuple[float, int]] = []
    with pytest.raises(Stopped):
        go_on(study(calls, stop_after=3), folder=tmp_path)
    assert calls == [(0.0, 0), (0.0, 1), (0.0, 2)]  # so that what is there has error bars
    rows = read(study(calls), tmp_path)
    assert len(rows) == 3 and len(missing(study(calls), rows)) == 3
    assert "**3 of 6 runs are missing.**" in report.chapter(study([]), rows)
    rows = go_on(study(calls), folder=tmp_path)
    assert calls[3:] == [(1.0, 0), (1.0, 1), (1.0, 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["made_up.json"]
    text = report.chapter(study([]), rows)
    assert "missing" not in text and "It is 2.0 ± 1.0." in text and "3 seeds" in text
    row = rows[0]
    assert row["torch"] == torch.__version__ and row["device"] and row["commit"] and row["seconds"] >= 0
    assert go_on(study(calls), folder=tmp_path) == rows and len(calls) == 6


def test_no_run_starts_when_the_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go_on(study([]), minutes=0, folder=tmp_path) == []
    assert "6 runs are left" in capsys.readouterr().out


def test_rows_of_another_process_are_kept(tmp_path: Path) -> None:
    outer = study([])

    def run(setting: Setting, seed: int, quick: bool) -> Mapping[str, float]:
        if (setting["lam"], seed) == (0.0, 0):
            go_on(study([], settings=SETTINGS[1:]), folder=tmp_path)
        return {"error": 0.0}

    go_on(dataclasses.replace(outer, run=run), folder=tmp_path)
    assert len([row for row in read(outer, tmp_path) if row["figures"] == {"error": 1.0 + row["seed"]}]) == 3


def test_the_list_says_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    main(study([]), ["--list"])
    text = capsys.readouterr().out
    assert "0 of 3 done,   30 s a run: lam 1.0, curve linear" in text and "6 runs to do, about 3.0 minutes" in text


def test_a_run_that_diverged_is_told_as_such(tmp_path: Path) -> None:
    rows = go_on(study([], run=lambda setting, seed, quick: {"error": math.nan}), folder=tmp_path)
    assert json.loads((tmp_path / "made_up.json").read_text())[0]["figures"] == {"error": None}
    assert f"{rows.spread('error', lam=1.0):.3f}" == "diverged"


def test_spreads() -> None:
    rows = Rows(
        {"setting": {"lam": 0.0, "p": p}, "figures": {"a": a, "b": 1.0}} for p, a in ((0, 1.0), (0, 3.0), (1, 9))
    )
    assert rows.spread("a", p=0) == Spread(2.0, 2**0.5, 2)
    assert f"{rows.spread('a', p=0):.2f}" == "2.00 ± 1.41"
    assert f"{rows.spread('a', p=1):.2f}" == "9.00 (one seed)"
    assert f"{rows.spread('a', p=2):.2f}" == "not run yet"
    assert rows.spread(lambda figures: figures["a"] + figures["b"], lam=0.0, p=0).mean == 3.0
    low, high = Spread(1.0, 0.4, 3), Spread(2.0, 0.5, 3)
    assert low.below(high) and not high.below(low) and not low.below(Spread(1.5, 0.2, 3))
    assert not rows.spread("a", p=0).below(rows.spread("a", p=1))  # of one seed nobody knows the deviation
    assert (compared(low, high), compared(high, low)) == ("less than", "more than")
    assert compared(low, low) == "within the error bars of"
    assert low.below(Spread(math.inf, math.nan, 3))
    assert cheapest({"a": high, "b": Spread(1.5, 0.2, 3), "c": low, "d": Spread(0.5, math.nan, 1)}) == "b"
    assert cheapest({"a": Spread(0.5, math.nan, 1)}) is None
    assert table("x", ["a"], {"y": [low]}) == "| x | a |\n|---|---|\n| y | 1.000 ± 0.400 |"


# ---- the mixture -----------------------------------------------------------------------------------------------------


def test_the_velocity_is_the_mean_of_the_conditional_one() -> None:
    """E[(v(z, t) - v) f(z)] = 0 for any f, over many draws."""
    data = three_gaussians(dim=3)
    x, noise = torch.randn(2, 200_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = data.means[torch.arange(len(x)) % 10 // 5 + (torch.arange(len(x)) % 10 > 7).long()] + 0.3 * x  # 5, 3, 2 of 10
    for t in (0.1, 0.5, 0.9):
        z, v = (1 - t) * x + t * noise, noise - x
        for f in (z, z.sin(), (z.sum(1, keepdim=True) > 0).double()):
            off = (data.velocity(z, t) - v) * f
            assert (off.mean(0).abs() < 5 * off.std(0) / len(x) ** 0.5).all()


def test_the_flow_takes_noise_to_the_data() -> None:
    data = three_gaussians()
    noise = torch.randn(5_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = data.flow(noise, 1.0, 0.0, steps=100)
    assert (x - data.flow(noise, 1.0, 0.0, steps=200)).abs().max() < 1e-4
    nearest = torch.cdist(x, data.means).min(1)
    share = torch.bincount(nearest.indices) / len(x)
    assert torch.allclose(share.double(), data.weights, atol=4 * (0.25 / len(x)) ** 0.5)
    assert float(nearest.values.square().mean() / 2) == pytest.approx(0.3**2, rel=0.03)
    back = data.flow(x, 0.0, torch.ones(len(x)), steps=100)
    assert (back - noise).abs().max() < 1e-2


def test_the_error_is_that_of_the_exact_map() -> None:
    data = three_gaussians()

    def net(z: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return z + 0.5 - data.flow(z.double(), t, r).float()

    assert one_step_error(net, data) == pytest.approx(0.5, abs=1e-5)


def test_in_more_dimensions_the_map_in_the_plane_is_the_same() -> None:
    noise = torch.randn(100, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = three_gaussians(dim=4, outside=0.05).flow(noise, 1.0, 0.0)
    torch.testing.assert_close(x[:, :2], three_gaussians().flow(noise[:, :2], 1.0, 0.0))
    torch.testing.assert_close(x[:, 2:], 0.05 * noise[:, 2:])  # of one Gaussian: a scaling
    data, h = three_gaussians(dim=4, outside=0.05), 1e-4
    slope = (data.flow(noise, 0.5, 0.5 + h) - data.flow(noise, 0.5, 0.5 - h)) / (2 * h)
    torch.testing.assert_close(slope, data.velocity(noise, 0.5), rtol=1e-6, atol=1e-6)


def test_finite_data_are_the_same_points_for_every_seed() -> None:
    batches = [three_gaussians(seed=seed, count=5).batch(3, 64)[0] for seed in (0, 1)]
    assert len(batches[0].unique(dim=0)) == len(torch.cat(batches).unique(dim=0)) == 5
    assert not batches[0].equal(batches[1])
    assert batches[0][:32].equal(three_gaussians(count=5).batch(3, 64, 0, 2)[0])


def test_sgd_is_gradient_descent_with_momentum() -> None:
    """v <- 0.9 v + g, theta <- theta - lr v, not AdamW."""
    net = MLP(2, width=8, depth=1)
    engine = sgd_engine(MeanFlowLoss(net), Optimizer(lr=0.1, warmup=0, clip=0.0), Train(batch=16, device="cpu"))
    theta, grads = net.input.weight, list[torch.Tensor]()
    theta.register_hook(grads.append)
    with torch.no_grad():
        net.output.weight.normal_()  # it starts at zero, and nothing before it would have a gradient
    expected, v = theta.detach().clone(), torch.zeros_like(theta)
    for step in range(3):
        engine.step(torch.randn(16, 2), step)
        v = 0.9 * v + grads[step]
        expected -= 0.1 * v
    torch.testing.assert_close(theta.detach(), expected, rtol=1e-5, atol=1e-6)
