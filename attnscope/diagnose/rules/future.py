"""Rules of what a language model is to predict and what it sees of it: the future, and labels that are other tokens."""

import re
from collections.abc import Mapping, Sequence

from attnscope.diagnose.blindness import answer, without_attention, without_config, without_steps
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.diagnose.rules.masks import layer_names, members_with, named
from attnscope.findings import Evidence, Finding, NotLooked
from attnscope.runs.probed import Sight, Targets, sights, targets_of
from attnscope.runs.reader import Run

# Shares of targets that are the token so many positions on. Measured on 56 kinds of loops, 32 of them healthy, set on one seed
# and the same on another: 1.0 of targets that are the next tokens, 0.10 at most of others; denoising, whose targets are
# its inputs before 15 % of them were hidden, has 0.89 of the tokens at the same positions.
SAME_TOKEN = 0.98
OTHERWISE = 0.9  # of other distances: where they fit, too, as in a text of one symbol, nothing can be said
FEWEST_TARGETS = 32
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
    FEWEST_TARGETS), and how much attention goes to keys after the query in self-attention over these positions, in the first
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
        for entry in run.entries:
            mine = [each for each in targets_of(run) if each.member == entry.name and each.positions]
            if any(each.equal[1] > OTHERWISE for each in mine):
                continue
            shifted = [(each, at) for each in mine if (at := _distance(each)) is not None and _is_causal(run, each)]
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
    names = layer_names(run)
    concerns = []
    for entry in run.entries:
        told = next((each for each in targets_of(run) if each.member == entry.name and _are_next(each)), None)
        layers = [] if told is None else _over_tokens(run, told)
        if told is None or not (seers := _unlike_others(told, layers, names)):
            continue
        worst = max(seers, key=lambda each: each.later or 0.0)
        concerns.append(
            Concern(
                member=entry.name,
                step=worst.step,
                badness=worst.later or 0.0,
                said=(
                    f"The targets are the inputs shifted by one ({told.equal[1]:.0%} of {told.compared} at step {told.step}), and "
                    f"in {len(seers)} of {len(layers)} attention layers queries see what comes after them: in "
                    f"{named(names, worst.member, worst.layer)} they give {worst.later:.2g} of their attention to later keys, "
                    "where a causal mask leaves nothing."
                ),
                evidence=tuple(
                    Evidence(
                        member=each.member,
                        step=each.step,
                        layer=each.layer,
                        quantity="events",
                        value=each.later,
                        threshold=SOME_ATTENTION,
                    )
                    for each in sorted(seers, key=lambda each: -(each.later or 0.0))
                ),
                severity="error",
            )
        )
    return concerns


def _shifted(told: Targets, distance: int) -> Concern:
    what = {
        0: "the inputs themselves, at the same positions: a model that sees its own token has only to copy it",
        -1: "the inputs one position before, which the model is given already",
        2: "the inputs two positions further on: they were shifted twice, perhaps by the script and by the model",
    }[distance]
    return Concern(
        member=told.member,
        step=told.step,
        badness=told.equal[distance],
        said=f"At step {told.step}, {told.equal[distance]:.0%} of {told.compared} targets are {what}.",
        evidence=(
            Evidence(
                member=told.member,
                step=told.step,
                quantity="events",
                value=told.equal[distance],
                threshold=SAME_TOKEN,
            ),
        ),
        severity="warning" if distance > 1 else "error",
    )


def _are_next(told: Targets) -> bool:
    return told.compared >= FEWEST_TARGETS and told.equal[1] >= SAME_TOKEN and told.equal[0] <= OTHERWISE


def _distance(told: Targets) -> int | None:
    """Which tokens the targets are, other than the next ones; None where that cannot be told."""
    fits = [at for at in (0, -1, 2) if told.equal[at] > OTHERWISE]
    is_clear = told.compared >= FEWEST_TARGETS and len(fits) == 1 and told.equal[fits[0]] >= SAME_TOKEN
    return fits[0] if is_clear else None


def _over_tokens(run: Run, told: Targets) -> list[Sight]:
    """Self-attention over as many positions as the tokens have."""
    return [
        each
        for each in sights(run)
        if each.member == told.member and each.queries == each.keys == told.positions and each.later is not None
    ]


def _unlike_others(told: Targets, layers: Sequence[Sight], names: Mapping[tuple[str, int], str]) -> list[Sight]:
    """Layers that see later keys where they may not: all of them do, or some of a stack, of which others do not.

    An encoder may see as many positions as there are tokens, and cross-attention as many keys.
    """
    seers = [each for each in layers if _sees_later(each)]
    if len(seers) == len(layers):
        return seers
    if told.sequences > 1:
        return []
    stacks = {each.layer: _NUMBER.sub("#", names.get((each.member, each.layer), "")) for each in layers}
    blind = {stacks[each.layer] for each in layers if each.later_rows == 0} - {""}
    return [each for each in seers if stacks[each.layer] in blind]


def _sees_later(each: Sight) -> bool:
    return (each.later_rows or 0.0) >= NEARLY_ALL and (each.later or 0.0) >= SOME_ATTENTION


def _is_causal(run: Run, told: Targets) -> bool:
    layers = _over_tokens(run, told)
    return bool(layers) and all(each.later_rows == 0 for each in layers)


def _without_next_tokens(run: Run) -> dict[str, str]:
    """Members of a watched script of which nobody knows whether they are to predict the next token, or whether they see it."""
    if run.kind != "watch":
        return without_config(run) | without_steps(run)
    blind = without_attention(run)
    for entry in run.entries:
        mine = [each for each in targets_of(run) if each.member == entry.name]
        language = [each for each in mine if _are_next(each)]
        if not mine:
            blind.setdefault(entry.name, NO_TARGETS)
        elif not any(each.sequences for each in mine):
            blind.setdefault(entry.name, NO_TOKENS)
        elif language and not _over_tokens(run, language[0]):
            n = language[0].positions
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
