"""Whether outputs know what they should not: padding, and other sequences of the batch.

Shape key: B batch, T position.
"""

import torch
from torch import Tensor

from attnscope.check.attention import Looked, spread
from attnscope.check.batch import changed_at
from attnscope.check.case import MODES, NOISE, Case, Mode, change_BT, first_changed
from attnscope.check.result import MOST_EVIDENCE, Checked, many, short, skipped

SEQUENCES = 4  # changed, one after the other


def padding_leak(case: Case, _: Looked) -> Checked:
    """Whether the contents of padding change outputs that are not padded."""
    name = "padding leak"
    batch = case.batch
    real_BT = batch.real_BT
    padded = int((~real_BT).sum())
    if batch.mask_name is None:
        return skipped(
            name,
            "The batch has no padding mask.",
            "Give one: attention_mask (1 = real), or src_key_padding_mask (True = padding).",
        )
    if not padded or not real_BT.any():
        return skipped(
            name,
            f"{batch.mask_name} marks {padded:,} of {many(real_BT.numel(), 'position')} as padding.",
            "Give a batch with sequences of different lengths.",
        )
    tried = f"{many(padded, 'padded position')} ({batch.mask_name})"
    return _compared(
        case,
        name=name,
        changes=[("padding", changed_at(batch, ~real_BT), real_BT)],
        said=f"Other contents at {tried} change",
        outputs="outputs that are not padded",
        remedy=f"Hide padded keys in every layer ({batch.mask_name} must reach the attention), and leave them out of means and norms.",
    )


def batch_leak(case: Case, _: Looked) -> Checked:
    """Whether one sequence changes the outputs of the others."""
    name = "batch leak"
    n_batch = case.grid[0]
    if n_batch < 2:
        return skipped(name, "The batch has a single sequence.", "Give two or more sequences.")
    changes = []
    for b in spread(n_batch, SEQUENCES):
        mine_BT = torch.zeros_like(case.batch.real_BT)
        mine_BT[b] = True
        x = changed_at(case.batch, mine_BT & case.batch.real_BT)
        changes.append((f"sequence {b}", x, ~mine_BT))
    return _compared(
        case,
        name=name,
        changes=changes,
        said=f"{many(len(changes), 'sequence')}, changed one after the other, change",
        outputs="outputs of other sequences",
        remedy=(
            "Keep sequences apart: no statistics over the batch (LayerNorm instead of BatchNorm), view and reshape that keep "
            "the first axis, batch_first=True in torch's modules."
        ),
    )


def _compared(
    case: Case,
    *,
    name: str,
    changes: list[tuple[str, Tensor, Tensor]],
    said: str,
    outputs: str,
    remedy: str,
) -> Checked:
    """Pass each changed input through the model, and look at the outputs that must stay as they are."""
    usable = [mode for mode in MODES if case.usable(mode)]
    unusable = [case.why_unusable(mode).rstrip(".") for mode in MODES if mode not in usable]
    if not usable:
        return skipped(
            name,
            f"Nothing can be told: {'; '.join(unusable)}.",
            "Repair that first (see the other checks).",
        )
    rows: list[tuple[float, dict[str, object]]] = []
    worst: tuple[float, Mode, Tensor, Tensor] | None = None
    leaked_in: dict[Mode, int] = dict.fromkeys(usable, 0)
    looked_at = 0
    for what, x, watched_BT in changes:
        looked_at += int(watched_BT.sum())
        for mode in usable:
            change = change_BT(case.outputs[mode], case.run(x, mode)).masked_fill(~watched_BT, 0.0)
            leaked_in[mode] += int((change > NOISE).sum())
            most = float(change.max())
            b, t = divmod(int(change.argmax()), change.shape[1])
            rows.append(
                (most, {"mode": mode, "changed": what, "sequence": b, "position": t, "change": most, "compared with": NOISE})
            )  # fmt: skip
            if most > NOISE and (worst is None or most > worst[0]):
                worst = (most, mode, x, watched_BT)
    rows.sort(key=lambda row: -row[0])
    evidence = tuple(row for _, row in rows)[:MOST_EVIDENCE]
    where = " and ".join(usable)
    rest = f" ({'; '.join(unusable)})" if unusable else ""
    if worst is None:
        return Checked(
            name=name,
            status="passed",
            finding=f"{said} none of {looked_at:,} {outputs} in {where}{rest}.",
            evidence=evidence[:1],
            remedy="",
        )
    most, mode, x, watched_BT = worst
    first = first_changed(case.trace(case.batch.input, mode), case.trace(x, mode), watched_BT)
    begins = f", first in {first}" if first else ""
    evidence[0]["first module"] = first
    modes = " and ".join(
        f"{count:,} of {looked_at:,} {outputs} in {each}"
        for each, count in leaked_in.items()
        if count
    )
    return Checked(
        name=name,
        status="failed",
        finding=f"{said} {modes}, by up to {short(most)} of the largest output{begins}{rest}.",
        evidence=evidence,
        remedy=remedy,
    )
