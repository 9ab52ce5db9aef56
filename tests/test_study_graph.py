"A study that is killed leaves nobody behind, loses nothing that was finished, and continues with the same command."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from echochamber.core import StudyError, project_root
from echochamber.study.graph import execute, plan
from echochamber.study.presets import FIGURES

COMMAND = Path(sys.executable).with_name("echochamber")


def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen([COMMAND, "reproduce", "--preset", "smoke"], env=os.environ | {"ECHOCHAMBER_OUTPUTS": str(folder)},
                            cwd=project_root(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, seconds: float = 90):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def test_killed_study_continues(tmp_path):
    first = start(tmp_path)
    pretraining = lambda: list(tmp_path.glob("runs/pretrain/*/DONE"))
    wait_for(lambda: pretraining() and list(tmp_path.glob("runs/finetune/*/progress.json")))
    family = psutil.Process(first.pid).children(recursive=True)
    assert family, "the run should be computed in a process of its own"
    first.send_signal(signal.SIGKILL)
    first.wait()
    wait_for(lambda: not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family), 20)
    assert not list(tmp_path.glob("figures/**/*.png")) and not list(tmp_path.glob("runs/finetune/*/DONE"))

    before = pretraining()[0].stat().st_mtime_ns
    second = start(tmp_path)
    output, _ = second.communicate(timeout=200)
    assert second.returncode == 0, output
    assert pretraining()[0].stat().st_mtime_ns == before, "a finished run was computed again"
    assert json.loads((tmp_path / "results/smoke/convergence.json").read_text())["line"] in " ".join(output.split())


def test_interrupt_speaks(tmp_path):
    command = start(tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/pretrain/*/progress.json")))
    command.send_signal(signal.SIGINT)
    output, _ = command.communicate(timeout=30)
    assert command.returncode == 130 and "run the same command to continue" in output and "Traceback" not in output
    assert not list(tmp_path.rglob("*.tmp"))


def test_damaged_run_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path))
    run = FIGURES["convergence"].runs("smoke", 1)[0]
    run.folder.mkdir(parents=True)
    (run.folder / "DONE").write_text('{"model": {"bytes": 3, "modified": 0, "sha256": ""}}')
    runs = plan([FIGURES["convergence"]], "smoke", 1)
    assert runs[0].status == "corrupt"
    with pytest.raises(StudyError, match="model is missing"):
        execute(runs)
    assert run.folder.exists()
