"""What probes said is read as it was written, and what somebody else made of it harms nobody."""

import math

import pytest

from attnscope.diagnose import examine
from attnscope.runs.probed import (
    MOST_NAMES,
    empty_rows,
    modes,
    sights,
    targets_of,
    upkeep_of,
    without_optimizer_of,
)
from tests.diagnose.probed import NOBODY, ORPHANS, SIGHT, TARGETS, UPKEEP, probed

KINDS = {
    "sight": SIGHT | {"layer": 0},
    "targets": TARGETS,
    "rows_without_keys": {"layer": 0, "rows": 1, "of": 2},
    "upkeep": UPKEEP,
    "without_optimizer": ORPHANS,
    "dropout_in_evaluation": {"model": "GPT", "dropouts": 1, "dropout": 0.1},
    "evaluation_in_training": {"model": "GPT", "dropouts": 1, "batch_norms": 1, "has_trained": True},
}
HOSTILE = (None, -1, 1e400, math.nan, True, "1", [], {}, 10**30, "\x1b[31m", [[]], {"count": 1, "names": 7})


def all_of(run):
    return (
        sights(run),
        targets_of(run),
        empty_rows(run),
        upkeep_of(run),
        without_optimizer_of(run),
        modes(run, "dropout_in_evaluation"),
        modes(run, "evaluation_in_training"),
    )


def test_what_is_written_is_read(tmp_path):
    sight, targets, empty, upkeep, without, dropout, mode = all_of(probed(tmp_path / "r", *KINDS.items()))
    assert (sight[0].queries, sight[0].later, sight[0].padded) == (16, 0.0, None)
    assert targets[0].equal == {-1: 0.05, 0: 0.05, 1: 1.0, 2: 0.05}
    assert (empty[0].rows, empty[0].of) == (1, 2)
    assert (upkeep[0].updates, upkeep[0].detached.count, upkeep[0].zeroed) == (30, 0, False)
    assert without[0].some.names[0] == "a.weight" and without[0].share == 0
    assert (dropout[0].dropout, mode[0].batch_norms, mode[0].has_trained) == (0.1, 1, True)


def test_of_an_optimizer_the_last_word_counts(tmp_path):
    later = ("upkeep", UPKEEP | {"updates": 90}, 60)
    other = ("upkeep", UPKEEP | {"number": 1}, 60)
    run = probed(tmp_path / "r", ("upkeep", UPKEEP), later, other)
    assert [(each.number, each.updates) for each in upkeep_of(run)] == [(0, 90), (1, 30)]


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_of_anybodys_harms_a_reader_or_a_rule(tmp_path, kind):
    fields = KINDS[kind]
    events = [(kind, {**fields, name: value}) for name in fields for value in HOSTILE]
    events += [(kind, {name: x for name, x in fields.items() if name != left}) for left in fields]
    run = probed(tmp_path / "r", *events, (kind, {}))
    all_of(run)
    for each in (*examine(run).findings, *examine(run).not_looked):
        text = getattr(each, "summary", "") + getattr(each, "why", "")
        assert "\x1b" not in text and len(text) < 1500


def test_names_are_few_and_printable(tmp_path):
    many = {"count": 99, "names": ["a\nb"] * 99}
    (found,) = upkeep_of(probed(tmp_path / "r", ("upkeep", UPKEEP | {"unused": many, "detached": NOBODY})))
    assert len(found.unused.names) == MOST_NAMES and "\n" not in found.unused.names[0]
