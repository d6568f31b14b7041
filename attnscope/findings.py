"""What a rule says: one finding for all members that it concerns, with numbers to check it by, or that it could not look."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

Kind = Literal["cause", "symptom"]
Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")  # the worst first
_T = TypeVar("_T")

MOST_EVIDENCE = 5
MOST_NAMED = 3  # members that a sentence names one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One number behind a finding, and where it stands in the run; None where something does not apply.

    Attributes:
        member: its name.
        step: optimizer updates already done.
        layer: counted from 0.
        head: counted from 0.
        group: parameter group.
        quantity: the column of a table or the setting it was read from, `events` for what stands only there.
        value: what was measured or applied.
        threshold: what it was compared with.
    """

    member: str
    step: int | None = None
    layer: int | None = None
    head: int | None = None
    group: str | None = None
    quantity: str
    value: float | None = None
    threshold: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NotLooked:
    """A rule that could not look, which is not the same as one that found nothing.

    Attributes:
        rule: its name.
        why: in words, without the members.
        members: at which it could not, in the order of run.json; none = at all.
        also: at others it could not for another reason.
    """

    rule: str
    why: str
    members: tuple[str, ...] = ()
    also: "tuple[NotLooked, ...]" = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """How often what a rule says was right in `attnscope bench faults`.

    Attributes:
        right: errors and warnings that named the fault, followed from it, or were a symptom of it.
        said: all of its errors and warnings, on programs with a fault that did harm and on healthy ones.
    """

    right: int
    said: int

    @property
    def share(self) -> float:
        """Of what it said, what was right."""
        return self.right / self.said


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one rule found in a run.

    Attributes:
        rule: name of the rule.
        title: a few words.
        kind: a cause is a setting or a state that training starts from or gets into; a symptom is what became of training.
        severity: an error broke training or made what it learned worthless, a warning did harm that was measured, or does as a
            rule; a note is odd, may be on purpose, and no harm of it was measured.
        summary: one or two sentences with the measured numbers.
        members: all that it concerns, in the order of run.json.
        evidence: at most MOST_EVIDENCE, the worst first.
        evidence_left_out: how many more there are.
        remedy: what to try.
        source: the paper or the measurement behind the threshold.
        step: at which it shows first, in the member where it is worst; None = it is no matter of steps.
        explains: rules whose findings it is a reason for, if they were found in its members and not before it; of what `examine`
            answers, those that were.
        also: where the rule could not look.
        confidence: how often its rule was right; None = not measured. Rules leave it to `examine`.
    """

    rule: str
    title: str
    kind: Kind
    severity: Severity
    summary: str
    members: tuple[str, ...]
    evidence: tuple[Evidence, ...]
    evidence_left_out: int
    remedy: str
    source: str
    step: int | None = None
    explains: tuple[str, ...] = ()
    also: tuple[NotLooked, ...] = ()
    confidence: Confidence | None = None


def worst_first(
    items: Iterable[_T],
    evidence: Callable[[_T], Evidence],
    *,
    order: Callable[[_T], Any] | None = None,
) -> tuple[tuple[Evidence, ...], int]:
    """The evidence of a finding, and how much more there is.

    Args:
        items: that it is made of, one piece each.
        evidence: makes it; asked only for what is shown.
        order: smallest is worst; what is alike stays in order. None = they are in order.
    """
    ordered = list(items) if order is None else sorted(items, key=order)
    shown = tuple(evidence(item) for item in ordered[:MOST_EVIDENCE])
    return shown, len(ordered) - len(shown)


def label(finding: Finding) -> str:
    """What kind of finding it is, before its title: "cause (error)", or "note"."""
    return "note" if finding.severity == "note" else f"{finding.kind} ({finding.severity})"


def confidence_in_words(confidence: Confidence | None) -> str:
    """A line without its full stop."""
    if confidence is None:
        return "Confidence: not measured"
    return f"Confidence: {confidence.share:.2f} ({confidence.right} of {confidence.said} in bench faults)"


def chain_in_words(chain: Sequence[Finding]) -> str:
    """From what became of training back to what it came from."""
    return " ← ".join(
        finding.title + ("" if finding.step is None else f" (step {finding.step})") for finding in reversed(chain)
    )


def to_table(said: Finding | NotLooked) -> dict[str, object]:
    """As JSON has it, without `also`; numbers that are not finite are left to `attnscope.runs.layout.to_json`."""
    table = asdict(said)
    del table["also"]
    if isinstance(said, Finding) and said.confidence is not None:
        table["confidence"]["share"] = said.confidence.share
    return table


def in_words(not_looked: Iterable[NotLooked]) -> tuple[str, ...]:
    """A line for each reason and the members it holds for, with the rules that could not look."""
    rules: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for each in not_looked:
        rules.setdefault((each.why, each.members), []).append(each.rule)
    return tuple(
        f"{', '.join(names)}: {why}{f' (of {named(members)})' if members else ''}"
        for (why, members), names in rules.items()
    )


def evidence_columns(evidence: Sequence[Evidence]) -> dict[str, tuple[str, ...]]:
    """Title to texts, one per piece of evidence, without places in which nothing applies."""
    places = ("step", "layer", "head", "group")
    columns: dict[str, list[object]] = {"member": [each.member for each in evidence]}
    for place in places:
        found = [getattr(each, place) for each in evidence]
        if any(value is not None for value in found):
            columns[place] = found
    columns["quantity"] = [each.quantity for each in evidence]
    columns["value"] = [each.value for each in evidence]
    columns["compared with"] = [each.threshold for each in evidence]
    return {title: tuple(map(_shown, values)) for title, values in columns.items()}


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def named(members: Sequence[str]) -> str:
    """Names for a sentence: "a", "a, b and c", or "a, b, c and 497 more"."""
    if len(members) > MOST_NAMED:
        return f"{', '.join(members[:MOST_NAMED])} and {len(members) - MOST_NAMED} more"
    *most, last = members
    return f"{', '.join(most)} and {last}" if most else last


def of_several(members: Sequence[str], what: str) -> str:
    """A sentence that begins with the names, and a space; nothing for one member, of which the next sentence speaks."""
    return f"{named(members)} {what}. " if len(members) > 1 else ""
