"""The pages say what the committed measurements say, and name what exists."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmf_fast.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_performance_table_is_that_of_the_committed_run() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.report", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run python -m benchmarks.report"


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKS = [(page, link) for page in PAGES for link in sorted(set(re.findall(r"\]\(([^)#:]+)\)", page.read_text())))]


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda value: getattr(value, "name", value))
def test_links_lead_somewhere(page: Path, link: str) -> None:
    assert (page.parent / link).exists()


def test_the_tree_names_real_files() -> None:
    tree = README.split("```text")[1].split("```")[0]
    names = re.findall(r"[\w/]+(?:\.py|/)(?!\S)", tree)
    assert len(names) > 15
    assert [name for name in names if not list(ROOT.glob(f"**/{name.rstrip('/')}"))] == []


BLOCKS = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)]


@pytest.mark.parametrize("block", BLOCKS, ids=["own network", "adapter", "own training", "own optimizers"])
def test_a_block_runs_outside_of_the_checkout(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "a page", "exec"), {"__name__": "page"})


def test_the_commands_of_the_readme_exist() -> None:
    named = set(re.findall(r"\bmmf ([a-z]+)", README))
    assert {"train", "sample", "evaluate", "doctor"} <= named <= set(COMMANDS)


def test_the_figures_of_the_recipes_are_those_of_mmf_evaluate() -> None:
    """docs/recipes holds the evaluation.json of a run of each."""

    def figure(name: str, of: str, column: str) -> float:
        found: float = json.loads((ROOT / f"docs/recipes/{name}.json").read_text())["figures"][of][column]
        return found

    text = " ".join(README.split())
    agreement = [f"{100 * figure('fashion', 'class_agreement', column):.0f} %" for column in ("1", "validation")]
    assert f"sees the class asked for in {agreement[0]} of them (in {agreement[1]} of test images)" in text
    guided, plain = (figure(name, "frechet_distance", "1") for name in ("fashion", "fashion_omega_1"))
    assert f"is {guided:.0f}, and at scale 1, which is no guidance, {plain:.0f}" in text
    distance, real = (figure("digits", "frechet_distance", column) for column in ("1", "validation"))
    assert f"Frechet distance {distance:.1f}, of real unseen digits {real:.1f}" in text


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 150
