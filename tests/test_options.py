"""Command lines made from dataclasses."""

import dataclasses
from pathlib import Path

import pytest

from mfm_ref.options import option, parse


@dataclasses.dataclass(frozen=True)
class Options:
    """One field of each type."""

    out: Path = option(Path("runs"), "folder")
    batch_size: int = option(8, "of a step")
    rate: float = option(0.1, "100 % of it")
    kind: str = option("a", "which one", choices=("a", "b"))
    fast: bool = option(False, "or slow")
    name: str = option("", "nobody's")


def test_defaults_are_those_of_the_fields():
    assert parse(Options, "", []) == Options()


def test_an_option_for_each_field():
    given = ["--out", "x/y", "--batch-size", "3", "--rate", "1e-3", "--kind", "b", "--fast"]
    assert parse(Options, "", given) == Options(Path("x/y"), 3, 1e-3, "b", True)
    assert parse(Options, "", ["--fast", "--no-fast"]) == Options()


@pytest.mark.parametrize(
    ("given", "match"),
    [(["--kind", "c"], "invalid choice: 'c'"), (["--batch-size", "x"], "invalid int"), (["--x"], "unrecognized")],
)
def test_what_is_no_option_ends_the_program(given, match, capsys):
    with pytest.raises(SystemExit):
        parse(Options, "", given)
    assert match in capsys.readouterr().err


def test_help_keeps_the_lines_of_the_description_and_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        parse(Options, "What it does.\n\n    a   table\n    of two lines", ["--help"], prog="python -m it")
    page = capsys.readouterr().out
    assert page.startswith("usage: python -m it [-h]")
    assert "nobody's\n" in page and "(default: )" not in page
    assert "\n    a   table\n    of two lines\n" in page
    assert "(default: 8)" in page and "100 % of it" in page and "--no-fast" in page


def test_a_preset_gives_defaults_and_what_is_typed_wins():
    presets = ("name", {"large": {"batch_size": 64, "fast": True, "out": Path("big")}, "slow": {"rate": 0.2}})
    assert parse(Options, "", [], presets=presets) == Options()
    assert parse(Options, "", ["--name", "large"], presets=presets) == Options(Path("big"), 64, 0.1, "a", True, "large")
    typed = ["--batch-size", "8", "--name", "large", "--no-fast"]  # the fields' own defaults, typed
    assert parse(Options, "", typed, presets=presets) == Options(Path("big"), 8, name="large")
    assert parse(Options, "", ["--name", "slow"], presets=presets).rate == 0.2
