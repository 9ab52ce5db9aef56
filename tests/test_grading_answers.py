"Adversarial and property checks of the grader, and the gold answers of the real benchmarks."
import json
import re
import time
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echochamber.data.benchmarks import load_benchmark
from echochamber.data.formats import FORMATS
from echochamber.grading.answers import (
    OUTCOMES,
    Grade,
    Grader,
    GraderConfig,
    canonical_number,
    prose_answer,
    read_gold,
    round_float,
)
from echochamber.grading.values import normalise, parse_number


def load_answers(file: Path) -> list[str]:
    "Gold answers as a file holds them, beside GSM8K's test set those of its training set; none of it is part of the project."
    files = [file, *(other for other in [file.with_name("train.jsonl")] if file.parent.name == "gsm8k" and other.exists())]
    golds = [question.answer for file in files for question in load_benchmark("math500", file)]
    whole = [json.loads(line)["answer"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(golds) == len(whole)
    return whole


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


def function(body: str) -> str:
    return f"def simple_math_problem() -> int:\n    {body}"


def block(code: str, output: str = "18") -> str:
    return f"Let us compute.\n<llm-code>\n{code}\n</llm-code>\n<llm-code-output>\n{output}\n</llm-code-output>\nSo \\boxed{{18}}."


# Real gold answers


def test_gsm8k_gold_answers(grader, real_file):
    golds = load_answers(real_file("gsm8k"))
    assert len(golds) in (7473, 1319, 7473 + 1319)
    boxed = grader.grade([rf"So \boxed{{{read_gold(gold)}}}." for gold in golds], golds)
    assert {grade.outcome for grade in boxed} == {"correct"}
    assert set(grader.grade(golds, golds)) == {Grade("omi2", grade.extracted, "correct", True) for grade in boxed}
    for change in (lambda value: value + 1, lambda value: -value or 7, lambda value: value * 10 + 1):
        changed = [rf"So \boxed{{{change(int(read_gold(gold).replace(',', '')))}}}." for gold in golds]
        assert {grade.outcome for grade in grader.grade(changed, golds)} == {"wrong"}


def change_digit(answer: str, position: int) -> str:
    digit = [match.start() for match in re.finditer("[0-9]", answer)][position]
    return f"{answer[:digit]}{(int(answer[digit]) + 1) % 10}{answer[digit + 1:]}"


def test_math500_gold_answers_and_both_ends_changed(real_file):
    golds = load_answers(real_file("math500"))
    assert len(golds) == 500
    pairs = sorted({(change_digit(gold, end), gold) for gold in golds for end in (0, -1) if re.search("[0-9]", gold)})
    with Grader(GraderConfig(latex_seconds=30)) as patient:  # a changed digit may make a power that takes seconds
        right = patient.grade([rf"\boxed{{{gold}}}" for gold in golds], golds)
        changed = patient.grade([rf"\boxed{{{answer}}}" for answer, _ in pairs], [gold for _, gold in pairs])
    assert {grade.outcome for grade in right} == {"correct"} and patient.comparer.failures == 0
    # Units are not graded, so a changed power of a unit passes.
    passing = {gold for (_, gold), grade in zip(pairs, changed, strict=True) if grade.outcome != "wrong"}
    assert passing <= {r"864 \mbox{ inches}^2", r"15\mbox{ cm}^2"}


def test_audit_of_real_answers(real_file):
    golds = [read_gold(gold).replace(",", "") for gold in load_answers(real_file("gsm8k"))[::40]]
    with Grader(GraderConfig(audit=True)) as grader:
        grader.grade([rf"\boxed{{{gold}}}" for gold in golds], golds)
        grader.grade([rf"\boxed{{{gold}1}}" for gold in golds], golds)
    assert grader.audited == 2 * len(golds) and not grader.disagreements


# Kinds of completions, each with neighbours; see the file for what they are

CASES = defaultdict(list)
for line in Path(__file__).with_name("grading_cases.jsonl").read_text(encoding="utf-8").splitlines():
    CASES[json.loads(line)["kind"]].append(json.loads(line))


@pytest.mark.parametrize("kind", CASES)
def test_every_case_of_a_kind_ends_as_it_should(grader, kind):
    cases = CASES[kind]
    grades = grader.grade([case["completion"] for case in cases], [case["answer"] for case in cases])
    astray = [(case["completion"], case["answer"], grade) for case, grade in zip(cases, grades, strict=True)
              if grade.outcome not in case["expected"].split("|") or grade.format != case.get("expected_format", grade.format)]
    assert not astray


def test_one_completion_never_ends_the_run(grader):
    odd = [case["completion"] for case in CASES["values that cannot be handed over"]]
    grades = grader.grade([text for each in odd for text in (each, function("return 18"))], ["18"] * 2 * len(odd))
    assert all(grade.outcome in OUTCOMES for grade in grades)
    assert {grade.outcome for grade in grades[1::2]} == {"correct"}


@pytest.mark.parametrize("text, runs_on", [
    (r"\boxed{18}", False), ("So \\boxed{18}.\n\nQuestion: and 3 more?\n\\boxed{21}", True), ("Question: 3 x 6?\n\nAnswer: 18", False),
    ("Let me see.\n\nQuestion: 3 x 6?\n\nThe answer is 18.", False), ("#### 18\n\n### Problem 2\n: 5", True),
])
def test_running_on_is_told(grader, text, runs_on):
    [grade] = grader.grade([text], ["18"])
    assert (grade.outcome, grade.runs_on) == ("correct", runs_on)


# Numbers


@given(value=st.fractions(max_denominator=10**6))
def test_any_fraction_survives_its_spellings(value):
    assert parse_number(str(value)) == value
    assert parse_number(rf"\frac{{{value.numerator}}}{{{value.denominator}}}") == value
    assert parse_number(f"${value.numerator:,}/{value.denominator}$") == value


@given(value=st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**12), max_value=10**12))
def test_any_decimal_is_read_exactly(value):
    assert parse_number(f"{value:f}") == parse_number(f"\\${value:,f}") == Fraction(value)


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_reading_a_float_is_idempotent_and_close(value):
    text = canonical_number(repr(value))
    assert canonical_number(text) == text
    number = parse_number(text)
    if number is not None:
        assert abs(number - Fraction(value)) <= max(1, abs(Fraction(value))) * Fraction(5, 10**12)


@given(value=st.integers(-(10**6), 10**6), places=st.integers(0, 5), noise=st.floats(-1e-15, 1e-15))
def test_noise_in_the_last_digits_is_read_away(value, places, noise):
    exact = Fraction(value, 10**places)
    noisy = float(exact) * (1 + noise)
    assert parse_number(canonical_number(repr(noisy))) == exact


def test_round_float_keeps_integers():
    for value in (0.0, 1.0, -7.0, 999999999999.0, 1e15, 2.0**53, 1e300):
        assert round_float(value) == value


@given(text=st.text(max_size=300) | st.text(alphabet="0123456789.,/-+$%\\{}() efracboxdtext#\n", max_size=300))
def test_no_text_breaks_the_readers(text):
    normalise(text), parse_number(text), prose_answer(text), canonical_number(text)


@pytest.mark.parametrize("text", [
    "1e999999999", "9" * 10**6, "1," * 10**6, "1/" * 10**6, r"\boxed{" * 10**5, r"\text{" * 10**5, "-" * 10**6,
    r"\frac" * 10**5, " " * 10**6, "#### " * 10**5, "the answer is " * 10**5, r"\boxed{" + "{" * 10**5 + "}" * 10**5 + "}",
    "(" * 199, "-" * 199, r"\boxed{" + "(" * 150 + "1" + ")" * 150 + "}", r"\boxed{" + r"\frac{1}{" * 20 + "2" + "}" * 20 + "}",
    "x = (\n" * 3000, "print(\n" * 2500, "@a\n" * 5000, "a.\n" * 5000, "```\nx = 1\n" * 2000,
    "\nQuestion: 1 " * 10**4, "the answer to a b c " * 10**4, "answer: x\n" * 10**4, "$" * 10**5, "[(" * 10**4,
    "<llm-code>\n" * 10**5, "def f():\n" * 10**5, "```\n" * 10**5, '"""' * 10**5, "\0" * 10**5, "\ud800" * 10**5,
])
def test_huge_completions_are_graded_quickly(grader, text):
    start = time.process_time()
    [grade] = grader.grade([text], ["18"])
    assert grade.outcome in OUTCOMES and grade.format in FORMATS and grade.outcome != "correct"
    assert time.process_time() - start < 5


# Programs


@pytest.mark.parametrize("body, outcome, extracted", [
    ("return 18", "correct", "18"), ("return 18.0", "correct", "18"), ("return 18.000000000000004", "correct", "18"),
    ("return 54 / 3", "correct", "18"), ("return 0.1 * 180", "correct", "18"), ("return '18 dollars'", "correct", "18 dollars"),
    ("return 18.00001", "wrong", "18.00001"), ("return True", "wrong", "True"), ("return [18]", "correct", "18"),
    ("return 'eighteen'", "correct", "eighteen"), ("return float('inf')", "wrong", "inf"), ("return 10**4000", "wrong", None),
    ("print(18)", "no_answer", None), ("return None", "no_answer", None), ("return ''", "no_answer", None),
    ("return 18 +", "error", None), ("return apples", "error", None), ("return (18", "error", None), ('"""18', "error", None),
    ("raise ValueError('18')", "error", None), ("while True: pass", "timeout", None), ("import numpy", "unsupported", None),
])
def test_what_a_function_answers(grader, body, outcome, extracted):
    [grade] = grader.grade([function(body) + "\n\nThe answer is \\boxed{18}."], ["18"])
    assert (grade.format, grade.outcome) == ("tinygsm", outcome)
    assert extracted is None or grade.extracted == extracted
    assert grade.strict == (outcome in ("correct", "wrong"))


@pytest.mark.parametrize("code, outcome", [
    ("9 * 2", "correct"), ("print(9 * 2)", "correct"), ("print(7)\nprint('Total:', 18.0)", "correct"), ("print(7)\n18", "correct"),
    ("x = 9 * 2", "no_answer"), ("print('')", "no_answer"), ("9 * 3", "wrong"), ("print('none')", "wrong"),
    ("9 * y", "error"), ("while True: pass", "timeout"), ("from sympy import *", "unsupported"),
])
def test_code_blocks_are_run_and_their_written_output_ignored(grader, code, outcome):
    [grade] = grader.grade([block(code)], ["18"])
    assert (grade.format, grade.outcome) == ("omi1", outcome)


def test_blocks_of_one_solution_share_their_names_and_solutions_do_not(grader):
    two = "<llm-code>\nx = 9\n</llm-code>\nand then\n<llm-code>\nx * 2\n</llm-code>"
    assert [grade.outcome for grade in grader.grade([two, block("x * 2")], ["18"] * 2)] == ["correct", "error"]


def test_a_fractional_gold_answer_meets_a_float(grader):
    texts = [function("return 1 / 3"), function("return 0.333"), function("return 2 / 4"), r"\boxed{0.3333333333333333}"]
    grades = grader.grade(texts, [r"\frac{1}{3}", r"\frac{1}{3}", r"\frac12", r"\frac13"])
    assert [grade.outcome for grade in grades] == ["correct", "wrong", "correct", "wrong"]


# Prose


@pytest.mark.parametrize("prose, outcome, strict", [
    ("By default she has 18.", "correct", False), ("The rate is defined as 18", "correct", False),
    ("def is short for default, \\boxed{18}", "correct", True), ("#### 18", "correct", True), ("#### $18.00", "correct", True),
    ("The answer is 18.", "correct", False), ("the answer is: 18", "correct", False), ("\\boxed{17} no, \\boxed{18}", "correct", True),
    ("\\boxed{18} and #### 17", "correct", True), ("#### 18\nThe answer is 17", "correct", True),
    ("The answer is 18, after 3 days", "correct", False), ("\\boxed{18", "correct", False), ("\\boxed{}, 18", "correct", False),
    ("\\boxed{18}, \\boxed{}", "wrong", False), ("\\boxed{18}, \\boxed{1", "wrong", False),
    ("\\boxed{\\frac{36}{2}}", "correct", True), ("\\boxed{x = 18}", "correct", True), ("\\boxed{2 \\cdot 9}", "correct", True),
    ("\\boxed{18, 19}", "wrong", True), ("\\boxed{81}", "wrong", True), ("", "no_answer", False), ("\\boxed{?}", "wrong", True),
])
def test_what_prose_answers(grader, prose, outcome, strict):
    [grade] = grader.grade([prose], ["18"])
    assert grade.format in ("omi2", "other") and (grade.outcome, grade.strict) == (outcome, strict)


@given(texts=st.lists(st.text(max_size=200), max_size=4))
def test_any_completion_gets_a_grade(grader, texts):
    grades = grader.grade(texts, ["18"] * len(texts))
    assert [grade.format in FORMATS and grade.outcome in OUTCOMES for grade in grades] == [True] * len(texts)


def test_rows_must_match(grader):
    with pytest.raises(ValueError):
        grader.grade(["18", "19"], ["18"])
