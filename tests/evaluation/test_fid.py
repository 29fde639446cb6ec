"""FID against scipy's formula on the same features, on one and two ranks, and from every kind of reference."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from support.archives import edm, pictures, write_zip
from torch import Tensor, nn

from mmf_fast import models
from mmf_fast.cli import main
from mmf_fast.data.formats import DataError
from mmf_fast.data.prepare import prepare
from mmf_fast.evaluation import fid
from mmf_fast.evaluation.distances import gaussian_frechet
from mmf_fast.evaluation.fid import Inception, evaluate_fid, to_uint8
from mmf_fast.evaluation.statistics import Statistics, Sums, read_statistics, write_statistics

ROOT = Path(__file__).parent.parent.parent
DIM = 12


class StandIn(nn.Module):
    """Called as NVlabs' Inception is: uint8 images in, features or (without return_features) something else out."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(dim, 3, 5, 5, generator=torch.Generator().manual_seed(7)))

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        if img.dtype != torch.uint8 or img.size(1) != 3:
            raise RuntimeError("images must be uint8 with 3 channels")
        x = nn.functional.conv2d(img.float() / 128 - 1, self.weight, stride=2)
        x = torch.relu(x).mean(dim=[2, 3])
        return x if return_features else x.softmax(1)


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pt"
    torch.jit.script(StandIn()).save(str(path))
    return path


def save_run(folder: Path, channels: int = 3, data: str = "images", num_classes: int = 4) -> Path:
    torch.manual_seed(0)
    net = models.build(
        "dit", input_size=8, channels=channels, patch_size=4, width=16, depth=1, heads=2, num_classes=num_classes
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    models.save_pretrained(folder, net, {"data": {"name": data}, "step": 5})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    write_statistics(path, statistics())
    return path


def statistics(dim: int = DIM, seed: int = 0) -> Statistics:
    x = np.random.default_rng(seed).normal(size=(3 * dim, dim))
    return Statistics(x.mean(0), np.cov(x, rowvar=False))


def by_scipy(features: np.ndarray, real: Statistics) -> float:
    """The formula as pytorch-fid and EDM write it."""
    mean, cov = features.mean(0), np.cov(features, rowvar=False)
    return float(((mean - real.mean) ** 2).sum() + np.trace(cov + real.cov - 2 * sqrtm(cov @ real.cov).real))


def test_sums_give_scipys_distance() -> None:
    """Features with a mean far above their spread, which sums of squares in float32 would lose."""
    features = 50 + torch.rand(500, DIM) * torch.linspace(0.1, 2, DIM)
    sums = Sums(DIM, torch.device("cpu"))
    for part in features.split(77):
        sums.add(part)
    found = sums.reduce()
    np.testing.assert_allclose(found.cov, np.cov(features.double().numpy(), rowvar=False), rtol=1e-6, atol=1e-9)
    other = Statistics(*(1.1 * part for part in found))
    value = gaussian_frechet(found.mean, other.mean, found.cov, other.cov)
    assert value == pytest.approx(by_scipy(features.double().numpy(), other), rel=1e-6)


def record(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The features that the evaluation sees, batch by batch."""
    seen: list[Tensor] = []
    real = Inception.__call__

    def call(self: Inception, images: Tensor) -> Tensor:
        seen.append(real(self, images))
        return seen[-1]

    monkeypatch.setattr(Inception, "__call__", call)
    return seen


def test_a_run_has_scipys_distance_of_its_own_features(
    run: Path, reference: Path, inception: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = record(monkeypatch)
    result = evaluate_fid(run, reference, inception, count=101, batch=16, seed=3)
    features = torch.cat(seen[1:]).double().numpy()  # the first call asks for the number of features
    assert features.shape == (101, DIM)
    assert result["fid"] == pytest.approx(by_scipy(features, statistics()), rel=1e-6)
    written = json.loads((run / "fid.json").read_text())
    assert written == result
    assert written["features"]["file"] == "inception.pt" and written["features"]["sha256"] == sha256sum(inception)
    assert written["reference"] == {"path": str(reference), "sha256": sha256sum(reference)}
    assert written["rounding"] == "round: trunc(127.5 x + 128)"
    assert [written[key] for key in ("samples", "steps", "seed", "ranks", "training_step")] == [101, 1, 3, 1, 5]


def sha256sum(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


def test_two_ranks_and_another_batch_give_the_same_figure(run: Path, reference: Path, inception: Path) -> None:
    options = ["--reference", str(reference), "--inception", str(inception), "--count", "37", "--device", "cpu"]
    whole = evaluate_fid(run, reference, inception, count=37, batch=64, device="cpu")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "mmf_fast", "fid", "--run-folder", str(run), *options, "--batch", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((run / "fid.json").read_text())
    assert found["ranks"] == 2 and found["batch"] == 5
    assert found["fid"] == pytest.approx(whole["fid"], rel=1e-6)
    assert done.stdout.count("FID") == 1 and f"FID {whole['fid']:.4f} of 37 samples" in done.stdout


@pytest.mark.parametrize("more", [{}, {"steps": 3, "sampler": "consistency"}], ids=["one step", "noise anew"])
def test_samples_depend_on_seed_and_number_alone(
    run: Path, inception: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    seen = record(monkeypatch)
    net, _ = models.load_pretrained(run)
    features = Inception(inception, torch.device("cpu"))

    def draw(**options: int) -> Tensor:
        seen.clear()
        fid.sample_statistics(net, features, **options, **more)
        return torch.cat(seen)

    first = draw(count=20, batch=7)
    torch.testing.assert_close(draw(count=30, batch=30)[:20], first, rtol=1e-5, atol=1e-6)
    assert (draw(count=20, batch=20, seed=1) - first).abs().min(dim=0).values.max() > 1e-3


def test_labels_are_balanced_and_every_sample_takes_the_steps_asked_for(run: Path, inception: Path) -> None:
    net, _ = models.load_pretrained(run)
    labels, calls = [], 0

    def spy(module: nn.Module, arguments: tuple, options: dict) -> None:
        nonlocal calls
        calls += 1
        labels.append(options["y"])

    net.register_forward_pre_hook(spy, with_kwargs=True)
    features = Inception(inception, torch.device("cpu"))
    fid.sample_statistics(net, features, count=22, batch=8)
    assert calls == 3 and torch.cat(labels).bincount().tolist() == [6, 6, 5, 5]
    calls = 0
    fid.sample_statistics(net, features, count=22, batch=8, steps=2)
    assert calls == 6


@pytest.mark.parametrize("level", [0, 1, 100, 127, 128, 254, 255])
def test_rounding(level: int) -> None:
    exact = torch.tensor([level / 127.5 - 1], dtype=torch.float64)
    above, below = exact + 0.4 / 127.5, exact - 0.4 / 127.5
    assert to_uint8(exact, "round") == to_uint8(above, "round") == to_uint8(below, "round") == level
    assert to_uint8(above, "floor") == level
    assert to_uint8(below, "floor") == max(level - 1, 0)


def test_rounding_to_the_nearest_undoes_the_scaling_of_the_data() -> None:
    images = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(images.float() / 127.5 - 1, "round"), images)


def test_the_rounding_changes_the_figure(run: Path, reference: Path, inception: Path) -> None:
    found = [evaluate_fid(run, reference, inception, count=20, rounding=rule)["fid"] for rule in ("round", "floor")]
    assert abs(found[0] - found[1]) > 1e-6


def test_one_channel_is_repeated(tmp_path: Path, reference: Path, inception: Path) -> None:
    run = save_run(tmp_path, channels=1, num_classes=0)
    assert evaluate_fid(run, reference, inception, count=20)["fid"] > 0
    grey = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    features = Inception(inception, torch.device("cpu"))
    assert torch.equal(features(grey), features(grey.repeat(1, 3, 1, 1)))


# ---- references ------------------------------------------------------------------------------------------------------


def pytorch_fid(path: Path, mean: np.ndarray, cov: np.ndarray) -> None:  # also clean-fid
    np.savez_compressed(path, mu=mean, sigma=cov)


def edm_npz(path: Path, mean: np.ndarray, cov: np.ndarray) -> None:  # also torch-fidelity
    np.savez(path, mu=mean, sigma=cov)


def adm(path: Path, mean: np.ndarray, cov: np.ndarray) -> None:
    samples = np.zeros((10, 8, 8, 3), np.uint8)
    np.savez(path, arr_0=samples, mu=mean, sigma=cov, mu_s=np.zeros(3), sigma_s=np.zeros((3, 3)))


def edm2(path: Path, mean: np.ndarray, cov: np.ndarray) -> None:
    dino = {"mu": np.zeros(3), "sigma": np.zeros((3, 3))}
    with open(path, "wb") as file:
        pickle.dump({"num_images": 50_000, "fid": {"mu": mean, "sigma": cov}, "fd_dinov2": dino}, file)


FORMATS = {pytorch_fid: "a.npz", edm_npz: "a.npz", adm: "a.npz", edm2: "a.pkl"}


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_is_read(write, tmp_path: Path) -> None:
    path = tmp_path / FORMATS[write]
    write(path, *statistics())
    found = read_statistics(path)
    for part, expected in zip(found, statistics(), strict=True):
        assert part.dtype == np.float64 and np.array_equal(part, expected)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_every_protocol_of_pickle_is_read(protocol: int, tmp_path: Path) -> None:
    mean, cov = statistics()
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"fid": {"mu": mean, "sigma": cov}}, protocol))
    assert np.array_equal(read_statistics(tmp_path / "a.pkl").cov, cov)


MEAN, COV = statistics()
POISONED = COV.copy()
POISONED[3, 4] = np.nan


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"mu": MEAN}, r"holds mu, not mu and sigma"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.uint8)}, "holds arr_0, not mu and sigma; pass statistics, not samples"),
        ({"mu": MEAN, "sigma": COV[:-1]}, r"sigma \(11, 12\), not \(D,\) and \(D, D\)"),
        ({"mu": MEAN[None], "sigma": COV}, r"mu has shape \(1, 12\)"),
        ({"mu": MEAN, "sigma": POISONED}, "sigma has values that are not finite"),
        ({"mu": MEAN * np.inf, "sigma": COV}, "mu has values that are not finite"),
        ({"mu": MEAN, "sigma": np.triu(COV)}, "sigma is not symmetric"),
        ({"mu": np.array(["a"] * DIM), "sigma": COV}, "mu is no array of numbers"),
    ],
)
def test_statistics_that_cannot_be_used_are_named(content: dict, words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **content)
    check(tmp_path / "bad.npz", words)
    with open(tmp_path / "bad.pkl", "wb") as file:
        pickle.dump({"fid": content}, file)
    if "mu" in content and content["mu"].dtype.kind == "f":
        check(tmp_path / "bad.pkl", words)


def check(path: Path, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_statistics(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_statistics(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple:
            return (exec, ("raise SystemExit('ran')",))

    np.savez(tmp_path / "cut.npz", mu=MEAN, sigma=COV)
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    (tmp_path / "damaged.npz").write_bytes(damaged)
    (tmp_path / "harmful.pkl").write_bytes(pickle.dumps({"fid": Harmful()}))
    (tmp_path / "dino.pkl").write_bytes(pickle.dumps({"fd_dinov2": {"mu": MEAN}}))
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], dtype=object), sigma=COV)
    for name, words in {
        "absent.npz": "No such file",
        "cut.npz": "damaged",
        "damaged.npz": "damaged",
        "harmful.pkl": "refused",
        "dino.pkl": "holds fd_dinov2, not fid",
        "objects.npz": "damaged",
    }.items():
        check(tmp_path / name, words)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    images = pictures(41, side=8)
    prepare(write_zip(folder / "set.zip", edm(images, [i % 4 for i in range(41)])), folder / "prepared")
    return folder / "prepared"


def test_statistics_of_a_prepared_set_are_computed_and_kept(
    run: Path, prepared: Path, inception: Path, tmp_path: Path
) -> None:
    result = evaluate_fid(run, prepared, inception, count=20, batch=6, save_reference=tmp_path / "kept.npz")
    images = torch.from_numpy(pictures(41, side=8))
    features = StandIn()(images, return_features=True).double().numpy()
    kept = np.load(tmp_path / "kept.npz")
    np.testing.assert_allclose(kept["mu"], features.mean(0), rtol=1e-6)
    np.testing.assert_allclose(kept["sigma"], np.cov(features, rowvar=False), rtol=1e-5, atol=1e-8)
    assert result["reference"] == {"path": str(prepared), "sha256": sha256sum(prepared / "samples.npy")}
    again = evaluate_fid(run, tmp_path / "kept.npz", inception, count=20)
    assert again["fid"] == pytest.approx(result["fid"])
    assert again["reference"]["sha256"] == sha256sum(tmp_path / "kept.npz")


# ---- errors of the command line --------------------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["fid", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def test_without_weights_the_error_names_the_file_to_bring(
    run: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = fails(capsys, "--run", run, "--reference", reference)
    assert "inception-2015-12-05.pt: missing; bring" in message and "nothing is downloaded" in message


def test_what_does_not_fit_is_one_line(
    run: Path,
    reference: Path,
    prepared: Path,
    inception: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Other(nn.Module):
        def forward(self, img: Tensor) -> Tensor:
            return img

    torch.jit.script(Other()).save(str(tmp_path / "other.pt"))
    (tmp_path / "text.pt").write_text("no network")
    write_statistics(tmp_path / "wide.npz", statistics(20))
    latents, grey = save_run(tmp_path / "latents", data="latents"), save_run(tmp_path / "grey", channels=1)
    four = save_run(tmp_path / "four", channels=4)
    base = {"--run": run, "--reference": reference, "--inception": inception, "--count": 4}
    for change, words in (
        ({"--inception": tmp_path / "text.pt"}, "text.pt: is no TorchScript file"),
        ({"--inception": tmp_path / "other.pt"}, "cannot be called as net(images, return_features=True)"),
        ({"--reference": tmp_path / "wide.npz"}, "has 20 features"),
        ({"--reference": tmp_path}, "is no prepared set"),
        ({"--run": grey, "--reference": prepared}, "shape (3, 8, 8), the network draws (1, 8, 8)"),
        ({"--run": latents}, "decode them to images first"),
        ({"--run": four}, "1 or 3 channels"),
        ({"--run": tmp_path / "absent"}, "model.safetensors is missing"),
        ({"--count": 1}, "count 1"),
        ({"--batch": 0}, "batch 0"),
        ({"--device": "nonsense"}, "nonsense"),
        ({"--save-reference": tmp_path / "x.npz"}, "is a file of statistics"),
        ({"--reference": prepared, "--save-reference": tmp_path / "x.txt"}, "written as .npz"),
    ):
        options = [part for pair in (base | change).items() for part in pair]
        assert words in fails(capsys, *options)


def test_a_network_that_diverged_is_an_error(
    tmp_path: Path, reference: Path, inception: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "run")
    net, extra = models.load_pretrained(run)
    with torch.no_grad():
        next(net.parameters()).fill_(torch.nan)
    models.save_pretrained(run, net, extra)
    message = fails(capsys, "--run", run, "--reference", reference, "--inception", inception, "--count", 4)
    assert "not finite" in message
    assert not (run / "fid.json").exists()
