"""Every rule, causes before symptoms, and the one function that asks them all."""

from collections.abc import Callable

from attnscope.diagnose.causes import applied_scale, clipping_always_on, saturated_at_start
from attnscope.diagnose.finding import Finding
from attnscope.diagnose.symptoms import loss_explosion, loss_spike, nonfinite, stalled
from attnscope.runs.reader import Run

Rule = Callable[[Run], Finding | None]

RULES: tuple[Rule, ...] = (
    applied_scale,
    saturated_at_start,
    clipping_always_on,
    nonfinite,
    loss_explosion,
    loss_spike,
    stalled,
)


def diagnose(run: Run) -> tuple[Finding, ...]:
    """What every rule finds in a run, causes first; one that is still training is judged by what it has recorded."""
    return tuple(finding for rule in RULES if (finding := rule(run)) is not None)
