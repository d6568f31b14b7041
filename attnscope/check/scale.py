"""What q·k is multiplied by, and how heads divide the width of the model."""

import math

from attnscope.check.attention import Attention, Looked
from attnscope.check.case import Case
from attnscope.check.masks import NO_ATTENTION
from attnscope.check.result import MOST_EVIDENCE, Checked, many, short, skipped

# Of 1/√d_head. Scales that are fitted to logits are exact to 1e-3 in float32; bfloat16 rounds by 0.4%.
SCALE_WITHIN = 0.01


def attention_scale(_: Case, looked: Looked) -> Checked:
    """Whether each attention call multiplies q·k by 1/√d_head."""
    name = "attention scale"
    if not looked.calls:
        return skipped(name, f"No attention was seen: {looked.why}.", NO_ATTENTION)
    measured = [each for each in looked.calls if each.scale is not None and not each.is_cosine]
    wrong = [each for each in measured if _is_off(each)]
    evidence = tuple(
        _scale_row(each) for each in [*wrong, *(e for e in looked.calls if e not in wrong)]
    )
    unmeasured = len(looked.calls) - len(measured)
    if not measured:
        return Checked(
            name=name,
            status="skipped",
            finding=f"The scale of {many(unmeasured, 'attention call')} cannot be read from {_its(unmeasured)} logits.",
            evidence=evidence[:MOST_EVIDENCE],
            remedy="A soft-cap, q and k of length 1, or a bias for each sequence leave no scale to compare with 1/sqrt(d_head).",
        )
    rest = f"; the scale of {unmeasured} more cannot be read" if unmeasured else ""
    if wrong:
        first = wrong[0]
        return Checked(
            name=name,
            status="failed",
            finding=(
                f"{len(wrong)} of {many(len(measured), 'attention call')} {'does' if len(wrong) == 1 else 'do'} not multiply "
                f"q.k by 1/sqrt(d_head): {first.layer} multiplies by {short(first.scale or 0.0)}{_in_words(first)}, which is {short(_ratio(first))} times 1/sqrt("
                f"{first.d_head}) = {short(first.d_head**-0.5)}{rest}."
            ),
            evidence=evidence[:MOST_EVIDENCE],
            remedy=(
                "Multiply q.k by 1/sqrt(d_head) once. Where another scale is meant (muP, T5, a learned temperature), this "
                "check says what it is and does not apply."
            ),
        )
    widths = sorted({each.d_head for each in measured})
    return Checked(
        name=name,
        status="passed",
        finding=(
            f"{many(len(measured), 'attention call')} {'multiplies' if len(measured) == 1 else 'multiply'} q.k by "
            f"1/sqrt(d_head), d_head = {', '.join(map(str, widths))}{rest}."
        ),
        evidence=evidence[:MOST_EVIDENCE],
        remedy="",
    )


def head_shapes(case: Case, looked: Looked) -> Checked:
    """Whether heads divide the width of the model and the heads of k, and attend over positions."""
    name = "head shapes"
    if not looked.calls:
        return skipped(name, f"No attention was seen: {looked.why}.", NO_ATTENTION)
    problems = [_misshapen(each, case) for each in looked.calls]
    found = list(zip(looked.calls, problems, strict=True))
    wrong = [(each, problem) for each, problem in found if problem is not None]
    order = [*(each for each, _ in wrong), *(each for each, problem in found if problem is None)]
    evidence = tuple(
        {
            "layer": each.layer,
            "heads": each.n_heads,
            "heads of k": each.n_kv_heads,
            "d_head": each.d_head,
            "d_model": each.d_model,
        }
        for each in order
    )[:MOST_EVIDENCE]
    if wrong:
        first, (said, remedy) = wrong[0]
        return Checked(
            name=name,
            status="failed",
            finding=f"{len(wrong)} of {many(len(looked.calls), 'attention call')}: {first.layer} {said}.",
            evidence=evidence,
            remedy=remedy,
        )
    shapes = sorted({(each.n_heads, each.d_head) for each in looked.calls})
    in_words = ", ".join(f"{n_heads} x {d_head}" for n_heads, d_head in shapes)
    return Checked(
        name=name,
        status="passed",
        finding=f"q and k of {many(len(looked.calls), 'attention call')} agree; heads x d_head: {in_words}.",
        evidence=evidence,
        remedy="",
    )


def _misshapen(each: Attention, case: Case) -> tuple[str, str] | None:
    """What is wrong with the shapes of a call, and what to do."""
    n_positions = case.grid[1]
    if n_positions not in (each.n_queries, each.n_keys) and n_positions == each.n_heads:
        return (
            f"attends over {each.n_queries} heads instead of {n_positions} positions: q is (batch, {each.n_heads}, "
            f"{each.n_queries}, {each.d_head})",
            "Put heads before positions: q.view(B, T, n_heads, d_head).transpose(1, 2), and k and v likewise.",
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


def _is_off(each: Attention) -> bool:
    return not math.isclose(_ratio(each), 1.0, rel_tol=SCALE_WITHIN)


def _ratio(each: Attention) -> float:
    return (each.scale or 0.0) * math.sqrt(each.d_head)


def _in_words(each: Attention) -> str:
    """A wrong scale by what people write for it."""
    known = {
        "no scale at all": 1.0,
        "1/d_head": 1 / each.d_head,
        "sqrt(d_head)": math.sqrt(each.d_head),
        "1/sqrt(d_model)": (each.n_heads * each.d_head) ** -0.5,
        "1/sqrt(n_heads)": each.n_heads**-0.5,
    }
    for words, value in known.items():
        if math.isclose(each.scale or 0.0, value, rel_tol=SCALE_WITHIN):
            return f" ({words})"
    return ""


def _scale_row(each: Attention) -> dict[str, object]:
    return {
        "layer": each.layer,
        "d_head": each.d_head,
        "scale": each.scale,
        "1/sqrt(d_head)": each.d_head**-0.5,
        "q and k of length 1": each.is_cosine,
    }


def _its(count: int) -> str:
    return "its" if count == 1 else "their"
