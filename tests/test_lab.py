"JupyterLab as a reader opens it with `make lab`: the index first, every picture there, the project's kernel."
import json
import os
import socket
import sys
import urllib.request
from pathlib import Path

import pytest
from browser import Page, get, page, program, until  # noqa: F401 (a fixture)

from echochamber.core import project_root

pytestmark = pytest.mark.sessions

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
ROOT, TOKEN = project_root(), "shown-to-nobody"
SETTINGS = {"notebook-extension/tracker": {"windowingMode": "none"},  # every cell is rendered, seen or not
            "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}
PICTURES = """(() => { const panel = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden)');
    return [...panel.querySelectorAll('img')].map(img => [img.complete, img.naturalWidth, img.src.slice(0, 200)]); })()"""


def as_jupyter_of_somebody(folder: Path) -> dict[str, str]:
    "An environment whose home has another kernel `python3`, one that cannot start, as `ipykernel install --user` leaves them."
    kernel = folder / "data" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "Somebody's", "language": "python"}))
    for name, values in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    return os.environ | {
        "JUPYTER_DATA_DIR": str(folder / "data"), "JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_TOKEN": TOKEN,
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"), "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"), "BROWSER": "/bin/true"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The address of the server that `make lab` starts, with set-up taken as done."
    folder = tmp_path_factory.mktemp("lab")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["make", "--old-file=.venv/.ready", f"BIN={Path(sys.executable).parent}", "lab", f"ARGS=--no-browser --ip=127.0.0.1 --port={port}"]
    with program(command, folder / "lab.log", cwd=ROOT, env=as_jupyter_of_somebody(folder)) as server:
        def answers():
            assert server.poll() is None, (folder / "lab.log").read_text()
            return get(f"http://127.0.0.1:{port}/api?token={TOKEN}")
        until(answers)
        yield f"http://127.0.0.1:{port}"


def pictures_of(path: Path) -> int:
    "How many pictures a notebook has, in its prose and in its outputs."
    cells = json.loads(path.read_text())["cells"]
    prose = sum("".join(cell["source"]).count("![") for cell in cells if cell["cell_type"] == "markdown")
    return prose + sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", ()))


def look(page: Page, url: str, pictures: int) -> tuple[str, list]:  # noqa: F811
    "Open an address; the name of the kernel shown beside the notebook, and its pictures, once they all are there."
    page.send("Page.navigate", url=url)
    until(lambda: len(page.value(PICTURES) or ()) >= pictures and all(done for done, *_ in page.value(PICTURES)))
    name = "document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-Toolbar-kernelName')?.textContent"
    return until(lambda: (page.value(name) or "").replace("No Kernel", "").strip()), page.value(PICTURES)


@pytest.mark.parametrize("pattern", ["index.ipynb", "figures/convergence.ipynb", "training/*_advantages.ipynb"])
def test_pictures_and_kernel(pattern, lab, page):  # noqa: F811
    path, = (ROOT / "nbs").glob(pattern)
    kernel, pictures = look(page, f"{lab}/lab/tree/{path.relative_to(ROOT)}?token={TOKEN}&reset", pictures_of(path))
    assert pictures and not [source for _, width, source in pictures if width == 0] and kernel == "Echo Chamber"


def test_the_index_is_opened_first(lab):
    with urllib.request.urlopen(f"{lab}/?token={TOKEN}", timeout=10) as answer:
        assert answer.geturl().split("?")[0] == f"{lab}/lab/tree/nbs/index.ipynb"


def test_the_kernel_is_that_of_the_project(lab):
    specs = get(f"{lab}/api/kernelspecs?token={TOKEN}")
    spec = specs["kernelspecs"][specs["default"]]["spec"]
    assert specs["default"] == "python3" and spec["display_name"] == "Echo Chamber"
    assert Path(spec["argv"][0]).parent.resolve() == Path(sys.executable).parent.resolve()


def test_nothing_but_dotfiles_is_hidden(lab):
    shown = {entry["name"] for entry in get(f"{lab}/api/contents/?token={TOKEN}")["content"]}
    assert {"nbs", "echochamber", "outputs", "tests", "README.md", "Makefile"} <= shown
