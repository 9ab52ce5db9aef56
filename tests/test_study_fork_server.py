"Forked kernels: they find what others find and compute the same bits; whoever is killed, nobody is left and nothing is lost."
import json
import os
import signal
import subprocess
import sys

import nbformat
import pandas as pd
import psutil
import pytest
from toy_study import ToyConfig, alive, family_at_the_gate, finished, start_session, wait_for, write_notebook

from echochamber.core import project_root, refused
from echochamber.study import fork_server as fork_server_module
from echochamber.study.conditions import Condition, runs_of
from echochamber.study.execution import kernel_environment, launch, run_task
from echochamber.study.fork_server import fork_server
from echochamber.study.runs import Run

pytestmark = pytest.mark.sessions

CENSUS = """
import gc, hashlib, json, locale, logging, os, random, signal, sys, warnings
import matplotlib, numpy, pandas, torch, torch._dynamo
import echochamber.study.figures
import matplotlib.pyplot as plt
from echochamber.study.fingerprint import code_version
OWN = ("JPY_PARENT_PID", "ECHOCHAMBER_FAMILY", "ECHOCHAMBER_RUN", "PYTHONPATH")  # the path is looked at itself
found = {
    "drawn": [random.random(), numpy.random.rand(), torch.rand(()).item()],
    "environment": {name: value for name, value in os.environ.items() if name not in OWN},
    "folder": os.getcwd(), "path": [os.path.realpath(entry) for entry in sys.path if "echochamber-" not in entry], "flags": str(sys.flags),
    "text": [locale.getpreferredencoding(), sys.stdout.encoding], "order of a set": list(set("echochamber")),
    "threads": torch.__config__.parallel_info(), "sum": torch.arange(3e6).sqrt().sum().item().hex(),
    "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE)],
    "tables": [pandas.get_option(f"display.{name}") for name in ("max_columns", "width", "max_rows")], "plots": matplotlib.get_backend(), "logging": logging.getLogger().level, "handlers": len(logging.getLogger().handlers),
    "collector": [gc.isenabled(), gc.get_threshold()], "hashed": code_version.cache_info().currsize,
    "input": sys.stdin.read() if sys.stdin else None, "main": sys.modules["__main__"].__dict__ is globals()}
plt.plot([0, 1]);
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("ECHOCHAMBER_NOTEBOOKS", str(tmp_path / "nbs"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # where there are GPUs nothing is forked
    monkeypatch.delenv("ECHOCHAMBER_RUN", raising=False)
    write_notebook(tmp_path / "nbs")
    return tmp_path


@pytest.fixture
def session(place):
    "A toy study that waits at its gate, and the members of its waiting run; whatever the test leaves alive is killed."
    session = start_session(gate=str(place / "gate"))
    yield session
    session.kill(), session.communicate()


@pytest.fixture(scope="module")
def server():
    "One for all tests that leave it as it was."
    with fork_server(kernel_environment(threads=1), [project_root() / "nbs/experiments/pretrain.ipynb"]) as server:
        yield server


def test_a_forked_kernel_finds_what_any_kernel_finds(place, server, monkeypatch):
    "Environment, folder, path, threads, hashes, handlers, but no random numbers; and its pictures are in the notebook."
    book = nbformat.read(place / "nbs/experiments/toy.ipynb", as_version=4)
    book.cells[1].source = CENSUS + book.cells[1].source.replace("progress.report(1, 1)", "(run.folder / 'census.json').write_text(json.dumps(found))")
    nbformat.write(book, place / "nbs/experiments/toy.ipynb")
    censuses = []
    for servers in (fork_server_module._servers, fork_server_module._servers, []):
        monkeypatch.setattr(fork_server_module, "_servers", servers)
        run = Run("toy", "census", ToyConfig(after=str(len(censuses))))
        launch(task := run_task(run, threads=2))
        censuses.append(json.loads((run.folder / "census.json").read_text()))
        shown = [sorted(output["data"]) for output in nbformat.read(task.output, as_version=4).cells[2].outputs if "data" in output]
        assert shown == [["image/png", "text/plain"]]
    monkeypatch.undo()
    drawn = [number for census in censuses for number in census.pop("drawn")]
    assert len(set(drawn)) == 9 and censuses[0] == censuses[2]
    assert censuses[0] == censuses[2]
    assert "at::get_num_threads() : 2" in censuses[0]["threads"] and censuses[0]["environment"]["RAYON_NUM_THREADS"] == "2"


def test_a_forked_pretraining_has_the_same_bits(place, server, monkeypatch):
    monkeypatch.delenv("ECHOCHAMBER_NOTEBOOKS")
    found = []
    for how, servers in (("forked", fork_server_module._servers), ("alone", [])):
        monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(place / how))
        monkeypatch.setattr(fork_server_module, "_servers", servers)
        launch(run_task(runs_of(Condition(), "smoke", 0)[0], threads=1))
        tables = {path.relative_to(place / how): pd.read_parquet(path) for path in (place / how / "runs").rglob("*.parquet")}
        found.append({path.relative_to(place / how): path.read_bytes() for path in (place / how / "runs").rglob("*.safetensors")}
                     | {path: table[[name for name in table if "second" not in name]].to_json() for path, table in tables.items()})
    assert {path.name for path in found[0]} >= {"model.safetensors", "metrics.parquet"}
    assert found[0] == found[1]


def test_a_killed_guard_is_told_and_leaves_nobody(session, place):
    family = sorted((one for one in family_at_the_gate(place, session) if "time.sleep(300)" not in " ".join(one.cmdline())),
                    key=lambda one: len(one.parents()))
    assert len(family) == 3 and os.getsid(family[2].pid) == family[0].pid
    everyone = [*family, *family[0].children(recursive=True)]
    family[0].kill()
    _, complaint = session.communicate(timeout=60)
    assert session.returncode == 1 and "its process ended with signal SIGKILL" in " ".join(complaint.split()) and "Traceback" not in complaint
    wait_for(lambda: not any(map(alive, everyone)), 30)
    (place / "gate").touch()
    again = start_session(gate=str(place / "gate"))
    _, complaint = again.communicate(timeout=180)
    assert again.returncode == 0 and finished(place, "second", "third"), complaint


def test_a_killed_server_costs_only_time(session, place):
    "What is forked goes on, what comes later starts as ever, and the session says so."
    family = family_at_the_gate(place, session)
    server, = (one for one in psutil.Process(session.pid).children() if "serve_forks(" in " ".join(one.cmdline()))
    server.kill()
    (place / "gate").touch()
    _, complaint = session.communicate(timeout=180)
    assert session.returncode == 0 and finished(place, "first", "second", "third"), complaint
    assert "fork server ended with status -9" in complaint and not any(map(alive, [server, *family]))


@pytest.mark.parametrize(("blow", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_session_that_ends_while_the_server_imports_leaves_nobody(session, blow, status):
    server, = wait_for(lambda: [one for one in psutil.Process(session.pid).children() if "serve_forks(" in " ".join(one.cmdline())])
    session.send_signal(blow)
    session.communicate(timeout=60)
    assert session.returncode == status
    wait_for(lambda: not alive(server), 5)


def test_forks_leave_nothing_behind(place, server):
    before = None

    def state() -> tuple:
        here, there = psutil.Process(), psutil.Process(server.pid)
        return here.num_fds(), len(here.children()), there.num_fds(), there.num_threads()
    for number in range(6):
        launch(run_task(run := Run("toy", f"number-{number}", ToyConfig()), threads=1))
        assert run.done
        before = before if number else state()
    wait_for(lambda: not psutil.Process(server.pid).children(), 5)
    assert state() == before


def test_a_server_with_two_threads_refuses(place):
    (place / "threaded.py").write_text("import threading, time\nthreading.Thread(target=time.sleep, args=[60], daemon=True).start()")
    born = kernel_environment(threads=1) | {"PYTHONPATH": f"{place}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    code = "from echochamber.study import fork_server; fork_server.PRELOADED = ('threaded',); fork_server.serve_forks(fork_server.os.getppid())"
    told = subprocess.run([sys.executable, "-P", "-c", code], env=os.environ | born, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert told.returncode == 1 and "2 threads after the imports" in told.stderr


def test_a_notebook_that_changed_meanwhile_is_refused(place, server):
    run = Run("toy", "changed", ToyConfig())
    task = run_task(run, threads=1)
    book = nbformat.read(place / "nbs/experiments/toy.ipynb", as_version=4)
    book.cells[1].source += "\nmore = 1"
    nbformat.write(book, place / "nbs/experiments/toy.ipynb")
    assert "the code or the notebook changed while the study ran" in refused(lambda: launch(task))
