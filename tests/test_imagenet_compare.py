"""Comparisons: what is read of each result, tables, curves, and what is refused."""

import json

import numpy as np
import pytest
from matplotlib.layout_engine import ConstrainedLayoutEngine

from imagenet import compare as script
from imagenet import pictures, steer_report
from tests.conftest import PLACE

ROW = {"folder": "any", "samples": 4, "diversity": 2.5, "passes": 3, "seconds": 0.5, "peak_memory": 2_000_000_000}


def steer_row(method, n, reward, spent, name="brightness", held_out=None):
    rewards = {name: [reward, 0.1]} | ({} if held_out is None else {"redness": [held_out, None]})
    return ROW | {"method": method, "n": n, "rewards": rewards, "evaluations": spent, "formula": spent}


def value_entry(t, method, spent, draws, r):
    error = None if r is None else 0.01
    numbers = {"evaluations": spent, "draws": draws, "value_evaluations": spent * draws}
    return {"t": t, "method": method, **numbers, "r": r, "r_error": error, "error": 0.3, "why": None}


@pytest.fixture
def results(tmp_path):
    """Two runs of each script, as they leave them."""
    for run, gain in (("small", 1.0), ("large", 2.0)):
        rows = [steer_row("base", 1, 0.5, 10), steer_row("mfm-g", 4, gain, 170), steer_row("mfm-g", 1, 0.6, 50)]
        write(tmp_path / "steered" / run / "steer.json", {"rows": rows, "reward": "brightness"})
        entries = [value_entry(0.2, "mfm", *numbers) for numbers in ((4, 16, 0.6), (1, 16, gain / 4), (1, 2, 0.1))]
        entries += [value_entry(0.2, "glass", 8, 16, None), value_entry(0.5, "mfm", 2, 16, 0.9)]
        write(tmp_path / "values" / run / "values-brightness.json", {"results": entries})
        lines = [tuned_line(0, 0.5, 4.0), tuned_line(500, gain, 3.0)]
        folder = tmp_path / "tuned" / run
        write(folder / "settings.json", {"reward": "hpsv2=/data/HPS.pt"})
        (folder / "rewards.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def tuned_line(step, reward, spread):
    held_out = {"pickscore=/models/pick": [0.2, 0.01]}
    return {"step": step, "reward": [reward, 0.1], "held_out": held_out, "diversity": spread, "diversity_of_base": 4.0}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def figures(monkeypatch):
    """The figures that are written, by their names."""
    found, save = {}, steer_report.save_figure
    monkeypatch.setattr(
        steer_report, "save_figure", lambda fig, path: found.update({path.name: fig}) or save(fig, path)
    )
    return found


def curves(ax):
    """Points of the curves of a panel, by labels."""
    return {bar.get_label(): [tuple(point) for point in bar.lines[0].get_xydata()] for bar in ax.containers}


def both(results, kind, tail=""):
    return ",".join(str(results / kind / run) + tail for run in ("small", "large"))


def test_everything_at_once(results, figures, capsys):
    """Tables, pictures and numbers, each with its run; three sections."""
    arguments = ["--values", both(results, "values", "/values-brightness.json"), "--steer", both(results, "steered")]
    script.main([*arguments, "--finetune", both(results, "tuned"), "--out", str(results / "out")])
    text, found = (
        (results / "out" / "compare.md").read_text(),
        json.loads((results / "out" / "compare.json").read_text()),
    )
    assert text.strip() == capsys.readouterr().out.strip()
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "## Values",
        "## Steering",
        "## Fine-tuning",
    ]
    assert {name: len(rows) for name, rows in found.items()} == {"values": 10, "steering": 6, "finetuning": 4}
    assert {row["run"] for rows in found.values() for row in rows} == {"small", "large"}
    assert set(figures) == {"values.png", "steering.png", "finetuning.png"}
    for name in figures:
        assert (results / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_values_have_a_column_and_a_panel_for_each_time(results, figures):
    script.main(["--values", both(results, "values", "/values-brightness.json"), "--out", str(results / "out")])
    lines = (results / "out" / "compare.md").read_text().splitlines()
    assert lines[2] == "| run | Pearson r of V̂ | evaluations | draws | t = 0.2 | t = 0.5 |"
    assert "| large | Meta Flow Map | 1 | 16 | 0.5 ± 0.01 |  |" in lines
    assert "| small | GLASS rollout | 8 | 16 | undefined |  |" in lines
    early, late = figures["values.png"].axes
    assert curves(early)["Meta Flow Map, 16 draws, large"] == [(16, 0.5), (64, 0.6)]
    assert curves(early)["Meta Flow Map, 2 draws, small"] == [(2, 0.1)]
    assert curves(late)["Meta Flow Map, 16 draws, small"] == [(32, 0.9)]
    assert not any("GLASS" in label for label in curves(early))
    assert early.get_xscale() == "log"


def test_steering_has_a_curve_for_each_method_and_run(results, figures):
    """In the order of evaluations; the base is a line across; names that are given; a reward that one run lacks."""
    more = results / "steered" / "more" / "steer.json"
    write(more, {"rows": [steer_row("mfm-g", 8, 3.0, 330, held_out=0.7), steer_row("base", 1, 0.5, 10, held_out=0.1)]})
    script.main(["--steer", f"a={results}/steered/small,b={more}", "--out", str(results / "out")])
    lines = (results / "out" / "compare.md").read_text().splitlines()
    assert lines[2].startswith("| run | method | N | brightness | redness | diversity | evaluations |")
    assert "| a | MFM-G | 4 | 1 ± 0.1 |  | 2.5 | 170 | 170 | 3 | 0.5 | 2.00 |" in lines
    assert "| b | MFM-G | 8 | 3 ± 0.1 | 0.7 | 2.5 | 330 | 330 | 3 | 0.5 | 2.00 |" in lines
    first, second = figures["steering.png"].axes
    assert curves(first) == {"MFM-G, a": [(50, 0.6), (170, 1.0)], "MFM-G, b": [(330, 3.0)]}
    assert curves(second) == {"MFM-G, b": [(330, 0.7)]}
    assert {line.get_label() for line in first.lines} >= {"base, a", "base, b"}
    assert len(figures["steering.png"].legends) == 1


def test_finetuning_has_rewards_and_diversity_against_updates(results, figures):
    """Rewards by their names without folders, the one that was trained for first."""
    script.main(["--finetune", both(results, "tuned"), "--out", str(results / "out")])
    lines = (results / "out" / "compare.md").read_text().splitlines()
    assert lines[2] == "| run | updates | diversity | hpsv2=HPS.pt | pickscore=pick |"
    assert "| large | 500 | 3 | 2 ± 0.1 | 0.2 ± 0.01 |" in lines
    reward, held_out, spread = figures["finetuning.png"].axes
    assert curves(reward)["large"] == [(0, 0.5), (500, 2.0)]
    assert curves(held_out)["small"] == [(0, 0.2), (500, 0.2)]
    assert curves(spread)["small"] == [(0, 4.0), (500, 3.0)]
    bases = {line.get_label(): line for line in spread.lines if "base" in line.get_label()}
    assert {name: set(line.get_ydata()) for name, line in bases.items()} == {"small, base": {4.0}, "large, base": {4.0}}
    assert reward.get_ylabel() == "hpsv2=HPS.pt" and not spread.yaxis.get_major_formatter().get_useOffset()


def test_rewards_of_one_name_stay_apart(results):
    """A held-out reward whose file is called as the one that was trained for; and one that is it keeps its place."""
    folder = results / "tuned" / "small"
    write(folder / "settings.json", {"reward": "probe=/a/p"})
    line = tuned_line(0, 0.5, 4.0) | {"held_out": {"probe=/b/p": [7.0, 0.1], "probe=/a/p": [9.0, 0.1]}}
    (folder / "rewards.jsonl").write_text(json.dumps(line))
    (row,) = script.read_finetune(folder)
    assert row["rewards"] == {"probe=/a/p": [0.5, 0.1], "probe=/b/p": [7.0, 0.1]}
    assert script.short_names(["0.5*probe=/a/p,hpsv2=x", "probe=/b/q/p"]) == ["0.5*probe=p,hpsv2=x", "probe=p"]


def test_a_path_may_have_an_equals_sign(results):
    folder = results / "scale=5" / "steer.json"
    write(folder, {"rows": [steer_row("base", 1, 0.5, 10)]})
    assert script.runs_of(f"{folder.parent},b={folder.parent}", "steer") == {
        "scale=5": folder.parent,
        "b": folder.parent,
    }


def test_ticks_are_some_of_the_values_and_apart():
    assert steer_report.apart([170, 50, 50, 51, 400]) == [50, 170, 400]
    assert steer_report.apart([2, 4, 8, 16, 32, 64]) == [2, 4, 8, 16, 32, 64]
    assert steer_report.apart([7]) == [7] and steer_report.apart([]) == []


@pytest.mark.parametrize("panels", [1, 3])
def test_titles_legends_and_panels_do_not_overlap(results, figures, panels, monkeypatch):
    """With a long title, and the longest names; the marks of an axis do not either."""
    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", PLACE)
    draws = [1, 2, 4, 8, 16, 32]
    rows = [
        steer_row(method, n, n, 50 + 50 * n * (1 + k))
        | {"rewards": {f"probe=reward-{panel}.safetensors": [n, 0.1] for panel in range(panels)}}
        for k, method in enumerate(steer_report.NAMES)
        for n in draws
    ]
    title = "128 samples, steered by 20 · pickscore=PickScore_v1,-0.1*compressed-size"
    steer_report.draw_curves(rows, title, results / "steer.png")
    figure = figures["steer.png"]
    boxes = [figure._suptitle.get_window_extent(), figure.legends[0].get_window_extent()]
    boxes += [ax.get_tightbbox() for ax in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 for box in boxes)
    for ax in figure.axes:
        marks = [mark.get_window_extent() for mark in ax.get_xticklabels()]
        assert len(marks) > 2 and not any(a.overlaps(b) for i, a in enumerate(marks) for b in marks[:i])


def test_panels_of_pictures_are_apart_and_have_their_headings(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: drawn.append(figure))
    panels = {
        "base\nmean reward 1": np.zeros((2, 2, 60, 60, 3), np.uint8),
        "N = 4": np.ones((2, 1, 60, 60, 3), np.uint8),
    }
    pictures.draw_lines([panels], ["", ""], "MFM-G", tmp_path / "any.png")
    (ax,) = drawn[0].axes
    (page,) = (image.get_array() for image in ax.images)
    assert page.shape == (2 * 62, 3 * 62 + 10, 3)
    assert (page[:, 122:134] == 255).all() and (page[:60, 62:122] == 0).all() and (page[:60, 134:194] == 1).all()
    assert [mark.get_text() for mark in ax.get_xticklabels()] == list(panels)
    assert list(ax.get_xticks()) == [62, 134 + 31]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ((), "compare needs --values, --steer or --finetune"),
        (("--steer", "{}/nowhere"), "--steer must be files or folders that are there, got .*nowhere"),
        (
            ("--steer", "{0}/steered/small,{0}/steered/small"),
            "--steer must have a name for each run, .*small is there twice",
        ),
        (("--steer", "{}/steered"), "steer.json"),
        (("--steer", "{}/values/small/values-brightness.json"), "must have rows with method, n, rewards"),
        (
            ("--steer", "{}/tuned/small"),
            "--steer must be steer.json of imagenet.steer, and .*small/steer.json is no file",
        ),
        (
            ("--values", "{}/steered/small"),
            "--values must be values-REWARD.json of imagenet.evaluate values, and .*small",
        ),
        (("--values", "{}/steered/small/steer.json"), "must have rows with t, method, evaluations, draws"),
        (("--steer", "{}/strange.json"), "strange.json must have methods of this version, got 'tds'"),
        (
            ("--finetune", "{}/steered/small"),
            "--finetune must be a folder of imagenet.finetune, and .*settings.json is no",
        ),
        (("--finetune", "{}/half"), "rewards.jsonl must be lines of JSON"),
        (("--finetune", "{}/other"), "rewards.jsonl must have rows with step, reward, held_out, diversity"),
    ],
)
def test_what_cannot_be_compared_is_refused(results, options, match):
    write(results / "strange.json", {"rows": [steer_row("tds", 1, 1.0, 1)]})
    for name, line in (("half", '{"step": 0, "rew'), ("other", '{"step": 0}')):
        write(results / name / "settings.json", {"reward": "brightness"})
        (results / name / "rewards.jsonl").write_text(line)
    with pytest.raises(SystemExit, match=f"imagenet.compare: .*{match}"):
        script.main([*(option.format(results) for option in options), "--out", str(results / "out")])
    assert not (results / "out").exists()
