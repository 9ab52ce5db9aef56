"2k steps = k steps + SIGKILL + resume, bit by bit, for pretraining and for GRPO."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

PRETRAIN = """
import sys, torch
from pathlib import Path
from echochamber.data.corpora import MINI_SOURCES, MixtureConfig, build_corpus
from echochamber.data.tokens import PackedData, pack_corpus, train_tokenizer
from echochamber.models.decoder import Decoder, DecoderConfig
from echochamber.training.fitting import FitConfig, OptimiserConfig
from echochamber.training.pretraining import pretrain

torch.set_num_threads(1)
torch.manual_seed(0)
texts = build_corpus(MixtureConfig(sources=tuple(MINI_SOURCES.values()), tokens=20_000))["train"]["text"]
data = PackedData(pack_corpus(texts, train_tokenizer(texts, 400), 32), batch_size=8)
model = Decoder(DecoderConfig(width=32, layers=2, heads=2, vocab_size=400, context=32))
fit = FitConfig(optimiser=OptimiserConfig(learning_rate=1e-2, warmup=5, horizon=60), steps=60, checkpoint_every=7, accumulate=2)
history = pretrain(model, data, fit, Path(sys.argv[1]), report=SLOW)
"""
GRPO = """
import sys, torch
from pathlib import Path
from echochamber.training.grpo import grpo_config
from echochamber.training.policy import train_policy
from echochamber.training.rollouts import toy_task

torch.set_num_threads(1)
model, tokenizer, questions, grader = toy_task()
config = grpo_config(40, prompts=10, samples=4, train_batch=20, micro_batch=10, max_new_tokens=2, temperature=1.0, learning_rate=1e-2,
                     precision="32-true", checkpoint_every=7, kl_coefficient=0.01)
history = train_policy(model, tokenizer, questions, grader, config, Path(sys.argv[1]), report=SLOW)
"""
SAVE = """
torch.save(model.state_dict(), Path(sys.argv[1]) / "weights.pt")
history.to_parquet(Path(sys.argv[1]) / "history.parquet")
"""
REPORT = """
import sys, time
from pathlib import Path
def SLOW(done, total, message):
    (Path(sys.argv[1]) / "done").write_text(str(done))
    if len(sys.argv) > 2:
        time.sleep(0.1)
"""


def start(script: str, folder: Path, *options: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", REPORT + script + SAVE, str(folder), *options], env=environment)


@pytest.mark.parametrize(("script", "kill_at"), [(PRETRAIN, 18), (GRPO, 17)], ids=["pretraining", "grpo"])
def test_killed_and_resumed_equals_uninterrupted(script, kill_at, tmp_path):
    straight, interrupted = tmp_path / "straight", tmp_path / "interrupted"
    straight.mkdir(), interrupted.mkdir()
    uninterrupted, victim = start(script, straight), start(script, interrupted, "slowly")
    marker, deadline = interrupted / "done", time.time() + 60
    while not (marker.exists() and int(marker.read_text() or 0) >= kill_at):
        assert victim.poll() is None and time.time() < deadline
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (interrupted / "weights.pt").exists() and (interrupted / "resume.ckpt").exists()
    assert start(script, interrupted).wait() == 0 and uninterrupted.wait() == 0

    expected, resumed = (torch.load(folder / "weights.pt") for folder in (straight, interrupted))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    histories = [pd.read_parquet(folder / "history.parquet") for folder in (straight, interrupted)]
    timeless = [c for c in histories[0] if not c.startswith("seconds") and c != "tokens_per_second"]
    pd.testing.assert_frame_equal(histories[0][timeless], histories[1][timeless], check_exact=True)
