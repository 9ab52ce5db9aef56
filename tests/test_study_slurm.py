"A file that describes SLURM jobs: the script that they run, each mistake in one sentence, and a study on jobs of a stand-in for SLURM."
import io
import json
import os
import signal
import subprocess
import threading
from functools import partial
from pathlib import Path

import dask
import pytest
from rich.console import Console
from toy_study import ToyConfig, environment, finished, folder_of, start_session, wait_for, write_notebook

from echochamber.core import refused
from echochamber.study import graph, reproduction
from echochamber.study.graph import dask_client, slurm_cluster
from echochamber.study.runs import Run, locked

pytestmark = pytest.mark.sessions

pytest.importorskip("dask_jobqueue", reason="the extra `cluster` is not installed")

JOB = {"cores": 4, "memory": "16GB", "queue": "gpu", "account": "lab", "walltime": "02:00:00",
       "job_extra_directives": ["--gres=gpu:1"], "job_script_prologue": ["source .venv/bin/activate"],
       "scheduler_options": {"dashboard_address": ":0"}}
# Commands in the place of SLURM's: a job is a process group, its number is the group's.
SBATCH = """#!/bin/bash
cp "$1" "$1.job"
setsid bash "$1.job" > /dev/null 2>&1 < /dev/null &
echo $! >> "$(dirname "$0")/submitted"
echo "Submitted batch job $!"
"""
SQUEUE = """#!/bin/bash
while read job; do kill -0 -- "-$job" 2> /dev/null && echo "$job"; done < "$(dirname "$0")/submitted"
exit 0
"""
SCANCEL = """#!/bin/bash
kill -TERM -- "-$1"
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    "A folder at the head of PATH, and the function that puts a command there."
    (folder := tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def add(name: str, text: str) -> None:
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    return add


def describe(folder: Path, description: object) -> Path:
    text = description if isinstance(description, str) else json.dumps(description)
    (file := folder / "slurm.json").write_text(text, encoding="utf-8")
    return file


def test_the_job_script_asks_for_what_is_described_and_runs_one_run_at_a_time(tmp_path):
    with slurm_cluster(describe(tmp_path, JOB)) as cluster:
        script = cluster.job_script().splitlines()
    assert {"#SBATCH -p gpu", "#SBATCH -A lab", "#SBATCH -n 1", "#SBATCH --cpus-per-task=4", "#SBATCH --mem=15G",
            "#SBATCH -t 02:00:00", "#SBATCH --gres=gpu:1"} <= set(script)
    worker = script[-1].split()
    assert script.index("source .venv/bin/activate") < len(script) - 1 and "distributed.cli.dask_worker" in worker
    assert "--nworkers" not in worker, "one worker per job"
    last = len(worker) - 1 - worker[::-1].index("--nthreads")
    assert worker[last + 1] == "1", "which computes one run at a time"


@pytest.mark.parametrize(("description", "word"), [
    ('{"cores": 4,', "Expecting"), ("[]", "mapping"), ('"four"', ""), ({"memory": "16GB"}, "cores"), ({"cores": 4}, "memory"),
    (JOB | {"corse": 4}, "corse"), (JOB | {"memory": "plenty"}, "plenty"), (JOB | {"cores": "four"}, ""),
    (JOB | {"processes": 0}, ""), (JOB | {"worker_extra_args": 3}, ""), (JOB | {"dashboard_address": ":1"}, "scheduler_options"),
], ids=["no JSON", "a list", "a word", "no cores", "no memory", "misspelt", "no number of bytes", "no number of cores",
        "no process", "arguments are no list", "in the wrong place"])
def test_each_mistake_in_the_description_is_one_sentence(description, word, tmp_path):
    sentence = refused(lambda: slurm_cluster(describe(tmp_path, description)))
    assert sentence.startswith(f"{tmp_path / 'slurm.json'}: does not describe a SLURM cluster (") and word in sentence
    assert "\n" not in sentence and len(sentence) < 500


def test_a_description_that_is_not_there_is_named(tmp_path):
    assert str(tmp_path / "none.json") in refused(lambda: slurm_cluster(tmp_path / "none.json"))


def test_without_slurm_the_command_is_named_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch" in refused(lambda: dask_client(1, slurm=describe(tmp_path, JOB)).__enter__())


def test_what_slurm_says_against_a_job_is_told(tmp_path, commands):
    commands("sbatch", "#!/bin/sh\necho 'invalid partition specified: gpu' >&2\nexit 1\n")
    sentence = refused(lambda: dask_client(2, slurm=describe(tmp_path, JOB)).__enter__())
    assert "SLURM does not take the job" in sentence and "invalid partition specified: gpu" in sentence and "\n" not in sentence


def test_a_study_is_computed_by_jobs(tmp_path, commands):
    "And its jobs are cancelled when it has ended."
    commands("sbatch", SBATCH), commands("scancel", SCANCEL)
    write_notebook(tmp_path / "nbs")
    (tmp_path / "gate").touch()
    job = {name: value for name, value in JOB.items() if name != "job_script_prologue"}
    job |= {"cores": 1, "memory": "1GB", "local_directory": str(tmp_path / "dask")}
    session = start_session(str(tmp_path / "gate"), options=json.dumps({"slurm": str(describe(tmp_path, job))}),
                            env=environment(tmp_path))
    printed, complaint = session.communicate(timeout=240)
    assert session.returncode == 0 and finished(tmp_path, "first", "second", "third"), printed + complaint
    assert "No worker has come yet" in printed
    workers = subprocess.run(["pgrep", "-f", str(tmp_path / "dask")], capture_output=True, text=True).stdout.split()
    assert not workers, "jobs are left"


@pytest.fixture
def cluster(tmp_path, commands, monkeypatch):
    "The toy study, a stand-in for SLURM that is asked often, and the numbers of the jobs that were submitted to it."
    commands("sbatch", SBATCH), commands("scancel", SCANCEL), commands("squeue", SQUEUE)
    write_notebook(tmp_path / "nbs")
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(graph, "SlurmJobs", partial(graph.SlurmJobs, pause=0.5, rounds=2))
    job = {name: value for name, value in JOB.items() if name != "job_script_prologue"}
    job |= {"cores": 1, "memory": "1GB", "local_directory": str(tmp_path / "dask")}
    describe(tmp_path, job)
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1s"}):
        yield lambda: [int(line) for line in (tmp_path / "bin" / "submitted").read_text().split()]


def compute(place: Path, gate: Path) -> tuple[threading.Thread, io.StringIO, list]:
    "The toy study's second run, on one job of SLURM, in a thread; its log, and its end."
    run, log, end = Run("toy", "second", ToyConfig(gate=str(gate))), io.StringIO(), []

    def work():
        try:
            end.append(graph.execute([run], workers=1, slurm=place / "slurm.json", console=Console(file=log, width=200)))
        except Exception as error:
            end.append(error)
    (thread := threading.Thread(target=work)).start()
    return thread, log, end


def wait_until_it_computes(place: Path) -> None:
    wait_for(lambda: (folder := folder_of(place, "second")) and (folder / "progress.json").exists())


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "its time is over"])
def test_a_job_that_ends_is_submitted_again_and_the_study_finishes(blow, tmp_path, cluster):
    thread, log, end = compute(tmp_path, tmp_path / "gate")
    wait_until_it_computes(tmp_path)
    os.killpg(cluster()[0], blow)
    wait_for(lambda: len(cluster()) == 2, seconds=60)
    (tmp_path / "gate").touch()
    thread.join(timeout=120)
    assert end == [1] and finished(tmp_path, "second"), (end, log.getvalue())
    assert json.loads((folder_of(tmp_path, "second") / "provenance.json").read_text())["attempts"] == 2
    assert "1 of SLURM's jobs ended with work left; submitted again: 1" in log.getvalue()


def test_jobs_that_die_before_their_worker_comes_end_the_study_with_a_sentence(tmp_path, cluster, commands):
    commands("sbatch", SBATCH.replace('bash "$1.job"', "sleep 0.1"))
    thread, log, end = compute(tmp_path, tmp_path / "gate")
    thread.join(timeout=120)
    assert not thread.is_alive() and len(cluster()) == 3, log.getvalue()
    assert "ended 3 times in a row without a run having come further" in str(end[0]) and "\n" not in str(end[0])


def test_a_run_that_outlives_too_many_jobs_is_given_up_alone(tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(graph, "LOST_JOBS", 0)
    thread, log, end = compute(tmp_path, tmp_path / "gate")
    wait_until_it_computes(tmp_path)
    os.killpg(cluster()[0], signal.SIGKILL)
    thread.join(timeout=120)
    assert "toy second: every worker that computed it has died" in str(end[0]) and "\n" not in str(end[0]), log.getvalue()


def test_without_an_answer_of_slurm_only_lost_workers_are_replaced(tmp_path, cluster, commands):
    commands("squeue", "#!/bin/sh\nexit 1\n")
    thread, log, end = compute(tmp_path, tmp_path / "gate")
    wait_until_it_computes(tmp_path)
    os.killpg(cluster()[0], signal.SIGKILL)
    wait_for(lambda: len(cluster()) == 2, seconds=60)
    (tmp_path / "gate").touch()
    thread.join(timeout=120)
    assert end == [1] and finished(tmp_path, "second"), (end, log.getvalue())


def test_a_job_of_an_array_computes_its_seed_while_another_one_has_the_first(tmp_path, monkeypatch):
    "Seed 0 is held for the whole time; the figure of both would have to wait for it."
    write_notebook(tmp_path / "nbs")
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    runs = [Run("toy", f"seed{seed}", ToyConfig(after=f"seed {seed}")) for seed in range(2)]
    monkeypatch.setattr(reproduction, "figure_runs", lambda figure, preset, seeds: [runs[seed] for seed in seeds])
    monkeypatch.setattr(reproduction, "expected_seconds", lambda run, preset: 5.0)
    figures = reproduction.choose_figures(["convergence"])
    with locked(runs[0].folder, name=".executor.lock"):
        said = reproduction.compute_seed(figures, "smoke", 1, console=Console(file=io.StringIO()))
        assert finished(tmp_path, "seed1") and not finished(tmp_path, "seed0")
    assert said.startswith("seed 1 is complete, 1 of its 1 runs computed now")
    assert "0 of its 1 runs" in reproduction.compute_seed(figures, "smoke", 1)
