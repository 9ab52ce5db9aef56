"The engine against the eager sampler: same tokens at any split and any bucket, called or recorded; weights, memory, waiting."
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echochamber.models import decoder as decoder_module
from echochamber.models import engine
from echochamber.models.decoder import Decoder, DecoderConfig, token_log_probs
from echochamber.models.engine import ENGINES, RECORDERS, record_operations, row_bucket, rows_that_fit, static_decode
from echochamber.models.generation import Completions, SamplingConfig, decode, generate, hold_weights
from echochamber.training.diagnostics import StopConfig

torch.set_num_threads(1)
VOCABULARY = 61
CONFIG = DecoderConfig(width=32, layers=2, heads=2, vocab_size=VOCABULARY, tied=False, init_std=0.2)
CUDA = pytest.param("cuda", marks=[
    pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")])
devices = pytest.mark.parametrize("device", ["cpu", CUDA])


@pytest.fixture(autouse=True)
def no_engine_of_another_test(monkeypatch):
    ENGINES.clear()
    yield
    ENGINES.clear()


@pytest.fixture
def recorded(monkeypatch):
    "Steps recorded as a CUDA graph would record them, on a machine without a GPU."
    monkeypatch.setitem(RECORDERS, "cpu", record_operations)


def decoder_of(seed: int, device: str = "cpu", **changes) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(CONFIG.model_copy(update=changes)).eval().to(device)


def prompts_of(count: int, longest: int = 40) -> list[list[int]]:
    dice = np.random.default_rng(count)
    return [dice.integers(1, VOCABULARY, size=dice.integers(1, longest)).tolist() for _ in range(count)]


def rows_that_differ(one: Completions, other: Completions) -> int:
    "Where the tokens agree, so do their log-probabilities; a GPU takes other kernels for other sizes."
    tolerance = 1e-5 if one.log_probs.device.type == "cpu" else 1e-4
    differ = (one.tokens != other.tokens).any(-1) if one.tokens.shape == other.tokens.shape else torch.ones(1)
    assert differ.any() or (one.log_probs - other.log_probs).abs().max() <= tolerance
    return int(differ.sum())


@devices
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_thousand_rows_of_mixed_lengths_are_those_of_the_eager_path(device, temperature):
    decoder, prompts = decoder_of(0, device), prompts_of(250)
    sampling = SamplingConfig(max_new_tokens=70, temperature=temperature)
    eager = generate(decoder, prompts, 4, sampling, seeds=5, batch_rows=1000)
    allowed = 0 if device == "cpu" else 3                                              # a draw may fall on a rounded edge
    for batch_rows in (1000, 391):
        assert rows_that_differ(eager, generate(decoder, prompts, 4, sampling, 5, batch_rows, static_decode)) <= allowed
    assert 0.1 < eager.ended.float().mean() < 0.9


@given(st.integers(1, 14), st.integers(1, 5), st.integers(1, 50), st.integers(1, 60), st.sampled_from([1, 3, 16]),
       st.sampled_from([1, 8, 64]), st.booleans(), st.sampled_from([(0.0, 1.0), (0.7, 1.0), (1.0, 0.8)]), st.integers(0, 3))
def test_any_split_and_any_bucket(prompts, samples, limit, batch_rows, segment, columns, exact, temper, model):
    decoder = decoder_of(model).double()  # or rounding decides a draw, about once in ten million tokens
    sampling = SamplingConfig(max_new_tokens=limit, temperature=temper[0], top_p=temper[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "SEGMENT", segment)
        patch.setattr(engine, "COLUMNS_PER_BUCKET", columns)
        if exact:
            patch.setattr(engine, "row_bucket", lambda rows: max(1, rows))
        ENGINES.clear()
        found = generate(decoder, prompts_of(prompts), samples, sampling, seeds=7, batch_rows=batch_rows, decode=static_decode)
        ENGINES.clear()
    assert rows_that_differ(generate(decoder, prompts_of(prompts), samples, sampling, seeds=7), found) == 0


def test_parts_that_memory_forces_change_nothing(monkeypatch):
    decoder, prompts, sampling = decoder_of(1), prompts_of(20), SamplingConfig(max_new_tokens=40)
    monkeypatch.setattr(engine, "rows_at_once", lambda decoder, rows, columns: min(rows, 24))
    found = generate(decoder, prompts, 5, sampling, decode=static_decode)
    assert rows_that_differ(generate(decoder, prompts, 5, sampling), found) == 0 and len(ENGINES[0].alive) == 24


@given(st.integers(1, 3000), st.integers(0, 2**36), st.sampled_from([2, 4]))
def test_the_rows_that_fit_fit_and_more_would_not(columns, memory, itemsize):
    rows = rows_that_fit(CONFIG, columns, memory, itemsize)
    size = 2 * CONFIG.layers * CONFIG.width * engine.column_bucket(columns) * itemsize
    assert rows == row_bucket(rows) and (rows * size <= memory or rows == 8)
    assert row_bucket(rows + 1) * size > memory


def test_a_recorded_step_gives_the_same_tokens_for_later_batches_and_other_weights(recorded):
    prompts, sampling = prompts_of(16), SamplingConfig(max_new_tokens=50)
    engines = set()
    for model, seed in ((0, 1), (0, 2), (3, 2)):
        found = generate(decoder_of(model), prompts, 3, sampling, seeds=seed, decode=static_decode)
        assert rows_that_differ(generate(decoder_of(model), prompts, 3, sampling, seeds=seed), found) == 0
        engines.add(ENGINES[0])
    assert engines == {ENGINES[0]}                                                     # one served all three
    recordings = dict(ENGINES[0].recordings)
    generate(decoder_of(3), prompts, 3, sampling, seeds=2, decode=static_decode)
    assert ENGINES[0].recordings == recordings and len(recordings) < 50                # nothing new to record


def test_the_host_asks_once_per_segment_and_a_step_asks_nothing(monkeypatch, recorded):
    asked = []
    monkeypatch.setattr(engine, "read_back", lambda tensor: asked.append(len(tensor)) or tensor.tolist())
    generate(decoder_of(0), prompts_of(30), 4, SamplingConfig(max_new_tokens=81), decode=static_decode)
    assert len(asked) <= 81 // engine.SEGMENT and asked == sorted(asked, reverse=True) and asked[-1] < asked[0]
    for replay in ENGINES[0].recordings.values():
        names = {str(call[0]) for call in replay.__self__.calls}
        assert not [name for name in names if any(word in name for word in ("local_scalar", "nonzero", "masked_select"))]


@devices
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_held_weights_compute_what_autocast_computes(device, tied, half):
    decoder, tokens = decoder_of(0, device, tied=tied), torch.randint(VOCABULARY, (5, 30), device=device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=half):
        assert torch.equal(hold_weights(decoder)(tokens), decoder(tokens))


@devices
@pytest.mark.parametrize("path", [decode, static_decode])
def test_in_bfloat16_sampler_and_trainer_stay_below_the_alarm(device, path):
    decoder, prompts = decoder_of(0, device, init_std=0.1), prompts_of(40)
    with torch.autocast(device, torch.bfloat16):
        found = generate(decoder, prompts, 4, SamplingConfig(max_new_tokens=40), decode=path)
        gaps = []
        for row, (written, length) in enumerate(zip(found.tokens.tolist(), found.lengths.tolist(), strict=True)):
            prompt = prompts[row // 4]
            with torch.no_grad():
                trained = token_log_probs(decoder, torch.tensor([prompt + written[:length]], device=device))[0, len(prompt) - 1:]
            gaps.append((trained - found.log_probs[row, :length]).abs())
    gap = torch.cat(gaps)
    assert 0 < gap.mean() < StopConfig().sampler_gap / 5


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("half", [True, False])
def test_graphs_are_captured_once_and_hold_no_more_memory(device, half):
    prompts, sampling = prompts_of(64), SamplingConfig(max_new_tokens=100)
    with torch.autocast(device, torch.bfloat16) if half else nullcontext():
        generate(decoder_of(0, device), prompts, 8, sampling, seeds=0, decode=static_decode)
        first, graphs = ENGINES[0], dict(ENGINES[0].recordings)
        assert graphs and all("CUDAGraph" in type(replay.__self__).__name__ for replay in graphs.values())
        used = torch.cuda.memory_allocated()
        for _ in range(3):
            generate(decoder_of(0, device), prompts, 8, sampling, seeds=0, decode=static_decode)
        assert ENGINES[0] is first and first.recordings == graphs and torch.cuda.memory_allocated() - used < 2**24


class PretendGraph(engine.Recording):
    "What `torch.cuda` offers for graphs, as far as the engine calls it, in Python: a capture is noted and leaves no trace."
    waits: list

    def __init__(self, cuda_graph=None, pool=None, stream=None):
        super().__init__()
        self.graph, self.pool, self.stream = cuda_graph, pool, stream

    def wait_stream(self, stream):
        self.waits.append(stream)

    def __enter__(self):
        if self.graph is None:
            return self                                                                # the side stream of a rehearsal
        self.before = [tensor.clone() for tensor in ENGINES[0].state]
        return super().__enter__()

    def __exit__(self, *error):
        if self.graph is not None:
            super().__exit__(*error)
            self.graph.calls = self.calls
            for tensor, value in zip(ENGINES[0].state, self.before, strict=True):
                tensor.copy_(value)


def test_the_order_of_a_capture_on_a_pretended_gpu(monkeypatch):
    "Both streams wait for each other, rehearsals and captures change no state, graphs share a pool, replays give the tokens."
    stream, captures = PretendGraph(), []
    monkeypatch.setattr(PretendGraph, "waits", [], raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", PretendGraph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: PretendGraph())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *graph, **where: captures.append(where) or PretendGraph(*graph, **where))
    prepared = engine.engine_for
    monkeypatch.setattr(engine, "engine_for", lambda *size: vars(found := prepared(*size)).update(pool=7, stream=stream) or found)
    monkeypatch.setitem(RECORDERS, "cpu", engine.record_cuda_graph)
    prompts, sampling = prompts_of(12), SamplingConfig(max_new_tokens=40)
    found = generate(decoder_of(0), prompts, 4, sampling, seeds=3, decode=static_decode)
    assert rows_that_differ(generate(decoder_of(0), prompts, 4, sampling, seeds=3), found) == 0
    assert captures == [{"pool": 7, "stream": stream}] * len(ENGINES[0].recordings) and len(captures) > 1
    assert len(PretendGraph.waits) == 2 * len(captures) and PretendGraph.waits[1::2] == [stream] * len(captures)


def test_only_a_large_bucket_may_build_a_kernel_for_its_shape(monkeypatch):
    allowed, attend = {}, decoder_module.fused_attention

    def fused_attention(query, key, value, **options):
        allowed.setdefault(key.nbytes + value.nbytes, set()).add(decoder_module.SHAPES_COME_AGAIN)
        return attend(query, key, value, **options)

    monkeypatch.setattr(decoder_module, "fused_attention", fused_attention)
    monkeypatch.setattr(engine, "BYTES_WORTH_A_KERNEL", 2**20)
    for path in (static_decode, decode):
        generate(decoder_of(0), prompts_of(30), 8, SamplingConfig(max_new_tokens=100), decode=path)
        assert all(found == {path is static_decode and size >= 2**20} for size, found in allowed.items())
        assert max(allowed) >= 2**20 > min(allowed)
        allowed.clear()
