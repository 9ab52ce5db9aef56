"Adversarial checks of the sandbox: fuzzing, growth, orphans, interrupts."
import subprocess
import sys
import time

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echochamber.core import StudyError
from echochamber.grading.sandbox import STATUSES, Sandbox, SandboxConfig


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(SandboxConfig(seconds=0.3)) as sandbox:
        yield sandbox


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False




@pytest.mark.parametrize("config", [dict(seconds=0), dict(workers=0), dict(memory_mb=0), dict(second=1)])
def test_limits_cannot_be_switched_off(config):
    with pytest.raises(StudyError):
        SandboxConfig.parse(config)


@given(program=st.text(max_size=200) | st.text(alphabet="()[]{}:=\n \"'\\def x0+-*/.,\0\ud800", max_size=200))
def test_any_text_has_an_outcome(sandbox, program):
    [result, after] = sandbox.run([program, "6 * 7"])
    assert result.status in STATUSES
    assert after.value == "42"


@pytest.mark.parametrize("bracket", ["(", "[", "{", "-", "not ", "lambda: ", "x if x else ", "f(", "x[", "[x for x in "])
def test_deep_nesting_never_kills_the_worker(sandbox, bracket):
    for depth in (50, 150, 1000, 19_000 // len(bracket)):
        [result] = sandbox.run([bracket * depth])
        assert result.status == "error" and "crashed" not in result.message


@pytest.mark.parametrize("program", [
    "from datetime import datetime, timedelta, timezone\ndatetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14)))",
    "10**4999", "float('nan')", "b'\\xff'", "'\\ud800'", "{1: {2: 3}}", "lambda: 0", "class A: pass\nA()", "range(10**18)",
    "...", "NotImplemented", "1j", "print", "ValueError('x')", "import math\nmath",
    "class A: pass\n{A()}", "class A: pass\n{A(): 1}", "class A: pass\n{(A(),): {A()}}", "x = []\nx.append(x)\nx", "[[1, 2], (3, {4, 5})]",
])
def test_any_value_comes_home_as_text(sandbox, program):
    [result] = sandbox.run([program])
    assert result.value is None or isinstance(result.value, str)


@pytest.mark.parametrize("program, status", [
    ("callable(3)", "unsupported"), ("(3).real", "unsupported"), ("from collections import OrderedDict", "unsupported"),
    ("import os\nos.system('id')", "unsupported"), ("str.upper('a')", "unsupported"), ("object()", "unsupported"),
    ("(3).reel", "error"), ("calable(3)", "error"), ("from collections import OrderdDict", "error"), ("import math\nmath.ceiling(3)", "error"),
    ("input()", "error"), ("raise NameError(\"name 'x' is not defined\")", "error"), ("str.uper('a')", "error"), ("None.real", "error"),
])
def test_what_python_has_and_the_sandbox_lacks_is_unsupported(sandbox, program, status):
    assert sandbox.run([program])[0].status == status


@given(number=st.floats(-1e6, 1e6) | st.integers(-10**6, 10**6).map(lambda thousandth: thousandth / 1000), digits=st.integers(0, 4))
def test_rounding_is_pythons(sandbox, number, digits):
    rounded, whole = sandbox.run([f"round({number!r}, {digits})", f"({number!r}).is_integer()"])
    assert (rounded.value, whole.value) == (str(round(number, digits)), str(number.is_integer()))


def test_cells_have_the_time_of_one_program(sandbox):
    start = time.perf_counter()
    [result, after] = sandbox.run([["for i in range(10**9):\n    x = 1 / (i - 200_000)"] * 200, "6 * 7"])
    assert result.status in ("timeout", "error") and after.value == "42"
    assert time.perf_counter() - start < 60  # the time of each cell would be 200 s


def test_sessions_share_nothing_and_repeat_exactly(sandbox):
    draw = "import random, time\n(random.random(), time.time())\nrandom.random()"
    first, second, name = sandbox.run([draw, draw, "draw"])
    assert first == second and first.status == "ok"
    assert name.status == "error"


def test_limits_hold(sandbox):
    long_output, endless, message = sandbox.run(
        ["print('a' * 20_000)\nprint(18)", "while True: print('a' * 1000)", "raise ValueError('a' * 10_000)"])
    assert long_output.status == "ok" and len(long_output.output) == 16_384 and long_output.output.endswith("a\n18\n")
    assert endless.status in ("unsupported", "timeout") and len(endless.output) <= 16_384
    assert len(message.message) <= 1001
    [too_long] = sandbox.run(["#" * 20_001])
    assert too_long.status == "error" and "20,001" in too_long.message


def test_stuck_programs_do_not_disturb_the_others():
    programs = ["while True: pass" if i % 10 == 0 else str(i) for i in range(40)]
    with Sandbox(SandboxConfig(workers=4, seconds=0.3)) as sandbox:
        results = sandbox.run(programs)
    assert [result.status == "timeout" for result in results] == [i % 10 == 0 for i in range(40)]
    assert [result.value for result in results if result.value] == [str(i) for i in range(40) if i % 10]


GROWTH = r"""
import psutil
from echochamber.grading.sandbox import Sandbox, SandboxConfig
resident = lambda: psutil.Process().memory_info().rss / 2**20
heavy = ["list(range(200_000))", "'a' * 10**7", "x = []\nwhile True: x.append('a' * 1000)", "print('a' * 10**6)"]
ordinary = [f"def f():\n    return {i} * 2\nf()" for i in range(1000)]
with Sandbox(SandboxConfig(seconds=0.3)) as sandbox:
    sandbox.run(heavy * 10 + ordinary)
    before = resident()
    for _ in range(5):
        sandbox.run(heavy * 4 + ordinary)
    print(resident() - before)
"""


def test_our_process_does_not_grow():
    "In a process of its own: this one holds what other tests have left, and frees it when it likes."
    grown = subprocess.run([sys.executable, "-c", GROWTH], timeout=240, check=True, capture_output=True, text=True)
    assert float(grown.stdout) < 32  # MiB


def test_a_missing_interpreter_is_one_sentence(monkeypatch):
    monkeypatch.setenv("MONTY_BIN", "/nowhere/monty")
    with pytest.raises(StudyError, match="reinstall"), Sandbox() as sandbox:
        sandbox.run(["1"])


FORKS = """
from multiprocessing import get_context
from echochamber.grading.sandbox import Sandbox

def run(sandbox, answers):
    answers.put([result.value for result in sandbox.run(["1 + 1", "2 + 1"])])

fork = get_context("fork")
with Sandbox() as sandbox:
    answers = fork.Queue()
    children = [fork.Process(target=run, args=(sandbox, answers)) for _ in range(2)]
    for child in children:
        child.start()
    assert [answers.get(timeout=30) for _ in children] == [["2", "3"]] * 2
    for child in children:
        child.join(30)
    assert sandbox.run(["3 + 1"])[0].value == "4"
"""


def test_forked_processes_start_workers_of_their_own():
    "Data parallelism in a notebook forks after the sandbox was made and before it is used; each process must be able to use it."
    assert subprocess.run([sys.executable, "-c", FORKS], timeout=120).returncode == 0


PARENT = r"""
import threading
from echochamber.grading.sandbox import Sandbox, SandboxConfig, session_limits
config = SandboxConfig(seconds=1)
with Sandbox(config) as sandbox:
    def loop():
        with sandbox.pool.checkout(**session_limits(config)) as session:
            print(f"{session.worker_pid}\n", end="", flush=True)
            session.feed_run("while True: pass")
    threads = [threading.Thread(target=loop) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
"""


def test_workers_die_with_a_killed_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    assert all(alive(pid) for pid in workers)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def test_an_interrupt_ends_a_long_batch_at_once():
    code = ("import _thread, signal, threading\nfrom echochamber.grading.sandbox import Sandbox, SandboxConfig\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
            "threading.Timer(0.5, _thread.interrupt_main).start()\n"
            "with Sandbox(SandboxConfig(seconds=0.4)) as sandbox:\n    sandbox.run(['while True: pass'] * 1000)\n")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "KeyboardInterrupt" in done.stderr
    assert time.perf_counter() - start < 60
