"Comparison of LaTeX: failures are counted, the next question is served, no process is left behind."
import subprocess
import sys
import time
from contextlib import closing

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echochamber.core import StudyError, project_root
from echochamber.grading.latex import LatexComparer


@pytest.fixture(scope="module")
def comparer():
    with closing(LatexComparer()) as comparer:
        yield comparer


def test_a_failing_comparison_is_counted_and_the_next_one_served():
    with closing(LatexComparer(seconds=1)) as comparer:
        assert not comparer("7", "9^{9^{9^9}}") and comparer.failures == 1
        assert comparer(r"\frac{1}{2}", "0.5") and comparer.failures == 1
        comparer.process.kill()
        comparer.process.wait()
        assert not comparer("x", "y") and comparer.failures == 2  # dead between two questions
        assert comparer("2k+2", "2(k+1)") and (comparer.calls, comparer.failures) == (4, 2)


@pytest.mark.skipif(not psutil.LINUX, reason="only Linux tells the limits of another process")
def test_memory_is_limited():
    with closing(LatexComparer(memory_mb=700)) as comparer:
        comparer.start()
        assert psutil.Process(comparer.process.pid).rlimit(psutil.RLIMIT_AS) == (700 * 2**20,) * 2


def test_a_judge_that_cannot_start_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StudyError, match="reinstall"):
        LatexComparer()("1", "2")


@given(text=st.text(max_size=60) | st.text(alphabet="0123456789xk+-*/^_(){}[]\\frac sqrt pi,=", max_size=40))
def test_any_text_gets_a_verdict(comparer, text):
    assert type(comparer("7", text)) is bool
    assert comparer("2k+2", "2(k+1)"), "whatever that was, the next one is judged as ever"


def test_no_file_of_the_working_folder_is_executed(tmp_path, monkeypatch):
    for name in ("email", "random", "string", "token", "json", "sympy", "math_verify", "pydantic"):
        (tmp_path / f"{name}.py").write_text("open('executed', 'w').close()", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:.:{project_root()}")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    with closing(LatexComparer()) as comparer:
        assert comparer("2k+2", "2(k+1)")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("gold, answer, equal", [
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", False), (r"\sqrt{2}", "1.414214", True), (r"\frac{\sqrt{2}}{10^9}", r"\frac{\sqrt{3}}{10^9}", False),
    ("0", "0.0", True), (r"\infty", r"+\infty", True), ("1,2", "2,1", True),
])
def test_numbers_agree_in_digits_whatever_their_size(comparer, gold, answer, equal):
    assert comparer(gold, answer) == equal


def test_the_process_dies_with_its_parent():
    code = ("from echochamber.grading.latex import LatexComparer\njudge = LatexComparer(seconds=1)\njudge.start()\n"
            "print(judge.process.pid, flush=True)\njudge('7', '9^{9^{9^9}}')")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
