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

COMMAND = Path(sys.executable).with_name("echochamber")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    reproduce(folder)
    return folder


def reproduce(folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"ECHOCHAMBER_OUTPUTS": str(folder)}
    finished = subprocess.run([COMMAND, "reproduce", "all", "--preset", "smoke", "--workers", "2"], env=environment, cwd=project_root(),
                              capture_output=True, text=True, timeout=400)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return finished


def test_every_artefact_is_there(outputs):
    for name, claim in (("convergence", "C1"), ("algorithms", "C6")):
        verdict = json.loads((outputs / f"results/smoke/{name}.json").read_text())
        assert verdict["claim"] == claim and verdict["line"]
        for part in ("", "_training", "_runs"):
            assert len(pd.read_parquet(outputs / f"results/smoke/{name}{part}.parquet"))
        for suffix in ("png", "pdf", "ipynb"):
            assert (outputs / f"figures/smoke/{name}.{suffix}").stat().st_size > 1000
    for stage, runs in {"pretrain": 1, "finetune": 4, "evaluate": 4}.items():
        folders = list((outputs / "runs" / stage).iterdir())
        assert len(folders) == runs
        for run in folders:
            assert {"DONE", "config.json", "provenance.json", f"{stage}.ipynb"} <= {path.name for path in run.iterdir()}


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
    assert time.time() - started < 30
    for name in ("convergence", "algorithms"):
        assert json.loads((outputs / f"results/smoke/{name}.json").read_text())["line"] in " ".join(finished.stdout.split())
    after = {path: path.stat().st_mtime_ns for path in before}
    assert before == after
