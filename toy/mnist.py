"""Real images, a convolutional network and a learned reward: digits, MNIST or Fashion-MNIST.

    python -m toy.mnist
    python -m toy.mnist download --data data/mnist
    python -m toy.mnist all --data data/mnist

Everything, or one stage of it: train the maps; noisy images and what they may be; steering to a class-mixture reward;
inverse problems; a reward without gradients; fine-tuning; the report. Each stage writes its pictures and STAGE.json
into the folder of the run, and one that is finished is not run again. The report, as report.html, report.md and
report.json, gathers whatever there is. A run that was killed goes on where it was.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mfm_ref.files import load_json, save_json
from toy.common import ToyConfig, remove_checkpoints, start
from toy.images.config import PRESETS, ImagesConfig
from toy.images.data import MIRRORS, download
from toy.images.report import Record, tables, write_report
from toy.images.rung import Rung, load_rung, missing_parts
from toy.images.settings import DataSettings, TrainSettings
from toy.images.stages import STAGES

OTHER = {
    "report": "one page of all results that are there",
    "all": "every stage that is not finished, then the report",
    "download": "get the files of --dataset into --data",
}
ELSEWHERE = ("out", "data", "device", "threads")  # options on which a result does not depend, but for rounding


# ---- the command line ----------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[str, ImagesConfig]:
    """The stage and the config: defaults, then the preset of the size, then that of --fast, then what is given."""
    parser = new_parser()
    given = parser.parse_args(arguments)
    dataset = given.dataset or ("mnist" if given.data else "digits")
    presets = ["full"] if given.size == "full" else ["mnist"] if dataset != "digits" else []
    presets += ["fast"] if given.fast else []
    for preset in presets:
        parser.set_defaults(**PRESETS[preset])
    parser.set_defaults(
        out=Path("runs") / "-".join([dataset, "images", *(name for name in presets if name != "mnist")])
    )
    options = vars(parser.parse_args(arguments)) | {"dataset": dataset}
    del options["size"]
    return options.pop("stage"), ImagesConfig(**options)


def new_parser() -> argparse.ArgumentParser:
    """One option a field, in a group for each stage."""
    parser = argparse.ArgumentParser(
        prog="python -m toy.mnist",
        usage="%(prog)s [STAGE] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    texts = {name: stage.text for name, stage in STAGES.items()} | OTHER
    parser.add_argument(
        "stage", nargs="?", default="all", choices=list(texts), metavar="STAGE",
        help="; ".join(f"{name}: {text}" for name, text in texts.items()) + " (default: all)",
    )  # fmt: skip
    parser.add_argument("--dataset", choices=["digits", *MIRRORS], help="default: digits, or mnist with --data")
    parser.add_argument(
        "--size", choices=["small", "full"], default="small",
        help="small: for two CPU cores, the defaults below (others for mnist and fashion); full: for a GPU",
    )  # fmt: skip
    done = {"dataset"}
    groups: dict[str, tuple[type[ToyConfig], ...]] = {"options of every stage": (ToyConfig, DataSettings)}
    groups |= {f"options of {name}": (stage.settings,) for name, stage in STAGES.items()}
    for title, settings in groups.items():
        group = parser.add_argument_group(title)
        for field in (field for kind in settings for field in dataclasses.fields(kind) if field.name not in done):
            add_option(group, field)
            done.add(field.name)
    return parser


def add_option(group: argparse._ArgumentGroup, field: "dataclasses.Field[Any]") -> None:
    """The option --name of a field; a flag for a bool."""
    name, text = "--" + field.name.replace("_", "-"), field.metadata.get("help", "").replace("%", "%%")
    if isinstance(field.default, bool):
        group.add_argument(name, action="store_true", default=field.default, help=text)
    else:
        shown = "" if field.name == "out" or field.default == "" else f" (default: {field.default})"
        group.add_argument(name, type=type(field.default), default=field.default, help=f"{text}{shown}".strip())


@contextmanager
def refusing() -> Iterator[None]:
    """What is wrong with options or files ends the program with the message alone."""
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"toy.mnist: {error}") from error


# ---- the stages ----------------------------------------------------------------------------------------


def settings_of(config: ImagesConfig, name: str) -> dict[str, Any]:
    """All options that the numbers of a stage depend on, as JSON values: its own and those of training."""
    kinds = (TrainSettings, STAGES[name].settings)
    fields = dict.fromkeys(field.name for kind in kinds for field in dataclasses.fields(kind))
    unused = {"train": ("map",), "posteriors": ()}.get(name, ("train_maps",))  # of all maps, most stages use one
    for field in unused:
        del fields[field]
    return json.loads(json.dumps({field: getattr(config, field) for field in fields if field not in ELSEWHERE}))


def read_record(config: ImagesConfig, name: str) -> Record | None:
    """The record of a stage that is finished, None where there is none.

    Raises:
        ValueError: it was made with other settings, or is damaged.
    """
    path = config.out / f"{name}.json"
    if not path.exists():
        return None
    record, settings = load_json(path), settings_of(config, name)
    found = record.get("settings", {})
    others = [
        f"{key} was {found.get(key)!r} and is {settings.get(key)!r}"
        for key in sorted(found.keys() | settings.keys())
        if found.get(key) != settings.get(key)
    ]
    if others:
        raise ValueError(
            f"{path} belongs to a run with other settings ({'; '.join(others)}): remove it or write elsewhere (--out)"
        )
    return record


def run_stage(config: ImagesConfig, name: str, rung: Rung | None) -> Record:
    """Run a stage and write its record."""
    began = start(config)
    result = STAGES[name].run(config, rung)
    record = {
        "settings": settings_of(config, name),
        # Of its parts, where they are known: those that an earlier process made count too.
        "seconds": max(time.perf_counter() - began, result.get("spent", 0.0)),
        "torch": torch.__version__,
        "hardware": hardware(config),
        "result": result,
    }
    save_json(record, config.out / f"{name}.json")
    return record


def hardware(config: ImagesConfig) -> str:
    """What the run computes on."""
    if torch.device(config.device).type == "cuda":
        return torch.cuda.get_device_name(config.device)
    return f"{config.device}, {config.threads} of {os.cpu_count()} cores"


def check_device(device: str) -> None:
    """Raise ValueError for a device that torch does not have."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be one that this torch computes on, got {device!r}: {error}") from error


def run_stages(config: ImagesConfig, names: Sequence[str]) -> None:
    """Every stage of these that is not finished; what all but training need is loaded once."""
    rung: Rung | None = None
    for name in names:
        with refusing():
            finished = read_record(config, name) is not None and not (name == "train" and missing_parts(config))
            if finished:
                print(f"{name}: finished before, {config.out / name}.json is kept; remove it to run the stage again")
                continue
            check_device(config.device)
            if name != "train" and rung is None:
                rung = load_rung(config)
            record = run_stage(config, name, rung)
        print(f"{name}: {record['seconds'] / 60:.1f} minutes")


def report(config: ImagesConfig) -> None:
    """Write the report of the results that are there."""
    with refusing():
        paths = {name: config.out / f"{name}.json" for name in STAGES}
        results = {name: load_json(path) for name, path in paths.items() if path.exists()}
        write_report(config, results)
    print(f"the report: {config.out / 'report.html'}, or report.md beside it")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    stage, config = parse_arguments(arguments)
    if stage == "download":
        with refusing():
            if not config.data:
                raise ValueError("download needs --data DIR, the folder for the files")
            for path, source in download(config.dataset, config.data).items():
                print(f"{path}: {source}")
        return
    if stage != "report":
        run_stages(config, list(STAGES) if stage == "all" else [stage])
    if stage in ("report", "all"):
        report(config)
    else:
        print(tables({stage: load_json(config.out / f"{stage}.json")}))
    if stage == "all":
        remove_checkpoints(config)


if __name__ == "__main__":
    main(sys.argv[1:])
