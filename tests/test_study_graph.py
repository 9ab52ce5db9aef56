"What is missing is computed after what it builds on, side by side where it can be; what fails stops only what builds on it."
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
from rich.console import Console
from toy_study import alive, environment, family_at_the_gate, start_session, wait_for
from toy_study import write_notebook as write_toy_notebook

from echochamber.core import StrictConfig, StudyError, project_root, refused
from echochamber.study.graph import execute, plan
from echochamber.study.runs import DeferredRun, Run

COMMAND = Path(sys.executable).with_name("echochamber")
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
    figure = DeferredRun("figure toy", lambda: Run("figure", "toy", ToyConfig(figure="toy")), parents=(runs[1],))
    sentence = refused(lambda: execute(runs, [figure], workers=2, console=log))
    lines = sentence.splitlines()
    assert lines[0].startswith("base broken: there are no digits; add them (the notebook with its traceback: ")
    assert lines[1].startswith("child failing: there are no digits; add them") and len(lines) == 3
    assert lines[2] == "2 that build on this were not started."
    assert [run.status for run in runs] == ["failed", "absent", "done", "done", "failed"]
    told = log.file.getvalue()
    assert "child heir: done" in told and "child orphan: skipped" in told and "2 of 6 done, 2 failed" in told


def test_a_figure_is_named_when_its_parents_are_done_drawn_once_and_published_each_time(place):
    base, moments, published = Run("base", "base", ToyConfig()), [], []

    def make() -> Run:
        moments.append(base.status)
        return Run("figure", "toy", ToyConfig(figure="toy", parent=(base.folder / "threads.txt").read_text()))

    figure = DeferredRun("figure toy", make, parents=(base,), publish=lambda run: published.append(run.status))
    assert execute([], [figure], console=Console(file=io.StringIO())) == 2
    assert execute([], [figure], console=Console(file=io.StringIO())) == 0, "it was drawn from what is there now"
    assert moments == ["done", "done"] and published == ["done", "done"]
    (make().folder / "threads.txt").unlink()
    assert execute([], [figure], console=Console(file=io.StringIO())) == 1, "a damaged figure is drawn again"
    assert published == ["done"] * 3


def test_a_figure_that_cannot_be_made_or_published_is_a_failure_of_its_own(place):
    def fail(*_) -> Run:
        raise StudyError("no table has any rows")
    make = lambda: Run("figure", "toy", ToyConfig(figure="toy"))
    figures = [DeferredRun("figure one", fail), DeferredRun("figure two", make, publish=fail), DeferredRun("figure three", make)]
    sentence = refused(lambda: execute([], figures, console=Console(file=io.StringIO())))
    assert sentence == "figure one: no table has any rows\nfigure two: no table has any rows" and make().done


def test_damaged_run_is_named_and_computed_again_if_asked(place):
    run = Run("base", "base", ToyConfig())
    run.folder.mkdir(parents=True)
    (run.folder / "DONE").write_text('{"model": {"bytes": 3, "modified": 0, "sha256": ""}}', encoding="utf-8")
    child = child_of(run, "child")
    assert "model is missing" in refused(lambda: execute([child]))
    assert run.folder.exists() and child.status == "absent"
    assert execute([child], redo=True, console=Console(file=io.StringIO())) == 2 and child.done


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


def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen([COMMAND, "reproduce", "--preset", "smoke"], env=os.environ | {"ECHOCHAMBER_OUTPUTS": str(folder)},
                            cwd=project_root(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_study_continues(tmp_path):
    "The real one, at preset smoke, in the middle of RL."
    first = start(tmp_path)
    pretraining = lambda: list(tmp_path.glob("runs/pretrain/*/DONE"))
    wait_for(lambda: pretraining() and list(tmp_path.glob("runs/finetune/*/progress.json")))
    family = psutil.Process(first.pid).children(recursive=True)
    assert family, "the run should be computed in a process of its own"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    wait_for(lambda: not any(map(alive, family)), 60)
    assert not list(tmp_path.glob("**/*.png")) and not list(tmp_path.glob("runs/finetune/*/DONE"))

    before = pretraining()[0].stat().st_mtime_ns
    second = start(tmp_path)
    output, _ = second.communicate(timeout=400)
    assert second.returncode == 0, output
    assert pretraining()[0].stat().st_mtime_ns == before, "a finished run was computed again"
    verdict = json.loads((tmp_path / "reproduced/smoke/convergence.json").read_text(encoding="utf-8"))
    assert verdict["line"] in " ".join(output.split())


def test_interrupt_speaks(tmp_path):
    command = start(tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/pretrain/*/progress.json")))
    command.send_signal(signal.SIGINT)
    output, _ = command.communicate(timeout=60)
    assert command.returncode == 130 and "run the same command to continue" in output and "Traceback" not in output
    assert not list(tmp_path.rglob("*.tmp"))
