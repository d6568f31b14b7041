"""The attention calls of one forward pass, and gradients between positions, in a few numbers each.

Shape key: B batch, H head, T query position, S key position, K d_head, D features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnscope.capture.calls import applied_scale, attention_calls, visible_keys
from attnscope.capture.names import n_heads_of
from attnscope.capture.seen import Seen
from attnscope.check.batch import with_input
from attnscope.check.case import SEED, Case, call, in_mode, rows_of
from attnscope.check.sight import Direction, direction_of, sight_of
from attnscope.errors import AttnscopeError

PROBES = 4  # queries whose gradients are looked at
UNIT_WITHIN = 1e-2  # of length 1: q and k were normalized


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """An attention call.

    Attributes:
        layer: name of the module that made it.
        n_heads: of q.
        n_kv_heads: of k.
        d_head: of q.
        said_heads: how many heads the module says it has.
        d_model: width of the module's input.
        n_queries: T.
        n_keys: S.
        scale: what multiplies q kᵀ altogether; None = it could not be seen.
        is_cosine: q and k have length 1, so that 1/√K is not what scales them.
        direction: of self-attention over the positions of the batch; None of any other.
        farthest: positions that a query sees ahead.
        rows: queries of all heads and sequences.
        empty_rows: those that see no key.
        empty_real_rows: of them, those at positions that are not padded.
    """

    layer: str
    n_heads: int
    n_kv_heads: int
    d_head: int
    said_heads: int | None
    d_model: int | None
    n_queries: int
    n_keys: int
    scale: float | None
    is_cosine: bool
    direction: Direction | None
    farthest: int
    rows: int
    empty_rows: int
    empty_real_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What one forward pass with gradients shows.

    Attributes:
        calls: in their order.
        why: why there are none.
        reacts: query position to how strongly its output reacts to each input position, (T,), relative to the strongest; empty
            where gradients between positions cannot be had.
    """

    calls: tuple[Attention, ...]
    why: str
    reacts: dict[int, Tensor]


def look(case: Case) -> Looked:
    """Pass the batch through the model in evaluation mode with gradients, and look at its attention."""
    model, batch = case.model, case.batch
    calls: list[Attention] = []
    widths: dict[str, int] = {}

    def on_call(name: str, module: nn.Module | None, seen: Seen) -> None:
        calls.append(_attention(case, name, module, seen))

    with in_mode(model, "evaluation", seed=SEED), torch.enable_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.is_leaf and not p.is_inference():
                p.requires_grad_(True)  # the scale is read from the graph
        x = batch.input.detach()
        with _widths(model, widths), _leaf(model, x) as leaves:
            if not batch.has_ids:
                leaves.append(x.clone().requires_grad_())
                x = leaves[0] * 1  # models may write into it
            try:
                with attention_calls(model, on_call) as unseen:
                    output = rows_of(call(model, with_input(batch, x), copy=False), batch)
            except AttnscopeError as error:
                return Looked(calls=(), why=f"with gradients, {error}", reacts={})
        reacts = _reacts(case, output, leaves[0]) if leaves else {}
    found = tuple(replace(each, d_model=_width_of(each.layer, widths)) for each in calls)
    why = "" if found else "; ".join(unseen[:1]) or "no call looked like attention"
    return Looked(calls=found, why=why, reacts=reacts)


@contextmanager
def _widths(model: nn.Module, widths: dict[str, int]) -> Iterator[None]:
    """Note the last axis of what each module is given first, (B, T, D)."""
    handles = []
    try:
        for name, module in model.named_modules():

            def note(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                for x in (*args, *kwargs.values()):
                    if isinstance(x, Tensor) and x.dim() == 3 and x.is_floating_point():
                        widths.setdefault(name, x.shape[-1])
                        return

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _width_of(layer: str, widths: dict[str, int]) -> int | None:
    """Of the nearest module that was given (B, T, D)."""
    while layer not in widths and "." in layer:
        layer = layer.rpartition(".")[0]
    return widths.get(layer, widths.get(""))


@contextmanager
def _leaf(model: nn.Module, ids: Tensor) -> Iterator[list[Tensor]]:
    """The output of the first module that turns the token ids into vectors, made a leaf of the graph."""
    leaves: list[Tensor] = []
    handles = []

    def swap(_: nn.Module, args: Any, out: Any) -> Any:
        given = args[0] if args else None
        if leaves or not isinstance(given, Tensor) or not isinstance(out, Tensor):
            return None
        same = given.shape == ids.shape and given.dtype == ids.dtype and torch.equal(given, ids)
        if not same or out.shape[:2] != ids.shape or not out.is_floating_point():
            return None
        leaves.append(out.detach().requires_grad_())
        return leaves[0] * 1  # models may write into it

    try:
        if not ids.is_floating_point():
            handles += [
                module.register_forward_hook(swap)
                for module in model.modules()
                if module is not model and not any(module.children())
            ]
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def _reacts(case: Case, output: Tensor, leaf: Tensor) -> dict[int, Tensor]:
    n_positions = case.grid[1]
    if not output.requires_grad:
        return {}
    generator = torch.Generator().manual_seed(SEED)
    direction_F = torch.randn(output.shape[-1], generator=generator).to(output)
    found: dict[int, Tensor] = {}
    real_BT = case.batch.real_BT
    for i in spread(n_positions, PROBES):
        if not real_BT[:, i].any():
            continue
        try:
            (grad,) = torch.autograd.grad(
                (output[:, i] * direction_F).sum(), [leaf], retain_graph=True, allow_unused=True
            )
        except RuntimeError:  # an operation without a gradient
            return {}
        if grad is None:
            continue
        size_BT = torch.linalg.vector_norm(grad.flatten(2).float(), dim=-1)
        share_BT = (size_BT / size_BT.amax(dim=1, keepdim=True)).nan_to_num(0.0)
        share_BT = share_BT.masked_fill(~(real_BT & real_BT[:, i : i + 1]), 0.0)
        found[i] = share_BT.amax(dim=0)
    return found


def spread(n_positions: int, wanted: int) -> list[int]:
    """At most so many positions, from the first to the last at equal distances."""
    if n_positions <= wanted:
        return list(range(n_positions))
    return sorted({round(at * (n_positions - 1) / (wanted - 1)) for at in range(wanted)})


def _attention(case: Case, name: str, module: nn.Module | None, seen: Seen) -> Attention:
    n_batch, n_heads, n_queries, d_head = seen.q.shape
    keys = seen.q if seen.k is None else seen.k
    n_keys = seen.k.shape[-2] if seen.k is not None else n_queries
    visible_BHTS = visible_keys(seen)
    empty_BHT = ~visible_BHTS.any(dim=-1)
    real_BT = case.batch.real_BT
    is_over_positions = (n_batch, n_queries) == case.grid
    empty_real = empty_BHT & real_BT[:, None] if is_over_positions else empty_BHT
    direction: Direction | None = None
    farthest = 0
    if is_over_positions and n_keys == n_queries:
        pairs_BTS = real_BT[:, :, None] & real_BT[:, None, :]
        seen_HTS = (visible_BHTS & pairs_BTS[:, None]).any(dim=0)
        sights = [sight_of(sees_TS, pairs_BTS.any(dim=0)) for sees_TS in seen_HTS]
        directions = {direction_of(sight) for sight in sights}
        direction = directions.pop() if len(directions) == 1 else "partly"
        farthest = max(sight.farthest for sight in sights)
    scale = applied_scale(seen) if torch.is_grad_enabled() else None
    return Attention(
        layer=name,
        n_heads=n_heads,
        n_kv_heads=keys.shape[1],
        d_head=d_head,
        said_heads=n_heads_of(module),
        d_model=None,
        n_queries=n_queries,
        n_keys=n_keys,
        scale=scale,
        is_cosine=_is_cosine(seen.q, keys, seen.factor),
        direction=direction,
        farthest=farthest,
        rows=empty_BHT.numel(),
        empty_rows=int(empty_BHT.sum()),
        empty_real_rows=int(empty_real.sum()),
    )


def _is_cosine(q: Tensor, k: Tensor, factor: float | None) -> bool:
    """Whether all q and k have length 1 before they are multiplied by `factor`."""
    sizes = [torch.linalg.vector_norm(x.detach().float(), dim=-1) for x in (q, k)]
    if any(x.max() - x.min() > UNIT_WITHIN * x.mean() for x in sizes):
        return False
    product = float(sizes[0].mean() * sizes[1].mean())
    return abs(product / (abs(factor or 1.0) or 1.0) - 1) < UNIT_WITHIN
