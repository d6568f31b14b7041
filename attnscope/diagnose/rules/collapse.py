"""Rules of collapse during training: of attention onto one key, and of tokens onto one direction.

Shape key: N rows, C course, M member in the order of run.json.
"""

from collections.abc import Sequence

import numpy as np

from attnscope.diagnose.blindness import answer, without_attention, without_config, without_steps
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.diagnose.courses import Courses, courses_by_member, head_courses, layer_courses, step_courses, too_short
from attnscope.diagnose.rules.data import plateaus
from attnscope.diagnose.rules.logits import LARGE_STD, severity_of
from attnscope.findings import Evidence, Finding, NotLooked, Severity
from attnscope.runs.by_member import configs_of, members_of_rows
from attnscope.runs.probe_events import KeysSeen
from attnscope.runs.probed import told
from attnscope.runs.reader import Run
from attnscope.runs.watched import cross_entropies

# entropy_ratio at the end of every head of a layer, and its mean over heads at first. Healthy members on even seeds have a head
# of 0.24 or more in every layer.
COLLAPSED = 0.2
OPEN = 0.3
MEASURED_COLLAPSE = (
    "measured on the members of logit_growth: of the 435 with odd seeds, 56 are found: all diverged, stalled or ended 0.12 nats or "
    "more above the best of their set-up (median 0.34); none of the 132 that ended within 0.1 of it is"
)

# token_cosine at the end. Of healthy members it is 0.4 to 0.87, of those whose learning rate is too low up to 0.91.
ALIKE = 0.98
MEASURED_ALIKE = (
    "measured on the members of logit_growth: of those with odd seeds, 25 are found, which diverged, stalled or ended 0.27 nats or "
    "more above the best of their set-up, and none of the 132 healthy ones"
)
PARTLY = ("recall", "modular")  # sources of which only some tokens are scored
PARTLY_SCORED = "only some tokens are scored"
UNKNOWN_SCORED = "how many tokens of a sequence are scored is not known"
FEWEST_SCORED = 5  # positions of a sequence: a classifier reads one, and the others may become what they like


def entropy_collapse(run: Run) -> Finding | NotLooked | None:
    """Attention becomes one-hot during training: every head of a layer looks at a single key.

    What it looks at: entropy_ratio of each layer: a mean over its heads of at least OPEN at first, and at the end of what was
    recorded (the last fifth, before divergence) every head below COLLAPSED. It is found where logit_std, mean over the heads,
    is at least LARGE_STD there. It began where the mean was below half of what it was at first for good.
    Why it matters: a query that copies one value has no gradient left by which it could look elsewhere (softmax_gain near 0),
    and what it looks at is noise. The loss shows no spike, only an end that is worse than it need be.
    What to try: a lower optimizer.lr, or a longer optimizer.warmup_steps; attention.qk_norm where the learning rate has to stay.
    Known limits: attention that becomes sharp with smaller logits is no finding, nor are single heads of a layer: a head that
    finds the one token it needs is sharp on purpose, as in recall. A training that began from sharp attention is left to
    saturated_at_start.
    Source: MEASURED_COLLAPSE; the mechanism: Zhai et al. 2023.
    """
    courses = layer_courses(run, mean=("entropy", "entropy_ratio", "max_prob", "logit_std"), largest=("entropy_ratio",))
    is_low_N = courses.columns["largest entropy_ratio"] < COLLAPSED
    is_collapsed_C = courses.first("entropy_ratio") >= OPEN
    is_collapsed_C &= courses.share_at_end(is_low_N) >= 0.5
    is_collapsed_C &= courses.share_at_end(courses.columns["logit_std"] >= LARGE_STD) >= 0.5
    blind = too_short(run, courses) | without_attention(run)
    concerns = [
        _collapse(run, courses, member, mine)
        for member, mine in courses_by_member(courses, np.flatnonzero(is_collapsed_C))
        if run.entries[member].name not in blind
    ]
    finding = finding_of(
        run,
        concerns,
        rule="entropy_collapse",
        title="Attention collapses onto single keys",
        kind="cause",
        several="have attention that collapses onto single keys",
        remedy=(
            "Lower optimizer.lr, or warm up longer (optimizer.warmup_steps). If the learning rate has to stay: "
            "attention.qk_norm keeps the logits, and with them the entropy, in range."
        ),
        source=MEASURED_COLLAPSE,
        explains=(
            "starved_queries_and_keys",
            "rank_collapse",
            "gradients_vanish_with_depth",
            "loss_rises",
            "plateau",
            "loss_spike",
            "nonfinite",
            "loss_explosion",
            "stalled",
        ),
    )
    return answer(run, "entropy_collapse", finding, blind)


def _collapse(run: Run, courses: Courses, member: int, mine: Sequence[int]) -> Concern:
    """What is said of one member: the layer in which it began, and the sharpest heads."""
    name, ratio_N = run.entries[member].name, courses.columns["entropy_ratio"]
    ratio_C = courses.first("entropy_ratio")
    began = {course: courses.step_since(course, ratio_N < ratio_C[course] / 2) for course in mine}
    ends = {course: courses.end_median(course, "entropy_ratio") for course in mine}
    first = min(mine, key=lambda course: (began[course], ends[course]))
    layer, last = int(courses.layer_C[first]), int(courses.step_N[courses.end_C[first] - 1])
    arrived = courses.step_since(first, ratio_N < COLLAPSED)
    of = int(np.sum(courses.member_C == member))
    heads = head_courses(run, ("entropy_ratio",), members={member})
    of_layer = np.flatnonzero(heads.layer_C == layer).tolist()
    sharpest = sorted((heads.end_median(course, "entropy_ratio"), int(heads.head_C[course])) for course in of_layer)
    said = (
        f"Attention of {name} collapses in layer {layer}: the mean entropy of its {len(sharpest)} heads is "
        f"{courses.first('entropy')[first]:.3g} nats at first ({ratio_C[first]:.2g} of its maximum), below half of that from "
        f"step {began[first]} on"
    )
    said += f", below {COLLAPSED:g} of its maximum from step {arrived} on" if arrived > began[first] else ""
    said += (
        f", and {courses.end_median(first, 'entropy'):.2g} nats at the end (step {last}), where the largest weight of a query is "
        f"{courses.end_median(first, 'max_prob'):.2g} on average."
    )
    said += f" {len(mine)} of {of} layers end so." if of > 1 else ""
    pieces = [
        Evidence(
            member=name,
            step=began[first],
            layer=layer,
            head=head,
            quantity="entropy_ratio",
            value=value,
            threshold=COLLAPSED,
        )
        for value, head in sharpest[:2]
    ]
    pieces += [
        Evidence(
            member=name,
            step=began[course],
            layer=int(courses.layer_C[course]),
            quantity="entropy_ratio",
            value=ends[course],
            threshold=COLLAPSED,
        )
        for course in sorted(mine, key=lambda course: ends[course])
        if course != first
    ]
    return Concern(
        member=name,
        step=began[first],
        badness=max(
            courses.end_median(course, "logit_std") for course in mine
        ),  # as logit_growth, to speak of the same member
        said=said,
        evidence=tuple(pieces),
        severity=severity_of(run.members[member]),
    )


def rank_collapse(run: Run) -> Finding | NotLooked | None:
    """The tokens of a sequence end up in one direction.

    What it looks at: token_cosine of the last layer at the end of what was recorded (the last fifth, before divergence): found
    above ALIKE if it was lower at first.
    Why it matters: where all tokens are alike, so is what is predicted after each of them: nothing but token frequencies can be
    learned, whatever attention does, and the gradient that could part them is as alike.
    What to try: a lower optimizer.lr and a longer optimizer.warmup_steps, above all with normalization after the residual sum
    (model.norm = post); model.norm = pre.
    Known limits: it does not look where only some tokens are scored (recall, modular, masked tokens; in watched scripts, a
    cross-entropy of fewer than FEWEST_SCORED targets for each sequence of the batch, or none that was seen): what becomes of
    the others is nobody's concern. It is a note while the loss still falls, and no worse than the plateau that the loss is on:
    where targets do not follow from inputs, shuffled ones for instance, tokens become alike, too.
    Source: MEASURED_ALIKE; the mechanism: Dong et al. 2021.
    """
    courses = step_courses(run, "token_cosine")
    cosine_N = courses.columns["token_cosine"]
    is_alike_C = (courses.share_at_end(cosine_N > ALIKE) >= 0.5) & (courses.first("token_cosine") <= ALIKE)
    recorded = set(members_of_rows(run.steps[run.steps["token_cosine"].notna()]).tolist())
    unrecorded = {
        entry.name: "token_cosine was not recorded" for m, entry in enumerate(run.entries) if m not in recorded
    }
    partly = {
        entry.name: PARTLY_SCORED
        for entry, config in zip(run.entries, configs_of(run), strict=True)
        if config is not None and (config.data.source in PARTLY or config.data.objective == "masked")
    }
    if run.kind == "watch":
        partly |= _partly_scored(run)
    blind = (
        too_short(run, courses, what="token_cosine") | unrecorded | partly | without_config(run) | without_steps(run)
    )
    concerns = []
    stuck = plateaus(run)
    severity: Severity
    for member, (course,) in courses_by_member(courses, np.flatnonzero(is_alike_C)):
        name = run.entries[member].name
        if name in blind:
            continue
        step, end = courses.step_since(course, cosine_N > ALIKE), courses.end_median(course, "token_cosine")
        said = (
            f"The tokens of {name} become alike: the mean cosine of two of them after the last layer is "
            f"{courses.first('token_cosine')[course]:.2g} at first, above {ALIKE:g} from step {step} on, and {end:.4g} at the end."
        )
        piece = Evidence(member=name, step=step, quantity="token_cosine", value=end, threshold=ALIKE)
        severity = "note" if run.members[member].is_falling else stuck.get(name, severity_of(run.members[member]))
        concerns.append(Concern(member=name, step=step, badness=end, said=said, evidence=(piece,), severity=severity))
    finding = finding_of(
        run,
        concerns,
        rule="rank_collapse",
        title="All tokens become alike",
        kind="symptom",
        several="have tokens that become alike",
        remedy=(
            "Where targets belong to their inputs, lower optimizer.lr and warm up longer (optimizer.warmup_steps), above all with "
            "model.norm = post; or normalize before attention (model.norm = pre)."
        ),
        source=MEASURED_ALIKE,
        explains=(
            "uniform_attention",
            "starved_queries_and_keys",
            "loss_explosion",
            "stalled",
        ),
    )
    return answer(run, "rank_collapse", finding, blind)


def _partly_scored(run: Run) -> dict[str, str]:
    """Members of a watched script whose cross-entropy counts few targets for each sequence, or of which that is not known."""
    scored = cross_entropies(run)
    sequences: dict[str, int] = {}
    for each in told(run, KeysSeen):
        if each.what.batch:
            sequences.setdefault(each.member, each.what.batch)
    found = {}
    for entry in run.entries:
        targets = None if entry.name not in scored else scored[entry.name].targets
        if targets is None or entry.name not in sequences:
            found[entry.name] = UNKNOWN_SCORED
        elif targets < FEWEST_SCORED * sequences[entry.name]:
            found[entry.name] = PARTLY_SCORED
    return found
