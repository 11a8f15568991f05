"""How good are samples and posteriors? Fréchet distances, and values set against those of SDE rollouts.

    python -m imagenet.evaluate fid --samples runs/samples/samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    python -m imagenet.evaluate recovery --posteriors runs/posteriors --reference VIRTUAL_imagenet256_labeled.npz
    python -m imagenet.evaluate values --posteriors runs/posteriors --reward brightness --scale 10

`fid` is the squared Fréchet distance of samples to a reference: the FID, where the features are the Inception's. Either
is an npz file, with ADM's statistics mu and sigma or with uint8 images arr_0, or a folder of images, which are cropped
to --size. --save-statistics keeps the statistics of --samples.

`recovery` is the same for every posterior that `imagenet.posterior` wrote, by time, method and evaluations of a network
for one draw. `values` takes the value (E15) of each noised image from its draws, under a reward of decoded images, and
correlates it over the images with the value by SDE rollouts. Both write JSON, a Markdown table and a picture.

Each is one process. One that was killed starts again from its first folder; results of the same name are replaced.
"""

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from imagenet.commands import check_device, device_name, numbers, refusing
from imagenet.evaluate_report import NAMES, Entry, draw_curves, table
from imagenet.features import (
    BATCH,
    INCEPTION,
    SIZE,
    Statistics,
    as_tensor,
    count_images,
    distance,
    image_batches,
    look_at,
    measure,
    remarks,
    save_statistics,
    statistics_of,
)
from imagenet.prompts import FIELD, names_for, prompts_for
from imagenet.rewards import LatentReward, RewardSum, load_reward, slug
from mfm_ref.checks import check_count, check_uncoupled, evaluate_reward
from mfm_ref.estimators import log_mean_exp
from mfm_ref.files import atomic_path, load_json, save_json
from mfm_ref.options import HelpFormatter, add_options, option


@dataclasses.dataclass(frozen=True)
class FeatureOptions:
    """Options of whatever takes features of images."""

    features: str = option(INCEPTION, "the extractor: torch-fidelity, a TorchScript file or module:function")
    batch: int = option(BATCH, "images in one call of the extractor")
    size: int = option(SIZE, "pixels, a side, to which the images of a folder are cropped")
    device: str = option("cpu", "where torch computes: cpu, cuda, …")


@dataclasses.dataclass(frozen=True)
class FidOptions(FeatureOptions):
    """Options of `fid`."""

    samples: str = option("", "npz file of the samples or of their statistics, or a folder of images")
    reference: str = option("", "the same of the reference; not needed with --save-statistics")
    save_statistics: str = option("", "npz file to keep the statistics of the samples in, laid out as ADM's")
    out: str = option("", "JSON file of the result, replaced if it is there; fid.json beside the samples where empty")


@dataclasses.dataclass(frozen=True)
class RecoveryOptions(FeatureOptions):
    """Options of `recovery`."""

    posteriors: str = option("", "folder that imagenet.posterior wrote")
    reference: str = option(
        "", "npz file of images or statistics, or a folder of images; the clean images in that folder where it is empty"
    )
    out: str = option(
        "",
        "folder of recovery.json, .md and .png, replaced if there; that of the posteriors where it is empty",
    )


@dataclasses.dataclass(frozen=True)
class ValueOptions:
    """Options of `values`."""

    posteriors: str = option("", "folder that imagenet.posterior wrote")
    reward: str = option(
        "brightness",
        "a sum [WEIGHT*]NAME[=PATH],…: brightness, contrast, redness, compressed-size, probe=FILE, pickscore=FOLDER, "
        "hpsv2=FILE, imagereward=FILE or module:function, of images in [0, 1], (B, 3, H, W) -> (B,)",
    )
    prompt: str = option("", "of rewards that take one, with the name of the label's class in place of {class}")
    names: str = option(
        "",
        "text file of the classes' names, one a line, for {class}; ImageNet's where the network has its 1000 classes",
    )
    scale: float = option(1.0, "the reward is multiplied by this")
    draws: str = option("", "numbers of draws in a value, such as 1,16,200; all that there are where it is empty")
    batch: int = option(BATCH, "images in one call of the reward")
    device: str = option("cpu", "where torch computes: cpu, cuda, …")
    out: str = option(
        "", "folder of values-REWARD.json, .md and .png, replaced if there; that of the posteriors where it is empty"
    )


# ---- Fréchet distances -----------------------------------------------------------------------------------


def fid(config: FidOptions) -> str:
    """The distance of samples to a reference, as JSON; returns what is to be printed.

    Raises:
        ValueError: options that are missing, files that cannot be read, features that do not go together, outputs that
            cannot be written or would replace what is read.
    """
    if not config.samples or not (config.reference or config.save_statistics):
        raise ValueError("fid needs --samples, and --reference or --save-statistics")
    out = Path(config.out or Path(os.path.abspath(config.samples)).parent / "fid.json")  # "." has no name
    _check_paths(config, out)
    samples, lines = _statistics(config, config.samples), []
    if config.save_statistics:
        save_statistics(samples, Path(config.save_statistics))
        lines.append(f"{config.save_statistics} has the statistics of {_words(samples)}")
    if config.reference:
        result = _distance_of(config, samples, _statistics(config, config.reference))
        save_json(result, out)
        lines += [result["line"], *(f"note: {remark}" for remark in result["remarks"])]
    return "\n".join(lines)


def _check_paths(config: FidOptions, out: Path) -> None:
    """What is wrong with files to read or to write, before features are taken: a ValueError."""
    inputs = [Path(name) for name in (config.samples, config.reference) if name]
    outputs = {"--save-statistics": Path(config.save_statistics)} if config.save_statistics else {}
    outputs |= {"--out": out} if config.reference else {}
    taken = {path.resolve() for path in [*inputs, Path(config.features)]}
    for name, path in outputs.items():
        place = next((parent for parent in path.absolute().parents if parent.exists()), path)
        if path.is_dir() or not place.is_dir() or not os.access(place, os.W_OK):
            raise ValueError(f"{name} must be a file that can be written, got {path}")
        if path.resolve() in taken:
            raise ValueError(f"{name} must be another file than those that are read or written, got {path}")
        taken.add(path.resolve())
    for path in inputs:
        look_at(path)


def _sampling(samples: Path) -> dict[str, Any] | None:
    """The settings.json beside a file of samples; None where there is none, or one that a result cannot hold."""
    try:
        found = load_json(samples.with_name("settings.json")) if samples.is_file() else None
        json.dumps(found, allow_nan=False)
    except ValueError:
        return None
    return found


def _distance_of(config: FidOptions, samples: Statistics, reference: Statistics) -> dict[str, Any]:
    """The result of `fid`, with the settings that imagenet.sample left beside the samples, if it did."""
    found, name = distance(samples, reference), measure(samples, reference)
    return {
        "distance": found,
        "measure": name,
        "line": f"{name}: {found:.6g} of {_words(samples)} to {_words(reference)}",
        "remarks": remarks(samples.source, samples) + remarks(reference.source, reference),
        "samples": _described(samples),
        "reference": _described(reference),
        "sampling": _sampling(Path(config.samples)),
        **_settings(config),
    }


def recovery(config: RecoveryOptions) -> str:
    """The distance of each posterior to a reference: recovery.json, .md and .png; returns what is to be printed.

    Raises:
        ValueError: options that are missing, files that cannot be read, features that do not go together.
    """
    folder, record = read_posteriors(config.posteriors)
    reference = _statistics(config, config.reference or str(images_in(folder / "clean")))
    entries = []
    for posterior in tqdm(record["posteriors"], desc="recovery", leave=False):
        samples = _statistics(config, str(draws_of(folder, record, posterior)))
        entries.append(_key(posterior) | {"distance": distance(samples, reference)})
    name, others = measure(samples, reference), "the reference" if config.reference else "the clean ones"
    caption = (
        f"{name} of {record['draws']} posterior draws for each of {record['contexts']} noised images to "
        f"{_words(reference)}, by evaluations of a network for one draw."
    )
    result = {
        "title": f"Distance of recovered images to {others}",
        "measure": name,
        "caption": caption,
        "remarks": remarks(reference.source, reference) + remarks("each posterior", samples),
        "results": entries,
        "reference": _described(reference),
    }
    return _write(config, folder, record, "recovery", result)


def _statistics(config: FeatureOptions, path: str) -> Statistics:
    return statistics_of(Path(path), config.features, batch=config.batch, size=config.size, device=config.device)


def _described(found: Statistics) -> dict[str, Any]:
    return {"file": found.source, "images": found.count, "size": len(found.mean), "features": found.features}


def _words(found: Statistics) -> str:
    return f"{found.source} ({'an unknown number of' if found.count is None else found.count} images)"


# ---- values ----------------------------------------------------------------------------------------------


def values(config: ValueOptions) -> str:
    """Pearson r of values with those by SDE rollouts: values-REWARD.json, .md, .png; returns what is to be printed.

    The value of a noised image is E15 of scale · reward over its draws. The reference at each time is the SDE rollout
    of the most evaluations, with all of its draws; all other posteriors are set against it.

    Raises:
        ValueError: options that are missing or of no use, files that cannot be read, a reward that does not fit or
            lacks its prompt, fewer than 3 noised images, a time without an SDE rollout or with nothing else.
    """
    folder, record = read_posteriors(config.posteriors)
    if record["contexts"] < 3:
        raise ValueError(f"a correlation needs at least 3 noised images, {folder} has {record['contexts']}")
    if not math.isfinite(config.scale):
        raise ValueError(f"--scale must be finite, got {config.scale}")
    counts, truth = _counts(config.draws, record["draws"]), _references(record)
    reward = load_reward(config.reward, config.device)
    prompts = _prompts(config, folder, record) if reward.reads_prompts else None
    rewards = {}
    for posterior in tqdm(record["posteriors"], desc="rewards", leave=False):
        path = draws_of(folder, record, posterior)
        flat = torch.cat(list(rewards_of(reward, path, config.batch, config.device, prompts)))
        rewards[posterior["folder"]] = config.scale * flat.view(record["contexts"], record["draws"]).T  # (n, contexts)
    entries = []
    for posterior in record["posteriors"]:
        expected = log_mean_exp(rewards[truth[posterior["t"]]["folder"]])
        for n in counts if posterior is not truth[posterior["t"]] else ():
            found = agreement(log_mean_exp(rewards[posterior["folder"]][:n]), expected)
            entries.append(_key(posterior) | {"draws": n, "value_evaluations": n * posterior["evaluations"]} | found)
    steps = ", ".join(f"{n:g}" for n in sorted({posterior["evaluations"] for posterior in truth.values()}))
    caption = (
        f"Pearson r, over {record['contexts']} noised images, of values under {config.scale:g} · {config.reward} with "
        f"those by {record['draws']} SDE rollouts of {steps} evaluations. Evaluations are of a network for one draw, "
        "draws those in one value. ± is a standard error by a jackknife over the images; in brackets is the root mean "
        "square difference of the values, in which, unlike in r, a bias counts: one evaluation of a rollout, the "
        "posterior's mean, has no noise."
    )
    notes = [f"{entry['why']} (t = {entry['t']:g}, {NAMES[entry['method']]})" for entry in entries if entry["why"]]
    result = {
        "title": f"Values under {config.reward}, set against those by long SDE rollouts",
        "measure": "Pearson r of V̂",
        "caption": caption,
        "remarks": list(dict.fromkeys(notes)),
        "identity": reward.identity,
        "results": entries,
    }
    return _write(config, folder, record, f"values-{slug(config.reward)}", result)


def _prompts(config: ValueOptions, folder: Path, record: Entry) -> list[str]:
    """That of each draw: draw d in context c is row c · draws + d. Raises ValueError for none, or {class} unnamed."""
    if not config.prompt:
        raise ValueError(f"--prompt must be given, since the reward {config.reward} reads prompts")
    names = None
    if FIELD in config.prompt:
        try:
            n_classes = int(record["settings"]["network"]["n_classes"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / 'posterior.json'} must have the network's n_classes for {FIELD}") from error
        names = names_for(n_classes, config.names)
    return [p for p in prompts_for(config.prompt, record["labels"], names) for _ in range(record["draws"])]


@torch.no_grad()
def rewards_of(
    reward: RewardSum, path: Path, batch: int = BATCH, device: str = "cpu", prompts: Sequence[str] | None = None
) -> Iterator[Tensor]:
    """The rewards of the images in a file, `(<= batch,)` at a time, in double precision.

    Args:
        reward: of images, or of images and prompts.
        path: npz file of images.
        batch: images in one call.
        device: where they are then.
        prompts: of each image in the file, where the reward takes them.

    Raises:
        ValueError: from `image_batches` and `evaluate_reward`; a reward of one image that depends on the others.
    """
    for k, images in enumerate(image_batches(path, batch)):
        x = as_tensor(images, device).float() / 255
        asked = LatentReward(None, reward, prompts and prompts[k * batch : k * batch + len(x)], decode=batch)
        r = evaluate_reward(asked, x)
        if k == 0 and len(x) > 1:
            check_uncoupled(asked, x, r)
        yield r.double().cpu()


def agreement(a: Tensor, b: Tensor) -> dict[str, Any]:
    """How estimates `(n,)` agree with a reference `(n,)`, n >= 3.

    Returns:
        `r`: Pearson's correlation; `r_error`: its standard error by a jackknife; both None where a or b is constant up
        to rounding, and the error where one is constant but for one entry; `why`: a word on an r that is None, else
        None; `error`: the root mean square difference, in which, unlike in r, a bias counts.
    """
    error = float((a - b).square().mean().sqrt())
    constant = [name for name, x in (("the values", a), ("the reference's values", b)) if _is_constant(x)]
    if constant:
        return {"r": None, "r_error": None, "why": f"{constant[0]} are all the same: r is undefined", "error": error}
    return {"r": _pearson(a, b), "r_error": _jackknife(a, b), "why": None, "error": error}


def _is_constant(x: Tensor) -> bool:
    return float(x.max() - x.min()) <= 1e-9 * float(x.abs().max())


def _pearson(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b / (a.norm() * b.norm())).clamp(-1, 1))


def _jackknife(a: Tensor, b: Tensor) -> float | None:
    """√((n−1)/n Σ_i (r_i − r̄)²) with r_i without pair i, `(n,), (n,) -> ()`; None where that leaves a constant."""
    rest = [torch.arange(len(a)) != i for i in range(len(a))]
    if any(_is_constant(x[kept]) for x in (a, b) for kept in rest):
        return None
    r = torch.tensor([_pearson(a[kept], b[kept]) for kept in rest], dtype=torch.float64)
    return float((len(a) - 1) ** 0.5 * r.std(correction=0))


def _counts(draws: str, most: int) -> list[int]:
    """Numbers of draws from "1,16", or `most`. Raises ValueError for what is not an integer in 1 … most."""
    counts = sorted(numbers(draws, "draws", int)) if draws else [most]
    if not 1 <= counts[0] <= counts[-1] <= most:
        raise ValueError(f"--draws must be from 1 to {most}, as many as there are, got {draws}")
    return counts


def _references(record: Entry) -> dict[float, Entry]:
    """The SDE rollout of the most evaluations at each time. Raises ValueError where there is none, or nothing else."""
    found: dict[float, Entry] = {}
    for posterior in sorted(record["posteriors"], key=lambda posterior: posterior["evaluations"]):
        if posterior["method"] == "sde":
            found[posterior["t"]] = posterior
    times = [posterior["t"] for posterior in record["posteriors"]]
    for t in sorted(set(times)):
        if t not in found or times.count(t) < 2:
            raise ValueError(f"values need an SDE rollout, and other posteriors to set against it; t = {t:g} lacks one")
    return found


# ---- what was drawn, and results -------------------------------------------------------------------------


def read_posteriors(name: str) -> tuple[Path, Entry]:
    """A folder that imagenet.posterior wrote, and its posterior.json. Raises ValueError where that lacks something."""
    if not name:
        raise ValueError("--posteriors must be a folder that imagenet.posterior wrote")
    path = Path(name) / "posterior.json"
    record = load_json(path)
    listed = record.get("posteriors")
    if not isinstance(listed, list) or not listed or not all(_is_posterior(one) for one in listed):
        raise ValueError(
            f"{path} must have a list of posteriors, at least one, each with t, evaluations, folder and a method: "
            f"{', '.join(NAMES)}"
        )
    for count in ("contexts", "draws"):
        check_count(record.get(count, 0), f"{count} in {path}")
    return path.parent, record


def _is_posterior(one: Any) -> bool:
    return (
        isinstance(one, dict)
        and isinstance(one.get("t"), int | float)
        and isinstance(one.get("evaluations"), int | float)
        and isinstance(one.get("folder"), str)
        and one.get("method") in NAMES
    )


def draws_of(folder: Path, record: Entry, posterior: Entry) -> Path:
    """The file of a posterior's draws: draw d of image c is number c · draws + d.

    Raises:
        ValueError: a file that is missing, damaged or of another length.
    """
    path = images_in(folder / posterior["folder"])
    n = count_images(path)
    if n != record["contexts"] * record["draws"]:
        raise ValueError(f"{path} must have {record['contexts']} · {record['draws']} images, got {n}")
    return path


def images_in(folder: Path) -> Path:
    """The file of the images in a folder of samples. Raises ValueError where there are latents alone."""
    path = folder / "samples.npz"
    if not path.is_file() and path.with_name("latents.npz").is_file():
        raise ValueError(f"{path} is missing, there are only latents: give imagenet.posterior a --vae")
    return path


def _key(posterior: Entry) -> Entry:
    return {name: posterior[name] for name in ("t", "method", "evaluations")}


def _write(config: RecoveryOptions | ValueOptions, folder: Path, record: Entry, name: str, result: Entry) -> str:
    """NAME.json, NAME.md and NAME.png; returns the table, its caption and the remarks."""
    out = Path(config.out or folder)
    drawn = {key: value for key, value in record.items() if key not in ("posteriors", "rows", "labels")}
    save_json(result | _settings(config) | {"posteriors": drawn}, out / f"{name}.json")
    draw_curves(result["results"], result["measure"], result["title"], out / f"{name}.png")
    notes = [f"Note: {note}." for note in result["remarks"]]
    text = "\n\n".join([table(result["results"], result["measure"]), result["caption"], *notes])
    with atomic_path(out / f"{name}.md") as temporary:
        temporary.write_text(text + "\n")
    return text


def _settings(config: FidOptions | RecoveryOptions | ValueOptions) -> dict[str, Any]:
    """What a result was made with."""
    found = {"settings": dataclasses.asdict(config), "torch": torch.__version__}
    return found | {"device": device_name(config.device)}


# ---- the command line ------------------------------------------------------------------------------------

# Of each: its options, what it does, that in a line, and the options without which it does nothing.
COMMANDS: dict[str, tuple[type[Any], Callable[[Any], str], str, str]] = {
    "fid": (
        FidOptions, fid, "Fréchet distance of samples to a reference",
        "--samples, and --reference or --save-statistics",
    ),
    "recovery": (
        RecoveryOptions, recovery, "Fréchet distances of posteriors to a reference, against evaluations of a network",
        "--posteriors",
    ),
    "values": (ValueOptions, values, "correlation of values with those by SDE rollouts", "--posteriors"),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, evaluate, print a table or a line."""
    parser = argparse.ArgumentParser(
        prog="python -m imagenet.evaluate", description=__doc__, formatter_class=HelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (config, _, text, needed) in COMMANDS.items():
        description = f"{text}\n\nneeded: {needed}"
        command = commands.add_parser(name, help=text, description=description, formatter_class=HelpFormatter)
        add_options(command, config)
    given = vars(parser.parse_args(arguments))
    config, evaluate, *_ = COMMANDS[given.pop("command")]
    with refusing("imagenet.evaluate"):
        if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise ValueError(f"an evaluation must be one process, without torchrun, got {world} processes")
        check_device(given["device"])
        print(evaluate(config(**given)))


if __name__ == "__main__":
    main()
