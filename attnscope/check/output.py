"""Which tensor of what a model returns is looked at: one with a row for each position, else for each sequence, else one number.

Shape key: B batch, T position, P rows of a sequence (T, or 1), F everything else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal

from torch import Tensor

OutputKind = Literal["positions", "sequences", "whole"]
KINDS: tuple[OutputKind, ...] = ("positions", "sequences", "whole")  # the finest first

# Looked at first, in this order; then whatever else the output holds, in its own order.
NAMES = ("logits", "prediction_logits", "last_hidden_state", "hidden_states")
DEEPEST = 3  # level of lists and dictionaries within one another


def rows_in(output: Any, n_batch: int, n_positions: int | None, kind: OutputKind) -> Tensor | None:
    """The first floating tensor of the output with rows of this kind, as (B, P, F); None where there is none.

    Args:
        output: whatever a module returned.
        n_batch: B.
        n_positions: T; None = the input has no positions.
        kind: positions = (B, T, ...), (B, ..., T, ...) or (B·T, ...); sequences = (B, ...); whole = anything, which becomes
            (1, 1, F).
    """
    floats = [x for _, x in _tensors(output) if x.is_floating_point() and x.numel()]
    if kind == "positions":
        return None if n_positions is None else _per_position(floats, n_batch, n_positions)
    if kind == "sequences":
        of_sequences = [x for x in floats if x.dim() and len(x) == n_batch]
        # (B, B) may compare all sequences with one another, as a contrastive loss does: rather another one.
        of_sequences.sort(key=lambda x: x.shape == (n_batch, n_batch))
        return of_sequences[0].reshape(n_batch, 1, -1) if of_sequences else None
    return floats[0].reshape(1, 1, -1) if floats else None


def _per_position(floats: list[Tensor], n_batch: int, n_positions: int) -> Tensor | None:
    grid = (n_batch, n_positions)
    for x in floats:
        if x.shape[:2] == grid:
            return x.reshape(*grid, -1)
    for x in floats:  # as losses are often fed
        if x.dim() >= 2 and x.shape[0] == n_batch * n_positions:
            return x.reshape(*grid, -1)
    for x in floats:  # as nn.CrossEntropyLoss takes them
        if x.dim() == 3 and x.shape[0] == n_batch and x.shape[2] == n_positions > 1:
            return x.transpose(1, 2)
    return None


def described(output: Any) -> str:
    """An output in words: which tensors of which shapes."""
    tensors = [f"{name} {tuple(x.shape)}".strip() for name, x in _tensors(output)]
    if output is None or tensors:
        return ", ".join(tensors[:8]) or "None"
    return f"a {type(output).__name__} without tensors"


def _tensors(output: Any, name: str = "", level: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield name, output
    elif level <= DEEPEST:
        for part, value in _parts(output):
            yield from _tensors(value, part or name, level + 1)


def _parts(output: Any) -> list[tuple[str, Any]]:
    if isinstance(output, tuple | list):
        return [("", part) for part in output]
    if isinstance(output, Mapping):
        held = {str(name): value for name, value in output.items()}
    elif is_dataclass(output):
        held = {field.name: getattr(output, field.name, None) for field in fields(output)}
    else:
        held = dict(getattr(output, "__dict__", {}))
    if isinstance(held.get("hidden_states"), tuple | list):
        held["hidden_states"] = held["hidden_states"][-1:]  # of the last layer
    first = [name for name in NAMES if name in held]
    return [(name, held[name]) for name in [*first, *(name for name in held if name not in NAMES)]]
