"Toy studies: kill, interrupt, fail or fill the disk; nobody is left behind and what was finished stays."
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from toy_study import (
    ToyConfig,
    alive,
    family_at_the_gate,
    finished,
    folder_of,
    line_with,
    start_session,
    wait_for,
    write_notebook,
)

from echochamber.core import StudyError, project_root, refused
from echochamber.study.execution import kernel_environment, launch, run_task
from echochamber.study.runs import Run

pytestmark = pytest.mark.sessions


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("ECHOCHAMBER_NOTEBOOKS", str(tmp_path / "nbs"))
    monkeypatch.delenv("ECHOCHAMBER_RUN", raising=False)
    write_notebook(tmp_path / "nbs")
    return tmp_path


@pytest.fixture
def toy_study():
    "Start the toy study; whatever the test leaves alive is killed."
    started = []

    def start(*arguments, **options) -> subprocess.Popen:
        started.append(start_session(*arguments, **options))
        return started[-1]
    yield start
    for process in started:
        process.kill(), process.communicate()


def attempts(place: Path, name: str) -> int:
    return json.loads((folder_of(place, name) / "provenance.json").read_text(encoding="utf-8"))["attempts"]


def test_killed_study_leaves_nobody_and_continues(toy_study, place):
    session = toy_study(gate=str(place / "gate"))
    family = family_at_the_gate(place, session)
    assert len(family) >= 3
    session.kill(), session.wait()
    wait_for(lambda: not any(map(alive, family)))
    first = folder_of(place, "first")
    sealed = (first / "DONE").read_bytes(), (first / "DONE").stat().st_mtime_ns
    assert not finished(place, "second") and folder_of(place, "third") is None

    (place / "gate").touch()
    session = toy_study(gate=str(place / "gate"))
    printed, complaint = session.communicate(timeout=180)
    assert session.returncode == 0, complaint
    assert sealed == ((first / "DONE").read_bytes(), (first / "DONE").stat().st_mtime_ns), "a finished run was computed again"
    assert finished(place, "second", "third") and attempts(place, "second") == 2

    session = toy_study(gate=str(place / "gate"))
    printed, complaint = session.communicate(timeout=180)
    assert session.returncode == 0 and "heavy: []" in printed, printed + complaint


def test_the_same_study_twice_at_once_is_computed_once(toy_study, place):
    "The second command waits and says for whom; it leaves no mark, and takes over if the first is killed."
    first = toy_study(gate=str(place / "gate"))
    family = family_at_the_gate(place, first)
    second = toy_study(gate=str(place / "gate"))
    assert "toy second" in line_with(second, "waiting for process")
    assert not (folder_of(place, "second") / ".failure.json").exists()
    first.kill(), first.wait()
    wait_for(lambda: not any(map(alive, family)))  # or they would pass for the second's, and the third might be faster
    family_at_the_gate(place, second)
    third = toy_study(gate=str(place / "gate"))
    line_with(third, "waiting for process")
    (place / "gate").touch()
    for session in (second, third):
        _, complaint = session.communicate(timeout=180)
        assert session.returncode == 0, complaint
    assert finished(place, "first", "second", "third") and attempts(place, "second") == 2 and attempts(place, "third") == 1
    assert not list(place.glob("outputs/runs/toy/*/.failure.json"))


def test_failing_notebook_gets_one_sentence_and_stops_what_builds_on_it(toy_study, place):
    session = toy_study(fail="raise ValueError('many words\\nof which the loss is not a number')")
    _, complaint = session.communicate(timeout=180)
    complaint, second = " ".join(complaint.split()), folder_of(place, "second")
    assert session.returncode == 1 and complaint.startswith("Error: ") and "Traceback (" not in complaint
    assert "toy second: failed with ValueError: many words" in complaint and "1 that build on this" in complaint
    notebook = second / "toy.ipynb"
    assert str(notebook) in complaint and "the loss is not a number" in notebook.read_text(encoding="utf-8")
    assert finished(place, "first") and not finished(place, "second") and folder_of(place, "third") is None


@pytest.mark.parametrize(("fail", "sentence"), [
    ("raise StudyError('add digits to the vocabulary')", "add digits to the vocabulary"),
    ("raise OSError(28, 'No space left on device')", "no space left on the disk"),
    ("import torch; torch.save(torch.zeros(100_000), '/dev/full')", "no space left on the disk"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "kernel died"),
], ids=["StudyError", "full disk", "full disk for torch", "dead kernel"])
def test_a_failure_is_told_in_the_words_of_its_cause(fail, sentence):
    run = Run("toy", "failing", ToyConfig(fail=fail))
    assert sentence in refused(lambda: launch(run_task(run, threads=1)))
    assert not run.done and not list(run.folder.rglob("*.tmp")) and not list(run.folder.rglob("*partial*"))


def test_two_executors_compute_a_run_once(place):
    "The second waits until the first has finished the run, not only until it has computed."
    run = Run("toy", "shared", ToyConfig())
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(launch, [run_task(run, threads=1)] * 2)) == [None, None]
    assert run.done and attempts(place, "shared") == 1


def test_the_outputs_folder_cannot_be_written(toy_study, place, monkeypatch):
    (place / "occupied").write_text("a file, not a folder")
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(place / "occupied"))
    session = toy_study()
    _, complaint = session.communicate(timeout=180)
    assert session.returncode == 1 and "occupied" in complaint and "Traceback" not in complaint


def test_files_of_the_working_folder_are_not_executed(toy_study, place):
    "Neither by an executor nor by a kernel, though the project itself is found through PYTHONPATH alone."
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    for name in ("email", "random", "string", "token"):
        (elsewhere / f"{name}.py").write_text(f"open({str(place / 'executed')!r}, 'w').write('{name}')", encoding="utf-8")
    session = toy_study(cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(project_root())})
    _, complaint = session.communicate(timeout=180)
    assert session.returncode == 0 and finished(place, "first", "second", "third"), complaint
    subprocess.run([sys.executable, "-m", "ipykernel_launcher", "--version"], cwd=elsewhere, check=True,
                   env=os.environ | kernel_environment(threads=1))
    assert not (place / "executed").exists(), (place / "executed").read_text()


def test_temporary_files_in_a_folder_with_a_long_name(place, monkeypatch):
    "Too long for the names of Unix sockets."
    (long := place / ("long-" * 20)).mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    run = Run("toy", "long", ToyConfig())
    launch(run_task(run, threads=1))
    assert run.done and not list(long.glob("echochamber-*"))


def test_a_task_that_is_not_wanted_any_more_ends_at_once(place):
    run = Run("toy", "unwanted", ToyConfig(gate=str(place / "gate")))
    with pytest.raises(StudyError, match="^was cancelled$"):
        launch(run_task(run, threads=1), cancelled=lambda: run.status == "running")
    assert run.status == "interrupted"
