"""Mixtures of every kind: shares, nesting, repetition, held-out questions."""
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from echochamber.core import StudyError
from echochamber.data.corpora import (
    MIXTURES,
    PRETOKEN,
    MixtureConfig,
    SourceConfig,
    build_corpus,
    corpus_hash,
    find_pretokens,
)
from echochamber.data.formats import recognise
from echochamber.data.problems import split_of

SOURCES = MIXTURES["equal"]()
WEIGHTS = st.sampled_from([0.0, 0.5, 1.0, 3.0])


@given(st.tuples(WEIGHTS, WEIGHTS, WEIGHTS), WEIGHTS, st.sampled_from([1, 2, 4, 8]), st.integers(0, 3))
def test_shares_and_nesting_hold_for_every_mixture(weights, background, repeat, seed):
    if not any(weights) and not background:
        return
    sources = tuple(source.model_copy(update={"weight": weight, "repeat": repeat if source.format == "tinygsm" else 1})
                    for source, weight in zip(SOURCES, weights, strict=True))
    large = MixtureConfig(sources=sources, background=background, tokens=20_000, seed=seed)
    corpus, half = build_corpus(large), build_corpus(large.model_copy(update={"tokens": 10_000}))
    for split in corpus:
        assert corpus[split].select(range(len(half[split]))).to_dict() == half[split].to_dict()
    for rows in (corpus["train"].to_pandas(), half["train"].to_pandas()):
        used = rows.groupby("source").tokens.sum()
        assert set(used.index) == set(large.shares)
        for name, share in large.shares.items():
            assert abs(used[name] - share * used.sum()) < 2 * rows.tokens.max()


def test_a_source_is_the_same_in_every_mixture():
    alone = build_corpus(MixtureConfig(sources=SOURCES[:1], tokens=20_000))["train"]
    mixed = build_corpus(MixtureConfig(sources=SOURCES, tokens=30_000))["train"].filter(lambda row: row["source"] == SOURCES[0].name)
    assert 0 < len(mixed) < len(alone) and mixed["text"][:] == alone["text"][:len(mixed)]


@pytest.mark.parametrize("repeat", [2, 4, 8])
def test_each_document_occurs_as_often_as_declared(repeat):
    mixture = MixtureConfig(sources=(SOURCES[1].model_copy(update={"repeat": repeat}),), tokens=200_000)
    counts = Counter(build_corpus(mixture)["train"]["text"])
    exact = sum(count % repeat == 0 for count in counts.values()) / len(counts)
    assert exact > 0.75 and max(counts.values()) <= 3 * repeat  # the last block may be cut; easy questions may come twice


def test_repetition_keeps_the_budget_and_moves_the_share():
    def share(repeat):
        mixture = MixtureConfig(sources=(SOURCES[0].model_copy(update={"repeat": repeat}), *SOURCES[1:]), tokens=60_000)
        rows = build_corpus(mixture)["train"].to_pandas()
        assert 60_000 <= rows.tokens.sum() < 60_300
        return rows[rows.source == SOURCES[0].name].tokens.sum() / rows.tokens.sum()
    assert [round(share(repeat), 2) for repeat in (1, 2, 4)] == [0.33, 0.5, 0.67]


def test_held_out_questions_are_never_trained_on_nor_asked():
    corpus = build_corpus(MixtureConfig(sources=SOURCES, tokens=150_000, held_out=0.1))
    question = lambda row: row["text"].split("\n\n")[0]
    questions = {split: set(map(question, rows)) for split, rows in corpus.items()}
    assert not questions["train"] & questions["held_out"]
    assert {split_of(text) for split in questions.values() for text in split} == {"pretrain"}
    assert len(set(Counter(corpus["held_out"]["source"]))) == 3


def test_no_held_out_share_is_allowed():
    corpus = build_corpus(MixtureConfig(sources=SOURCES, tokens=2_000, held_out=0))
    assert len(corpus["held_out"]) == 0 and len(corpus["train"]) > 0


def test_only_background_has_no_format():
    corpus = build_corpus(MixtureConfig(background=1, tokens=20_000))["train"]
    assert set(map(recognise, corpus["text"])) == {"other"} and set(corpus["source"]) == {"mini-text"}


def test_the_hash_changes_with_the_content_only():
    mixture = MixtureConfig(sources=SOURCES, tokens=5_000)
    base = corpus_hash(build_corpus(mixture))
    assert base == corpus_hash(build_corpus(mixture.model_copy(update={"background": 0.0})))
    for change in ({"tokens": 6_000}, {"background": 1.0}, {"sources": SOURCES[::-1]}, {"held_out": 0.2}):
        assert corpus_hash(build_corpus(mixture.model_copy(update=change))) != base


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_pieces_are_lossless(text):
    assert "".join(find_pretokens(text)) == text


@given(st.text(st.sampled_from("aZé_ 12\n\t.,<>={}\\?'\"-")))
def test_the_tokenizers_engine_splits_alike(text):
    split = pre_tokenizers.Split(Regex(PRETOKEN), "isolated").pre_tokenize_str(text)
    assert [piece for piece, _ in split] == find_pretokens(text)


@pytest.mark.parametrize("values, word", [
    ({}, "weight"), ({"sources": [{"name": "a", "format": "omi1", "weight": 0}]}, "weight"), ({"background": -1}, "background"),
    ({"background": 1, "tokens": 0}, "tokens"), ({"sources": [{"name": "a", "format": "omi3"}]}, "format"),
    ({"sources": [{"name": "a", "format": "omi1"}] * 2}, "differ"), ({"sources": [{"name": "mini-text", "format": "omi1"}]}, "differ"),
    ({"background": 1, "held_out": 0.9}, "held_out"), ({"background": 1, "ratio": 0.9}, "ratio"),
    ({"sources": [{"name": "a", "format": "omi1", "repeat": 0}]}, "repeat"),
    ({"sources": [{"name": "a", "format": "omi1", "style": {"wrong_families": ["x"]}}]}, "unknown families")])
def test_a_bad_mixture_is_one_sentence(values, word):
    with pytest.raises(StudyError, match=word) as caught:
        MixtureConfig.parse(values)
    assert "\n" not in str(caught.value)


def test_sources_of_one_seed_differ():
    first, second = (SourceConfig(name=name, format="omi2") for name in "ab")
    rows = build_corpus(MixtureConfig(sources=(first, second), tokens=10_000))["train"].to_pandas()
    texts = rows.groupby("source").text.agg(set)
    assert len(texts["a"] & texts["b"]) < 0.05 * len(rows)
