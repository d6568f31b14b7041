"""From what was seen of foreign steps to rows on disk, a block of steps at a time; the host waits for the device only here.

Shape key: C column, H head, P parameter.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnscope.runs.divergence import LossWatch
from attnscope.runs.layout import COLUMNS as TABLES
from attnscope.runs.writer import PartWriter
from attnscope.signals.alarms import FED
from attnscope.watch.attention import COLUMNS as HEAD_COLUMNS
from attnscope.watch.attention import scale_of
from attnscope.watch.finite import Outputs
from attnscope.watch.names import Modules

PARAMETER_COLUMNS = ("grad_norm", "grad_max", "nonfinite", "weight_norm", "update_norm")
LOSS_SHARE = (
    1e-3  # how near a loss's last factor must be to 1 / micro-batches to count as a mean over them
)

MOST_PLACES = 20  # that an event names

Array = NDArray[Any]
Tables = dict[str, dict[str, Array]]
# Called with steps and heads of each block that is on disk; returns what went wrong, to be recorded.
OnBlock = Callable[[dict[str, Array], dict[str, Array]], str | None]


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
        fit: see `attnscope.watch.attention.Measured`.
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


@dataclass(slots=True, kw_only=True)
class Step:
    """What was seen of one step.

    Attributes:
        number: optimizer updates done before it.
        measured: whether attention and parameters were looked at.
        losses: given to backward, with the number each was last multiplied by.
        heads: layer to what was measured of its calls in training, else in evaluation, (C, H) each.
        training: layers with calls in training.
        parameters: (layer, group) along P.
        sizes: PARAMETER_COLUMNS, (P,) each.
        gradients: (layer, group) and norm before clipping of what has a gradient, (P,) each; at every step.
        outputs: sums over the outputs of modules.
        lrs: of all parameter groups that were updated.
    """

    number: int
    measured: bool
    losses: list[tuple[Tensor, float | None]] = field(default_factory=list)
    heads: dict[int, list[Tensor]] = field(default_factory=dict)
    training: set[int] = field(default_factory=set)
    parameters: list[tuple[int, str]] = field(default_factory=list)
    sizes: dict[str, list[Tensor]] = field(default_factory=dict)
    gradients: list[tuple[list[tuple[int, str]], Tensor]] = field(default_factory=list)
    outputs: Outputs | None = None
    grad_norm: Tensor | None = None
    clip_factor: Tensor | None = None
    lrs: list[float | Tensor] = field(default_factory=list)
    loss_scale: Tensor | None = None
    step_ms: float = 0.0


class Means:
    """Loss of a step from those of its micro-batches, which scripts divide by how many there are, or do not."""

    def __init__(self) -> None:
        self._divided_by = 0  # micro-batches of the last step that had all it divides by

    def of(self, losses: Sequence[tuple[float, float | None]]) -> float:
        """The mean over micro-batches, from each one's loss and the number it was last multiplied by."""
        n, total = len(losses), sum(loss for loss, _ in losses)
        factors = [factor for _, factor in losses]
        if n > 1 and _are(factors, 1 / n):
            self._divided_by = n
            return total
        # The last update of an epoch may have fewer of them than its losses are divided by.
        if n < self._divided_by and _are(factors, 1 / self._divided_by):
            return total * self._divided_by / n
        return total / n if n else math.nan


def _are(factors: Sequence[float | None], share: float) -> bool:
    return all(factor is not None and abs(factor / share - 1) < LOSS_SHARE for factor in factors)


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
        self._means = Means()
        self._reported: set[str] = set()
        self.broken: str | None = None

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
        """Something happened once."""
        self._writer.event(kind, step=step, member=0, **fields)

    def flush(self) -> Tables:
        """Write the block and forget it; its tables, empty where there was none.

        Raises:
            RunWriteError: the disk did not take it.
        """
        self._since = time.perf_counter()
        for step, layer in self._undescribed:
            self.event("attention", step=step, **layer.described())
        self._undescribed.clear()
        block, self._block = self._block, []
        if not block:
            return {}
        steps = _steps([step for step in block if step.losses], self._means)
        heads = _heads([step for step in block if step.heads])
        params = _params([step for step in block if step.parameters])
        tables = {"steps": steps, "heads": heads, "params": params}
        for table, columns in tables.items():
            if columns:
                self._writer.append(table, columns)
        self._alarm(block, steps, heads)
        failure = None if self._on_block is None else self._on_block(steps, heads)
        if failure is not None:
            self.event("tracker_failed", step=block[-1].number, reason=failure)
        return tables

    def finish(self, status: str, **fields: object) -> None:
        """Write what is left and say how it ended."""
        self.flush()
        self._watch.end()
        for step, kind, said in self._divergence():
            self.event(kind, step=step, **said)
        self._writer.finish(status, **fields)

    def _alarm(
        self, block: Sequence[Step], steps: dict[str, Array], heads: dict[str, Array]
    ) -> None:
        """The events of a block, in the order of their steps; of one step in the order in which it computes the tensors."""
        found: list[tuple[int, str, dict[str, object]]] = []
        if "activation" not in self._reported:
            found += self._first_of(block, "activation", self._broken_outputs)
        if heads:
            bad = ~np.isfinite(heads["max_logit_bound"]) & ~np.isfinite(heads["max_logit"])
            if bad.any():
                first = int(heads["step"][bad][0])
                layers = heads["layer"][bad & (heads["step"] == first)]
                where = [self._layers[int(layer)] for layer in dict.fromkeys(layers)]
                found += self._once(first, "attention logits", where)
        if steps:
            bad = ~np.isfinite(steps["loss"])
            if bad.any():
                found += self._once(int(steps["step"][bad][0]), "loss", [])
            self._watch.feed(*(steps[name] for name in FED))
        if "gradient" not in self._reported:
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


def broken_gradients(step: Step) -> list[str]:
    """The parameters whose gradient is not finite, as they are named in texts; waits for the device."""
    found = []
    for places, norm_P in step.gradients:
        broken_P = (~norm_P.isfinite()).cpu().tolist()
        for (layer, group), broken in zip(places, broken_P, strict=True):
            if broken:
                found.append(f"layer {layer} {group}" if layer >= 0 else group)
    return list(dict.fromkeys(found))


def _steps(block: Sequence[Step], means: Means) -> dict[str, Array]:
    """One row per step whose loss was seen."""
    n = len(block)
    if not n:
        return {}
    columns = {name: np.full(n, np.nan) for name in TABLES["steps"]}
    columns["step"] = np.array([step.number for step in block])
    columns["member"] = np.zeros(n, dtype=np.int64)
    columns["tokens"] = np.zeros(n, dtype=np.int64)  # what a token is, only the script knows
    losses = iter(_on_host([loss for step in block for loss, _ in step.losses]))
    columns["loss"] = np.array(
        [means.of([(next(losses), factor) for _, factor in step.losses]) for step in block]
    )
    for name in ("grad_norm", "clip_factor", "loss_scale"):
        values = [getattr(step, name) for step in block]
        found = iter(_on_host([value for value in values if value is not None]))
        columns[name] = np.array([math.nan if value is None else next(found) for value in values])
    columns["lr"] = np.array([_largest(step.lrs) for step in block])
    columns["clip_factor"] = np.nan_to_num(columns["clip_factor"], nan=1.0)
    columns["loss_scale"] = np.nan_to_num(columns["loss_scale"], nan=1.0)
    columns["step_ms"] = np.array([step.step_ms for step in block])
    return columns


def _largest(lrs: Sequence[float | Tensor]) -> float:
    tensors = [lr for lr in lrs if isinstance(lr, Tensor)]
    numbers = [float(lr) for lr in lrs if not isinstance(lr, Tensor)]
    return max(numbers + _on_host(tensors), default=math.nan)


def _heads(block: Sequence[Step]) -> dict[str, Array]:
    """One row per step, layer and head; several calls of a layer in one step are one row."""
    seen = [(step, layer, each) for step in block for layer, each in sorted(step.heads.items())]
    calls = [call for _, _, each in seen for call in each]
    if not calls:
        return {}
    sizes = [call.shape[1] for call in calls]
    device = calls[0].device
    joined = torch.cat([call.to(device) for call in calls], dim=1).cpu().numpy()
    pieces = iter(np.split(joined, np.cumsum(sizes)[:-1], axis=1))
    rows: dict[str, list[Array]] = {name: [] for name in TABLES["heads"]}
    for step, layer, each in seen:
        found = _together([dict(zip(HEAD_COLUMNS, next(pieces), strict=True)) for _ in each])
        n_heads = len(found["rows"])
        rows["step"].append(np.full(n_heads, step.number))
        rows["member"].append(np.zeros(n_heads, dtype=np.int64))
        rows["layer"].append(np.full(n_heads, layer))
        rows["head"].append(np.arange(n_heads))
        for name in HEAD_COLUMNS:
            rows[name].append(found[name])
    return {name: np.concatenate(each) for name, each in rows.items()}


def _together(calls: list[dict[str, Array]]) -> dict[str, Array]:
    """The statistics of several calls as if their rows had been in one; calls with other numbers of heads are left out."""
    calls = [call for call in calls if len(call["rows"]) == len(calls[0]["rows"])]
    if len(calls) == 1:
        return calls[0]
    stacked = {name: np.stack([call[name] for call in calls]) for name in HEAD_COLUMNS}
    share = stacked["rows"] / np.maximum(stacked["rows"].sum(axis=0), 1)
    found = {}
    for name, values in stacked.items():
        if name in ("rows", "rows_left_out"):
            found[name] = values.sum(axis=0)
        elif name in ("max_logit", "max_logit_bound"):
            found[name] = np.where(np.isnan(values).all(axis=0), np.nan, np.fmax.reduce(values))
        elif name == "logit_std":
            found[name] = np.sqrt((share * values**2).sum(axis=0))
        else:
            found[name] = (share * values).sum(axis=0)
    return found


def _params(block: Sequence[Step]) -> dict[str, Array]:
    """One row per step, layer and group."""
    if not block:
        return {}
    rows: dict[str, list[Array]] = {name: [] for name in TABLES["params"]}
    for step in block:
        names = list(dict.fromkeys(step.parameters))
        place = np.array([names.index(each) for each in step.parameters])
        found = {
            name: np.concatenate([x.cpu().double().numpy() for x in step.sizes[name]])
            for name in PARAMETER_COLUMNS
        }
        with np.errstate(all="ignore"):
            sizes = {
                name: np.sqrt(np.bincount(place, weights=found[name] ** 2, minlength=len(names)))
                for name in ("grad_norm", "weight_norm", "update_norm")
            }
            sizes["update_ratio"] = sizes["update_norm"] / sizes["weight_norm"]
        largest = np.full(len(names), -np.inf)
        with np.errstate(invalid="ignore"):
            np.maximum.at(largest, place, found["grad_max"])
        sizes["grad_max"] = largest
        sizes["nonfinite"] = np.bincount(
            place, weights=found["nonfinite"], minlength=len(names)
        ).astype(np.int64)
        rows["step"].append(np.full(len(names), step.number))
        rows["member"].append(np.zeros(len(names), dtype=np.int64))
        rows["layer"].append(np.array([layer for layer, _ in names]))
        rows["group"].append(np.array([group for _, group in names], dtype=object))
        for name, values in sizes.items():
            rows[name].append(values)
    return {name: np.concatenate(each) for name, each in rows.items()}


def _on_host(values: Sequence[Tensor]) -> list[float]:
    """Scalars, in one copy per device."""
    if not values:
        return []
    device = values[0].device
    stacked = torch.stack([value.detach().float().reshape(()).to(device) for value in values])
    return list(map(float, stacked.cpu().tolist()))
