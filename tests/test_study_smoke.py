"The whole study at preset smoke, through the command line: every experiment and figure notebook is executed by papermill."
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from echochamber.core import project_root
from echochamber.study.figures import FIGURES, figure_runs

COMMAND = Path(sys.executable).with_name("echochamber")
CONDITIONS = {one.name: one for figure in FIGURES.values() for one in figure.conditions}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    reproduce(folder)
    return folder


def reproduce(folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"ECHOCHAMBER_OUTPUTS": str(folder)}
    finished = subprocess.run([COMMAND, "reproduce", "all", "--preset", "smoke", "--workers", "2"], env=environment,
                              cwd=project_root(), capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return finished


def test_every_figure_is_published_and_nothing_is_shipped(outputs):
    place = outputs / "reproduced/smoke"
    for name, figure in FIGURES.items():
        verdict = json.loads((place / f"{name}.json").read_text())
        assert verdict["claim"] == figure.claim and verdict["line"] and verdict["predictions"]
        for suffix in ("png", "pdf", "ipynb"):
            assert (place / f"{name}.{suffix}").stat().st_size > 1000
    assert not (outputs / "results").exists() and not (outputs / "figures").exists()


def test_every_condition_has_its_tables(outputs):
    for name in CONDITIONS:
        evaluations, training, costs = (pd.read_parquet(outputs / f"reproduced/smoke/{name}{part}.parquet")
                                        for part in ("", "_training", "_costs"))
        assert set(evaluations.condition) == {name} and {"seed", "pretraining_seed", "sampled", "benchmark"} <= set(evaluations)
        assert set(training.stage) == {"pretrain", "finetune"} and not [column for column in training if "second" in column]
        assert list(costs.stage) == ["pretrain", "finetune", "evaluate"] and (costs.seconds > 0).all() and (costs.tokens > 0).all()


def test_every_run_is_whole_and_shared(outputs):
    wanted = {run.reference for figure in FIGURES.values() for run in figure_runs(figure, "smoke", 1)}
    assert {f"{run.parent.name}/{run.name}" for run in outputs.glob("runs/[!f]*/*")} | {
        f"finetune/{run.name}" for run in outputs.glob("runs/finetune/*")} == wanted
    for run in outputs.glob("runs/*/*"):
        assert {"DONE", "config.json", "provenance.json"} <= {path.name for path in run.iterdir()} and list(run.glob("*.ipynb"))


def test_pretraining_keeps_the_snapshots_that_rl_can_start_from(outputs):
    for run in (outputs / "runs/pretrain").iterdir():
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000020", "step-000040"]


def test_evaluation_keeps_every_completion(outputs):
    for run in (outputs / "runs/evaluate").iterdir():
        evaluation, config = pd.read_parquet(run / "evaluation.parquet"), json.loads((run / "config.json").read_text())
        assert len(evaluation) == len(config["steps"]) * config["questions"] * (config["samples"] + 1)
        assert evaluation.completion.notna().all() and set(evaluation.outcome) <= {
            "correct", "wrong", "no_answer", "error", "timeout", "unsupported"}


def test_second_time_computes_nothing(outputs):
    before = {path: path.stat().st_mtime_ns for path in outputs.rglob("*") if path.is_file() and path.suffix != ".lock"}
    started = time.time()
    finished = reproduce(outputs)
    assert time.time() - started < 60
    for name in FIGURES:
        verdict = json.loads((outputs / f"reproduced/smoke/{name}.json").read_text())
        assert " ".join(verdict["line"].split()) in " ".join(finished.stdout.split())
    assert before == {path: path.stat().st_mtime_ns for path in before}
