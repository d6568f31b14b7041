"""Whether heads divide the width of the model, and q, k and v stand over the same positions."""

from attnscope.check.attention import Observed
from attnscope.check.case import Case
from attnscope.check.facts import Attention
from attnscope.check.masks import NO_ATTENTION, unseen_rest
from attnscope.check.result import Checked, failed, many, not_looked, passed


def head_shapes(case: Case, observed: Observed) -> Checked:
    """Whether heads divide the width of the model and the heads of k, and attend over positions."""
    name = "head shapes"
    if not observed.calls:
        return not_looked(name, f"No attention was seen: {observed.why}.", NO_ATTENTION)
    problems = [(call, _misshapen(call, case)) for call in observed.calls]
    wrong = [(call, problem) for call, problem in problems if problem is not None]
    order = [*(call for call, _ in wrong), *(call for call, problem in problems if problem is None)]
    evidence = [
        {
            "layer": call.layer,
            "heads": call.n_heads,
            "heads of k": call.n_kv_heads,
            "d_head": call.d_head,
            "d_model": call.d_model,
            "queries": call.n_queries,
            "keys": call.n_keys,
        }
        for call in order
    ]
    if wrong:
        first, (said, remedy) = wrong[0]
        finding = f"{len(wrong)} of {many(len(observed.calls), 'attention call')}: {first.layer} {said}."
        return failed(name, finding, evidence, remedy)
    shapes = sorted({(call.n_heads, call.d_head) for call in observed.calls})
    in_words = ", ".join(f"{n_heads} x {d_head or '?'}" for n_heads, d_head in shapes)
    agree = f"q and k of {many(len(observed.calls), 'attention call')} agree; heads x d_head: {in_words}"
    return passed(name, f"{agree}{unseen_rest(observed)}.", evidence)


def _misshapen(call: Attention, case: Case) -> tuple[str, str] | None:
    """What is wrong with the shapes of a call, and what to do."""
    n_positions = case.grid[1]
    if call.over_batch is None and n_positions not in (call.n_queries, call.n_keys) and n_positions == call.n_heads:
        return (
            f"attends over {call.n_queries} heads instead of {n_positions} positions: q is (batch, {call.n_heads}, "
            f"{call.n_queries}, {call.d_head})",
            "Put heads before positions: q.view(B, T, n_heads, d_head).transpose(1, 2), and k and v likewise.",
        )
    if call.repeated > 1:
        return (
            f"has {call.n_keys} keys for {call.n_queries} queries: each key stands {call.repeated} times on the axis of positions, "
            f"repeated along the sequence instead of the heads{', and a causal mask reaches only the first of them' if call.mask == 'causal' else ''}",
            "Repeat heads of k and v along the axis of heads: repeat_interleave(n, dim=1) of (B, heads, S, d_head), or enable_gqa=True.",
        )
    if call.is_top_left:
        return (
            f"says is_causal for {call.n_queries} {'query' if call.n_queries == 1 else 'queries'} and {call.n_keys} keys: the first query then stands at the first key, and query t sees keys 0 to t",
            "is_causal=True is for as many keys as queries; with a cache, give a mask that ends in the bottom right corner, or none for a "
            "single query.",
        )
    if call.n_heads % call.n_kv_heads:
        return (
            f"has {call.n_heads} heads of q, which {call.n_kv_heads} heads of k do not divide",
            "Use a number of key heads that divides that of the query heads.",
        )
    used = call.n_heads * call.d_head
    if call.d_model and used != call.d_model and call.d_model // call.n_heads == call.d_head:
        return (
            f"uses {used} of {call.d_model} dimensions: {call.n_heads} heads do not divide d_model = {call.d_model}",
            f"Use a number of heads that divides {call.d_model}, or another d_model.",
        )
    return None
