"Property checks of the metrics: brute force, invariances, coverage, agreement of the summary with the obvious versions."
import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echochamber.core import StudyError
from echochamber.data.formats import FORMATS
from echochamber.grading.answers import OUTCOMES
from echochamber.grading.metrics import (
    accuracy_by_format,
    bootstrap_interval,
    format_shares,
    majority_at_k,
    majority_curve,
    majority_vote,
    open_ends,
    pass_at_k,
    summarise,
    summarise_change,
)


def imagine(problems: int, samples: int, seed: int = 0, mode: str = "sampled") -> pd.DataFrame:
    "A random evaluation with every outcome and format."
    generator = np.random.default_rng(seed)
    rows = problems * samples
    outcome = generator.choice(OUTCOMES, rows, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    wrong = generator.integers(19, 23, rows).astype(str)
    return pd.DataFrame(dict(
        problem=np.repeat(np.arange(problems), samples), mode=mode, sample=np.tile(np.arange(samples), problems),
        format=generator.choice(FORMATS, rows, p=[0.5, 0.3, 0.1, 0.1]), outcome=outcome,
        extracted=np.where(outcome == "correct", "18", np.where(outcome == "wrong", wrong, None)),
        strict=generator.random(rows) < 0.8, ended=generator.random(rows) < 0.9)).astype({"extracted": object})


def pick(summary: pd.DataFrame, metric: str, **labels) -> pd.Series:
    rows = summary[summary["metric"] == metric]
    for label, value in labels.items():
        rows = rows[rows[label] == value]
    assert len(rows) == 1
    return rows.iloc[0]


# pass@k and maj@k


@given(samples=st.integers(1, 300), data=st.data())
def test_pass_at_k_is_a_probability_that_grows(samples, data):
    correct = data.draw(st.integers(0, samples))
    curve = [float(pass_at_k(correct, samples, k)) for k in range(1, samples + 1)]
    assert all(0 <= low <= high <= 1 for low, high in itertools.pairwise([0, *curve]))
    assert np.isclose(curve[0], correct / samples) and curve[-1] == float(correct > 0)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_k_beyond_the_samples_is_refused(k):
    with pytest.raises(StudyError):
        pass_at_k([1, 2], [8, 4], k)
    with pytest.raises(StudyError):
        majority_at_k(2, (1,), 1, k)
    with pytest.raises(StudyError):
        summarise(imagine(3, 4), ks=(1, k))


@given(correct=st.integers(0, 3), wrong=st.lists(st.integers(1, 3), max_size=3), silent=st.integers(0, 2))
def test_majority_equals_all_subsets(correct, wrong, silent):
    votes = ["right"] * correct + [f"wrong {i}" for i, count in enumerate(wrong) for _ in range(count)] + [None] * silent
    for k in range(1, min(len(votes), 6) + 1):
        worth = []
        for subset in itertools.combinations(votes, k):
            counts = {vote: subset.count(vote) for vote in subset if vote}
            leaders = [vote for vote in counts if counts[vote] == max(counts.values())]
            worth.append(leaders.count("right") / max(len(leaders), 1))
        assert np.isclose(majority_at_k(correct, wrong, silent, k), np.mean(worth), atol=1e-12)


@given(correct=st.integers(0, 40), wrong=st.lists(st.integers(1, 30), max_size=6), silent=st.integers(0, 20))
def test_majority_is_bounded_by_pass_and_starts_at_the_accuracy(correct, wrong, silent):
    samples = correct + sum(wrong) + silent
    curve = majority_curve(correct, tuple(sorted(wrong)), silent)
    if samples:
        assert np.isclose(curve[1], correct / samples)
        passed = [float(pass_at_k(correct, samples, k)) for k in range(1, samples + 1)]
        assert all(0 <= vote <= chance + 1e-12 for vote, chance in zip(curve[1:], passed, strict=True))


def test_votes_are_counted_by_value_and_ties_go_to_the_first():
    assert majority_vote([7, 5, 5, 5, 5]) == 5
    assert majority_vote(["1/2", "0.50", "\\frac{1}{2}", "2", "2"]) == "1/2"
    assert majority_vote(["x", "2", "2", " x ", "x."]) == "x"
    assert majority_vote([None, float("nan"), "3"]) == "3"
    assert majority_vote([]) is None


# The summary


def test_summary_agrees_with_the_obvious_versions():
    frame = imagine(20, 8)
    summary = summarise(frame, ks=(1, 3, 8))
    shares, accuracies = format_shares(frame), accuracy_by_format(frame)
    for format in FORMATS:
        assert np.isclose(pick(summary, "format_share", format=format).value, shares[format])
        assert np.isclose(pick(summary, "accuracy", format=format).value, accuracies[format])
    assert np.isclose(summary[summary.metric == "format_share"].value.sum(), 1)
    assert np.isclose(summary[summary.metric == "outcome_share"].value.sum(), 1)
    assert np.isclose(pick(summary, "strict_accuracy").value, ((frame.outcome == "correct") & frame.strict).mean())
    assert np.isclose(pick(summary, "truncation_rate").value, 1 - frame.ended.mean())
    for k in (1, 3, 8):
        passed = [pass_at_k((part.outcome == "correct").sum(), 8, k) for _, part in frame.groupby("problem")]
        assert np.isclose(pick(summary, "pass_at_k", k=k).value, np.mean(passed))
    assert pick(summary, "majority_at_k", k=8).n == 20
    assert ((summary.low <= summary.value) & (summary.value <= summary.high)).all()


def test_maj_at_n_of_the_summary_is_the_vote():
    frame = imagine(60, 7, seed=3)
    summary = summarise(frame, ks=(7,))
    worth = []
    for _, part in frame.groupby("problem"):
        counts = part.loc[part.outcome.isin(["correct", "wrong"]), "extracted"].value_counts()
        leaders = counts[counts == counts.max()].index
        worth.append(float("18" in leaders) / max(len(leaders), 1))
    assert np.isclose(pick(summary, "majority_at_k", k=7).value, np.mean(worth))


def test_modes_are_kept_apart_and_greedy_has_pass_at_1():
    greedy, sampled = imagine(20, 1, seed=1, mode="greedy"), imagine(20, 4, seed=2)
    summary = summarise(pd.concat([greedy, sampled], ignore_index=True), ks=(1, 4))
    assert np.isclose(pick(summary, "pass_at_k", mode="greedy").value, (greedy.outcome == "correct").mean())
    assert not ((summary["mode"] == "greedy") & (summary.metric == "majority_at_k")).any()
    alone = summarise(sampled, ks=(1, 4)).reset_index(drop=True)
    pd.testing.assert_frame_equal(summary[summary["mode"] == "sampled"].reset_index(drop=True), alone)


def test_order_of_rows_and_index_do_not_matter():
    frame = imagine(15, 6)
    shuffled = frame.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(summarise(frame, (1, 6)), summarise(shuffled, (1, 6)))


def test_a_format_that_never_occurs_has_share_zero_and_no_accuracy():
    frame = imagine(30, 4)
    frame = frame[frame["format"] != "omi2"]
    summary = summarise(frame, (1,))
    share, accuracy = pick(summary, "format_share", format="omi2"), pick(summary, "accuracy", format="omi2")
    assert share.value == 0 and 0 < share.high < 0.15
    assert np.isnan(accuracy[["value", "low", "high"]].astype(float)).all() and accuracy.n == 0


def test_bad_evaluations_are_one_sentence():
    frame = imagine(3, 2)
    with pytest.raises(StudyError, match="outcome"):
        summarise(frame.drop(columns="outcome"))
    with pytest.raises(StudyError, match="rows"):
        summarise(frame.iloc[:0])
    with pytest.raises(StudyError, match="alike"):
        summarise_change(frame, imagine(4, 2))


def test_default_ks_reach_the_fewest_samples():
    frame = imagine(10, 12).drop(index=3)
    assert set(summarise(frame).k.dropna()) == {1, 2, 4, 8, 11}
    assert set(summarise(imagine(5, 1, mode="greedy")).k.dropna()) == {1}


def test_changes_need_the_same_seeds_but_not_the_same_order():
    frame = pd.concat([imagine(8, 1, mode="greedy"), imagine(8, 4)], ignore_index=True).assign(seed=0)
    assert (summarise_change(frame, frame[::-1]).value.dropna() == 0).all()
    assert (summarise_change(frame, frame.drop(columns="seed")).value.dropna() == 0).all()
    with pytest.raises(StudyError, match="seeds"):
        summarise_change(frame, frame.assign(seed=7))


@pytest.mark.filterwarnings("error")
def test_majority_at_the_largest_size_and_beyond():
    assert np.isclose(majority_at_k(500, (499,), 1, 1000), 1) and np.isclose(majority_at_k(500, (500,), 0, 999), 0.5)
    with pytest.raises(StudyError, match="1,030"):
        majority_at_k(515, (515,), 0, 10)


def test_a_missing_completion_keeps_the_sums_right():
    frame = imagine(10, 4).drop(index=[0, 17])
    summary = summarise(frame, (1, 3))
    assert pick(summary, "accuracy", format="all").n == 38
    assert np.isclose(pick(summary, "accuracy", format="all").value, (frame.outcome == "correct").mean())


# Intervals


def test_the_paired_interval_is_narrower_than_two_separate_ones():
    generator = np.random.default_rng(0)
    skill = generator.beta(0.5, 0.5, 300)

    def evaluate(shift: float, seed: int) -> pd.DataFrame:
        frame = imagine(300, 8, seed)
        right = np.random.default_rng(seed).random(len(frame)) < np.clip(skill + shift, 0, 1)[frame["problem"]]
        return frame.assign(outcome=np.where(right, "correct", "wrong"), extracted="18")

    before, after = evaluate(0, 1), evaluate(0.05, 2)
    change = pick(summarise_change(before, after), "accuracy", format="all")
    separate = [pick(summarise(frame), "accuracy", format="all") for frame in (before, after)]
    assert np.isclose(change.value, separate[1].value - separate[0].value)
    assert change.high - change.low < 0.5 * sum(each.high - each.low for each in separate)
    assert change.low > 0
    nothing = pick(summarise_change(before, before), "accuracy", format="all")
    assert nothing.value == nothing.low == nothing.high == 0


@pytest.mark.parametrize("seeds, least", [(5, 0.85), (20, 0.92)])
def test_crossed_intervals_cover_when_seeds_differ(seeds, least):
    generator = np.random.default_rng(seeds)
    problems, evaluations = 100, 400
    effects = 0.5 + generator.normal(0, 0.1, (seeds, 1, evaluations)) + generator.normal(0, 0.2, (1, problems, evaluations))
    low, high = bootstrap_interval(effects + generator.normal(0, 0.1, effects.shape))
    covered = np.mean((low <= 0.5) & (0.5 <= high))
    assert least < covered <= 0.995
    first = bootstrap_interval(effects[:1])  # one seed cannot cover the variation of seeds
    assert np.mean((first[0] <= 0.5) & (0.5 <= first[1])) < 0.7


def test_coverage_of_a_ratio():
    generator = np.random.default_rng(0)
    problems, evaluations = 150, 400
    written = generator.binomial(16, generator.beta(2, 4, (1, problems, evaluations)))
    solved = generator.binomial(written, generator.beta(1, 2, (1, problems, evaluations)))
    low, high = bootstrap_interval(solved, written)
    assert 0.91 < np.mean((low <= 1 / 3) & (1 / 3 <= high)) < 0.98


def test_shapes_and_repeatability_of_intervals():
    values = np.random.default_rng(0).random((3, 40, 5))
    low, high = bootstrap_interval(values)
    assert low.shape == high.shape == (5,)
    again = bootstrap_interval(values)
    assert (low == again[0]).all() and (high == again[1]).all()
    single = bootstrap_interval(values[:, :, 0])
    assert np.isclose(single[0], low[0]) and np.isclose(single[1], high[0])
    assert np.isclose(bootstrap_interval(values[0, :, 0], confidence=0.5)[0], bootstrap_interval(values[:1, :, :1], confidence=0.5)[0])


def test_open_ends():
    low, high = open_ends(np.array([0.0, 0.3, np.nan]), np.array([0.0, 0.2, np.nan]), np.array([0.0, 0.4, np.nan]),
                          np.array([100, 1, 0]))
    assert low[0] == 0 and np.isclose(high[0], 1 - 0.025**0.01)
    assert (low[1], high[1]) == (0, 1)
    assert np.isnan(low[2]) and np.isnan(high[2])
