"""What Modular MeanFlow does, question by question: python -m studies lists them, docs/results.md has the answers."""

STUDIES = ("curriculum", "reasons", "digits")  # modules of this folder, in the order of docs/results.md
