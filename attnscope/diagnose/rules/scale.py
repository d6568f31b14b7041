"""Rules for attention scales that are not 1/sqrt(d_head): a note, and a warning or error where harm was measured that they explain.

Shape key: N rows, M member in the order of run.json.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from attnscope.diagnose.applied_scale import Applied, odd_scales, unseen_scales
from attnscope.diagnose.blindness import NO_RATIO, answer, without_attention
from attnscope.diagnose.courses import head_courses, largest_of
from attnscope.diagnose.rules.heads import FEWEST_STEPS_TO_LEARN, UNIFORM_STD
from attnscope.diagnose.rules.saturation import early_signals
from attnscope.findings import Evidence, Finding, NotLooked, Severity, of_several, worst_first
from attnscope.runs.by_member import configs_of, first_measured, mean_by_member, members_of_rows
from attnscope.runs.members import MemberRecord
from attnscope.runs.reader import Run

if TYPE_CHECKING:
    import pandas as pd

# Times 1/sqrt(d_head), from which on a scale explains sharp attention: with less, the logits would be nearly as large without it.
EXPLAINS = 1.5
# Mean entropy_ratio at the start, and nats at the end against the twin with 1/sqrt(d_head). Measured with pre norm, d_model 64, 200
# steps, 3 seeds: without a scale, d_head 8, 32 and 64 begin at 0.52, 0.25 and 0.17 and end 0.01 to 0.03, 0.07 to 0.08 and 0.11 to
# 0.14 worse; with 1/d_head (0.98 and more) 0.00 to 0.04, with twice 1/sqrt(d_head) (0.65) 0.01 to 0.03.
SHARP_RATIO = 0.3
WORSE = 0.06
# Share of the heads of these layers that never leave uniform attention (`heads.UNIFORM_STD`), under a scale of at most FLATTENS.
FLATTENS = 0.5
STAYS_UNIFORM = 0.5
EXPLAINED = (
    "saturated_at_start",
    "logit_growth",
    "entropy_collapse",
    "starved_queries_and_keys",
    "uniform_attention",
    "nonfinite",
    "loss_explosion",
    "stalled",
)
FEWEST_STEPS = 20  # to compare ends: the final loss is the mean over so many


@dataclass(frozen=True, slots=True, kw_only=True)
class Harm:
    """What was measured of a member that its scale explains."""

    said: str
    evidence: Evidence


def applied_scale(run: Run) -> Finding | NotLooked | None:
    """Logits are multiplied by something else than 1/sqrt(d_head), and that did harm.

    What it looks at: attention.scale of each member, resolved for every layer, against 1/sqrt(d_head), SCALE_TOLERANCE of it
    aside; in watched runs, the scale that each layer was seen to apply, FITTED_TOLERANCE aside. It is a cause where harm was
    measured that it explains: a softmax that begins sharp (a mean entropy_ratio below SHARP_RATIO) under a scale of at least
    EXPLAINS times 1/sqrt(d_head), divergence after one became saturated, attention that stays uniform in STAYS_UNIFORM of the
    heads (as uniform_attention has it) under a scale of at most FLATTENS times 1/sqrt(d_head), or an end more than WORSE nats above
    that of a member that differs in nothing but a scale of 1/sqrt(d_head). A learned scale is no finding.
    Why it matters: the dot product of two vectors of d_head independent unit-variance entries has a standard deviation
    of sqrt(d_head). What the scale does not take back is in the softmax: a larger one sharpens it until no gradient
    reaches q and k, a smaller one flattens it.
    What to try: attention.scale = inverse_sqrt.
    Known limits: other harm of a smaller scale shows only beside such a twin, and only after FEWEST_STEPS steps that both made;
    watched scripts have no twin. Of a watched layer no scale is known where no single number multiplies q.k.
    Source: Vaswani et al. 2017, section 3.2.1; the thresholds: measured with pre norm, d_model 64, 200 steps, 3 seeds.
    """
    odd = odd_scales(run)
    harm = _harm(run, odd)
    concerned = [each for each in odd if each.member in harm]
    blind = unseen_scales(run) | _harm_not_looked_for(run, odd, harm)
    if not concerned:
        return answer(run, "applied_scale", None, blind)
    finding = _finding(
        run,
        concerned,
        rule="applied_scale",
        title="Attention logits are not scaled by 1/sqrt(d_head)",
        harm=harm,
    )
    return answer(run, "applied_scale", finding, blind)


def unusual_scale(run: Run) -> Finding | NotLooked | None:
    """Logits are multiplied by something else than 1/sqrt(d_head); no harm of it was measured.

    What it looks at: as applied_scale, where nothing was measured that the scale would explain.
    Why it matters: it may be on purpose: T5 leaves it out and initializes smaller weights, muP uses 1/d_head, normalized q and
    k bound the logits whatever it is. Where it is not, a longer or larger training may show the harm that this one does not.
    What to try: if it is not on purpose, attention.scale = inverse_sqrt, or a twin with it to see the difference.
    Known limits: it does not know what is on purpose, and that no harm was measured is not that there is none.
    Source: Vaswani et al. 2017, section 3.2.1; Raffel et al. 2020 (T5); Yang et al. 2022 (muP).
    """
    odd = odd_scales(run)
    harm = _harm(run, odd)
    concerned = [each for each in odd if each.member not in harm]
    blind = {name: why for name, why in unseen_scales(run).items() if name not in harm}
    if not concerned:
        return answer(run, "unusual_scale", None, blind)
    finding = _finding(
        run,
        concerned,
        rule="unusual_scale",
        title="The attention scale is not 1/sqrt(d_head)",
        harm={},
    )
    return answer(run, "unusual_scale", finding, blind)


def _finding(run: Run, odd: Sequence[Applied], *, rule: str, title: str, harm: Mapping[str, Harm]) -> Finding:
    worst = max(odd, key=_how_odd)
    names = tuple(entry.name for entry in run.entries if any(o.member == entry.name for o in odd))
    expected = worst.d_head**-0.5
    times = f"{worst.times:.3g} times" if worst.times > 1 else f"1/{1 / worst.times:.3g} of"
    layers = "" if run.kind == "watch" or len(worst.layers) == worst.of else f" in layer {worst.layer}"
    who = worst.member
    if run.kind == "watch":
        who = worst.name or worst.member
        several = f"{len(worst.layers)} of {worst.of} attention layers do not multiply q.k by 1/sqrt(d_head). "
    else:
        several = of_several(list(names), "do not multiply q.k by 1/sqrt(d_head)")
    summary = (
        f"{several}{who} multiplies {'it' if run.kind == 'watch' else 'q.k'} by {abs(worst.scale):.3g}{layers}, {times} "
        f"1/sqrt({worst.d_head}) = {expected:.3g}"
    )
    spreads = _logit_std(run, odd)
    if worst.member in spreads:
        spread = spreads[worst.member]
        summary += (
            f"; at step {spread.step} the logits of {'layer 0' if run.kind != 'watch' else 'these layers'} have a standard "
            f"deviation of {spread.value:.3g}, where unit-variance q and k give {spread.threshold:.3g} at this scale and 1 at "
            "1/sqrt(d_head)"
        )
    if worst.is_normed:
        summary += (
            f". Its q and k are normalized (qk_norm): while their gains are 1, no logit is above "
            f"{worst.scale * worst.d_head:.3g}"
        )
    hurt = harm.get(worst.member)
    summary += f". {hurt.said}" if hurt else "" if harm else ". Nothing that was measured shows harm of it"
    pieces = [
        (applied, each)
        for applied in odd
        for each in (
            applied.evidence,
            spreads.get(applied.member),
            harm[applied.member].evidence if applied.member in harm else None,
        )
        if each is not None
    ]
    evidence, left_out = worst_first(pieces, lambda piece: piece[1], order=lambda piece: -_how_odd(piece[0]))
    on_purpose = "If it is not on purpose (T5 leaves it out and initializes smaller weights, muP uses 1/d_head), "
    set_it = (
        "multiply q.k by 1/sqrt(d_head): F.scaled_dot_product_attention does so where no scale is given."
        if run.kind == "watch"
        else "set attention.scale = inverse_sqrt, and train a twin with it to see the difference."
    )
    return Finding(
        rule=rule,
        title=title,
        kind="cause",
        severity=_severity(run, harm),
        summary=f"{summary}.",
        members=names,
        evidence=evidence,
        evidence_left_out=left_out,
        remedy=set_it[0].upper() + set_it[1:] if hurt and worst.times > 1 else on_purpose + set_it,
        source="Vaswani et al. 2017, section 3.2.1",
        step=0,
        explains=EXPLAINED if harm else (),
    )


def _severity(run: Run, harm: Mapping[str, Harm]) -> Severity:
    if any(record.name in harm and record.diverged_at is not None for record in run.members):
        return "error"
    return "warning" if harm else "note"


def _how_odd(applied: Applied) -> float:
    """0 for 1/sqrt(d_head)."""
    return abs(math.log(applied.times))


def _harm(run: Run, odd: Sequence[Applied]) -> dict[str, Harm]:
    """Of the members whose scale is off, the harm that it explains."""
    if not odd:
        return {}
    records = {record.name: record for record in run.members}
    early = early_signals(run)
    at_start = _ratio_at_start(run, odd)
    twins = _twins(run, {each.member for each in odd})
    flat = _stays_uniform(run, [each for each in odd if each.times <= FLATTENS])
    found: dict[str, Harm] = {}
    for applied in odd:
        name, sharpens = applied.member, applied.times >= EXPLAINS
        start, record = at_start.get(name), records[name]
        if sharpens and start is not None and (start.value or 0.0) < SHARP_RATIO:
            said = f"Its attention is sharp from the start: a mean entropy_ratio of {start.value:.2g} (below {SHARP_RATIO:g})"
            found[name] = Harm(said=said, evidence=start)
        elif sharpens and record.diverged_at is not None and early.get(name):
            signal = early[name][0]
            said = (
                f"Before it diverged at step {record.diverged_at}, its attention had left its normal range "
                f"({signal.quantity} {signal.value:.3g} at step {signal.step})"
            )
            found[name] = Harm(said=said, evidence=signal)
        elif name in twins and (worse := _worse(record, records[twins[name]])):
            found[name] = worse
        elif name in flat:
            found[name] = flat[name]
    return found


def _stays_uniform(run: Run, small: Sequence[Applied]) -> dict[str, Harm]:
    """Of these members, those whose heads stay uniform in the layers that are off."""
    if not small:
        return {}
    number = {entry.name: m for m, entry in enumerate(run.entries)}
    courses = head_courses(run, ("logit_std",), members=[number[each.member] for each in small])
    largest_C = largest_of(courses.columns["logit_std"], courses.start_C)
    found = {}
    for each in small:
        mine = np.flatnonzero((courses.member_C == number[each.member]) & np.isin(courses.layer_C, each.layers))
        is_uniform_C = largest_C[mine] < UNIFORM_STD
        if not len(mine) or is_uniform_C.mean() < STAYS_UNIFORM:
            continue
        last = int(courses.step_N[courses.end_C[mine] - 1].max())
        if last + 1 < FEWEST_STEPS_TO_LEARN:
            continue
        course = mine[is_uniform_C][int(np.argmax(largest_C[mine][is_uniform_C]))]
        said = f"{is_uniform_C.sum()} of {len(mine)} heads look at all keys alike from the first step to step {last}"
        evidence = Evidence(
            member=each.member,
            step=last,
            layer=int(courses.layer_C[course]),
            head=int(courses.head_C[course]),
            quantity="logit_std",
            value=float(largest_C[course]),
            threshold=UNIFORM_STD,
        )
        found[each.member] = Harm(said=said, evidence=evidence)
    return found


def _harm_not_looked_for(run: Run, odd: Sequence[Applied], harm: Mapping[str, Harm]) -> dict[str, str]:
    """Of the members whose scale is off, those that may have come to harm that was not recorded."""
    unharmed = [each for each in odd if each.member not in harm]
    if not unharmed:
        return {}
    records = {record.name: record for record in run.members}
    at_start, unmeasured = _ratio_at_start(run, odd), without_attention(run)
    twins = _twins(run, {each.member for each in odd})
    found = {}
    for name, sharpens in ((each.member, each.times >= EXPLAINS) for each in unharmed):
        if sharpens and name not in at_start:
            found[name] = unmeasured.get(name, NO_RATIO)
        elif name in twins and (why := _cannot_compare(records[name], records[twins[name]])):
            found[name] = why
    return found


def _cannot_compare(record: MemberRecord, twin: MemberRecord) -> str:
    """Why the ends of two members that did not diverge cannot be compared; empty if they can."""
    if record.diverged_at is not None or twin.diverged_at is not None:
        return ""
    if record.last_step is None or record.last_step + 1 < FEWEST_STEPS:
        return f"fewer than {FEWEST_STEPS} steps to compare with the twin that has 1/sqrt(d_head)"
    if "running" in (record.status, twin.status):
        return "the twin that has 1/sqrt(d_head) is compared with when training has ended"
    if record.last_step != twin.last_step:
        return "the twin that has 1/sqrt(d_head) was trained for another number of steps"
    return ""


def _worse(record: MemberRecord, twin: MemberRecord) -> Harm | None:
    """The harm that the twin with 1/sqrt(d_head) shows."""
    if twin.diverged_at is not None or twin.final_loss is None or record.final_loss is None:
        return None
    if record.diverged_at is not None:
        said = f"It diverged at step {record.diverged_at}, and {twin.name}, which differs in the scale alone, did not"
        return Harm(said=said, evidence=Evidence(member=record.name, step=record.diverged_at, quantity="loss"))
    last = record.last_step
    if "running" in (record.status, twin.status) or last != twin.last_step or last is None or last + 1 < FEWEST_STEPS:
        return None
    if not record.final_loss - twin.final_loss > WORSE:
        return None
    said = f"It ends {record.final_loss - twin.final_loss:.2g} nats above {twin.name}, which differs in the scale alone"
    return Harm(
        said=said,
        evidence=Evidence(
            member=record.name,
            step=last,
            quantity="final_loss",
            value=record.final_loss,
            threshold=twin.final_loss,
        ),
    )


def _twins(run: Run, odd: set[str]) -> dict[str, str]:
    """Member to the one that differs from it in nothing but a scale of 1/sqrt(d_head)."""

    def others(settings: Mapping[str, object]) -> str:
        return repr(sorted((k, v) for k, v in settings.items() if k != "attention.scale"))

    if run.kind == "watch":
        return {}
    usual = {
        others(entry.settings): entry.name
        for entry, config in zip(run.entries, configs_of(run), strict=True)
        if config is not None and entry.name not in odd and config.attention.scale != "learned"
    }
    return {
        entry.name: usual[others(entry.settings)]
        for entry in run.entries
        if entry.name in odd and others(entry.settings) in usual
    }


def _ratio_at_start(run: Run, odd: Sequence[Applied]) -> dict[str, Evidence]:
    """Mean entropy_ratio over the layers that are off, at the first step measured."""
    heads = first_measured(run.heads, len(run.entries))
    heads = heads[_is_off(run, odd, heads)]
    ratio_N = heads["entropy_ratio"].to_numpy().astype(np.float64)
    ratio_M = mean_by_member(members_of_rows(heads), ratio_N, len(run.entries))
    steps = dict(zip(members_of_rows(heads).tolist(), heads["step"].tolist(), strict=True))
    return {
        entry.name: Evidence(
            member=entry.name,
            step=int(steps[m]),
            quantity="entropy_ratio",
            value=float(ratio_M[m]),
            threshold=SHARP_RATIO,
        )
        for m, entry in enumerate(run.entries)
        if math.isfinite(ratio_M[m])
    }


def _logit_std(run: Run, odd: Sequence[Applied]) -> dict[str, Evidence]:
    """Of these members, where it was measured at the start: logit_std and what unit-variance q and k give.

    In this lab that of layer 0 at step 0, which sees the embeddings alone: in later layers the residual stream has grown. In
    watched runs that of the layers that are off.
    """
    heads = first_measured(run.heads, len(run.entries))
    if run.kind == "watch":
        heads = heads[_is_off(run, odd, heads)]
    else:
        heads = heads[(heads["layer"] == 0) & (heads["step"] == 0)]
    codes_N = members_of_rows(heads)
    square_N = heads["logit_std"].to_numpy().astype(np.float64) ** 2
    spread_M = np.sqrt(mean_by_member(codes_N, square_N, len(run.entries)))
    steps = dict(zip(codes_N.tolist(), heads["step"].tolist(), strict=True))
    number = {entry.name: m for m, entry in enumerate(run.entries)}
    return {
        each.member: Evidence(
            member=each.member,
            step=int(steps[m]),
            layer=None if run.kind == "watch" else 0,
            quantity="logit_std",
            value=float(spread_M[m]),
            threshold=1.0 if run.kind != "watch" and 0 not in each.layers else each.times,
        )
        for each in odd
        if math.isfinite(spread_M[m := number[each.member]])
    }


def _is_off(run: Run, odd: Sequence[Applied], heads: "pd.DataFrame") -> NDArray[np.bool_]:
    """Whether each row of heads is of a layer whose scale is off, (N,)."""
    layer_N = heads["layer"].to_numpy()
    number = {entry.name: m for m, entry in enumerate(run.entries)}
    most = max([int(layer_N.max(initial=0)), *(max(each.layers) for each in odd if each.layers)])
    is_off_ML = np.zeros((len(run.entries), most + 1), dtype=bool)
    for each in odd:
        is_off_ML[number[each.member], list(each.layers)] = True
    is_off_N: NDArray[np.bool_] = is_off_ML[members_of_rows(heads), layer_N]
    return is_off_N
