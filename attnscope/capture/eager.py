"""Sees attention wherever it runs in eager PyTorch: fused, in nn.MultiheadAttention, in kernels, or written by hand.

Fused attention is seen at its call. Hand-written attention is seen at its softmax, whose input are the logits; q and k are
found among the products of activations just before it. Calls in a backward pass are recomputations of checkpointed
forward passes and are not counted again.

Shape key: B batch, H head, T query position, S key position, K d_head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnscope.capture.kernels import watch_kernels
from attnscope.capture.names import module_of_call, n_heads_of
from attnscope.capture.patches import Original, Patches
from attnscope.capture.products import Product, Products
from attnscope.capture.seen import NotMeasuredError, Seen, factor_of_both, split_mask

# Called with the module whose method made the call (None outside of modules) and what was seen of it.
OnAttention = Callable[[nn.Module | None, Seen], None]
# Called with the module, the backend, the shapes and the reason.
OnUnmeasured = Callable[[nn.Module | None, str, list[list[int]], str], None]


class Capture:
    """What is done at each call while somebody looks."""

    def __init__(
        self, patches: Patches, *, on_attention: OnAttention, on_unmeasured: OnUnmeasured
    ) -> None:
        self._on_attention = on_attention
        self._on_unmeasured = on_unmeasured
        self._products = Products()
        replace = patches.replace
        replace([F, torch._C._nn], "scaled_dot_product_attention", self._fused)
        replace([torch, F, torch.special], "softmax", self._softmax)
        replace([torch.Tensor], "softmax", self._softmax)
        for name in ("matmul", "bmm"):
            replace([torch, torch.Tensor], name, self._product)
        replace([torch.Tensor], "__matmul__", self._product)
        replace([torch, torch.Tensor], "baddbmm", self._product_added)
        replace([torch], "einsum", self._einsum)
        replace([torch], "_native_multi_head_attention", self._native)
        replace([torch], "_transformer_encoder_layer_fwd", self._native_layer)
        watch_kernels(patches, self._look)

    def forget(self) -> None:
        """Let go of the script's tensors."""
        self._products.forget()

    def _fused(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = original(*args, **kwargs)
        self._look(lambda _: seen_fused(*args, **kwargs), "sdpa", args)
        return out

    def _product(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) == 2:
            self._products.remember(*args)
        return original(*args, **kwargs)

    def _product_added(
        self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if len(args) == 3:
            self._products.remember(*args[1:])
        return original(*args, **kwargs)

    def _einsum(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._products.remember_einsum(args[0], args[1:])
        return original(*args, **kwargs)

    def _softmax(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = original(*args, **kwargs)
        z = args[0] if args else kwargs.get("input")
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if isinstance(z, Tensor) and z.dim() >= 3 and dim in (-1, z.dim() - 1):
            product = self._products.behind(z)
            if product is not None:
                self._products.forget()
                self._look(
                    lambda module: seen_by_hand(z, product, n_heads_of(module)), "eager", (z,)
                )
            elif z.dim() >= 4 and z.shape[-1] > 1:
                self._look(lambda _: _unseen_product(), "eager", (z,))
        return out

    def _native(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The fast path of nn.MultiheadAttention in evaluation."""
        out = original(*args, **kwargs)
        self._look(lambda _: _seen_native(*args, **kwargs), "fast path", args[:3])
        return out

    def _native_layer(
        self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The fast path of nn.TransformerEncoderLayer in evaluation."""
        out = original(*args, **kwargs)
        self._look(
            lambda _: _seen_native_layer(*args, **kwargs), "fast path", args[:1], "self_attn"
        )
        return out

    def _look(
        self,
        seen: Callable[[nn.Module | None], Seen],
        backend: str,
        tensors: tuple[Any, ...],
        part: str = "",
    ) -> None:
        """Hand on a call of the module that is on the stack, or of a part of it."""
        if not in_backward():
            module = module_of_call()
            module = getattr(module, part, module) if part else module
            self.hand_on(module, backend, tensors, lambda: seen(module))

    def hand_on(
        self,
        module: nn.Module | None,
        backend: str,
        tensors: Sequence[Any],
        see: Callable[[], Seen],
    ) -> None:
        """Hand on what is seen; whatever goes wrong in looking is said, and the script goes on."""
        try:
            self._on_attention(module, see())
        except NotMeasuredError as error:
            reason = str(error)
        except Exception as error:
            # Whatever a strange tensor does to our arithmetic, it must not stop training.
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            return
        shapes = [list(x.shape) for x in tensors if isinstance(x, Tensor)]
        self._on_unmeasured(module, backend, shapes, reason)


def in_backward() -> bool:
    """Whether autograd runs: what is called then is a forward pass recomputed by checkpointing."""
    return torch._C._current_graph_task_id() != -1


def seen_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    factor: float | None = None,
) -> Seen:
    """A call of F.scaled_dot_product_attention; `factor` is what q and k were multiplied by before, where that is known."""
    if query.is_nested or key.is_nested:
        raise NotMeasuredError("nested tensors")
    q, k = _four_axes(query), _four_axes(key)
    if enable_gqa and k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    visible, bias, mask = None, None, "none"
    if attn_mask is not None:
        visible, bias, mask = split_mask(
            attn_mask if attn_mask.dim() < 3 else _four_axes(attn_mask)
        )
    elif is_causal:
        visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        mask = "causal"
    applied = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return Seen(
        q=q, k=k, z=None, scale=applied, factor=factor_of_both(query, key) if factor is None else factor, visible=visible, bias=bias, mask=mask, backend="sdpa",
    )  # fmt: skip


def seen_by_hand(
    z: Tensor, product: Product, n_heads: int | None, *, factor: float | None = None
) -> Seen:
    """Logits that a softmax was given, and the product behind them; `factor` as in `seen_fused`."""
    n_queries, n_keys = z.shape[-2:]
    if z.dim() == 3 and n_heads and len(z) % n_heads == 0:
        n_batch = len(z) // n_heads
    else:
        n_batch, n_heads = z.shape[0], z[0, ..., 0, 0].numel()
    grid = (n_batch, n_heads)
    return Seen(
        q=product.q().reshape(*grid, n_queries, -1),
        k=product.k().reshape(*grid, n_keys, -1),
        z=z.reshape(*grid, n_queries, n_keys),
        scale=None,
        factor=factor_of_both(product.left, product.right) if factor is None else factor,
        visible=None,
        bias=None,
        mask="in the logits",
        backend="eager",
    )


def _unseen_product() -> Seen:
    raise NotMeasuredError(
        "softmax over 4 axes whose q and k were not seen: no product of activations before it"
    )


def _seen_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> Seen:
    """What torch._native_multi_head_attention computes inside: the projections are done again to see q and k."""
    if query.is_nested:
        raise NotMeasuredError("nested tensors")
    (w_q, w_k, _), (b_q, b_k, _) = qkv_weight.chunk(3), qkv_bias.chunk(3)
    q, k = (
        F.linear(x.detach(), w.detach(), b.detach()).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for x, w, b in ((query, w_q, b_q), (key, w_k, b_k))
    )
    hidden = mask
    if hidden is not None and mask_type == 1:  # padding, (B, S)
        hidden = hidden[:, None, None, :]
    visible, bias, kind = (None, None, "none") if hidden is None else split_mask(~hidden.bool())
    return Seen(
        q=q, k=k, z=None, scale=q.shape[-1] ** -0.5, factor=1.0, visible=visible, bias=bias, mask=kind, backend="fast path",
    )  # fmt: skip


def _seen_native_layer(
    src: Tensor, embed_dim: int, num_heads: int, *rest: Any, **kwargs: Any
) -> Seen:
    """What torch._transformer_encoder_layer_fwd computes inside."""
    qkv_weight, qkv_bias, proj_weight, proj_bias, _use_gelu, norm_first, eps, *more = rest
    if src.is_nested:
        raise NotMeasuredError("nested tensors")
    if norm_first:
        norm_weight, norm_bias = more[:2]
        src = F.layer_norm(
            src.detach(), (embed_dim,), norm_weight.detach(), norm_bias.detach(), eps
        )
    mask = more[8] if len(more) > 8 else kwargs.get("mask")
    mask_type = more[9] if len(more) > 9 else kwargs.get("mask_type")
    return _seen_native(
        src, src, src, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type=mask_type
    )  # fmt: skip


def _four_axes(x: Tensor) -> Tensor:
    """(B, H, T, K) from any number of leading axes: one more is taken for groups of heads."""
    if x.dim() == 4:
        return x
    if x.dim() == 3:
        return x[:, None]
    if x.dim() > 4:
        return x.flatten(1, -3)
    raise NotMeasuredError(f"q or k with {x.dim()} axes")
