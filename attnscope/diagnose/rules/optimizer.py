"""Rules of the optimizer's other settings: weight decay and Adam's epsilon.

Shape key: N rows, G parameter groups of all members, M member in the order of run.json.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnscope.diagnose.blindness import answer, without_optimizer, without_steps
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.diagnose.courses import changes_in, order_of_rows
from attnscope.diagnose.movement import NO_PARAMS, movement_of, without_movement
from attnscope.diagnose.pieces import PIECE
from attnscope.diagnose.twins import Twin, better_twins, number_of, setting_of
from attnscope.findings import Evidence, Finding, NotLooked, Severity
from attnscope.runs.by_member import NEVER, diverged_at, members_of_rows
from attnscope.runs.reader import Run
from attnscope.runs.watched import optimizers_of

# Weight decay: what is left of the typical group's norm, and how much of the way that it went led towards zero. Measured with
# AdamW (pre norm, lr 1e-3 and 3e-3, decay 0 to 100) and SGD (pre norm, lr 0.03 and 0.1, decay 0 to 3), two seeds, 200 steps: the 26 members
# that pass both ended 0.12 to 2.3 nats above their likes without decay, the others within 0.08. Without decay nothing shrinks.
LEFT_OVER = 0.25
TOWARDS_ZERO = 0.5
FEWEST_MEASURED = 10

# Adam's first step moves every entry by lr: then update_norm x grad_max is at least lr x grad_norm in every group, whatever its size.
# Measured at the first step as a multiple of that: 2.7 and more in each group of 60 healthy members, 5 and more in the median group;
# 1.2 to 1.4 with eps 1e-2, which cost 0.4 to 0.5 nats in 150 steps, 0.02 with eps 1.
ADAM_SHARE = 2.0
SLOW_RATIO = 1e-4  # typical update_ratio: with less, 200 steps of Adam left the loss 0.8 nats and more above the best
MARGIN = 0.1  # nats, see learning_rate_too_high
ADAMS = {"Adam", "AdamW", "NAdam"}

DECAY_SOURCE = "measured: 26 members of which a quarter of the weights was left ended 0.12 to 2.3 nats above their likes without decay"
EPSILON_SOURCE = (
    "Kingma and Ba 2015; measured: with eps 1e-2 and lr 1e-3 the loss is 0.4 to 0.5 nats higher after 150 steps"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shrunk:
    """Each parameter group that begins with weights, from the first to the last measured step before divergence.

    Attributes:
        layer_G: -1 for what belongs to no layer.
        left_G: its last norm by its first.
        towards_G: what its norm lost by the length of the way that its weights went.
        first_row_G: of the params table.
        last_row_G: of the params table.
        start_M: where a member begins along G.
    """

    layer_G: NDArray[np.int64]
    left_G: NDArray[np.float64]
    towards_G: NDArray[np.float64]
    first_row_G: NDArray[np.int64]
    last_row_G: NDArray[np.int64]
    start_M: NDArray[np.int64]


def weight_decay_too_strong(run: Run) -> Finding | NotLooked | None:
    """Weight decay shrinks the weights faster than gradients build them up.

    What it looks at: weight_norm at the last measured step by that at the first, and how much of the way that the weights went
    (sum of update_norm) led towards zero, as medians over the groups of layers; found below LEFT_OVER, where the share is above TOWARDS_ZERO.
    Why it matters: what is learned is forgotten at the same pace, and small weights make every update a large one.
    What to try: optimizer.weight_decay ten times smaller. What counts is lr x weight_decay x steps: with SGD's large learning rates
    0.01 is much, with Adam 0.1 is usual.
    Known limits: decay that balances gradients at weights that have not shrunk is not found. A penalty in the loss, or a
    projection, shrinks weights as decay does. Steps between those that were measured count as the one before them.
    Source: DECAY_SOURCE.
    """
    shrunk = _shrunk_groups(run)
    blind, concerns = {}, []
    for m, record in enumerate(run.members):
        groups = np.arange(shrunk.start_M[m], shrunk.start_M[m + 1])
        if not len(groups):
            blind[record.name] = f"{NO_PARAMS} {FEWEST_MEASURED} times"
            continue
        if (shrunk.layer_G[groups] >= 0).any():  # embeddings are often not decayed
            groups = groups[shrunk.layer_G[groups] >= 0]
        left, towards = (float(np.median(x_G[groups])) for x_G in (shrunk.left_G, shrunk.towards_G))
        if not (left < LEFT_OVER and towards > TOWARDS_ZERO):
            continue
        worst = int(groups[np.argmin(np.abs(shrunk.left_G[groups] - left))])
        first, last = (run.params.iloc[int(row_G[worst])] for row_G in (shrunk.first_row_G, shrunk.last_row_G))
        layer, group = int(first["layer"]), str(first["group"])
        decay = number_of(run, record.settings, "optimizer.weight_decay")
        begun = f"With weight_decay {decay:g} the" if decay else "The"
        concerns.append(
            Concern(
                member=record.name,
                step=int(first["step"]),
                badness=-left,
                said=(
                    f"{begun} weights of {record.name} shrink to {left:.2g} of their size by step {int(last['step'])} (median over "
                    f"{len(groups)} groups), and {towards:.0%} of the way that they went led towards zero."
                ),
                evidence=(
                    Evidence(
                        member=record.name,
                        step=int(last["step"]),
                        layer=None if layer < 0 else layer,
                        group=group,
                        quantity="weight_norm",
                        value=float(last["weight_norm"]),
                        threshold=LEFT_OVER * float(first["weight_norm"]),
                    ),
                ),
                severity="warning",
            )
        )
    finding = finding_of(
        run,
        concerns,
        rule="weight_decay_too_strong",
        title="Weight decay is too strong",
        kind="cause",
        several="have weights that shrink away",
        remedy="Try a tenth of optimizer.weight_decay: what counts is lr x weight_decay x steps.",
        source=DECAY_SOURCE,
        explains=(
            "starved_queries_and_keys",
            "uniform_attention",
            "gradients_vanish_with_depth",
            "stalled",
            "plateau",
            "rank_collapse",
            "loss_rises",
        ),
    )
    return answer(run, "weight_decay_too_strong", finding, blind | without_steps(run))


def adam_epsilon_too_large(run: Run) -> Finding | NotLooked | None:
    """Adam's epsilon is larger than its gradients.

    What it looks at: the first measured step of members trained by Adam, AdamW or NAdam. There every entry of the weights moves by
    lr, so that update_norm x grad_max / (lr x grad_norm) is at least 1, and mostly 3 to 40; with an epsilon above the gradients it is
    grad_max by epsilon. It is found below ADAM_SHARE, as the median over groups, or of a watched script, whose groups may have learning rates of
    their own, in all of them. It is a warning where the typical update_ratio is below SLOW_RATIO, or a member with a smaller
    optimizer.eps ended MARGIN nats better, else a note.
    Why it matters: Adam becomes SGD with the learning rate lr / eps, mostly a tiny one.
    What to try: eps 1e-8 (with float16 states the smallest that is not rounded to 0, 1e-7), or a larger lr if it is meant.
    Known limits: an epsilon that only reaches the smallest gradients is not found. Other optimizers that have one are not looked at.
    Source: EPSILON_SOURCE.
    """
    blind = without_optimizer(run) | without_movement(run)
    adams = _trained_by_adam(run)
    twins = better_twins(run, "optimizer.eps", lower=True, margin=MARGIN)
    moves = movement_of(run)
    shares = _adam_shares(run)
    concerns = []
    for m, record in enumerate(run.members):
        if record.name not in adams or record.name in blind:
            continue
        if m not in shares:
            blind[record.name] = "lr was not recorded"
            continue
        row, share, epsilon = shares[m]
        if share >= ADAM_SHARE:
            continue
        severity, harm = _harm_of_epsilon(float(np.median(moves.ratio_K[moves.of(m)])), twins.get(record.name))
        place = run.params.iloc[row]
        layer, step = int(place["layer"]), int(place["step"])
        set_to = number_of(run, record.settings, "optimizer.eps")
        said_eps = f"eps {set_to:g}" if set_to is not None else f"an eps of about {epsilon:.1g}"
        concerns.append(
            Concern(
                member=record.name,
                step=step,
                badness=-share,
                said=(
                    f"At step {step} update_norm x grad_max / (lr x grad_norm) is {share:.2g} in {record.name} (below {ADAM_SHARE:g}): "
                    f"Adam hardly divides by its gradients, as with {said_eps}.{harm}"
                ),
                evidence=(
                    Evidence(
                        member=record.name,
                        step=step,
                        layer=None if layer < 0 else layer,
                        group=str(place["group"]),
                        quantity="update_norm",
                        value=float(place["update_norm"]),
                        threshold=float(place["update_norm"]) * ADAM_SHARE / share,
                    ),
                ),
                severity=severity,
            )
        )
    finding = finding_of(
        run,
        concerns,
        rule="adam_epsilon_too_large",
        title="Adam's epsilon is larger than the gradients",
        kind="cause",
        several="have an epsilon that drowns their gradients",
        remedy="Set eps to 1e-8 (optimizer.eps), or 1e-7 in float16; if it is meant, a larger lr.",
        source=EPSILON_SOURCE,
        explains=("learning_rate_too_low", "stalled", "plateau"),
    )
    return answer(run, "adam_epsilon_too_large", finding, blind)


def _shrunk_groups(run: Run) -> _Shrunk:
    params, n_members = run.params, len(run.entries)
    codes_N, layer_N, group_N = (
        params["member"].cat.codes.to_numpy(), params["layer"].to_numpy(), params["group"].cat.codes.to_numpy()
    )  # fmt: skip
    step_N, weight_N, update_N = (params[name].to_numpy() for name in ("step", "weight_norm", "update_norm"))
    good_N = np.isfinite(weight_N) & np.isfinite(update_N)
    if (diverged_at(run) < NEVER).any():
        good_N &= step_N < diverged_at(run)[codes_N]
    rows_N = np.flatnonzero(good_N).astype(np.int32)
    keys = codes_N, layer_N, group_N
    rows_N = rows_N[order_of_rows(step_N[rows_N], *(key_N[rows_N] for key_N in keys))]
    first_G = changes_in(*(key_N[rows_N] for key_N in keys))
    behind_G = np.r_[first_G[1:], len(rows_N)][: len(first_G)]
    way_G, left_on = np.zeros(len(first_G)), -1
    while left_on + 1 < len(first_G):  # some groups at a time
        begin = left_on + 1
        left_on = max(begin, int(np.searchsorted(behind_G, first_G[begin] + PIECE, side="right")) - 1)
        mine = rows_N[first_G[begin] : behind_G[left_on]]
        own_G = first_G[begin : left_on + 1] - first_G[begin]
        span_N = np.ones(len(mine))
        span_N[:-1] = np.diff(step_N[mine].astype(np.int64))
        span_N[own_G[1:] - 1] = 0  # the update of the last step led on from its weights
        span_N[-1] = 0
        way_G[begin : left_on + 1] = np.add.reduceat(update_N[mine].astype(np.float64) * span_N, own_G)
    last_G = behind_G - 1
    begun_G, ended_G = (weight_N[rows_N[row_G]].astype(np.float64) for row_G in (first_G, last_G))
    keep_G = (begun_G > 0) & (way_G > 0) & (last_G - first_G + 1 >= FEWEST_MEASURED)
    first_G, last_G = rows_N[first_G[keep_G]], rows_N[last_G[keep_G]]
    way_G, begun_G, ended_G = way_G[keep_G], begun_G[keep_G], ended_G[keep_G]
    return _Shrunk(
        layer_G=layer_N[first_G].astype(np.int64),
        left_G=ended_G / begun_G,
        towards_G=(begun_G - ended_G) / way_G,
        first_row_G=first_G.astype(np.int64),
        last_row_G=last_G.astype(np.int64),
        start_M=np.searchsorted(codes_N[first_G], np.arange(n_members + 1)),
    )


def _trained_by_adam(run: Run) -> set[str]:
    if run.kind == "watch":
        return {name for name, names in optimizers_of(run).items() if names <= ADAMS}
    return {e.name for e in run.entries if setting_of(run, e.settings, "optimizer.name") == "adamw"}


def _adam_shares(run: Run) -> dict[int, tuple[int, float, float]]:
    """Member to the row of the params table that decides, its share of the smallest step of Adam, and the epsilon that explains it."""
    params, moves = run.params, movement_of(run)
    codes_N, step_N = params["member"].cat.codes.to_numpy(), params["step"].to_numpy()
    first_M = np.full(len(run.entries), -1)
    begun = np.flatnonzero(np.diff(moves.start_M))
    first_M[begun] = moves.step_K[moves.start_M[begun]]
    steps = run.steps
    at_first_S = steps["step"].to_numpy() == first_M[members_of_rows(steps)]
    lr_M = np.full(len(run.entries), np.nan)
    lr_M[members_of_rows(steps)[at_first_S]] = steps["lr"].to_numpy()[at_first_S]
    rows_N = np.flatnonzero(step_N == (first_M[0] if len(first_M) == 1 else first_M[codes_N]))
    norm_N, update_N, largest_N = (
        params[name].to_numpy()[rows_N].astype(np.float64) for name in ("grad_norm", "update_norm", "grad_max")
    )
    with np.errstate(all="ignore"):
        share_N = update_N * largest_N / (lr_M[codes_N[rows_N]] * norm_N)
        epsilon_N = lr_M[codes_N[rows_N]] * norm_N / update_N
    found = {}
    for m in begun.tolist():
        mine = np.flatnonzero((codes_N[rows_N] == m) & np.isfinite(share_N) & (share_N > 0))
        if not len(mine):
            continue
        order = mine[np.argsort(share_N[mine])]
        decides = order[-1] if run.kind == "watch" else order[len(order) // 2]
        found[m] = int(rows_N[decides]), float(share_N[decides]), float(epsilon_N[decides])
    return found


def _harm_of_epsilon(ratio: float, twin: Twin | None) -> tuple[Severity, str]:
    if twin is not None:
        return "warning", (
            f" It ended at a loss of {twin.loss:.3g}, {twin.better} with {twin.better_value:g} at {twin.better_loss:.3g}."
        )
    if ratio < SLOW_RATIO:
        return "warning", f" The typical group moves by {ratio:.2g} of its weights in a step."
    return "note", " The weights move all the same."
