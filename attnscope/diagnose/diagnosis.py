"""Every rule, causes before risks before symptoms, and the one function that asks them all."""

from collections.abc import Callable, Sequence

from attnscope.diagnose.rules.clipping import clipping_always_on
from attnscope.diagnose.rules.loss import failed, loss_explosion, loss_spike, stalled
from attnscope.diagnose.rules.nonfinite import nonfinite, nonfinite_loss_passed, updates_skipped
from attnscope.diagnose.rules.saturation import saturated_at_start
from attnscope.diagnose.rules.scale import applied_scale, unusual_scale
from attnscope.findings import Finding, to_table
from attnscope.runs.layout import to_json
from attnscope.runs.reader import Run

Rule = Callable[[Run], Finding | None]

RULES: tuple[Rule, ...] = (
    applied_scale,
    saturated_at_start,
    clipping_always_on,
    unusual_scale,
    nonfinite,
    nonfinite_loss_passed,
    updates_skipped,
    loss_explosion,
    loss_spike,
    stalled,
    failed,
)


def diagnose(run: Run) -> tuple[Finding, ...]:
    """What every rule finds in a run, causes first; one that is still training is judged by what it has recorded."""
    return tuple(finding for rule in RULES if (finding := rule(run)) is not None)


def findings_json(run: Run, findings: Sequence[Finding]) -> str:
    """What was looked for and what was found, for machines."""
    said = {
        "run": run.name,
        "status": run.status,
        "members": [
            {"name": each.name, "status": each.status, "error": each.error} for each in run.members
        ],
        "rules": [rule.__name__ for rule in RULES],
        "findings": [to_table(finding) for finding in findings],
        "lost": run.lost,
    }
    return to_json(said, indent=1)
