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


def prompts_for(template: str, labels: Tensor | Sequence[int], names: Sequence[str] | None = None) -> list[str]:
    """A prompt for each label: the template with the name of the class in place of {class}.

    Args:
        template: such as `TEMPLATE`; one without {class} is the prompt of all labels.
        labels: classes, `(B,)`.
        names: of the classes; ImageNet's where it is None.

    Raises:
        ValueError: a label without a name, such as that of no class.
    """
    known = _names() if names is None else names
    found = [int(label) for label in labels]
    strange = [label for label in found if not 0 <= label < len(known)]
    if strange:
        raise ValueError(f"labels must be from 0 to {len(known) - 1} to have a name, got {strange[0]}")
    return [template.replace(FIELD, known[label]) for label in found]


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
