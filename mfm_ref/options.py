"""Command lines made from dataclasses: one option a field."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

Config = TypeVar("Config")


def option(default: Any, text: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """A field of a config, with the line that `--help` shows for it and, for a string, the values that it may have."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


def parse(
    config: type[Config],
    description: str,
    arguments: list[str] | None = None,
    *,
    prog: str | None = None,
    presets: tuple[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> Config:
    """A config from the command line: an option `--name` for each field of a dataclass.

    The default says of what type a field is. A bool is a flag, `--name` or `--no-name`.

    Args:
        config: the dataclass; every field has a default that is a str, int, float, bool or Path.
        description: the text above the options in `--help`.
        arguments: in place of those that the process got.
        prog: the command, as a user types it; the file's name where None.
        presets: the field that names a preset, and for each name the defaults of other fields under it; what is typed
            wins over them.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=HelpFormatter)
    add_options(parser, config)
    found = parser.parse_args(arguments)
    if presets is not None:
        field, defaults = presets
        parser.set_defaults(**defaults.get(getattr(found, field), {}))
        found = parser.parse_args(arguments)
    return config(**vars(found))


def add_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup, config: type[Any]) -> None:
    """Add the options of a dataclass to a parser, as `parse` does."""
    for field in dataclasses.fields(config):
        name, kind = "--" + field.name.replace("_", "-"), type(field.default)
        text = (field.metadata.get("help") or " ").replace("%", "%%")
        if kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        else:
            choices = field.metadata.get("choices")
            parser.add_argument(name, type=kind, default=field.default, choices=choices, help=text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after each option, but for empty ones, and the description with its own lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default == "" else super()._get_help_string(action)
