"""Rules for the mode that a model is in."""

import pytest
import torch

from attnscope.diagnose import diagnose
from attnscope.diagnose.blindness import NO_STEP
from attnscope.diagnose.rules.modes import dropout_in_evaluation, evaluation_in_training
from tests.diagnose.probed import probed
from tests.diagnose.synthetic import run_of, steps_table
from tests.watch.test_probes import Decoder, loss_of, plain_step, train

DROPOUT = {"model": "GPT", "dropouts": 3, "dropout": 0.2}
MODE = {"model": "GPT", "dropouts": 2, "batch_norms": 0, "losses_before": 0}


def test_dropout_in_evaluation_is_a_warning_of_the_first_time(tmp_path):
    run = probed(tmp_path / "r", ("dropout_in_evaluation", DROPOUT, 10), ("dropout_in_evaluation", DROPOUT, 20))
    found = dropout_in_evaluation(run)
    assert (found.severity, found.step) == ("warning", 10)
    assert found.summary == (
        "At step 10, GPT computes a loss without gradients while it is in training mode: 3 modules drop up to 0.2 of what they "
        "are given."
    )


@pytest.mark.parametrize(
    ("fields", "severity", "said"),
    [
        ({}, "note", "At step 1, GPT is trained in evaluation mode: it has 2 modules that drop something."),
        (
            {"losses_before": 9},
            "warning",
            "At step 1, GPT is trained in evaluation mode, and was in training mode before: it has 2 modules that drop something.",
        ),
        (
            {"dropouts": 0, "batch_norms": 1},
            "warning",
            "At step 1, GPT is trained in evaluation mode: it has 1 batch norms.",
        ),
        ({"dropouts": 0}, None, ""),  # the mode changes nothing
    ],
)
def test_evaluation_in_training(tmp_path, fields, severity, said):
    found = evaluation_in_training(probed(tmp_path / "r", ("evaluation_in_training", MODE | fields, 1)))
    assert getattr(found, "severity", None) == severity
    assert severity is None or found.summary == said


@pytest.mark.parametrize("rule", [dropout_in_evaluation, evaluation_in_training])
def test_silent_where_nothing_is_told(tmp_path, rule):
    assert rule(probed(tmp_path / "a")) is None
    assert rule(probed(tmp_path / "b", steps=0)).why == NO_STEP
    assert rule(run_of(tmp_path / "c", steps=steps_table([4.0] * 3))) is None


@pytest.mark.parametrize("rightly", [True, False])
def test_a_real_evaluation_with_dropout_on_and_its_healthy_twin(tmp_path, rightly):
    def step(model, optimizer):
        plain_step(model, optimizer)
        model.train(not rightly)
        with torch.no_grad():
            loss_of(model)
        model.train()

    run = train(tmp_path / "r", step, model=Decoder(dropout=0.2), steps=30)
    found = [each.rule for each in diagnose(run) if each.severity != "note"]
    assert found == ([] if rightly else ["dropout_in_evaluation"])


def test_a_real_model_that_is_left_in_evaluation_mode(tmp_path):
    def step(model, optimizer):
        plain_step(model, optimizer)
        model.eval()

    run = train(tmp_path / "r", step, model=Decoder(dropout=0.2))
    assert evaluation_in_training(run).severity == "warning"
