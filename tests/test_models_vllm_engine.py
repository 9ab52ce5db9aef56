"vLLM itself, where there is one: its completions are those of our own engine."
import importlib.util
import os

import pytest
import torch

from echochamber.data.benchmarks import load_benchmark
from echochamber.data.tokens import train_tokenizer
from echochamber.models.checkpoints import save_model
from echochamber.models.decoder import Decoder, DecoderConfig
from echochamber.models.generation import SamplingConfig, generate, prompt_seeds
from echochamber.models.vllm_engine import generate_with_vllm

pytestmark = [pytest.mark.sessions, pytest.mark.skipif(
    not (os.environ.get("ECHOCHAMBER_VLLM_PYTHON") or importlib.util.find_spec("vllm")),
    reason="no vLLM here; ECHOCHAMBER_VLLM_PYTHON may name the Python of an environment that has it")]


def test_it_completes_as_our_own_engine_does(tmp_path):
    questions = load_benchmark("mini-gsm", limit=8)
    tokenizer = train_tokenizer([question.question for question in questions], 300)
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocab_size=tokenizer.get_vocab_size(), width=128, layers=2, heads=4, context=64))
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.mul_(8)
    save_model(tmp_path / "model", decoder, tokenizer)
    prompts = [tokenizer.encode(question.question).ids for question in questions]
    assert max(map(len, prompts)) + 24 > decoder.config.context
    wanted = [(1, SamplingConfig(max_new_tokens=24, temperature=0.0)), (50, SamplingConfig(max_new_tokens=3, temperature=0.3, top_p=0.9))]
    seeds, log = prompt_seeds(0, len(prompts)), tmp_path / "log"
    theirs, again = (generate_with_vllm(tmp_path / "model", prompts, wanted, seeds, log=log) for _ in range(2))
    ours = [generate(decoder, prompts, samples, sampling, seeds) for samples, sampling in wanted]
    assert theirs[0].token_lists() == ours[0].token_lists()
    assert torch.equal(theirs[1].tokens, again[1].tokens)
    shares = [torch.bincount(found[1].tokens[:, 0], minlength=decoder.config.vocab_size) / 400 for found in (ours, theirs)]
    assert (shares[0] - shares[1]).abs().max() < 5 * (2 * 0.25 / 400) ** 0.5
    assert len(set(map(tuple, theirs[1].tokens[:50].tolist()))) > 10
