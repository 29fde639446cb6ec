from collections.abc import Callable, Collection, Iterable, MutableSequence, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from mmf_fast import config
from mmf_fast.config import ConfigError, convert
from mmf_fast.objective import Guidance, LambdaSchedule, TimeSampler
from mmf_fast.training.settings import differences, fixed

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
TOY = "data: {name: two_moons}\nmodel: {name: mlp, width: 16}\nloss: {objective: mmf}\n"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(TOY)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_loads_and_survives_a_round_trip(path: Path) -> None:
    first = config.load(path)
    written = yaml.safe_load(yaml.safe_dump(first.tree()))
    assert config.from_tree(written) == first


def test_overrides_take_effect_and_keep_their_neighbours(toy: Path) -> None:
    loaded = config.load(toy, ["train.steps=1e2", "loss.lam.kind=cosine", "loss.times.share=0.5", "optimizer.lr=1e-4"])
    assert loaded.train.steps == 100 and isinstance(loaded.train.steps, int)
    assert loaded.optimizer.lr == 1e-4
    assert loaded.loss["lam"].kind == "cosine"
    assert loaded.loss["lam"].warmup == config.load(toy).loss["lam"].warmup > 0  # of the preset
    assert loaded.loss["times"] == TimeSampler(share=0.5)
    assert loaded.model == {"name": "mlp", "width": 16}


def test_lambda_is_a_number_or_a_schedule(toy: Path) -> None:
    assert config.load(toy, ["loss.lam=0.5"]).loss["lam"] == 0.5
    schedule = config.load(toy, ["loss.lam={kind: step, value: 0.5, start: 7}"]).loss["lam"]
    assert isinstance(schedule, LambdaSchedule) and schedule(6) == 0.0 and schedule(7) == 0.5


def test_guidance_is_off_or_typed(toy: Path) -> None:
    assert config.load(toy).loss.get("guidance") is None
    assert config.load(toy, ["loss.guidance.omega=2"]).loss["guidance"] == Guidance(omega=2.0)
    ranged = config.load(toy, ["loss.guidance={omega: [1, 8], t_max: [0.5, 1]}"]).loss["guidance"]
    assert ranged == Guidance(omega=(1.0, 8.0), t_max=(0.5, 1.0))
    with pytest.raises(config.ConfigError, match=r"loss.guidance.omega: must be float or list of 2, is \[1, 2, 3\]"):
        config.load(toy, ["loss.guidance.omega=[1, 2, 3]"])


def test_nothing_written_is_an_empty_text_or_none(toy: Path) -> None:
    loaded = config.load(toy, ["train.zero=zero1.json", "train.zero=", "train.init=", "loss.guidance="])
    assert (loaded.train.zero, loaded.train.init, loaded.loss["guidance"]) == ("", "", None)


def test_a_component_may_be_named_in_short(toy: Path) -> None:
    loaded = config.load(toy, ["data=checkerboard", "loss=flow_matching"])
    assert loaded.data["name"] == "checkerboard"
    assert loaded.loss["objective"] == "flow_matching"


@pytest.mark.parametrize(
    ("override", "named", "advice"),
    [
        ("train.stpes=3", "train.stpes", "train.steps"),
        ("optimzer.lr=1", "optimzer", "optimizer"),
        ("model.widht=3", "model.widht", "model.width"),
        ("data.sed=1", "data.sed", "data.seed"),
        ("loss.lam.kin=linear", "loss.lam.kin", "loss.lam.kind"),
        ("loss.tangnet=predicted", "loss.tangnet", "loss.tangent"),
        ("loss.guidance.omga=2", "loss.guidance.omga", "loss.guidance.omega"),
        ("train.steps=many", "train.steps", "int"),
        ("train.steps=", "train.steps", "int"),
        ("train.steps=1.5", "train.steps", "int"),
        ("train.compile=1", "train.compile", "bool"),
        ("optimizer.lr=true", "optimizer.lr", "float"),
        ("optimizer.lr=.nan", "optimizer.lr", "number"),
        ("optimizer.betas=[0.9]", "optimizer.betas", "2"),
        ("optimizer.betas=0.9", "optimizer.betas", "list"),
        ("optimizer.schedule=cosin", "optimizer.schedule", "cosine"),
        ("model.width=wide", "model.width", "int"),
        ("model=mpl", "model.name", "mlp"),
        ("data=two_moon", "data.name", "two_moons"),
        ("loss=mff", "loss.objective", "mmf"),
        ("loss.lam.kind=linaer", "loss.lam", "linear"),
        ("loss.times.share=-0.25", "loss.times.share", "[0, 1]"),
        ("loss.lam=fast", "loss.lam", "float"),
        ("train=5", "train", "mapping"),
        ("train.steps=0", "steps", "at least 1"),
        ("optimizer.lr=0", "lr", "positive"),
        ("seed=x", "seed", "int"),
        ("steps", "steps", "key=value"),
        ("model.width=${nothing}", "nothing", "not found"),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_names_it(toy: Path, override: str, named: str, advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(toy, [override])
    message = str(caught.value)
    assert "\n" not in message
    assert named in message
    assert advice in message.split(named, 1)[1]


@pytest.mark.parametrize(
    ("text", "advice"),
    [("", "data: missing"), ("[1, 2]", "mapping"), ("a: [", "toy.yaml"), ("data: {name: two_moons}", "model: missing")],
)
def test_a_file_that_is_no_configuration(toy: Path, text: str, advice: str) -> None:
    toy.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(toy)
    assert advice in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: there is no such file; .* a shipped one: .*digits"):
        config.load(tmp_path / "absent.yaml")


def fingerprint(cfg: config.Config) -> dict[str, Any]:
    return {**cfg.identity({}), **fixed(cfg.optimizer, cfg.train), "seed": cfg.seed}


def test_length_and_logging_are_not_part_of_the_fingerprint(toy: Path) -> None:
    one = fingerprint(config.load(toy))
    longer = config.load(toy, ["train.steps=9", "train.log_every=3", "train.keep=1", "train.device=cpu"])
    assert differences(one, fingerprint(longer)) == []
    same_steps = config.load(toy, ["optimizer.kind=apex"])
    assert differences(one, fingerprint(same_steps)) == []
    other = config.load(toy, ["model.width=8", "train.batch=7", "seed=1", "loss.lam=0.5"])
    changed = {text.split()[0] for text in differences(one, fingerprint(other))}
    assert {"model.width", "train.batch", "seed", "loss.lam"} <= changed
    assert all(key in changed or key.startswith("loss.lam.") for key in changed)


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_a_free_argument_of_the_network_is_not_part_of_the_fingerprint(name: str) -> None:
    def made(**model: Any) -> dict[str, Any]:
        tree = {"data": {"name": "digits"}, "model": {"name": name, "dropout": 0.1, **model}, "loss": {}}
        return fingerprint(config.from_tree(tree))

    kept = made()
    assert made(recompute=True) == kept and kept["model.dropout"] == 0.1
    assert differences(kept, made(dropout=0.2)) == ["model.dropout (0.1 -> 0.2)"]


OWN = """
from torch import nn
class Net(nn.Module):
    def __init__(self, width: int, num_classes: int = 0, **rest): super().__init__()
def points(count: int = 5): ...
"""


def test_import_paths_name_networks_and_data_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = "own_for_test_config"
    (tmp_path / f"{own}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    tree = {
        "data": {"name": f"{own}:points", "count": 7},
        "model": {"name": f"{own}:Net", "width": 4.0, "anything": "x"},
        "loss": {},
    }
    cfg = config.from_tree(tree)
    assert cfg.model == {"name": "own_for_test_config:Net", "width": 4, "anything": "x"}
    assert config.from_tree(cfg.tree()) == cfg and fingerprint(cfg)["data.count"] == 7
    for change, message in (
        (
            {"data": {"name": "own_for_test_config:points", "cuont": 7}},
            "unknown key data.cuont; did you mean data.count",
        ),
        (
            {"data": {"name": "own_for_test_config:pionts"}},
            "data.name: 'own_for_test_config:pionts' cannot be imported",
        ),
        ({"model": {"name": "no_such_module:Net"}}, "model.name: 'no_such_module:Net' cannot be imported"),
        ({"model": {"name": f"{own}:Net", "width": "wide"}}, "model.width: must be int"),
    ):
        with pytest.raises(ConfigError, match=message):
            config.from_tree({**tree, **change})


@pytest.mark.parametrize(
    "override", ["loss.lam=[1,2]", "loss.times=[1]", "loss.times=3", "model=[1]", "loss.guidance=4"]
)
@pytest.mark.parametrize("name", ["two_moons", "digits", None])
def test_values_of_another_kind_are_one_line(override: str, name: str | None, toy: Path) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")) as caught:
        config.load(name or toy, [override])
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Point:
    x: float
    tags: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, float, 3.0),
        (3.0, int, 3),
        (None, int | None, None),
        (2, int | None, 2),
        ([1, 2.0], tuple[int, ...], (1, 2)),
        ([1, 2], Sequence[float], (1.0, 2.0)),
        (["a"], Collection[str], ("a",)),
        (["a"], Iterable[str] | None, ("a",)),
        ([1.0], MutableSequence[int], [1]),
        (["a", "a"], AbstractSet[str], {"a"}),
        ([1, 1], set[float], {1.0}),
        (["a"], frozenset[str], frozenset("a")),
        (["a"], tuple, ("a",)),
        ([[0, 0.5]], tuple[tuple[int, float], ...], ((0, 0.5),)),
        ("a", Literal["a", 1], "a"),
        ({"x": 1, "tags": ["b"]}, Point, Point(1.0, ("b",))),
        ({"x": 1}, Point | float, Point(1.0)),
        (4, Point | float, 4.0),
        ({"k": [1]}, dict[str, Any], {"k": [1]}),
        ("anything", Any, "anything"),
    ],
)
def test_convert(value: Any, hint: Any, expected: Any) -> None:
    result = convert(value, hint, "key")
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, int),
        (1, bool),
        (1, str),
        ("1", int),
        (True, Literal[1]),
        ({}, Point),
        ({"y": 1}, Point),
        ("x", Point | float),
        ("text", Collection[str]),
        ([1], set[str]),
        ("f", Callable[[int], int]),
    ],
)
def test_convert_coerces_nothing_else(value: Any, hint: Any) -> None:
    with pytest.raises(ConfigError, match="key"):
        convert(value, hint, "key")


def test_names_of_conditions_are_a_list_that_survives_a_round_trip(toy: Path) -> None:
    cfg = config.load(toy, ["loss.shared=[text]"])
    assert cfg.loss["shared"] == ("text",) and config.from_tree(yaml.safe_load(yaml.safe_dump(cfg.tree()))) == cfg
    with pytest.raises(ConfigError, match=r"loss\.shared: must be a list, is 'text'"):
        config.load(toy, ["loss.shared=text"])


def test_a_set_is_saved_as_a_list_in_one_order() -> None:
    assert config._plain({"tags": {"b", "c", "a"}}) == {"tags": ["a", "b", "c"]}


def test_a_mapping_replaces_what_the_file_says_of_a_component(toy: Path) -> None:
    assert config.load(toy, ["model={name: mlp, depth: 3}"]).model == {"name": "mlp", "depth": 3}
    assert config.load(toy, ["model.depth=3"]).model == {"name": "mlp", "width": 16, "depth": 3}


def test_a_wheel_finds_its_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name that is no file here is looked for where setup.py installs configs/; a path is not."""
    installed = tmp_path / "share" / "mmf_fast" / "configs"
    installed.mkdir(parents=True)
    (installed / "mine.yaml").write_text(TOY)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert config.load("mine").model["width"] == config.load("mine.yaml").model["width"] == 16
    with pytest.raises(ConfigError, match=r"wrong/mine.yaml: there is no such file; .*: .*digits.*, mine"):
        config.load("wrong/mine.yaml")
