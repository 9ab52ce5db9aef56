"Conditions: one builder of runs, whose references are shared where the work is, and distinct where it is not."
from unittest import mock

import pytest

from echochamber.core import StudyError
from echochamber.models.decoder import DECODERS
from echochamber.study.conditions import Condition, changed_preset, condition_labels, expected_seconds, runs_of
from echochamber.study.figures import FIGURES, Figure, figure_runs
from echochamber.study.presets import PRESETS, SMOKE

ALGORITHMS_OF_PRESETS = [(preset, algorithm) for preset in PRESETS for algorithm in ("grpo", "ppo", "expert_iteration", "sft")
                         if (preset, algorithm) != ("paper", "sft")]  # which has no solutions to imitate


def counts(figure: Figure, preset: str = "smoke", seeds: int = 2) -> dict[str, int]:
    stages = [run.stage for run in figure_runs(figure, preset, seeds)]
    return {stage: stages.count(stage) for stage in ("pretrain", "finetune", "evaluate")}


def test_a_grid_of_kl_coefficients_is_one_entry():
    "Eight conditions on one pretraining per seed; β = 0 is the run that other figures have."
    grid = tuple(Condition(algorithm=algorithm, kl_coefficient=beta) for algorithm in ("ppo", "grpo") for beta in (0, 0.001, 0.01, 0.1))
    figure = Figure(name="kl", claim="C3", title="a KL penalty keeps formats alive", conditions=grid)
    assert counts(figure) == {"pretrain": 2, "finetune": 16, "evaluate": 16}
    configs = [run.config for run in figure_runs(figure, "smoke", 1) if run.stage == "finetune"]
    assert sorted(config.algorithm.loss.kl_coefficient for config in configs) == [0, 0, 0.001, 0.001, 0.01, 0.01, 0.1, 0.1]
    known = {run.reference for run in figure_runs(FIGURES["precision"], "smoke", 1)}
    assert len(known & {run.reference for run in figure_runs(figure, "smoke", 1)}) == 3


def test_a_sweep_over_sizes_is_one_entry():
    "Every size has its own pretraining; names say which."
    sizes = {"default": SMOKE.decoders["default"], "200k": DECODERS["200k"], "1M": DECODERS["1M"]}
    figure = Figure(name="scale", claim="C5", title="size decides", conditions=tuple(Condition(decoder=size) for size in sizes))
    with mock.patch.dict(PRESETS, smoke=SMOKE.model_copy(update={"decoders": sizes})):
        assert counts(figure) == {"pretrain": 6, "finetune": 6, "evaluate": 6}
        names = [run.name for run in figure_runs(figure, "smoke", 1)]
        assert names[3:6] == ["three-formats-200k-seed0", "grpo-200k-seed0", "grpo-200k-seed0-mini-gsm"]
        small, large = (expected_seconds(runs_of(Condition(decoder=size), "smoke", 0)[0], "smoke") for size in ("default", "1M"))
    assert large > 5 * small


def test_a_seed_is_a_whole_realisation_on_the_same_questions():
    first, second = (runs_of(Condition(algorithm="expert_iteration"), "laptop", seed) for seed in (0, 5))
    for run, other in zip(first, second, strict=True):
        assert run.reference != other.reference
    pretraining, tuned, evaluated = (run.config for run in second)
    seeds = [source.seed for source in pretraining.mixture.sources] + [pretraining.mixture.seed, pretraining.seed, tuned.seed,
             tuned.algorithm.seed, tuned.algorithm.supervised.seed, evaluated.seed]
    assert set(seeds) == {5}
    same = ("benchmark", "problems", "questions", "samples", "sampling", "steps")
    assert all(getattr(evaluated, field) == getattr(first[2].config, field) for field in same)


def test_numbers_of_the_laptop_preset_are_those_of_the_shipped_results():
    "Seed 0 is what the committed tables were pretrained with."
    pretraining, tuned, evaluated = (run.config for run in runs_of(Condition(), "laptop", 0))
    assert [(source.name, source.weight, source.seed) for source in pretraining.mixture.sources] == [
        ("mini-tinygsm", 0.28, 0), ("mini-omi1", 0.37, 0), ("mini-omi2", 0.35, 0)]
    assert pretraining.mixture.sources[0].style.random_errors == 0.1
    assert pretraining.mixture.sources[1].style.wrong_families == ("saving", "packing", "reading", "baking")
    assert (pretraining.mixture.tokens, pretraining.mixture.seed, pretraining.batch_size) == (4_000_000, 0, 8)
    assert (pretraining.fit.steps, pretraining.fit.optimiser.warmup, pretraining.fit.optimiser.learning_rate) == (4000, 100, 6e-3)
    assert pretraining.decoder.num_parameters == 278_528
    rollouts, fit = tuned.algorithm.rollouts, tuned.algorithm.fit
    assert (rollouts.prompts, rollouts.samples, rollouts.train_batch, rollouts.sampling.temperature) == (32, 8, 128, 1.0)
    assert (fit.steps, fit.optimiser.learning_rate, fit.optimiser.warmup, tuned.questions) == (120, 3e-4, 4, 1024)
    assert (evaluated.questions, evaluated.samples, evaluated.sampling.top_p) == (200, 16, 0.95)


def test_no_preset_leaves_its_precision_to_the_machine():
    for preset, algorithm in ALGORITHMS_OF_PRESETS:
        configs = [run.config.model_dump_json() for run in runs_of(Condition(algorithm=algorithm), preset, 0)]
        precision = "32-true" if preset in ("smoke", "laptop") else "bf16-mixed"
        assert not any('"auto"' in config for config in configs) and f'"precision":"{precision}"' in configs[0]


def test_names_follow_what_changes_the_run():
    "The same config reached by two conditions is one run; a change that reaches only the evaluation renames only that."
    default = [run.reference for run in runs_of(Condition(), "smoke", 0)]
    same = Condition(pretraining_seed=0, precision="32-true", changes=(("rl.temperature", 1.0),))
    assert [run.reference for run in runs_of(same, "smoke", 0)] == default
    more = [run.reference for run in runs_of(Condition(changes=(("evaluation.samples", 4),)), "smoke", 0)]
    assert more[:2] == default[:2] and more[2] != default[2]
    early = runs_of(Condition(start=0.5), "smoke", 0)
    assert early[0].reference == default[0] and early[1].config.step == 16 and early[1].name == "grpo-start0.5-seed0"
    two = runs_of(Condition(benchmarks=("mini-gsm", "mini-math")), "smoke", 0)
    assert [run.reference for run in two][:3] == default and two[3].name == "grpo-seed0-mini-math"


def test_a_change_can_be_relative_to_the_preset():
    "`x2` is twice the preset's number, at every scale, and stays a whole number where that is one."
    changes = (("rl.steps", "x2"), ("pretraining.tokens", "x1.5"), ("rl.learning_rate", "x0.5"))
    for preset in ("smoke", "laptop", "gpu"):
        before, after = PRESETS[preset], changed_preset(PRESETS[preset], changes)
        assert (after.rl.steps, after.pretraining.tokens) == (2 * before.rl.steps, 1.5 * before.pretraining.tokens)
        assert after.rl.learning_rate == before.rl.learning_rate / 2
    assert changed_preset(PRESETS["laptop"], (("rl.temperature", "x1"),)) == PRESETS["laptop"]


def test_a_supervised_stage_lies_between_pretraining_and_rl():
    "It is the control's own run, from the same snapshot; changes of RL do not rename it."
    condition = Condition(supervised_first=True, start=0.5, changes=(("rl.learning_rate", "x2"),))
    start, first, tuned, evaluated = runs_of(condition, "smoke", 3)
    assert first.reference == runs_of(Condition(algorithm="sft", start=0.5), "smoke", 3)[1].reference
    assert (first.config.step, first.config.model) == (16, start.reference) and first.parents == (start,)
    assert (tuned.config.step, tuned.config.model) == (None, first.reference) and tuned.parents == (first,)
    assert tuned.config.algorithm.kind == "on_policy" and evaluated.config.model == tuned.reference


def test_checkpoints_and_operations_of_an_evaluation():
    condition = Condition(checkpoints="ends", changes=(("evaluation.operations", (1, 4)), ("prompt_operations", (1, 1))))
    pretraining, tuned, evaluated = (run.config for run in runs_of(condition, "smoke", 0))
    assert tuned.snapshot_steps == (0, 2, 4) and evaluated.steps == (0, 4)
    operations = [one.operations for one in (pretraining.mixture.sources[0].problems, tuned.problems, evaluated.problems)]
    assert operations == [(1, 2), (1, 1), (1, 4)]
    assert condition.name == "grpo-ends-evaluation.operations_1_4-prompt_operations_1_1", condition.name


def test_labels_are_what_differs():
    assert condition_labels(Condition(pretraining_seed=0)) == {"condition": "grpo-pretraining0", "algorithm": "grpo"}
    labels = condition_labels(Condition(mixture="equal", algorithm="ppo", kl_coefficient=0.1))
    assert labels == {"condition": "ppo-equal-kl0.1", "algorithm": "ppo", "mixture": "equal", "kl_coefficient": 0.1}


@pytest.mark.parametrize("fields, word", [
    ({"changes": (("rl.temperatur", 0.7),)}, "rl.temperatur"), ({"changes": (("rl.steps", 0),)}, "rl.steps"),
    ({"changes": (("rl.steps.more", 1),)}, "rl.steps.more"), ({"changes": (("control.epochs", 2),)}, "control.epochs"),
    ({"benchmarks": ("gsm9k",)}, "gsm9k"), ({"decoder": "huge"}, "huge"), ({"mixture": "x"}, "three-formats"), ({"start": 0.3}, "0.3 of its steps; choose one of 0.0625, 0.125"),
    ({"algorithm": "sft", "supervised_first": True}, "not before sft"),
])
def test_a_wrong_condition_is_refused_with_its_place(fields, word):
    with pytest.raises(StudyError, match=word):
        runs_of(Condition.parse(fields, "condition"), "smoke", 0)


def test_expected_seconds_follow_the_work():
    for preset, algorithm in ALGORITHMS_OF_PRESETS:
        pretraining, tuned, _ = runs_of(Condition(algorithm=algorithm), preset, 3)
        assert expected_seconds(pretraining, preset) == PRESETS[preset].seconds["pretrain"]
        assert expected_seconds(tuned, preset) == PRESETS[preset].seconds[algorithm]
    longer = runs_of(Condition(changes=(("rl.steps", 240),)), "laptop", 0)[1]
    assert 1.8 < expected_seconds(longer, "laptop") / PRESETS["laptop"].seconds["grpo"] < 2


def test_the_paper_preset_has_the_numbers_of_the_paper():
    "Those that the paper, its sweep files and the replication state."
    pretraining, tuned, evaluated = (run.config for run in runs_of(Condition(algorithm="ppo", kl_coefficient=0.001), "paper", 0))
    assert (pretraining.decoder.num_parameters, pretraining.batch_size, pretraining.decoder.context) == (162_398_208, 512, 2048)
    optimiser = pretraining.fit.optimiser
    assert (optimiser.learning_rate, optimiser.betas, optimiser.epsilon, optimiser.weight_decay) == (1e-3, (0.9, 0.95), 1e-8, 0.1)
    assert (optimiser.warmup, optimiser.final_fraction, optimiser.clip_norm) == (5000, 0.1, 1.0)
    assert [source.name for source in pretraining.mixture.sources] == ["finemath", "algebraic-stack", "tinygsm", "omi1", "omi2"]
    assert (tuned.prompts.benchmark, tuned.questions) == ("gsm8k-train", 7473)
    rollouts, fit, critic = tuned.algorithm.rollouts, tuned.algorithm.fit, tuned.algorithm.critic
    assert (rollouts.prompts, rollouts.samples, rollouts.train_batch, rollouts.passes) == (64, 8, 64, 1)
    assert (rollouts.sampling.temperature, rollouts.sampling.max_new_tokens) == (0.7, 1024)
    assert (fit.optimiser.learning_rate, fit.optimiser.weight_decay, critic.learning_rate) == (1e-6, 0.0, 7e-6)
    assert tuned.algorithm.loss.kl == "k1_in_reward" and tuned.algorithm.loss.kl_coefficient == 0.001
    assert len(tuned.snapshot_steps) == 16 and abs(fit.steps / (7473 * 8 / 64) - 10) < 0.01, "ten episodes"
    assert (evaluated.benchmark, evaluated.questions, evaluated.samples) == ("gsm8k", None, 64)
    rounds = runs_of(Condition(algorithm="expert_iteration"), "paper", 0)[1].config.algorithm
    assert (rounds.samples, rounds.sampling.temperature, rounds.sampling.top_p, rounds.supervised.epochs) == (64, 1.0, 0.95, 2)
    assert (rounds.supervised.learning_rate, rounds.supervised.batch) == (1e-4, 256)
