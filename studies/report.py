"""docs/results.md, a chapter for each study, and its figures, from studies/results/: python -m studies.report

Nothing in it is typed by hand but words: every number comes from the rows, so a test can make it again.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from mmf_fast.files import write_text, writing
from studies.rows import Rows
from studies.runner import ROOT, Study, all_studies, missing, read

__all__ = ["PAGE", "chapter", "page", "save_figure", "write"]

PAGE = ROOT / "docs" / "results.md"
FIGURES = ROOT / "docs" / "results"


def page() -> str:
    """docs/results.md as the rows that there are make it."""
    found = [(study, read(study)) for study in all_studies()]
    advice = [study.recommend(rows) for study, rows in found if study.recommend and rows]
    head = [
        "# Results",
        *([f"**Recommendation.** As far as these rows say: {'; '.join(filter(None, advice))}."] if any(advice) else []),
        "Each chapter is one question, and one command repeats it (`python -m studies` lists them, `--list` shows the "
        "cost). This page is made from the rows in studies/results by `python -m studies.report`. Figures are mean ± "
        'standard deviation over seeds; "beyond the error bars" means that these intervals do not overlap.',
    ]
    chapters = [chapter(study, rows) for study, rows in found if rows]
    waiting = [f"- {study.question} (`python -m studies.{study.name}`)" for study, rows in found if not rows]
    end = ["## Not run yet", "\n".join(waiting)] if waiting else []
    return _wrapped("\n\n".join(head + chapters + end)) + "\n"


def chapter(study: Study, rows: Rows) -> str:
    left, whole = len(missing(study, rows)), len(study.settings) * study.seeds
    seeds = max(row["seed"] for row in rows) + 1
    state = f"**{left} of {whole} runs are missing.** " if left else ""
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    parts = [
        f"## {study.title}",
        f"**Question.** {study.question}",
        f"**Setting.** {study.method}",
        f"![{study.title}](results/{study.name}.png)",
        f"**Answer.** {study.answer(rows)}",
        f"**What would change it.** {study.doubt}",
        f"{state}{len(rows)} runs, {seeds} seeds, {sum(row['seconds'] for row in rows) / 60:.0f} minutes by the clock; "
        f"commits {commits}; `python -m studies.{study.name}`.",
    ]
    return "\n\n".join(parts)


def save_figure(study: Study, rows: Rows, folder: Path = FIGURES) -> None:
    with writing(folder / f"{study.name}.png") as draft:
        study.draw(rows).savefig(draft, format="png", dpi=110, metadata={"Software": None})


def write() -> None:
    for study in all_studies():
        if rows := read(study):
            save_figure(study, rows)
    write_text(PAGE, page())


def _wrapped(text: str) -> str:
    """Paragraphs in lines of 120 characters; tables, lists, headings and pictures as they are."""
    blocks = text.split("\n\n")
    return "\n\n".join(
        block if re.match(r"[|#!-]|```", block) else textwrap.fill(block, 120, break_on_hyphens=False)
        for block in blocks
    )


if __name__ == "__main__":
    write()
    print(f"written: {PAGE}, {FIGURES}/")
