"""Prompts for the classes of ImageNet.

The names are in class_names.txt; class_names.LICENSE says where they are from.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

TEMPLATE = "A high-quality, high-resolution photograph of a {class}."  # the paper's
FIELD = "{class}"
NAMES = Path(__file__).with_name("class_names.txt")


def class_names() -> list[str]:
    """The names of ImageNet's 1,000 classes, in the order of labels: 207 is Golden Retriever, 281 tabby cat."""
    return list(_names())


def names_for(n_classes: int, names_file: str = "") -> list[str] | None:
    """The names of the classes of a network or of latents: those of a file, else ImageNet's where there are 1,000.

    Args:
        n_classes: how many classes there are.
        names_file: text file of one name a line, in the order of labels; "" for none.

    Returns:
        A name for each label; None where the classes are not ImageNet's and there is no file.

    Raises:
        ValueError: a file that cannot be read, has a line without a name, or another number of names.
    """
    if not names_file:
        return class_names() if n_classes == len(_names()) else None
    try:
        names = [line.strip() for line in Path(names_file).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--names must be a text file that can be read, got {names_file}: {error}") from error
    if len(names) != n_classes or not all(names):
        raise ValueError(
            f"--names must have one name a line for each of {n_classes} classes, got {sum(map(bool, names))} names in "
            f"{len(names)} lines of {names_file}"
        )
    return names


def prompts_for(template: str, labels: Tensor | Sequence[int], names: Sequence[str] | None = None) -> list[str]:
    """A prompt for each label: the template with the name of the class in place of {class}.

    Args:
        template: such as `TEMPLATE`; one without {class} is the prompt of all labels.
        labels: classes, `(B,)`.
        names: of the classes, as `names_for` gives them; None where they are not known.

    Raises:
        ValueError: {class} without names, or with a label that has none, such as that of no class.
    """
    found = [int(label) for label in labels]
    if FIELD not in template:
        return [template] * len(found)
    if names is None:
        raise ValueError(
            f"a prompt with {FIELD} needs the names of the classes, which are not ImageNet's: give --names FILE, a "
            f"text file of one name a line, or a prompt without {FIELD}; got {template!r}"
        )
    strange = [label for label in found if not 0 <= label < len(names)]
    if strange:
        raise ValueError(f"labels must be from 0 to {len(names) - 1} to have a name, got {strange[0]}")
    return [template.replace(FIELD, names[label]) for label in found]


def rows_of(prompts: str | Sequence[str] | None, n: int) -> list[str] | None:
    """A prompt for each of n rows: one for all, or from a list whose length divides n, row i having prompt i mod len.

    None where there are none.

    Raises:
        ValueError: a length that does not divide n.
    """
    if prompts is None:
        return None
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not prompts or n % len(prompts):
        raise ValueError(f"the number of prompts must divide that of images, {n}, got {len(prompts)}")
    return list(prompts) * (n // len(prompts))


@functools.cache
def _names() -> tuple[str, ...]:
    return tuple(NAMES.read_text().splitlines())
