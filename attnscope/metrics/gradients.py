"""Norms of gradients, weights and updates per parameter group.

A group is what one row of the params table speaks of: a kind of parameter (q, k, v, o, mlp_in, mlp_out, norm, scale) in
one layer, or the embedding or head, which belong to no layer (layer -1).

Shape key: M member, L layer, G group, ... the axes of one parameter.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# In the order of the table on disk.
PARAMETER_STATISTICS = ("grad_norm", "weight_norm", "update_norm", "update_ratio", "grad_max", "nonfinite")
# What is taken of every parameter at every step; the table follows from it.
REDUCTIONS = ("grad_norm", "grad_highest", "grad_lowest", "update_norm", "weight_norm")
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
        groups_of: parameter name to group name, for every parameter, in the order of the tensors; to several where as
            many matrices stand side by side along the axis before the last.
        layered: parameters shaped (M, L, ...); the others are (M, ...).
        rows: (layer, group name) of every group, in the order of the axis G.
    """

    groups_of: Mapping[str, tuple[str, ...]]
    layered: frozenset[str]
    rows: tuple[tuple[int, str], ...]

    def kept(self, name: str, n_axes: int) -> tuple[int, ...]:
        """Axes of a parameter that tell its groups apart; over the others it is reduced."""
        several = (n_axes - 2,) if len(self.groups_of[name]) > 1 else ()
        return ((0, 1) if name in self.layered else (0,)) + several

    def reduced(self, name: str, n_axes: int) -> tuple[int, ...]:
        """The other axes."""
        return tuple(sorted(set(range(n_axes)) - set(self.kept(name, n_axes))))


def group_parameters(groups_of: Mapping[str, tuple[str, ...]], *, layered: frozenset[str], n_layers: int) -> Grouping:
    """Lay out the axis G: the groups without a layer first, then every layer of each kind."""
    alone: dict[str, None] = {}
    kinds: dict[str, None] = {}
    for name, groups in groups_of.items():
        (kinds if name in layered else alone).update(dict.fromkeys(groups))
    rows = [(-1, group) for group in alone]
    rows += [(layer, kind) for kind in kinds for layer in range(n_layers)]
    return Grouping(groups_of=groups_of, layered=layered, rows=tuple(rows))


def group_norms(tensors: Mapping[str, Tensor], grouping: Grouping) -> Tensor:
    """L2 norm of every group, (M, G)."""
    norms = {name: _norm(x, grouping.reduced(name, x.dim())) for name, x in tensors.items()}
    return _join(norms, grouping, torch.hypot)


def global_norm(norm_MG: Tensor) -> Tensor:
    """L2 norm over all parameters, (M,), from those of the groups."""
    return torch.linalg.vector_norm(norm_MG, dim=-1)


class Sheet:
    """Where the reductions of a step's parameters go: one tensor, so that a step is checked and copied at once.

    Attributes:
        values: (R, X) float32, R in the order of REDUCTIONS; X goes through members and layers of every parameter.
    """

    def __init__(self, parameters: Mapping[str, Tensor], grouping: Grouping) -> None:
        """Lay out X for tensors shaped like `parameters`."""
        self._shapes = {
            name: torch.Size(x.shape[axis] for axis in grouping.kept(name, x.dim())) for name, x in parameters.items()
        }
        self._axes = {name: grouping.reduced(name, x.dim()) for name, x in parameters.items()}
        sizes = [shape.numel() for shape in self._shapes.values()]
        device = next(iter(parameters.values())).device
        self.values = torch.empty(len(REDUCTIONS), sum(sizes), device=device)
        self._views = {name: tuple(columns.values()) for name, columns in self.read(self.values).items()}
        self._host_norms = self.values[0].numpy() if device.type == "cpu" else None

    def measure(self, name: str, *, gradient: Tensor, weight: Tensor, update: Tensor) -> None:
        """Reduce one parameter: its gradient before clipping, its weight before the update, the update."""
        axes = self._axes[name]
        grad_norm, highest, lowest, update_norm, weight_norm = self._views[name]
        _norm(gradient, axes, out=grad_norm)
        torch.amax(gradient, dim=axes, out=highest)
        torch.amin(gradient, dim=axes, out=lowest)
        _norm(update, axes, out=update_norm)
        _norm(weight, axes, out=weight_norm)

    def count_nonfinite(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """NaN and Inf in each gradient, shaped as in `read`; empty where the norms say that there are none.

        Only the CPU may look at its norms: it has nobody to wait for. A finite norm has finite terms.
        """
        if self._host_norms is not None and math.isfinite(sum(self._host_norms.tolist())):
            return {}
        return {  # 0 x is 0 for a number and NaN for NaN and Inf
            name: (x * 0.0).nan_to_num_(nan=1.0).sum(dim=self._axes[name]) for name, x in gradients.items()
        }

    def read(self, values: Tensor) -> dict[str, dict[str, Tensor]]:
        """Parameter to REDUCTIONS, each (..., M), (..., M, L) or, of several groups, (..., M, L, 3), from (..., R, X)."""
        pieces = values.split([shape.numel() for shape in self._shapes.values()], dim=-1)
        return {
            name: dict(zip(REDUCTIONS, piece.unflatten(-1, shape).unbind(values.dim() - 2), strict=True))
            for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }


def parameter_stats(measured: Mapping[str, Mapping[str, Tensor]], grouping: Grouping) -> dict[str, Tensor]:
    """The params table, column to (..., M, G).

    Args:
        measured: what `Sheet.read` gives and, as `nonfinite`, counts, shaped likewise.
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


def _norm(x: Tensor, axes: tuple[int, ...], *, out: Tensor | None = None) -> Tensor:
    """L2 norm over axes, the last among them."""
    if axes[-1] - axes[0] >= len(axes):
        # Where another axis stands between them, one after the other is four times as fast.
        x, axes = torch.linalg.vector_norm(x, dim=-1), axes[:-1]
    norm: Tensor = torch.linalg.vector_norm(x, dim=axes, out=out)
    return norm


def _join(values: Mapping[str, Tensor], grouping: Grouping, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine the parameters of each group and line the groups up along G."""
    alone: dict[str, Tensor] = {}
    kinds: dict[str, Tensor] = {}
    for name, groups in grouping.groups_of.items():  # the order of `rows`, not the optimizer's
        columns = kinds if name in grouping.layered else alone
        values_of_groups = values[name].unbind(-1) if len(groups) > 1 else (values[name],)
        for group, value in zip(groups, values_of_groups, strict=True):
            value_MG = value if name in grouping.layered else value[..., None]
            columns[group] = combine(columns[group], value_MG) if group in columns else value_MG
    return torch.cat([*alone.values(), *kinds.values()], dim=-1)
