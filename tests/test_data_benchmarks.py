"""Real benchmark files where they are present, and every way in which a file can be wrong."""
import json

import datasets
import pytest

from echochamber.core import StudyError
from echochamber.data import benchmarks
from echochamber.data.benchmarks import load_benchmark
from echochamber.data.problems import ProblemConfig, split_of

GOOD = {"question": "2 + 2?", "answer": "#### 4"}


@pytest.mark.parametrize("name, count", [("gsm8k", 1319), ("math500", 500), ("aime", 30)])
def test_real_files_load_completely(name, count, real_file):
    questions = load_benchmark(name, real_file(name))
    assert len(questions) == count and all(q.question == q.question.strip() != "" for q in questions)
    assert all(q.answer and "####" not in q.answer for q in questions)
    if name != "math500":
        assert all(q.answer.lstrip("-").isdigit() for q in questions)


def test_a_limit_is_a_seeded_sample_in_order(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps({"question": str(i), "answer": i}) for i in range(100)), encoding="utf-8")
    chosen = [int(q.question) for q in load_benchmark("gsm8k", path, limit=10, seed=3)]
    assert chosen == sorted(set(chosen)) and len(chosen) == 10 and chosen != list(range(10))
    assert chosen == [int(q.answer) for q in load_benchmark("gsm8k", path, limit=10, seed=3)]
    assert len(load_benchmark("gsm8k", path, limit=1000)) == 100


def test_the_environment_names_a_local_file(tmp_path, monkeypatch):
    path, other = tmp_path / "local.jsonl", tmp_path / "other.jsonl"
    path.write_text(json.dumps(GOOD), encoding="utf-8")
    other.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD), encoding="utf-8")
    monkeypatch.setenv("ECHOCHAMBER_GSM8K", str(path))
    monkeypatch.setenv("ECHOCHAMBER_MINI-GSM", str(path))
    assert len(load_benchmark("gsm8k")) == 1 and len(load_benchmark("gsm8k", other)) == 2
    assert len(load_benchmark("mini-gsm", limit=7)) == 7
    monkeypatch.setenv("ECHOCHAMBER_GSM8K", str(tmp_path / "absent.jsonl"))
    with pytest.raises(StudyError, match="absent.jsonl: cannot be read"):
        load_benchmark("gsm8k")


def test_mini_benchmarks_come_from_the_test_split():
    for name in ("mini-gsm", "mini-math"):
        questions = load_benchmark(name, limit=200)
        assert {split_of(q.question) for q in questions} == {"test"} and len({q.question for q in questions}) == 200
    narrow = load_benchmark("mini-gsm", limit=20, problems=ProblemConfig(families=("riding",)))
    assert all("bus" in q.question for q in narrow)


@pytest.mark.parametrize("line, message", [
    ('{"question": "half', "line 2: is not valid JSON"), ("[1, 2]", "line 2: is not a JSON object"), ("3", "line 2"),
    ('{"question": "?"}', "line 2: has no text in field `answer`"), ('{"answer": "4"}', "line 2: has no text in field `question`"),
    ('{"question": " ", "answer": "4"}', "question"), ('{"question": "?", "answer": null}', "answer"),
    ('{"question": {"a": 1}, "answer": "4"}', "question"), ("[" * 100_000, "line 2"), ('{"question": "?", "answer": "####"}', "line 2: has no answer"),
    ('{"question": "?", "answer": "#### "}', "line 2: has no answer"), ('{"question": "?", "answer": "So none.\\n#### ,"}', "no answer"),
    ('{"question": "?", "answer": ""}', "answer"), ('{"question": "", "answer": "4"}', "question"),
    ('{"question": "?", "answer": NaN}', "line 2: field `answer` holds nan"), ('{"question": "?", "answer": 1e999}', "inf"),
    ('{"question": "?", "answer": true}', "answer"), ('{"question": "\\ud800", "answer": "4"}', "line 2: field `question` holds"),
    ('{"question": "a", "question": "b", "answer": "4"}', "line 2: has the key `question` twice"),
    ('{"question": "?", "answer": "4", "source": {"page": 1, "page": 1}}', "line 2: has the key `page` twice")])
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line, encoding="utf-8")
    with pytest.raises(StudyError) as caught:
        load_benchmark("gsm8k", path)
    assert message in str(caught.value) and "questions.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_content(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join([json.dumps(GOOD)] * 2), encoding="utf-8-sig")
    assert [(q.question, q.answer) for q in load_benchmark("gsm8k", path)] == [("2 + 2?", "4")] * 2


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_the_line_that_is_not_utf8_is_named(mark, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(mark + json.dumps(GOOD).encode() + b'\n\xff{"question": "?"}\n')
    with pytest.raises(StudyError, match="questions.jsonl, line 2: is not UTF-8"):
        load_benchmark("gsm8k", path)


def test_other_ways_to_fail(tmp_path, monkeypatch):
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xff"}')
    for name, data, message in (("gsm9k", None, "unknown benchmark"), ("gsm8k", tmp_path / "absent.jsonl", "cannot be read"),
                                ("gsm8k", tmp_path, "cannot be read"), ("gsm8k", tmp_path / "latin.jsonl", "UTF-8")):
        with pytest.raises(StudyError, match=message):
            load_benchmark(name, data)

    def offline(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub\nwith details")
    monkeypatch.setattr(benchmarks, "load_dataset", offline)
    with pytest.raises(StudyError, match="--data") as caught:
        load_benchmark("aime")
    assert "\n" not in str(caught.value)


def test_the_hub_is_read_by_the_declared_fields(monkeypatch):
    rows = {"openai/gsm8k": GOOD, "HuggingFaceH4/MATH-500": {"problem": "x?", "solution": "s", "answer": "\\frac{1}{2}"},
            "Maxwell-Jia/AIME_2024": {"ID": "1", "Problem": "y?", "Solution": "s", "Answer": 33}}
    monkeypatch.setattr(benchmarks, "load_dataset", lambda hub, config, split: datasets.Dataset.from_list([rows[hub]]))
    assert [load_benchmark(name)[0].answer for name in ("gsm8k", "math500", "aime")] == ["4", "\\frac{1}{2}", "33"]
