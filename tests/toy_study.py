"""A study whose three runs build on each other and take no time, in processes of its own, to be killed and interrupted.

The second run waits at a gate: it goes on once the file named in its config exists, and has a child that waits too."""
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil

from echochamber.core import StrictConfig, project_root

CONFIG = """
class ToyConfig(StrictConfig):
    after: str = ""
    gate: str = ""
    fail: str = ""
"""
NOTEBOOK = """
import subprocess, sys, time
from pathlib import Path
from echochamber.core import StrictConfig, StudyError
from echochamber.study.runs import Run, open_run
""" + CONFIG + """
run = Run("toy", name, ToyConfig.parse(config))
with open_run(run) as progress:
    if run.config.fail:
        exec(run.config.fail)
    if run.config.gate:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    start = time.time()
    while run.config.gate and not Path(run.config.gate).exists():
        progress.report(time.time() - start, 600, unit="seconds")
        time.sleep(0.05)
    progress.report(1, 1)
"""
SESSION = """
import json, sys
from pathlib import Path
from echochamber.core import StrictConfig
from echochamber.study import cli, graph
from echochamber.study.runs import Run
""" + CONFIG + """
def study(gate, fail):
    first = Run("toy", "first", ToyConfig())
    second = Run("toy", "second", ToyConfig(after=first.reference, gate=gate, fail=fail), parents=(first,))
    third = Run("toy", "third", ToyConfig(after=second.reference), parents=(second,))
    return [first, second, third]
@cli.app.command()
def toy(gate: str, fail: str, options: str):
    options = json.loads(options)
    graph.execute(study(gate, fail), expected=lambda run: 5.0, **{"workers": 1} | options)
    print("heavy:", [module for module in ("torch", "distributed", "papermill") if module in sys.modules])
cli.main(["toy", *sys.argv[1:]])
"""


class ToyConfig(StrictConfig):
    after: str = ""
    gate: str = ""
    fail: str = ""


def write_notebook(folder: Path) -> None:
    "The experiment notebook of stage `toy`."
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)
                                               for code in ("name = ''\nconfig = {}", NOTEBOOK)])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    (folder / "experiments").mkdir(parents=True)
    nbformat.write(notebook, folder / "experiments" / "toy.ipynb")


def start_session(gate: str = "", fail: str = "", options: str = "{}", **popen) -> subprocess.Popen:
    "The command that computes the toy study; `options` of `execute` are JSON."
    settings = {"cwd": project_root(), "start_new_session": True} | popen
    return subprocess.Popen([sys.executable, "-P", "-c", SESSION, gate, fail, options], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)


def wait_for(condition: Callable[[], object], seconds: float = 180):
    "What the condition has become, once it is true."
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def line_with(session: subprocess.Popen, words: str) -> str:
    "The first line of a session's output that contains these words."
    for line in session.stdout:
        if words in line:
            return line
    raise AssertionError(f"ended without saying `{words}`: {session.communicate()[1]}")


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def folder_of(place: Path, name: str) -> Path | None:
    "The folder of a run of the toy study, once it is there."
    return next(iter(place.glob(f"outputs/runs/toy/{name}-*")), None)


def finished(place: Path, *names: str) -> bool:
    return all((folder := folder_of(place, name)) and (folder / "DONE").exists() for name in names)


def family_at_the_gate(place: Path, session: subprocess.Popen) -> list[psutil.Process]:
    "Executor, kernel and the kernel's child of the second run, wherever they were started, once they are all there."
    def members() -> list[psutil.Process]:
        assert session.poll() is None, session.communicate()
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                born = process.environ()
                if born.get("ECHOCHAMBER_OUTPUTS") == str(place / "outputs") and "ECHOCHAMBER_FAMILY" in born \
                        and "/second-" in born.get("ECHOCHAMBER_RUN", ""):
                    found.append(process)
        leaders = {os.getsid(process.pid) for process in found if alive(process)}  # what is forked has another environment
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process not in found and os.getsid(process.pid) in leaders:
                    found.append(process)
        waits = any("time.sleep(300)" in " ".join(process.cmdline()) for process in found if alive(process))
        return found if waits else []
    return wait_for(members)


def environment(place: Path) -> dict[str, str]:
    "Where the toy study lies."
    return os.environ | {"ECHOCHAMBER_OUTPUTS": str(place / "outputs"), "ECHOCHAMBER_NOTEBOOKS": str(place / "nbs")}
