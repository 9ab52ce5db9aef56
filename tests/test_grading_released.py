"The grader of the release: used like ours, and each of its defects."
import subprocess
import sys

import pytest
import torch

from echochamber.grading.answers import Grade, Grader
from echochamber.grading.released import ReleasedGrader, block_program, function_program, label_as_released
from echochamber.models.generation import SamplingConfig
from echochamber.training.rollouts import sample_and_grade
from echochamber.training.toy import toy_task

torch.set_num_threads(1)
QUESTION = "Ann has 18 apples and nobody takes any. How many has she?"
PROGRAM = "\n\ndef simple_math_problem() -> int:\n    apples = 9 * 2\n    return apples"
BLOCK = "\n\nWe compute.\n<llm-code>\nx = 9\nx * 2\n</llm-code>\n<llm-code-output>\n18\n</llm-code-output>\nSo \\boxed{18}."
PROSE = "\n\nTwice 9 is 18, so the answer is \\boxed{18}."


@pytest.fixture(scope="module")
def ours():
    with Grader() as grader:
        yield grader


@pytest.fixture(scope="module")
def theirs():
    with ReleasedGrader() as grader:
        yield grader


def grade(grader: Grader, completion: str, prompt: str | None = None, answer: str = "18") -> Grade:
    [found] = grader.grade([completion], [answer], [prompt]) if prompt else grader.grade([completion], [answer])
    return found


@pytest.mark.parametrize(("completion", "format"), [(PROGRAM, "tinygsm"), (BLOCK, "omi1"), (PROSE, "omi2")])
@pytest.mark.parametrize("prompt", [None, "Ann has 9 apples and Ben as many. How many are these?"])
def test_what_is_in_order_is_graded_alike(completion, format, prompt, ours, theirs):
    right, wrong = (grade(theirs, completion, prompt, answer) for answer in ("18", "19"))
    assert (right.format, right.reward, wrong.reward) == (format, 1, 0)
    assert grade(ours, completion).format == format and grade(ours, completion).reward == 1


def test_it_grades_as_many_as_it_is_given(theirs):
    assert theirs.grade([], []) == []
    grades = theirs.grade([PROGRAM, "", BLOCK, PROSE], ["18"] * 4)
    assert [found.outcome for found in grades] == ["correct", "wrong", "correct", "correct"]
    with pytest.raises(ValueError, match="zip"):
        theirs.grade([PROGRAM, PROSE], ["18"])


# The reward sees the prompt


@pytest.mark.parametrize("completion", ["", "\n\nI do not know.", "</s>"])
def test_a_number_of_the_question_is_rewarded(completion, ours, theirs):
    assert grade(theirs, completion, QUESTION).reward == 1
    assert grade(theirs, completion).reward == grade(ours, completion).reward == 0
    with ReleasedGrader(sees_prompts=False) as evaluator:
        assert grade(evaluator, completion, QUESTION).reward == 0


def test_the_label_is_that_of_the_completion(theirs):
    assert grade(theirs, PROSE, "How many are defective?").format == "omi2"


# A program is where `def` stands


@pytest.mark.parametrize(("prose", "format"), [
    ("\n\nBy default, she has \\boxed{18}.", "tinygsm"), ("\n\nNo <llm-code> is needed: \\boxed{18}.", "omi1"),
    ("\n\nNo <llm-code>, by default: \\boxed{18}.", "tinygsm"), ("\n\nWhatever 18", "omi2")])
def test_a_word_makes_a_program(prose, format, ours, theirs):
    assert grade(theirs, prose).format == format and grade(theirs, prose).reward == 1
    assert grade(ours, prose).format in ("omi2", "other")


def test_a_block_that_failed_counts_for_nothing_beside_a_function(theirs):
    both = BLOCK.replace("x = 9", "x = y") + PROGRAM
    assert grade(theirs, both) == Grade("tinygsm", "18", "correct", False)
    assert [label_as_released(both, block_ran) for block_ran in (True, False)] == ["omi1", "tinygsm"]


# A program that fails is searched for a number


@pytest.mark.parametrize(("completion", "outcome"), [
    ("\n\ndef simple_math_problem():\n    return apples  # this is 18", "error"),
    ("\n\ndef simple_math_problem():\n    while True: pass\n\nThe answer is 18.", "timeout"),
    ("\n\n<llm-code>\napples * 2\n</llm-code>\nSo \\boxed{18}.", "error"),
])
def test_a_program_that_fails_is_rewarded_for_what_stands_in_it(completion, outcome, ours, theirs):
    assert grade(ours, completion).outcome == outcome
    released = grade(theirs, completion)
    assert released.reward == 1 and released.extracted is None and released.format != "omi2"


def test_prose_behind_a_right_program_spoils_it(ours, theirs):
    completion = PROGRAM + "\n\nThat is 7 more than 11."
    assert grade(ours, completion).reward == 1 and grade(theirs, completion).reward == 0


def test_the_last_line_of_a_block_must_be_a_value(theirs):
    assert grade(theirs, "\n\n<llm-code>\nx = 18\n</llm-code>").extracted is None
    assert grade(theirs, "\n\n<llm-code>\nprint(18)\n</llm-code>") == Grade("omi1", "None", "wrong", False)
    for code in ("", "18\n# so", "(\n18\n)"):  # nothing, a comment, half an expression
        assert grade(theirs, f"\n\n<llm-code>\n{code}\n</llm-code>\nSo \\boxed{{18}}.") == Grade("omi1", None, "correct", False)


# What is ours: nothing of it runs here


@pytest.mark.parametrize("statement", ["import os\n    os._exit(3)", "import sys\n    sys.exit(3)", "open('/tmp/x', 'w')", "exit(3)"])
def test_programs_run_in_the_sandbox(statement, theirs):
    text = f"\n\ndef simple_math_problem():\n    {statement}\n    return 18\n"
    found = grade(theirs, text, answer="7")
    assert found.outcome == "wrong" and grade(theirs, PROGRAM).reward == 1


def test_an_endless_expression_ends(theirs):
    failures = theirs.comparer.failures
    assert grade(theirs, "\n\n$9^{9^{9^{9^{9}}}}$").reward == 0 and grade(theirs, PROSE).reward == 1
    assert theirs.comparer.failures >= failures


def test_nothing_is_imported_from_where_somebody_works(tmp_path):
    (tmp_path / "random.py").write_text("raise SystemExit('executed')")
    code = ("from echochamber.grading.released import ReleasedGrader\nwith ReleasedGrader() as grader:\n"
            "    print(grader.grade(['So 18.'], ['18'])[0].reward)")
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "1.0\n", done.stderr


@pytest.mark.parametrize("text", ["def", "\ndef", "<llm-code>", "<llm-code></llm-code>", "\0def\ndef", "def\ud800", "\n\ndef f(:\n'''"])
def test_any_text_gets_a_program_that_fails_quietly(text, theirs):
    assert isinstance(function_program(text), str) and isinstance(block_program(text), str)
    assert grade(theirs, text).outcome == "wrong"


# It is shown the prompts by the one function that samples


def test_sampling_shows_the_prompts_to_whoever_asks_for_them():
    policy, tokenizer, questions, _ = toy_task()
    sampling = SamplingConfig(max_new_tokens=1, temperature=1.0)
    rewards = {}
    for sees_prompts in (True, False):
        with ReleasedGrader(sees_prompts=sees_prompts) as grader:
            rewards[sees_prompts] = sample_and_grade(policy, tokenizer, questions, 4, sampling, grader, range(10)).rewards
    with Grader() as grader:
        ours = sample_and_grade(policy, tokenizer, questions, 4, sampling, grader, range(10)).rewards
    assert torch.equal(rewards[False], ours) and not torch.equal(rewards[True], ours)  # `7` below `1` is read as 17
