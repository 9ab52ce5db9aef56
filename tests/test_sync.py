"Notebooks are the source: the package, the README and the notebooks' own conventions must agree with them."
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from echochamber.core import project_root

ROOT = project_root()
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and p.name[0] not in "._")
EXECUTED = [p for p in NOTEBOOKS if p.parent.name in ("experiments", "figures")]


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def identity(path: Path) -> str:
    return str(path.relative_to(ROOT / "nbs"))


def test_package_equals_export(tmp_path):
    "Exporting into an empty package gives exactly the package, no file more and none less."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=tmp_path, check=True, capture_output=True)

    def sources(root: Path) -> dict[str, str]:
        files = (p for p in (root / "echochamber").rglob("*.py") if p.name != "_modidx.py")  # an index for documentation only
        return {str(p.relative_to(root)): p.read_text() for p in files if p.read_text().strip()}

    exported, package = sources(tmp_path), sources(ROOT)
    assert sorted(exported) == sorted(package), "run `make export`; a notebook came or went"
    changed = [name for name in exported if exported[name] != package[name]]
    assert not changed, f"run `make export`; these differ from their notebooks: {changed}"


def test_readme_equals_index():
    command = f"{Path(sys.executable).with_name('jupyter')} nbconvert --log-level WARN --to markdown --stdout nbs/index.ipynb"
    rendered = subprocess.run(command.split(), cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert rendered.replace("(../", "(") == (ROOT / "README.md").read_text(), "run `make readme`"


@pytest.mark.parametrize("path", EXECUTED, ids=identity)
def test_parameters_cell(path):
    "papermill silently runs the defaults unless there is exactly one cell tagged `parameters`; only literals survive it."
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    for statement in ast.parse("".join(tagged[0]["source"])).body:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=identity)
def test_notebook_conventions(path):
    "Cells have ids and a readable size; exported imports stand alone; no path of somebody's machine in the outputs."
    text = path.read_text()
    assert not re.search(r'(?<![\w.])/(home|root|work|Users)/', text), "an output or a cell holds a local path"
    for cell in cells(path):
        assert cell["id"]
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        assert len(source.splitlines()) <= 45, f"cell too long:\n{source[:200]}"
        if source.startswith("#| export"):
            kinds = {isinstance(s, ast.Import | ast.ImportFrom) or "TYPE_CHECKING" in ast.unparse(s) for s in ast.parse(source).body}
            assert len(kinds) <= 1, f"imports share a cell with code:\n{source[:200]}"


def test_imports_go_one_way():
    "data <- models <- grading <- training <- study; Lightning and the schedulers only where the design says."
    rooms = ["data", "models", "grading", "training", "study"]
    for path in (ROOT / "echochamber").rglob("*.py"):
        if path.parent.name not in rooms:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2 and node.module and node.module.split(".")[0] in rooms:
                target = node.module.split(".")[0]
                assert rooms.index(target) <= rooms.index(path.parent.name), f"{path.name} imports {node.module}"
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.split(".")[0] for name in names}:
                assert top not in ("papermill", "distributed", "dask") or path.parent.name == "study", f"{path}: {top}"
                assert top != "lightning" or path.parent.name in ("training", "study") or path.name == "tokens.py", f"{path}: {top}"
