"""The studies, how far each has come, and what the rest of it costs: python -m studies"""

from studies.runner import all_studies, missing, read, remaining

for study in all_studies():
    rows = read(study)
    left = missing(study, rows)
    state = f"{remaining(study, rows) / 60:.0f} minutes left" if left else "complete"
    done = len(study.settings) * study.seeds - len(left)
    print(f"python -m studies.{study.name:12} {done:3} of {done + len(left):3} runs, {state:18} {study.question}")
print("python -m studies.report       docs/results.md and its figures from the rows that there are")
