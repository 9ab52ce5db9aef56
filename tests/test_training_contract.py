"""What every algorithm signs, whatever it optimises: `check_algorithm`, and besides it that a seed matters, that a step may be
split in any way, and the interruptions that are easy to get wrong."""
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pytest
import torch

from echochamber.core import StudyError
from echochamber.data.llama import as_read_here, train_llama_tokenizer
from echochamber.data.tokens import train_tokenizer
from echochamber.models.generation import SamplingConfig
from echochamber.training import toy
from echochamber.training.algorithms import ALGORITHMS as ON_POLICY
from echochamber.training.algorithms import OnPolicyConfig
from echochamber.training.critic import CriticConfig
from echochamber.training.diagnostics import METRICS
from echochamber.training.expert_iteration import ExpertIterationConfig, ending_tokens, train_expert_iteration
from echochamber.training.policy import train_policy
from echochamber.training.rollouts import VerifierConfig, verify
from echochamber.training.supervised import SupervisedConfig, encode_examples, train_supervised
from echochamber.training.toy import (
    COUNTS,
    TOY_SIZES,
    KillAt,
    Killed,
    ToyRun,
    check_algorithm,
    check_moves,
    identical,
    kill,
    reward_rises,
    run_toy,
    same_run,
    toy_task,
)

torch.set_num_threads(1)
EVERY = [*ON_POLICY, "supervised", "expert_iteration"]


def imitate(config: SupervisedConfig, folder: Path, report=None) -> ToyRun:
    "Every question three times, with its answer."
    policy, tokenizer, questions, _ = toy_task()
    examples = encode_examples([(question.question, question.answer) for question in questions] * 3, tokenizer)
    return ToyRun(policy, train_supervised(policy, examples, config, folder, report=report))


def iterate(config: ExpertIterationConfig, folder: Path, report=None) -> ToyRun:
    "Expert Iteration; its report counts 100 per round, of which the second half is fine-tuning."
    policy, tokenizer, questions, grader = toy_task()
    return ToyRun(policy, train_expert_iteration(policy, tokenizer, questions, grader, config, folder, report=report))


def likelihood_rises(history: pd.DataFrame) -> bool:
    return history.likelihood_loss.iloc[-1] < history.likelihood_loss.iloc[0] - 1


def on_policy(name: str, steps: int, kl: float = 0.02, **sizes) -> OnPolicyConfig:
    critic = {"critic": CriticConfig(learning_rate=sizes["learning_rate"])} if name == "ppo" else {}
    return ON_POLICY[name](steps, kl, **TOY_SIZES | sizes, **critic)


def long_config(name: str, kl: float = 0.02):
    "Enough to learn something; for the algorithms with rollouts two steps per rollout batch."
    if name in ON_POLICY:
        return on_policy(name, 12, kl, samples=32, train_batch=160, micro_batch=80, learning_rate=3e-2)
    supervised = SupervisedConfig(epochs=16, batch=20, micro_batch=20, learning_rate=2e-2, precision="32-true", checkpoint_every=3)
    if name == "supervised":
        return supervised
    return ExpertIterationConfig(rounds=3, samples=64, sampling=SamplingConfig(max_new_tokens=3), supervised=supervised)


def train(name: str, folder: Path, seed: int = 0, micro_batch: int = 10, report=None) -> ToyRun:
    "Six steps, or two rounds, by any algorithm; with a penalty where there is one."
    if name in ON_POLICY:
        sizes = dict(samples=4, train_batch=20, micro_batch=micro_batch, learning_rate=1e-3, seed=seed)
        return run_toy(on_policy(name, 6, **sizes), folder, report=report)
    config = SupervisedConfig(epochs=4 if name == "supervised" else 24, batch=20, micro_batch=micro_batch, learning_rate=3e-4,
                              seed=seed, precision="32-true", checkpoint_every=3)
    if name == "supervised":
        return imitate(config, folder, report)
    return iterate(ExpertIterationConfig(rounds=2, samples=16, sampling=SamplingConfig(max_new_tokens=3), supervised=config,
                                         prompts=4, seed=seed), folder, report)


@pytest.fixture(scope="module")
def signed():
    "The run of an algorithm that has signed the contract, made once."
    def sign(name: str) -> ToyRun:
        how = {"supervised": dict(train=imitate, learns=likelihood_rises), "expert_iteration": dict(train=iterate, kill_after=180)}
        return check_algorithm(long_config(name), **how.get(name, {}))
    return cache(sign)


@pytest.fixture(scope="module")
def unpenalised(tmp_path_factory):
    "A long training without a penalty, made once."
    return cache(lambda name: run_toy(long_config(name, kl=0.0), tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    "A short training, made once per algorithm."
    return cache(lambda name: train(name, tmp_path_factory.mktemp(name)))


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_it_signs_the_contract(name, signed):
    "With a penalty there is a reference, in PPO a critic."
    run = signed(name)
    assert (run.reference is not None) == (name in ON_POLICY) and (run.critic is not None) == (name == "ppo")


@pytest.mark.parametrize("name", ON_POLICY)
def test_it_learns_without_a_penalty_and_then_has_no_reference(name, unpenalised):
    run = unpenalised(name)
    assert reward_rises(run.history) and run.reference is None
    check_moves(run)


@pytest.fixture(scope="module")
def misled(tmp_path_factory):
    "A long training by GRPO whose verifier rewards what is wrong, and nothing else."
    perverse = VerifierConfig(true_positive_rate=0.0, false_positive_rate=1.0)
    return run_toy(long_config("grpo", kl=0.0).model_copy(update={"verifier": perverse}), tmp_path_factory.mktemp("misled"))


def test_every_definition_is_logged_by_somebody(signed, unpenalised, misled):
    "That every logged column is defined, is part of the contract."
    logged = [set(signed(name).history) for name in EVERY] + [set(unpenalised(name).history) for name in ON_POLICY]
    logged.append(set(misled.history))
    assert set.union(*logged) - COUNTS == set(METRICS)
    assert all("step" in columns for columns in logged)


# --- how an imitated completion ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [train_tokenizer, lambda texts, size: as_read_here(train_llama_tokenizer(texts, size))])
def test_an_ending_is_what_it_is_behind_a_text(tokenizer):
    "A tokenizer of Llama-2's kind puts a space before a text, so that an ending encoded alone would have two."
    texts = ["The number of miles is \\boxed{128}.", "def simple_math_problem():\n    return 18"] * 50
    tokenizer = tokenizer(texts, 400)
    for text in texts[:2]:
        for ending in ("", " ", " so", "\n\n"):
            assert tokenizer.decode(tokenizer.encode(text).ids + ending_tokens(ending, tokenizer)) == text + ending
    with pytest.raises(StudyError, match="the ending '.' runs into the text before it; begin it with a space"):
        ending_tokens(".", train_tokenizer(["so..."] * 100, 300))


# --- a verifier that errs ---------------------------------------------------------------------------------------------


def test_a_perfect_verifier_changes_nothing(unpenalised, tmp_path):
    "Spelt out it is the default, and another rate is another run from the first rollout batch on."
    config = long_config("grpo", kl=0.0)
    spelt_out = OnPolicyConfig(**config.model_dump() | {"verifier": {"true_positive_rate": 1.0, "false_positive_rate": 0.0}})
    assert spelt_out == config and not any(name.startswith("verified") for name in unpenalised("grpo").history)
    again = run_toy(spelt_out, tmp_path / "again")
    assert identical(again.policy, unpenalised("grpo").policy)
    deaf = run_toy(config.model_copy(update={"verifier": VerifierConfig(true_positive_rate=0.9)}), tmp_path / "deaf")
    assert not identical(deaf.policy, again.policy)
    assert deaf.history.reward[0] == again.history.reward[0] > deaf.history.verified[0]


def test_the_sign_of_j_decides_what_is_learnt(misled, unpenalised):
    "Rewarded for what is wrong the policy unlearns what is right; the diagnostics tell both."
    history = misled.history
    assert reward_rises(unpenalised("grpo").history) and history.reward.iloc[-1] < history.reward.iloc[0]
    assert ((history.reward + history.verified - 1).abs() < 1e-6).all() and history.verified.iloc[-1] > history.verified.iloc[0]
    assert ((history.groups_all_wrong - history.verified_all_right).abs() < 1e-6).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_blind_verifier_rewards_at_its_rate_whatever_was_written(seed):
    truth = (torch.arange(80_000).view(-1, 8) % 8 < 2).float()
    rewarded = verify(truth, VerifierConfig(true_positive_rate=0.3, false_positive_rate=0.3), seed, 0)
    assert rewarded.dtype == truth.dtype and set(rewarded.unique().tolist()) == {0, 1}
    assert (rewarded[truth == 1].mean() - 0.3).abs() < 0.015 and (rewarded[truth == 0].mean() - 0.3).abs() < 0.01
    assert not torch.equal(rewarded, verify(truth, VerifierConfig(true_positive_rate=0.3, false_positive_rate=0.3), seed + 1, 0))


# --- what a seed decides, and what the split of a step does not ---------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_another_seed_gives_another_policy(name, short, tmp_path):
    assert not identical(train(name, tmp_path, seed=1).policy, short(name).policy)


@pytest.mark.parametrize("name", EVERY)
def test_micro_batches_are_a_matter_of_memory(name, short, tmp_path):
    whole, split = train(name, tmp_path, micro_batch=20), short(name)
    torch.testing.assert_close(whole.policy.state_dict(), split.policy.state_dict(), atol=1e-5, rtol=0)
    timeless = [column for column in whole.history if "second" not in column]
    pd.testing.assert_frame_equal(whole.history[timeless], split.history[timeless], atol=1e-4, rtol=1e-4)


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kills"), [
    ("grpo", [4, 3]),  # a resume point written amid the first step's micro-batches would count one that is repeated
    ("grpo", [6]),  # the resume point of the last step leaves nothing to train, and must still give a history
    ("expert_iteration", [60, 180]),  # in the fine-tuning of both rounds
], ids=["twice at the same place", "after the last step", "in every round"])
def test_interrupted_at_awkward_moments(name, kills, short, tmp_path):
    for done in kills:
        with pytest.raises(Killed):
            train(name, tmp_path, report=KillAt(done))
    assert same_run(train(name, tmp_path), short(name))


@pytest.mark.parametrize(("name", "done"), [("grpo", 4), ("expert_iteration", 180)])
def test_a_half_trained_policy_is_not_taken_for_the_beginning(name, done, tmp_path):
    "A notebook cell that is run again after an interruption hands over the policy it has trained, not the one that it began with."
    task = toy_task()
    with patch.object(toy, "toy_task", lambda: task), patch(f"{__name__}.toy_task", lambda: task):
        with pytest.raises(Killed):
            train(name, tmp_path, report=KillAt(done))
        with pytest.raises(StudyError, match="started from other weights"):
            train(name, tmp_path)


# --- a contract that can be broken --------------------------------------------------------------------------------------


def test_a_critic_that_does_not_move_breaks_the_contract():
    config = long_config("ppo")
    still = config.model_copy(update={"critic": config.critic.model_copy(update={"learning_rate": 1e-30})})
    with pytest.raises(AssertionError, match="a tensor of the critic did not move"):
        check_algorithm(still)


def test_a_training_that_ends_before_the_kill_is_told(tmp_path):
    with pytest.raises(AssertionError, match="the training ended before 10 was done"):
        kill(lambda config, folder, report: None, None, tmp_path, 10)


# --- passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_POLICY)
def test_a_second_pass_is_off_policy(name, tmp_path):
    "One step per pass: the first is on-policy to rounding, the second sees the same completions from a policy that has moved."
    sizes = dict(samples=4, train_batch=40, micro_batch=10, passes=2, learning_rate=1e-3)
    policy, *task = toy_task()
    history = train_policy(policy, *task, on_policy(name, 4, **sizes), tmp_path)
    for first, second in ((0, 1), (2, 3)):
        assert history.ratio_max[first] == pytest.approx(1, abs=1e-5) and history.sampler_gap[first] < 1e-5
        assert history.log_ratio_abs[second] > 1e-4 and abs(history.ratio_max[second] - 1) > 1e-3
        assert pd.isna(history.sampler_gap[second])
        assert history.tokens[first] == history.tokens[second] and history.reward[first] == history.reward[second]
