"Two processes do the work of one: the same gradients, weights and histories from the same global batches."
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import process_cases
import pytest
import torch

from echochamber.core import StudyError, project_root
from echochamber.study.execution import free_port, rank_environment
from echochamber.training.distributed import run_on_all_ranks

pytestmark = pytest.mark.sessions

HERE = Path(__file__).parent
HANG = 900  # seconds; a busy machine may need many times what an idle one does, and only a hang needs it all


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    "What one process leaves, trained here."
    folder = tmp_path_factory.mktemp("alone")
    process_cases.train_all(1, folder)
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    "What two processes leave; a hang ends after a while."
    folder = tmp_path_factory.mktemp("shared")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(project_root())}
    with open(folder / "errors.txt", "w+") as errors:  # a pipe would also wait for whatever the second process holds open
        done = subprocess.run([sys.executable, str(HERE / "process_cases.py"), "2", str(folder)], env=environment,
                              stdout=errors, stderr=errors, timeout=HANG)
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
    compared = [column for column in histories[0] if "second" not in column]
    assert list(histories[0]) == list(histories[1])
    pd.testing.assert_frame_equal(*(history[compared] for history in histories), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", process_cases.CASES)
def test_the_processes_agree_to_the_bit(case, shared):
    first, second = (weights(shared / case, f"last-{rank}") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_interrupted_processes_continue_bit_by_bit_inside_a_rollout_batch(shared):
    straight, resumed = (weights(shared / case, "last-0") for case in ("ppo", "interrupted"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


LAUNCHED = """
import sys
from pathlib import Path
sys.ps1 = ">>> "  # as in a notebook, of which each rank has one of its own
import process_cases
from echochamber.training.distributed import global_rank, joined_processes
with joined_processes():
    for name in sys.argv[2:]:
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        model, history = process_cases.CASES[name](2, folder)
        process_cases.save(model, folder, f"last-{global_rank()}")
        history.to_parquet(folder / f"history-{global_rank()}.parquet")
"""


def test_ranks_of_a_launcher_equal_one(alone, tmp_path):
    cases = ("expert_iteration", "grpo", "pretraining")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{project_root()}{os.pathsep}{HERE}"}
    port = free_port()
    ranks = [subprocess.Popen([sys.executable, "-c", LAUNCHED, str(tmp_path), *cases], env=environment | rank_environment(rank, 2, port),
                              stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for process in ranks:
        complaint = process.communicate(timeout=HANG)[1]
        assert process.returncode == 0, complaint[-3000:]
    for case in cases:
        for rank in range(2):
            torch.testing.assert_close(weights(tmp_path / case, f"last-{rank}"), weights(alone / case, "last-0"), atol=1e-6, rtol=0)
        reached = [pd.read_parquet(folder / case / name).step.tolist()
                   for folder, name in ((tmp_path, "history-0.parquet"), (tmp_path, "history-1.parquet"), (alone, "history.parquet"))]
        assert reached[0] == reached[1] == reached[2]


FORKED = """
import sys
from pathlib import Path
sys.ps1 = ">>> "  # as in a notebook, whose processes cannot be started by running a script again
import process_cases
for name in ("expert_iteration", "grpo"):
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    model, history = process_cases.CASES[name](2, folder)
    process_cases.save(model, folder, "last-0")
    history.to_parquet(folder / "history.parquet")
"""


def test_processes_forked_by_a_notebook_equal_one(alone, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{project_root()}{os.pathsep}{HERE}"}
    done = subprocess.run([sys.executable, "-c", FORKED, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-3000:]
    for case in ("expert_iteration", "grpo"):
        torch.testing.assert_close(weights(tmp_path / case, "last-0"), weights(alone / case, "last-0"), atol=1e-6, rtol=0)
        reached, expected = (pd.read_parquet(folder / case / "history.parquet").step for folder in (tmp_path, alone))
        assert reached.tolist() == expected.tolist()


BROKEN_GRADER = """
import sys
sys.ps1 = ">>> "
from process_cases import grpo_config, toy_task, train_policy
from echochamber.core import StudyError
from echochamber.training.distributed import global_rank

class Broken:
    def grade(self, completions, answers):
        if global_rank() == 1:
            raise StudyError("the grader of the second process is ill; heal it")
        return toy_task()[3].grade(completions, answers)

policy, tokenizer, questions, _ = toy_task()
config = grpo_config(2, prompts=10, samples=8, train_batch=40, micro_batch=10, max_new_tokens=4, precision="32-true", processes=2)
train_policy(policy, tokenizer, questions, Broken(), config, sys.argv[1])
"""


def test_what_stops_a_fork_is_told_in_its_own_words(tmp_path):
    "The study records what the process of the notebook raises, and that is not the one that failed."
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{project_root()}{os.pathsep}{HERE}"}
    done = subprocess.run([sys.executable, "-c", BROKEN_GRADER, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=HANG)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == "echochamber.core.StudyError: the grader of the second process is ill; heal it"


def hear(rank: int, folder: Path) -> None:
    "One of two processes, of which the second fails; leaves what it was told."
    def work() -> str:
        if rank == 1:
            raise StudyError("the second process is ill; heal it")
        return "well"

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        run_on_all_ranks(work)
    except StudyError as error:
        (folder / f"heard-{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_what_stops_one_process_is_heard_by_all(tmp_path):
    "Started as a script, the first process would only see its connection closed, or wait."
    torch.multiprocessing.start_processes(hear, args=(tmp_path,), nprocs=2, start_method="fork")
    assert [(tmp_path / f"heard-{rank}.txt").read_text() for rank in (0, 1)] == ["the second process is ill; heal it"] * 2
