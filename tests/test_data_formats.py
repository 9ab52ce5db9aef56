"""The recogniser on hostile text, on prose full of code-like words, and on real solutions."""
import json
import random
import string
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from echochamber.data.formats import (
    FORMATS,
    RENDERERS,
    StyleConfig,
    join_document,
    last_box,
    parse_completion,
    recognise,
    render_solution,
    stated_answer,
)
from echochamber.data.problems import FAMILIES, ProblemConfig, generate_problems

PROBLEMS = generate_problems(ProblemConfig(), 400, seed=5, split="train")
MEGABYTE = 1_000_000

HOSTILE = {
    "brackets in the header": "def f(" + "(" * MEGABYTE,
    "brackets in the body": "def f():\n    return " + "(" * MEGABYTE,
    "brackets within the length limit": "def f(x=" + "(" * 180 + "):",
    "unary operators in the header": "def f(x=" + "-" * 180 + "1):",
    "quotes": "def f():\n" + "\"'" * (MEGABYTE // 2) + '"""',
    "escaped quotes": "def f():\n    " + '\\"' * (MEGABYTE // 2) + "'''",
    "triple quotes": "def f():\n    " + '"""' * (MEGABYTE // 3),
    "empty strings before a triple quote": "def f():\n    " + "'' " * (MEGABYTE // 3) + '"""',
    "hashes": "#" * MEGABYTE,
    "hashes with numbers": "#### 1 " * (MEGABYTE // 7),
    "a number and spaces": "#### 5" + " " * MEGABYTE + "(",
    "many digits": "#### " + "1" * MEGABYTE + "x",
    "many groups of digits": "#### " + "1," * (MEGABYTE // 2) + "x",
    "unclosed boxes": "\\boxed{" * (MEGABYTE // 7),
    "nested boxes": "\\boxed{" * (MEGABYTE // 8) + "}" * (MEGABYTE // 8),
    "boxes and spaces": "\\boxed" + " " * MEGABYTE,
    "answer sentences": "the answer is " * (MEGABYTE // 14),
    "answer sentences with a colon": "the answer is: 5 " * (MEGABYTE // 17),
    "answer and spaces": "the answer is" + " " * MEGABYTE,
    "answer and markers": "the answer is " + "$" * MEGABYTE,
    "opening tags": "<llm-code>\n" * (MEGABYTE // 11),
    "tags in a line": "<llm-code>" * (MEGABYTE // 10),
    "spaces before a tag": (" " * 1000 + "\n") * 1000 + " <llm-code> x",
    "empty lines": "\n" * MEGABYTE,
    "empty lines in a function": "def f():\n" + "\n" * MEGABYTE + "x",
    "spaces": " " * MEGABYTE,
    "fences": "```" * (MEGABYTE // 3),
    "NUL bytes": "\0" * MEGABYTE,
    "NUL in a header": "def f(\0):\n    return 1",
    "a lone surrogate": "def f(x='\ud800'):\n    return 1",
    "carriage returns": "def f():\r    return 1\r" * 1000,
    "a header over two lines": "def f(\n    x):\n    return 1",
    "open brackets on many lines": "x = (\n" * (MEGABYTE // 6),
    "decorators": "@a\n" * (MEGABYTE // 3),
    "fences with code": "```python\nx = 1\n```\n" * (MEGABYTE // 20),
    "announced questions": "\nQuestion: 1" * (MEGABYTE // 12),
    "answers in many words": "the answer to a b " * (MEGABYTE // 18),
    "an escape that warns": "def f(x='\\d'):\n    return 1",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_has_a_format_within_two_seconds(text):
    start = time.process_time()
    assert parse_completion(text).format in FORMATS
    assert time.process_time() - start < 2


@pytest.mark.parametrize("unit", ["#### 1 ", "\\boxed{", "}{", "the answer is ", "<llm-code>\n", "\n<llm-code", "'\"", "\\\"",
                                  "def f():\n", "    x = 1\n", "'''", "# ", "\\", "1,", "$", " \n", "#\n", "import a\n", "def f(\n", "```\n"])
@pytest.mark.parametrize("opening", ["", "def f():\n    ", "<llm-code>\n", "\\boxed{"])
def test_time_is_linear(opening, unit):
    def seconds(size):
        text = opening + unit * (size // len(unit)) + "'''"
        return min(_timed(text) for _ in range(3))
    assert seconds(400_000) < 12 * seconds(100_000) + 0.02


def _timed(text):
    start = time.process_time()
    parse_completion(text)
    return time.process_time() - start


PIECES = st.sampled_from(["def f():", "def ", "\n", "    return 1", "<llm-code>", "</llm-code>", "<llm-code-output>", "\\boxed{",
                          "}", "{", "#### ", "12", "the answer is ", ":", "```", "'''", '"""', "#", "\\", "\0", "\ud800", " "])


@given(st.one_of(st.text(), st.lists(PIECES | st.text(max_size=3), max_size=30).map("".join)))
def test_every_text_has_exactly_one_format(text):
    parsed = parse_completion(text)
    assert parsed.format in FORMATS and recognise(text) == parsed.format
    assert (parsed.format in ("tinygsm", "omi1")) <= bool(parsed.cells) <= (parsed.format != "omi2")
    assert (parsed.format == "tinygsm") <= (parsed.call is not None) <= (parsed.format in ("tinygsm", "other"))
    assert (parsed.format == "omi2") <= (stated_answer(parsed.prose) is not None)


WORDS = st.sampled_from(["default", "defined", "def", "def f", "define f(x)", "definitely", "class", "return", "import", "by",
                         "the", "Tom", "has", "12", "apples", "=", "+", "(x):", "`<llm-code>`", "<llm-code>", "lambda", "is:"])


@given(st.lists(WORDS, min_size=3, max_size=40).map(" ".join))
def test_prose_with_words_of_code_is_never_code(prose):
    sentence = f"So {prose}."
    assert recognise(sentence) == "other"
    assert recognise(sentence + " \\boxed{4}") == "omi2"
    assert recognise(prose.replace("<llm-code>", "") + " and so on.") == "other"


@pytest.mark.parametrize("text", ["default", "defined as 3", "def", "def is a keyword:", "define f(x): x", "def f(x) = x + 1",
                                  "def f(x): the value at x", "deft hands", "class A:\n    pass", "async def f():\n    return 1",
                                  "x = 3\ny = x + 1\ny", "import math", "    return result", "result = 3\n    return result"])
def test_not_functions(text):
    assert recognise(text) == "other"


@pytest.mark.parametrize("text", ["def f( -> int:\n    return 3", "x:\ndef f() -> int\n    return 3", "async def f():\n    return 3",
                                  "def f(x) = x + 1", "```python\ndef f(:\n    return 3\n```\nIt is \\boxed{3}."])
def test_code_without_a_shape_is_a_program_and_never_prose(text):
    "Its answer is what it computes; no number in it can be taken for one."
    parsed = parse_completion(text)
    assert parsed.format == "other" and parsed.cells and stated_answer(parsed.prose) is None


@pytest.mark.parametrize("text", ["import math\ndef f():\n    return 1", "# solve\n\nfrom math import ceil\n\ndef f():\n    return 1",
                                  "```python\nimport math\n\ndef f():\n    return 1\n```"])
def test_a_function_may_follow_imports_and_comments(text):
    parsed = parse_completion(text)
    assert parsed.format == "tinygsm" and parsed.call == "f()" and all(cell in text for cell in parsed.cells)


@pytest.mark.parametrize("text", ["def f():", "def f():\n", "\n\n  def f():\n    return 1", "def f(a, b=2, *c, **d) -> 'x':\n  retur",
                                  "```\ndef f():\n    return 1\n```", "```python\n\ndef f():\n    return 1", "def f(): return 1",
                                  "def f():  # comment\n    return 1", "def f():\nreturn 1", "def f():\n    \\boxed{3}"])
def test_functions_also_when_broken(text):
    parsed = parse_completion(text)
    assert parsed.format == "tinygsm" and parsed.call == "f()" and parsed.cells[0].startswith("def f(")


@pytest.mark.parametrize("text, program", [
    ("<llm-code>\n1 + 1", "1 + 1"), ("a\n  <llm-code>  \n1\n</llm-code>\n<llm-code>\n2\n</llm-code>", "1 2"),
    ("<llm-code>\r\n1\r\n</llm-code>\r\n", "1"), ("<llm-code>", ""), ("<llm-code>\n1\n<llm-code>\n2", "1 <llm-code> 2")])
def test_code_blocks(text, program):
    parsed = parse_completion(text)
    assert parsed.format == "omi1" and " ".join(parsed.cells).split() == program.split()


def test_output_is_neither_program_nor_prose():
    parsed = parse_completion("A\n<llm-code>\n1\n</llm-code>\n<llm-code-output>\n\\boxed{7}\n</llm-code-output>\nB")
    assert "7" not in "".join(parsed.cells) and "7" not in parsed.prose and parsed.prose.split() == ["A", "B"]


@pytest.mark.parametrize("text, answer", [
    ("\\boxed{1} or \\boxed{2}", "2"), ("\\boxed{1} or \\boxed{2", None), ("\\boxed{1} or \\boxed{}", ""), ("\\fbox{3}", "3"),
    ("\boxed{3}", "3"), ("\\boxed{a \\boxed{3}", "3"), ("\\boxed {\\frac{1}{2}}", "\\frac{1}{2}"),
    ("{ \\boxed{3}", "3"), ("} \\boxed{3}", "3"), ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"), ("\\boxed{}", ""), ("\\boxed 3", "3"),
    ("boxed{3}", None), ("\\boxed{x\\}", None), ("\\boxed{a{b}c}", "a{b}c")])
def test_last_box(text, answer):
    assert last_box(text)[0] == answer


@pytest.mark.parametrize("text, answer", [
    ("#### 18", ("hashes", "18")), ("so 3.\n#### $1,200.50\n", ("hashes", "$1,200.50")), ("x #### -4", ("hashes", "-4")),
    ("#### 1\n#### 2", ("hashes", "2")), ("#### 18 apples", ("hashes", "18 apples")), ("#### 5%", ("hashes", "5%")), ("##### 5", None),
    ("#### Step 1", None), ("#### 1. First", None), ("The answer is: 5", ("sentence", "5")), ("THE ANSWER IS 1/2.", ("sentence", "1/2")),
    ("the final answer is **7**", ("sentence", "7")), ("the answer is 3 or the answer is 4.", ("sentence", "4")),
    ("the answer is", None), ("the answer is unclear", ("sentence", "unclear")), ("the answers is 4", None), ("breathe answer is 4", None)])
def test_stated_answer(text, answer):
    assert stated_answer(text) == answer


STYLES = st.builds(StyleConfig, docstring=st.sampled_from([0.0, 1.0]), short_names=st.sampled_from([0.0, 1.0]),
                   comments=st.sampled_from([0.0, 1.0]), words=st.sampled_from([0.0, 1.0]), random_errors=st.sampled_from([0.0, 1.0]),
                   wrong_families=st.lists(st.sampled_from(sorted(FAMILIES)), max_size=3, unique=True))


@given(st.sampled_from(PROBLEMS), st.sampled_from(sorted(RENDERERS)), STYLES, st.integers(0, 99))
@example(PROBLEMS[0], "omi2", StyleConfig(), 0)
def test_rendered_solutions_are_recognised_whatever_the_style(problem, format, style, seed):
    solution = render_solution(problem, format, style, random.Random(seed))
    assert recognise(solution) == recognise("\n\n" + solution) == format
    assert solution == render_solution(problem, format, style, random.Random(seed))
    assert join_document(problem.question, solution).startswith(problem.question + "\n\n")
    assert set(solution) <= set(string.printable)


@pytest.mark.parametrize("field, format, mark", [("docstring", "tinygsm", '"""'), ("short_names", "omi1", "\na = "),
                                                 ("comments", "omi1", "# now"), ("words", "omi2", " equals ")])
def test_style_shares_are_met(field, format, mark):
    style = StyleConfig(**{"docstring": 0, "short_names": 0, "comments": 0, "words": 0, field: 0.3})
    rng = random.Random(0)
    first_lines = [render_solution(problem, format, style, rng).rpartition("\n")[0] for problem in PROBLEMS * 5]
    assert abs(sum(mark in lines for lines in first_lines) / len(first_lines) - 0.3) < 0.05


def test_real_gsm8k_solutions_state_their_answer(real_file):
    for row in map(json.loads, real_file("gsm8k").read_text(encoding="utf-8").splitlines()):
        assert recognise(row["answer"]) == "omi2"
        assert stated_answer(row["answer"]) == ("hashes", row["answer"].split("#### ")[1])
        assert recognise(row["question"]) == "other"
