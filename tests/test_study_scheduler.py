"The study on the workers of a Dask scheduler: what dies there, or here, costs nothing that was finished, and leaves nobody behind."
import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from toy_study import (
    alive,
    environment,
    family_at_the_gate,
    finished,
    folder_of,
    start_session,
    wait_for,
    write_notebook,
)

from echochamber.core import refused
from echochamber.study.graph import dask_client

pytestmark = pytest.mark.sessions

CLUSTER = """
import sys
from distributed import LocalCluster
with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, memory_limit=0, dashboard_address="127.0.0.1:0") as cluster:
    print(cluster.scheduler_address, flush=True)
    sys.stdin.read()
"""


class Cluster:
    "A scheduler and two workers, in processes of their own."

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-P", "-c", CLUSTER], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.address = self.process.stdout.readline().strip()
        self.workers = [process for process in psutil.Process(self.process.pid).children(recursive=True)
                        if "spawn_main" in " ".join(process.cmdline())]
        assert len(self.workers) == 2 and self.address.startswith("tcp://")

    def end(self) -> None:
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        for process in [*self.workers, self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def cluster():
    cluster = Cluster()
    yield cluster
    cluster.end()


@pytest.fixture
def toy_study(tmp_path):
    "Start the toy study on a scheduler; whatever the test leaves alive is killed."
    write_notebook(tmp_path / "nbs")
    started = []

    def start(address: str) -> subprocess.Popen:
        started.append(start_session(str(tmp_path / "gate"), options=json.dumps({"scheduler": address}),
                                     env=environment(tmp_path)))
        return started[-1]
    yield start
    for process in started:
        process.kill(), process.communicate()


def attempts(place: Path, name: str) -> int:
    return json.loads((folder_of(place, name) / "provenance.json").read_text(encoding="utf-8"))["attempts"]


def expect_success(session: subprocess.Popen) -> str:
    printed, complaint = session.communicate(timeout=180)
    assert session.returncode == 0, printed + complaint
    return printed


def test_interrupted_and_killed_sessions_leave_the_workers_idle_and_continue(cluster, toy_study, tmp_path):
    for blow, status in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        session = toy_study(cluster.address)
        family = family_at_the_gate(tmp_path, session)
        assert psutil.Process(session.pid).children() == [], "the workers compute, not the session"
        session.send_signal(blow)
        _, complaint = session.communicate(timeout=60)
        assert session.returncode == status and "Traceback" not in complaint, complaint
        wait_for(lambda family=family: not any(map(alive, family)), seconds=30)
    assert finished(tmp_path, "first") and not finished(tmp_path, "second") and all(map(alive, cluster.workers))
    (tmp_path / "gate").touch()
    expect_success(toy_study(cluster.address))
    assert finished(tmp_path, "second", "third") and attempts(tmp_path, "first") == 1 and attempts(tmp_path, "second") == 3


def test_a_killed_worker_hands_its_run_to_another_one(cluster, toy_study, tmp_path):
    session = toy_study(cluster.address)
    family = family_at_the_gate(tmp_path, session)
    executor = family[0]
    worker = wait_for(lambda: next((one for one in cluster.workers if executor in one.children()), None))
    worker.kill()
    wait_for(lambda: not any(map(alive, family)), seconds=30)
    second = family_at_the_gate(tmp_path, session)
    assert not set(family) & set(second)
    (tmp_path / "gate").touch()
    expect_success(session)
    assert finished(tmp_path, "first", "second", "third")
    assert attempts(tmp_path, "first") == attempts(tmp_path, "third") == 1 and attempts(tmp_path, "second") == 2


def test_a_killed_scheduler_is_told_in_a_sentence_and_the_same_command_continues(cluster, toy_study, tmp_path):
    session = toy_study(cluster.address)
    family = family_at_the_gate(tmp_path, session)
    cluster.process.kill()
    _, complaint = session.communicate(timeout=60)
    assert session.returncode == 1 and "Traceback" not in complaint
    assert complaint.strip().startswith("Error: ") and "the Dask scheduler is gone" in complaint
    wait_for(lambda: not any(map(alive, [*family, *cluster.workers])), seconds=60)
    (tmp_path / "gate").touch()
    successor = Cluster()
    try:
        expect_success(toy_study(successor.address))
    finally:
        successor.end()
    assert finished(tmp_path, "first", "second", "third") and attempts(tmp_path, "first") == 1


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "127.0.0.1:99999", "pigeon://127.0.0.1", "no such place", ""])
def test_an_address_where_no_scheduler_answers_is_named(address, monkeypatch):
    sentence = refused(lambda: dask_client(1, scheduler=address or " ").__enter__())
    assert "no Dask scheduler answers there" in sentence and "\n" not in sentence
