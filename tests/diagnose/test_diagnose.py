"""All rules at once: healthy runs, order, many members, strangers' runs."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

import attnscope
from attnscope.diagnose import diagnose
from attnscope.findings import MOST_EVIDENCE, to_table
from attnscope.runs.layout import to_json
from attnscope.runs.reader import open_run
from tests.diagnose.synthetic import heads_table, run_of, steps_table
from tests.runs.made_up import columns, new_run

# What the losses and tables of many broken members show, whatever else is looked for.
HOSTILE = "<img src=x onerror=alert(1)>|`$x_$ [red]a[/red] \x1b[31m\u202e\n"


def rules_of(run):
    return [finding.rule for finding in diagnose(run)]


def test_the_article_s_pair_is_told_from_the_cause_to_the_symptom(tmp_path):
    config = {
        "model": {"d_model": 64},
        "data": {"batch_size": 4},
        "train": {"steps": 30},
        "arm": [{"name": "unscaled", "attention": {"scale": "none"}}, {"name": "scaled"}],
    }
    found = diagnose(attnscope.train_model(config, path=tmp_path / "r"))
    # It explodes within 20 steps: whether its logits are seen to grow before is a matter of the processor's last bit.
    found = [finding for finding in found if finding.rule != "logit_growth"]
    about = {finding.rule: finding.members for finding in found}
    assert about == {
        "applied_scale": ("unscaled",),
        "saturated_at_start": ("unscaled",),
        "nonfinite": ("unscaled",),
        "loss_explosion": ("unscaled",),
        "stalled": ("scaled",),  # 30 steps do not reach the unigram loss
        "first_loss_too_high": ("unscaled", "scaled"),  # embeddings of standard deviation 1, no norm
    }
    assert [finding.kind for finding in found] == ["cause"] * 2 + ["symptom"] * 3 + ["cause"]
    assert found[-1].severity == "note"


def test_healthy_training_gives_no_finding(tmp_path):
    config = {
        "model": {"d_model": 64, "n_layers": 2, "norm": "pre"},
        "optimizer": {"name": "adamw", "lr": 3e-3},
        "clip": {"threshold": 1.0},
        "train": {"steps": 80},
        "arm": [{"name": f"s{seed}", "train": {"seed": seed}} for seed in range(3)],
    }
    run = attnscope.train_model(config, path=tmp_path / "r")
    assert [member.status for member in run.members] == ["trained"] * 3
    assert diagnose(run) == ()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_default_model_gives_no_finding_but_notes(tmp_path, seed):
    run = attnscope.train_model({"train": {"seed": seed}}, path=tmp_path / "r")
    assert {finding.severity for finding in diagnose(run)} <= {"note"}


# The rules that the five hundred members below are made for.
MADE_FOR = {
    "applied_scale",
    "saturated_at_start",
    "clipping_always_on",
    "unusual_scale",
    "nonfinite",
    "nonfinite_loss_passed",
    "updates_skipped",
    "loss_explosion",
    "loss_spike",
    "stalled",
    "failed",
}


def test_five_hundred_members_are_diagnosed_quickly_and_in_few_words(tmp_path):
    n, steps = 500, 200
    draw = np.random.default_rng(0)
    losses = 6.0 + 0.1 * draw.normal(size=(n, steps))
    losses[:250, 100:] = 50.0
    losses[:250, 150:] = np.nan
    losses[250:300, 60] = 15.0
    losses[300:, 30] = np.nan
    arms = [
        {"name": f"member {i}", "train": {"seed": i}} | ({"attention": {"scale": "none"}} if i < 250 else {"attention": {"scale": "inverse"}} if i >= 490 else {})
        for i in range(n)
    ]  # fmt: skip
    run = run_of(
        tmp_path / "r",
        {"arm": arms},
        steps=steps_table(losses, clip_factor=np.full((steps, n), 0.01)),
        heads=heads_table(n, range(0, steps, 10), n_layers=2, n_heads=2, entropy_ratio=0.05),
        events=[("nonfinite", 150, i, {"tensor": "loss"}) for i in range(250)]
        + [("skipped_update", 9, i, {}) for i in range(20) for _ in range(17)],
        end="failed",
        planned=steps,
    )
    assert len(run.members) == n and len(run.heads) == n * 20 * 4  # read before the clock starts
    began = time.process_time()
    found = diagnose(run)
    assert time.process_time() - began < 5
    assert {finding.rule for finding in found} >= MADE_FOR
    assert found[0].rule == "applied_scale" and found[-1].severity == "note"
    for finding in found:
        assert len(finding.evidence) == MOST_EVIDENCE < finding.evidence_left_out
        assert len(finding.summary) < 500
        assert f"and {len(finding.members) - 3} more" in finding.summary


def test_findings_are_strict_json_whatever_they_hold(tmp_path):
    run = run_of(tmp_path / "r", steps=steps_table([4.0, np.inf, np.nan]))
    (text,) = [to_json(to_table(f)) for f in diagnose(run) if f.rule == "loss_explosion"]
    assert json.loads(text)["evidence"][0]["value"] == "Infinity"
    assert "NaN" not in text.replace('"NaN"', "")


@pytest.mark.parametrize("recorded", [(), ("steps",), ("heads",), ("layers",), ("params",)])
def test_a_run_that_was_killed_early_is_diagnosed(tmp_path, recorded):
    part = new_run(tmp_path / "r").part(0)
    for table in recorded:
        part.append(table, columns(table, [0], members=(0, 1)))
    part.finish("finished")
    (tmp_path / "r" / "part-0000" / "end.json").unlink()
    for path in (tmp_path / "r" / "part-0000").iterdir():
        os.utime(path, (1, 1))
    said = ["unusual_scale"]  # the unscaled twin, as configured
    if recorded == ("params",):
        said = ["learning_rate_too_high", *said]  # its updates are as large as its weights
    assert rules_of(open_run(tmp_path / "r")) == said


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -1e30])
def test_tables_full_of_one_value_are_diagnosed(tmp_path, value):
    n = 60
    steps = steps_table(np.full((1, n), value))
    heads = heads_table(1, range(n))
    for table, keys in ((steps, ("step", "member", "tokens")), (heads, ("step", "member", "layer", "head"))):  # fmt: skip
        for name in table:
            if name not in (*keys, "rows", "rows_left_out"):
                table[name] = np.full(n, value)
    for finding in diagnose(run_of(tmp_path / "r", steps=steps, heads=heads)):
        assert finding.summary.endswith(".") and finding.evidence


def test_texts_of_strangers_are_fit_to_show(tmp_path):
    events = [
        ("nonfinite", 1, 0, {"tensor": HOSTILE, "where": [HOSTILE]}),
        ("nonfinite", 1, 0, {"tensor": ["x"], "where": 3}),
        ("nonfinite", 0, None, {"tensor": "loss"}),
        ("nonfinite", 1, 0, {}),
    ]
    run_of(tmp_path / "r", steps=steps_table([np.nan] * 3), events=events)
    place = tmp_path / "r" / "run.json"
    raw = json.loads(place.read_text())
    raw["members"][0]["name"] = HOSTILE
    raw["members"][0]["settings"] = {HOSTILE: HOSTILE, "attention.scale": "none"}
    place.write_text(json.dumps(raw))
    found = diagnose(open_run(tmp_path / "r"))
    assert {finding.rule for finding in found} >= {"unusual_scale", "nonfinite", "loss_explosion"}
    for finding in found:
        for text in (finding.summary, *finding.members, *(e.quantity for e in finding.evidence)):
            assert text.isprintable() and len(text) < 1000
        assert all((e.group or "").isprintable() for e in finding.evidence)


def test_a_config_that_cannot_be_understood_leaves_the_other_rules(tmp_path):
    run_of(tmp_path / "r", {"attention": {"scale": "none"}}, steps=steps_table([4.0, np.nan]))
    place = tmp_path / "r" / "run.json"
    raw = json.loads(place.read_text())
    raw["config"] = {"strange": {"a": 1}}
    place.write_text(json.dumps(raw))
    assert rules_of(open_run(tmp_path / "r")) == ["nonfinite", "loss_explosion"]


def test_members_in_several_parts_are_told_apart(tmp_path):
    arms = [
        {"name": "one layer", "model": {"n_layers": 1}, "attention": {"scale": "none"}},
        {"name": "two layers", "model": {"n_layers": 2}},
        {"name": "two layers, unscaled", "model": {"n_layers": 2}, "attention": {"scale": "none"}},
    ]
    config = {"model": {"d_model": 64}, "train": {"steps": 2}, "arm": arms}
    run = attnscope.train_model(config, path=tmp_path / "r")
    assert len({member.part for member in run.members}) == 2
    about = {finding.rule: finding.members for finding in diagnose(run)}
    assert about["applied_scale"] == ("one layer", "two layers, unscaled")
    assert about["saturated_at_start"] == ("one layer", "two layers, unscaled")


def test_a_diagnosis_needs_no_torch(tmp_path):
    run_of(tmp_path / "r", steps=steps_table([4.0, np.nan]), heads=heads_table(1, [0, 1]))
    code = (
        "import sys, attnscope.diagnose as d, attnscope.runs.reader as r\n"
        f"assert d.diagnose(r.open_run({str(tmp_path / 'r')!r}))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
