"""Tables and pictures of `imagenet.evaluate`, from its results alone.

A result is a list of entries, each with t, method and evaluations, and either fid or r, r_error, error and draws.
"""

from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mfm_ref.figures import COLOURS, new_figure, save_figure

NAMES = {"mfm": "Meta Flow Map", "glass": "GLASS rollout", "sde": "SDE rollout", "again": "second SDE rollout"}
CURVES = {"mfm": COLOURS["blue"], "glass": COLOURS["orange"]}  # against evaluations; the others are lines
LINES = {"sde": (COLOURS["green"], "--"), "again": (COLOURS["grey"], ":")}

Entry = dict[str, Any]


def table(entries: list[Entry]) -> str:
    """A Markdown table: a row for each method and number of evaluations, and of draws if any; a column for each t."""
    times = sorted({entry["t"] for entry in entries})
    counts = ["evaluations"] + ["draws"] * any("draws" in entry for entry in entries)
    rows: dict[tuple[str, ...], dict[float, str]] = {}
    for entry in entries:
        key = (NAMES[entry["method"]], *(f"{entry[count]:g}" for count in counts))
        rows.setdefault(key, {})[entry["t"]] = _cell(entry)
    header = ["", *counts, *(f"t = {t:g}" for t in times)]
    body = [[*key, *(found.get(t, "") for t in times)] for key, found in rows.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *body])


def _cell(entry: Entry) -> str:
    """The distance; or r ± its standard error, and in brackets the root mean square difference."""
    if "fid" in entry:
        return f"{entry['fid']:.4g}"
    r = "undefined" if entry["r"] is None else f"{entry['r']:.3f}"
    spread = "" if entry["r_error"] is None else f" ± {entry['r_error']:.3f}"
    return f"{r}{spread} ({entry['error']:.2g})"


def draw_curves(entries: list[Entry], path: Path) -> None:
    """FID or r (of most draws) against evaluations, one panel a time; SDE rollouts are a line across."""
    times = sorted({entry["t"] for entry in entries})
    key, most = ("fid", 0) if "fid" in entries[0] else ("r", max(entry["draws"] for entry in entries))
    figure, axes = new_figure(1, len(times), size=(2.6, 2.8), sharey="row")
    for ax, t in zip(axes[0], times, strict=True):
        shown = [one for one in entries if one["t"] == t and one.get("draws", 0) == most and one[key] is not None]
        counts: set[float] = set()
        for method, colour in CURVES.items():
            curve = dict(sorted((one["evaluations"], one[key]) for one in shown if one["method"] == method))
            ax.plot(list(curve), list(curve.values()), "o-", markersize=3, color=colour, label=NAMES[method])
            counts |= curve.keys()
        for one in shown:
            if one["method"] in LINES:
                colour, style = LINES[one["method"]]
                label = f"{NAMES[one['method']]}, {one['evaluations']:g}"
                ax.axhline(one[key], color=colour, linestyle=style, label=label)
        ax.set(xscale="log", title=f"t = {t:g}", xlabel="evaluations of a draw")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_locator(FixedLocator(sorted(counts)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[0, 0].set_ylabel("FID" if key == "fid" else f"Pearson r of V̂, {most} draws")
    if key == "fid" and all(one["fid"] > 0 for one in entries):
        axes[0, 0].set_yscale("log")
    axes[0, -1].legend(fontsize=6)
    figure.suptitle(
        "Recovered images" if key == "fid" else "Values, set against those by long SDE rollouts", fontsize=9
    )
    save_figure(figure, path)
