import errno
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from support.archives import npy, write_folder
from torch import nn

from mmf_fast import models, sampling
from mmf_fast.cli import main
from mmf_fast.data import load
from mmf_fast.data.prepare import prepare
from mmf_fast.pictures import save_rows, writing
from mmf_fast.sampling import sample, sample_in_chunks, save_grid


def gaussian_flow(mean, std):
    """The exact average velocity u(z, r, t) of the path from N(mean, std^2) to N(0, 1).

    Its flow map is z_r = (1-r) mean + s_r / s_t (z_t - (1-t) mean) with s_t^2 = (1-t)^2 std^2 + t^2, for any r < t.
    """

    def spread(t):
        return ((1 - t) ** 2 * std**2 + t**2).sqrt()

    def u(z, r, t):
        r, t = r.double()[:, None], t.double()[:, None]
        z_r = (1 - r) * mean + spread(r) / spread(t) * (z - (1 - t) * mean)
        return (z - z_r) / (t - r)

    return u


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_the_exact_average_velocity_gives_the_exact_map_in_any_number_of_steps(steps):
    noise = torch.randn(64, 3, dtype=torch.float64)
    x = sample(gaussian_flow(1.5, 0.3), noise.shape, steps, noise)
    torch.testing.assert_close(x, 1.5 + 0.3 * noise, atol=1e-12, rtol=1e-12)


def test_times_run_from_noise_to_data_in_equal_steps():
    seen = []

    def net(z, r, t):
        assert r.dtype == t.dtype == torch.float32 and r.shape == t.shape == (5,)
        seen.append((r.unique().item(), t.unique().item()))
        return torch.zeros_like(z)

    noise = torch.randn(5, 2, dtype=torch.bfloat16)
    assert torch.equal(sample(net, (5, 2), 4, noise), noise)
    assert seen == [(0.75, 1.0), (0.5, 0.75), (0.25, 0.5), (0.0, 0.25)]


def test_every_sampler_asks_the_network_for_what_it_knows_and_steps_as_written():
    """A network that is only asked for the times it knows: u(z, r, t) = f(z) g(r, t), the step by its formula."""
    noise = [torch.randn(6, 2, dtype=torch.float64) for _ in range(3)]
    times, asked = [1.0, 0.6, 0.25, 0.0], []

    def net(z, r, t):
        asked.append((r[0].item(), t[0].item()))
        return torch.sin(z) * (1 + r + 2 * t)[:, None]

    def u(z, r, t):
        return torch.sin(z) * (1 + r + 2 * t)

    pairs = list(zip(times, times[1:], strict=False))
    average = euler = consistency = noise[0]
    for i, (t, r) in enumerate(pairs):
        average = average - (t - r) * u(average, r, t)
        euler = euler - (t - r) * u(euler, t, t)
        x = consistency - t * u(consistency, 0, t)
        consistency = (1 - r) * x + (r * noise[i + 1] if i < 2 else 0)
    for name, expected, ends in (
        ("average", average, times[1:]),
        ("euler", euler, times[:-1]),
        ("consistency", consistency, [0.0, 0.0, 0.0]),
    ):
        given = noise if name == "consistency" else noise[0]
        torch.testing.assert_close(sample(net, (6, 2), times, given, sampler=name), expected)
        torch.testing.assert_close(sample_in_chunks(net, given, times, 4, sampler=name), expected)
        torch.testing.assert_close(sample(net, (6, 2), np.array(times), given, sampler=name), expected)
        assert asked[:3] == list(zip(ends, times[:-1], strict=True))
        asked.clear()


def test_a_consistency_sampler_of_the_exact_maps_draws_from_the_data_in_any_number_of_steps():
    """To the data and back to a law of the path: the law of x is that of the data, N(1.5, 0.3^2) in each element."""
    x = sample(gaussian_flow(1.5, 0.3), (40_000, 1), [1, 0.8, 0.3, 0.1, 0], seed=0, sampler="consistency")
    assert abs(x.mean() - 1.5) < 5 * 0.3 / 200 and abs(x.std() / 0.3 - 1) < 5 / 283  # 5 standard errors
    assert torch.equal(
        x, sample(gaussian_flow(1.5, 0.3), x.shape, [1, 0.8, 0.3, 0.1, 0], seed=0, sampler="consistency")
    )


class Probe(nn.Module):
    """u = weight * z * (1 + y); remembers the modes it was called in, and can fail."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.trained, self.frozen = nn.Dropout(), nn.Dropout().eval()
        self.modes, self.fails = set(), False

    def forward(self, z, r, t, y=None):
        self.modes.add((self.training, self.trained.training, torch.is_grad_enabled()))
        if self.fails:
            raise RuntimeError("boom")
        return self.weight * self.frozen(self.trained(z)) * (1 if y is None else 1 + y[:, None])


@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_mode_without_gradient_and_every_mode_restored(fails):
    net = Probe().train()
    net.frozen.eval()
    net.fails = fails
    if fails:
        with pytest.raises(RuntimeError, match="boom"):
            sample(net, (4, 2))
    else:
        assert not sample(net, (4, 2)).requires_grad
    assert net.modes == {(False, False, False)}
    assert (net.training, net.trained.training, net.frozen.training) == (True, True, False)


def test_conditions_reach_the_network_and_chunks_change_nothing():
    noise, y = torch.randn(10, 2), torch.arange(10) % 3
    expected = noise - 0.5 * noise * (1 + y[:, None])
    torch.testing.assert_close(sample(Probe(), (10, 2), noise=noise, y=y), expected)
    torch.testing.assert_close(sample_in_chunks(Probe(), noise, chunk=3, y=y), expected)


def test_noise_is_standard_normal_and_decided_by_one_source():
    def keep(z, r, t):
        return torch.zeros_like(z)

    generator = torch.Generator().manual_seed(3)
    assert torch.equal(sample(keep, (5, 2), seed=3), sample(keep, (5, 2), generator=generator))
    torch.manual_seed(3)
    assert torch.equal(sample(keep, (5, 2), seed=3), sample(keep, (5, 2)))
    x = sample(keep, (100_000, 1), seed=0)
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
    with pytest.raises(ValueError, match="only one of noise, seed and generator"):
        sample(keep, (5, 2), seed=3, noise=torch.zeros(5, 2))


@pytest.mark.parametrize(
    ("steps", "noise", "sampler", "message"),
    [
        (0, None, "average", "steps is 0"),
        ([1, 0.5], None, "average", r"steps are \[1.0, 0.5\]: give a number of steps, or times that fall from 1 to 0"),
        ([1, 0.5, 0.5, 0], None, "average", "fall from 1 to 0"),
        ([], None, "average", "fall from 1 to 0"),
        (1, None, "heun", "sampler is 'heun': choose one of average, euler, consistency"),
        (1, torch.zeros(4, 3), "average", r"noise has shape \(4, 3\), but shape is \(4, 2\)"),
        (3, [torch.zeros(4, 2)] * 2, "euler", "noise has 2 draws, but 3 steps of 'euler' take 1"),
    ],
)
def test_refused(steps, noise, sampler, message):
    with pytest.raises(ValueError, match=message):
        sample(Probe(), (4, 2), steps, noise, sampler=sampler)


def test_a_number_is_no_shape():
    with pytest.raises(ValueError, match=r"shape is 4: give that of the result, batch first"):
        sample(Probe(), 4)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_grid_shows_every_image_in_its_place(tmp_path):
    grey = torch.linspace(-1, 1, 5)
    save_grid(grey[:, None, None, None].expand(5, 1, 8, 8), tmp_path / "grid.png", columns=3)
    pixels = (imread(tmp_path / "grid.png")[..., :3] * 255).round()
    tile = 8 * 6 + 2  # 8x8 images are enlarged to 48x48, with 2 white pixels between
    assert pixels.shape == (2 * tile + 2, 3 * tile + 2, 3)
    for i, value in enumerate([0, 64, 128, 191, 255]):
        row, column = divmod(i, 3)
        shown = pixels[row * tile + 2 : (row + 1) * tile, column * tile + 2 : (column + 1) * tile]
        assert (np.abs(shown - value) <= 1).all()
    assert (pixels[tile + 2 :, 2 * tile + 2 :] == 255).all()  # the place without an image
    assert (pixels[:2] == 255).all() and (pixels[:, tile : tile + 2] == 255).all()


def test_grid_keeps_orientation_colours_and_clamps(tmp_path):
    image = torch.full((1, 3, 64, 64), -1.0)
    image[0, 0, :32, 32:] = 7  # red, top right
    save_grid(image, tmp_path / "grid.png")
    pixels = imread(tmp_path / "grid.png")[2:66, 2:66, :3]
    assert (pixels[:32, 32:] == [1, 0, 0]).all()
    assert pixels.sum() == 32 * 32


def test_points_become_a_scatter_plot(tmp_path):
    save_grid(torch.randn(500, 2), tmp_path / "points.png")
    assert imread(tmp_path / "points.png")[..., :3].std() > 0.01
    assert [path.name for path in tmp_path.iterdir()] == ["points.png"]


def test_rows_have_names(tmp_path):
    black = torch.full((4, 1, 8, 8), -1.0)
    save_rows({"one": black, "two": black}, tmp_path / "rows.png")
    save_rows({"": black, " ": black}, tmp_path / "unnamed.png")
    named, unnamed = (imread(tmp_path / name) for name in ("rows.png", "unnamed.png"))
    assert named.shape == unnamed.shape
    assert not np.array_equal(named, unnamed)


@pytest.mark.parametrize(
    ("x", "columns", "message"),
    [
        (torch.zeros(4, 2, 8, 8), 2, r"shape \(4, 2, 8, 8\)"),
        (torch.zeros(4, 3), 2, r"shape \(4, 3\)"),
        (torch.zeros(0, 1, 8, 8), 2, r"shape \(0, 1, 8, 8\)"),
        (torch.zeros(4, 1, 8, 8), 0, "columns is 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, x, columns, message):
    with pytest.raises(ValueError, match=message):
        save_grid(x, tmp_path / "grid.png", columns)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "grid.png"
    path.write_text("old")
    with (
        pytest.raises(ValueError, match="cannot write .*grid.png \\(No space left.*choose a writable place"),
        writing(path) as new,
    ):
        new.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
    with pytest.raises(ValueError, match="cannot write .*choose a writable place"):
        save_grid(torch.zeros(1, 1, 8, 8), path / "grid.png")


# ---- command line ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of networks with random weights: an image network with classes, a toy, one that gives NaN."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    images = models.build("dit", input_size=8, channels=1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)
    points, broken = models.build("mlp", width=16, depth=1), models.build("mlp", width=16, depth=1)
    for net in (images, points, broken):
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.2)
    nn.init.constant_(broken.output.bias, torch.nan)
    for name, net in (("images", images), ("points", points), ("broken", broken)):
        models.save_pretrained(folder / name, net, extra={"data": {"name": "two_moons"}, "step": 1})
    return folder


def test_npz_holds_what_the_function_draws(runs, tmp_path):
    arguments = ["--run", runs / "images", "--out", tmp_path / "new" / "x.npz", "--steps", 2, "--seed", 5, "--count", 7]
    assert main(["sample", *map(str, arguments), "--classes", "3", "8"]) == 0
    saved = np.load(tmp_path / "new" / "x.npz")
    assert saved["y"].tolist() == [3, 8, 3, 8, 3, 8, 3]
    net, _ = models.load_pretrained(runs / "images")
    expected = sample(net, (7, 1, 8, 8), 2, seed=5, y=torch.tensor(saved["y"]))
    np.testing.assert_array_equal(saved["x"], expected.numpy())
    plain = sample(net, (7, 1, 8, 8), 2, seed=5)
    assert not np.allclose(saved["x"], plain.numpy())  # labels do matter


def test_the_default_grid_has_one_column_per_class(runs, tmp_path, capsys):
    assert main(["sample", "--run", str(runs / "images"), "--out", str(tmp_path / "grid.png")]) == 0
    assert imread(tmp_path / "grid.png").shape[:2] == (8 * 50 + 2, 10 * 50 + 2)
    assert "80 samples, 1 evaluation of the network each" in capsys.readouterr().out
    assert main(["sample", "--run", str(runs / "points"), "--out", str(tmp_path / "points.npz")]) == 0
    assert list(np.load(tmp_path / "points.npz")) == ["x"]


def test_latents_are_given_back_as_the_autoencoder_knows_them(tmp_path, monkeypatch, capsys):
    stored = np.random.default_rng(0).normal(3, 2, (6, 4, 4, 4)).astype(np.float32)
    files = write_folder(tmp_path / "files", {f"{i}.npy": npy(each) for i, each in enumerate(stored)})
    folder = tmp_path / "set"
    prepare(files, folder, latents="sample", labels="none")
    (tmp_path / "decoders.py").write_text("def colours():\n    return lambda z: z[:, :3]\n")
    monkeypatch.chdir(tmp_path)
    net = models.build("dit", input_size=4, channels=4, patch_size=2, width=16, depth=1, heads=2)
    extra = {"data": {"name": "latents", "path": str(folder)}, "step": 1}
    models.save_pretrained(tmp_path / "run", net, extra=extra)

    def drawn(*options):
        assert main(["sample", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "x.npz"), *options]) == 0
        return torch.from_numpy(np.load(tmp_path / "x.npz")["x"])

    as_drawn, stored = drawn("--normalized"), load("latents", path=str(folder))
    torch.testing.assert_close(drawn(), stored.to_latents(as_drawn))
    assert not torch.allclose(drawn(), as_drawn)
    torch.testing.assert_close(drawn("--decoder", "decoders:colours"), stored.to_latents(as_drawn)[:, :3])
    assert main(["sample", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "x.png")]) == 2
    assert "samples of 4 channels are no picture; if they are latents, pass --decoder" in capsys.readouterr().err
    shutil.rmtree(folder)
    assert main(["sample", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "x.npz")]) == 2
    assert "or pass --normalized" in capsys.readouterr().err


def test_the_signature_is_looked_at_once_however_many_chunks(monkeypatch):
    net, looked = models.build("mlp", width=8, depth=1), []
    monkeypatch.setattr(sampling, "check_network", lambda net: looked.append(net))
    noise = torch.randn(7, 2)
    x = sample_in_chunks(net, noise, chunk=2)
    assert len(looked) == 1
    torch.testing.assert_close(x, sample(net, (7, 2), noise=noise))


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        ("absent", [], "absent/model.safetensors is missing"),
        ("images", ["--out", "grid.gif"], "--out grid.gif: the name must end in .png or .npz"),
        ("images", ["--classes", "3", "10"], "class 10 is unknown"),
        ("images", ["--count", "0"], "count is 0"),
        ("images", ["--steps", "0"], "steps is 0"),
        ("images", ["--device", "tpu9"], "device 'tpu9' cannot be used here"),
        ("points", ["--classes", "0"], "has no classes: leave --classes out"),
        ("broken", [], "not finite"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(runs, tmp_path, capsys, run, arguments, message):
    status = main(["sample", "--run", str(runs / run), "--out", str(tmp_path / "grid.png"), *arguments])
    captured = capsys.readouterr()
    assert (status, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert captured.err.startswith("error: ") and message in captured.err
    assert not list(tmp_path.iterdir())


def test_as_a_command(tmp_path):
    command = [sys.executable, "-m", "mmf_fast", "sample", "--run", str(tmp_path), "--out", "grid.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
