"Rows of four kinds of file, read in parts: each once, whatever the boundaries."
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echochamber.core import StudyError
from echochamber.data.sources import (
    SOURCES,
    CorpusSource,
    jsonl_rows,
    make_document,
    parquet_rows,
    part_of,
    read_rows,
)

SOURCE = CorpusSource(name="mini", repository="owner/mini", files=("*",), kind="jsonl", columns=("text",), format="other")
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=12)


@given(TEXTS, st.integers(1, 40), st.sampled_from(["\n", "\r\n", "\n\n", " \n"]), st.booleans())
def test_each_line_is_in_one_part(texts, parts, ending, ended):
    lines = ending.join(json.dumps({"meta": number, "text": text}, ensure_ascii=False) for number, text in enumerate(texts))
    content = (lines + ending * ended).encode()
    rows = [row for part in range(parts) for row in jsonl_rows(SOURCE, io.BytesIO(content), part, parts, "mini")]
    assert rows == [(text,) for text in texts]


@given(TEXTS, st.integers(1, 6), st.integers(1, 5))
def test_each_row_group_is_in_one_part(texts, parts, group):
    file = io.BytesIO()
    pq.write_table(pa.table({"other": list(range(len(texts))), "text": pa.array(texts, pa.string())}), file, row_group_size=group)
    rows = [row for part in range(parts) for row in parquet_rows(SOURCE, io.BytesIO(file.getvalue()), part, parts, "mini")]
    assert rows == [(text,) for text in texts]


@given(st.integers(0, 10**12), st.integers(1, 2000))
def test_parts_are_nearly_equal_and_whole(count, parts):
    ranges = [part_of(count, part, parts) for part in range(parts)]
    assert ranges[0].start == 0 and ranges[-1].stop == count
    assert all(one.stop == other.start for one, other in zip(ranges, ranges[1:], strict=False))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize(("content", "sentence"), [
    (b'{"text": "a"}\n[1]\n', "byte 14: is not a JSON object"), (b'{"text": "a"}\n{"tex', "byte 14: is truncated or corrupt"),
    (b'{"text": "caf\xe9"}\n', "byte 0: is truncated or corrupt"), (b'{"txt": "a"}\n', "byte 0: has no column `text` .columns: txt")])
def test_a_line_that_is_no_row_is_named(tmp_path, content, sentence):
    Path(tmp_path, "lines").write_bytes(content)
    with pytest.raises(StudyError, match=f"owner/mini/lines, {sentence}"):
        list(read_rows(SOURCE, str(tmp_path), "lines"))


@given(st.text(st.characters()))  # lone surrogates included
def test_a_document_can_be_written_or_is_rejected(text):
    document, reason = make_document((text,))
    assert (document, reason) in {(text, ""), ("", "empty"), ("", "half a character")} and document.encode() is not None


def test_the_catalogue_names_each_source_of_the_paper_once():
    ours = [source for source in SOURCES.values() if not source.name.endswith("-released")]
    assert len({source.repository for source in ours}) == len(ours) == 6
    assert {source.format for source in ours} == {"tinygsm", "omi1", "omi2", "other"}
