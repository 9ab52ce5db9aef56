"Styles that keep their promise, and what the drawing functions leave on the axes."
import ast
import itertools
import json
import re

import matplotlib
import matplotlib.colors
import numpy as np
import pandas as pd
import pytest

from echochamber.core import project_root
from echochamber.data.formats import FORMATS
from echochamber.plots import (
    ALGORITHM_STYLE,
    FORMAT_STYLE,
    MARK_STYLE,
    METRIC_STYLE,
    PRECISION_STYLE,
    PROMPTS_STYLE,
    caption,
    crop,
    draw_own_seed,
    draw_seeds,
    house_style,
    mark_episode,
    plot_interval,
    save_figure,
    step_axis,
)

KINDS = [FORMAT_STYLE, METRIC_STYLE, ALGORITHM_STYLE, PRECISION_STYLE, PROMPTS_STYLE, MARK_STYLE]


@pytest.fixture
def axes():
    import matplotlib.pyplot as plt
    with matplotlib.rc_context(), plt.ioff():
        matplotlib.use("agg")
        house_style()
        figure, axes = plt.subplots(figsize=(4, 3))
        yield axes
        plt.close(figure)


def lightness(style: dict) -> float:
    return float(np.dot(matplotlib.colors.to_rgb(style["color"]), [0.299, 0.587, 0.114]))


def test_no_two_things_share_a_colour_or_a_marker():
    styles = [style for kind in KINDS for style in kind.values()]
    for first, second in itertools.combinations(styles, 2):
        distance = np.subtract(*(matplotlib.colors.to_rgb(style["color"]) for style in (first, second)))
        assert first["marker"] != second["marker"] and np.linalg.norm(distance) > 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_readable_in_grey(kind):
    assert min(np.diff(sorted(map(lightness, kind.values())))) > 0.05
    assert len({str(style["linestyle"]) for style in kind.values()}) == len(kind)


@pytest.mark.parametrize("path", sorted((project_root() / "nbs/figures").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_figure_types_no_colour_and_no_marker_that_means_something(path):
    "Styles come from `plots`, by name."
    source = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code")
    chosen = []  # what stands as a marker, in a call or in a dict
    for node in ast.walk(ast.parse(source)):
        chosen += [word.value for word in getattr(node, "keywords", []) if word.arg in ("marker", "fmt")]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "plot":
            chosen += node.args[2:]
        if isinstance(node, ast.Dict):
            chosen += [value for key, value in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant) and key.value == "marker"]
    typed = {part.value for each in chosen for part in ast.walk(each) if isinstance(part, ast.Constant)}
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", source), "a colour"
    assert not typed & {style["marker"] for kind in KINDS for style in kind.values()}, "a marker"


def test_every_format_has_a_style_whose_label_names_no_corpus():
    assert set(FORMAT_STYLE) == set(FORMATS)
    assert not [style["label"] for style in FORMAT_STYLE.values() if "GSM" in style["label"] or "Open" in style["label"]]


def rows(values, n=400) -> pd.DataFrame:
    values = np.asarray(values, float)
    return pd.DataFrame({"step": np.arange(len(values)), "value": values, "low": values - 0.1, "high": values + 0.1, "n": n})


def test_few_completions_are_hollow_and_cut_the_band(axes):
    plot_interval(rows([0.5] * 6, n=[400, 29, 30, 31, 5, 400]), "step", axes, **FORMAT_STYLE["omi1"])
    assert list(np.flatnonzero(np.isnan(axes.get_lines()[0].get_ydata()))) == [1, 4], "no slope leads to a hollow point"
    assert list(axes.get_lines()[1].get_xdata()) == [1, 4] and axes.get_lines()[1].get_markerfacecolor() == "white"
    band, bars = axes.collections
    ends = [(path.vertices[:, 0].min(), path.vertices[:, 0].max()) for path in band.get_paths()]
    assert [(first, last) for first, last in ends if first < last] == [(2, 3)]
    assert [bar.tolist() for bar in bars.get_segments()] == [[[0, 0.4], [0, 0.6]], [[5, 0.4], [5, 0.6]]]


def test_enough_completions_or_no_count_leave_nothing_hollow(axes):
    plot_interval(rows([0.5, 0.6]), "step", axes, color="k")
    plot_interval(rows([0.5, 0.6]).drop(columns="n"), "step", axes, color="k")
    assert len(axes.get_lines()) == 2


def test_a_missing_value_is_left_out_and_order_does_not_matter(axes):
    plot_interval(rows([0.1, np.nan, 0.3])[::-1], "step", axes, color="k")
    assert list(axes.get_lines()[0].get_xdata()) == [0, 2]


def test_seeds_are_thin_and_the_readers_lies_on_top_with_one_entry_in_the_legend(axes):
    seeds = pd.concat([rows([0.1, 0.2]).assign(seed=seed) for seed in range(3)])
    draw_seeds(seeds, "step", axes, **FORMAT_STYLE["tinygsm"])
    draw_own_seed(rows([0.3, 0.4]), "step", axes, legend="seed 7", **FORMAT_STYLE["tinygsm"])
    axes.legend()
    *thin, own = axes.get_lines()
    assert len(thin) == 3 and max(line.get_linewidth() for line in thin) < 1 < own.get_linewidth()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["seed 7"]


@pytest.mark.parametrize("steps", [[0, 4, 8, 16, 24, 32, 64, 120], [0, 1, 2, 3], [5], range(0, 2000, 10), [0.0, 1.5, 3.0]])
def test_step_axis_shows_every_step_and_labels_no_two_on_top_of_each_other(axes, steps):
    axes.plot(list(steps), [0.5] * len(steps))
    step_axis(axes, list(steps))
    low, high = axes.get_xlim()
    assert low < 0 < max(steps) < high
    ticks = axes.get_xticks()
    assert {0, max(steps)} <= set(ticks) <= {0, *steps} and list(ticks) == sorted(ticks)
    axes.figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_step_axis_of_the_start_alone_is_left_as_it_is(axes):
    step_axis(axes, [0])
    assert axes.get_xscale() == "linear"


def test_the_mark_of_an_episode_does_not_move_the_vertical_limits(axes):
    axes.plot([0, 10, 100], [0.6, 0.62, 0.7])
    mark_episode(axes, 64)
    crop(axes)
    assert np.allclose(axes.get_ylim(), (0.595, 0.705))


@pytest.mark.parametrize("values, limits", [
    ([0.6, 0.7], (0.595, 0.705)), ([0.02, 0.95], (-0.05, 1.05)), ([0.5, 0.5], (0.4725, 0.5275)),
    ([1.0, 1.0], (0.9725, 1.0025)), ([0.0, 0.4], (-0.02, 0.42))])
def test_crop(axes, values, limits):
    axes.plot([0, 1], values)
    crop(axes)
    assert np.allclose(axes.get_ylim(), limits)


def test_crop_shows_bands_and_bears_an_empty_panel(axes):
    crop(axes)
    plot_interval(rows([0.5, 0.6]), "step", axes, color="k")
    crop(axes)
    assert axes.get_ylim()[0] < 0.4 and axes.get_ylim()[1] > 0.7


def test_caption_names_what_the_figure_rests_on(axes):
    text = caption(axes.figure, "200 problems · 16 samples each", {"ppo": 1, "grpo": 1}, "laptop", [341_632], note="shaded: 95 %")
    assert text == "n = 200 problems · 16 samples each · 1 seed · preset laptop · 0.34 M parameters · shaded: 95 %"
    assert axes.figure.get_supxlabel().replace("\n", " ") == text and "\n" in axes.figure.get_supxlabel(), "as wide as the figure"
    other = caption(axes.figure, "1 problem", {"ppo": 3, "grpo": 5}, "paper", [150_000_000, 1_100_000_000])
    assert other == "n = 1 problem · 3 seeds (ppo) · 5 seeds (grpo) · preset paper · 150 to 1,100 M parameters"


def test_a_figure_is_saved_whole_in_three_formats(axes, tmp_path):
    save_figure(axes.figure, tmp_path / "made" / "figure")
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["figure.pdf", "figure.png", "figure.svg"]
