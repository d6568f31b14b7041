"""Rules of the size of the learning rate: updates that reach too far, and updates that move nothing.

Shape key: K measured steps, S recorded steps, one member after the other, M member in the order of run.json.
"""

import math

import numpy as np
from numpy.typing import NDArray

from attnscope.diagnose.blindness import answer, without_loss
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.diagnose.harm import Closed, closed_attention, with_large_logits
from attnscope.diagnose.movement import Movement, at_measured, movement_of, without_movement
from attnscope.diagnose.rules.depth import VANISHING, vanished_later
from attnscope.diagnose.twins import Twin, better_twins
from attnscope.findings import Evidence, Finding, NotLooked
from attnscope.runs.by_member import members_of_rows
from attnscope.runs.members import MemberRecord
from attnscope.runs.reader import Run

# grad_norm x update_norm, summed over groups, by the loss: how much of it an update would undo if the loss went on along its
# slope. Measured on 19 grids of learning rates (sgd, adamw, muon; pre, post and no norm; Xavier and GPT-2 weights; with warm-up
# and without; MEASURED): at the best learning rate of a grid the median over steps is at most 0.33.
OVERSHOOT = 1.0
WINDOW = 5  # measured steps before divergence, or at the end
ENDED_ABOVE = 1.0  # nats above the first loss, and half of it: then nothing was learned

# The third largest typical update_ratio, from which on it is the updates that closed attention: it is 0.009 and more where the
# learning rate did it, and attention did not close at all in members that stayed below.
MOVING = 0.01
THIRD = 3

# Of the twin with a lower learning rate: by so much its final loss is better, in nats, in every seed. Seeds differ by 0.05.
MARGIN = 0.1

# Hardly anything moves: all steps together, in shares of the weights and of the first loss. Of healthy members of 100 to 300 steps none is below
# 0.06 and 2; a hundredth of a good learning rate comes to 0.0015 to 0.013 and 0.03 to 0.2, where the loss falls by 1 to 10 %.
LITTLE_PATH = 0.015
LITTLE_REACH = 0.2
FEWEST_STEPS = 100

MEASURED = (
    "measured on grids of learning rates of small models (sgd, adamw, muon; pre, post and no norm; two seeds and more)"
)
EXPLAINS = (
    "logit_growth",
    "entropy_collapse",
    "gradients_vanish_with_depth",
    "rank_collapse",
    "loss_explosion",
    "nonfinite",
    "loss_spike",
    "stalled",
)


def learning_rate_too_high(run: Run) -> Finding | NotLooked | None:
    """The learning rate is too high.

    What it looks at: members that came to harm, and what updates did before. (1) It diverged, or its loss ended ENDED_ABOVE nats and
    half of itself above the first one, and grad_norm x update_norm (summed over groups) was more than OVERSHOOT times the loss,
    as the median of the last WINDOW measured steps: no loss can fall by more than there is of it. (2) While the
    typical group moved by more than MOVING of its weights a step, attention that was open closed up (mean entropy_ratio below
    CLOSED_RATIO and half of what it was, max_logit above LARGE_LOGIT, or max_logit above HUGE_LOGIT alone; below SHUT_RATIO where
    updates only overshot), or the first layers lost their gradients (as in gradients_vanish_with_depth) in the course of training.
    (3) A member of the same run with a lower learning rate, and else the
    same settings, ended MARGIN nats better, with every seed. Without harm an update as large as the weights is a note.
    Why it matters: the gradient speaks of a neighbourhood. A step that leaves it lands anywhere: logits grow, attention closes,
    the loss jumps or stays where it is, often without a spike.
    What to try: a third of optimizer.lr, and again; a warm-up (optimizer.warmup_steps) if only the first steps are too large.
    Known limits: members that begin with saturated attention or have no scale are left to those rules. Harm that shows neither
    in the loss nor in attention is only seen beside a member with a lower learning rate. A loss that is negative, or GradScaler
    with gradients clipped before they are unscaled, cannot be compared with updates.
    Source: MEASURED; Wortsman et al. 2023; Kimi K2 2025.
    """
    moves = movement_of(run)
    overshoot_K = _overshoot(run, moves)
    other_cause = with_large_logits(run)
    closed, vanished = closed_attention(run), vanished_later(run)
    twins = better_twins(run, "optimizer.lr", lower=True, margin=MARGIN)
    at_lr = _largest_lr(run)
    concerns = []
    for m, record in enumerate(run.members):
        k = moves.of(m)
        if k.start == k.stop:
            continue
        concern = None
        if record.name not in other_cause:
            concern = _overshot(run, record, moves, k, overshoot_K, at_lr[record.name])
            if concern is None and record.name in vanished:
                concern = _loses_gradients(run, record, moves, k, vanished[record.name], at_lr[record.name])
            if concern is None and record.name in closed:
                concern = _closes(run, record, moves, k, overshoot_K, closed[record.name], at_lr[record.name])
        if concern is None and record.name in twins:
            concern = _worse_than_twin(record, twins[record.name])
        if concern is None and record.diverged_at is None:
            concern = _larger_than_weights(run, record, moves, k, at_lr[record.name])
        if concern is not None:
            concerns.append(concern)
    finding = finding_of(
        run,
        concerns,
        rule="learning_rate_too_high",
        title="The learning rate is too high",
        kind="cause",
        several="are trained with updates that are too large",
        remedy="Try a third of optimizer.lr, and again; or a warm-up (optimizer.warmup_steps), if only the first steps are too large.",
        source=MEASURED,
        explains=EXPLAINS,
    )
    return answer(run, "learning_rate_too_high", finding, without_movement(run))


def learning_rate_too_low(run: Run) -> Finding | NotLooked | None:
    """The learning rate is so low that hardly anything moves.

    What it looks at: all updates of at least FEWEST_STEPS steps together. The typical group moved by less than LITTLE_PATH of
    its weights (sum of update_ratio), and the loss could not have changed by more than LITTLE_REACH of itself (sum of grad_norm
    x update_norm over groups and steps, which is more than any first-order change).
    Why it matters: the run costs what a useful one does and ends where it began.
    What to try: ten times optimizer.lr, and again; look whether the schedule is counted in the right unit.
    Known limits: a learning rate ten times too low still moves something and is not found. While the learning rate still rises
    nothing is said. Steps between those that were measured count as the one before them.
    Source: MEASURED; to first order a loss changes by the product of gradient and update (Cauchy-Schwarz).
    """
    moves = movement_of(run)
    blind = without_movement(run) | without_loss(run)
    lr_K = at_measured(run, moves, "lr")
    concerns = []
    for m, record in enumerate(run.members):
        k = moves.of(m)
        if record.name in blind or record.diverged_at is not None or record.first_loss is None:
            continue
        if (record.last_step or 0) + 1 < FEWEST_STEPS:
            blind[record.name] = f"fewer than {FEWEST_STEPS} steps"
            continue
        path = float((moves.ratio_K[k] * moves.span_K[k]).sum())
        reach = float((moves.reach_K[k] * moves.span_K[k]).sum())
        if not (path < LITTLE_PATH and reach < LITTLE_REACH * abs(record.first_loss)) or _still_rises(lr_K[k]):
            continue
        largest = k.start + int(moves.ratio_K[k].argmax())
        said = (
            f"In {(record.last_step or 0) + 1} steps the weights of {record.name} moved by at most {path:.2g} of their size, "
            f"and to first order its loss of {record.first_loss:.3g} could not change by more than {reach:.2g}."
        )
        concerns.append(
            Concern(
                member=record.name,
                step=int(moves.step_K[k.start]),
                badness=-path,
                said=said,
                evidence=(
                    moves.evidence(run, largest, LITTLE_PATH),
                    Evidence(
                        member=record.name,
                        step=record.last_step,
                        quantity="reach",
                        value=reach,
                        threshold=LITTLE_REACH * abs(record.first_loss),
                    ),
                ),
                severity="warning",
            )
        )
    finding = finding_of(
        run,
        concerns,
        rule="learning_rate_too_low",
        title="The learning rate is so low that hardly anything moves",
        kind="cause",
        several="hardly move",
        remedy="Try ten times optimizer.lr, and again. Look whether the schedule is counted in the right unit.",
        source=MEASURED,
        explains=("stalled", "plateau"),
    )
    return answer(run, "learning_rate_too_low", finding, blind)


def _overshot(
    run: Run, record: MemberRecord, moves: Movement, k: slice, overshoot_K: NDArray[np.float64], at_lr: str
) -> Concern | None:
    """Against a member that diverged or ended far above its first loss, where updates overshot before."""
    mine_K = overshoot_K[k]
    known = np.flatnonzero(~np.isnan(mine_K))
    if not len(known):
        return None
    level = float(np.median(mine_K[known[-WINDOW:]]))
    if level < OVERSHOOT:
        return None
    if record.diverged_at is not None:
        became = f"before it diverged at step {record.diverged_at}"
    elif _ended_above(record):
        became = f"and it ended at a loss of {record.final_loss:.3g}, after {record.first_loss:.3g} at first"
    else:
        return None
    first = int(known[np.argmax(mine_K[known] >= OVERSHOOT)])
    n = min(WINDOW, len(known))
    over = "at the last step measured" if n == 1 else f"median of the last {n} measured steps"
    largest = k.start + int(moves.ratio_K[k].argmax())
    said = (
        f"{at_lr}the updates of {record.name} reach too far: along the gradient they would undo {level:.3g} times its "
        f"whole loss ({over}), {became}. {_moved(moves.ratio_K[largest]).capitalize()}."
    )
    return Concern(
        member=record.name,
        step=int(moves.step_K[k.start + first]),
        badness=level,
        said=said,
        evidence=(
            Evidence(
                member=record.name,
                step=int(moves.step_K[k.start + known[-1]]),
                quantity="overshoot",
                value=level,
                threshold=OVERSHOOT,
            ),
            moves.evidence(run, largest, None),
        ),
        severity="error",
    )


def _closes(
    run: Run,
    record: MemberRecord,
    moves: Movement,
    k: slice,
    overshoot_K: NDArray[np.float64],
    closed: Closed,
    at_lr: str,
) -> Concern | None:
    """Against a member whose attention closed up while its weights moved fast."""
    before_K = moves.step_K[k] <= closed.step
    ratio_K, mine_K = moves.ratio_K[k][before_K], np.nan_to_num(overshoot_K[k][before_K], nan=0.0)
    if not len(ratio_K) or not (_third(ratio_K) > MOVING or (closed.is_shut and _third(mine_K) > OVERSHOOT)):
        return None
    largest = k.start + int(ratio_K.argmax())
    said = (
        f"{at_lr}the attention logits of {record.name} grew to {closed.logit:.3g} by step {closed.step}, where its mean "
        f"entropy_ratio is {closed.ratio:.2g} after {closed.first_ratio:.2g} at first, while {_moved(moves.ratio_K[largest])}."
    )
    return Concern(
        member=record.name,
        step=int(moves.step_K[largest]),
        badness=float(_third(ratio_K)),
        said=said,
        evidence=(
            moves.evidence(run, largest, MOVING),
            Evidence(
                member=record.name,
                step=closed.step,
                quantity="entropy_ratio",
                value=closed.ratio,
                threshold=closed.limit_ratio,
            ),
            Evidence(
                member=record.name,
                step=closed.step,
                quantity="max_logit",
                value=closed.logit,
                threshold=closed.limit_logit,
            ),
        ),
        severity="warning" if record.diverged_at is None else "error",
    )


def _loses_gradients(
    run: Run, record: MemberRecord, moves: Movement, k: slice, vanished: tuple[int, float], at_lr: str
) -> Concern | None:
    """Against a member whose first layers lost their gradients while its weights moved fast."""
    step, share = vanished
    ratio_K = moves.ratio_K[k]
    if _third(ratio_K) <= MOVING:
        return None
    largest = k.start + int(ratio_K.argmax())
    return Concern(
        member=record.name,
        step=min(int(moves.step_K[largest]), step),
        badness=_third(ratio_K),
        said=(
            f"{at_lr}the first layers of {record.name} lost their gradients in the course of training: their norm is "
            f"{share:.2g} of the last layer's from step {step} on, while {_moved(moves.ratio_K[largest])}."
        ),
        evidence=(
            moves.evidence(run, largest, MOVING),
            Evidence(
                member=record.name,
                step=step,
                quantity="grad_norm (first layer / last layer)",
                value=share,
                threshold=VANISHING,
            ),
        ),
        severity="warning" if record.diverged_at is None else "error",
    )


def _worse_than_twin(record: MemberRecord, twin: Twin) -> Concern:
    ended = "diverged" if math.isinf(twin.loss) else f"ended at a loss of {twin.loss:.3g}"
    return Concern(
        member=record.name,
        badness=-1 / (1 + twin.loss - twin.better_loss),  # after what shows in the member itself
        said=(
            f"At a learning rate of {twin.value:g} {record.name} {ended}, while {twin.better} ended at "
            f"{twin.better_loss:.3g} with {twin.better_value:g} and else the same settings."
        ),
        evidence=(
            Evidence(
                member=record.name, step=record.last_step, quantity="loss", value=twin.loss, threshold=twin.better_loss
            ),
            Evidence(member=record.name, quantity="optimizer.lr", value=twin.value, threshold=twin.better_value),
        ),
        severity="error" if math.isinf(twin.loss) else "warning",
    )


def _larger_than_weights(run: Run, record: MemberRecord, moves: Movement, k: slice, at_lr: str) -> Concern | None:
    """Against a member that an update gave other weights altogether; no harm of it was measured."""
    ratio_K = moves.ratio_K[k]
    if not (ratio_K >= 1).any():
        return None
    first = k.start + int(np.argmax(ratio_K >= 1))
    return Concern(
        member=record.name,
        step=int(moves.step_K[first]),
        badness=float(moves.ratio_K[first]),
        said=(
            f"{at_lr}the update of step {int(moves.step_K[first])} is {moves.ratio_K[first]:.3g} times as large as the "
            f"weights of {record.name} that it moves: of what they were nothing is left. No harm of it was measured."
        ),
        evidence=(moves.evidence(run, first, 1.0),),
        severity="note",
    )


def _overshoot(run: Run, moves: Movement) -> NDArray[np.float64]:
    """How much of the loss each measured step would undo, (K,); NaN where it is not positive, or gradients may be scaled."""
    loss_K = at_measured(run, moves, "loss")
    with np.errstate(all="ignore"):
        overshoot_K = moves.reach_K / np.where(loss_K > 0, loss_K, np.nan)
    if run.kind == "watch":
        overshoot_K = np.where(at_measured(run, moves, "loss_scale") == 1, overshoot_K, np.nan)
    return np.where(np.isfinite(loss_K), overshoot_K, np.nan)


def _ended_above(record: MemberRecord) -> bool:
    first, final = record.first_loss, record.final_loss
    return first is not None and final is not None and final - first > max(ENDED_ABOVE, abs(first) / 2)


def _still_rises(lr_K: NDArray[np.float64]) -> bool:
    """Whether the learning rate was largest at the end: a warm-up may not be over."""
    late = max(1, len(lr_K) // 10)
    return bool(np.median(lr_K[-late:]) > 1.05 * np.median(lr_K))


def _third(values_K: NDArray[np.float64]) -> float:
    """The third largest; of fewer the smallest: what is no single peak."""
    return float(np.sort(values_K)[::-1][min(THIRD, len(values_K)) - 1])


def _largest_lr(run: Run) -> dict[str, str]:
    """Member to the beginning of a sentence: the largest learning rate that it was trained with, where it is known."""
    lr_M = np.full(len(run.entries), np.nan)
    np.fmax.at(lr_M, members_of_rows(run.steps), run.steps["lr"].to_numpy().astype(np.float64))
    return {
        entry.name: f"With a learning rate of {lr:.3g} " if np.isfinite(lr) else "Here "
        for entry, lr in zip(run.entries, lr_M.tolist(), strict=True)
    }


def _moved(ratio: float) -> str:
    """What the typical group did at its largest step."""
    size = f"{ratio:.2%} of" if ratio < 0.1 else f"{ratio:.0%} of" if ratio < 10 else f"{ratio:.3g} times"
    return f"the typical group moved by up to {size} its weights in a step"
