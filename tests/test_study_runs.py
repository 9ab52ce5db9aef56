"A run's name follows everything that can change its result; its folder is whole, resumable or absent."
import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echochamber.core import StrictConfig, StudyError, refused
from echochamber.study import runs
from echochamber.study.runs import Progress, Run, finished_run, locked, open_run


class ToyConfig(StrictConfig):
    rate: float = 0.1
    seed: int = 0
    model: str = ""


@pytest.fixture(autouse=True)
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("ECHOCHAMBER_NOTEBOOKS", str(tmp_path / "nbs"))
    monkeypatch.delenv("ECHOCHAMBER_RUN", raising=False)
    write_notebook(tmp_path / "nbs/experiments/toy.ipynb", "1 + 1")
    return tmp_path


def write_notebook(path: Path, code: str, parameters: str = "name = ''", prose: str = "# Toy") -> None:
    cells = [nbformat.v4.new_markdown_cell(prose), nbformat.v4.new_code_cell(parameters), nbformat.v4.new_code_cell(code)]
    cells[1].metadata["tags"] = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    runs.code_version.cache_clear()


def compute(run: Run) -> None:
    with open_run(run, patience=0.1) as progress:
        (run.folder / "checkpoints").mkdir(exist_ok=True)
        (run.folder / "checkpoints" / "weights").write_bytes(bytes(1000))
        progress.report(1, 1)


configs = st.builds(ToyConfig, rate=st.floats(0, 1), seed=st.integers(0, 9), model=st.text(max_size=5))


@given(configs, configs)
def test_equal_configs_and_only_they_share_a_folder(one, other):
    assert (Run("toy", "a", one).reference == Run("toy", "a", other).reference) == (one.model_dump_json() == other.model_dump_json())


def test_code_renames_a_run_and_prose_does_not(study):
    notebook, reference = study / "nbs/experiments/toy.ipynb", lambda: Run("toy", "a", ToyConfig()).reference
    first = reference()
    write_notebook(notebook, "1 + 1  # two", parameters="name = 'other'", prose="# Another title")
    assert reference() == first
    write_notebook(notebook, "1 + 2")
    assert reference() != first


def test_a_change_at_the_head_renames_the_whole_chain():
    def chain(rate: float) -> list[str]:
        references = [Run("toy", "head", ToyConfig(rate=rate))]
        for link in ("middle", "tail"):
            references.append(Run("toy", link, ToyConfig(model=references[-1].reference), parents=(references[-1],)))
        return [run.reference for run in references]
    assert chain(0.1) == chain(0.1) and not set(chain(0.1)) & set(chain(0.2))


def test_done_is_written_last_and_lists_every_artefact(monkeypatch):
    written, write_json = [], runs.write_json
    monkeypatch.setattr(runs, "write_json", lambda path, values: (written.append(path.name), write_json(path, values)))
    run = Run("toy", "a", ToyConfig())
    compute(run)
    assert written[-1] == "DONE" and written.count("DONE") == 1 and run.done
    assert set(json.loads((run.folder / "DONE").read_text())) == {
        "config.json", "provenance.json", "progress.json", "checkpoints/weights"}


DAMAGE = {
    "truncated": lambda folder: (folder / "checkpoints/weights").write_bytes(bytes(999)),
    "same size, other bytes": lambda folder: (folder / "checkpoints/weights").write_bytes(bytes(999) + b"!"),
    "missing": lambda folder: (folder / "provenance.json").unlink(),
    "DONE is empty": lambda folder: (folder / "DONE").write_text(""),
    "DONE is no object": lambda folder: (folder / "DONE").write_text("[1]"),
    "DONE is binary": lambda folder: (folder / "DONE").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("break_it", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_run_is_refused_wherever_it_is_met(break_it):
    run = Run("toy", "a", ToyConfig())
    compute(run)
    break_it(run.folder)
    assert run.status == "corrupt"
    for meet in (lambda: finished_run(run.reference), lambda: compute(run)):
        with pytest.raises(StudyError, match="damaged"):
            meet()


def test_a_finished_run_is_never_opened_again():
    run = Run("toy", "a", ToyConfig())
    compute(run)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.name != ".lock"}
    with pytest.raises(StudyError, match="finished"):
        compute(run)
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("writes", range(6))
def test_a_disk_that_fills_up_at_any_write_leaves_nothing_half_written(writes, monkeypatch):
    run, left, write_text = Run("toy", "a", ToyConfig()), [writes], Path.write_text

    def fills_up(path: Path, text: str, *arguments, **options):
        if left[0] == 0:
            write_text(path, text[:len(text) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        left[0] -= 1
        return write_text(path, text, *arguments, **options)

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", fills_up)
        with pytest.raises(StudyError, match="no space left on the disk"):
            compute(run)
    assert not (run.folder / "DONE").exists() and not list(run.folder.rglob("*.tmp"))
    for path in run.folder.glob("*.json"):
        json.loads(path.read_text())
    compute(run)
    assert run.done


def test_what_killed_writes_left_is_swept_by_the_next_attempt():
    run = Run("toy", "a", ToyConfig())
    (run.folder / "checkpoints" / ".step-000001.0a1b2c3d.tmp").mkdir(parents=True)
    (run.folder / ".resume.ckpt.0a1b2c3d.tmp").write_bytes(b"half a checkpoint")
    compute(run)
    assert run.done and not list(run.folder.rglob("*.tmp"))


LOCALE_CHILD = """
import json, sys
from echochamber.core import StrictConfig
from echochamber.study.runs import Run, finished_run, open_run
class ToyConfig(StrictConfig):
    rate: float = 0.1
    seed: int = 0
    model: str = ""
run = Run("toy", "a", ToyConfig(model="Zo\\u00eb \\u6570"))
if sys.argv[1:] == ["compute"]:
    with open_run(run) as progress:
        progress.report(1, 1, message=run.config.model)
print(json.dumps([run.reference, run.status, str(finished_run(run.reference))]))
"""


def test_a_locale_without_these_letters_gives_the_same_names_and_finds_the_same_runs(study):
    "What one terminal has computed is finished for any other one."
    write_notebook(study / "nbs/experiments/toy.ipynb", "print('Zoë 数')", prose="# Größe")
    poor = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    answers = [subprocess.run([sys.executable, "-c", LOCALE_CHILD, *words], env=os.environ | locale, check=True,
                              capture_output=True, text=True).stdout
               for words, locale in ((["compute"], poor), ([], {"PYTHONUTF8": "1"}), ([], poor))]
    assert answers[0] == answers[1] == answers[2] and json.loads(answers[0])[1] == "done"


def test_who_reports_is_waited_for_and_who_is_silent_is_not(study, monkeypatch):
    "As long as there is word of progress, for longer than the patience; after that a sentence, and no trace. The clock is ours."
    folder, holder, now, words = study / "outputs" / "held", contextlib.ExitStack(), 0.0, iter(range(10))

    def hear(place: Path) -> object:
        "Two thirds of the patience later: another word, until the run has ended."
        nonlocal now
        now += 0.02
        if (word := next(words, None)) is None:
            holder.close()
        return word

    def silence(place: Path) -> dict:
        nonlocal now
        now += 0.02
        return {"pid": 7, "host": "here"}

    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: now))
    with holder, monkeypatch.context() as patch:
        patch.setattr(runs, "read_progress", hear)
        holder.enter_context(locked(folder))
        with locked(folder, patience=0.03):
            assert now > 6 * 0.03
    with locked(folder), monkeypatch.context() as patch:
        Progress(folder)
        before = sorted(folder.iterdir())
        patch.setattr(runs, "read_progress", silence)
        assert "process 7 on here holds this run and has reported nothing for 0.03 s" in refused(lambda: locked(folder, 0.03).__enter__())
        assert sorted(folder.iterdir()) == before


def test_torch_on_a_full_disk_is_told_as_a_full_disk(study):
    "Whatever torch calls it, where the disk has room again by the time one asks."
    import torch
    run = Run("toy", "a", ToyConfig())
    with pytest.raises(StudyError, match="no space left on the disk"), open_run(run):
        torch.save(torch.zeros(100_000), "/dev/full")
    assert run.status == "failed"


class ToyFigureConfig(StrictConfig):
    figure: str
    tables: dict[str, str] = {}


def test_a_figure_is_a_run_of_its_own_notebook(study):
    "Other tables, or another style of the pictures, make another run; finished once, it is not drawn again."
    write_notebook(study / "nbs/figures/kl.ipynb", "from echochamber import plots")
    write_notebook(study / "nbs/experiments/same.ipynb", "from echochamber import plots")
    figure = Run("figure", "kl-laptop", ToyFigureConfig(figure="kl", tables={"grpo": "0a1b"}))
    assert figure.notebook == study / "nbs/figures/kl.ipynb"
    assert figure.reference != Run("figure", "kl-laptop", ToyFigureConfig(figure="kl", tables={"grpo": "2c3d"})).reference
    assert figure.code != Run("same", "a", ToyConfig()).code, "the same code, in which only a figure counts the style"
    compute(figure)
    with pytest.raises(StudyError, match="finished"):
        compute(figure)
