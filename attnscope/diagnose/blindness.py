"""Why a rule could not look: what a member did not record, in the words of whoever recorded it.

A rule that finds nothing where it looked answers None; here is what it answers where there was nothing to look at.
"""

from collections.abc import Mapping
from dataclasses import replace

from attnscope.findings import Finding, NotLooked
from attnscope.runs.by_member import configs_of, members_of_rows
from attnscope.runs.events import INTERNAL, LossNotSeen, NotRecorded
from attnscope.runs.foreign import printable
from attnscope.runs.reader import Run
from attnscope.runs.watched import not_measured, optimizers_of

NO_STEP = "no step was recorded"
NO_LOSS = "no loss was seen"
NO_ATTENTION = "no attention was measured"
NO_RATIO = "entropy_ratio is not a number at the first step measured"
NO_OPTIMIZER = "the optimizer was not seen"
NO_CONFIG = "the config cannot be understood"

MOST_REASON = 160  # characters

Blind = Mapping[str, str]  # member to why


def answer(run: Run, rule: str, finding: Finding | None, blind: Blind) -> Finding | NotLooked | None:
    """What a rule answers: what it found, and of the members of which it found nothing, where it could not look."""
    found = () if finding is None else finding.members
    names: dict[str, list[str]] = {}
    for entry in run.entries:
        if entry.name in blind and entry.name not in found:
            names.setdefault(blind[entry.name], []).append(entry.name)
    answers = [
        NotLooked(rule=rule, why=why, members=() if len(each) == len(run.entries) else tuple(each))
        for why, each in names.items()
    ]
    if finding is not None:
        return replace(finding, also=tuple(answers)) if answers else finding
    return replace(answers[0], also=tuple(answers[1:])) if answers else None


def without_steps(run: Run) -> dict[str, str]:
    """Members of which no step was recorded."""
    return {record.name: NO_STEP for record in run.members if record.last_step is None}


def without_loss(run: Run) -> dict[str, str]:
    """Members of which no step was recorded, or, of a watched script, no loss seen."""
    said: dict[str, str] = {}
    for _, member, missing in run.happened(LossNotSeen):
        said.setdefault(member or "", printable(missing.why, MOST_REASON))
    for _, member, empty in run.happened(NotRecorded):
        if "loss" in empty.why_empty:
            said.setdefault(member or "", printable(empty.why_empty["loss"], MOST_REASON))
    return {
        record.name: NO_LOSS + (f": {said[record.name]}" if record.name in said else "")
        for record in run.members
        if record.first_loss is None
    } | without_steps(run)


def without_attention(run: Run) -> dict[str, str]:
    """Members without a row of attention."""
    measured = set(members_of_rows(run.heads).tolist())
    failed = [each for each in not_measured(run) if each.backend != INTERNAL]
    why = NO_ATTENTION
    if failed:
        first = failed[0]
        more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        why += printable(f": {first.name} ({first.backend}): {first.reason}", MOST_REASON) + more
    empty = without_steps(run)
    return {entry.name: empty.get(entry.name, why) for m, entry in enumerate(run.entries) if m not in measured}


def without_optimizer(run: Run) -> dict[str, str]:
    """Members of a watched script whose optimizer was not seen, or of a run whose config does not tell it."""
    if run.kind == "watch":
        seen = optimizers_of(run)
        return {entry.name: NO_OPTIMIZER for entry in run.entries if entry.name not in seen}
    return without_config(run)


def without_config(run: Run) -> dict[str, str]:
    """Members of a run of this lab whose settings cannot be understood; a watched script has none."""
    if run.kind == "watch":
        return {}
    configs = configs_of(run)
    return {e.name: NO_CONFIG for e, config in zip(run.entries, configs, strict=True) if not config}
