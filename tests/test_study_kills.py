"Whoever is killed, and whenever: the same command continues, and finds what a study finds that nobody disturbs."
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from toy_study import alive, wait_for

from echochamber.core import project_root

pytestmark = pytest.mark.sessions
COMMAND = Path(sys.executable).with_name("echochamber")


def start(folder: Path, figures: tuple[str, ...]) -> subprocess.Popen:
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen([COMMAND, "reproduce", *figures, "--preset", "smoke", "--workers", "2"], cwd=project_root(),
                                env=os.environ | {"ECHOCHAMBER_OUTPUTS": str(folder)}, stdout=log, stderr=log,
                                start_new_session=True)


def finish(folder: Path, figures: tuple[str, ...]) -> Path:
    "Everything that is missing."
    assert start(folder, figures).wait(timeout=1800) == 0, folder.with_suffix(".log").read_text()[-3000:]
    return folder


def kill(session: subprocess.Popen, victim: str, luck: random.Random) -> bool:
    """SIGKILL for a process that has no children (a run, mostly), a child of the session (a worker, mostly), or its group;
    False where there is none at the moment."""
    if victim == "group":
        os.killpg(session.pid, signal.SIGKILL)
        return True
    try:
        this = psutil.Process(session.pid)
        family = this.children() if victim == "worker" else [one for one in this.children(recursive=True) if not one.children()]
        if family:
            luck.choice(family).kill()
    except psutil.NoSuchProcess:
        return False  # it ended by itself meanwhile
    return bool(family)


def nobody_is_left(family: set[psutil.Process]) -> None:
    wait_for(lambda: not any(map(alive, family)), 60)


def disturb(folder: Path, figures: tuple[str, ...], victims: list[str], luck: random.Random) -> None:
    "Start the study again and again until each of `victims` has been killed, one after the other."
    session, family, waiting = None, set(), list(victims)
    while waiting:
        if session is None or session.poll() is not None:
            nobody_is_left(family)
            session, family = start(folder, figures), set()
        time.sleep(luck.uniform(1, 30))
        if session.poll() is None:
            family |= set(psutil.Process(session.pid).children(recursive=True))
            if kill(session, waiting[0], luck):
                waiting.pop(0)
                time.sleep(1)
    if session.poll() is None:
        os.killpg(session.pid, signal.SIGKILL)
    session.wait()
    nobody_is_left(family)


def found(folder: Path) -> dict[str, pd.DataFrame]:
    "Tables of all runs without what a clock said, by the run's name."
    tables = {str(file.relative_to(folder)): pd.read_parquet(file) for file in sorted(folder.glob("runs/*/*/*.parquet"))}
    return {name: table[[column for column in table if "second" not in column]] for name, table in tables.items()}


def test_ten_kills_change_nothing(tmp_path, figures=("all",), seed=0):
    "The whole study; with some figures alone it takes a few minutes less. Which processes there are when, the clock decides."
    calm, stormy, luck = finish(tmp_path / "calm", figures), tmp_path / "stormy", random.Random(seed)
    disturb(stormy, figures, luck.sample(("run", "worker", "group"), 10, counts=(4, 3, 3)), luck)
    finish(stormy, figures)
    first, second = found(calm), found(stormy)
    assert list(first) == list(second) and len(first) > 10
    for name in first:
        pd.testing.assert_frame_equal(first[name], second[name], obj=name)
    for verdict in calm.glob("reproduced/smoke/*.json"):
        assert verdict.read_text() == (stormy / verdict.relative_to(calm)).read_text()
    assert not list(stormy.rglob("*.tmp"))
