"What is typed: bad input gets one sentence, a status and nothing half-written."
import errno
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from echochamber.core import project_root
from echochamber.study.cli import main

GOOD = {"question": "1 + 1?", "answer": "2", "completion": r"The sum is \boxed{2}."}
COLUMNS = ["question", "answer", "completion", "format", "extracted", "outcome", "strict"]


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


@pytest.fixture
def echochamber(capsys):
    "Run a command line; its status, what it printed, and what it complained of as one line."
    def command(*arguments) -> tuple[int, str, str]:
        status = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code or 0
        printed = capsys.readouterr()
        return status, printed.out, " ".join(printed.err.split())
    return command


def write_lines(path: Path, *lines: dict | str | bytes) -> Path:
    encoded = (line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode() for line in lines)
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


BAD_LINES = {
    "broken JSON": ('{"question": "1 + 1?", "ans', "not valid JSON"),
    "no object": ("[1, 2]", "not a JSON object"),
    "unknown field": (GOOD | {"source": "me"}, "unknown field `source`"),
    "missing field": ({"question": "1 + 1?", "completion": "2"}, "`answer`"),
    "number": (GOOD | {"answer": 2}, "`answer`"),
    "null": (GOOD | {"completion": None}, "`completion`"),
    "list": (GOOD | {"completion": ["2"]}, "`completion`"),
}


@pytest.mark.parametrize(("line", "sentence"), BAD_LINES.values(), ids=BAD_LINES)
def test_grade_names_the_line_it_cannot_read(line, sentence, tmp_path, echochamber):
    file = write_lines(tmp_path / "made.jsonl", GOOD, "", line, GOOD)
    status, printed, complaint = echochamber("grade", file, "--out", tmp_path / "graded.parquet")
    assert (status, printed) == (1, "") and "made.jsonl, line 3" in complaint and sentence in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["made.jsonl"]


@pytest.mark.parametrize("content", [b"", b"\n \n"], ids=["empty", "blank lines"])
def test_grade_refuses_a_file_without_completions(content, tmp_path, echochamber):
    (tmp_path / "made.jsonl").write_bytes(content)
    status, _, complaint = echochamber("grade", tmp_path / "made.jsonl")
    assert status == 1 and "no completions" in complaint


def test_grade_keeps_every_completion(tmp_path, echochamber):
    rows = [GOOD, GOOD | {"completion": "I think 2"}, GOOD | {"question": "1 + 2?", "answer": "3", "completion": "#### 4"},
            GOOD | {"question": "1 + 2?", "answer": "3", "completion": "def f() -> int:\n    return 1 / 0"}]
    status, printed, _ = echochamber("grade", write_lines(tmp_path / "made.jsonl", *rows), "--out", tmp_path / "graded.parquet")
    graded = pd.read_parquet(tmp_path / "graded.parquet")
    assert status == 0 and list(graded) == COLUMNS
    assert graded[COLUMNS[:3]].to_dict("records") == rows
    assert list(graded.outcome) == ["correct", "correct", "wrong", "error"] and list(graded.strict) == [True, False, True, False]
    assert "pass@2" in printed and "maj@2" in printed


def test_uneven_groups_have_no_pass_at_k(tmp_path, echochamber):
    file = write_lines(tmp_path / "made.jsonl", GOOD, GOOD, GOOD | {"question": "2 - 0?"})
    status, printed, _ = echochamber("grade", file)
    assert status == 0 and "pass@" not in printed and "maj@" not in printed


def test_grade_on_a_full_disk_keeps_the_old_file(tmp_path, echochamber, monkeypatch):
    file, out = write_lines(tmp_path / "made.jsonl", GOOD), tmp_path / "graded.parquet"
    out.write_bytes(b"what was there")

    def fills_up(frame, path, **options):
        Path(path).write_bytes(b"PAR1")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(pd.DataFrame, "to_parquet", fills_up)
    status, _, complaint = echochamber("grade", file, "--out", out)
    assert status == 1 and "no space left on the disk" in complaint
    assert out.read_bytes() == b"what was there" and not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*"))


def test_run_names_the_unknown_key(tmp_path, echochamber, outputs):
    config = tmp_path / "mine.json"
    config.write_text(json.dumps({"model": "pretrain/x", "sampling": {"max_new_tokens": 8, "temprature": 1.0}}))
    status, _, complaint = echochamber("run", "evaluate", "--config", config)
    assert status == 1 and "mine.json" in complaint and "unknown key `sampling.temprature`" in complaint
    assert not outputs.exists()


MISTAKES = {
    "stage": ("run nonsense --config mine.json", 1, "choose one of pretrain, finetune, evaluate"),
    "config": ("run pretrain --config nowhere.json", 1, "nowhere.json: cannot be read"),
    "figure": ("reproduce nonsense", 1, "convergence"),
    "preset": ("reproduce --preset nonsense", 1, "smoke, laptop"),
    "checkpoint": ("evaluate --checkpoint nowhere --benchmark gsm8k", 1, "model.safetensors"),
    "option": ("reproduce --sedes 2", 2, "--sedes"),
    "report": ("report", 1, "echochamber reproduce"),
}


@pytest.mark.parametrize(("line", "status", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_get_one_sentence(line, status, sentence, echochamber, outputs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found, _, complaint = echochamber(*line.split())
    assert found == status and sentence in complaint and not outputs.exists()


def test_dry_run_computes_nothing(echochamber, outputs):
    status, printed, _ = echochamber("reproduce", "convergence", "--preset", "smoke", "--dry-run")
    assert status == 0 and all(f"{stage}/" in printed for stage in ("pretrain", "finetune", "evaluate")) and not outputs.exists()


def test_help_needs_nothing_heavy():
    code = """
import atexit, sys
atexit.register(lambda: print([module for module in ("torch", "pandas", "distributed") if module in sys.modules]))
from echochamber.study.cli import main
main(["grade", "--help"])
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=project_root(), timeout=60)
    assert finished.returncode == 0 and "Example" in finished.stdout and finished.stdout.rstrip().endswith("[]")
