"""Names of ImageNet's classes, prompts made of them, and prompts dealt to rows."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import imagenet.prompts
from imagenet.prompts import TEMPLATE, class_names, names_for, prompts_for, rows_of


def test_there_is_a_name_for_each_class_in_the_order_of_labels():
    """Classes that everyone knows by number, at both ends and in between."""
    names = class_names()
    assert len(names) == 1000 and all(name == name.strip() and name.isascii() and name for name in names)
    known = {0: "tench", 207: "golden retriever", 281: "tabby cat", 388: "giant panda", 817: "sports car"}
    known |= {950: "orange", 985: "daisy", 999: "toilet paper"}
    assert {k: names[k].lower() for k in known} == known


def test_names_that_stand_twice_are_those_that_the_licence_file_tells():
    """As in the source: two classes each, which ImageNet itself tells apart by a hair."""
    names = class_names()
    twice = {name: [k for k, other in enumerate(names) if other == name] for name, n in Counter(names).items() if n > 1}
    assert twice == {"missile": [657, 744], "sunglasses": [836, 837]}
    licence = Path(imagenet.prompts.__file__).with_name("class_names.LICENSE").read_text()
    assert "open_clip_torch" in licence and "Permission is hereby granted" in licence
    assert all(f'"{name}" ({a}, {b})' in " ".join(licence.split()) for name, (a, b) in twice.items())


def test_the_list_that_is_given_is_a_copy():
    class_names().clear()
    assert len(class_names()) == 1000


def test_prompts_are_the_template_with_the_name():
    expected = ["A high-quality, high-resolution photograph of a tabby cat."]
    assert prompts_for(TEMPLATE, [281], names_for(1000)) == expected
    assert prompts_for("{class}, {class}!", torch.tensor([1, 0]), ["a", "b"]) == ["b, b!", "a, a!"]
    assert prompts_for("a {photo} of nothing", [5, 6]) == ["a {photo} of nothing"] * 2
    assert prompts_for(TEMPLATE, [], ["a"]) == []


def test_names_are_imagenets_or_those_of_a_file(tmp_path):
    """ImageNet's for 1000 classes alone; those of a file go before."""
    file = tmp_path / "names.txt"
    assert names_for(1000) == class_names() and names_for(2) is None and names_for(999) is None
    file.write_text("daisy\n rote Rübe \n", encoding="utf-8")
    assert names_for(2, str(file)) == ["daisy", "rote Rübe"]
    file.write_text("\n".join(map(str, range(1000))))
    assert names_for(1000, str(file)) == [str(k) for k in range(1000)]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"a\nb\nc\n", "one name a line for each of 2 classes, got 3 names in 3 lines of "),
        (b"a\n\n", "one name a line for each of 2 classes, got 1 names in 2 lines of "),
        (b"\xff\n", "--names must be a text file that can be read, got "),
        (None, "--names must be a text file that can be read, got "),
    ],
)
def test_names_that_do_not_fit_are_refused(content, match, tmp_path):
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        names_for(2, str(tmp_path / "names.txt"))


def test_a_prompt_with_a_class_needs_names():
    """Those of a user's classes are not ImageNet's."""
    with pytest.raises(ValueError, match=r"with \{class\} needs the names of the classes.* give --names FILE"):
        prompts_for(TEMPLATE, [0], names_for(2))


@pytest.mark.parametrize("label", [1000, -1])
def test_a_label_without_a_name_is_refused(label):
    with pytest.raises(ValueError, match=f"labels must be from 0 to 999 to have a name, got {label}"):
        prompts_for(TEMPLATE, torch.tensor([3, label]), class_names())


@given(st.lists(st.text(max_size=3), min_size=1, max_size=5), st.integers(1, 4))
def test_rows_have_prompts_in_turn(prompts, times):
    """Draws `(n, B, *D)`, flattened: the prompt of sample b, for each draw."""
    n = len(prompts) * times
    assert rows_of(prompts, n) == [prompts[i % len(prompts)] for i in range(n)]
    assert rows_of(tuple(prompts), n) == rows_of(prompts, n)
    assert rows_of("one for all", n) == ["one for all"] * n and rows_of(None, n) is None


@pytest.mark.parametrize(("prompts", "n"), [(["a", "b"], 3), (["a", "b"], 1), ([], 2)])
def test_a_number_of_prompts_that_does_not_divide_that_of_rows_is_refused(prompts, n):
    with pytest.raises(ValueError, match=rf"must divide that of images, {n}, got {len(prompts)}"):
        rows_of(prompts, n)
