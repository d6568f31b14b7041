"""Rules of batches: one that comes again and again, and one that is not like the others.

Shape key: S steps of a member, K found.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from attnscope.diagnose.blindness import answer, without_loss
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.diagnose.levels import NO_CLASSES
from attnscope.findings import Evidence, Finding, NotLooked
from attnscope.runs.by_member import diverged_at, slices_of, sorted_by_member
from attnscope.runs.reader import Run
from attnscope.runs.watched import cross_entropies
from attnscope.signals.spikes import LEAST_EXCESS, SIGMAS, WINDOW

FEWEST_REPEATS = 10  # steps whose targets were looked at
MEMORIZED = 0.1  # of the first loss, below which a batch is learned by heart

LEAST_JUMP = 0.5  # nats: a batch that the model cannot predict
CALM = 3.0  # robust standard deviations, within which the loss of the step before is
STEEP = 2.0  # times the median gradient norm
BACK = 0.5  # of the excess, below which the next losses are
NEXT = 3  # steps
FLAT_LOGITS = 1.0  # nats that log_z may have moved
MOST_POISONED = 3  # in a run: more are no accidents
# Measured on watched loops, AdamW 1e-3, clipped to 1, two seeds, with one batch of random tokens, random labels or one character with
# labels that never come at step 40 or 80: 8 of 12 are found, of those at step 80 6 of 6; at step 40, while the loss still falls
# fast, the gradient of a random batch is no larger than the others'. Of 186 healthy
# members 1 has one.
MEASURED_POISON = (
    "measured: 8 of 12 poisoned batches, 6 of 6 of those after the loss had settled; 1 in 186 healthy members"
)

_Floats = NDArray[np.float64]


def repeated_batch(run: Run) -> Finding | NotLooked | None:
    """Every step trains on the same batch.

    What it looks at: the targets of the first cross-entropy of class indices in each of the first 20 steps of a watched script: all
    of at least FEWEST_REPEATS are the same, and they are not laid out by hand (counted through, or class by class), as those of
    contrastive losses and of few-shot episodes are.
    Why it matters: the loss falls to zero by learning one batch by heart, and says nothing of other data. It is a warning
    where the loss ended below MEMORIZED of the first.
    What to try: whether the iterator is made anew at each step (next(iter(loader))), and whether a seed is set inside the loop.
    Known limits: it may be on purpose: to overfit one batch is a good test of a model, and a small data set may be one batch. Only
    the first 20 steps are looked at, and of a step the first micro-batch. Runs of this lab draw new batches.
    Source: the definition.
    """
    if run.kind != "watch":
        return None
    concerns, seen, blind = [], cross_entropies(run), {}
    for record in run.members:
        what = seen.get(record.name)
        if what is None:
            blind[record.name] = NO_CLASSES
        elif what.steps < FEWEST_REPEATS:
            blind[record.name] = f"the targets of fewer than {FEWEST_REPEATS} steps were seen"
        elif what.same == what.steps and what.irregular and record.first_loss and record.final_loss is not None:
            by_heart = 0 <= record.final_loss < MEMORIZED * record.first_loss
            concerns.append(
                Concern(
                    member=record.name,
                    step=what.step,
                    badness=what.same,
                    said=(
                        f"The first {what.same} steps of {record.name} have the same targets, one by one"
                        + (
                            f", and its loss has fallen from {record.first_loss:.3g} to {record.final_loss:.3g}: "
                            if by_heart
                            else ": "
                        )
                        + "it learns one batch by heart."
                    ),
                    evidence=(Evidence(member=record.name, step=what.step, quantity="events", value=float(what.same)),),
                    severity="warning" if by_heart else "note",
                )
            )
    finding = finding_of(
        run,
        concerns,
        rule="repeated_batch",
        title="Every step trains on the same batch",
        kind="cause",
        several="train on one batch",
        remedy=(
            "If it is no test whether one batch can be overfitted: make the iterator of the data once, outside of the loop, and set "
            "no seed inside it."
        ),
        source="the targets of the first steps, compared one by one",
    )
    return answer(run, "repeated_batch", finding, blind | without_loss(run))


def poisoned_batch(run: Run) -> Finding | NotLooked | None:
    """One batch is not like the others.

    What it looks at: a loss above the median of the WINDOW before by more than SIGMAS robust standard deviations, LEAST_EXCESS of it
    and LEAST_JUMP nats, after a loss within CALM of them, with a gradient norm above STEEP times its median; the next losses
    (three of them) are back below half of the excess, and log_z, where it was recorded, moved by at most FLAT_LOGITS: the weights
    were as before, so it was the batch. In a run with other spikes, or more than MOST_POISONED such steps, it is not said.
    Why it matters: an update that teaches nonsense: without clipping or with a large learning rate it can throw training back.
    What to try: look at the batch of that step (a damaged file, labels of something else, a document of one character); clip
    gradients, so that one batch cannot do more than others.
    Known limits: the first WINDOW steps are not judged. A batch that does lasting harm looks like training that broke. Instability
    that comes and goes in a single step, with logits that stay as they are, looks the same.
    Source: MEASURED_POISON.
    """
    concerns, blind = [], {}
    columns = ("step", "loss", "grad_norm", "log_z")
    codes_N, step_N, *values = sorted_by_member(run.steps, columns)
    keep_N = step_N < diverged_at(run)[codes_N]
    codes_N, step_N = codes_N[keep_N], step_N[keep_N]
    loss_N, norm_N, log_z_N = (each[keep_N].astype(np.float64) for each in values)
    for m, rows in enumerate(slices_of(codes_N, len(run.entries))):
        name, loss_S, norm_S = run.entries[m].name, loss_N[rows], norm_N[rows]
        if len(loss_S) <= WINDOW + NEXT:
            blind[name] = f"fewer than {WINDOW + NEXT + 1} steps before divergence"
            continue
        if np.isnan(norm_S).all():
            blind[name] = "grad_norm was not recorded"
            continue
        found = _poisoned(loss_S, norm_S, log_z_N[rows])
        if not found:
            continue
        worst = max(found, key=lambda at: loss_S[at])
        before = slice(worst - WINDOW, worst)
        median, usual = np.median(loss_S[before]), np.median(norm_S[before])
        step = int(step_N[rows][worst])
        concerns.append(
            Concern(
                member=name,
                step=step,
                badness=float(loss_S[worst] - median),
                said=(
                    f"At step {step} the loss of {name} is {loss_S[worst]:.3g} (a median of {median:.3g} before) and its gradient norm "
                    f"{norm_S[worst] / usual:.2g} times the usual; one step later the loss is {loss_S[worst + 1]:.3g}."
                    + (
                        f" So it is at {len(found) - 1} other {'steps' if len(found) > 2 else 'step'}."
                        if len(found) > 1
                        else ""
                    )
                ),
                evidence=tuple(
                    Evidence(
                        member=name,
                        step=int(step_N[rows][at]),
                        quantity="loss",
                        value=float(loss_S[at]),
                        threshold=float(np.median(loss_S[at - WINDOW : at])) + LEAST_JUMP,
                    )
                    for at in sorted(found, key=lambda at: -loss_S[at])
                ),
                severity="note",
            )
        )
    finding = finding_of(
        run,
        concerns,
        rule="poisoned_batch",
        title="One batch is not like the others",
        kind="cause",
        several="have a batch that is not like the others",
        remedy="Look at the batch of that step: a damaged file, labels of something else, a text of one character. Clip gradients.",
        source=MEASURED_POISON,
        explains=("loss_spike",),
    )
    return answer(run, "poisoned_batch", finding, blind | without_loss(run))


def _poisoned(loss_S: _Floats, norm_S: _Floats, log_z_S: _Floats) -> list[int]:
    """Rows of the steps whose batch is not like the others; none where the loss leaves its range in any other way, too."""
    with np.errstate(all="ignore"):
        window_SW = sliding_window_view(loss_S, WINDOW)[:-1]
        median_S = np.median(window_SW, axis=1)
        spread_S = 1.4826 * np.median(np.abs(window_SW - median_S[:, None]), axis=1)
        excess_S = loss_S[WINDOW:] - median_S
        is_out_S = excess_S > np.maximum(SIGMAS * spread_S, LEAST_EXCESS * np.abs(median_S))
    found: list[int] = []
    for k in np.flatnonzero(is_out_S).tolist():
        at = k + WINDOW
        if found and at - found[-1] <= NEXT:  # what the update of that batch left
            continue
        usual = np.nanmedian(norm_S[at - WINDOW : at])
        calm = loss_S[at - 1] - median_S[k] <= CALM * spread_S[k]
        steep = norm_S[at] > STEEP * usual >= norm_S[at - 1] / STEEP
        after_S = loss_S[at + 1 : at + 1 + NEXT] - median_S[k]
        is_back = len(after_S) > 0 and bool((after_S < BACK * excess_S[k]).all())
        known_S = log_z_S[at - WINDOW : at][~np.isnan(log_z_S[at - WINDOW : at])]
        moved = abs(log_z_S[at] - np.median(known_S[-5:])) if len(known_S) else 0.0
        if not (excess_S[k] > LEAST_JUMP and calm and steep and is_back and not moved > FLAT_LOGITS):
            return []
        found.append(at)
    return found if len(found) <= MOST_POISONED else []
