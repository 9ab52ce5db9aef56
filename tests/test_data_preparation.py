"Six miniatures become files of tokens: every row once, whatever dies in between, and one sentence for whatever is wrong."
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from huggingface_hub.errors import GatedRepoError
from hypothesis import given
from hypothesis import strategies as st
from miniatures import AWKWARD, LONG, REJECTED, WRITERS, miniature_config, rows_of, write_mirror
from tokenizers import Tokenizer

from echochamber.core import StudyError, project_root
from echochamber.data import files, preparation
from echochamber.data.files import patiently
from echochamber.data.preparation import (
    corpus_fingerprint,
    plan_corpus,
    prepare,
    processes,
    read_manifest,
    training_tokens,
)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Path:
    return write_mirror(tmp_path_factory.mktemp("mirror"))


@pytest.fixture(scope="module")
def undisturbed(mirror, tmp_path_factory) -> Path:
    return prepare(miniature_config(mirror), tmp_path_factory.mktemp("corpora") / "corpus", str(mirror))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def documents_of(folder: Path, source: str) -> list[str]:
    "The documents that the files of a source hold, decoded."
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = np.concatenate([np.fromfile(path, "<u2") for path in sorted((folder / source).glob("*.bin"))])
    return [tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False)
            for part in np.split(tokens, np.flatnonzero(tokens == 2) + 1)[:-1]]


def spoken(text: str) -> str:
    "What a document reads like: `▁` stands for a space."
    return text.replace("▁", " ")


# --- what is prepared ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("source", "format"), [("tinygsm", "tinygsm"), ("omi1", "omi1"), ("omi2", "omi2")])
def test_every_row_is_a_document_once(undisturbed, source, format):
    expected = Counter(spoken(f"{question}\n\n{solution}") for question, solution in rows_of(format, 120, 0))
    assert Counter(documents_of(undisturbed, source)) == expected


def test_the_longest_document_and_literal_tokens_survive(undisturbed):
    documents = documents_of(undisturbed, "finemath")
    assert max(map(len, documents)) == LONG and {spoken(text) for text in AWKWARD} <= set(documents)


def test_the_manifest_counts_what_happened(undisturbed, mirror):
    manifest = read_manifest(undisturbed)
    assert len(manifest) == len(plan_corpus(miniature_config(mirror), str(mirror)).units) > 40
    for source, lines in manifest.groupby("source"):
        rejected = sum(map(Counter, lines.rejected), Counter())
        assert rejected == REJECTED[source] and lines.rows.sum() == lines.documents.sum() + rejected.total()
        assert 0 < (lines.tokens - lines.training_tokens).sum() < 0.2 * lines.tokens.sum()
    assert sum(map(Counter, manifest.contaminated), Counter())["mini-gsm"] > 0
    assert set(manifest.revision) == {"mirror"}


def test_the_manifest_names_what_sha256sum_says(undisturbed):
    line = read_manifest(undisturbed).iloc[0]
    said = subprocess.run(["sha256sum", undisturbed / line.file], capture_output=True, text=True, check=True).stdout
    assert said.split()[0] == line.sha256


def test_subsets_of_openmathinstruct2_are_a_variant_of_their_own(mirror):
    plans = [plan_corpus(miniature_config(mirror, sources=[preparation.choose_source(name)]), str(mirror))
             for name in ("omi2", "omi2-released")]
    ours, released = ({unit.path for unit in plan.units} for plan in plans)
    assert ours < released and not [path for path in ours if "train_" in path] and len(released) == len(ours) + 3


def test_incorrect_solutions_are_not_read(mirror):
    plan = plan_corpus(miniature_config(mirror), str(mirror))
    assert {unit.path for unit in plan.units if unit.source == "omi1"} == {"correct_solutions/train.jsonl"}


def test_files_are_chosen_by_seed_and_nested(mirror):
    def files(seed: int, tokens: int | None) -> list[tuple]:
        choice = preparation.choose_source("finemath").model_copy(update={"tokens": tokens})
        plan = plan_corpus(miniature_config(mirror, sources=[choice], seed=seed), str(mirror))
        return [(unit.path, unit.part) for unit in plan.units]
    few, many, whole = files(0, 1_000), files(0, 20_000), files(0, None)
    assert len(few) < len(many) < len(whole) and few == many[:len(few)] and many == whole[:len(many)]
    assert sorted(files(1, None)) == sorted(whole) != whole and files(1, None) != whole != sorted(whole)


def test_contaminated_documents_can_be_left_out(mirror, undisturbed, tmp_path):
    clean = prepare(miniature_config(mirror, drop_contaminated=True), tmp_path / "clean", str(mirror))
    before, after = read_manifest(undisturbed), read_manifest(clean)
    assert after.dropped.sum() == before.documents.sum() - after.documents.sum() > 0
    assert list(before.contaminated) == list(after.contaminated)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.floats(0, 0.5))
def test_the_tail_begins_with_a_document_and_is_no_longer_than_asked(lengths, held_out):
    ends = np.cumsum(lengths)
    kept = training_tokens(ends, held_out)
    assert kept in {0, *ends} and ends[-1] - kept <= held_out * ends[-1] + 1e-9


# --- killed and continued -----------------------------------------------------------------------------------------------

def slowly(mirror: Path, folder: Path, at_work) -> None:
    "Prepare with a pause at every row, so that most kills fall into the middle of a unit."
    original = preparation.make_document

    def make_document(values):
        at_work.set()
        time.sleep(0.003)
        return original(values)

    preparation.make_document = make_document
    prepare(miniature_config(mirror), folder, str(mirror))


def test_ten_kills_change_nothing(mirror, undisturbed, tmp_path):
    "Three of them while it starts, the others while rows are read."
    folder, rng, halves, context = tmp_path / "corpus", random.Random(0), 0, multiprocessing.get_context("fork")
    for kill in range(10):
        at_work = context.Event()
        process = context.Process(target=slowly, args=(mirror, folder, at_work))
        process.start()
        if kill >= 3:
            assert at_work.wait(30)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it had finished before it was killed"
        halves += len(list(folder.rglob(".*.tmp")))
        assert not (folder / "manifest.jsonl").exists()
    assert halves, "no kill fell into the middle of a unit"
    assert contents(prepare(miniature_config(mirror), folder, str(mirror))) == contents(undisturbed)


def test_processes_do_the_same(mirror, undisturbed, tmp_path):
    with processes(2) as mapping:
        folder = prepare(miniature_config(mirror), tmp_path / "corpus", str(mirror), mapping)
    assert contents(folder) == contents(undisturbed)


PARALLEL = """
import signal, sys
sys.path.insert(0, "tests")
from pathlib import Path
from miniatures import miniature_config
from echochamber.data.preparation import prepare, processes
if __name__ == "__main__":
    mirror, folder = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
    def hold(done, units, line):
        print(done, flush=True)
        sys.stdin.read()  # the second unit is not waited for
    with processes(2) as mapping:
        prepare(miniature_config(Path(mirror)), folder, mirror, mapping, hold)
"""


@pytest.mark.parametrize("deadly", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_one_that_started_them(mirror, undisturbed, tmp_path, deadly):
    script = tmp_path / "parallel.py"
    script.write_text(PARALLEL, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": f"{project_root()}{os.pathsep}{project_root() / 'tests'}"}
    process = subprocess.Popen([sys.executable, script, mirror, tmp_path / "corpus"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=project_root(), env=environment)
    assert process.stdout.readline().strip() == "1"
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(deadly)
    process.wait(30)
    assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=10)[1]
    assert not (tmp_path / "corpus/manifest.jsonl").exists()
    assert contents(prepare(miniature_config(mirror), tmp_path / "corpus", str(mirror))) == contents(undisturbed)


def test_two_do_not_prepare_the_same_corpus(mirror, tmp_path):
    def another(function, units):
        with pytest.raises(StudyError, match="another process"):
            prepare(miniature_config(mirror), tmp_path / "corpus", str(mirror))
        return map(function, units)
    prepare(miniature_config(mirror, sources=[preparation.choose_source("metamath")]), tmp_path / "corpus", str(mirror), another)


# --- what is wrong ------------------------------------------------------------------------------------------------------

def damaged(mirror: Path, tmp_path: Path, source: str) -> tuple[Path, Path]:
    "A mirror of one source, and its file that is read first."
    copy = tmp_path / "mirror"
    WRITERS[source](copy, 60, 0)
    shutil.copytree(mirror / "tokenizer", copy / "tokenizer")
    config = miniature_config(copy, sources=[preparation.choose_source(source)])
    plan = plan_corpus(config, str(copy))
    return config, copy, copy / plan.source(source).repository / plan.units[0].path


@pytest.mark.parametrize("source", WRITERS)
def test_a_truncated_file_is_one_sentence(mirror, tmp_path, source):
    config, copy, file = damaged(mirror, tmp_path, source)
    plan = plan_corpus(config, str(copy))
    os.truncate(file, file.stat().st_size - 50)
    with pytest.raises(StudyError, match=rf"{file.name}.*truncated") as refused:  # before it was planned
        prepare(config, tmp_path / "first", str(copy))
    assert str(refused.value).count("\n") == 0 and not list((tmp_path / "first").rglob(".*.tmp"))
    (tmp_path / "second").mkdir()
    preparation.begin(plan, tmp_path / "second", str(copy))
    with pytest.raises(StudyError, match=rf"{file.name}: has [\d,]+ bytes and had"):  # and after
        prepare(config, tmp_path / "second", str(copy))


@pytest.mark.parametrize("source", WRITERS)
def test_a_renamed_column_is_one_sentence(mirror, tmp_path, source):
    config, copy, _ = damaged(mirror, tmp_path, source)
    chosen = config.sources[0].source
    renamed = chosen.model_copy(update={"columns": (*chosen.columns[:-1], "former_name")})
    config = miniature_config(copy, sources=[{"source": renamed.model_dump()}])
    with pytest.raises(StudyError, match="has no column `former_name` .columns: .*") as refused:
        prepare(config, tmp_path / "corpus", str(copy))
    assert chosen.columns[-1] in str(refused.value) and not list((tmp_path / "corpus").rglob("*.bin"))


def test_a_full_disk_is_found_before_anything_is_written(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StudyError, match="need about .* bytes .*, 1k bytes are free"):
        prepare(miniature_config(mirror), tmp_path / "corpus", str(mirror))
    assert not list((tmp_path / "corpus").iterdir())


def response(status: int, **headers) -> SimpleNamespace:
    return SimpleNamespace(status_code=status, headers=headers, request=None, url="https://huggingface.co")


def test_too_many_requests_are_waited_for_in_the_middle_of_a_unit(mirror, undisturbed, tmp_path, monkeypatch):
    said, slept, read_rows = [], [], preparation.read_rows

    def limited(*arguments):
        for number, row in enumerate(read_rows(*arguments)):
            if number == 20 and len(said) < 2:
                error = OSError("429 Client Error")
                error.response = response(429, **{"Retry-After": "17"})
                raise error
            yield row

    monkeypatch.setattr(preparation, "read_rows", limited)
    monkeypatch.setattr(preparation, "patiently", partial(patiently, say=said.append, sleep=slept.append))
    assert contents(prepare(miniature_config(mirror), tmp_path / "corpus", str(mirror))) == contents(undisturbed)
    assert slept == [18, 18] and "asks to wait 17 s" in said[0]


@pytest.mark.parametrize(("error", "sentence"), [
    (OSError(-2, "Name or service not known"), "cannot be reached .*--mirror or ECHOCHAMBER_HUB"),
    (ConnectionError("offline"), "cannot be reached"),
    (GatedRepoError("403", response=response(403)), "is gated; accept its terms"),
    (FileNotFoundError(), "does not exist there"),
])
def test_a_hub_that_does_not_answer_is_one_sentence(error, sentence, tmp_path, mirror, monkeypatch):
    class Hub:
        def repo_info(self, *_, **__):
            raise error
    monkeypatch.delenv("ECHOCHAMBER_HUB", raising=False)
    monkeypatch.setattr(files, "HfApi", Hub)
    with pytest.raises(StudyError, match=f"TinyGSM/TinyGSM@main: {sentence}"):
        prepare(miniature_config(mirror), tmp_path / "corpus")
    assert not list((tmp_path / "corpus").iterdir())


def test_main_may_move_on_while_a_corpus_is_prepared(mirror, tmp_path, monkeypatch):
    "What was begun at one commit is ended at it."
    commits = iter(["a" * 40] * 6 + ["b" * 40] * 6)
    monkeypatch.setattr(preparation, "resolve_revision", lambda *_: next(commits))

    def breaks_off(function, units):
        yield function(units[0])
        raise InterruptedError

    with contextlib.suppress(InterruptedError):
        prepare(miniature_config(mirror), tmp_path / "corpus", str(mirror), breaks_off)
    manifest = read_manifest(prepare(miniature_config(mirror), tmp_path / "corpus", str(mirror)))
    assert set(manifest.revision) == {"a" * 40}


def test_another_corpus_is_left_alone(mirror, undisturbed):
    before = contents(undisturbed)
    with pytest.raises(StudyError, match="another config"):
        prepare(miniature_config(mirror, seed=1), undisturbed, str(mirror))
    assert contents(undisturbed) == before


def test_a_damaged_file_is_found_and_mended(mirror, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "corpus")
    name, fingerprint = read_manifest(undisturbed).file[3], corpus_fingerprint(undisturbed)
    for damage in (lambda path: os.truncate(path, 2), Path.unlink):
        damage(tmp_path / "corpus" / name)
        with pytest.raises(StudyError, match=name):
            read_manifest(tmp_path / "corpus")
        prepare(miniature_config(mirror), tmp_path / "corpus", str(mirror))
        assert corpus_fingerprint(tmp_path / "corpus") == fingerprint
    (tmp_path / "corpus/manifest.jsonl").write_text('{"file": "tru')
    with pytest.raises(StudyError, match="not completely prepared"):
        read_manifest(tmp_path / "corpus")


def test_each_line_of_the_manifest_is_json(undisturbed):
    lines = (undisturbed / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    assert all({"source", "repository", "revision", "path", "rows", "rejected", "tokens", "sha256"} <= set(json.loads(line)) for line in lines)
