"""Rules of descent: whether updates lower the loss at all.

Shape key: N rows, S steps, M member in the order of run.json.
"""

import math

import numpy as np
from numpy.typing import NDArray

from attnscope.diagnose.blindness import answer, without_loss
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.diagnose.levels import NOT_THE_LOSS, is_about, losses_before, untrained_in, without_levels
from attnscope.findings import Evidence, Finding, NotLooked
from attnscope.runs.by_member import slices_of, sorted_by_member
from attnscope.runs.reader import Run
from attnscope.runs.watched import cross_entropies

# Measured on watched loops, d_model 64, AdamW (1e-4, 1e-3) and SGD (0.1), two seeds, 100 steps: uphill, 16 to 18 of 20 steps raise the
# loss, none is below the first, and update_ratio is 0.002 to 0.014; of healthy ones at most 11 do, and they come below 0.92 of it.
# With too high a learning rate update_ratio is above 0.05.
RISING_STEPS = 20
RISING = 0.8  # share of steps after which the loss is higher
LOWEST = 0.98  # of the first loss
SMALL_UPDATE = 0.03  # update_ratio
MEASURED_UPHILL = (
    "measured: 13 of 13 watched loops that went uphill, none of 126 healthy ones and of 10 with too high a rate"
)


def loss_rises(run: Run) -> Finding | NotLooked | None:
    """Training goes uphill: the sign of the loss or of the update is wrong.

    What it looks at: watched scripts whose loss is a cross-entropy of class indices. Either the loss that is differentiated
    begins at minus the cross-entropy of a model that was not trained before (at least FROM_SCRATCH of ln(classes)) and ends
    lower still, or of the first RISING_STEPS steps at least a share of RISING raises it, never below LOWEST of the first loss,
    while the median update_ratio is at most SMALL_UPDATE, and it ends above it.
    Why it matters: each update makes the model worse, and nothing stops it: a loss that falls without bound looks like success.
    What to try: the sign of the loss, maximize = False of the optimizer, gradients that are reversed.
    Known limits: of losses that are no cross-entropy it says nothing: those of a generator or a policy may rise from the start.
    With larger updates than SMALL_UPDATE it is left to learning rates. Runs of this lab have no sign to get wrong.
    Source: a mean cross-entropy of class indices is never negative; MEASURED_UPHILL.
    """
    if run.kind != "watch":
        return None
    concerns, blind = [], without_levels(run)
    ratio_M, from_scratch = _median_update(run), untrained_in(run)
    seen = cross_entropies(run)
    for m, step_S, loss_S in losses_before(run):
        record = run.members[m]
        if record.name not in seen:
            continue
        first, last = loss_S[0], loss_S[-RISING_STEPS:].mean()
        said = ""
        if len(loss_S) <= RISING_STEPS:
            blind[record.name] = f"fewer than {RISING_STEPS + 1} losses"
        elif is_about(-first, seen[record.name]) and last < first:
            if record.name in from_scratch:
                said = (
                    f"The loss that {record.name} differentiates is minus its cross-entropy: {first:.3g} at step {step_S[0]}, where "
                    f"that is {seen[record.name].loss:.3g}. It falls to {last:.3g}, and the cross-entropy rises as far."
                )
        elif not is_about(first, seen[record.name]):
            blind[record.name] = NOT_THE_LOSS
        elif math.isnan(ratio_M[m]):
            blind[record.name] = "update_ratio was not recorded"
        elif _goes_up(loss_S) and last > first and ratio_M[m] <= SMALL_UPDATE:
            up = int((np.diff(loss_S[: RISING_STEPS + 1]) > 0).sum())
            said = (
                f"The loss of {record.name} rises from the first step on: from {first:.3g} to {loss_S[RISING_STEPS]:.3g} at step "
                f"{step_S[RISING_STEPS]}, in {up} of {RISING_STEPS} steps, though updates are small (a median update_ratio of "
                f"{ratio_M[m]:.2g}). It ends at {last:.3g}."
            )
        if said:
            evidence = Evidence(
                member=record.name,
                step=int(step_S[RISING_STEPS]),
                quantity="loss",
                value=float(loss_S[RISING_STEPS]),
                threshold=float(first),
            )
            concerns.append(
                Concern(
                    member=record.name,
                    step=int(step_S[0]),
                    badness=abs(last - first),
                    said=said,
                    evidence=(evidence,),
                    severity="error",
                )
            )
    finding = finding_of(
        run,
        concerns,
        rule="loss_rises",
        title="Training goes uphill",
        kind="cause",
        several="train uphill",
        remedy="Look at the sign of the loss, at maximize of the optimizer, and at whatever changes the sign of gradients.",
        source=MEASURED_UPHILL,
        explains=("logit_growth", "entropy_collapse", "loss_explosion", "nonfinite", "stalled"),
    )
    return answer(run, "loss_rises", finding, blind | without_loss(run))


def _goes_up(loss_S: NDArray[np.float64]) -> bool:
    """Whether the first steps raise the loss, nearly each of them."""
    early_S = loss_S[: RISING_STEPS + 1]
    return bool((np.diff(early_S) > 0).mean() >= RISING and early_S.min() >= LOWEST * early_S[0])


def _median_update(run: Run) -> NDArray[np.float64]:
    """Median update_ratio of the first steps, after the very first, (M,); NaN where there is none."""
    codes_N, step_N, ratio_N = sorted_by_member(run.params, ("step", "update_ratio"))
    keep_N = (step_N > 1) & (step_N < RISING_STEPS) & np.isfinite(ratio_N)
    codes_N, ratio_N = codes_N[keep_N], ratio_N[keep_N]
    rows = slices_of(codes_N, len(run.entries))
    return np.array([np.median(ratio_N[each]) if each.start < each.stop else math.nan for each in rows])
