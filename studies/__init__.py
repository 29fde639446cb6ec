"""What Modular MeanFlow does, question by question: python -m studies lists them, docs/results.md has the answers."""

# Modules of this folder, in the order of docs/results.md.
STUDIES = (
    *("curriculum", "reasons", "digits", "fashion", "field", "little_data", "guidance"),
    *("pictures", "c2ot", "trajectories", "control"),
)
