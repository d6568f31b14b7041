"""Rules of how large the loss is that an optimizer is given: sums over tokens, and over the losses of an update.

Shape key: N rows, M member in the order of run.json.
"""

import numpy as np

from attnscope.diagnose.blindness import answer, without_loss, without_optimizer, without_steps
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.findings import Evidence, Finding, NotLooked, Severity
from attnscope.runs.by_member import sorted_by_member
from attnscope.runs.members import MemberRecord
from attnscope.runs.probe_events import PassesSeen
from attnscope.runs.probed import told
from attnscope.runs.reader import Run
from attnscope.runs.watched import cross_entropies, optimizers_of

FEWEST_TOKENS = 8  # that are summed over
NEARLY_EQUAL = 0.25  # of the number of tokens: the loss by log_z of a model that knows nothing
SUM_SOURCE = "the loss of a model that knows nothing is near its log-partition, once, not once for each token"

# What each loss of an update is by the mean cross-entropy that it was computed from: 1 where nobody divides, 1/n, at most a half, where
# n losses are averaged; a small penalty beside it adds a few hundredths.
UNDIVIDED = 0.9
FEWEST_CLASSES = 3  # of two, real and made examples may be judged one after the other, as in a GAN
STILL_WHOLE = 1.0  # median clip_factor: below, clipping sets the size of the update, whatever the gradient is
PASSES_SOURCE = "the gradient of n losses that are added up is n times that of their mean"
NO_PASSES = "no update after losses that are each one mean cross-entropy was seen in the first steps"


def loss_summed(run: Run) -> Finding | NotLooked | None:
    """The loss is summed over tokens instead of averaged.

    What it looks at: the first loss of a watched script by log_z, the mean log-partition of its output, against the number of
    tokens of that step: within NEARLY_EQUAL of it, from FEWEST_TOKENS tokens on. The loss of this lab is a mean. It is an error where the
    member diverged, a warning where SGD trains it, whose updates grow with it, else a note.
    Why it matters: gradients are as many times too large as there are tokens, and change with every batch size and length:
    clipping is always on, float16 overflows, and no usual learning rate fits.
    What to try: the mean (reduction="mean"), and each loss divided by the number of batches that are accumulated.
    Known limits: only cross-entropy of class indices tells log_z. A sum over sequences alone, or over accumulated batches, cannot be
    told from several losses that are added up. A script may divide gradients later, or have a learning rate that fits.
    Source: SUM_SOURCE.
    """
    if run.kind != "watch":
        return None
    blind = without_loss(run)
    seen = optimizers_of(run)
    concerns = []
    codes_N, step_N, loss_N, log_z_N, tokens_N = sorted_by_member(run.steps, ("step", "loss", "log_z", "tokens"))
    for m, record in enumerate(run.members):
        mine = np.flatnonzero(codes_N == m)
        if not len(mine) or record.name in blind:
            continue
        at = mine[0]
        step, loss, log_z, tokens = int(step_N[at]), float(loss_N[at]), float(log_z_N[at]), float(tokens_N[at])
        if not (np.isfinite(log_z) and log_z > 0 and np.isfinite(loss)):
            blind[record.name] = "log_z was not seen at the first step"
            continue
        times = loss / log_z
        if tokens < FEWEST_TOKENS or abs(times / tokens - 1) > NEARLY_EQUAL:
            continue
        by_size = seen.get(record.name) == {"SGD"}
        severity: Severity = "error" if record.diverged_at is not None else "warning" if by_size else "note"
        concerns.append(
            Concern(
                member=record.name,
                step=step,
                badness=times,
                said=(
                    f"The first loss of {record.name} is {loss:.4g}, {times:.3g} times the log-partition of its output ({log_z:.3g}), "
                    f"and the step has {tokens:.0f} tokens: it is their sum."
                ),
                evidence=(
                    Evidence(member=record.name, step=step, quantity="loss", value=loss, threshold=log_z),
                    Evidence(member=record.name, step=step, quantity="tokens", value=tokens),
                ),
                severity=severity,
            )
        )
    finding = finding_of(
        run,
        concerns,
        rule="loss_summed",
        title="The loss is a sum over tokens",
        kind="cause",
        several="are trained on a sum",
        remedy='Take the mean (reduction="mean"), and divide by the number of batches that are accumulated.',
        source=SUM_SOURCE,
        explains=(
            "learning_rate_too_high",
            "clipping_always_on",
            "first_loss_too_high",
            "half_precision_headroom",
            "nonfinite",
            "loss_explosion",
        ),
    )
    return answer(run, "loss_summed", finding, blind)


def accumulation_not_divided(run: Run) -> Finding | NotLooked | None:
    """Several losses are differentiated for each update, and none is divided by their number.

    What it looks at: in the first steps of a watched script, how many losses are differentiated before an update, and what each
    is by the mean cross-entropy that it was computed from, without what a GradScaler multiplies it by: from two losses on in every
    step, and from UNDIVIDED on. It is an error where SGD trains the member and it diverged, a warning where SGD trains it and
    clipping leaves the gradient as it is, else a note: Adam and Muon divide the size of the gradient out again.
    Why it matters: the gradient is as many times too large as there are micro-batches: a learning rate that fits
    one batch is as many times too high, and another number of them is another training.
    What to try: (loss / n).backward() for each of n micro-batches.
    Known limits: whoever divides gradients later, or has a learning rate for their sum, is told all the same. Several
    losses of one batch, each differentiated by itself, look the same. Cross-entropy that is a sum, or inside of a compiled graph, is
    not looked at. This lab trains on one loss.
    Source: PASSES_SOURCE.
    """
    if run.kind != "watch":
        return None
    seen, entropies = optimizers_of(run), cross_entropies(run)
    factors = _clip_factors(run)
    passes = {each.member: each for each in told(run, PassesSeen)}
    blind = {entry.name: NO_PASSES for entry in run.entries if entry.name not in passes}
    concerns = []
    for record in run.members:
        each, entropy = passes.get(record.name), entropies.get(record.name)
        if each is None or each.what.fewest < 2:
            continue
        if each.what.weight is None or entropy is None:
            blind[record.name] = NO_PASSES
            continue
        n, weight = each.what.fewest, each.what.weight
        if weight < UNDIVIDED or entropy.classes < FEWEST_CLASSES:
            continue
        many = f"{n}" if n == each.what.most else f"{n} to {each.what.most}"
        concerns.append(
            Concern(
                member=record.name,
                step=0,
                badness=float(n),
                said=(
                    f"For each update of {record.name}, {many} losses are differentiated (of {each.what.steps} steps looked at), and each "
                    f"is {weight:.3g} times the mean cross-entropy that it comes from, not 1/{n} of it: the gradient is their sum."
                ),
                evidence=(
                    Evidence(member=record.name, step=0, quantity="events", value=weight, threshold=UNDIVIDED),
                    Evidence(member=record.name, step=0, quantity="events", value=float(n), threshold=2.0),
                ),
                severity=_severity(record, seen.get(record.name, set()), factors.get(record.name)),
            )
        )
    finding = finding_of(
        run,
        concerns,
        rule="accumulation_not_divided",
        title="Losses of an update are added up, not averaged",
        kind="cause",
        several="add the losses of an update up",
        remedy="Divide each loss by their number: (loss / n).backward() for each of n micro-batches.",
        source=PASSES_SOURCE,
        explains=(
            "learning_rate_too_high",
            "missing_warmup",
            "clipping_always_on",
            "entropy_collapse",
            "logit_growth",
            "nonfinite",
            "loss_explosion",
        ),
    )
    return answer(run, "accumulation_not_divided", finding, blind | without_optimizer(run) | without_steps(run))


def _severity(record: MemberRecord, optimizers: set[str], clip_factor: float | None) -> Severity:
    if optimizers != {"SGD"} or (clip_factor is not None and clip_factor < STILL_WHOLE):
        return "note"
    return "error" if record.diverged_at is not None else "warning"


def _clip_factors(run: Run) -> dict[str, float]:
    """Median of each member that has any."""
    codes_N, factor_N = sorted_by_member(run.steps, ("clip_factor",))
    known_N = ~np.isnan(factor_N)
    return {
        entry.name: float(np.median(factor_N[mine_N]))
        for m, entry in enumerate(run.entries)
        if (mine_N := known_N & (codes_N == m)).any()
    }
