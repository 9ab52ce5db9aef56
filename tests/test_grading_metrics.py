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
    crossed_interval,
    difference_interval,
    format_shares,
    half_width,
    jackknife,
    majority_at_k,
    majority_curve,
    majority_vote,
    paired_difference,
    pass_at_k,
    prediction_interval,
    share,
    share_interval,
    summarise,
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
        paired_difference(frame, imagine(4, 2))


def test_default_ks_reach_the_fewest_samples():
    frame = imagine(10, 12).drop(index=3)
    assert set(summarise(frame).k.dropna()) == {1, 2, 4, 8, 11}
    assert set(summarise(imagine(5, 1, mode="greedy")).k.dropna()) == {1}


def test_changes_need_the_same_seeds_but_not_the_same_order():
    frame = pd.concat([imagine(8, 1, mode="greedy"), imagine(8, 4)], ignore_index=True).assign(seed=0)
    assert (paired_difference(frame, frame[::-1]).value.dropna() == 0).all()
    assert (paired_difference(frame, frame.drop(columns="seed")).value.dropna() == 0).all()
    with pytest.raises(StudyError, match="seeds"):
        paired_difference(frame, frame.assign(seed=7))


@pytest.mark.filterwarnings("error")
def test_majority_at_the_largest_size_and_beyond():
    assert np.isclose(majority_at_k(500, (499,), 1, 1000), 1) and np.isclose(majority_at_k(500, (500,), 0, 999), 0.5)
    with pytest.raises(StudyError, match="1,030"):
        majority_at_k(515, (515,), 0, 515)
    assert np.isclose(majority_at_k(515, (515,), 0, 11), 0.5)


def test_a_curve_that_is_cut_short_equals_the_whole_one():
    for votes in ((5, (3, 2, 2), 4), (0, (4,), 1), (7, (), 0), (3, (3, 3), 0)):
        whole = majority_curve(*votes)
        for most in range(len(whole)):
            assert np.allclose(majority_curve(*votes, most), whole[:most + 1], atol=1e-14)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("samples", [1024, 1500, 5000])
def test_thousands_of_samples_of_a_question_keep_their_accuracy(samples):
    frame = imagine(2, samples)
    summary = summarise(frame, ks=(1, 2, 128))
    assert np.isclose(pick(summary, "accuracy", format="all").value, (frame.outcome == "correct").mean())
    assert np.isclose(pick(summary, "majority_at_k", k=1).value, pick(summary, "pass_at_k", k=1).value)
    assert pick(summary, "majority_at_k", k=2).value < pick(summary, "majority_at_k", k=128).value <= 1
    assert pick(summary, "pass_at_k", k=128).value > 0.99


def test_a_vote_that_cannot_be_counted_is_left_out_with_a_word():
    frame = imagine(2, 1100)
    with pytest.warns(UserWarning, match="maj@1,100 is left out"):
        summary = summarise(frame, ks=(2, 1100))
    assert set(summary[summary.metric == "pass_at_k"].k) == {2, 1100}
    assert set(summary[summary.metric == "majority_at_k"].k) == {2}


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
    change = pick(paired_difference(before, after), "accuracy", format="all")
    separate = [pick(summarise(frame), "accuracy", format="all") for frame in (before, after)]
    assert np.isclose(change.value, separate[1].value - separate[0].value)
    assert change.high - change.low < 0.5 * sum(each.high - each.low for each in separate)
    assert change.low > 0
    nothing = pick(paired_difference(before, before), "accuracy", format="all")
    assert nothing.value == 0 and 0 < nothing.high == -nothing.low < 0.01  # no change in 300 problems, not none anywhere


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_crossed_intervals_cover_when_seeds_differ(seeds):
    generator = np.random.default_rng(seeds)
    shape = (seeds, 100, 600)
    effects = 0.5 + generator.normal(0, 0.1, (seeds, 1, 600)) + generator.normal(0, 0.2, (1, 100, 600))
    sums = of_means(effects + generator.normal(0, 0.1, shape))
    _, low, high = crossed_interval(share, sums)
    assert 0.93 < np.mean((low <= 0.5) & (0.5 <= high)) <= 0.995
    _, low, high = crossed_interval(share, sums[:1])  # one seed cannot cover the variation of seeds
    assert np.mean((low <= 0.5) & (0.5 <= high)) < 0.7


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_coverage_of_a_ratio(seeds):
    generator = np.random.default_rng(seeds)
    written = generator.binomial(16, generator.beta(2, 4, (seeds, 150, 400)))
    solved = generator.binomial(written, generator.beta(1, 2, (1, 150, 400)))
    value, *variances = jackknife(share, np.stack([solved, written], axis=2).astype(float))
    low, high = share_interval(value, half_width(*variances, seeds, 150), 150, 10**6)
    assert 0.925 < np.mean((low <= 1 / 3) & (1 / 3 <= high)) < 0.995


def of_means(values: np.ndarray) -> np.ndarray:
    return np.stack([values, np.ones_like(values)], axis=2)


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.99])
def test_confidence_is_what_is_asked_for(confidence):
    generator = np.random.default_rng(0)
    effects = generator.normal(0, 1, (3, 1, 4000)) + generator.normal(0, 0.1, (3, 30, 4000))
    _, low, high = crossed_interval(share, of_means(effects), confidence)
    assert abs(np.mean((low <= 0) & (0 <= high)) - confidence) < 0.03


def test_variances_of_a_mean_are_the_mean_squares():
    scores = np.random.default_rng(0).normal(0, 1, (4, 7, 2)) * [1, 3]
    value, seed, problem, cell = jackknife(share, of_means(scores))
    assert np.allclose(value, scores.mean(axis=(0, 1)))
    assert np.allclose(seed, scores.mean(axis=1).var(axis=0, ddof=1) / 4)
    assert np.allclose(problem, scores.mean(axis=0).var(axis=0, ddof=1) / 7)
    rest = scores - scores.mean(axis=0) - scores.mean(axis=1, keepdims=True) + scores.mean(axis=(0, 1))
    assert np.allclose(cell, (rest**2).sum(axis=(0, 1)) / (3 * 6) / 28)


def test_any_statistic_of_totals_has_an_interval():
    "The distance between two sets of shares (total variation), as a figure uses it."
    generator = np.random.default_rng(0)
    sums = generator.multinomial(16, [0.5, 0.3, 0.2], size=(5, 200)).astype(float)  # [S, P, 3]
    moved = generator.multinomial(16, [0.8, 0.15, 0.05], size=(5, 200)).astype(float)
    fractions = lambda totals: totals / totals.sum(axis=-1, keepdims=True)
    distance = lambda totals: np.abs(fractions(totals[..., 3:]) - fractions(totals[..., :3])).sum(axis=-1, keepdims=True) / 2
    value, low, high = crossed_interval(distance, np.concatenate([sums, moved], axis=-1))
    assert 0 < low[0] < 0.3 < high[0] < 1 and low[0] < value[0] < high[0] and high[0] - low[0] < 0.05


def test_one_seed_says_so_and_rests_on_problems_only():
    frame = imagine(40, 4)
    alone = summarise(frame)
    assert set(alone.seeds) == {1}
    pd.testing.assert_frame_equal(alone, summarise(frame.assign(seed=3)))
    both = summarise(pd.concat([frame.assign(seed=0), imagine(40, 4, seed=1).assign(seed=1)]))
    assert set(both.seeds) == {2}
    width = lambda table: (pick(table, "accuracy", format="all")[["high", "low"]].astype(float) * [1, -1]).sum()
    assert width(both) != width(alone)


def test_a_format_that_one_seed_still_writes_rests_on_one_seed():
    frame = pd.concat([imagine(40, 4, seed=seed).assign(seed=seed) for seed in range(3)], ignore_index=True)
    frame.loc[(frame.seed > 0) & (frame["format"] == "omi2"), "format"] = "tinygsm"
    summary = summarise(frame, (1,))
    accuracy = pick(summary, "accuracy", format="omi2")
    assert accuracy.seeds == 1 and accuracy.low < accuracy.value < accuracy.high < 1
    assert pick(summary, "format_share", format="omi2").seeds == 3
    change = paired_difference(frame, frame, (1,))
    assert pick(change, "accuracy", format="omi2").seeds == 1 and pick(change, "format_share", format="omi2").seeds == 3


@pytest.mark.filterwarnings("error")
def test_seeds_that_agree_by_luck_still_leave_an_interval_with_width():
    frame = imagine(50, 4)
    summary = summarise(pd.concat([frame.assign(seed=seed) for seed in range(3)], ignore_index=True))
    known = summary.dropna(subset=["value"])
    assert (known.high - known.low > 0.005).all() and known.low.min() >= 0 and known.high.max() <= 1
    certain = summarise(pd.concat([frame.assign(seed=s, outcome="correct") for s in range(3)]), (1, 4))
    top = pick(certain, "accuracy", format="all")
    assert top.value == top.high == 1 and np.isclose(top.low, 0.025 ** (1 / 50))


@pytest.mark.filterwarnings("error")
def test_every_interval_holds_its_value_inside_its_bounds():
    for seed, (problems, samples, seeds) in enumerate([(1, 1, 1), (1, 4, 3), (2, 2, 2), (7, 3, 5), (30, 2, 1)]):
        frames = [[imagine(problems, samples, 97 * seed + 7 * s + shift).assign(seed=s) for s in range(seeds)] for shift in (0, 3)]
        before, after = (pd.concat(frame, ignore_index=True) for frame in frames)
        for table, least in ((summarise(before), 0), (paired_difference(before, after), -1)):
            known = table.dropna(subset=["value"])
            assert len(known) and ((least <= known.low) & (known.low <= known.value + 1e-12)).all()
            assert ((known.value <= known.high + 1e-12) & (known.high <= 1)).all()


def test_ends_of_shares():
    low, high = share_interval([0.0, 0.3, np.nan, 1.0], [0.0, 0.1, 0.0, 0.0], [100, 1, 0, 100], 1000)
    assert low[0] == 0 and np.isclose(high[0], 1 - 0.025**0.01) and np.isclose(low[3], 0.025**0.01) and high[3] == 1
    assert (low[1], high[1]) == (0, 1)
    assert np.isnan(low[2]) and np.isnan(high[2])


def test_differences_stay_in_their_range_and_have_a_least_width():
    low, high = difference_interval(np.array([0.0, 1.0, -0.2, 0.1]), np.array([0.0, 0.3, 0.1, np.inf]), [200, 200, 200, 1])
    assert np.isclose(high[0], 1.972 * 2**0.5 / 202, rtol=1e-3) and low[0] == -high[0]
    assert (low[1], high[1]) == (0.7, 1) and np.allclose([low[2], high[2]], [-0.3, -0.1]) and (low[3], high[3]) == (-1, 1)


# One more seed


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_a_new_seed_lies_within_the_spread_as_often_as_promised(seeds):
    draws = np.random.default_rng(seeds).normal(0.7, 0.1, (3000, seeds + 1))
    ends = np.array([prediction_interval(draw[:-1], 0.9) for draw in draws])
    assert abs(np.mean((ends[:, 0] <= draws[:, -1]) & (draws[:, -1] <= ends[:, 1])) - 0.9) < 0.02


def test_the_spread_of_too_few_seeds_is_not_told():
    for values in ([], [0.7], [0.7, 0.8], [0.7, 0.8, float("nan")]):
        with pytest.raises(StudyError, match="give 3 finite values"):
            prediction_interval(values)
    low, high = prediction_interval([0.7, 0.8, 0.9])
    assert np.isclose((low + high) / 2, 0.8) and np.isclose(high - 0.8, 4.3027 * 0.1 * (4 / 3) ** 0.5, rtol=1e-4)


def test_equal_shares_of_few_questions_leave_room_for_a_miss():
    assert prediction_interval([1.0, 1.0, 1.0]) == (1, 1)
    low, high = prediction_interval([1.0, 1.0, 1.0], trials=200)
    assert 0.97 < low < 0.995 and high == 1
    assert np.allclose(prediction_interval([0.6, 0.62, 0.64], trials=10**6), prediction_interval([0.6, 0.62, 0.64]))
