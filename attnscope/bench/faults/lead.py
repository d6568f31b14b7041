"""How long before the loss each signal knew: at thresholds that healthy programs pass, steps from its first firing to divergence.

A threshold lies where a given share of the healthy programs of one half of the population (the tuned one) fire, at most FALSE_ALARMS;
with few of them above the worst of all. Firings are told of the other half, with the false alarms that it really has. Whether a
threshold is set on a value as it is or on how many times its first one it is, is settled on the tuned half, too.

Shape key: R runs, N samples.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnscope.bench.faults.answered import Answered
from attnscope.bench.faults.traces import SIGNALS, Family, Form, scores

FALSE_ALARMS = 0.01  # of healthy programs, that are asked for
GRADUAL_FROM = 20  # steps: what diverges before has no room for a lead of 10
SUDDEN = ("learning rate jumps", "one batch poisoned")  # nothing can know before it happens
NORMS = ("pre", "post", "none")
SAMPLES = 2000  # of the bootstrap
COVERAGE = 95  # % of its intervals

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """Over runs that diverged.

    Attributes:
        runs: how many have the signal.
        median: steps from its first firing to divergence; a run in which it does not fire before counts as 0.
        low: of the median, COVERAGE % interval over runs.
        high: of it.
        fired: share of runs in which it fired, no later than the loss diverged.
    """

    runs: int
    median: float
    low: float
    high: float
    fired: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalLead:
    """Of one signal.

    Attributes:
        signal: its column or score.
        family: loss or attention.
        is_low_bad: it fires below its threshold.
        form: of its threshold.
        threshold: beyond which it fires.
        every: over all runs that diverged.
        gradual: over those that did so at GRADUAL_FROM or later, of no SUDDEN fault.
        false_alarms: healthy programs in which it fired.
        healthy: that have the signal.
        auroc: that its worst value before the end, in this form, is worse in a run that diverged than in a healthy one.
    """

    signal: str
    family: Family
    is_low_bad: bool
    form: Form
    threshold: float
    every: Lead
    gradual: Lead
    false_alarms: int
    healthy: int
    auroc: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LeadTable:
    """Of all signals.

    Attributes:
        signals: that were measured, those of the loss first.
        diverged: runs of the reported half.
        gradual: those of them that did so gradually.
        tuned_healthy: programs that set the thresholds.
        expected: share of other healthy programs that fires as a rule, where so many set a threshold.
        no_norm: AUROC for divergence of knowing whether the model has norms, and nothing else.
        best: attention signal with the longest mean lead on the tuned half's gradual divergences (of all, where it has none).
    """

    signals: tuple[SignalLead, ...]
    diverged: int
    gradual: int
    tuned_healthy: int
    expected: float
    no_norm: float
    best: str | None

    def of(self, signal: str | None) -> SignalLead | None:
        """The row of a signal; None if it has none."""
        return next((each for each in self.signals if each.signal == signal), None)


def lead_table(
    *, tuned: Sequence[Answered], reported: Sequence[Answered], is_healthy: Callable[[Answered], bool]
) -> LeadTable | None:
    """The table; None where a half has no healthy program, or no run diverged.

    Args:
        tuned: programs that thresholds are set on: healthy ones, and those with a fault.
        reported: programs that are told of, likewise.
        is_healthy: which.
    """
    calm = [each for each in tuned if is_healthy(each) and each.diverged_at is None]
    quiet = [each for each in reported if is_healthy(each) and each.diverged_at is None]
    to_tune = [each for each in tuned if each.diverged_at is not None]
    diverged = [each for each in reported if each.diverged_at is not None]
    if not calm or not quiet or not diverged:
        return None
    to_tune = [each for each in to_tune if _is_gradual(each)] or to_tune
    rows, promise = [], {}
    for name, signal in SIGNALS.items():
        forms = [(form, _threshold(name, form, calm)) for form in signal.forms]
        chosen = [(form, limit) for form, limit in forms if limit is not None]
        if not chosen or not any(name in each.traces for each in diverged):
            continue
        form, limit = max(chosen, key=lambda each: _mean(_leads(name, each[0], each[1], to_tune)))
        promise[name] = _mean(_leads(name, form, limit, to_tune))
        worst = [_worst(each, name, form) for each in quiet if name in each.traces]
        rows.append(
            SignalLead(
                signal=name,
                family=signal.family,
                is_low_bad=signal.is_low_bad,
                form=form,
                threshold=-limit if signal.is_low_bad else limit,
                every=_lead(_leads(name, form, limit, diverged)),
                gradual=_lead(_leads(name, form, limit, [each for each in diverged if _is_gradual(each)])),
                false_alarms=sum(value > limit for value in worst),
                healthy=len(worst),
                auroc=auroc([_worst(each, name, form) for each in diverged if name in each.traces], worst),
            )
        )
    attention = [row.signal for row in rows if row.family == "attention"]
    return LeadTable(
        signals=tuple(rows),
        diverged=len(diverged),
        gradual=sum(map(_is_gradual, diverged)),
        tuned_healthy=len(calm),
        expected=(_passed_over(len(calm)) + 1) / (len(calm) + 1),
        no_norm=auroc(
            *([float(each.norm == "none") for each in group if each.norm in NORMS] for group in (diverged, quiet))
        ),
        best=max(attention, key=lambda name: promise[name], default=None) if to_tune else None,
    )


def first_firing(answered: Answered, name: str, form: Form, limit: float) -> int | None:
    """The step at which a signal is first beyond a limit; None = never, or not measured."""
    trace = answered.traces.get(name)
    if trace is None:
        return None
    beyond = (value > limit for value in scores(trace, SIGNALS[name], form))
    return next((step for step, fires in zip(trace.steps, beyond, strict=True) if fires), None)


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Chance that one of the first is larger than one of the second, ties half; NaN without both."""
    if not len(positive) or not len(negative):
        return math.nan
    first, second = np.array(positive)[:, None], np.array(negative)[None, :]
    return float(((first > second) + 0.5 * (first == second)).mean())


def _is_gradual(answered: Answered) -> bool:
    at = answered.diverged_at
    return at is not None and at >= GRADUAL_FROM and answered.done.fault not in SUDDEN


def _threshold(name: str, form: Form, calm: Sequence[Answered]) -> float | None:
    """The score that no more than FALSE_ALARMS of healthy programs exceed; None where too few have one."""
    worst = sorted((_worst(each, name, form) for each in calm if name in each.traces), reverse=True)
    limit = worst[_passed_over(len(worst))] if worst else math.inf
    return limit if math.isfinite(limit) else None


def _passed_over(healthy: int) -> int:
    """How many of them may be beyond a threshold."""
    return int(FALSE_ALARMS * healthy)


def _worst(answered: Answered, name: str, form: Form) -> float:
    """The last of a trace is the worst; what has no first value to compare with is never beyond anything."""
    value = scores(answered.traces[name], SIGNALS[name], form)[-1]
    return -math.inf if math.isnan(value) else value


def _leads(name: str, form: Form, limit: float, diverged: Sequence[Answered]) -> list[float]:
    """Steps before divergence, of each run that has the signal; NaN where it does not fire."""
    leads = []
    for answered in diverged:
        if name in answered.traces:
            step = first_firing(answered, name, form, limit)
            late = step is None or answered.diverged_at is None or step > answered.diverged_at
            leads.append(math.nan if late or step is None else float((answered.diverged_at or 0) - step))
    return leads


def _mean(leads: Sequence[float]) -> float:
    return statistics.fmean(0.0 if math.isnan(lead) else lead for lead in leads) if leads else 0.0


def _lead(leads: Sequence[float]) -> Lead:
    if not leads:
        return Lead(runs=0, median=math.nan, low=math.nan, high=math.nan, fired=math.nan)
    lead_R = np.array(leads)
    fired_R = ~np.isnan(lead_R)
    lead_R = np.where(fired_R, lead_R, 0.0)
    low, high = _interval(lead_R)
    return Lead(runs=len(leads), median=float(np.median(lead_R)), low=low, high=high, fired=float(fired_R.mean()))


def _interval(lead_R: _Floats) -> tuple[float, float]:
    """Percentile bootstrap of the median, over runs; the same each time."""
    draw = np.random.default_rng(0)
    median_N = np.median(lead_R[draw.integers(0, len(lead_R), (SAMPLES, len(lead_R)))], axis=1)
    rest = (100 - COVERAGE) / 2
    low, high = np.percentile(median_N, [rest, 100 - rest])
    return float(low), float(high)
