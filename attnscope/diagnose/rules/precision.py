"""Rules of half precision: numbers that come close to its largest, a loss scale that falls away, updates that are rounded away.

Shape key: N rows, M member in the order of run.json.
"""

import numpy as np
from numpy.typing import NDArray

from attnscope.diagnose.blindness import answer, without_attention, without_optimizer, without_steps
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.diagnose.levels import untrained_in
from attnscope.diagnose.products import FLOAT16_MAX, products_of
from attnscope.findings import Evidence, Finding, NotLooked
from attnscope.runs.by_member import diverged_at, members_of_rows, slices_of, sorted_by_member
from attnscope.runs.reader import Run
from attnscope.runs.watched import dtypes_of

# Of FLOAT16_MAX. Measured in float16 with pre norm, AdamW, d_model 64, 80 steps, two seeds: at lr 1e-3 and 3e-3 q.k stays below 0.002
# of it, with a qk_gain of 4, 10 and 20 below 0.01, 0.05 and 0.19: none of 20 members overflows. Of 19 above it 11 overflow (all 4
# with a qk_gain of 60, 7 of 7 at lr 0.1 and 0.3), and 8 with a qk_gain of 30 and 40 do not within 80 steps, at most at 0.75.
HEADROOM = 0.25
MEASURED_HEADROOM = (
    "measured: healthy training stays below 0.002 of it; of 19 members that came above, 11 overflowed within 80 steps"
)

LEAST_SCALE = 1.0  # a loss scale that protects nothing any more
FIRST_SCALE = 2.0  # of a run that scales its loss

HALF_ULP = 2.0**-9  # of bfloat16, whose significand has 8 bits: an entry moves only by more than this share of its size
FEWEST_MEASURED = 5  # steps
# Measured with AdamW and SGD on bfloat16 weights beside float32 ones, pre norm, 150 steps, lr 1e-5 to 1e-1, two seeds: at a median
# update_ratio of 0.0002 they end 0.26 to 0.34 nats higher, at 0.0015 0.16, at 0.002 to 0.004 0.03 to 0.05, at 0.01 less than 0.02.
# Models that were trained before (80 steps at lr 1e-5 and 1e-4, ratios of 0.00003 to 0.0008) end 0.01 to 0.02 higher.
MEASURED_ROUNDING = (
    "measured: below 2^-9 a run of 150 steps ends 0.16 to 0.34 nats above its float32 twin, above it at most 0.05"
)
_MANY = 2**32  # more than there are steps


def half_precision_headroom(run: Run) -> Finding | NotLooked | None:
    """q.k comes close to the largest float16 before it is scaled.

    What it looks at: members that compute attention in float16 without a fused kernel: max_logit over the scale is the largest
    q.k, against HEADROOM of FLOAT16_MAX; up to the step at which the member diverged.
    Why it matters: above it the product is infinite, however small the scale that follows, and its softmax NaN. Loss scaling
    protects the gradient only.
    What to try: bfloat16; F.scaled_dot_product_attention, which sums the product in float32; q times the scale before the product;
    attention.qk_norm.
    Known limits: of sampled query rows, so the largest product of all is larger. Only attention: activations of the MLP and output
    logits may overflow earlier. Of a watched script only where what multiplied the product could be seen; soft-capped logits
    tell nothing.
    Source: IEEE 754; MEASURED_HEADROOM.
    """
    product_N, blind = products_of(run)
    limit = HEADROOM * FLOAT16_MAX
    codes_N, step_N = run.heads["member"].cat.codes.to_numpy(), run.heads["step"].to_numpy()
    layer_N, head_N = run.heads["layer"].to_numpy(), run.heads["head"].to_numpy()
    over_N = product_N > limit
    if over_N.any():
        over_N &= step_N <= diverged_at(run)[codes_N]  # its step still has sound weights
    concerns = []
    for m in np.unique(codes_N[over_N]).tolist():
        record = run.members[m]
        rows_K = np.flatnonzero(over_N & (codes_N == m))
        first = int(rows_K[step_N[rows_K].argmin()])
        most = int(rows_K[product_N[rows_K].argmax()])
        broke = record.nonfinite_at
        said = (
            f"From step {step_N[first]} on, q.k of {record.name} is above {limit:,.0f} before it is scaled: {product_N[most]:,.0f} at step "
            f"{step_N[most]} in layer {layer_N[most]}, head {head_N[most]}; the largest float16 is {FLOAT16_MAX:,.0f}."
            + ("" if broke is None else f" At step {broke} its loss is not finite.")
        )
        evidence = tuple(
            Evidence(
                member=record.name,
                step=int(step_N[at]),
                layer=int(layer_N[at]),
                head=int(head_N[at]),
                quantity="max_logit",
                value=float(run.heads["max_logit"].iloc[at]),
                threshold=float(run.heads["max_logit"].iloc[at] / product_N[at] * limit),
            )
            for at in dict.fromkeys((most, first))
        )
        concerns.append(
            Concern(
                member=record.name,
                step=int(step_N[first]),
                badness=float(product_N[most]),
                said=said,
                evidence=evidence,
                severity="warning" if broke is None else "error",
            )
        )
    finding = finding_of(
        run,
        concerns,
        rule="half_precision_headroom",
        title="q.k comes close to the largest float16",
        kind="cause",
        several="come close to the largest float16",
        remedy=(
            "Use bfloat16, or a fused kernel (F.scaled_dot_product_attention sums the product in float32), or multiply q by the "
            "scale before the product; attention.qk_norm bounds it."
        ),
        source=MEASURED_HEADROOM,
        explains=("nonfinite", "nonfinite_loss_passed", "loss_explosion", "loss_scale_collapse", "updates_skipped"),
    )
    unmeasured = without_attention(run)
    blind = {name: unmeasured.get(name, why) for name, why in blind.items()}
    return answer(run, "half_precision_headroom", finding, blind)


def loss_scale_collapse(run: Run) -> Finding | NotLooked | None:
    """The loss scale was halved until nothing was left of it.

    What it looks at: loss_scale of members that begin with at least FIRST_SCALE, before they diverged: whether it came down to
    LEAST_SCALE or below.
    Why it matters: it is halved at each step whose gradient is not finite. At one, gradients overflow without any scaling, and
    what it was there to protect from, underflow, is no longer prevented.
    What to try: what makes the gradients large or not finite (other findings); bfloat16, which needs no scale.
    Known limits: of watched scripts only torch's GradScaler is seen. A scale that is kept low on purpose is no finding, as it does not
    begin high.
    Source: Micikevicius et al. 2018; DeepSpeed and fairseq stop at a least scale, too.
    """
    codes_N, step_N, scale_N = sorted_by_member(run.steps, ("step", "loss_scale"))
    keep_N = (step_N < diverged_at(run)[codes_N]) & np.isfinite(scale_N)
    codes_N, step_N, scale_N = codes_N[keep_N], step_N[keep_N], scale_N[keep_N]
    concerns = []
    for m, rows in enumerate(slices_of(codes_N, len(run.entries))):
        if rows.start == rows.stop or scale_N[rows][0] < FIRST_SCALE or scale_N[rows].min() > LEAST_SCALE:
            continue
        name, first = run.entries[m].name, float(scale_N[rows][0])
        at = rows.start + int((scale_N[rows] <= LEAST_SCALE).argmax())
        lowest = float(scale_N[rows].min())
        evidence = Evidence(
            member=name, step=int(step_N[at]), quantity="loss_scale", value=float(scale_N[at]), threshold=LEAST_SCALE
        )
        concerns.append(
            Concern(
                member=name,
                step=int(step_N[at]),
                badness=-lowest,
                said=(
                    f"The loss scale of {name} falls from {first:g} to {scale_N[at]:g} at step {step_N[at]}"
                    + (f", and to {lowest:.3g} later" if lowest < scale_N[at] else "")
                    + ": its gradients are not finite without any scale."
                ),
                evidence=(evidence,),
                severity="warning",
            )
        )
    finding = finding_of(
        run,
        concerns,
        rule="loss_scale_collapse",
        title="The loss scale was halved until nothing was left",
        kind="symptom",
        several="have no loss scale left",
        remedy="Remove what makes the gradients large or not finite (other findings), or use bfloat16, which needs no scale.",
        source="Micikevicius et al. 2018",
        explains=("stalled", "nonfinite"),
    )
    return answer(run, "loss_scale_collapse", finding, without_steps(run))


def updates_round_away(run: Run) -> Finding | NotLooked | None:
    """Updates are smaller than what bfloat16 weights can move by.

    What it looks at: watched scripts whose optimizers move bfloat16 weights and no others: the median update_ratio over parameter
    groups and measured steps at which the learning rate is at least half of its largest, against HALF_ULP = 2^-9, in runs of
    at least FEWEST_MEASURED such steps. It is a note where the model was trained before, as far as its first cross-entropy tells
    (below FROM_SCRATCH of ln(classes)), or where that was not seen.
    Why it matters: a bfloat16 number has 8 significant bits. An update below half a unit in the last place of a weight is rounded
    away, however often it comes; what is left of the others is coarse.
    What to try: float32 weights under autocast to bfloat16; an optimizer that keeps float32 copies, rounds stochastically or
    carries the rounding error along (Kahan summation).
    Known limits: an optimizer that does the latter two looks the same, and is not hurt. Runs of this lab keep float32 weights.
    Of older runs it is not known what the weights are.
    Source: MEASURED_ROUNDING.
    """
    if run.kind != "watch":
        return None
    dtypes, blind = dtypes_of(run), without_optimizer(run)
    blind = {
        entry.name: "the dtype of the weights was not recorded" for entry in run.entries if entry.name not in dtypes
    } | blind
    full_K, from_scratch = _full_rates(run), untrained_in(run)
    codes_N, step_N, layer_N, ratio_N = sorted_by_member(run.params, ("step", "layer", "update_ratio"))
    group_N = run.params["group"].to_numpy()[np.argsort(members_of_rows(run.params), kind="stable")]
    full_N = np.isin(codes_N * _MANY + step_N, full_K) & np.isfinite(ratio_N) & (step_N < diverged_at(run)[codes_N])
    concerns = []
    for m, entry in enumerate(run.entries):
        if dtypes.get(entry.name) != {"bfloat16"}:
            continue
        rows_K = np.flatnonzero(full_N & (codes_N == m))
        steps = np.unique(step_N[rows_K])
        if len(steps) < FEWEST_MEASURED:
            blind[entry.name] = f"fewer than {FEWEST_MEASURED} updates were measured at a full learning rate"
            continue
        ratio = float(np.median(ratio_N[rows_K]))
        if not ratio < HALF_ULP:
            continue
        last_K = rows_K[step_N[rows_K] == steps[-1]]
        evidence = tuple(
            Evidence(
                member=entry.name,
                step=int(step_N[at]),
                layer=None if layer_N[at] < 0 else int(layer_N[at]),
                group=str(group_N[at]),
                quantity="update_ratio",
                value=float(ratio_N[at]),
                threshold=HALF_ULP,
            )
            for at in last_K[np.argsort(ratio_N[last_K], kind="stable")]
        )
        concerns.append(
            Concern(
                member=entry.name,
                step=int(steps[0]),
                badness=-ratio,
                said=(
                    f"The weights of {entry.name} are bfloat16, and the median of its updates is {ratio:.2g} of the weights, below the "
                    f"{HALF_ULP:.2g} (2^-9) that a weight needs to move: most of them are rounded away."
                ),
                evidence=evidence,
                severity="warning" if entry.name in from_scratch else "note",
            )
        )
    finding = finding_of(
        run,
        concerns,
        rule="updates_round_away",
        title="Updates are rounded away",
        kind="cause",
        several="have updates that are rounded away",
        remedy=(
            "Keep the weights in float32 and run the forward pass under torch.autocast to bfloat16, or use an optimizer with float32 "
            "copies, stochastic rounding or Kahan summation."
        ),
        source=MEASURED_ROUNDING,
        explains=("learning_rate_too_low", "plateau", "stalled"),
    )
    return answer(run, "updates_round_away", finding, blind)


def _full_rates(run: Run) -> NDArray[np.int64]:
    """Steps at which the learning rate is at least half of the largest of its member, each with its member as one number."""
    codes_N, step_N, lr_N = sorted_by_member(run.steps, ("step", "lr"))
    most_M = np.full(len(run.entries), np.nan)
    np.fmax.at(most_M, codes_N.astype(np.int64), lr_N)
    full_N = (lr_N >= 0.5 * most_M[codes_N]) & (lr_N > 0)
    found_K: NDArray[np.int64] = codes_N[full_N] * _MANY + step_N[full_N]
    return found_K
