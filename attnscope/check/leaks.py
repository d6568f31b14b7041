"""Whether outputs know what they should not: padding, and other sequences of the batch.

Shape key: B batch, T position, P rows of a sequence in the output.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnscope.check.attention import Observed, spread
from attnscope.check.batch import CallBatch, changed_at
from attnscope.check.case import BATCH_NORMS, MODES, NOISE, Case, Mode, change_BP, first_changed
from attnscope.check.facts import Attention
from attnscope.check.result import MOST_ROWS, Checked, failed, listed, many, not_looked, passed, short, stated

BATCH = "batch leak"
SEQUENCES = 4  # changed, one after the other
REAL = 6  # positions, one after the other, to see whether anything real reaches an output
INVERTED = (
    "Turn it round (~mask): attention_mask and boolean masks of F.scaled_dot_product_attention say True or 1 for what is seen, "
    "key_padding_mask says True for what is hidden."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Another input.

    Attributes:
        what: was changed.
        batch: the changed one.
        watched_BP: outputs that must stay as they are.
        where_BT: positions of which the same is true inside of the model.
    """

    what: str
    batch: CallBatch
    watched_BP: Tensor
    where_BT: Tensor


def padding_leak(case: Case, observed: Observed) -> Checked:
    """Whether the contents of padding change outputs that are not padded, and whether a padding mask is the wrong way round."""
    name = "padding leak"
    inputs = [given for given in (case.batch, case.batch.source) if given is not None]
    masked = [given for given in inputs if given.mask_name is not None]
    if not masked:
        return not_looked(
            name,
            "The batch has no padding mask.",
            "Give one: attention_mask (1 = real), src_key_padding_mask (True = padding), or lengths.",
        )
    padded = [given for given in masked if not given.real_BT.all() and given.real_BT.any()]
    if not padded:
        n_padded = int((~masked[0].real_BT).sum())
        return not_looked(
            name,
            f"{masked[0].mask_name} marks {n_padded:,} of {many(masked[0].real_BT.numel(), 'position')} as padding.",
            "Give a batch with sequences of different lengths.",
        )
    inverted = [call for call in observed.calls if call.is_inverted]
    if inverted:
        return _inverted(name, inverted, [call for call in observed.calls if call.is_inverted is not None])
    if case.kind == "whole":
        return not_looked(name, f"{WHOLE}.", "Give the arguments with which the model returns more than a loss.")
    real_BT = case.batch.real_BT
    changes = [
        Change(
            what="padding",
            batch=changed_at(given, ~given.real_BT),
            watched_BP=case.watched(real_BT),
            where_BT=real_BT,
        )
        for given in padded
    ]
    n_padded = sum(int((~given.real_BT).sum()) for given in padded)
    names = " and ".join(str(given.mask_name) for given in padded)
    soft = [call for call in observed.calls if call.soft is not None and call.soft.keys == "padded keys"]
    why = f"; in {listed(call.layer for call in soft)}, {soft[0].soft}" if soft else ""
    checked = _compared(
        case,
        name=name,
        changes=changes,
        said=f"Other contents at {many(n_padded, 'padded position')} ({names}) change",
        outputs="outputs that are not padded" if case.kind == "positions" else "outputs of sequences",
        remedy=f"Hide padded keys in every layer ({names} must reach the attention), and leave them out of means and norms.",
        why=why,
    )
    if checked.status == "failed" and padded[0] is case.batch and _nothing_real_reaches(case):
        return failed(
            name,
            f"The padding mask is inverted: real tokens are hidden and padding is seen. No output reacts to a real token at "
            f"another position, but to padding: {checked.finding[0].lower()}{checked.finding[1:]}",
            checked.evidence,
            INVERTED,
        )
    return checked


def _inverted(name: str, calls: list[Attention], known: list[Attention]) -> Checked:
    some = "" if len(calls) == len(known) else f" in {len(calls)} of {many(len(known), 'attention call')}"
    return failed(
        name,
        f"The padding mask is inverted{some}: real keys are hidden and padded keys are seen in {listed(call.layer for call in calls)}.",
        [{"layer": call.layer, "mask": call.mask, "inverted": bool(call.is_inverted)} for call in [*calls, *(e for e in known if not e.is_inverted)]],
        INVERTED,
    )  # fmt: skip


def _nothing_real_reaches(case: Case) -> bool:
    """Whether real positions change no output but their own, in sequences that have padding."""
    real_BT = case.batch.real_BT
    has_padding_B1 = ~real_BT.all(dim=1, keepdim=True)
    tried = [t for t in spread(real_BT.shape[1], REAL) if (real_BT[:, t] & has_padding_B1[:, 0]).any()]
    reached = 0
    for t in tried:
        where_BT = torch.zeros_like(real_BT)
        where_BT[:, t] = real_BT[:, t]
        change = change_BP(case.outputs["evaluation"], case.run(changed_at(case.batch, where_BT), "evaluation"))
        others_BT = real_BT & has_padding_B1 & real_BT[:, t : t + 1] & ~where_BT
        reached += bool((change > NOISE)[case.watched(others_BT)].any())
    # A pooled output has a position of its own, which changes it by way of the residual stream.
    return len(tried) > 2 and reached <= int(case.kind == "sequences")


def batch_leak(case: Case, observed: Observed) -> Checked:
    """Whether one sequence changes the outputs of the others."""
    name = BATCH
    n_batch, n_positions = case.grid
    over_batch = [call for call in observed.calls if call.over_batch is not None]
    remedy = (
        "Keep sequences apart: no statistics over the batch (LayerNorm instead of BatchNorm), view and reshape that keep the first "
        "axis, batch_first=True in torch's modules."
    )
    why = ""
    if over_batch:
        first = over_batch[0]
        shape = f"(batch {first.n_batch}, heads {first.n_heads}, positions {first.n_queries}, {first.d_head})"
        why = (
            f"Attention runs over the batch axis in {listed(call.layer for call in over_batch)}: it takes the {many(n_batch, 'sequence')} "
            f"for positions, q is {shape} for {n_batch} x {n_positions} positions"
        )
        remedy = (
            "Say batch_first=True to torch's modules, which take (positions, batch, d) otherwise, or transpose around them. That the "
            "first axis of a batch is meant to be that of positions is told by a causal mask, a padding mask or position embeddings."
        )
        rows = [{"layer": e.layer, "sequences": e.n_batch, "positions": e.n_queries} for e in over_batch]
    if n_batch < 2 or case.kind == "whole":
        if why:
            return failed(name, f"{why}.", rows, remedy)
        if n_batch < 2:
            return not_looked(name, "The batch has a single sequence.", "Give two or more sequences.")
        return not_looked(name, f"{WHOLE}.", "Give the arguments with which the model returns more than a loss.")
    changes = []
    for b in spread(n_batch, SEQUENCES):
        mine_BT = torch.zeros_like(case.batch.real_BT)
        mine_BT[b] = True
        others_BT = ~mine_BT
        batch = changed_at(case.batch, mine_BT & case.batch.real_BT)
        changes.append(
            Change(what=f"sequence {b}", batch=batch, watched_BP=case.watched(others_BT), where_BT=others_BT)
        )
    checked = _compared(
        case,
        name=name,
        changes=changes,
        said=f"{many(len(changes), 'sequence')}, changed one after the other, change",
        outputs="outputs of other sequences",
        remedy=remedy,
    )
    if not why:
        return checked
    if checked.status == "failed":
        why += f"; {checked.finding[0].lower()}{checked.finding[1:]}".rstrip(".")
    return failed(name, f"{why}.", [*rows[:3], *checked.evidence], remedy)


def _compared(
    case: Case,
    *,
    name: str,
    changes: list[Change],
    said: str,
    outputs: str,
    remedy: str,
    why: str = "",
) -> Checked:
    """Pass each changed batch through the model, and look at the outputs that must stay as they are."""
    usable = [mode for mode in MODES if case.usable(mode)]
    unusable = [case.why_unusable(mode) for mode in MODES if mode not in usable]
    if not usable:
        return not_looked(
            name,
            f"Nothing can be told: {'; '.join(unusable)}.",
            "Repair that first (see the other checks).",
        )
    rows: list[tuple[float, dict[str, object]]] = []
    worst: tuple[float, Mode, Change] | None = None
    leaked_in: dict[Mode, int] = dict.fromkeys(usable, 0)
    looked_at = 0
    for changed in changes:
        looked_at += int(changed.watched_BP.sum())
        for mode in usable:
            change = change_BP(case.outputs[mode], case.run(changed.batch, mode))
            change = change.masked_fill(~changed.watched_BP, 0.0)
            leaked_in[mode] += int((change > NOISE).sum())
            most = float(change.max())
            b, t = divmod(int(change.argmax()), change.shape[1])
            at = {"sequence": b, "position": t} if case.kind == "positions" else {"sequence": b}
            rows.append(
                (
                    most,
                    {"mode": mode, "changed": changed.what, **at, "change": most, "compared with": NOISE},
                )
            )
            if most > NOISE and (worst is None or most > worst[0]):
                worst = (most, mode, changed)
    rows.sort(key=lambda row: -row[0])
    evidence = tuple(row for _, row in rows)[:MOST_ROWS]
    where = " and ".join(usable)
    rest = f" ({'; '.join(unusable)})" if unusable else ""
    if worst is None:
        finding = f"{said} none of {looked_at:,} {outputs} in {where}{rest}."
        return passed(name, finding, evidence[:1])
    most, mode, leak = worst
    before, after = (case.trace(batch, mode, sequences=name == BATCH) for batch in (case.batch, leak.batch))
    first = first_changed(before, after, leak.where_BT)
    begins = f", first in {first}" if first else ""
    evidence[0]["first module"] = first
    modes = " and ".join(
        f"{count:,} of {looked_at:,} {outputs} in {mode}" for mode, count in leaked_in.items() if count
    )
    finding = f"{said} {modes}, by up to {short(most)} of the largest output{begins}{why}{rest}."
    module = dict(case.model.named_modules()).get(first or "")
    is_norm = isinstance(module, BATCH_NORMS) and not leaked_in.get("evaluation")
    if name == BATCH and is_norm and not case.batch.has_positions:  # as images are normalized
        return stated(name, f"{finding} It is a {type(module).__name__}.", evidence)
    return failed(name, finding, evidence, remedy)


WHOLE = "The output has no axis of sequences"
