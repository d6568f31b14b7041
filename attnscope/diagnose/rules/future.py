"""Rules of what a language model is to predict and what it sees of it: the future, and labels that are other tokens."""

import re
from collections.abc import Iterable, Mapping, Sequence

from attnscope.diagnose.blindness import answer, without_attention, without_config, without_steps
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.diagnose.rules.masks import layer_names, members_with, named
from attnscope.findings import Evidence, Finding, NotLooked
from attnscope.runs.probe_events import KeysSeen, TargetsSeen
from attnscope.runs.probed import Told, told
from attnscope.runs.reader import Run

# Shares of targets that are the token so many positions on. Measured on 56 kinds of loops, 32 of them healthy, set on one seed
# and the same on another: 1.0 of targets that are the next tokens, 0.10 at most of others; denoising, whose targets are
# its inputs before 15 % of them were hidden, has 0.89 of the tokens at the same positions.
SAME_TOKEN = 0.98
OTHERWISE = 0.9  # of other distances: where they fit, too, as in a text of one symbol, nothing can be said
FEWEST_TARGETS = 32
# Packed documents, whose separators are masked, or have another token beside them in the targets: the next tokens for 0.8 and more,
# and no other distance is anywhere near. Enough to tell what is to be predicted, not that it is another token.
NEXT_TOKEN = 0.8
UNLIKE = 0.5
# Share of query rows that see a later key. In the same loops all rows do without a mask, 0.29 to 0.33 where a prefix of 6 of 16
# positions may be read both ways, and none under a causal mask.
NEARLY_ALL = 0.9
# Mean share of attention on later keys: 0.48 and more without a mask, 0.13 and more where it is off by one (16 positions), 1e-4
# at most under a mask of -10, which lets through too little to learn from.
SOME_ATTENTION = 1e-3
_NUMBER = re.compile(r"\d+")

NO_TARGETS = "no cross-entropy with class indices was seen in the first steps"
NO_TOKENS = "no token ids were seen in the first steps, which the targets could be compared with"


def future_visible(run: Run) -> Finding | NotLooked | None:
    """A model that learns to predict the next token sees it.

    What it looks at: in runs of this lab, attention.mask = none under data.objective = next_token. In watched runs, whether the
    targets of the cross-entropy are the token ids that an embedding was given, shifted by one (at least SAME_TOKEN of at least
    FEWEST_TARGETS, or NEXT_TOKEN where no other distance fits UNLIKE of them), and how much attention goes to keys after the query in self-attention over these positions, in the first
    steps: rows that see such keys (NEARLY_ALL), and their mean share (SOME_ATTENTION). All layers over so many positions must see
    later keys, or some of those of one stack; where the model was given other sequences of tokens, too, as an encoder is, all.
    Why it matters: the loss falls far below what can be predicted, by reading the answer, and so does the loss on held-out data;
    when text is generated there is no answer to read, and it is garbage.
    What to try: a causal mask: is_causal=True, or -inf above the diagonal before the softmax; attention.mask = causal.
    Known limits: targets that are the inputs without a shift (masked language models, autoencoders) are not looked at, nor a
    mask that lets only some positions look ahead; lookups and losses inside of a compiled graph are not seen.
    Source: Vaswani et al. 2017, section 3.2.3; in this lab val_loss 0.10 without the mask and 2.38 with it, and 9.1 against 2.35
    after a prefix (configs/missing_causal_mask.toml).
    """
    concerns = _unmasked_members(run) if run.kind != "watch" else _leaks(run)
    finding = finding_of(
        run,
        concerns,
        rule="future_visible",
        title="The model sees the tokens that it is to predict",
        kind="cause",
        several="see the tokens that they are to predict",
        remedy=(
            "Mask what comes after the query: is_causal=True, or -inf above the diagonal before the softmax "
            "(attention.mask = causal)."
        ),
        source="Vaswani et al. 2017, section 3.2.3; configs/missing_causal_mask.toml",
        explains=("loss_too_low",),
    )
    return answer(run, "future_visible", finding, _without_next_tokens(run))


def labels_shifted_wrong(run: Run) -> Finding | NotLooked | None:
    """A causal model is to predict another token than the next one.

    What it looks at: in watched runs whose self-attention over the tokens sees no later key, which of the token ids that an
    embedding was given the targets of the cross-entropy are, in the first steps: those of the same position, of the one before, or
    two further on, in at least SAME_TOKEN of at least FEWEST_TARGETS, while no cross-entropy of the step has the next ones (more than
    OTHERWISE).
    Why it matters: a token that the model is given already is copied, and the loss falls to nothing while nothing is learned; of
    labels that were shifted twice, by the script and by the model, it learns to skip one.
    What to try: logits[:, :-1] against ids[:, 1:], once; where the model shifts its labels itself, give it the ids as they are.
    Known limits: lookups and losses inside of a compiled graph are not seen.
    Source: transformers shifts labels inside of its causal language models; what is compared are the ids themselves.
    """
    concerns = []
    if run.kind == "watch":
        layers, targets = told(run, KeysSeen), told(run, TargetsSeen)
        for entry in run.entries:
            mine = [each for each in targets if each.member == entry.name and each.what.positions]
            if any((each.what.equal_next or 0.0) > OTHERWISE for each in mine):
                continue
            shifted = [(each, at) for each in mine if (at := _distance(each.what)) and _are_causal(layers, each)]
            concerns += [_shifted(*one) for one in shifted[:1]]
    finding = finding_of(
        run,
        concerns,
        rule="labels_shifted_wrong",
        title="The targets are not the next tokens",
        kind="cause",
        several="have targets that are not the next tokens",
        remedy=(
            "Shift once: logits[:, :-1] against ids[:, 1:], or targets that are the tokens after the inputs; models of "
            "transformers shift the labels that they are given themselves."
        ),
        source="the token ids and the targets of the first steps, compared",
        explains=("loss_too_low", "first_loss_too_high", "plateau", "stalled"),
    )
    return answer(run, "labels_shifted_wrong", finding, _without_next_tokens(run))


def _leaks(run: Run) -> list[Concern]:
    names, layers, targets = layer_names(run), told(run, KeysSeen), told(run, TargetsSeen)
    concerns = []
    for entry in run.entries:
        asked = next((each for each in targets if each.member == entry.name and _are_next(each.what)), None)
        over = [] if asked is None else _over_tokens(layers, asked)
        if asked is None or not (seers := _unlike_others(asked.what, over, names)):
            continue
        seers = sorted(seers, key=lambda each: -(each.what.later or 0.0))
        worst, share = seers[0], asked.what.equal_next or 0.0
        concerns.append(
            Concern(
                member=entry.name,
                step=worst.step,
                badness=worst.what.later or 0.0,
                said=(
                    f"The targets are the inputs shifted by one ({share:.0%} of {asked.what.compared} at step {asked.step}), and "
                    f"in {len(seers)} of {len(over)} attention layers queries see what comes after them: in "
                    f"{named(names, worst.member, worst.what.layer)} they give {worst.what.later:.2g} of their attention to later "
                    "keys, where a causal mask leaves nothing."
                ),
                evidence=tuple(
                    Evidence(
                        member=each.member,
                        step=each.step,
                        layer=each.what.layer,
                        quantity="events",
                        value=each.what.later,
                        threshold=SOME_ATTENTION,
                    )
                    for each in seers
                ),
                severity="error",
            )
        )
    return concerns


# Which tokens targets may be, other than the next ones: where `TargetsSeen` has the share, in words, and whether it is copying.
_OTHERS = {
    "equal_same": (
        "the inputs themselves, at the same positions: a model that sees its own token has only to copy it",
        True,
    ),
    "equal_before": ("the inputs one position before, which the model is given already", True),
    "equal_after_next": (
        "the inputs two positions further on: they were shifted twice, perhaps by the script and by the model",
        False,
    ),
}


def _shifted(targets: Told[TargetsSeen], which: str) -> Concern:
    share = float(getattr(targets.what, which))
    words, copies = _OTHERS[which]
    evidence = Evidence(member=targets.member, step=targets.step, quantity="events", value=share, threshold=SAME_TOKEN)
    return Concern(
        member=targets.member,
        step=targets.step,
        badness=share,
        said=f"At step {targets.step}, {share:.0%} of {targets.what.compared} targets are {words}.",
        evidence=(evidence,),
        severity="error" if copies else "warning",
    )


def _are_next(targets: TargetsSeen) -> bool:
    share = targets.equal_next or 0.0
    others = max(getattr(targets, which) or 0.0 for which in _OTHERS)
    is_all = share >= SAME_TOKEN and (targets.equal_same or 0.0) <= OTHERWISE
    return targets.compared >= FEWEST_TARGETS and (is_all or (share >= NEXT_TOKEN and others <= UNLIKE))


def _distance(targets: TargetsSeen) -> str:
    """Which of _OTHERS the targets are; empty where that cannot be told."""
    shares = {which: getattr(targets, which) or 0.0 for which in _OTHERS}
    fits = [which for which, share in shares.items() if share > OTHERWISE]
    is_clear = targets.compared >= FEWEST_TARGETS and len(fits) == 1 and shares[fits[0]] >= SAME_TOKEN
    return fits[0] if is_clear else ""


def _over_tokens(layers: Iterable[Told[KeysSeen]], targets: Told[TargetsSeen]) -> list[Told[KeysSeen]]:
    """Self-attention over as many positions as the tokens have."""
    n = targets.what.positions
    mine = (each for each in layers if each.member == targets.member and each.what.later is not None)
    return [each for each in mine if each.what.queries == each.what.keys == n]


def _unlike_others(
    targets: TargetsSeen, layers: Sequence[Told[KeysSeen]], names: Mapping[tuple[str, int], str]
) -> list[Told[KeysSeen]]:
    """Layers that see later keys where they may not: all of them do, or some of a stack, of which others do not.

    An encoder may see as many positions as there are tokens, and cross-attention as many keys.
    """
    seers = [each for each in layers if _sees_later(each.what)]
    if len(seers) == len(layers):
        return seers
    if targets.sequences > 1:
        return []
    stacks = {each.what.layer: _NUMBER.sub("#", names.get((each.member, each.what.layer), "")) for each in layers}
    blind = {stacks[each.what.layer] for each in layers if each.what.later_rows == 0} - {""}
    return [each for each in seers if stacks[each.what.layer] in blind]


def _sees_later(layer: KeysSeen) -> bool:
    return (layer.later_rows or 0.0) >= NEARLY_ALL and (layer.later or 0.0) >= SOME_ATTENTION


def _are_causal(layers: Iterable[Told[KeysSeen]], targets: Told[TargetsSeen]) -> bool:
    over = _over_tokens(layers, targets)
    return bool(over) and all(each.what.later_rows == 0 for each in over)


def _without_next_tokens(run: Run) -> dict[str, str]:
    """Members of a watched script of which nobody knows whether they are to predict the next token, or whether they see it."""
    if run.kind != "watch":
        return without_config(run) | without_steps(run)
    blind, layers, targets = without_attention(run), told(run, KeysSeen), told(run, TargetsSeen)
    for entry in run.entries:
        mine = [each for each in targets if each.member == entry.name]
        language = [each for each in mine if _are_next(each.what)]
        if not mine:
            blind.setdefault(entry.name, NO_TARGETS)
        elif not any(each.what.sequences for each in mine):
            blind.setdefault(entry.name, NO_TOKENS)
        elif language and not _over_tokens(layers, language[0]):
            n = language[0].what.positions
            blind.setdefault(entry.name, f"no attention over the {n} positions of the tokens was measured in training")
    return blind


def _unmasked_members(run: Run) -> list[Concern]:
    """Of this lab: decoders without a mask."""
    return [
        Concern(
            member=name,
            step=0,
            badness=1.0,
            said=f"{name} predicts the next token with attention.mask = none: each query sees the keys after it, the answer too.",
            evidence=(Evidence(member=name, quantity="attention.mask"),),
            severity="error",
        )
        for name in members_with(run, mask="none", objective="next_token")
    ]
