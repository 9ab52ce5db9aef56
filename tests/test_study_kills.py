"Whoever is killed, and whenever: the same command continues, and finds what a study finds that nobody disturbs."
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import psutil
import pytest
from toy_study import alive, wait_for

from echochamber.core import project_root
from echochamber.study.runs import folder_status, read_progress

pytestmark = pytest.mark.sessions
COMMAND = Path(sys.executable).with_name("echochamber")


def start(folder: Path, figures: tuple[str, ...]) -> subprocess.Popen:
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen([COMMAND, "reproduce", *figures, "--preset", "smoke", "--workers", "2"], cwd=project_root(),
                                stdout=log, stderr=log, start_new_session=True,
                                env=os.environ | {"ECHOCHAMBER_OUTPUTS": str(folder), "CUDA_VISIBLE_DEVICES": ""})


def finish(folder: Path, figures: tuple[str, ...]) -> Path:
    "Everything that is missing."
    assert start(folder, figures).wait(timeout=1800) == 0, folder.with_suffix(".log").read_text()[-3000:]
    return folder


def belongs(process: psutil.Process, folder: Path) -> bool:
    "Whether a process was started for the study that writes into this folder."
    return process.environ().get("ECHOCHAMBER_OUTPUTS") == str(folder)


def at_work(folder: Path) -> dict[Path, psutil.Process]:
    "The runs that are computed at this moment, by their folders, and the kernel of each: it holds the lock and gave its number."
    kernels = {}
    for run in sorted(folder.glob("runs/*/*")):
        if folder_status(run) == "running" and (said := read_progress(run)):
            with contextlib.suppress(psutil.NoSuchProcess):  # the lock's new owner has not spoken yet
                if belongs(kernel := psutil.Process(said["pid"]), folder):
                    kernels[run] = kernel
    return kernels


def fork_server_of(session: subprocess.Popen) -> psutil.Process:
    "The child of a session that forks its executors."
    return next(child for child in psutil.Process(session.pid).children() if "fork_server" in " ".join(child.cmdline()))


def strike(session: subprocess.Popen, victim: str, folder: Path, luck: random.Random) -> list[Path] | None:
    """SIGKILL for the kernel of a run that is computed, for the executor above it, for the fork server, or for the session
    with all its group; the runs that it kept from their end. None if nothing was computed, or the blow came too late."""
    work = at_work(folder)
    with contextlib.suppress(psutil.NoSuchProcess):
        if not work:
            return None
        run = luck.choice(list(work))
        executors = {one: kernel.parent() for one, kernel in work.items()}
        assert all(belongs(one, folder) and one.pid != session.pid for one in executors.values())
        match victim:
            case "kernel":
                work[run].kill()
            case "executor":
                executors[run].kill()
            case "server":
                fork_server_of(session).kill()
                return []  # what it has forked goes on
            case "group":
                os.killpg(session.pid, signal.SIGKILL)
        struck = list(work) if victim == "group" else [run]
        nobody_is_left({process for one in struck for process in (work[one], executors[one])})
        return [one for one in struck if not (one / "DONE").exists()] or None
    return None  # it ended by itself meanwhile


def nobody_is_left(family: set[psutil.Process]) -> None:
    wait_for(lambda: not any(map(alive, family)), 60)


def finished(folder: Path) -> int:
    return len(list(folder.glob("runs/*/*/DONE")))


def disturb(folder: Path, figures: tuple[str, ...], victims: list[str], runs: int, luck: random.Random) -> Counter:
    """Start the study again and again until each of `victims` has been killed, one after the other, spread over the first
    five sixths of its `runs`; how often each run was hit."""
    session, family, hits, starts = None, set(), Counter(), 0
    for place, victim in enumerate(victims):
        hit = None
        while hit is None:
            if session is None or session.poll() is not None:
                assert finished(folder) < runs, f"nothing is left to be computed while {victims[place:]} are to be killed"
                nobody_is_left(family)
                session, family, starts = start(folder, figures), set(), starts + 1
                assert starts <= 5 * len(victims), folder.with_suffix(".log").read_text()[-3000:]
            while not at_work(folder) and session.poll() is None:
                time.sleep(0.05)
            time.sleep(luck.uniform(0, 2))
            if session.poll() is None and finished(folder) >= place * runs // (1.2 * len(victims)):
                family |= set(psutil.Process(session.pid).children(recursive=True))
                hit = strike(session, victim, folder, luck)
        hits.update(hit)
    session.wait(timeout=1800)
    nobody_is_left(family)
    return hits


def found(folder: Path) -> dict[str, pd.DataFrame]:
    "Tables of all runs without what a clock said, by the run's name."
    tables = {str(file.relative_to(folder)): pd.read_parquet(file) for file in sorted(folder.glob("runs/*/*/*.parquet"))}
    return {name: table[[column for column in table if "second" not in column]] for name, table in tables.items()}


def test_ten_kills_change_nothing(tmp_path, figures=("all",), seed=0):
    """The whole study; with some figures alone it takes a few minutes less. Who is killed is dealt beforehand, when depends on
    how many runs are done, and a blow counts if a run was being computed; at which of its steps it falls, the clock decides."""
    calm, stormy, luck = finish(tmp_path / "calm", figures), tmp_path / "stormy", random.Random(seed)
    victims = luck.sample(("kernel", "executor", "group"), 9, counts=(3, 3, 3))
    victims.insert(victims.index("group"), "server")  # a session without one goes on, but slowly: soon another begins
    hits = disturb(stormy, figures, victims, finished(calm), luck)
    finish(stormy, figures)
    attempts = {run: json.loads((run / "provenance.json").read_text())["attempts"] for run in hits}
    assert sum(hits.values()) >= 9 and all(attempts[run] > hits[run] for run in hits), (hits, attempts)
    first, second = found(calm), found(stormy)
    assert list(first) == list(second) and len(first) >= finished(calm) - len(list(calm.glob("runs/figure/*")))
    for name in first:
        pd.testing.assert_frame_equal(first[name], second[name], obj=name)
    for verdict in calm.glob("reproduced/smoke/*.json"):
        assert verdict.read_text() == (stormy / verdict.relative_to(calm)).read_text()
    assert not list(stormy.rglob("*.tmp"))
