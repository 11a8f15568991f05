"""The stage "Posteriors": noised held-out images, and what each sampler takes for the clean one.

Three questions, each at several times t, of one Meta Flow Map and of rollouts of a drift, by evaluations of a network:
how far recovered images are from clean ones (the squared Fréchet distance in the classifier's features), whether draws
are calibrated, and whether V̂ (E15) agrees with a long SDE rollout. Rollouts are those of the base drift, unless it is
said that they are of the map's own. Writes posteriors.png, recovery.png and, in out/checkpoints/posteriors, each
finished piece, so that a run that was killed goes on.
"""

import dataclasses
import hashlib
import itertools
import operator
from collections.abc import Callable
from functools import partial
from statistics import fmean, pvariance
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mfm_ref import FlowMap, MetaFlowMap, denoiser, frechet_distance, interpolate, sample_posterior, sde_rollout, value
from mfm_ref.alignment import rewards_of
from mfm_ref.baselines import GlassRollout, by_rows
from mfm_ref.estimators import log_mean_exp
from mfm_ref.figures import new_figure, save_figure
from mfm_ref.files import load_json, save_json
from mfm_ref.sampling import noise_like
from toy.common import ToyConfig, option, stream_of
from toy.digits import psnr
from toy.images.data import Images
from toy.images.maps import BASE_SHARE
from toy.images.posteriors_report import ROLLOUTS, draw_recovery, section
from toy.images.rung import Rung
from toy.images.samples import tag_of
from toy.images.section import mosaic

TIMES = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8)
COMPARED = (0.1, 0.4, 0.8)  # the times at which all maps are compared
STEPS = (1, 2, 4, 8)  # evaluations of the map for one draw
DRAWS = (1, 4, 16, 64, 192)  # posterior draws in V̂, as far as the long rollout has as many particles
COMPARED_DRAWS = 16  # in V̂ of every map
# Steps of each draw in V̂ by GLASS rollouts, which have as many evaluations as the map: they divide larger DRAWS.
GLASS_STEPS = (8, 32)
JUDGED = 2000  # draws that the judge classifies, at most: it is slow
PICTURED = 4  # images in the picture
STATES, SAMPLERS, VALUE_STATES, VALUES, REFERENCE, CONTROL, PICTURE = range(20, 27)  # streams of random numbers

__all__ = ["PRESETS", "Settings", "run", "section"]

Sampler = Callable[[float, Tensor, torch.Generator], Tensor]  # t and states (B, *D) -> one draw for each state


@dataclasses.dataclass(frozen=True)
class Settings(ToyConfig):
    """Settings of the stage; the defaults take about 15 minutes of one core for digits."""

    posterior_images: int = option(500, "held-out images that are noised and recovered, at most")
    posterior_repeats: int = option(
        4, "noisy states of each image; images and network stay the same, so they show the noise's share of the "
        "uncertainty only",
    )  # fmt: skip
    posterior_evaluations: int = option(32, "most evaluations of a rollout in the comparison, a power of 2")
    posterior_draws: int = option(8, "posterior draws for each image, for the calibration")
    posterior_contexts: int = option(20, "noisy states whose values are estimated, at each time; at least 3")
    posterior_steps: int = option(200, "steps of the long SDE rollouts, with which estimated values are compared")
    posterior_particles: int = option(200, "long SDE rollouts from each noisy state")
    posterior_value_repeats: int = option(8, "estimates of each value by each method")
    posterior_rows: int = option(2048, "most images in one call of a network")


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "posterior_images": 24, "posterior_repeats": 1, "posterior_evaluations": 2, "posterior_draws": 2,
        "posterior_contexts": 4, "posterior_steps": 4, "posterior_particles": 4, "posterior_value_repeats": 1,
    },
    "mnist": {
        "posterior_images": 200, "posterior_repeats": 2, "posterior_draws": 4, "posterior_contexts": 12,
        "posterior_steps": 100, "posterior_particles": 64, "posterior_value_repeats": 4,
    },
    "full": {
        "posterior_images": 2000, "posterior_repeats": 2, "posterior_draws": 4, "posterior_rows": 4096,
    },
}  # fmt: skip


# ---- samplers, states and random numbers -----------------------------------------------------------------


def of_map(X: MetaFlowMap, steps: int = 1) -> Sampler:
    """Draws of a map, with `steps` evaluations each."""
    return lambda t, x, rng: sample_posterior(X, t, x, 1, steps, generator=rng)[0]


def of_sde(rung: Rung, steps: int) -> Sampler:
    """Ends of SDE rollouts of the base drift."""
    return lambda t, x, rng: sde_rollout(rung.base.drift, t, x, 1, steps, generator=rng)[0]


def glass(base: FlowMap, steps: int) -> GlassRollout:
    """GLASS rollouts of the unconditional drift b_t of a map, as a map."""
    return GlassRollout(base.drift, base.shape, steps, base.dtype, base.device)


def draw(config: Settings, sampler: Sampler, t: float, x: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """n draws for each state, `(n, B, *D)`, at most `posterior_rows` in one call."""
    many = x.expand(n, *x.shape).flatten(0, 1)
    return by_rows(lambda x: (sampler(t, x, rng),), config.posterior_rows, many)[0].unflatten(0, (n, len(x)))


def stream(config: Settings, stage: int, t: float, repeat: int = 0) -> torch.Generator:
    """Random numbers of one time and one repeat, the same for all samplers."""
    seed = 10_000 * stream_of(config, stage) + 100 * repeat + TIMES.index(t)
    return torch.Generator(config.device).manual_seed(seed)


def balanced(images: Images, n: int) -> Tensor:
    """Indices of n images, of each class in turn."""
    by_class = [(images.classes == k).nonzero().flatten().tolist() for k in images.classes.unique()]
    turns = [i for turn in itertools.zip_longest(*by_class) for i in turn if i is not None]
    return torch.tensor(turns[:n], device=images.classes.device)


def recovered_count(config: Settings, rung: Rung) -> int:
    """Images in each set."""
    return min(config.posterior_images, len(rung.data.held_out), len(others(rung)))


def others(rung: Rung) -> Images:
    """Real images that are not held out, and that the classifier did not see either if there are any such."""
    return rung.data.train if rung.data.judge is rung.data.held_out else rung.data.judge


def noised(config: Settings, rung: Rung, t: float, repeat: int = 0) -> tuple[Tensor, Tensor]:
    """Held-out images, `(B, 1, H, W)`, and their noisy states at t."""
    rng = stream(config, STATES, t, repeat)
    held_out = rung.data.held_out
    clean = held_out.blur(held_out.images[: recovered_count(config, rung)], rng)
    return clean, interpolate(noise_like(rung.X, len(clean), generator=rng), clean, t)


def value_states(config: Settings, rung: Rung, t: float) -> Tensor:
    """Noisy states at t whose values are estimated, of all classes equally often."""
    rng = stream(config, VALUE_STATES, t)
    held_out = rung.data.held_out
    clean = held_out.blur(held_out.images[balanced(held_out, config.posterior_contexts)], rng)
    return interpolate(noise_like(rung.X, len(clean), generator=rng), clean, t)


# ---- what is measured, piece by piece --------------------------------------------------------------------


def features(config: Settings, rung: Rung, x: Tensor) -> Tensor:
    """Of the classifier, `(B, F)`."""
    return by_rows(lambda x: (rung.classifier.features(x),), config.posterior_rows, x)[0]


def distances(config: Settings, rung: Rung, samplers: dict[str, Sampler], t: float) -> dict[str, list[float]]:
    """{sampler: squared Fréchet distance of recovered to clean images, of each repeat}; one draw for each state."""
    found: dict[str, list[float]] = {name: [] for name in samplers}
    for repeat in range(config.posterior_repeats):
        clean, x = noised(config, rung, t, repeat)
        target = features(config, rung, clean)
        for name, sampler in samplers.items():
            recovered = draw(config, sampler, t, x, 1, stream(config, SAMPLERS, t, repeat))[0]
            found[name].append(float(frechet_distance(features(config, rung, recovered), target)))
    return found


def recovery(config: Settings, rung: Rung, t: float) -> dict[str, Any]:
    """`distances` by kind and evaluations: the map, rollouts of the base drift, "own" of the map's drift b_t."""
    samplers = {f"mfm {k}": of_map(rung.X, k) for k in STEPS}
    for k in rollout_counts(config):
        samplers |= {f"glass {k}": of_map(glass(rung.base, k)), f"own {k}": of_map(glass(rung.X, k))}
        samplers[f"sde {k}"] = of_sde(rung, k)
    found: dict[str, Any] = {kind: {} for kind in ("mfm", *ROLLOUTS)}
    for name, by_repeat in distances(config, rung, samplers, t).items():
        kind, evaluations = name.split()
        found[kind][evaluations] = by_repeat
    return found


def rollout_counts(config: Settings) -> list[int]:
    """Evaluations of the rollouts, powers of 2."""
    return [2**k for k in range(config.posterior_evaluations.bit_length())]


def floor(config: Settings, rung: Rung) -> dict[str, list[float]]:
    """Squared Fréchet distances between real images: to as many others, and of two halves of the held-out ones."""
    found: dict[str, list[float]] = {"others": [], "halves": []}
    for repeat in range(config.posterior_repeats):
        rng = stream(config, SAMPLERS, 0.0, repeat)
        clean = features(config, rung, noised(config, rung, 0.0, repeat)[0])
        order = torch.randperm(len(others(rung)), generator=rng, device=rung.X.device)[: len(clean)]
        real = features(config, rung, others(rung).blur(others(rung).images[order], rng))
        found["others"].append(float(frechet_distance(real, clean)))
        mixed = clean[torch.randperm(len(clean), generator=rng, device=clean.device)]
        found["halves"].append(float(frechet_distance(*mixed.tensor_split(2))))
    return found


def checks(config: Settings, rung: Rung, X: MetaFlowMap, t: float) -> dict[str, float]:
    """What must hold of exact draws, beside what does; as in `toy.digits`.

    - `psnr`: of the mean E[x₁ | x_t] (E2) to the clean image, in dB; `noisy_psnr`: of the best multiple of x_t.
    - `spread_over_error`: the variance of the draws over the squared error of their mean; 1 where calibrated.
    - `same_class`: how often the judge finds the class of the clean image in a draw.
    """
    clean, x = noised(config, rung, t)
    draws = draw(config, of_map(X), t, x, config.posterior_draws, stream(config, SAMPLERS, t))
    spread = draws.var(0).mean()
    error = (draws.mean(0) - clean).square().mean() - spread / len(draws)
    truth = rung.data.held_out.classes[: len(x)].repeat(len(draws))[:JUDGED]
    agree = rung.judge(draws.flatten(0, 1)[:JUDGED]) == truth
    mean = by_rows(lambda x: (denoiser(X, t, x),), config.posterior_rows, x)[0]
    return {
        "psnr": psnr(mean, clean),
        "noisy_psnr": psnr(x * float((x * clean).sum() / x.square().sum()), clean),
        "spread_over_error": float(spread / error),
        "same_class": float(agree.float().mean()),
    }


def long_rollout(config: Settings, rung: Rung, stage: int, t: float) -> dict[str, Any]:
    """{value: log of the mean of e^r over the ends of many long SDE rollouts, for each state}."""
    x = value_states(config, rung, t)
    sampler = of_sde(rung, config.posterior_steps)
    draws = draw(config, sampler, t, x, config.posterior_particles, stream(config, stage, t))
    return {"value": log_mean_exp(rewards_of(rung.reward, draws)).tolist()}


def estimates(config: Settings, rung: Rung, X: MetaFlowMap, n: int, t: float) -> list[list[float]]:
    """V̂ (E15) by n draws of a map, `(repeats, states)`."""
    x = value_states(config, rung, t)
    found = []
    for repeat in range(config.posterior_value_repeats):
        rng = stream(config, VALUES, t, repeat)
        found.append(
            by_rows(
                lambda x, rng=rng: (value(X, rung.reward, t, x, n, generator=rng),),
                max(1, config.posterior_rows // n),
                x,
            )[0].tolist()
        )
    return found


def values(config: Settings, rung: Rung, t: float) -> dict[str, Any]:
    """V̂ by the map and by GLASS rollouts, by the evaluations of the network for each state."""
    found: dict[str, Any] = {"mfm": {}} | {f"glass {k}": {} for k in GLASS_STEPS}
    for n in draw_counts(config):
        found["mfm"][str(n)] = estimates(config, rung, rung.X, n, t)
        for most in GLASS_STEPS:
            steps = min(n, most)
            found[f"glass {most}"][str(n)] = estimates(config, rung, glass(rung.base, steps), n // steps, t)
    return found


def draw_counts(config: Settings) -> list[int]:
    """Numbers of draws in V̂."""
    return [n for n in DRAWS if n <= config.posterior_particles]


def measure_map(config: Settings, rung: Rung, X: MetaFlowMap, t: float) -> dict[str, Any]:
    """The distances by evaluations, the checks and V̂ of one map."""
    by_steps = distances(config, rung, {str(k): of_map(X, k) for k in STEPS[:3]}, t)
    n = min(COMPARED_DRAWS, config.posterior_particles)
    return {"distance": by_steps, **checks(config, rung, X, t), "values": estimates(config, rung, X, n, t)}


def measure_rollout(config: Settings, rung: Rung, t: float) -> dict[str, Any]:
    """The distance and the checks of the longest GLASS rollout."""
    longest = glass(rung.base, config.posterior_evaluations)
    return {"distance": distances(config, rung, {"1": of_map(longest)}, t), **checks(config, rung, longest, t)}


# ---- what follows from the pieces ------------------------------------------------------------------------


def worth(distance: float, curve: dict[int, float]) -> float | None:
    """Evaluations at which a curve {evaluations: distance} comes down to a distance, between two by logarithms.

    None where it does not; the first of the curve where that is as near already.
    """
    before: tuple[int, float] | None = None
    for k, found in sorted(curve.items()):
        if found <= distance:
            if before is None or found <= 0:
                return float(k)
            share = torch.tensor([before[1] / distance, before[1] / found], dtype=torch.float64).log()
            return float(before[0] * (k / before[0]) ** float(share[0] / share[1]))
        before = (k, found)
    return None


def matches(found: dict[str, Any]) -> dict[str, Any]:
    """{evaluations of the map: {rollout: [as many of it, by the mean distances, then by those of each repeat]}}."""
    repeats = range(len(found["mfm"]["1"]))
    picks: list[Callable[[list[float]], float]] = [fmean, *(operator.itemgetter(i) for i in repeats)]

    def curve(kind: str, pick: Callable[[list[float]], float]) -> dict[int, float]:
        return {int(k): pick(by_repeat) for k, by_repeat in found[kind].items()}

    return {
        str(k): {kind: [worth(curve("mfm", pick)[k], curve(kind, pick)) for pick in picks] for kind in ROLLOUTS}
        for k in STEPS[:2]
    }


def pearson(a: list[float], b: list[float]) -> float:
    """Correlation of two lists, 0 where one is constant."""
    r = torch.corrcoef(torch.tensor([a, b], dtype=torch.float64))[0, 1]
    return float(r.nan_to_num(0.0))


def jackknife(runs: list[list[float]], reference: list[float]) -> float:
    """Standard error, by leaving out each state in turn, of the mean Pearson r of estimates `(repeats, states)`."""
    n = len(reference)

    def without(i: int, numbers: list[float]) -> list[float]:
        return numbers[:i] + numbers[i + 1 :]

    r = [fmean(pearson(without(i, one), without(i, reference)) for one in runs) for i in range(n)]
    return ((n - 1) * pvariance(r)) ** 0.5


def correlations(by_time: dict[str, list[list[float]]], reference: dict[str, list[float]]) -> dict[str, Any]:
    """Pearson r of estimates `(repeats, states)` with the reference, by time and over all, the mean over repeats.

    `jackknife` has the standard errors of those by time. `error` is the root mean square difference over all times, in
    which, unlike in r, a bias counts.
    """
    truth = list(itertools.chain(*(reference[t] for t in by_time)))
    together = [list(itertools.chain(*one)) for one in zip(*by_time.values(), strict=True)]
    found = {t: fmean([pearson(one, reference[t]) for one in runs]) for t, runs in by_time.items()}
    squares = [(a - b) ** 2 for one in together for a, b in zip(one, truth, strict=True)]
    return {
        **found,
        "jackknife": {t: jackknife(runs, reference[t]) for t, runs in by_time.items()},
        "all": fmean([pearson(one, truth) for one in together]),
        "error": fmean(squares) ** 0.5,
    }


# ---- the run ---------------------------------------------------------------------------------------------


Make = Callable[[], dict[str, Any]]


def kept(config: Settings, name: str, tag: str, make: Make) -> dict[str, Any]:
    """A piece of the result; it is kept in out/checkpoints/posteriors, and its file's name has a hash of the tag."""
    digest = hashlib.sha256(tag.encode()).hexdigest()[:16]
    path = config.out / "checkpoints" / "posteriors" / f"{name.replace(' ', '-')}-{digest}.json"
    if not path.exists():
        save_json(make(), path)
    return load_json(path)


def pieces(config: Settings, rung: Rung) -> dict[str, tuple[str, Make]]:
    """All that is measured, by name, each with the tag of what it depends on."""
    networks = [rung.base, rung.classifier]
    tag = tag_of(config, Settings, *networks, rung.X)
    found = {name: (tag, make) for name, make in main_pieces(config, rung).items()}
    tags = {name: tag_of(config, Settings, *networks, X) for name, X in rung.maps.items()}
    rollout_tag = tag_of(config, Settings, *networks)
    for t in COMPARED:
        found[f"rollout {t}"] = rollout_tag, partial(measure_rollout, config, rung, t)
        for name, X in rung.maps.items():
            found[f"map {name} {t}"] = tags[name], partial(measure_map, config, rung, X, t)
    return found


def main_pieces(config: Settings, rung: Rung) -> dict[str, Make]:
    """What is measured of one map and of rollouts."""
    jobs: dict[str, Make] = {"floor": partial(floor, config, rung)}
    for t in TIMES:
        jobs[f"recovery {t}"] = partial(recovery, config, rung, t)
        jobs[f"checks {t}"] = partial(checks, config, rung, rung.X, t)
    for t in TIMES[1:]:
        jobs[f"reference {t}"] = partial(long_rollout, config, rung, REFERENCE, t)
        jobs[f"control {t}"] = partial(long_rollout, config, rung, CONTROL, t)
        jobs[f"values {t}"] = partial(values, config, rung, t)
    return jobs


@torch.no_grad()
def run(config: Settings, rung: Rung) -> dict[str, Any]:
    """The stage; returns what `section` reads.

    Raises:
        ValueError: fewer than 3 contexts, evaluations that are no power of 2, too few images.
    """
    check_settings(config, rung)
    jobs = tqdm(pieces(config, rung).items(), desc="posteriors", leave=False)
    found = {name: kept(config, name, tag, make) for name, (tag, make) in jobs}
    late = [str(t) for t in TIMES[1:]]
    reference = {t: found[f"reference {t}"]["value"] for t in late}
    result: dict[str, Any] = {
        "images": recovered_count(config, rung),
        "states": len(reference[late[0]]),
        "seen": others(rung) is rung.data.train,
        "judge_knows": rung.data.judge is rung.data.held_out,
        "base_share": BASE_SHARE,
        "floor": found["floor"],
        "distance": {str(t): found[f"recovery {t}"] for t in TIMES},
        "worth": {str(t): matches(found[f"recovery {t}"]) for t in TIMES},
        "checks": {str(t): found[f"checks {t}"] for t in TIMES},
        "values": {
            kind: {
                n: correlations({t: found[f"values {t}"][kind][n] for t in late}, reference)
                for n in found[f"values {late[0]}"][kind]
            }
            for kind in found[f"values {late[0]}"]
        },
        "ceiling": correlations({t: [found[f"control {t}"]["value"]] for t in late}, reference),
        "compared_draws": min(COMPARED_DRAWS, config.posterior_particles),
        "maps": {name: compared(found, name, reference) for name in rung.maps},
        "rollout": {str(t): found[f"rollout {t}"] for t in COMPARED},
        "settings": {k: v for k, v in dataclasses.asdict(config).items() if k.startswith("posterior_")},
    }
    draw_posteriors(config, rung)
    draw_recovery(result, config.out / "recovery.png")
    return result


def check_settings(config: Settings, rung: Rung) -> None:
    """Raises ValueError as `run` does."""
    if config.posterior_contexts < 3:
        raise ValueError(f"posterior_contexts must be at least 3, for a correlation, got {config.posterior_contexts}")
    k = config.posterior_evaluations
    if k < 1 or k & (k - 1):
        raise ValueError(f"posterior_evaluations must be a power of 2, got {k}")
    if recovered_count(config, rung) < 4:
        raise ValueError(f"posteriors need at least 4 images to recover, got {recovered_count(config, rung)}")


def compared(found: dict[str, Any], name: str, reference: dict[str, list[float]]) -> dict[str, Any]:
    """What was measured of one map, by time, with V̂ as its correlation and the standard error of that."""
    by_time = {str(t): dict(found[f"map {name} {t}"]) for t in COMPARED}
    r = correlations({t: piece.pop("values") for t, piece in by_time.items()}, reference)
    return {t: piece | {"r": r[t], "r_error": r["jackknife"][t]} for t, piece in by_time.items()}


# ---- pictures --------------------------------------------------------------------------------------------


def draw_posteriors(config: Settings, rung: Rung) -> None:
    """A few held-out images at each time: clean, noisy, and draws of the posterior by each sampler."""
    rng = stream(config, PICTURE, 0.0)
    held_out = rung.data.held_out
    clean = held_out.images[balanced(held_out, 3 * PICTURED)[::3]]  # of classes that lie apart
    counts = pictured_counts(config)
    titles = [
        "x₁, x_t", "map: 1 evaluation", "map: 4 evaluations", f"GLASS: {', '.join(map(str, counts))}",
        f"SDE: {counts[-1]}",
    ]  # fmt: skip
    widths = [2, 4, 4, len(counts), 3]
    half = (len(TIMES) + 1) // 2
    # One column of axes stays empty, between the early times and the late ones.
    figure, axes = new_figure(half, 2 * len(widths) + 1, size=(1.32, 1.8), width_ratios=[*widths, 0.3, *widths])
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for i, t in enumerate(TIMES):
        panel = axes[i % half, (len(widths) + 1) * (i // half) :]
        x = interpolate(noise_like(rung.X, len(clean), generator=rng), clean, t)
        eps = noise_like(rung.X, 4, len(clean), generator=rng)
        many = [sample_posterior(rung.X, t, x, 4, steps, eps=eps) for steps in (1, 4)]
        glasses = [sample_posterior(glass(rung.base, k), t, x, 1, eps=eps[:1])[0] for k in counts]
        ends = sde_rollout(rung.base.drift, t, x, 3, counts[-1], generator=rng)
        groups = [torch.stack([clean, x]), *many, torch.stack(glasses), ends]
        for ax, group, title in zip(panel, groups, titles, strict=False):
            ax.imshow(mosaic(group.transpose(0, 1)), cmap="gray", vmin=-1, vmax=1)
            if i % half == 0:
                ax.set_title(title, fontsize=8)
        panel[0].set_ylabel(f"t = {t:g}", fontsize=10)
    figure.suptitle("What could the clean image be? Held-out images x₁, noisy states x_t, and draws of p(x₁ | x_t)")
    save_figure(figure, config.out / "posteriors.png")


def pictured_counts(config: Settings) -> list[int]:
    """Evaluations of the GLASS rollouts in the picture, about four of them."""
    return sorted({k for k in (1, 4, 16) if k < config.posterior_evaluations} | {config.posterior_evaluations})
