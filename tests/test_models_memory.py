"A plan holds what a training takes, what does not fit is refused before it starts, and recomputed activations change no bit."
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from echochamber.core import StudyError, project_root
from echochamber.models.decoder import DECODERS, Decoder, DecoderConfig, token_log_probs
from echochamber.models.memory import PeakMemory, plan_pretraining, plan_rl, recompute_activations, require_memory
from echochamber.training import policy, pretraining
from echochamber.training.algorithms import grpo_config
from echochamber.training.fitting import FitConfig, OptimiserConfig
from echochamber.training.policy import train_policy
from echochamber.training.pretraining import pretrain
from echochamber.training.toy import toy_task

torch.set_num_threads(1)
SHAPE = DecoderConfig(width=128, layers=4, heads=4, mlp_ratio=8, vocab_size=500, context=128)


class Rows:
    batch_size = 8

    def __len__(self):
        return 3

    def __iter__(self):
        yield from torch.randint(500, (3, 8, 129), generator=torch.Generator().manual_seed(0))


def fitted(folder, precision: str, recompute: bool) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(SHAPE)
    config = FitConfig(optimiser=OptimiserConfig(horizon=3), steps=3, precision=precision, recompute_activations=recompute)
    pretrain(model, Rows(), config, folder)
    return model


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_recomputed_activations_train_the_same_model_to_the_bit(precision, tmp_path):
    kept, again = (fitted(tmp_path / str(recompute), precision, recompute) for recompute in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), again.parameters(), strict=True))
    assert not any("forward" in vars(block) for block in again.blocks), "the decoder is itself again"


def test_recomputing_holds_less_and_a_view_is_no_memory():
    model, batch = Decoder(SHAPE), torch.randint(500, (8, 129))
    with PeakMemory() as usual:
        token_log_probs(model, batch).mean().backward()
    model.zero_grad()
    with PeakMemory() as less, recompute_activations(model):
        token_log_probs(model, batch).mean().backward()
    assert less.peak < usual.peak / 2
    with PeakMemory() as nothing:
        model.embedding.weight.t()[:3].unsqueeze(0)
    assert nothing.peak == 0


RESIDENT = """
import torch
from echochamber.models.decoder import Decoder, DecoderConfig, token_log_probs
torch.set_num_threads(1)
config = DecoderConfig(width=256, layers=8, heads=4, mlp_ratio=8, vocab_size=500, context=512)
def peak():  # `getrusage` would count the process that this one was forked from
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
def step(model, optimiser, rows):
    loss = -token_log_probs(model, torch.randint(500, (rows, config.context + 1))).mean()
    optimiser.zero_grad(); loss.backward(); optimiser.step()
tiny = Decoder(DecoderConfig(width=8, layers=1, heads=1, vocab_size=500))
step(tiny, torch.optim.AdamW(tiny.parameters(), fused=True), 1)
before = peak()
model = Decoder(config)
optimiser = torch.optim.AdamW(model.parameters(), fused=True)
for _ in range(2): step(model, optimiser, 4)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
def test_the_plan_agrees_with_what_the_system_says():
    "The peak of a process's resident memory; an allocator rounds, so within a third."
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True, cwd=project_root())
    config = DecoderConfig(width=256, layers=8, heads=4, mlp_ratio=8, vocab_size=500, context=512)
    ratio = sum(plan_pretraining(config, 4, bf16=False).values()) / int(done.stdout)
    assert 0.75 < ratio < 1.35, ratio


def test_parts_of_the_papers_plans():
    small = plan_pretraining(DECODERS["150M"], 1, bf16=True)
    assert (small["weights"], small["gradients"], small["Adam"]) == (4 * 162_398_208, 4 * 162_398_208, 8 * 162_398_208)
    grpo, ppo = (plan_rl(DECODERS["150M"], 8, 512, 512, bf16=True, critic=critic) for critic in (False, True))
    assert ppo["critic"] == 16 * 137_822_208 and "critic" not in grpo and "reference" not in plan_rl(DECODERS["150M"], 8, 8, 512, True, reference=False)
    more, longer = plan_rl(DECODERS["150M"], 8, 1024, 512, bf16=True), plan_rl(DECODERS["150M"], 8, 512, 1024, bf16=True)
    assert more["KV cache"] == longer["KV cache"] == 2 * grpo["KV cache"]


def test_too_little_memory_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    with pytest.raises(StudyError, match=r"1B needs 29.\d GiB \(weights 4.2, .*\) and 16.0 GiB are free; make the micro-batch smaller"):
        require_memory("1B", plan_pretraining(DECODERS["1B"], 8, bf16=True, recompute=True, device="cuda"), 16 * 2**30)
    for module in (pretraining, policy):
        monkeypatch.setattr(module, "free_memory", lambda device: 10_000)
    with pytest.raises(StudyError, match="pretraining needs"):
        fitted(tmp_path / "pretraining", "32-true", False)
    model, tokenizer, questions, grader = toy_task()
    config = grpo_config(8, prompts=8, samples=8, train_batch=8, max_new_tokens=4)
    with pytest.raises(StudyError, match="grpo needs"):
        train_policy(model, tokenizer, questions, grader, config, tmp_path / "rl")
    assert not (tmp_path / "pretraining").exists() and not (tmp_path / "rl").exists()
