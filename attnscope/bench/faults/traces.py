"""What each signal did on the way: the worst that it had been, step by step, of which any threshold makes a first firing.

A signal has one number per measured step: of a table with layers, heads or groups the worst over them. Five look at the loss and
at gradients, as trackers do; the others look into attention. Nothing after a run's divergence counts.

Shape key: R rows of a table, S measured steps, K of them worse than all before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from attnscope.runs.by_member import members_of_rows
from attnscope.runs.parts import NEVER
from attnscope.runs.reader import Run
from attnscope.signals.spikes import LEAST_EXCESS, SIGMAS
from attnscope.signals.spikes import WINDOW as SPIKE_WINDOW

Family = Literal["loss", "attention"]
Form = Literal["as is", "of its first"]
FORMS: tuple[Form, ...] = ("as is", "of its first")

WINDOW = 30  # losses that a rolling z-score looks back at: what W&B's automations offer
FEWEST = 5  # losses before, of which a spread can be told
SLACK = 0.5  # of a CUSUM, in standard deviations: half the shift that it is to find (Page 1954)
DIGITS = 3  # of a value that is kept

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """What may give a divergence away before it is there.

    Attributes:
        family: loss (what a tracker has: loss, gradients, updates) or attention.
        is_low_bad: the smallest value is the worst.
        forms: in which a threshold may be set: on the value as it is, or on how many times its first one it is. A score that has its
            own spread as its unit has the first alone; which of both is better is settled on the tuned half.
    """

    family: Family
    is_low_bad: bool = False
    forms: tuple[Form, ...] = FORMS


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The worst that a signal had been, from its first value on.

    Attributes:
        steps: at which it became worse than ever, (K,).
        values: that it had there, (K,); the first of all is the first.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]


SIGNALS: Mapping[str, Signal] = {
    "grad_norm": Signal(family="loss"),
    "update_ratio": Signal(family="loss"),
    "loss_cusum": Signal(family="loss", forms=("as is",)),
    "loss_spike": Signal(family="loss", forms=("as is",)),
    "loss_z_score": Signal(family="loss", forms=("as is",)),
    "entropy": Signal(family="attention", is_low_bad=True),
    "entropy_ratio": Signal(family="attention", is_low_bad=True),
    "softmax_gain": Signal(family="attention", is_low_bad=True),
    "max_prob": Signal(family="attention"),
    "max_logit": Signal(family="attention"),
    "max_logit_bound": Signal(family="attention"),
    "logit_std": Signal(family="attention"),
    "attn_form_update_ratio": Signal(family="attention"),
}


def traces_of(run: Run) -> dict[str, Trace]:
    """Of every signal that was measured in the one member of a run, up to its divergence."""
    diverged_at = run.members[0].diverged_at if run.members else None
    last = NEVER if diverged_at is None else diverged_at
    traces = {}
    for name, signal in SIGNALS.items():
        step_S, value_S = _series(run, name, is_low_bad=signal.is_low_bad)
        kept_S = (step_S <= last) & ~np.isnan(value_S)
        if kept_S.any():
            traces[name] = worst_so_far(step_S[kept_S], value_S[kept_S], is_low_bad=signal.is_low_bad)
    return traces


def scores(trace: Trace, signal: Signal, form: Form) -> tuple[float, ...]:
    """One per step of a trace, larger is worse; NaN where the first value is none to compare with."""
    values = np.array(trace.values)
    if form == "of its first":
        first = values[0]
        values = np.full(len(values), np.nan) if not np.isfinite(first) or first <= 0 else values / first
    return tuple((-values if signal.is_low_bad else values).tolist())


def worst_so_far(step_S: _Ints, value_S: _Floats, *, is_low_bad: bool) -> Trace:
    """The steps at which a course became worse than it ever was, to DIGITS."""
    value_S = np.array([float(f"{value:.{DIGITS}g}") for value in value_S.tolist()])
    so_far_S = (np.minimum if is_low_bad else np.maximum).accumulate(value_S)
    is_new_S = np.append(True, so_far_S[1:] != so_far_S[:-1])
    return Trace(steps=tuple(step_S[is_new_S].tolist()), values=tuple(so_far_S[is_new_S].tolist()))


def _series(run: Run, name: str, *, is_low_bad: bool) -> tuple[_Ints, _Floats]:
    steps = run.steps[members_of_rows(run.steps) == 0]
    step_S, loss_S = steps["step"].to_numpy().astype(np.int64), steps["loss"].to_numpy().astype(np.float64)
    match name:
        case "grad_norm":
            return step_S, steps["grad_norm"].to_numpy().astype(np.float64)
        case "loss_cusum":
            return step_S, cusum(loss_S)
        case "loss_z_score":
            return step_S, z_scores(loss_S)
        case "loss_spike":
            return step_S, spike_scores(loss_S)
    for table in (run.heads, run.layers, run.params):
        if name in table.columns:
            mine_R = members_of_rows(table) == 0
            if (
                name == "update_ratio"
            ):  # of what is in layers, and began with weights: others move by any number of times themselves
                mine_R &= (table["layer"].to_numpy() >= 0) & (table["weight_norm"].to_numpy() > 0)
            rows = table[mine_R]
            return _worst_of_each_step(
                rows["step"].to_numpy().astype(np.int64), rows[name].to_numpy().astype(np.float64), is_low_bad
            )
    return np.empty(0, dtype=np.int64), np.empty(0)


def _worst_of_each_step(step_R: _Ints, value_R: _Floats, is_low_bad: bool) -> tuple[_Ints, _Floats]:
    if not len(step_R):
        return step_R, value_R
    order = np.argsort(step_R, kind="stable")
    step_S, start_S = np.unique(step_R[order], return_index=True)
    return step_S, (np.fmin if is_low_bad else np.fmax).reduceat(value_R[order], start_S)


def z_scores(loss_S: _Floats) -> _Floats:
    """By how many standard deviations each loss is above the mean of up to WINDOW before it; NaN before there are FEWEST."""
    mean_S, std_S = _before(loss_S)
    return _broken_is_worst(loss_S, (loss_S - mean_S) / std_S)


def cusum(loss_S: _Floats) -> _Floats:
    """One-sided cumulative sum of z-scores beyond SLACK (Page 1954); NaN before there is a z-score."""
    sums_S = np.full(len(loss_S), np.nan)
    total = 0.0
    for at, score in enumerate(z_scores(loss_S).tolist()):
        if not np.isnan(score):
            total = max(0.0, total + score - SLACK)
            sums_S[at] = total
    return sums_S


def spike_scores(loss_S: _Floats) -> _Floats:
    """By how many robust standard deviations each loss is above the median before it, as `signals.spikes` looks at it."""
    scores_S = np.full(len(loss_S), np.nan)
    if len(loss_S) > SPIKE_WINDOW:
        with np.errstate(all="ignore"):
            window_SW = sliding_window_view(loss_S[:-1], SPIKE_WINDOW)
            middle_S = np.median(window_SW, axis=1)
            mad_S = np.median(np.abs(window_SW - middle_S[:, None]), axis=1)
            unit_S = np.maximum(1.4826 * mad_S, LEAST_EXCESS / SIGMAS * np.abs(middle_S))
            scores_S[SPIKE_WINDOW:] = (loss_S[SPIKE_WINDOW:] - middle_S) / unit_S
        scores_S[SPIKE_WINDOW:] = _broken_is_worst(loss_S, scores_S)[SPIKE_WINDOW:]
    return scores_S


def _before(loss_S: _Floats) -> tuple[_Floats, _Floats]:
    mean_S, std_S = np.full(len(loss_S), np.nan), np.full(len(loss_S), np.nan)
    with np.errstate(all="ignore"):
        for at in range(FEWEST, len(loss_S)):
            window = loss_S[max(0, at - WINDOW) : at]
            mean_S[at], std_S[at] = window.mean(), max(float(window.std(ddof=1)), 1e-6)
    return mean_S, std_S


def _broken_is_worst(loss_S: _Floats, scores_S: _Floats) -> _Floats:
    """A loss that is not finite is as far out as can be."""
    broken_S = ~np.isfinite(loss_S)
    broken_S[:FEWEST] = False
    return np.where(broken_S, np.inf, scores_S)
