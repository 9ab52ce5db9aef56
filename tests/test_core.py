"What every room needs: errors that name their mend, hashes, strict configs, files that are whole or absent."
import errno
import json
import os
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from echochamber.core import (
    StrictConfig,
    atomic_path,
    content_hash,
    outputs_folder,
    project_root,
    read_json,
    refused,
    write_frame,
    write_json,
    write_text,
)

PARTS = st.lists(st.text(max_size=4) | st.binary(max_size=4), max_size=4)


class Inner(StrictConfig):
    rate: float = Field(0.1, gt=0, description="of learning")


class Outer(StrictConfig):
    inner: Inner = Inner()
    steps: int = Field(3, description="steps to take")


@given(PARTS, PARTS)
def test_a_hash_tells_where_one_part_ends(first, second):
    encoded = [[part if isinstance(part, bytes) else part.encode() for part in parts] for parts in (first, second)]
    assert (content_hash(*first) == content_hash(*second)) == (encoded[0] == encoded[1])


def test_a_file_counts_by_its_content(tmp_path):
    (tmp_path / "one").write_bytes(b"same"), (tmp_path / "two").write_bytes(b"same")
    assert content_hash(tmp_path / "one") == content_hash(tmp_path / "two") == content_hash("same")
    assert len(content_hash()) == 12


def test_a_config_refuses_what_it_does_not_know_all_at_once():
    sentence = refused(Outer.parse, {"stepz": 4, "inner": {"rate": -1}}, "toy.json")
    assert sentence.startswith("toy.json: ") and "unknown key `stepz`" in sentence and "`inner.rate`: " in sentence
    assert Outer().hash == Outer(steps=3).hash != Outer(steps=4).hash
    assert Outer.parse(json.loads(Outer(steps=5).model_dump_json())) == Outer(steps=5)
    with pytest.raises(ValueError, match="frozen"):
        Outer().steps = 4


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff", b"[1]", b"3"])
def test_a_config_that_cannot_be_read_is_one_sentence_with_its_name(tmp_path, content):
    if content is not None:
        (tmp_path / "toy.json").write_bytes(content)
    sentence = refused(Outer.load, tmp_path / "toy.json")
    assert "toy.json" in sentence and "\n" not in sentence


def test_what_is_written_is_whole_or_absent(tmp_path):
    target = tmp_path / "deep" / "file"
    write_text(target, "first")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "first" and os.listdir(target.parent) == ["file"]


def test_a_folder_takes_the_place_of_a_folder(tmp_path):
    for name in ("old", "new"):
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert os.listdir(tmp_path / "folder") == ["new"] and os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota"), RuntimeError("No space left on device")])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, error):
    def write() -> None:
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise error
    assert "no space left on the disk" in refused(write) and not os.listdir(tmp_path)


def test_tables_and_texts_come_back(tmp_path):
    table = pd.DataFrame({"one": [1, 2], "two": ["Zoë", "数"]})
    write_frame(tmp_path / "table.parquet", table), write_json(tmp_path / "values.json", {"name": "Größe"})
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), table)
    assert read_json(tmp_path / "values.json") == {"name": "Größe"} and "Größe" in (tmp_path / "values.json").read_text(encoding="utf-8")


def test_outputs_lie_in_the_project_or_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.delenv("ECHOCHAMBER_OUTPUTS", raising=False)
    assert outputs_folder() == project_root() / "outputs" and (project_root() / "settings.ini").exists()
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path))
    assert outputs_folder() == Path(tmp_path)
