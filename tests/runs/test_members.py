"""A member's record: all that its entry and its outcome say, by their own names."""

from dataclasses import fields

import numpy as np
import pandas as pd

from attnscope.runs.layout import MemberEntry
from attnscope.runs.members import MemberRecord, losses_seen
from attnscope.runs.outcome import Outcome, outcome


def test_a_record_says_all_that_its_entry_and_its_outcome_say():
    entry = MemberEntry(name="a", part=3, index=2, settings={"optimizer.lr": 1.0})
    ended = outcome(range(40), [4.0] * 40, end_status="failed", error="x", planned_steps=90, unigram=3.0)
    record = MemberRecord(entry=entry, outcome=ended)
    for said in (entry, ended):
        for field in fields(said):
            assert getattr(record, field.name) == getattr(said, field.name)
    assert not {field.name for field in fields(MemberEntry)} & {field.name for field in fields(Outcome)}
    assert (record.name, record.status, record.last_step, record.error) == ("a", "failed", 39, "x")


def test_a_loss_that_is_nan_was_seen_from_the_first_event_that_says_so_on():
    nan = np.nan
    steps = pd.DataFrame(
        {
            "step": [0, 0, 1, 1, 2, 2],
            "member": pd.Categorical.from_codes([0, 1, 0, 1, 0, 1], categories=["a", "b"]),
            "loss": [nan, nan, nan, 4.0, nan, nan],
        }
    )
    assert losses_seen(steps, [(0, 2), (0, 1)], 2).tolist() == [False, False, True, True, True, False]
