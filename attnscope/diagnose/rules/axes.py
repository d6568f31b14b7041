"""Rules of the axis that attention runs over: that of the batch, or one along which the keys are all the same."""

from attnscope.diagnose.blindness import answer, without_attention, without_config, without_steps
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.diagnose.rules.masks import evidence_of, layer_names, named
from attnscope.findings import Finding, NotLooked, Severity
from attnscope.runs.probe_events import InputsSeen, KeysRepeated, KeysSeen, TargetsSeen
from attnscope.runs.probed import Told, inputs_of, told
from attnscope.runs.reader import Run

# Share of the targets that are the next token, or the same, along the axis of the sequences. Along the other one it is that of
# tokens of other texts: below 0.3 in the texts and tasks of this lab.
FITS = 0.9
FEWEST_FITTING = 16  # targets

SQUARE = "there are as many sequences as tokens in them"
UNKNOWN_AXES = "nothing tells which axis is that of the batch"
NO_LAYER = "no self-attention was seen in the first steps"


def attention_over_batch(run: Run) -> Finding | NotLooked | None:
    """Attention runs along the axis of the batch.

    What it looks at: in watched runs, in the first steps: the first two axes of the token ids that are looked up, or of what
    modules are given, and which of the two self-attention runs over. Which is that of the batch is told by positions that are
    counted through, by a cross-entropy with one label for each sequence, and by targets that are the tokens along one axis (at
    least FITS of at least FEWEST_FITTING). It is an error where every self-attention layer runs over the sequences.
    Why it matters: a token attends to those of other examples at its place, and to none of its own sequence. The loss may
    fall by what is common to all, and what the model says of one example depends on those beside it.
    What to try: batch_first=True in nn.MultiheadAttention and nn.TransformerEncoderLayer, whose default takes (T, B, D); or
    transpose what they are given.
    Known limits: it is not looked for where a batch has as many sequences as tokens, or nothing tells which is which: with
    other losses and positions that are parameters. Models in which some layers attend over each axis mean it so.
    Source: the definition; nn.MultiheadAttention takes (T, B, D) unless batch_first is set.
    """
    names, seen, inputs = layer_names(run), told(run, KeysSeen), inputs_of(run)
    fits = [each for each in told(run, TargetsSeen) if _fits(each.what)]
    concerns, blind = [], {}
    for entry in run.entries if run.kind == "watch" else ():
        layers = [each for each in seen if each.member == entry.name and each.what.queries == each.what.keys]
        layers = [each for each in layers if each.what.batch is not None]
        what = inputs.get(entry.name)
        if not layers:
            blind[entry.name] = NO_LAYER
        elif all(each.what.batch == each.what.queries for each in layers):
            blind[entry.name] = SQUARE
        elif what is None:
            blind[entry.name] = UNKNOWN_AXES
        else:
            along = {each.what.positions for each in fits if each.member == entry.name}
            votes = [_vote(each.what, what, along) for each in layers]
            if all(vote is None for vote in votes):
                blind[entry.name] = UNKNOWN_AXES
            elif all(votes):
                concerns.append(_over_batch(layers, names))
    finding = finding_of(
        run,
        concerns,
        rule="attention_over_batch",
        title="Attention runs along the axis of the batch",
        kind="cause",
        several="have attention along the axis of the batch",
        remedy=(
            "Set batch_first=True in nn.MultiheadAttention and nn.TransformerEncoderLayer, whose default takes (T, B, D), or "
            "transpose what they are given."
        ),
        source="nn.MultiheadAttention takes (T, B, D) unless batch_first is set",
        explains=(
            "future_visible",
            "uniform_attention",
            "attention_sink",
            "rank_collapse",
            "loss_too_low",
            "plateau",
            "stalled",
        ),
    )
    return answer(run, "attention_over_batch", finding, blind | _without_attention(run))


def keys_repeated(run: Run) -> Finding | NotLooked | None:
    """The keys of all positions are the same, although the tokens differ.

    What it looks at: in watched runs, at steps 0, 5 and 19, the largest distance between the keys of a head, and between the
    tokens that the module was given: a head is found where its keys are the same to a millionth each time, and the tokens are
    not. Also keys that stand there several times in a row, or all of them again, where there are so many times more than
    queries and tokens. It is an error where all heads of a layer have one and the same key everywhere; else a warning.
    Why it matters: the same keys get the same logits from every query: attention is a mean over what is visible, whatever it
    learns. Keys that are repeated no longer stand where masks and positions take them to be.
    What to try: look at what is expanded or repeated before the product q·k, and over which axis: heads that share keys
    repeat the axis of heads, not that of positions.
    Known limits: it does not look in compiled graphs, nor where a module is given nothing of the length of the keys. Keys of
    zero are no keys that are repeated: a projection may begin there.
    Source: the definition of softmax.
    """
    names, found = layer_names(run), told(run, KeysRepeated)
    concerns = []
    for entry in run.entries:
        mine = [each for each in found if each.member == entry.name and each.what.heads]
        if not mine:
            continue
        dead = [each for each in mine if _is_dead(each)]
        worst = (dead or mine)[0]
        what, where = worst.what, named(names, worst.member, worst.what.layer)
        heads = f"all {what.of} heads" if what.heads >= what.of else f"{what.heads} of {what.of} heads"
        more = f" So it is in {len(mine) - 1} more {'layers' if len(mine) > 2 else 'layer'}." if len(mine) > 1 else ""
        said = (
            f"In {heads} of {where} the keys of all positions are the same, although its tokens differ: attention can only take "
            f"the mean of what it sees.{more}"
            if not what.times
            else f"In {heads} of {where} each key stands there {what.times} times, and there are {what.times} times as many keys "
            f"as tokens: they are repeated along the axis of positions.{more}"
        )
        severity: Severity = "error" if dead else "warning"
        concerns.append(
            Concern(
                member=entry.name,
                step=worst.step,
                badness=float(len(mine)),
                said=said,
                evidence=tuple(evidence_of(each, each.what.heads) for each in (dead or mine)),
                severity=severity,
            )
        )
    finding = finding_of(
        run,
        concerns,
        rule="keys_repeated",
        title="Keys of different positions are the same",
        kind="cause",
        several="have keys that are the same at different positions",
        remedy=(
            "Look at what is expanded or repeated before the product q·k, and over which axis: heads that share keys repeat the "
            "axis of heads, not that of positions."
        ),
        source="the softmax of equal logits is uniform",
        explains=("uniform_attention", "starved_queries_and_keys", "identical_heads", "plateau", "stalled"),
    )
    return answer(run, "keys_repeated", finding, _without_attention(run))


def _vote(layer: KeysSeen, what: InputsSeen, along: set[int]) -> bool | None:
    """Whether a layer attends over the sequences of the batch (True) or their tokens; None where nothing tells."""
    n, others = layer.queries, layer.batch or 0
    if n == others or min(n, others) < 2:
        return None
    pairs = [pair for pair in ((n, others), (others, n)) if pair in what.given or pair in what.inside]
    if not pairs:
        return None
    over_batch = what.labels == n or what.positions == others or others in along
    over_tokens = what.labels == others or what.positions == n or n in along
    if over_batch == over_tokens:
        return None
    # Rows of a picture are folded into the batch by models that attend along one axis of it at a time: that is a multiple.
    if over_batch and not any(pair in what.given for pair in pairs) and others % n == 0:
        return None
    return over_batch


def _fits(what: TargetsSeen) -> bool:
    """Whether the targets are the tokens along the axis that they were compared on."""
    return what.compared >= FEWEST_FITTING and max(what.equal_next or 0.0, what.equal_same or 0.0) >= FITS


def _over_batch(layers: list[Told[KeysSeen]], names: dict[tuple[str, int], str]) -> Concern:
    first = layers[0]
    where = named(names, first.member, first.what.layer)
    more = f", as all {len(layers)} self-attention layers do" if len(layers) > 1 else ""
    said = (
        f"The self-attention of {where} runs over {first.what.queries} sequences instead of their {first.what.batch} tokens{more}: "
        "a token attends to those at its place in the other examples of the batch."
    )
    return Concern(
        member=first.member,
        step=first.step,
        badness=float(len(layers)),
        said=said,
        evidence=tuple(evidence_of(each, each.what.queries, threshold=each.what.batch or 0) for each in layers),
        severity="error",
    )


def _is_dead(each: Told[KeysRepeated]) -> bool:
    return not each.what.times and each.what.heads >= each.what.of


def _without_attention(run: Run) -> dict[str, str]:
    """Members of a watched script whose attention was not seen; this lab attends over tokens."""
    return without_attention(run) if run.kind == "watch" else without_config(run) | without_steps(run)
