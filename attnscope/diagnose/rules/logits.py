"""Rules of attention logits: logits that grow until the softmax is one-hot, and q and k that no gradient reaches.

Shape key: N rows, C course, M member in the order of run.json.
"""

from collections.abc import Sequence

import numpy as np

from attnscope.diagnose.blindness import answer, without_attention, without_steps
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.diagnose.courses import (
    Courses,
    courses_by_member,
    group_courses,
    layer_courses,
    too_short,
)
from attnscope.findings import Evidence, Finding, NotLooked, Severity
from attnscope.runs.members import MemberRecord
from attnscope.runs.reader import Run

# Mean logit_std of a layer at the end, and times what it was at first. Chosen on members with even seeds: those within 0.1 nats
# of the best of their set-up end below 13.5, those above 17 end at least 0.12 nats worse.
LARGE_STD = 15.0
GROWN = 5.0
BEGUN = 2.0  # times the first logit_std: from here on it grows
MEASURED_GROWTH = (
    "measured on 834 members (text, recall, Markov; no, pre and post norm; SGD, AdamW and Muon; learning rates from too low to "
    "divergence), chosen on even seeds; of the 435 with odd seeds, 57 are found: all diverged, stalled or ended 0.12 nats or more "
    "above the best of their set-up, and none of the 132 that ended within 0.1 of it is found"
)

# The larger of the gradients of q and k over that of v. Of healthy members it is 0.1 and more, but for the first layer under post
# norm with small embeddings (3e-4 from the start to the end) and small initial weights (0.003 to 0.01).
STARVED = 1e-4
LEARNING = 0.01
NOTHING = 1e-9
FADED = 0.1  # of the first gradient of v
MEASURED_STARVED = (
    "measured on the members of logit_growth: of those with odd seeds, 18 are found, which stalled or ended 0.44 nats or more above "
    "the best of their set-up, and none of the 132 healthy ones"
)
NO_GROUPS = "no parameters called q, k and v were recorded"
CALLED = {
    name: called
    for called, word in (("q", "query"), ("k", "key"), ("v", "value"))
    for name in (
        called,
        word,
        f"{called}_proj",
        f"{word}_proj",
        f"w{called}",
        f"w_{called}",
        f"to_{called}",
        f"{called}_lin",
        f"{called}_linear",
        f"linear_{called}",
    )
}


def logit_growth(run: Run) -> Finding | NotLooked | None:
    """Attention logits grow during training until the softmax has no choice left.

    What it looks at: logit_std of each layer, mean over its heads, at the end of what was recorded (the last fifth, before
    divergence): found from LARGE_STD on, if that is GROWN times what it was at first, and max_logit_bound BEGUN times, where it
    was seen. It began where logit_std was BEGUN times the first for good. At least FEWEST_RECORDS_IN_ALL records are needed.
    Why it matters: logits are a product of q and k, and each grows with the other: once they are so far apart, every query looks at
    one key, no gradient reaches q and k that could undo it, and a little later the loss may leave. It does not show in the loss
    at first: no spike, only an end that is worse than it need be.
    What to try: a lower optimizer.lr, or a longer optimizer.warmup_steps; attention.qk_norm, attention.qk_clip or
    attention.logit_softcap where the learning rate has to stay.
    Known limits: a logit that is added to all keys of a query alike, as a bias of k adds it, makes max_logit grow and does no
    harm: it is not looked at. Of a pretrained model, growth is counted from where this training began.
    Source: MEASURED_GROWTH; the mechanism: Wortsman et al. 2023, Dehghani et al. 2023.
    """
    courses = layer_courses(run, mean=("logit_std",), largest=("max_logit", "max_logit_bound"))
    std_N, start_C = courses.columns["logit_std"], courses.first("logit_std")
    is_large_C = courses.share_at_end(std_N >= LARGE_STD) >= 0.5
    with np.errstate(all="ignore"):
        is_grown_C = courses.share_at_end(std_N >= GROWN * start_C[courses.course_N]) >= 0.5
        # Where q and k are normalized, logits may spread up to a bound that is there from the start: nothing grows.
        bound_N, bound_C = courses.columns["largest max_logit_bound"], courses.first("largest max_logit_bound")
        is_grown_C &= courses.share_at_end(~(bound_N < BEGUN * bound_C[courses.course_N])) >= 0.5
    blind = too_short(run, courses) | without_attention(run)
    concerned = np.flatnonzero(is_large_C & is_grown_C)
    concerns = [
        _growth(run, courses, member, mine)
        for member, mine in courses_by_member(courses, concerned)
        if run.entries[member].name not in blind
    ]
    finding = finding_of(
        run,
        concerns,
        rule="logit_growth",
        title="Attention logits grow without bound",
        kind="cause",
        several="have attention logits that grow without bound",
        remedy=(
            "Lower optimizer.lr, or warm up longer (optimizer.warmup_steps). If the learning rate has to stay: "
            "attention.qk_norm, attention.qk_clip or attention.logit_softcap bound the logits."
        ),
        source=MEASURED_GROWTH,
        explains=(
            "entropy_collapse",
            "starved_queries_and_keys",
            "rank_collapse",
            "half_precision_headroom",
            "nonfinite",
            "loss_spike",
            "loss_rises",
            "plateau",
            "loss_explosion",
            "stalled",
        ),
    )
    return answer(run, "logit_growth", finding, blind)


def _growth(run: Run, courses: Courses, member: int, mine: Sequence[int]) -> Concern:
    """What is said of one member: the layer in which it began, and where it went furthest."""
    name, std_N = run.entries[member].name, courses.columns["logit_std"]
    start_C = courses.first("logit_std")
    began = {course: courses.step_since(course, std_N >= BEGUN * start_C[course]) for course in mine}
    ends = {course: courses.end_median(course, "logit_std") for course in mine}
    first = min(mine, key=lambda course: (began[course], -ends[course]))
    layer, last = int(courses.layer_C[first]), int(courses.step_N[courses.end_C[first] - 1])
    others = int(np.sum(courses.member_C == member))
    largest = {
        column: (float(courses.first(column)[first]), courses.end_median(first, column))
        for column in ("largest max_logit", "largest max_logit_bound")
    }
    (logit_0, logit_1), (bound_0, bound_1) = largest.values()
    said = (
        f"The attention logits of {name} grow from step {began[first]} on in layer {layer}: their standard deviation from "
        f"{start_C[first]:.2g} to {ends[first]:.3g} (at step {last}), the largest from {logit_0:.3g} to {logit_1:.3g}"
    )
    if np.isfinite(bound_0) and np.isfinite(bound_1):
        said += f", its bound |q| |k| from {bound_0:.3g} to {bound_1:.3g}"
    said += f". {len(mine)} of {others} layers end above {LARGE_STD:g}." if others > 1 else "."
    ranked = sorted(mine, key=lambda course: -ends[course])
    pieces = [
        Evidence(
            member=name,
            step=began[course],
            layer=int(courses.layer_C[course]),
            quantity="logit_std",
            value=ends[course],
            threshold=LARGE_STD,
        )
        for course in (first, *(course for course in ranked if course != first))
    ]
    pieces.insert(
        1,
        Evidence(
            member=name,
            step=last,
            layer=layer,
            quantity="max_logit",
            value=logit_1,
            threshold=logit_0,
        ),
    )
    return Concern(
        member=name,
        step=began[first],
        badness=max(ends.values()),
        said=said,
        evidence=tuple(pieces),
        severity=severity_of(run.members[member]),
    )


def starved_queries_and_keys(run: Run) -> Finding | NotLooked | None:
    """No gradient reaches q and k any more, while v still learns.

    What it looks at: grad_norm of q and of k, the larger of the two, over that of v, layer by layer, at the end of what was
    recorded (the last fifth, before divergence): found below NOTHING, or below STARVED where it was LEARNING or more at first and
    the gradient of v is still FADED of what it was at first, or more.
    Why it matters: what a layer looks at stays as it is, for better or worse: only what it copies goes on learning.
    What to try: the causes found: logits that grew until the softmax is one-hot, tokens that are all alike, q or k that are
    constant, detached, or decayed to nothing (optimizer.weight_decay).
    Known limits: it needs parameters called q, k and v (or q_proj, query, wq, to_q and their like): where they are one, as
    c_attn, it cannot look. Attention may be one-hot and its gradient large all the same, as large keys multiply what is left.
    Source: MEASURED_STARVED; the mechanism: Zhai et al. 2023.
    """
    groups = _queries_keys_values(run)
    blind = without_steps(run)
    if set(groups.values()) != {"q", "k", "v"}:
        return answer(run, "starved_queries_and_keys", None, {entry.name: NO_GROUPS for entry in run.entries} | blind)
    courses = group_courses(run, "grad_norm", groups)
    value_N = courses.columns["v"]
    with np.errstate(all="ignore"):
        share_N = np.fmax(courses.columns["q"], courses.columns["k"]) / value_N
        courses = courses.plus(share=np.where(value_N > 0, share_N, np.nan))
        is_fed_N = value_N >= FADED * courses.first("v")[courses.course_N]
        share_N, first_C = courses.columns["share"], courses.first("share")
        is_none_N = share_N < NOTHING
        is_small_N = is_none_N | ((share_N < STARVED) & (first_C[courses.course_N] >= LEARNING))
    starved = np.flatnonzero(courses.share_at_end(is_none_N | (is_small_N & is_fed_N)) >= 0.5)
    blind = too_short(run, courses, what="the gradient of q, k and v") | blind
    concerns = []
    for member, mine in courses_by_member(courses, starved):
        name = run.entries[member].name
        if name in blind:
            continue
        since = {course: courses.step_since(course, is_small_N) for course in mine}
        ends = {course: courses.end_median(course, "share") for course in mine}
        first = min(mine, key=lambda course: (since[course], ends[course]))
        of = int(np.sum(courses.member_C == member))
        said = (
            f"In layer {int(courses.layer_C[first])} of {name} no gradient reaches q and k from step {since[first]} on: the larger "
            f"of theirs is {ends[first]:.2g} of that of v at the end, {first_C[first]:.2g} at first."
        )
        said += f" {len(mine)} of {of} layers end so." if of > 1 else ""
        pieces = tuple(
            Evidence(
                member=name,
                step=since[course],
                layer=int(courses.layer_C[course]),
                group="q, k / v",
                quantity="grad_norm",
                value=ends[course],
                threshold=STARVED,
            )
            for course in sorted(mine, key=lambda course: (since[course], ends[course]))
        )
        concerns.append(
            Concern(
                member=name,
                step=since[first],
                badness=len(mine) / of,
                said=said,
                evidence=pieces,
                severity=severity_of(run.members[member]),
            )
        )
    finding = finding_of(
        run,
        concerns,
        rule="starved_queries_and_keys",
        title="No gradient reaches q and k",
        kind="cause",
        several="have q and k that no gradient reaches",
        remedy=(
            "Remove the causes found: logits that grew until the softmax is one-hot, tokens that are all alike, q or k that are "
            "constant, detached, or decayed to nothing (optimizer.weight_decay)."
        ),
        source=MEASURED_STARVED,
        explains=("plateau", "stalled"),
    )
    return answer(run, "starved_queries_and_keys", finding, blind)


def _queries_keys_values(run: Run) -> dict[str, str]:
    """Groups of the params table to q, k and v: those of the first attention that has all three as parameters of their own."""
    places: dict[str, dict[str, str]] = {}
    for group in map(str, run.params["group"].unique()):
        place, _, last = group.rpartition(".")
        called = CALLED.get(last.lower())
        if called is not None:
            places.setdefault(place, {})[group] = called
    return next((groups for groups in places.values() if set(groups.values()) == {"q", "k", "v"}), {})


def severity_of(record: MemberRecord) -> Severity:
    """An error where training came to nothing; else a warning."""
    return "error" if record.status in ("diverged", "stalled") else "warning"
