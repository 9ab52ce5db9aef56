"""Finished runs that nobody computed: completions that lie in a table as the reader's own evaluation, with all it builds on."""
import pandas as pd

from echochamber.study.conditions import Condition, condition_labels, runs_of
from echochamber.study.runs import open_run

LABELS = ("seed", "pretraining_seed", "benchmark", "sampled")


def pretend_runs(condition: Condition, seed: int, completions: pd.DataFrame, preset: str = "laptop") -> None:
    "The runs of one seed of a condition, whose evaluation has these completions."
    labels = [name for name in (*LABELS, *condition_labels(condition)) if name in completions]
    for run in runs_of(condition, preset, seed):
        if run.done:
            continue
        with open_run(run):
            if run.stage == "evaluate":
                completions.drop(columns=labels).to_parquet(run.folder / "evaluation.parquet")
            else:
                pd.DataFrame({"step": [1], "loss": [1.0]}).to_parquet(run.folder / "metrics.parquet")
