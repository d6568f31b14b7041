"""What attention multiplies q·k by."""

import math

from attnscope.check.attention import Observed
from attnscope.check.case import Case
from attnscope.check.facts import Attention
from attnscope.check.masks import NO_ATTENTION, unseen_rest
from attnscope.check.result import Checked, failed, many, not_looked, passed, short, stated

# Of 1/√d_head. Scales that are fitted to logits are exact to 1e-3 in float32; bfloat16 rounds by 0.4%.
SCALE_WITHIN = 0.01
NAME = "attention scale"


def attention_scale(_: Case, observed: Observed) -> Checked:
    """Whether each attention call multiplies q·k by 1/√d_head, or by what is no known mistake."""
    if not observed.calls:
        return not_looked(NAME, f"No attention was seen: {observed.why}.", NO_ATTENTION)
    measured = [call for call in observed.calls if call.scale is not None and not call.is_cosine]
    off = [call for call in measured if _is_off(call)]
    rows = [_scale_row(call) for call in [*off, *(e for e in observed.calls if e not in off)]]
    n_unmeasured = len(observed.calls) - len(measured)
    if not measured:
        return not_looked(
            NAME,
            f"The scale of {many(n_unmeasured, 'attention call')} cannot be read from {'its' if n_unmeasured == 1 else 'their'} logits.",
            "A soft-cap, q and k of length 1, or a bias for each sequence leave no scale to compare with 1/sqrt(d_head).",
            rows,
        )
    rest = f"; the scale of {n_unmeasured} more cannot be read" if n_unmeasured else ""
    rest += unseen_rest(observed)
    if not off:
        widths = sorted({call.d_head for call in measured})
        return passed(
            NAME,
            f"{many(len(measured), 'attention call')} {'multiplies' if len(measured) == 1 else 'multiply'} q.k by "
            f"1/sqrt(d_head), d_head = {', '.join(map(str, widths))}{rest}.",
            rows,
        )
    mistakes = [(call, words) for call in off if (words := _mistake(call, measured))]
    if not mistakes:
        first = off[0]
        how = (
            _design(first, measured) or "the same in all layers"
            if _agree(off)
            else _design(first, measured) or "of their own"
        )
        return stated(
            NAME,
            f"{len(off)} of {many(len(measured), 'attention call')} {'multiplies' if len(off) == 1 else 'multiply'} q.k by another "
            f"number than 1/sqrt(d_head), {how}: {first.layer} by {short(first.scale or 0.0)}, {short(_ratio(first))} times 1/sqrt("
            f"{first.d_head}){rest}.",
            rows,
        )
    first, words = mistakes[0]
    return failed(
        NAME,
        f"{len(mistakes)} of {many(len(measured), 'attention call')} {'does' if len(mistakes) == 1 else 'do'} not multiply "
        f"q.k by 1/sqrt(d_head): {first.layer} multiplies by {short(first.scale or 0.0)} ({words}), which is "
        f"{short(_ratio(first))} times 1/sqrt({first.d_head}) = {short(first.d_head**-0.5)}{rest}.",
        rows,
        "Multiply q.k by 1/sqrt(d_head) once.",
    )


def _mistake(call: Attention, measured: list[Attention]) -> str:
    """A wrong scale by what people write for it; empty where it may be meant."""
    scale, d_head = call.scale or 0.0, call.d_head
    if _design(call, measured):
        return ""
    known = {
        "no scale at all": 1.0,
        "sqrt(d_head)": math.sqrt(d_head),
        "1/sqrt(d_model)": (call.n_heads * d_head) ** -0.5,
        "1/sqrt(n_heads)": call.n_heads**-0.5,
        "1/sqrt of the number of keys": call.n_keys**-0.5,
        "1/d_model": 1 / (call.n_heads * d_head),
    }
    for words, value in known.items():
        if _is_near(scale, value):
            return words
    if _is_near(scale, 1 / d_head) and call.before is not None and _is_near(call.before, d_head**-0.5):
        return "1/d_head: 1/sqrt(d_head) before the call and in it"
    right = len(measured) - sum(map(_is_off, measured))
    if 2 * right >= len(measured):
        named = "1/d_head, " if _is_near(scale, 1 / d_head) else ""
        return f"{named}unlike {many(right, 'other call')}"
    return ""


def _design(call: Attention, measured: list[Attention]) -> str:
    """What else a scale may be; empty where nothing speaks for it."""
    # T5 starts with q smaller than k by the scale. Halfway to it (in factors) it is no accident.
    sizes = sorted(call.rms)
    if _ratio(call) > 1 and not _is_twice(call) and sizes[0] < call.d_head**-0.25 * sizes[1]:
        return "with weights of q that make up for it, as in T5"
    # GPT-2's scale_attn_by_inverse_layer_idx.
    if len(measured) > 2 and all(_is_near(_ratio(e), 1 / (n + 1)) for n, e in enumerate(measured)):
        return "1/layer of it"
    if all(_is_near(e.scale or 0.0, 1 / e.d_head) for e in measured) and not _is_twice(call):
        return "1/d_head as in muP"
    return ""


def _is_twice(call: Attention) -> bool:
    return call.before is None or not _is_near(call.before, 1.0)


def _agree(calls: list[Attention]) -> bool:
    return all(_is_near(_ratio(call), _ratio(calls[0])) for call in calls)


def _is_off(call: Attention) -> bool:
    return not _is_near(_ratio(call), 1.0)


def _is_near(value: float, other: float) -> bool:
    return math.isclose(value, other, rel_tol=SCALE_WITHIN)


def _ratio(call: Attention) -> float:
    return (call.scale or 0.0) * math.sqrt(call.d_head)


def _scale_row(call: Attention) -> dict[str, object]:
    return {
        "layer": call.layer,
        "d_head": call.d_head,
        "scale": call.scale,
        "1/sqrt(d_head)": call.d_head**-0.5,
        "q and k of length 1": call.is_cosine,
    }
