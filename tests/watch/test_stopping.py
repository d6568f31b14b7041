"""Conditions: what is understood, when they are met, and that the script stops there."""

import numpy as np
import pytest
import torch

from attnscope.errors import ConfigError
from attnscope.runs.reader import open_run
from attnscope.signals.conditions import Stopper, parse_condition
from attnscope.watch.attach import watch_model
from tests.watch.test_script import script, watch  # noqa: F401  (a fixture)
from tests.watch.test_training import Small, plain_step


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nan", "--stop-on is 'nan', but must be nonfinite, explosion, or a column and a threshold, as in max_logit>1e4."),
        ("max_logit>=4", "--stop-on is 'max_logit>=4', but must be nonfinite, explosion, or a column and a threshold, as in max_logit>1e4."),
        ("max_logits>4", "--stop-on max_logits>4: there is no column max_logits. Columns: "),
        ("loss>high", "--stop-on loss>high: 'high' is not a number. Write it as in max_logit>1e4."),
        ("loss>nan", "--stop-on loss>nan: 'nan' is not a number. Write it as in max_logit>1e4."),
        ("step>4", "--stop-on step>4: there is no column step. Columns: "),
    ],
)  # fmt: skip
def test_conditions_that_cannot_be_understood(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_condition(text)
    assert str(caught.value).startswith(message)


def test_a_threshold_names_the_first_place_that_passes_it():
    stopper = Stopper([parse_condition("entropy_ratio<0.1"), parse_condition("max_logit > 1e4")])
    heads = {
        "step": np.array([3, 3]), "layer": np.array([0, 1]), "head": np.array([0, 2]),
        "entropy_ratio": np.array([0.5, 0.2]), "max_logit": np.array([9e3, 2e4]),
    }  # fmt: skip
    condition, found = stopper.met({"heads": heads})
    assert condition.text == "max_logit > 1e4"
    assert found == "max_logit 2e+04 at step 3, layer 1, head 2"
    assert stopper.met({}) is None and stopper.met({"heads": {}}) is None


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


def test_a_script_is_stopped_with_exit_code_3_and_it_is_said(script):  # noqa: F811
    done = watch("--stop-on", "nonfinite", "--stop-on", "update_norm>0", "train.py", cwd=script.parent)  # fmt: skip
    assert done.returncode == 3, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if "stopped on" in line]
    assert said.startswith("attnscope: stopped on update_norm>0: update_norm ")
    assert said.endswith("at step 0, layer -1, group wte")
    assert "Traceback" not in done.stderr
    assert open_run(script.parent / "runs" / "r").steps["step"].tolist() == [0]
    assert len(done.stdout.splitlines()) == 2, "the arguments, and the step"
