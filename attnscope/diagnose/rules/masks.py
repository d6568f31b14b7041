"""Rules of what attention is let to see: nothing, padding, keys along the wrong axis."""

import re
from collections.abc import Sequence

from attnscope.diagnose.blindness import answer, without_attention, without_config, without_steps
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.findings import Evidence, Finding, NotLooked
from attnscope.runs.by_member import configs_of
from attnscope.runs.events import Nonfinite
from attnscope.runs.probe_events import KeysRepeated, KeysSeen, RowsWithoutKeys
from attnscope.runs.probed import Told, told
from attnscope.runs.reader import Run
from attnscope.runs.watched import attention_layers, not_measured

# Mean share of attention of real queries on padding. In the loops behind the thresholds of future.py: 0 where it is masked or stands
# after the queries under a causal mask, 0.48 and more where half of some sequences is padding, and seen.
PADDING = 0.01
INVERTED = 0.99  # of the rows that have a mask

_AXIS = re.compile(r"softmax over (the queries' axis|axis \d+ of \d+): weights of one query do not sum to 1")


def rows_fully_masked(run: Run) -> Finding | NotLooked | None:
    """Queries have every key hidden from them.

    What it looks at: in watched runs, query rows without a visible key in the first 20 steps. It is an error where numbers that
    are not finite follow in the same step, else a note.
    Why it matters: a softmax over nothing but -inf is 0/0, and one NaN in attention makes every gradient NaN, also where the
    loss leaves these positions out; where masks are large negative numbers, such a query reads everything alike.
    What to try: let each query see one key, itself for instance, and leave its output out of the loss.
    Known limits: rows of padding are often masked so on purpose, by kernels that give 0 for them; masks of more than 4 million
    numbers, and those of FlexAttention and flash-attn, are not looked at.
    Source: IEEE 754; F.scaled_dot_product_attention gives 0 for such rows from PyTorch 2.5 on.
    """
    broken: dict[str, int] = {}
    for step, member, _ in run.happened(Nonfinite):
        if member is not None:
            broken[member] = min(step, broken.get(member, step))
    names, empty = layer_names(run), told(run, RowsWithoutKeys)
    concerns = []
    for entry in run.entries:
        mine = [each for each in empty if each.member == entry.name]
        if not mine:
            continue
        first = min(mine, key=lambda each: (each.step, each.what.layer))
        breaks = broken.get(entry.name) == first.step
        concerns.append(
            Concern(
                member=entry.name,
                step=first.step,
                badness=first.what.rows / max(first.what.of, 1),
                said=(
                    f"At step {first.step}, {first.what.rows} of {first.what.of} query rows of {named(names, first.member, first.what.layer)} "
                    f"see no key at all"
                    + (
                        ", and in the same step numbers are not finite."
                        if breaks
                        else "; what they read means nothing."
                    )
                ),
                evidence=tuple(evidence_of(each, each.what.rows) for each in mine),
                severity="error" if breaks else "note",
            )
        )
    finding = finding_of(
        run,
        concerns,
        rule="rows_fully_masked",
        title="Queries have every key hidden from them",
        kind="cause",
        several="have queries that see no key",
        remedy=(
            "Let each query see at least one key, itself for instance, and leave the outputs of padding out of the loss. "
            "F.scaled_dot_product_attention with a boolean mask gives 0 for such rows, a softmax by hand NaN."
        ),
        source="a softmax over -inf alone is 0/0",
        explains=("nonfinite", "nonfinite_loss_passed", "updates_skipped"),
    )
    return answer(run, "rows_fully_masked", finding, _without_attention(run))


def padding_attended(run: Run) -> Finding | NotLooked | None:
    """Attention reads padding.

    What it looks at: in runs of this lab, attention.mask = none under data.objective = masked, whose sequences are padded. In
    watched runs, in the first steps: how much attention real queries give to keys at the ends of sequences whose token is the
    padding_idx of the embedding (more than PADDING is a note), and whether a mask hides keys of several tokens, and leaves keys of
    one token alone (in at least INVERTED of the rows that it masks: an error).
    Why it matters: what a sequence's outputs are depends on how long the others of its batch are. Under a mask the wrong way
    round, a model sees nothing but padding, and cannot learn.
    What to try: hide padding with the mask; mind that True hides in key_padding_mask, and shows in the boolean attn_mask of
    F.scaled_dot_product_attention and in attention_mask of transformers.
    Known limits: where the embedding has no padding_idx, padding that is seen beside real tokens is not known.
    Source: the harm of seeing it was small where it was measured: 0.01 to 0.02 nats (configs/bert_padding.toml).
    """
    concerns = _padded_members(run) if run.kind != "watch" else _padding_seen(run)
    finding = finding_of(
        run,
        concerns,
        rule="padding_attended",
        title="Attention reads padding",
        kind="cause",
        several="read padding",
        remedy=(
            "Hide padding from attention. True hides in key_padding_mask of nn.MultiheadAttention, and shows in a boolean "
            "attn_mask of F.scaled_dot_product_attention (attention.mask = padding)."
        ),
        source="configs/bert_padding.toml",
        explains=("plateau", "stalled"),
    )
    return answer(run, "padding_attended", finding, _without_attention(run))


def wrong_softmax_axis(run: Run) -> Finding | NotLooked | None:
    """Attention weights are normalized along another axis than that of the keys.

    What it looks at: in watched runs, the axis of each softmax written by hand, and which axis of its weights the product with
    the values sums over. Weights that are divided by their sum over the keys afterwards (slot attention) are no finding.
    Why it matters: the weights of a query do not sum to 1 over its keys. Queries compete for keys instead: a query gets
    little or much of everything, and what later queries ask for changes the weights of earlier ones, masked or not.
    What to try: softmax(dim=-1) of logits (..., queries, keys).
    Known limits: attention of this kind is not measured, so that other rules say nothing about these layers.
    Source: Vaswani et al. 2017, equation 1.
    """
    concerns = []
    found = [each for each in not_measured(run) if _AXIS.match(each.reason)]
    if run.kind == "watch" and found:
        axis = _AXIS.match(found[0].reason)
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        member = _member_of_unmeasured(run)
        concerns.append(
            Concern(
                member=member,
                step=0,
                badness=float(len(found)),
                said=(
                    f"In {found[0].name}{more} the softmax runs over {axis.group(1) if axis else 'another axis'}, and the product "
                    "with the values sums over another one: the weights of a query do not sum to 1 over its keys."
                ),
                evidence=tuple(Evidence(member=member, step=0, group=each.name, quantity="events") for each in found),
                severity="error",
            )
        )
    finding = finding_of(
        run,
        concerns,
        rule="wrong_softmax_axis",
        title="The softmax of attention runs over the wrong axis",
        kind="cause",
        several="have a softmax over the wrong axis",
        remedy="softmax(dim=-1), where the logits are (..., queries, keys): over the axis that the values are summed over.",
        source="Vaswani et al. 2017, equation 1",
        explains=("loss_too_low", "plateau", "stalled"),
    )
    return answer(run, "wrong_softmax_axis", finding, _without_attention(run))


def _padded_members(run: Run) -> list[Concern]:
    return [
        Concern(
            member=name,
            step=0,
            badness=1.0,
            said=f"{name} is given padded sequences with attention.mask = none: padding is read like any token.",
            evidence=(Evidence(member=name, quantity="attention.mask"),),
            severity="note",
        )
        for name in members_with(run, mask="none", objective="masked")
    ]


def members_with(run: Run, *, mask: str, objective: str) -> list[str]:
    """Members of a run of this lab that have this attention.mask and this data.objective."""
    return [
        entry.name
        for entry, config in zip(run.entries, configs_of(run), strict=True)
        if config is not None and (config.attention.mask, config.data.objective) == (mask, objective)
    ]


def _padding_seen(run: Run) -> list[Concern]:
    names, seen = layer_names(run), told(run, KeysSeen)
    concerns = []
    for entry in run.entries:
        layers = [each for each in seen if each.member == entry.name]
        inverted = [each for each in layers if (each.what.inverted_rows or 0.0) >= INVERTED]
        padded = [each for each in layers if (each.what.padded or 0.0) > PADDING]
        if not inverted and not padded:
            continue
        worst = inverted[0] if inverted else max(padded, key=lambda each: each.what.padded or 0.0)
        where = named(names, worst.member, worst.what.layer)
        said = (
            f"The mask of {where} is the wrong way round: what it leaves to be seen is one token, again and again, and what it "
            "hides are different ones."
            if inverted
            else f"At step {worst.step} real queries of {where} give {worst.what.padded:.2g} of their attention to padding."
        )
        concerns.append(
            Concern(
                member=entry.name,
                step=worst.step,
                badness=(worst.what.inverted_rows if inverted else worst.what.padded) or 0.0,
                said=said,
                evidence=tuple(
                    Evidence(
                        member=each.member,
                        step=each.step,
                        layer=each.what.layer,
                        quantity="events",
                        value=each.what.inverted_rows if inverted else each.what.padded,
                        threshold=INVERTED if inverted else PADDING,
                    )
                    for each in (inverted or padded)
                ),
                severity="error" if inverted else "note",
            )
        )
    return concerns


def _without_attention(run: Run) -> dict[str, str]:
    """Members of a watched script whose attention was not seen; of this lab, what rules ask for here is in the config."""
    return without_attention(run) if run.kind == "watch" else without_config(run) | without_steps(run)


def layer_names(run: Run) -> dict[tuple[str, int], str]:
    """Member and number of an attention layer of a watched run to the path of its module."""
    return {(each.member, each.layer): each.name for each in attention_layers(run)}


def evidence_of(
    each: Told[RowsWithoutKeys] | Told[KeysSeen] | Told[KeysRepeated], value: int, *, threshold: int = 0
) -> Evidence:
    """What a probe told of an attention layer, and the number in it that counts."""
    return Evidence(
        member=each.member,
        step=each.step,
        layer=each.what.layer,
        quantity="events",
        value=float(value),
        threshold=float(threshold),
    )


def named(names: dict[tuple[str, int], str], member: str, layer: int) -> str:
    """An attention layer as a sentence has it."""
    name = names.get((member, layer))
    return f"attention layer {layer}" + (f" ({name})" if name else "")


def _member_of_unmeasured(run: Run) -> str:
    events = run.events[run.events["kind"] == "not_measured"]
    names: Sequence[str] = [entry.name for entry in run.entries]
    told = [str(member) for member in events["member"].astype(object) if member in names]
    return told[0] if told else names[0]
