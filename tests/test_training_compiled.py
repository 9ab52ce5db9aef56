"Compiled RL and imitation: the numbers of the eager step, whatever the lengths, with a bounded number of compilations."
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from echochamber.training.algorithms import grpo_config, ppo_config
from echochamber.training.experience import LENGTH_BUCKET, split_micro_batches
from echochamber.training.policy import train_policy
from echochamber.training.rollouts import pad_prompt_completion
from echochamber.training.supervised import Example, SupervisedConfig, train_supervised
from echochamber.training.toy import toy_task

SIZES = dict(prompts=10, samples=4, train_batch=20, micro_batch=10, max_new_tokens=3, temperature=1.0, precision="32-true",
             learning_rate=1e-3)


@pytest.fixture
def counter(monkeypatch) -> CompileCounter:
    "Traces as a compiler does and runs the trace, so that no compiler is needed and compilations are counted."
    torch.compiler.reset()
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", partial(compile, backend=counter))
    return counter


@pytest.mark.parametrize("algorithm", [grpo_config, ppo_config])
def test_compiled_rl_is_eager_rl(tmp_path: Path, counter, algorithm):
    histories = []
    for compiled in (False, True):
        config = algorithm(8, kl_coefficient=0.01, **SIZES)
        config = config.model_copy(update={"fit": config.fit.model_copy(update={"compiled": compiled})})
        histories.append(train_policy(*toy_task(), config, tmp_path / str(compiled)))
    eager, fused = histories
    assert counter.frame_count > 0 and (eager.loss - fused.loss).abs().max() < 1e-4
    assert fused.sampler_gap.max() < 1e-4 and torch.allclose(*map(torch.tensor, (eager.reward.values, fused.reward.values)))


def test_lengths_are_bucketed_and_compiled_once(counter, monkeypatch, tmp_path):
    rows = pad_prompt_completion([[1, 2]] * 40, [[3] * length for length in range(1, 161, 4)])
    parts = split_micro_batches(rows, 4, LENGTH_BUCKET)
    assert {part["mask"].shape[1] for part in parts} == {64, 128, 192}
    assert sum(int(part["mask"].sum()) for part in parts) == int(rows["mask"].sum())
    assert all(part["tokens"].shape[1] == part["mask"].shape[1] + 1 for part in parts)
    for module in ("steps", "supervised"):
        monkeypatch.setattr(f"echochamber.training.{module}.resolve_compiled", lambda stated: True)
    examples = [Example([1, 2], [3] * length + [0]) for length in range(1, 161, 4)]
    config = SupervisedConfig(epochs=1, batch=8, micro_batch=4, precision="32-true")
    history = train_supervised(toy_task()[0], examples, config, tmp_path)
    assert len(history) == 5 and counter.frame_count <= 2


def test_rl_in_bfloat16_reports_its_gap_and_stays_below_the_alarm(tmp_path):
    config = grpo_config(8, **SIZES | {"precision": "bf16-mixed"})
    gaps = train_policy(*toy_task(), config, tmp_path).sampler_gap.dropna()
    assert len(gaps) == 4 and config.stop.sampler_gap and (gaps <= config.stop.sampler_gap / 5).all()
