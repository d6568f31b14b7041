"""Rules that are asked while training goes on: which ones may be believed then, and what they find at a step.

Right or silent holds for every step: a rule that speaks of what became of training in the end is not asked before, and one
that may take a passing state for a lasting one has to find it at two moments.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attnscope.diagnose.diagnosis import RULES, Rule
from attnscope.findings import Finding
from attnscope.runs.events import Event
from attnscope.runs.found_live import FoundLive
from attnscope.runs.reader import Run, open_run
from attnscope.signals.conditions import parse_condition
from attnscope.signals.moments import Live

# Why a rule is not asked before the end.
NOT_LIVE: Mapping[str, str] = {
    "updates_round_away": "how large the largest learning rate is shows at the end of the schedule",
    "learning_rate_too_low": "how far all updates go together shows at the end of training",
    "clipping_always_on": "whether it is always on shows at the end of training",
    "updates_skipped": "no step is done while updates are skipped",
    "plateau": "whether the loss leaves it shows at the end of training",
    "stalled": "it is about the end of training",
    "failed": "it is about the end of training",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class When:
    """When a rule may be believed before the end.

    Attributes:
        twice: only where it found the same at the moment before, but for members that diverged, of which no more is looked at.
        errors_only: its warnings are about how training ends.
        wait: steps after what it found, but for errors.
        is_asked: whether it is where nobody names it: what only makes notes is not.
    """

    twice: bool = False
    errors_only: bool = False
    wait: int = 0
    is_asked: bool = True


AT_ONCE = When()  # it speaks of what has happened, or was there from the start
LASTING = When(twice=True)
NOTE = When(is_asked=False)

WHEN: Mapping[str, When] = {
    "wrong_softmax_axis": AT_ONCE,
    "attention_over_batch": AT_ONCE,
    "norm_over_one_feature": AT_ONCE,
    "keys_repeated": AT_ONCE,
    "future_visible": AT_ONCE,
    "labels_shifted_wrong": AT_ONCE,
    "rows_fully_masked": AT_ONCE,
    "padding_attended": AT_ONCE,
    "parameters_without_optimizer": AT_ONCE,
    "parameters_without_gradient": AT_ONCE,
    "parameters_frozen": AT_ONCE,
    "gradients_accumulate": AT_ONCE,
    "evaluation_in_training": AT_ONCE,
    "evaluation_scales_otherwise": AT_ONCE,
    "clipped_before_unscaling": AT_ONCE,
    "clipped_after_step": LASTING,
    "dropout_in_evaluation": AT_ONCE,
    "residual_missing": AT_ONCE,
    "repeated_batch": AT_ONCE,
    "loss_rises": LASTING,
    "applied_scale": AT_ONCE,
    "saturated_at_start": AT_ONCE,
    "first_loss_too_high": AT_ONCE,
    "half_precision_headroom": AT_ONCE,
    "loss_summed": AT_ONCE,
    "accumulation_not_divided": AT_ONCE,
    "adam_epsilon_too_large": LASTING,
    "weight_decay_too_strong": LASTING,
    "learning_rate_jump": When(wait=50),  # `schedule.RECOVERY`
    "missing_warmup": LASTING,
    "learning_rate_too_high": LASTING,
    "gradients_explode_with_depth": When(errors_only=True),
    "gradients_vanish_with_depth": LASTING,
    "logit_growth": LASTING,
    "entropy_collapse": LASTING,
    "rank_collapse": LASTING,
    "uniform_attention": LASTING,
    "starved_queries_and_keys": LASTING,
    "identical_heads": LASTING,
    "attention_sink": NOTE,
    "unusual_scale": NOTE,
    "poisoned_batch": NOTE,
    "nonfinite": AT_ONCE,
    "nonfinite_loss_passed": AT_ONCE,
    "loss_scale_collapse": AT_ONCE,
    "loss_explosion": AT_ONCE,
    "loss_spike": NOTE,
    "loss_too_low": LASTING,
}

LIVE_RULES: Mapping[str, Rule] = {rule.__name__: rule for rule in RULES if rule.__name__ in WHEN}


def live(stop_on: Sequence[str] = ()) -> Live:
    """What is looked for while training goes on, and where it stops.

    Args:
        stop_on: conditions as they were typed: nonfinite, explosion, the name of a rule, COLUMN>NUMBER.

    Raises:
        ConfigError: a condition cannot be understood, or the rule is in NOT_LIVE.
    """
    conditions = tuple(parse_condition(text, LIVE_RULES, NOT_LIVE) for text in stop_on)
    return Live(ask=found_live, stop_on=conditions)


def found_live(path: Path, part: int, step: int, before: int | None, also: Collection[str] = ()) -> list[Event]:
    """What rules find in what a part has recorded up to a step, of members in which they have not found it before.

    Args:
        path: of the run directory.
        part: its number.
        step: the last one to look at.
        before: that of the moment before; None = there is none.
        also: rules that are asked for by name, notes included.
    """
    run = open_run(path, part=part, until=step)
    told = {(what.rule, name) for at, _, what in run.happened(FoundLive) if at < step for name in what.members}
    earlier: list[Run] = []

    def run_before() -> Run | None:
        if not earlier and before is not None:
            earlier.append(open_run(path, part=part, until=before))
        return earlier[0] if earlier else None

    number = {entry.name: entry.index for entry in run.entries}
    events = []
    for name, rule in LIVE_RULES.items():
        if not (WHEN[name].is_asked or name in also) or all((name, each) in told for each in number):
            continue
        finding = rule(run)
        if not isinstance(finding, Finding) or not _counts(finding, WHEN[name], step, named=name in also):
            continue
        new = tuple(each for each in finding.members if (name, each) not in told)
        if new and WHEN[name].twice:
            new = _lasting(run, run_before, rule, new, named=name in also)
        if new:
            what = FoundLive(
                rule=name, severity=finding.severity, title=finding.title, members=new, summary=finding.summary
            )
            events.append(Event(step=step, member=number[new[0]] if len(new) == 1 else None, what=what))
    return events


def _counts(finding: Finding, when: When, step: int, *, named: bool) -> bool:
    if finding.severity == "error":
        return True
    if when.errors_only or (finding.severity == "note" and not named):
        return False
    return step - (finding.step or 0) >= when.wait


def _lasting(
    run: Run, before: Callable[[], Run | None], rule: Rule, members: Sequence[str], *, named: bool
) -> tuple[str, ...]:
    """Those in which it was found at the moment before, too, or that diverged since."""
    diverged = {record.name for record in run.members if record.diverged_at is not None}
    if diverged.issuperset(members):
        return tuple(members)
    earlier = before()
    said = None if earlier is None else rule(earlier)
    is_finding = isinstance(said, Finding) and (named or said.severity != "note")
    lasting = diverged.union(said.members if isinstance(said, Finding) and is_finding else ())
    return tuple(each for each in members if each in lasting)
