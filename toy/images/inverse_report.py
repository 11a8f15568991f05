"""The report of the stage "Inverse problems", from its result alone."""

from typing import Any

from toy.images.section import Section, Table

CHOSEN, RIVAL = "both, SDE", "DPS"  # the methods that the words are about
REPORTED = ("0.5", "0.9")  # levels of central intervals in the tables
ENOUGH = 8  # images, below which a jackknife over them says nothing


def section(result: dict[str, Any]) -> Section:
    """The report's words about inverse problems."""
    tables = [
        Table(
            "Peak signal-to-noise ratio, dB",
            ["problem", "measurements", "A⁺y", "Gaussian mean", "DPS, mean", "mean of samples", "one sample"],
            [psnr_row(task, facts) for task, facts in result["tasks"].items()],
        ),
        Table(
            f"Calibration on {result['images']} images; exact posteriors have 1, 0.5, 0.9, 1 and two equal shares"
            f"{alone(result['images'])}",
            [
                *("problem", "samples of", "spread over error", "coverage of 50 %", "coverage of 90 %", "residual"),
                *("class of the truth", "two samples agree", "class among the samples"),
            ],
            [calibration_row(*row, result["images"]) for row in rows_of(result, "all")],
        ),
        Table(
            f"Estimators and dynamics, on {result['compared']} of these images{alone(result['compared'])}",
            [
                *("problem", "method", "PSNR of the mean", "spread over error", "coverage of 50 %"),
                *("coverage of 90 %", "residual", "evaluations", "seconds per sample"),
            ],
            [method_row(*row, result["compared"]) for row in rows_of(result, "some")],
        ),
    ]
    pictures = [
        (
            "inverse.png",
            "What was measured, and what is made of it; of a standard deviation, black is 0 and white 1",
        ),
        ("inverse_calibration.png", "Ranks of the truth among the samples, and coverage of central intervals"),
    ]
    return Section("Inverse problems", words(result), tables, pictures)


def rows_of(result: dict[str, Any], part: str) -> list[tuple[str, str, dict[str, Any] | None]]:
    """(problem, method, facts) of every row of a table."""
    return [(task, name, found) for task, facts in result["tasks"].items() for name, found in facts[part].items()]


def psnr_row(task: str, facts: dict[str, Any]) -> list[str]:
    """One row of the first table."""
    rival, chosen = facts["all"][RIVAL], facts["all"][CHOSEN]
    values = [facts["psnr_trivial"], facts["psnr_gaussian"], rival and rival["psnr_mean"]]
    values += [chosen and chosen[key] for key in ("psnr_mean", "psnr_single")]
    cells = ["diverges" if value is None else f"{value:.1f}" for value in values]
    return [task, str(facts["measurements"]), *cells]


def alone(images: int) -> str:
    """What a caption says where there are no standard errors."""
    return "" if images >= ENOUGH else "; too few of them for standard errors"


def with_error(pair: list[float], images: int) -> str:
    """A number, and its standard error if there are enough images for one."""
    return f"{pair[0]:.2f} ± {pair[1]:.2f}" if images >= ENOUGH else f"{pair[0]:.2f}"


def checks(found: dict[str, Any], images: int) -> list[str]:
    """Spread, coverages and residual."""
    covered = [found["coverage"][level] for level in REPORTED]
    return [with_error(pair, images) for pair in (found["spread_over_error"], *covered, found["residual"])]


def calibration_row(task: str, name: str, found: dict[str, Any] | None, images: int) -> list[str]:
    """One row of the second table."""
    if found is None:
        return [task, name, "diverges", *[""] * 6]
    shares = [f"{found['classes'][key]:.2f}" for key in ("same", "pairs", "among")]
    return [task, name, *checks(found, images), *shares]


def method_row(task: str, name: str, found: dict[str, Any] | None, images: int) -> list[str]:
    """One row of the third table."""
    if found is None:
        return [task, name, "diverges", *[""] * 6]
    cost = [f"{found['evaluations']:.0f}", f"{found['seconds']:.2f}"]
    return [task, name, f"{found['psnr_mean']:.1f}", *checks(found, images), *cost]


def words(result: dict[str, Any]) -> str:
    """What was done, and what the numbers of the chosen method say."""
    verdicts = [verdict(task, facts, result["images"]) for task, facts in result["tasks"].items()]
    return "\n\n".join([setting(result), judgement(result), *verdicts])


def setting(result: dict[str, Any]) -> str:
    """The problems, and the samplers."""
    return (
        f"{result['images']} held-out images, each measured as y = A x₁ + σ ξ with σ = {result['sigma']:g}: without a "
        f"square of half the side (inpainting), without the right half, blurred by a Gaussian of standard deviation "
        f"{result['blur']:g} (in pixels), and averaged {result['factor']} by {result['factor']}. "
        "All of these are one call, `steer` with the log-likelihood of y as the reward, on the map of the other "
        f"stages: {result['samples']} samples for each image, {result['draws']} posterior draws a step, "
        f"{result['steps']} steps of the Doob SDE. DPS gets {result['dps_steps']} steps. "
        "The Gaussian is N(mean, covariance) of the training images, whose posteriors have a closed form."
    )


def judgement(result: dict[str, Any]) -> str:
    """How samples are judged, and how far that can be trusted."""
    opened = "; ".join(
        f"{task}: {100 * facts['open'] / result['pixels']:.0f} %" for task, facts in result["tasks"].items()
    )
    text = (
        "A measured image is a draw of its exact posterior, so among exact samples it would be one more. The pixels "
        f"that are judged are the open ones, whose Gaussian posterior is wider than σ ({opened}). Before truth and "
        f"samples are ranked, both get noise of standard deviation {result['jitter']:g} (σ, the threshold, is "
        f"{result['sigma']:g}): pixels that are black for certain would be ties. Beside a posterior that is hardly "
        "wider than σ this noise is not small, and it pulls the coverage towards its level. "
        f"{errors(result)}"
    )
    if result["judge_saw_them"]:
        text += (
            " The judge, by whom samples have classes, was trained on these very images: that it finds the class of "
            "the truth says less than it would of images that it did not see."
        )
    return text


def errors(result: dict[str, Any]) -> str:
    """What standard errors there are, and how many verdicts rest on them."""
    if result["images"] < ENOUGH:
        return "So few images give no standard errors: the numbers stand alone, without a verdict."
    count = sum(comparisons(facts) for facts in result["tasks"].values())
    return (
        f"Standard errors are over images, by the jackknife. A coverage is compared with its level {count} times "
        "below, at two standard errors: one in twenty of such comparisons fails by chance, with exact samples too."
    )


def comparisons(facts: dict[str, Any]) -> int:
    """How often `verdict` compares a coverage with its level."""
    return 0 if facts["all"][CHOSEN] is None else 2 + (facts["all"][RIVAL] is not None)


def verdict(task: str, facts: dict[str, Any], images: int) -> str:
    """What the numbers say about one problem."""
    found = facts["all"][CHOSEN]
    if found is None:
        return f"{task.capitalize()}: the samples diverge."
    gain = found["psnr_mean"] - facts["psnr_gaussian"]
    rival = facts["all"][RIVAL]
    beside = "DPS diverges" if rival is None else f"with DPS the central half has it {how_often(rival, '0.5', images)}"
    return (
        f"{task.capitalize()}: the mean of the samples is {abs(gain):.1f} dB {'better' if gain >= 0 else 'worse'} than "
        f"the Gaussian one. The truth is within the central half of the samples {how_often(found, '0.5', images)}, "
        f"within the central 90 % {how_often(found, '0.9', images)}; {beside}. The spread of the samples is "
        f"{with_error(found['spread_over_error'], images)} of their error, and a sample leaves "
        f"{with_error(found['residual'], images)} of the residual that the truth leaves."
    )


def how_often(found: dict[str, Any], level: str, images: int) -> str:
    """Coverage, and against its level, in words: within two standard errors of it, above or below."""
    share, error = found["coverage"][level]
    if images < ENOUGH:
        return f"with frequency {share:.2f}"
    if abs(share - float(level)) <= 2 * error:
        return f"as often as it should be, within two standard errors ({share:.2f})"
    return f"{'more' if share > float(level) else 'less'} often than it should be ({share:.2f})"
