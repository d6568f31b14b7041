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
    found = [(each, _misshapen(each, case)) for each in observed.calls]
    wrong = [(each, problem) for each, problem in found if problem is not None]
    order = [*(each for each, _ in wrong), *(each for each, problem in found if problem is None)]
    evidence = [
        {
            "layer": each.layer,
            "heads": each.n_heads,
            "heads of k": each.n_kv_heads,
            "d_head": each.d_head,
            "d_model": each.d_model,
            "queries": each.n_queries,
            "keys": each.n_keys,
        }
        for each in order
    ]
    if wrong:
        first, (said, remedy) = wrong[0]
        finding = f"{len(wrong)} of {many(len(observed.calls), 'attention call')}: {first.layer} {said}."
        return failed(name, finding, evidence, remedy)
    shapes = sorted({(each.n_heads, each.d_head) for each in observed.calls})
    in_words = ", ".join(f"{n_heads} x {d_head or '?'}" for n_heads, d_head in shapes)
    agree = f"q and k of {many(len(observed.calls), 'attention call')} agree; heads x d_head: {in_words}"
    return passed(name, f"{agree}{unseen_rest(observed)}.", evidence)


def _misshapen(each: Attention, case: Case) -> tuple[str, str] | None:
    """What is wrong with the shapes of a call, and what to do."""
    n_positions = case.grid[1]
    if each.over_batch is None and n_positions not in (each.n_queries, each.n_keys) and n_positions == each.n_heads:
        return (
            f"attends over {each.n_queries} heads instead of {n_positions} positions: q is (batch, {each.n_heads}, "
            f"{each.n_queries}, {each.d_head})",
            "Put heads before positions: q.view(B, T, n_heads, d_head).transpose(1, 2), and k and v likewise.",
        )
    if each.repeated > 1:
        return (
            f"has {each.n_keys} keys for {each.n_queries} queries: each key stands {each.repeated} times on the axis of positions, "
            f"repeated along the sequence instead of the heads{', and a causal mask reaches only the first of them' if each.mask == 'causal' else ''}",
            "Repeat heads of k and v along the axis of heads: repeat_interleave(n, dim=1) of (B, heads, S, d_head), or enable_gqa=True.",
        )
    if each.is_top_left:
        return (
            f"says is_causal for {each.n_queries} {'query' if each.n_queries == 1 else 'queries'} and {each.n_keys} keys: the first query then stands at the first key, and query t sees keys 0 to t",
            "is_causal=True is for as many keys as queries; with a cache, give a mask that ends in the bottom right corner, or none for a "
            "single query.",
        )
    if each.n_heads % each.n_kv_heads:
        return (
            f"has {each.n_heads} heads of q, which {each.n_kv_heads} heads of k do not divide",
            "Use a number of key heads that divides that of the query heads.",
        )
    used = each.n_heads * each.d_head
    if each.d_model and used != each.d_model and each.d_model // each.n_heads == each.d_head:
        return (
            f"uses {used} of {each.d_model} dimensions: {each.n_heads} heads do not divide d_model = {each.d_model}",
            f"Use a number of heads that divides {each.d_model}, or another d_model.",
        )
    return None
