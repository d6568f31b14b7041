"""Rules of single heads: heads that look nowhere, heads that are copies of each other, heads that rest on the first token.

Shape key: N rows, C course, M member in the order of run.json.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from attnscope.diagnose.blindness import answer, without_attention
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.diagnose.courses import (
    FEWEST_RECORDS,
    FOR_GOOD,
    Courses,
    Ints,
    courses_by_member,
    head_courses,
    largest_of,
    too_short,
)
from attnscope.diagnose.pieces import order_by_step
from attnscope.findings import Evidence, Finding, NotLooked
from attnscope.runs.reader import Run

# logit_std of a head at every step measured: nats by which the logits of a query differ.
UNIFORM_STD = 0.01
NO_STD = 1e-6  # nothing but rounding: q.k is a constant
FEWEST_STEPS_TO_LEARN = 100  # optimizer updates: what is uniform before may yet become something

# Largest relative difference of entropy, max_prob, logit_std and sink of two heads that are one.
SAME = 1e-3
COMPARED = ("logit_std", "entropy", "max_prob", "sink")
MEASURED_SAME = (
    "heads that are drawn apart never agree to 0.01 in all four numbers at nine in ten steps (none of 1,095 healthy and faulty "
    "members); a GPT whose 4 heads are one ends 0.01 to 0.09 nats above its twin (4 runs of 250 steps)"
)

SOME = 4  # every so many steps tell of a layer of more than so many rows whether it may have copies: more than the tenth that may not
MANY_ROWS = 10_000

SINK = 0.3  # mean weight on the first visible key
TIMES_UNIFORM = 2.0  # of the weight that uniform attention would give it


def uniform_attention(run: Run) -> Finding | NotLooked | None:
    """Heads look at all keys alike from the first step to the last.

    What it looks at: logit_std of each head: below UNIFORM_STD at every step measured, over FEWEST_STEPS_TO_LEARN steps. It is
    a warning where it is below NO_STD in every head of a layer, as where q or k is zero, or never differs from key to key.
    Why it matters: such a head averages all values and takes no choice: it learns no more than a bag of words.
    What to try: look at what q and k of that layer are made of (zero weights, a scale that is far too small, an embedding
    without normalization before it); a higher optimizer.lr where nothing else has been learned either.
    Known limits: it says nothing of harm: one such layer below others costs little, as the first layer under post norm with
    small embeddings, or heads that were pruned on purpose.
    Source: the derivative of the logits with regard to q is k: where both are near zero, so is what they learn.
    """
    courses = head_courses(run, ("logit_std",))
    std_N = courses.columns["logit_std"]
    largest_C = largest_of(std_N, courses.start_C)
    last_M, blind = _last_steps(run, courses)
    with np.errstate(invalid="ignore"):
        uniform = np.flatnonzero((largest_C < UNIFORM_STD) & (last_M[courses.member_C] + 1 >= FEWEST_STEPS_TO_LEARN))
    concerns = []
    for member, mine in courses_by_member(courses, uniform):
        name = run.entries[member].name
        if name in blind:
            continue
        of_member = np.flatnonzero(courses.member_C == member)
        zero = of_member[largest_C[of_member] < NO_STD]
        layers, counts = np.unique(courses.layer_C[of_member], return_counts=True)
        dead, dead_counts = np.unique(courses.layer_C[zero], return_counts=True)
        whole = [int(x) for x, n in zip(dead, dead_counts, strict=True) if n == counts[layers == x][0]]
        order = sorted(mine, key=lambda course: (courses.layer_C[course] not in whole, largest_C[course]))
        worst = order[0]
        at, last = int(courses.layer_C[worst]), int(courses.step_N[courses.end_C[worst] - 1])
        in_layer = sum(int(courses.layer_C[course]) == at for course in mine)
        said = (
            f"{len(mine)} of {len(of_member)} heads of {name} look at all keys alike from the first step to step {last}: in layer "
            f"{at}, {in_layer} of {int(counts[layers == at][0])}, whose logits never have a standard deviation above "
            f"{max(largest_C[course] for course in mine if courses.layer_C[course] == at):.2g}."
        )
        said += f" In layer {', '.join(map(str, whole))} they do not differ at all: q.k is a constant." if whole else ""
        pieces = tuple(
            Evidence(
                member=name,
                step=last,
                layer=int(courses.layer_C[course]),
                head=int(courses.head_C[course]),
                quantity="logit_std",
                value=float(largest_C[course]),
                threshold=NO_STD if int(courses.layer_C[course]) in whole else UNIFORM_STD,
            )
            for course in order
        )
        concerns.append(
            Concern(
                member=name,
                step=int(courses.step_N[courses.start_C[worst]]),
                badness=len(mine) / len(of_member),
                said=said,
                evidence=pieces,
                severity="warning" if whole else "note",
            )
        )
    is_whole = any(concern.severity == "warning" for concern in concerns)
    finding = finding_of(
        run,
        concerns,
        rule="uniform_attention",
        title="Heads look at all keys alike",
        kind="cause",
        several="have heads that look at all keys alike",
        remedy=(
            "Look at what q and k of these layers are made of: zero weights, a scale that is far too small, an input that is "
            "nearly zero. If nothing else has been learned either, raise optimizer.lr."
        ),
        source="the derivative of the logits with regard to q is k",
        # A few uniform heads are no reason for anything: healthy training has them, too.
        explains=("starved_queries_and_keys", "plateau", "stalled") if is_whole else (),
    )
    return answer(run, "uniform_attention", finding, blind)


def identical_heads(run: Run) -> Finding | NotLooked | None:
    """Heads of a layer are copies of each other.

    What it looks at: logit_std, entropy, max_prob and sink of the heads of a layer, which are measured on the same query rows:
    heads are one where all of these agree to SAME of their value at nine in ten of the steps measured. Heads with a logit_std
    below UNIFORM_STD are left to uniform_attention.
    Why it matters: copies get the same gradient and never part, so a layer of many heads works as one of few, at the price of
    many.
    What to try: draw the weights of each head anew; look whether heads are expanded from one, or their weights repeated.
    Known limits: heads that share q and k on purpose look the same. What their values are is not looked at.
    Source: MEASURED_SAME.
    """
    courses = head_courses(run, COMPARED)
    blind = too_short(run, courses) | without_attention(run)
    concerned: dict[int, list[Copies]] = {}
    for copies in _copies(courses):
        concerned.setdefault(copies.member, []).append(copies)
    concerns = []
    for member, layers in concerned.items():
        name = run.entries[member].name
        if name in blind:
            continue
        layers.sort(key=lambda copies: copies.distinct / copies.n_heads)
        worst, of = layers[0], len(np.unique(courses.layer_C[courses.member_C == member]))
        said = (
            f"The {worst.n_heads} heads of layer {worst.layer} of {name} are {worst.distinct} in truth: at {worst.records} steps "
            f"measured, heads {worst.heads[0]} and {worst.heads[1]}{' and others' if worst.n_heads - worst.distinct > 1 else ''} "
            f"agree in logit_std, entropy, max_prob and sink to {SAME:g} of their value."
        )
        said += f" {len(layers)} of {of} layers have such heads." if of > 1 else ""
        pieces = tuple(
            Evidence(
                member=name,
                step=copies.step,
                layer=copies.layer,
                head=copies.heads[1],
                quantity="logit_std",
                value=copies.values[1],
                threshold=copies.values[0],
            )
            for copies in layers
        )
        concerns.append(
            Concern(
                member=name,
                badness=1 - worst.distinct / worst.n_heads,
                said=said,
                evidence=pieces,
                severity="warning",
            )
        )
    finding = finding_of(
        run,
        concerns,
        rule="identical_heads",
        title="Heads are copies of each other",
        kind="cause",
        several="have heads that are copies of each other",
        remedy=(
            "Draw the weights of q and k of each head anew, and look whether one head is expanded to many or weights are repeated."
        ),
        source=MEASURED_SAME,
        explains=("plateau", "stalled"),
    )
    return answer(run, "identical_heads", finding, blind)


def attention_sink(run: Run) -> Finding | NotLooked | None:
    """Heads rest on the first key.

    What it looks at: sink of each head at the end of what was recorded (the last fifth, before divergence): found above SINK,
    if that is TIMES_UNIFORM times what uniform attention would put there, after FEWEST_STEPS_TO_LEARN steps: attention that is sharp
    from the start rests on any key.
    Why it matters: a head that has nothing to look up has to put its weight somewhere, and the first token is always visible:
    most trained language models have such heads. They do no harm in training; they do in quantization, in windows that lose the
    first token, and they make max_logit large.
    What to try: nothing, if it is known; a learned sink (a bias in the softmax's denominator) or gated attention otherwise.
    Known limits: the first visible key of a window or of a packed sequence counts as first. What uniform attention would put
    there is taken from entropy and entropy_ratio, a geometric mean over rows.
    Source: Gu et al. 2024 (epsilon 0.3).
    """
    courses = head_courses(run, ("sink", "entropy", "entropy_ratio"))
    sink_N = courses.columns["sink"]
    with np.errstate(all="ignore"):
        log_keys_N = courses.columns["entropy"] / courses.columns["entropy_ratio"]
        is_sink_N = (sink_N > SINK) & ~(sink_N <= TIMES_UNIFORM * np.exp(-log_keys_N))
    _, blind = _last_steps(run, courses)
    sinks = np.flatnonzero(courses.share_at_end(is_sink_N) >= 0.5)
    concerns = []
    for member, mine in courses_by_member(courses, sinks):
        name = run.entries[member].name
        if name in blind:
            continue
        ends = {course: courses.end_median(course, "sink") for course in mine}
        order = sorted(mine, key=lambda course: -ends[course])
        worst = order[0]
        since = {course: courses.step_since(course, is_sink_N) for course in order}
        said = (
            f"{len(mine)} of {int(np.sum(courses.member_C == member))} heads of {name} rest on the first key: head "
            f"{int(courses.head_C[worst])} of layer {int(courses.layer_C[worst])} puts {ends[worst]:.2g} of its weight there, "
            f"above {SINK:g} from step {since[worst]} on."
        )
        pieces = tuple(
            Evidence(
                member=name,
                step=since[course],
                layer=int(courses.layer_C[course]),
                head=int(courses.head_C[course]),
                quantity="sink",
                value=ends[course],
                threshold=SINK,
            )
            for course in order
        )
        concerns.append(
            Concern(
                member=name,
                step=since[worst],
                badness=len(mine),
                said=said,
                evidence=pieces,
                severity="note",
            )
        )
    finding = finding_of(
        run,
        concerns,
        rule="attention_sink",
        title="Heads rest on the first key",
        kind="cause",
        several="have heads that rest on the first key",
        remedy="Nothing, if it is known: most language models have such heads. Keep the first token visible in windows.",
        source="Gu et al. 2024 (epsilon 0.3)",
    )
    return answer(run, "attention_sink", finding, blind)


def _last_steps(run: Run, courses: Courses) -> tuple[Ints, dict[str, str]]:
    """The last step measured of each member, (M,), -1 where there is none, and why those with too few tell nothing."""
    last_M = np.full(len(run.entries), -1)
    np.maximum.at(last_M, courses.member_C, courses.step_N[courses.end_C - 1])
    why = f"fewer than {FEWEST_STEPS_TO_LEARN} steps before divergence"
    few = {entry.name: why for entry, last in zip(run.entries, last_M, strict=True) if last + 1 < FEWEST_STEPS_TO_LEARN}
    return last_M, few | too_short(run, courses) | without_attention(run)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Heads of a layer that are one.

    Attributes:
        member: its position in run.json.
        layer: counted from 0.
        distinct: heads that are no copy of another.
        n_heads: all of them.
        records: at how many steps they were compared.
        step: the last of these at which two were alike.
        heads: these two.
        values: their logit_std.
    """

    member: int
    layer: int
    distinct: int
    n_heads: int
    records: int
    step: int
    heads: tuple[int, int]
    values: tuple[float, float]


def _copies(courses: Courses) -> Iterator[Copies]:
    """Layers of members with heads that are copies at nine in ten of their records."""
    begins_C = np.r_[True, (np.diff(courses.member_C) != 0) | (np.diff(courses.layer_C) != 0)][: len(courses.head_C)]
    first_P = np.flatnonzero(begins_C)
    columns = [courses.columns[name] for name in COMPARED]
    for first, behind in pairwise([*first_P.tolist(), len(begins_C)]):
        rows = slice(int(courses.start_C[first]), int(courses.end_C[behind - 1]))
        n_C = courses.end_C[first:behind] - courses.start_C[first:behind]
        head_N, step_N = np.repeat(courses.head_C[first:behind], n_C), courses.step_N[rows]
        by_step = _by_step(step_N, n_C)
        head_N, step_N = head_N[by_step], step_N[by_step]
        values_QN = np.stack([values_N[rows][by_step] for values_N in columns])
        if not _may_be_copies(step_N, values_QN):
            continue
        of_place = _beside(step_N, values_QN)
        copies_G, heads_G, order = of_place.copies_G, of_place.heads_G, of_place.order
        copies = int(np.quantile(copies_G, 1 - FOR_GOOD, method="lower")) if len(copies_G) else 0
        if not copies or len(copies_G) < FEWEST_RECORDS:
            continue
        at = int(np.flatnonzero(of_place.is_copy)[-1])
        one, other = (int(row) for row in sorted(order[at : at + 2], key=lambda row: head_N[row]))
        yield Copies(
            member=int(courses.member_C[first]),
            layer=int(courses.layer_C[first]),
            distinct=int(heads_G.max()) - copies,
            n_heads=int(heads_G.max()),
            records=len(copies_G),
            step=int(step_N[order[at]]),
            heads=(int(head_N[one]), int(head_N[other])),
            values=(float(values_QN[0, one]), float(values_QN[0, other])),
        )


def _by_step(step_N: Ints, n_C: Ints) -> Ints:
    """The rows of some courses, one step after the other: as a rule all are measured at the same steps, and nothing is to sort."""
    if (n_C == n_C[0]).all():
        beside: Ints = np.arange(len(step_N)).reshape(len(n_C), -1).T.ravel()
        if (np.diff(step_N[beside]) >= 0).all():
            return beside
    order: Ints = np.argsort(step_N, kind="stable")
    return order


@dataclass(frozen=True, slots=True, kw_only=True)
class _Beside:
    """The heads of a layer side by side, step by step.

    Attributes:
        order: of its rows, in the order of step and logit_std: between copies nothing fits.
        is_copy: whether each but the first is a copy of the one before.
        copies_G: how many are, of each record: the layer at a step.
        heads_G: how many heads each record has.
    """

    order: Ints
    is_copy: NDArray[np.bool_]
    copies_G: Ints
    heads_G: Ints


def _beside(step_N: Ints, values_QN: NDArray[np.float64]) -> _Beside:
    kept = np.flatnonzero(np.isfinite(values_QN).all(axis=0) & (values_QN[0] >= UNIFORM_STD))
    order = kept[order_by_step(np.zeros_like(kept), step_N[kept], values_QN[0, kept])]
    values_QN = values_QN[:, order]
    is_beside = np.diff(step_N[order]) == 0
    is_copy = is_beside & (np.abs(np.diff(values_QN, axis=1)) <= SAME * np.abs(values_QN[:, 1:])).all(axis=0)
    record_N = np.cumsum(np.r_[True, ~is_beside][: len(order)]) - 1
    heads_G = np.bincount(record_N)
    copies_G = np.bincount(record_N[1:], weights=is_copy, minlength=len(heads_G)).astype(np.int64)
    return _Beside(order=order, is_copy=is_copy, copies_G=copies_G, heads_G=heads_G)


def _may_be_copies(step_N: Ints, values_QN: NDArray[np.float64]) -> bool:
    """Whether some of the steps leave it open: of a long run without copies these say enough."""
    if len(step_N) < SOME * MANY_ROWS:
        return True
    steps = np.unique(step_N)
    some = np.flatnonzero(np.searchsorted(steps, step_N) % SOME == 0)
    alone = int((_beside(step_N[some], values_QN[:, some]).copies_G == 0).sum())
    return alone <= (1 - FOR_GOOD) * len(steps)
