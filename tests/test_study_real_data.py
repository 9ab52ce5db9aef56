"Real benchmarks and corpora before the work: what is looked for, what a run is named by, and that a refusal leaves nothing."
import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from miniatures import miniature_config, write_gsm8k, write_mirror

from echochamber.core import StudyError
from echochamber.data import preparation
from echochamber.data.benchmarks import load_benchmark
from echochamber.data.preparation import choose_source, prepare, read_manifest
from echochamber.models.checkpoints import save_model
from echochamber.models.decoder import Decoder, DecoderConfig
from echochamber.study import real_data
from echochamber.study.checkpoint_evaluation import plan_evaluation
from echochamber.study.cli import status_of
from echochamber.study.real_data import benchmark_file, corpus_plan, prepare_corpus


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Path:
    write_gsm8k(mirror := write_mirror(tmp_path_factory.mktemp("mirror"), rows=40, names=("metamath", "tinygsm")))
    return mirror


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


def config_of(mirror: Path, **changes):
    return miniature_config(mirror, **({"sources": [choose_source("metamath"), choose_source("tinygsm")], "benchmarks": ["mini-gsm", "gsm8k"]} | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sentence(action, *arguments, **options) -> str:
    with pytest.raises(StudyError) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def hub_with(mirror: Path) -> SimpleNamespace:
    "A client that hands out the folders of a mirror."
    return SimpleNamespace(snapshot_download=lambda name, repo_type: str(mirror / name), dataset_info=lambda name: name)


def offline(*arguments, **options):
    raise ConnectionError("no route to host\nwith details")


# --- benchmarks ---------------------------------------------------------------------------------------------------------

def test_other_rows_under_the_same_name_are_another_run(mirror, tmp_path, monkeypatch):
    from echochamber.data.tokens import train_tokenizer
    tokenizer = train_tokenizer(["Sam has 3 apples."], 300)
    save_model(tmp_path / "model", Decoder(DecoderConfig(width=16, layers=1, heads=2, vocab_size=tokenizer.get_vocab_size())), tokenizer)
    shutil.copytree(mirror / "openai", tmp_path / "hub/openai")
    monkeypatch.setattr(real_data, "HfApi", lambda: hub_with(tmp_path / "hub"))
    first, again = (plan_evaluation(tmp_path / "model", "gsm8k") for _ in range(2))
    assert first.config.data_hash and Path(first.config.data).is_file() and first.reference == again.reference
    write_gsm8k(tmp_path / "hub", count=5)
    second = plan_evaluation(tmp_path / "model", "gsm8k")
    assert second.reference != first.reference and len(load_benchmark("gsm8k", second.config.data, data_hash=second.config.data_hash)) == 5
    assert len(load_benchmark("gsm8k", first.config.data, data_hash=first.config.data_hash)) == 4, "what was planned is what is asked"
    monkeypatch.setenv("ECHOCHAMBER_HUB", str(mirror))
    assert plan_evaluation(tmp_path / "model", "gsm8k").reference == first.reference, "a mirror with the same rows gives the same run"


def test_a_kept_benchmark_that_was_damaged_is_written_again(mirror):
    whole = (file := benchmark_file("gsm8k", str(mirror))).read_bytes()
    file.write_bytes(whole[:20])
    assert benchmark_file("gsm8k", str(mirror)) == file and file.read_bytes() == whole


def test_without_a_network_a_benchmark_is_one_sentence(outputs, capfd):
    away = SimpleNamespace(snapshot_download=offline, dataset_info=offline)
    said = sentence(benchmark_file, "gsm8k", client=away)
    assert said.startswith("datasets/openai/gsm8k: cannot be fetched from the Hub (no route to host); ") and "--data" not in said
    assert "ECHOCHAMBER_GSM8K" in said and "ECHOCHAMBER_HUB" in said and not outputs.exists()
    assert said == sentence(real_data.require_benchmark, "gsm8k", client=away) and capfd.readouterr() == ("", "")


# --- plans --------------------------------------------------------------------------------------------------------------

def test_a_small_disk_is_a_warning_to_whoever_plans(mirror, tmp_path, monkeypatch, capsys, outputs):
    settings = tmp_path / "corpus.json"
    settings.write_text(json.dumps(config_of(mirror).model_dump(mode="json")), encoding="utf-8")
    words = ["--config", str(settings), "--mirror", str(mirror)]
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert status_of(["data", "plan", *words]) == 0
    printed, complaint = capsys.readouterr()
    assert "tinygsm: TinyGSM/TinyGSM at mirror" in printed and "requests" in printed and "minutes" in printed
    assert complaint.startswith("Warning: ") and "bytes are free there" in complaint
    assert status_of(["data", "prepare", *words]) == 1
    assert "Error: " in (complaint := capsys.readouterr().err) and "bytes are free there" in complaint and not outputs.exists()


def test_a_plan_of_what_is_prepared_needs_no_space(mirror, outputs, monkeypatch):
    folder = prepare_corpus(config_of(mirror), outputs / "corpus", str(mirror))
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    plan = corpus_plan(config_of(mirror), folder, str(mirror))
    assert real_data.shortage(plan, folder) == "" and " 0 units to do" in real_data.plan_lines(plan, folder)[0]


# --- refusals -----------------------------------------------------------------------------------------------------------

WRONG = {
    "benchmark not in the mirror": ({"benchmarks": ["aime"]}, "the mirror has no copy of aime"),
    "unknown benchmark": ({"benchmarks": ["gsm9k"]}, "unknown benchmark `gsm9k`"),
    "no tokenizer": ({"tokenizer": "no/where"}, "holds no file like tokenizer.json"),
    "no SentencePiece file": ({"sha256": "0" * 64}, "holds no file like tokenizer.model"),
    "no source": ({"sources": [choose_source("omi1")]}, "holds no file like correct_solutions"),
}


@pytest.mark.parametrize("action", [corpus_plan, prepare_corpus])
@pytest.mark.parametrize(("changes", "said"), WRONG.values(), ids=WRONG)
def test_what_is_missing_is_found_by_a_plan_and_leaves_nothing(changes, said, action, mirror, outputs):
    assert said in sentence(action, config_of(mirror, **changes), outputs / "corpora/corpus", str(mirror)) and not outputs.exists()


def damaged(mirror: Path, tmp_path: Path, file: str, content: bytes) -> Path:
    shutil.copytree(mirror, copy := tmp_path / "damaged")
    (copy / file).write_bytes(content)
    return copy


@pytest.mark.parametrize(("file", "said"), [("tokenizer/tokenizer.json", "is not a tokenizer"), ("openai/gsm8k/main/test-00000-of-00001.parquet", "cannot be read as gsm8k")])
def test_what_is_damaged_is_found_before_anything_is_written(file, said, mirror, tmp_path, outputs):
    copy = damaged(mirror, tmp_path, file, b"{")
    assert said in sentence(prepare_corpus, config_of(copy), outputs / "corpora/corpus", str(copy)) and not outputs.exists()


def test_a_disk_that_fills_up_at_the_beginning_leaves_nothing(mirror, outputs, monkeypatch):
    def full(destination, text):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(real_data, "write_text", full)
    assert "no space left" in sentence(prepare_corpus, config_of(mirror), outputs / "corpus", str(mirror))
    assert not list(outputs.rglob("*"))


def test_what_a_killed_process_left_is_no_corpus_and_in_nobodys_way(mirror, outputs):
    (outputs / "corpus").mkdir(parents=True)
    (outputs / "corpus/tokenizer.json").write_text("half")
    (outputs / ".corpus.1234.tmp").mkdir()
    folder = prepare_corpus(config_of(mirror), outputs / "corpus", str(mirror))
    assert [path.name for path in outputs.iterdir()] == ["corpus"], "and no lock"
    assert contents(folder) == contents(prepare_corpus(config_of(mirror), outputs / "another", str(mirror)))


def test_the_study_prepares_what_the_room_of_data_does(mirror, outputs):
    config = config_of(mirror, benchmarks=["mini-gsm"])
    assert contents(prepare_corpus(config, outputs / "one", str(mirror))) == contents(prepare(config, outputs / "other", str(mirror)))


def breaks_off(function, units):
    yield function(units[0])
    raise InterruptedError


def begun(config, folder: Path, mirror: str) -> None:
    with contextlib.suppress(InterruptedError):
        prepare_corpus(config, folder, mirror, breaks_off)


def test_a_corpus_of_the_hub_does_not_go_on_from_a_mirror(mirror, outputs, monkeypatch):
    "Its rows would carry a commit of the Hub that nobody has looked at."
    with monkeypatch.context() as planned:
        planned.setattr(preparation, "resolve_revision", lambda *_: "c0ffee" + "0" * 34)
        begun(config_of(mirror), outputs / "corpus", str(mirror))
    before = contents(outputs)
    for action in (corpus_plan, prepare_corpus):
        assert "was begun at commits of the Hub" in sentence(action, config_of(mirror), outputs / "corpus", str(mirror))
    assert contents(outputs) == before


def test_a_corpus_of_a_mirror_does_not_go_on_from_the_hub(mirror, outputs):
    begun(config_of(mirror), outputs / "corpus", str(mirror))
    assert "was begun from a mirror; name it again with --mirror" in sentence(prepare_corpus, config_of(mirror), outputs / "corpus")
    assert set(read_manifest(prepare_corpus(config_of(mirror), outputs / "corpus", str(mirror))).revision) == {"mirror"}


def test_units_are_told_the_mirror_of_the_environment(mirror, outputs, monkeypatch):
    "A unit may run where the environment names none, in another working folder."
    def elsewhere(function, units):
        monkeypatch.delenv("ECHOCHAMBER_HUB")
        monkeypatch.chdir("/")
        return map(function, units)
    monkeypatch.chdir(mirror.parent)
    monkeypatch.setenv("ECHOCHAMBER_HUB", mirror.name)
    folder = prepare_corpus(config_of(mirror), outputs / "corpus", mapping=elsewhere)
    assert isinstance(lines := read_manifest(folder), pd.DataFrame) and lines.rows.sum() == 40 + 1 + 40 + 1
