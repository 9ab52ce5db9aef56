"Notebooks are the source: the package, the README and the craft of the notebooks themselves must agree with them."
import ast
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from nbdev.process import extract_directives
from torch.distributed.checkpoint.stateful import Stateful

from echochamber.core import project_root

ROOT = project_root()
ROOMS = ("data", "models", "grading", "training", "study")  # imports go from right to left
SHARED = ("core", "plots")  # beside the rooms, for all of them
PAPERMILL = ("experiments", "figures", "benchmarks")
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and p.name[0] not in "._")
LIBRARY = [p for p in NOTEBOOKS if p.parent.name in ROOMS or p.stem in SHARED]
MODULES = sorted(p for p in (ROOT / "echochamber").rglob("*.py") if p.name[0] != "_")
BIN = Path(sys.executable).parent
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
DEFINITIONS = FUNCTIONS | ast.ClassDef
EXPORTS = {"export", "exports", "exporti"}


def identity(path: Path) -> str:
    return path.relative_to(ROOT).as_posix().removeprefix("nbs/").removeprefix("echochamber/")


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code_cells(path: Path) -> list[dict]:
    return [cell | {"source": "".join(cell["source"])} for cell in cells(path) if cell["cell_type"] == "code"]


def syntax(source: str) -> ast.Module:
    "The code of a cell without lines for IPython."
    return ast.parse(re.sub(r"^\s*[%!].*$", "pass", source, flags=re.MULTILINE))


def directives(cell: dict) -> set[str]:
    "Names of the directives of a code cell, as nbdev reads them: from the lines before its code."
    return set(extract_directives(SimpleNamespace(source=cell["source"]), remove=False))


def outermost(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    "Statements of a module, also those within its `if`, `with`, `for` and `try`."
    for statement in body:
        yield statement
        if not isinstance(statement, DEFINITIONS):
            for part in ("body", "orelse", "finalbody"):
                yield from outermost(getattr(statement, part, []))
            for handler in getattr(statement, "handlers", []):
                yield from outermost(handler.body)


def copy_of_notebooks(folder: Path) -> Path:
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return folder


# --- what is written from notebooks -------------------------------------------------------------------------------------

def test_package_equals_export(tmp_path):
    "Exporting into an empty package gives exactly the package, no file more and none less."
    subprocess.run([BIN / "nbdev_export"], cwd=copy_of_notebooks(tmp_path), check=True, capture_output=True)

    def sources(root: Path) -> dict[str, str]:
        files = (p for p in (root / "echochamber").rglob("*.py") if p.name != "_modidx.py")  # an index for documentation only
        return {str(p.relative_to(root)): p.read_text() for p in files if p.read_text().strip()}

    exported, package = sources(tmp_path), sources(ROOT)
    assert sorted(exported) == sorted(package), "run `make export`; a notebook came or went"
    changed = [name for name in exported if exported[name] != package[name]]
    assert not changed, f"run `make export`; these differ from their notebooks: {changed}"


def test_readme_equals_index(tmp_path):
    subprocess.run(["make", "--old-file=.venv/.ready", f"BIN={BIN}", "readme", f"README={tmp_path / 'README.md'}"],
                   cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), "run `make readme`"


def test_links_of_the_front_page_lead_somewhere():
    "In the notebook and, one folder up, in the README."
    prose = "".join("".join(cell["source"]) for cell in cells(ROOT / "nbs/index.ipynb") if cell["cell_type"] == "markdown")
    for text, folder in ((prose, ROOT / "nbs"), ((ROOT / "README.md").read_text(), ROOT)):
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
        assert links and not [link for link in links if not (folder / link).exists()]


def test_cleaned_notebooks_stay_as_they_are(tmp_path):
    "What Jupyter leaves behind (counts, metadata, names of kernels) is gone already."
    subprocess.run([BIN / "nbdev_clean"], cwd=copy_of_notebooks(tmp_path), check=True, capture_output=True)
    changed = [identity(path) for path in NOTEBOOKS if path.read_bytes() != (tmp_path / path.relative_to(ROOT)).read_bytes()]
    assert not changed, f"run `nbdev_clean`; it would change {changed}"


# --- where things lie ---------------------------------------------------------------------------------------------------

def test_every_folder_is_known():
    folders = {path.parent.relative_to(ROOT / "nbs").as_posix() for path in NOTEBOOKS}
    assert folders <= {".", *ROOMS, "tutorials", *PAPERMILL}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=identity)
def test_path_is_module_path(path):
    "A notebook of a room makes the module of its name, in the order of its number; the other notebooks make none."
    made = re.findall(r"^#\| default_exp (\S+)", "\n".join(cell["source"] for cell in code_cells(path)), flags=re.MULTILINE)
    room = path.parent.relative_to(ROOT / "nbs").as_posix()
    if path in LIBRARY:
        name = path.stem if room == "." else f"{room}.{re.sub(r'^[0-9][0-9]_', '', path.stem)}"
        assert made == [name] and (room == "." or path.stem[:2].isdigit())
    else:
        assert made == []


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name in ("experiments", "figures")], ids=identity)
def test_parameters_cell(path):
    "papermill silently runs the defaults unless there is exactly one cell tagged `parameters`; only literals survive it."
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    for statement in ast.parse("".join(tagged[0]["source"])).body:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)


# --- craft --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", NOTEBOOKS, ids=identity)
def test_notebook_conventions(path):
    "Cells have ids and a readable size; exported imports stand alone; no kernel and no path of somebody's machine."
    book = json.loads(path.read_text(encoding="utf-8"))
    assert book["metadata"]["kernelspec"]["name"] == "python3"  # what every environment calls its own
    assert not (found := re.search(r"(?<![\w.])/(home|root|work|Users)/", json.dumps(book, ensure_ascii=False))), f"a local path: {found}"
    assert all(cell["id"] for cell in book["cells"])
    for cell in code_cells(path):
        lines = cell["source"].splitlines()
        assert len(lines) <= 28, f"a cell of {len(lines)} lines (28 at most): {lines[:3]}"
        assert not (wide := [line for line in lines if len(line) > 120]), f"lines of more than 120 columns: {wide}"
        assert not (late := re.findall(r"^\s*#\s*\|.*", cell["source"], flags=re.MULTILINE)[len(directives(cell)):]), f"below the code: {late}"
        if directives(cell) & EXPORTS:
            kinds = {isinstance(s, ast.Import | ast.ImportFrom) or "TYPE_CHECKING" in ast.unparse(s) for s in syntax(cell["source"]).body}
            assert len(kinds) <= 1, f"imports share a cell with code: {lines[:3]}"


def exported_names(cell: dict) -> list[str]:
    "Public functions, classes and values of a cell that goes into the module, listed in `__all__` or not."
    if not directives(cell) & EXPORTS:
        return []
    statements = list(outermost(syntax(cell["source"]).body))
    names = [s.name for s in statements if isinstance(s, DEFINITIONS)]
    for statement in (s for s in statements if isinstance(s, ast.Assign | ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        names += [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return [name for name in names if name[0] != "_"]


def is_check(cell: dict) -> bool:
    "Whether a reader sees here that something holds: an assertion, a test of fastcore's, an output or a picture."
    if directives(cell) & {*EXPORTS, "hide"}:
        return False
    shown = [output for output in cell["outputs"] if output.get("name") != "stderr" and output["output_type"] != "error"]
    asserts = any(isinstance(node, ast.Assert) or isinstance(node, ast.Call) and ast.unparse(node.func).startswith("test_")
                  for node in ast.walk(syntax(cell["source"])))
    return bool(shown) or asserts


@pytest.mark.parametrize("path", LIBRARY, ids=identity)
def test_an_export_is_followed_by_a_check(path):
    "Within two code cells of every exported function, class or value something is asserted or shown."
    found = code_cells(path)
    unchecked = [name for place, cell in enumerate(found) for name in exported_names(cell)
                 if not any(map(is_check, found[place + 1 : place + 3]))]
    assert not unchecked, f"no check or picture within two code cells of {', '.join(unchecked)}"


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    "Public functions, and public methods of public classes."
    for node in outermost(tree.body):
        if isinstance(node, FUNCTIONS) and node.name[0] != "_":
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and node.name[0] != "_":
            yield from ((f"{node.name}.{each.name}", each) for each in node.body if isinstance(each, FUNCTIONS) and each.name[0] != "_")


def catches(handler: ast.ExceptHandler) -> bool:
    "Whether a `StudyError` ends here, and nothing takes its place or goes on with it."
    kinds = ast.unparse(handler.type) if handler.type else "Exception"
    return bool(re.search(r"\b(StudyError|(Base)?Exception)\b", kinds)) and not any(
        isinstance(node, ast.Raise) and not node.exc for node in ast.walk(handler))


def uncaught(node: ast.AST) -> Iterator[ast.AST]:
    "Everything in a function but what stands where its `StudyError` is caught."
    yield node
    inside = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Try) and any(map(catches, node.handlers)):
        inside = [*node.handlers, *node.orelse, *node.finalbody]
    if isinstance(node, ast.With) and re.search(r"suppress\(.*(StudyError|Exception)", ast.unparse(node.items[0])):
        inside = []
    for each in inside:
        yield from uncaught(each)


def refuses(function: ast.FunctionDef, helpers: set[str] = frozenset()) -> bool:
    "Whether a function raises `StudyError` itself, by whatever name, or calls a helper that does."
    parts = list(uncaught(function))
    named = {target.id for node in parts if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("StudyError(")
             for target in node.targets if isinstance(target, ast.Name)}
    raised = [ast.unparse(node.exc) for node in parts if isinstance(node, ast.Raise) and node.exc]
    called = {ast.unparse(node.func) for node in parts if isinstance(node, ast.Call)}
    return bool(called & helpers) or any(each.startswith("StudyError(") or each in named for each in raised)


def refusing(tree: ast.Module) -> set[str]:
    "Names of a module's functions that raise `StudyError`, directly or through each other."
    functions, found = [node for node in outermost(tree.body) if isinstance(node, FUNCTIONS)], set()
    while more := {one.name for one in functions if refuses(one, found)} - found:
        found |= more
    return found


def documented(module: str, name: str) -> bool:
    "Whether a function or method says what it is, or the one that it overrides or, for torch's protocol of states, stands for."
    owner, _, method = name.rpartition(".")
    place = importlib.import_module(module)
    return bool(inspect.getdoc(inspect.getattr_static(getattr(place, owner), method) if owner else getattr(place, name)) or
                owner and (hasattr(Stateful, method) or inspect.getdoc(getattr(getattr(place, owner), method))))


@pytest.mark.parametrize("path", MODULES, ids=identity)
def test_public_functions_say_what_they_are_and_what_they_refuse(path):
    "What a command of the command line says is its help: it names no exception."
    tree, module = ast.parse(path.read_text()), ".".join(path.relative_to(ROOT).with_suffix("").parts)
    functions, helpers = list(public_functions(tree)), refusing(tree)
    silent = [name for name, function in functions if not documented(module, name)]
    assert not silent, f"no docstring: {', '.join(silent)}"
    told = [function for _, function in functions if not any("command(" in ast.unparse(each) for each in function.decorator_list)]
    untold = [each.name for each in told if refuses(each, helpers) and "StudyError" not in (ast.get_docstring(each) or "")]
    assert not untold, f"raise StudyError, or call what does, and do not say so in their docstring: {', '.join(untold)}"


EVASIONS = """
if True:
    def hidden(): return named()
def named():
    error = StudyError("a word")
    raise error
def careful():
    try: named()
    except StudyError: pass
def passes_on():
    try: named()
    except Exception: raise
def silent():
    with contextlib.suppress(StudyError): named()
twice, constant = lambda one: 2 * one, 3
half = lambda one: one / 2
"""


def test_nothing_evades_these_rules():
    "By a condition, a name for the error, a helper, a lambda, or how a directive is written."
    tree = ast.parse(EVASIONS)
    assert refusing(tree) == {"hidden", "named", "passes_on"}
    assert [name for name, _ in public_functions(tree)] == ["hidden", "named", "careful", "passes_on", "silent"]
    for directive in ("#| export", "#|export", "#| exporti", "# | exports", "#| hide\n#| export"):
        cell = {"source": f"{directive}\n{EVASIONS}", "outputs": []}
        assert exported_names(cell)[:2] == ["hidden", "named"] and exported_names(cell)[-3:] == ["twice", "constant", "half"] and not is_check(cell)


# --- who imports whom ---------------------------------------------------------------------------------------------------

def imports(tree: ast.Module, package: str = "") -> set[str]:
    "Absolute names of all imported modules, wherever the import stands; `package` is what relative ones start from."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
            module = (start + (node.module or "")).rstrip(".")
            found |= {f"{module}.{alias.name}" for alias in node.names} if module in ("echochamber", "") else {module}
    return found


def test_relative_imports_are_understood():
    tree = ast.parse("from ..core import a\nfrom .runs import b\nfrom . import runs\nfrom .. import plots\nimport torch.nn")
    assert imports(tree, "echochamber.study") == {"echochamber.core", "echochamber.study.runs", "echochamber.study", "echochamber.plots", "torch.nn"}


def imports_of(path: Path) -> set[str]:
    if path.suffix == ".py":
        return imports(ast.parse(path.read_text()), ".".join(path.relative_to(ROOT).parts[:-1]))
    return set().union(*(imports(syntax(cell["source"])) for cell in code_cells(path)))


@pytest.mark.parametrize("path", MODULES + LIBRARY, ids=lambda path: f"{identity(path)}")
def test_imports_go_one_way(path):
    "core, plots <- data <- models <- grading <- training <- study: in what is exported, and in what notebooks use to show it."
    order = ("", *ROOMS)
    room = path.parent.name if path.parent.name in ROOMS else ""
    for name in imports_of(path):
        if name.startswith("echochamber."):
            target = name.split(".")[1]
            assert target in SHARED or order.index(target) <= order.index(room), f"{identity(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES + LIBRARY, ids=identity)
def test_heavy_machinery_stays_in_its_rooms(path):
    "Only the study knows papermill and Dask; Lightning is where data are loaded, in training, and in the study."
    room, module = path.parent.name, re.sub(r"^[0-9][0-9]_", "", path.stem)
    for top in {name.split(".")[0] for name in imports_of(path)}:
        assert top not in ("papermill", "distributed", "dask", "dask_jobqueue") or room == "study", f"{identity(path)} imports {top}"
        assert top not in ("lightning", "pytorch_lightning") or room in ("training", "study") or module == "tokens", f"{identity(path)} imports {top}"
