"""Queries that see no key, and what becomes of them; softmax over the wrong axis.

Shape key: B batch, T position.
"""

from collections.abc import Sequence

from attnscope.check.attention import Observed
from attnscope.check.case import Case
from attnscope.check.result import Checked, failed, listed, many, not_looked, passed

NO_ATTENTION = "Seen are F.scaled_dot_product_attention, nn.MultiheadAttention, FlexAttention, and matmul, bmm or einsum followed by a softmax."
WRONG_AXIS = "softmax over the queries' axis"  # as the reason of a call that could not be seen begins


def masked_rows(case: Case, observed: Observed) -> Checked:
    """Whether every query sees a key, and whether outputs are finite."""
    name = "masked rows"
    output = case.outputs["evaluation"]
    broken_BP = ~output.isfinite().all(dim=-1)
    broken, real = int(broken_BP.sum()), int((broken_BP & case.watched(case.batch.real_BT)).sum())
    n_rows = broken_BP.numel()
    empty = sum(call.empty_rows for call in observed.calls)
    empty_real = sum(call.empty_real_rows for call in observed.calls)
    total = sum(call.rows for call in observed.calls)
    evidence = [
        {
            "layer": call.layer,
            "rows": call.rows,
            "without a key": call.empty_rows,
            "of them not padded": call.empty_real_rows,
        }
        for call in sorted(observed.calls, key=lambda call: -call.empty_real_rows)
    ]
    rows = "No attention was seen"
    if observed.calls:
        rows = f"{empty:,} of {many(total, 'query row')} in {many(len(observed.calls), 'attention call')} see no key"
        if empty == total:
            rows = f"Every query row is fully masked: {rows}"
        elif empty:
            rows += f" ({empty_real:,} of them at positions that are not padded)"
    if broken or empty_real:
        outputs = "outputs are finite"
        if broken:
            unit = "position" if case.kind == "positions" else "row"
            not_padded = f" ({real:,} not padded)" if case.kind == "positions" else ""
            outputs = f"outputs are NaN or infinite at {broken:,} of {many(n_rows, unit)}{not_padded}"
        remedy = "Look for what is not finite before attention: weights, embeddings, a division by zero."
        if empty:
            remedy = (
                "Let every query see at least its own position (a causal mask keeps its diagonal: triu(1) is hidden, not "
                "triu(0)); with padding on the left, let padded queries see one key."
            )
        if empty == total and empty:
            remedy = (
                "Is the mask the wrong way round? Boolean masks of F.scaled_dot_product_attention say True for what is seen, "
                "key_padding_mask and the masks of torch's modules say True for what is hidden."
            )
        return failed(name, f"{rows}, and {outputs}.", evidence, remedy)
    if not observed.calls:
        return not_looked(name, f"No attention was seen: {observed.why}.", NO_ATTENTION)
    return passed(name, f"{rows}, and all outputs are finite{unseen_rest(observed)}.", evidence)


def softmax_axis(_: Case, observed: Observed) -> Checked:
    """Whether each softmax between q kᵀ and v runs over the keys."""
    wrong = wrong_axes(observed.unseen)
    if wrong:
        n_calls = len(wrong) + len(observed.calls)
        return failed(
            "softmax axis",
            f"{len(wrong)} of {many(n_calls, 'attention call')} {'takes' if len(wrong) == 1 else 'take'} the softmax over the axis "
            f"of the queries instead of the keys: {listed(where for where, _ in wrong)}.",
            [{"layer": where, "seen": reason} for where, reason in wrong],
            "Say softmax(dim=-1): the weights of one query over all keys sum to 1.",
        )
    if not observed.calls:
        return not_looked("softmax axis", f"No attention was seen: {observed.why}.", NO_ATTENTION)
    finding = f"The softmax of {many(len(observed.calls), 'attention call')} is over the keys{unseen_rest(observed)}."
    return passed("softmax axis", finding)


def wrong_axes(unseen: Sequence[str]) -> list[tuple[str, str]]:
    """Of lines such as "layers.0.attn (eager, [[3, 4, 12, 12]]): reason", where each softmax over the queries is, and the reason."""
    wrong = []
    for line in unseen:
        place, between, reason = line.partition("): ")
        if between and reason.startswith(WRONG_AXIS):
            wrong.append((place.partition(" (")[0], reason))
    return wrong


def unseen_rest(observed: Observed) -> str:
    """What a result over the calls that were seen does not speak of."""
    if not observed.unseen:
        return ""
    return f"; {many(len(observed.unseen), 'more call')} could not be looked at ({observed.unseen[0]})"
