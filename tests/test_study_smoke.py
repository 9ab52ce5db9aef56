"The whole study at preset smoke, through the command line: every run and every figure is executed by papermill."
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
from toy_study import alive, wait_for

from echochamber.core import project_root
from echochamber.study.figures import FIGURES, condition_tables, figure_runs

COMMAND = Path(sys.executable).with_name("echochamber")
CONDITIONS = {one.name: one for name in ("algorithms", "precision") for one in FIGURES[name].conditions}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> SimpleNamespace:
    """The study at preset smoke, interrupted while it pretrains, killed in the middle of RL, and finished.

    `outputs`: its folder; `interrupted`: status and output of the first command; `survivors`: processes of the killed one
    that went on; `killed`: names of the files it left; `pretrained`: when the pretrainings were done that were, before and after."""
    outputs = tmp_path_factory.mktemp("outputs")
    first = start(outputs)
    wait_for(lambda: list(outputs.glob("runs/pretrain/*/progress.json")))
    first.send_signal(signal.SIGINT)
    interrupted = first.communicate(timeout=60)[0], first.returncode, list(outputs.rglob("*.tmp"))
    second, pretraining = start(outputs), lambda: list(outputs.glob("runs/pretrain/*/DONE"))
    wait_for(lambda: pretraining() and list(outputs.glob("runs/finetune/*/progress.json")))
    family, moments = psutil.Process(second.pid).children(recursive=True), {path: path.stat().st_mtime_ns for path in pretraining()}
    second.send_signal(signal.SIGKILL)
    second.communicate()
    wait_for(lambda: not any(map(alive, family)), 60)
    killed = [path.name for path in outputs.rglob("*") if path.is_file()]
    finish(outputs)
    return SimpleNamespace(outputs=outputs, interrupted=interrupted, family=family, killed=killed,
                           pretrained=(moments, {path: path.stat().st_mtime_ns for path in moments}))


@pytest.fixture(scope="module")
def outputs(study) -> Path:
    return study.outputs


def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen([COMMAND, "reproduce", "all", "--preset", "smoke", "--workers", "2"], cwd=project_root(), text=True,
                            env=os.environ | {"ECHOCHAMBER_OUTPUTS": str(folder)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(folder: Path) -> str:
    "Everything that is missing; what the command says."
    command = start(folder)
    output, _ = command.communicate(timeout=900)
    assert command.returncode == 0, output[-3000:]
    return output


def test_an_interrupted_study_says_how_to_go_on(study):
    output, status, leftovers = study.interrupted
    assert status == 130 and "run the same command to continue" in output and "Traceback" not in output and not leftovers


def test_a_killed_study_leaves_nothing_running_and_continues(study):
    assert study.family, "runs should be computed in processes of their own"
    assert not [name for name in study.killed if name.endswith((".png", ".pdf"))]
    assert study.pretrained[0] == study.pretrained[1], "a finished run was computed again"


def test_every_figure_is_published_and_nothing_is_shipped(outputs):
    place = outputs / "reproduced/smoke"
    for name in FIGURES:
        verdict = json.loads((place / f"{name}.json").read_text())
        assert verdict["claim"] == FIGURES[name].claim and verdict["line"] and verdict["predictions"]
        for suffix in ("png", "svg", "pdf", "ipynb"):
            assert (place / f"{name}.{suffix}").stat().st_size > 1000
    assert not (outputs / "results").exists() and not (outputs / "figures").exists()


def test_every_condition_has_its_tables(outputs, monkeypatch):
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(outputs))
    for condition in CONDITIONS.values():
        evaluations, training, costs = condition_tables(condition, "smoke", [0]).values()
        assert set(evaluations.condition) == {condition.name}
        assert {"seed", "pretraining_seed", "sampled", "benchmark"} <= set(evaluations)
        assert set(training.stage) == {"pretrain", "finetune"} and not [column for column in training if "second" in column]
        assert list(costs.stage) == ["pretrain", "finetune", "evaluate"] and (costs.seconds > 0).all() and (costs.tokens > 0).all()


def test_every_run_is_whole_and_shared(outputs):
    wanted = {run.reference for name in FIGURES for run in figure_runs(FIGURES[name], "smoke", 1)}
    assert {f"{run.parent.name}/{run.name}" for run in outputs.glob("runs/[!f]*/*")} | {
        f"finetune/{run.name}" for run in outputs.glob("runs/finetune/*")} == wanted
    for run in outputs.glob("runs/*/*"):
        assert {"DONE", "config.json", "provenance.json"} <= {path.name for path in run.iterdir()} and list(run.glob("*.ipynb"))


def test_pretraining_keeps_the_snapshots_that_rl_can_start_from(outputs):
    for run in (outputs / "runs/pretrain").iterdir():
        last = json.loads((run / "config.json").read_text())["fit"]["steps"]
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step-{step:06d}" for step in (2, 4, 8, 16, last)]


def test_evaluation_keeps_every_completion(outputs):
    for run in (outputs / "runs/evaluate").iterdir():
        evaluation, config = pd.read_parquet(run / "evaluation.parquet"), json.loads((run / "config.json").read_text())
        assert len(evaluation) == len(config["steps"]) * config["questions"] * (config["samples"] + 1)
        assert evaluation.completion.notna().all() and set(evaluation.outcome) <= {
            "correct", "wrong", "no_answer", "error", "timeout", "unsupported"}


def test_second_time_computes_nothing(outputs):
    before = {path: path.stat().st_mtime_ns for path in outputs.rglob("*") if path.is_file() and path.suffix != ".lock"}
    said = finish(outputs)
    for name in FIGURES:
        verdict = json.loads((outputs / f"reproduced/smoke/{name}.json").read_text())
        assert " ".join(verdict["line"].split()) in " ".join(said.split())
    assert before == {path: path.stat().st_mtime_ns for path in before}
