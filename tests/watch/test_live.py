"""What rules find while a script trains: said once on stderr, recorded, and the same whatever the blocks."""

import sys
import types

import pytest
import torch

from attnscope.errors import ConfigError
from attnscope.runs.events import Stopped
from attnscope.runs.found_live import FoundLive
from attnscope.runs.probe_events import Upkeep
from attnscope.runs.reader import open_run
from attnscope.watch.attach import watch_model
from attnscope.watch.settings import Settings
from attnscope.watch.trackers import TrackerLog
from tests.watch.test_script import run, script, watch  # noqa: F401  (a fixture)
from tests.watch.test_training import Small, loss_of

STEPS = 30


def accumulate(path, *, steps=STEPS, **settings):
    """Train without zeroing gradients; how many steps it took."""
    model, done = Small(), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with watch_model(model, optimizer, path, **settings):
        for _ in range(steps):
            loss_of(model).backward()
            optimizer.step()
            done += 1
    return done


def findings(path):
    return [(step, what.rule, what.severity) for step, _, what in open_run(path).happened(FoundLive)]


@pytest.mark.parametrize("flush_s", [0.0, 0.02, 1e9])
def test_a_finding_has_the_same_step_whatever_the_blocks(tmp_path, capsys, monkeypatch, flush_s):
    monkeypatch.setattr("attnscope.watch.watcher.FLUSH_SECONDS", flush_s)
    accumulate(tmp_path / "run")
    assert findings(tmp_path / "run") == [(9, "gradients_accumulate", "warning")]
    assert {step for step, _, _ in open_run(tmp_path / "run").happened(Upkeep)} == {4, STEPS}, (
        "dated by what they tell of"
    )
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith(
        "attnscope: step 9: warning: Gradients are never zeroed (watched): At each of 4 updates of SGD that were looked at,"
    )


def test_training_stops_at_the_step_at_which_a_rule_finds_something(tmp_path):
    with pytest.raises(SystemExit) as caught:
        accumulate(tmp_path / "run", stop_on=["loss_explosion", "gradients_accumulate"])
    assert caught.value.code == 3
    run = open_run(tmp_path / "run")
    ((step, _, stopped),) = run.happened(Stopped)
    assert (step, stopped.on, run.members[0].last_step) == (10, "gradients_accumulate", 9)
    assert stopped.found == "Gradients are never zeroed (watched), found at step 9"


def test_healthy_training_says_nothing(tmp_path, capsys):
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch_model(model, optimizer, tmp_path / "run"):
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert findings(tmp_path / "run") == [] and capsys.readouterr() == ("", "")


def test_rules_that_need_the_end_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match=r"^--stop-on plateau: this rule cannot be asked while training goes on: "):
        watch_model(path=tmp_path / "run", stop_on=["plateau"])
    assert not (tmp_path / "run").exists()
    assert Settings(stop_on=["rank_collapse"]).checked().rules == ("rank_collapse",)


def test_a_rule_that_fails_leaves_the_script_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("attnscope.diagnose.live.LIVE_RULES", {"gradients_accumulate": lambda _run: 1 / 0})
    assert accumulate(tmp_path / "run") == STEPS
    (fields,) = [each for each in open_run(tmp_path / "run").events["fields"] if each.get("name") == "findings"]
    assert fields["reason"] == "ZeroDivisionError: division by zero" and capsys.readouterr().err == ""


def test_the_output_of_a_script_is_that_of_plain_python(script):  # noqa: F811
    program = script.read_text().replace("optimizer.zero_grad(set_to_none=True)", "pass")
    script.write_text(program)
    plain = run(script.name, cwd=script.parent)
    done = watch(script.name, cwd=script.parent)
    assert done.stdout == plain.stdout
    said = [line for line in done.stderr.splitlines() if "step 9:" in line]
    assert len(said) == 1 and said[0].startswith("attnscope: step 9: warning: Gradients are never zeroed")


FOUND = FoundLive(rule="x", severity="error", title="It broke", members=("watched",), summary="It did. At last.")


def test_a_tracker_that_has_alerts_raises_one(tmp_path, monkeypatch):
    raised = []
    run = types.SimpleNamespace(alert=lambda **what: raised.append(what))
    wandb = types.SimpleNamespace(run=run, AlertLevel=types.SimpleNamespace(ERROR="ERROR", WARN="WARN"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert TrackerLog("wandb", tmp_path).alert(7, FOUND) is None
    assert raised == [{"title": "attnscope: It broke", "text": "step 7: It did. At last.", "level": "ERROR"}]
    assert TrackerLog("tensorboard", tmp_path).alert(7, FOUND) is None and len(raised) == 1
    wandb.run = None
    assert TrackerLog("wandb", tmp_path).alert(7, FOUND) is None and len(raised) == 1


def test_an_alert_that_fails_is_said_and_training_goes_on(tmp_path, monkeypatch, capsys):
    def alert(**_what):
        raise OSError("no network")

    wandb = types.SimpleNamespace(
        run=types.SimpleNamespace(alert=alert), AlertLevel=types.SimpleNamespace(ERROR="ERROR", WARN="WARN")
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert TrackerLog("wandb", tmp_path).alert(7, FOUND) == "wandb: OSError: no network"
    assert capsys.readouterr().err == (
        f"attnscope: wandb: OSError: no network. No alert was raised; {tmp_path} has the finding.\n"
    )
