"""Rules of the learning rate's course: jumps in the middle of training, and its beginning.

Shape key: S steps of a member, K measured steps, M member in the order of run.json.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnscope.diagnose.blindness import answer, without_loss, without_steps
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.diagnose.movement import movement_of
from attnscope.diagnose.twins import Twin, better_twins
from attnscope.findings import Evidence, Finding, NotLooked, Severity
from attnscope.runs.by_member import sorted_by_member
from attnscope.runs.members import MemberRecord
from attnscope.runs.reader import Run

JUMP_TIMES = 3.0  # times the largest learning rate of the steps before: more than warm-ups by epoch and by halves do
BEFORE = 10  # steps: several optimizers that take turns have all stepped
RECOVERY = 50  # steps within which a restart that is meant gets its loss back
# Of the loss before. Measured in watched programs at step 80: a learning rate of 100 times a good one leaves the loss 0.09 to 1.5
# of itself higher in 5 of 6; restarts of a cosine to 20 times its end (4 of 4) and 10 times a good one (6 of 6) less than 0.04.
STAYS_ABOVE = 0.08

EARLY = 20  # steps at the beginning
SHORT_WARMUP = 2  # steps: over before it began
NEARLY = 0.9  # of the peak: warm-up is over
# By how much of the first loss the second largest of the EARLY ones is above it. Measured with and without 30 steps of warm-up (90 pairs
# of members, sgd and adamw, pre, post and no norm): of 8 that are above it and did not diverge, 6 end 0.10 to 0.75 nats better with a
# warm-up, one alike and one 0.07 worse; none of those that learned best is (the largest of them rises once, by 0.10).
EARLY_RISE = 0.1
NOISE = 6.0  # robust standard deviations of the differences of losses from step to step
FEWEST_STEPS = 40
MARGIN = 0.1  # nats, see learning_rate_too_high

JUMP_EXPLAINS = (
    "learning_rate_too_high",
    "logit_growth",
    "entropy_collapse",
    "loss_explosion",
    "nonfinite",
    "loss_spike",
    "loss_rises",
    "stalled",
)

NO_RATE = "lr was not recorded"
JUMP_SOURCE = f"a jump is more than {JUMP_TIMES:g} times the largest of {BEFORE} steps before; harm is a loss that is not back within {RECOVERY}"
WARMUP_SOURCE = (
    "measured: of 8 members whose loss rose early without a warm-up, 6 end 0.1 to 0.75 nats better with 30 steps of it; "
    "Xiong et al. 2020; Goyal et al. 2017"
)

_Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Course:
    """Steps of one member at which the learning rate is known, (S,) each."""

    record: MemberRecord
    m: int
    step_S: NDArray[np.int64]
    lr_S: _Floats
    loss_S: _Floats


def learning_rate_jump(run: Run) -> Finding | NotLooked | None:
    """The learning rate jumps up in the middle of training.

    What it looks at: steps whose lr is more than JUMP_TIMES times the largest of the BEFORE ones before; and the losses after. It is an
    error where the member diverged within RECOVERY steps, a warning where no BEFORE losses in a row within as many steps have a
    median below that of the BEFORE losses before, STAYS_ABOVE of it higher, else a note.
    Why it matters: a schedule that starts anew when a run is resumed, or counts in another unit than the loop, throws trained
    weights away. Restarts of a cosine and cycles are meant, and get their loss back.
    What to try: save and load the schedule with the weights; look at the lr around that step.
    Known limits: of several parameter groups the largest lr is recorded. A rise in many small steps is none. After few steps
    nothing is known of the loss, and it stays a note.
    Source: JUMP_SOURCE.
    """
    concerns = [concern for course in _courses(run) if (concern := _jumped(run, course)) is not None]
    finding = finding_of(
        run,
        concerns,
        rule="learning_rate_jump",
        title="The learning rate jumps up",
        kind="cause",
        several="have a learning rate that jumps up",
        remedy="Save and load the schedule with the weights, and count it in the unit of the loop. If the restart is meant, start lower.",
        source=JUMP_SOURCE,
        explains=JUMP_EXPLAINS,
    )
    return answer(run, "learning_rate_jump", finding, _without_rate(run))


def missing_warmup(run: Run) -> Finding | NotLooked | None:
    """Training begins at its full learning rate, or never gets there.

    What it looks at: lr at the beginning, and losses. (1) A warm-up of at most SHORT_WARMUP steps (up to NEARLY of the largest lr),
    and within EARLY steps at least two losses above the first one by EARLY_RISE of it, and by NOISE times what losses differ by
    from step to step, in a member that ended below its first loss. (2) A member of the same run with a longer warm-up, and else the
    same settings, that ended MARGIN nats better, with every seed. (3) lr that rises linearly up to the last step: the warm-up
    is longer than the run, a note.
    Why it matters: at first Adam's estimates rest on few gradients, and in post-LN the last layers get large ones: full steps then
    break what takes long to mend.
    What to try: optimizer.warmup_steps of 1 to 10 % of the run, and the schedule stepped once per update, in its own unit.
    Known limits: harm that shows neither in the first losses nor beside another member is not seen: a deep post-LN that never leaves
    its plateau. A member that diverges is left to learning_rate_too_high.
    Source: WARMUP_SOURCE.
    """
    twins = better_twins(run, "optimizer.warmup_steps", lower=False, margin=MARGIN)
    concerns = []
    for course in _courses(run):
        concern = _rose_early(course)
        if concern is None and course.record.name in twins:
            concern = _worse_than_twin(course, twins[course.record.name])
        if concern is None:
            concern = _never_there(course)
        if concern is not None:
            concerns.append(concern)
    finding = finding_of(
        run,
        concerns,
        rule="missing_warmup",
        title="The warm-up is missing, or in the wrong unit",
        kind="cause",
        several="have no warm-up that fits",
        remedy=(
            "Warm up over 1 to 10 % of the run (optimizer.warmup_steps), and step the schedule once per update, in the unit that it "
            "counts in."
        ),
        source=WARMUP_SOURCE,
        explains=(
            "logit_growth",
            "entropy_collapse",
            "gradients_vanish_with_depth",
            "rank_collapse",
            "loss_spike",
            "stalled",
            "plateau",
        ),
    )
    return answer(run, "missing_warmup", finding, without_loss(run) | _without_rate(run))


def _jumped(run: Run, course: _Course) -> Concern | None:
    """Against a member, of the jump that did most harm."""
    lr_S = course.lr_S
    if len(lr_S) <= BEFORE:
        return None
    before_S = np.lib.stride_tricks.sliding_window_view(lr_S, BEFORE)[:-1].max(axis=1)
    with np.errstate(all="ignore"):
        times_S = lr_S[BEFORE:] / before_S
    found = np.flatnonzero((times_S > JUMP_TIMES) & np.isfinite(times_S))
    # Where a rise takes several steps, each is above what was before: the first one counts.
    found = found[np.r_[True, np.diff(found) > BEFORE]] if len(found) else found
    jumps = [_jump(run, course, int(at) + BEFORE, float(times_S[at])) for at in found.tolist()]
    order = {"error": 0, "warning": 1, "note": 2}
    return min(jumps, key=lambda each: (order[each.severity], -each.badness), default=None)


def _jump(run: Run, course: _Course, at: int, times: float) -> Concern:
    record, loss_S = course.record, course.loss_S
    step, lr, lr_before = (int(course.step_S[at]), float(course.lr_S[at]), float(course.lr_S[at - BEFORE : at].max()))
    evidence = [Evidence(member=record.name, step=step, quantity="lr", value=lr, threshold=JUMP_TIMES * lr_before)]
    said = f"At step {step} the learning rate of {record.name} jumps from {lr_before:.3g} to {lr:.3g}, {times:.3g} times as much"
    severity: Severity = "note"
    before, after = _level(loss_S[at - BEFORE : at]), _lowest_level(loss_S[at + 1 : at + 1 + RECOVERY])
    diverged = record.diverged_at
    if diverged is not None and step <= diverged <= step + RECOVERY:
        severity = "error"
        said += f", and it diverges at step {diverged}."
    elif before is not None and after is not None and after - before > STAYS_ABOVE * abs(before):
        severity = "warning"
        said += f"; its loss of {before:.3g} before is {after:.3g} at best over the next {min(RECOVERY, len(loss_S) - at - 1)} steps."
        evidence.append(
            Evidence(
                member=record.name,
                step=step,
                quantity="loss",
                value=after,
                threshold=before + STAYS_ABOVE * abs(before),
            )
        )
    else:
        said += ". No lasting harm of it was measured."
    moves = movement_of(run)
    k = moves.of(course.m)
    later = np.flatnonzero(moves.step_K[k] >= step)
    if len(later):
        evidence.append(moves.evidence(run, k.start + int(later[0]), None))
    return Concern(
        member=record.name,
        step=step,
        badness=times,
        said=said,
        evidence=tuple(evidence),
        severity=severity,
    )


def _rose_early(course: _Course) -> Concern | None:
    """Against a member that lost ground in its first steps at full learning rate, and found back."""
    record, loss_S = course.record, course.loss_S
    warmup = _warmup_of(course)
    first, final = record.first_loss, record.final_loss
    if warmup > SHORT_WARMUP or record.diverged_at is not None or len(loss_S) < FEWEST_STEPS:
        return None
    if first is None or final is None or not final < first or not np.isfinite(loss_S[0]):
        return None
    early_S, differences_S = loss_S[1:EARLY], np.abs(np.diff(loss_S[EARLY:]))
    early_S, differences_S = early_S[np.isfinite(early_S)], differences_S[np.isfinite(differences_S)]
    if len(early_S) < 2 or not len(differences_S):
        return None
    second = float(np.sort(early_S)[-2])
    noise = 1.4826 * float(np.median(differences_S)) / 2**0.5
    limit = first + max(EARLY_RISE * abs(first), NOISE * noise)
    if second <= limit:
        return None
    peak = 1 + int(np.nanargmax(loss_S[1:EARLY]))
    begun = "without a warm-up" if warmup == 0 else f"with a warm-up that is over after {_steps(warmup)}"
    return Concern(
        member=record.name,
        step=int(course.step_S[0]),
        badness=second / max(abs(first), 1e-9),
        said=(
            f"{record.name} begins at a learning rate of {course.lr_S[:EARLY].max():.3g} {begun}: its loss rises from {first:.3g} to "
            f"{loss_S[peak]:.3g} at step {int(course.step_S[peak])} before it falls."
        ),
        evidence=(
            Evidence(
                member=record.name,
                step=int(course.step_S[peak]),
                quantity="loss",
                value=float(loss_S[peak]),
                threshold=limit,
            ),
            Evidence(member=record.name, step=int(course.step_S[0]), quantity="lr", value=float(course.lr_S[0])),
        ),
        severity="warning",
    )


def _worse_than_twin(course: _Course, twin: Twin) -> Concern:
    record = course.record
    ended = "diverged" if np.isinf(twin.loss) else f"ended at a loss of {twin.loss:.3g}"
    return Concern(
        member=record.name,
        step=int(course.step_S[0]),
        badness=-1 / (1 + twin.loss - twin.better_loss),  # after what shows in the member itself
        said=(
            f"With {_steps(int(twin.value))} of warm-up {record.name} {ended}, while {twin.better} ended at {twin.better_loss:.3g} "
            f"with {_steps(int(twin.better_value))} and else the same settings."
        ),
        evidence=(
            Evidence(
                member=record.name, step=record.last_step, quantity="loss", value=twin.loss, threshold=twin.better_loss
            ),
            Evidence(
                member=record.name,
                quantity="optimizer.warmup_steps",
                value=twin.value,
                threshold=twin.better_value,
            ),
        ),
        severity="error" if np.isinf(twin.loss) else "warning",
    )


def _never_there(course: _Course) -> Concern | None:
    """Against a member that ended while its learning rate still rose linearly: a range test rises by factors."""
    lr_S, record = course.lr_S, course.record
    if record.status not in ("trained", "stalled") or len(lr_S) < FEWEST_STEPS:
        return None
    rise_S = np.diff(lr_S)
    if not (rise_S > 0).all() or rise_S.max() > 1.01 * rise_S.min() + 1e-6 * lr_S.max():
        return None
    return Concern(
        member=record.name,
        step=int(course.step_S[0]),
        badness=0.0,
        said=(
            f"The learning rate of {record.name} rises from {lr_S[0]:.3g} to {lr_S[-1]:.3g} up to its last step ({record.last_step}): the "
            "warm-up is longer than the run."
        ),
        evidence=(Evidence(member=record.name, step=record.last_step, quantity="lr", value=float(lr_S[-1])),),
        severity="note",
    )


def _courses(run: Run) -> Iterator[_Course]:
    """Of each member that has any."""
    codes_N, step_N, lr_N, loss_N = sorted_by_member(run.steps, ("step", "lr", "loss"))
    known_N = np.isfinite(lr_N)
    codes_N, step_N, lr_N, loss_N = (x_N[known_N] for x_N in (codes_N, step_N, lr_N, loss_N))
    start_M = np.searchsorted(codes_N, np.arange(len(run.entries) + 1))
    for m, record in enumerate(run.members):
        at = slice(int(start_M[m]), int(start_M[m + 1]))
        if at.stop > at.start:
            yield _Course(
                record=record,
                m=m,
                step_S=step_N[at].astype(np.int64),
                lr_S=lr_N[at].astype(np.float64),
                loss_S=loss_N[at].astype(np.float64),
            )


def _warmup_of(course: _Course) -> int:
    """Steps before the learning rate is first near its largest."""
    return int(np.argmax(course.lr_S >= NEARLY * course.lr_S.max()))


def _without_rate(run: Run) -> dict[str, str]:
    known = {course.record.name for course in _courses(run)}
    return {entry.name: NO_RATE for entry in run.entries if entry.name not in known} | without_steps(run)


def _level(loss_S: _Floats) -> float | None:
    finite_S = loss_S[np.isfinite(loss_S)]
    return float(np.median(finite_S)) if len(finite_S) else None


def _lowest_level(loss_S: _Floats) -> float | None:
    """The lowest median of BEFORE losses in a row."""
    finite_S = loss_S[np.isfinite(loss_S)]
    if len(finite_S) < BEFORE:
        return None
    return float(np.median(np.lib.stride_tricks.sliding_window_view(finite_S, BEFORE), axis=1).min())


def _steps(number: int) -> str:
    return "1 step" if number == 1 else f"{number} steps"
