"The decoder against Transformers' OLMo at any shape: logits, gradients, parameter counts and weights there and back."
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import OlmoConfig, OlmoForCausalLM

from echochamber.models.decoder import (
    DECODERS,
    CompiledDecoder,
    Decoder,
    DecoderConfig,
    log_probs_and_entropy,
    token_log_probs,
)
from echochamber.models.olmo import from_olmo, from_olmo_config, to_olmo, to_olmo_config

torch.set_num_threads(1)
seeds = st.integers(0, 2**31)


@st.composite
def shapes(draw) -> DecoderConfig:
    "Any small decoder; weights ten times larger than at the start, so that attention is far from uniform."
    heads = draw(st.integers(1, 5))
    return DecoderConfig(width=2 * heads * draw(st.integers(1, 10)), layers=draw(st.integers(1, 4)), heads=heads,
                         mlp_ratio=draw(st.integers(1, 9)), vocab_size=draw(st.integers(2, 200)), tied=draw(st.booleans()),
                         rope_theta=draw(st.sampled_from([50.0, 10_000.0, 500_000.0])), init_std=0.2)


def reference(config: DecoderConfig) -> OlmoForCausalLM:
    return OlmoForCausalLM(OlmoConfig(**to_olmo_config(config))).eval()


def loaded(model: OlmoForCausalLM, decoder: Decoder) -> OlmoForCausalLM:
    model.load_state_dict(to_olmo(decoder.state_dict(), decoder.config), strict=False)
    return model


@given(shapes(), seeds, st.integers(1, 6), st.integers(2, 40))
def test_logits_and_gradients_are_those_of_transformers(config, seed, rows, length):
    torch.manual_seed(seed)
    decoder = Decoder(config)
    olmo = loaded(reference(config), decoder)
    olmo.model.embed_tokens.padding_idx = None                                         # else token 0 gets no gradient there
    tokens = torch.randint(config.vocab_size, (rows, length))
    logits = decoder(tokens)
    assert (logits - olmo(tokens).logits).abs().max() < 1e-4
    (-token_log_probs(decoder, tokens).mean()).backward()
    olmo(tokens, labels=tokens).loss.backward()
    ours = to_olmo({name: weight.grad for name, weight in decoder.named_parameters()}, config)
    theirs = {name: weight.grad for name, weight in olmo.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def loss_and_gradients(scores, decoder: Decoder, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    decoder.zero_grad()
    loss = -token_log_probs(scores, tokens).mean()
    return (loss.detach(), *torch.autograd.grad(loss, list(decoder.parameters())))


@pytest.mark.parametrize(("device", "backend", "tolerance"), [
    ("cpu", "eager", 1e-5),                                                            # traced, without generating code
    pytest.param("cuda", "inductor", 1e-4, marks=[
        pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")])])
@pytest.mark.parametrize("shape", [dict(width=32, layers=2, heads=2), dict(width=48, layers=1, heads=4, tied=False)])
def test_what_a_compiler_reads_is_the_same_function(device, backend, tolerance, shape):
    torch.compiler.reset()
    decoder = Decoder(DecoderConfig(**shape, vocab_size=97, init_std=0.2)).to(device)
    compiled = CompiledDecoder(decoder, backend=backend)
    for size in ((3, 24), (5, 65), (2, 128)):
        tokens = torch.randint(97, size, device=device)
        both = (loss_and_gradients(scores, decoder, tokens) for scores in (decoder, compiled))
        for eager, fused in zip(*both, strict=True):
            torch.testing.assert_close(fused, eager, atol=tolerance, rtol=1e-3)


@given(shapes(), seeds)
def test_weights_of_transformers_survive_the_way_here_and_back(config, seed):
    torch.manual_seed(seed)
    theirs = dict(reference(config).named_parameters())
    decoder = Decoder(from_olmo_config(OlmoConfig(**to_olmo_config(config)).to_dict()))
    decoder.load_state_dict(from_olmo(theirs, config))
    back = to_olmo(decoder.state_dict(), config)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], weight) for name, weight in theirs.items())


@pytest.mark.parametrize(("name", "count"), [("150M", 162_398_208), ("1B", 1_139_277_824)])
def test_the_sizes_of_the_paper_count_alike_in_transformers(name, count):
    with torch.device("meta"):
        theirs, ours = reference(DECODERS[name]), Decoder(DECODERS[name])
    assert theirs.num_parameters() == count == sum(weight.numel() for weight in ours.parameters())
    assert to_olmo(ours.state_dict(), ours.config).keys() == dict(theirs.named_parameters()).keys()


@given(seeds, st.integers(1, 5), st.integers(2, 30), st.integers(1, 2_000), st.sampled_from([0.3, 1.0, 2.0]))
def test_log_probabilities_do_not_depend_on_the_pieces(seed, rows, length, logits_at_once, temperature):
    torch.manual_seed(seed)
    decoder = Decoder(DecoderConfig(width=16, layers=1, heads=2, vocab_size=31, init_std=0.2))
    tokens = torch.randint(31, (rows, length))
    expected = (decoder(tokens)[:, :-1].double() / temperature).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    found = token_log_probs(decoder, tokens, temperature, logits_at_once)
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=0)


@given(seeds, st.integers(1, 5), st.integers(2, 30), st.integers(1, 2_000), st.sampled_from([0.3, 1.0, 2.0]), st.floats(0, 1))
def test_log_probabilities_and_entropy_where_a_mask_says_so(seed, rows, length, logits_at_once, temperature, share):
    torch.manual_seed(seed)
    decoder = Decoder(DecoderConfig(width=16, layers=1, heads=2, vocab_size=50, init_std=0.3))
    tokens, mask = torch.randint(50, (rows, length)), torch.rand(rows, length - 1) < share
    log_probs, entropy = log_probs_and_entropy(decoder, tokens, mask, temperature, logits_at_once)
    choices = torch.distributions.Categorical(logits=decoder(tokens)[:, :-1].double() / temperature)
    torch.testing.assert_close(log_probs, token_log_probs(decoder, tokens, temperature) * mask, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), choices.entropy() * mask, atol=1e-4, rtol=1e-4)
    assert log_probs.shape == entropy.shape == mask.shape and not (log_probs[~mask].any() or entropy[~mask].any())
