"Toy studies: kill, interrupt, fail or fill the disk; nobody is left behind and what was finished stays."
import contextlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import psutil
import pytest

from echochamber.core import StrictConfig, project_root
from echochamber.study.execution import launch, run_task
from echochamber.study.runs import Run

TOY = """
import subprocess, sys, time
from pathlib import Path
from echochamber.core import StrictConfig, StudyError
from echochamber.study.runs import Run, open_run
class ToyConfig(StrictConfig):
    after: str = ""
    gate: str = ""
    fail: str = ""
run = Run("toy", name, ToyConfig.parse(config))
with open_run(run) as progress:
    if run.config.fail:
        exec(run.config.fail)
    if run.config.gate:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    while run.config.gate and not Path(run.config.gate).exists():
        time.sleep(0.05)
    progress.report(1, 1)
"""
SESSION = """
import json, sys
from echochamber.core import StrictConfig
from echochamber.study import cli, graph
from echochamber.study.runs import Run
class ToyConfig(StrictConfig):
    after: str = ""
    gate: str = ""
    fail: str = ""
def study(gate, fail):
    first = Run("toy", "first", ToyConfig())
    second = Run("toy", "second", ToyConfig(after=first.reference, gate=gate, fail=fail), parents=(first,))
    third = Run("toy", "third", ToyConfig(after=second.reference), parents=(second,))
    return [first, second, third]
@cli.app.command()
def toy(gate: str, fail: str):
    graph.execute(study(gate, fail), expected=lambda run: 5.0, workers=1)
    print("heavy:", [module for module in ("torch", "distributed", "papermill") if module in sys.modules])
cli.main(["toy", *sys.argv[1:]])
"""


class ToyConfig(StrictConfig):
    after: str = ""
    gate: str = ""
    fail: str = ""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("ECHOCHAMBER_NOTEBOOKS", str(tmp_path / "nbs"))
    monkeypatch.delenv("ECHOCHAMBER_RUN", raising=False)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in ("name, config = '', {}", TOY)])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    (tmp_path / "nbs/experiments").mkdir(parents=True)
    nbformat.write(notebook, tmp_path / "nbs/experiments/toy.ipynb")
    return tmp_path


@pytest.fixture
def toy_study(place):
    "Start the toy study; whatever the test leaves alive is killed and counts as a failure."
    started = []

    def start(gate: str = "", fail: str = "") -> subprocess.Popen:
        started.append(subprocess.Popen([sys.executable, "-c", SESSION, gate, fail], cwd=project_root(), text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True))
        return started[-1]
    yield start
    for process in started:
        process.kill(), process.communicate()


def wait_for(condition, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def folder_of(place: Path, name: str) -> Path | None:
    return next(iter(place.glob(f"outputs/runs/toy/{name}-*")), None)


def family_at_the_gate(session: subprocess.Popen, place: Path) -> list[psutil.Process]:
    "Executor, kernel and the kernel's child of the second run, once they are all there."
    def members() -> list[psutil.Process]:
        return psutil.Process(session.pid).children(recursive=True)
    def at_the_gate() -> bool:
        assert session.poll() is None, session.communicate()
        return bool(folder_of(place, "second")) and any("time.sleep(300)" in " ".join(p.cmdline()) for p in members() if alive(p))
    wait_for(at_the_gate)
    return members()


def test_killed_study_leaves_nobody_and_continues(toy_study, place):
    session = toy_study(gate=str(place / "gate"))
    family = family_at_the_gate(session, place)
    assert len(family) >= 3
    session.kill(), session.wait()
    wait_for(lambda: not any(map(alive, family)))
    first = folder_of(place, "first")
    sealed = (first / "DONE").read_bytes(), (first / "DONE").stat().st_mtime_ns
    assert not (folder_of(place, "second") / "DONE").exists() and folder_of(place, "third") is None

    (place / "gate").touch()
    session = toy_study(gate=str(place / "gate"))
    printed, complaint = session.communicate(timeout=180)
    assert session.returncode == 0, complaint
    assert sealed == ((first / "DONE").read_bytes(), (first / "DONE").stat().st_mtime_ns), "a finished run was computed again"
    assert all((folder_of(place, name) / "DONE").exists() for name in ("second", "third"))
    assert json.loads((folder_of(place, "second") / "provenance.json").read_text())["attempts"] == 2

    session = toy_study(gate=str(place / "gate"))
    printed, complaint = session.communicate(timeout=180)
    assert session.returncode == 0 and "heavy: []" in printed, printed + complaint


def test_failing_notebook_gets_one_sentence_and_stops_what_builds_on_it(toy_study, place):
    session = toy_study(fail="raise ValueError('many words\\nof which the loss is not a number')")
    _, complaint = session.communicate(timeout=180)
    complaint, second = " ".join(complaint.split()), folder_of(place, "second")
    assert session.returncode == 1 and complaint.startswith("Error: ") and "Traceback (" not in complaint
    assert "toy second" in complaint and "ValueError" in complaint
    notebook = second / "toy.ipynb"
    assert str(notebook) in complaint and "the loss is not a number" in notebook.read_text()
    assert (folder_of(place, "first") / "DONE").exists() and not (second / "DONE").exists() and folder_of(place, "third") is None


@pytest.mark.parametrize(("fail", "sentence"), [
    ("raise StudyError('add digits to the vocabulary')", "add digits to the vocabulary"),
    ("raise OSError(28, 'No space left on device')", "no space left on the disk"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "kernel died"),
], ids=["StudyError", "full disk", "dead kernel"])
def test_a_failure_is_told_in_the_words_of_its_cause(fail, sentence, place):
    run = Run("toy", "failing", ToyConfig(fail=fail))
    failure = launch(run_task(run, threads=1))
    assert failure["kind"] == "StudyError" and sentence in failure["message"]
    assert not run.done and not list(run.folder.rglob("*.tmp")) and not list(run.folder.rglob("*partial*"))


def test_two_executors_compute_a_run_once(place):
    "The second waits until the first has sealed, not only until it has computed."
    run = Run("toy", "shared", ToyConfig())
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(launch, [run_task(run, threads=1)] * 2)) == [None, None]
    assert run.done and json.loads((run.folder / "provenance.json").read_text())["attempts"] == 1


def test_the_outputs_folder_cannot_be_written(place, monkeypatch):
    (place / "occupied").write_text("a file, not a folder")
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(place / "occupied"))
    finished = subprocess.run([sys.executable, "-c", SESSION, "", ""], cwd=project_root(), env=os.environ, text=True,
                              capture_output=True, timeout=180)
    assert finished.returncode == 1 and "occupied" in finished.stderr and "Traceback" not in finished.stderr
