"What is missing is computed after what it builds on, side by side where it can be; what fails stops only what builds on it."
import io
import os
import signal
import time

import nbformat
import pytest
from rich.console import Console
from toy_study import alive, environment, family_at_the_gate, finished, start_session
from toy_study import write_notebook as write_toy_notebook

from echochamber.core import StrictConfig, refused
from echochamber.study.graph import execute, plan
from echochamber.study.runs import Run

pytestmark = pytest.mark.sessions

NOTEBOOK = """
import os, time
from pathlib import Path
from echochamber.core import StrictConfig, StudyError
from echochamber.study.runs import Run, open_run
class ToyConfig(StrictConfig):
    parent: str = ""
    figure: str = ""
    fail: bool = False
    meet: str = ""
    company: int = 0
run = Run(STAGE, name, ToyConfig.parse(config))
with open_run(run) as progress:
    if run.config.meet:
        (Path(run.config.meet) / name).touch()
    start = time.time()
    while len(list(Path(run.config.meet).iterdir()) if run.config.meet else []) < run.config.company:
        assert time.time() - start < 120, "nobody else came"
        time.sleep(0.05)
    if run.config.fail:
        raise StudyError("there are no digits; add them")
    (run.folder / "threads.txt").write_text(os.environ["OMP_NUM_THREADS"])
    progress.report(1, 1)
"""


class ToyConfig(StrictConfig):
    parent: str = ""
    figure: str = ""
    fail: bool = False
    meet: str = ""
    company: int = 0


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A study of stages `base`, `child` and a figure `toy`."
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("ECHOCHAMBER_NOTEBOOKS", str(tmp_path / "nbs"))
    monkeypatch.delenv("ECHOCHAMBER_RUN", raising=False)
    for stage, path in {"base": "experiments/base", "child": "experiments/child", "figure": "figures/toy"}.items():
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in (
            "name = ''\nconfig = {}", NOTEBOOK.replace("STAGE", repr(stage)))])
        notebook.cells[0].metadata["tags"] = ["parameters"]
        file = tmp_path / "nbs" / f"{path}.ipynb"
        file.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, file)
    return tmp_path


def child_of(base: Run, name: str, **fields) -> Run:
    return Run("child", name, ToyConfig(parent=base.reference, **fields), (base,))


def test_children_of_one_parent_are_computed_side_by_side(place):
    "Dask would keep them where their parent's result is; they wait for each other, so alone none could end."
    (meeting := place / "meeting").mkdir()
    base = Run("base", "base", ToyConfig())
    children = [child_of(base, f"seed{seed}", meet=str(meeting), company=2) for seed in range(2)]
    assert execute(children, workers=2, console=Console(file=io.StringIO())) == 3
    assert all(run.done for run in [base, *children])


def test_a_failure_stops_only_what_builds_on_it_and_each_is_one_sentence(place):
    base, broken = Run("base", "good", ToyConfig()), Run("base", "broken", ToyConfig(fail=True))
    log = Console(file=io.StringIO(), width=200)
    runs = [broken, child_of(broken, "orphan"), base, child_of(base, "heir"), child_of(base, "failing", fail=True)]
    figure = Run("figure", "toy", ToyConfig(figure="toy", parent=runs[1].reference), (runs[1],))
    sentence = refused(lambda: execute([*runs, figure], workers=2, console=log))
    lines = sentence.splitlines()
    assert lines[0].startswith("base broken: there are no digits; add them (the notebook with its traceback: ")
    assert lines[1].startswith("child failing: there are no digits; add them") and len(lines) == 3
    assert lines[2] == "2 that build on this were not started."
    assert [run.status for run in runs] == ["failed", "absent", "done", "done", "failed"]
    told = log.file.getvalue()
    assert "child heir: done" in told and "child orphan: skipped" in told and "2 of 6 done, 2 failed" in told


def test_a_figure_is_a_run_behind_its_parents_drawn_once_and_again_if_damaged(place):
    base = Run("base", "base", ToyConfig())
    figure = Run("figure", "toy", ToyConfig(figure="toy", parent=base.reference), (base,))
    compute = lambda: execute([figure], console=Console(file=io.StringIO()))
    assert (compute(), compute()) == (2, 0) and figure.done
    (figure.folder / "threads.txt").unlink()
    assert compute() == 1 and figure.done, "nothing is built on a figure, so it is drawn again unasked"


def test_damaged_run_is_named_and_computed_again_if_asked(place):
    run = Run("base", "base", ToyConfig())
    run.folder.mkdir(parents=True)
    (run.folder / "DONE").write_text('{"model": {"bytes": 3, "modified": 0, "sha256": ""}}', encoding="utf-8")
    child = child_of(run, "child")
    assert "model is missing" in refused(lambda: execute([child]))
    assert run.folder.exists() and child.status == "absent"
    said = Console(file=io.StringIO(), width=200)
    assert execute([child], redo=True, console=said) == 2 and child.done
    aside = run.folder.parents[2] / "damaged" / run.reference
    assert (aside / "DONE").exists() and str(aside) in said.file.getvalue()


def test_a_terminal_shows_bars_and_the_share_of_cores_is_given(place):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    runs = plan([child_of(Run("base", "base", ToyConfig()), "heir")])
    assert execute(runs, workers=1, console=terminal) == 2
    shown = terminal.file.getvalue()
    assert "study" in shown and "base base" in shown and "child heir: done" in shown and "2 of 2 done" in shown
    assert (runs[0].folder / "threads.txt").read_text() == str(len(os.sched_getaffinity(0)))


def test_interrupted_session_ends_its_executors_before_itself(tmp_path):
    write_toy_notebook(tmp_path / "nbs")
    session = start_session(str(tmp_path / "gate"), env=environment(tmp_path))
    family = family_at_the_gate(tmp_path, session)
    session.send_signal(signal.SIGINT)
    _, complaint = session.communicate(timeout=60)
    assert session.returncode == 130 and "run the same command to continue" in complaint and "Traceback" not in complaint
    assert not any(map(alive, family)), "the prompt came back before everything had ended"


def test_a_session_that_slept_goes_on(tmp_path):
    "Dask takes workers that were silent for minutes for dead, and waits for others; those of a laptop that sleeps come back."
    write_toy_notebook(tmp_path / "nbs")
    impatient = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "100ms"}  # ten times the interval of heartbeats, Dask adds
    session = start_session(str(tmp_path / "gate"), env=environment(tmp_path) | impatient)
    family_at_the_gate(tmp_path, session)
    session.send_signal(signal.SIGSTOP)
    time.sleep(12)
    session.send_signal(signal.SIGCONT)
    time.sleep(1)
    (tmp_path / "gate").touch()
    try:
        printed, complaint = session.communicate(timeout=90)
    finally:
        session.kill()
    assert session.returncode == 0 and finished(tmp_path, "first", "second", "third"), (printed, complaint)
