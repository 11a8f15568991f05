"""The API reference: it builds from the docstrings without a warning, and the check of its links finds broken ones."""

import importlib.util
import warnings
from pathlib import Path

import pytest

import mfm_ref

ROOT = Path(mfm_ref.__file__).parent.parent
spec = importlib.util.spec_from_file_location("docs_tool", ROOT / ".ci" / "docs.py")
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """The whole reference without the sources of the functions, which take half of the time."""
    folder = tmp_path_factory.mktemp("docs")
    docs.build(folder, sources=False)
    return folder


def text_of(path: Path) -> str:
    return path.read_text()


def test_every_module_has_a_page_and_every_link_a_place(reference):
    modules = {path.stem for path in (ROOT / "mfm_ref").glob("*.py")} - {"__init__"}
    assert {path.stem for path in (reference / "mfm_ref").glob("*.html")} == modules
    assert docs.broken_links(reference) == []


def test_every_public_name_is_on_the_page_of_its_module(reference):
    pages = {path.stem: docs.Page(text_of(path)) for path in (reference / "mfm_ref").glob("*.html")}
    for name in mfm_ref.__all__:
        assert name in pages[getattr(mfm_ref, name).__module__.removeprefix("mfm_ref.")].places


def test_formulas_sections_and_names_are_shown_as_they_are_meant(reference):
    """A formula with stars has no emphasis, arguments are a list, and names lead to their pages."""
    page = text_of(reference / "mfm_ref" / "interpolant.html")
    assert "x* = ((1−s)² t x + (1−t)² s z) / (q (q+p))," in page
    assert "With D = x* + (1−t*) b the division" in page
    assert "<strong>drift:</strong>" in page
    assert '<a href="alignment.html#guidance">mfm_ref.alignment.guidance</a>' in page
    page = text_of(reference / "mfm_ref" / "objectives.html")
    assert '<a href="interpolant.html#coupled_interpolants"><code>coupled_interpolants</code></a>' in page
    assert '<a href="mfm_ref/steering.html">' in text_of(reference / "mfm_ref.html")


def test_a_docstring_as_markdown():
    written = (
        "b* and `(B, *D)`, see `steer`, `own`.\n\n    x* = 2\n\nArgs:\n    x: a* b.\n\n        More *.\n\nAfter *."
    )
    expected = (
        "b\\* and `(B, *D)`, see [`steer`](steering.html#steer), `own`.\n\n    x* = 2\n\n"
        "Args:\n    x: a\\* b.\n\n        More \\*.\n\nAfter \\*."
    )
    assert docs.as_markdown(written, "mixture", {"steer": "steering", "own": "mixture"}) == expected
    assert "(mfm_ref/steering.html#steer)" in docs.as_markdown("`steer`", "__init__", {"steer": "steering"})


def test_names_of_several_modules_are_no_links(tmp_path):
    (tmp_path / "a.py").write_text("def f(): ...\ndef g(): ...\ndef _h(): ...\n")
    (tmp_path / "b.py").write_text("class f: ...\n")
    assert docs.definitions(tmp_path) == {"g": "a"}


PAGE = '<h1 id="top">A</h1><a href="{}">x</a><script src="https://example.org/x.js"></script>'


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("b.html", None),
        ("b.html#top", None),
        ("#top", None),
        ("b%2Ehtml", None),
        ("https://example.org/nothing", None),
        ("c.html", "a.html: c.html leads to no page"),
        ("b.html#bottom", "a.html: b.html#bottom leads to no place on b.html"),
        ("#bottom", "a.html: #bottom leads to no place on a.html"),
        ("../b.html", "a.html: ../b.html leads to no page"),
    ],
)
def test_a_broken_link_is_found_and_named(link, message, tmp_path):
    (tmp_path / "a.html").write_text(PAGE.format(link))
    (tmp_path / "b.html").write_text(PAGE.format("a.html"))
    assert docs.broken_links(tmp_path) == ([message] if message else [])


def test_broken_links_and_warnings_end_the_command(tmp_path, monkeypatch):
    def built(folder):
        (folder / "a.html").write_text(PAGE.format("c.html"))

    monkeypatch.setattr(docs, "build", built)
    with pytest.raises(SystemExit, match="leads to no page"):
        docs.main(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(docs.pdoc.doc.Module, "from_name", lambda name: warnings.warn("a warning", stacklevel=1))
    with pytest.raises(UserWarning, match="a warning"):
        docs.build(tmp_path)


@pytest.mark.slow
def test_the_command_with_the_sources(tmp_path, capsys):
    docs.main(tmp_path)
    assert capsys.readouterr().out.strip() == str(tmp_path / "index.html")
    assert "View Source" in text_of(tmp_path / "mfm_ref" / "interpolant.html")
