"""A block of recorded steps on the host, and the tables that it becomes.

Shape key: S steps of a block, M member, L layer, H head, G group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnscope.runs.streams import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A few steps of one part, on the host.

    Attributes:
        members: index within the part, (M,).
        steps: (S,).
        step_ms: (S,).
        columns: column of the steps table to (S, M).
        head_steps: the steps of which heads were measured.
        heads: column of the heads table to (S, M, L, H) over head_steps.
        layers: column of the layers table to (S, M, L) over head_steps.
        params: column of the params table to (S, M, G) over head_steps.
        groups: (layer, group name) along G.
    """

    members: Sequence[int]
    steps: Array
    step_ms: Array
    columns: dict[str, Array]
    head_steps: Array
    heads: dict[str, Array]
    layers: dict[str, Array]
    params: dict[str, Array]
    groups: tuple[tuple[int, str], ...]


def tables_of(block: Block, tokens_per_step: int) -> dict[str, dict[str, Array]]:
    """Lay a block out as the columns of the four tables, one row per step, member and whatever the table is about."""
    n_members = len(block.members)
    steps = {
        **_keys(block.steps, block.members, 1),
        **{name: value.ravel() for name, value in block.columns.items()},
        "tokens": np.repeat((block.steps + 1) * tokens_per_step, n_members),
        "step_ms": np.repeat(block.step_ms, n_members),
    }
    if not len(block.head_steps):
        return {"steps": steps}
    n_layers, n_heads = block.heads["entropy"].shape[2:]
    times = len(block.head_steps) * n_members
    heads = {
        **_keys(block.head_steps, block.members, n_layers * n_heads),
        "layer": np.tile(np.repeat(np.arange(n_layers), n_heads), times),
        "head": np.tile(np.arange(n_heads), times * n_layers),
        **{name: value.ravel() for name, value in block.heads.items()},
    }
    layers = {
        **_keys(block.head_steps, block.members, n_layers),
        "layer": np.tile(np.arange(n_layers), times),
        **{name: value.ravel() for name, value in block.layers.items()},
    }
    params = {
        **_keys(block.head_steps, block.members, len(block.groups)),
        "layer": np.tile([layer for layer, _ in block.groups], times),
        "group": np.tile(np.array([group for _, group in block.groups], dtype=object), times),
        **{name: value.ravel() for name, value in block.params.items()},
    }
    return {"steps": steps, "heads": heads, "layers": layers, "params": params}


def _keys(steps: Array, members: Sequence[int], rows_each: int) -> dict[str, Array]:
    return {
        "step": np.repeat(steps, len(members) * rows_each),
        "member": np.tile(np.repeat(np.array(members), rows_each), len(steps)),
    }
