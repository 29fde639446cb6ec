"""The pages say what the committed measurements say, and name what exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    names = [line.split()[0] for line in tree.strip().splitlines() if line.split()]
    missing = [name for name in names if not list(ROOT.glob(f"**/{name.rstrip('/')}"))]
    assert not missing


def test_the_drop_in_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
