"""Execute the notebooks, so that the outputs in them are those of their code.

Usage:
    python -m tutorials.run              # all, in full; outputs and minutes are written into the notebooks
    python -m tutorials.run 03 05        # some of them
    python -m tutorials.run --check 03   # execute and compare with the outputs that are there; nothing is written
    python -m tutorials.run --fast       # seconds each, by MFM_FAST=1; nothing is written
"""

import argparse
import copy
import hashlib
import math
import os
import re
import time
import tomllib
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from mfm_ref.files import atomic_path

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
QUICK = """\
from matplotlib.layout_engine import ConstrainedLayoutEngine
ConstrainedLayoutEngine.execute = lambda engine, figure: None"""  # draws without placing the text
ANSWER = re.compile(r"<details>.*?```python\n(.*?)```.*?</details>", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
TOLERANCE = 0.35  # of a printed number, as its share: trained networks differ between machines
FLOOR = 5e-3  # below it numbers are taken for zero; whole numbers may be one off


def repository() -> str:
    """The address of the repository, from pyproject.toml: badges lead there."""
    return str(tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]["urls"]["Repository"])


def badge(path: Path) -> str:
    """The Colab badge of a notebook, in Markdown."""
    address = repository().replace("https://github.com/", "https://colab.research.google.com/github/")
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})]({address}/blob/main/tutorials/{path.name})"


def read(path: Path) -> NotebookNode:
    """A notebook, which must be a valid one."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_hash(notebook: NotebookNode) -> str:
    """SHA-256 of the code, which tells outputs that are older than the code."""
    cells = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(cells.encode()).hexdigest()


def with_answers(notebook: NotebookNode) -> NotebookNode:
    """The notebook with the hidden answers to its exercises as code cells, where they are told."""
    notebook, cells = copy.deepcopy(notebook), list[NotebookNode]()
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "markdown":
            cells += [nbformat.v4.new_code_cell(answer) for answer in ANSWER.findall(cell.source)]
    notebook.cells = cells
    return notebook


def execute(notebook: NotebookNode, *, fast: bool, timeout: float = 900) -> tuple[NotebookNode, float]:
    """An executed copy, and the seconds that it took. Raises nbclient's CellExecutionError with the failing cell."""
    notebook = copy.deepcopy(notebook)
    environment = {name: value for name, value in os.environ.items() if name != "MFM_FAST"}
    if fast:
        environment["MFM_FAST"] = "1"
        notebook.cells.insert(0, nbformat.v4.new_code_cell(QUICK))
    began = time.perf_counter()
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute(env=environment)
    if fast:
        notebook.cells.pop(0)
    return notebook, time.perf_counter() - began


def written(notebook: NotebookNode, path: Path, seconds: float) -> NotebookNode:
    """An executed notebook as it is kept: without what differs from run to run, with its time and its code's hash."""
    notebook, seconds = copy.deepcopy(notebook), round(seconds)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "mfm_ref": {"code": code_hash(notebook), "seconds": seconds},
    }
    title, rest = notebook.cells[0].source.split("\n", 1)
    rest = re.sub(r"^\s*\[!\[Open in Colab\].*?\n", "", rest)
    rest = re.sub(r"^\s*About [^\n]* on 2 cores\.\n", "", rest)
    minutes = max(1, math.ceil(seconds / 60))
    told = f"About {minutes} minute{'s' if minutes > 1 else ''} on 2 cores."
    notebook.cells[0].source = f"{title}\n\n{badge(path)}\n\n{told}\n\n{rest.lstrip()}"
    return notebook


def printed(notebook: NotebookNode) -> list[str]:
    """What each code cell prints or shows, as text."""
    texts = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shown = (output.get("text", output.get("data", {}).get("text/plain", "")) for output in cell.outputs)
            texts.append("".join(shown))
    return texts


def is_near(x: float, y: float) -> bool:
    """Whether two printed numbers are one, but for chance and rounding."""
    whole = x == round(x) and y == round(y)
    return abs(x - y) <= max(TOLERANCE * max(abs(x), abs(y)), 1.0 if whole else FLOOR)


def differences(old: NotebookNode, new: NotebookNode) -> list[str]:
    """Where the outputs of two executions differ: in words, or in a number by more than chance and rounding explain."""
    found = []
    for number, (a, b) in enumerate(zip(printed(old), printed(new), strict=True)):
        numbers = [[float(n) for n in NUMBER.findall(text)] for text in (a, b)]
        words = [NUMBER.sub("#", text).split() for text in (a, b)]
        near = len(numbers[0]) == len(numbers[1]) and all(is_near(x, y) for x, y in zip(*numbers, strict=True))
        if words[0] != words[1] or not near:
            found.append(f"code cell {number + 1}: was\n{a}\nis\n{b}")
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tutorials.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("numbers", nargs="*", help="the first two digits of notebooks; all where none is given")
    parser.add_argument("--fast", action="store_true", help="execute with MFM_FAST=1 and write nothing")
    parser.add_argument("--check", action="store_true", help="compare with the outputs that are there")
    given = parser.parse_args()
    span = f"{NOTEBOOKS[0].name[:2]} to {NOTEBOOKS[-1].name[:2]}"
    unknown = set(given.numbers) - {path.name[:2] for path in NOTEBOOKS}
    if unknown:
        parser.error(f"numbers must be two digits, {span}, got {', '.join(sorted(unknown))}")
    if given.fast and given.check:
        parser.error("--check compares outputs in full: give it without --fast")
    failed = False
    for path in (path for path in NOTEBOOKS if not given.numbers or path.name[:2] in given.numbers):
        before = read(path)
        after, seconds = execute(before, fast=given.fast)
        print(f"{path.name}: {seconds:.0f} s", flush=True)
        if given.check:
            found = differences(before, after)
            failed |= bool(found)
            print(*found, sep="\n", end="\n" if found else "")
        elif not given.fast:
            with atomic_path(path) as temporary:
                nbformat.write(written(after, path, seconds), temporary)
    if failed:
        raise SystemExit("outputs differ")


if __name__ == "__main__":
    main()
