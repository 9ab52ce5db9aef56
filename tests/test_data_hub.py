"The way that readers go: no mirror, but the Hub's own client and a server that answers like the Hub."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub
from miniatures import WRITERS, miniature_config, write_mirror

from echochamber.core import project_root
from echochamber.data.preparation import prepare, read_manifest

COMMAND = Path(sys.executable).with_name("echochamber")


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Path:
    return write_mirror(tmp_path_factory.mktemp("mirror"))


@pytest.fixture
def hub(mirror):
    server = Hub(mirror)
    yield server
    server.shutdown()


def data(hub: Hub, folder: Path, action: str = "prepare", *arguments) -> subprocess.CompletedProcess:
    "The command, with the server for a Hub and no mirror."
    config = miniature_config(hub.mirror).model_dump(mode="json") | {"sources": list(WRITERS)}
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
    assert hub.limited == 0 and "asks to wait 0 s; waiting" in done.stderr
    assert not list((tmp_path / "hf").rglob("*.parquet")), "what is fetched is not kept"


def test_a_plan_fetches_nothing(hub, tmp_path):
    done = data(hub, tmp_path, "plan")
    assert done.returncode == 0 and f"at {COMMIT[:12]}" in done.stdout and not hub.asked and not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda hub: hub.gated.add("TinyGSM/TinyGSM"), "TinyGSM/TinyGSM@main: is gated; accept its terms on the Hub's page"),
    (lambda hub: setattr(hub, "mirror", hub.mirror / "nothing"), "TinyGSM/TinyGSM@main: does not exist there"),
    (lambda hub: setattr(hub, "address", "http://127.0.0.1:9"), "TinyGSM/TinyGSM@main: cannot be reached"),
], ids=["gated", "absent", "no network"])
def test_a_hub_that_refuses_is_one_sentence(hub, change, sentence, tmp_path):
    change(hub)
    done = data(hub, tmp_path, "plan")
    assert done.returncode == 1 and sentence in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
