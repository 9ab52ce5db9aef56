"Losses: the formulas that TRL and OpenRLHF publish, exact KL gradients, and invariance to how a step is cut."
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from listed_language import (
    LIVE,
    STATE,
    gradient,
    probabilities,
    random_rewards,
    random_table,
    token_log_probs,
    visits,
)

from echochamber.core import StudyError
from echochamber.training.advantages import add_kl_penalty, returns_to_go
from echochamber.training.critic import CriticConfig, critic_advantages
from echochamber.training.losses import (
    LossConfig,
    clipped_objective,
    combine_statistics,
    k1,
    k2,
    k3,
    live_tokens,
    loss_normaliser,
    loss_weights,
    mean_statistics,
    policy_loss,
    sft_loss,
    value_loss,
)

torch.set_num_threads(1)
close = partial(torch.testing.assert_close, atol=1e-10, rtol=1e-8)  # double precision throughout
seeds = st.integers(0, 2**31)
NORMALISERS = {"token": LossConfig(normaliser="token"), "sequence": LossConfig(normaliser="sequence"),
               "constant": LossConfig(normaliser="constant", constant=12)}


class Batch:
    "Random rollouts in double precision: right-padded completions, a policy that has drifted, a reference."

    def __init__(self, seed: int = 0, rows: int = 8, width: int = 10):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        self.mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator)
        self.behaviour = -draw(rows, width).abs()
        self.log_probs = (self.behaviour + 0.3 * draw(rows, width)).requires_grad_()
        self.reference = self.behaviour + 0.2 * draw(rows, width)
        self.advantages = draw(rows)
        self.old_values, self.returns = draw(rows, width), draw(rows, width)
        self.values = (self.old_values + 0.3 * draw(rows, width)).requires_grad_()

    def weights(self, config: LossConfig, rows=slice(None)) -> torch.Tensor:
        return loss_weights(self.mask[rows], config, loss_normaliser(self.mask, config).double())

    def policy_loss(self, config: LossConfig, rows=slice(None)):
        return policy_loss(self.log_probs[rows], self.behaviour[rows], self.reference[rows], self.advantages[rows],
                           self.weights(config, rows), config)


def same_loss_and_gradient(ours, theirs, parameter):
    close(ours, theirs)
    close(torch.autograd.grad(ours, parameter, retain_graph=True)[0], torch.autograd.grad(theirs, parameter)[0])


# --- the published formulas, recomputed -------------------------------------------------------------------------------


def average(per_token, mask, normaliser):
    "The three reductions, each written as its inventors do."
    summed = (per_token * mask).sum(-1)  # [N]
    if normaliser == "sequence":
        return (summed / mask.sum(-1)).mean()
    return summed.sum() / (mask.sum() if normaliser == "token" else len(mask) * 12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0., 0.04])
@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.28)])
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_grpo_equals_trl(seed, beta, low, high, normaliser):
    """TRL v1.9.0, trl/trainer/grpo_trainer.py, _compute_loss; our normalisers are its loss types: `sequence` is grpo,
    `token` is bnpo and dapo, `constant` is dr_grpo."""
    batch = Batch(seed)
    kind = {"kl": "k3_in_loss", "kl_coefficient": beta} if beta else {}
    config = LossConfig(**NORMALISERS[normaliser].model_dump() | kind | {"clip_low": low, "clip_high": high})
    ratio, advantage = (batch.log_probs - batch.behaviour).exp(), batch.advantages[:, None]
    ahead = batch.reference - batch.log_probs
    surrogate = torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    per_token = beta * (ahead.exp() - ahead - 1) - surrogate
    loss, statistics = batch.policy_loss(config)
    same_loss_and_gradient(loss, average(per_token, batch.mask, normaliser), batch.log_probs)

    logged, mask = mean_statistics(statistics), batch.mask  # clip_ratio/low_mean, clip_ratio/high_mean
    assert logged["clip_fraction_low"] == pytest.approx(((ratio < 1 - low) & (advantage < 0))[mask].double().mean().item())
    assert logged["clip_fraction_high"] == pytest.approx(((ratio > 1 + high) & (advantage > 0))[mask].double().mean().item())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("normaliser", ["token", "sequence"])
@pytest.mark.parametrize("kl", ["none", "k2_in_loss", "k3_in_loss"])
def test_ppo_equals_openrlhf(seed, normaliser, kl):
    """OpenRLHF v0.11.0, openrlhf/models/loss.py, PolicyLoss and aggregate_loss, with the KL loss of
    openrlhf/trainer/ray/ppo_actor.py and compute_approx_kl. The release's PolicyLoss is the `sequence` case."""
    batch = Batch(seed)
    beta = 0. if kl == "none" else 0.01
    config = LossConfig(kl=kl, kl_coefficient=beta, normaliser=normaliser)
    ratio = (batch.log_probs - batch.behaviour).clamp(-20, 20).exp()
    surrogate = torch.stack([ratio, ratio.clamp(0.8, 1.2)]) * batch.advantages[:, None]
    distance = batch.log_probs - batch.reference
    divergence = distance ** 2 / 2 if kl == "k2_in_loss" else (-distance).exp() - 1 + distance
    actor, penalty = (average(term, batch.mask, normaliser) for term in (-surrogate.amin(0), divergence.clamp(-10, 10)))
    theirs = actor + beta * penalty
    same_loss_and_gradient(batch.policy_loss(config)[0], theirs, batch.log_probs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("normaliser", ["token", "sequence"])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss_equals_openrlhf(seed, normaliser, clip):
    "OpenRLHF v0.11.0, openrlhf/models/loss.py, ValueLoss, with its factor ½; the release's is the `sequence` case."
    batch = Batch(seed)
    squared = (batch.values - batch.returns) ** 2
    if clip is not None:
        near = torch.min(torch.max(batch.values, batch.old_values - clip), batch.old_values + clip)
        squared = torch.max(squared, (near - batch.returns) ** 2)
    ours, _ = value_loss(batch.values, batch.old_values, batch.returns, batch.weights(NORMALISERS[normaliser]), clip)
    same_loss_and_gradient(ours, 0.5 * average(squared, batch.mask, normaliser), batch.values)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_on_policy_gradient_is_reinforce(normaliser):
    batch = Batch(4)
    batch.behaviour = batch.log_probs.detach().clone()
    ours, _ = batch.policy_loss(NORMALISERS[normaliser])
    reinforce = average(-batch.advantages[:, None] * batch.log_probs, batch.mask, normaliser)
    ours, reinforce = (torch.autograd.grad(loss, batch.log_probs)[0] for loss in (ours, reinforce))
    close(ours, reinforce)


# --- the gradient of each KL setting, exactly -------------------------------------------------------------------------


def expected_gradient(table, reference, rewards, config):
    log_probs, frozen = token_log_probs(table), token_log_probs(reference)
    charged = config.kl_coefficient if config.kl == "k1_in_reward" else 0.
    per_token = add_kl_penalty(rewards, (log_probs - frozen).detach(), LIVE, charged)
    weights = probabilities(table).detach()[:, None] * LIVE
    loss, _ = policy_loss(log_probs, log_probs.detach(), frozen, returns_to_go(per_token, LIVE), weights, config)
    return gradient(loss, table)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beta", [0.01, 1.])
def test_kl_settings_have_the_gradients_their_names_say(seed, beta):
    table, reference, rewards = random_table(seed), random_table(seed + 100).detach(), random_rewards(seed)
    policy, frozen = table.log_softmax(-1), reference.log_softmax(-1)
    once = visits(table).detach()
    penalties = {
        "none": 0 * table.sum(),
        "k1_in_reward": probabilities(table) @ (probabilities(table) / probabilities(reference)).log(),
        "k2_in_loss": once @ (policy.exp() * (policy - frozen)).sum(-1),
        "k3_in_loss": once @ (frozen.exp() * (frozen - policy)).sum(-1),
    }
    found = {}
    for kl, penalty in penalties.items():
        config = LossConfig(kl=kl, kl_coefficient=0. if kl == "none" else beta)
        found[kl] = expected_gradient(table, reference, rewards, config)
        close(found[kl], gradient(beta * penalty - probabilities(table) @ rewards, table))
    assert min((found[a] - found[b]).abs().max() for a in found for b in found if a < b) > 1e-4 * beta


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("white", [False, True])
def test_ppo_on_policy_climbs_the_reward_minus_the_divergence(seed, white):
    "With any critic at λ = 1, through the whole of PPO; whitening takes away a constant, which has no gradient, and divides by one."
    table, reference, rewards = random_table(seed), random_table(seed + 100).detach(), random_rewards(seed)
    values = random_table(seed + 200)[:, 0].detach()[STATE]
    log_probs, frozen = token_log_probs(table), token_log_probs(reference)
    per_token = add_kl_penalty(rewards, (log_probs - frozen).detach(), LIVE, beta=0.3)
    plain, used = (critic_advantages(per_token, values, LIVE, CriticConfig(gae_lambda=1., whiten=whiten))["advantages"]
                   for whiten in (False, white))
    weights = probabilities(table).detach()[:, None] * LIVE
    loss, _ = policy_loss(log_probs, log_probs.detach(), frozen, used, weights, LossConfig(kl="k1_in_reward", kl_coefficient=0.3))
    scale = plain[LIVE].std(correction=0) if white else 1.
    divergence = probabilities(table) @ (probabilities(table) / probabilities(reference)).log()
    close(scale * gradient(loss, table), gradient(0.3 * divergence - probabilities(table) @ rewards, table))


@pytest.mark.parametrize("seed", range(4))
def test_k1_as_a_loss_does_nothing(seed):
    table, reference = random_table(seed), random_table(seed + 100).detach()
    ratio = torch.where(LIVE, token_log_probs(table) - token_log_probs(reference), 0.)
    found = gradient(probabilities(table).detach() @ k1(ratio).sum(-1), table)
    assert found.abs().max() < 1e-14


@given(seeds, st.floats(0.01, 3))
def test_estimators_in_exact_expectation(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(6, generator=generator, dtype=torch.float64).mul(scale).log_softmax(-1) for _ in range(2))
    exact = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
    for estimator in (k1, k3):
        close(p.exp() @ estimator(p - q), exact)
    assert (k3(p - q) >= 0).all() and (k2(p - q) >= 0).all()


@given(st.floats(-20, 20, width=32))
def test_k3_is_never_negative_in_float32(distance):
    d = torch.tensor(distance)
    assert k3(d) >= 0
    torch.testing.assert_close(k3(d).double(), torch.expm1(-d.double()) + d.double(), atol=1e-12, rtol=1e-2)


# --- how a step is cut ------------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from(sorted(NORMALISERS)), st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_loss_gradient_and_statistics_do_not_depend_on_the_cut(seed, normaliser, sizes):
    batch = Batch(seed, rows=max(sum(sizes), 1))
    config = LossConfig(**NORMALISERS[normaliser].model_dump() | {"kl": "k3_in_loss", "kl_coefficient": 0.1})
    whole, statistics = batch.policy_loss(config)
    order = torch.randperm(len(batch.mask), generator=torch.Generator().manual_seed(seed))
    sizes = [*filter(None, sizes)] or [1]
    losses, parts = zip(*(batch.policy_loss(config, rows) for rows in order.split(sizes)), strict=True)
    close(sum(losses), whole)
    close(torch.autograd.grad(sum(losses), batch.log_probs)[0], torch.autograd.grad(whole, batch.log_probs)[0])
    assert mean_statistics(combine_statistics(parts)) == pytest.approx(mean_statistics(statistics), rel=1e-9, abs=1e-12)
    assert sum(loss_normaliser(batch.mask[rows], config) for rows in order.split(sizes)) == loss_normaliser(batch.mask, config)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_accumulation_and_averaging_over_processes_are_undone_by_the_total(normaliser):
    "Two processes accumulate three micro-batches each, of different sizes; trainers divide by 3 and average over 2."
    batch, config = Batch(6, rows=12), NORMALISERS[normaliser]
    shards = torch.arange(12).split([3, 2, 1, 1, 4, 1])
    total = sum(loss_normaliser(batch.mask[rows], config).double() for rows in shards)  # all-reduced
    loss = 0.
    for rows in shards:
        weights = loss_weights(batch.mask[rows], config, total / (3 * 2))
        part, _ = policy_loss(batch.log_probs[rows], batch.behaviour[rows], None, batch.advantages[rows], weights,
                              config)
        loss = loss + part / 3 / 2
    same_loss_and_gradient(loss, batch.policy_loss(config)[0], batch.log_probs)


def test_the_other_losses_split_too():
    batch, config = Batch(7), NORMALISERS["sequence"]
    for loss in (lambda rows: value_loss(batch.values[rows], batch.old_values[rows], batch.returns[rows],
                                         batch.weights(config, rows))[0],
                 lambda rows: sft_loss(batch.log_probs[rows], batch.weights(config, rows))[0]):
        close(sum(loss(rows) for rows in torch.arange(8).split([1, 5, 2])), loss(slice(None)))


def test_statistics_of_nothing_are_finite():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    nan = torch.full((2, 3), torch.nan)
    weights = loss_weights(mask, LossConfig())
    loss, statistics = policy_loss(nan, nan, nan, nan[:, 0], weights, LossConfig(), entropy=nan)
    assert loss == 0 and all(math.isfinite(value) for value in mean_statistics(statistics).values())


# --- masks ------------------------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from(sorted(NORMALISERS)), st.sampled_from([torch.nan, torch.inf, -torch.inf]),
       st.sampled_from(["none", "k1_in_reward", "k2_in_loss", "k3_in_loss"]))
def test_rubbish_in_tokens_that_do_not_count_changes_nothing(seed, normaliser, rubbish, kl):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 6, generator=generator) < 0.5  # any pattern, empty rows included
    penalty = {"kl": kl, "kl_coefficient": 0. if kl == "none" else 0.1}
    config = LossConfig(**NORMALISERS[normaliser].model_dump() | penalty)
    weights = loss_weights(mask, config)
    clean = [torch.randn(4, 6, generator=generator) for _ in range(8)]

    def losses_gradients_statistics(tensors):
        log_probs, values = (tensor.clone().requires_grad_() for tensor in tensors[:2])
        results = [policy_loss(log_probs, tensors[2], tensors[3], tensors[4], weights, config, entropy=tensors[5]),
                   value_loss(values, tensors[6], tensors[7], weights), sft_loss(log_probs, weights)]
        gradients = torch.autograd.grad(sum(loss for loss, _ in results), (log_probs, values))
        assert all(found[~mask].count_nonzero() == 0 for found in gradients)
        return [loss for loss, _ in results], gradients, [statistics for _, statistics in results]

    dirty = [torch.where(mask, tensor, rubbish) for tensor in clean]
    torch.testing.assert_close(losses_gradients_statistics(dirty), losses_gradients_statistics(clean), atol=0, rtol=0)


def test_weights_add_up_to_one_and_ignore_rows_without_a_token():
    mask = torch.arange(9) < torch.tensor([[3], [0], [9], [1]])
    for normaliser in ("token", "sequence"):
        weights = loss_weights(mask, NORMALISERS[normaliser])
        assert weights.sum().item() == pytest.approx(1) and weights.isfinite().all()
        assert torch.equal(weights > 0, mask)
    per_row = loss_weights(mask, NORMALISERS["sequence"]).sum(-1)
    torch.testing.assert_close(per_row, torch.tensor([1 / 3, 0., 1 / 3, 1 / 3]))


def test_truncated_completions_are_kept_or_masked():
    mask, ended = torch.ones(3, 4, dtype=torch.bool), torch.tensor([True, False, True])
    assert torch.equal(live_tokens(mask, ended, LossConfig()), mask)
    assert live_tokens(mask, ended, LossConfig(truncated="mask")).any(-1).tolist() == ended.tolist()


# --- the clip ---------------------------------------------------------------------------------------------------------


@given(st.floats(-3, 3), st.floats(-2, 2), st.floats(0.05, 0.5), st.floats(0.05, 0.5))
def test_the_gradient_vanishes_where_the_clip_bites_and_only_there(log_ratio, advantage, low, high):
    x = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    clipped_objective(x, torch.tensor(advantage, dtype=torch.float64), low, high).backward()
    bites = (math.exp(log_ratio) > 1 + high and advantage > 0) or (math.exp(log_ratio) < 1 - low and advantage < 0)
    assert x.grad.item() == pytest.approx(0 if bites else math.exp(log_ratio) * advantage, abs=1e-12)


@pytest.mark.parametrize("log_ratio", [-1e4, -100., 100., 1e4])
@pytest.mark.parametrize("advantage", [-1., 0., 1.])
def test_extreme_ratios_give_finite_gradients(log_ratio, advantage):
    x = torch.tensor(log_ratio, requires_grad=True)
    clipped_objective(x, torch.tensor(advantage), 0.2, 0.2).backward()
    assert x.grad.isfinite()


def test_advantages_per_sequence_and_per_token_agree():
    batch, config = Batch(9), LossConfig()
    weights = batch.weights(config)
    broadcast = batch.advantages[:, None].expand_as(weights)
    results = [policy_loss(batch.log_probs, batch.behaviour, None, advantages, weights, config)
               for advantages in (batch.advantages, broadcast)]
    torch.testing.assert_close(*results, atol=0, rtol=0)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {"kl": "k1_in_reward"}, {"kl": "k2_in_loss", "kl_coefficient": 0}, {"kl_coefficient": 1e-3}, {"kl": "k1_in_loss"},
    {"normaliser": "constant"}, {"constant": 10}, {"normaliser": "mean"}, {"clip_low": 0}, {"clip_low": 1.5},
    {"clip": 0.2}, {"kl": "k3_in_loss", "kl_coefficient": -0.1}, {"truncated": "drop"}])
def test_contradictory_or_unknown_settings_are_refused(settings):
    with pytest.raises(StudyError):
        LossConfig.parse(settings)


def test_a_penalty_in_the_loss_needs_a_reference():
    batch = Batch(0)
    config = LossConfig(kl="k2_in_loss", kl_coefficient=0.1)
    with pytest.raises(StudyError, match="reference"):
        policy_loss(batch.log_probs, batch.behaviour, None, batch.advantages, batch.weights(config), config)


def test_statistics_are_defined_as_in_the_table():
    batch, config = Batch(11), LossConfig()
    entropy = torch.rand(8, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, statistics = policy_loss(batch.log_probs, batch.behaviour, batch.reference, batch.advantages,
                                batch.weights(config), config, entropy)
    moved, ahead = ((batch.log_probs - other)[batch.mask].detach() for other in (batch.behaviour, batch.reference))
    expected = {
        "tokens": batch.mask.sum(), "ratio": moved.exp().mean(), "ratio_max": moved.exp().max(),
        "log_ratio_abs": moved.abs().mean(), "log_ratio_abs_max": moved.abs().max(),
        "kl_behaviour_k1": -moved.mean(), "kl_behaviour_k3": (moved.exp() - 1 - moved).mean(),
        "kl_reference_k1": ahead.mean(), "kl_reference_k3": ((-ahead).exp() - 1 + ahead).mean(),
        "entropy": entropy[batch.mask].mean(),
    }
    logged = mean_statistics(statistics)
    assert set(logged) == {*expected, "clip_fraction_low", "clip_fraction_high"}
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value.item()), name
    assert not any(value.requires_grad for value in statistics.values())


@pytest.mark.parametrize("far", [-1e3, -200., 200., 1e3])
def test_a_token_that_went_astray_leaves_every_statistic_finite(far):
    "The objective bounds the log-ratio before it exponentiates; a mean that is logged beside it must do so too."
    log_probs, behaviour, reference = torch.zeros(1, 2), torch.tensor([[-far, 0.]]), torch.tensor([[-far, 0.]])
    loss, statistics = policy_loss(log_probs, behaviour, reference, torch.ones(1), torch.full((1, 2), 0.5), LossConfig())
    assert loss.isfinite() and all(value.isfinite() for value in statistics.values())
    assert statistics["log_ratio_abs_max"] == abs(far)  # what happened is still told
    assert statistics["ratio_max"] == torch.tensor(min(far, 20.)).exp().clamp(min=1)
