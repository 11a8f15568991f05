"""Tables and pictures of `imagenet.evaluate`, from its results alone.

A result is a list of entries, each with t, method and evaluations, and either distance or r, r_error, error and draws.
"""

from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mfm_ref.figures import COLOURS, new_figure, save_figure

NAMES = {"mfm": "Meta Flow Map", "glass": "GLASS rollout", "sde": "SDE rollout", "again": "second SDE rollout"}
CURVES = {"mfm": COLOURS["blue"], "glass": COLOURS["orange"]}  # against evaluations; the others are lines
LINES = {"sde": (COLOURS["green"], "--"), "again": (COLOURS["grey"], ":")}

Entry = dict[str, Any]


def table(entries: list[Entry], measure: str) -> str:
    """A Markdown table of what `measure` names: a row for each method and counts, a column for each t."""
    times = sorted({entry["t"] for entry in entries})
    counts = ["evaluations"] + ["draws"] * any("draws" in entry for entry in entries)
    rows: dict[tuple[str, ...], dict[float, str]] = {}
    for entry in entries:
        key = (NAMES[entry["method"]], *(f"{entry[count]:g}" for count in counts))
        rows.setdefault(key, {})[entry["t"]] = _cell(entry)
    header = [measure, *counts, *(f"t = {t:g}" for t in times)]
    body = [[*key, *(found.get(t, "") for t in times)] for key, found in rows.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *body])


def _cell(entry: Entry) -> str:
    """The distance; or r ± its standard error, and in brackets the root mean square difference."""
    if "distance" in entry:
        return f"{entry['distance']:.4g}"
    r = "undefined" if entry["r"] is None else f"{entry['r']:.3f}"
    spread = "" if entry["r_error"] is None else f" ± {entry['r_error']:.3f}"
    return f"{r}{spread} ({entry['error']:.2g})"


def draw_curves(entries: list[Entry], measure: str, title: str, path: Path) -> None:
    """Distance or r (of most draws) against evaluations, one panel a time; SDE rollouts are a line across.

    Bars, and the bands of lines, are a standard error to either side, where there is one.
    """
    times = sorted({entry["t"] for entry in entries})
    key, most = ("distance", 0) if "distance" in entries[0] else ("r", max(entry["draws"] for entry in entries))
    figure, axes = new_figure(1, len(times), size=(2.6, 2.8), sharey="row")
    for ax, t in zip(axes[0], times, strict=True):
        shown = [one for one in entries if one["t"] == t and one.get("draws", 0) == most and one[key] is not None]
        _draw_panel(ax, shown, key)
        ax.set_title(f"t = {t:g}", fontsize=9)
    axes[0, 0].set_ylabel(f"{measure}, {most} draws" if most else measure)
    if key == "distance" and all(one[key] > 0 for one in entries):
        axes[0, 0].set_yscale("log")
    axes[0, -1].legend(fontsize=6, frameon=False)
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


def _draw_panel(ax: Any, shown: list[Entry], key: str) -> None:
    """The curves and lines of one time."""
    counts = set()
    for method, colour in CURVES.items():
        curve = sorted((one["evaluations"], one[key], _error(one)) for one in shown if one["method"] == method)
        x, y, errors = zip(*curve, strict=True) if curve else ((), (), ())
        bars = errors if any(errors) else None
        ax.errorbar(x, y, bars, fmt="o-", markersize=3, capsize=2, elinewidth=1, color=colour, label=NAMES[method])
        counts |= set(x)
    for one in shown:
        if one["method"] in LINES:
            (colour, style), middle, error = LINES[one["method"]], one[key], _error(one)
            label = f"{NAMES[one['method']]}, {one['evaluations']:g} evaluations"
            ax.axhline(middle, color=colour, linestyle=style, label=label)
            ax.axhspan(middle - error, middle + error, color=colour, alpha=0.15, linewidth=0)
    ax.set(xscale="log", xlabel="evaluations of a draw")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_locator(FixedLocator(sorted(counts)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _error(entry: Entry) -> float:
    return entry.get("r_error") or 0.0
