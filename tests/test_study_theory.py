"The theory against exact calculations on toys of other shapes than the notebook's, and what it must refuse."
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch

from echochamber.core import StudyError
from echochamber.data.formats import FORMATS
from echochamber.study.conditions import Condition
from echochamber.study.theory import (
    DRIVES,
    GROWTHS,
    PENALTIES,
    RIVALS,
    Law,
    MeasuredRun,
    Path,
    Start,
    TimeScale,
    fit_gain,
    fit_time_scale,
    frozen_optimum,
    generations,
    group_multiplier,
    kept_samples,
    law_of,
    measured_run,
    optimum,
    pool,
    predict,
    read_runs,
    score_table,
    score_totals,
    start_of_completions,
    tilt,
)
from echochamber.training.advantages import group_advantages

LAWS = [Law(drive, growth, penalty=penalty, beta=beta, group=group) for drive, growth, penalty, beta, group in
        product(DRIVES, GROWTHS, PENALTIES, (0.0, 0.2), (None, 4))]


@pytest.fixture(params=range(3))
def start(request) -> Start:
    "Random problems, one of them with a format that is never written and one that is never right."
    generator = np.random.default_rng(request.param)
    shares, accuracies = generator.dirichlet(np.ones(4), 6), generator.random((6, 4))
    shares[0] = [0.5, 0.5, 0, 0]
    accuracies[0, 2:], accuracies[1, 0] = np.nan, 0.0
    return Start(shares, accuracies)


def line(*shares: float) -> np.ndarray:
    return np.array(shares, float)


# --- the path -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_path_stays_on_the_simplex_and_absent_formats_stay_absent(start, law):
    path = predict(start, np.full(50, 0.3), TimeScale(5.0, 2.0), law)
    assert np.isfinite(path.shares).all() and path.shares.min() >= 0
    np.testing.assert_allclose(path.shares.sum(-1), 1)
    alone = predict(Start(start.shares[:1], start.accuracies[:1]), np.full(50, 0.3), TimeScale(5.0, 2.0), law)
    assert not alone.shares[:, 2:].any() and np.isnan(alone.accuracies[:, 2:]).all()


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_first_row_is_the_start_and_units_of_time_cancel(start, law):
    slow, fast = (predict(start, np.full(20, 0.02 * c), TimeScale(8 / c, 3 / c), law) for c in (1, 10))
    np.testing.assert_allclose(slow.shares, fast.shares, atol=1e-10)
    np.testing.assert_allclose(slow.shares[0], start.shares.mean(0))


def test_problems_are_independent_unless_the_law_generalises(start):
    one = lambda problem: Start(start.shares[problem], start.accuracies[problem])
    law, scale, rates = Law(growth="practice", group=4), TimeScale(3.0, 1.0), np.full(30, 0.2)
    alone = np.mean([predict(one(problem), rates, scale, law).shares for problem in range(6)], axis=0)
    np.testing.assert_allclose(predict(start, rates, scale, law).shares, alone)
    together = Law(growth="practice", group=4, generalises=True)
    assert np.abs(predict(start, rates, scale, together).shares - alone).max() > 1e-3
    twice = Start(np.tile(start.shares[1], (2, 1)), np.tile(start.accuracies[1], (2, 1)))
    np.testing.assert_allclose(predict(twice, rates, scale, together).shares, predict(one(1), rates, scale, law).shares)


@pytest.mark.parametrize("drive", DRIVES)
def test_the_sign_of_j_decides(start, drive):
    final = {rate: predict(start, np.full(60, 0.5), TimeScale(2.0), Law(drive, true_positives=0.5, false_positives=rate))
             for rate in (0.1, 0.5, 0.9)}
    reward = {rate: np.nansum(path.shares * path.accuracies, -1) for rate, path in final.items()}
    assert reward[0.1][-1] > reward[0.1][0] and reward[0.9][-1] < reward[0.9][0]
    np.testing.assert_allclose(final[0.5].shares, final[0.5].shares[[0] * 61])


def test_small_steps_of_the_exact_policy_gradient_follow_the_law():
    "A softmax over eight answers (format, right or wrong) by autograd: its first move is that of both exponents."
    shares, accuracies = line(0.1, 0.2, 0.3, 0.4), line(0.9, 0.5, 0.2, 0.6)
    logits = torch.tensor(np.log(np.stack([shares * accuracies, shares * (1 - accuracies)])), requires_grad=True)
    right = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    (torch.softmax(logits.flatten(), 0).reshape(2, 4) * right).sum().backward()
    policy = np.exp(logits.detach().numpy())
    fisher = np.diag(policy.ravel()) - np.outer(policy.ravel(), policy.ravel())
    natural = (np.linalg.pinv(fisher) @ logits.grad.numpy().ravel()).reshape(2, 4)
    moved = policy * (natural - (policy * natural).sum())                                       # d policy / d time
    path = predict(Start(shares, accuracies), [1e-6], TimeScale(1.0, 1.0), Law("replicator", "shared"))
    np.testing.assert_allclose((path.shares[1] - path.shares[0]) / 1e-6, moved.sum(0), atol=1e-5)
    grown = (moved[0] - accuracies * moved.sum(0)) / shares
    np.testing.assert_allclose((path.accuracies[1] - path.accuracies[0]) / 1e-6, grown, atol=1e-5)


def test_the_multiplier_is_what_grpo_does_on_groups_drawn_at_random():
    generator = torch.Generator().manual_seed(0)
    rewards = (torch.rand(200_000, 8, generator=generator) < 0.3).float()
    score = (rewards - 0.3) / (0.3 * 0.7)
    samples = (group_advantages(rewards) * score).mean(-1)
    assert abs(samples.mean() - group_multiplier(0.3, 8)) < 4 * samples.std() / len(samples) ** 0.5
    np.testing.assert_allclose(group_multiplier(np.array([0.4, 0.5]), 500), 1 / np.sqrt([0.24, 0.25]), rtol=5e-3)


# --- fixed points -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_optimum_lies_between_the_start_and_one_generation(start, beta, penalty):
    found = optimum(start, beta, penalty)
    np.testing.assert_allclose(found.sum(-1), 1)
    kept = kept_samples(start) / kept_samples(start).sum(-1, keepdims=True)
    low, high = np.minimum(start.shares, kept), np.maximum(start.shares, kept)
    assert (found >= low - 1e-12).all() and (found <= high + 1e-12).all()


def test_claim_c8_in_its_own_words(start):
    weights = start.shares * (1 + start.accuracies * np.expm1(1 / 0.25))
    np.testing.assert_allclose(optimum(start, 0.25), weights / weights.sum(-1, keepdims=True))
    assert np.isfinite(optimum(Start([0.5, 0.5], [0.0, 1e-300]), 1e-4)).all()
    hopeless = Start([0.7, 0.3], [0.0, 0.0])
    for penalty in PENALTIES:
        np.testing.assert_allclose(optimum(hopeless, 1e-3, penalty), [[0.7, 0.3]])


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_flows_end_at_the_optimum(drive, penalty):
    toy = Start([0.3, 0.3, 0.4], [0.7, 0.5, 0.4])
    growth = {"replicator": "shared", "softmax": "gradient"}[drive]
    path = predict(toy, np.ones(8000), TimeScale(0.3, 0.3), Law(drive, growth, beta=0.5, penalty=penalty))
    np.testing.assert_allclose(path.shares[-1], optimum(toy, 0.5, penalty)[0], atol=1e-4)
    frozen = predict(toy, np.ones(8000), TimeScale(0.3), Law(drive, beta=0.5))
    np.testing.assert_allclose(frozen.shares[-1], frozen_optimum(toy, 0.5)[0], atol=1e-4)


# --- Expert Iteration ---------------------------------------------------------------------------------------------------

def test_generations_are_conditionals_of_samples(start):
    "Sampled by the million, kept where right: the shares of the next generation."
    generator = np.random.default_rng(0)
    formats = generator.choice(4, 1_000_000, p=start.shares[2])
    kept = formats[generator.random(1_000_000) < start.accuracies[2, formats]]
    exact = generations(Start(start.shares[2], start.accuracies[2]), 1).shares[1]
    np.testing.assert_allclose(np.bincount(kept, minlength=4) / len(kept), exact, atol=3e-3)


def test_duplicates_flatten_and_a_question_without_right_answers_stays():
    steep = Start([[0.9, 0.1], [0.6, 0.4]], [[0.5, 0.5], [0.0, 0.0]])
    few, many = (generations(steep, 1, samples=64, texts=texts).shares[1] for texts in (1, 1e6))
    assert few[0] < many[0] and np.allclose(many, [(0.9 + 0.6) / 2, (0.1 + 0.4) / 2], atol=1e-3)
    assert kept_samples(Start([1.0, 0.0], [1.0, 0.0]), samples=3, texts=1).tolist() == [[1.0, 0.0]]


# --- reading, fitting, scoring ------------------------------------------------------------------------------------------

def metrics(path: Path, rates: np.ndarray) -> pd.DataFrame:
    "Training metrics without noise, a rollout batch for every optimiser step."
    frame = pd.DataFrame({"step": np.arange(len(rates)) + 1, "learning_rate": rates, "sampler_gap": 0.0})
    for name, values in (("share", path.shares), ("accuracy", path.accuracies)):
        for place, format in enumerate(FORMATS):
            frame[f"{name}_{format}"] = values[:-1, place]
    return frame


@pytest.mark.parametrize("law", [Law("softmax"), Law("replicator", "shared", group=8), Law("softmax", "practice")], ids=str)
@pytest.mark.parametrize("unit", [1e-6, 1.0])
def test_constants_are_found_again_in_any_unit(law, unit):
    toy, rates = Start([0.3, 0.2, 0.45, 0.05], [0.5, 0.3, 0.35, 0.01]), np.full(80, 0.1 * unit)
    truth = TimeScale(7.0 / unit, 0.5 / unit)
    run = measured_run(metrics(predict(toy, rates, truth, law), rates), 256)
    found = fit_time_scale([run], law, starts=[toy])
    assert found.kappa == pytest.approx(truth.kappa, rel=1e-3) and found.rmse < 1e-5
    assert law.growth == "frozen" or found.lam == pytest.approx(truth.lam, rel=1e-3)


def test_a_run_is_read_at_the_first_step_of_its_batches():
    toy, rates = Start([0.3, 0.2, 0.45, 0.05], [0.5, 0.3, 0.35, 0.01]), np.arange(8.0)
    rows = metrics(predict(toy, np.full(8, 0.1), TimeScale(3.0)), rates)
    rows.loc[1::2, "sampler_gap"] = np.nan
    run = measured_run(rows.sample(frac=1, random_state=0), 256)
    assert run.path.steps.tolist() == [0, 2, 4, 6] and run.learning_rates.tolist() == list(range(8))
    rounds = pd.concat([rows.assign(round=number) for number in (2, 1)]).drop(columns="sampler_gap")
    assert measured_run(rounds, 256).path.steps.tolist() == [0, 1]


def test_a_format_that_nobody_wrote_in_has_no_accuracy():
    "Its column is empty, and readers drop empty columns."
    toy, rates = Start([0.3, 0.2, 0.45, 0.05], [0.5, 0.3, 0.35, 0.01]), np.full(8, 0.1)
    rows = metrics(predict(toy, rates, TimeScale(3.0)), rates).drop(columns=f"accuracy_{FORMATS[1]}")
    run = measured_run(rows, 256)
    assert np.isnan(run.path.accuracies[:, 1]).all() and np.isfinite(run.start().accuracies).all()


def test_completions_give_the_pool_and_the_problems():
    rows = pd.DataFrame({"problem": [4, 4, 4, 9, 9, 9], "mode": ["sampled"] * 5 + ["greedy"],
                         "format": ["omi2", "omi2", "tinygsm", "tinygsm", "tinygsm", "omi1"],
                         "outcome": ["correct", "wrong", "wrong", "correct", "error", "correct"]})
    raw, shrunk = start_of_completions(rows, 0.0), start_of_completions(rows, 1e9)
    assert raw.shares.tolist() == [[1 / 3, 0, 2 / 3, 0], [1, 0, 0, 0]]
    assert raw.accuracies[0].tolist()[::2] == [0, 0.5] and raw.accuracies[1, 0] == 0.5
    np.testing.assert_allclose(shrunk.shares, [[0.6, 0, 0.4, 0]] * 2, atol=1e-6)
    np.testing.assert_allclose(shrunk.accuracies[:, [0, 2]], [[1 / 3, 0.5]] * 2, atol=1e-6)


def test_scores_of_a_known_miss():
    measured = Path(np.array([0, 2]), np.array([[0.5, 0.5, 0, 0], [0.9, 0.1, 0, 0]]), np.full((2, 4), 0.5))
    run = MeasuredRun(np.ones(2), measured, 100)
    told = Path(np.arange(3), np.array([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0.3, 0.7, 0, 0]]), np.full((3, 4), 0.5))
    table = score_table({"miss": {("a", 0): told, ("b", 1): told}, "hit": {("a", 0): measured, ("b", 1): measured}},
                        {("a", 0): run, ("b", 1): run}, fitted=[("b", 1)])
    miss = table.iloc[0]
    assert (miss.winner, miss.predicted, miss.right, miss.fitted) == (FORMATS[0], FORMATS[1], False, False)
    assert miss.final_error == pytest.approx(-0.6) and miss.rmse == pytest.approx((2 * 0.36 / 8) ** 0.5)
    assert miss.floor == pytest.approx(((2 * 0.25 + 2 * 0.09) / 8 / 100) ** 0.5)
    totals = score_totals(table)
    assert totals.runs.tolist() == [1, 1] and totals.right.tolist() == [0, 1] and totals.rmse["hit"] == 0


def test_rivals_ignore_accuracies_of_formats_that_are_never_written():
    start = Start([0.2, 0.5, 0.3, 0.0], [0.9, 0.2, 0.3, np.nan])
    assert [rival(start, 2).winner for rival in RIVALS.values()] == [1, 1, 0]


# --- bad input ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("action", "sentence"), [
    (lambda: Start([0.5, 0.6], [0.1, 0.1]), "sum to"),
    (lambda: Start([0.5, 0.5], [0.1, 1.1]), "chances"),
    (lambda: Start([0.5, 0.5], [0.1]), "shape"),
    (lambda: Start([0.5, 0.5], [0.1, np.nan]), "NaN only where"),
    (lambda: Law(growth="fast"), "frozen, shared, practice, gradient"),
    (lambda: optimum(Start([1.0], [0.5]), 0.0), "β > 0"),
    (lambda: law_of(Condition(algorithm="expert_iteration"), "laptop"), "generations"),
    (lambda: read_runs(Condition(kl_coefficient=0.4321), "laptop"), "kl0.4321"),
    (lambda: predict(Start([1.0], [0.5]), [0.1], TimeScale(1.0)).at([0, 7]), "no step 7"),
])
def test_refusals_say_what_is_wrong(action, sentence):
    with pytest.raises(StudyError, match=sentence):
        action()


def test_expert_iteration_from_its_own_rounds():
    run = MeasuredRun(np.zeros(0), generations(Start([0.4, 0.6, 0, 0], [0.3, 0.2, 0, 0]), 3, gain=1.3), 1000)
    assert fit_gain([run]) == pytest.approx(1.3, abs=1e-4)


def test_pools_and_tilts_agree_with_counting():
    shares, accuracies = pool(line(0.5, 0.5, 0)[None], line(0.2, 0.4, 0)[None])
    assert shares.tolist() == [0.5, 0.5, 0] and accuracies.tolist()[:2] == [0.2, 0.4] and np.isnan(accuracies[2])
    np.testing.assert_allclose(tilt(line(0.25, 0.75, 0), line(np.log(3), 0, 9)), [0.5, 0.5, 0])
