"""What watching looks at once, in the first steps of watched code: a class for each kind of event, as in `runs.events`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropySeen:
    """`cross_entropy`: cross-entropy of class indices was computed for the first time in watched code.

    Attributes:
        classes: that the softmax runs over.
        loss: mean over the targets that count, nats, whatever the script makes of it.
        targets: that count; None in older runs.
    """

    classes: int
    loss: float
    targets: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTargets:
    """`first_targets`: what the targets of the first steps of watched code are like.

    Attributes:
        steps: that were looked at.
        same: how many of them have the targets of the first.
        irregular: whether targets like these are no two batches' by their layout.
        counted: share of them that count.
        entropy: of their frequencies, nats; None where there were too few to tell.
    """

    steps: int
    same: int
    irregular: bool = False
    counted: float = 0.0
    entropy: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysSeen:
    """`keys_seen`: which keys the queries of an attention layer of watched code see, in the first steps.

    Attributes:
        layer: its number in the tables.
        queries: T.
        keys: S.
        later: mean share of attention on keys after the query; None where T is not S.
        later_rows: share of query rows that see such a key.
        padded: mean share of attention of real queries on padding; None where none is known.
        inverted_rows: share of rows with a mask that see one token alone, while several are hidden from them.
        batch: B; None in older runs.
    """

    layer: int
    queries: int
    keys: int
    later: float | None
    later_rows: float | None
    padded: float | None
    inverted_rows: float | None
    batch: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsWithoutKeys:
    """`rows_without_keys`: an attention layer of watched code has query rows that see no key, for the first time."""

    layer: int
    rows: int
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetsSeen:
    """`targets`: how the targets of a cross-entropy of watched code stand to the tokens that the model was given.

    Attributes:
        positions: of a sequence; 0 = the targets fit none.
        compared: targets that count.
        equal_before: share of them that are the token one position before theirs.
        equal_same: the token at their position.
        equal_next: the next one.
        equal_after_next: the one after that.
        sequences: of tokens that the model was given; 0 = none was seen.
    """

    positions: int
    compared: int
    equal_before: float | None
    equal_same: float | None
    equal_next: float | None
    equal_after_next: float | None
    sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Upkeep:
    """`upkeep`: what an optimizer of watched code did besides its updates; of each number, the last one counts.

    Attributes:
        number: of the optimizer.
        optimizer: its class.
        updates: of it.
        steps_without_gradient: its steps after a loss, at which no parameter of it had a gradient.
        steps_zeroed: of those, the ones before which its gradients had been thrown away.
        compared: updates before whose backward passes gradients were looked at.
        gradients_kept: those at which none of these passes began with gradients of zero.
        parameters: that it has.
        detached: its parameters that modules compute with, and that never had a gradient.
        detached_names: of the first.
        unused: the others that never had one.
        unused_names: of the first.
        lr_zero: its parameters that had gradients, and a learning rate of 0 at every update.
        lr_zero_names: of the first.
        clipped: how often its gradients were clipped between a backward pass and its update, from its second update on.
        clipped_after: how often they were made smaller by clipping only after its update, among the first times.
    """

    number: int
    optimizer: str = ""
    updates: int
    steps_without_gradient: int
    steps_zeroed: int
    compared: int
    gradients_kept: int
    parameters: int
    detached: int
    detached_names: tuple[str, ...] = ()
    unused: int
    unused_names: tuple[str, ...] = ()
    lr_zero: int
    lr_zero_names: tuple[str, ...] = ()
    clipped: int = 0
    clipped_after: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WithoutOptimizer:
    """`without_optimizer`: parameters of watched code that had gradients, and that no optimizer has; the last one counts.

    Attributes:
        parameters: how many.
        names: of the first.
        left_out: how many are registered in a model that an optimizer has other parameters of.
        share_left_out: their share of that model's numbers.
        hidden: how many are those of modules in Python containers of such a model.
        containers: its attributes that are those.
    """

    parameters: int
    names: tuple[str, ...] = ()
    left_out: int
    share_left_out: float | None
    hidden: int
    containers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DropoutInEvaluation:
    """`dropout_in_evaluation`: a watched model computed a loss without gradients while it was in training mode.

    Attributes:
        model: its class.
        dropouts: modules of it that drop something.
        dropout: the largest share that one drops.
    """

    model: str = ""
    dropouts: int
    dropout: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationInTraining:
    """`evaluation_in_training`: a watched model was trained while all of it was in evaluation mode.

    Attributes:
        model: its class.
        losses_before: that were differentiated while it was in training mode.
        dropouts: modules of it that drop something.
        batch_norms: modules of it that take statistics of the batch in training mode.
    """

    model: str = ""
    losses_before: int
    dropouts: int
    batch_norms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedScaled:
    """`clipped_scaled`: gradients of watched code were clipped while they were still multiplied by the loss scale.

    Attributes:
        optimizer: its class.
        loss_scale: that they were multiplied by.
        threshold: of clipping.
        kept: what clipping multiplied them by.
    """

    optimizer: str = ""
    loss_scale: float
    threshold: float
    kept: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NormsOverOne:
    """`norms_over_one`: norms of watched code that normalize over a single number.

    Attributes:
        norms: modules with a norm that were seen in the first steps.
        over_one: of them, over a single number.
        sign_left: of those, how many leave the number its sign (RMSNorm); the others leave nothing of it.
        names: of the first.
    """

    norms: int
    over_one: int
    sign_left: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class InputsSeen:
    """`inputs_seen`: the axes of what a model of watched code was given, in one of the first steps.

    Attributes:
        given: the first two axes of token ids that were looked up, and of what the outermost module was given.
        inside: of what modules around an attention call were given.
        positions: that were looked up, counted through; 0 = none were, or different numbers of them.
        labels: targets of a cross-entropy, on one axis; 0 = none was seen, or several.
    """

    given: tuple[tuple[object, ...], ...] = ()
    inside: tuple[tuple[object, ...], ...] = ()
    positions: int
    labels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysRepeated:
    """`keys_repeated`: the keys of an attention layer of watched code are the same at all positions, although its input is not.

    Attributes:
        layer: its number in the tables.
        heads: that have such keys.
        of: heads.
        times: that each key stands there; 0 = all are the same.
        looks: at different steps, at each of which it was so.
    """

    layer: int
    heads: int
    of: int
    times: int
    looks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InputCarried:
    """`input_carried`: whether a block of watched code adds to the stream that it is given, in the first steps.

    Attributes:
        layer: number of the block, as in the layers table.
        attention: whether the output of its attention is added to the stream.
        mlp: whether what comes after attention is; None where nothing does.
    """

    layer: int
    attention: bool | None
    mlp: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionInOtherMode:
    """`attention_in_other_mode`: how a layer of watched code attends in evaluation, beside training at the same step.

    Attributes:
        layer: its number in the tables.
        queries: T in both, which is S, too.
        scale_ratio: the smaller of the two scales by the larger; None where one of them is not known.
        is_larger: whether evaluation's is the larger one.
        later_rows: share of query rows that see a later key, in evaluation.
        later_rows_trained: the same in training.
    """

    layer: int
    queries: int
    scale_ratio: float | None
    is_larger: bool
    later_rows: float | None
    later_rows_trained: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PassesSeen:
    """`passes`: how many losses watched code differentiates for an update, in the first steps.

    Attributes:
        steps: that were looked at.
        fewest: losses of one of these steps.
        most: of another.
        weight: what such a loss is by the mean cross-entropy that it was computed from, median; None where it is not told.
    """

    steps: int
    fewest: int
    most: int
    weight: float | None
