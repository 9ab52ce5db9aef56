"Styles on texts that mislead, and the decomposition of gains: exact, symmetric, invariant, in agreement with the metrics."
import json
import math
import random
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echochamber.core import StudyError, project_root
from echochamber.data.formats import FORMATS, RENDERERS, StyleConfig
from echochamber.data.problems import ProblemConfig, generate_problems
from echochamber.grading.metrics import paired_difference, summarise
from echochamber.grading.styles import (
    Mean,
    decompose_gain,
    pattern_shares,
    pattern_sums,
    prose_style,
    selection_and_improvement,
    style_of,
    with_styles,
)

PROBLEMS = generate_problems(ProblemConfig(operations=(1, 5)), 60, 3, "test")


def program(*lines: str) -> str:
    return "\n    ".join(["def simple_math_problem() -> int:", *lines, "return result"])


@pytest.mark.parametrize("text, style", [
    (program('"""', "# of a = 3, b and c", '"""', "pens = 3", "result = pens + 1"), "docstring"),
    (program("note = '# no comment'", "a = 3", "pens = 3", "result = a + pens"), "plain"),
    (program("pens = 3  # pens", "result = pens"), "comments"),
    (program("a = 3", "b = 4", "cost = a * b", "result = cost"), "short"),
    (program("a = 3", "cost = 4", "result = a * cost"), "plain"),  # half of them is not most of them
    (program("'not a docstring'.upper()", "pens = 3", "result = pens"), "plain"),
    (program("result = 3"), "plain"),
    (program("pens = 3 pens", "result = pens"), "broken"),
    ("<llm-code>\na = 3\nb = 4  # more\na * b\n</llm-code>\nSo \\boxed{12}.", "short+comments"),
    ("<llm-code>\na = 3\n</llm-code>\nThen\n<llm-code>\ntotal = a\nprice = 1\ntotal\n</llm-code>\n\\boxed{3}", "plain"),
    ("He has 3 times as many, 3 * 4 = 12. So \\boxed{12}.", "signs"),
    ("Minus the rest it is 3 plus 4 equals 7. The answer is 7.", "words"),
    ("The answer is 7.", "plain"), ("", "other"), ("3 plus 4", "other")])
def test_style_of_a_text(text, style):
    assert style_of(text) == style == style_of("\n\n" + text)


@given(st.sampled_from(list(RENDERERS)), st.tuples(*[st.booleans()] * 4), st.sampled_from(PROBLEMS), st.integers(0, 99))
def test_a_rendered_style_is_recognised(format, marks, problem, seed):
    docstring, short, comments, words = marks
    style = StyleConfig(docstring=docstring, short_names=short, comments=comments, words=words)
    expected = "+".join(name for name, on in (("docstring", docstring and format == "tinygsm"), ("short", short),
                                              ("comments", comments)) if on) or "plain"
    solution = RENDERERS[format](problem, style, random.Random(seed))
    assert style_of(solution) == (("words" if words else "signs") if format == "omi2" else expected)


def test_no_text_is_too_much():
    cases = [json.loads(line)["completion"] for line in (project_root() / "tests/grading_cases.jsonl").read_text().splitlines()]
    hostile = ["def f():\n    return " + "(" * 5000, "def f():\n    a = " + "1 + " * 9000 + "1", "def f():\n\t a\0 = 3",
               "<llm-code>\n" + "x = [" * 400 + "\n</llm-code>", "1 plus " * 100_000 + "the answer is 3"]
    assert all(isinstance(style_of(text), str) for text in cases + hostile)


def test_prose_style_is_that_of_most_operations():
    assert prose_style("3 plus 4, 5 minus 2, 3 - 1") == "words" and prose_style("3 plus 4, 5 - 2") == "signs"
    assert prose_style(r"\frac{3}{4} \times 5, then 3 \times 5") == "signs" and prose_style("in 1990–95 and at 3:15") == "plain"


# --- gains --------------------------------------------------------------------------------------------------------------

def imagine(seeds=3, problems=20, samples=8, seed=0) -> tuple[pd.DataFrame, pd.DataFrame]:
    "Two evaluations with every format, and a pattern that only one of them has."
    generator = np.random.default_rng(seed)
    frames = []
    for odds in ([0.4, 0.3, 0.3, 0], [0.6, 0.1, 0.2, 0.1]):
        rows = pd.MultiIndex.from_product([range(seeds), range(problems), range(samples)],
                                          names=["seed", "problem", "sample"]).to_frame(index=False)
        formats = generator.choice(FORMATS, len(rows), p=odds)
        right = generator.random(len(rows)) < pd.Series(formats).map(dict(zip(FORMATS, (0.7, 0.5, 0.3, 0.1), strict=True)))
        frames.append(rows.assign(mode="sampled", format=formats, outcome=np.where(right, "correct", "wrong"), strict=True,
                                  ended=True, extracted=np.where(right, "18", "17")))
    return tuple(frames)


def obvious(totals: np.ndarray, mean: str) -> tuple[float, float]:
    "Selection and improvement as the equations say them, pattern by pattern."
    (n, right), (m, later) = ((side[:, 0], side[:, 1]) for side in totals)
    selection = improvement = 0.0
    for i in range(len(n)):
        p, q = n[i] / n.sum(), m[i] / m.sum()
        if n[i] + m[i]:
            a = right[i] / n[i] if n[i] else later[i] / m[i]
            b = later[i] / m[i] if m[i] else a
            weight = (p + q) / 2 if mean == "arithmetic" else math.sqrt(p * q)
            selection += q * b - p * a - weight * (b - a)
            improvement += weight * (b - a)
    return selection, improvement


counts = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=5)


@given(st.tuples(counts, counts), st.sampled_from(get_args(Mean)))
def test_decomposition_is_the_equation(sides, mean):
    size = min(map(len, sides))
    totals = np.array([[[n + m, n] for n, m in side[:size]] for side in sides], float)  # [2, M, 2]
    totals[:, 0, 0] += 1
    parts = selection_and_improvement(totals, mean)
    accuracy = totals[..., 1].sum(axis=1) / totals[..., 0].sum(axis=1)
    assert parts.sum() == pytest.approx(accuracy[1] - accuracy[0], abs=1e-12)
    assert parts.sum(axis=1) == pytest.approx(obvious(totals, mean), abs=1e-12)
    assert selection_and_improvement(totals[::-1], mean) == pytest.approx(-parts, abs=1e-12)


@pytest.mark.parametrize("mean", get_args(Mean))
def test_a_pattern_cut_into_equal_parts_changes_nothing(mean):
    totals = np.array([[[40, 20], [60, 12]], [[80, 60], [20, 8]]], float)
    cut = np.array([[[10, 5], [30, 15], [60, 12]], [[20, 15], [60, 45], [20, 8]]], float)
    whole = selection_and_improvement(totals, mean).sum(axis=1)
    assert selection_and_improvement(cut, mean).sum(axis=1) == pytest.approx(whole)


def test_the_last_completions_of_a_pattern_do_not_decide():
    "Whether a handful of strays is left, or none, moves the improvement by little."
    def improvement(strays: int) -> float:
        totals = np.array([[[1000, 300], [2200, 1300]], [[strays, 0], [3200 - strays, 2900]]], float)
        return selection_and_improvement(totals)[1].sum()
    assert abs(improvement(3) - improvement(0)) < 0.01


def test_agreement_with_the_metrics():
    "The gain is the paired difference of the accuracy, and shares are those of a summary, interval by interval."
    before, after = imagine()
    ends = ["value", "low", "high"]
    rows = lambda table, metric: table[(table.metric == metric) & (table.outcome == "all")].set_index("format")[ends]
    changes, summary = paired_difference(before, after, [1]), summarise(before, [1])
    gain = decompose_gain(before, after).set_index(["pattern", "part"]).loc[("all", "gain"), ends]
    assert gain.to_numpy(float) == pytest.approx(rows(changes, "accuracy").loc["all"].to_numpy(float))
    shares = pattern_shares(before, after, "format").set_index(["part", "pattern"])[ends]
    for part, expected in (("before", summary), ("change", changes)):
        expected = rows(expected, "format_share")
        assert shares.loc[part].to_numpy(float) == pytest.approx(expected.loc[shares.loc[part].index].to_numpy(float))


def test_parts_of_the_table_add_up():
    before, after = imagine()
    table = decompose_gain(before, after).pivot(index="pattern", columns="part", values="value")
    assert (table.selection + table.improvement).to_numpy() == pytest.approx(table.gain.to_numpy())
    assert table.drop("all").sum().to_numpy() == pytest.approx(table.loc["all"].to_numpy())
    assert table.improvement["other"] == 0  # it appears


def test_order_of_rows_and_greedy_completions_do_not_matter():
    before, after = imagine()
    expected = pattern_sums(before, after, "format")
    mixed = pd.concat([before, before.assign(mode="greedy", outcome="correct")]).sample(frac=1, random_state=0)
    names, sums = pattern_sums(mixed.astype({"format": "category"}), after[::-1], "format")
    assert names == expected[0] and (sums == expected[1]).all()


@pytest.mark.parametrize("change", [lambda frame: frame[frame.seed > 0], lambda frame: frame[frame.problem > 0],
                                    lambda frame: frame[1:], lambda frame: frame[:0], lambda frame: frame.drop(columns="format")])
def test_what_differs_is_refused(change):
    before, after = imagine()
    with pytest.raises(StudyError):
        decompose_gain(before, change(after))
    with pytest.raises(StudyError):
        decompose_gain(change(before), after)


def test_with_styles_reads_completions_in_any_order():
    texts = [RENDERERS[format](problem, StyleConfig(), random.Random(0)) for problem in PROBLEMS for format in RENDERERS]
    frame = pd.DataFrame({"completion": texts * 2}).sample(frac=1, random_state=1)
    assert with_styles(frame)["style"].tolist() == [style_of(text) for text in frame.completion]
