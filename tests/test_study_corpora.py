"The six miniatures through the command line: plan, prepare here and on a Dask scheduler, pretrain, RL, evaluate."
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import REAL_FILES
from miniatures import WRITERS, miniature_config, write_mirror
from rich.console import Console
from test_study_scheduler import Cluster

from echochamber.core import project_root
from echochamber.data.preparation import corpus_fingerprint, prepare, read_manifest
from echochamber.models.checkpoints import load_model
from echochamber.study.cli import where_units_run
from echochamber.study.graph import execute
from echochamber.study.runs import Run
from echochamber.study.stages import EvaluateConfig, FinetuneConfig
from echochamber.training.algorithms import grpo_config

pytestmark = pytest.mark.sessions

COMMAND = Path(sys.executable).with_name("echochamber")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    write_mirror(folder / "mirror", rows=200)
    values = miniature_config(folder / "mirror", unit_bytes=60_000).model_dump(mode="json")
    (folder / "corpus.json").write_text(json.dumps(values | {"sources": list(WRITERS)}), encoding="utf-8")
    return folder


def command(place: Path, *arguments) -> str:
    "What a command prints that has to succeed."
    environment = os.environ | {"ECHOCHAMBER_OUTPUTS": str(place / "outputs"), "ECHOCHAMBER_HUB": str(place / "mirror"),
                                "OMP_NUM_THREADS": "1"}
    done = subprocess.run([COMMAND, *map(str, arguments)], env=environment, cwd=project_root(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run(place: Path, stage: str, config: dict) -> Path:
    "The folder of a run with a config."
    file = place / f"{stage}.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return Path(command(place, "run", stage, "--config", file, "--name", "miniature").strip().splitlines()[-1])


@pytest.fixture(scope="module")
def corpus(place) -> Path:
    arguments = ("--config", place / "corpus.json", "--name", "six")
    planned = command(place, "data", "plan", *arguments)
    assert "requests" in planned and "algebraic-stack" in planned and not (place / "outputs").exists()
    prepared = command(place, "data", "prepare", *arguments, "--workers", 2)
    folder = place / "outputs/corpora/six"
    assert corpus_fingerprint(folder) in prepared and "rows rejected: 1 no text" in prepared
    return folder


def test_a_scheduler_prepares_the_same(place, corpus):
    cluster = Cluster()
    try:
        with where_units_run(2, cluster.address) as mapping:
            config = miniature_config(place / "mirror", unit_bytes=60_000)
            folder = prepare(config, place / "by-dask", str(place / "mirror"), mapping)
    finally:
        cluster.end()
    assert corpus_fingerprint(folder) == corpus_fingerprint(corpus)


def test_prepared_again_nothing_is_done(place, corpus):
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*.bin")}
    again = command(place, "data", "prepare", "--config", place / "corpus.json", "--name", "six")
    assert "0 units to do" in again and {path: path.stat().st_mtime_ns for path in corpus.rglob("*.bin")} == before


@pytest.fixture(scope="module")
def pretrained(place, corpus) -> Path:
    schedule = {"steps": 8, "optimiser": {"horizon": 8, "learning_rate": 1e-3}}
    shape = {"vocab_size": 600, "width": 32, "layers": 1, "heads": 2, "context": 64, "end_token": 2}
    mixture = {"corpus": "six", "corpus_hash": corpus_fingerprint(corpus), "tokens": 40_000, "held_out_rows": 4,
               "sources": [{"name": "tinygsm", "repeat": 4}, *({"name": name} for name in WRITERS if name != "tinygsm")]}
    return run(place, "pretrain", {"mixture": mixture, "decoder": shape, "fit": schedule, "batch_size": 4})


def tuning(pretrained: Path, **prompts) -> Run:
    algorithm = grpo_config(2, prompts=2, samples=4, train_batch=8).model_dump(mode="json")
    algorithm["rollouts"]["sampling"] = {"max_new_tokens": 8, "temperature": 1.0}
    return Run("finetune", "miniature", FinetuneConfig.parse({
        "model": f"pretrain/{pretrained.name}", "questions": 8, "algorithm": algorithm, "snapshots": [0, 2], **prompts}))


def evaluation_of(tuned: Run, **benchmark) -> Run:
    sampling = {"max_new_tokens": 8, "temperature": 0.7, "top_p": 0.95}
    return Run("evaluate", "miniature", EvaluateConfig.parse({
        "model": tuned.reference, "steps": [2], "questions": 4, "samples": 2, "sampling": sampling, **benchmark}), (tuned,))


def test_what_was_prepared_is_pretrained_on(corpus, pretrained):
    losses = pd.read_parquet(pretrained / "held_out.parquet")
    assert set(losses.source) <= set(read_manifest(corpus).source) and losses.loss.between(1, 10).all() and len(losses) > 3
    decoder, tokenizer = load_model(pretrained / "checkpoints/step-000008")
    assert decoder.config.end_token == 2 and 1 not in tokenizer.encode("How many?").ids, "no beginning of text in prompts"


def test_it_is_tuned_and_evaluated(place, pretrained, monkeypatch):
    """On GSM8K's training set as prompts of RL, and GSM8K, MATH-500 and AIME 2024 as evaluations, where the environment
    names files of them; else on the generator's problems."""
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(place / "outputs"))
    train, *tests = (REAL_FILES[f"ECHOCHAMBER_{name}"] for name in ("GSM8K_TRAIN", "GSM8K", "MATH500", "AIME24"))
    tuned = tuning(pretrained, **({"prompts": {"benchmark": "gsm8k-train", "data": train}} if train else {}))
    if train:
        assert tuned.config.prompts.data_hash, "another file is another run"
    real = {name: file for name, file in zip(("gsm8k", "math500", "aime24"), tests, strict=True) if file}
    evaluations = {file: evaluation_of(tuned, benchmark=name, data=file) for name, file in real.items()}
    execute(list(evaluations.values()) or [evaluation_of(tuned)], workers=1, console=Console(file=io.StringIO()))
    for file, run in evaluations.items():
        evaluation = pd.read_parquet(run.folder / "evaluation.parquet")
        rows = map(json.loads, Path(file).read_text(encoding="utf-8").splitlines())
        known = {value.strip() for row in rows for value in row.values() if isinstance(value, str)}
        assert len(evaluation) == 4 * 3 and set(evaluation.question.str.strip()) <= known
    assert evaluations or len(pd.read_parquet(evaluation_of(tuned).folder / "evaluation.parquet")) == 4 * 3
