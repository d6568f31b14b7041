"""What counts as not finite: of each tensor of a step, the rows of the tables that show it.

Shape key: N rows of a table.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The tensors in the order in which a step computes them, and what shows them: a column, or where there is none, words.
TENSORS = {
    "activation": "output of a module",
    "attention logits": "max_logit_bound",
    "loss": "loss",
    "gradient": "nonfinite",
}

Array = NDArray[Any]
Tables = Mapping[str, Mapping[str, Array]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """One tensor in the rows of one table.

    Attributes:
        tensor: of TENSORS.
        step_N: (N,).
        member_N: index within the part, (N,).
        layer_N: (N,); None where the tensor has no place.
        group_N: (N,); None where there are none.
        where_N: a Place each, None where it is not broken, (N,); None = layers and groups tell.
        broken_N: whether it has NaN or Inf, (N,).
    """

    tensor: str
    step_N: Array
    member_N: Array
    layer_N: Array | None = None
    group_N: Array | None = None
    where_N: Array | None = None
    broken_N: Array


def looked_at(tables: Tables) -> Iterator[Looked]:
    """Every tensor that tables tell of, as `PartWriter.append` takes them; those that are missing are skipped."""
    heads, steps, params = (tables.get(name) or {} for name in ("heads", "steps", "params"))
    if heads:
        # The bound is NaN where q and k were not seen, and the logits are where no row could be measured.
        unsound_N = ~np.isfinite(heads["max_logit_bound"]) & ~np.isfinite(heads["max_logit"])
        yield Looked(
            tensor="attention logits",
            step_N=heads["step"],
            member_N=heads["member"],
            layer_N=heads["layer"],
            broken_N=unsound_N,
        )
    if steps:
        yield Looked(
            tensor="loss",
            step_N=steps["step"],
            member_N=steps["member"],
            broken_N=~np.isfinite(steps["loss"]),
        )
    if params:
        yield Looked(
            tensor="gradient",
            step_N=params["step"],
            member_N=params["member"],
            layer_N=params["layer"],
            group_N=params["group"],
            broken_N=params["nonfinite"] > 0,
        )


def norms_looked_at(steps: Mapping[str, Array]) -> Iterator[Looked]:
    """The gradient of each step as a whole, as its norm in the steps table tells; nothing of an empty one."""
    if steps:
        yield Looked(
            tensor="gradient",
            step_N=steps["step"],
            member_N=steps["member"],
            broken_N=~np.isfinite(steps["grad_norm"]),
        )
