"""Saving and loading: exact, whole or not at all, and clear about what is wrong."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from mmf_fast.models import MLP, build, load_pretrained, pretrained, register_network, save_pretrained

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
def test_a_failed_save_leaves_the_weights_and_what_they_are_together(saved, net, monkeypatch, failing):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def part_then_full_disk(weights, path, **options):
        path.write_bytes(b"part")
        raise OSError("No space left on device")

    if failing == "model.safetensors":
        monkeypatch.setattr("safetensors.torch.save_file", part_then_full_disk)
    else:  # which is there for people
        monkeypatch.setattr("pathlib.Path.write_text", lambda path, text: part_then_full_disk(None, path))
    with pytest.raises(ValueError, match=r"cannot write a model to .*No space left.*choose a writable folder"):
        save_pretrained(saved, net, extra={"step": 2})
    assert (saved / "model.json").read_bytes() == before["model.json"]
    assert load_pretrained(saved)[1] == ({} if failing == "model.safetensors" else {"step": 2})
    assert len(list(saved.iterdir())) == 2


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


def test_a_missing_file(saved):
    (saved / "model.json").unlink()
    assert load_pretrained(saved)[1] == {}
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing; give the folder of a run"):
        load_pretrained(saved)


def test_a_flipped_bit_is_found(saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in (whole.index(b"mlp"), start, start + 401, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors.* is damaged"):
            load_pretrained(saved)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors is damaged") as error:
        load_pretrained(saved)
    assert "\n" not in str(error.value)


def with_facts(folder, facts):
    """The same weights with another description, and its checksum."""
    state, _ = pretrained._read(folder / "model.safetensors")
    text = json.dumps({**facts, "sha256": pretrained._digest(state, facts)})
    save_file(state, folder / "model.safetensors", {"model.json": text})


@pytest.mark.parametrize("facts", [{}, {"config": {}, "extra": {}}, {"extra": {}}, {"config": [], "extra": {}}])
def test_a_damaged_description(saved, facts):
    with_facts(saved, facts)
    with pytest.raises(ValueError, match="its description is damaged"):
        load_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "vae"}, "model.json: unknown model 'vae'; valid are mlp, dit, unet"),
        ({"dpeth": 2}, "model.json: model 'mlp' has no argument 'dpeth'; did you mean 'depth'"),
        ({"width": 16}, r"does not fit mlp: conditioning.fc_in.weight has shape \(8, 512\), expected \(16, 512\)"),
    ],
)
def test_a_description_that_does_not_fit(saved, change, message):
    _, facts = pretrained._read(saved / "model.safetensors")
    facts["config"].update(change)
    with_facts(saved, facts)
    with pytest.raises(ValueError, match=message):
        load_pretrained(saved)


class Own(torch.nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.fc = torch.nn.Linear(width, width)
        self.again = self.fc  # tied
        self.register_buffer("count", torch.tensor(5))

    def forward(self, z, r, t):
        return self.again(self.fc(z))


@pytest.mark.parametrize("wrap", [lambda net: net, torch.compile, AveragedModel], ids=["bare", "compiled", "averaged"])
def test_a_network_of_ones_own_is_saved_and_loaded_into_another(tmp_path, wrap):
    net = Own()
    save_pretrained(tmp_path, wrap(net), {"step": 1})
    with pytest.raises(ValueError, match="pass it, or --net package.module:make"):
        load_pretrained(tmp_path)
    loaded, extra = load_pretrained(tmp_path, wrap(Own()))
    assert extra == {"step": 1} and all(map(torch.equal, loaded.state_dict().values(), net.state_dict().values()))
    with pytest.raises(ValueError, match=r"does not fit Own: fc.weight has shape \(3, 3\), expected \(4, 4\)"):
        load_pretrained(tmp_path, Own(4))


def test_a_registered_network_and_one_of_an_import_path_are_rebuilt(tmp_path, monkeypatch):
    register_network("own_of_test_pretrained", Own)
    save_pretrained(tmp_path, build("own_of_test_pretrained", width=2))
    assert load_pretrained(tmp_path)[0].fc.in_features == 2
    with pytest.raises(ValueError, match="registered already"):
        register_network("own_of_test_pretrained", MLP)
    save_pretrained(tmp_path, build("torch.nn:Linear", in_features=2, out_features=3))
    assert load_pretrained(tmp_path)[0].out_features == 3
