"""Conditions: what is understood, and which records meet them."""

import numpy as np
import pytest

from attnscope.errors import ConfigError
from attnscope.runs.events import Diverged, Event
from attnscope.runs.found_live import FoundLive
from attnscope.signals.conditions import first_met, parse_condition


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nan", "--stop-on is 'nan', but must be nonfinite, explosion, the name of a rule, or a column and a threshold, as in max_logit>1e4."),
        ("max_logit>=4", "--stop-on is 'max_logit>=4', but must be nonfinite, explosion, the name of a rule, or a column and a threshold, as in max_logit>1e4."),
        ("max_logits>4", "--stop-on max_logits>4: there is no column max_logits. Columns: "),
        ("entropy_colapse", "--stop-on is 'entropy_colapse', but must be nonfinite, explosion, the name of a rule, or a column and a threshold, as in max_logit>1e4. Did you mean entropy_collapse?"),
        ("stalled", "--stop-on stalled: this rule cannot be asked while training goes on: it ends. Ask it afterwards: attnscope diagnose RUN --fail-on stalled"),
        ("loss>high", "--stop-on loss>high: 'high' is not a number. Write it as in max_logit>1e4."),
        ("loss>nan", "--stop-on loss>nan: 'nan' is not a number. Write it as in max_logit>1e4."),
        ("step>4", "--stop-on step>4: there is no column step. Columns: "),
    ],
)  # fmt: skip
def test_conditions_that_cannot_be_understood(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_condition(text, ["entropy_collapse", "loss_rises"], {"stalled": "it ends"})
    assert str(caught.value).startswith(message)


def test_a_threshold_names_the_first_place_that_passes_it():
    conditions = [parse_condition("entropy_ratio<0.1"), parse_condition("max_logit > 1e4")]
    heads = {
        "step": np.array([3, 3]), "layer": np.array([0, 1]), "head": np.array([0, 2]),
        "entropy_ratio": np.array([0.5, 0.2]), "max_logit": np.array([9e3, 2e4]),
    }  # fmt: skip
    condition, found = first_met(conditions, {"heads": heads}, None)
    assert condition.text == "max_logit > 1e4"
    assert found == "max_logit 2e+04 at step 3, layer 1, head 2"
    assert first_met(conditions, {}, None) is None and first_met(conditions, {"heads": {}}, None) is None


def test_of_several_members_the_one_is_named():
    heads = {"step": np.array([3, 3]), "member": np.array([0, 1]), "layer": np.array([0, 0]), "head": np.array([1, 1])}
    tables = {"heads": {**heads, "max_logit": np.array([1.0, 2e4])}}
    assert (
        first_met([parse_condition("max_logit>1e4")], tables, None)[1]
        == "max_logit 2e+04 at step 3, member 1, layer 0, head 1"
    )


def test_a_rule_is_met_where_it_finds_something():
    condition = parse_condition("entropy_collapse", ["entropy_collapse"])
    found = FoundLive(
        rule="entropy_collapse",
        severity="warning",
        title="Attention collapses",
        members=("a", "b"),
        summary="The entropy is 0.1 of it. And more.",
    )
    other = FoundLive(rule="loss_rises", severity="error", title="Uphill", members=("a",), summary="It rises.")
    assert first_met([condition], {}, None, [Event(step=9, what=other)]) is None
    assert first_met([condition], {}, None, [Event(step=9, what=other), Event(step=9, what=found)]) == (
        condition,
        "Attention collapses (a, b), found at step 9",
    )


def test_an_explosion_is_what_the_alarms_say():
    conditions = [parse_condition("nonfinite"), parse_condition("explosion")]
    assert first_met(conditions, {}, None) is None
    diverged = Event(step=7, member=0, what=Diverged(why="far above what it was"))
    assert first_met(conditions, {}, diverged) == (conditions[1], "the loss diverged at step 7: far above what it was")


def block(*, loss=2.0, is_seen=True, grad_norm=1.0, logit=3.0, bound=4.0, nonfinite=0):
    """Tables of step 7."""
    steps = {
        "step": [7], "member": [0], "loss": [loss], "grad_norm": [grad_norm], "loss_scale": [1.0],
    }  # fmt: skip
    tables = {
        "steps": steps,
        "losses": {name: x if is_seen else [] for name, x in steps.items()},
        "heads": {
            "step": [7, 7], "member": [0, 0], "layer": [0, 1], "head": [0, 0],
            "max_logit": [1.0, logit], "max_logit_bound": [2.0, bound],
        },
        "params": {
            "step": [7, 7], "member": [0, 0], "layer": [0, 0], "group": ["q", "k"],
            "nonfinite": [0, nonfinite],
        },
    }  # fmt: skip
    return {table: {name: np.array(x) for name, x in columns.items()} for table, columns in tables.items()}


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ({}, None),
        ({"loss": np.nan}, "loss is not finite at step 7"),
        ({"loss": np.nan, "is_seen": False}, None),
        ({"grad_norm": np.inf}, "grad_norm is not finite at step 7"),
        ({"grad_norm": np.nan, "nonfinite": 3}, "the gradient of k is not finite at step 7"),
        ({"nonfinite": 1}, "the gradient of k is not finite at step 7"),
        ({"logit": np.inf, "bound": np.inf}, "max_logit_bound is not finite at step 7"),
        ({"bound": np.nan}, None),  # q and k were not seen
        ({"logit": np.nan}, None),  # no row could be measured
    ],
)
def test_what_is_not_finite_is_named(what, found):
    met = first_met([parse_condition("nonfinite")], block(**what), None)
    assert (None if met is None else met[1]) == found
