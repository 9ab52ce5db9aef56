"What figures conclude: tables are what was planned, and verdicts say no where the answer is no."
import ast
import json
import shutil

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from pretended_runs import pretend_runs

from echochamber.core import StudyError, project_root, refused
from echochamber.study.conditions import Condition, condition_labels
from echochamber.study.figures import FIGURES, TABLES, conditions_at, figure_run, table_file, write_table
from echochamber.study.reading import (
    ACCURACY,
    GREEDY,
    Results,
    Tables,
    Verdict,
    change,
    own_seed_line,
    seed_values,
    share,
    value,
    with_common_seeds,
)

PPO, GRPO = FIGURES["convergence"].conditions
SHIPPED = project_root() / "outputs/results/laptop"


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    "A copy of the committed tables in an outputs folder of its own; the folder of the copies."
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path))
    return shutil.copytree(SHIPPED, tmp_path / "results/laptop")


def reproduce_seed(condition: Condition, seed: int) -> None:
    "One shipped seed as the reader's seed 0."
    table = pd.read_parquet(SHIPPED / f"{condition.name}.parquet")
    pretend_runs(condition, 0, table[table.seed == seed])


def test_results_are_the_committed_rows(shipped):
    results = Results.read(figure_run(FIGURES["convergence"], "laptop").config)
    tables = [pd.read_parquet(SHIPPED / f"{one.name}.parquet") for one in (PPO, GRPO)]
    common = set.intersection(*(set(table.seed) for table in tables))  # a condition may have more for other figures
    tables = [table[table.seed.isin(common)] for table in tables]
    assert {*results.costs.seed} == {*results.training.seed} == common
    assert len(results.evaluation) == sum(map(len, tables)) and results.own.empty
    assert results.seeds == sorted(common) and (results.problems, results.samples) == (200, 16)
    assert results.pretrainings == {one.name: table.pretraining_seed.nunique() for one, table in zip((PPO, GRPO), tables, strict=True)}
    rows = results.rows(GRPO.name, 120)
    assert value(results, (GRPO.name, 120), ACCURACY).value == pytest.approx(
        (rows[rows["mode"] == "sampled"].outcome == "correct").mean())
    each = seed_values(rows, GREEDY, results.ks)
    greedy = rows[rows["mode"] == "greedy"]
    assert each.to_dict() == pytest.approx((greedy.outcome == "correct").groupby(greedy.seed).mean().to_dict())
    assert change(results, (GRPO.name, 0), (GRPO.name, 120), ACCURACY).low > 0.1


def test_a_table_that_changes_after_planning_is_refused(shipped):
    config = figure_run(FIGURES["convergence"], "laptop").config
    pd.read_parquet(shipped / f"{PPO.name}.parquet").head(100).to_parquet(shipped / f"{PPO.name}.parquet")
    with pytest.raises(StudyError, match="changed after this figure was planned"):
        Results.read(config)
    (shipped / f"{PPO.name}.parquet").unlink()
    with pytest.raises(StudyError, match="changed after"):
        Results.read(config)


def test_the_readers_rows_lie_beside_the_shipped_ones(shipped):
    for condition in (PPO, GRPO):
        reproduce_seed(condition, 1)
    results = Results.read(figure_run(FIGURES["convergence"], "laptop", seeds=[0]).config)
    assert len(results.seeds) >= 3 and sorted(results.own.seed.unique()) == [0]
    for condition in (PPO, GRPO):
        line, alone = own_seed_line(results, (condition.name, 120), {"accuracy": ACCURACY}), results.pretrainings[condition.name] == 1
        assert ("share one pretraining" in line) == alone and ("within" in line or "outside" in line) != alone
    assert not Results.read(figure_run(FIGURES["convergence"], "laptop").config).own.size


def test_without_shipped_tables_the_readers_are_the_results(tmp_path, monkeypatch):
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path))
    with pytest.raises(StudyError, match="reproduce convergence"):
        figure_run(FIGURES["convergence"], "laptop")
    config = figure_run(FIGURES["convergence"], "laptop", seeds=[0]).config
    with pytest.raises(StudyError, match="is needed first"):
        Results.read(config)
    for condition in (PPO, GRPO):
        reproduce_seed(condition, 2)
    results = Results.read(config)
    assert results.seeds == [0] and results.own.empty and len(results.costs) == 6


def test_whole_seeds_judge_the_readers_seed(shipped):
    "The shipped seed of median accuracy, taken for the reader's, lies within the others; its beginning does not."
    whole = pd.read_parquet(SHIPPED / "grpo.parquet").assign(condition=GRPO.name)
    finals = {"accuracy": ACCURACY, "share": share("tinygsm")}
    by_seed = seed_values(whole[whole.step == 120], ACCURACY, [1])
    middle = by_seed.sort_values().index[len(by_seed) // 2]
    near = Results(whole, own=whole[whole.seed == middle])
    assert own_seed_line(near, (GRPO.name, 120), finals).count("within") == 2
    early = whole[(whole.seed == middle) & (whole.step == 0)].assign(step=120)
    assert own_seed_line(Results(whole, own=early), (GRPO.name, 120), finals).count("outside") >= 1
    four = whole[whole.seed != middle]
    assert own_seed_line(near, (GRPO.name, 120), finals) == own_seed_line(Results(four, own=near.own), (GRPO.name, 120), finals)


def run_cells(figure: str) -> dict:
    "Execute the code of a figure's notebook in this process, as if by hand, but for its picture, which nobody looks at; its names."
    matplotlib.use("Agg")
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("echochamber.plots.save_figure", lambda figure, path: None)
        for cell in json.loads((project_root() / f"nbs/figures/{figure}.ipynb").read_text())["cells"]:
            if cell["cell_type"] == "code":
                exec(compile(ast.parse("".join(cell["source"])), figure, "exec"), names)
    plt.close("all")
    return names


def test_a_model_that_never_moves_is_not_reproduced(shipped):
    "The convergence figure on tables whose every checkpoint is the start."
    for condition in (PPO, GRPO):
        table = pd.read_parquet(shipped / f"{condition.name}.parquet")
        start = table[(table.step == 0) & (table.problem < 40)]
        idle = pd.concat([start.assign(step=step, sampled=128 * step) for step in (0, 8, 120)])
        write_table(shipped / f"{condition.name}.parquet", idle)
    verdict = run_cells("convergence")["verdict"]
    assert verdict.status == "not reproduced" and [one["holds"] for one in verdict.predictions] == [False] * 5


def relabel(name: str, shipped, table_of, problems: int = 40) -> dict:
    "Tables of a figure's conditions from few problems of the shipped ones, as `table_of` changes them; the names of its notebook."
    grpo = pd.read_parquet(SHIPPED / "grpo.parquet").query("seed < 5")  # however many more will be shipped
    few = grpo[(grpo.problem < problems) & grpo.step.isin((0, 120))].astype({"format": str, "outcome": str})
    for condition in FIGURES[name].conditions:
        write_table(table_file(condition, "laptop"), table_of(condition, few).assign(**condition_labels(condition)))
        for part in ("_training", "_costs"):
            rows = pd.read_parquet(SHIPPED / f"grpo{part}.parquet").query("seed < 5").assign(**condition_labels(condition))
            write_table(table_file(condition, "laptop", part), rows)
    return run_cells(name)


def test_a_control_that_moves_as_far_refutes_the_comparison(shipped):
    "The algorithms figure on tables where supervised fine-tuning ends where GRPO does."
    verdict = relabel("algorithms", shipped, lambda condition, rows: rows[rows.step == 120] if condition.algorithm == "sft" else rows)["verdict"]
    assert verdict.status == "not reproduced" and any(one.startswith("GRPO") for one in verdict.refuted_by)
    assert verdict.predictions[0]["holds"] is False


def test_a_winner_that_size_does_not_change_is_no_flip(shipped):
    "The scale figure where every size ends alike, and where the three larger ones end with prose instead."
    same = relabel("scale", shipped, lambda condition, rows: rows)
    assert not same["inside"] and not any(one["holds"] for one in same["verdict"].predictions[:3])

    def by_size(condition, rows):
        swapped = {"tinygsm": "omi2", "omi2": "tinygsm"} if condition.decoder in ("default", "x3", "x9") else {}
        return rows.assign(format=rows.format.where(rows.step == 0, rows.format.replace(swapped)))
    flipped = relabel("scale", shipped, by_size)
    assert all(one["holds"] for one in flipped["verdict"].predictions[:3]), flipped["verdict"].table.to_string()
    assert 0.225 < flipped["flip"].value < 0.338


def test_rl_that_teaches_nothing_transfers_nothing(shipped):
    "The transfer figure where the end is the start: no gain, and none at the edge either."
    def idle(condition, rows):
        return pd.concat([rows[rows.step == 0].assign(step=step) for step in (0, 120)])
    names = relabel("transfer", shipped, idle)
    held = [one["holds"] for one in names["verdict"].predictions]
    assert names["verdict"].status == "not reproduced" and not held[0] and held[2] is not False and not held[4]
    assert all(table.value.abs().max() < 1e-9 for table in names["edges"].values()), "nothing regresses to the mean"


def ends_where_it_began(rows: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([rows[rows.step == 0].assign(step=step) for step in (0, 120)])


def test_a_penalty_keeps_a_minority_only_if_it_does(shipped):
    "The kl figure where no penalty matters, and where one of 0.01 stops everything."
    none = relabel("kl", shipped, lambda condition, rows: rows, problems=200)["verdict"]
    assert [one["holds"] for one in none.predictions[:5]] == [False, True, False, True, True] and none.status == "not reproduced"

    def stopped(condition, rows):
        return ends_where_it_began(rows) if condition.kl_coefficient >= 0.01 else rows
    papers = relabel("kl", shipped, stopped, problems=200)["verdict"]
    assert [one["holds"] for one in papers.predictions[:5]] == [True, True, True, True, False], papers.table.to_string()


def test_rl_that_does_nothing_mends_nothing(shipped):
    "The errors figure where the end is the start."
    verdict = relabel("errors", shipped, lambda condition, rows: ends_where_it_began(rows))["verdict"]
    assert verdict.status == "not reproduced" and not any(one["holds"] for one in verdict.predictions[:3])


def test_a_verifier_that_does_not_matter_is_seen(shipped):
    "The verifier figure where every verifier teaches as much, also the one that rewards wrong answers."
    verdict = relabel("verifier", shipped, lambda condition, rows: rows, problems=200)["verdict"]
    assert [one["holds"] for one in verdict.predictions] == [False, False, True, True, True] and verdict.status == "not reproduced"


def test_entropy_that_buys_accuracy_is_told_from_entropy_that_does_not(shipped):
    "The entropy figure on rewards that lie on its curve, and on rewards that rise while entropy stays."
    def status(entropy, reward) -> list:
        def training(name: str, rows: pd.DataFrame) -> None:
            noise = np.random.default_rng(len(name)).normal(0, 0.004, len(rows))
            found = entropy(rows.step.astype(float)) + noise
            write_table(shipped / f"{name}_training.parquet", rows.assign(entropy=found, reward=reward(found, rows.step)))

        grpo = pd.read_parquet(SHIPPED / "grpo_training.parquet").astype({"entropy": float, "reward": float})
        for condition in FIGURES["entropy"].conditions:
            rows = pd.read_parquet(SHIPPED / "grpo.parquet")
            write_table(table_file(condition, "laptop"), rows[rows.problem < 9].assign(**condition_labels(condition)))
            training(condition.name, grpo[grpo.stage == "finetune"].assign(**condition_labels(condition)))
        return [one["holds"] for one in run_cells("entropy")["verdict"].predictions]

    falls = lambda step: 0.2 * np.exp(-step / 40)
    assert status(falls, lambda found, step: 2.3 - 1.5 * np.exp(found)) == [True] * 4 + [None]
    assert status(lambda step: 0.1, lambda found, step: 0.3 + 0.004 * step)[:2] == [False, False]


def test_a_law_that_errs_is_seen(shipped):
    "The theory figure on the runs of convergence alone, and where programs win although prose is the accurate one."
    for file in shipped.glob("*.parquet"):
        if file.stem not in {f"{one.name}{part}" for one in (PPO, GRPO) for part in TABLES}:
            file.unlink()

    def verdict(change) -> Verdict:
        for condition in (PPO, GRPO):
            rows = pd.read_parquet(SHIPPED / f"{condition.name}_training.parquet")
            write_table(shipped / f"{condition.name}_training.parquet", change(rows))
        return run_cells("theory")["verdict"]

    right = [one["holds"] for one in verdict(lambda rows: rows).predictions]
    assert right[0] and right[2]
    exchanged = {"accuracy_tinygsm": "accuracy_omi2", "accuracy_omi2": "accuracy_tinygsm"}
    wrong = verdict(lambda rows: rows.rename(columns=exchanged))
    assert wrong.status == "not reproduced" and not any(one["holds"] for one in wrong.predictions[:3])


def test_a_verdict_without_its_headline_is_not_reproduced():
    for holds, status in (((True, True), "reproduced"), ((True, False), "partly reproduced"), ((False, True), "not reproduced"),
                          ((None, True), "undecided"), ((True, None), "partly reproduced"), ((False, None), "not reproduced")):
        verdict = Verdict("T")
        for place, one in enumerate(holds):
            verdict.predict(str(place), "measured", one, headline=place == 0)
        assert verdict.status == status


def test_a_seed_that_stands_for_two_pretrainings_is_refused():
    "The shipped conditions start from one model each seed; with two seeds of one of them exchanged they do not."
    ends = [pd.read_parquet(SHIPPED / f"{name}.parquet").query("step == 0") for name in ("grpo", "ppo")]
    conditions = (Condition(), Condition(algorithm="ppo"))
    assert with_common_seeds(Tables(pd.concat(ends), conditions=conditions)).seeds == [0, 1, 2, 3, 4]
    exchanged = ends[1].seed.replace({0: 1, 1: 0})
    ends[1] = ends[1].assign(seed=exchanged, pretraining_seed=exchanged)
    said = refused(with_common_seeds, Tables(pd.concat(ends), conditions=conditions))
    assert said.startswith("seed 0: ppo and grpo do not start from the same model") and "in one place" in said


@pytest.mark.parametrize("helps", [True, False])
def test_rl_on_one_set_helps_on_a_harder_one_only_if_it_does(tmp_path, monkeypatch, helps):
    """The figure of real problems at preset paper, on what the small model writes: all of GSM8K gains, of MATH-500 half of
    what models with OpenMathInstruct-2 are asked, or nothing."""
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path))
    rows = pd.read_parquet(SHIPPED / "ppo.parquet").query("step in (0, 120)").astype({"format": str, "outcome": str, "benchmark": str})
    for condition in conditions_at(FIGURES["harder"], "paper"):
        benchmark = condition.benchmarks[0]
        few = rows[rows.problem < {"gsm8k": 60, "math500": 180, "aime": 90}[benchmark]]
        gains = {"gsm8k": 1, "math500": 2 if helps and condition.mixture != "tinygsm-omi1-4x" else 1000, "aime": 1000}[benchmark]
        start = few[few.step == 0]
        start = start.assign(outcome="wrong") if benchmark == "aime" else start
        idle = pd.concat([start, start.assign(step=120)])
        mixed = pd.concat([idle[idle.problem % gains > 0], few[few.problem % gains == 0]])
        write_table(table_file(condition, "paper"), mixed.assign(**condition_labels(condition), benchmark=benchmark))
    names = run_cells("harder")
    held = [one["holds"] for one in names["verdict"].predictions]
    assert [held[place] for place in (0, 2, 4)] == [helps, True, True], names["verdict"].table.to_string()
    assert held[3] is (True if helps else None) and held[5] is None, "one model stays as it was beyond"
    assert (names["verdict"].status == "not reproduced") == bool(names["verdict"].refuted_by) == (not helps)
    assert "60 problems of gsm8k, 180 of math500, 90 of aime" in " ".join(names["figure"].get_supxlabel().split())
