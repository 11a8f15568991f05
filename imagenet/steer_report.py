"""Tables and pictures of `imagenet.steer` and, of several of its runs, of `imagenet.compare`, from results alone.

A row is what steer.json has of one folder; with "run", the name of a run, where there are several.
"""

import itertools
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mfm_ref.figures import COLOURS, new_figure, save_figure

Row = dict[str, Any]

NAMES = {
    "base": "base",
    "mfm-g": "MFM-G",
    "mfm-c": "MFM, both estimators",
    "mfm-gf": "MFM-GF",
    "dps": "DPS, best of N",
    "search": "MFM-Search",
    "best-of-n": "Best-of-N",
}
CURVES = dict(zip(NAMES, ("grey", "blue", "sky", "green", "red", "purple", "orange"), strict=True))
STYLES = ("-", "--", ":", "-.")  # of runs
TICKS = 6  # at most, along a logarithmic axis
LETTER, SMALL = 0.075, 0.06  # inches of a letter, of a title and of a legend


def short_names(specs: Sequence[str]) -> list[str]:
    """Specs of rewards without the folders of their files; as they are where two would have one name."""
    short = [re.sub(r"=[^,]*/([^/,]+)", r"=\1", spec) for spec in specs]
    return [name if short.count(name) == 1 else spec for name, spec in zip(short, specs, strict=True)]


def names_of(rows: Sequence[Row]) -> list[str]:
    """The rewards of all rows, each once, in order."""
    return list(dict.fromkeys(name for row in rows for name in row["rewards"]))


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, a line for each row."""
    rewards, runs = names_of(rows), any("run" in row for row in rows)
    header = [
        *(["run"] if runs else []), "method", "N", *rewards, "diversity", "evaluations", "by the formula", "passes",
        "seconds", "peak GB",
    ]  # fmt: skip
    body = [[row.get("run", "")] * runs + [NAMES[row["method"]], f"{row['n']}", *_cells(row, rewards)] for row in rows]
    return markdown([header, *body])


def _cells(row: Row, rewards: Sequence[str]) -> list[str]:
    return [
        *(with_error(row["rewards"].get(name)) for name in rewards),
        "" if row["diversity"] is None else f"{row['diversity']:.3g}",
        f"{row['evaluations']:g}",
        f"{row['formula']:g}",
        f"{row['passes']:g}",
        f"{row['seconds']:.3g}",
        f"{row['peak_memory'] / 1e9:.2f}",
    ]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of lines of cells, the first of which is its head; in this, * is a star."""
    cells = [[cell.replace("*", r"\*") for cell in lines[0]], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def with_error(pair: Sequence[float | None] | None) -> str:
    """A mean and its standard error; empty where there is none."""
    if pair is None:
        return ""
    mean, error = pair
    return f"{mean:.4g}" + ("" if error is None else f" ± {error:.2g}")


def draw_curves(rows: Sequence[Row], title: str, path: Path) -> None:
    """Mean rewards against evaluations of map and reward for a sample, one panel a reward; the base is a line across.

    Bars, and the bands of lines, are a standard error to either side.
    """
    rewards, runs = names_of(rows), list(dict.fromkeys(row.get("run", "") for row in rows))
    figure, axes = new_figure(1, len(rewards), size=(3.4, 3.0))
    for ax, name in zip(axes[0], rewards, strict=True):
        for (run, style), method in itertools.product(zip(runs, itertools.cycle(STYLES), strict=False), NAMES):
            shown = [one for one in rows if one["method"] == method and one.get("run", "") == run]
            _draw(ax, [one for one in shown if name in one["rewards"]], name, style)
        ax.set(xlabel="evaluations of a sample", ylabel=name)
        log_axis(ax, [one["evaluations"] for one in rows if one["method"] != "base" and name in one["rewards"]])
    finish(figure, axes, title, path)


def log_axis(ax: Any, values: Sequence[float]) -> None:
    """A logarithmic scale along x, marked at some of the values that are shown, far enough from each other to read."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(apart(values)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())


def apart(values: Sequence[float]) -> list[float]:
    """Some of the values, the least among them, no two nearer than a part of their range in a logarithmic scale."""
    found: list[float] = []
    for value in sorted(set(values)):
        if not found or math.log(value / found[-1]) > math.log(max(values) / min(values)) / TICKS:
            found.append(value)
    return found


def finish(figure: Figure, axes: Any, title: str, path: Path) -> None:
    """Write a figure as PNG, with a title above its panels and beside them a legend of all, for which it is widened."""
    pairs = [zip(*reversed(ax.get_legend_handles_labels()), strict=True) for ax in axes.flat]
    handles = dict(pair for found in pairs for pair in found)
    wide, high = figure.get_size_inches()
    figure.suptitle(textwrap.fill(title, int(wide / LETTER)), fontsize=9, x=0.02, ha="left")
    figure.set_size_inches(wide + 0.5 + SMALL * max(map(len, handles), default=0), high)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=7, frameon=False)
    save_figure(figure, path)


def _draw(ax: Any, rows: list[Row], name: str, style: str) -> None:
    """The curve of one method of one run, if it is there."""
    if not rows:
        return
    rows = sorted(rows, key=lambda row: row["evaluations"])
    method, run, pairs = rows[0]["method"], rows[0].get("run"), [row["rewards"][name] for row in rows]
    colour, label = CURVES[method], NAMES[method] + (f", {run}" if run else "")
    if method == "base":
        mean, error = pairs[0][0], pairs[0][1] or 0.0
        ax.axhline(mean, color=COLOURS[colour], linestyle=style, label=label)
        ax.axhspan(mean - error, mean + error, color=COLOURS[colour], alpha=0.15, linewidth=0)
    else:
        plot(ax, [row["evaluations"] for row in rows], pairs, label, colour, style)


def plot(
    ax: Any, x: Sequence[float], pairs: Sequence[Sequence[float | None]], label: str, colour: str, style: str
) -> None:
    """A curve of means, with bars of their standard errors where there are some."""
    errors = [error or 0.0 for _, error in pairs]
    look = {"linestyle": style, "marker": "o", "markersize": 3, "capsize": 2, "elinewidth": 1}
    ax.errorbar(x, [mean for mean, _ in pairs], errors, label=label, color=COLOURS[colour], **look)
