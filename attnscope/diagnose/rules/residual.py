"""Rules of the residual stream: blocks that put something in its place instead of adding to it."""

from collections.abc import Sequence

from attnscope.diagnose.blindness import answer, without_steps
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.diagnose.levels import Levels, levels_of
from attnscope.findings import Evidence, Finding, NotLooked
from attnscope.runs.members import MemberRecord
from attnscope.runs.probe_events import InputCarried
from attnscope.runs.probed import Told, told
from attnscope.runs.reader import Run

# Share of the first loss, or of the unigram loss where it is known: what ends above learned next to nothing.
LEARNED_NOTHING = 0.9

NOT_FOLLOWED = "whether blocks add to the stream that they are given could not be told"
STREAM_SOURCE = "He et al. 2016; Dong et al. 2021 (without it attention loses rank doubly exponentially with depth)"


def residual_missing(run: Run) -> Finding | NotLooked | None:
    """A block puts the output of its attention or its MLP in place of the stream.

    What it looks at: in watched runs, in the first steps, the autograd graph of each block that attends: whether a path of
    additions, norms, gates and views leads from its output back to what it was given, or all end at products with
    weights. It is an error where the member diverged, stalled or did not get below LEARNED_NOTHING of its first loss (and of the
    unigram loss, where that is known), else a warning. The blocks of this lab always add.
    Why it matters: what one block throws away no later one can read, the tokens of deep models become alike, and the gradient of the
    first layers has to pass through every matrix of those above.
    What to try: x = x + attention(norm(x)), x = x + mlp(norm(x)).
    Known limits: it is silent on blocks with functions that it does not know, on compiled ones, on those that attend twice, and
    where the stream has no gradient. It may be on purpose, as in models that shrink a sequence or change its width.
    Source: STREAM_SOURCE.
    """
    if run.kind != "watch":
        return None
    blocks = told(run, InputCarried)
    concerns = []
    for record in run.members:
        mine = [each for each in blocks if each.member == record.name]
        found = [each for each in mine if False in (each.what.attention, each.what.mlp)]
        if found:
            concerns.append(_concern(run, record, found, len(mine)))
    finding = finding_of(
        run,
        concerns,
        rule="residual_missing",
        title="Blocks do not add to the residual stream",
        kind="cause",
        several="have blocks that do not add to the residual stream",
        remedy="Add what a sublayer puts out to what it was given: x = x + attention(norm(x)), x = x + mlp(norm(x)).",
        source=STREAM_SOURCE,
        explains=(
            "first_loss_too_high",
            "learning_rate_too_low",
            "gradients_explode_with_depth",
            "gradients_vanish_with_depth",
            "entropy_collapse",
            "rank_collapse",
            "starved_queries_and_keys",
            "loss_explosion",
            "plateau",
            "stalled",
        ),
    )
    followed = {each.member for each in blocks}
    blind = {entry.name: NOT_FOLLOWED for entry in run.entries if entry.name not in followed}
    return answer(run, "residual_missing", finding, blind | without_steps(run))


def _concern(run: Run, record: MemberRecord, found: Sequence[Told[InputCarried]], n_blocks: int) -> Concern:
    worst = found[0]
    parts = {"attention": worst.what.attention, "its MLP": worst.what.mlp}
    missing = " and ".join(name for name, is_added in parts.items() if is_added is False)
    return Concern(
        member=record.name,
        step=0,
        badness=float(len(found)),
        said=(
            f"In {len(found)} of {n_blocks} blocks of {record.name} that were followed, no path of additions leads from what they are "
            f"given to what they put out: in block {worst.what.layer} the output of {missing} stands in place of the stream."
        ),
        evidence=tuple(
            Evidence(member=record.name, step=each.step, layer=each.what.layer, quantity="events") for each in found
        ),
        severity="error" if _did_harm(run, record) else "warning",
    )


def _did_harm(run: Run, record: MemberRecord) -> bool:
    if record.diverged_at is not None or record.status == "stalled":
        return True
    first, final = record.first_loss, record.final_loss
    known = levels_of(run).get(record.name, Levels())
    levels = [level for level in (first, known.unigram) if level is not None]
    return final is not None and any(final > LEARNED_NOTHING * level > 0 for level in levels)
