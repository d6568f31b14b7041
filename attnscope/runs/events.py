"""What happened once in a run: a line of an events file, as it is written and as it is read.

Each kind is a class of EVENTS, and its fields are those of the line. What is read may be of an older or a newer version, or
anybody's: a field that is missing or of a wrong type is its default, or None where it may be. Where it has neither, and where
the kind is not known, the event is `Untyped`. Texts are as they were written: show them through `runs.foreign.printable`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, cast

import numpy as np

from attnscope.runs.foreign import number_in, printable
from attnscope.runs.layout import MAX_INDEX, with_special
from attnscope.runs.manifest import is_whole

PLACES = "places"  # the field that says of what stands in `where` in words which layers, groups and paths they are
INTERNAL = "internal"  # stands for the backend of a measurement that failed in attnscope's own code

MOST_DEEP = 4  # levels of lists and dictionaries in a field
MOST_TEXT = 500  # characters of what is no plain value in a field
MOST_WHOLE = 2**53  # beyond, a float is no exact whole number

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
        mask: in words.
        dtype: of the queries.
        backend: sdpa, eager, ...
    """

    layer: int
    name: str = ""
    n_heads: int
    d_head: int | None
    scale: float | None
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
    """

    name: str
    parameters: int | None
    devices: tuple[str, ...] = ()


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
    """`stopped`: the watched script was stopped.

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
    | SkippedUpdate
    | StepWithoutGradient
    | LossNotSeen
    | Stopped
    | SnapshotTaken
    | SnapshotFailed
    | TrackerFailed
    | CheckpointLeftOut
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
    "skipped_update": SkippedUpdate,
    "step_without_gradient": StepWithoutGradient,
    "loss_not_seen": LossNotSeen,
    "stopped": Stopped,
    "snapshot": SnapshotTaken,
    "snapshot_failed": SnapshotFailed,
    "tracker_failed": TrackerFailed,
    "checkpoint_left_out": CheckpointLeftOut,
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

    @property
    def fields(self) -> Mapping[str, object]:
        """What the kind has to tell, as JSON understands it."""
        return fields_of(self.what) if self.as_read is None else self.as_read


def kind_of(what: What) -> str:
    """The word that an events file has for it."""
    return what.kind if isinstance(what, Untyped) else _KINDS[type(what)]


def event_as_json(event: Event) -> dict[str, object]:
    """The line of an event, for `layout.to_json`."""
    return {"kind": event.kind, "step": event.step, "member": event.member, "fields": event.fields}


def event_in_json(line: object) -> Event | None:
    """The event of a line that JSON was read from; None where it is none. Never an error, whatever it is."""
    if not isinstance(line, dict):
        return None
    kind, step, member, written = (line.get(key) for key in ("kind", "step", "member", "fields"))
    if (
        not isinstance(kind, str)
        or not is_whole(step, 0, 2**31 - 1)
        or not (member is None or is_whole(member, 0, MAX_INDEX))
        or not isinstance(written, dict)
    ):
        return None
    as_read = {key: with_special(value) for key, value in written.items()}
    return Event(step=step, member=member, what=_what_in(printable(kind, 40), as_read), as_read=as_read)


def fields_of(what: What) -> dict[str, object]:
    """The fields of a line, as JSON understands them; an optional one that is None is left out."""
    if isinstance(what, Untyped | NotRecorded):
        plain = as_plain(what.fields if isinstance(what, Untyped) else what.why_empty)
        return cast("dict[str, object]", plain)
    found: dict[str, object] = {}
    for each in fields(what):
        value = getattr(what, each.name)
        if value is None and each.default is None:
            continue
        if each.type in (tuple[Place, ...], tuple[Place, ...] | None):
            found[each.name] = [place.words for place in value]
            found[PLACES] = [_place_as_json(place) for place in value]
        else:
            found[each.name] = as_plain(value)
    return found


def as_plain(value: object, deep: int = MOST_DEEP) -> object:
    """What JSON understands; anything else, a symbolic size among them, as text."""
    if value is None or isinstance(value, bool | int | float | str | np.ndarray | np.generic):
        return value
    if deep and isinstance(value, Mapping):
        return {str(key): as_plain(each, deep - 1) for key, each in value.items()}
    if deep and isinstance(value, list | tuple | set | frozenset):
        return [as_plain(each, deep - 1) for each in value]
    try:
        return str(value)[:MOST_TEXT]
    except Exception:
        return type(value).__name__


def place_in_words(text: str) -> Place:
    """What `Place.words` says of a layer and a group; the path of a module, which looks no different, is taken for a group."""
    match = _IN_WORDS.fullmatch(text)
    return Place(group=text) if match is None else Place(layer=int(match[1]), group=match[2])


def _what_in(kind: str, as_read: Mapping[str, object]) -> What:
    what = EVENTS.get(kind)
    if what is NotRecorded:
        return NotRecorded(why_empty={key: why for key, why in as_read.items() if isinstance(why, str)})
    values: dict[str, Any] = {}
    for each in () if what is None else fields(what):
        value = _READERS[each.type](as_read, each.name)
        if value is not None or each.type in _OPTIONAL:
            values[each.name] = value
        elif each.default is MISSING and each.default_factory is MISSING:
            what = None
            break
    return Untyped(kind=kind, fields=as_read) if what is None else what(**values)


def _text(as_read: Mapping[str, object], name: str) -> str | None:
    value = as_read.get(name)
    return value if isinstance(value, str) else None


def _texts(as_read: Mapping[str, object], name: str) -> tuple[str, ...] | None:
    value = as_read.get(name)
    return tuple(value) if isinstance(value, list) and all(isinstance(each, str) for each in value) else None


def _whole(as_read: Mapping[str, object], name: str) -> int | None:
    value = as_read.get(name)
    return value if is_whole(value, -MOST_WHOLE, MOST_WHOLE) else None


def _number(as_read: Mapping[str, object], name: str) -> float | None:
    return number_in(as_read.get(name))


def _table(as_read: Mapping[str, object], name: str) -> Mapping[str, object] | None:
    value = as_read.get(name)
    return value if isinstance(value, dict) else None


def _shapes(as_read: Mapping[str, object], name: str) -> tuple[tuple[object, ...], ...] | None:
    value = as_read.get(name)
    return tuple(tuple(each) for each in value if isinstance(each, list)) if isinstance(value, list) else None


def _places(as_read: Mapping[str, object], name: str) -> tuple[Place, ...] | None:
    """Older runs have places in words alone."""
    texts, tables = _texts(as_read, name), as_read.get(PLACES)
    if texts is None:
        return None
    known = [_place_in_json(each) for each in tables] if isinstance(tables, list) else []
    if len(known) != len(texts):
        known = [None] * len(texts)
    return tuple(place or place_in_words(text) for place, text in zip(known, texts, strict=True))


def _place_as_json(place: Place) -> dict[str, object]:
    found = {"layer": place.layer, "group": place.group, "path": place.path}
    return {name: value for name, value in found.items() if value is not None}


def _place_in_json(table: object) -> Place | None:
    if not isinstance(table, dict):
        return None
    layer, group, path = table.get("layer"), _text(table, "group"), _text(table, "path")
    place = Place(layer=layer if is_whole(layer, 0, MAX_INDEX) else None, group=group, path=path)
    return None if place == Place() else place


# How a field of each type is read: from the fields of a line and its name to a value, None where there is none of the type.
_READERS: Mapping[object, Callable[[Mapping[str, object], str], object]] = {
    str: _text,
    int: _whole,
    int | None: _whole,
    float: _number,
    float | None: _number,
    tuple[str, ...]: _texts,
    tuple[tuple[object, ...], ...]: _shapes,
    tuple[Place, ...]: _places,
    tuple[Place, ...] | None: _places,
    Mapping[str, object]: _table,
}
_OPTIONAL = (int | None, float | None, tuple[Place, ...] | None)
