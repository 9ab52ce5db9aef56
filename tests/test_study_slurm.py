"A file that describes SLURM jobs: the script that they run, each mistake in one sentence, and a study on jobs of a stand-in for SLURM."
import json
import os
import subprocess
from pathlib import Path

import pytest
from toy_study import environment, finished, start_session, write_notebook

from echochamber.core import refused
from echochamber.study.graph import dask_client, slurm_cluster

pytestmark = pytest.mark.sessions

pytest.importorskip("dask_jobqueue", reason="the extra `cluster` is not installed")

JOB = {"cores": 4, "memory": "16GB", "queue": "gpu", "account": "lab", "walltime": "02:00:00",
       "job_extra_directives": ["--gres=gpu:1"], "job_script_prologue": ["source .venv/bin/activate"],
       "scheduler_options": {"dashboard_address": ":0"}}
# Commands in the place of SLURM's: a job is a process group, its number is the group's.
SBATCH = """#!/bin/bash
cp "$1" "$1.job"
setsid bash "$1.job" > /dev/null 2>&1 < /dev/null &
echo "Submitted batch job $!"
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
