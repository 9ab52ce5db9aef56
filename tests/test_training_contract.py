"""What every algorithm signs, whatever it optimises: it learns, moves what it should and nothing else, and is a function of its
seed alone, not of how a step is cut nor of where the run was interrupted."""
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pytest
import torch

from echochamber.core import StudyError
from echochamber.models.decoder import Decoder
from echochamber.models.generation import SamplingConfig
from echochamber.training import policy as policy_module
from echochamber.training.algorithms import ALGORITHMS as POLICY
from echochamber.training.algorithms import OnPolicyConfig
from echochamber.training.critic import Critic, CriticConfig
from echochamber.training.diagnostics import METRICS
from echochamber.training.expert_iteration import ExpertIterationConfig, train_expert_iteration
from echochamber.training.policy import train_policy
from echochamber.training.supervised import SupervisedConfig, encode_examples, train_supervised
from echochamber.training.toy import toy_task

torch.set_num_threads(1)
toy_task_of_rollouts = toy_task
ALGORITHMS = [*POLICY, "supervised", "expert_iteration"]
SETTINGS = [(name, kl) for name in POLICY for kl in (0.0, 0.02)] + [("supervised", 0.0), ("expert_iteration", 0.0)]
BESIDES = {"step", "round", "kept"}  # columns that count instead of measuring


@dataclass
class Outcome:
    "What a training left: the policy, its history, and the networks that only `train_policy` holds."
    policy: Decoder
    history: pd.DataFrame
    references: list[Decoder] = field(default_factory=list)
    critics: list[Critic] = field(default_factory=list)


class Interruption(Exception):
    pass


def policy_sizes(name: str, learning_rate: float = 1e-3, **sizes) -> dict:
    "Two steps per rollout batch and two micro-batches per step, unless `sizes` say otherwise."
    critic = {"critic": CriticConfig(learning_rate=learning_rate)} if name == "ppo" else {}
    return dict(prompts=10, samples=4, train_batch=20, micro_batch=10, max_new_tokens=2, temperature=1.0, precision="32-true",
                learning_rate=learning_rate, checkpoint_every=3) | critic | sizes


def train_by_policy(config: OnPolicyConfig, folder: Path, report=None) -> Outcome:
    "`train_policy` on the toy task, with the reference and the critic caught as they are made."
    policy, tokenizer, questions, grader = toy_task()
    outcome = Outcome(policy, pd.DataFrame())
    copy = lambda network: outcome.references.append(deepcopy(network)) or outcome.references[-1]
    make = lambda network: outcome.critics.append(Critic(network)) or outcome.critics[-1]
    with patch.object(policy_module, "deepcopy", copy), patch.object(policy_module, "Critic", make):
        outcome.history = train_policy(policy, tokenizer, questions, grader, config, folder, report=report)
    return outcome


def train_supervised_toy(folder: Path, config: SupervisedConfig, report=None) -> Outcome:
    "Every question three times, with its answer."
    policy, tokenizer, questions, _ = toy_task()
    examples = encode_examples([(question.question, question.answer) for question in questions] * 3, tokenizer)
    return Outcome(policy, train_supervised(policy, examples, config, folder, report=report))


def train_toy_experts(folder: Path, config: ExpertIterationConfig, report=None) -> Outcome:
    policy, tokenizer, questions, grader = toy_task()
    return Outcome(policy, train_expert_iteration(policy, tokenizer, questions, grader, config, folder, report=report))


def train(name: str, folder: Path, seed: int = 0, micro_batch: int = 10, report=None) -> Outcome:
    "Six steps, or two rounds, by any algorithm; with a penalty where there is one."
    if name in POLICY:
        return train_by_policy(POLICY[name](6, 0.02, **policy_sizes(name, micro_batch=micro_batch, seed=seed)), folder, report)
    config = SupervisedConfig(epochs=4 if name == "supervised" else 24, batch=20, micro_batch=micro_batch, learning_rate=3e-4,
                              seed=seed, precision="32-true", checkpoint_every=3)
    if name == "supervised":
        return train_supervised_toy(folder, config, report)
    return train_toy_experts(folder, ExpertIterationConfig(
        rounds=2, samples=16, sampling=SamplingConfig(max_new_tokens=3), supervised=config, prompts=4, seed=seed), report)


def train_long(name: str, folder: Path, kl: float) -> Outcome:
    "Enough to learn something."
    if name in POLICY:
        sizes = policy_sizes(name, learning_rate=3e-2, samples=32, train_batch=160, micro_batch=80)
        return train_by_policy(POLICY[name](12, kl, **sizes), folder)
    config = SupervisedConfig(epochs=12, batch=10, micro_batch=10, learning_rate=2e-2, precision="32-true")
    if name == "supervised":
        return train_supervised_toy(folder, config)
    return train_toy_experts(folder, ExpertIterationConfig(
        rounds=3, samples=64, sampling=SamplingConfig(max_new_tokens=3), supervised=config))


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    "A long training, made once per setting."
    return cache(lambda name, kl: train_long(name, tmp_path_factory.mktemp(name), kl))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    "A short training, made once per algorithm."
    return cache(lambda name: train(name, tmp_path_factory.mktemp(name)))


def identical(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))


def all_moved(trained: torch.nn.Module, untrained: torch.nn.Module) -> bool:
    return not any(torch.equal(*pair) for pair in zip(trained.parameters(), untrained.parameters(), strict=True))


def same_history(one: pd.DataFrame, other: pd.DataFrame, **tolerance) -> None:
    "Equal in everything but what a clock measured."
    timeless = [column for column in one if "second" not in column]
    assert list(one) == list(other)
    pd.testing.assert_frame_equal(one[timeless], other[timeless], **tolerance or {"check_exact": True})


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kl"), SETTINGS)
def test_it_learns(name, kl, learnt):
    "The reward of a step is that of its samples: in Expert Iteration, of what the round before has learnt."
    history = learnt(name, kl).history
    if name == "supervised":
        assert history.likelihood_loss.iloc[-1] < history.likelihood_loss.iloc[0] - 1
    else:
        assert history.reward.iloc[-1] > history.reward.iloc[0] + 0.15


@pytest.mark.parametrize(("name", "kl"), SETTINGS)
def test_what_moves_and_what_stays(name, kl, learnt):
    "Every tensor of policy and critic moves, none of the reference; there is a reference with a penalty, a critic in PPO."
    outcome, base = learnt(name, kl), toy_task()[0]
    assert all_moved(outcome.policy, base)
    assert len(outcome.references) == (1 if kl else 0) and len(outcome.critics) == (1 if name == "ppo" else 0)
    assert all(identical(reference, base) for reference in outcome.references)
    assert all(all_moved(critic, Critic(base)) for critic in outcome.critics)


# --- a function of its seed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_seed_decides_every_bit(name, short, tmp_path):
    again = train(name, tmp_path / "again")
    assert identical(again.policy, short(name).policy)
    assert all(identical(*pair) for pair in zip(again.critics, short(name).critics, strict=True))
    same_history(again.history, short(name).history)
    assert not identical(train(name, tmp_path / "other", seed=1).policy, short(name).policy)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_micro_batches_are_a_matter_of_memory(name, short, tmp_path):
    whole = train(name, tmp_path, micro_batch=20)
    torch.testing.assert_close(whole.policy.state_dict(), short(name).policy.state_dict(), atol=1e-5, rtol=0)
    same_history(whole.history, short(name).history, atol=1e-4, rtol=1e-4)


# --- the table of metrics ---------------------------------------------------------------------------------------------


def test_every_logged_column_is_defined_and_every_definition_is_logged(learnt):
    logged = [set(learnt(*setting).history) for setting in SETTINGS]
    assert set.union(*logged) - BESIDES == set(METRICS)
    assert all("step" in columns for columns in logged)


# --- interruptions ----------------------------------------------------------------------------------------------------


def stop_at(chosen: int):
    "A report that fails once so much is done."
    def report(done: int, total: int, message: str) -> None:
        if done >= chosen:
            raise Interruption
    return report


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_interrupted_run_continues_bit_by_bit(name, short, tmp_path):
    "Resumed from step 3, inside a rollout batch; Expert Iteration from the middle of its second fine-tuning."
    with pytest.raises(Interruption):
        train(name, tmp_path, report=stop_at(180 if name == "expert_iteration" else 4))
    resumed = train(name, tmp_path)
    assert identical(resumed.policy, short(name).policy)
    assert all(identical(*pair) for pair in zip(resumed.critics, short(name).critics, strict=True))
    same_history(resumed.history, short(name).history)


def test_interrupted_again_between_the_micro_batches_of_the_first_step(short, tmp_path):
    "A resume point written there would count a micro-batch that the next attempt repeats."
    for chosen in (4, 3):
        with pytest.raises(Interruption):
            train("grpo", tmp_path, report=stop_at(chosen))
    resumed = train("grpo", tmp_path)
    assert identical(resumed.policy, short("grpo").policy)
    same_history(resumed.history, short("grpo").history)


@pytest.mark.parametrize("name", ["grpo", "expert_iteration"])
def test_a_half_trained_policy_is_not_taken_for_the_beginning(name, tmp_path):
    "A notebook cell that is run again after an interruption hands over the policy it has trained, not the one that it began with."
    policy = toy_task()[0]
    with patch(f"{__name__}.toy_task", lambda: (policy, *toy_task_of_rollouts()[1:])):
        with pytest.raises(Interruption):
            train(name, tmp_path, report=stop_at(180 if name == "expert_iteration" else 4))
        with pytest.raises(StudyError, match="started from other weights"):
            train(name, tmp_path)


def test_interrupted_after_the_last_step(short, tmp_path):
    "The resume point of the last step leaves nothing to train, and must still give a history."
    with pytest.raises(Interruption):
        train("grpo", tmp_path, report=stop_at(6))
    resumed = train("grpo", tmp_path)
    assert identical(resumed.policy, short("grpo").policy)
    same_history(resumed.history, short("grpo").history)


# --- passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICY)
def test_a_second_pass_is_off_policy(name, tmp_path):
    "One step per pass: the first is on-policy to rounding, the second sees the same completions from a policy that has moved."
    config = POLICY[name](4, 0.02, **policy_sizes(name, train_batch=40, passes=2))
    history = train_by_policy(config, tmp_path).history
    for first, second in ((0, 1), (2, 3)):
        assert history.ratio_max[first] == pytest.approx(1, abs=1e-5) and history.sampler_gap[first] < 1e-5
        assert history.log_ratio_abs[second] > 1e-4 and abs(history.ratio_max[second] - 1) > 1e-3
        assert pd.isna(history.sampler_gap[second])
        assert history.tokens[first] == history.tokens[second] and history.reward[first] == history.reward[second]
