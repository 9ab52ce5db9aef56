"Runs of 13 words, against the slow and obvious version, and on the questions of real benchmarks."
from hypothesis import given
from hypothesis import strategies as st

from echochamber.data.benchmarks import load_benchmark
from echochamber.data.contamination import Contamination, words_of

WORDS = st.lists(st.sampled_from(["a", "B", "c,", "(d)", "e-a", "x_1", "É", "unknown", "  "]), max_size=25).map(" ".join)


def runs(text: str, gram: int) -> set[tuple]:
    words = words_of(text)
    return {tuple(words[start:start + gram]) for start in range(len(words) - gram + 1)}


@given(st.lists(WORDS, max_size=5), st.lists(WORDS, max_size=3), st.lists(WORDS, max_size=3), st.integers(1, 6))
def test_the_same_as_comparing_every_run(texts, first, second, gram):
    found = Contamination({"first": first, "second": second}, gram).found(texts)
    for column, questions in enumerate((first, second)):
        known = set().union(*(runs(question, gram) for question in questions))
        assert found[:, column].tolist() == [bool(runs(text, gram) & known) for text in texts]


def test_a_run_does_not_reach_into_the_next_text():
    check = Contamination({"only": ["one two three four"]}, gram=4)
    assert check.found(["one two", "three four", "x one two", "three four one two three four"])[:, 0].tolist() == [False] * 3 + [True]


def test_real_questions_are_found_in_what_quotes_them(real_file):
    questions = [question.question for question in load_benchmark("gsm8k", real_file("gsm8k"))]
    check = Contamination({"gsm8k": questions})
    quoted = [f"Exercise.\n\n{question.upper()}\nSolution" for question in questions]
    found = check.found(quoted)[:, 0]
    assert found.sum() == len(questions) - check.too_short["gsm8k"] and check.too_short["gsm8k"] < 0.05 * len(questions)


def test_real_training_questions_are_not_the_test(real_file):
    "GSM8K's own training set: a handful of near copies, known to be there, and no more."
    train = real_file("gsm8k").with_name("train.jsonl")
    asked = [question.question for question in load_benchmark("gsm8k", real_file("gsm8k"))]
    found = Contamination({"gsm8k": asked}).found([question.question for question in load_benchmark("gsm8k", train)])
    assert found.mean() < 0.02
