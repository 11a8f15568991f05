"""The pictures of `toy.objectives`."""

from pathlib import Path
from typing import Any

from mfm_ref.figures import COLOURS, new_figure, save_figure

SOURCES = {
    "teacher": "teacher: v_{s,s} by E12",
    "self": "self: v_{s,s} of the model",
    "data": "from data alone",
}
STYLES = {
    "semigroup": ("blue", "o", "-"),
    "shortcut": ("green", "s", "--"),
    "Lagrangian": ("orange", "^", "-"),
    "Eulerian": ("red", "v", "-"),
    "mean flow": ("grey", "D", "--"),
}


def draw_objectives(report: dict[str, Any], path: Path) -> None:
    """Posterior ratio against t, on the paper's mixture: sources in columns, equal time above equal steps."""
    figure, axes = new_figure(2, 3, size=(3.4, 2.7), sharex=True, sharey=True)
    for row, (budget, title) in enumerate((("time", "equal time"), ("steps", "equal steps"))):
        for ax, (source, meaning) in zip(axes[row], SOURCES.items(), strict=True):
            _lines(ax, report["results"][f"mixture, {budget}"], source)
            ax.set(yscale="log", yticks=[1, 2, 4, 8], yticklabels=["1", "2", "4", "8"])
            ax.minorticks_off()
            if row == 0:
                ax.set_title(meaning)
                ax.legend(loc="upper right")
        axes[row, 0].set_ylabel(f"{title}\nposterior ratio (1: perfect)")
    for ax in axes[1]:
        ax.set_xlabel("context time t")
    figure.suptitle(
        "One-step posterior samples against exact ones, by training objective; bands: least to greatest seed"
    )
    save_figure(figure, path)


def draw_others(report: dict[str, Any], path: Path) -> None:
    """The shapes, and the error of the map as the dimension grows; means over seeds."""
    names = [name for name in report["results"] if not name.startswith("mixture, ")]
    figure, axes = new_figure(2, 3, size=(3.4, 2.7))
    *panels, key = axes.flat
    for ax, name in zip(panels, names, strict=True):
        of_shape = not name.startswith("mixture-")
        for objective, runs in report["results"][name].items():
            consistency, source = objective.split(", ")
            colour, marker, _ = STYLES[consistency]
            found = [run["ratio" if of_shape else "error"] for run in runs]
            times, values = [float(t) for t in found[0]], [sum(run[t] for run in found) / len(found) for t in found[0]]
            line = {"teacher": "-", "self": "--", "data": ":"}[source]
            ax.plot(times, values, line, marker=marker, color=COLOURS[colour], markersize=3, linewidth=1)
            key.plot([], [], line, marker=marker, color=COLOURS[colour], markersize=3, linewidth=1, label=objective)
        where = name.split(",")[0]
        ax.set_title(where if of_shape else f"mixture in {where.removeprefix('mixture-')} dimensions")
        ax.set(xlabel="context time t", yscale="log")
        ax.set_ylabel("posterior ratio to a rollout" if of_shape else "error of X / posterior's spread")
    handles, labels = key.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    key.legend(once.values(), once.keys(), loc="center")
    key.set_axis_off()
    figure.suptitle("Data without a closed form, against long rollouts of the teacher; mixtures as the dimension grows")
    save_figure(figure, path)


def _lines(ax: Any, results: dict[str, Any], source: str) -> None:
    for objective, runs in results.items():
        consistency, of = objective.split(", ")
        if of != source:
            continue
        colour, marker, line = STYLES[consistency]
        times = [float(t) for t in runs[0]["ratio"]]
        columns = [[run["ratio"][t] for run in runs] for t in runs[0]["ratio"]]
        means = [sum(values) / len(values) for values in columns]
        ax.plot(
            times, means, line, marker=marker, color=COLOURS[colour], markersize=4, linewidth=1.2, label=consistency
        )
        low, high = [min(values) for values in columns], [max(values) for values in columns]
        ax.fill_between(times, low, high, color=COLOURS[colour], alpha=0.15, linewidth=0)
