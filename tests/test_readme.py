"""The pages say what the committed measurements say, and name what exists."""

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


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 150
