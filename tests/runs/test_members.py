"""A member's record: all that its entry and its outcome say, by their own names."""

from dataclasses import fields

from attnscope.runs.layout import MemberEntry
from attnscope.runs.members import MemberRecord
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
