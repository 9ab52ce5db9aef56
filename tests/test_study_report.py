"The report in the repository is what is written from what is committed, whole, and good to read wherever it is opened."
import json
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from browser import page, until  # noqa: F401 (a fixture)
from bs4 import BeautifulSoup

from echochamber.core import outputs_folder, project_root, refused
from echochamber.study.cli import main
from echochamber.study.figures import FIGURES, figures_at, picture_file, table_file, verdict_file
from echochamber.study.report import COLOURS, PREDICTED, notebooks_in, report_page, short_name, verdicts, write_report

REPORT = project_root() / "outputs/report.html"


@pytest.fixture(scope="module")
def soup() -> BeautifulSoup:
    return BeautifulSoup(REPORT.read_text(encoding="utf-8"), "html.parser")


def test_it_is_what_is_written_from_what_is_committed():
    assert report_page() == REPORT.read_text(encoding="utf-8"), "run `echochamber report` after `make figures`"


@pytest.mark.parametrize("name", FIGURES)
def test_the_commits_of_a_prediction_are_those_of_its_history(name):
    "A commit cannot know its own name, so the last one may be missing here until the next."
    def git(*arguments: str) -> str:
        told = subprocess.run(["git", *arguments], cwd=project_root(), capture_output=True, text=True)
        return told.stdout if told.returncode == 0 else ""

    if git("rev-parse", "--is-shallow-repository").strip() != "false":
        pytest.skip("there is no history here")
    history = git("log", "--reverse", "--abbrev=7", "--no-patch", "--format=%h",
                  f"-L/Prediction/,/What would refute/:nbs/figures/{name}.ipynb").split()
    named = PREDICTED.get(name, "").split()
    assert history[: len(named)] == named and len(history) - len(named) <= 1, f"PREDICTED lacks some of {' '.join(history)}"


def test_every_figure_has_its_article_in_the_order_of_the_argument(soup):
    parts = ["Claimed and predicted", "Measured", "Verdict", "Command", "Cost and provenance"]
    assert [article["id"] for article in soup.find_all("article")] == list(verdicts())
    for article in soup.find_all("article"):
        heads = [head.get_text() for head in article.find_all("h3")]
        assert [head for head in heads if head in parts] == parts
        before = article.img.find_previous("h3").get_text(), article.img.find_next("h3").get_text()
        assert before == ("Verdict", "Command") and "What would refute it" in article.get_text()


def test_figures_without_results_are_named(soup):
    text = soup.find(id="findings").get_text()
    wanted = figures_at("laptop")
    assert all(FIGURES[name].title in text for name in wanted if name not in verdicts())
    assert ("Not measured yet" in text) == (len(verdicts()) < len(wanted)) and FIGURES["harder"].title not in text


def test_costs_count_every_run_once(soup):
    rows = [[cell.get_text() for cell in row.find_all(["th", "td"])] for row in soup.find(id="cost").tbody.find_all("tr")]
    assert [row[0] for row in rows] == [*map(short_name, verdicts()), "all figures, each run once"]
    files = {table_file(condition, "laptop", "_costs") for name in verdicts() for condition in FIGURES[name].conditions}
    runs = pd.concat(pd.read_parquet(file) for file in files if file.exists()).drop_duplicates("reference")
    assert int(rows[-1][1]) == len(runs) < sum(int(row[1]) for row in rows[:-1])
    assert sum(map(float, rows[-1][3:])) == pytest.approx(runs.seconds.sum() / 3600, abs=0.01 * len(rows[-1][3:]))
    told = soup.header.get_text()
    assert all(machine in told for machine in runs.machine.unique()) and "0.0 hours on" not in soup.get_text()


def test_figures_go_by_their_names_and_in_their_order(soup):
    links = {link["href"][1:]: link.get_text() for link in soup.nav.find_all("a")}
    assert all(links[name] == short_name(name) for name in verdicts())
    assert {link.get_text() for link in soup.find(id="negative").find_all("a")} <= set(map(short_name, FIGURES))
    assert [path.stem for path in notebooks_in("figures")] == [name for name in FIGURES if name in {path.stem for path in notebooks_in("figures")}]
    assert [path.stem for path in notebooks_in("experiments")] == ["pretrain", "finetune", "evaluate", "evaluate_vllm"]


def test_headings_and_landmarks_are_in_order(soup):
    levels = [int(head.name[1]) for head in soup.find_all(["h1", "h2", "h3", "h4", "h5", "h6"])]
    assert levels.count(1) == 1 == levels[0] and all(below - above <= 1 for above, below in pairwise(levels))
    assert soup.html["lang"] and soup.title.get_text() and all(len(soup.find_all(part)) == 1 for part in ("header", "nav", "main", "footer"))
    assert soup.body.a["href"] == "#findings" and "skip" in soup.body.a["class"]


def test_what_eyes_see_is_told_in_words(soup):
    assert all(len(img["alt"]) > 40 and "n = " in img["alt"] for img in soup.find_all("img"))
    assert all(table.caption.get_text() for table in soup.find_all("table")) and all(head["scope"] for head in soup.find_all("th"))
    for one in soup.find_all(class_="mark"):
        assert one.span["aria-hidden"] == "true" and len(one.get_text(strip=True)) > len(one.span.get_text())


def test_every_link_leads_somewhere_and_nothing_is_loaded(soup):
    ids = [element["id"] for element in soup.find_all(id=True)]
    assert len(ids) == len(set(ids))
    for link in soup.find_all("a"):
        target = link["href"]
        assert target[1:] in ids if target[0] == "#" else "://" in target or (REPORT.parent / target.split("#")[0]).exists(), target
    assert not soup.find_all(["script", "iframe", "object"]) and {link["href"] for link in soup.find_all("link")} == {"data:,"}
    assert all(img["src"].startswith("data:image/svg+xml;base64,") for img in soup.find_all("img"))


# --- what may be missing or broken --------------------------------------------------------------------------------------

@pytest.fixture
def one_figure(tmp_path, monkeypatch) -> Path:
    "An outputs folder in which only `errors` was published."
    monkeypatch.setenv("ECHOCHAMBER_OUTPUTS", str(tmp_path / "outputs"))
    for file in ("results/laptop/errors.json", "figures/laptop/errors.svg"):
        (tmp_path / "outputs" / file).parent.mkdir(parents=True)
        shutil.copy(REPORT.parent / file, tmp_path / "outputs" / file)
    return tmp_path / "outputs"


def test_partial_results_make_a_report(one_figure):
    soup = BeautifulSoup(write_report().read_text(), "html.parser")
    assert [article["id"] for article in soup.find_all("article")] == ["errors"]
    assert FIGURES["convergence"].title in soup.find(id="findings").get_text()
    assert all((one_figure / link["href"].split("#")[0]).exists() for link in soup.find_all("a")
               if link["href"][0] != "#" and "://" not in link["href"])


def test_texts_are_no_markup(one_figure):
    file = verdict_file("errors", "laptop", ship=True)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"finding": "a <b>bold</b> claim & more"}))
    assert "A &lt;b&gt;bold&lt;/b&gt; claim &amp; more." in report_page()


@pytest.mark.parametrize(("broken", "text", "sentence"), [
    ("results/laptop/errors.json", "{", "errors.json: is not valid JSON"),
    ("figures/laptop/errors.svg", "<svg", "`echochamber figures errors --preset laptop` draws it"),
    ("figures/laptop/errors.svg", None, "`echochamber figures errors --preset laptop` draws it"),
    ("results/laptop/errors.json", None, "no figure has been drawn yet")])
def test_what_is_broken_is_named_and_nothing_is_written(one_figure, broken, text, sentence):
    (one_figure / broken).unlink() if text is None else (one_figure / broken).write_text(text)
    said = refused(write_report)
    assert sentence in said and "\n" not in said and not list(one_figure.rglob("*.html"))


INCOMPLETE = pd.DataFrame({"reference": ["a"], "seconds": [1.0]}).to_parquet()


@pytest.mark.parametrize(("ending", "damage"), [
    ("_costs.parquet", lambda data: data[: len(data) // 2]), ("_costs.parquet", lambda data: b""), ("_costs.parquet", lambda data: INCOMPLETE),
    ("_costs.parquet", None), (".json", lambda data: data[:40]), (".json", lambda data: data.replace(b'"seeds"', b'"sown"')),
    (".json", lambda data: b'{"seeds": 3}'), (".json", lambda data: b"\xff"), (".json", None)])
def test_a_damaged_table_is_named_with_its_mend(one_figure, ending, damage):
    for whole in (REPORT.parent / "results/laptop").glob("grpo[._]*"):
        if whole.name in ("grpo.json", "grpo_costs.parquet"):
            shutil.copy(whole, one_figure / "results/laptop")
    assert "Where the tables of E errors come from" in report_page()
    file = one_figure / f"results/laptop/grpo{ending}"
    file.unlink() if damage is None else file.write_bytes(damage(file.read_bytes()))
    said = refused(write_report)
    assert said.startswith(f"{file}: cannot be read") and f"`git checkout -- {file}`" in said and "\n" not in said
    assert "`echochamber reproduce errors --preset laptop --seeds 5 --ship`" in said and not list(one_figure.rglob("*.html"))


def test_an_incomplete_verdict_is_named_with_its_mend(one_figure):
    file = verdict_file("errors", "laptop", ship=True)
    file.write_text('{"claim": "E"}')
    assert "does not tell finding, own" in (said := refused(report_page)) and "`echochamber figures errors --preset laptop`" in said


def test_a_place_that_cannot_be_written_gets_one_sentence(one_figure, capfd):
    (one_figure / "report.html").mkdir()
    with pytest.raises(SystemExit) as end:
        main(["report"])
    complaint = capfd.readouterr().err
    assert end.value.code == 1 and "report.html" in complaint and complaint.count("\n") == 1 and not list(one_figure.rglob("*.tmp"))


def test_the_readers_own_results_have_a_report_of_their_own(one_figure):
    assert "no figure has been drawn yet" in refused(write_report, ship=False)
    for move in (verdict_file, lambda *where, ship=False: picture_file(*where, ".svg", ship)):
        move("errors", "laptop").parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(move("errors", "laptop", ship=True), move("errors", "laptop"))
    assert write_report(ship=False) == outputs_folder() / "reproduced/laptop/report.html"
    assert "Results computed here" in write_report(ship=False).read_text() and not (one_figure / "report.html").exists()


# --- in a browser -------------------------------------------------------------------------------------------------------

PICTURES = "[...document.images].map(img => [img.complete && img.naturalWidth, img.getBoundingClientRect().width, img.getBoundingClientRect().height])"


def look(page, width: int, scheme: str) -> None:  # noqa: F811
    "Open the report in a window of that width, and wait until all pictures are there."
    for domain in ("Log", "Runtime", "Network", "Page"):
        page.send(f"{domain}.enable")
    page.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
    page.send("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.events.clear()
    page.send("Page.navigate", url=REPORT.as_uri())
    until(lambda: page.value("document.readyState") == "complete" and len(page.value(PICTURES)) == len(verdicts())
          and all(drawn for drawn, *_ in page.value(PICTURES)))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_every_figure_is_drawn_and_nothing_sticks_out(width, scheme, page):  # noqa: F811
    look(page, width, scheme)
    assert all(size > 100 for picture in page.value(PICTURES) for size in picture)
    assert page.value("document.documentElement.scrollWidth") <= width
    paper = COLOURS["paper"][scheme == "dark"].lstrip("#")
    shown = page.value("getComputedStyle(document.body).backgroundColor")
    assert shown == f"rgb({', '.join(str(int(paper[at : at + 2], 16)) for at in (0, 2, 4))})"


def test_the_browser_complains_of_nothing_and_asks_nobody(page):  # noqa: F811
    look(page, 1280, "light")
    kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert not [event for event in page.events if event["method"] in kinds]
    asked = [event["params"]["request"]["url"] for event in page.events if event["method"] == "Network.requestWillBeSent"]
    assert asked and not [url for url in asked if not url.startswith(("file://", "data:"))]


def test_the_keyboard_reaches_the_findings_first(page):  # noqa: F811
    look(page, 1280, "light")
    for kind in ("keyDown", "keyUp"):
        page.send("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert page.value("document.activeElement.textContent") == "Skip to the findings"
    assert page.value("document.activeElement.getBoundingClientRect().top") >= 0
    assert page.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"


SEEN = "document.querySelector('details table').checkVisibility()"


def test_on_paper_long_names_break_and_what_is_folded_is_open(page):  # noqa: F811
    look(page, 700, "light")
    assert page.value(SEEN) is False
    page.send("Emulation.setEmulatedMedia", media="print")
    assert page.value(SEEN) is True and page.value("document.documentElement.scrollWidth") <= 700
    assert not page.value("[...document.querySelectorAll('.wide')].filter(box => box.scrollWidth > box.clientWidth).length")
