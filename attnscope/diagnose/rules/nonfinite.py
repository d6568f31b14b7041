"""Rules for numbers that are not finite: for good, and for a moment.

Shape key: N rows, M member in the order of run.json.
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnscope.diagnose.blindness import answer, without_loss, without_optimizer, without_steps
from attnscope.diagnose.why_nonfinite import why_nonfinite
from attnscope.findings import Evidence, Finding, NotLooked, of_several, worst_first
from attnscope.runs.by_member import members_of_rows, sorted_by_member
from attnscope.runs.divergence import IN_A_ROW
from attnscope.runs.events import Nonfinite, Place, SkippedUpdate
from attnscope.runs.foreign import printable
from attnscope.runs.reader import Run
from attnscope.signals.nonfinite import TENSORS

MOST_HALVINGS = 16  # from the first scale of GradScaler, 2**16, to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Break:
    """One tensor of a member that is not finite, at one step, and where."""

    step: int
    member: str
    tensor: str
    where: tuple[Place, ...] = ()

    @property
    def layer(self) -> int | None:
        """Of the first place."""
        return self.where[0].layer if self.where else None

    @property
    def group(self) -> str | None:
        """Of the first place, or the path of its module."""
        if not self.where:
            return None
        name = self.where[0].path if self.where[0].group is None else self.where[0].group
        return None if name is None else printable(name, 40)

    @property
    def evidence(self) -> Evidence:
        """As a finding has it."""
        return Evidence(
            member=self.member,
            step=self.step,
            layer=self.layer,
            group=self.group,
            quantity=TENSORS.get(self.tensor, printable(self.tensor, 40)),
        )


def nonfinite(run: Run) -> Finding | NotLooked | None:
    """Numbers became NaN or Inf, and stayed so.

    What it looks at: of each member, the last step whose loss and gradient were finite, and the first `nonfinite` event
    after it; without one, the first loss that is not finite. Fewer than IN_A_ROW steps at the very end count only if they did
    harm: a loss whose gradient is finite, or a step that loss scaling skips, does none. It says why where the tables show it: q.k
    in float16 came close to its largest number before it was scaled, or no target of a watched step counted.
    Why it matters: what comes after it means nothing, and the first tensor tells where it began.
    What to try: look at what grew before (other findings); float16: bfloat16 or a smaller scale.
    Known limits: it names the first tensor among those that are recorded, not the operation; within a step they are taken in
    the order in which a step computes them.
    Source: the definition.
    """
    sound_M = _last_sound(run)
    number = {entry.name: m for m, entry in enumerate(run.entries)}
    first: dict[str, Break] = {}
    for each in _breaks(run):
        before = first.get(each.member)
        if each.step > sound_M[number[each.member]] and (before is None or each.step < before.step):
            first[each.member] = each
    for record in run.members:
        at = record.nonfinite_at
        if record.name not in first and at is not None and at > sound_M[number[record.name]]:
            first[record.name] = Break(member=record.name, step=at, tensor="loss")
    blind = _without_loss_and_gradient(run)
    if not first:
        return answer(run, "nonfinite", None, blind)
    names = [entry.name for entry in run.entries if entry.name in first]
    evidence, left_out = worst_first(first.values(), lambda each: each.evidence, order=lambda each: each.step)
    worst = min(first.values(), key=lambda each: each.step)
    direction = "backward" if worst.tensor == "gradient" else "forward"
    where = "" if worst.layer is None else f" in layer {worst.layer}"
    where += f" ({worst.group})" if worst.group else ""
    why, remedy = why_nonfinite(run, number[worst.member], worst.step, worst.tensor)
    finding = Finding(
        rule="nonfinite",
        title="Numbers stopped being finite",
        kind="symptom",
        severity="error",
        step=worst.step,
        summary=(
            f"{of_several(names, 'recorded NaN or Inf')}The first non-finite numbers of {worst.member} are at step "
            f"{worst.step}, in the {direction} pass: {printable(worst.tensor, 40)}{where}.{why and f' {why}'}"
        ),
        members=tuple(names),
        evidence=evidence,
        evidence_left_out=left_out,
        remedy=(
            (
                remedy
                or "Look for what grew before. With float16, use bfloat16 or smaller logits: loss scaling protects the gradient only."
            )
            + (
                " `attnscope watch --snapshot 2` keeps the weights and batches that led to it."
                if run.kind == "watch"
                else ""
            )
        ),
        source="first nonfinite event after which nothing was finite, or first such loss",
        explains=("loss_explosion", "failed"),
    )
    return answer(run, "nonfinite", finding, blind)


def nonfinite_loss_passed(run: Run) -> Finding | NotLooked | None:
    """A loss was NaN or Inf, and training went on.

    What it looks at: losses that are not finite, after which losses and gradients were finite again; and the gradient of
    the same step. A gradient alone that overflows under loss scaling is how loss scaling works, and no finding.
    Why it matters: the step taught nothing, and a mean over many losses, as a logger takes it, is NaN from then on.
    What to try: look at the batch: one without any label has a mean over nothing.
    Known limits: of a watched script NaN also stands for a loss that was not seen; after the first one that was seen to be NaN,
    the two are not told apart.
    Source: the definition.
    """
    codes_N, step_N, loss_N, norm_N = sorted_by_member(run.steps, ("step", "loss", "grad_norm"))
    is_bad_N = ~np.isfinite(loss_N) & _is_seen(run)
    passed_K = np.flatnonzero(is_bad_N & (step_N <= _last_sound(run)[codes_N]))
    blind = without_loss(run)
    if not len(passed_K):
        return answer(run, "nonfinite_loss_passed", None, blind)
    names = [run.entries[m].name for m in np.unique(codes_N[passed_K])]
    first = int(passed_K[step_N[passed_K].argmin()])
    member, step, loss = run.entries[codes_N[first]].name, int(step_N[first]), loss_N[first]
    is_finite = bool(np.isfinite(norm_N[first]))
    others = int((codes_N[passed_K] == codes_N[first]).sum()) - 1
    more = "" if not others else f" (as {'is' if others == 1 else 'are'} {others} after it)"
    is_last = step == run.members[int(codes_N[first])].last_step
    how = (
        "its gradients and the weights stayed finite"
        if is_finite
        else "its gradients were not finite either, but the weights stayed so"
    )
    how += ", and it was the last" if is_last else ", and training went on"
    evidence, left_out = worst_first(
        passed_K.tolist(),
        lambda k: Evidence(
            member=run.entries[codes_N[k]].name,
            step=int(step_N[k]),
            quantity="loss",
            value=float(loss_N[k]),
        ),
    )
    finding = Finding(
        rule="nonfinite_loss_passed",
        title="A loss was not finite, and training went on",
        kind="symptom",
        severity="warning",
        step=step,
        summary=(
            f"{of_several(names, 'have losses that are not finite, and finite ones after them')}The loss of step {step} of "
            f"{member} is {'NaN' if math.isnan(loss) else 'infinite'}{more}; {how}."
        ),
        members=tuple(names),
        evidence=evidence,
        evidence_left_out=left_out,
        remedy=(
            "Look at the batch of that step: if no token of it has a label, its loss is a mean over nothing. Leave such "
            "batches out, or divide by at least 1."
            if is_finite
            else "Look at the batch of that step. With float16, use bfloat16 or smaller logits: it overflows in the "
            "forward pass, where loss scaling does not protect."
        ),
        source="the definition",
    )
    return answer(run, "nonfinite_loss_passed", finding, blind)


def updates_skipped(run: Run) -> Finding | NotLooked | None:
    """Loss scaling skips one update after the other.

    What it looks at: `skipped_update` events of watched runs with the same number of updates before them.
    Why it matters: each halves the scale; after MOST_HALVINGS in a row the gradient is not finite without any scale, and
    nothing is learned, while the loss looks as before.
    What to try: find what makes the gradient infinite, in the parameters named.
    Known limits: runs of this lab do not record such events; only torch's GradScaler is seen, and one that begins at another
    scale than 2**16 needs more halvings or fewer.
    Source: torch.amp.GradScaler begins at 2**16.
    """
    first: dict[tuple[str, int], Break] = {}
    counts: Counter[tuple[str, int]] = Counter()
    for step, member, skipped in run.happened(SkippedUpdate):
        if member is not None:
            counts[member, step] += 1
            first.setdefault((member, step), Break(step=step, member=member, tensor="gradient", where=skipped.where))
    endless = [key for key, count in counts.items() if count > MOST_HALVINGS]
    skipping = {member for member, _ in counts}
    blind = {name: why for name, why in _unseen_skips(run).items() if name not in skipping}
    if not endless:
        return answer(run, "updates_skipped", None, blind)
    members = {member for member, _ in endless}
    names = [entry.name for entry in run.entries if entry.name in members]
    most = max(endless, key=lambda key: counts[key])
    worst = first[most]
    evidence, left_out = worst_first(endless, lambda key: first[key].evidence, order=lambda key: -counts[key])
    finding = Finding(
        rule="updates_skipped",
        title="Loss scaling skips one update after the other",
        kind="symptom",
        severity="error",
        step=worst.step,
        summary=(
            f"{of_several(names, 'skip updates without end')}After {worst.step} updates of {worst.member}, "
            f"{counts[most]} in a row were skipped: each time the gradient was not finite, and the loss scale was "
            f"halved. More than {MOST_HALVINGS} halvings say that no scale helps."
        ),
        members=tuple(names),
        evidence=evidence,
        evidence_left_out=left_out,
        remedy=(
            "Find the operation whose gradient is not finite (sqrt or log at 0, a division by 0, a norm of zeros), in or "
            "after the parameters named; torch.autograd.detect_anomaly() names it."
        ),
        source="torch.amp.GradScaler begins at 2**16 and halves at each skipped update",
    )
    return answer(run, "updates_skipped", finding, blind)


def _without_loss_and_gradient(run: Run) -> dict[str, str]:
    """Members of which neither was seen: where the loss breaks, so does its gradient, and either is enough."""
    codes_N, norm_N = members_of_rows(run.steps), run.steps["grad_norm"].to_numpy()
    has_norm_M = np.bincount(codes_N[~np.isnan(norm_N)], minlength=len(run.entries)) > 0
    has_norm = {entry.name for entry, has in zip(run.entries, has_norm_M, strict=True) if has}
    return {name: why for name, why in without_loss(run).items() if name not in has_norm}


def _unseen_skips(run: Run) -> dict[str, str]:
    """Members of which an update that was skipped could not be seen."""
    if run.kind == "watch":
        return without_optimizer(run) | without_steps(run)
    codes_N, scale_N = members_of_rows(run.steps), run.steps["loss_scale"].to_numpy()
    scaled_M = np.bincount(codes_N[scale_N > 1], minlength=len(run.entries)) > 0
    scaled = zip(run.entries, scaled_M, strict=True)
    return {
        entry.name: "skipped updates are recorded of watched scripts only" for entry, is_scaled in scaled if is_scaled
    }


def _last_sound(run: Run) -> NDArray[np.int64]:
    """The last step of each member up to which what was not finite did no lasting harm, (M,); -1 = there is none.

    Up to the end it did none where nobody was lost: losses without finite gradients, and gradients that loss scaling made
    overflow, are few and the last ones by chance.
    """
    codes_N, step_N, loss_N, norm_N, scale_N = sorted_by_member(run.steps, ("step", "loss", "grad_norm", "loss_scale"))
    n_members = len(run.entries)
    finite_N, norm_finite_N = np.isfinite(loss_N), np.isfinite(norm_N)
    is_known_M = np.bincount(codes_N[norm_finite_N], minlength=n_members) > 0
    seen_N = _is_seen(run)
    sound_N = np.where(seen_N, finite_N & (norm_finite_N | ~is_known_M[codes_N]), norm_finite_N)
    sound_M = np.full(n_members, -1, dtype=np.int64)
    np.maximum.at(sound_M, codes_N[sound_N].astype(np.int64), step_N[sound_N].astype(np.int64))
    diverged_M = np.array([record.diverged_at is not None for record in run.members], dtype=bool)
    after_N = (step_N > sound_M[codes_N]) & ~diverged_M[codes_N]
    count_M = np.bincount(codes_N[after_N], minlength=n_members)
    # A step that was skipped; a loss of nothing.
    passes_N = np.where(finite_N | ~seen_N, scale_N > 1, norm_finite_N)
    harm_M = np.bincount(codes_N[after_N & ~passes_N], minlength=n_members) > 0
    for m in np.flatnonzero((count_M > 0) & (count_M < IN_A_ROW) & ~harm_M):
        sound_M[m] = run.members[m].last_step or 0
    return sound_M


def _is_seen(run: Run) -> NDArray[np.bool_]:
    """Whether each loss was seen, (N,), in the order of `sorted_by_member`."""
    return run.loss_seen[np.argsort(members_of_rows(run.steps), kind="stable")]


def _breaks(run: Run) -> list[Break]:
    """The nonfinite events, in the order in which a step computes the tensors."""
    breaks = [
        Break(step=step, member=member, tensor=broken.tensor, where=broken.where or ())
        for step, member, broken in run.happened(Nonfinite)
        if member is not None
    ]
    order = {tensor: at for at, tensor in enumerate(TENSORS)}
    return sorted(breaks, key=lambda broken: order.get(broken.tensor, len(order)))
