import json
import math
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from scipy.linalg import sqrtm
from scipy.stats import wasserstein_distance
from torch import nn

from mmf_fast import data, models
from mmf_fast.cli import main
from mmf_fast.data import ArrayDataset
from mmf_fast.evaluation.classifier import train_classifier
from mmf_fast.evaluation.distances import (
    frechet_distance,
    gaussian_frechet,
    nearest,
    precision_recall,
    sliced_wasserstein,
)
from mmf_fast.evaluation.samples import IMAGE_DRAWS, evaluate, evaluate_run, table

# ---- sliced Wasserstein ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(50, 50), (30, 47), (12, 36), (1, 5)])
def test_one_dimension_agrees_with_scipy(n, m):
    x, y = torch.randn(n, 1), 2 * torch.randn(m, 1) + 1
    expected = wasserstein_distance(x[:, 0].double().numpy(), y[:, 0].double().numpy())
    assert sliced_wasserstein(x, y, p=1) == pytest.approx(expected, rel=1e-12)
    assert sliced_wasserstein(y, x, p=1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_unequal_sizes_agree_with_copies_of_the_points(p):
    x, y = torch.randn(6, 2), torch.randn(4, 2) + 1
    copies = sliced_wasserstein(x.repeat(2, 1), y.repeat(3, 1), p=p)  # 12 points each: sorted and paired
    assert sliced_wasserstein(x, y, p=p) == pytest.approx(copies, rel=1e-12)


def test_a_translation_in_the_plane():
    """W_p along theta is |<theta, m>|, and <theta, m> = |m| cos(angle): SW_2 = |m| / sqrt(2), SW_1 = 2 |m| / pi."""
    x, shift = torch.randn(400, 2, dtype=torch.float64), torch.tensor([0.3, -0.4], dtype=torch.float64)
    assert sliced_wasserstein(x, x + shift, projections=20_000) == pytest.approx(0.5 / math.sqrt(2), rel=0.02)
    assert sliced_wasserstein(x, x + shift, p=1, projections=20_000) == pytest.approx(1 / math.pi, rel=0.02)
    assert sliced_wasserstein(x, x[torch.randperm(400)]) == pytest.approx(0, abs=1e-12)


def test_two_gaussians():
    """Every projection of N(0, s^2 I) is N(0, s^2), so SW_2(N(0, I), N(m, s^2 I))^2 = (1 - s)^2 + |m|^2 / D."""
    x, y = torch.randn(20_000, 3), 0.5 * torch.randn(20_000, 3) + torch.tensor([0.6, 0, 0])
    assert sliced_wasserstein(x, y) == pytest.approx(math.sqrt(0.25 + 0.12), rel=0.03)


def test_directions_depend_on_the_seed_only():
    x, y = torch.randn(50, 2), torch.randn(50, 2)
    assert sliced_wasserstein(x, y, seed=1) == sliced_wasserstein(x, y, seed=1) != sliced_wasserstein(x, y, seed=2)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 4), {}, "dimension 2 and 4"),
        (torch.zeros(0, 2), torch.zeros(3, 2), {}, "empty set"),
        (torch.full((3, 2), torch.nan), torch.zeros(3, 2), {}, "not finite"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"p": 0.5}, "p is 0.5"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"projections": 0}, "projections is 0"),
    ],
)
def test_sets_that_cannot_be_compared(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein(x, y, **options)


# ---- Frechet distance ------------------------------------------------------------------------------------------------


def test_diagonal_gaussians():
    """Independent coordinates: the sum of (m_a - m_b)^2 + (s_a - s_b)^2, also where a variance is zero."""
    mean_a, mean_b = np.array([0.0, 1, 2]), np.array([0.5, 1, -1])
    std_a, std_b = np.array([1.0, 0, 3]), np.array([2.0, 0.5, 0])
    expected = ((mean_a - mean_b) ** 2 + (std_a - std_b) ** 2).sum()
    assert gaussian_frechet(mean_a, mean_b, np.diag(std_a**2), np.diag(std_b**2)) == pytest.approx(expected, rel=1e-12)


def test_correlated_gaussians_agree_with_the_matrix_square_root():
    rng = np.random.default_rng(0)
    a, b = (factor @ factor.T for factor in rng.standard_normal((2, 8, 8)))
    expected = np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert gaussian_frechet(np.zeros(8), np.zeros(8), a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_transformed_samples():
    """x -> s x + m moves the Gaussian fitted to x by exactly |m + (s - 1) mean|^2 + (s - 1)^2 tr(cov)."""
    x, shift = torch.randn(40, 5, dtype=torch.float64) * torch.arange(5), torch.randn(5, dtype=torch.float64)
    expected = (shift + 0.5 * x.mean(0)).square().sum() + 0.25 * x.var(0).sum()
    assert frechet_distance(x, 1.5 * x + shift) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("x", "message"), [(torch.zeros(1, 3), "at least 2 samples"), (torch.zeros(4, 2), "dimension 2 and 3")]
)
def test_features_that_cannot_be_compared(x, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(x, torch.zeros(5, 3))


def test_nearest_neighbour():
    x, y = torch.randn(30, 1, 3, 3), torch.randn(20, 1, 3, 3)
    brute = np.array([[math.sqrt(float(((a.double() - b.double()) ** 2).sum())) for b in y] for a in x])
    distance, index = nearest(x, y)
    np.testing.assert_allclose(distance, brute.min(axis=1), rtol=1e-12)
    np.testing.assert_array_equal(index, brute.argmin(axis=1))


def test_the_nearest_of_many_that_are_close_is_exact():
    """Rows far from the origin that differ by less than float32 resolves there, and copies, whose distance is 0."""
    y = 1e3 + torch.cat([torch.randn(300, 5, dtype=torch.float64), 1e-3 * torch.randn(3, 5, dtype=torch.float64)])
    x = torch.cat([y[:40], y[260:] + 1e-4 * torch.randn(43, 5, dtype=torch.float64)])
    distance, index = nearest(x, y)
    brute = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    torch.testing.assert_close(distance, brute.values, rtol=1e-12, atol=0)
    assert torch.equal(index, brute.indices) and (distance[:40] == 0).all()


def test_precision_and_recall_by_hand():
    """Balls of the first nearest row: about 0, 1, 3 they reach 1, 1, 2; about 0.5, 9 they reach 8.5 both."""
    y, x = torch.tensor([[0.0], [1], [3]]), torch.tensor([[0.5], [9]])
    assert precision_recall(x, y, k=1) == (0.5, 1.0)
    assert precision_recall(y, x, k=1) == (1.0, 0.5)


def test_precision_and_recall_by_brute_force():
    x, y = torch.randn(300, 2, 2), 1.5 * torch.randn(270, 2, 2)

    def share(a, b, k):
        def distance(p, q):
            return math.sqrt(float(((p.double() - q.double()) ** 2).sum()))

        radius = [sorted(distance(p, q) for q in b)[k] for p in b]
        return np.mean([any(distance(p, q) <= reach for q, reach in zip(b, radius, strict=True)) for p in a])

    assert precision_recall(x, y, k=2) == pytest.approx((share(x, y, 2), share(y, x, 2)), abs=1e-12)


def test_missing_modes_cost_recall_and_bad_samples_precision():
    y = torch.cat([torch.randn(500, 2) - 20, torch.randn(500, 2) + 20])
    precision, recall = precision_recall(torch.randn(1000, 2) - 20, y)
    assert precision > 0.9 and 0.4 < recall < 0.5
    precision, recall = precision_recall(torch.cat([y[::2] + 1e-3, 100 + torch.randn(500, 2)]), y)
    assert 0.49 < precision < 0.51 and recall > 0.6


@pytest.mark.parametrize("k", [0, 3])
def test_balls_that_cannot_be(k):
    with pytest.raises(ValueError, match=f"k is {k}: it must lie between 1 and 2"):
        precision_recall(torch.zeros(3, 1), torch.zeros(5, 1), k)


# ---- points ----------------------------------------------------------------------------------------------------------


def test_points_of_known_distance():
    """u = -shift moves every standard normal point by `shift` in any number of steps."""
    x = torch.randn(2, 4000, 2)
    normal = ArrayDataset("normal", {"train": (x[0], None), "validation": (x[1], None)})
    result = evaluate(lambda z, r, t: torch.zeros_like(z) - torch.tensor([0.6, 0.8]), normal, steps=(1, 3))
    figures = result["figures"]["sliced_wasserstein"]
    assert figures["validation"] < 0.05
    assert figures["1"] == pytest.approx(1 / math.sqrt(2), rel=0.08)  # 256 directions, not all
    assert figures["3"] == pytest.approx(figures["1"], rel=1e-5)
    assert result["samples"] == 4000


@pytest.mark.parametrize("name", ["two_moons", "circles", "checkerboard", "eight_gaussians"])
def test_the_floor_of_the_toys(name):
    toy = data.load(name)
    assert 0 < sliced_wasserstein(toy.split("train")[0], toy.split("validation")[0]) < 0.03


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def classifier(digits):
    return train_classifier(digits)


def test_the_classifier_can_judge(digits, classifier):
    x, y = digits.split("validation")
    features, labels = classifier.judge(x)
    assert features.shape == (360, 64)
    assert (labels == y).double().mean() >= 0.97
    torch.testing.assert_close(classifier(x).argmax(1), labels)


def test_frechet_distance_in_its_features_sees_damage(digits, classifier):
    train, validation = (classifier.judge(digits.split(name)[0])[0] for name in ("train", "validation"))
    floor = frechet_distance(validation, train)
    x = digits.split("validation")[0]
    noisy = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    blurred = nn.functional.avg_pool2d(x, 3, 1, 1)
    collapsed = x[:36].repeat(10, 1, 1, 1)
    for damaged in (noisy, blurred, collapsed):
        assert frechet_distance(classifier.judge(damaged)[0], train) > 2 * floor


def test_the_classifier_is_the_same_at_every_call_and_draws_nothing_from_the_caller(digits):
    state = torch.get_rng_state()
    one, other = (train_classifier(digits, epochs=1).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)


class Oracle:
    """A "network" whose samples for label y are given images of class y + offset, in turn."""

    def __init__(self, x, y, offset=0):
        self.images = [x[y == (k + offset) % 10] for k in range(10)]

    def __call__(self, z, r, t, y):
        chosen = torch.empty_like(z)
        for k, images in enumerate(self.images):
            rows = (y == k).nonzero()[:, 0]
            chosen[rows] = images[torch.arange(len(rows)) % len(images)]
        return (z - chosen) / t[:, None, None, None]


@pytest.fixture
def judged(digits, classifier, monkeypatch):
    monkeypatch.setattr("mmf_fast.evaluation.samples.train_classifier", lambda dataset: classifier)
    return lambda net, folder=None: evaluate(net, digits, steps=(1,), folder=folder)


def test_validation_images_as_samples_get_the_validation_figures(digits, judged):
    result = judged(Oracle(*digits.split("validation")))
    assert result["samples"] == 360 * IMAGE_DRAWS
    for row in result["figures"].values():
        assert row["1"] == pytest.approx(row["validation"], rel=1e-4)
    assert result["figures"]["nearest_share"]["validation"] == pytest.approx(0.01, abs=0.005)
    assert result["classifier_accuracy"]["validation"] == result["figures"]["class_agreement"]["validation"]


def test_training_images_as_samples_are_recognised_as_memorised(digits, judged):
    figures = judged(Oracle(*digits.split("train")))["figures"]
    assert figures["nearest_share"]["1"] == 1
    assert figures["nearest_distance"]["1"] == pytest.approx(0, abs=1e-5)
    assert figures["class_agreement"]["1"] > 0.99
    assert figures["frechet_distance"]["1"] < figures["frechet_distance"]["validation"]


def test_samples_of_the_wrong_class_do_not_agree(digits, judged, tmp_path):
    figures = judged(Oracle(*digits.split("validation"), offset=1), tmp_path)["figures"]
    assert figures["class_agreement"]["1"] < 0.02
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation_nearest.png", "evaluation_samples.png"]


def test_images_without_labels_are_refused():
    x = torch.zeros(4, 1, 8, 8)
    unlabelled = ArrayDataset("clouds", {"train": (x, None), "validation": (x, None)})
    with pytest.raises(ValueError, match="dataset clouds has images without labels"):
        evaluate(lambda z, r, t: z, unlabelled)
    with pytest.raises(ValueError, match="dataset clouds has no labelled images"):
        train_classifier(unlabelled)


# ---- command line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    net = models.build("mlp", width=16, depth=1)
    models.save_pretrained(tmp_path, net, extra={"data": {"name": "circles", "factor": 0.4}, "step": 12})
    return tmp_path


def test_command(run, capsys):
    assert main(["evaluate", "--run", str(run), "--steps", "2", "1"]) == 0
    printed = capsys.readouterr().out
    saved = json.loads((run / "evaluation.json").read_text())
    figures = saved["figures"]["sliced_wasserstein"]
    assert (saved["data"], saved["step"], list(figures)) == ("circles", 12, ["validation", "1", "2"])
    assert table(saved) in printed
    assert f"{figures['1']:.4f}" in printed and f"{figures['validation']:.4f}" in printed
    # an untrained network has u = 0: its samples are the noise, as far from the data in any number of steps
    noise = torch.randn(10_000, 2, generator=torch.Generator().manual_seed(0))
    expected = sliced_wasserstein(noise, data.load("circles", factor=0.4).split("train")[0])
    assert figures["1"] == pytest.approx(expected, rel=1e-6) == figures["2"]
    for name in ("evaluation_field.png", "evaluation_arrows.png"):
        assert imread(run / name)[..., :3].std() > 0.01
    # in two steps of "consistency" half of that noise is another draw
    assert main(["evaluate", "--run", str(run), "--steps", "1", "2", "--sampler", "consistency"]) == 0
    saved = json.loads((run / "evaluation.json").read_text())
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(10_000, 2, generator=generator) for _ in range(2))
    mixed = sliced_wasserstein((first + second) / 2, data.load("circles", factor=0.4).split("train")[0])
    assert saved["sampler"] == "consistency"
    assert saved["figures"]["sliced_wasserstein"]["1"] == figures["1"]
    assert saved["figures"]["sliced_wasserstein"]["2"] == pytest.approx(mixed, rel=1e-5)


def test_the_data_of_a_run_take_other_options(run):
    """As data.validation=FOLDER, where the run had none, or data.path=FOLDER, where it has moved."""
    assert main(["evaluate", "--run", str(run), "data.factor=0.8", "--steps", "1", "data.noise=0.01"]) == 0
    figures = json.loads((run / "evaluation.json").read_text())["figures"]["sliced_wasserstein"]
    circles = data.load("circles", factor=0.8, noise=0.01)
    assert figures["validation"] == pytest.approx(
        sliced_wasserstein(circles.split("validation")[0], circles.split("train")[0]), rel=1e-6
    )
    models.save_pretrained(run, models.load_pretrained(run)[0], {})  # of data that have no name
    assert evaluate_run(run, (1,), pictures=False, overrides=["data=two_moons"])["data"] == "two_moons"


def test_other_options_of_the_data_need_the_extra_that_reads_them(run, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "mmf_fast.config", raising=False)
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    assert main(["evaluate", "--run", str(run), "data.factor=0.8"]) == 2
    assert "[train]" in capsys.readouterr().err


def spoil(run, what):
    net, extra = models.load_pretrained(run)
    if what == "extra":
        extra = {}
    if what == "data":
        extra["data"]["name"] = "circle"
    if what == "weights":
        nn.init.constant_(net.output.bias, torch.nan)
    models.save_pretrained(run, net, extra)
    if what == "missing":
        (run / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("what", "arguments", "message"),
    [
        ("extra", [], "does not name its data"),
        ("data", [], "unknown dataset 'circle'; did you mean 'circles'?"),
        ("weights", [], "not finite: its training has diverged"),
        ("missing", [], "model.safetensors is missing"),
        ("nothing", ["--steps", "0"], "steps are [0]"),
        ("nothing", ["--device", "tpu9"], "device 'tpu9'"),
        ("nothing", ["data.factr=0.5"], "unknown key data.factr; did you mean data.factor?"),
        ("nothing", ["data.factor=big"], "data.factor: must be float, is 'big'"),
        ("nothing", ["train.batch=3"], "unknown key train; valid keys: data"),
        ("nothing", ["data.factor"], "write it as key=value"),
        ("nothing", ["data.factor=0.5", "--data", "mmf_fast.data.digits:digits"], "leave it out, or --data"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(run, capsys, what, arguments, message):
    spoil(run, what)
    (run / "evaluation.json").write_text("old")
    status = main(["evaluate", "--run", str(run), *arguments])
    captured = capsys.readouterr()
    assert (status, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert captured.err.startswith("error: ") and message in captured.err
    assert (run / "evaluation.json").read_text() == "old"


def test_data_of_another_shape_than_the_network(run):
    models.save_pretrained(run, models.load_pretrained(run)[0], {"data": {"name": "digits"}})
    with pytest.raises(ValueError, match=r"shape \(2,\) and 0 classes, but digits has \(1, 8, 8\) and 10"):
        evaluate_run(run)


OWN = """
import torch
from mmf_fast.data import ArrayDataset
x, images, y = torch.randn(40, 2), torch.zeros(40, 1, 8, 8), torch.arange(40) % 3
def pair(): return x, y
def points(): return x
def trained(): return ArrayDataset("mine", {"train": (x, None)})
def unsaid(): return ArrayDataset("mine", {"train": (images, y), "validation": (images, y)})
def batches(): return [(images[:4], y[:4])]
"""


@pytest.mark.parametrize(
    ("net", "make", "message"),
    [
        ("mlp", "points", "tensor has no validation split: give one, ArrayDataset(name, {"),
        ("mlp", "trained", "mine has no validation split: give one, ArrayDataset(name, {"),
        ("mlp", "pair", "has shape (2,) and 0 classes, but tensor has (2,) and 3; give data of as many classes, if"),
        (
            "dit",
            "unsaid",
            "3 classes, but mine has (1, 8, 8) and 0; give data of as many classes, if your own as data.Arr",
        ),
        ("dit", "batches", "3 classes, but list has (4, 1, 8, 8) and 0; give the data it was trained with"),
    ],
)
def test_own_data_that_cannot_be_judged_is_one_line(net, make, message, tmp_path, monkeypatch, capsys):
    """What a Trainer takes, such as a pair of tensors, is taken, and what it lacks is named."""
    (tmp_path / "own_for_test_samples.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    options = {"input_size": 8, "channels": 1, "patch_size": 4, "num_classes": 3, "heads": 2}
    built = models.build(net, width=16, depth=1, **(options if net == "dit" else {}))
    models.save_pretrained(tmp_path, built, {"step": 1})
    assert main(["evaluate", "--run", str(tmp_path), "--data", f"own_for_test_samples:{make}", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
