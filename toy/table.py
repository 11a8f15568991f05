"""The README's tables, from the reports of a run: `python -m toy.table [FOLDER with mixture.json and digits.json]`."""

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def mixture_tables(report: dict[str, Any]) -> str:
    """Posterior ratio, steering and fine-tuning on the mixture."""
    ratio = report["posterior_ratio"]
    posterior = markdown(["t", *ratio], [["posterior ratio", *(f"{v:.2f}" for v in ratio.values())]])
    counts = ["0", "1", "4", "16"]
    names = {
        "exact": "exact ∇V",
        "gradient": "MFM-G (E16)",
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
    """For each problem and budget: the posterior ratio of each objective, the greatest of its seeds at each t."""
    return "\n\n".join(f"{name}:\n\n{_objectives_table(name, report)}" for name in report["results"])


def _objectives_table(name: str, report: dict[str, Any]) -> str:
    results = report["results"][name]
    times = next(iter(results.values()))[0]["ratio"]
    rows = []
    for objective, runs in results.items():
        worst = [max(run["ratio"][t] for run in runs) for t in times]
        residual = sum(sum(run["semigroup"].values()) / len(times) for run in runs) / len(runs)
        milliseconds = 1e3 * report["seconds_per_step"][objective]
        steps = sum(run["steps"] for run in runs) / len(runs)
        cells = [f"{ratio:.2f}" for ratio in worst]
        rows.append([objective, *cells, f"{residual:.3f}", f"{milliseconds:.1f}", f"{steps:.0f}"])
    return markdown(["posterior ratio at t =", *times, "semigroup residual", "ms per step", "steps"], rows)


def main(folder: Path = RESULTS) -> tuple[str, str]:
    """The tables of the mixture and of the digits."""
    mixture, digits = (json.loads((folder / f"{name}.json").read_text()) for name in ("mixture", "digits"))
    return mixture_tables(mixture), digits_tables(digits)


if __name__ == "__main__":
    print("\n\n".join(main(*map(Path, sys.argv[1:]))))
