"""What happened once in a run: a class for each kind of event, and where in a model it did.

The fields of a class are those of a line of an events file (`runs.event_lines`). What was read from one is anybody's: show
texts through `runs.foreign.printable`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from attnscope.runs.found_live import FoundLive
from attnscope.runs.probe_events import (
    AttentionInOtherMode,
    ClippedScaled,
    CrossEntropySeen,
    DropoutInEvaluation,
    EvaluationInTraining,
    FirstTargets,
    InputCarried,
    InputsSeen,
    KeysRepeated,
    KeysSeen,
    NormsOverOne,
    PassesSeen,
    RowsWithoutKeys,
    TargetsSeen,
    Upkeep,
    WithoutOptimizer,
)

INTERNAL = "internal"  # stands for the backend of a measurement that failed in attnscope's own code


_IN_WORDS = re.compile(r"layer (\d{1,4})(?: (.+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in a model something is; what is not known is None.

    Attributes:
        layer: as in the tables; None for what belongs to no layer.
        group: of the params table.
        path: of the module or parameter in watched code.
    """

    layer: int | None = None
    group: str | None = None
    path: str | None = None

    @property
    def words(self) -> str:
        """The place as people read it: "layer 2 q", "layer 0", "embedding" or "blocks.0.attn"."""
        if self.group is None and self.path is not None:
            return self.path
        if self.layer is None:
            return self.group or "outside of layers"
        return f"layer {self.layer}" if self.group is None else f"layer {self.layer} {self.group}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """`start`: somebody begins to write a segment of the part.

    Attributes:
        segment: its number.
        threads: the part is trained with.
        files: those of the segments before, as `runs.parts.files_as_json` lists them.
    """

    segment: int | None
    threads: int | None
    files: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nonfinite:
    """`nonfinite`: a tensor has NaN or Inf that was sound before.

    Attributes:
        tensor: of `signals.nonfinite.TENSORS`.
        direction: forward or backward.
        where: the first places; None = the tensor has none.
    """

    tensor: str
    direction: str = ""
    where: tuple[Place, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Diverged:
    """`diverged`: the loss left for good; `why` as `runs.divergence` says."""

    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """`dropped`: the member is lost, and the others go on without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """`evaluation`: the held-out loss after training, nats per token, at one sequence length."""

    seq_len: int
    val_loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """`generation`: what a trained member wrote after a held-out prompt.

    Attributes:
        prompt: what it went on with.
        text: what it wrote.
        loss_from_prefixes: its loss where it sees no token that it has to predict, nats per token.
    """

    prompt: str = ""
    text: str = ""
    loss_from_prefixes: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSeen:
    """`attention`: an attention layer of watched code was called for the first time.

    Attributes:
        layer: its number in the tables.
        name: path of its module.
        n_heads: query heads.
        d_head: size of a query; None where it was not seen.
        scale: what multiplied q.k; None where no single number does, or it could not be seen.
        scale_after: what of it multiplied the product, and not q or k before; None as for scale, and in older runs.
        mask: in words.
        dtype: of the queries.
        backend: sdpa, eager, ...
    """

    layer: int
    name: str = ""
    n_heads: int
    d_head: int | None
    scale: float | None
    scale_after: float | None = None
    mask: str = ""
    dtype: str = ""
    backend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmeasured:
    """`not_measured`: something in watched code was seen and could not be measured.

    Attributes:
        name: path of a module, or what it was in words.
        backend: of an attention call; INTERNAL where the measurement itself failed.
        shapes: of its tensors.
        reason: why, in words.
    """

    name: str = ""
    backend: str = ""
    shapes: tuple[tuple[object, ...], ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotRecorded:
    """`not_recorded`: columns and tables of a watched run that stayed empty, each with why; they are the fields of the line."""

    why_empty: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSeen:
    """`optimizer`: an optimizer of watched code stepped for the first time.

    Attributes:
        name: of its class.
        parameters: numbers it moves.
        devices: they are on.
        dtypes: they are of.
    """

    name: str
    parameters: int | None
    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksSeen:
    """`blocks`: a stack of numbered blocks of watched code was seen for the first time.

    Attributes:
        name: its path.
        model: class of the model.
        first_layer: `layer` in the layers table of its block 0.
        n_blocks: it has.
    """

    name: str
    model: str = ""
    first_layer: int
    n_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedUpdate:
    """`skipped_update`: loss scaling skipped an update of watched code; `where` the gradient was not finite."""

    why: str = ""
    where: tuple[Place, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWithoutGradient:
    """`step_without_gradient`: an optimizer of this class stepped, and no parameter of it had a gradient."""

    optimizer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LossNotSeen:
    """`loss_not_seen`: the first update of watched code whose loss is not known."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """`stopped`: training was stopped where somebody had asked for it.

    Attributes:
        on: the condition as it was typed.
        found: what met it.
    """

    on: str
    found: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotTaken:
    """`snapshot`: the last weights and batches were kept, in these files of the part."""

    why: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotFailed:
    """`snapshot_failed`: they could not be written."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerFailed:
    """`tracker_failed`: the tracker that records are also given to takes no more."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLeftOut:
    """`checkpoint_left_out`: a checkpoint newer than the one that training goes on from cannot be used."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Untyped:
    """A kind that this version does not know, or fields that make no sense of one that it does."""

    kind: str
    fields: Mapping[str, object] = field(default_factory=dict)


What = (
    Started
    | Nonfinite
    | Diverged
    | Dropped
    | Evaluated
    | Generated
    | AttentionSeen
    | Unmeasured
    | NotRecorded
    | OptimizerSeen
    | BlocksSeen
    | CrossEntropySeen
    | FirstTargets
    | SkippedUpdate
    | StepWithoutGradient
    | LossNotSeen
    | Stopped
    | SnapshotTaken
    | SnapshotFailed
    | TrackerFailed
    | CheckpointLeftOut
    | FoundLive
    | KeysSeen
    | RowsWithoutKeys
    | TargetsSeen
    | Upkeep
    | WithoutOptimizer
    | DropoutInEvaluation
    | EvaluationInTraining
    | ClippedScaled
    | NormsOverOne
    | InputsSeen
    | KeysRepeated
    | InputCarried
    | AttentionInOtherMode
    | PassesSeen
    | Untyped
)

EVENTS: Mapping[str, type[What]] = {
    "start": Started,
    "nonfinite": Nonfinite,
    "diverged": Diverged,
    "dropped": Dropped,
    "evaluation": Evaluated,
    "generation": Generated,
    "attention": AttentionSeen,
    "not_measured": Unmeasured,
    "not_recorded": NotRecorded,
    "optimizer": OptimizerSeen,
    "blocks": BlocksSeen,
    "cross_entropy": CrossEntropySeen,
    "first_targets": FirstTargets,
    "skipped_update": SkippedUpdate,
    "step_without_gradient": StepWithoutGradient,
    "loss_not_seen": LossNotSeen,
    "stopped": Stopped,
    "snapshot": SnapshotTaken,
    "snapshot_failed": SnapshotFailed,
    "tracker_failed": TrackerFailed,
    "checkpoint_left_out": CheckpointLeftOut,
    "finding": FoundLive,
    "keys_seen": KeysSeen,
    "rows_without_keys": RowsWithoutKeys,
    "targets": TargetsSeen,
    "upkeep": Upkeep,
    "without_optimizer": WithoutOptimizer,
    "dropout_in_evaluation": DropoutInEvaluation,
    "evaluation_in_training": EvaluationInTraining,
    "clipped_scaled": ClippedScaled,
    "norms_over_one": NormsOverOne,
    "inputs_seen": InputsSeen,
    "keys_repeated": KeysRepeated,
    "input_carried": InputCarried,
    "attention_in_other_mode": AttentionInOtherMode,
    "passes": PassesSeen,
}
_KINDS = {what: kind for kind, what in EVENTS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What happened once, and when.

    Attributes:
        step: updates done when it did.
        member: index within the part; None = it concerns all of them.
        what: happened.
        as_read: the fields of the line that it was read from, which may be more than `what` has; None where it was not.
    """

    step: int
    member: int | None = None
    what: What
    as_read: Mapping[str, object] | None = None

    @property
    def kind(self) -> str:
        """One word: nonfinite, diverged, ..."""
        return kind_of(self.what)


def kind_of(what: What) -> str:
    """The word that an events file has for it."""
    return what.kind if isinstance(what, Untyped) else _KINDS[type(what)]


def place_in_words(text: str) -> Place:
    """What `Place.words` says of a layer and a group; the path of a module, which looks no different, is taken for a group."""
    match = _IN_WORDS.fullmatch(text)
    return Place(group=text) if match is None else Place(layer=int(match[1]), group=match[2])
