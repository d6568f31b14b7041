"""Rules of gradients along depth: layers that hardly get any, and layers that get all of it.

Shape key: N rows, K measured steps, one member after the other, M member in the order of run.json.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from attnscope.diagnose.blindness import answer, without_steps
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.diagnose.pieces import order_by_step, pieces_of
from attnscope.findings import Evidence, Finding, NotLooked, Severity
from attnscope.runs.by_member import diverged_at, members_of_rows
from attnscope.runs.members import MemberRecord
from attnscope.runs.reader import Run

# AutoTrainer (Zhang et al. 2021): norm of the first layer's gradient by that of the last. Measured on 200 members (2 to 8 layers; pre,
# post and no norm; Xavier weights with gains 0.1 to 3, and GPT-2's): of those that learned none is below 0.005, and one above 25, a note.
VANISHING = 1e-3
EXPLODING = 70.0
# With fewer than four layers, which AutoTrainer did not have: a tenth from layer to layer. Of members of two and three layers that learned none
# falls below half.
A_LAYER = 0.1
WINDOW = 20  # measured steps, at the beginning and at the end
LEARNED = 0.9  # of the first loss: what ends above learned next to nothing

NO_LAYERS = "gradients of fewer than two layers were measured"
SOURCE = "AutoTrainer (Zhang et al. 2021): the first layer's gradient by the last layer's below 1e-3 vanishes, above 70 explodes"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Depth:
    """Norm of the gradient of the first and the last layer that have one, at each measured step before divergence."""

    step_K: NDArray[np.int64]
    layer_K: tuple[NDArray[np.int64], NDArray[np.int64]]
    norm_K: tuple[NDArray[np.float64], NDArray[np.float64]]
    start_M: NDArray[np.int64]


def gradients_vanish_with_depth(run: Run) -> Finding | NotLooked | None:
    """The first layers get next to no gradient.

    What it looks at: grad_norm of the first layer that has gradients by that of the last one (all groups of a layer together),
    as the median of the first WINDOW measured steps and of the last ones before divergence, against VANISHING, and with fewer than
    four layers against A_LAYER for each step from one to the next.
    Why it matters: what the first layers do is never corrected. With SGD they stand still; Adam makes steps of full size out of
    noise.
    What to try: residual connections, model.norm = pre, weights that keep the size of activations; a lower optimizer.lr if it came later.
    Known limits: layers without any gradient (frozen ones) do not count. A dip between the beginning and the end is not seen.
    Source: SOURCE.
    """
    return _found(
        run,
        rule="gradients_vanish_with_depth",
        title="Gradients vanish on the way to the first layers",
        sign=-1,
        threshold=VANISHING,
        several="have first layers that get next to no gradient",
        remedy=(
            "Residual connections, model.norm = pre, or weights that keep the size of activations; a lower optimizer.lr, if it "
            "came in the course of training."
        ),
        explains=("stalled", "plateau"),
    )


def gradients_explode_with_depth(run: Run) -> Finding | NotLooked | None:
    """The gradient grows from layer to layer on its way back.

    What it looks at: grad_norm of the first layer that has gradients by that of the last one (all groups of a layer together),
    as the median of the first WINDOW measured steps and of the last ones before divergence, against EXPLODING. It is an error
    where the member diverged, a warning where it stalled or its loss did not fall below LEARNED of the first one, else a note.
    Why it matters: no learning rate suits all layers: what moves the last ones at all throws the first ones far away.
    What to try: smaller weights (init.gain), model.norm = pre. Clipping alone does not help: of 8 layers with a gain of 1.4 that
    diverge, clipped to 1, the loss stays finite and where it began.
    Known limits: layers without any gradient (frozen ones) do not count. Fewer layers grow less: a factor of 4 a layer is found
    from four layers on.
    Source: SOURCE.
    """
    return _found(
        run,
        rule="gradients_explode_with_depth",
        title="Gradients explode on the way to the first layers",
        sign=1,
        threshold=EXPLODING,
        several="have gradients that grow from layer to layer on their way back",
        remedy=(
            "Smaller weights (init.gain), or normalization (model.norm = pre). Clipping alone keeps the loss finite, and where it "
            "began."
        ),
        explains=("clipping_always_on", "loss_explosion", "nonfinite", "stalled"),
    )


def vanished_later(run: Run) -> dict[str, tuple[int, float]]:
    """Each member whose first layers had gradients at first and none in the end: since which step, and the median ratio."""
    depth = _depth_of(run)
    with np.errstate(all="ignore"):
        ratio_K = depth.norm_K[0] / depth.norm_K[1]
    found = {}
    for m, entry in enumerate(run.entries):
        k = slice(int(depth.start_M[m]), int(depth.start_M[m + 1]))
        mine_K = ratio_K[k]
        limit = _vanishing(int(depth.layer_K[1][k][-1] - depth.layer_K[0][k][-1])) if len(mine_K) else 0.0
        if len(mine_K) < WINDOW or not np.median(mine_K[:3]) > 2 * limit:
            continue
        median = float(np.median(mine_K[-WINDOW:]))
        if median < limit:
            found[entry.name] = int(depth.step_K[k][np.argmax(mine_K < limit)]), median
    return found


def _found(
    run: Run,
    *,
    rule: str,
    title: str,
    sign: int,
    threshold: float,
    several: str,
    remedy: str,
    explains: tuple[str, ...],
) -> Finding | NotLooked | None:
    depth = _depth_of(run)
    with np.errstate(all="ignore"):
        ratio_K = depth.norm_K[0] / depth.norm_K[1]
    concerns = []
    blind = {}
    for m, record in enumerate(run.members):
        k = np.arange(depth.start_M[m], depth.start_M[m + 1])
        if not len(k):
            blind[record.name] = NO_LAYERS
            continue
        # At step 0 some gradients are 0 by design (weights that begin at 0); it counts only where it is all there is.
        windows = (k[1 : WINDOW + 1] if len(k) > 1 else k, k[-WINDOW:])
        medians = [float(np.median(ratio_K[window])) for window in windows]
        worst = int(np.argmax([sign * median for median in medians]))
        first, last = (int(layer_K[k[-1]]) for layer_K in depth.layer_K)
        limit = threshold if sign > 0 else _vanishing(last - first)
        if sign * medians[worst] <= sign * limit:
            continue
        window = windows[worst]
        at = int(window[np.argmax(sign * ratio_K[window] > sign * limit)])
        first, last = (int(layer_K[at]) for layer_K in depth.layer_K)
        near, far = (float(norm_K[at]) for norm_K in depth.norm_K)
        step = int(depth.step_K[at])
        said = (
            f"At step {step} the gradient of layer {first} of {record.name} has norm {near:.3g} and that of layer {last} {far:.3g}: "
            f"over {len(window)} measured steps the median of their ratio is {medians[worst]:.2g} "
            f"({'below' if sign < 0 else 'above'} {limit:g})."
        )
        concerns.append(
            Concern(
                member=record.name,
                step=step,
                badness=float(sign * np.log(max(medians[worst], 1e-300))),
                said=said,
                evidence=(
                    Evidence(
                        member=record.name,
                        step=step,
                        layer=first,
                        quantity="grad_norm",
                        value=near,
                        threshold=limit * far,
                    ),
                    Evidence(member=record.name, step=step, layer=last, quantity="grad_norm", value=far),
                ),
                severity=_severity(record, sign),
            )
        )
    finding = finding_of(
        run,
        concerns,
        rule=rule,
        title=title,
        kind="cause",
        several=several,
        remedy=remedy,
        source=SOURCE,
        explains=explains,
    )
    return answer(run, rule, finding, blind | without_steps(run))


def _vanishing(layers_below: int) -> float:
    return float(max(VANISHING, A_LAYER**layers_below))


def _severity(record: MemberRecord, sign: int) -> Severity:
    if sign < 0:
        return "warning"  # all that were measured had learned less than their likes
    if record.diverged_at is not None:
        return "error"
    first, final = record.first_loss, record.final_loss
    learned_nothing = first is not None and final is not None and final > LEARNED * first > 0
    return "warning" if record.status == "stalled" or learned_nothing else "note"


_known: "WeakKeyDictionary[Run, _Depth]" = WeakKeyDictionary()  # several rules ask for the same


def _depth_of(run: Run) -> _Depth:
    if run not in _known:
        pieces = [_depth_in(run, rows) for rows in pieces_of(run, run.params["step"].to_numpy())]
        codes_K, step_K, near_K, far_K, near_norm_K, far_norm_K = (
            np.concatenate(each) for each in zip(*pieces, strict=True)
        )
        _known[run] = _Depth(
            step_K=step_K,
            layer_K=(near_K, far_K),
            norm_K=(near_norm_K, far_norm_K),
            start_M=np.searchsorted(codes_K, np.arange(len(run.entries) + 1)),
        )
    return _known[run]


def _depth_in(run: Run, rows: slice) -> tuple[NDArray[Any], ...]:
    """Member, step, the first and the last layer with a gradient and its norms there, of each step in these rows, (K,)."""
    params = run.params.iloc[rows]
    codes_N, step_N = members_of_rows(params), params["step"].to_numpy().astype(np.int64)
    layer_N, norm_N = params["layer"].to_numpy().astype(np.int64), params["grad_norm"].to_numpy().astype(np.float64)
    rows_N = np.flatnonzero((layer_N >= 0) & np.isfinite(norm_N) & (norm_N > 0) & (step_N < diverged_at(run)[codes_N]))
    rows_N = rows_N[order_by_step(codes_N[rows_N], step_N[rows_N], layer_N[rows_N])]
    codes_N, step_N, layer_N, norm_N = codes_N[rows_N], step_N[rows_N], layer_N[rows_N], norm_N[rows_N]
    begins_N = np.ones(len(rows_N), dtype=bool)
    begins_N[1:] = (codes_N[1:] != codes_N[:-1]) | (step_N[1:] != step_N[:-1]) | (layer_N[1:] != layer_N[:-1])
    first_L = np.flatnonzero(begins_N)  # of each layer at each step
    norm_L = np.sqrt(np.add.reduceat(norm_N**2, first_L)) if len(first_L) else np.empty(0)
    codes_L, step_L, layer_L = codes_N[first_L], step_N[first_L], layer_N[first_L]
    begins_L = np.ones(len(first_L), dtype=bool)
    begins_L[1:] = (codes_L[1:] != codes_L[:-1]) | (step_L[1:] != step_L[:-1])
    near_K = np.flatnonzero(begins_L)
    far_K = np.r_[near_K[1:], len(first_L)][: len(near_K)] - 1
    several_K = layer_L[near_K] < layer_L[far_K]
    near_K, far_K = near_K[several_K], far_K[several_K]
    return codes_L[near_K], step_L[near_K], layer_L[near_K], layer_L[far_K], norm_L[near_K], norm_L[far_K]
