"""The results of all stages as one page that needs no other file, as Markdown beside its pictures, and as JSON.

A stage's record is a dict: `settings` (all that its numbers depend on), `seconds`, `torch` (its version), `hardware`,
and `result`, what the stage's `run` returned. The sections are made from these records alone, so that a report can be
made anew, elsewhere, from the JSON files and the pictures.
"""

import base64
import html
from pathlib import Path
from typing import Any

from mfm_ref.files import atomic_path, save_json
from toy.common import markdown
from toy.images.section import Section, Table
from toy.images.settings import DataSettings
from toy.images.stages import STAGES

Record = dict[str, Any]

NAMES = {"digits": "scikit-learn's digits", "mnist": "MNIST", "fashion": "Fashion-MNIST"}

# The pictures are made for paper: they stay on white in the dark.
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #ccc; --quiet: #555; --link: #0055a4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --line: #444; --quiet: #a8a8a8; --link: #7cb7ff; }
}
body { max-width: 80rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.55 system-ui, sans-serif;
       color: var(--ink); background: var(--paper); }
a { color: var(--link); }
p, figcaption { max-width: 50rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); padding-bottom: 0.3rem; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption, caption, .quiet { color: var(--quiet); font-size: 0.9rem; text-align: left; }
.wide { overflow-x: auto; margin: 1.5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { padding-bottom: 0.4rem; }
th, td { padding: 0.25rem 0.8rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
"""


def write_report(config: DataSettings, results: dict[str, Record]) -> None:
    """Write report.html, report.md and report.json into `config.out`, where the pictures are.

    Args:
        config: only `out` is read.
        results: the record of each finished stage.

    Raises:
        ValueError: no record at all, or records that differ in a setting that they share, the map say.
    """
    if not results:
        raise ValueError(f"{config.out} must hold the result of a stage: run `python -m toy.mnist` first")
    _check_alike(results)
    page = _page(config.out, results)
    save_json({"seconds": sum(r["seconds"] for r in results.values()), "stages": results}, config.out / "report.json")
    for name, text in {"report.html": page, "report.md": markdown_page(results)}.items():
        with atomic_path(config.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _check_alike(results: dict[str, Record]) -> None:
    """Refuse records of different runs."""
    known: dict[str, tuple[str, Any]] = {}
    for stage, record in results.items():
        for name, value in record["settings"].items():
            first, other = known.setdefault(name, (stage, value))
            if other != value:
                raise ValueError(
                    f"results must be of one run: {name} is {other!r} in {first}.json and {value!r} in {stage}.json; "
                    "remove one of them, or write elsewhere (--out)"
                )


def sections(results: dict[str, Record]) -> dict[str, Section]:
    """The section of each stage that has a record, in the order of the stages."""
    return {name: stage.section(results[name]["result"]) for name, stage in STAGES.items() if name in results}


def tables(results: dict[str, Record]) -> str:
    """All tables in Markdown, each below its section's title and its own caption."""
    parts = (*sections(results).values(), _costs(results))
    return "\n\n".join(_markdown_table(table, f"**{part.title}.** ") for part in parts for table in part.tables)


def markdown_page(results: dict[str, Record]) -> str:
    """The report in Markdown; its pictures are beside it."""
    text = [f"# {_title(results)}"]
    for part in (*sections(results).values(), _costs(results)):
        pictures = [f"![{caption}]({name})\n\n{caption}" for name, caption in part.pictures]
        text += [f"## {part.title}", part.text, *pictures, *map(_markdown_table, part.tables)]
    return "\n\n".join(filter(None, text)) + "\n"


def _markdown_table(table: Table, title: str = "") -> str:
    """A table below its caption."""
    header, *rows = ([_plain(cell) for cell in row] for row in (table.header, *table.rows))
    return f"{title}{table.caption}\n\n{markdown(header, rows)}"


def _title(results: dict[str, Record]) -> str:
    """The title of the page."""
    dataset = next(iter(results.values()))["settings"]["dataset"]
    return f"Meta Flow Maps on {NAMES.get(dataset, dataset)}"


def _plain(cell: str) -> str:
    """A cell of a Markdown table: a bar would end it."""
    return cell.replace("|", r"\|")


def _costs(results: dict[str, Record]) -> Section:
    """What the run took, on what."""
    rows = [
        [name, f"{results[name]['seconds'] / 60:.1f}", results[name]["hardware"], results[name]["torch"]]
        for name in STAGES
        if name in results
    ]
    rows.append(["all", f"{sum(r['seconds'] for r in results.values()) / 60:.1f}", "", ""])
    table = Table("Minutes of each stage", ["stage", "minutes", "hardware", "torch"], rows)
    return Section("Time", "", [table])


def _settings(results: dict[str, Record]) -> Section:
    """Every setting of every stage, those that they share once."""
    shown: dict[str, tuple[str, str]] = {}
    for stage in STAGES:
        for name, value in results.get(stage, {}).get("settings", {}).items():
            shown.setdefault(name, (stage, str(value)))
    rows = [[stage, name, value] for name, (stage, value) in shown.items()]
    table = Table("A setting of training counts for every later stage", ["stage", "setting", "value"], rows)
    return Section("Settings", "", [table])


# ---- HTML ----------------------------------------------------------------------------------------------


def _page(folder: Path, results: dict[str, Record]) -> str:
    """The whole page."""
    title = _title(results)
    parts = {**sections(results), "time": _costs(results), "settings": _settings(results)}
    contents = "\n".join(f'<li><a href="#{_text(key)}">{_text(part.title)}</a></li>' for key, part in parts.items())
    body = "\n".join(_section(key, part, folder) for key, part in parts.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{_text(title)}</h1>
<p class="quiet">A Meta Flow Map draws samples of p(x₁ | x_t), the clean images that a noisy one may come from, in one
step, and lets gradients through. Noise is at time 0, data at time 1.</p>
<nav aria-label="Contents"><ol>
{contents}
</ol></nav>
<main>
{body}
</main>
</body>
</html>
"""


def _section(key: str, section: Section, folder: Path) -> str:
    """A heading, paragraphs, pictures and tables."""
    paragraphs = [f"<p>{_text(part.strip())}</p>" for part in section.text.split("\n\n") if part.strip()]
    pictures = [_picture(folder / name, caption) for name, caption in section.pictures]
    parts = [f"<h2>{_text(section.title)}</h2>", *paragraphs, *pictures, *map(_table, section.tables)]
    return f'<section id="{_text(key)}">\n' + "\n".join(parts) + "\n</section>"


def _picture(path: Path, caption: str) -> str:
    """A PNG file within the page; a line that says so where there is none."""
    text = _text(caption)
    if not path.is_file():
        return f"<figure><figcaption>{text} (The picture {_text(path.name)} is missing.)</figcaption></figure>"
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _table(table: Table) -> str:
    """A table that scrolls by itself where the page is narrow."""
    header = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return (
        f'<div class="wide"><table><caption>{_text(table.caption)}</caption>\n'
        f"<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _text(text: str) -> str:
    """Text that HTML shows as it is."""
    return html.escape(text, quote=True)
