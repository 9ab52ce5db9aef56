"Figures are drawn from committed tables, and what is committed is what they draw."
import json
import re
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from pretended_runs import pretend_runs

from echochamber.core import StudyError, project_root
from echochamber.study import figures
from echochamber.study.conditions import Condition, runs_of
from echochamber.study.figures import (
    FIGURES,
    Figure,
    parse_seeds,
    read_if_there,
    redraw,
    seeds_kept,
    table_file,
    verdict_file,
    with_rows_kept,
    write_table,
)
from echochamber.study.reproduction import reproduce

ROOT, SHIPPED = project_root(), project_root() / "outputs/results/laptop"
COMMITTED = [name for name in FIGURES if (SHIPPED / f"{name}.json").exists()]  # verdicts


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    "Every figure drawn from the committed tables into an outputs folder of its own; the folder, and which they are."
    outputs = tmp_path_factory.mktemp("outputs")
    shutil.copytree(SHIPPED, outputs / "results/laptop", ignore=shutil.ignore_patterns(*(f"{name}.{ending}" for name in FIGURES for ending in ("json", "csv", "md"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECHOCHAMBER_OUTPUTS", str(outputs))
        lines = redraw("laptop")
    return outputs, list(lines)


@pytest.fixture
def redrawn(drawing):
    return drawing[0]


def test_what_can_be_drawn_is_what_is_shown():
    "No figure drops out of the comparisons because one of its tables is gone, and none is shown that cannot be drawn."
    drawable = [name for name, figure in FIGURES.items()
                if all((SHIPPED / f"{one.name}.parquet").exists() for one in figure.conditions[: figure.needs])]
    pictures = {file.stem for file in (ROOT / "outputs/figures/laptop").iterdir()}
    assert drawable == COMMITTED and pictures == set(COMMITTED)


@pytest.mark.sessions
def test_what_is_drawn_is_what_is_committed(drawing):
    assert drawing[1] == COMMITTED


def printed(notebook: Path) -> list[str]:
    "Everything that a notebook's cells say in text, one string per code cell."
    def text(output) -> str:
        return output.get("text") or output.get("data", {}).get("text/plain", "")
    cells = [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", [])]
    said = ["".join(text(output) for output in cell.outputs if output.get("name") != "stderr").strip() for cell in cells
            if "injected-parameters" not in cell.metadata.get("tags", [])]
    return [re.sub(r"<Figure size .*?>", "<Figure>", one) for one in said]


@pytest.mark.sessions
@pytest.mark.parametrize("name", COMMITTED)
def test_the_verdict_is_the_committed_one(redrawn, name):
    assert read_if_there(redrawn / f"results/laptop/{name}.json") == read_if_there(SHIPPED / f"{name}.json")


@pytest.mark.sessions
@pytest.mark.parametrize("name", COMMITTED)
def test_the_tables_are_the_committed_ones(redrawn, name):
    drawn, committed = (folder / f"results/laptop/{name}.md" for folder in (redrawn, ROOT / "outputs"))
    assert drawn.read_text() == committed.read_text()
    tables = [pd.read_csv(file.with_suffix(".csv")) for file in (drawn, committed)]
    pd.testing.assert_frame_equal(*tables, rtol=0, atol=2e-4)  # four places are written


@pytest.mark.sessions
@pytest.mark.parametrize("name", COMMITTED)
def test_the_picture_is_the_committed_one(redrawn, name):
    "Every coordinate, within a twentieth of a point; on one machine every byte (`plots`)."
    drawn, committed = (re.findall(r"-?\d+\.\d+", (folder / f"figures/laptop/{name}.svg").read_text())
                        for folder in (redrawn, ROOT / "outputs"))
    assert len(drawn) == len(committed) and [float(one) for one in drawn] == pytest.approx([float(one) for one in committed], abs=0.05)


@pytest.mark.sessions
@pytest.mark.parametrize("name", COMMITTED)
def test_the_notebook_says_what_is_committed(redrawn, name):
    "Outputs saved in `nbs/figures` are those of the committed tables."
    assert printed(redrawn / f"figures/laptop/{name}.ipynb") == printed(ROOT / f"nbs/figures/{name}.ipynb")


@pytest.mark.parametrize("name", COMMITTED)
def test_the_front_page_says_what_is_committed(name):
    "Of every prediction what was measured and whether it holds, of every claim its status and what was found."
    readme, verdict = (ROOT / "README.md").read_text(), read_if_there(SHIPPED / f"{name}.json")
    answers = {True: "yes", False: "**no**", None: "undecided"}
    rows = [line for line in readme.splitlines() if line.startswith(f"| {verdict['claim']} | ")]
    expected = [" | ".join(["", verdict["claim"], one["prediction"], one["measured"], answers[one["holds"]], ""]).strip()
                for one in verdict["predictions"]]
    assert rows == expected, "run `make readme` after `make figures`"
    finding = f"{verdict['finding'][:1].upper()}{verdict['finding'][1:]}"
    assert f"- **{verdict['claim']}**, {FIGURES[name].title}: ***{verdict['status']}***. {finding}.\n" in readme
    assert (ROOT / f"outputs/figures/laptop/{name}.png").exists()
    assert (ROOT / f"outputs/figures/laptop/{name}.svg").stat().st_size < 300_000, "a picture of that many points should be rasterised"


@pytest.mark.sessions
def test_the_front_page_computes_what_it_shows():
    "Its cells, executed again in a kernel of their own, say what is stored in it, of which the README is made."
    def said(cell) -> str:
        data = [output.get("data", {"text/plain": output.get("text")}) for output in cell.outputs if output.get("name") != "stderr"]
        return "\n".join(one.get("text/markdown", one.get("text/plain")) for one in data)
    index = nbformat.read(ROOT / "nbs/index.ipynb", 4)
    stored = [said(cell) for cell in index.cells if cell.cell_type == "code"]
    NotebookClient(index, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "nbs")}}).execute()
    assert [said(cell) for cell in index.cells if cell.cell_type == "code"] == stored, "execute nbs/index.ipynb, then `make readme`"


def test_committed_tables_are_those_of_figures():
    "No table without a condition, no condition without provenance, and the seeds it names are in the rows."
    conditions = {one.name for figure in FIGURES.values() for one in figure.conditions}
    tables = {file.stem for file in SHIPPED.glob("*.parquet") if not file.stem.endswith(("_training", "_costs"))}
    assert tables <= conditions and COMMITTED
    for name in tables:
        rows, origin = pd.read_parquet(SHIPPED / f"{name}.parquet"), json.loads((SHIPPED / f"{name}.json").read_text())
        assert sorted(rows.seed.unique()) == origin["seeds"] and sorted(rows.pretraining_seed.unique()) == origin["pretraining_seeds"]
        assert set(rows.condition) == {name} and origin["revisions"]
        assert max(file.stat().st_size for file in SHIPPED.glob(f"{name}*.parquet")) < 2**20


TOY = """
import matplotlib.pyplot as plt
from echochamber.plots import save_figure
from echochamber.study.figures import figure_folder, open_figure
from echochamber.study.reading import ACCURACY, Results, Verdict, own_seed_line, value, write_verdict
by_hand, config = config is None, open_figure("toy", preset, config)
results, end, verdict = Results.read(config), (config.conditions[0].name, 120), Verdict("T1")
verdict.predict("1 it learns", f"{value(results, end, ACCURACY).value:.2f}", True, headline=True)
with figure_folder(name, config, by_hand) as folder:
    save_figure(plt.figure(), folder / "toy")
    write_verdict(folder, verdict, results, "a toy", own_seed_line(results, end, {"accuracy": ACCURACY}))
"""


@pytest.mark.sessions
def test_a_figure_is_one_entry_and_one_notebook(tmp_path, monkeypatch):
    "Five lines and a notebook of ten; drawn from prepared tables, with the reader's own seed."
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("ECHOCHAMBER_NOTEBOOKS", str(tmp_path / "nbs"))
    parameters = nbformat.v4.new_code_cell("name = 'toy'\nconfig = None\npreset = 'laptop'", metadata={"tags": ["parameters"]})
    (tmp_path / "nbs/figures").mkdir(parents=True)
    (tmp_path / "nbs/experiments").symlink_to(ROOT / "nbs/experiments")
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(TOY)]), tmp_path / "nbs/figures/toy.ipynb")

    toy = Figure(name="toy", claim="T1", title="a toy learns", conditions=(Condition(),))
    monkeypatch.setitem(figures.FIGURES, "toy", toy)

    table = pd.read_parquet(SHIPPED / "grpo.parquet")
    write_table(table_file(toy.conditions[0], "laptop"), table)
    assert redraw("laptop") == {"toy": "T1 reproduced: a toy; 1 of 1 predictions hold."}
    pretend_runs(toy.conditions[0], 0, table[table.seed == 1])
    drawn = [reproduce([toy], "laptop")["toy"] for _ in range(2)]
    assert drawn[0].startswith("T1 reproduced: a toy; 1 of 1 predictions hold. Your seed (grpo): accuracy")
    assert read_if_there(verdict_file("toy", "laptop"))["seeds"] == sorted(table.seed.unique()), "the shipped seeds stay the results"
    attempts = [read_if_there(run / "provenance.json")["attempts"] for run in (tmp_path / "outputs/runs/figure").iterdir()]
    assert drawn[0] == drawn[1] and attempts == [1, 1], "nothing is drawn twice"


def test_a_table_does_not_grow_with_rows_of_another_edition(tmp_path):
    file, rows = tmp_path / "grpo.parquet", pd.DataFrame({"seed": [0, 0, 1], "format": pd.Categorical(["omi2", "omi1", "omi2"])})
    write_table(file, rows)
    new = pd.DataFrame({"seed": [5, 5], "format": ["tinygsm", None]})
    grown = with_rows_kept(file, new, [1])
    assert grown.seed.tolist() == [1, 5, 5] and grown.format.fillna("").tolist() == ["omi2", "tinygsm", ""]
    with pytest.raises(StudyError, match=r"grpo.parquet: .* \(style\)"):
        with_rows_kept(file, new.assign(style="short names"), [1])


@pytest.mark.parametrize("asked, same, kept", [("3", True, "5"), ("5", True, ""), ("5-7", True, "5"), ("2-6", True, "2"), ("5-7", False, "")])
def test_seeds_stay_that_this_code_computed_and_that_do_not_come_again(tmp_path, monkeypatch, asked, same, kept):
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path))
    for condition, expected in ((Condition(), parse_seeds(kept) if kept else []), (Condition(pretraining_seed=0), [])):
        runs = [run for seed in range(5) for run in runs_of(condition, "laptop", seed)]
        write_table(table_file(condition, "laptop", "_costs"), pd.DataFrame({"reference": [run.reference for run in runs]}))
        code = {run.stage: run.code if same else "other" for run in runs}
        table_file(condition, "laptop").with_suffix(".json").write_text(json.dumps({"seeds": [0, 1, 2, 3, 4], "code": code}))
        assert seeds_kept(condition, "laptop", parse_seeds(asked)) == expected


def test_seeds_of_another_preset_do_not_stay(tmp_path, monkeypatch):
    "A preset is no code: what it says is in the names of the runs, which the table of costs tells."
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path))
    costs = table_file(Condition(), "laptop", "_costs")
    write_table(costs, pd.DataFrame({"reference": [run.reference for seed in (0, 1) for run in runs_of(Condition(), "laptop", seed)]}))
    code = {run.stage: run.code for run in runs_of(Condition(), "laptop", 0)}
    costs.with_name("grpo.json").write_text(json.dumps({"seeds": [0, 1], "code": code}))
    assert seeds_kept(Condition(), "laptop", [5]) == [0, 1]
    rows = pd.read_parquet(costs).astype(str)
    write_table(costs, rows.assign(reference=[name.replace("seed1-", "seed1-0") for name in rows.reference]))
    assert seeds_kept(Condition(), "laptop", [5]) == [0]
    costs.write_bytes(b"damaged")
    assert seeds_kept(Condition(), "laptop", [5]) == []


def test_every_shipped_seed_would_stay():
    "Nothing in the repository is of another code or preset: tables can grow by seeds that are computed elsewhere."
    conditions = {one.name: one for name in COMMITTED for one in FIGURES[name].conditions if (SHIPPED / f"{one.name}.json").exists()}
    for name, condition in conditions.items():
        assert seeds_kept(condition, "laptop", [99]) == json.loads((SHIPPED / f"{name}.json").read_text())["seeds"], name
