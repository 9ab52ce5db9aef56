"Advantages: exact expectations on a listed language, the published formulas, and properties on random shapes."
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from listed_language import LIVE, STATE, gradient, probabilities, random_rewards, random_table, token_log_probs

from echochamber.core import StudyError
from echochamber.training.advantages import (
    GROUP_ESTIMATORS,
    add_kl_penalty,
    batch_advantages,
    explained_variance,
    generalised_advantages,
    group_advantages,
    leave_one_out_advantages,
    returns_to_go,
    whiten,
)

torch.set_num_threads(1)
close = partial(torch.testing.assert_close, atol=1e-6, rtol=1e-5)
seeds = st.integers(0, 2**31)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stretches(seed: int, rows: int, width: int) -> torch.Tensor:
    "A mask [rows, width] with one stretch of live tokens per row: prompt before, padding after; some rows are empty."
    ends = torch.randint(0, width + 1, (2, rows, 1), generator=torch.Generator().manual_seed(seed))
    place = torch.arange(width)
    return (place >= ends.amin(0)) & (place < ends.amax(0))


# --- group estimators: what they are ----------------------------------------------------------------------------------


@given(seeds, st.integers(1, 5), st.integers(2, 9), st.sampled_from(sorted(GROUP_ESTIMATORS)))
def test_properties_shared_by_all_group_estimators(seed, prompts, samples, name):
    estimator, rewards = GROUP_ESTIMATORS[name], noise(seed, prompts, samples)
    advantages = estimator(rewards)
    assert advantages.shape == rewards.shape and advantages.dtype == torch.float32
    torch.testing.assert_close(advantages.sum(-1), torch.zeros(prompts), atol=1e-4, rtol=0)
    torch.testing.assert_close(estimator(rewards + 3), advantages, atol=1e-3, rtol=1e-3)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(estimator(rewards[:, order]), advantages[:, order], atol=1e-4, rtol=1e-4)
    assert (advantages.gather(-1, rewards.argsort(-1)).diff(dim=-1) >= 0).all()


@given(st.floats(-1e3, 1e3, width=32), st.integers(2, 64), st.sampled_from(sorted(GROUP_ESTIMATORS)))
def test_equal_rewards_give_exactly_zero(reward, samples, name):
    assert GROUP_ESTIMATORS[name](torch.full((3, samples), reward)).count_nonzero() == 0


@pytest.mark.parametrize("name", GROUP_ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64])
def test_rewards_of_any_type_give_float32(name, dtype):
    rewards = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 0]])
    assert torch.equal(GROUP_ESTIMATORS[name](rewards.to(dtype)), GROUP_ESTIMATORS[name](rewards.float()))


@pytest.mark.parametrize("name", GROUP_ESTIMATORS)
@pytest.mark.parametrize("shape", [(4, 1), (1, 1), (8,), (2, 2, 2)])
def test_groups_without_a_baseline_are_refused(name, shape):
    with pytest.raises(StudyError, match="at least 2 samples"):
        GROUP_ESTIMATORS[name](torch.ones(shape))


def test_a_prompt_does_not_see_the_other_prompts():
    rewards = noise(0, 6, 5)
    for estimator in (group_advantages, leave_one_out_advantages):
        assert torch.equal(estimator(rewards)[2:4], estimator(rewards[2:4]))
    assert not torch.equal(batch_advantages(rewards)[2:4], batch_advantages(rewards[2:4]))


# --- the published formulas, recomputed -------------------------------------------------------------------------------


def test_group_estimators_equal_the_release_and_openrlhf():
    """rosieyzh/openrlhf-pretrain (34d239d) and OpenRLHF v0.11.0, openrlhf/trainer/ppo_utils/experience_maker.py,
    compute_advantages_and_returns: `group_norm`, `dr_grpo`, `rloo`, and `reinforce_baseline` before whitening."""
    r = torch.rand(16, 8, generator=torch.Generator().manual_seed(1)).round()
    mean = r.sum(-1, keepdim=True) / 8
    deviation = ((r - mean).square().sum(-1, keepdim=True) / 7).sqrt()  # torch's default: G - 1
    close(group_advantages(r), (r - mean) / (deviation + 1e-9))
    close(group_advantages(r, scale=False), r - mean)
    close(leave_one_out_advantages(r), r - (r.sum(-1, keepdim=True) - r) / 7)


def test_group_advantages_equal_trl():
    "TRL v1.9.0, trl/trainer/grpo_trainer.py, _generate_and_score_completions: Bessel's correction, ε = 1e-4."
    r = noise(2, 16, 8)
    close(group_advantages(r, epsilon=1e-4), (r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + 1e-4))


def test_reinforce_baseline_equals_the_release():
    "Centre on the group, price per token, sum to go, whiten over all tokens (replay_buffer.py, normalize)."
    r, mask = noise(3, 4, 4).round(), stretches(3, 16, 7)
    mask[:, 3] = True  # no empty row here
    ratio = noise(4, 16, 7)
    centred = (r - r.mean(-1, keepdim=True)).flatten()
    slow = torch.zeros(16, 7)
    for n, t in mask.nonzero().tolist():
        later = mask[n, t:].nonzero().flatten() + t
        slow[n, t] = centred[n] - 0.05 * ratio[n, later].sum()
    slow_white = (slow - slow[mask].mean()) / slow[mask].var(correction=0).clamp(min=1e-8).sqrt()
    ours = whiten(returns_to_go(add_kl_penalty(centred, ratio, mask, beta=0.05), mask), mask)
    torch.testing.assert_close(ours, slow_white * mask, atol=1e-5, rtol=1e-4)


def test_penalised_rewards_equal_the_release():
    "openrlhf/models/utils.py, compute_reward: scatter the outcome to the last token, subtract β·k1; its clip is left out."
    rewards, mask, ratio = noise(5, 8).mul(20), stretches(5, 8, 6), noise(6, 8, 6)
    mask[:, 2] = True
    slow = -0.01 * ratio * mask
    for n in range(8):
        slow[n, mask[n].nonzero().max()] += rewards[n]
    close(add_kl_penalty(rewards, ratio, mask, beta=0.01), slow)


@given(seeds, st.integers(1, 4), st.integers(1, 9), st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_the_double_sum_with_rubbish_around(seed, rows, width, gamma, gae_lambda):
    mask = stretches(seed, rows, width)
    rewards, values = noise(seed, rows, width).double(), noise(seed + 1, rows, width).double()
    slow = torch.zeros_like(rewards)
    for n, t in mask.nonzero().tolist():
        last = int(mask[n].nonzero().max())
        for k in range(t, last + 1):
            following = values[n, k + 1] if k < last else 0.
            slow[n, t] += (gamma * gae_lambda) ** (k - t) * (rewards[n, k] + gamma * following - values[n, k])
    rewards[~mask], values[~mask] = torch.nan, torch.inf
    advantages, returns = generalised_advantages(rewards, values, mask, gamma, gae_lambda)
    torch.testing.assert_close(advantages, slow)
    torch.testing.assert_close(returns, torch.where(mask, slow + values, 0.))


# --- exactness: every group of a listed language ----------------------------------------------------------------------


def listed_gradient(estimator, tables, rewards, samples):
    "Expected gradient per table, by listing all 15^(B·G) batches of completions, each weighted by its probability."
    batches = torch.cartesian_prod(*[torch.arange(15)] * (len(tables) * samples)).unflatten(1, (len(tables), samples))
    log_probs = torch.stack([probabilities(table).log()[batches[:, b]] for b, table in enumerate(tables)], dim=1)
    weights = log_probs.detach().sum((1, 2), keepdim=True).exp()  # [batches, 1, 1]
    advantages = torch.vmap(estimator)(rewards[batches])  # [batches, B, G]
    return gradient((weights * advantages * log_probs).sum() / samples, *tables)


def multiplier(estimator, pass_rates, samples):
    "Factor on ∇p of the first prompt, from the definition of an expectation over 2^(B·G) outcomes."
    total = 0.
    for outcomes in product((0., 1.), repeat=len(pass_rates) * samples):
        bits = torch.tensor(outcomes, dtype=torch.float64).reshape(len(pass_rates), samples)
        rates = torch.tensor(pass_rates, dtype=torch.float64)[:, None].expand_as(bits)
        chance = torch.where(bits == 1, rates, 1 - rates)
        chance[0, 0] = 1.  # given the outcome of the sample in question
        total += chance.prod() * estimator(bits)[0, 0] * (1 if bits[0, 0] else -1)
    return total.item()


@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_expected_gradients_of_group_estimators(samples, seed):
    table, rewards = random_table(seed), random_rewards(seed)
    pass_rate = probabilities(table) @ rewards
    truth = gradient(pass_rate, table)
    close(listed_gradient(leave_one_out_advantages, [table], rewards, samples), truth)
    close(listed_gradient(GROUP_ESTIMATORS["dr_grpo"], [table], rewards, samples), (1 - 1 / samples) * truth)
    factor = multiplier(group_advantages, [pass_rate.item()], samples)
    close(listed_gradient(group_advantages, [table], rewards, samples), factor * truth)


def test_expected_gradient_with_a_batch_baseline():
    "Two prompts with their own policies are coupled by one standard deviation; each still climbs its own pass rate."
    tables, rewards = [random_table(2), random_table(3)], random_rewards(4)
    rates = [(probabilities(table) @ rewards).item() for table in tables]
    for own, found in enumerate(listed_gradient(batch_advantages, tables, rewards, samples=2)):
        factor = multiplier(batch_advantages, [rates[own], rates[1 - own]], 2)
        close(found, factor * gradient(probabilities(tables[own]) @ rewards, tables[own]))


# --- exactness: advantages per token ----------------------------------------------------------------------------------


def critic_gradient(table, rewards, forecast, gae_lambda):
    "Expected gradient with GAE and a critic that forecasts `forecast[state]`."
    values, nothing = forecast[STATE], torch.zeros(15, 3, dtype=torch.float64)
    advantages, _ = generalised_advantages(add_kl_penalty(rewards, nothing, LIVE, 0.), values, LIVE, gae_lambda=gae_lambda)
    per_completion = torch.where(LIVE, advantages * token_log_probs(table), 0.).sum(-1)
    return gradient(probabilities(table).detach() @ per_completion, table)


def true_values(table, rewards):
    "Expected reward from each of the 7 states on."
    chance = (probabilities(table).detach()[:, None] * LIVE)[LIVE]
    sums = torch.zeros(2, 7, dtype=torch.float64)
    sums[0].index_add_(0, STATE[LIVE], chance * rewards[:, None].expand(15, 3)[LIVE])
    sums[1].index_add_(0, STATE[LIVE], chance)
    return sums[0] / sums[1]


@pytest.mark.parametrize("seed", range(3))
def test_gae_is_unbiased_with_any_critic_at_lambda_one_and_with_a_true_critic_at_any_lambda(seed):
    table, rewards, wrong = random_table(seed), random_rewards(seed), noise(seed, 7).double()
    truth = gradient(probabilities(table) @ rewards, table)
    close(critic_gradient(table, rewards, wrong, gae_lambda=1.), truth)
    for gae_lambda in (0., 0.5, 0.95):
        close(critic_gradient(table, rewards, true_values(table, rewards), gae_lambda), truth)
        assert (critic_gradient(table, rewards, wrong, gae_lambda) - truth).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_k1_in_the_reward_is_the_gradient_of_the_divergence_of_completions(seed):
    table, reference, rewards = random_table(seed), random_table(seed + 10).detach(), random_rewards(seed)
    ratio = token_log_probs(table) - token_log_probs(reference)
    advantages = returns_to_go(add_kl_penalty(rewards, ratio.detach(), LIVE, beta=0.3), LIVE)
    per_completion = torch.where(LIVE, advantages * token_log_probs(table), 0.).sum(-1)
    divergence = probabilities(table) @ (probabilities(table) / probabilities(reference)).log()
    close(gradient(probabilities(table).detach() @ per_completion, table),
          gradient(probabilities(table) @ rewards - 0.3 * divergence, table))


# --- masks and shards -------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 6), st.integers(1, 6), st.floats(-1e4, 1e4))
def test_whitening_standardises_what_is_live(seed, rows, width, offset):
    values, mask = noise(seed, rows, width) + offset, stretches(seed, rows, width)
    values[~mask] = torch.nan
    parts = whiten(values, mask)
    assert parts.isfinite().all() and parts[~mask].count_nonzero() == 0
    if mask.sum() > 1 and values[mask].double().var(correction=0) > 1e-3:
        assert abs(parts[mask].mean()) < 1e-2 and parts[mask].var(correction=0) == pytest.approx(1, abs=1e-2)


def test_rows_without_a_live_token_stay_empty():
    mask, nan = torch.zeros(2, 3, dtype=torch.bool), torch.full((2, 3), torch.nan)
    results = [add_kl_penalty(torch.ones(2), nan, mask, 1.), returns_to_go(nan, mask), whiten(nan, mask),
               *generalised_advantages(nan, nan, mask)]
    assert all(result.count_nonzero() == 0 for result in results)


def test_advantages_carry_no_gradient_to_policy_or_critic():
    mask = torch.ones(2, 3, dtype=torch.bool)
    ratio, values = noise(0, 2, 3).requires_grad_(), noise(1, 2, 3).requires_grad_()
    rewards = add_kl_penalty(torch.ones(2), ratio, mask, 0.1)
    assert not any(result.requires_grad for result in (rewards, *generalised_advantages(rewards, values, mask)))


def test_explained_variance_reads_live_tokens_only():
    mask, returns = stretches(8, 6, 9), noise(8, 6, 9)
    values = returns + 0.5 * noise(9, 6, 9)
    expected = 1 - (returns - values)[mask].var(correction=0) / returns[mask].var(correction=0)
    rubbish = torch.where(mask, values, torch.nan)
    close(explained_variance(rubbish, torch.where(mask, returns, torch.inf), mask), expected)
    assert explained_variance(values, torch.ones(6, 9), mask).isnan()
