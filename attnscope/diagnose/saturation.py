"""When attention counts as saturated, and the first steps at which it was.

Shape key: N rows, M member in the order of run.json.
"""

from attnscope.diagnose.finding import Evidence
from attnscope.runs.by_member import NEVER, diverged_at, members_of_rows
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
    codes_N, step_N = members_of_rows(heads), heads["step"].to_numpy()
    before_N = (end_M[codes_N] < NEVER) & (step_N < end_M[codes_N])
    rows = heads.loc[before_N, ["entropy_ratio", "max_logit"]]
    by_step = rows.groupby([codes_N[before_N], step_N[before_N]]).agg(
        {"entropy_ratio": "mean", "max_logit": "max"}
    )
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
