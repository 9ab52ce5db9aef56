"What the benchmarks share, where only a test can look: a GPU's clock, the notebooks' parameters, and notebooks that run."
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from echochamber.core import project_root, read_json
from echochamber.study.speed import machine_name, matrix_rate, memory_bandwidth, seconds_of, top_operators, use_device

BENCHMARKS = sorted((project_root() / "nbs/benchmarks").glob("[a-z]*.ipynb"))
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_one_cell_of_parameters_all_literals(path):
    tagged = [cell for cell in json.loads(path.read_text())["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    found = {statement.targets[0].id: ast.literal_eval(statement.value) for statement in ast.parse("".join(tagged[0]["source"])).body}
    assert found["quick"] is False and found["sizes"] == {}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_make_gpu_runs_every_benchmark_on_the_device_that_is_asked_for(device):
    said = subprocess.run(["make", "--dry-run", "--old-file=.venv/.ready", "gpu", f"DEVICE={device}"], cwd=project_root(),
                          check=True, capture_output=True, text=True).stdout
    assert set(re.findall(r"notebook (\w+) ", said)) == {path.stem for path in BENCHMARKS}
    assert f"-p device {device}" in said and ("--preset gpu" in said) == (device == "cuda")
    assert int(re.search(r"\+ (\d+) \)", said)[1]) < (540 if device == "cuda" else 240)  # under nine, under four minutes


@pytest.mark.sessions
@pytest.mark.parametrize("name", ["generation", "grading", "rl_step"])
def test_a_trial_runs_and_leaves_nothing_among_the_results(name, tmp_path):
    environment = os.environ | {"ECHOCHAMBER_OUTPUTS": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([Path(sys.executable).parent / "papermill", project_root() / f"nbs/benchmarks/{name}.ipynb",
                    tmp_path / "executed.ipynb", "--kernel", "python3", "--no-progress-bar", "-p", "quick", "True"],
                   check=True, capture_output=True, env=environment, timeout=300)
    kept, = tmp_path.glob(f"benchmarks/quick/*/{name}.json")
    assert read_json(kept)["hardware"]["gpus"] == [] and "trial" in read_json(kept)["machine"]
    assert not (tmp_path / "results").exists()


@pytest.mark.cuda
@cuda
def test_the_clock_waits_for_a_gpu_and_the_profile_sees_its_kernels():
    device = use_device("cuda")
    left = torch.randn(8192, 8192, device=device)
    rate, bandwidth = matrix_rate(device, torch.bfloat16), memory_bandwidth(device)
    assert 1e13 < rate < 5e15 and 1e11 < bandwidth < 2e13
    assert seconds_of(lambda: left @ left, device) > 2 * 8192**3 / 5e15  # a launch alone takes microseconds
    spent = top_operators(lambda: [left @ left for _ in range(10)], device, count=3)
    assert spent.iloc[0] > 0.5 * spent.sum() and machine_name().startswith(("nvidia", "amd"))
