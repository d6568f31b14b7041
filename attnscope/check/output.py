"""Which tensor of what a model returns has a row for each position.

Shape key: B batch, T position, F everything else.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

# Looked at first, in this order; then whatever else the output holds, in its own order.
NAMES = ("logits", "prediction_logits", "last_hidden_state", "hidden_states")


def per_position(output: Any, n_batch: int, n_positions: int) -> Tensor | None:
    """The first floating tensor (B, T, ...) of an output, as (B, T, F); else the first (B·T, ...); else None."""
    grid = (n_batch, n_positions)
    floats = [x for _, x in _tensors(output) if x.is_floating_point()]
    for x in floats:
        if x.shape[:2] == grid:
            return x.reshape(*grid, -1)
    for x in floats:  # as losses are often fed
        if x.dim() >= 2 and x.shape[0] == n_batch * n_positions:
            return x.reshape(*grid, -1)
    return None


def described(output: Any) -> str:
    """An output in words: which tensors of which shapes."""
    found = [f"{name} {tuple(x.shape)}".strip() for name, x in _tensors(output)]
    return ", ".join(found[:8]) if found else f"a {type(output).__name__} without tensors"


def _tensors(output: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield "", output
        return
    if isinstance(output, Mapping):
        names = [
            *(name for name in NAMES if name in output),
            *(n for n in output if n not in NAMES),
        ]
        named = [(str(name), output[name]) for name in names]
    elif isinstance(output, tuple | list):
        named = [("", each) for each in output]
    else:
        named = [(n, getattr(output, n)) for n in NAMES if hasattr(output, n)]
        named += [(n, x) for n, x in getattr(output, "__dict__", {}).items() if n not in NAMES]
    for name, value in named:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple | list):
            yield from ((name, each) for each in value if isinstance(each, Tensor))
