"""The report of the stage "Posteriors", from its result alone."""

from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mfm_ref.figures import COLOURS, new_figure, save_figure
from toy.images.section import Section, Table

NAMES = {
    "mfm": "Meta Flow Map", "glass": "GLASS rollout", "own": "GLASS rollout of the map's drift", "sde": "SDE rollout",
}  # fmt: skip
PINK = "#CC79A7"  # of the palette that the other colours are from
LINES = {"mfm": COLOURS["blue"], "glass": COLOURS["orange"], "own": PINK, "sde": COLOURS["green"]}
ROLLOUTS = ("glass", "own", "sde")  # of the base drift, but "own"
WORTH = {"1": "one evaluation", "2": "two evaluations"}  # of the map, set against those of rollouts
NEAR = 1.1  # of the longest rollout's distance: as near as that

CHECKS = {
    "psnr": ("PSNR of the posterior's mean, dB", ".1f"),
    "noisy_psnr": ("PSNR of the best multiple of x_t, dB", ".1f"),
    "spread_over_error": ("spread of the draws / squared error of their mean", ".2f"),
    "same_class": ("draws with the class of the clean image", ".2f"),
}


def draw_recovery(result: dict[str, Any], path: Path) -> None:
    """The distance against the evaluations, one panel a time; below, the correlation of the values."""
    times = list(result["distance"])
    figure, axes = new_figure(2, len(times), size=(2.3, 2.4), sharex="row", sharey="row")
    for ax, t in zip(axes[0], times, strict=True):
        for kind, colour in LINES.items():
            found = {int(k): numbers for k, numbers in result["distance"][t][kind].items()}
            middle = [fmean(numbers) for numbers in found.values()]
            apart = [
                [m - min(numbers) for m, numbers in zip(middle, found.values(), strict=True)],
                [max(numbers) - m for m, numbers in zip(middle, found.values(), strict=True)],
            ]
            ax.errorbar(list(found), middle, apart, fmt="o-", markersize=3, color=colour, label=NAMES[kind], capsize=2)
        ax.axhline(
            fmean(result["floor"]["others"]),
            color=COLOURS["grey"],
            linestyle="--",
            label="other real images",
        )
        ax.set(xscale="log", yscale="log", title=f"t = {float(t):g}", xlabel="evaluations of a draw")
        plain_ticks(ax.xaxis, list(found))
    axes[0, 0].set_ylabel("squared Fréchet distance")
    for ax, t in zip(axes[1], [*times[1:], "all"], strict=True):
        for kind, label, colour in values_shown(result):
            by_n = {int(n): r[t] for n, r in result["values"][kind].items()}
            ax.semilogx(list(by_n), list(by_n.values()), "o-", markersize=3, color=colour, label=label)
        ax.axhline(result["ceiling"][t], color=COLOURS["grey"], linestyle="--", label="second long SDE rollout")
        ax.set(title="all times" if t == "all" else f"t = {float(t):g}", xlabel="evaluations of a value")
        plain_ticks(ax.xaxis, list(by_n))
    axes[1, 0].set_ylabel("Pearson r of V̂")
    for row in axes:
        row[-1].legend(fontsize=6)
    figure.suptitle("Recovered images and estimated values, by evaluations of a network")
    save_figure(figure, path)


def values_shown(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Estimators of V̂: kind, name and colour."""
    colours = iter((COLOURS["orange"], COLOURS["red"]))
    names = {kind: NAMES["mfm"] if kind == "mfm" else f"GLASS, {kind.split()[1]} a draw" for kind in result["values"]}
    return [(kind, name, LINES["mfm"] if kind == "mfm" else next(colours)) for kind, name in names.items()]


def plain_ticks(axis: Any, values: list[int]) -> None:
    """Ticks of a logarithmic axis at these values, written out."""
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(FixedLocator(values))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def section(result: dict[str, Any]) -> Section:
    """The report's words, tables and pictures."""
    return Section(
        "Posteriors",
        "\n\n".join([words_of_recovery(result), words_of_checks(result), words_of_values(result)]),
        [distance_table(result), worth_table(result), checks_table(result), values_table(result), maps_table(result)],
        [
            (
                "posteriors.png",
                "Held-out images and their noisy states, then draws of the posterior: the map's with one and with four "
                "evaluations (the same noises), GLASS rollouts of the base drift from the first of these noises with "
                "more and more evaluations, ends of SDE rollouts. One evaluation of a rollout is the posterior's mean.",
            ),
            (
                "recovery.png",
                "Above: squared Fréchet distance of recovered to clean images; bars show the lowest and the highest "
                "repeat. The repeats share images and network, so the bars are the noise's share of the uncertainty "
                "only. Below: Pearson r of V̂ with the value of a long SDE rollout; in that of all times differences "
                "between times count too, which mostly raises it.",
            ),
        ],
    )


def words_of_recovery(result: dict[str, Any]) -> str:
    """How the distances were measured, and how many evaluations of a rollout one and two of the map are worth."""
    settings = result["settings"]
    most = settings["posterior_evaluations"]
    late = [t for t, by in result["distance"].items() if all(is_flat(by[kind], most) for kind in ("glass", "own"))]
    counts = {
        f"{name}, {NAMES[kind]}": [by[k][kind][0] for t, by in result["worth"].items() if t not in late]
        for k, name in WORTH.items()
        for kind in ROLLOUTS
    }
    found = "; ".join(f"{name}: {span(numbers, most)}" for name, numbers in counts.items() if numbers)
    words = (
        f"{result['images']} held-out images are noised to t and recovered, one draw for each (repeats: "
        f"{settings['posterior_repeats']}). The squared Fréchet distance of recovered to clean images, in the features "
        "of the classifier, is then set against the evaluations of a network that a draw takes. How many of a rollout "
        f"come as near as those of the map, from lowest to highest over the times: {found or 'none'}. The paper "
        "expects about thirty. The rollouts do not have the same drift. That of the base is from plain flow matching "
        f"only, with {result['base_share']:g} of the processor time of a map; the map's own drift, read off its "
        "diagonal, is from the training that made the map, with all of that time. SDE rollouts are of the base."
    )
    if late:
        words += (
            f" Left out are t = {', '.join(f'{float(t):g}' for t in late)}, where GLASS rollouts of one evaluation, "
            f"the posterior's mean, are within a tenth of those of {most}: there is nothing to tell apart."
        )
    return words + (
        " Exact draws would not be at zero: at t = 0 they are as far from the clean images as "
        f"{'training' if result['seen'] else 'other'} images are ({fmean(result['floor']['others']):.3g}), and nearer "
        "at later times, where they resemble the image that was noised."
    )


def is_flat(curve: dict[str, list[float]], most: int) -> bool:
    """Whether one evaluation of a rollout is about as near as the most of them."""
    return fmean(curve["1"]) <= NEAR * fmean(curve[str(most)])


def span(numbers: list[float | None], most: int) -> str:
    """The lowest and the highest of some counts of evaluations, None for more than `most`."""
    low, high = (pick(float("inf") if n is None else n for n in numbers) for pick in (min, max))
    ends = [f"more than {most}" if n == float("inf") else f"{n:.2g}" for n in (low, high)]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def words_of_checks(result: dict[str, Any]) -> str:
    """What is to be seen in the checks."""
    words = "Where draws are calibrated, their spread is the squared error of their mean: the ratio in the tables is 1."
    if result["judge_knows"]:
        words += (
            " The judge was trained on these very held-out images: it finds the class of a clean image in draws that "
            "are like it more often than a judge would that had not seen it."
        )
    return words


def range_of(found: dict[str, Any]) -> str:
    """The lowest and the highest r over the times."""
    low, high = (pick(found[t] for t in found["jackknife"]) for pick in (min, max))
    return f"{low:.2f} to {high:.2f}"


def words_of_values(result: dict[str, Any]) -> str:
    """How the values were measured, and how they agree."""
    settings = result["settings"]
    by_n = result["values"]["mfm"]
    few, many = min(by_n, key=int), max(by_n, key=int)
    ceiling = result["ceiling"]
    lowest = min(ceiling[t] for t in ceiling["jackknife"])
    sure = max(by_n[n]["jackknife"][t] for n in (few, many) for t in ceiling["jackknife"])
    rollouts = [kind for kind in result["values"] if kind != "mfm"]
    steps, mean_only = " or ".join(kind.split()[1] for kind in rollouts), result["values"][rollouts[0]][few]
    return (
        f"V̂ (E15) of {result['states']} noisy states at each time, under the class-mixture reward, is compared with "
        f"the log of the mean of e^r over {settings['posterior_particles']} SDE rollouts of "
        f"{settings['posterior_steps']} steps of the base drift. From the lowest to the highest over the times, "
        f"Pearson r is {range_of(by_n[few])} with {few} draw of the map and {range_of(by_n[many])} with {many} "
        f"(standard errors of up to {sure:.2f}); a second such rollout has {range_of(ceiling)}, and an estimator "
        f"without any error would have about √r, at least {max(lowest, 0) ** 0.5:.2f}. GLASS rollouts have the same "
        f"evaluations, in draws of up to {steps} each. Their first, of one evaluation, is the reward of the "
        f"posterior's mean: it has no noise, r is {range_of(mean_only)}, but a bias that r does not see (root mean "
        f"square errors: {mean_only['error']:.2f}, and {by_n[many]['error']:.2f} of the map with {many} draws). The "
        "reference and the GLASS rollouts are of the same base drift and share its errors; a map that was trained from "
        "images alone does not. At t = 0 all states have the same posterior, so there is nothing to correlate: that "
        "time is left out."
    )


def distance_table(result: dict[str, Any]) -> Table:
    """Mean distances by kind and evaluations."""
    times = list(result["distance"])
    rows = [
        [f"{name}, {k}", *(f"{fmean(result['distance'][t][kind][k]):.3g}" for t in times)]
        for kind, name in NAMES.items()
        for k in result["distance"][times[0]][kind]
    ]
    for name, key in (("as many other real images", "others"), ("halves of the held-out images", "halves")):
        rows.append([name, f"{fmean(result['floor'][key]):.3g}", *[""] * (len(times) - 1)])
    caption = (
        "Squared Fréchet distance of recovered to clean images, by evaluations of a draw. The halves are smaller sets, "
        "and therefore further apart."
    )
    return Table(caption, ["t =", *(f"{float(t):g}" for t in times)], rows)


def worth_table(result: dict[str, Any]) -> Table:
    """Evaluations of a rollout that come as near as those of the map."""
    most = result["settings"]["posterior_evaluations"]
    rows = [
        [
            f"{k} of the map, in the {NAMES[kind]}",
            *(f"{span(by[k][kind][:1], most)} ({span(by[k][kind][1:], most)})" for by in result["worth"].values()),
        ]
        for k in WORTH
        for kind in ROLLOUTS
    ]
    caption = (
        "Evaluations that come as near to the clean images: by the mean distances, and in brackets the lowest and the "
        "highest of the repeats, which share images and network. Rollouts are of the base drift but where they are of "
        "the map's."
    )
    return Table(caption, ["t =", *(f"{float(t):g}" for t in result["worth"])], rows)


def checks_table(result: dict[str, Any]) -> Table:
    """The checks of the map's one-step draws."""
    found = result["checks"]
    rows = [[label, *(f"{by[key]:{form}}" for by in found.values())] for key, (label, form) in CHECKS.items()]
    return Table("One-step draws of the map", ["t =", *(f"{float(t):g}" for t in found)], rows)


def values_table(result: dict[str, Any]) -> Table:
    """Correlations by estimator and evaluations."""
    times = list(result["ceiling"]["jackknife"])

    def cells(r: dict[str, Any]) -> list[str]:
        return [*(plus_minus(r[t], r["jackknife"][t]) for t in times), f"{r['all']:.2f}", f"{r['error']:.2f}"]

    rows = [
        [f"{label}, {n}", *cells(r)]
        for kind, label, _ in values_shown(result)
        for n, r in result["values"][kind].items()
    ]
    rows.append(["a second long SDE rollout", *cells(result["ceiling"])])
    caption = (
        f"Pearson r of V̂ with the value of a long SDE rollout over {result['states']} states at each time, by "
        "evaluations of the network for one value; ± is a standard error by a jackknife over the states. “All” takes "
        "the times together: differences between them count too, which mostly raises it. In the last column the root "
        "mean square error of V̂, in which a bias counts too."
    )
    return Table(caption, ["t =", *(f"{float(t):g}" for t in times), "all", "error"], rows)


def plus_minus(value: float, error: float) -> str:
    """A cell."""
    return f"{value:.2f} ± {error:.2f}"


def maps_table(result: dict[str, Any]) -> Table:
    """Every map at a few times, and the longest GLASS rollout."""
    settings = result["settings"]
    n = result["compared_draws"]
    steps = list(next(iter(next(iter(result["maps"].values())).values()))["distance"])
    header = [
        "map", "t", *(f"distance, {k}" for k in steps), "PSNR of the mean, dB", "spread / error", "same class",
        f"r, {n} draws",
    ]  # fmt: skip
    rows = []
    for name, by_time in result["maps"].items():
        for t, found in by_time.items():
            cells = [f"{fmean(found['distance'][k]):.3g}" for k in steps]
            rows.append([name, f"{float(t):g}", *cells, *three_checks(found), plus_minus(found["r"], found["r_error"])])
    for t, found in result["rollout"].items():
        cells = [f"{fmean(found['distance']['1']):.3g}", *[""] * (len(steps) - 1)]
        name = f"GLASS rollout, {settings['posterior_evaluations']} evaluations"
        rows.append([name, f"{float(t):g}", *cells, *three_checks(found), ""])
    caption = (
        "Every map that was trained, with 1, 2 and 4 evaluations of a draw; the rest with 1. Pearson r of V̂ is over "
        f"{result['states']} states, ± a standard error by a jackknife over them."
    )
    return Table(caption, header, rows)


def three_checks(found: dict[str, Any]) -> list[str]:
    """Cells."""
    return [f"{found[key]:{CHECKS[key][1]}}" for key in ("psnr", "spread_over_error", "same_class")]
