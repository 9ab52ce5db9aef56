"The Llama-2 tokenizer as documents are read: exactly its tokens, for any text, whichever boundaries are cut at."
import hashlib
import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from miniatures import AWKWARD, rows_of
from tokenizers import Tokenizer

from echochamber.core import StudyError
from echochamber.data.llama import (
    COARSE,
    FINE,
    PieceEncoder,
    as_read_here,
    entries_of,
    exact_pattern,
    pieces_of,
    read_llama_tokenizer,
    sentencepiece_entries,
    train_llama_tokenizer,
)

TEXTS = [text for format in ("tinygsm", "omi1", "omi2") for pair in rows_of(format, 80, 0) for text in pair]
PUBLISHED = train_llama_tokenizer(TEXTS, 900)
TOKENIZER = as_read_here(PUBLISHED)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
# what merges could reach across: spaces, digits, signs and letters of several scripts side by side
CROWDED = st.text("ab1.,_▁ \n\té”–漢()</s>", max_size=60)


def mixed() -> Tokenizer:
    "A tokenizer one of whose entries mixes letters with punctuation, as merged from them."
    state = json.loads(PUBLISHED.to_str())
    for entry in ("s", "'", "'s"):
        state["model"]["vocab"].setdefault(entry, len(state["model"]["vocab"]))
    state["model"]["merges"].append(["'", "s"])
    return as_read_here(Tokenizer.from_str(json.dumps(state)))


ENCODERS = {"fine": (TOKENIZER, PieceEncoder(TOKENIZER, limit=200)), "coarse": (mixed(), PieceEncoder(mixed(), limit=200))}


def test_each_tokenizer_gets_the_finest_exact_pattern():
    assert exact_pattern(ENCODERS["fine"][0]) is FINE and exact_pattern(ENCODERS["coarse"][0]) is COARSE
    fine = PieceEncoder(mixed())
    fine.pattern = FINE
    assert fine.encode("it's") != ENCODERS["coarse"][1].encode("it's"), "the pattern matters"


@pytest.mark.parametrize("kind", ENCODERS)
@given(TEXT | CROWDED | st.sampled_from(AWKWARD))
def test_the_encoder_gives_the_tokens_of_the_tokenizer(kind, text):
    tokenizer, encoder = ENCODERS[kind]
    assert np.frombuffer(encoder.encode(text), "<u2").tolist() == [*tokenizer.encode(text).ids, 2]


@given(TEXT | CROWDED)
def test_nothing_is_lost_between_pieces(text):
    for pattern in (FINE, COARSE):
        assert "".join(pieces_of(text, pattern)) == ("▁" + text.replace(" ", "▁") if text else "")


@given(TEXT.map(lambda text: text.replace("▁", "")))
def test_every_text_survives_and_holds_no_special_token(text):
    tokens = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(tokens) == text and not {1, 2} & set(tokens)


@given(TEXT.map(str.rstrip), TEXT)
def test_the_tokens_of_a_prompt_begin_those_of_its_document(question, solution):
    prompt = TOKENIZER.encode(question).ids
    assert TOKENIZER.encode(f"{question}\n\n{solution}").ids[:len(prompt)] == prompt


@pytest.mark.parametrize("text", ["a" * 1_000_000, "+-" * 500_000, "one two. " * 111_111, "漢" * 1_000_000],
                         ids=["one piece", "signs", "words", "bytes"])
def test_a_million_characters_are_not_quadratic(text):
    encoder, seconds = PieceEncoder(TOKENIZER), []
    for part in (text[:100_000], text):
        start = time.process_time()
        encoder.encode(part)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 30 * seconds[0] + 1  # a hundred times, were it quadratic


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def model_file(entries: list[str]) -> bytes:
    fields = [b"\x0a" + varint(len(text := entry.encode())) + text + b"\x15\0\0\0\0" for entry in entries]
    return b"".join(b"\x0a" + varint(len(field)) + field for field in fields) + b"\x12\x00"


@given(st.lists(TEXT, max_size=20))
def test_entries_of_a_sentencepiece_file_are_read(entries):
    assert sentencepiece_entries(model_file(entries)) == entries


def test_the_file_that_is_loaded_has_to_belong_to_the_one_that_is_known(tmp_path):
    PUBLISHED.save(str(tmp_path / "tokenizer.json"))
    model = model_file(entries_of(PUBLISHED))
    with pytest.raises(StudyError, match=r"tokenizer.model: does not exist"):
        read_llama_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(model)
    with pytest.raises(StudyError, match="SHA-256 begins with .* not with 9e556afd4421"):
        read_llama_tokenizer(tmp_path)
    digest = hashlib.sha256(model).hexdigest()
    assert read_llama_tokenizer(tmp_path, digest).to_str() == TOKENIZER.to_str()
    train_llama_tokenizer(TEXTS, 500).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(StudyError, match="other entries than the tokenizer.model"):
        read_llama_tokenizer(tmp_path, digest)


def test_transformers_reads_the_same_tokens(tmp_path):
    "An independent reading of the published file, beginning of text taken off."
    from transformers import PreTrainedTokenizerFast
    PUBLISHED.save(str(tmp_path / "tokenizer.json"))
    peer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert peer(text, add_special_tokens=False, split_special_tokens=True).input_ids == TOKENIZER.encode(text).ids
        assert peer(text, split_special_tokens=True).input_ids == [1, *TOKENIZER.encode(text).ids]
