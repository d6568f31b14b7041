"""Rules of saturation: when attention counts as saturated, the first steps at which it was, and saturation from the start.

Shape key: N rows, M member in the order of run.json.
"""

import numpy as np

from attnscope.diagnose.blindness import NO_RATIO, answer, without_attention
from attnscope.findings import Evidence, Finding, NotLooked, of_several, worst_first
from attnscope.runs.by_member import NEVER, diverged_at, first_measured, mean_by_member, members_of_rows
from attnscope.runs.reader import Run

# Mean entropy_ratio at step 0. Measured on 12 shapes (no, pre and post norm; 2, 4 and 8 layers; d_head 16 to 64; seq_len 32
# and 64; SGD and AdamW), each with 12 combinations of scale, gain and scheme and two seeds, 150 steps. All scaled members
# with Xavier weights and gain 1 are above it (0.29 and more), but for 8 layers without norm (0.15), which diverge.
SATURATED_RATIO = 0.2
MEASURED = (
    "measured on 288 members of 12 shapes: of 125 below it, 83 diverged and the others ended 0.12 nats or more above the "
    "best of their shape; of 163 above it, 11 diverged"
)

# Wortsman et al. 2023: transplanted logits hurt from 1e3 on. Of the 152 members behind SATURATED_RATIO that neither began
# saturated nor diverged, 2 went above it (at losses of thousands), and 4 below SATURATED_RATIO.
LARGE_LOGIT = 1e3


def early_signals(run: Run) -> dict[str, tuple[Evidence, ...]]:
    """For each member that diverged, the first step before at which a signal was out of its range.

    A member whose attention was measured before, but was never out of range, has an empty tuple.
    """
    import pandas as pd

    heads, end_M = run.heads, diverged_at(run)
    if (end_M == NEVER).all():
        return {}
    codes_N, step_N = members_of_rows(heads), heads["step"].to_numpy()
    before_N = (end_M[codes_N] < NEVER) & (step_N < end_M[codes_N])
    rows = heads.loc[before_N, ["entropy_ratio", "max_logit"]]
    by_step = rows.groupby([codes_N[before_N], step_N[before_N]]).agg({"entropy_ratio": "mean", "max_logit": "max"})
    codes = by_step.index.get_level_values(0)
    found: dict[int, list[Evidence]] = {int(code): [] for code in codes.unique()}
    for column, limit, out in (
        ("entropy_ratio", SATURATED_RATIO, by_step["entropy_ratio"] < SATURATED_RATIO),
        ("max_logit", LARGE_LOGIT, by_step["max_logit"] > LARGE_LOGIT),
    ):
        values = by_step.loc[out, column]
        firsts = values[~pd.Index(values.index.get_level_values(0)).duplicated()]
        for (code, step), value in firsts.items():
            found[code].append(
                Evidence(
                    member=run.entries[code].name,
                    step=int(step),
                    quantity=column,
                    value=float(value),
                    threshold=limit,
                )
            )
    return {run.entries[code].name: tuple(each) for code, each in found.items()}


def saturated_at_start(run: Run) -> Finding | NotLooked | None:
    """The softmax is close to one-hot before anything is learned.

    What it looks at: entropy_ratio at each member's first measured step, mean over layers and heads, against SATURATED_RATIO.
    Why it matters: the softmax's derivative vanishes where it is one-hot (softmax_gain near 0), so q and k get no
    gradient that could undo it, and each query copies one arbitrary value vector.
    What to try: 1/sqrt(d_head); smaller init.qk_gain or init.gain; normalization before attention; qk_norm.
    Known limits: the threshold was measured on models that start from random weights; a pretrained one may be sharp on purpose.
    A single saturated head among many does not move the mean.
    Source: MEASURED; the mechanism: Vaswani et al. 2017, Zhai et al. 2023.
    """
    heads = first_measured(run.heads, len(run.entries))
    codes_N = members_of_rows(heads)
    ratio_N = heads["entropy_ratio"].to_numpy().astype(np.float64)
    ratio_M = mean_by_member(codes_N, ratio_N, len(run.entries))
    concerned = np.flatnonzero(ratio_M < SATURATED_RATIO)
    blind = {
        entry.name: NO_RATIO for entry, ratio in zip(run.entries, ratio_M, strict=True) if np.isnan(ratio)
    } | without_attention(run)
    if not len(concerned):
        return answer(run, "saturated_at_start", None, blind)
    names = [run.entries[m].name for m in concerned]
    worst = int(concerned[ratio_M[concerned].argmin()])
    mine_N = codes_N == worst
    means = {
        column: mean_by_member(codes_N, heads[column].to_numpy().astype(np.float64), len(run.entries))
        for column in ("max_prob", "softmax_gain")
    }
    step = int(heads["step"].to_numpy()[mine_N][0])
    place_N = np.flatnonzero(np.isin(codes_N, concerned) & (ratio_N < SATURATED_RATIO))
    evidence, left_out = worst_first(
        place_N.tolist(),
        lambda at: Evidence(
            member=run.entries[codes_N[at]].name,
            step=int(heads["step"].iloc[at]),
            layer=int(heads["layer"].iloc[at]),
            head=int(heads["head"].iloc[at]),
            quantity="entropy_ratio",
            value=float(ratio_N[at]),
            threshold=SATURATED_RATIO,
        ),
        order=lambda at: ratio_N[at],
    )
    finding = Finding(
        rule="saturated_at_start",
        title="The softmax is saturated from the start",
        kind="cause",
        severity="error" if any(run.members[m].diverged_at is not None for m in concerned) else "warning",
        summary=(
            f"{of_several(names, 'begin with nearly one-hot attention')}At step {step} the mean entropy of "
            f"{run.entries[worst].name} is {ratio_M[worst]:.2g} of its maximum (below {SATURATED_RATIO}), the largest "
            f"weight of a query {means['max_prob'][worst]:.2g} on average, and softmax_gain "
            f"{means['softmax_gain'][worst]:.2g}."
        ),
        members=tuple(names),
        evidence=evidence,
        evidence_left_out=left_out,
        remedy=(
            "Make the logits smaller: 1/sqrt(d_head) (attention.scale = inverse_sqrt), smaller initial weights "
            "(init.qk_gain, init.gain), normalization before attention (model.norm = pre), or attention.qk_norm."
        ),
        source=MEASURED,
        step=step,
        explains=(
            "half_precision_headroom",  # it takes large products to be one-hot
            "logit_growth",
            "starved_queries_and_keys",
            "nonfinite",
            "loss_explosion",
            "stalled",
        ),
    )
    return answer(run, "saturated_at_start", finding, blind)
