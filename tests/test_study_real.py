"Real prompts and real benchmarks go through the same miniature chain as the synthetic ones."
import pandas as pd
import pytest

from echochamber.core import content_hash
from echochamber.data.benchmarks import load_benchmark
from echochamber.study.conditions import Condition, runs_of
from echochamber.study.graph import execute
from echochamber.study.runs import Run
from echochamber.study.stages import EvaluateConfig, FinetuneConfig, PromptsConfig


@pytest.fixture(autouse=True)
def outputs_here(tmp_path, monkeypatch):
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path / "outputs"))


def test_rl_on_real_prompts_is_measured_on_real_benchmarks(real_file):
    pretrained, finetuned, evaluated = runs_of(Condition(), "smoke", 0)
    train = real_file("gsm8k-train")
    prompts = PromptsConfig(benchmark="gsm8k-train", data=str(train))
    assert prompts.data_hash == content_hash(train)
    config = FinetuneConfig(**finetuned.config.model_dump() | {"prompts": prompts.model_dump(), "questions": 16})
    rl = Run("finetune", "real", config, parents=(pretrained,))
    assert rl.reference != finetuned.reference
    measured = {name: Run("evaluate", f"real-{name}", EvaluateConfig(**evaluated.config.model_dump() | {
        "model": rl.reference, "steps": config.snapshot_steps[-1:], "benchmark": name, "data": str(real_file(name)), "data_hash": None,
        "questions": 2, "samples": 2}), parents=(rl,)) for name in ("gsm8k", "math500", "aime24")}
    execute([pretrained, rl, *measured.values()])
    asked = set(pd.read_parquet(rl.folder / "samples.parquet").question)
    assert asked and asked <= {question.question for question in load_benchmark("gsm8k-train", train)}
    for name, run in measured.items():
        table = pd.read_parquet(run.folder / "evaluation.parquet")
        assert len(table) == 2 * (1 + 2) and ("year" in table) == (name == "aime24")
