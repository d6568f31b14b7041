"""Rows of members whose numbers are given."""

from attnscope.comparison.member import MemberRow, Softmax
from attnscope.runs.layout import MemberEntry
from attnscope.runs.members import MemberRecord
from attnscope.runs.outcome import Outcome

NOT_MEASURED = Softmax()


def row_of(
    name="a",
    status="trained",
    *,
    step=99,
    first_loss=6.0,
    best_loss=2.0,
    final_loss=2.0,
    nonfinite_at=None,
    error=None,
    is_falling=None,
    val_loss=None,
    prefix_loss=None,
    unigram=None,
    theory_std=None,
    start=NOT_MEASURED,
    end=NOT_MEASURED,
    settings=None,
):
    """One that diverged did so at `step`; of others that is the last one."""
    outcome = Outcome(
        status=status,
        error=error,
        diverged_at=step if status == "diverged" else None,
        limit=None,
        nonfinite_at=nonfinite_at,
        first_loss=first_loss,
        best_loss=best_loss,
        final_loss=final_loss,
        last_step=step,
        is_falling=is_falling,
    )
    entry = MemberEntry(name=name, part=0, index=0, settings={})
    return MemberRow(
        record=MemberRecord(entry=entry, outcome=outcome),
        val_loss=val_loss,
        prefix_loss=prefix_loss,
        unigram=unigram,
        theory_std=theory_std,
        start=start,
        end=end,
        settings=settings or {},
    )
