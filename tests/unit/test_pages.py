"""The report's pages and pictures, from the files a run leaves behind."""

import json
import re
import xml.dom.minidom
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest

from prunadapt_ds import figures, pages
from tests.unit.test_report import filled

pytestmark = pytest.mark.fast
PLAN = {
    "units": [
        {"layer": 0, "kind": "heads", "dense": 4, "kept": [0, 2]},
        {"layer": 0, "kind": "neurons", "dense": 48, "kept": list(range(24))},
        {"layer": 1, "kind": "heads", "dense": 4, "kept": []},
        {"layer": 1, "kind": "neurons", "dense": 48, "kept": list(range(48))},
    ]
}


def answer(index, label, logits):
    values = {"prediction": int(np.argmax(logits)), "logits": logits}
    return {"split": "validation", "index": index, "label": label, "masked": values, "exported": values}


ANSWERS = [answer(0, 0, [1.0, 2.0]), answer(1, 1, [0.0, 3.0]), answer(2, 1, [5.0, -2.0]), answer(3, 0, [1.0, 0.0])]


def run_folder(folder):
    (folder / "plan.json").write_text(json.dumps(PLAN))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(a) + "\n" for a in ANSWERS))
    lines = [{"step": 4, "phase": "dense", "eval/score": 0.7}, {"step": 8, "phase": "finish", "eval/score": 0.75}]
    half = '{"step": 9, "pha'  # of a disk that was full for a while
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + half)
    result = filled() | {"labels": ["no", "yes & <no>"], "command": "python launcher/train.py --seed 1"}
    result["progress"] = [
        {"step": 4 * (i + 1), "phase": phase, "loss": 1.0 / (i + 1), "sparsity": 0.2 * i, "samples_per_s": 9.0}
        | {"live_tensor_bytes": 2**20, "train_s": 1.0}
        for i, phase in enumerate(("dense", "prune", "recover"))
    ]
    result["time"] |= {"train_s": 9.0, "dense_phase_s": 4.0, "checkpoint_s": 1.5, "steps": 12}
    result["memory"]["live_parts_bytes"]["dense"] |= {"parameters": 2**20, "optimizer": 2**19, "activations": 2**19}
    result["memory"]["live_tensor_bytes"] |= {"dense": 2**21, "after_shrink": 2**20}
    return result


class Page(HTMLParser):
    """What a browser would fetch or show."""

    def __init__(self, text):
        super().__init__()
        self.images, self.links, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        if tag == "img":
            self.images.append(values)
        self.links += [v for k, v in attributes if k in ("href", "src") and not v.startswith("data:")]


def test_the_page_stands_alone_and_every_picture_is_said_in_words(tmp_path):
    pages.write(tmp_path, run_folder(tmp_path), lambda name, index: f"text {index} <b> | x")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not page.links and "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert len(page.images) == 5
    for image in page.images:
        assert len(image["alt"]) > 10
        xml.dom.minidom.parseString(b64decode(image["src"].split("base64,")[1]))
    alts = " ".join(image["alt"] for image in page.images)
    for words in (
        "0: 2 of 4",
        "prune from step 4 to 8",
        "2 of 4 examples are right",
        "dense phase 4.0 s",
        "checkpoint 1.5 s",
    ):
        assert words in alts, words
    assert "parameters, dense 1.0 MiB, optimizer, dense 0.5 MiB" in alts and "activations, pruned" not in alts
    assert "text 2 &lt;b&gt;" in text and "<b> |" not in text and "python launcher/train.py --seed 1" in text
    assert "text 2 <b> \\| x" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["labels"] == ["no", "yes & <no>"]


def test_worst_examples_are_the_surest_mistakes():
    rows = pages.worst(ANSWERS, ["no", "yes"], None)
    assert [row[0] for row in rows] == ["validation 2", "validation 0"]
    assert rows[0][1:] == ("yes", "no", "99.9% sure")


def test_numbers_are_scattered_and_ranked_by_error():
    lines = [answer(i, 2.0, [0.0]) for i in range(3)]
    for line, value in zip(lines, (2.5, 0.0, 2.0), strict=True):
        line["exported"] = {"prediction": value, "logits": [value]}
    assert [row[0] for row in pages.worst(lines, [], None)] == ["validation 1", "validation 0"]
    picture = pages._outcome(lines, [])
    assert "off by 0.833" in picture.alt


def test_a_run_that_ended_early_has_pages(tmp_path):
    from prunadapt_ds import report

    pages.write(tmp_path, report.empty())
    assert not Page((tmp_path / "report.html").read_text()).images
    assert (tmp_path / "report.md").is_file() and (tmp_path / "report.json").is_file()


def test_kept_units_become_tables():
    tables = figures.kept_tables(PLAN)
    assert tables["heads"].tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]
    assert tables["neurons"].shape == (2, figures.BLOCKS)
    assert tables["neurons"].sum(1).tolist() == [12, 24]


def test_a_reader_who_hears_the_page_knows_what_belongs_to_what(tmp_path):
    """Headings of columns and rows, and a name for everything that takes the focus."""
    pages.write(tmp_path, run_folder(tmp_path))
    tags = Page((tmp_path / "report.html").read_text()).tags
    heads = [values for tag, values in tags if tag == "th"]
    assert {values["scope"] for values in heads} == {"col", "row"}
    rows = sum(tag == "tr" for tag, _ in tags)
    tables = sum(tag == "table" for tag, _ in tags)
    assert sum(values["scope"] == "row" for values in heads) == rows - tables
    focusable = [values for _, values in tags if "tabindex" in values]
    assert len(focusable) == tables + 1 and all(v["role"] == "region" and v["aria-label"] for v in focusable)


def test_many_classes_are_put_into_few_words():
    names = [f"class {i} {'x' * 100}" for i in range(30)]
    labels = [i for i in range(30) for _ in range(30)]
    picture = figures.confusion(labels, list(range(30)) * 30, names)
    assert picture.alt.startswith("30 of 900 examples are right. 1 labelled class 0 ")
    assert picture.alt.endswith("; 860 in 860 other pairs.") and len(picture.alt) < 1500


@pytest.mark.filterwarnings("error")
def test_classes_in_characters_that_the_font_lacks(capfd):
    """Nothing about glyphs on the console; the alternative text has them."""
    picture = figures.drawn(figures.confusion, [0, 1, 1], [0, 1, 0], ["\U0001f600", "\u65e5\u672c"])
    assert "1 labelled \u65e5\u672c but predicted \U0001f600" in picture.alt and picture.svg.startswith("<svg")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("names", [["$5 (50% off $)", "$a_b_c$"], ["$1 #2 $", "b"], ["$50k-$100k", "rest"]])
def test_names_of_classes_are_no_formulas(names):
    """They are drawn, and what they hold is theirs: dollars as well."""
    picture = figures.drawn(figures.confusion, [0, 1, 1], [0, 1, 0], names)
    assert f"<!-- {names[0].split()[0]}" in picture.svg, "where it is drawn, matplotlib says what it has drawn"


def test_many_classes_make_no_endless_picture(recwarn):
    labels = list(range(150)) * 2
    picture = figures.drawn(figures.confusion, labels, labels, [f"class_{i}" for i in range(150)])
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', picture.svg).groups())
    assert height < 3 * width and "class_7" not in picture.svg and "300 of 300" in picture.alt
    names = ["a very long name of a class " * 3 + word for word in ("one", "two", "three")]
    picture = figures.drawn(figures.confusion, [0, 1, 2], [0, 1, 1], names)
    assert "three" not in picture.svg and not [w for w in recwarn if "constrained_layout" in str(w.message)]
