"""Several results side by side: values against rollouts, steering against evaluations, fine-tuning against updates.

    python -m imagenet.compare --values b2=runs/b2/values-hpsv2.json,xl2=runs/xl2/values-hpsv2.json --out runs/compared
    python -m imagenet.compare --steer runs/steered-1,runs/steered-5 --finetune runs/hpsv2-10,runs/hpsv2-50 --out OUT

Each option takes [NAME=]PATH, separated by commas; without a NAME it is that of the folder. PATH is

    --values      values-REWARD.json of `imagenet.evaluate values`
    --steer       steer.json of `imagenet.steer`, or its folder
    --finetune    folder of `imagenet.finetune`, with rewards.jsonl and settings.json

OUT gets values.png (Pearson r with long SDE rollouts, against the evaluations in a value, a panel for each time),
steering.png (mean rewards against the evaluations of a sample), finetuning.png (mean rewards and diversity against
updates), compare.md with their tables and compare.json with all numbers, each with the name of its "run"; those of the
options that are given.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

from imagenet.commands import refusing
from imagenet.evaluate_report import NAMES as VALUE_NAMES
from imagenet.steer_report import (
    NAMES,
    STYLES,
    draw_curves,
    finish,
    log_axis,
    markdown,
    names_of,
    plot,
    short_names,
    table,
    with_error,
)
from mfm_ref.figures import COLOURS, new_figure
from mfm_ref.files import atomic_path, load_json, save_json
from mfm_ref.options import option, parse

Row = dict[str, Any]

VALUE_COLOURS = dict(zip(VALUE_NAMES, ("blue", "orange", "green", "grey"), strict=True))
RUN_COLOURS = ("blue", "orange", "green", "red", "purple", "sky", "grey")
SEVERAL = "separated by commas"


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Options of the script."""

    values: str = option("", f"[NAME=]FILE of imagenet.evaluate values, {SEVERAL}")
    steer: str = option("", f"[NAME=]FOLDER of imagenet.steer, {SEVERAL}")
    finetune: str = option("", f"[NAME=]FOLDER of imagenet.finetune, {SEVERAL}")
    out: Path = option(Path("runs/compared"), "folder of compare.json, .md and pictures, replaced if they are there")


# ---- what is read ----------------------------------------------------------------------------------------


def runs_of(text: str, name: str) -> dict[str, Path]:
    """Paths by names, of an option. Raises ValueError for a name that is there twice, and for a path that is not."""
    found: dict[str, Path] = {}
    for part in text.split(",") if text else []:
        label, equals, path = ("", "", part) if Path(part).exists() else part.partition("=")  # = may be of a folder
        place = Path(path if equals else part)
        if not place.exists():
            raise ValueError(f"--{name} must be files or folders that are there, got {place}")
        key = label if equals else (place if place.is_dir() else place.absolute().parent).resolve().name
        if key in found:
            raise ValueError(f"--{name} must have a name for each run, NAME=PATH: {key} is there twice")
        found[key] = place
    return found


def read_values(path: Path) -> list[Row]:
    """The entries of values-REWARD.json. Raises ValueError for any other file."""
    keys = ("t", "method", "evaluations", "draws", "value_evaluations", "r", "r_error")
    path = file_at(path, "--values must be values-REWARD.json of imagenet.evaluate values")
    return checked(load_json(path).get("results"), keys, path, VALUE_NAMES)


def read_steer(path: Path) -> list[Row]:
    """The rows of steer.json. Raises ValueError for any other file."""
    path = file_at(path / "steer.json" if path.is_dir() else path, "--steer must be steer.json of imagenet.steer")
    keys = ("method", "n", "rewards", "diversity", "evaluations", "formula", "passes", "seconds", "peak_memory")
    return checked(load_json(path).get("rows"), keys, path, NAMES)


def read_finetune(path: Path) -> list[Row]:
    """The lines of rewards.jsonl, their rewards by names. Raises ValueError for any other folder."""
    settings, lines = (
        file_at(path / name, "--finetune must be a folder of imagenet.finetune")
        for name in ("settings.json", "rewards.jsonl")
    )
    reward = str(load_json(settings).get("reward", "reward"))
    try:
        rows = [json.loads(line) for line in lines.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{lines} must be lines of JSON: {error}") from error
    rows = checked(rows, ("step", "reward", "held_out", "diversity", "diversity_of_base"), lines)
    result = []
    for row in rows:
        rewards = {reward: row["reward"]} | {spec: r for spec, r in row["held_out"].items() if spec != reward}
        named = dict(zip(short_names(list(rewards)), rewards.values(), strict=True))
        result.append({name: row[name] for name in ("step", "diversity", "diversity_of_base")} | {"rewards": named})
    return result


def file_at(path: Path, wanted: str) -> Path:
    """The path. Raises ValueError, with what it must be, where there is no such file."""
    if not path.is_file():
        raise ValueError(f"{wanted}, and {path} is no file")
    return path


def checked(rows: Any, keys: Sequence[str], path: Path, methods: Container[str] | None = None) -> list[Row]:
    """Rows that are dicts with some keys, and methods that are known. Raises ValueError for any other."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and {*keys} <= {*row} for row in rows):
        raise ValueError(f"{path} must have rows with {', '.join(keys)}")
    strange = [row["method"] for row in rows if methods is not None and row["method"] not in methods]
    if strange:
        raise ValueError(f"{path} must have methods of this version, got {strange[0]!r}")
    return rows


def joined(text: str, name: str, read: Callable[[Path], list[Row]]) -> list[Row]:
    """The rows of all runs of an option, each with the name of its run."""
    return [{"run": run, **row} for run, path in runs_of(text, name).items() for row in read(path)]


# ---- tables and pictures ---------------------------------------------------------------------------------


def value_table(rows: Sequence[Row]) -> str:
    """A Markdown table of correlations, a column for each time."""
    times = sorted({row["t"] for row in rows})
    lines: dict[tuple[str, ...], dict[float, str]] = {}
    for row in rows:
        key = (row["run"], VALUE_NAMES[row["method"]], f"{row['evaluations']:g}", f"{row['draws']:g}")
        lines.setdefault(key, {})[row["t"]] = (
            "undefined" if row["r"] is None else with_error([row["r"], row["r_error"]])
        )
    header = ["run", "Pearson r of V̂", "evaluations", "draws", *(f"t = {t:g}" for t in times)]
    return markdown([header, *([*key, *(found.get(t, "") for t in times)] for key, found in lines.items())])


def finetune_table(rows: Sequence[Row]) -> str:
    """A Markdown table, a line for each run and number of updates."""
    rewards = names_of(rows)
    body = [
        [row["run"], f"{row['step']}", f"{row['diversity']:.3g}"]
        + [with_error(row["rewards"].get(name)) for name in rewards]
        for row in rows
    ]
    return markdown([["run", "updates", "diversity", *rewards], *body])


def draw_values(rows: Sequence[Row], path: Path) -> None:
    """r against the evaluations of a value, one panel a time; a curve has one run, method and number of draws."""
    times, runs = sorted({row["t"] for row in rows}), list(dict.fromkeys(row["run"] for row in rows))
    styles = dict(zip(runs, itertools.cycle(STYLES), strict=False))
    figure, axes = new_figure(1, len(times), size=(2.8, 3.0), sharey="row")
    for ax, t in zip(axes[0], times, strict=True):
        curves: dict[tuple[str, str, int], list[Row]] = {}
        for row in rows:
            if row["t"] == t and row["r"] is not None:
                curves.setdefault((row["run"], row["method"], row["draws"]), []).append(row)
        for (run, method, draws), found in curves.items():
            found.sort(key=lambda row: row["value_evaluations"])
            plot(
                ax, [row["value_evaluations"] for row in found], [[row["r"], row["r_error"]] for row in found],
                f"{VALUE_NAMES[method]}, {draws} draws, {run}", VALUE_COLOURS[method], styles[run],
            )  # fmt: skip
        ax.set(xlabel="evaluations of a value", title=f"t = {t:g}")
        log_axis(ax, [row["value_evaluations"] for found in curves.values() for row in found])
    axes[0, 0].set_ylabel("Pearson r of V̂")
    finish(figure, axes, "Values, set against those by long SDE rollouts", path)


def draw_finetuning(rows: Sequence[Row], path: Path) -> None:
    """Mean rewards, and diversity, against updates, one panel each."""
    rewards, runs = names_of(rows), list(dict.fromkeys(row["run"] for row in rows))
    figure, axes = new_figure(1, len(rewards) + 1, size=(3.0, 3.0))
    for run, colour in zip(runs, itertools.cycle(RUN_COLOURS), strict=False):
        own = sorted((row for row in rows if row["run"] == run), key=lambda row: row["step"])
        for ax, name in zip(axes[0, : len(rewards)], rewards, strict=True):
            found = [row for row in own if name in row["rewards"]]
            plot(ax, [row["step"] for row in found], [row["rewards"][name] for row in found], run, colour, "-")
        plot(axes[0, -1], [row["step"] for row in own], [[row["diversity"], None] for row in own], run, colour, "-")
        base = own[0]["diversity_of_base"]
        axes[0, -1].axhline(base, color=COLOURS[colour], linestyle="--", linewidth=1, label=f"{run}, base")
    for ax, name in zip(axes[0], [*rewards, "diversity"], strict=True):
        ax.set(xlabel="updates", ylabel=name)
        ax.ticklabel_format(axis="y", useOffset=False)
    finish(figure, axes, "Fine-tuning", path)


# ---- the whole -------------------------------------------------------------------------------------------


def compare(config: CompareOptions) -> str:
    """Read all, write tables, pictures and compare.json; what compare.md says.

    Raises:
        ValueError: nothing to compare; paths and files that are not what they should be.
    """
    values = joined(config.values, "values", read_values)
    steering = joined(config.steer, "steer", read_steer)
    finetuning = joined(config.finetune, "finetune", read_finetune)
    if not (values or steering or finetuning):
        raise ValueError("compare needs --values, --steer or --finetune")
    sections = []
    if values:
        draw_values(values, config.out / "values.png")
        sections.append(f"## Values\n\n{value_table(values)}")
    if steering:
        draw_curves(steering, "Steering", config.out / "steering.png")
        sections.append(f"## Steering\n\n{table(steering)}")
    if finetuning:
        draw_finetuning(finetuning, config.out / "finetuning.png")
        sections.append(f"## Fine-tuning\n\n{finetune_table(finetuning)}")
    text = "\n\n".join(sections)
    with atomic_path(config.out / "compare.md") as temporary:
        temporary.write_text(text + "\n")
    found = {"values": values, "steering": steering, "finetuning": finetuning}
    save_json({name: rows for name, rows in found.items() if rows}, config.out / "compare.json")
    return text


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    config = parse(CompareOptions, __doc__ or "", arguments, prog="python -m imagenet.compare")
    with refusing("imagenet.compare"):
        print(compare(config))


if __name__ == "__main__":
    main()
