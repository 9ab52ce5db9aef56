"Two processes do the work of one: the same gradients, weights and histories from the same global batches."
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import process_cases
import pytest
import torch

from echochamber.core import project_root

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    "What one process leaves, trained here."
    folder = tmp_path_factory.mktemp("alone")
    process_cases.train_all(1, folder)
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    "What two processes leave; a hang ends after two minutes."
    folder = tmp_path_factory.mktemp("shared")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(project_root())}
    with open(folder / "errors.txt", "w+") as errors:  # a pipe would also wait for whatever the second process holds open
        done = subprocess.run([sys.executable, str(HERE / "process_cases.py"), "2", str(folder)], env=environment,
                              stdout=errors, stderr=errors, timeout=120)
        errors.seek(0)
        assert done.returncode == 0, errors.read()[-3000:]
    return folder


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"weights-{name}.pt", weights_only=True)


def gradients(folder: Path) -> list[torch.Tensor]:
    "The optimiser's averages of the gradients, from the last resume point: linear in them, unlike the steps of AdamW."
    checkpoint = torch.load(max(folder.rglob("resume.ckpt")), weights_only=True)
    return [state["exp_avg"] for state in checkpoint["optimizer_states"][0]["state"].values()]


@pytest.mark.parametrize("case", process_cases.CASES)
def test_two_processes_equal_one(case, alone, shared):
    "AdamW divides by the size of the gradient, so where that is rounding its steps are, too; hence 1e-6."
    ours, theirs = alone / case, shared / case
    for moment in ("first", "last-0"):
        torch.testing.assert_close(weights(theirs, moment), weights(ours, moment), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradients(theirs), gradients(ours), atol=1e-6, rtol=1e-4)
    assert max(gradient.abs().max() for gradient in gradients(ours)) > 1e-2
    histories = [pd.read_parquet(folder / "history.parquet") for folder in (ours, theirs)]
    local = ["loss"] if case == "pretraining" else []  # that of the first process's last micro-batch
    compared = [column for column in histories[0] if "second" not in column and column not in local]
    assert list(histories[0]) == list(histories[1])
    pd.testing.assert_frame_equal(*(history[compared] for history in histories), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", process_cases.CASES)
def test_the_processes_agree_to_the_bit(case, shared):
    first, second = (weights(shared / case, f"last-{rank}") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_interrupted_processes_continue_bit_by_bit_inside_a_rollout_batch(shared):
    straight, resumed = (weights(shared / case, "last-0") for case in ("ppo", "interrupted"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
