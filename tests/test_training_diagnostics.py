"Stop conditions: a run that cannot go on stops with a sentence, and can be taken up from before; and the grid of steps at which models are kept."
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echochamber.core import StudyError
from echochamber.grading.answers import Grade
from echochamber.training import experience as experience_module
from echochamber.training.algorithms import grpo_config
from echochamber.training.diagnostics import StopConfig, stop_reason
from echochamber.training.fitting import logarithmic_steps
from echochamber.training.policy import train_policy
from echochamber.training.rollouts import Rollouts, VerifierConfig
from echochamber.training.supervised import SupervisedConfig, encode_examples, train_supervised
from echochamber.training.toy import toy_task

torch.set_num_threads(1)
SIGNAL = {"groups_all_wrong": 0.2, "groups_all_right": 0.1}


# --- when a run stops itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0.0501, 3.0, float("inf"), float("nan")])
def test_a_gap_over_its_limit_or_unknown_is_a_reason_to_stop(gap):
    sentence = stop_reason(SIGNAL | {"sampler_gap": gap}, 0, StopConfig(sampler_gap=0.05))
    assert f"differ by {gap:.3g} nats" in sentence and "temperature and precision" in sentence and "stop.sampler_gap" in sentence
    assert stop_reason(SIGNAL | {"sampler_gap": gap}, 0, StopConfig(sampler_gap=None)) is None


@pytest.mark.parametrize("gap", [0.0, 1e-7, 0.05])
def test_a_gap_within_its_limit_is_none(gap):
    assert stop_reason(SIGNAL | {"sampler_gap": gap}, 0, StopConfig(sampler_gap=0.05)) is None


@pytest.mark.parametrize(("wrong", "right", "word"), [(1.0, 0.0, "failed"), (0.0, 1.0, "solved"), (0.6, 0.4, "failed")])
def test_nothing_to_learn_from_is_a_reason_to_stop_from_its_limit_on(wrong, right, word):
    metrics = {"groups_all_wrong": wrong, "groups_all_right": right}
    assert stop_reason(metrics, 49, StopConfig()) is None
    sentence = stop_reason(metrics, 50, StopConfig())
    assert f"mostly {word}" in sentence and "other questions or more samples" in sentence and "stop.uninformative_rollouts" in sentence
    assert stop_reason(metrics, 10**6, StopConfig(uninformative_rollouts=None)) is None


# --- what a run does about it -----------------------------------------------------------------------------------------


def train(folder: Path, stop: StopConfig | None = None, callbacks=(), report=None, grader=None, verifier=None):
    "Eight steps, two per rollout batch, with resume points at 3 and 6."
    policy, tokenizer, questions, toy_grader = toy_task()
    config = grpo_config(8, 0.02, prompts=10, samples=4, train_batch=20, max_new_tokens=2, temperature=1.0, learning_rate=1e-3,
                         precision="32-true", checkpoint_every=3, stop=stop, verifier=verifier)
    history = train_policy(policy, tokenizer, questions, grader or toy_grader, config, folder, callbacks, report)
    return policy, history


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("undisturbed"))[0].state_dict()


def continues_from_before(folder: Path, step: int, undisturbed: dict[str, torch.Tensor], **options) -> None:
    "The resume point is that of `step`, and from it a run without the fault ends where it would have ended anyway."
    assert torch.load(folder / "resume.ckpt", weights_only=True)["global_step"] == step
    policy, history = train(folder, **options)
    assert history.step.tolist() == list(range(1, 9))
    assert all(torch.equal(tensor, undisturbed[name]) for name, tensor in policy.state_dict().items())


class Poison(L.Callback):
    "Makes the weights NaN once so many steps are done."

    def __init__(self, after: int):
        self.after = after

    @torch.no_grad()
    def on_train_batch_start(self, trainer, module, batch, batch_index):
        if trainer.global_step == self.after:
            next(module.networks["policy"].parameters()).fill_(torch.nan)


@pytest.mark.parametrize("after", [4, 5])
def test_a_loss_that_is_no_number_ends_the_run(after, undisturbed, tmp_path):
    "At the first step of a rollout batch and at a later one."
    with pytest.raises(StudyError, match=f"the gradient of the policy is nan after step {after}; lower the learning rate"):
        train(tmp_path, callbacks=[Poison(after)])
    continues_from_before(tmp_path, 3, undisturbed)


class PoisonGradient(L.Callback):
    "Makes a gradient infinite once so many steps are done, as an overflow would."

    def __init__(self, after: int):
        self.after = after

    def on_after_backward(self, trainer, module):
        if trainer.global_step == self.after:
            next(module.networks["policy"].parameters()).grad.fill_(torch.inf)


def test_a_gradient_that_is_no_number_ends_the_run(undisturbed, tmp_path):
    "Before the step, which would leave no policy to sample the next rollout batch from."
    with pytest.raises(StudyError, match="the gradient of the policy is inf after step 5; lower the learning rate"):
        train(tmp_path, callbacks=[PoisonGradient(5)])
    continues_from_before(tmp_path, 3, undisturbed)


def test_imitation_has_the_same_stop_condition(tmp_path):
    policy, tokenizer, questions, _ = toy_task()
    examples = encode_examples([(question.question, question.answer) for question in questions], tokenizer)
    config = SupervisedConfig(epochs=4, batch=10, micro_batch=10, precision="32-true", checkpoint_every=1)
    with pytest.raises(StudyError, match="the gradient of the policy is nan after step 2; lower the learning rate"):
        train_supervised(policy, examples, config, tmp_path, [Poison(2)])
    assert torch.load(tmp_path / "resume.ckpt", weights_only=True)["global_step"] == 2


class Sampler:
    "`sample_and_grade`, but from its third call on the log-probs are those of another implementation."

    def __init__(self, distance: float):
        self.genuine, self.distance, self.calls = experience_module.sample_and_grade, distance, 0

    def __call__(self, *arguments, **options) -> Rollouts:
        self.calls += 1
        rollouts = self.genuine(*arguments, **options)
        if self.calls < 3:
            return rollouts
        completions = rollouts.completions
        return replace(rollouts, completions=replace(completions, log_probs=completions.log_probs + self.distance))


def test_a_sampler_that_is_not_the_trainer_ends_the_run(undisturbed, tmp_path):
    "Noticed at step 5, the first of the third rollout batch."
    with patch.object(experience_module, "sample_and_grade", Sampler(0.1)), \
            pytest.raises(StudyError, match="stopped after step 5: sampler and trainer differ by 0.1 nats per token, over the limit of 0.05; "
                                            "compare temperature and precision of both, or raise stop.sampler_gap"):
        train(tmp_path)
    continues_from_before(tmp_path, 3, undisturbed)


@pytest.mark.parametrize(("distance", "stop"), [(0.04, StopConfig()), (0.1, StopConfig(sampler_gap=0.2)), (0.1, StopConfig(sampler_gap=None))])
def test_a_gap_that_is_allowed_is_only_logged(distance, stop, tmp_path):
    with patch.object(experience_module, "sample_and_grade", Sampler(distance)):
        _, history = train(tmp_path, stop)
    gaps = history.sampler_gap
    assert gaps[[0, 2]].max() < 1e-5 and gaps[[4, 6]].tolist() == pytest.approx([distance] * 2, abs=1e-5)
    assert gaps[[1, 3, 5, 7]].isna().all() and history.log_ratio_abs.notna().all()


class Verdicts:
    "The toy's grader in those rollout batches (from 0) where `uninformative` does not hold, and one verdict for all completions in the others."

    def __init__(self, outcome: str, uninformative: Callable[[int], bool], first: int = 0):
        self.genuine, self.outcome, self.uninformative, self.rollout = toy_task()[3], outcome, uninformative, first - 1

    def grade(self, completions, answers) -> list[Grade]:
        self.rollout += 1
        grades = self.genuine.grade(completions, answers)
        return [replace(grade, outcome=self.outcome) for grade in grades] if self.uninformative(self.rollout) else grades


@pytest.mark.parametrize(("outcome", "word"), [("wrong", "failed"), ("correct", "solved")])
def test_rollouts_without_a_signal_end_the_run(outcome, word, undisturbed, tmp_path):
    "The second and third batch teach nothing; that is noticed after step 5."
    with pytest.raises(StudyError, match=rf"stopped after step 5: the last 2 rollout batches held no right and wrong .* \(questions mostly {word}\).*; "
                                         "take other questions or more samples, or raise stop.uninformative_rollouts"):
        train(tmp_path, StopConfig(uninformative_rollouts=2), grader=Verdicts(outcome, lambda rollout: rollout > 0))
    assert torch.load(tmp_path / "resume.ckpt", weights_only=True)["global_step"] == 3
    assert train(tmp_path)[1].step.tolist() == list(range(1, 9))


def test_a_single_signal_starts_the_count_anew(tmp_path):
    history = train(tmp_path, StopConfig(uninformative_rollouts=2), grader=Verdicts("wrong", lambda rollout: rollout in (0, 2)))[1]
    assert history.groups_all_wrong[::2].tolist()[::2] == [1, 1] and len(history) == 8


def test_wrong_answers_that_are_rewarded_teach_something(tmp_path):
    "No group holds a right sample, but a verifier that errs makes differences: the run goes on, whatever it learns."
    stop, everything_wrong = StopConfig(uninformative_rollouts=2), Verdicts("wrong", lambda rollout: True)
    history = train(tmp_path, stop, grader=everything_wrong, verifier=VerifierConfig(false_positive_rate=0.5))[1]
    assert (history.groups_all_wrong == 1).all() and (history.verified_all_wrong < 1).all() and len(history) == 8


def test_an_interruption_does_not_start_the_count_anew(tmp_path):
    "Batches 1 and 2 teach nothing, and between them the run is interrupted and continues from step 3."
    class Interruption(Exception):
        pass

    def stop(step, steps, message):
        if step == 4:
            raise Interruption

    conditions, uninformative = StopConfig(uninformative_rollouts=2), lambda rollout: rollout > 0
    with pytest.raises(Interruption):
        train(tmp_path, conditions, report=stop, grader=Verdicts("wrong", uninformative))
    with pytest.raises(StudyError, match="stopped after step 5: the last 2 rollout batches"):
        train(tmp_path, conditions, grader=Verdicts("wrong", uninformative, first=2))


# --- the grid ---------------------------------------------------------------------------------------------------------

lengths, points, decades = st.integers(1, 10**6), st.integers(1, 40), st.floats(0, 6)


@given(lengths, points, decades)
def test_the_grid_rises_from_the_start_to_the_end(steps, points, decades):
    grid = logarithmic_steps(steps, points, decades)
    assert grid[0] == 0 and grid[-1] == steps and len(grid) <= points + 1
    assert all(type(step) is int for step in grid) and all(a < b for a, b in zip(grid, grid[1:], strict=False))


@given(lengths, points, decades)
def test_the_grid_is_as_dense_as_its_logarithm_where_steps_are_plenty(steps, points, decades):
    "Every point that was asked for is within half a step of one of the grid, and there are no others."
    wanted = [steps * 10 ** (-decades * (1 - point / max(1, points - 1))) for point in range(points)] if points > 1 else [steps]
    grid = logarithmic_steps(steps, points, decades)[1:]
    assert all(min(abs(step - max(1, point)) for step in grid) <= 0.5 + 1e-6 for point in wanted)
    assert all(min(abs(step - max(1, point)) for point in wanted) <= 0.5 + 1e-6 for step in grid)


@given(lengths, lengths, points, decades)
def test_a_longer_run_keeps_what_the_shorter_has_kept(steps, more, points, decades):
    "The grid of the extension is that of a run of its length, moved; it shares one step with the old grid, the border."
    old, new = logarithmic_steps(steps, points, decades), logarithmic_steps(steps + more, points, decades, extends=steps)
    assert new == tuple(steps + step for step in logarithmic_steps(more, points, decades))
    assert set(old) & set(new) == {steps}


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 5, "extends": 5}, {"steps": 5, "extends": -1}, {"steps": 5, "points": 0}])
def test_a_grid_that_cannot_be_is_refused(options):
    with pytest.raises(StudyError, match="ask for at least one point, and for an end after the start"):
        logarithmic_steps(**options)
