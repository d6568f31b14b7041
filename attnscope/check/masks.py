"""Queries that see no key, and what becomes of them.

Shape key: B batch, T position.
"""

from attnscope.check.attention import Looked
from attnscope.check.case import Case
from attnscope.check.result import MOST_EVIDENCE, Checked, many, skipped

NO_ATTENTION = (
    "Seen are F.scaled_dot_product_attention, nn.MultiheadAttention, and matmul, bmm or einsum followed by a softmax, in eager "
    "PyTorch and with gradients."
)


def masked_rows(case: Case, looked: Looked) -> Checked:
    """Whether every query sees a key, and whether outputs are finite."""
    name = "masked rows"
    output = case.outputs["evaluation"]
    broken_BT = ~output.isfinite().all(dim=-1)
    broken, real = int(broken_BT.sum()), int((broken_BT & case.batch.real_BT).sum())
    n_positions = broken_BT.numel()
    empty = sum(each.empty_rows for each in looked.calls)
    empty_real = sum(each.empty_real_rows for each in looked.calls)
    total = sum(each.rows for each in looked.calls)
    evidence = tuple(
        {
            "layer": each.layer,
            "rows": each.rows,
            "without a key": each.empty_rows,
            "of them not padded": each.empty_real_rows,
        }
        for each in sorted(looked.calls, key=lambda each: -each.empty_real_rows)
    )[:MOST_EVIDENCE]
    rows = (
        f"{empty:,} of {many(total, 'query row')} in {many(len(looked.calls), 'attention call')} see no key"
        + (f" ({empty_real:,} of them at positions that are not padded)" if empty else "")
        if looked.calls
        else "no attention was seen"
    )
    if broken or empty_real:
        outputs = (
            f"outputs are NaN or infinite at {broken:,} of {many(n_positions, 'position')} ({real:,} not padded)"
            if broken
            else "outputs are finite"
        )
        return Checked(
            name=name,
            status="failed",
            finding=f"{rows[0].upper()}{rows[1:]}, and {outputs}.",
            evidence=evidence,
            remedy=(
                "Let every query see at least its own position (a causal mask keeps its diagonal: triu(1) is hidden, not "
                "triu(0)); with padding on the left, let padded queries see one key."
                if empty
                else "Look for what is not finite before attention: weights, embeddings, a division by zero."
            ),
        )
    if not looked.calls:
        return skipped(name, f"No attention was seen: {looked.why}.", NO_ATTENTION)
    return Checked(
        name=name,
        status="passed",
        finding=f"{rows[0].upper()}{rows[1:]}, and all outputs are finite.",
        evidence=evidence,
        remedy="",
    )
