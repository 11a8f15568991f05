"""Build the API reference from the docstrings with pdoc, and check it.

Usage: python .ci/docs.py [FOLDER]    # runs/docs where none is given

A warning while it is built is an error. So is a link within the reference whose page or place on the page does not
exist; the message names the page and the link.
"""

import ast
import re
import sys
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

import pdoc
import pdoc.docstrings

ROOT = Path(__file__).parent.parent
PACKAGE = "mfm_ref"
SECTION = re.compile(r"[A-Z][A-Za-z ]+:")  # Args:, Returns:, Raises:, Raises ValueError (…):
CODE = re.compile(r"(`[^`]+`)")
convert = pdoc.docstrings.convert


# ---- links ---------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What the links of one page are, and the places on it that links may lead to."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep `href`, `src` and `id`, of whatever element."""
        self.links += [value for name, value in attrs if name in ("href", "src") and value is not None]
        self.places |= {value for name, value in attrs if name == "id" and value}


def broken_links(folder: Path) -> list[str]:
    """A message for each link in the pages of a folder that leads nowhere; addresses elsewhere are not looked at."""
    pages = {path.resolve(): Page(path.read_text()) for path in sorted(folder.rglob("*.html"))}
    messages = []
    for path, page in pages.items():
        name = path.relative_to(folder.resolve())
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = unquote(parts.fragment)
            if not target.is_file():
                messages.append(f"{name}: {link} leads to no page")
            elif place and (target not in pages or place not in pages[target].places):
                messages.append(f"{name}: {link} leads to no place on {target.name}")
    return messages


# ---- docstrings ----------------------------------------------------------------------------------------


def definitions(package: Path) -> dict[str, str]:
    """{public name at the top of a module: the module}, names of several modules left out."""
    found: dict[str, str] = {}
    several = set()
    for path in sorted(package.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                several |= {node.name} & set(found)
                found[node.name] = path.stem
    return {name: module for name, module in found.items() if name not in several}


def prose(docstring: str) -> Iterator[tuple[bool, str]]:
    """The docstring in pieces, each with whether it is prose: an indented block outside the sections is a formula."""
    within = False

    def kind(line: str) -> bool:
        nonlocal within
        if line[:1].strip():
            within = SECTION.fullmatch(line.strip()) is not None
        return within or not line.startswith("    ")

    for is_prose, lines in groupby(docstring.splitlines(keepends=True), kind):
        yield is_prose, "".join(lines)


def as_markdown(docstring: str, home: str, names: dict[str, str]) -> str:
    """A docstring as Markdown that shows what is written: stars in prose as stars, and names as links.

    Args:
        docstring: as `inspect.cleandoc` gives it.
        home: the module whose page shows it, "__init__" for the package.
        names: from `definitions`. A name of another module than home becomes a link; pdoc finds the others.
    """

    def link(code: str) -> str:
        module = names.get(code[1:-1])
        if module is None or module == home:
            return code
        return f"[{code}]({f'{PACKAGE}/' if home == '__init__' else ''}{module}.html#{code[1:-1]})"

    return "".join(
        "".join(link(part) if k % 2 else part.replace("*", r"\*") for k, part in enumerate(CODE.split(piece)))
        if is_prose
        else piece
        for is_prose, piece in prose(docstring)
    )


# ---- the pages -----------------------------------------------------------------------------------------


def build(folder: Path, *, sources: bool = True) -> None:
    """Write a page for the package, one for each of its modules, and an index for the search.

    Args:
        folder: where the pages go.
        sources: whether a page shows the code of what is on it.

    Raises:
        Warning: whatever pdoc or an import warns of.
    """
    package = ROOT / PACKAGE
    names = definitions(package)

    def converted(docstring: str, docformat: str, source_file: Path | None) -> str:
        home = source_file.stem if source_file is not None and source_file.parent == package else ""
        return convert(as_markdown(docstring, home, names) if home else docstring, docformat, source_file)

    with warnings.catch_warnings(), patch.object(pdoc.docstrings, "convert", converted):
        warnings.simplefilter("error")
        pdoc.render.configure(docformat="google", footer_text=PACKAGE, show_source=sources)
        modules = {PACKAGE: pdoc.doc.Module.from_name(PACKAGE)}
        # Without `__all__` the package's page lists all modules, and a name has one place, on the page of its module.
        with patch.dict(vars(modules[PACKAGE].obj)):
            del modules[PACKAGE].obj.__all__
            modules |= {module.fullname: module for module in modules[PACKAGE].submodules}
            for name, module in modules.items():
                page = folder / f"{name.replace('.', '/')}.html"
                page.parent.mkdir(parents=True, exist_ok=True)
                page.write_text(pdoc.render.html_module(module, modules))
            (folder / "index.html").write_text(pdoc.render.html_index(modules))
            (folder / "search.js").write_text(pdoc.render.search_index(modules))


def main(folder: Path) -> None:
    """Build, check, and say where the first page is."""
    build(folder)
    messages = broken_links(folder)
    if messages:
        raise SystemExit("\n".join(messages))
    print(folder / "index.html")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "docs")
