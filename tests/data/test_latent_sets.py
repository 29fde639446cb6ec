"""Latents as a training stream: each visit draws from the stored mean and standard deviation."""

import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from support.archives import edm2, npy, npz, write_folder, write_zip
from support.prepare_child import in_child, prepare_in_small_steps

from mmf_fast.data import load
from mmf_fast.data.prepare import prepare
from mmf_fast.data.prepared import read_manifest

COUNT = 6


def moments(seed=0):
    """(6, 4, 2, 2) float32: means of size 5, deviations in [0.5, 2]; exact in float16."""
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(0, 5, (COUNT, 2, 2, 2)), rng.uniform(0.5, 2, (COUNT, 2, 2, 2))], 1)
    return values.astype(np.float16).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    prepare(write_zip(tmp_path / "a.zip", edm2(moments(), list(range(COUNT)))), tmp_path / "out")
    return str(tmp_path / "out")


def draws(data, steps):
    """{label: (visits, *shape)} of that many batches of the whole set."""
    found = {i: [] for i in range(COUNT)}
    for step in range(steps):
        for x, y in zip(*data.batch(step, COUNT), strict=True):
            found[int(y)].append(x)
    return {label: torch.stack(xs) for label, xs in found.items()}


def test_a_latent_is_drawn_from_its_mean_and_deviation(folder):
    with pytest.warns(UserWarning, match="root mean square"):
        data = load("latents", path=folder, scale=0.5, seed=3)
    assert data.shape == (2, 2, 2) and data.num_classes == COUNT
    mean, std = np.split(moments(), 2, axis=1)
    noise = []
    for label, x in draws(data, 500).items():
        assert x.dtype == torch.float32
        noise.append((x / 0.5 - torch.from_numpy(mean[label])) / torch.from_numpy(std[label]))
    noise = torch.cat([part.flatten() for part in noise])  # 24,000 standard normal numbers
    assert len(noise.unique()) > 0.99 * len(noise)
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03 and abs((noise**4).mean() - 3) < 0.3


def test_noise_differs_between_rows_steps_and_seeds(folder):
    one, two = load("latents", path=folder, seed=0), load("latents", path=folder, seed=1)
    first = draws(one, 3)
    assert all(len(x.flatten(1).unique(dim=0)) == 3 for x in first.values())
    assert not torch.equal(first[0], draws(two, 3)[0])
    assert torch.equal(first[0], draws(load("latents", path=folder, seed=0), 3)[0])


def test_every_channel_has_mean_0_and_std_1(folder):
    """Measured over what is drawn: the variance within a latent counts as well as that between them."""
    data = load("latents", path=folder)
    x = torch.cat([data.batch(step, COUNT)[0] for step in range(2000)]).transpose(0, 1).flatten(1)  # 48,000 a channel
    assert x.mean(1).abs().max() < 0.03 and (x.std(1) - 1).abs().max() < 0.03
    assert torch.allclose(
        data.to_latents(x[:, :4].reshape(1, 2, 2, 2)), x[:, :4].reshape(1, 2, 2, 2) * spread() + centre()
    )


def centre():
    return torch.from_numpy(moments()[:, :2].astype("f8").mean((0, 2, 3)).astype("f4"))[:, None, None]


def spread():
    mean, std = np.split(moments().astype("f8"), 2, axis=1)
    return torch.from_numpy(np.sqrt(mean.var((0, 2, 3)) + (std**2).mean((0, 2, 3))).astype("f4"))[:, None, None]


def test_the_manifest_holds_the_statistics(folder):
    statistics = read_manifest(Path(folder)).statistics
    assert statistics["from"] == "measured" and np.allclose(statistics["mean"], centre().flatten(), rtol=1e-6)
    assert np.allclose(statistics["std"], spread().flatten(), rtol=1e-6)
    normalised = load("latents", path=folder).batch(2, 4)[0]
    with pytest.warns(UserWarning, match="root mean square"):
        stored = load("latents", path=folder, scale=1.0).batch(2, 4)[0]
    assert torch.allclose(normalised, (stored - centre()) / spread(), atol=1e-6)
    assert torch.allclose(load("latents", path=folder).to_latents(normalised), stored, atol=1e-5)


def test_a_scale_replaces_the_statistics_and_is_doubted_where_they_contradict(folder):
    """Open-Sora #494: 0.18215 for an autoencoder of another scale."""
    with pytest.warns(
        UserWarning, match=r"data.scale=0.01: .* root mean square of 0.0\d+ and not of about 1.*leave data.scale"
    ):
        data = load("latents", path=folder, scale=0.01)
    fitting = 1 / float((spread() ** 2 + centre() ** 2).mean().sqrt())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = load("latents", path=folder, scale=fitting)
    assert torch.allclose(data.batch(2, 4)[0] * 100 * fitting, other.batch(2, 4)[0], rtol=1e-5)
    assert torch.allclose(other.to_latents(other.batch(2, 4)[0]), data.to_latents(data.batch(2, 4)[0]), rtol=1e-5)
    with pytest.raises(ValueError, match=r"scale is 0\.0; it must be positive, or left out"):
        load("latents", path=folder, scale=0.0)


def test_the_validation_set_is_normalised_as_the_training_set(folder, tmp_path):
    other = moments() * 2
    prepare(write_zip(tmp_path / "b.zip", edm2(other, list(range(COUNT)))), tmp_path / "b")
    data = load("latents", path=folder, validation=str(tmp_path / "b"))
    again = load("latents", path=folder, validation=folder)
    assert not torch.equal(data.split("validation")[0], again.split("validation")[0])
    held = data.to_latents(data.split("validation")[0]), again.to_latents(again.split("validation")[0])
    assert torch.allclose(held[0], 2 * held[1], rtol=1e-4, atol=1e-4)


def test_the_statistics_tell_two_sets_apart(folder, tmp_path):
    stats = npz(mean=np.zeros(2), std=np.full(2, 5.0))
    prepare(write_folder(tmp_path / "src", edm2(moments(), list(range(COUNT))) | {"stats.npz": stats}), tmp_path / "b")
    one, other = (load("latents", path=str(path)) for path in (folder, tmp_path / "b"))
    assert one.identity["path"] != other.identity["path"]
    assert torch.allclose(other.batch(0, 4)[0], one.to_latents(one.batch(0, 4)[0]) / 5, atol=1e-5)


def test_a_set_of_an_older_version_needs_its_scale(folder):
    path = Path(folder, "manifest.json")
    tree = json.loads(path.read_text())
    del tree["statistics"], tree["report"]
    path.write_text(json.dumps({**tree, "version": 1}))
    with pytest.raises(
        ValueError, match=r"without statistics, by an older version.*--overwrite, or pass data.scale=0.18215"
    ):
        load("latents", path=folder)
    x, y = load("latents", path=folder, scale=0.18215).batch(0, COUNT)
    noise = (x / 0.18215 - torch.from_numpy(moments()[:, :2])[y]) / torch.from_numpy(moments()[:, 2:])[y]
    assert noise.abs().max() < 6


def test_drawn_latents_are_not_drawn_or_scaled_again(tmp_path):
    """fast-DiT stores 0.18215 times the latent."""
    values = (moments()[:, :2] / 5).astype(np.float16).astype("f4")
    files = {f"imagenet256_features/{i}.npy": npy(value[None]) for i, value in enumerate(values)}
    files |= {f"imagenet256_labels/{i}.npy": npy(np.array([i])) for i in range(COUNT)}
    manifest = prepare(write_folder(tmp_path / "src", files), tmp_path / "out")
    assert manifest.statistics["from"] == "the format: times 0.18215 already"
    for scale in (None, 0.18215):
        data = load("latents", path=str(tmp_path / "out"), scale=scale)
        x, y = data.batch(0, COUNT)
        assert torch.allclose(x, torch.from_numpy(values)[y])
        assert torch.allclose(data.to_latents(x), torch.from_numpy(values)[y] / 0.18215)


def test_unit_latents_are_not_shrunk(tmp_path, capsys):
    """The scale of the SD-VAE, applied unasked, would give a std of 0.18; stated by the format, it is doubted."""
    values = np.random.default_rng(0).normal(size=(50, 4, 8, 8)).astype("f4")
    files = {f"c{i % 2}/{i}.npy": npy(value) for i, value in enumerate(values)}
    prepare(write_folder(tmp_path / "src", files), tmp_path / "out", latents="sample")
    assert abs(load("latents", path=str(tmp_path / "out")).split("train")[0].std() - 1) < 1e-3
    prepare(tmp_path / "src", tmp_path / "out2", latents="scaled-sample")
    assert "root mean square" not in capsys.readouterr().err
    for i, value in enumerate(values):
        (tmp_path / "src" / f"c{i % 2}" / f"{i}.npy").write_bytes(npy(value * 5))
    prepare(tmp_path / "src", tmp_path / "out3", latents="scaled-sample")
    assert "have a root mean square of 4.9" in capsys.readouterr().err


def test_a_channel_that_never_changes_is_only_shifted(tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 2, 8, 8)).astype("f4")
    values[:, 1] = 3
    files = {f"c{i % 2}/{i}.npy": npy(value) for i, value in enumerate(values)}
    prepare(write_folder(tmp_path / "src", files), tmp_path / "out", latents="sample")
    assert (load("latents", path=str(tmp_path / "out")).split("train")[0][:, 1] == 0).all()


def test_statistics_are_the_same_after_a_kill(tmp_path):
    values = np.random.default_rng(0).normal(size=(700, 2, 2, 2)).astype("f4")
    source = write_zip(tmp_path / "a.zip", {f"c{i % 2}/{i:04d}.npy": npy(value) for i, value in enumerate(values)})
    whole = prepare(source, tmp_path / "whole", latents="sample")
    flushed = lambda: (tmp_path / "out" / "progress.json").exists()  # noqa: E731
    assert in_child(prepare_in_small_steps, source, tmp_path / "out", 1, "sample", until=flushed) == -9
    assert prepare(source, tmp_path / "out", latents="sample").statistics == whole.statistics


def test_flips_take_the_latent_of_the_mirrored_image(folder, tmp_path):
    plain, mirrored = moments(), moments(seed=1)
    plain[:, 2:], mirrored[:, 2:] = 0, 0  # no noise
    files = {}
    for i in range(COUNT):
        buffer = io.BytesIO()
        np.savez(buffer, moments=plain[i], moments_flip=mirrored[i])
        files[f"{i}/a.npz"] = buffer.getvalue()
    prepare(write_folder(tmp_path / "src", files), tmp_path / "flips", latents="mean-std")
    data = load("latents", path=str(tmp_path / "flips"), flip=True)
    assert data.shape == (2, 2, 2)
    taken = []
    for label, x in draws(data, 100).items():
        x = data.to_latents(x)
        is_mirrored, is_plain = (
            torch.isclose(x, torch.from_numpy(latent[label, :2]), atol=1e-4).flatten(1).all(1)
            for latent in (mirrored, plain)
        )
        assert (is_plain ^ is_mirrored).all()
        taken.append(is_mirrored.float())
    assert 0.4 < torch.cat(taken).mean() < 0.6  # 600 fair coins: 0.5 +- 0.02
    never = load("latents", path=str(tmp_path / "flips"))
    assert torch.allclose(never.to_latents(never.split("train")[0]), torch.from_numpy(plain[:, :2]), atol=1e-5)
    with pytest.raises(ValueError, match="no latents of mirrored images"):
        load("latents", path=folder, flip=True)


def test_a_split_is_the_same_at_every_call_and_seed(folder):
    one, two = (load("latents", path=folder, validation=folder, seed=seed) for seed in (0, 1))
    assert torch.equal(one.split("train")[0], two.split("train")[0])
    assert torch.equal(one.split("validation")[0], one.split("train")[0])
    assert one.split("train")[1].tolist() == list(range(COUNT))
