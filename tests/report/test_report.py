"""Reports of whole run directories: real ones, broken ones, foreign ones."""

import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

import attnscope
from attnscope.diagnose import diagnose
from attnscope.errors import RunError, RunWriteError
from attnscope.report import write_report
from attnscope.report.contents import MOST_EVENTS, contents_of
from attnscope.report.figures import draw_figures
from attnscope.report.figures.attention import MOST_MAPS
from attnscope.report.markdown import escaped
from attnscope.runs.events import Event, Place, SkippedUpdate
from attnscope.runs.reader import open_run
from tests.runs.made_up import columns, event, fill, new_run

TINY = {
    "model": {"d_model": 16, "n_layers": 2, "seq_len": 8},
    "data": {"source": "markov", "batch_size": 2},
    "train": {"steps": 3},
}
DRAWN = {
    "loss", "attention", "max_logit", "logit_std", "gradients", "group_gradients", "update_ratio", "activations",
}  # fmt: skip
HOSTILE = "<img src=x onerror=alert(1)>|`$x_$ [a](http://b) www.c.d \x1b[31m\u202e"


@pytest.fixture(scope="module")
def exploded(tmp_path_factory):
    """A member that becomes NaN beside one that does not: the real loop, the real writer."""
    config = TINY | {
        "model": TINY["model"] | {"d_model": 64},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 40, "sample_tokens": 5, "eval_lengths": [1]},
        "data": {"source": "stdlib", "batch_size": 4},
        "arm": [
            {"name": "hot", "attention": {"scale": "none"}, "init": {"gain": 3.0}},
            {"name": "cold"},
        ],
    }
    return attnscope.train_model(config, path=tmp_path_factory.mktemp("runs") / "exploded")


def made(path, steps=range(5), **changes):
    writer = new_run(path, **changes)
    part = writer.part(0)
    fill(part, np.arange(len(steps)) if steps is None else np.asarray(list(steps)))
    part.finish("finished")
    return writer


def markdown(run):
    return (write_report(run).parent / "report.md").read_text()


def test_members_of_an_exploded_run(exploded):
    hot, cold = contents_of(exploded).members
    assert (hot.status, hot.nonfinite_at) == ("diverged", exploded.members[0].nonfinite_at)
    assert hot.step == exploded.members[0].diverged_at
    assert cold.val_loss == pytest.approx(next(f["val_loss"] for f in exploded.events["fields"] if "seq_len" in f))
    heads = exploded.heads[exploded.heads["member"] == "cold"]
    for at, found in ((0, cold.start), (39, cold.end)):
        table = heads[heads["step"] == at]
        assert found.step == at
        assert found.max_prob == pytest.approx(table["max_prob"].mean())
        assert found.entropy == pytest.approx(table["entropy"].mean())
        assert found.max_logit == pytest.approx(table["max_logit"].max())
    broken = exploded.heads[exploded.heads["member"] == "hot"]
    finite = broken.groupby("step")["max_prob"].apply(lambda values: values.notna().all())
    assert not finite.all(), "it was meant to become NaN"
    assert hot.end.step == finite[finite].index.max()


def test_the_report_has_what_a_reader_looks_for(exploded):
    place = write_report(exploded)
    assert place == exploded.path / "report" / "report.html"
    text = (place.parent / "report.md").read_text()
    titles = [
        "What was seen", "Findings", "What differs", "Members", "Layers and heads", "Gradients and clipping", "Events",
        "Held-out loss at the end", "What they write", "How it was made", "Definitions",
    ]  # fmt: skip
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == titles
    assert "### What cold writes" in text
    assert "| hot | none | 3 |" in text
    assert "loss not finite" in text and "unigram loss | " in text
    assert r"| entropy\_ratio | mean of entropy / ln n" in text
    assert "### Cause (error): Attention logits are not scaled" in text
    for name in re.findall(r"\]\((.*?\.png)\)", text):
        picture = imread(place.parent / name)
        assert picture.shape[1] > 800 and picture.std() > 0.05, f"{name} is empty"
    drawn = {path.name for path in (place.parent / "figures").iterdir()}
    assert drawn == {f"{name}.{suffix}" for name in DRAWN for suffix in ("png", "svg")}


def test_findings_json_is_what_diagnose_says(exploded):
    found = json.loads((write_report(exploded).parent / "findings.json").read_text())
    assert [each["rule"] for each in found["findings"]] == [each.rule for each in diagnose(exploded)]
    assert "applied_scale" in {each["rule"] for each in found["findings"]}


def test_the_same_run_gives_the_same_bytes(exploded):
    def everything():
        folder = write_report(exploded).parent
        return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    first = everything()
    assert first == everything()
    assert len(first) == 3 + 2 * len(DRAWN)


def test_tables_of_a_report_are_tables(exploded):
    text = markdown(exploded)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


@pytest.mark.parametrize("recorded", [(), ("steps",), ("heads",), ("layers",), ("params",)])
def test_a_run_that_was_killed_early_is_reported(tmp_path, recorded):
    part = new_run(tmp_path / "r").part(0)
    for table in recorded:
        part.append(table, columns(table, [0], members=(0, 1)))
    part.finish("finished")
    (tmp_path / "r" / "part-0000" / "end.json").unlink()
    for path in (tmp_path / "r" / "part-0000").iterdir():
        os.utime(path, (1, 1))  # long ago: not running any more
    text = markdown(open_run(tmp_path / "r"))
    assert "nan" not in text.split("## Definitions")[0]
    assert ("recorded nothing (killed)" in text) is ("steps" not in recorded)
    assert ("was killed after step 0" in text) is ("steps" in recorded)


def test_a_run_of_nothing_but_nan_is_reported(tmp_path):
    part = new_run(tmp_path / "r").part(0)
    for table in ("steps", "heads", "layers", "params"):
        part.append(
            table,
            {
                name: np.full(len(values), np.nan) if values.dtype == float and name not in KEYS else values
                for name, values in columns(table, [0, 1], members=(0, 1)).items()
            },
        )
    part.finish("finished")
    run = open_run(tmp_path / "r")
    assert [m.status for m in contents_of(run).members] == ["diverged", "diverged"]
    assert "became non-finite at step 0" in markdown(run)


KEYS = ("step", "member", "layer", "head", "rows", "rows_left_out", "tokens", "nonfinite")


def test_names_and_values_of_strangers_stay_text(tmp_path):
    made(tmp_path / "r")
    place = tmp_path / "r" / "run.json"
    raw = json.loads(place.read_text())
    raw["members"][0]["name"] = HOSTILE
    raw["members"][1]["settings"] = {HOSTILE: HOSTILE, "attention.scale": ["<b>"] * 100}
    raw["command"] = [HOSTILE]
    raw["environment"] = {HOSTILE: HOSTILE, "deep": {"a": [HOSTILE]}}
    raw["data"] = {
        "fingerprint": {HOSTILE: HOSTILE},
        "reference": {"unigram": "NaN", "bigram": HOSTILE},
    }
    raw["config"] = {HOSTILE: 1}
    place.write_text(json.dumps(raw))
    strange = {"kind": HOSTILE, "step": 1, "member": 0, "fields": {HOSTILE: HOSTILE}}
    generation = {
        "prompt": HOSTILE,
        "text": f"{HOSTILE}\n# title\n```\n" * 500,
        "loss_from_prefixes": HOSTILE,
    }
    odd = {
        "kind": "evaluation",
        "step": 1,
        "member": 0,
        "fields": {"seq_len": 10**400, "val_loss": "x"},
    }
    with (tmp_path / "r" / "part-0000" / "events-0000.jsonl").open("a") as file:
        for each in (
            strange,
            odd,
            {"kind": "generation", "step": 1, "member": 0, "fields": generation},
        ):
            file.write(json.dumps(each) + "\n")
    run = open_run(tmp_path / "r")
    text = markdown(run)
    assert text.isprintable() or all(letter == "\n" or letter.isprintable() for letter in text)
    outside = [line for line in text.splitlines() if not line.startswith("    ")]
    assert not [line for line in outside if re.search(r"(?<!\\)<", line)], "HTML"
    assert not [line for line in outside if re.search(r"(?<!\\)\]\((?!figures/)", line)], "a link"
    assert not re.search(r"(?<!\\)`\$", "\n".join(outside))
    assert len(text) < 80_000


def test_escaped_text_keeps_its_letters():
    text = "a_b*c [x](y) <i> `z` | # ~ & @ http://u www.v"
    assert re.sub(r"\\(.)", r"\1", escaped(text)) == text
    assert "http://" not in escaped(text) and "www." not in escaped(text)


def test_events_are_limited_and_counted(tmp_path):
    writer = new_run(tmp_path / "r")
    part = writer.part(0)
    fill(part, np.arange(2))
    for step in range(MOST_EVENTS + 7):
        part.event(event("strange", step=step, what=step))
    part.finish("finished")
    found = contents_of(open_run(tmp_path / "r"))
    assert (len(found.events), found.events_left_out) == (MOST_EVENTS, 7)
    assert found.events[3].what == "what: 3" and found.events[3].member == ""
    assert "7 more events" in markdown(open_run(tmp_path / "r"))


def test_an_event_with_places_tells_them_once(tmp_path):
    part = new_run(tmp_path / "r").part(0)
    fill(part, np.arange(2))
    where = (Place(layer=0, group="qkv", path="h.0.qkv.weight"), Place(path="head"))
    part.event(Event(step=1, member=0, what=SkippedUpdate(why="it overflowed", where=where)))
    part.finish("finished")
    (told,) = contents_of(open_run(tmp_path / "r")).events
    assert told.what == "why: it overflowed; where: layer 0 qkv, head"


def test_many_members_are_reported_and_figures_say_which(tmp_path):
    arms = [{"name": f"s{i}", "train": {"seed": i}} for i in range(20)]
    run = attnscope.train_model(TINY | {"arm": arms}, path=tmp_path / "r")
    text = markdown(run)
    assert text.count("| s1") >= 11
    assert f"{MOST_MAPS} of 20 members are shown: the first of each outcome." in text


def test_a_figure_of_an_earlier_report_does_not_stay(tmp_path):
    made(tmp_path / "r")
    old = tmp_path / "r" / "report" / "figures" / "old.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    write_report(open_run(tmp_path / "r"))
    assert not old.exists()


def test_a_report_never_leads_out_of_the_run(tmp_path):
    made(tmp_path / "r")
    (tmp_path / "outside").mkdir()
    (tmp_path / "r" / "report").symlink_to(tmp_path / "outside")
    with pytest.raises(RunError, match="is a link or a file"):
        write_report(open_run(tmp_path / "r"))
    assert not list((tmp_path / "outside").iterdir())


def test_a_full_disk_leaves_the_old_report(tmp_path, monkeypatch):
    made(tmp_path / "r")
    run = open_run(tmp_path / "r")
    place = write_report(run)
    before = place.read_bytes()

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("attnscope.report.replace_file", full)
    with pytest.raises(RunWriteError, match=r"no space left on device\. Free space and write the report again"):
        write_report(run)
    assert place.read_bytes() == before


def test_a_long_run_is_drawn_from_few_points(tmp_path):
    made(tmp_path / "r", steps=range(20_000))
    run = open_run(tmp_path / "r")
    for figure in draw_figures(run, contents_of(run)):
        assert imread(io.BytesIO(figure.png)).size > 0
        assert len(figure.png) < 300_000


def test_a_report_needs_no_torch(exploded):
    code = (
        "import sys, attnscope.report, attnscope.runs.reader as r\n"
        f"attnscope.report.write_report(r.open_run({str(exploded.path)!r}))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
