"""What probes said is read as it was written, and what somebody else made of it harms nobody."""

import math

import pytest

from attnscope.diagnose import examine
from attnscope.runs.probe_events import (
    AttentionInOtherMode,
    DropoutInEvaluation,
    EvaluationInTraining,
    InputCarried,
    InputsSeen,
    KeysRepeated,
    KeysSeen,
    NormsOverOne,
    PassesSeen,
    RowsWithoutKeys,
    TargetsSeen,
    Upkeep,
    WithoutOptimizer,
)
from attnscope.runs.probed import MOST_NAMES, inputs_of, told, upkeep_of
from tests.diagnose.probed import ORPHANS, SIGHT, TARGETS, UPKEEP, probed

LINES = {
    "keys_seen": (KeysSeen, SIGHT | {"layer": 0, "batch": 4}),
    "keys_repeated": (KeysRepeated, {"layer": 0, "heads": 1, "of": 2, "times": 2, "looks": 3}),
    "norms_over_one": (NormsOverOne, {"norms": 3, "over_one": 2, "sign_left": 1, "names": ["a", "b"]}),
    "targets": (TargetsSeen, TARGETS),
    "rows_without_keys": (RowsWithoutKeys, {"layer": 0, "rows": 1, "of": 2}),
    "upkeep": (Upkeep, UPKEEP),
    "without_optimizer": (WithoutOptimizer, ORPHANS),
    "dropout_in_evaluation": (DropoutInEvaluation, {"model": "GPT", "dropouts": 1, "dropout": 0.1}),
    "evaluation_in_training": (
        EvaluationInTraining,
        {"model": "GPT", "dropouts": 1, "batch_norms": 1, "losses_before": 2},
    ),
    "input_carried": (InputCarried, {"layer": 0, "attention": False, "mlp": True}),
    "attention_in_other_mode": (
        AttentionInOtherMode,
        {
            "layer": 0,
            "queries": 16,
            "scale_ratio": 0.25,
            "is_larger": True,
            "later_rows": 1.0,
            "later_rows_trained": 0.0,
        },
    ),
    "passes": (PassesSeen, {"steps": 20, "fewest": 4, "most": 4, "weight": 1.0}),
}
HOSTILE = (None, -1, 1e400, math.nan, True, "1", [], {}, 10**30, "\x1b[31m", [[]], -0.5, 7.5)


@pytest.mark.parametrize("kind", LINES)
def test_what_is_written_is_read(tmp_path, kind):
    what, fields = LINES[kind]
    (one,) = told(probed(tmp_path / "r", (kind, fields, 4)), what)
    assert (one.member, one.step) == ("watched", 4)
    for name, value in fields.items():
        assert getattr(one.what, name) == (tuple(value) if isinstance(value, list) else value), name


def test_of_an_optimizer_the_last_word_counts(tmp_path):
    later, other = ("upkeep", UPKEEP | {"updates": 90}, 60), ("upkeep", UPKEEP | {"number": 1}, 60)
    run = probed(tmp_path / "r", ("upkeep", UPKEEP), later, other)
    assert [(each.what.number, each.what.updates) for each in upkeep_of(run)] == [(0, 90), (1, 30)]


@pytest.mark.parametrize("kind", LINES)
def test_no_value_of_anybodys_harms_a_reader_or_a_rule(tmp_path, kind):
    what, fields = LINES[kind]
    events = [(kind, {**fields, name: value}) for name in fields for value in HOSTILE]
    events += [(kind, {name: x for name, x in fields.items() if name != left}) for left in fields]
    run = probed(tmp_path / "r", *events, (kind, {}))
    for one in told(run, what):
        shares = [x for name in fields if isinstance(x := getattr(one.what, name), float)]
        counts = [x for name in fields if isinstance(x := getattr(one.what, name), int)]
        assert all(0 <= share <= 1 for share in shares) and all(0 <= count <= 2**53 for count in counts)
    for answer in (*examine(run).findings, *examine(run).not_looked):
        text = getattr(answer, "summary", "") + getattr(answer, "why", "")
        assert "\x1b" not in text and len(text) < 1500


def test_names_are_few_and_printable(tmp_path):
    (one,) = upkeep_of(probed(tmp_path / "r", ("upkeep", UPKEEP | {"unused_names": ["a\nb"] * 99})))
    assert len(one.what.unused_names) == MOST_NAMES and "\n" not in one.what.unused_names[0]


def test_axes_of_inputs_are_pairs_of_sizes(tmp_path):
    fields = {"given": [[2, 3], [4], [-1, 2], ["a", 1], 7, [5, 6]], "inside": "no", "positions": 3, "labels": 2}
    (what,) = inputs_of(probed(tmp_path / "r", ("inputs_seen", fields))).values()
    assert what == InputsSeen(given=((2, 3), (5, 6)), inside=(), positions=3, labels=2)
    assert inputs_of(probed(tmp_path / "s", ("inputs_seen", fields | {"labels": -1}))) == {}
