"""Latents as a training stream: each visit draws from the stored mean and standard deviation."""

import io

import numpy as np
import pytest
import torch
from support.archives import edm2, npy, write_folder, write_zip

from mmf_fast.data import load
from mmf_fast.data.prepare import prepare

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


def test_the_scale_of_the_sd_vae_is_the_default(folder):
    assert torch.allclose(
        load("latents", path=folder).batch(2, 4)[0], load("latents", path=folder, scale=1.0).batch(2, 4)[0] * 0.18215
    )
    with pytest.raises(ValueError, match="scale is 0.0; it must be positive"):
        load("latents", path=folder, scale=0.0)


def test_drawn_latents_are_not_drawn_or_scaled_again(tmp_path):
    """fast-DiT stores 0.18215 times the latent."""
    values = moments()[:, :2]
    files = {f"imagenet256_features/{i}.npy": npy(value[None]) for i, value in enumerate(values)}
    files |= {f"imagenet256_labels/{i}.npy": npy(np.array([i])) for i in range(COUNT)}
    prepare(write_folder(tmp_path / "src", files), tmp_path / "out")
    for scale, factor in ((0.18215, 1), (1.0, 1 / 0.18215)):
        x, y = load("latents", path=str(tmp_path / "out"), scale=scale).batch(0, COUNT)
        assert torch.allclose(x, torch.from_numpy(values)[y] * factor)


def test_flips_take_the_latent_of_the_mirrored_image(folder, tmp_path):
    plain, mirrored = moments(), moments(seed=1)
    plain[:, 2:], mirrored[:, 2:] = 0, 0  # no noise
    files = {}
    for i in range(COUNT):
        buffer = io.BytesIO()
        np.savez(buffer, moments=plain[i], moments_flip=mirrored[i])
        files[f"{i}/a.npz"] = buffer.getvalue()
    prepare(write_folder(tmp_path / "src", files), tmp_path / "flips", latents="mean-std")
    data = load("latents", path=str(tmp_path / "flips"), scale=1.0, flip=True)
    assert data.shape == (2, 2, 2)
    taken = []
    for label, x in draws(data, 100).items():
        is_mirrored = (x == torch.from_numpy(mirrored[label, :2])).flatten(1).all(1)
        is_plain = (x == torch.from_numpy(plain[label, :2])).flatten(1).all(1)
        assert (is_plain ^ is_mirrored).all()
        taken.append(is_mirrored.float())
    assert 0.4 < torch.cat(taken).mean() < 0.6  # 600 fair coins: 0.5 +- 0.02
    never = load("latents", path=str(tmp_path / "flips"), scale=1.0)
    assert torch.equal(never.split("train")[0], torch.from_numpy(plain[:, :2]))
    with pytest.raises(ValueError, match="no latents of mirrored images"):
        load("latents", path=folder, flip=True)


def test_a_split_is_the_same_at_every_call_and_seed(folder):
    one, two = (load("latents", path=folder, validation=folder, seed=seed) for seed in (0, 1))
    assert torch.equal(one.split("train")[0], two.split("train")[0])
    assert torch.equal(one.split("validation")[0], one.split("train")[0])
    assert one.split("train")[1].tolist() == list(range(COUNT))
