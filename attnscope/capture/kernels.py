"""Attention in kernels that no softmax of PyTorch shows: FlexAttention, flash-attn, xFormers.

What such a call computes is taken from its arguments. Functions of positions (score_mod, mask_mod, a window, ALiBi) are
evaluated for the query rows that are looked at and no others. An argument that is not known here, and may decide the
weights, is a reason not to measure. The libraries are not imported: they are seen when the script imports them.

Shape key: B batch, H head, T query position, S key position, R query row that is looked at, C index of a block,
N documents, K d_head.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf, nan
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from attnscope.capture.dispatch import Original
from attnscope.capture.flex import flex_call, shared_keys
from attnscope.capture.imports import when_imported
from attnscope.capture.patches import Patches
from attnscope.capture.seen import Modified, NotMeasuredError, Scaled, Seen, factor_of_both, split_mask

MOST_MATERIALIZED = 1 << 26  # numbers of a bias that xFormers otherwise never holds

# Told of each call: how to see it, the backend, and the tensors it was given.
OnKernelCall = Callable[[Callable[[nn.Module | None], Seen], str, tuple[Any, ...]], None]
Given = Mapping[str, Any]  # arguments by their names


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """Functions of a module that compute attention.

    Attributes:
        module: where scripts import them from.
        backend: what the record calls them.
        functions: their names, and what each call does, from its arguments.
        known: arguments that are understood, or do not change the weights before dropout; words.
    """

    module: str
    backend: str
    functions: Mapping[str, Callable[[Given], Seen]]
    known: str


def watch_kernels(patches: Patches, on_call: OnKernelCall) -> None:
    """Look at the calls of KERNELS, also of modules that are imported later, until `patches` are restored."""
    later: dict[str, Callable[[ModuleType], None]] = {}
    for kernel in KERNELS:
        replace = partial(_replace, patches, on_call, kernel)
        if kernel.module in sys.modules:
            replace(sys.modules[kernel.module])
        else:
            later[kernel.module] = replace
    patches.restore_with(when_imported(later))


def _replace(patches: Patches, on_call: OnKernelCall, kernel: Kernel, module: ModuleType) -> None:
    for name, see in kernel.functions.items():

        def look(original: Original, args: Any, kwargs: Any, see: Any = see) -> Any:
            out = original(*args, **kwargs)
            tensors = (*args, *kwargs.values())
            on_call(lambda _: see(_given(kernel, original, args, kwargs)), kernel.backend, tensors)
            return out

        patches.replace([module], name, look)


def _given(kernel: Kernel, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """Arguments by the names that this version of the library has for them."""
    signature = inspect.signature(original)
    given = signature.bind(*args, **kwargs).arguments
    known = kernel.known.split()
    for name, value in given.items():
        default = signature.parameters[name].default
        if name not in known and (isinstance(value, Tensor) or value not in (None, default)):
            raise NotMeasuredError(f"argument {name}, of which attnscope does not know what it does")
    return given


# -- FlexAttention --


def seen_flex(given: Given) -> Seen:
    """A call of flex_attention outside of torch.compile, where only the mask's function counts, not its blocks."""
    block_mask = given.get("block_mask")
    return flex_call(
        given["query"],
        given["key"],
        given.get("scale"),
        given.get("score_mod"),
        None if block_mask is None else block_mask.mask_mod,
        factor=factor_of_both(given["query"], given["key"]),
        backend="flex",
    )


# -- flash-attn --


def seen_flash(given: Given) -> Seen:
    """A call of flash-attn (2.1 or later: masks end in the bottom right corner), of sequences or of documents in a row."""
    packed, packed_kv = given.get("qkv"), given.get("kv")
    from_q = given["q"] if packed is None else packed
    from_k = next(x for x in (packed, packed_kv, given.get("k")) if x is not None)
    query = from_q.detach() if packed is None else packed.detach().select(-3, 0)
    key = from_k.detach()
    if from_k.dim() > query.dim():  # (..., S, 2 or 3, H, K); what comes before v is k
        key = key.select(-3, key.shape[-3] - 2)
    starts_q = given.get("cu_seqlens_q", given.get("cu_seqlens"))
    starts_k = given.get("cu_seqlens_k", given.get("cu_seqlens"))
    if starts_q is not None:  # all tokens in one axis
        query, key = query[None], key[None]
    q, k = query.transpose(1, 2), key.transpose(1, 2)
    left, right = (-1 if n is None else int(n) for n in given.get("window_size", (-1, -1)))
    causal, softcap = bool(given.get("causal", False)), float(given.get("softcap", 0.0))
    slopes = given.get("alibi_slopes")  # (H,), or (B or N, H)
    scale = given.get("softmax_scale")

    def modify(z_BHRS: Tensor, b_B: Tensor, h_H: Tensor, i_R: Tensor) -> tuple[Tensor, Tensor]:
        distance_RS, visible_RS, sequence_BR = _distances(i_R, b_B, (q.shape[2], k.shape[2]), starts_q, starts_k)
        if left >= 0:
            visible_RS = visible_RS & (distance_RS <= left)
        if causal or right >= 0:
            visible_RS = visible_RS & (distance_RS >= (0 if causal else -right))
        if softcap > 0:
            z_BHRS = softcap * torch.tanh(z_BHRS / softcap)
        if slopes is not None:
            of_all = slopes.dim() == 1
            slope = slopes[h_H] if of_all else slopes[sequence_BR][..., h_H].transpose(1, 2)
            z_BHRS = z_BHRS - (slope[:, None, None] if of_all else slope[..., None]) * distance_RS.abs()  # fmt: skip
        return z_BHRS, visible_RS

    parts = {
        "causal": causal,
        "window": left >= 0 or (right >= 0 and not causal),
        "documents": starts_q is not None,
        "soft-cap": softcap > 0,
        "alibi": slopes is not None,
    }
    keys, applied = shared_keys(k, q), q.shape[-1] ** -0.5 if scale is None else float(scale)
    most = nan if slopes is not None else softcap if softcap > 0 else inf
    return Seen(
        logits=Modified(q=q, k=keys, scale=applied, modify=modify, most=most)
        if any(parts.values())
        else Scaled(q=q, k=keys, scale=applied),
        factor=factor_of_both(from_q, from_k),
        mask=", ".join(name for name, is_there in parts.items() if is_there) or "none",
        backend="flash-attn",
    )


def _distances(
    i_R: Tensor,
    b_B: Tensor,
    sizes: tuple[int, int],
    starts_q: Tensor | None,
    starts_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """How far before each query a key is, as the last query stands at the last key; which keys belong to it; its sequence.

    Args:
        i_R: queries.
        b_B: sequences.
        sizes: T and S.
        starts_q: where documents begin and the last one ends, (N + 1,); None where there is an axis of sequences.
        starts_k: the same of keys.

    Returns:
        (R, S), (R, S) and (B, 1 or R).
    """
    j_S = torch.arange(sizes[1], device=i_R.device)
    if starts_q is None or starts_k is None:
        distance_RS = i_R[:, None] + (sizes[1] - sizes[0]) - j_S
        return distance_RS, torch.ones_like(distance_RS, dtype=torch.bool), b_B[:, None]
    starts_q, starts_k = starts_q.long(), starts_k.long()
    n_R = torch.searchsorted(starts_q[1:], i_R, right=True).clamp(max=len(starts_q) - 2)
    first_R1, end_R1 = starts_k[n_R][:, None], starts_k[n_R + 1][:, None]
    # A query is as far from its document's end as the key is that it stands at.
    distance_RS = (i_R - starts_q[n_R + 1])[:, None] + end_R1 - j_S
    is_token_R1 = (i_R < starts_q[-1])[:, None]  # and not padding behind the last document
    return distance_RS, (j_S >= first_R1) & (j_S < end_R1) & is_token_R1, n_R[None]


# -- xFormers --


def seen_xformers(given: Given) -> Seen:
    """A call of memory_efficient_attention."""
    q, k = (_heads_before_positions(given[name].detach()) for name in ("query", "key"))
    bias = given.get("attn_bias")
    kind, scale = type(bias).__name__, given.get("scale")
    shape = (q.shape[-2], k.shape[-2])
    visible, added, mask = None, None, "none"
    if isinstance(bias, Tensor):
        n_axes = given["query"].dim()
        if n_axes == 3 and bias.dim() == 3:  # (B, T, S)
            bias = bias[:, None]
        elif bias.dim() == 5:  # groups of heads
            bias = bias.flatten(1, 2)
        visible, added, mask = split_mask(bias)
    elif kind == "LowerTriangularMask":
        visible = torch.ones(shape, dtype=torch.bool, device=q.device).tril()
        mask = "causal"
    elif bias is not None and hasattr(bias, "materialize"):
        if shape[0] * shape[1] > MOST_MATERIALIZED:
            raise NotMeasuredError(f"a {kind} of {shape[0]} x {shape[1]} is too large to look at")
        visible, added, _ = split_mask(bias.materialize(shape, dtype=torch.float32, device=q.device))
        mask = kind
    elif bias is not None:
        raise NotMeasuredError(f"attn_bias is a {kind}, which has no materialize()")
    applied = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return Seen(
        logits=Scaled(q=q, k=k, scale=applied, visible=visible, bias=added),
        factor=factor_of_both(given["query"], given["key"]),
        mask=mask,
        backend="xformers",
    )


def _heads_before_positions(x: Tensor) -> Tensor:
    """(B, H, T, K) from (B, T, K), (B, T, H, K) or (B, T, groups, H, K)."""
    if x.dim() == 3:
        return x[:, None]
    return (x.flatten(2, 3) if x.dim() == 5 else x).transpose(1, 2)


def _partial_softmax(given: Given) -> Seen:
    raise NotMeasuredError("attention over some of the keys, to be merged with that over others")


def _jagged(_given: Given) -> Seen:
    raise NotMeasuredError("nested tensors")


KERNELS = (
    Kernel(
        module="torch.nested._internal.sdpa",  # F.scaled_dot_product_attention of nested tensors goes there
        backend="sdpa",
        functions={"jagged_scaled_dot_product_attention": _jagged},
        known="query key value attn_mask dropout_p is_causal scale enable_gqa",
    ),
    Kernel(
        module="torch.nn.attention.flex_attention",
        backend="flex",
        functions={"flex_attention": seen_flex},
        known="query key value score_mod block_mask scale enable_gqa return_lse return_aux kernel_options",
    ),
    Kernel(
        module="flash_attn",
        backend="flash-attn",
        functions={
            "flash_attn_func": seen_flash,
            "flash_attn_qkvpacked_func": seen_flash,
            "flash_attn_kvpacked_func": seen_flash,
            "flash_attn_varlen_func": seen_flash,
            "flash_attn_varlen_qkvpacked_func": seen_flash,
            "flash_attn_varlen_kvpacked_func": seen_flash,
            "flash_attn_with_kvcache": seen_flash,  # whose arguments are not known
        },
        known="q k v qkv kv dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
        " cu_seqlens cu_seqlens_q cu_seqlens_k max_seqlen max_seqlen_q max_seqlen_k",
    ),
    Kernel(
        module="xformers.ops",
        backend="xformers",
        functions={
            "memory_efficient_attention": seen_xformers,
            "memory_efficient_attention_forward": seen_xformers,
            "memory_efficient_attention_partial": _partial_softmax,
        },
        known="query key value attn_bias p scale op output_dtype",
    ),
)
