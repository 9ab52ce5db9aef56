"""The generator over many configs, and the splits over many seeds."""
import random
import re
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from echochamber.core import StudyError
from echochamber.data.problems import (
    FAMILIES,
    Bounds,
    ProblemConfig,
    calculate,
    draw_chain,
    draw_names,
    generate_problems,
    out_of_distribution,
    solve,
    split_of,
    stories,
    valid_operands,
    write_story,
)


def ranges(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high)).map(sorted).map(tuple)


VALUES = st.fixed_dictionaries({
    "operations": ranges(1, 6), "operands": ranges(1, 40), "factors": ranges(2, 9), "largest_result": st.integers(1, 1000),
    "families": st.lists(st.sampled_from(sorted(FAMILIES)), min_size=1, max_size=3, unique=True).map(tuple)})


def accepted(values: dict) -> ProblemConfig | None:
    "The config, or None if it is refused."
    try:
        return ProblemConfig.parse(values)
    except StudyError:
        return None


def tells(bounds: Bounds, family: str, count: int) -> bool:
    "Whether some chain of `count` events exists, by trying all of them."
    def goes_on(value, told, left):
        return left == 0 or any(
            goes_on(calculate(event.operation, value, number), after, left - 1)
            for event, after in stories(family, bounds).events(told) for number in valid_operands(event.operation, value, bounds))
    (low, high), (least, most) = bounds.operands, bounds.factors
    heaps = range(least, most + 1) if FAMILIES[family].first[0].operation == "/" else (1,)
    return any(start <= bounds.largest_result and goes_on(start, (), count)
               for start in {amount * factor for amount in range(low, high + 1) for factor in heaps})


@given(VALUES, st.integers(0, 9))
def test_every_config_that_is_accepted_yields_problems_that_obey_it(values, seed):
    assume((config := accepted(values)) is not None)
    rng = random.Random(seed)
    for family in config.families * 5:
        problem = write_story(family, *draw_chain(rng, family, config), draw_names(rng))
        assert problem.family in config.families
        assert config.operations[0] <= problem.level <= config.operations[1]
        assert solve(problem.steps) == int(problem.answer) == problem.steps[-1].result.value
        assert all(0 < step.result.value <= config.largest_result for step in problem.steps)
        for index, step in enumerate(problem.steps):
            assert step.result.step == index and step.left.step == (index - 1 if index else None)
            assert step.right.step is None and "{sum}" in step.reason


@given(st.fixed_dictionaries({"operations": ranges(1, 4), "operands": ranges(1, 12), "factors": ranges(2, 4), "largest_result": st.integers(1, 40)}),
       st.sampled_from(sorted(FAMILIES)))
def test_a_config_is_refused_exactly_when_a_story_does_not_exist(values, family):
    bounds = Bounds(values["operands"], values["factors"], values["largest_result"])
    exists = all(tells(bounds, family, count) for count in range(values["operations"][0], values["operations"][1] + 1))
    assert (accepted(values | {"families": (family,)}) is not None) == exists


def test_the_config_that_once_found_nothing_yields_its_few_stories():
    narrow = {"operations": [5, 5], "operands": [25, 34], "largest_result": 200, "families": ["travelling"]}
    problems = generate_problems(ProblemConfig.parse(narrow), 20, 0, "pretrain")
    assert all(problem.level == 5 and problem.steps[-1].result.value <= 200 for problem in problems)
    with pytest.raises(StudyError, match="travelling.*6 operations.*largest_result"):
        ProblemConfig.parse(narrow | {"operations": [6, 6]})


def test_the_question_states_each_number_in_the_order_of_use():
    for problem in generate_problems(ProblemConfig(operations=(1, 6)), 2000, 0, "pretrain"):
        stated = [quantity.value for quantity in problem.stated]
        assert [int(number) for number in re.findall(r"\d+", problem.question)] == stated
        assert len(stated) == problem.level + 1 and "{" not in problem.question + problem.goal


def test_splits_are_disjoint_and_of_the_declared_size():
    seen = {split: {p.question for seed in range(3) for p in generate_problems(ProblemConfig(), 2000, seed, split)}
            for split in ("pretrain", "train", "test")}
    assert not (seen["pretrain"] & seen["train"] or seen["pretrain"] & seen["test"] or seen["train"] & seen["test"])
    share = Counter(split_of(f"{question}?") for questions in seen.values() for question in questions)
    assert abs(share["test"] / share.total() - 0.1) < 0.01 and abs(share["pretrain"] / share.total() - 0.8) < 0.015


def test_train_and_test_have_no_duplicates():
    for split in ("train", "test"):
        questions = [problem.question for problem in generate_problems(ProblemConfig(operations=(1, 1)), 3000, 0, split)]
        assert len(set(questions)) == 3000


def test_beyond_the_distribution_nothing_overlaps():
    config = ProblemConfig()
    harder = out_of_distribution(config)
    assert harder.operations[0] > config.operations[1] and harder.operands[0] > config.operands[1]
    assert all(problem.level > 3 for problem in generate_problems(harder, 300, 0, "test"))


def test_levels_and_families_are_balanced():
    problems = generate_problems(ProblemConfig(), 6000, 0, "pretrain")
    for counts, expected in ((Counter(p.level for p in problems), 2000), (Counter(p.family for p in problems), 600)):
        assert all(0.8 * expected < count < 1.2 * expected for count in counts.values())


@pytest.mark.parametrize("values, word", [
    ({"operations": [3, 1]}, "operations"), ({"operations": [0, 1]}, "operations"), ({"operands": [0, 5]}, "operands"),
    ({"factors": [1, 5]}, "factors"), ({"families": []}, "families"), ({"families": ["nothing"]}, "nothing"),
    ({"largest_result": 0}, "largest_result"), ({"max_operand": 3}, "max_operand"), ({"operations": 3}, "operations")])
def test_a_bad_config_is_one_sentence(values, word):
    with pytest.raises(StudyError, match=word) as caught:
        ProblemConfig.parse(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [{"largest_result": 1}, {"operands": [20, 20], "families": ["riding"], "operations": [3, 3],
                                                           "largest_result": 30}])
def test_an_impossible_config_is_refused_when_it_is_parsed(config):
    with pytest.raises(StudyError, match="widen"):
        ProblemConfig.parse(config)


def test_a_split_that_runs_out_says_so():
    config = ProblemConfig(operations=(1, 1), operands=(2, 3), families=("riding",))
    with pytest.raises(StudyError, match="split test.*widen"):
        generate_problems(config, 100, 0, "test")
