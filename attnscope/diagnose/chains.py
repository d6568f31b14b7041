"""Which finding explains which: causes first, then what they led to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from attnscope.findings import SEVERITIES, Finding


def linked(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Each with the rules that it does explain here, in the order in which they are told.

    A finding explains another that its rule may explain, in a member that both concern, if it did not begin after it; at one
    step the first in the given order explains.
    Causes come before symptoms, the worst first, what nothing explains before what something does; notes come last. A finding is
    as bad as the worst that it explains: what training came to is often measured further down the chain.
    """
    places = {finding.rule: place for place, finding in enumerate(findings)}
    found = [
        replace(finding, explains=tuple(other.rule for other in findings if _explains(finding, other, places)))
        for finding in findings
    ]
    explained = {rule for finding in found for rule in finding.explains}
    by_rule = {finding.rule: finding for finding in found}
    ranks: dict[str, int] = {}

    def rank(finding: Finding) -> int:
        """Place in SEVERITIES of the worst among it and what it leads to."""
        if finding.rule not in ranks:
            led_to = [rank(by_rule[rule]) for rule in finding.explains]
            ranks[finding.rule] = min([SEVERITIES.index(finding.severity), *led_to])
        return ranks[finding.rule]

    def order(finding: Finding) -> tuple[bool, bool, int, bool, int]:
        return (
            finding.severity == "note",
            finding.kind == "symptom",
            rank(finding),
            finding.rule in explained,
            SEVERITIES.index(finding.severity),
        )

    return tuple(sorted(found, key=order))


def chains(findings: Sequence[Finding]) -> tuple[tuple[Finding, ...], ...]:
    """The longest way from each finding that nothing explains to what it explains in the end; of `linked` ones."""
    by_rule = {finding.rule: finding for finding in findings}
    explained = {rule for finding in findings for rule in finding.explains}
    longest: dict[str, tuple[Finding, ...]] = {}

    def way_from(finding: Finding) -> tuple[Finding, ...]:
        if finding.rule not in longest:
            ways = [way_from(by_rule[rule]) for rule in finding.explains]
            longest[finding.rule] = (finding, *max(ways, key=len, default=()))
        return longest[finding.rule]

    ways = [way_from(finding) for finding in findings if finding.rule not in explained]
    return tuple(way for way in ways if len(way) > 1)


def _explains(finding: Finding, other: Finding, places: Mapping[str, int]) -> bool:
    return (
        other.rule in finding.explains
        and not set(finding.members).isdisjoint(other.members)
        and _begins(finding, places) < _begins(other, places)
    )


def _begins(finding: Finding, places: Mapping[str, int]) -> tuple[float, int]:
    """By which no two findings explain each other; what has no step was there at first, or is how training ended."""
    never = math.inf if finding.kind == "symptom" else -math.inf
    return never if finding.step is None else finding.step, places[finding.rule]
