"Rows of a prepared corpus: each token a target once, budgets nested, repetition exact."
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from miniatures import miniature_config, write_mirror

from echochamber.core import StudyError
from echochamber.data.preparation import corpus_fingerprint, prepare, read_manifest
from echochamber.data.token_files import FileRows, MixtureRows, PreparedMixtureConfig, open_mixture, wanted_rows
from echochamber.data.tokens import PackedData, pack_documents


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    mirror = write_mirror(tmp_path_factory.mktemp("mirror"))
    return prepare(miniature_config(mirror, unit_bytes=30_000), mirror / "corpus", str(mirror))


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(1, 9))
def test_rows_of_files_are_those_of_packing(tmp_path_factory, lengths, context):
    "Each file by itself, as `pack_documents` packs it; its end token is 0, a corpus's is 2."
    folder, expected, first = tmp_path_factory.mktemp("files"), [], 1
    for number, length in enumerate(lengths):
        tokens = [*range(first, first + length), 0]
        np.array(tokens, "<u2").tofile(folder / str(number))
        expected += pack_documents([tokens[:-1]], context).tolist()
        first += length
    rows = FileRows([folder / str(number) for number in range(len(lengths))], [0] * len(lengths), [n + 1 for n in lengths], context)
    assert [rows.window(row).tolist() for row in range(len(rows))] == expected


class Numbered:
    "Rows of a source that hold their own number."

    def __init__(self, name: str, count: int):
        self.name, self.count = name, count

    def __len__(self) -> int:
        return self.count

    def window(self, row: int) -> np.ndarray:
        return np.array([row], np.uint16)


def multiset(rows: MixtureRows) -> Counter:
    return Counter((rows.names[source], row) for source, row in map(rows.address, range(len(rows))))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(1, 400), st.integers(1, 400), st.integers(0, 3))
def test_a_smaller_budget_is_contained_in_a_larger(few, many, repeat, small, large, seed):
    sources = {"few": Numbered("few", few), "many": Numbered("many", many)}
    config = PreparedMixtureConfig(corpus="", sources=[{"name": "few", "repeat": repeat}, {"name": "many"}])
    mixtures = []
    for tokens in sorted((small, large)):
        counts = wanted_rows({"few": few, "many": many}, config.model_copy(update={"tokens": tokens * 4}), context=4)
        mixtures.append(multiset(MixtureRows(sources, counts, 4, seed)))
    assert mixtures[0] <= mixtures[1]


@given(st.integers(1, 30), st.integers(1, 4))
def test_repetition_reads_every_row_so_often(rows, repeat):
    config = PreparedMixtureConfig(corpus="", sources=[{"name": "a", "repeat": repeat}])
    mixture = MixtureRows({"a": Numbered("a", rows)}, wanted_rows({"a": rows}, config, 4), 4)
    assert multiset(mixture) == Counter({("a", row): repeat for row in range(rows)})


def test_another_seed_is_another_choice_of_the_same_size():
    source = {"a": Numbered("a", 1000)}
    first, second = (multiset(MixtureRows(source, {"a": 300}, 4, seed)) for seed in (0, 1))
    assert len(first) == len(second) == 300 and 50 < len(first & second) < 130  # 90 by chance


def test_training_and_tails_share_nothing(corpus):
    manifest = read_manifest(corpus)
    rows, held_out = open_mixture(PreparedMixtureConfig(corpus=str(corpus), held_out_rows=10_000), context=16)
    assert len(rows) == sum(np.maximum(0, (manifest.training_tokens - 1) // 16)) and set(held_out) == set(manifest.source)
    for line in manifest[manifest.training_tokens > 0].itertuples():
        tokens = np.fromfile(corpus / line.file, "<u2")
        assert tokens[line.training_tokens - 1] == 2, "a tail begins with a document"


def test_weights_change_shares_and_not_the_budget(corpus):
    def share(weight: float) -> tuple[float, int]:
        config = PreparedMixtureConfig(corpus=str(corpus), tokens=60_000, sources=[
            {"name": "tinygsm", "weight": weight}, {"name": "algebraic-stack", "weight": 1 - weight}])
        rows, _ = open_mixture(config, context=32)
        return np.mean([rows.address(index)[0] == rows.names.index("tinygsm") for index in range(len(rows))]), len(rows)
    for weight in (0.1, 0.3, 0.7):
        found, length = share(weight)
        assert abs(found - weight) < 0.002 and abs(length - 60_000 / 32) <= 2


def test_a_batch_is_a_pure_function_of_the_step(corpus):
    mixture = PreparedMixtureConfig(corpus=str(corpus), corpus_hash=corpus_fingerprint(corpus))
    (one, _), (two, _) = (open_mixture(mixture, context=64) for _ in range(2))
    assert (PackedData(one, 8, seed=1).batch(7) == PackedData(two, 8, seed=1).batch(7)).all()


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"corpus_hash": "0" * 12}, "is another corpus"), ({"sources": [{"name": "omi3"}]}, "holds no source `omi3`"),
    ({"tokens": 100}, "100 tokens leave `.*` no row"), ({"corpus": "nowhere"}, "holds no prepared corpus; run `echochamber data prepare`")])
def test_what_does_not_fit_is_one_sentence(corpus, changes, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path))
    with pytest.raises(StudyError, match=sentence):
        open_mixture(PreparedMixtureConfig.parse({"corpus": str(corpus)} | changes), 64)


def test_a_source_that_fills_no_row_is_refused(corpus):
    with pytest.raises(StudyError, match="do not fill one row of 1000000 tokens"):
        open_mixture(PreparedMixtureConfig(corpus=str(corpus)), 1_000_000)
