"""Latents in every form yield the arrays they were made from, and none can run code."""

import io
import json
import pickle

import numpy as np
import pytest
import torch
from support.archives import edm2, npy, npz, write_folder, write_tar, write_zip
from support.sources import read

from mmf_fast.data.formats import DataError, SampleError, open_source
from mmf_fast.data.prepare import prepare


def moments(count, seed=0):
    """(count, 8, 4, 4) float32: means, then positive deviations."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(0, 5, (count, 4, 4, 4)), rng.uniform(0.01, 2, (count, 4, 4, 4))], 1).astype("f4")


def test_edm2_latents(tmp_path):
    values = moments(3)
    path = write_zip(tmp_path / "img512-sd.zip", edm2(values, [7, 0, 7]))
    found, labels, source = read(path, "latents")
    assert np.array_equal(found, values) and labels == [7, 0, 7]
    assert source.kind == "latents" and source.facts == {"holds": "mean-std", "scaled_by": 1.0, "flipped": False}


def test_fast_dit(tmp_path):
    values = moments(12)[:, :4]
    files = {f"imagenet256_features/{i}.npy": npy(value[None]) for i, value in enumerate(values)}
    files |= {f"imagenet256_labels/{i}.npy": npy(np.array([i % 5])) for i in range(12)}
    found, labels, source = read(write_folder(tmp_path, files), "latents")
    assert np.array_equal(found, values)  # 10 behind 9
    assert labels == [i % 5 for i in range(12)]
    assert source.facts == {"holds": "sample", "scaled_by": 0.18215, "flipped": False}
    (tmp_path / "imagenet256_labels" / "3.npy").unlink()
    with pytest.raises(DataError, match="imagenet256_labels/3.npy"):
        read(tmp_path, "latents")


def test_log_variances_become_standard_deviations(tmp_path):
    values = moments(2)
    logvar = np.concatenate([values[:, :4], 2 * np.log(values[:, 4:])], 1)
    path = write_folder(tmp_path, {f"n01/{i}.npy": npy(value) for i, value in enumerate(logvar)})
    with pytest.raises(DataError, match="--latents"):
        open_source(path, root=".")
    found, labels, _ = read(path, "latents", latents="mean-logvar", root=".")
    assert np.allclose(found, values, rtol=1e-5) and labels == [0, 0]
    with pytest.raises(SampleError, match="perhaps --latents mean-logvar"):
        read(path, "latents", latents="mean-std", root=".")
    extreme = np.concatenate([np.zeros((1, 4, 4)), np.full((1, 4, 4), -100.0)]).astype("f4")
    (tmp_path / "n01" / "0.npy").write_bytes(npy(extreme))
    (tmp_path / "n01" / "1.npy").write_bytes(npy(extreme))
    assert np.allclose(read(path, "latents", latents="mean-logvar", root=".")[0][:, 1], np.exp(-15))


def test_moments_of_the_mirrored_image(tmp_path):
    values, mirrored = moments(2), moments(2, seed=1)
    files = {}
    for i in range(2):
        buffer = io.BytesIO()
        np.savez(buffer, moments=values[i], moments_flip=mirrored[i])
        files[f"n{i}/x.JPEG.npz"] = buffer.getvalue()
    found, labels, source = read(write_folder(tmp_path, files), "latents", latents="mean-std")
    assert np.array_equal(found, np.concatenate([values, mirrored], 1)) and labels == [0, 1]
    assert source.facts["flipped"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.zeros((8, 4), "f4")), "not a latent"),
        (npy(np.zeros((8, 4, 4), "i4")), "not a latent"),
        (npy(np.zeros((7, 4, 4), "f4")), "7 channels"),
        (npy(np.full((8, 4, 4), np.nan, "f4")), "not finite in float16"),
        (npy(np.full((8, 4, 4), 1e5, "f4")), "not finite in float16"),
        (npy(np.zeros((8, 4, 4), "f4"))[:-5], "cannot be read as numpy"),
        (b"", "cannot be read as numpy"),
    ],
)
def test_damaged_latents(content, message, tmp_path):
    write_zip(tmp_path / "a.zip", {"00000/img-mean-std-00000000.npy": content})
    with pytest.raises(SampleError, match=message):
        read(tmp_path / "a.zip", "latents")


def test_a_pickled_array_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], object), allow_pickle=True)
    write_folder(tmp_path, {"a.npy": buffer.getvalue()})
    with pytest.raises(SampleError, match="cannot be read as numpy"):
        read(tmp_path, "latents", latents="mean-std")


# ---- latents as tensors ----------------------------------------------------------------------------------------------


def pt(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def tensors(**arrays):
    from safetensors.torch import save

    return save({key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()})


VALUES, MIRRORED = moments(4), moments(4, seed=1)
DRAWN = VALUES[:, :4]
LOG = np.concatenate([VALUES[:, :4], 2 * np.log(VALUES[:, 4:])], 1)
FOLDERS = ["cat/a", "cat/b", "dog/a", "dog/b"]


def each(content):
    return {f"{name}.{ending}": data for name, (ending, data) in zip(FOLDERS, map(content, range(4)), strict=True)}


def one_per_file():
    """{case: (files, options, samples, facts)}; the labels are 0, 0, 1, 1."""
    plain = {"holds": "sample", "scaled_by": 1.0, "flipped": False}
    drawn = {"holds": "mean-std", "scaled_by": 1.0, "flipped": False}
    half = torch.from_numpy(DRAWN).bfloat16()
    return {
        "pt": (each(lambda i: ("pt", pt(torch.from_numpy(DRAWN[i])))), {"latents": "sample"}, DRAWN, plain),
        "pt of a batch of one": (
            each(lambda i: ("pth", pt(torch.from_numpy(DRAWN[i : i + 1])))),
            {"latents": "sample"},
            DRAWN,
            plain,
        ),
        "pt with a key": (each(lambda i: ("pt", pt({"latent": torch.from_numpy(DRAWN[i])}))), {}, DRAWN, plain),
        "bfloat16": (each(lambda i: ("pt", pt({"latents": half[i].clone()}))), {}, half.float().numpy(), plain),
        "safetensors": (each(lambda i: ("safetensors", tensors(latents=DRAWN[i]))), {}, DRAWN, plain),
        "mean and std": (
            each(lambda i: ("safetensors", tensors(mean=VALUES[i, :4], std=VALUES[i, 4:]))),
            {},
            VALUES,
            drawn,
        ),
        "mean and logvar": (
            each(lambda i: ("pt", pt({"mean": torch.from_numpy(LOG[i, :4]), "logvar": torch.from_numpy(LOG[i, 4:])}))),
            {},
            VALUES,
            drawn,
        ),
        "moments and their mirror": (
            each(
                lambda i: (
                    "pt",
                    pt({"moments": torch.from_numpy(VALUES[i]), "moments_flip": torch.from_numpy(MIRRORED[i])}),
                )
            ),
            {"latents": "mean-std"},
            np.concatenate([VALUES, MIRRORED], 1),
            {**drawn, "flipped": True},
        ),
        "a label in each": (
            {f"{i}.pt": pt({"latent": torch.from_numpy(DRAWN[i]), "label": i // 2}) for i in range(4)},
            {},
            DRAWN,
            plain,
        ),
        "npz with a label": (
            {f"{i}.npz": npz(latents=DRAWN[i], y=np.array([i // 2])) for i in range(4)},
            {},
            DRAWN,
            plain,
        ),
    }


@pytest.mark.parametrize("case", one_per_file())
def test_a_latent_per_file(case, tmp_path):
    files, options, expected, facts = one_per_file()[case]
    for path in (write_folder(tmp_path / "set", files), write_tar(tmp_path / "a.tar.gz", files, "")):
        found, labels, source = read(path, "latents", **options)
        assert found.dtype == np.float32 and np.allclose(found, expected, rtol=1e-5) and labels == [0, 0, 1, 1]
        assert source.facts == facts and source.statistics is None


@pytest.mark.parametrize("kind", ["safetensors", "pt", "npz"])
def test_shards_as_lightningdit_writes_them(kind, tmp_path):
    """hustvl/LightningDiT #34: another autoencoder's latents, and statistics that were not applied."""
    write = {"safetensors": tensors, "pt": lambda **a: pt({k: torch.from_numpy(v) for k, v in a.items()}), "npz": npz}[
        kind
    ]
    files = {
        f"latents_rank{i:02d}_shard000.{kind}": write(
            latents=DRAWN[part].copy(), latents_flip=MIRRORED[part, :4].copy(), labels=np.array([5, 2 + i])
        )
        for i, part in enumerate([slice(0, 2), slice(2, 4)])
    }
    mean, std = torch.arange(4.0).reshape(1, 4, 1, 1), torch.full((1, 4, 1, 1), 2.0)
    files["latents_stats.pt"] = pt({"mean": mean, "std": std})
    path = write_folder(tmp_path / "imagenet_train_256", files)
    found, labels, source = read(path, "latents")
    assert np.array_equal(found, np.concatenate([DRAWN, MIRRORED[:, :4]], 1)) and labels == [5, 2, 5, 3]
    assert source.facts == {"holds": "sample", "scaled_by": 1.0, "flipped": True}
    place = str(path / "latents_stats.pt")
    assert source.statistics == {"mean": [0.0, 1.0, 2.0, 3.0], "std": [2.0] * 4, "from": place}
    assert open_source(path, ignore=("latents_stats.pt",)).statistics is None
    assert {item.label for item in open_source(path, labels="none").items()} == {None}


def test_the_config_of_a_vae_states_its_scale(tmp_path):
    files = each(lambda i: ("npy", npy(DRAWN[i])))
    for config, expected in [
        ({"scaling_factor": 0.5}, {"mean": [0.0], "std": [2.0]}),
        ({"scaling_factor": 0.25, "shift_factor": 0.1}, {"mean": [0.1], "std": [4.0]}),
        ({"scaling_factor": 1.0, "latents_mean": [1, 2, 3, 4], "latents_std": [1, 1, 2, 2]}, None),
        ({"latents_mean": [1, 2, 3, 4], "latents_std": [1, 1, 2, 2]}, None),  # Wan2.1 #307: no other factor
        (  # diffusers #7111: decoding takes latents * std / scaling_factor + mean
            {"scaling_factor": 0.5, "latents_mean": [1, 0, 0, 0], "latents_std": [5, 5, 5, 5]},
            {"mean": [1.0, 0.0, 0.0, 0.0], "std": [10.0] * 4},
        ),
        (
            {"scaling_factor": 1.5305, "shift_factor": 0.0609},
            {"mean": [0.0609], "std": [1 / 1.5305]},
        ),  # diffusers #8708
        ({"scaling_factor": 0.5, "shift_factor": None, "latents_mean": None}, {"mean": [0.0], "std": [2.0]}),
        ({"model_type": "dit"}, "nothing"),
        (["a list"], "nothing"),
    ]:
        path = write_folder(tmp_path, files | {"config.json": json.dumps(config).encode()})
        source = open_source(path, latents="sample")
        if expected == "nothing":
            assert source.statistics is None
        elif expected:
            assert source.statistics == {**expected, "from": str(tmp_path / "config.json")}
        else:
            assert source.statistics["mean"] == [1, 2, 3, 4] and source.statistics["std"] == [1, 1, 2, 2]


class Trap:
    def __reduce__(self):
        return (open, ("trace", "w"))


LATENTS_REFUSED = {
    "a pickle that runs code": ({"a/1.pt": pt(Trap())}, "asks for more than tensors.*may run code"),
    "a pickle of another kind": (
        {"a/1.pt": pickle.dumps(Trap())},
        "asks for more than tensors|cannot be read as torch",
    ),
    "no tensor": ({"a/1.pt": pt({1: {2: 3}})}, "not a latent|which of|cannot be read"),
    "a cut pt": ({"a/1.pt": pt(torch.ones(4, 2, 2))[:-200]}, "cannot be read as torch"),
    "a cut safetensors": ({"a/1.safetensors": tensors(x=DRAWN[0])[:-9]}, "cannot be read as safetensors"),
    "two latents": ({"a/1.npz": npz(one=DRAWN[0], two=DRAWN[1])}, "which of one, two is the latent"),
    "many without labels": ({"a/1.npz": npz(latents=DRAWN)}, "many latents and no labels; pass --labels none"),
    "labels that are missing": (
        {"1.npz": npz(latents=DRAWN[0], y=np.array(1)), "2.npz": npz(latents=DRAWN[0])},
        "its labels are missing",
    ),
    "keys that change": (
        {"a/1.npz": npz(latents=DRAWN[0]), "b/1.npz": npz(x=DRAWN[0])},
        "b/1.npz: cannot be read as the others: it has no latents",
    ),
    "statistics of nothing": ({"a/1.npy": npy(DRAWN[0]), "stats.npz": npz(a=DRAWN)}, "has a, not mean and std"),
    "statistics of no use": (
        {"a/1.npy": npy(DRAWN[0]), "stats.npz": npz(mean=np.zeros(4), std=np.zeros(4))},
        "std positive",
    ),
    "images as floats": ({"1.npz": npz(x=np.zeros((5, 8, 8, 3), "f4"), y=np.arange(5))}, "images as floats; save"),
    "an image per file": ({"a/1.npy": npy(np.zeros((8, 8, 3), np.uint8))}, "holds bytes, as images do; save"),
    "an LMDB": ({"data.mdb": b"x", "lock.mdb": b"x"}, "is an LMDB, often of pickles, which is not read; export it"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("case", LATENTS_REFUSED)
def test_latents_that_are_refused(case, tmp_path, monkeypatch):
    files, message = LATENTS_REFUSED[case]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = write_folder(tmp_path / "set", files)
    with pytest.raises(DataError, match=message) as error:
        named = "latents" in "".join(files) or any(b"latents" in data for data in files.values())
        for item in open_source(path, root=".", **({} if named else {"latents": "sample"})).items():
            item.load()
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not list((tmp_path / "here").iterdir())


def test_statistics_of_another_number_of_channels(tmp_path):
    files = each(lambda i: ("npy", npy(DRAWN[i]))) | {"stats.npz": npz(mean=np.zeros(3), std=np.ones(3))}
    with pytest.raises(DataError, match=r"stats\.npz: states 3 channels, latents have 4"):
        prepare(write_folder(tmp_path / "set", files), tmp_path / "out", latents="sample")
