"""The report of the image rungs: one page that needs no other file, whatever the text in it."""

import base64
import dataclasses
import html.parser
import json

import pytest
import torch

from mfm_ref.figures import new_figure, save_figure
from toy.images import report
from toy.images.section import Section, Table
from toy.images.settings import DataSettings

VOID = {"meta", "img", "br"}


class Page(html.parser.HTMLParser):
    """Checks that every element is closed, and keeps what a page shows."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def record(result: dict) -> dict:
    settings = {"dataset": "digits", "seed": 0, "steer_samples": 7}
    return {"settings": settings, "seconds": 90.0, "torch": "2", "hardware": "cpu, 1 of 2 cores", "result": result}


NASTY = "p(x₁ | x_t) & <script>alert('1')</script> \"quoted\""


def first(result):
    table = Table("First caption " + NASTY, ["a|b", "c"], [["1", NASTY], ["2", "x | y"]])
    return Section("One <b>", f"Word.\n\nAnother {result['word']}.", [table], [("one.png", "A picture of " + NASTY)])


def second(_):
    return Section("Two", "", [], [("nowhere.png", "Not there")])


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A folder with a report of two of three stages."""
    stage = report.STAGES["train"]
    sections = {"one": first, "none": second, "two": second}
    stages = {name: dataclasses.replace(stage, section=section) for name, section in sections.items()}
    monkeypatch.setattr(report, "STAGES", stages)
    figure, _ = new_figure(1, 1, size=(1, 1))
    save_figure(figure, tmp_path / "one.png")
    results = {"two": record({}), "one": record({"word": "<i>word</i>"})}
    report.write_report(DataSettings(out=tmp_path), results)
    return tmp_path, results


def test_page_is_whole_and_needs_no_other_file(written):
    folder, _ = written
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not any(page.all(tag) for tag in ("script", "link", "iframe", "b", "i"))
    assert "http" not in text and "url(" not in text
    (image,) = page.all("img")
    head, data = image["src"].split(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == (folder / "one.png").read_bytes()
    assert image["alt"] == "A picture of " + NASTY
    assert "The picture nowhere.png is missing." in " ".join(page.texts)


def test_contents_lead_to_the_sections_in_the_order_of_the_stages(written):
    page = Page((written[0] / "report.html").read_text(encoding="utf-8"))
    ids = [section["id"] for section in page.all("section")]
    assert ids == ["one", "two", "time", "settings"]
    assert [link["href"] for link in page.all("a")] == [f"#{key}" for key in ids]


def test_text_is_shown_as_it_is(written):
    page = Page((written[0] / "report.html").read_text(encoding="utf-8"))
    assert NASTY in page.texts  # a cell
    assert "One <b>" in page.texts
    assert "Word." in page.texts and "Another <i>word</i>." in page.texts


def test_json_holds_every_record_and_the_sum_of_the_seconds(written):
    folder, results = written
    assert json.loads((folder / "report.json").read_text()) == {"seconds": 180.0, "stages": results}


def test_markdown_has_the_words_tables_and_pictures(written):
    text = (written[0] / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Meta Flow Maps on ") and text == report.markdown_page(written[1])
    assert all(part in text for part in report.tables(written[1]).split("\n\n") if part.startswith("|"))
    for section in report.sections(written[1]).values():
        assert f"## {section.title}\n" in text and section.text in text
        assert all(f"![{caption}]({name})" in text for name, caption in section.pictures)


def test_tables_in_markdown(written):
    text = report.tables(written[1])
    lines = text.splitlines()
    assert lines[0].startswith("**One <b>.** First caption")
    assert lines[2] == r"| a\|b | c |"
    assert lines[5] == r"| 2 | x \| y |"
    assert lines[-1] == "| all | 3.0 |  |  |"
    assert "steer_samples" not in text


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold the result of a stage"):
        report.write_report(DataSettings(out=tmp_path), {})


def test_records_with_a_number_that_is_none_are_refused(tmp_path, monkeypatch):
    stage = dataclasses.replace(report.STAGES["train"], section=second)
    monkeypatch.setattr(report, "STAGES", {"one": stage})
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write_report(DataSettings(out=tmp_path), {"one": record({"x": float(torch.tensor(float("nan")))})})
    assert not (tmp_path / "report.json").exists()
