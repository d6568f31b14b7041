"""Rules while training goes on: which ones may be asked, what they find when, and that blocks change nothing."""

import itertools

import pytest

from attnscope.config import parse_table
from attnscope.diagnose import RULES
from attnscope.diagnose.live import LIVE_RULES, NOT_LIVE, WHEN, found_live, live
from attnscope.diagnose.rules.schedule import RECOVERY
from attnscope.errors import ConfigError
from attnscope.runs.events import Stopped
from attnscope.runs.found_live import FoundLive, line_of
from attnscope.runs.reader import open_run
from attnscope.signals.moments import moments
from attnscope.train.run import resume_run, train_run
from tests.train.small import PAIR, small

BREAKS = small(optimizer={"lr": 0.3}, train={"steps": 60, "checkpoint_every": 0}, arm=PAIR)


def trained(path, *, stop_on=(), flush_s=None, monkeypatch=None, config=BREAKS):
    if flush_s is not None:
        monkeypatch.setattr("attnscope.train.loop.FLUSH_SECONDS", flush_s)
    said = []
    status = train_run(
        parse_table(config), path, live=live(stop_on), on_progress=lambda _part, now: said.extend(now.events)
    )
    return status, said


def findings(run):
    return [(step, what.rule, what.severity, what.members) for step, _, what in run.happened(FoundLive)]


def asked_again(path):
    """What rules find in a finished run, at each moment and each step at which they did find something."""
    run = open_run(path)
    last = run.steps["step"].max()
    known = list(itertools.takewhile(lambda step: step <= last, moments()))
    asked = sorted({*known, *(step for step, *_ in findings(run))})
    answers = [found_live(path, 0, step, max((at for at in known if at < step), default=None)) for step in asked]
    return [event for answer in answers for event in answer]


def test_every_rule_is_asked_live_or_says_why_not():
    names = {rule.__name__ for rule in RULES}
    assert names == WHEN.keys() | NOT_LIVE.keys() and not WHEN.keys() & NOT_LIVE.keys()
    assert list(LIVE_RULES) == [rule.__name__ for rule in RULES if rule.__name__ in WHEN]
    assert WHEN["learning_rate_jump"].wait == RECOVERY


def test_conditions_may_name_rules():
    assert live(["loss_explosion", "loss>3"]).rules == ("loss_explosion",)
    with pytest.raises(ConfigError) as caught:
        live(["stalled"])
    assert str(caught.value) == (
        "--stop-on stalled: this rule cannot be asked while training goes on: it is about the end of training. Ask it afterwards: "
        "attnscope diagnose RUN --fail-on stalled"
    )
    with pytest.raises(ConfigError, match="Did you mean entropy_collapse"):
        live(["entropy_colapse"])


def test_findings_are_the_same_whatever_the_blocks(tmp_path, monkeypatch):
    status, said = trained(tmp_path / "each", flush_s=0.0, monkeypatch=monkeypatch)
    trained(tmp_path / "one", flush_s=1e9, monkeypatch=monkeypatch)
    each, one = open_run(tmp_path / "each"), open_run(tmp_path / "one")
    assert status == "finished" and findings(each) == findings(one)
    assert "loss_explosion" in [rule for _, rule, *_ in findings(one)]
    assert [event.what for event in said if isinstance(event.what, FoundLive)] == [
        what for _, _, what in each.happened(FoundLive)
    ], "what is recorded is what is said, once"
    told = [(rule, name) for _, rule, _, members in findings(one) for name in members]
    assert len(told) == len(set(told))
    assert [(event.step, event.what) for event in asked_again(tmp_path / "one")] == [
        (step, what) for step, _, what in one.happened(FoundLive)
    ], "what was found while it grew is in what was recorded"


def test_training_stops_at_the_step_at_which_a_rule_finds_something(tmp_path):
    trained(tmp_path / "whole")
    (step, *_), *_ = [each for each in findings(open_run(tmp_path / "whole")) if each[1] == "loss_explosion"]
    status, _ = trained(tmp_path / "stopped", stop_on=["loss_explosion"])
    run = open_run(tmp_path / "stopped")
    ((at, _, stopped),) = run.happened(Stopped)
    assert (status, at, run.members[0].last_step, run.status) == ("stopped", step, step, "interrupted")
    assert stopped.on == "loss_explosion" and stopped.found.endswith(f", found at step {step}")
    assert resume_run(tmp_path / "stopped", live=live()) == "finished", "it goes on from its checkpoint"
    run = open_run(tmp_path / "stopped")
    told = [(rule, name) for _, rule, _, members in findings(run) for name in members]
    assert len(told) == len(set(told)), "a run that goes on tells nothing twice"


def test_training_stops_on_columns_and_on_what_is_not_finite(tmp_path):
    status, _ = trained(tmp_path / "run", stop_on=["update_norm>0"])
    assert status == "stopped" and open_run(tmp_path / "run").steps["step"].max() == 0


def test_healthy_training_is_told_nothing(tmp_path, monkeypatch):
    trained(tmp_path / "run", config=small(model={"norm": "pre"}, optimizer={"lr": 0.01}, train={"steps": 60}))
    assert findings(open_run(tmp_path / "run")) == []


def test_a_run_may_be_opened_as_it_was_at_a_step(tmp_path):
    trained(tmp_path / "run")
    run = open_run(tmp_path / "run", until=9)
    assert run.status == "running" and not run.ends
    assert {int(table["step"].max()) for table in (run.steps, run.heads, run.params, run.layers)} == {9}
    assert run.events["step"].max() <= 9 and run.members[0].last_step == 9


def test_a_line_is_cut_to_the_terminal():
    what = FoundLive(
        rule="x",
        severity="error",
        title="It broke",
        members=("a", "b", "c", "d"),
        summary="At 0.97 of q.k it did. And then.",
    )
    assert line_of(7, what) == "step 7: error: It broke (a, b, c and 1 more): At 0.97 of q.k it did."
    assert line_of(7, what, 20) == "step 7: error: It..."
