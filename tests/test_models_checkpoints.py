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
from transformers import OlmoConfig, OlmoForCausalLM

from echochamber.core import StudyError
from echochamber.data.tokens import save_tokenizer, train_tokenizer
from echochamber.models.checkpoints import export_to_transformers, import_from_transformers, load_model, save_model
from echochamber.models.decoder import Decoder, DecoderConfig
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
    assert "end_token 50279 is outside the vocabulary of 300" in sentence(lambda: import_from_transformers(tmp_path / "theirs"))
