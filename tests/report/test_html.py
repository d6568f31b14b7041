"""The page: complete, small, alone, and text stays text."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from attnscope.config import parse_table
from attnscope.report import write_report
from attnscope.report.contents import contents_of
from attnscope.report.curves import NUMBERS, PER_HEAD, PER_STEP, curves_of
from attnscope.runs.layout import COLUMNS
from attnscope.runs.reader import open_run
from tests.runs.made_up import columns, new_run

SCRIPT = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


class Page(HTMLParser):
    """Every element with its attributes, and what stands in scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self._inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")
            self._inside = True

    def handle_endtag(self, tag):
        self._inside = self._inside and tag != "script"

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data

    def attributes(self, tag):
        return [found for name, found in self.elements if name == tag]


def big(path, n_members, n_steps, **shape):
    """A run of many members."""
    arms = [{"name": f"member {m}", "train": {"seed": m}} for m in range(n_members)]
    part = new_run(path, config=parse_table({"arm": arms})).part(0)
    for table in COLUMNS:
        part.append(table, columns(table, np.arange(n_steps), members=range(n_members), **shape))
    part.finish("finished")
    return open_run(path)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    run = big(tmp_path_factory.mktemp("runs") / "r", 2, 30)
    place = run.path / "run.json"
    raw = json.loads(place.read_text())
    raw["members"][0]["name"] = SCRIPT
    place.write_text(json.dumps(raw))
    return open_run(run.path)


def test_the_page_brings_everything_along(hostile):
    text = write_report(hostile).read_text()
    page = Page(text)
    names = {tag for tag, _ in page.elements}
    assert not names & {"link", "iframe", "object", "embed", "base", "form", "audio", "video"}
    for _, attributes in page.elements:
        for key, value in attributes.items():
            assert not key.startswith("on"), key
            if key in ("src", "href", "action", "data", "poster", "srcset"):
                assert value.startswith(("data:image/", "#")), value
    assert "@import" not in text and "url(" not in text
    (policy,) = [a["content"] for a in page.attributes("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; img-src data:;") and "sha256-" in policy


def test_hostile_names_are_text(hostile):
    page = Page(write_report(hostile).read_text())
    data, script = page.scripts
    assert script.lstrip().startswith('"use strict"')
    assert json.loads(data)["members"][0]["name"] == SCRIPT
    assert len(page.attributes("img")) == len(page.attributes("figure"))


def test_the_policy_lets_in_this_script_and_no_other(hostile):
    text = write_report(hostile).read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text.replace("&#39;", "'")


def test_every_figure_has_words_and_every_table_a_head(hostile):
    page = Page(write_report(hostile).read_text())
    assert len(page.attributes("img")) >= 6
    assert all(len(image["alt"]) > 20 for image in page.attributes("img"))
    assert len(page.attributes("table")) == len(page.attributes("thead")) > 5


def test_64_members_stay_below_3_megabytes(tmp_path):
    place = write_report(big(tmp_path / "r", 64, 200, n_layers=4, n_heads=4))
    assert place.stat().st_size < 3_000_000


@pytest.mark.slow
def test_500_members_fit_and_what_is_left_out_is_said(tmp_path):
    run = big(tmp_path / "r", 500, 40)
    place = write_report(run)
    text = place.read_text()
    assert place.stat().st_size < 8_000_000
    assert text.count("<td>member 499</td>") >= 1
    assert "64 of 500 members, at equal distances." in text
    assert "The first 300 of 500 members are shown." in text
    markdown = (place.parent / "report.md").read_text()
    assert "450 more rows are in report.html." in markdown and len(markdown) < 200_000


def test_curves_keep_to_their_budget_and_say_what_is_not_finite(tmp_path):
    run = big(tmp_path / "r", 3, 3000, n_layers=8, n_heads=8)
    data = json.loads(curves_of(run, contents_of(run)).json)
    sizes = [
        len(curve) if name in PER_STEP else sum(map(len, curve))
        for name, members in zip((*PER_STEP, *PER_HEAD), data["curves"], strict=True)
        for curve in members
    ]
    assert sum(sizes) <= NUMBERS and min(sizes) > 0
    assert data["heads"][:9] == [*(f"0.{h}" for h in range(8)), "1.0"]
    loss = run.steps[run.steps["member"] == "member 1"]["loss"].to_numpy()
    points = len(data["steps"][1])
    edges = np.arange(3000) * points // 3000
    assert data["curves"][0][1][5] == pytest.approx(loss[edges == 5].mean(), rel=1e-3)


def test_a_member_of_nothing_but_nan_has_gaps(tmp_path):
    part = new_run(tmp_path / "r").part(0)
    broken = columns("steps", np.arange(4), members=(0, 1))
    broken["loss"] = np.where(broken["member"] == 0, np.nan, broken["loss"])
    part.append("steps", broken)
    part.finish("finished")
    run = open_run(tmp_path / "r")
    data = json.loads(curves_of(run, contents_of(run)).json)
    assert data["curves"][0][0] == [None] * 4 and None not in data["curves"][0][1]
