"""Real benchmark files where they are present, and every way in which a file can be wrong."""
import json

import datasets
import pytest

from echochamber.core import StudyError, content_hash
from echochamber.data import benchmarks
from echochamber.data.benchmarks import REAL, boxed_answer, check_content, load_benchmark
from echochamber.data.problems import ProblemConfig, split_of

GOOD = {"question": "2 + 2?", "answer": "#### 4"}


@pytest.mark.parametrize("name, count", [("gsm8k", 1319), ("gsm8k-train", 7473), ("gsm1k", 1205), ("math500", 500),
                                         ("math-train", 7500), ("aime", 90), ("aime24", 30)])
def test_real_files_load_completely(name, count, real_file):
    questions = load_benchmark(name, real_file(name))
    assert len(questions) == count and all(q.question == q.question.strip() != "" for q in questions)
    assert all(q.answer and "####" not in q.answer for q in questions)
    if "math" not in name:
        assert all(q.answer.lstrip("-").isdigit() for q in questions)
    assert {q.year for q in questions} == {"aime": {2022, 2023, 2024}, "aime24": {2024}}.get(name, {None})


def test_the_last_box_of_a_real_solution_is_its_stated_answer(real_file):
    rows = list(map(json.loads, real_file("math500").read_text(encoding="utf-8").splitlines()))
    assert [boxed_answer(row["solution"]) for row in rows] == [row["answer"] for row in rows]


def test_an_answer_with_leading_zeros_is_a_number(tmp_path):
    "AIME's copies write 4 as `4` or as `004`; a vote that counts both as different answers is wrong."
    path = tmp_path / "aime.jsonl"
    rows = [{"id": 0, "problem": "x?", "solution": "s", "answer": answer, "url": f"https://wiki/{year}_AIME_II_Problems/Problem_7"}
            for answer, year in (("004", 2022), ("073", 2023), ("000", 2024))]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [(q.answer, q.year) for q in load_benchmark("aime", path)] == [("4", 2022), ("73", 2023), ("0", 2024)]
    path.write_text(json.dumps(rows[0] | {"answer": "4.5"}), encoding="utf-8")
    with pytest.raises(StudyError, match="line 1: has the answer '4.5', which is no whole number"):
        load_benchmark("aime", path)


def test_a_file_of_another_content_is_refused(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(GOOD), encoding="utf-8")
    told = content_hash(path)
    check_content(path, told)
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD), encoding="utf-8")
    with pytest.raises(StudyError, match="questions.jsonl: its content is not what the config names"):
        load_benchmark("gsm8k-train", path, data_hash=told)


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
    test, train = GOOD, {"question": "3 + 3?", "answer": "3 + 3 = <<3+3=6>>6\n#### 6"}
    rows = {("openai/gsm8k", "main", "test"): test, ("openai/gsm8k", "main", "train"): train, ("ScaleAI/gsm1k", None, "test"): train,
            ("HuggingFaceH4/MATH-500", None, "test"): {"problem": "x?", "solution": "s", "answer": "\\frac{1}{2}"},
            ("DigitalLearningGmbH/MATH-lighteval", "default", "train"):
                {"problem": "x?", "level": "Level 2", "solution": "It is $\\boxed{\\frac{1}{3}}$.", "type": "Algebra"},
            ("AI-MO/aimo-validation-aime", None, "train"): {"id": 0, "problem": "y?", "solution": "s", "answer": "007",
                                                            "url": "https://wiki/2023_AIME_I_Problems/Problem_1"},
            ("Maxwell-Jia/AIME_2024", None, "train"): {"ID": "2024-I-4", "Problem": "y?", "Solution": "s", "Answer": 33}}
    monkeypatch.setattr(benchmarks, "load_dataset", lambda *place, split: datasets.Dataset.from_list([rows[*place, split]]))
    found = {name: load_benchmark(name)[0] for name in REAL}
    assert {name: question.answer for name, question in found.items()} == {
        "gsm8k": "4", "gsm8k-train": "6", "gsm1k": "6", "math500": "\\frac{1}{2}", "math-train": "\\frac{1}{3}", "aime": "7", "aime24": "33"}
    assert (found["aime"].year, found["aime24"].year) == (2023, 2024)
