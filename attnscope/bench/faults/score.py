"""How often the rules were right.

Of each kind of fault, how often it was seen and its cause told first; of healthy programs, how often something was said; of each
rule, how much of what it said was right.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from attnscope.bench.faults.answered import Answered, Said
from attnscope.bench.faults.kinds import FAULTS, Fault
from attnscope.bench.faults.lead import LeadTable, lead_table
from attnscope.bench.faults.population import HEALTHY, REPORTED, TWIN, Done, worth
from attnscope.findings import Confidence

NOISE = 3.0  # standard deviations between seeds, from which on a loss is worse than its twin's
LEAST = 0.02  # nats: less is no harm however alike the seeds are


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was said of one program.

    Attributes:
        answered: the program and what was said.
        is_harmful: it died or diverged, its held-out loss is worse than its twin's, or the fault is structural.
        is_worse: harm of it was measured.
    """

    answered: Answered
    is_harmful: bool
    is_worse: bool = True

    @property
    def done(self) -> Done:
        return self.answered.done

    @property
    def is_healthy(self) -> bool:
        return self.done.fault in (TWIN, HEALTHY)

    @property
    def told(self) -> tuple[Said, ...]:
        """Errors and warnings, in the order in which they are told."""
        return tuple(said for said in self.answered.findings if said.severity != "note")

    @property
    def first(self) -> Said | None:
        """What is told first; a note if there is nothing else."""
        return self.answered.findings[0] if self.answered.findings else None

    def counted(self, severity: str) -> int:
        """Findings of a severity."""
        return sum(said.severity == severity for said in self.answered.findings)


@dataclass(frozen=True, slots=True, kw_only=True)
class KindScore:
    """Of one kind of fault, over the programs in which it did harm.

    Attributes:
        fault: its name.
        programs: in which it did.
        harmless: in which it did not.
        detected: share in which an error or a warning was found, or, where nothing measured is the worse for it, a note that names it.
        named: share in which what is told first is right.
        layer: share of these in which the first layer named is one that the fault is in; None = it is in all, or is not named.
        step: median of the steps from which on what is told first, and right, shows; None = none has a step.
        instead: what is told first and wrong, the most frequent first.
    """

    fault: str
    programs: int
    harmless: int
    detected: float
    named: float
    layer: float | None
    step: float | None
    instead: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Of one half of a population.

    Attributes:
        half: which.
        kinds: of faults.
        harmful: programs with a fault that did harm.
        detected: share of them in which an error or a warning was found, or, where nothing measured is the worse for it, a note that
            names it: more would be said than is known.
        named: share of them in which what is told first is right.
        healthy: programs without a fault that trained.
        errors_per_healthy: findings of severity error.
        warnings_per_healthy: of severity warning.
        notes_per_healthy: of severity note.
        said_of_healthy: rules whose errors and warnings these are, and how many.
        confidence: of each rule, over programs with a fault that did harm and healthy ones; without rules that said nothing.
        leads: how long before the loss each signal knew.
        problems: programs that nothing could be asked of, and why.
    """

    half: str
    kinds: tuple[KindScore, ...]
    harmful: int
    detected: float
    named: float
    healthy: int
    errors_per_healthy: float
    warnings_per_healthy: float
    notes_per_healthy: float
    said_of_healthy: dict[str, int]
    confidence: dict[str, Confidence]
    leads: LeadTable | None
    problems: tuple[str, ...]


def answers(population: Sequence[Answered]) -> list[Answer]:
    """Which programs were harmed; those without a fault that did not train are left out."""
    done = [each.done for each in population]
    twins: dict[tuple[str, int], float] = {(d.base, d.seed): worth(d) for d in done if d.fault == TWIN}
    noise = {base: _noise(base, done) for base in {each.base for each in done}}
    structural = {fault.name for fault in FAULTS if fault.is_structural}
    judged = []
    for each in population:
        mine = each.done
        is_worse = worth(mine) > twins.get((mine.base, mine.seed), math.inf) + noise[mine.base]
        if mine.fault in (TWIN, HEALTHY):
            if mine.error is None and math.isfinite(worth(mine)):
                judged.append(Answer(answered=each, is_harmful=False))
        else:
            is_broken = mine.error is not None or math.isinf(worth(mine)) or each.diverged_at is not None
            is_harmful = is_broken or is_worse or mine.fault in structural
            judged.append(Answer(answered=each, is_harmful=is_harmful, is_worse=is_broken or is_worse))
    return judged


def score(said: Sequence[Answer], half: str = REPORTED) -> Score:
    """Of one half; the other sets the thresholds of signals."""
    mine = [answer for answer in said if answer.done.half == half]
    other = [answer for answer in said if answer.done.half != half]
    healthy = [answer for answer in mine if answer.is_healthy]
    harmful = [answer for answer in mine if answer.is_harmful]
    false = Counter(each.rule for answer in healthy for each in answer.told)
    return Score(
        half=half,
        kinds=tuple(_of_kind(fault, mine) for fault in FAULTS),
        harmful=len(harmful),
        detected=_share(_is_seen(answer) for answer in harmful),
        named=_share(_is_right(answer) for answer in harmful),
        healthy=len(healthy),
        errors_per_healthy=_per_program(healthy, "error"),
        warnings_per_healthy=_per_program(healthy, "warning"),
        notes_per_healthy=_per_program(healthy, "note"),
        said_of_healthy=dict(false.most_common()),
        confidence=_confidence([*harmful, *healthy]),
        leads=lead_table(
            tuned=[answer.answered for answer in other if answer.is_healthy or answer.is_harmful],
            reported=[answer.answered for answer in mine if answer.is_healthy or answer.is_harmful],
            is_healthy=lambda answered: answered.done.fault in (TWIN, HEALTHY),
        ),
        problems=tuple(f"{a.done.case}: {a.answered.problem}" for a in mine if a.answered.problem is not None),
    )


def layers_of(fault: Fault, strength: int) -> tuple[int, ...] | None:
    """Layers that a fault is in; None = nobody says, or it is in all.

    A kind has one set of layers, or one for each strength.
    """
    layers = getattr(fault, "layers", None)
    if layers and isinstance(layers[0], tuple):
        return tuple(layers[min(strength, len(layers) - 1)])
    return tuple(layers) if layers else None


def _noise(base: str, population: Sequence[Done]) -> float:
    """By how much seeds differ, as a loss that counts."""
    losses = [worth(done) for done in population if done.base == base and done.fault == TWIN]
    finite = [loss for loss in losses if math.isfinite(loss)]
    return max(LEAST, NOISE * statistics.stdev(finite)) if len(finite) > 1 else 10 * LEAST


def _of_kind(fault: Fault, mine: Sequence[Answer]) -> KindScore:
    programs = [answer for answer in mine if answer.done.fault == fault.name and answer.is_harmful]
    firsts = [answer.first for answer in programs if answer.first is not None]
    right = [first for first in firsts if first.rule in fault.right]
    steps = [first.step for first in right if first.step is not None]
    in_layers = [_is_right_layer(answer, fault) for answer in programs if _is_right(answer)]
    return KindScore(
        fault=fault.name,
        programs=len(programs),
        harmless=sum(answer.done.fault == fault.name and not answer.is_harmful for answer in mine),
        detected=_share(_is_seen(answer) for answer in programs),
        named=len(right) / len(programs) if programs else math.nan,
        layer=_share(each for each in in_layers if each is not None) if {True, False} & {*in_layers} else None,
        step=statistics.median(steps) if steps else None,
        instead=tuple(rule for rule, _ in Counter(f.rule for f in firsts if f.rule not in fault.right).most_common()),
    )


def _is_seen(answer: Answer) -> bool:
    names_it = any(said.rule in _right_of(answer) for said in answer.answered.findings)
    return bool(answer.told) or (names_it and not answer.is_worse)


def _is_right(answer: Answer) -> bool:
    return answer.first is not None and answer.first.rule in _right_of(answer)


def _right_of(answer: Answer) -> tuple[str, ...]:
    return next((fault.right for fault in FAULTS if fault.name == answer.done.fault), ())


def _is_right_layer(answer: Answer, fault: Fault) -> bool | None:
    layers = layers_of(fault, answer.done.strength)
    if layers is None or answer.first is None or not answer.first.layers:
        return None
    return answer.first.layers[0] in layers


def _confidence(counted: Sequence[Answer]) -> dict[str, Confidence]:
    said: dict[str, list[bool]] = {}
    for answer in counted:
        right = _right_in(answer)
        for each in answer.told:
            said.setdefault(each.rule, []).append(each.rule in right)
    return {rule: Confidence(right=sum(hits), said=len(hits)) for rule, hits in sorted(said.items())}


def _right_in(answer: Answer) -> set[str]:
    """What is right of a program that was harmed: its fault, whatever that explains, and every symptom; of a healthy one nothing."""
    if not answer.is_harmful:
        return set()
    explains = {each.rule: each.explains for each in answer.answered.findings}
    right = {each.rule for each in answer.answered.findings if each.kind == "symptom"} | set(_right_of(answer))
    left = [rule for rule in _right_of(answer) if rule in explains]
    while left:
        for rule in explains.get(left.pop(), ()):
            if rule not in right:
                right.add(rule)
                left.append(rule)
    return right


def _per_program(answered: Sequence[Answer], severity: str) -> float:
    return sum(answer.counted(severity) for answer in answered) / max(1, len(answered))


def _share(hits: Iterable[bool]) -> float:
    values = list(hits)
    return sum(values) / len(values) if values else math.nan
