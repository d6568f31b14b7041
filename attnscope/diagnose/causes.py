"""Rules for causes: settings, and states that training starts from.

Shape key: N rows, M member in the order of run.json.
"""

import math

import numpy as np

from attnscope.config import Config
from attnscope.diagnose.by_member import (
    configs_of,
    diverged_at,
    first_measured,
    mean_by_member,
    members_of_rows,
    sorted_by_member,
)
from attnscope.diagnose.finding import MOST_EVIDENCE, Evidence, Finding, of_several
from attnscope.runs.reader import Run
from attnscope.runs.watched import AttentionLayer, attention_layers, optimizers_of

FITTED_TOLERANCE = (
    0.03  # of a scale that was fitted to logits: what the fit may leave unexplained, and a digit
)
SCALE_TOLERANCE = 0.01  # a scale typed with two digits is meant to be 1/sqrt(d_head)

# Mean entropy_ratio at step 0. Measured on 12 shapes (no, pre and post norm; 2, 4 and 8 layers; d_head 16 to 64; seq_len 32
# and 64; SGD and AdamW), each with 12 combinations of scale, gain and scheme and two seeds, 150 steps. All scaled members
# with Xavier weights and gain 1 are above it (0.29 and more), but for 8 layers without norm (0.15), which diverge.
SATURATED_RATIO = 0.2
MEASURED = (
    "measured on 288 members of 12 shapes: of 125 below it, 83 diverged and the others ended 0.12 nats or more above the "
    "best of their shape; of 163 above it, 11 diverged"
)

ALWAYS = 0.9  # share of steps
FEWEST_STEPS = 20  # with fewer there is no always
# Median clip_factor. Measured with SGD, 200 steps, two seeds: at 0.58 to 0.62 the final loss is that without clipping (within
# 0.04 nats), at 0.28 to 0.34 it is 0.7 to 1.0 higher, at 0.04 to 0.09 0.4 higher (pre norm), at 0.01 7 higher (no norm).
HARMLESS_FACTOR = 0.5


def applied_scale(run: Run) -> Finding | None:
    """Logits are multiplied by something else than 1/sqrt(d_head).

    What it looks at: attention.scale of each member, resolved for every layer, against 1/sqrt(d_head); beside it the
    measured logit_std of layer 0 against what theory gives at this scale. A learned scale is no finding. In watched runs,
    the scale that each layer was seen to apply.
    Why it matters: the dot product of two vectors of d_head independent unit-variance entries has a standard deviation
    of sqrt(d_head). What the scale does not take back is in the softmax: a larger one sharpens it until no gradient
    reaches q and k, a smaller one flattens it.
    What to try: attention.scale = inverse_sqrt.
    Source: Vaswani et al. 2017, section 3.2.1; 1/d_head: Yang et al. 2022 (muP).
    """
    if run.kind == "watch":
        return _scale_seen(run)
    found: dict[str, tuple[float, Evidence]] = {}
    config_of: dict[str, Config] = {}
    for entry, config in zip(run.entries, configs_of(run), strict=True):
        odd = None if config is None else _odd_scale(config)
        if config is None or odd is None:
            continue
        layer, scale = odd
        expected = config.d_head**-0.5
        config_of[entry.name] = config
        found[entry.name] = (
            abs(math.log(scale / expected)),
            Evidence(
                member=entry.name,
                layer=layer,
                quantity="attention.scale",
                value=scale,
                threshold=expected,
            ),
        )
    if not found:
        return None
    worst_first = [each for _, each in sorted(found.values(), key=lambda pair: -pair[0])]
    worst = worst_first[0]
    measured = _logit_std(run, config_of)
    value, expected = worst.value or 0.0, worst.threshold or 0.0
    config = config_of[worst.member]
    times = f"{value / expected:.3g} times" if value > expected else f"1/{expected / value:.3g} of"
    several = of_several(list(found), "do not multiply q.k by 1/sqrt(d_head)")
    place = f" in layer {worst.layer}" if config.attention.scale == "depth" else ""
    summary = (
        f"{several}{worst.member} multiplies q.k by {value:.3g}{place}, {times} 1/sqrt({config.d_head}) = "
        f"{expected:.3g}"
    )
    if worst.member in measured:
        spread = measured[worst.member]
        summary += (
            f"; at step {spread.step} the logits of layer 0 have a standard deviation of {spread.value:.3g}, where "
            f"unit-variance q and k give {spread.threshold:.3g} at this scale and 1 at 1/sqrt(d_head)"
        )
    if config.attention.qk_norm:
        summary += (
            f". Its q and k are normalized (qk_norm): while their gains are 1, no logit is above "
            f"{value * config.d_head:.3g}"
        )
    evidence = [
        each
        for scale in worst_first
        for each in (scale, measured.get(scale.member))
        if each is not None
    ]
    return Finding(
        rule="applied_scale",
        title="Attention logits are not scaled by 1/sqrt(d_head)",
        kind="cause",
        summary=f"{summary}.",
        members=tuple(found),
        evidence=tuple(evidence[:MOST_EVIDENCE]),
        evidence_left_out=max(0, len(evidence) - MOST_EVIDENCE),
        remedy=(
            "Set attention.scale = inverse_sqrt, and train a twin with it to see the difference."
            if value > expected
            else "If it is not on purpose (muP uses 1/d_head), set attention.scale = inverse_sqrt."
        ),
        source="Vaswani et al. 2017, section 3.2.1",
    )


def _scale_seen(run: Run) -> Finding | None:
    """Of a watched run: layers that were seen to multiply q.k by something else."""
    layers = [layer for layer in attention_layers(run) if layer.scale]
    odd = [
        layer
        for layer in layers
        if not math.isclose(abs(layer.scale or 0), layer.d_head**-0.5, rel_tol=FITTED_TOLERANCE)
    ]
    if not odd:
        return None

    def off(layer: AttentionLayer) -> float:
        return abs(math.log(abs(layer.scale or 1) * math.sqrt(layer.d_head)))

    worst_first = sorted(odd, key=off, reverse=True)
    worst = worst_first[0]
    scale, expected = abs(worst.scale or 0), worst.d_head**-0.5
    times = f"{scale / expected:.3g} times" if scale > expected else f"1/{expected / scale:.3g} of"
    names = tuple(dict.fromkeys(layer.member for layer in odd))
    return Finding(
        rule="applied_scale",
        title="Attention logits are not scaled by 1/sqrt(d_head)",
        kind="cause",
        summary=(
            f"{len(odd)} of {len(layers)} attention layers do not multiply q.k by 1/sqrt(d_head). {worst.name} multiplies it by "
            f"{scale:.3g}, {times} 1/sqrt({worst.d_head}) = {expected:.3g}."
        ),
        members=names,
        evidence=tuple(
            Evidence(
                member=layer.member,
                layer=layer.layer,
                group=layer.name,
                quantity="scale",
                value=layer.scale,
                threshold=layer.d_head**-0.5,
            )
            for layer in worst_first[:MOST_EVIDENCE]
        ),
        evidence_left_out=max(0, len(odd) - MOST_EVIDENCE),
        remedy=(
            "If it is not on purpose (T5 leaves it out and initializes smaller weights, muP uses 1/d_head), multiply q.k by "
            "1/sqrt(d_head): F.scaled_dot_product_attention does so where no scale is given."
        ),
        source="Vaswani et al. 2017, section 3.2.1",
    )


def saturated_at_start(run: Run) -> Finding | None:
    """The softmax is close to one-hot before anything is learned.

    What it looks at: entropy_ratio at each member's first measured step, mean over layers and heads.
    Why it matters: the softmax's derivative vanishes where it is one-hot (softmax_gain near 0), so q and k get no
    gradient that could undo it, and each query copies one arbitrary value vector.
    What to try: 1/sqrt(d_head); smaller init.qk_gain or init.gain; normalization before attention; qk_norm.
    Source: the threshold as MEASURED says; the mechanism: Vaswani et al. 2017, Zhai et al. 2023.
    """
    heads = first_measured(run.heads, len(run.entries))
    codes_N = members_of_rows(heads)
    ratio_N = heads["entropy_ratio"].to_numpy().astype(np.float64)
    ratio_M = mean_by_member(codes_N, ratio_N, len(run.entries))
    concerned = np.flatnonzero(ratio_M < SATURATED_RATIO)
    if not len(concerned):
        return None
    names = [run.entries[m].name for m in concerned]
    worst = int(concerned[ratio_M[concerned].argmin()])
    mine_N = codes_N == worst
    means = {
        column: mean_by_member(
            codes_N, heads[column].to_numpy().astype(np.float64), len(run.entries)
        )
        for column in ("max_prob", "softmax_gain")
    }
    step = int(heads["step"].to_numpy()[mine_N][0])
    place_N = np.flatnonzero(np.isin(codes_N, concerned) & (ratio_N < SATURATED_RATIO))
    place_N = place_N[np.argsort(ratio_N[place_N], kind="stable")]
    evidence = tuple(
        Evidence(
            member=run.entries[codes_N[at]].name,
            step=int(heads["step"].iloc[at]),
            layer=int(heads["layer"].iloc[at]),
            head=int(heads["head"].iloc[at]),
            quantity="entropy_ratio",
            value=float(ratio_N[at]),
            threshold=SATURATED_RATIO,
        )
        for at in place_N[:MOST_EVIDENCE]
    )
    return Finding(
        rule="saturated_at_start",
        title="The softmax is saturated from the start",
        kind="cause",
        summary=(
            f"{of_several(names, 'begin with nearly one-hot attention')}At step {step} the mean entropy of "
            f"{run.entries[worst].name} is {ratio_M[worst]:.2g} of its maximum (below {SATURATED_RATIO}), the largest "
            f"weight of a query {means['max_prob'][worst]:.2g} on average, and softmax_gain "
            f"{means['softmax_gain'][worst]:.2g}."
        ),
        members=tuple(names),
        evidence=evidence,
        evidence_left_out=len(place_N) - len(evidence),
        remedy=(
            "Make the logits smaller: 1/sqrt(d_head) (attention.scale = inverse_sqrt), smaller initial weights "
            "(init.qk_gain, init.gain), normalization before attention (model.norm = pre), or attention.qk_norm."
        ),
        source=MEASURED,
    )


def clipping_always_on(run: Run) -> Finding | None:
    """Clipping shrinks nearly every update.

    What it looks at: the share of steps with clip_factor below 1 and its median, after warm-up and before divergence, of
    members trained with SGD. AdamW and Muon divide the size of the gradient out again: clipped on every step to a tenth,
    AdamW ends where it ends without clipping (2.39 against 2.41, measured with pre norm).
    Why it matters: clipping is meant for rare peaks. Where it is always on, the update has the same size whatever the
    gradient is, so it is the learning rate that is limited, and what makes gradients large is hidden.
    What to try: the cause of the large gradients (see the other findings), then a threshold above the usual norm.
    Source: Pascanu et al. 2013; measured: the default model without a scale, clipped to 1, stays at losses of 17 to 23.
    """
    n_members = len(run.entries)
    configs = configs_of(run)
    optimizers = [None if config is None else config.optimizer for config in configs]
    seen = optimizers_of(run)
    by_size_M = np.array(
        [
            seen.get(entry.name, {"SGD"}) == {"SGD"} if each is None else each.name == "sgd"
            for entry, each in zip(run.entries, optimizers, strict=True)
        ]
    )
    warmup_M = np.array([0 if each is None else each.warmup_steps for each in optimizers])
    codes_N, step_N, factor_N = sorted_by_member(run.steps, ("step", "clip_factor"))
    counted_N = by_size_M[codes_N] & (step_N >= warmup_M[codes_N]) & ~np.isnan(factor_N)
    counted_N &= step_N < diverged_at(run)[codes_N]
    codes_N, factor_N = codes_N[counted_N], factor_N[counted_N]
    share_M = mean_by_member(codes_N, (factor_N < 1).astype(np.float64), n_members)
    steps_M = np.bincount(codes_N, minlength=n_members)
    ends_M = np.cumsum(steps_M)
    always = np.flatnonzero((steps_M >= FEWEST_STEPS) & (share_M >= ALWAYS))
    median = {
        int(m): float(np.median(factor_N[ends_M[m] - steps_M[m] : ends_M[m]])) for m in always
    }
    concerned = [m for m in median if median[m] < HARMLESS_FACTOR]
    if not concerned:
        return None
    worst_first = sorted(concerned, key=lambda m: median[m])
    worst = worst_first[0]
    names = [run.entries[m].name for m in concerned]
    evidence = [
        Evidence(
            member=run.entries[m].name,
            quantity="clip_factor",
            value=median[m],
            threshold=HARMLESS_FACTOR,
        )
        for m in worst_first[:MOST_EVIDENCE]
    ]
    return Finding(
        rule="clipping_always_on",
        title="Clipping shrinks nearly every update",
        kind="cause",
        summary=(
            f"{of_several(names, f'are clipped on at least {ALWAYS:.0%} of their steps')}{run.entries[worst].name} is "
            f"clipped on {round(share_M[worst] * steps_M[worst])} of {steps_M[worst]} steps, to a median of {median[worst]:.2g} of its "
            "gradient: the size of its updates is set by clipping."
        ),
        members=tuple(names),
        evidence=tuple(evidence),
        evidence_left_out=len(concerned) - len(evidence),
        remedy=(
            "First remove what makes gradients large (see the other findings), then set clip.threshold above the usual "
            "gradient norm."
        ),
        source="Pascanu et al. 2013; measured: above a median of 0.5 the final loss is that without clipping",
    )


def _odd_scale(config: Config) -> tuple[int, float] | None:
    """The layer in which the scale is furthest from 1/sqrt(d_head), and the scale there; None where it is that."""
    rule, d_head = config.attention.scale, config.d_head
    if rule in ("inverse_sqrt", "learned") or d_head < 1:
        return None
    last = config.model.n_layers - 1
    layer = last if rule == "depth" else 0
    if isinstance(rule, str):
        scale = {"none": 1.0, "inverse": 1 / d_head, "depth": d_head**-0.5 / (last + 1)}[rule]
    else:
        scale = float(rule)
    close = math.isclose(scale, d_head**-0.5, rel_tol=SCALE_TOLERANCE)
    return None if close else (layer, scale)


def _logit_std(run: Run, configs: dict[str, Config]) -> dict[str, Evidence]:
    """Of these members, where step 0 was measured: logit_std of layer 0 and what unit-variance q and k give.

    Layer 0 sees the embeddings alone: in later layers the residual stream has grown.
    """
    heads = first_measured(run.heads, len(run.entries))
    heads = heads[(heads["layer"] == 0) & (heads["step"] == 0)]
    square_N = heads["logit_std"].to_numpy().astype(np.float64) ** 2
    spread_M = np.sqrt(mean_by_member(members_of_rows(heads), square_N, len(run.entries)))
    found = {}
    for m, entry in enumerate(run.entries):
        odd = _odd_scale(configs[entry.name]) if entry.name in configs else None
        if odd is None or not math.isfinite(spread_M[m]):
            continue
        config = configs[entry.name]
        by_depth = config.attention.scale == "depth"  # which leaves layer 0 as it is
        found[entry.name] = Evidence(
            member=entry.name,
            step=0,
            layer=0,
            quantity="logit_std",
            value=float(spread_M[m]),
            threshold=1.0 if by_depth else odd[1] * math.sqrt(config.d_head),
        )
    return found
