"""The notebooks: they run, answers included; their outputs are those of their code; their links lead somewhere."""

import ast
import base64
import json
import re
from pathlib import Path

import pytest
from nbclient.exceptions import CellExecutionError

from tutorials import run

ROOT = Path(__file__).parent.parent
NAMES = (
    "01_posteriors", "02_flow_maps", "03_meta_flow_maps", "04_steering", "05_finetuning", "06_digits", "07_questions",
    "08_imagenet", "09_fields", "10_extend",
)  # fmt: skip
EVERY = pytest.mark.parametrize("path", run.NOTEBOOKS, ids=lambda path: path.stem)
LINK = re.compile(r"\[`([\w.]+)`\]\(([^)]+)\)")
SETUP = """\
import os
import sys
from pathlib import Path

FAST = "MFM_FAST" in os.environ  # for the test suite: seconds, and networks that are hardly trained
if not Path("../mfm_ref").exists():  # on Colab
    !git clone -q {address} && pip install -q "./mfm_ref[toy]"
    os.chdir("mfm_ref/tutorials")
sys.path.insert(0, "..")"""


def code_of(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def words_of(notebook) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def tree_of(source: str) -> ast.Module:
    return ast.parse("\n".join(re.sub(r"^(\s*)[!%].*", r"\1pass", line) for line in source.split("\n")))


def pictures_of(notebook):
    """What holds a picture among the outputs."""
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    return [o["data"] for o in outputs if any(kind.startswith("image/") for kind in o.get("data", {}))]


def test_there_are_ten():
    assert tuple(path.stem for path in run.NOTEBOOKS) == NAMES


@EVERY
def test_it_runs_fast_with_its_answers(path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run.execute(run.with_answers(run.read(path)), fast=True)


@pytest.mark.slow
@EVERY
def test_it_runs_in_full_to_the_outputs_it_shows(path):
    before = run.read(path)
    after, seconds = run.execute(before, fast=False)
    assert not run.differences(before, after)
    assert seconds < 180
    run.execute(run.with_answers(before), fast=False)


@EVERY
def test_its_outputs_are_not_older_than_its_code(path):
    notebook = run.read(path)
    assert notebook.metadata["mfm_ref"]["code"] == run.code_hash(notebook), f"python -m tutorials.run {path.name[:2]}"
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == [
        k + 1 for k in range(len(code_of(notebook)))
    ]
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)


@EVERY
def test_it_is_small_quick_and_says_how_long_it_takes(path):
    notebook = run.read(path)
    seconds = notebook.metadata["mfm_ref"]["seconds"]
    assert path.stat().st_size < 500_000
    assert seconds <= 180
    # The head is the one that `written` makes now: badge, address, minutes.
    assert run.written(notebook, path, seconds).cells[0].source == notebook.cells[0].source
    assert f"{run.badge(path)}\n\nAbout " in notebook.cells[0].source
    number, _, title = notebook.cells[0].source.split("\n")[0].removeprefix("# ").partition(". ")
    assert int(number) == int(path.name[:2]) and title


@EVERY
def test_it_begins_alike_and_is_for_itself(path):
    notebook = run.read(path)
    first, *rest = code_of(notebook)
    assert first == SETUP.format(address=run.repository())
    allowed = {"torch", "numpy", "mfm_ref", "math", "inspect", "itertools", "collections", "dataclasses", "tempfile",
               "json", "zlib", "functools", "copy", "pathlib", "sklearn", "scipy", "subprocess", "time", "contextlib",
               "typing", "io", "string", "textwrap", "argparse", "shlex"}  # fmt: skip
    allowed |= {"imagenet"} if path.stem == "08_imagenet" else set()
    for cell in rest:
        for node in ast.walk(tree_of(cell)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, names


@EVERY
def test_its_claims_are_asserted_and_its_exercises_answered(path):
    notebook = run.read(path)
    asserts = [node for cell in code_of(notebook) for node in ast.walk(tree_of(cell)) if isinstance(node, ast.Assert)]
    assert len(asserts) >= 5
    exercises = words_of(notebook).split("## Exercises")[1].split("## Where it is")[0]
    answers = run.ANSWER.findall(exercises)
    assert len(answers) == exercises.count("<details>") == exercises.count("</details>") >= 3
    assert all("assert" in answer for answer in answers)


@EVERY
def test_its_figures_stand_alone(path):
    notebook = run.read(path)
    shown = pictures_of(notebook)
    assert len(shown) >= 2
    for number, data in enumerate(shown, 1):
        caption = data["text/plain"]
        assert caption.startswith(f"Figure {number}. ") and len(caption) > 60, caption
        assert base64.b64decode(data["image/jpeg"])[:2] == b"\xff\xd8"
    code = "\n".join(code_of(notebook))
    assert "pyplot" not in code and code.count("new_figure(") >= code.count("Captioned(") >= len(shown)
    # Colours come from COLOURS, which is safe for colour-blind readers, or from a map of even lightness.
    named = re.findall(r"(?:color|facecolor|edgecolor)=[\"'](\w+)", code) + re.findall(r"cmap=[\"'](\w+)", code)
    assert set(named) <= {"white", "black", "none", "cividis", "viridis", "gray", "Greys", "gray_r"}, named
    assert not re.search(r"#[0-9a-fA-F]{6}", code)


@EVERY
def test_its_links_lead_to_what_they_name(path):
    words = words_of(run.read(path))
    for link in re.findall(r"\]\(([^)\s]+)\)", words):
        if not link.startswith("https://"):
            assert (run.FOLDER / link.partition("#")[0]).exists(), link
    table = words.split("## Where it is")[1]
    rows = re.findall(r"^\| E\d+.*$", table, re.MULTILINE)
    assert rows
    for row in rows:
        equation, functions, tests = (cell.strip() for cell in row.strip("|").split("|"))
        assert LINK.findall(functions) and LINK.findall(tests), row
        for name, link in LINK.findall(functions) + LINK.findall(tests):
            text = (run.FOLDER / link).read_text()
            last = name.split(".")[-1]
            assert re.search(rf"^\s*(def|class) {last}\b|^{last} = ", text, re.MULTILINE), f"{equation}: {name}, {link}"
        for name, link in LINK.findall(tests):
            assert name.startswith("test_") and link.startswith("../tests/"), row
        assert all(link.startswith(("../mfm_ref/", "../imagenet/")) for _, link in LINK.findall(functions)), row


@EVERY
def test_its_outputs_name_no_machine(path):
    assert not re.search(r"/(home|tmp|root|usr|work)/|site-packages", json.dumps(run.read(path)))


# ---- the tool itself -----------------------------------------------------------------------------------


def notebook_of(*cells: str):
    """A notebook of code cells, which print what they say."""
    new = run.nbformat.v4
    words = (
        "# 1. Title\n\nSome words.\n\n<details><summary>Answer</summary>\n\n```python\nassert x == 3\n```\n</details>"
    )
    return new.new_notebook(
        cells=[new.new_code_cell(cells[0]), new.new_markdown_cell(words), *map(new.new_code_cell, cells[1:])]
    )


def test_a_wrong_answer_fails():
    assert run.execute(run.with_answers(notebook_of("x = 3")), fast=True)[1] > 0
    with pytest.raises(CellExecutionError, match="AssertionError"):
        run.execute(run.with_answers(notebook_of("x = 4")), fast=True)


def test_fast_is_told_by_the_environment_alone(monkeypatch):
    monkeypatch.setenv("MFM_FAST", "1")
    cell = "import os; print('MFM_FAST' in os.environ)"
    said = [run.printed(run.execute(notebook_of(cell), fast=fast)[0])[0] for fast in (True, False)]
    assert said == ["True\n", "False\n"]


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("error 0.021", "error 0.023", True),
        ("error 2.10", "error 2.40", True),
        ("error 2.10", "error 4.20", False),
        ("error 2.10", "errors 2.10", False),
        ("error 2.10", "error 2.10 and 3", False),
        ("1e-15", "3e-15", True),
        ("error 0.021", "error 0.060", False),
        ("1 mode", "2 modes", False),
        ("3 of 20 samples", "4 of 20 samples", True),
        ("0.00 and 1", "0.03 and 1", False),
    ],
)
def test_stale_outputs_are_seen(old, new, same):
    cells = [
        run.nbformat.v4.new_code_cell("x", outputs=[run.nbformat.v4.new_output("stream", text=t)]) for t in (old, new)
    ]
    books = [run.nbformat.v4.new_notebook(cells=[cell]) for cell in cells]
    assert (not run.differences(*books)) == same


def test_code_that_changed_is_seen():
    assert run.code_hash(notebook_of("x = 3")) != run.code_hash(notebook_of("x = 4"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["3"], "must be two digits, 01 to 10, got 3"), (["--fast", "--check", "03"], "give it without --fast")],
)
def test_the_command_refuses(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run", *arguments])
    with pytest.raises(SystemExit):
        run.main()
    assert said in capsys.readouterr().err


def test_what_is_written_has_one_head(tmp_path):
    notebook = notebook_of("x = 3")
    notebook.cells.reverse()
    path = tmp_path / "01_title.ipynb"
    once = run.written(notebook, path, 61)
    head = once.cells[0].source
    assert head.startswith("# 1. Title\n\n[![Open in Colab]") and "About 2 minutes on 2 cores.\n\nSome words." in head
    again = run.written(once, path, 59)
    assert again.cells[0].source == head.replace("2 minutes", "1 minute")
