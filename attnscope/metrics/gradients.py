"""Norms of gradients, weights and updates per parameter group.

A group is what one row of the params table speaks of: a kind of parameter (q, k, v, o, mlp_in, mlp_out, norm, scale) in
one layer, or the embedding or head, which belong to no layer (layer -1).

Shape key: M member, L layer, G group, ... the axes of one parameter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# In the order of the table on disk.
PARAMETER_STATISTICS = (
    "grad_norm",
    "weight_norm",
    "update_norm",
    "update_ratio",
    "grad_max",
    "nonfinite",
)
# How parameters of one group come together.
COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad_norm": torch.hypot,
    "weight_norm": torch.hypot,
    "update_norm": torch.hypot,
    "grad_max": torch.maximum,
    "nonfinite": torch.add,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """Which group each parameter belongs to.

    Attributes:
        group_of: parameter name to group name, for every parameter, in the order of the tensors.
        layered: parameters shaped (M, L, ...); the others are (M, ...).
        rows: (layer, group name) of every group, in the order of the axis G.
    """

    group_of: Mapping[str, str]
    layered: frozenset[str]
    rows: tuple[tuple[int, str], ...]


def group_parameters(
    group_of: Mapping[str, str], *, layered: frozenset[str], n_layers: int
) -> Grouping:
    """Lay out the axis G: the groups without a layer first, then every layer of each kind."""
    alone = dict.fromkeys(group for name, group in group_of.items() if name not in layered)
    kinds = dict.fromkeys(group for name, group in group_of.items() if name in layered)
    rows = [(-1, group) for group in alone]
    rows += [(layer, kind) for kind in kinds for layer in range(n_layers)]
    return Grouping(group_of=group_of, layered=layered, rows=tuple(rows))


def group_norms(tensors: Mapping[str, Tensor], grouping: Grouping) -> Tensor:
    """L2 norm of every group, (M, G)."""
    norms = {
        name: torch.linalg.vector_norm(_flat(name, x, grouping), dim=-1)
        for name, x in tensors.items()
    }
    return _join(norms, grouping, torch.hypot)


def global_norm(norm_MG: Tensor) -> Tensor:
    """L2 norm over all parameters, (M,), from those of the groups."""
    return torch.linalg.vector_norm(norm_MG, dim=-1)


def measure_parameter(
    *, gradient: Tensor, weight: Tensor, update: Tensor, layered: bool
) -> dict[str, Tensor]:
    """What `parameter_stats` needs of one parameter: (M, L) where it is layered, else (M,).

    Args:
        gradient: before clipping.
        weight: before the update.
        update: what the optimizer adds to it.
        layered: whether the second axis is the layer.
    """
    axes = _entries(gradient, layered=layered)
    return {
        "grad_norm": torch.linalg.vector_norm(gradient, dim=axes),
        "grad_highest": gradient.amax(dim=axes),
        "grad_lowest": gradient.amin(dim=axes),
        "update_norm": torch.linalg.vector_norm(update, dim=axes),
        "weight_norm": torch.linalg.vector_norm(weight, dim=axes),
    }


def count_nonfinite(
    gradients: Mapping[str, Tensor],
    measured: Mapping[str, Mapping[str, Tensor]],
    grouping: Grouping,
) -> dict[str, Tensor]:
    """NaN and Inf in each gradient: (M, L) where layered, else (M,); empty where `measured` says there are none."""
    norms = [stats["grad_norm"].flatten() for stats in measured.values()]
    # The CPU has nobody to wait for, and a finite norm has finite terms: there is nothing to count.
    if norms[0].device.type == "cpu" and np.isfinite(torch.cat(norms).numpy()).all():
        return {}
    return {  # 0 x is 0 for a number and NaN for NaN and Inf
        name: (x * 0.0).nan_to_num_(nan=1.0).sum(dim=_entries(x, layered=name in grouping.layered))
        for name, x in gradients.items()
    }


def _entries(x: Tensor, *, layered: bool) -> tuple[int, ...]:
    """The axes of one parameter, without those that name members and layers."""
    return tuple(range(2 if layered else 1, x.dim()))


def parameter_stats(
    measured: Mapping[str, Mapping[str, Tensor]], grouping: Grouping
) -> dict[str, Tensor]:
    """The params table, column to (..., M, G).

    Args:
        measured: `measure_parameter` and, as `nonfinite`, `count_nonfinite` of every parameter, (..., M) or (..., M, L).
        grouping: of the parameters.
    """
    columns = {}
    for name, combine in COMBINE.items():
        values = {
            parameter: torch.maximum(stats["grad_highest"], -stats["grad_lowest"])
            if name == "grad_max"
            else stats[name]
            for parameter, stats in measured.items()
        }
        columns[name] = _join(values, grouping, combine)
    columns["update_ratio"] = columns["update_norm"] / columns["weight_norm"]
    return {name: columns[name] for name in PARAMETER_STATISTICS}


def _flat(name: str, x: Tensor, grouping: Grouping) -> Tensor:
    return x.flatten(2 if name in grouping.layered else 1)


def _join(
    values: Mapping[str, Tensor],
    grouping: Grouping,
    combine: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Combine the parameters of each group and line the groups up along G."""
    alone: dict[str, Tensor] = {}
    kinds: dict[str, Tensor] = {}
    for name, group in grouping.group_of.items():  # the order of `rows`, not the optimizer's
        value = values[name]
        found = kinds if name in grouping.layered else alone
        value_MG = value if name in grouping.layered else value[..., None]
        found[group] = combine(found[group], value_MG) if group in found else value_MG
    return torch.cat([*alone.values(), *kinds.values()], dim=-1)
