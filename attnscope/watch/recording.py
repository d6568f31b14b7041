"""What was seen of foreign steps goes to the disk, a block of steps at a time, with what went wrong in it."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from attnscope.capture.names import Modules
from attnscope.capture.seen import scale_of
from attnscope.runs.divergence import LossWatch
from attnscope.runs.writer import PartWriter
from attnscope.signals.alarms import FED
from attnscope.watch.step import Step
from attnscope.watch.tables import Array, heads_of, params_of, seen_losses, steps_of

MOST_PLACES = 20  # that an event names
MOST_DEEP = 4  # levels of lists and dictionaries in an event
MOST_TEXT = 500  # characters of what is no plain value in an event

# Why a column or a table may be empty at the end of a watched run.
WHY_EMPTY = {
    "loss": "no scalar was given to backward()",
    "val_loss": "which forward passes are an evaluation, only the script knows",
    "grad_norm": "no optimizer was seen to step with gradients",
    "lr": "no optimizer was seen to step",
    "tokens": "F.cross_entropy with class indices was not seen",
    "output_logit_max": "F.cross_entropy with class indices was not seen",
    "log_z": "F.cross_entropy with class indices was not seen",
    "activation_rms_max": "which activations are the residual stream, only the script knows",
    "token_cosine": "which activations are the residual stream, only the script knows",
    "table heads": "no attention was measured",
    "table layers": "which activations are the residual stream, only the script knows",
    "table params": "no optimizer was seen to step with gradients",
}

Tables = dict[str, dict[str, Array]]
# Called with steps and heads of each block that is on disk, and whether each loss was seen, as `loss_seen` among the steps;
# returns what went wrong, to be recorded.
OnBlock = Callable[[dict[str, Array], dict[str, Array]], str | None]
# Called with what is measured or written, and a step: what fails inside the context is said, and goes no further.
Measuring = Callable[[str, int], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """An attention layer as it was first seen.

    Attributes:
        number: in the order of first calls; `layer` in the tables.
        name: path of its module.
        n_heads: query heads.
        d_head: size of a query.
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
    d_head: int
    mask: str
    dtype: str
    backend: str
    scale: float | None
    factor: float | None
    fit: Tensor | None

    def described(self) -> dict[str, object]:
        """As the events file has it; waits for the device where the scale was fitted."""
        scale = self.scale
        if self.fit is not None:
            scale = scale_of(tuple(self.fit.tolist()))
        applied = None if scale is None or self.factor is None else scale * self.factor
        return {
            "layer": self.number,
            "name": self.name,
            "n_heads": self.n_heads,
            "d_head": self.d_head,
            "scale": applied,
            "mask": self.mask,
            "dtype": self.dtype,
            "backend": self.backend,
        }


class Recorder:
    """The block that is not on disk yet.

    Invariant: a block has whole steps only.
    """

    def __init__(
        self, writer: PartWriter, modules: Modules, on_block: OnBlock | None = None
    ) -> None:
        self._writer = writer
        self._modules = modules
        self._on_block = on_block
        self._block: list[Step] = []
        self._since = time.perf_counter()
        self._layers: dict[int, str] = {}
        self._undescribed: list[tuple[int, Layer]] = []
        self._watch = LossWatch()
        self._reported: set[str] = set()
        self._tokens = 0
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

    def event(self, kind: str, *, step: int, **fields: object) -> None:
        """Something happened once; what JSON does not know is written as text."""
        plain = {name: as_plain(value) for name, value in fields.items()}
        self._writer.event(kind, step=step, member=0, **plain)

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
                self.event("attention", step=step, **layer.described())
        block, self._block = self._block, []
        if not block:
            return {}
        last = block[-1].number
        tables: Tables = {"steps": {}, "heads": {}, "params": {}}
        with measuring("table steps", last):
            tables["steps"] = steps_of([step for step in block if step.counts], self._tokens)
            self._note_filled(tables["steps"], block)
        with measuring("table heads", last):
            tables["heads"] = heads_of([step for step in block if step.heads])
        with measuring("table params", last):
            tables["params"] = params_of([step for step in block if step.parameters])
        for table, columns in tables.items():
            if columns:  # what fails to be written fails for good
                with measuring(f"table {table}", last):
                    self._writer.append(table, columns)
                self._filled.add(f"table {table}")
        tables["losses"] = seen_losses(tables["steps"], block)
        with measuring("alarms", last):
            self._alarm(block, tables["steps"], tables["heads"], measuring)
        if self._on_block is not None:
            with measuring("tracker", last):
                seen = np.array([bool(step.losses) for step in block if step.counts])
                steps = tables["steps"] | {"loss_seen": seen} if tables["steps"] else {}
                failure = self._on_block(steps, tables["heads"])
                if failure is not None:
                    self.event("tracker_failed", step=last, reason=failure)
        return tables

    def finish(self, status: str, measuring: Measuring, *, step: int, **fields: object) -> None:
        """Write what is left and say how it ended, and what stayed empty."""
        self.flush(measuring)
        self._watch.end()
        for at, kind, said in self._divergence():
            self.event(kind, step=at, **said)
        with measuring("event not_recorded", step):
            empty = {name: why for name, why in WHY_EMPTY.items() if name not in self._filled}
            if empty:
                self.event("not_recorded", step=step, **empty)
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

    def _alarm(
        self,
        block: Sequence[Step],
        steps: dict[str, Array],
        heads: dict[str, Array],
        measuring: Measuring,
    ) -> None:
        """The events of a block, in the order of their steps; of one step in the order in which it computes the tensors."""
        found: list[tuple[int, str, dict[str, object]]] = []
        if "activation" not in self._reported:
            with measuring("outputs of modules", block[-1].number):
                found += self._first_of(block, "activation", self._broken_outputs)
        if heads:
            bad = ~np.isfinite(heads["max_logit_bound"]) & ~np.isfinite(heads["max_logit"])
            if bad.any():
                first = int(heads["step"][bad][0])
                layers = heads["layer"][bad & (heads["step"] == first)]
                where = [self._layers[int(layer)] for layer in dict.fromkeys(layers)]
                found += self._once(first, "attention logits", where)
        if steps:
            seen = seen_losses(steps, block)
            bad = ~np.isfinite(seen["loss"])
            if bad.any():
                found += self._once(int(seen["step"][bad][0]), "loss", [])
            self._watch.feed(*(seen[name] for name in FED))
        if "gradient" not in self._reported:
            with measuring("gradients", block[-1].number):
                found += self._first_of(block, "gradient", broken_gradients)
        found += self._divergence()
        for step, kind, fields in sorted(found, key=lambda each: each[0]):
            self.event(kind, step=step, **fields)
            if self.broken is None:
                said = "loss diverged" if kind == "diverged" else f"{fields['tensor']} not finite"
                self.broken = f"{said} at step {step}"

    def _divergence(self) -> list[tuple[int, str, dict[str, object]]]:
        if self._watch.diverged_at is None or "diverged" in self._reported:
            return []
        self._reported.add("diverged")
        return [(self._watch.diverged_at, "diverged", {"why": self._watch.why})]

    def _first_of(
        self, block: Sequence[Step], tensor: str, broken: Callable[[Step], list[str]]
    ) -> list[tuple[int, str, dict[str, object]]]:
        for step in block:
            where = broken(step)
            if where:
                return self._once(step.number, tensor, where)
        return []

    def _once(
        self, step: int, tensor: str, where: Sequence[str]
    ) -> list[tuple[int, str, dict[str, object]]]:
        if tensor in self._reported:
            return []
        self._reported.add(tensor)
        fields: dict[str, object] = {
            "tensor": tensor,
            "direction": "backward" if tensor == "gradient" else "forward",
        }
        if where:
            fields["where"] = list(dict.fromkeys(where))[:MOST_PLACES]
        return [(step, "nonfinite", fields)]

    def _broken_outputs(self, step: Step) -> list[str]:
        """Where it began: the rest of a forward pass is broken, too."""
        broken = [] if step.outputs is None else step.outputs.broken()
        return [
            "outside of modules" if module is None else self._modules.name_of(module)
            for module in broken[:1]
        ]


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


def broken_gradients(step: Step) -> list[str]:
    """The parameters whose gradient is not finite, as they are named in texts; waits for the device."""
    found = []
    for places, norm_P in step.gradients:
        broken_P = (~norm_P.isfinite()).cpu().tolist()
        for (layer, group), broken in zip(places, broken_P, strict=True):
            if broken:
                found.append(f"layer {layer} {group}" if layer >= 0 else group)
    return list(dict.fromkeys(found))
