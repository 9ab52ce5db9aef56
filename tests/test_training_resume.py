"2k steps = k steps + SIGKILL + resume, bit by bit, for pretraining and for every loop of fine-tuning."
import os
import time
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._python_dispatch import TorchDispatchMode

from echochamber.core import StudyError
from echochamber.data.corpora import MIXTURES, MixtureConfig, build_corpus
from echochamber.data.tokens import PackedData, pack_corpus, train_tokenizer
from echochamber.models.decoder import Decoder, DecoderConfig
from echochamber.models.generation import SamplingConfig
from echochamber.training.algorithms import grpo_config, ppo_config
from echochamber.training.critic import CriticConfig
from echochamber.training.expert_iteration import ExpertIterationConfig, train_expert_iteration
from echochamber.training.fitting import FitConfig, OptimiserConfig, SnapshotCallback
from echochamber.training.policy import train_policy
from echochamber.training.pretraining import held_out_losses, pretrain
from echochamber.training.rollouts import VerifierConfig
from echochamber.training.supervised import SupervisedConfig
from echochamber.training.toy import toy_task

torch.set_num_threads(1)
Report = Callable[[int, int, str], None]
Trained = tuple[Decoder, pd.DataFrame]
NOISY = VerifierConfig(true_positive_rate=0.8, false_positive_rate=0.1)
SIZES = dict(prompts=10, samples=4, train_batch=20, micro_batch=10, max_new_tokens=2, temperature=1.0, learning_rate=1e-2,
             precision="32-true", checkpoint_every=7, kl_coefficient=0.01)  # two steps per rollout batch


@cache
def pretraining_data() -> PackedData:
    "Rows of all three sources, and held-out rows of each."
    corpus = build_corpus(MixtureConfig(sources=MIXTURES["three-formats"](), tokens=20_000, held_out=0.05))
    tokenizer = train_tokenizer(corpus["train"]["text"], 400)
    held_out = {source: pack_corpus(rows.text, tokenizer, 32) for source, rows in corpus["held_out"].to_pandas().groupby("source")}
    return PackedData(pack_corpus(corpus["train"]["text"], tokenizer, 32), batch_size=8, held_out=held_out)


def untrained_decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(width=32, layers=2, heads=2, vocab_size=400, context=32))


def pretraining(folder: Path, report: Report, compiled: bool | None = None) -> Trained:
    fit = FitConfig(optimiser=OptimiserConfig(learning_rate=1e-2, warmup=5, horizon=60), steps=60, checkpoint_every=7, accumulate=2,
                    precision="32-true", compiled=compiled)
    model = untrained_decoder()
    return model, pretrain(model, pretraining_data(), fit, folder, report=report)


def grpo(folder: Path, report: Report) -> Trained:
    model, *task = toy_task()
    return model, train_policy(model, *task, grpo_config(30, **SIZES), folder, report=report)


def noisy_grpo(folder: Path, report: Report) -> Trained:
    "The verifier errs."
    model, *task = toy_task()
    return model, train_policy(model, *task, grpo_config(12, verifier=NOISY, **SIZES), folder, report=report)


def ppo(folder: Path, report: Report) -> Trained:
    model, *task = toy_task()
    config = ppo_config(24, critic=CriticConfig(learning_rate=1e-2), **SIZES)
    return model, train_policy(model, *task, config, folder, report=report)


def expert_iteration(folder: Path, report: Report, **options) -> Trained:
    "Reports 100 per round: the first half of it is sampling; 101, 201 and 301 lie between rounds."
    model, *task = toy_task()
    supervised = SupervisedConfig(epochs=16, batch=10, micro_batch=5, learning_rate=1e-2, precision="32-true", checkpoint_every=2)
    config = ExpertIterationConfig(rounds=3, samples=32, sampling=SamplingConfig(max_new_tokens=3), supervised=supervised, prompts=3,
                                   **options)
    between = SnapshotCallback(range(4), lambda round: report(100 * round + 1, 300, "between rounds"))
    return model, train_expert_iteration(model, *task, config, folder, between, report)


def noisy_expert_iteration(folder: Path, report: Report) -> Trained:
    "The verifier errs, and what is kept is longer than what was drawn."
    return expert_iteration(folder, report, verifier=NOISY, ending="9")


def work(train: Callable[[Path, Report], Trained], folder: Path, fatal: float = float("inf")) -> None:
    "Train and save; once `fatal` is done, wait for the end."
    def report(done: int, total: int, message: str) -> None:
        if done >= fatal:
            (folder / "waits").touch()
            time.sleep(600)

    torch.set_num_threads(1)
    model, history = train(folder, report)
    torch.save(model.state_dict(), folder / "weights.pt")
    history.to_parquet(folder / "history.parquet")


@pytest.fixture(scope="module")
def processes():
    "Starts processes that have nothing from this one, and need not import everything again."
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = get_context("forkserver")
    context.set_forkserver_preload(["pytest", "echochamber.data.corpora", "echochamber.training.pretraining",
                                    "echochamber.training.expert_iteration", "echochamber.training.toy"])
    return context


def run(processes, *arguments) -> int | None:
    "Exit code of `work` in a process of its own, or None if it waited to be killed, and was."
    folder, deadline = arguments[1], time.time() + 300
    process = processes.Process(target=work, args=arguments, daemon=True)
    process.start()
    while process.is_alive() and not (folder / "waits").exists() and time.time() < deadline:
        time.sleep(0.01)
    if process.is_alive():
        process.kill()
        process.join()
        (folder / "waits").unlink()
        return None
    return process.exitcode


@pytest.mark.parametrize(("train", "kills"), [
    (pretraining, [18]),
    (grpo, [24]),
    (noisy_grpo, [10]),  # continues from step 7, inside a rollout batch; the next one is verified after that
    (ppo, [10, 17]),  # continues from step 7, inside a rollout batch, and from step 14, between two
    (expert_iteration, [125, 175, 200, 201]),  # sampling round 2, amid and after the last step of its fine-tuning, before round 3
    (noisy_expert_iteration, [125, 201]),
], ids=["pretraining", "grpo", "grpo with errors", "ppo", "expert iteration", "expert iteration with errors"])
def test_killed_and_resumed_equals_uninterrupted(train, kills, processes, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir(), killed.mkdir()
    for fatal in kills:
        assert run(processes, train, killed, fatal) is None
        assert not (killed / "weights.pt").exists() and list(killed.rglob("resume.ckpt"))
    assert run(processes, train, killed) == 0
    work(train, straight)

    expected, resumed = (torch.load(folder / "weights.pt") for folder in (straight, killed))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    histories = [pd.read_parquet(folder / "history.parquet") for folder in (straight, killed)]
    assert histories[0].step.tolist() == list(range(1, len(histories[0]) + 1))
    timeless = [column for column in histories[0] if "second" not in column]
    pd.testing.assert_frame_equal(histories[0][timeless], histories[1][timeless], check_exact=True)


class Interruption(Exception):
    pass


def stop_at_18(step: int, steps: int, message: str) -> None:
    if step == 18:
        raise Interruption


def held_out_loss(model: Decoder) -> float:
    "Mean over the sources [nats per token]."
    return held_out_losses(model, pretraining_data()).loss.mean()


@pytest.fixture
def compiler() -> str:
    "What PyTorch compiles C++ with; nothing else here needs one."
    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("there is no C++ compiler (g++), which `compiled` needs")


@pytest.mark.sessions
def test_compiled_pretraining_learns_the_same_and_continues_bit_by_bit(compiler, tmp_path):
    """Two correct programs round differently and drift apart, by how much depends on the processor. So the first steps have to
    agree closely, and the end in what was learnt."""
    eager, history = pretraining(tmp_path / "eager", lambda *_: None)
    straight, fused = pretraining(tmp_path / "fused", lambda *_: None, compiled=True)
    assert (history.loss - fused.loss)[:3].abs().max() < 1e-4
    learnt, learnt_fused, before = (held_out_loss(model) for model in (eager, straight, untrained_decoder()))
    assert max(learnt, learnt_fused) < before - 1 and abs(learnt - learnt_fused) < 0.1

    with pytest.raises(Interruption):
        pretraining(tmp_path / "resumed", stop_at_18, compiled=True)
    resumed, _ = pretraining(tmp_path / "resumed", lambda *_: None, compiled=True)
    assert all(torch.equal(*pair) for pair in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_missing_compiler_is_named(tmp_path):
    torch.compiler.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        with pytest.raises(StudyError, match=r"install a C\+\+ compiler .*`compiled`"):
            pretraining(tmp_path, lambda *_: None, compiled=True)


class Readings(TorchDispatchMode):
    "Counts how often a number is asked of a tensor, which on a GPU waits for all work before it."
    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        self.count += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*arguments, **(named or {}))


def test_pretraining_reads_numbers_late_and_together(tmp_path):
    model, fit = untrained_decoder(), FitConfig(optimiser=OptimiserConfig(horizon=40), steps=40, checkpoint_every=100, precision="32-true")
    within, reported = [], []
    with Readings() as readings:
        history = pretrain(model, pretraining_data(), fit, tmp_path, report=lambda *told: within.append(readings.count) or reported.append(told))
    assert len(history) == len(reported) == 40 and reported[-1][-1] == f"loss {history.loss.iloc[-1]:.3f}"
    asked = [after - before for before, after in pairwise(within)]
    assert sum(count > 0 for count in asked) <= 10 and sum(asked) <= 2 * 40   # loss and speed of every step, once a second or at the end
    logged = pd.read_csv(next(tmp_path.glob("logs/csv/*/metrics.csv")))
    assert logged.loss.round(5).tolist() == history.loss.round(5).tolist() and logged.step.tolist() == history.step.tolist()
