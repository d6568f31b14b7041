"""Two sentences on a run: how its members ended, and what their attention was like.

They say what was measured and nothing else. That members differ in one setting alone is a fact of the run; that it was
the cause is for the reader to conclude.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from attnscope.comparison.member import MemberRow
from attnscope.report.numbers import number

MOST_NAMED = 4  # members that a sentence names one by one
ALIKE = 0.05  # max_prob closer than that is called alike


def verdict_of(members: Sequence[MemberRow], differing: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    """How the members ended; what their attention was like."""
    return _outcomes(members), _attention(members, differing)


def _outcomes(members: Sequence[MemberRow]) -> str:
    if len(members) <= MOST_NAMED:
        return "; ".join(_outcome(member) for member in members) + "."
    counts = Counter(member.status for member in members)
    listed = _and([f"{count} {status}" for status, count in counts.most_common()])
    best = min(
        (m for m in members if m.status in ("trained", "stalled") and m.final_loss is not None),
        key=lambda m: m.final_loss or 0.0,
        default=None,
    )
    lowest = f"; the lowest final loss is {number(best.final_loss)} ({best.name})" if best else ""
    died = next((m for m in members if m.status == "failed"), None)
    of = f"; {died.name} failed{_of(died)}" if died and died.error else ""
    return f"Of {len(members)} members, {listed}{lowest}{of}."


def _outcome(member: MemberRow) -> str:
    name, loss = member.name, number(member.final_loss)
    against = "" if member.unigram is None else f" the unigram loss {number(member.unigram)}"
    if member.step is None:
        return f"{name} recorded nothing ({member.status}{_of(member)})"
    if member.status == "diverged":
        first = f"{name} diverged at step {member.step}: its loss was {number(member.first_loss)} at first"
        if member.nonfinite_at is None:
            return f"{first} and {loss} at the end"
        return f"{first} and became non-finite at step {member.nonfinite_at}"
    falls = " and still falling" if member.is_falling else ""
    if member.status == "stalled" and member.is_falling:
        return f"{name} is not below{against} yet: its final loss {loss} still falls{_passed(member)}"
    if member.status == "stalled":
        return f"{name} stalled: its final loss {loss} is above{against}{_passed(member)}"
    if member.status == "failed":
        return f"{name} failed after step {member.step} at a loss of {loss}{_of(member)}"
    if member.status == "trained" and against:
        return f"{name} trained to a loss of {loss}, below{against}{falls}{_leak(member)}{_passed(member)}"
    if member.status == "trained":  # nobody knows what would be learned
        return (
            f"{name} ran to its end at a loss of {loss}{falls}, {number(member.first_loss)} at first{_passed(member)}"
        )
    halted = {"running": "is still training"}.get(member.status, f"was {member.status}")
    return f"{name} {halted} after step {member.step} at a loss of {loss}"


def _of(member: MemberRow) -> str:
    """What a member died of, without the end of a sentence."""
    return f": {member.error.rstrip('.')}" if member.error else ""


def _passed(member: MemberRow) -> str:
    """A loss that was not finite, after which training went on."""
    return (
        ""
        if member.nonfinite_at is None
        else f" (its loss of step {member.nonfinite_at} was not finite, and training went on)"
    )


def _leak(member: MemberRow) -> str:
    """A model that predicts better than token frequencies only while it sees what it predicts."""
    val_loss, prefix_loss, unigram = member.val_loss, member.prefix_loss, member.unigram
    if unigram is None or val_loss is None or prefix_loss is None:
        return ""
    if not val_loss < unigram < prefix_loss:
        return ""
    return f", but to {number(prefix_loss)} where it does not see the token that it predicts"


def _attention(members: Sequence[MemberRow], differing: Mapping[str, Sequence[str]]) -> str:
    seen = [member for member in members if member.start.max_prob is not None]
    if not seen:
        return "Nothing was recorded of their attention."
    if len(seen) == 1:
        return _of_one(seen[0])
    sharp = max(seen, key=lambda member: member.start.max_prob or 0.0)
    flat = min(seen, key=lambda member: member.start.max_prob or 0.0)
    top, bottom = sharp.start.max_prob or 0.0, flat.start.max_prob or 0.0
    step = sharp.start.step
    where = f"at step {step}"
    if top - bottom > ALIKE:
        sentence = (
            f"{where} the softmax of {sharp.name} puts {number(top)} of a query's weight on one key on average, "
            f"that of {flat.name} {number(bottom)}; largest logits {number(sharp.start.max_logit)} and "
            f"{number(flat.start.max_logit)}"
        )
    else:
        sentence = f"{where} their attention is alike (max_prob {number(bottom)} to {number(top)})"
        last = [member for member in seen if member.end.max_prob is not None]
        ends = [f"{member.name} {number(member.end.max_prob)} (step {member.end.step})" for member in last[:MOST_NAMED]]
        more = f" and {len(last) - MOST_NAMED} more" if len(last) > MOST_NAMED else ""
        sentence += f", when last finite it is {', '.join(ends)}{more}"
    if 1 <= len(differing) <= 3:
        alone = " alone" if len(differing) == 1 else ""
        return f"They differ in {_and(list(differing))}{alone}: {sentence}."
    return f"{sentence[0].upper()}{sentence[1:]}."


def _of_one(member: MemberRow) -> str:
    start, end = member.start, member.end
    sentence = (
        f"At step {start.step} its softmax puts {number(start.max_prob)} of a query's weight on one key on average, "
        f"with a largest logit of {number(start.max_logit)}"
    )
    if end.step != start.step:
        sentence += f"; at step {end.step} {number(end.max_prob)} and {number(end.max_logit)}"
    return f"{sentence}."


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
