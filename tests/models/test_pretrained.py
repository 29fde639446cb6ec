"""Saving and loading: exact, whole or not at all, and clear about what is wrong."""

import json

import pytest
import torch

from mmf_fast.models import MLP, build, load_pretrained, pretrained, save_pretrained

NETWORKS = [
    dict(name="mlp", dim=3, width=8, depth=1, num_classes=2),
    dict(name="dit", input_size=4, channels=1, patch_size=2, width=8, depth=1, heads=2, qk_norm=True),
    dict(
        name="unet", input_size=4, channels=1, base_channels=4, channel_mults=(1, 2), blocks=1,
        attention_resolutions=(2,), heads=2,
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config["name"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_saved_network_comes_back_exactly(tmp_path, config, dtype):
    net = build(**config).to(dtype)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    extra = {"data": {"name": "digits", "classes": [1, 2]}, "step": 7}
    save_pretrained(tmp_path / "new" / "folder", net, extra)
    loaded, loaded_extra = load_pretrained(tmp_path / "new" / "folder")
    assert loaded_extra == extra and loaded.config == net.config and not loaded.training
    z, t = torch.randn(2, *net.shape, dtype=dtype), torch.rand(2)
    assert loaded(z, 0.5 * t, t).equal(net.eval()(z, 0.5 * t, t))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return MLP(dim=3, width=8, depth=1)


@pytest.fixture
def saved(tmp_path, net):
    save_pretrained(tmp_path, net)
    return tmp_path


def test_other_weights_can_be_saved_in_place_of_the_networks_own(tmp_path, net):
    average = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    save_pretrained(tmp_path, net, state_dict=average)
    loaded, extra = load_pretrained(tmp_path)
    assert extra == {}
    assert all(tensor.equal(average[name]) for name, tensor in loaded.state_dict().items())


def test_loading_leaves_the_random_state_alone(saved):
    before = torch.get_rng_state()
    load_pretrained(saved)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("failing", ["model.safetensors", "model.json"])
def test_a_failed_save_leaves_the_old_file_whole(saved, net, monkeypatch, failing):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    save_file = pretrained.save_file

    def part_then_full_disk(weights, path):
        path.write_bytes(b"part")
        raise OSError("No space left on device")

    if failing == "model.safetensors":
        monkeypatch.setattr(pretrained, "save_file", part_then_full_disk)
    else:
        monkeypatch.setattr(pretrained, "save_file", lambda weights, path: save_file(net.state_dict(), path))
        monkeypatch.setattr("pathlib.Path.write_text", lambda path, text: part_then_full_disk(None, path))
    with pytest.raises(ValueError, match=r"cannot write a model to .*No space left.*choose a writable folder"):
        save_pretrained(saved, net, extra={"step": 2})
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_file_in_place_of_the_folder(tmp_path, net):
    (tmp_path / "runs").write_text("")
    with pytest.raises(ValueError, match="choose a writable folder"):
        save_pretrained(tmp_path / "runs", net)


def test_weights_of_another_network_are_not_saved(tmp_path, net):
    wrapped = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not belong to this mlp: conditioning.fc_in.weight is missing"):
        save_pretrained(tmp_path, net, state_dict=wrapped)
    counted = {**net.state_dict(), "n_averaged": torch.tensor(3)}
    with pytest.raises(ValueError, match="n_averaged is unknown"):
        save_pretrained(tmp_path, net, state_dict=counted)
    assert not list(tmp_path.iterdir())


def test_extra_that_json_cannot_hold(tmp_path, net):
    with pytest.raises(ValueError, match="extra must be JSON-able"):
        save_pretrained(tmp_path, net, extra={"weights": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing; give the folder of a run"):
        load_pretrained(saved)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors is damaged") as error:
        load_pretrained(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", '{"config": {"name": "mlp"', "[]", '{"config": {}, "extra": {}}', '{"extra": {}}']
)
def test_a_damaged_description(saved, text):
    (saved / "model.json").write_text(text)
    with pytest.raises(ValueError, match="model.json is damaged"):
        load_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "vae"}, "model.json: unknown model 'vae'; valid are mlp, dit, unet"),
        ({"dpeth": 2}, "model.json: model 'mlp' has no argument 'dpeth'; did you mean 'depth'"),
        (
            {"width": 16},
            r"does not fit model.json: conditioning.fc_in.weight has shape \(8, 512\), expected \(16, 512\)",
        ),
    ],
)
def test_a_description_that_does_not_fit(saved, change, message):
    path = saved / "model.json"
    description = json.loads(path.read_text())
    description["config"].update(change)
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=message):
        load_pretrained(saved)
