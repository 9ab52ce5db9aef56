"What a study takes from its machine is told before its first run, and preset `paper` fits the GPU that it names."
import io
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from echochamber.core import StudyError
from echochamber.study import requirements
from echochamber.study.conditions import Condition, runs_of
from echochamber.study.figures import FIGURES, conditions_at, figure_runs, figures_at
from echochamber.study.graph import execute
from echochamber.study.presets import PRESETS
from echochamber.study.reproduction import choose_figures, reproduce
from echochamber.study.requirements import (
    Division,
    disk_bytes,
    division_of,
    gpu_memory,
    lacks_corpora,
    lacks_disk,
    lacks_memory,
    memory_mend,
    memory_plan,
    missing_requirements,
)
from echochamber.training import policy, pretraining

GIB = 2**30
H100 = 79 * GIB  # what a run finds of its 80 GB


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    "Nothing is computed, and no corpus is prepared."
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "outputs"


@pytest.fixture
def paper_corpus(outputs):
    "A corpus named `paper` with every source, empty but for its manifest."
    write_manifest(outputs / "corpora/paper", "finemath", "algebraic-stack", "tinygsm", "omi1", "omi2", "metamath")


def write_manifest(folder: Path, *sources: str) -> None:
    lines = []
    for source in sources:
        (folder / source).mkdir(parents=True)
        (folder / source / "00000.bin").write_bytes(b"")
        lines.append(f'{{"source": "{source}", "file": "{source}/00000.bin", "tokens": 0, "training_tokens": 0}}\n')
    (folder / "manifest.jsonl").write_text("".join(lines))
    (folder / "tokenizer.json").write_text("{}")


def pretend_gpus(monkeypatch, gibibytes: int, count: int = 1) -> None:
    "This machine has GPUs of so much memory, as far as a study looks."
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    monkeypatch.setattr(requirements, "gpu_memory", lambda gpus: gibibytes * GIB)


# --- memory -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset", ["gpu", "paper"])
@pytest.mark.parametrize("name", FIGURES)
def test_every_run_of_every_figure_fits_a_gpu_of_80_gb(preset, name):
    if name not in figures_at(preset):
        with pytest.raises(StudyError, match=f"{name} is not at preset {preset}: .+ what is there: convergence, "):
            figure_runs(FIGURES[name], preset, 1)
        return
    for run in figure_runs(FIGURES[name], preset, 1):
        plan = memory_plan(run, H100)
        assert 0 < sum(plan.values()) < H100, f"{run.reference}: {sum(plan.values()) / GIB:.1f} GiB, {plan}"


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "reinforce", "expert_iteration"])
@pytest.mark.parametrize("decoder", ["default", "1B"])
def test_every_algorithm_fits_at_both_sizes_of_the_paper(algorithm, decoder):
    beta = 0.0 if algorithm == "expert_iteration" else 0.01
    for run in runs_of(Condition(algorithm=algorithm, decoder=decoder, kl_coefficient=beta), "paper", 0):
        assert sum(memory_plan(run, H100).values()) < H100
        assert getattr(run.config, "processes", 1) == (8 if decoder == "1B" and run.stage != "evaluate" else 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_passes_divide_the_batches_of_a_preset(preset):
    "Batches are those that the preset states, whatever they are divided into."
    scale = PRESETS[preset]
    for decoder in scale.decoders:
        for algorithm in ("grpo", "ppo", "expert_iteration"):
            start, tuned, *_ = (run.config for run in runs_of(Condition(algorithm=algorithm, decoder=decoder), preset, 0))
            own = division_of(start)
            assert own.rows * own.processes * start.fit.accumulate == own.batch == scale.pretraining.batch_size
            own, whole = division_of(tuned), scale.expert_iteration.batch if algorithm == "expert_iteration" else scale.rl.train_batch
            assert own.batch == whole and whole % (own.rows * own.processes) == 0
    if preset == "paper":
        assert division_of(tuned).rows < division_of(tuned).batch, "Expert Iteration has no check of its own"


def planned_by_runs(monkeypatch, run) -> int:
    "What the check inside a run of RL or pretraining asks for [bytes]."
    asked, first = [], requirements.pretraining_of(run).decoder
    for module in (policy, pretraining):
        monkeypatch.setattr(module, "require_memory", lambda what, plan, free: asked.append(sum(plan.values())))
        monkeypatch.setattr(module, "compute_device", lambda: torch.device("cuda"))
        monkeypatch.setattr(module, "free_memory", lambda device: H100)
    decoder = type("Decoder", (), {"config": first})
    if run.stage == "pretrain":
        data = type("Data", (), {"batch_size": run.config.batch_size})
        pretraining.require_memory_to_pretrain(decoder, data, run.config.fit)
    else:
        policy.require_memory_for_rl(decoder, requirements.LONGEST_PROMPT, run.config.algorithm)
    return asked[0]


@pytest.mark.parametrize("decoder", ["default", "1B"])
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_the_plan_before_a_study_is_that_of_the_runs(monkeypatch, algorithm, decoder):
    "Or a study would be let through and refused after two days."
    for run in runs_of(Condition(algorithm=algorithm, decoder=decoder, kl_coefficient=0.01), "paper", 0)[:2]:
        assert sum(memory_plan(run, H100).values()) == planned_by_runs(monkeypatch, run)


def test_what_does_not_fit_is_refused_before_anything_starts_with_a_mend_that_helps(monkeypatch, outputs, paper_corpus):
    pretend_gpus(monkeypatch, 50)
    with pytest.raises(StudyError) as refusal:
        reproduce(choose_figures(["convergence"]), "paper", console=Console(file=io.StringIO()))
    said, end = str(refusal.value).splitlines()
    assert "finetune ppo-seed0 needs 59.3 GiB of memory and the GPU has 50.0 GiB" in said and end == "Nothing was started."
    assert not (outputs / "runs").exists()
    assert "with 16 rows per pass instead of 32 and 2 processes, a GPU for each, it would fit" in said
    run = runs_of(Condition(algorithm="ppo"), "paper", 0)[1]
    assert sum(memory_plan(run, H100).values()) > 50 * GIB > sum(memory_plan(run, H100, Division(64, 16, 2)).values())


def test_a_mend_is_tried_before_it_is_named():
    "Smaller passes do not help against the cache of what is sampled at once, nor anything against the weights."
    start, tuned = runs_of(Condition(algorithm="grpo", decoder="1B", changes=(("passes.1B.processes", 1),)), "paper", 0)[:2]
    assert "rows per pass" not in memory_mend(tuned, H100, H100) and "4 processes" in memory_mend(tuned, H100, H100)
    assert "4 rows per pass" in memory_mend(start, 45 * GIB, H100)
    assert "activations that are recomputed" in memory_mend(start, 23 * GIB, H100)
    assert "smaller model" in memory_mend(start, 10 * GIB, H100)


def test_more_processes_than_gpus_are_refused_beforehand(monkeypatch):
    pretend_gpus(monkeypatch, 79, count=2)
    said, = lacks_memory(runs_of(Condition(decoder="1B"), "paper", 0), ["0", "1"])
    assert "takes 8 GPUs, and 2 can be seen" in said and "1 more of these runs" in said


def test_memory_without_gpus_is_the_machines(monkeypatch):
    memory = type("Memory", (), {"total": 16 * GIB})
    monkeypatch.setattr(requirements.psutil, "virtual_memory", lambda: memory)
    start, tuned, evaluated = runs_of(Condition(), "paper", 0)
    said, = lacks_memory([start, tuned, evaluated], [])
    assert "pretrain three-formats-seed0 needs" in said and "the machine has 16.0 GiB; with 8 rows per pass" in said
    assert memory_mend(tuned, 16 * GIB) == "no division of its steps would do here; compute it on GPUs"
    assert "batch_rows" in memory_mend(evaluated, 16 * GIB)
    assert not lacks_memory(runs_of(Condition(), "laptop", 0), [])


def test_memory_of_gpus_is_asked_without_torch(monkeypatch, tmp_path):
    "The smallest counts; a GPU that is not told of is not held against anything."
    (command := tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 81559\necho 24576\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpu_memory(["0", "1"]) == 24576 * 2**20 - requirements.RESERVED and gpu_memory([]) == 0
    command.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert gpu_memory(["MIG-1"]) == 0 and not lacks_memory(runs_of(Condition(decoder="1B"), "paper", 0), ["MIG-1"])


# --- disk ---------------------------------------------------------------------------------------------------------------

def pretend_free(monkeypatch, gigabytes: float) -> None:
    usage = type("Usage", (), {"free": gigabytes * 1e9})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)


def test_a_full_disk_is_told_before_anything_starts(monkeypatch, outputs):
    pretend_free(monkeypatch, 0.001)
    with pytest.raises(StudyError, match=r"the models of these runs take \d+\.\d GB and 0\.0 GB are free; make room there") as refusal:
        execute(runs_of(Condition(), "laptop", 0), console=Console(file=io.StringIO()))
    assert str(refusal.value).endswith("Nothing was started.") and not (outputs / "runs").exists()


def test_what_lies_there_already_counts(monkeypatch):
    "An interrupted study must not be refused for the room that it has taken itself."
    run = runs_of(Condition(), "laptop", 0)[0]
    run.folder.mkdir(parents=True)
    (run.folder / "resume.ckpt").write_bytes(bytes(int(disk_bytes(run))))
    pretend_free(monkeypatch, 0)
    assert not lacks_disk([run])


# --- corpora ------------------------------------------------------------------------------------------------------------

COMMAND = "echochamber data prepare finemath algebraic-stack tinygsm omi1 omi2 metamath --name paper"


def test_a_missing_corpus_is_named_before_anything_starts_with_the_whole_command(monkeypatch, outputs):
    pretend_gpus(monkeypatch, 79)
    with pytest.raises(StudyError) as refusal:
        reproduce(choose_figures(["convergence"]), "paper", console=Console(file=io.StringIO()))
    said, _ = str(refusal.value).splitlines()
    assert said.startswith(f"{outputs / 'corpora/paper'}: holds no prepared corpus; run `{COMMAND}`")
    assert not (outputs / "runs").exists()


def test_the_command_names_sources_that_can_be_prepared():
    from echochamber.data.preparation import corpus_config
    sources = COMMAND.removeprefix("echochamber data prepare ").removesuffix(" --name paper").split()
    assert [choice.source.name for choice in corpus_config(sources).sources] == sources


def test_a_corpus_that_was_begun_is_continued_and_one_without_a_source_is_named(outputs):
    runs = runs_of(Condition(), "paper", 0)
    (folder := outputs / "corpora/paper").mkdir(parents=True)
    (folder / "plan.json").write_text('{"config": {"sources": [{"source": {"name": "omi1"}}, {"source": {"name": "omi2"}, "tokens": 5}]}}')
    assert "is not completely prepared; `echochamber data prepare omi1 omi2=5 --name paper` continues it" in lacks_corpora(runs)[0]
    write_manifest(folder, "tinygsm", "omi1")
    said, = lacks_corpora(runs)
    assert "holds no source finemath, algebraic-stack, omi2 (it has omi1, tinygsm), and none can be added" in said and COMMAND in said


def test_whatever_is_missing_is_told_together(monkeypatch):
    pretend_gpus(monkeypatch, 24)
    pretend_free(monkeypatch, 1)
    runs = runs_of(Condition(), "paper", 0)
    assert len(missing_requirements(runs, ["0"])) == 3 and len(missing_requirements(runs, ["0"], local=False)) == 2


# --- which figures a preset has -----------------------------------------------------------------------------------------

def test_figures_of_the_paper():
    "What needs the generator is not there, and says so; `all` is what there is."
    absent = {"precision", "when", "errors", "controls", "transfer"}
    assert set(FIGURES) - set(figures_at("paper")) == absent and [one.name for one in choose_figures(["all"], "paper")] == figures_at("paper")
    assert figures_at("smoke") == list(FIGURES)
    for preset in ("laptop", "gpu"):
        assert set(FIGURES) - set(figures_at(preset)) == {"harder"}


@pytest.mark.parametrize("preset", ["gpu", "paper"])
def test_conditions_of_a_figure_differ(preset):
    "Precision at preset gpu compared bfloat16 with itself."
    for name in figures_at(preset):
        conditions = conditions_at(FIGURES[name], preset)
        assert len({runs_of(one, preset, 0)[-1].reference for one in conditions}) == len(conditions), name
