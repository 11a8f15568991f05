"""The README's tables, from the reports of runs: `python -m toy.table [FOLDER]`, toy/results where none is given."""

import json
import sys
from pathlib import Path
from typing import Any

from toy import alignment, diversity, estimators, finetuning, lipschitz, reward_variance, smoothing, tilted_map
from toy.common import markdown

RESULTS = Path(__file__).parent / "results"


def mixture_tables(report: dict[str, Any]) -> str:
    """Posterior ratio, steering and fine-tuning on the mixture."""
    ratio = report["posterior_ratio"]
    posterior = markdown(["t", *ratio], [["posterior ratio", *(f"{v:.2f}" for v in ratio.values())]])
    counts = ["0", "1", "4", "16"]
    names = {
        "exact": "exact ∇V",
        "gradient": "MFM-G (E16)",
        "controlled": "both (default)",
        "stein": "MFM-GF (E17)",
        "dps": "DPS",
        "unsteered": "unsteered",
    }
    steering = markdown(
        ["sliced W₂ to p*", "no draws", *(f"N = {n}" for n in counts[1:])],
        [
            [
                name,
                *(f"{report['steering'][key][n]['sw2']:.2f}" if n in report["steering"][key] else "" for n in counts),
            ]
            for key, name in names.items()
        ]
        + [["two exact sets (floor)", f"{report['steering']['exact']['0']['floor']:.2f}", "", "", ""]],
    )
    tuned = report["finetune"]
    finetune = markdown(
        ["fine-tuned drift", "relative error to b*", "sliced W₂ to p* of its samples"],
        [
            [
                "base, before",
                f"{report['base_relative_error']:.3f}",
                f"{report['steering']['unsteered']['0']['sw2']:.2f}",
            ],
            ["E18, gradient", f"{tuned['gradient']['relative_error']:.3f}", f"{tuned['gradient']['sw2']:.2f}"],
            ["E18, Stein form", f"{tuned['stein']['relative_error']:.3f}", f"{tuned['stein']['sw2']:.2f}"],
        ],
    )
    return "\n\n".join((posterior, steering, finetune))


def digits_tables(report: dict[str, Any]) -> str:
    """Posterior checks and class frequencies on the digits."""
    posterior = markdown(
        ["t", *report["posteriors"]],
        [
            [title, *(f"{found[key]:.{digits}f}" for found in report["posteriors"].values())]
            for title, key, digits in (
                ("PSNR of the posterior's mean, dB", "psnr", 1),
                ("PSNR of the best multiple of x_t, dB", "noisy_psnr", 1),
                ("spread of the draws / squared error of their mean", "spread_over_error", 2),
                ("draws with the class of the clean digit", "same_class", 2),
            )
        ],
    )
    classes = markdown(
        ["L₂ of class frequencies to w", "by the classifier in the reward", "by the judge"],
        [
            [name, f"{found['classifier']['l2']:.3f}", f"{found['judge']['l2']:.3f}"]
            for name, found in report["classes"].items()
        ]
        + [["samples of w itself (floor)", f"{report['l2_floor']:.3f}", f"{report['l2_floor']:.3f}"]],
    )
    return "\n\n".join((posterior, classes))


def objectives_tables(report: dict[str, Any]) -> str:
    """The mixture at equal time, then at equal steps; then the shapes and the dimensions."""
    results = report["results"]
    tables = [_ratios(results[f"mixture, {budget}"], report["seconds_per_step"]) for budget in ("time", "steps")]
    return "\n\n".join([*tables, _others(results)])


def _ratios(results: dict[str, Any], seconds_per_step: dict[str, float]) -> str:
    """Posterior ratio of each objective at each t, the greatest of its seeds."""
    times = next(iter(results.values()))[0]["ratio"]
    rows = []
    for objective, runs in results.items():
        worst = [max(run["ratio"][t] for run in runs) for t in times]
        residual = sum(sum(run["semigroup"].values()) / len(times) for run in runs) / len(runs)
        milliseconds, steps = 1e3 * seconds_per_step[objective], runs[0]["steps"]
        cells = [f"{ratio:.2f}" for ratio in worst]
        rows.append([objective, *cells, f"{residual:.3f}", f"{milliseconds:.1f}", f"{steps}"])
    return markdown(["posterior ratio at t =", *times, "semigroup residual", "ms per step", "steps"], rows)


def _others(results: dict[str, Any]) -> str:
    """Greatest posterior ratio over t and seeds on the shapes; greatest error of X likewise in each dimension."""
    shapes = [name for name in results if not name.startswith("mixture")]
    dimensions = [name for name in results if name.startswith("mixture-")]
    objectives = list(dict.fromkeys(objective for name in (*shapes, *dimensions) for objective in results[name]))
    rows = []
    for objective in objectives:
        cells = []
        for name in (*shapes, *dimensions):
            key = "error" if name in dimensions else "ratio"
            worst = [max(run[key].values()) for run in results[name].get(objective, [])]
            cells.append(f"{max(worst):.2f}" if worst else "")
        rows.append([objective, *cells])
    header = [f"{name.split(',')[0]}: ratio" for name in shapes]
    header += [f"D = {name.split(',')[0].removeprefix('mixture-')}: error" for name in dimensions]
    return markdown(["worst over t", *header], rows)


def main(folder: Path = RESULTS) -> tuple[str, ...]:
    """The tables of every report that is in the folder."""
    makers = {
        "mixture": mixture_tables,
        "digits": digits_tables,
        "objectives": objectives_tables,
        "alignment": alignment.table,
        "estimators": estimators.table,
        "finetuning": finetuning.table,
        "tilted_map": tilted_map.table,
        "smoothing": smoothing.table,
        "diversity": diversity.table,
        "reward_variance": reward_variance.table,
        "lipschitz": lipschitz.table,
    }
    paths = {name: folder / f"{name}.json" for name in makers}
    return tuple(maker(json.loads(paths[name].read_text())) for name, maker in makers.items() if paths[name].exists())


if __name__ == "__main__":
    print("\n\n".join(main(*map(Path, sys.argv[1:]))))
