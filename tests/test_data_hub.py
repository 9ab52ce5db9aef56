"The way that readers go: no mirror, but the Hub's own client and a server that answers like the Hub."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub
from miniatures import WRITERS, miniature_config, write_gsm8k, write_mirror

from echochamber.core import project_root
from echochamber.data.preparation import prepare, read_manifest
from echochamber.study.real_data import prepare_corpus

pytestmark = pytest.mark.sessions

COMMAND = Path(sys.executable).with_name("echochamber")


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Path:
    write_gsm8k(mirror := write_mirror(tmp_path_factory.mktemp("mirror")))
    return mirror


@pytest.fixture
def hub(mirror):
    server = Hub(mirror)
    yield server
    server.shutdown()


def data(hub: Hub, folder: Path, action: str = "prepare", *arguments, **changes) -> subprocess.CompletedProcess:
    "The command, with the server for a Hub and no mirror."
    config = miniature_config(hub.mirror, **changes).model_dump(mode="json") | {"sources": list(WRITERS)}
    (folder / "corpus.json").write_text(json.dumps(config), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in ("ECHOCHAMBER_HUB", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return subprocess.run([COMMAND, "data", action, "--config", folder / "corpus.json", "--name", folder / "corpus", *arguments],
                          env=environment, cwd=project_root(), capture_output=True, text=True, timeout=200)


def test_from_the_hub_comes_what_comes_from_a_mirror(hub, mirror, tmp_path):
    hub.limited = 7  # and it asks to wait, more often than its own client has patience
    done = data(hub, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    manifest = read_manifest(tmp_path / "corpus")
    local = read_manifest(prepare(miniature_config(mirror), tmp_path / "local", str(mirror)))
    assert set(manifest.revision) == {COMMIT} and list(manifest.sha256) == list(local.sha256)
    assert hub.limited == 0 and "asks to wait 0 s; waiting" in done.stderr, done.stderr
    assert not list((tmp_path / "hf").rglob("*.parquet")), "what is fetched is not kept"


def test_a_plan_fetches_nothing(hub, tmp_path):
    done = data(hub, tmp_path, "plan")
    assert done.returncode == 0 and f"at {COMMIT[:12]}" in done.stdout and not hub.asked and not (tmp_path / "corpus").exists()


def test_the_questions_of_a_benchmark_come_from_the_hub_like_everything_else(hub, mirror, tmp_path):
    hub.limited = 40  # three files, each more often than its own client has patience
    done = data(hub, tmp_path, benchmarks=["gsm8k"])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    local = prepare_corpus(miniature_config(mirror, benchmarks=["gsm8k"]), tmp_path / "local", str(mirror))
    assert (tmp_path / "corpus/benchmarks.json").read_bytes() == (local / "benchmarks.json").read_bytes()
    assert len(json.loads((local / "benchmarks.json").read_text())["gsm8k"]) == 4
    assert hub.limited == 0 and "asks to wait 0 s; waiting" in done.stderr, done.stderr


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda hub: hub.gated.add("openai/gsm8k"), "datasets/openai/gsm8k: is gated; accept its conditions at https://huggingface.co/datasets/openai/gsm8k"),
    (lambda hub: hub.absent.add("openai/gsm8k"), "datasets/openai/gsm8k: is not to be found on the Hub"),
], ids=["gated", "absent"])
@pytest.mark.parametrize("action", ["plan", "prepare"])
def test_a_benchmark_that_is_refused_is_one_sentence_and_leaves_nothing(hub, change, sentence, action, tmp_path):
    change(hub)
    done = data(hub, tmp_path, action, benchmarks=["gsm8k"])
    assert done.returncode == 1 and done.stderr.startswith("Error: ") and sentence in " ".join(done.stderr.split()), done.stderr
    assert "ECHOCHAMBER_GSM8K" in done.stderr or "gated" in sentence
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "hf") == ["corpus.json"] and not hub.asked


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda hub: hub.gated.add("TinyGSM/TinyGSM"), "TinyGSM/TinyGSM@main: is gated; accept its terms on the Hub's page"),
    (lambda hub: setattr(hub, "mirror", hub.mirror / "nothing"), "TinyGSM/TinyGSM@main: does not exist there"),
    (lambda hub: setattr(hub, "address", "http://127.0.0.1:9"), "TinyGSM/TinyGSM@main: cannot be reached"),
], ids=["gated", "absent", "no network"])
def test_a_hub_that_refuses_is_one_sentence(hub, change, sentence, tmp_path):
    change(hub)
    done = data(hub, tmp_path, "plan")
    assert done.returncode == 1 and sentence in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
