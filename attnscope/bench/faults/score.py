"""How often the rules were right.

Of each kind of fault, how often it was seen and its cause named first; of healthy programs, how often something was said.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from attnscope.bench.faults.kinds import FAULTS
from attnscope.bench.faults.population import HEALTHY, REPORTED, Done, worth
from attnscope.diagnose import examine
from attnscope.findings import Finding
from attnscope.runs.reader import open_run

TWIN = "twin"
NOISE = 3.0  # standard deviations between seeds, from which on a loss is worse than its twin's
LEAST = 0.02  # nats: less is no harm however alike the seeds are


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was said of one program.

    Attributes:
        done: the program.
        is_harmful: it diverged, its held-out loss is worse than its twin's, or the fault is structural.
        rules: errors and warnings, in the order in which they are told.
        first_cause: the first that is a cause, or a note, if there is nothing else.
        step: of it.
        errors: how many.
        warnings: how many.
    """

    done: Done
    is_harmful: bool
    rules: tuple[str, ...]
    first_cause: str | None
    step: int | None
    errors: int
    warnings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KindScore:
    """Of one kind of fault, over the programs in which it did harm.

    Attributes:
        fault: its name.
        programs: in which it did.
        harmless: in which it did not.
        detected: share in which an error or a warning was found.
        named: share in which the first cause is right.
        step: median of the steps from which on the right cause shows; None = none does.
        instead: first causes that are wrong, the most frequent first.
    """

    fault: str
    programs: int
    harmless: int
    detected: float
    named: float
    step: float | None
    instead: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Of one half of a population.

    Attributes:
        half: which.
        kinds: of faults.
        detected: share of harmful programs in which an error or a warning was found.
        named: share of harmful programs whose first cause is right.
        healthy: programs without a fault that trained.
        errors_per_healthy: findings of severity error.
        warnings_per_healthy: of severity warning.
        said_of_healthy: rules that said so, and how often.
        confidence: rule to the share of its errors and warnings in programs with a fault for which it is right, or that are
            symptoms of one, among all of its errors and warnings, healthy programs included; None = it said nothing.
    """

    half: str
    kinds: tuple[KindScore, ...]
    detected: float
    named: float
    healthy: int
    errors_per_healthy: float
    warnings_per_healthy: float
    said_of_healthy: dict[str, int]
    confidence: dict[str, float]


def answers(population: Sequence[Done], folder: Path) -> list[Answer]:
    """Ask every rule of every program; those without a fault that did not train are left out."""
    twins: dict[tuple[str, int], float] = {(d.base, d.seed): worth(d) for d in population if d.fault == TWIN}
    noise = {base: _noise(base, population) for base in {done.base for done in population}}
    structural = {fault.name for fault in FAULTS if fault.is_structural}
    answered = []
    for done in population:
        is_worse = worth(done) > twins.get((done.base, done.seed), math.inf) + noise[done.base]
        if done.fault in (TWIN, HEALTHY):
            if done.error is None and math.isfinite(worth(done)):
                answered.append(_answer(done, folder, is_harmful=False))
        else:
            answered.append(_answer(done, folder, is_harmful=is_worse or done.fault in structural))
    return answered


def score(said: Sequence[Answer], half: str = REPORTED) -> Score:
    """Of one half."""
    mine = [answer for answer in said if answer.done.half == half]
    healthy = [answer for answer in mine if answer.done.fault in (TWIN, HEALTHY)]
    harmful = [answer for answer in mine if answer.is_harmful]
    false: dict[str, int] = {}
    for answer in healthy:
        for rule in answer.rules:
            false[rule] = false.get(rule, 0) + 1
    return Score(
        half=half,
        kinds=tuple(_of_kind(fault.name, fault.right, mine) for fault in FAULTS),
        detected=_share(bool(answer.rules) for answer in harmful),
        named=_share(_is_right(answer) for answer in harmful),
        healthy=len(healthy),
        errors_per_healthy=sum(answer.errors for answer in healthy) / max(1, len(healthy)),
        warnings_per_healthy=sum(answer.warnings for answer in healthy) / max(1, len(healthy)),
        said_of_healthy=dict(sorted(false.items(), key=lambda item: -item[1])),
        confidence=_confidence(harmful, healthy),
    )


def _noise(base: str, population: Sequence[Done]) -> float:
    """By how much seeds differ, as a loss that counts."""
    losses = [worth(done) for done in population if done.base == base and done.fault == TWIN]
    finite = [loss for loss in losses if math.isfinite(loss)]
    return max(LEAST, NOISE * statistics.stdev(finite)) if len(finite) > 1 else 10 * LEAST


def _answer(done: Done, folder: Path, *, is_harmful: bool) -> Answer:
    findings = examine(open_run(folder / done.case)).findings
    told = [finding for finding in findings if finding.severity != "note"]
    causes = [finding for finding in findings if finding.kind == "cause"]
    first: Finding | None = causes[0] if causes else None
    return Answer(
        done=done,
        is_harmful=is_harmful,
        rules=tuple(finding.rule for finding in told),
        first_cause=None if first is None else first.rule,
        step=None if first is None else first.step,
        errors=sum(finding.severity == "error" for finding in told),
        warnings=sum(finding.severity == "warning" for finding in told),
    )


def _of_kind(fault: str, right: tuple[str, ...], mine: Sequence[Answer]) -> KindScore:
    programs = [answer for answer in mine if answer.done.fault == fault and answer.is_harmful]
    named = [answer for answer in programs if answer.first_cause in right]
    steps = [answer.step for answer in named if answer.step is not None]
    wrong = [answer.first_cause for answer in programs if answer.first_cause not in (None, *right)]
    return KindScore(
        fault=fault,
        programs=len(programs),
        harmless=sum(answer.done.fault == fault and not answer.is_harmful for answer in mine),
        detected=_share(bool(answer.rules) for answer in programs),
        named=_share(answer in named for answer in programs),
        step=statistics.median(steps) if steps else None,
        instead=tuple(sorted({rule for rule in wrong if rule}, key=lambda rule: -wrong.count(rule))),
    )


def _is_right(answer: Answer) -> bool:
    return any(answer.done.fault == fault.name and answer.first_cause in fault.right for fault in FAULTS)


def _confidence(harmful: Sequence[Answer], healthy: Sequence[Answer]) -> dict[str, float]:
    right = {fault.name: fault.right for fault in FAULTS}
    causes = {rule for rules in right.values() for rule in rules}
    said: dict[str, list[bool]] = {}
    for answer in (*harmful, *healthy):
        for rule in answer.rules:
            is_right = answer.is_harmful and (rule in right[answer.done.fault] or rule not in causes)
            said.setdefault(rule, []).append(is_right)
    return {rule: sum(hits) / len(hits) for rule, hits in sorted(said.items())}


def _share(hits: Iterable[bool]) -> float:
    values = list(hits)
    return sum(values) / len(values) if values else math.nan
