"""Rules of single heads: dead ones, copies, and sinks."""

from dataclasses import replace

import numpy as np
import pytest

from attnscope.bench.faults.loop import train
from attnscope.bench.faults.recipe import Recipe
from attnscope.diagnose.rules.heads import SAME, SINK, UNIFORM_STD, attention_sink, identical_heads, uniform_attention
from attnscope.diagnose.rules.logits import starved_queries_and_keys
from attnscope.runs.reader import open_run
from tests.diagnose.synthetic import heads_table, run_of, steps_table

STEPS = 120
AT = list(range(0, STEPS, 7))
DRAW = np.random.default_rng(0)
SMALL = Recipe(d_model=32, n_layers=2, n_heads=4, steps=120, attention="written")


def run_with(path, *, n_layers=1, n_heads=4, losses=4.0, **columns):
    heads = heads_table(1, AT, n_layers=n_layers, n_heads=n_heads, **columns)
    return run_of(path, steps=steps_table(np.full(STEPS, losses)), heads=heads)


def spread(n_heads=4, n_layers=1):
    """Numbers that differ from head to head and step to step, as those of a real layer do."""
    return DRAW.uniform(0.5, 1.0, size=(len(AT), 1, n_layers, n_heads))


@pytest.mark.parametrize(("std", "found"), [(UNIFORM_STD * 1.01, False), (UNIFORM_STD * 0.99, True)])
def test_heads_are_uniform_below_the_threshold(tmp_path, std, found):
    values = spread()
    values[..., 2] = std
    finding = uniform_attention(run_with(tmp_path / "r", logit_std=values))
    assert (finding is not None) is found
    if finding is not None:
        assert (finding.severity, finding.evidence[0].head) == ("note", 2)


def test_a_head_that_looked_somewhere_once_is_not_dead(tmp_path):
    values = spread()
    values[..., 2] = 0.0
    values[5, ..., 2] = 0.1
    assert uniform_attention(run_with(tmp_path / "r", logit_std=values)) is None


def test_a_whole_layer_of_nothing_is_a_warning_and_named(tmp_path):
    values = spread(n_layers=2)
    values[:, :, 1] = 0.0
    run = run_with(tmp_path / "r", n_layers=2, logit_std=values)
    finding = uniform_attention(run)
    assert finding.severity == "warning"
    assert finding.summary == (
        f"4 of 8 heads of {run.entries[0].name} look at all keys alike from the first step to step 119: in layer 1, 4 of 4, whose "
        "logits never have a standard deviation above 0. In layer 1 they do not differ at all: q.k is a constant."
    )
    values[:, :, 1, 3] = 1e-3
    assert uniform_attention(run_with(tmp_path / "s", n_layers=2, logit_std=values)).severity == "note"


def test_a_hundred_steps_are_needed_to_call_a_head_dead(tmp_path):
    heads = heads_table(1, range(99), logit_std=0.0)
    run = run_of(tmp_path / "r", steps=steps_table(np.full(99, 4.0)), heads=heads)
    assert uniform_attention(run).why == "fewer than 100 steps before divergence"


def copies(by, *, n_copies=2, std=1.0):
    """Columns of four heads, of which some are copies of head 1, `by` of their value apart."""
    columns = {
        name: spread() * (std if name == "logit_std" else 1) for name in ("logit_std", "entropy", "max_prob", "sink")
    }
    for values in columns.values():
        for head in range(2, 1 + n_copies):
            values[..., head] = values[..., 1] * (1 + by)
    return columns


@pytest.mark.parametrize(("by", "found"), [(0.0, True), (SAME * 0.9, True), (SAME * 1.2, False)])
def test_heads_are_copies_up_to_the_threshold(tmp_path, by, found):
    assert (identical_heads(run_with(tmp_path / "r", **copies(by))) is not None) is found


def test_copies_are_told(tmp_path):
    run = run_with(tmp_path / "r", **copies(0.0, n_copies=3))
    finding = identical_heads(run)
    assert finding.summary == (
        f"The 4 heads of layer 0 of {run.entries[0].name} are 2 in truth: at 18 steps measured, heads 2 and 3 and others agree in "
        "logit_std, entropy, max_prob and sink to 0.001 of their value."
    )
    assert finding.evidence[0].value == finding.evidence[0].threshold


def test_what_differs_in_one_number_or_at_some_steps_is_no_copy(tmp_path):
    other = copies(0.0)
    other["sink"][..., 2] += 0.01
    assert identical_heads(run_with(tmp_path / "a", **other)) is None
    parting = copies(0.0)
    parting["entropy"][4:, ..., 2] += 0.01
    assert identical_heads(run_with(tmp_path / "b", **parting)) is None


def test_heads_that_all_look_nowhere_are_no_copies(tmp_path):
    assert identical_heads(run_with(tmp_path / "r", logit_std=1e-3, entropy=2.0, max_prob=0.1, sink=0.1)) is None


@pytest.mark.parametrize(("sink", "found"), [(SINK - 0.01, False), (SINK + 0.01, True)])
def test_a_head_rests_on_the_first_key_above_the_threshold(tmp_path, sink, found):
    values = np.full((len(AT), 1, 1, 4), 0.05)
    values[8:, ..., 3] = sink
    finding = attention_sink(run_with(tmp_path / "r", entropy=1.5, sink=values))
    assert (finding is not None) is found
    if finding is not None:
        assert (finding.severity, finding.step, finding.evidence[0].head) == ("note", AT[8], 3)


def test_short_sequences_put_much_on_the_first_key_by_themselves(tmp_path):
    two_keys = {"entropy": 0.69, "entropy_ratio": 1.0}
    assert attention_sink(run_with(tmp_path / "r", sink=0.5, **two_keys)) is None


def test_dead_layers_and_heads_made_of_one_are_seen_in_real_training_and_their_twin_is_silent(tmp_path):
    def told(name, recipe):
        train(recipe, tmp_path / name)
        run = open_run(tmp_path / name)
        return [rule(run) for rule in (uniform_attention, identical_heads, starved_queries_and_keys)]

    assert told("twin", SMALL) == [None, None, None]
    dead, _, starved = told("dead", replace(SMALL, dead_layers=(1,)))
    assert dead.severity == "warning" and {each.layer for each in dead.evidence} == {1}
    assert {each.layer for each in starved.evidence} == {1}
