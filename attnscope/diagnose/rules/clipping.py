"""Rules of clipping: what it does to training where it never lets go, or comes at the wrong moment.

Shape key: N rows, M member in the order of run.json.
"""

import math

import numpy as np
from numpy.typing import NDArray

from attnscope.diagnose.blindness import answer, without_optimizer, without_steps
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.diagnose.rules.parameters import without_upkeep
from attnscope.findings import Evidence, Finding, NotLooked, of_several, worst_first
from attnscope.runs.by_member import configs_of, diverged_at, mean_by_member, sorted_by_member
from attnscope.runs.foreign import printable
from attnscope.runs.probe_events import ClippedScaled, Upkeep
from attnscope.runs.probed import Told, upkeep_of
from attnscope.runs.reader import Run
from attnscope.runs.watched import optimizers_of

ALWAYS = 0.9  # share of steps
FEWEST_STEPS = 20  # with fewer there is no always
# Median clip_factor. Measured with SGD, 200 steps, two seeds: at 0.58 to 0.62 the final loss is that without clipping (within
# 0.04 nats), at 0.28 to 0.34 it is 0.7 to 1.0 higher, at 0.04 to 0.09 0.4 higher (pre norm), at 0.01 7 higher (no norm).
HARMLESS_FACTOR = 0.5
# Above it, it costs at most what was measured at 0.58: clipping at 1 of norms of 1 to 3 is what most recipes do.
COSTLY_FACTOR = 0.35

# What clipping before unscaling comes to: its threshold over the loss scale. Nobody clips gradients at so little; who multiplies
# the threshold by the scale stays far above it.
LEAST_THRESHOLD = 0.01
FEWEST_LATE = 3  # calls after a step that would have clipped something


def clipping_always_on(run: Run) -> Finding | NotLooked | None:
    """Clipping shrinks nearly every update.

    What it looks at: the share of steps with clip_factor below 1 and its median, after warm-up and before divergence, of
    members trained with SGD. It is found from a share of ALWAYS on, where the median is below HARMLESS_FACTOR, with at least
    FEWEST_STEPS steps; above COSTLY_FACTOR it is a note. AdamW and Muon divide the size of the gradient out again: clipped on every step to a tenth, AdamW
    ends where it ends without clipping (2.39 against 2.41, measured with pre norm).
    Why it matters: clipping is meant for rare peaks. Where it is always on, the update has the same size whatever the
    gradient is, so it is the learning rate that is limited, and what makes gradients large is hidden.
    What to try: the cause of the large gradients (see the other findings), then a threshold above the usual norm.
    Known limits: of a watched script only classes named SGD count, and only where every optimizer is one; its warm-up is not
    known and counts as training. A learning rate chosen for clipped gradients is not told from a wrong one.
    Source: Pascanu et al. 2013; measured: the default model without a scale, clipped to 1, stays at losses of 17 to 23; above
    a median of HARMLESS_FACTOR the final loss is that without clipping.
    """
    n_members = len(run.entries)
    configs = configs_of(run)
    optimizers = [None if config is None else config.optimizer for config in configs]
    seen = optimizers_of(run)
    by_size_M = np.array(
        [
            seen.get(entry.name) == {"SGD"} if each is None else each.name == "sgd"
            for entry, each in zip(run.entries, optimizers, strict=True)
        ]
    )
    warmup_M = np.array([0 if each is None else each.warmup_steps for each in optimizers])
    codes_N, step_N, factor_N = sorted_by_member(run.steps, ("step", "clip_factor"))
    clipped_M = np.bincount(codes_N[factor_N < 1], minlength=n_members) > 0
    known_M = np.bincount(codes_N[~np.isnan(factor_N)], minlength=n_members) > 0
    counted_N = by_size_M[codes_N] & (step_N >= warmup_M[codes_N]) & ~np.isnan(factor_N)
    counted_N &= step_N < diverged_at(run)[codes_N]
    codes_N, factor_N = codes_N[counted_N], factor_N[counted_N]
    share_M = mean_by_member(codes_N, (factor_N < 1).astype(np.float64), n_members)
    steps_M = np.bincount(codes_N, minlength=n_members)
    ends_M = np.cumsum(steps_M)
    always = np.flatnonzero((steps_M >= FEWEST_STEPS) & (share_M >= ALWAYS))
    median = {int(m): float(np.median(factor_N[ends_M[m] - steps_M[m] : ends_M[m]])) for m in always}
    concerned = [m for m in median if median[m] < HARMLESS_FACTOR]
    blind = _blind(run, by_size_M, clipped_M, known_M, steps_M)
    if not concerned:
        return answer(run, "clipping_always_on", None, blind)
    worst = min(concerned, key=lambda m: median[m])
    names = [run.entries[m].name for m in concerned]
    evidence, left_out = worst_first(
        concerned,
        lambda m: Evidence(
            member=run.entries[m].name,
            quantity="clip_factor",
            value=median[m],
            threshold=HARMLESS_FACTOR,
        ),
        order=lambda m: median[m],
    )
    finding = Finding(
        rule="clipping_always_on",
        title="Clipping shrinks nearly every update",
        kind="cause",
        severity="warning" if median[worst] <= COSTLY_FACTOR else "note",
        summary=(
            f"{of_several(names, f'are clipped on at least {ALWAYS:.0%} of their steps')}{run.entries[worst].name} is "
            f"clipped on {round(share_M[worst] * steps_M[worst])} of {steps_M[worst]} steps, to a median of {median[worst]:.2g} of its "
            "gradient: the size of its updates is set by clipping."
        ),
        members=tuple(names),
        evidence=evidence,
        evidence_left_out=left_out,
        remedy=(
            "First remove what makes gradients large (see the other findings), then set clip.threshold above the usual "
            "gradient norm."
        ),
        source="Pascanu et al. 2013; measured: above a median of 0.5 the final loss is that without clipping",
        explains=("learning_rate_too_low", "plateau", "stalled"),
    )
    return answer(run, "clipping_always_on", finding, blind)


def clipped_before_unscaling(run: Run) -> Finding | NotLooked | None:
    """Gradients are clipped while the loss scale is still in them.

    What it looks at: in watched runs, clip_grad_norm_ and clip_grad_value_ between the backward pass of a loss that GradScaler
    has multiplied and the moment at which it divides the gradients by its scale, where they made them smaller. It is found
    where the threshold over the scale is below LEAST_THRESHOLD.
    Why it matters: gradients are 65,536 times as large at first: clipped at 1, next to nothing is left of each once they are
    divided. SGD stands still, Adam comes near its eps, and what is left changes with every change of the scale.
    What to try: scaler.unscale_(optimizer) before clipping.
    Known limits: loss scaling that is no torch.amp.GradScaler is not seen, nor clipping by hand. With a small scale the threshold may
    be meant so.
    Source: PyTorch's notes on automatic mixed precision, working with unscaled gradients.
    """
    concerns: dict[str, Concern] = {}
    for step, member, what in run.happened(ClippedScaled):
        numbers = (what.loss_scale, what.threshold, what.kept)
        if member is None or not all(map(math.isfinite, numbers)) or what.loss_scale <= 1 or not 0 < what.kept < 1:
            continue
        left = what.threshold / what.loss_scale
        if 0 < left < LEAST_THRESHOLD and member not in concerns:
            concerns[member] = Concern(
                member=member,
                step=step,
                badness=1 / left,
                said=(
                    f"At step {step} the gradients of {printable(what.optimizer, 60)} are clipped at {what.threshold:.3g} while they "
                    f"are multiplied by a loss scale of {what.loss_scale:,.0f}: {what.kept:.2g} of them is left, as if they were "
                    f"clipped at {left:.2g}."
                ),
                evidence=(
                    Evidence(member=member, step=step, quantity="events", value=left, threshold=LEAST_THRESHOLD),
                ),
                severity="warning",
            )
    finding = finding_of(
        run,
        list(concerns.values()),
        rule="clipped_before_unscaling",
        title="Gradients are clipped before they are unscaled",
        kind="cause",
        several="clip gradients that have the loss scale in them",
        remedy="Call scaler.unscale_(optimizer) between backward() and clipping.",
        source="PyTorch's notes on automatic mixed precision",
        explains=("clipping_always_on", "adam_epsilon_too_large", "learning_rate_too_low", "plateau", "stalled"),
    )
    blind = without_optimizer(run) if run.kind == "watch" else {}
    return answer(run, "clipped_before_unscaling", finding, blind | without_steps(run))


def clipped_after_step(run: Run) -> Finding | NotLooked | None:
    """Gradients are clipped after the optimizer has used them.

    What it looks at: in watched runs, calls of clip_grad_norm_ and clip_grad_value_ whose parameters an optimizer has updated
    since the last backward pass. It is found where at least FEWEST_LATE of those made gradients smaller, none was clipped
    before an update from the second one on, and the gradients are zeroed.
    Why it matters: it does nothing: the update is made, and the gradients are thrown away before the next one.
    What to try: clip between backward() and optimizer.step().
    Known limits: clipping by hand is not seen; a threshold that no gradient reaches is no finding.
    Source: the definition; Pascanu et al. 2013 clip what the update is made of.
    """
    concerns = [
        Concern(
            member=each.member,
            step=each.step,
            badness=float(each.what.clipped_after),
            said=(
                f"The gradients of {each.what.optimizer} are clipped after its steps ({each.what.clipped_after} times among the first), "
                "and never between backward() and step(): clipping changes nothing."
            ),
            evidence=(
                Evidence(
                    member=each.member,
                    step=each.step,
                    quantity="events",
                    value=float(each.what.clipped_after),
                    threshold=float(FEWEST_LATE),
                ),
            ),
            severity="warning",
        )
        for each in reversed({each.member: each for each in reversed(_clipped_late(run))}.values())
    ]
    finding = finding_of(
        run,
        concerns,
        rule="clipped_after_step",
        title="Gradients are clipped after the step",
        kind="cause",
        several="clip gradients after the step",
        remedy="Clip between backward() and optimizer.step().",
        source="the definition",
        explains=("learning_rate_too_high", "loss_explosion", "loss_spike", "nonfinite"),
    )
    return answer(run, "clipped_after_step", finding, without_upkeep(run))


def _clipped_late(run: Run) -> list[Told[Upkeep]]:
    return [
        each
        for each in upkeep_of(run)
        if each.what.clipped_after >= FEWEST_LATE and not each.what.clipped and not each.what.gradients_kept
    ]


def _blind(
    run: Run,
    by_size_M: NDArray[np.bool_],
    clipped_M: NDArray[np.bool_],
    known_M: NDArray[np.bool_],
    steps_M: NDArray[np.int64],
) -> dict[str, str]:
    """Members that the rule could concern, and of which it cannot be said."""
    unknown, empty = without_optimizer(run), without_steps(run)
    found = {}
    for m, entry in enumerate(run.entries):
        name = entry.name
        if not (by_size_M[m] or name in unknown):
            continue
        if name in empty:
            found[name] = empty[name]
        elif not known_M[m]:
            found[name] = "clip_factor was not recorded"
        elif clipped_M[m] and name in unknown:
            found[name] = unknown[name]
        elif clipped_M[m] and steps_M[m] < FEWEST_STEPS:
            found[name] = f"fewer than {FEWEST_STEPS} steps after warm-up and before divergence"
    return found
