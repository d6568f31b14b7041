"""From a block of foreign steps to the tables of a run directory; the host waits for the device only here.

Shape key: C column, H head, N calls, P parameter, R rows of a table, X all heads of a block's calls side by side.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnscope.metrics.totals import HEAD_COLUMNS, TOTALS, add, finish
from attnscope.runs.divergence import FED
from attnscope.runs.layout import COLUMNS as TABLES
from attnscope.watch.passed import Passed
from attnscope.watch.step import Step

PARAMETER_COLUMNS = ("grad_norm", "grad_max", "nonfinite", "weight_norm", "update_norm")

Array = NDArray[Any]


def steps_of(block: Sequence[Step], tokens_before: int) -> dict[str, Array]:
    """One row per step that had an update or a loss; NaN is the loss of a step whose loss was not seen."""
    n = len(block)
    if not n:
        return {}
    columns = {name: np.full(n, np.nan) for name in TABLES["steps"]}
    columns["step"] = np.array([step.number for step in block])
    columns["member"] = np.zeros(n, dtype=np.int64)
    columns["loss"] = _sums([step.counted_losses() for step in block])
    for name in ("grad_norm", "clip_factor", "loss_scale"):
        values = [getattr(step, name) for step in block]
        columns[name] = _sums([[] if value is None else [value] for value in values])
    tokens = np.nan_to_num(_sums([step.output.tokens for step in block]))
    columns["tokens"] = tokens_before + tokens.cumsum().astype(np.int64)
    with np.errstate(invalid="ignore"):
        log_z, looked_at = (_sums([getattr(step.output, name) for step in block]) for name in ("log_z", "looked_at"))  # fmt: skip
        columns["log_z"] = log_z / looked_at
    columns["output_logit_max"] = _sums([step.output.largest() for step in block])
    columns["lr"] = np.array([_largest(step.lrs) for step in block])
    columns["clip_factor"] = np.nan_to_num(columns["clip_factor"], nan=1.0)
    columns["loss_scale"] = np.nan_to_num(columns["loss_scale"], nan=1.0)
    columns["step_ms"] = np.array([step.step_ms for step in block])
    return columns


def _largest(lrs: Sequence[float | Tensor]) -> float:
    tensors = [lr for lr in lrs if isinstance(lr, Tensor)]
    numbers = [float(lr) for lr in lrs if not isinstance(lr, Tensor)]
    return max(numbers + _on_host(tensors), default=math.nan)


def seen_losses(steps: dict[str, Array], block: Sequence[Step]) -> dict[str, Array]:
    """What tells whether training diverges, of the rows whose loss was seen."""
    if not steps:
        return {}
    seen = np.array([bool(step.losses) for step in block if step.counts])
    return {name: steps[name][seen] for name in ("member", *FED)}


def heads_of(block: Sequence[Step]) -> dict[str, Array]:
    """One row per step, layer and head: several calls of a layer in one step are one row, as if they had been one call."""
    seen = [(step, layer, each) for step in block for layer, each in sorted(step.heads.items()) if each]  # fmt: skip
    if not seen:
        return {}
    sizes = [each[0].shape[1] for _, _, each in seen]
    device = seen[0][2][0].device
    # The n-th calls of all steps and layers at once: rows stand side by side along X.
    together = _side_by_side([each[0] for _, _, each in seen], device)
    start = np.cumsum([0, *sizes])
    for n in range(1, max(len(each) for _, _, each in seen)):
        has_more = [at for at, (_, _, each) in enumerate(seen) if len(each) > n]
        at_X = torch.cat([torch.arange(start[at], start[at + 1]) for at in has_more])
        more = _side_by_side([seen[at][2][n] for at in has_more], device)
        summed = add({name: x[at_X] for name, x in together.items()}, more)
        for name, x in together.items():
            x[at_X] = summed[name]
    found = {name: x.numpy() for name, x in finish(together).items()}
    keys = {
        "step": np.repeat([step.number for step, _, _ in seen], sizes),
        "member": np.zeros(start[-1], dtype=np.int64),
        "layer": np.repeat([layer for _, layer, _ in seen], sizes),
        "head": np.concatenate([np.arange(size) for size in sizes]),
    }
    keys["attn_form_update_ratio"] = _forms_of([step.forms.get(layer) for step, layer, _ in seen], sizes)
    return keys | {name: found[name] for name in HEAD_COLUMNS}


def _forms_of(forms: Sequence[Tensor | None], sizes: Sequence[int]) -> Array:
    """One after the other, as many heads as `sizes` says, NaN where nothing was measured; in one copy."""
    known = [form for form in forms if form is not None]
    if not known:
        return np.full(sum(sizes), np.nan)
    on_host = torch.cat([form.to(known[0].device) for form in known]).cpu().numpy()
    pieces = iter(np.split(on_host, np.cumsum([len(form) for form in known])[:-1]))
    return np.concatenate(
        [np.full(n, np.nan) if form is None else next(pieces) for form, n in zip(forms, sizes, strict=True)]
    )


def _side_by_side(calls: Sequence[Tensor], device: torch.device) -> dict[str, Tensor]:
    """TOTALS to (X,) float64 on the host, from one (C, H) per call."""
    joined_CX = torch.cat([call.to(device) for call in calls], dim=1).cpu().double()
    return dict(zip(TOTALS, joined_CX, strict=True))


def layers_of(block: Sequence[tuple[int, Passed]]) -> dict[str, Array]:
    """One row per step and layer, of steps by their numbers: several calls of a layer are as one with all their sequences.

    Calls in evaluation count only where there are no others.
    """
    if not block:
        return {}
    device = block[0][1].values_NC.device
    values_NC = torch.cat([passed.values_NC.to(device) for _, passed in block]).cpu().double().numpy()
    step_N = np.repeat([step for step, _ in block], [len(passed.layers) for _, passed in block])
    layer_N, trains_N, size_N, compared_N = (
        np.array([x for _, passed in block for x in getattr(passed, name)])
        for name in ("layers", "trains", "sizes", "n_compared")
    )
    keys_R2, row_N = np.unique(np.stack([step_N, layer_N], axis=1), axis=0, return_inverse=True)
    n_rows = len(keys_R2)
    trains_R = np.bincount(row_N, weights=trains_N, minlength=n_rows) > 0
    counts_N = trains_N | ~trains_R[row_N]
    size_N, compared_N = size_N * counts_N, compared_N * counts_N
    rms_N, cosine_N = (
        np.where(of_N > 0, x_N, 0.0) for of_N, x_N in zip((size_N, compared_N), values_NC.T, strict=True)
    )
    with np.errstate(all="ignore"):
        square_R, size_R, cosine_R, compared_R = (
            np.bincount(row_N, weights=x_N, minlength=n_rows)
            for x_N in (size_N * rms_N**2, size_N, compared_N * cosine_N, compared_N)
        )
        return {
            "step": keys_R2[:, 0],
            "member": np.zeros(n_rows, dtype=np.int64),
            "layer": keys_R2[:, 1],
            "activation_rms": np.sqrt(square_R / size_R),
            "token_cosine": cosine_R / compared_R,
        }


def fill_in(steps: dict[str, Array], layers: dict[str, Array]) -> None:
    """The columns of the steps table that come from the layers table: NaN at steps without a row there."""
    if not steps or not layers:
        return
    step_R = layers["step"]
    first_S = np.flatnonzero(np.r_[True, step_R[1:] != step_R[:-1]])
    last_S = np.r_[first_S[1:], len(step_R)] - 1
    _, at, from_S = np.intersect1d(steps["step"], step_R[first_S], return_indices=True)
    steps["activation_rms_max"][at] = np.maximum.reduceat(layers["activation_rms"], first_S)[from_S]
    steps["token_cosine"][at] = layers["token_cosine"][last_S[from_S]]


def params_of(block: Sequence[Step]) -> dict[str, Array]:
    """One row per step, layer and group."""
    if not block:
        return {}
    rows: dict[str, list[Array]] = {name: [] for name in TABLES["params"]}
    for step in block:
        names = list(dict.fromkeys(step.parameters))
        place = np.array([names.index(each) for each in step.parameters])
        found = {
            name: np.concatenate([x.cpu().double().numpy() for x in step.sizes[name]]) for name in PARAMETER_COLUMNS
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
        sizes["nonfinite"] = np.bincount(place, weights=found["nonfinite"], minlength=len(names)).astype(np.int64)
        rows["step"].append(np.full(len(names), step.number))
        rows["member"].append(np.zeros(len(names), dtype=np.int64))
        rows["layer"].append(np.array([layer for layer, _ in names]))
        rows["group"].append(np.array([group for _, group in names], dtype=object))
        for name, values in sizes.items():
            rows[name].append(values)
    return {name: np.concatenate(each) for name, each in rows.items()}


def _sums(values: Sequence[Sequence[Tensor]]) -> Array:
    """Of each group of scalars the sum, NaN where there is none; in one copy per device."""
    found = iter(_on_host([value for group in values for value in group]))
    return np.array([sum(next(found) for _ in group) if group else math.nan for group in values])


def _on_host(values: Sequence[Tensor]) -> list[float]:
    """Scalars, in one copy per device."""
    if not values:
        return []
    device = values[0].device
    stacked = torch.stack([value.detach().float().reshape(()).to(device) for value in values])
    return list(map(float, stacked.cpu().tolist()))
