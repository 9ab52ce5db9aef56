"A checkpoint survives the disk and Transformers bit by bit, and whatever happens to its files ends in one sentence."
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, OlmoConfig, OlmoForCausalLM

from echochamber.core import StudyError
from echochamber.data.tokens import save_tokenizer, train_tokenizer
from echochamber.models.checkpoints import (
    begin_tokens,
    export_to_transformers,
    import_from_transformers,
    load_model,
    save_model,
)
from echochamber.models.decoder import DECODERS, Decoder, DecoderConfig
from echochamber.models.generation import SamplingConfig, generate
from echochamber.models.olmo import to_olmo_config

torch.set_num_threads(1)
TOKENIZER = train_tokenizer(["Sam has 3 apples and eats 1."], 300)
SHAPES = [DecoderConfig(width=32, layers=2, heads=2, vocab_size=300, tied=tied) for tied in (True, False)]


def decoder_of(config: DecoderConfig, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(config)


def same(a: Decoder, b: Decoder) -> bool:
    return a.config == b.config and all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def sentence(action) -> str:
    with pytest.raises(StudyError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text
    return text


@pytest.fixture(params=SHAPES, ids=["tied", "untied"])
def saved(request, tmp_path) -> tuple[Path, Decoder]:
    decoder = decoder_of(request.param)
    save_model(tmp_path / "model", decoder, TOKENIZER)
    return tmp_path / "model", decoder


def test_there_and_back(saved):
    folder, decoder = saved
    loaded, tokenizer = load_model(folder)
    assert same(loaded, decoder) and tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_weights_in_half_precision_are_widened_exactly(saved):
    folder, decoder = saved
    save_model(folder, decoder.bfloat16(), TOKENIZER)
    loaded, _ = load_model(folder)
    assert all(x.dtype == torch.float32 and torch.equal(x, y.float())
               for x, y in zip(loaded.parameters(), decoder.parameters(), strict=True))


def test_the_way_through_transformers_loses_nothing(saved, tmp_path):
    folder, decoder = saved
    export_to_transformers(folder, tmp_path / "olmo")
    theirs = OlmoForCausalLM.from_pretrained(tmp_path / "olmo")
    theirs.save_pretrained(tmp_path / "again")
    save_tokenizer(tmp_path / "again", TOKENIZER)
    for name in ("olmo", "again"):
        assert same(import_from_transformers(tmp_path / name)[0], decoder)


def test_weights_in_several_files_are_read_and_a_lost_one_is_noticed(tmp_path):
    theirs = OlmoForCausalLM(OlmoConfig(**to_olmo_config(SHAPES[1])))
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    save_tokenizer(tmp_path, TOKENIZER)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    tokens, (decoder, _) = torch.arange(20)[None], import_from_transformers(tmp_path)
    assert len(shards) > 1 and (decoder(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    shards[-1].unlink()
    assert "do not fit" in sentence(lambda: import_from_transformers(tmp_path))


@given(st.data())
def test_a_file_cut_anywhere_is_refused(saved, data):
    folder, _ = saved
    name = data.draw(st.sampled_from(["model.safetensors", "config.json", "tokenizer.json"]))
    damaged = folder.with_name("damaged")
    shutil.copytree(folder, damaged, dirs_exist_ok=True)
    content = (folder / name).read_bytes()
    end = len(content.rstrip()) - 1                                                    # a lost newline is no damage
    (damaged / name).write_bytes(content[:data.draw(st.integers(0, end))])
    assert str(damaged) in sentence(lambda: load_model(damaged))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_missing_file_is_named(saved, name):
    folder, _ = saved
    (folder / name).unlink()
    assert name in sentence(lambda: load_model(folder))


def test_weights_of_another_model_are_refused(saved):
    folder, _ = saved
    weights = load_file(folder / "model.safetensors")
    for foreign in (weights | {"bias": torch.zeros(3)}, {"x": torch.zeros(3)}, {},
                    weights | {"embedding.weight": torch.zeros(7, 32)}):
        save_file(foreign, folder / "model.safetensors")
        assert "do not fit" in sentence(lambda: load_model(folder))


@pytest.mark.parametrize("change", [{"model_type": "llama"}, {"clip_qkv": 8.0}, {"num_key_value_heads": 1},
                                    {"attention_bias": True}, {"hidden_act": "gelu"}, {"hidden_size": "wide"},
                                    {"num_hidden_layers": 3}, {"vocab_size": 301}, {"intermediate_size": 90},
                                    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0}}])
def test_models_that_are_no_such_olmo_are_refused(saved, tmp_path, change):
    export_to_transformers(saved[0], tmp_path / "olmo")
    config = json.loads((tmp_path / "olmo" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "olmo" / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    sentence(lambda: import_from_transformers(tmp_path / "olmo"))


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "3", '"olmo"', "{}", '{"model_type": "olmo"}'])
def test_a_config_that_is_none_is_refused(saved, tmp_path, content):
    export_to_transformers(saved[0], tmp_path / "olmo")
    (tmp_path / "olmo" / "config.json").write_text(content, encoding="utf-8")
    sentence(lambda: import_from_transformers(tmp_path / "olmo"))


def test_extra_weights_are_not_dropped_silently(saved, tmp_path):
    export_to_transformers(saved[0], tmp_path / "olmo")
    path = tmp_path / "olmo" / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.q_norm.weight": torch.ones(32)}, path)
    assert "do not fit" in sentence(lambda: import_from_transformers(tmp_path / "olmo"))


def test_an_interrupted_save_leaves_the_old_model_whole(saved, monkeypatch):
    folder, decoder = saved
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_model(folder / "new", decoder_of(decoder.config, seed=1), TOKENIZER)
    monkeypatch.undo()
    assert same(load_model(folder)[0], decoder) and not (folder / "new").exists()
    assert not list(folder.glob(".*.tmp"))


def test_the_end_token_goes_there_and_back_and_ends_completions(tmp_path):
    "A model of Transformers may end its texts with any token; graded on what runs on behind it, it would be graded wrongly."
    decoder = decoder_of(DecoderConfig(width=32, layers=2, heads=2, vocab_size=300, init_std=0.5, end_token=7))
    save_model(tmp_path / "ours", decoder, TOKENIZER)
    export_to_transformers(tmp_path / "ours", tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"] == TOKENIZER.id_to_token(7)
    imported, _ = import_from_transformers(tmp_path / "theirs")
    assert imported.config.end_token == 7
    drawn = generate(imported, [[1]], 300, SamplingConfig(max_new_tokens=60, temperature=1.5))
    assert drawn.ended.any() and not drawn.ended.all() and (drawn.tokens == 0).any()
    for row, length, ended in zip(drawn.tokens.tolist(), drawn.lengths.tolist(), drawn.ended.tolist(), strict=True):
        assert 7 not in row[:length - 1] and (row[length - 1] == 7) == ended


def test_an_end_token_outside_the_vocabulary_is_refused(saved, tmp_path):
    export_to_transformers(saved[0], tmp_path / "theirs")
    shape = tmp_path / "theirs" / "config.json"
    values = json.loads(shape.read_text(encoding="utf-8"))
    del values["eos_token_id"]
    shape.write_text(json.dumps(values), encoding="utf-8")
    (tmp_path / "theirs" / "tokenizer_config.json").unlink()                                # which would name it
    assert "end_token 50279 is outside the vocabulary of 300" in sentence(lambda: import_from_transformers(tmp_path / "theirs"))


# --- released checkpoints ------------------------------------------------------------------------------------------------

def llama_tokenizer() -> Tokenizer:
    "As Llama's: `<unk>`, `<s>`, `</s>` come first, `<s>` goes before every text, and a copy has a `<pad>` beyond the model's vocabulary."
    words = ["<unk>", "<s>", "</s>", *(chr(number) for number in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture
def released(tmp_path) -> Path:
    "A checkpoint as the paper's authors released theirs: the config calls token 0 the end and 1 the padding."
    entries = llama_tokenizer().get_vocab_size() - 1
    theirs = OlmoForCausalLM(OlmoConfig(**to_olmo_config(DecoderConfig(width=32, layers=2, heads=2, vocab_size=entries))))
    theirs.save_pretrained(tmp_path / "released")
    config = json.loads((tmp_path / "released" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "released" / "config.json").write_text(json.dumps(config | {"eos_token_id": 0, "pad_token_id": 1}), encoding="utf-8")
    save_tokenizer(tmp_path / "released", llama_tokenizer())
    return tmp_path / "released"


@pytest.mark.parametrize("told_by", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_texts_end_where_the_tokenizer_says(released, told_by):
    "Stopped by token 0, as the config has it, a released model would never stop."
    if told_by != "tokenizer.json":
        (released / told_by).write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "<s>"}), encoding="utf-8")
    decoder, tokenizer = load_model(released)
    stated = {token["content"]: token["id"] for token in json.loads((released / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]}
    assert decoder.config.end_token == stated["</s>"] == 2


def test_no_text_begins_with_a_token_that_was_never_read(released):
    tokenizer = load_model(released)[1]
    assert llama_tokenizer().encode("2 + 2").ids[0] == 1
    assert tokenizer.encode("2 + 2").ids == llama_tokenizer().encode("2 + 2").ids[1:]
    assert begin_tokens(tokenizer, True) == [1] and begin_tokens(tokenizer, False) == []
    assert 2 not in tokenizer.encode("a literal </s> stays text").ids


def test_an_end_token_survives_export_and_transformers(released, tmp_path):
    export_to_transformers(released, tmp_path / "ours")
    assert load_model(tmp_path / "ours")[0].config.end_token == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").config.eos_token_id == 2
    assert same(load_model(tmp_path / "ours")[0], load_model(released)[0])


def test_the_tokenizer_of_a_larger_model_is_refused(released):
    save_tokenizer(released, train_tokenizer(["Sam has 3 apples and eats 1."], 300))
    assert "tokenizer of another model" in sentence(lambda: load_model(released))


def test_pickles_are_refused_unless_asked_for_and_then_only_tensors_are_read(released, tmp_path):
    expected = load_model(released)[0]
    weights = load_file(released / "model.safetensors")
    (released / "model.safetensors").unlink()
    torch.save(weights, released / "pytorch_model.bin")
    assert "--pickles" in sentence(lambda: load_model(released))
    assert same(load_model(released, pickles=True)[0], expected)

    class Trap:
        def __reduce__(self):
            return Path(tmp_path / "sprung").touch, ()
    torch.save(weights | {"trap": Trap()}, released / "pytorch_model.bin")
    assert "could run code" in sentence(lambda: load_model(released, pickles=True))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name, layers", [("150M", 12), ("1B", 2)])
def test_the_papers_shapes_there_and_back(name, layers, tmp_path):
    "150M whole; 1B with two of its sixteen layers, which are all alike, because of the memory."
    config = DECODERS[name].model_copy(update={"layers": layers, "end_token": 2})
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        decoder = Decoder(config)
    shapes = {name: weight.shape for name, weight in decoder.state_dict().items()}
    weights = {name: torch.empty(shape).normal_(0, 0.02, generator=generator) for name, shape in shapes.items()}
    decoder.load_state_dict(weights, assign=True)
    save_model(tmp_path / "ours", decoder, TOKENIZER)
    export_to_transformers(tmp_path / "ours", tmp_path / "theirs")
    shutil.rmtree(tmp_path / "ours")
    assert same(load_model(tmp_path / "theirs")[0], decoder)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert sum(weight.numel() for weight in theirs.parameters()) == config.num_parameters and theirs.config.eos_token_id == 2
    tokens = torch.randint(config.vocab_size, (2, 12), generator=generator)
    with torch.no_grad():
        assert (decoder(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    shutil.rmtree(tmp_path / "theirs")


def test_the_papers_sizes_to_the_digit():
    small, large = DECODERS["150M"], DECODERS["1B"]
    assert (small.num_parameters, small.num_parameters - small.vocab_size * small.width) == (162_398_208, 137_822_208)
    assert large.num_parameters == 1_139_277_824
    assert (small.context, large.context, small.tied, large.tied) == (2048, 2048, False, True)
