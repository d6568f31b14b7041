"""The script stops where a condition is met."""

import pytest
import torch

from attnscope.runs.events import Diverged, Stopped
from attnscope.runs.reader import open_run
from attnscope.watch.attach import watch_model
from tests.watch.test_script import script, watch  # noqa: F401  (a fixture)
from tests.watch.test_training import Small, plain_step


def test_training_stops_after_the_step_that_meets_it(tmp_path):
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e3)
    done = 0
    with (
        pytest.raises(SystemExit) as caught,
        watch_model(model, path=tmp_path / "run", every=1, stop_on=["nonfinite", "explosion"]),
    ):
        for _ in range(100):
            plain_step(model, optimizer)
            done += 1
    assert caught.value.code == 3
    run = open_run(tmp_path / "run")
    assert run.steps["step"].tolist() == list(range(done)), "the next step had not begun"
    (fields,) = run.events[run.events["kind"] == "stopped"]["fields"]
    assert fields["on"] in ("explosion", "nonfinite")
    assert run.members[0].status == "diverged"


def test_an_explosion_stops_where_the_alarms_say_that_the_loss_diverged(tmp_path):
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    losses = [4.0, 4.1, 3.9] * 5 + [90.0] * 15
    with pytest.raises(SystemExit), watch_model(path=tmp_path / "run", stop_on=["explosion"]):
        for height in losses:
            optimizer.zero_grad()
            (weight * 0 + height).backward()
            optimizer.step()
    run = open_run(tmp_path / "run")
    at, _, said = run.happened(Diverged)[0]
    (step, _, stopped), *more = run.happened(Stopped)
    assert not more and at == 15 < step == len(run.steps) < len(losses)
    assert stopped.found == f"the loss diverged at step {at}: {said.why}"
    assert run.members[0].diverged_at == at, "live as read back"


def test_a_script_is_stopped_with_exit_code_3_and_it_is_said(script):  # noqa: F811
    done = watch("--stop-on", "nonfinite", "--stop-on", "update_norm>0", "train.py", cwd=script.parent)  # fmt: skip
    assert done.returncode == 3, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if "stopped on" in line]
    assert said.startswith("attnscope: stopped on update_norm>0: update_norm ")
    assert said.endswith("at step 0, layer -1, group wte")
    assert "Traceback" not in done.stderr
    assert open_run(script.parent / "runs" / "r").steps["step"].tolist() == [0]
    assert len(done.stdout.splitlines()) == 2, "the arguments, and the step"
