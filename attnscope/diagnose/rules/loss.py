"""Rules for symptoms of the loss: what became of a member, and what was measured before.

Shape key: N rows, K found, W window, M member in the order of run.json.
"""

import math
from collections.abc import Mapping

import numpy as np

from attnscope.diagnose.blindness import answer, without_loss
from attnscope.diagnose.rules.saturation import early_signals
from attnscope.findings import Evidence, Finding, NotLooked, of_several, worst_first
from attnscope.runs.by_member import diverged_at, members_of_rows, sorted_by_member
from attnscope.runs.divergence import FIRSTS, GUESSES, IN_A_ROW, LAST, LEAST_RISE, NEARLY_ZERO, NOT_FINITE_IN_A_ROW
from attnscope.runs.members import MemberRecord
from attnscope.runs.reader import Run
from attnscope.signals.spikes import BACK_WITHIN, LEAST_EXCESS, SIGMAS, WINDOW, spikes_of

FEWEST_LOSSES = IN_A_ROW + 1  # one to rise from
UNFINISHED = ("running", "interrupted", "failed", "killed")


def loss_explosion(run: Run) -> Finding | NotLooked | None:
    """The loss left for good.

    What it looks at: members that diverged: at least IN_A_ROW losses in a row far above the range before them (by its highest
    loss, WIDTHS times its width, or LEAST_RISE nats, whichever is most), or NOT_FINITE_IN_A_ROW in a row that are not finite,
    or up to the end, or, of a cross-entropy, a record that ends with LAST losses above GUESSES times guessing and FIRSTS times the
    first one; and, at the steps before, whether the mean entropy_ratio was below SATURATED_RATIO and the largest
    max_logit above LARGE_LOGIT.
    Why it matters: nothing is learned after it; an attention signal that left its range earlier is where to look.
    What to try: the causes found; else a lower optimizer.lr, a longer warm-up, qk_norm.
    Known limits: of losses that are noise and nothing else, hundreds of nats large, 1 run of 300 steps in 100 diverges where
    they are exponential, and 1 in 15 where they are squares. After few losses it takes a larger rise, or one that stays longer;
    with fewer than FEWEST_LOSSES none is seen. That a signal left its range before does not make it the cause.
    Source: attnscope.runs.divergence; max_logit: Wortsman et al. 2023; entropy_ratio: as in saturated_at_start.
    """
    exploded = [record for record in run.members if record.diverged_at is not None]
    seen_M = np.bincount(
        members_of_rows(run.steps)[~np.isnan(run.steps["loss"].to_numpy())],
        minlength=len(run.entries),
    )
    blind = {
        entry.name: f"fewer than {FEWEST_LOSSES} losses"
        for entry, seen in zip(run.entries, seen_M, strict=True)
        if seen < FEWEST_LOSSES
    } | without_loss(run)
    if not exploded:
        return answer(run, "loss_explosion", None, blind)
    peak, loss_then = _losses(run)
    early = early_signals(run)
    first = min(exploded, key=lambda record: record.diverged_at or 0)
    pieces = [
        (record.diverged_at or 0, each)
        for record in exploded
        for each in (
            Evidence(
                member=record.name,
                step=record.diverged_at,
                quantity="loss",
                value=loss_then[record.name],
                threshold=record.limit,
            ),
            *early.get(record.name, ()),
        )
    ]
    # Of members that diverged at the same step, each keeps its pieces together: sorting is stable.
    evidence, left_out = worst_first(pieces, lambda piece: piece[1], order=lambda piece: piece[0])
    finding = Finding(
        rule="loss_explosion",
        title=(
            "The loss exploded"
            if any(record.limit is not None for record in exploded)
            else "The loss stopped being finite"
        ),
        kind="symptom",
        severity="error",
        step=first.diverged_at,
        summary=(
            f"{of_several([record.name for record in exploded], 'diverged')}{_course(first, peak[first.name])}. "
            f"{_before(exploded, early)}"
        ),
        members=tuple(record.name for record in exploded),
        evidence=evidence,
        evidence_left_out=left_out,
        remedy=("Remove the causes found, if any; else a lower optimizer.lr, a longer warm-up, or attention.qk_norm."),
        source=(
            f"at least {IN_A_ROW} losses in a row far above the range before them, dated to where all are twice the best "
            f"level (or {LEAST_RISE:g} above it); or at the end {LAST} above {GUESSES:g} ln(classes) and {FIRSTS:g} times the first; or {NOT_FINITE_IN_A_ROW} in a row not finite, or up to the end"
        ),
        explains=("nonfinite", "failed"),
    )
    return answer(run, "loss_explosion", finding, blind)


def loss_spike(run: Run) -> Finding | NotLooked | None:
    """The loss jumped and came back.

    What it looks at: losses above the median of the WINDOW before by more than SIGMAS robust standard deviations and by more
    than LEAST_EXCESS of it, which are back below that within BACK_WITHIN steps; not what happens while a member diverges.
    Why it matters: a spike that recovers costs little itself, but more of them, or larger ones, often come before
    divergence; a single one may be an odd batch, or noise: about one in 5,000 steps is.
    What to try: look at the batch; a lower optimizer.lr, or clipping, if they recur.
    Known limits: noise with heavier tails than normal passes more often (t with 5 degrees of freedom: about one in 500 steps).
    The first WINDOW steps are not judged, nor is a step with a loss that was not seen so shortly before.
    Source: OLMo 2 2024 (6 to 7 standard deviations of the losses before) with robust statistics.
    """
    member_K, step_K, loss_K, median_K, limit_K = spikes_of(run)
    blind = _too_short(run) | without_loss(run)
    if not len(member_K):
        return answer(run, "loss_spike", None, blind)
    order_K = np.argsort(-(loss_K / np.maximum(median_K, 1e-9)), kind="stable")
    worst = order_K[0]
    names = [run.entries[m].name for m in np.unique(member_K)]
    evidence, left_out = worst_first(
        order_K.tolist(),
        lambda k: Evidence(
            member=run.entries[member_K[k]].name,
            step=int(step_K[k]),
            quantity="loss",
            value=float(loss_K[k]),
            threshold=float(limit_K[k]),
        ),
    )
    count = f"{len(member_K)} spikes" if len(member_K) > 1 else "1 spike"
    finding = Finding(
        rule="loss_spike",
        title="The loss spiked and came back",
        kind="symptom",
        severity="note",
        step=evidence[0].step,
        summary=(
            f"{of_several(names, 'have spikes')}{count} of the loss, back within {BACK_WITHIN} steps. The largest is "
            f"in {evidence[0].member} at step {evidence[0].step}: {loss_K[worst]:.3g} against a median of "
            f"{median_K[worst]:.3g} over the {WINDOW} steps before."
        ),
        members=tuple(names),
        evidence=evidence,
        evidence_left_out=left_out,
        remedy="Look at the batch of that step. If spikes recur: a lower optimizer.lr, or clipping.",
        source=(
            f"excess over the median of {WINDOW} losses above max({SIGMAS:g} * 1.4826 * MAD, {LEAST_EXCESS:g} * median), "
            "after OLMo 2 2024; normal noise alone passes it about once in 5,000 steps"
        ),
    )
    return answer(run, "loss_spike", finding, blind)


def stalled(run: Run) -> Finding | NotLooked | None:
    """Training ended finite and learned nothing from context.

    What it looks at: members whose final loss (mean of the last FINAL_STEPS steps) is above the unigram loss of their data.
    Why it matters: predicting every token from its frequency alone would do better; no spike detector sees it.
    What to try: the causes found; more steps if the loss still falls; a higher optimizer.lr if it hardly moves.
    Known limits: it needs the unigram loss, which is known of this lab's data and never of a watched script, and a training
    that came to its end. A loss that stays just below the unigram loss is not found.
    Source: attnscope.runs.outcome.
    """
    stuck = [record for record in run.members if record.status == "stalled"]
    blind = {
        record.name: "training did not come to its end"
        if record.status in UNFINISHED
        else "the unigram loss of the data is unknown"
        for record in run.members
        if record.status in UNFINISHED or run.unigram_of(record.part) is None
        if record.status != "diverged"
    } | without_loss(run)
    if not stuck:
        return answer(run, "stalled", None, blind)
    evidence, left_out = worst_first(
        stuck,
        lambda record: Evidence(
            member=record.name,
            step=record.last_step,
            quantity="loss",
            value=record.final_loss,
            threshold=run.unigram_of(record.part),
        ),
        order=lambda record: (run.unigram_of(record.part) or 0.0) - (record.final_loss or 0.0),
    )
    worst = evidence[0]
    falling = [record.name for record in stuck if record.is_falling]
    if len(falling) == len(stuck):
        title, course = "Training ended above the unigram loss, still falling", " It still falls."
        word = "ended above the unigram loss"
    else:
        title, word = "Training stalled above the unigram loss", "stalled"
        course = f" {len(falling)} of {len(stuck)} still fall." if falling else ""
    finding = Finding(
        rule="stalled",
        title=title,
        kind="symptom",
        severity="warning",
        summary=(
            f"{of_several([record.name for record in stuck], word)}The loss of {worst.member} is finite, but "
            f"{worst.value:.4g} at the end (step {worst.step}), above the {worst.threshold:.4g} of predicting from "
            f"token frequencies alone.{course}"
        ),
        members=tuple(record.name for record in stuck),
        evidence=evidence,
        evidence_left_out=left_out,
        remedy=(
            "Remove the causes found, if any. "
            + ("Train longer, " if falling else "If the loss hardly moves, change optimizer.lr, ")
            + "and look again."
        ),
        source="the unigram loss of the run's own data",
    )
    return answer(run, "stalled", finding, blind)


def failed(run: Run) -> Finding | NotLooked | None:
    """Training died of an error.

    What it looks at: members whose part ended with an error before all their steps were done.
    Why it matters: what was recorded up to there is good, and whatever else was found in it may have led there.
    What to try: what the error says.
    Known limits: a process that is killed says nothing, and its traceback is where it was started, not in the run.
    Source: end.json.
    """
    dead = [record for record in run.members if record.error is not None]
    dead = [record for record in dead if record.status in ("failed", "diverged")]
    blind = {
        record.name: "no end was recorded"
        for record in run.members
        if record.part not in run.ends and run.status != "running"
    }
    if not dead:
        return answer(run, "failed", None, blind)
    worst = dead[0]
    evidence, left_out = worst_first(
        dead,
        lambda record: Evidence(member=record.name, step=record.last_step, quantity="end.json"),
    )
    when = "before its first step" if worst.last_step is None else f"after step {worst.last_step}"
    finding = Finding(
        rule="failed",
        title="Training failed",
        kind="symptom",
        severity="error",
        step=worst.last_step,
        summary=(f"{of_several([record.name for record in dead], 'failed')}{worst.name} failed {when}: {worst.error}"),
        members=tuple(record.name for record in dead),
        evidence=evidence,
        evidence_left_out=left_out,
        remedy="Put right what the error says; its traceback is where the run was started.",
        source="what its process said when it ended",
    )
    return answer(run, "failed", finding, blind)


def _too_short(run: Run) -> dict[str, str]:
    """Members that nowhere have a window of losses and one after it, before they diverged."""
    codes_N, step_N, loss_N = sorted_by_member(run.steps, ("step", "loss"))
    usable_N = ~np.isnan(loss_N) & (step_N < diverged_at(run)[codes_N])
    row_N = np.arange(len(loss_N))
    is_first_N = np.r_[True, codes_N[1:] != codes_N[:-1]][: len(row_N)]
    # How many usable ones in a row end here: rows since the last that is none, or since the member began.
    last_bad_N = np.maximum.accumulate(np.where(~usable_N, row_N, np.where(is_first_N, row_N - 1, -1)))
    longest_M = np.zeros(len(run.entries), dtype=np.int64)
    np.maximum.at(longest_M, codes_N.astype(np.int64), row_N - last_bad_N)
    return {
        entry.name: f"fewer than {WINDOW + 1} losses in a row before divergence"
        for entry, longest in zip(run.entries, longest_M, strict=True)
        if longest <= WINDOW
    }


def _losses(run: Run) -> tuple[dict[str, float], dict[str, float]]:
    """The largest finite loss of each member, NaN where there is none, and the loss at the step where it diverged."""
    codes_N, step_N = members_of_rows(run.steps), run.steps["step"].to_numpy()
    loss_N = run.steps["loss"].to_numpy().astype(np.float64)
    peak_M, then_M = np.full((2, len(run.entries)), np.nan)
    finite_N = np.isfinite(loss_N)
    np.fmax.at(peak_M, codes_N[finite_N], loss_N[finite_N])
    there_N = step_N == diverged_at(run)[codes_N]
    then_M[codes_N[there_N]] = loss_N[there_N]
    names = [entry.name for entry in run.entries]
    return dict(zip(names, peak_M.tolist(), strict=True)), dict(zip(names, then_M.tolist(), strict=True))


def _course(record: MemberRecord, peak: float) -> str:
    """What the loss of a member that diverged did."""
    first = record.first_loss
    said = f"{record.name} diverged at step {record.diverged_at}: its loss was {first:.3g} at first"
    if math.isfinite(peak) and first is not None and record.limit is not None:
        said += f", at most {peak:.3g}"
        said += f" ({peak / first:.3g} times as much)" if first > NEARLY_ZERO else ""
    if record.nonfinite_at is not None:
        said += f", and not finite at step {record.nonfinite_at}"
    return said


def _before(exploded: list[MemberRecord], early: Mapping[str, tuple[Evidence, ...]]) -> str:
    """What attention was like before, in one sentence; only what was measured."""
    seen = [record for record in exploded if record.name in early]
    if not seen:
        return "No attention was measured before."
    left = [record for record in seen if early[record.name]]
    if not left:
        return "Before, the mean entropy_ratio and max_logit stayed in their normal range."
    shown = early[left[0].name]
    signals = [
        f"{each.quantity} was {each.value:.3g} at step {each.step} "
        f"({'below' if each.quantity == 'entropy_ratio' else 'above'} {each.threshold:g})"
        for each in shown
    ]
    count = "" if len(exploded) == 1 else f" in {len(left)} of {len(exploded)}"
    return (
        f"Attention had left its normal range before{count}: in {left[0].name} {' and '.join(signals)}, "
        f"{(left[0].diverged_at or 0) - min(each.step or 0 for each in shown)} steps earlier."
    )
