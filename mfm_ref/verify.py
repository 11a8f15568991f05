"""The paper, executable: every equation, its function, its test, its tutorial, and how well it holds, measured now.

Usage:
    python -m mfm_ref.verify              # the table, in under a minute on one core; exit code 1 where a row fails
    python -m mfm_ref.verify --seed 7     # on other random mixtures
    python -m mfm_ref.verify --markdown   # as a Markdown table with links, for the README

The rows are in `verify_residuals.py`, which is written to be read.
"""

import argparse
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import mfm_ref
from mfm_ref.checks import check_count
from mfm_ref.verify_residuals import EQUATIONS, RELATIVE, Equation

TUTORIALS = {
    name[:2]: f"tutorials/{name}.ipynb"
    for name in (
        "01_posteriors",
        "02_flow_maps",
        "03_meta_flow_maps",
        "04_steering",
        "05_finetuning",
        "06_digits",
        "07_questions",
        "08_imagenet",
        "09_fields",
        "10_extend",
    )
}
WIDTH = 130  # of the table in a terminal


@dataclass(frozen=True)
class Result:
    """A row, measured."""

    equation: Equation
    residual: float

    @property
    def passed(self) -> bool:
        """Whether the residual is within the tolerance; NaN is not."""
        return self.residual <= self.equation.tolerance

    @property
    def verdict(self) -> str:
        """What the last column says."""
        return "pass" if self.passed else "FAIL"

    @property
    def shown(self) -> str:
        """The residual, in as many digits as mean something."""
        return f"{self.residual:.1e}" if self.equation.unit == RELATIVE else f"{self.residual:.1f}"

    @property
    def limit(self) -> str:
        """The tolerance with its unit."""
        return f"≤ {self.equation.tolerance:.0e}" if self.equation.unit == RELATIVE else "≤ 5 s.e."


def verify(seed: int = 0, equations: Iterable[Equation] = EQUATIONS) -> list[Result]:
    """Measure every row on random mixtures that follow from the seed, an integer >= 0, on one thread."""
    check_count(seed, "seed", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small
    try:
        return [Result(row, row.residual(seed)) for row in equations]
    finally:
        torch.set_num_threads(threads)


# ---- in a terminal -------------------------------------------------------------------------------------


def width(text: str) -> int:
    """Columns that a text takes in a terminal: the bar of b̄ takes none."""
    return sum(not unicodedata.combining(character) for character in text)


def table(results: Sequence[Result]) -> str:
    """Two lines a row: the equation with its residual, and below where it is."""
    cells = [(f"E{r.equation.number}", r.equation.name, r.equation.formula, r.shown, r.limit) for r in results]
    head = ("", "equation", "", "residual", "tolerance")
    widths = [max(map(width, column)) for column in zip(head, *cells, strict=True)]

    def line(row: Sequence[str], verdict: str) -> str:
        return "  ".join([*(a + " " * (w - width(a)) for a, w in zip(row, widths, strict=True)), verdict]).rstrip()

    lines = [line(head, ""), "─" * WIDTH]
    indent = " " * (widths[0] + 2)
    for row, result in zip(cells, results, strict=True):
        e = result.equation
        where = f"{', '.join(e.functions)} · {e.test} · tutorial {e.tutorial}"
        lines.append(line(row, result.verdict))
        lines += textwrap.wrap(where, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join([*lines, "─" * WIDTH, summary(results)])


def summary(results: Sequence[Result]) -> str:
    """How many rows hold, and what the residuals are."""
    failed = [f"E{r.equation.number} {r.equation.name}" for r in results if not r.passed]
    said = f"FAIL: {', '.join(failed)}." if failed else "All hold."
    return (
        f"{len(results)} rows for {len({r.equation.number for r in results})} equations. {said} Residuals are relative "
        "to one plus the size of the result,\nor, of laws, in standard errors (s.e.) of 60 or more independent runs."
    )


# ---- in Markdown ---------------------------------------------------------------------------------------


def markdown(results: Sequence[Result]) -> str:
    """The table with links that start at the repository's root."""
    lines = [
        "| | equation | function | test | tutorial | residual | tolerance | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        e = r.equation
        path, test = e.test.split("::")
        cells = (
            f"E{e.number}",
            escaped(f"{e.name}: {e.formula}"),
            ", ".join(f"[`{name}`]({source(name)})" for name in e.functions),
            f"[{test.removeprefix('test_').replace('_', ' ')}]({path})",
            f"[{e.tutorial}]({TUTORIALS[e.tutorial]})",
            r.shown,
            r.limit,
            r.verdict,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def escaped(text: str) -> str:
    """A text in a cell of a Markdown table as it is, bars and stars included."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def find(name: str) -> Any:
    """The function, class or method of a row, as `GaussianMixture.tilt` or `sampling.sde_transition`."""
    found: Any = mfm_ref
    for part in name.split("."):
        found = getattr(found, part)
    return found


def source(name: str) -> str:
    """The file that defines it, as seen from the repository's root."""
    return find(name).__module__.replace(".", "/") + ".py"


# ---- the command ---------------------------------------------------------------------------------------


def seed_of(text: str) -> int:
    """A seed from the command line."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer >= 0, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 1 where a row fails."""
    parser = argparse.ArgumentParser(
        prog="python -m mfm_ref.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=seed_of, default=0, help="of the random mixtures (default: 0)")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table with links")
    options = parser.parse_args(arguments)
    results = verify(options.seed)
    print(markdown(results) if options.markdown else table(results))
    return int(not all(r.passed for r in results))


if __name__ == "__main__":
    sys.exit(main())
