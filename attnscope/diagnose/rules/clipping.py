"""Rules of clipping: what it does to training where it never lets go.

Shape key: N rows, M member in the order of run.json.
"""

import numpy as np
from numpy.typing import NDArray

from attnscope.diagnose.blindness import answer, without_optimizer, without_steps
from attnscope.findings import Evidence, Finding, NotLooked, of_several, worst_first
from attnscope.runs.by_member import configs_of, diverged_at, mean_by_member, sorted_by_member
from attnscope.runs.reader import Run
from attnscope.runs.watched import optimizers_of

ALWAYS = 0.9  # share of steps
FEWEST_STEPS = 20  # with fewer there is no always
# Median clip_factor. Measured with SGD, 200 steps, two seeds: at 0.58 to 0.62 the final loss is that without clipping (within
# 0.04 nats), at 0.28 to 0.34 it is 0.7 to 1.0 higher, at 0.04 to 0.09 0.4 higher (pre norm), at 0.01 7 higher (no norm).
HARMLESS_FACTOR = 0.5
# Above it, it costs at most what was measured at 0.58: clipping at 1 of norms of 1 to 3 is what most recipes do.
COSTLY_FACTOR = 0.35


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
        explains=("stalled",),
    )
    return answer(run, "clipping_always_on", finding, blind)


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
