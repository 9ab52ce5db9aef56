"A run with two processes is two kernels of one notebook, and computes what one does."
import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from echochamber.core import StudyError
from echochamber.study.conditions import Condition, runs_of
from echochamber.study.execution import launch, run_task
from echochamber.study.graph import gpus_of
from echochamber.study.runs import Run
from echochamber.study.stages import PretrainConfig

pytestmark = pytest.mark.sessions


@pytest.fixture(autouse=True)
def outputs_here(tmp_path, monkeypatch):
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path / "outputs"))


def pretraining(processes: int) -> Run:
    told = runs_of(Condition(), "smoke", 0)[0].config.model_dump()
    fit = told["fit"] | {"steps": 3, "precision": "32-true", "processes": processes, "checkpoint_every": 1}
    fit["optimiser"] = fit["optimiser"] | {"learning_rate": 3e-4, "warmup": 0}
    return Run("pretrain", f"on-{processes}", PretrainConfig(**told | {"fit": fit, "snapshots": ()}))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(max((run.folder / "checkpoints").glob("step-*")) / "model.safetensors")


def test_two_kernels_equal_one():
    one, two = pretraining(1), pretraining(2)
    for run in (one, two):
        launch(run_task(run, threads=1))
        assert run.done and [file.name for file in run.folder.glob("[!.]*.ipynb")] == ["pretrain.ipynb"]
    torch.testing.assert_close(weights(two), weights(one), atol=1e-6, rtol=0)
    histories = [pd.read_parquet(run.folder / "metrics.parquet") for run in (one, two)]
    pd.testing.assert_series_equal(*(history.loss for history in histories), atol=1e-5, rtol=1e-4)
    other = json.loads((two.folder / ".rank-1.ipynb").read_text(encoding="utf-8"))
    assert all(cell["execution_count"] for cell in other["cells"] if cell["cell_type"] == "code"), "the second kernel took part"


def test_more_ranks_than_gpus_are_refused_with_the_numbers():
    with pytest.raises(StudyError, match="the run has 8 processes, but there are 4 GPUs"):
        gpus_of(8, 0, list("0123"))
