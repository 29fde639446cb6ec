"""Imports go down only, and MAY_IMPORT says which: it is the map of the house, quoted in CONTRIBUTING.md."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mmf_fast

PACKAGE = Path(__file__).parent.parent / "mmf_fast"

# room -> what it imports, from the top floor down; no more than the code does.
MAY_IMPORT: dict[str, set[str]] = {
    "__main__": {"cli"},
    "planning": {"train", "config", "objective", "data", "forward", "devices"},
    "train": {"cli", "config", "training", "models", "objective", "data", "registry"},
    "doctor": {"contract", "forward", "registry"},
    "cli": set(),  # it finds each command by name
    "evaluation": {"config", "sampling", "models", "data", "pictures", "files", "devices", "distributed"},
    "config": {"training", "models", "objective", "data", "registry"},
    "__init__": {"training", "sampling", "models", "objective", "forward"},
    "training": {
        "sampling", "models", "objective", "data", "contract", "pictures", "files", "devices", "distributed",
    },
    "sampling": {"models", "data", "contract", "pictures", "files", "devices", "registry"},
    "models": {"forward", "contract", "files", "registry"},
    "objective": {"forward", "ops", "contract"},
    "data": {"files", "registry"},
    "forward": {"ops"},
    "pictures": {"files"},
    "files": set(),
    "distributed": {"devices"},
    "devices": {"ops"},
    "ops": set(),
    "registry": set(),
    "contract": set(),
}  # fmt: skip
BELOW_FORWARD = {"torch", "triton", "mmf_fast"}  # forward and ops stand on these alone
ABOVE = {"studies", "benchmarks", "tests"}


def layer(name: str) -> str:
    """mmf_fast.training.engines.local -> training; mmf_fast -> __init__"""
    return name.split(".")[1] if "." in name else "__init__"


def imports(source: str, own: str) -> list[str]:
    """Dotted names a module imports, anywhere in it; `from mmf_fast import data` counts as mmf_fast.data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"{own}: relative import in line {node.lineno}")
            base = node.module or ""
            found += [f"mmf_fast.{alias.name}" for alias in node.names] if base == "mmf_fast" else [base]
    return found


def violations(source: str, own: str) -> list[str]:
    wrong = []
    for name in imports(source, own):
        top = name.split(".")[0]
        if top == "mmf_fast":
            if layer(name) not in MAY_IMPORT[layer(own)] | {layer(own)}:
                wrong.append(f"{own} imports {name}")
        elif layer(own) in ("forward", "ops") and top not in BELOW_FORWARD | sys.stdlib_module_names:
            wrong.append(f"{own} imports {name}: only torch and triton are below it")
        elif top in ABOVE:
            wrong.append(f"{own} imports {name}: it stands on the package, not the other way round")
        elif top == "deepspeed" and own != "mmf_fast.training.engines.deepspeed":
            wrong.append(f"{own} imports deepspeed: only its engine may")
    return wrong


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


@pytest.mark.parametrize("name", modules())
def test_imports_go_down_only(name: str) -> None:
    assert violations(modules()[name].read_text(), name) == []


def test_every_arrow_of_the_map_is_in_the_code_and_points_down() -> None:
    found: dict[str, set[str]] = {room: set() for room in MAY_IMPORT}
    for own, path in modules().items():
        names = imports(path.read_text(), own)
        found[layer(own)] |= {layer(name) for name in names if name.split(".")[0] == "mmf_fast"}
    assert {room: names - {room} for room, names in found.items()} == MAY_IMPORT
    floors = list(MAY_IMPORT)
    for room, names in MAY_IMPORT.items():
        assert {name for name in names if floors.index(name) < floors.index(room)} == set(), room


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "studies").glob("*.py")), ids=lambda path: path.stem)
def test_a_study_stands_on_the_package_like_a_script(path: Path) -> None:
    """On its rooms and no private name of them, not on the commands; on no test, and on no benchmark but the losses of
    the field, which are written once."""
    source = path.read_text()
    names = imports(source, f"studies.{path.stem}")
    found = {layer(name) for name in names if name.split(".")[0] == "mmf_fast"}
    rooms = set(MAY_IMPORT) - {"__main__", "cli", "planning", "doctor"}
    assert found <= rooms | set(mmf_fast.__all__)
    others = {name for name in names if name.split(".")[0] in ("tests", "support", "benchmarks")}
    assert all(name.startswith("benchmarks.field") for name in others)
    private = [alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)
               for alias in node.names if alias.name.startswith("_") and node.module != "__future__"]  # fmt: skip
    assert private == []


def test_contributing_quotes_the_map() -> None:
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    lines = page.split("```text\n")[1].split("```")[0].splitlines()
    quoted = {room: set(names.split()) for room, _, names in (line.partition(" -> ") for line in lines)}
    assert quoted == {room: names for room, names in MAY_IMPORT.items() if names}


def test_no_two_modules_have_one_name() -> None:
    stems = [path.stem for path in modules().values() if path.stem not in ("__init__", "__main__")]
    assert {stem for stem in stems if stems.count(stem) > 1} == set()


@pytest.mark.parametrize(
    ("own", "source"),
    [
        ("mmf_fast.models.dit", "from mmf_fast.training import Trainer"),
        ("mmf_fast.objective.loss", "import mmf_fast.models.dit"),
        ("mmf_fast.sampling", "def late():\n    from mmf_fast import config"),
        ("mmf_fast.data.digits", "from mmf_fast.models import build"),
        ("mmf_fast.forward.dual", "import numpy"),
        ("mmf_fast.ops.attention", "from mmf_fast.models import layers"),
        ("mmf_fast.training.trainer", "import deepspeed"),
        ("mmf_fast.training.trainer", "from mmf_fast import Dual"),
        ("mmf_fast.training.engines.local", "from mmf_fast.config import ConfigError"),
        ("mmf_fast.pictures", "from studies.rows import Rows"),
    ],
)
def test_an_import_that_goes_up_is_noticed(own: str, source: str) -> None:
    assert len(violations(source, own)) == 1


def test_relative_imports_are_noticed() -> None:
    with pytest.raises(AssertionError, match="relative"):
        violations("from . import layers", "mmf_fast.models.dit")


def test_no_module_of_the_package_hides_another_library() -> None:
    """`deepspeed mmf_fast/train.py` puts mmf_fast/ itself first on sys.path, before every library."""
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    libraries = {"torch", "triton", "numpy", "scipy", "sklearn", "omegaconf", "safetensors", "tensorboard", "tqdm"}
    libraries |= {"matplotlib", "yaml", "PIL", "deepspeed", "datasets", "evaluate", "transformers", "einops", "apex"}
    assert names & (set(sys.stdlib_module_names) | libraries) == set()


# What a wheel in an empty environment lacks, when torch and numpy are all there is besides.
ABSENT = ["matplotlib", "omegaconf", "PIL", "pyarrow", "safetensors", "scipy", "sklearn", "tensorboard", "tqdm", "yaml"]
ABSENT += ["deepspeed", "nvtx", "triton"]


def without_extras(code: str, folder: Path) -> str:
    """What a program prints that can import none of these."""
    block = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))\n"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", block + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loss_needs_torch_and_numpy_alone(tmp_path: Path) -> None:
    readme = (PACKAGE.parent / "README.md").read_text()
    own_network = readme.split("```python\n")[1].split("```")[0]
    assert "sample(" in own_network
    without_extras(own_network, tmp_path)


def test_a_command_says_in_a_line_which_extra_it_lacks(tmp_path: Path) -> None:
    code = """
import contextlib, io
from mmf_fast.cli import COMMANDS, main
arguments = {"train": ["--config", "digits"], "ops": [], "doctor": ["mmf_fast.models:MLP", "--shape", "2"]}
for name in COMMANDS:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main([name, *arguments.get(name, ["--run", "x", "--out", "x.png"][: 4 if name == "sample" else 2])])
    print(name, status, said.getvalue().strip())
"""
    said = {line.split()[0]: line.split(maxsplit=2)[1:] for line in without_extras(code, tmp_path).splitlines()}
    assert said["ops"] == ["0"]
    for name, extra in {"train": "train", "sample": "eval", "evaluate": "eval", "fid": "eval", "plan": "train"}.items():
        status, line = said[name]
        assert status == "2" and f"error: mmf {name} needs" in line and f"[{extra}]" in line


def test_whoever_wants_the_loss_alone_imports_torch_and_little_else() -> None:
    """Dynamo alone takes as long to import as torch; the rest is what training and evaluation need."""
    late = ["torch._dynamo", "matplotlib", "omegaconf", "PIL", "scipy", "sklearn", "safetensors", "deepspeed"]
    code = f"import sys, mmf_fast.models, mmf_fast.sampling; print([name for name in {late} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
