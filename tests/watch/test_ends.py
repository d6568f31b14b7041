"""How a watched training ended, told alike by its events, the run, the report and the findings."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from attnscope.cli.app import app
from attnscope.diagnose import diagnose
from attnscope.report.contents import contents_of
from attnscope.runs.listing import list_runs
from attnscope.runs.reader import open_run
from attnscope.watch.attach import watch_model
from tests.watch.test_training import Small, loss_of, train


def said_by(path, *words):
    """What a command prints of a run or a folder, on lines of any length."""
    done = CliRunner().invoke(app, [*words, str(path)])
    assert done.exit_code == 0, done.output
    return " ".join(done.stdout.split())


def rules_of(run):
    return {finding.rule for finding in diagnose(run)}


def test_a_script_that_dies_of_an_error_is_said_to_have_failed_and_of_what(tmp_path):
    calls = iter(range(10))

    def step(model, optimizer):
        if next(calls) == 2:
            raise ValueError("the data is broken")
        loss_of(model).backward()
        optimizer.step()

    with pytest.raises(ValueError, match="the data is broken"):
        train(tmp_path / "run", step, steps=5)
    run = open_run(tmp_path / "run")
    (member,) = run.members
    assert (run.status, member.status) == ("failed", "failed")
    assert member.error == "ValueError: the data is broken"
    told = "failed after step 1"
    assert contents_of(run).verdict[0].startswith(f"{member.name} {told}")
    for words in (("diagnose",), ("report",)):
        said = said_by(run.path, *words)
        assert told in said and "ValueError: the data is broken" in said
    (found,) = json.loads(CliRunner().invoke(app, ["runs", str(tmp_path), "--json"]).stdout)
    assert (found["status"], found["error"]) == ("failed", "ValueError: the data is broken")
    assert "ValueError: the data is broken" in said_by(tmp_path, "runs")
    (told_in_json,) = json.loads(CliRunner().invoke(app, ["diagnose", str(run.path), "--json"]).stdout)["members"]
    assert told_in_json["status"] == "failed" and "broken" in told_in_json["error"]
    assert list_runs(tmp_path)[0].error == "ValueError: the data is broken"


class Classes(nn.Module):
    """Cross-entropy over the tokens with a label; the chosen step has none."""

    def __init__(self, empty=()):
        super().__init__()
        torch.manual_seed(0)
        self.small, self.empty, self.number = Small(), empty, 0

    def forward(self):
        labels = torch.zeros(24, dtype=torch.long)
        if self.number in self.empty:
            labels[:] = -100
        self.number += 1
        x = torch.randn(4, 6, 16)
        return F.cross_entropy(self.small(x).flatten(0, 1), labels, ignore_index=-100)


def train_classes(path, empty, *, steps=20, breaks=False):
    model = Classes(empty)

    def step(model, optimizer):
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        if breaks and not loss.isfinite():
            model.small.out.weight.grad.fill_(float("nan"))
        optimizer.step()

    return train(path, step, steps=steps, model=model, every=5)


@pytest.mark.parametrize("empty", [(7,), (7, 8, 9, 10), (0,), (3, 9, 15), (19,)])
def test_batches_without_labels_do_not_make_training_diverge(tmp_path, empty):
    run = train_classes(tmp_path / "run", empty)
    (member,) = run.members
    assert (member.status, member.diverged_at, member.nonfinite_at) == ("trained", None, empty[0])
    assert "diverged" not in set(run.events["kind"])
    assert rules_of(run) == {"nonfinite_loss_passed"}
    (finding,) = diagnose(run)
    assert f"The loss of step {empty[0]} of {member.name} is NaN" in finding.summary
    assert "its gradients and the weights stayed finite" in finding.summary
    assert ("training went on" in finding.summary) == (empty[0] < 19)
    assert [e.step for e in finding.evidence] == list(empty)


def test_a_loss_that_breaks_the_weights_diverges_where_it_did(tmp_path):
    run = train_classes(tmp_path / "run", (7,), breaks=True)
    (member,) = run.members
    assert (member.status, member.diverged_at, member.nonfinite_at) == ("diverged", 7, 7)
    (at,) = run.events[run.events["kind"] == "diverged"]["step"]
    assert at == 7 and rules_of(run) == {"nonfinite", "loss_explosion"}
    short = train_classes(tmp_path / "short", (7,), breaks=True, steps=9)
    (at,) = short.events[short.events["kind"] == "diverged"]["step"]
    assert (at, short.members[0].diverged_at) == (7, 7), "known when the record ends"


def test_an_error_without_words_is_named_by_its_class(tmp_path):
    with pytest.raises(AssertionError), watch_model(path=tmp_path / "run"):
        raise AssertionError
    assert open_run(tmp_path / "run").ends[0]["error"] == "AssertionError"
