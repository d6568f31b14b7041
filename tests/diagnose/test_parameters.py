"""Rules for parameters that are not trained as they should be."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from attnscope.diagnose import diagnose
from attnscope.diagnose.blindness import NO_OPTIMIZER, NO_STEP
from attnscope.diagnose.rules.parameters import (
    FEWEST_UPDATES,
    MOST_OF_IT,
    NO_UPDATES,
    gradients_accumulate,
    parameters_frozen,
    parameters_without_gradient,
    parameters_without_optimizer,
)
from tests.diagnose.probed import ORPHANS, UPKEEP, probed
from tests.diagnose.synthetic import run_of, steps_table
from tests.watch.test_probes import Decoder, loss_of, plain_step, train

NAMES = ["h.0.q", "h.0.k", "h.0.v", "h.1.q", "h.1.k"]


def some(which, count=5):
    return {which: count, f"{which}_names": NAMES}


ALL = (parameters_without_optimizer, parameters_without_gradient, parameters_frozen, gradients_accumulate)


def orphans(tmp_path, *, upkeep=UPKEEP, **fields):
    return parameters_without_optimizer(
        probed(tmp_path / "r", ("upkeep", upkeep), ("without_optimizer", ORPHANS | fields))
    )


def test_modules_in_a_python_list_are_an_error_that_names_it(tmp_path):
    found = orphans(tmp_path, hidden=4, containers=["model.layers"])
    assert found.severity == "error"
    assert found.summary == (
        "4 parameters get gradients, and no optimizer has them (a.weight, a.bias, b.weight and 1 more). 4 of them are those of "
        "modules in a Python container (model.layers), where parameters() does not find them."
    )
    assert [each.group for each in found.evidence] == ORPHANS["names"]


@pytest.mark.parametrize(
    ("left_out", "share", "severity"),
    [(4, MOST_OF_IT - 0.01, "warning"), (4, MOST_OF_IT, "note"), (0, 0.0, "note")],
)
def test_the_smaller_part_of_a_model_is_forgotten_and_the_larger_one_frozen(tmp_path, left_out, share, severity):
    assert orphans(tmp_path, left_out=left_out, share_left_out=share).severity == severity


def test_an_optimizer_of_another_model_is_an_error(tmp_path):
    stale = UPKEEP | {"updates": 0, "steps_without_gradient": FEWEST_UPDATES}
    found = orphans(tmp_path, upkeep=stale)
    assert found.severity == "error" and "It may have been made for another model" in found.summary
    assert "parameters_without_gradient" in found.explains


def test_parameters_left_out_are_no_reason_for_others_without_a_gradient(tmp_path):
    assert "parameters_without_gradient" not in orphans(tmp_path, left_out=4, share_left_out=0.1).explains


def test_few_updates_and_what_has_changed_since_are_no_finding(tmp_path):
    few = UPKEEP | {"updates": FEWEST_UPDATES - 1}
    assert orphans(tmp_path, upkeep=few).why == NO_UPDATES
    events = [("without_optimizer", ORPHANS), ("without_optimizer", ORPHANS | {"parameters": 0, "names": []}, 20)]
    assert parameters_without_optimizer(probed(tmp_path / "s", ("upkeep", UPKEEP), *events)) is None


def told(tmp_path, rule, **fields):
    return rule(probed(tmp_path / "r", ("upkeep", UPKEEP | fields)))


@pytest.mark.parametrize(
    ("fields", "severity", "said"),
    [
        (
            some("detached"),
            "warning",
            "In 30 updates of AdamW, 5 of its 12 parameters compute in the forward pass, and never got a gradient "
            "(h.0.q, h.0.k, h.0.v and 2 more).",
        ),
        (
            some("unused"),
            "note",
            "In 30 updates of AdamW, 5 of its 12 parameters never got a gradient; perhaps they are not used "
            "(h.0.q, h.0.k, h.0.v and 2 more).",
        ),
        (
            {"updates": 0, "steps_without_gradient": 40, "steps_zeroed": 40},
            "error",
            "AdamW stepped 40 times after a loss was differentiated, and none of its 12 parameters had a gradient: zero_grad() "
            "stands between backward() and step().",
        ),
        ({"updates": FEWEST_UPDATES - 1, **some("detached")}, None, ""),
        ({}, None, ""),
    ],
)
def test_parameters_that_no_gradient_reaches(tmp_path, fields, severity, said):
    found = told(tmp_path, parameters_without_gradient, **fields)
    assert getattr(found, "severity", None) == severity
    assert severity is None or found.summary == said


def test_an_optimizer_that_never_had_a_gradient_beside_one_that_has_is_a_warning(tmp_path):
    dead = UPKEEP | {"number": 1, "updates": 0, "steps_without_gradient": 30}
    found = parameters_without_gradient(probed(tmp_path / "r", ("upkeep", UPKEEP), ("upkeep", dead)))
    assert found.severity == "warning"


@pytest.mark.parametrize(("n", "is_found"), [(FEWEST_UPDATES, True), (FEWEST_UPDATES - 1, False)])
def test_gradients_that_are_exactly_zero_at_every_step(tmp_path, n, is_found):
    run = probed(tmp_path / "r", ("upkeep", UPKEEP), steps=n, grad_norm=0.0)
    found = parameters_without_gradient(run)
    assert (getattr(found, "severity", None) == "error") is is_found
    some = np.zeros(30)
    some[20] = 1e-9
    assert parameters_without_gradient(probed(tmp_path / "s", ("upkeep", UPKEEP), grad_norm=some)) is None
    gaps = np.where(np.arange(30) % 2, 0.0, np.nan)
    assert parameters_without_gradient(probed(tmp_path / "t", ("upkeep", UPKEEP), grad_norm=gaps)).severity == "error"
    nothing = probed(tmp_path / "u", ("upkeep", UPKEEP), grad_norm=np.nan)
    assert parameters_without_gradient(nothing) is None


@pytest.mark.parametrize(
    ("fields", "severity"),
    [
        (some("lr_zero"), "warning"),
        (some("lr_zero", 6), "note"),
        (some("lr_zero", 12), "warning"),
        (some("lr_zero", 10) | {"unused": 2}, "warning"),
        (some("lr_zero", 12) | {"updates": FEWEST_UPDATES - 1}, None),
        ({}, None),
    ],
)
def test_a_learning_rate_of_zero(tmp_path, fields, severity):
    assert getattr(told(tmp_path, parameters_frozen, **fields), "severity", None) == severity


@pytest.mark.parametrize(
    ("kept", "compared", "is_found"),
    [(4, 4, True), (FEWEST_UPDATES, FEWEST_UPDATES, True), (2, 2, False), (3, 4, False), (0, 4, False)],
)
def test_gradients_that_are_never_zeroed(tmp_path, kept, compared, is_found):
    found = told(tmp_path, gradients_accumulate, gradients_kept=kept, compared=compared)
    assert (found is not None) is is_found
    if is_found:
        assert (found.severity, found.step) == ("warning", 1) and "loss_explosion" in found.explains


def test_never_zeroing_is_an_error_in_what_diverged(tmp_path):
    losses = np.r_[np.full(10, 4.0), np.full(20, 50.0)]
    run = probed(tmp_path / "r", ("upkeep", UPKEEP | {"gradients_kept": 4}), losses=[losses])
    assert gradients_accumulate(run).severity == "error"


@pytest.mark.parametrize("rule", ALL)
def test_who_could_not_look_says_why_and_this_lab_trains_everything(tmp_path, rule):
    assert rule(probed(tmp_path / "a")).why == NO_OPTIMIZER
    assert (
        rule(probed(tmp_path / "b", steps=0)).why == NO_STEP
        or rule(probed(tmp_path / "c", steps=0)).why == NO_OPTIMIZER
    )
    assert rule(run_of(tmp_path / "d", steps=steps_table([4.0] * 30))) is None
    two = probed(
        tmp_path / "e", ("upkeep", UPKEEP | some("lr_zero") | some("unused") | {"gradients_kept": 4}), n_members=2
    )
    found = rule(two)
    assert (found.also[0] if rule is not parameters_without_optimizer else found).members == ("rank 1",)


# -- real scripts --


def warnings_of(run):
    return [(found.rule, found.severity) for found in diagnose(run) if found.severity != "note"]


def without_zeroing(model, optimizer):
    loss_of(model).backward()
    optimizer.step()


def zeroing_too_late(model, optimizer):
    loss_of(model).backward()
    optimizer.zero_grad()
    optimizer.step()


def test_healthy_training_has_no_finding_of_its_upkeep(tmp_path):
    run = train(tmp_path / "r", steps=30)
    assert warnings_of(run) == [] and all(rule(run) is None for rule in ALL)


def test_a_script_that_never_zeroes_diverges_and_that_is_the_reason(tmp_path):
    model = Decoder()
    run = train(tmp_path / "r", without_zeroing, model=model, optimizer=SGD(model.parameters(), 2.0), steps=150)
    found = gradients_accumulate(run)
    assert run.members[0].diverged_at is not None
    assert found.severity == "error" and diagnose(run)[0].rule == "gradients_accumulate"


def test_a_script_that_zeroes_too_late_trains_nothing(tmp_path):
    run = train(tmp_path / "r", zeroing_too_late, steps=10)
    assert ("parameters_without_gradient", "error") in warnings_of(run)


def test_an_optimizer_made_of_a_copy_is_the_reason_why_no_parameter_of_it_has_a_gradient(tmp_path):
    optimizer = Adam(copy.deepcopy(Decoder()).parameters(), 1e-3)
    found = diagnose(train(tmp_path / "r", optimizer=optimizer, steps=10))
    assert found[0].rule == "parameters_without_optimizer" and found[0].severity == "error"
    assert "parameters_without_gradient" in found[0].explains


class Listed(nn.Module):
    """A decoder before layers that stand in a list, or in one of PyTorch's."""

    def __init__(self, container):
        super().__init__()
        self.decoder = Decoder()
        torch.manual_seed(1)
        self.layers = container(nn.Linear(20, 20) for _ in range(2))

    def forward(self, ids, mask=None):
        x = self.decoder(ids, mask)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(("container", "expected"), [(list, ["parameters_without_optimizer"]), (nn.ModuleList, [])])
def test_layers_in_a_list_are_trained_in_one_of_pytorchs_alone(tmp_path, container, expected):
    run = train(tmp_path / "r", plain_step, model=Listed(container), steps=30)
    assert [rule for rule, severity in warnings_of(run) if severity == "error"] == expected
