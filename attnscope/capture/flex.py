"""FlexAttention: logits and masks that are functions of positions, evaluated for the query rows that are looked at.

Shape key: B batch, H head, T query position, S key position, R query row that is looked at, C index of a block, K d_head.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import inf, nan
from typing import Any

import torch
from torch import Tensor

from attnscope.capture.seen import Modified, NotMeasuredError, Seen, visible_logits
from attnscope.errors import error_in_a_line

Mod = Callable[..., Tensor]  # score_mod(score, b, h, q, k) or mask_mod(b, h, q, k), for one logit


def flex_call(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    score_mod: Mod | None,
    mask_mod: Mod | None,
    *,
    factor: float | None,
    backend: str,
    blocks: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Seen:
    """Logits are score_mod(scale q kᵀ) where mask_mod is true, and blocks(b, h, i), of the same shape, where it is given."""
    q, k = query.detach(), key.detach()
    n_keys = k.shape[-2]

    def modify(z_BHRS: Tensor, b_B: Tensor, h_H: Tensor, i_R: Tensor) -> tuple[Tensor, Tensor | None]:
        at = (b_B, h_H, i_R, torch.arange(n_keys, device=i_R.device))
        raw_BHRS, visible_BHRS = z_BHRS, None
        if score_mod is not None:
            z_BHRS = _mapped("score_mod", score_mod, (0,), (z_BHRS, *at))
            # One that masks gives -inf or the like; NaN is to be seen.
            visible_BHRS = visible_logits(z_BHRS, raw_BHRS) | z_BHRS.isnan()
        if mask_mod is not None:
            inside = _mapped("mask_mod", mask_mod, (), at)
            visible_BHRS = inside if visible_BHRS is None else inside & visible_BHRS
        if blocks is not None:
            inside = blocks(b_B, h_H, i_R)
            visible_BHRS = inside if visible_BHRS is None else inside & visible_BHRS
        return z_BHRS, visible_BHRS

    mods = {"mask_mod": mask_mod, "score_mod": score_mod}
    return Seen(
        logits=Modified(
            q=q,
            k=shared_keys(k.expand(len(q), *k.shape[1:]), q),
            scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
            modify=modify,
            most=inf if score_mod is None else nan,
        ),
        factor=factor,
        mask=" and ".join(name for name, mod in mods.items() if mod is not None) or "none",
        backend=backend,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Which blocks of keys a compiled kernel visits: no others are seen, whatever mask_mod says.

    Attributes:
        counts: for each kind of block (partial, full), how many of its indices count, (B or 1, H or 1, query blocks); None
            where there is none of the kind.
        indices: blocks of keys, like counts with a last axis C.
        size: of a block, queries and keys.
        n_keys: of the call, S.
    """

    counts: tuple[Tensor | None, ...]
    indices: tuple[Tensor | None, ...]
    size: tuple[int, int]
    n_keys: int

    def of_rows(self, b_B: Tensor, h_H: Tensor, i_R: Tensor) -> Tensor:
        """Keys that these rows can see, (B or 1, H or 1, R, S)."""
        n_blocks = -(-self.n_keys // self.size[1])
        j_S = torch.arange(self.n_keys, device=i_R.device)
        visible = torch.zeros((), dtype=torch.bool, device=i_R.device)
        for counts, indices in zip(self.counts, self.indices, strict=True):
            if counts is None or indices is None:
                continue
            b = b_B if counts.shape[0] > 1 else b_B[:1] * 0
            h = h_H if counts.shape[1] > 1 else h_H[:1] * 0
            at = (b[:, None, None], h[:, None], i_R // self.size[0])
            index_BHRC = indices[at].long()
            column_C = torch.arange(index_BHRC.shape[-1], device=i_R.device)
            # What does not count goes into one block more, which no key is in.
            index_BHRC = index_BHRC.where(column_C < counts[at][..., None], n_blocks)
            found = torch.zeros(*index_BHRC.shape[:-1], n_blocks + 1, device=i_R.device)
            visible = visible | (found.scatter(-1, index_BHRC, 1.0) > 0)[..., j_S // self.size[1]]
        return visible


def _mapped(name: str, mod: Mod, prefix: tuple[int, ...], arguments: tuple[Tensor, ...]) -> Tensor:
    """A function of one logit for a whole grid of them, as FlexAttention itself maps it: axis by axis, the last one first."""
    # Lets a tensor be indexed by the numbers of vmap.
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    for axis in (3, 2, 1, 0):
        axes: list[int | None] = [None] * 4
        axes[axis] = 0
        mod = torch.vmap(mod, in_dims=(*prefix, *axes))
    try:
        with _vmap_at_work(), TransformGetItemToIndex():
            return mod(*arguments)
    except Exception as error:
        raise NotMeasuredError(f"{name} raised {error_in_a_line(error)}") from error


def _vmap_at_work() -> AbstractContextManager[object]:
    """Where an operator is watched by a dispatch mode, as ours is in the first call of a compiled graph, vmap is shut out."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()  # fmt: skip
    for name in ("Batched", "VmapMode", "DynamicLayerBackMode", "DynamicLayerFrontMode"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, f"FuncTorch{name}"))
    guard: Any = torch._C._ForceDispatchKeyGuard
    return guard(included, excluded)


def shared_keys(k: Tensor, q: Tensor) -> Tensor:
    """Keys with as many heads as queries have: each is shared by neighbours."""
    nshared_keys = q.shape[1] // k.shape[1]
    return k if nshared_keys == 1 else k.repeat_interleave(nshared_keys, dim=1)
