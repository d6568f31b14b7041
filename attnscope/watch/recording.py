"""What was seen of foreign steps goes to the disk, a block of steps at a time, with what went wrong in it."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from attnscope.capture.names import Modules
from attnscope.capture.seen import scale_of
from attnscope.runs.event_lines import as_plain
from attnscope.runs.events import (
    AttentionSeen,
    Diverged,
    Event,
    Nonfinite,
    NotRecorded,
    Place,
    TrackerFailed,
    What,
)
from attnscope.runs.found_live import FoundLive
from attnscope.runs.members import guessing_among
from attnscope.runs.part_writer import PartWriter
from attnscope.runs.probe_events import CrossEntropySeen
from attnscope.signals.alarms import Alarms, place_of
from attnscope.signals.conditions import Condition
from attnscope.signals.journal import Journal
from attnscope.signals.moments import Live
from attnscope.signals.nonfinite import Looked
from attnscope.watch.output import Targets
from attnscope.watch.passes import PassesTold
from attnscope.watch.step import FIRST, Step
from attnscope.watch.tables import Array, fill_in, heads_of, layers_of, params_of, seen_losses, steps_of

# Why a column or a table may be empty at the end of a watched run; `finish` is told of others.
WHY_EMPTY = {
    "loss": "no scalar was given to backward()",
    "val_loss": "which forward passes are an evaluation, and of what, only the script knows",
    "grad_norm": "no optimizer was seen to step with gradients",
    "lr": "no optimizer was seen to step",
    "tokens": "F.cross_entropy with class indices was not seen",
    "output_logit_max": "F.cross_entropy with class indices was not seen",
    "log_z": "F.cross_entropy with class indices was not seen",
    "table heads": "no attention was measured",
    "table params": "no optimizer was seen to step with gradients",
}

Tables = dict[str, dict[str, Array]]
# Called with steps and heads of each block that is on disk, and whether each loss was seen, as `loss_seen` among the steps;
# returns what went wrong, to be recorded.
OnBlock = Callable[[dict[str, Array], dict[str, Array]], str | None]
# Called with an event of a rule that found something; returns what went wrong, to be recorded.
OnFound = Callable[[Event], str | None]
# Called with what is measured or written, and a step: what fails inside the context is said, and goes no further.
Measuring = Callable[[str, int], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """An attention layer as it was first seen.

    Attributes:
        number: in the order of first calls; `layer` in the tables.
        name: path of its module.
        n_heads: query heads.
        d_head: size of a query; None where it was not seen.
        mask: in words.
        dtype: of the queries.
        backend: sdpa, eager, fast path.
        scale: what q kᵀ was multiplied by in the call; None where `fit` tells.
        factor: what q and k were multiplied by before; None where it could not be seen.
        fit: see `attnscope.capture.seen.Measured`.
    """

    number: int
    name: str
    n_heads: int
    d_head: int | None
    mask: str
    dtype: str
    backend: str
    scale: float | None
    factor: float | None
    fit: Tensor | None

    def described(self) -> AttentionSeen:
        """As an event; waits for the device where the scale was fitted."""
        scale = self.scale
        if self.fit is not None:
            scale = scale_of(tuple(self.fit.tolist()))
        applied = None if scale is None or self.factor is None else scale * self.factor
        return AttentionSeen(
            layer=self.number,
            name=self.name,
            n_heads=self.n_heads,
            d_head=self.d_head,
            scale=applied,
            scale_after=scale,
            mask=self.mask,
            dtype=self.dtype,
            backend=self.backend,
        )


class WatchRecorder:
    """The block that is not on disk yet.

    Invariant: a block has whole steps only.
    """

    def __init__(
        self,
        writer: PartWriter,
        modules: Modules,
        *,
        live: Live | None = None,
        on_block: OnBlock | None = None,
        on_found: OnFound = lambda _event: None,
    ) -> None:
        self._writer = writer
        self._modules = modules
        self._on_block = on_block
        self._on_found = on_found
        self._block: list[Step] = []
        self._since = time.perf_counter()
        self._layers: dict[int, str] = {}
        self._undescribed: list[tuple[int, Layer]] = []
        self._alarms = Alarms(self._place)
        self._journal = Journal(writer, self._alarms, live)
        self._tokens = 0
        self._targets = Targets(FIRST)
        self._passes = PassesTold(FIRST)
        self._filled: set[str] = set()
        self.broken: str | None = None
        self.losses_not_seen = 0

    @property
    def folder(self) -> Path:
        """Of the part."""
        return self._writer.path

    def add_layer(self, step: int, layer: Layer) -> None:
        """A layer was seen for the first time."""
        self._layers[layer.number] = layer.name
        self._undescribed.append((step, layer))

    def add(self, step: Step) -> None:
        """A step is over."""
        self._block.append(step)

    def due(self, seconds: float) -> bool:
        """Whether the block has waited this long."""
        return time.perf_counter() - self._since >= seconds

    def event(self, what: What, *, step: int) -> None:
        """Something happened once."""
        self._writer.event(Event(step=step, member=0, what=what))

    def flush(self, measuring: Measuring) -> Tables:
        """Write the block and forget it.

        Returns:
            Its tables, those empty of which nothing was seen or that failed; as `losses` those of the steps table that were
            seen: of the others it has NaN, too.
        """
        self._since = time.perf_counter()
        undescribed, self._undescribed = self._undescribed, []
        for step, layer in undescribed:
            with measuring(f"layer {layer.name}", step):
                self.event(layer.described(), step=step)
        block, self._block = self._block, []
        if not block:
            return {}
        self._look_at_targets(block, measuring)
        last = block[-1].number
        tables: Tables = {"steps": {}, "heads": {}, "layers": {}, "params": {}}
        with measuring("table layers", last):
            tables["layers"] = layers_of([(step.number, step.passed) for step in block if step.passed is not None])
        with measuring("table steps", last):
            tables["steps"] = steps_of([step for step in block if step.counts], self._tokens)
            fill_in(tables["steps"], tables["layers"])
            self._note_filled(tables["steps"], block)
        with measuring("table heads", last):
            tables["heads"] = heads_of([step for step in block if step.heads])
        with measuring("table params", last):
            tables["params"] = params_of([step for step in block if step.parameters])
        self._filled |= {f"table {name}" for name, columns in tables.items() if columns}
        seen = seen_losses(tables["steps"], block)
        more: list[Looked] = []
        with measuring("outputs of modules", last):
            more.append(self._outputs_in(block))
        with measuring("gradients", last):
            more.append(_gradients_in(block))
        events = self._journal.add(
            tables,
            looked_at={**tables, "steps": seen},
            more=more,
            trying=lambda what: measuring(what, last),
        )
        broken = [event for event in events if isinstance(event.what, Nonfinite | Diverged)]
        if broken and self.broken is None:
            self.broken = _in_words(broken[0])
        self._say_found(events, measuring)
        if self._on_block is not None:
            with measuring("tracker", last):
                is_seen = np.array([bool(step.losses) for step in block if step.counts])
                steps = tables["steps"] | {"loss_seen": is_seen} if tables["steps"] else {}
                failure = self._on_block(steps, tables["heads"])
                if failure is not None:
                    self.event(TrackerFailed(reason=failure), step=last)
        return {**tables, "losses": seen}

    def _say_found(self, events: Sequence[Event], measuring: Measuring) -> None:
        for event in events:
            if isinstance(event.what, FoundLive):
                with measuring("findings", event.step):
                    failure = self._on_found(event)
                    if failure is not None:
                        self.event(TrackerFailed(reason=failure), step=event.step)

    def met(self, conditions: Sequence[Condition], tables: Tables) -> tuple[Condition, str] | None:
        """The first condition that the block last flushed meets, and what met it; None if none does."""
        return self._journal.met(conditions, tables)

    def _look_at_targets(self, block: Sequence[Step], measuring: Measuring, *, is_end: bool = False) -> None:
        with measuring("targets", block[-1].number if block else 0):
            calls = [(step.number, step.output.first) for step in block if step.counts]
            for step, what in self._targets.add(calls, is_end=is_end):
                if isinstance(what, CrossEntropySeen):
                    self._alarms.guessing = guessing_among(what)
                self.event(what, step=step)
        with measuring("losses of an update", block[-1].number if block else 0):
            losses = [(step.number, step.passes.losses[step.first_counted :]) for step in block if step.updated]
            for step, passes in self._passes.add(losses, is_end=is_end):
                self.event(passes, step=step)

    def finish(
        self,
        status: str,
        measuring: Measuring,
        *,
        step: int,
        why_empty: Mapping[str, str],
        **fields: object,
    ) -> None:
        """Write what is left and say how it ended, and what stayed empty: WHY_EMPTY and `why_empty` have the reasons."""
        self.flush(measuring)
        self._look_at_targets([], measuring, is_end=True)
        self._journal.end([0])
        self._say_found(self._journal.last_found(trying=lambda what: measuring(what, step)), measuring)
        with measuring("event not_recorded", step):
            empty = {name: why for name, why in {**WHY_EMPTY, **why_empty}.items() if name not in self._filled}
            if empty:
                self.event(NotRecorded(why_empty=empty), step=step)
        plain = {name: as_plain(value) for name, value in fields.items()}
        self._writer.finish(status, **plain)

    def _note_filled(self, steps: dict[str, Array], block: Sequence[Step]) -> None:
        """Which columns have had a value; 1 for a factor that was not there is none, nor is NaN for a loss."""
        if not steps:
            return
        self._tokens = int(steps["tokens"][-1])
        self._filled |= {name for name, x in steps.items() if not np.isnan(x).all()}
        self._filled -= {"loss", "tokens"}
        self._filled |= {"loss"} if any(step.losses for step in block) else set()
        self._filled |= {"tokens"} if self._tokens else set()

    def _place(self, layer: int, group: str | None) -> Place:
        """An attention layer with its module, a parameter by the layer and group that its name tells."""
        return Place(layer=layer, path=self._layers.get(layer)) if group is None else place_of(layer, group)

    def _outputs_in(self, block: Sequence[Step]) -> Looked:
        """Whether outputs were finite, and which module's was the first that was not: the rest of its pass is broken, too."""
        where = []
        for step in block:
            broken = [] if step.outputs is None else step.outputs.broken()
            first = ("outside of modules" if module is None else self._modules.name_of(module) for module in broken[:1])
            where.append([Place(path=path) for path in first])
        return _looked("activation", block, where)


def _gradients_in(block: Sequence[Step]) -> Looked:
    return _looked("gradient", block, [broken_gradients(step) for step in block])


def _looked(tensor: str, block: Sequence[Step], where: Sequence[Sequence[Place]]) -> Looked:
    """One row for each place of a step at which a tensor is broken, and one for a step at which it is sound."""
    rows = [
        (step.number, place) for step, places in zip(block, where, strict=True) for place in (tuple(places) or (None,))
    ]
    return Looked(
        tensor=tensor,
        step_N=np.array([step for step, _ in rows]),
        member_N=np.zeros(len(rows), dtype=np.int64),
        where_N=np.array([place for _, place in rows], dtype=object),
        broken_N=np.array([place is not None for _, place in rows]),
    )


def _in_words(event: Event) -> str:
    said = f"{event.what.tensor} not finite" if isinstance(event.what, Nonfinite) else "loss diverged"
    return f"{said} at step {event.step}"


def broken_gradients(step: Step) -> list[Place]:
    """The parameters whose gradient is not finite; waits for the device."""
    found = []
    for parameters, norm_P in step.gradients:
        broken_P = (~norm_P.isfinite()).cpu().tolist()
        found += [
            replace(place_of(parameter.layer, parameter.group), path=parameter.path)
            for parameter, broken in zip(parameters, broken_P, strict=True)
            if broken
        ]
    return found
