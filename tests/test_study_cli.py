"What is typed: bad input gets one sentence, a status and nothing half-written."
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from echochamber.core import project_root
from echochamber.data.problems import ProblemConfig
from echochamber.data.tokens import save_tokenizer, train_tokenizer
from echochamber.grading.latex import LatexProcess
from echochamber.study import checkpoint_evaluation, cli
from echochamber.study.cli import main
from echochamber.study.figures import FIGURES, figure_runs, table_file

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
    "doubled key": ('{"question": "a", "question": "b", "answer": "2", "completion": "2"}', "`question` twice"),
    "doubled key, equal": ('{"question": "a", "answer": "2", "answer": "2", "completion": "2"}', "`answer` twice"),
    "empty question": (GOOD | {"question": " \t"}, "the question is empty"),
    "empty gold": (GOOD | {"answer": ""}, "the gold answer is empty; add it"),
    "empty gold after ####": (GOOD | {"answer": "1 + 1 = 2\n#### "}, "the gold answer is empty after `####`"),
    "gold without a value": (GOOD | {"answer": "$ $"}, "the gold answer is empty"),
    "half a character": (json.dumps(GOOD | {"completion": "\ud83d"}), "half a character"),
    "two golds": (GOOD | {"answer": "3"}, "the gold answer is `3`, but the same question has `2` in line 1"),
    "not UTF-8": (json.dumps(GOOD).encode().replace(b"sum", b"s\xfcm"), "UTF-8"),
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


def test_grade_accepts_a_byte_order_mark(tmp_path, echochamber):
    file = write_lines(tmp_path / "made.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), GOOD)
    status, printed, _ = echochamber("grade", file, "--out", tmp_path / "graded.parquet")
    assert status == 0 and pd.read_parquet(tmp_path / "graded.parquet")[COLUMNS[:3]].to_dict("records") == [GOOD, GOOD]


@pytest.mark.parametrize("undecided", [0, 1, 2])
def test_grade_tells_what_could_not_be_decided(undecided, tmp_path, echochamber, monkeypatch):
    monkeypatch.setattr(LatexProcess, "ask", lambda self, gold, answer: None if answer in ("x+1", "x+2")[:undecided] else False)
    hard = [GOOD | {"answer": "x^2", "completion": rf"\boxed{{x+{number}}}"} for number in (1, 2, 3, 1)]
    status, printed, complaint = echochamber("grade", write_lines(tmp_path / "made.jsonl", *hard))
    assert (status, complaint) == (0, "") and ("could not be decided" in printed) == (undecided > 0)
    if undecided:
        line, = (line for line in printed.splitlines() if "could not be decided" in line)
        assert line.startswith(f"{undecided} comparison") and "wrong" in line


BAD_PLACES = {
    "folder": ("there", "is a folder; give a file in it, such as there/graded.parquet"),
    "suffix": ("graded.csv", "give graded.parquet"),
    "no suffix": ("graded", "give graded.parquet"),
    "below a file": ("made.jsonl/graded.parquet", "made.jsonl is not a folder"),
    "long name": ("x" * 240 + ".parquet", "File name too long"),  # by the ending of the temporary file
    "long folder": ("x" * 300 + "/graded.parquet", "File name too long"),
    "made by nobody": ("/proc/graded.parquet", "cannot be written"),
}


@pytest.mark.parametrize("command", ["grade made.jsonl", "evaluate --checkpoint model --benchmark mini-gsm"])
@pytest.mark.parametrize(("place", "sentence"), BAD_PLACES.values(), ids=BAD_PLACES)
def test_a_place_that_takes_no_table_is_refused_before_the_work(place, sentence, command, tmp_path, echochamber, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("echochamber.grading.answers.grade_frame", lambda *inputs: pytest.fail("graded first"))
    monkeypatch.setattr(cli, "compute", lambda run: pytest.fail("evaluated first"))
    write_lines(tmp_path / "made.jsonl", GOOD)
    (tmp_path / "there").mkdir()
    make_checkpoint(tmp_path / "model")
    status, printed, complaint = echochamber(*command.split(), "--out", place)
    assert (status, printed) == (1, "") and complaint.startswith(f"Error: {place}: ") and sentence in complaint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.jsonl", "model", "there"]


def test_a_place_that_may_not_be_written_is_refused(tmp_path, echochamber, monkeypatch):
    def refuse(*place, **options):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr("tempfile.mkdtemp", refuse)  # root may write everywhere
    status, _, complaint = echochamber("grade", write_lines(tmp_path / "made.jsonl", GOOD), "--out", tmp_path / "graded.parquet")
    assert status == 1 and f"{tmp_path} does not allow it" in complaint and "graded.parquet" in complaint


def test_home_is_expanded_where_the_shell_does_not(tmp_path, echochamber, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "made.jsonl", GOOD)
    status, printed, _ = echochamber("grade", "made.jsonl", "--out=~/new/graded.parquet")
    assert status == 0 and len(pd.read_parquet(tmp_path / "home" / "new" / "graded.parquet")) == 1 and "~" not in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "made.jsonl"]
    status, _, complaint = echochamber("grade", "made.jsonl", "--out=~nobody-of-that-name/graded.parquet")
    assert status == 1 and "unknown home" in complaint


def test_grade_makes_the_folder_of_its_table(tmp_path, echochamber):
    out = tmp_path / "[new]" / "folder" / "graded.parquet"
    status, printed, _ = echochamber("grade", write_lines(tmp_path / "made.jsonl", GOOD), "--out", out)
    assert status == 0 and len(pd.read_parquet(out)) == 1 and str(out) in printed


TOKENIZER = train_tokenizer(["Sam has 3 apples."], 300)
ENTRIES = TOKENIZER.get_vocab_size()


def make_checkpoint(folder: Path, *left_out: str) -> Path:
    "A checkpoint without weights in its file of weights."
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"vocab_size": ENTRIES, "width": 16, "layers": 1, "heads": 2}))
    save_tokenizer(folder, TOKENIZER)
    for name in left_out:
        (folder / name).unlink()
    return folder


@pytest.fixture(autouse=True)
def a_benchmark(tmp_path_factory, monkeypatch):
    "GSM8K from a file that the environment names: no test asks the Hub."
    monkeypatch.setenv("ECHOCHAMBER_GSM8K", str(write_lines(tmp_path_factory.mktemp("benchmark") / "gsm8k.jsonl", GOOD)))


@pytest.fixture
def executed(monkeypatch):
    "Runs that `evaluate` asked for; instead of being computed they get two completions."
    asked = []

    def compute(run):
        asked.append(run)
        run.folder.mkdir(parents=True)
        frame = pd.DataFrame([GOOD | {"problem": 0, "sample": 0, "mode": "greedy", "format": "omi2", "extracted": "2", "outcome": "correct",
                                      "strict": True, "tokens": 5, "ended": True, "step": -1}])
        pd.concat([frame, frame.assign(problem=1)]).to_parquet(run.folder / "evaluation.parquet", index=False)
        (run.folder / "provenance.json").write_text("{}")
    monkeypatch.setattr(cli, "compute", compute)
    return asked


EASY, HARD = (ProblemConfig(operations=(1, most)).model_dump(mode="json") for most in (1, 5))
RUNS = {
    "finetune": ({"model": "pretrain/x", "problems": EASY}, EASY),
    "pretrain": ({"mixture": {"sources": [{"name": "a", "problems": EASY}, {"name": "b", "problems": HARD}]}}, EASY),
    "first source without": ({"mixture": {"sources": [{"name": "a"}, {"name": "b", "problems": HARD}]}}, HARD),
    "no problems": ({"mixture": {"sources": []}}, None),
    "somebody else's": ([{"model_type": "olmo2"}], None),
    "no config": (None, None),
}


@pytest.mark.parametrize("benchmark", ["mini-gsm", "mini-math"])
@pytest.mark.parametrize(("config", "problems"), RUNS.values(), ids=RUNS)
def test_evaluate_asks_what_the_model_was_trained_on(config, problems, benchmark, tmp_path, echochamber, executed):
    make_checkpoint(tmp_path / "mine" / "checkpoints" / "step-000004")
    if config is not None:
        (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    status, printed, complaint = echochamber("evaluate", "--checkpoint", tmp_path / "mine" / "checkpoints" / "step-000004", "--benchmark", benchmark)
    assert (status, complaint) == (0, "") and executed[0].config.problems == ProblemConfig(**problems or {})
    line, = (line for line in printed.splitlines() if line.startswith(benchmark))
    assert ("of mine" in line) == (problems is not None) and ("default" in line) == (problems is None)
    assert f"{1} to {ProblemConfig(**problems or {}).operations[1]} operations" in line


def test_evaluate_asks_the_default_problems_of_a_lone_checkpoint(tmp_path, echochamber, executed):
    (tmp_path / "config.json").write_text(json.dumps({"problems": EASY}))  # lies two folders up, but not as a run's does
    status, printed, _ = echochamber("evaluate", "--checkpoint", make_checkpoint(tmp_path / "mine" / "last"), "--benchmark", "mini-gsm")
    assert status == 0 and executed[0].config.problems == ProblemConfig() and "default" in printed


def test_only_the_generator_has_problems(tmp_path, echochamber, executed):
    make_checkpoint(tmp_path / "mine" / "checkpoints" / "step-000004")
    (tmp_path / "mine" / "config.json").write_text(json.dumps({"problems": EASY}))
    data = write_lines(tmp_path / "test.jsonl", GOOD)
    for benchmark in ("gsm8k", "mini-gsm"):
        status, printed, _ = echochamber("evaluate", "--checkpoint", tmp_path / "mine" / "checkpoints" / "step-000004", "--benchmark", benchmark, "--data", data)
        assert status == 0 and executed[-1].config.problems == ProblemConfig() and "problems" not in printed


@pytest.mark.parametrize("content", ['{"problems": {"operations": [3, 1]}}', '{"problems": ', '{"problems": 3}'])
def test_a_damaged_config_of_a_run_is_named(content, tmp_path, echochamber, executed):
    make_checkpoint(tmp_path / "mine" / "checkpoints" / "step-000004")
    (tmp_path / "mine" / "config.json").write_text(content)
    status, _, complaint = echochamber("evaluate", "--checkpoint", tmp_path / "mine" / "checkpoints" / "step-000004", "--benchmark", "mini-gsm")
    assert status == 1 and "mine/config.json" in complaint and not executed


def test_evaluate_copies_its_table(tmp_path, echochamber, executed):
    out = tmp_path / "new" / "graded.parquet"
    status, printed, _ = echochamber("evaluate", "--checkpoint", make_checkpoint(tmp_path / "model"), "--benchmark", "gsm8k", "--out", out)
    assert status == 0 and "graded.parquet" in printed and "accuracy" in printed
    pd.testing.assert_frame_equal(pd.read_parquet(out), pd.read_parquet(executed[0].folder / "evaluation.parquet"))
    assert [path.name for path in out.parent.iterdir()] == ["graded.parquet"]


def test_a_file_that_the_environment_names_is_part_of_the_runs_name(tmp_path, echochamber, executed, monkeypatch):
    model = make_checkpoint(tmp_path / "model")
    for text in ("one", "another"):
        monkeypatch.setenv("ECHOCHAMBER_GSM8K", str(write_lines(tmp_path / "test.jsonl", GOOD | {"question": text})))
        assert echochamber("evaluate", "--checkpoint", model, "--benchmark", "gsm8k")[0] == 0
    assert executed[0].config.data == str(tmp_path / "test.jsonl") and executed[0].reference != executed[1].reference


@pytest.mark.parametrize("folder", ["my model", "-x", "модель"])
def test_any_folder_name_can_be_evaluated(folder, tmp_path, echochamber, executed):
    status, _, complaint = echochamber("evaluate", "--checkpoint", make_checkpoint(tmp_path / folder), "--benchmark", "gsm8k")
    assert (status, complaint) == (0, "") and executed[0].config.model == str(tmp_path / folder)


@pytest.mark.parametrize(("spoil", "sentence"), [
    (lambda folder: (folder / "tokenizer.json").write_text('{"version": '), "tokenizer.json: is not a tokenizer"),
    (lambda folder: save_tokenizer(folder, train_tokenizer(["Sam has 3 apples and buys some more."], ENTRIES + 9)), "is the tokenizer of another model"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "olmo", "hidden_size": "wide", "intermediate_size": 1}'), "cannot be read as a model's config"),
    (lambda folder: (folder / "tokenizer_config.json").write_text("{}"), None),
], ids=["damaged", "another model's", "no config", "whole"])
def test_a_wrong_tokenizer_is_found_before_a_kernel_starts(spoil, sentence, tmp_path, echochamber, executed, outputs):
    spoil(folder := make_checkpoint(tmp_path / "model"))
    status, _, complaint = echochamber("evaluate", "--checkpoint", folder, "--benchmark", "gsm8k")
    if sentence:
        assert status == 1 and sentence in complaint and not executed and not outputs.exists()
    else:
        assert status == 0 and executed


def test_a_beginning_that_the_tokenizer_lacks_is_refused_first(tmp_path, echochamber, executed):
    status, _, complaint = echochamber("evaluate", "--checkpoint", make_checkpoint(tmp_path / "model"), "--benchmark", "gsm8k", "--bos")
    assert status == 1 and "has no `<s>`" in complaint and not executed


def test_a_slip_in_a_path_is_no_name_on_the_hub(tmp_path, echochamber, executed, outputs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint_evaluation, "fetch_model", lambda *asked: pytest.fail("the Hub was asked"))
    outputs.mkdir()
    for command in ("evaluate --benchmark gsm8k", "export --out exported"):
        status, _, complaint = echochamber(*command.split(), "--checkpoint", "outputs/nope")
        assert status == 1 and complaint == ("Error: outputs/nope: there is no such folder in outputs; check the path, or write outputs/nope@main "
                                             "if you mean a model on the Hub")


@pytest.mark.parametrize("left_out", ["model.safetensors", "config.json", "tokenizer.json"])
def test_half_a_checkpoint_is_refused(left_out, tmp_path, echochamber, executed):
    folder = make_checkpoint(tmp_path / "model", left_out)
    status, _, complaint = echochamber("evaluate", "--checkpoint", folder, "--benchmark", "gsm8k")
    assert status == 1 and f"has no {left_out}" in complaint and not executed


def test_uneven_groups_have_no_pass_at_k(tmp_path, echochamber):
    file = write_lines(tmp_path / "made.jsonl", GOOD, GOOD, GOOD | {"question": "2 - 0?"})
    status, printed, _ = echochamber("grade", file)
    assert status == 0 and "pass@" not in printed and "maj@" not in printed and "1 to 2 completions each" in printed
    file = write_lines(tmp_path / "made.jsonl", *[GOOD] * 2, *[GOOD | {"question": "2 - 0?"}] * 5)
    status, printed, _ = echochamber("grade", file)
    assert status == 0 and "pass@2" in printed and "pass@4" not in printed and "2 to 5 completions each" in printed


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
    "shipped": ("figures convergence --preset smoke", 1, "echochamber reproduce convergence --preset smoke"),
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


@pytest.mark.parametrize(("completions", "remark"), [(1_100, ""), (15_000, "maj@128 is left out")])
def test_a_question_may_have_very_many_completions(completions, remark, tmp_path, echochamber):
    file = write_lines(tmp_path / "made.jsonl", *[GOOD | {"completion": "#### 2"}] * completions)
    status, printed, complaint = echochamber("grade", file)
    assert (status, complaint) == (0, "") and "accuracy (lenient)   100.00 %" in printed and "pass@128" in printed
    assert remark in printed and ("maj@128   " in printed) == (not remark)


def test_golds_that_say_the_same_are_one_question(tmp_path, echochamber):
    golds = ("2", "2.0", "1 + 1 = 2\n#### 2", "$2$")
    status, printed, _ = echochamber("grade", write_lines(tmp_path / "made.jsonl", *(GOOD | {"answer": gold} for gold in golds)))
    assert status == 0 and "sampled, 1 question," in printed and "pass@4" in printed


def test_results_of_more_seeds_do_not_go_without_a_word(echochamber, outputs):
    file = table_file(FIGURES["convergence"].conditions[0], "smoke").with_suffix(".json")
    file.parent.mkdir(parents=True)
    file.write_text('{"seeds": [0, 1, 2]}')
    for seeds, ship, warned in (("2", ["--ship"], True), ("3", ["--ship"], False), ("2", [], False)):
        status, printed, _ = echochamber("reproduce", "convergence", "--preset", "smoke", "--dry-run", "--seeds", seeds, *ship)
        assert status == 0 and ("rests on 3 seeds" in printed) == warned == ("--seeds 3" in printed)


def test_looking_deletes_nothing(echochamber, outputs):
    "Not even a damaged run, and not even with --redo."
    run = figure_runs(FIGURES["convergence"], "smoke", 1)[0]
    run.folder.mkdir(parents=True)
    (run.folder / "DONE").write_text("{}")
    for arguments in (("reproduce", "convergence", "--preset", "smoke", "--dry-run", "--redo"), ("study",)):
        status, printed, complaint = echochamber(*arguments)
        assert (status, complaint) == (0, "") and (run.folder / "DONE").exists()
    status, _, complaint = echochamber("reproduce", "convergence", "--preset", "smoke")
    assert status == 1 and "damaged" in complaint and "--redo" in complaint and (run.folder / "DONE").exists()


def test_an_unfinished_run_has_no_result_yet(tmp_path, echochamber, executed):
    checkpoint = make_checkpoint(tmp_path / "mine" / "checkpoints" / "step-000004")
    (tmp_path / "mine" / "config.json").write_text("{}")
    status, _, complaint = echochamber("evaluate", "--checkpoint", tmp_path / "mine", "--benchmark", "gsm8k")
    assert status == 1 and "interrupted" in complaint and str(checkpoint) in complaint and not executed


def test_another_tokenizer_is_another_evaluation(tmp_path, echochamber, executed):
    checkpoint = make_checkpoint(tmp_path / "mine")
    for text in ("Sam has 3 apples.", "Ann"):
        save_tokenizer(checkpoint, train_tokenizer([text], 300))
        assert echochamber("evaluate", "--checkpoint", checkpoint, "--benchmark", "gsm8k")[0] == 0
    assert executed[0].reference != executed[1].reference


def test_help_needs_nothing_heavy():
    code = """
import atexit, sys
atexit.register(lambda: print([module for module in ("torch", "pandas", "distributed") if module in sys.modules]))
from echochamber.study.cli import main
main(["grade", "--help"])
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=project_root(), timeout=60)
    assert finished.returncode == 0 and "Example" in finished.stdout and finished.stdout.rstrip().endswith("[]")


@pytest.mark.sessions
def test_a_reader_that_has_seen_enough_hears_no_complaint():
    command = [Path(sys.executable).with_name("echochamber"), "study"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=project_root()) as listing:
        listing.stdout.close()
        listing.wait(120)
        assert listing.stderr.read() == b""


def test_a_terminal_without_a_character_gets_a_question_mark(tmp_path):
    made = write_lines(tmp_path / "модель.jsonl", GOOD | {"answer": "→ "}, GOOD | {"answer": "←"})
    command = [Path(sys.executable).with_name("echochamber"), "grade", made]
    finished = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, timeout=120)
    assert finished.returncode == 1 and b"Traceback" not in finished.stderr and b"`?`" in finished.stderr
