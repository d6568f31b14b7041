"""Sees attention wherever it runs in eager PyTorch: fused, in nn.MultiheadAttention, in kernels, or written by hand.

Fused attention is seen at its call, hand-written attention at its softmax once a product with the values follows
(`by_hand`). Calls in a backward pass are recomputations of checkpointed forward passes and are not counted again.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnscope.capture.by_hand import ByHand, SoftmaxCall
from attnscope.capture.dispatch import Unobserved, outside, why_unseen
from attnscope.capture.fused import seen_fused, seen_native, seen_native_layer
from attnscope.capture.kernels import watch_kernels
from attnscope.capture.names import module_of_call
from attnscope.capture.patches import Patches
from attnscope.capture.products import Product, einsum_product, matrix_product
from attnscope.capture.seen import NotMeasuredError, Seen
from attnscope.errors import error_in_a_line

# Called with the module whose method made the call (None outside of modules) and what was seen of it.
OnAttention = Callable[[nn.Module | None, Seen], None]
# Called with the module, the backend, the shapes and the reason.
OnUnmeasured = Callable[[nn.Module | None, str, list[list[int]], str], None]

# What F.scaled_dot_product_attention chooses from; called by other code, their masks have other meanings.
KERNELS_OF_SDPA = ("flash", "efficient", "cudnn")


class Capture:
    """What is done at each call while somebody looks."""

    def __init__(self, patches: Patches, *, on_attention: OnAttention, on_unmeasured: OnUnmeasured) -> None:
        self._on_attention = on_attention
        self._on_unmeasured = on_unmeasured
        self._local = threading.local()
        listen = patches.listen
        listen("scaled_dot_product_attention", self._fused)
        for kernel in KERNELS_OF_SDPA:
            listen(f"_scaled_dot_product_{kernel}_attention", self._kernel_of_sdpa)
        listen("softmax.int", self._softmax)
        for name in ("matmul", "bmm"):
            listen(name, self._product)
        listen("baddbmm", self._product_added)
        listen("einsum", self._einsum)
        listen("_native_multi_head_attention", self._native)
        listen("_transformer_encoder_layer_fwd", self._native_layer)
        watch_kernels(patches, self._look)

    @property
    def _by_hand(self) -> ByHand:
        """Of this thread: what two of them compute has nothing to do with each other."""
        found: ByHand | None = getattr(self._local, "by_hand", None)
        if found is None:
            found = self._local.by_hand = ByHand(self._found)
        return found

    def forget(self) -> None:
        """A forward pass is over: say which softmaxes may have been attention, and let go of the script's tensors."""
        for softmax in self._by_hand.forget():
            if softmax.z.dim() >= 4:  # others are of classifiers
                reason = "softmax over 4 axes or more that no product of activations followed"
                self._say(softmax.module, "eager", (softmax.z,), reason)

    def _fused(self, args: tuple[Any, ...], kwargs: dict[str, Any], _out: Any) -> None:
        args, kwargs = outside(args), outside(kwargs)
        self._look(lambda module: seen_fused(*args, module=module, **kwargs), "sdpa", args[:3])

    def _kernel_of_sdpa(self, args: tuple[Any, ...], _kwargs: dict[str, Any], _out: Any) -> None:
        self._look(_not_by_its_function, "sdpa", args[:3])

    def _product(self, args: tuple[Any, ...], _kwargs: dict[str, Any], _out: Any) -> None:
        self._add(matrix_product, args)

    def _product_added(self, args: tuple[Any, ...], _kwargs: dict[str, Any], _out: Any) -> None:
        self._add(matrix_product, args[1:3])

    def _einsum(self, args: tuple[Any, ...], _kwargs: dict[str, Any], _out: Any) -> None:
        self._add(lambda *operands: einsum_product(args[0], operands), args[1])

    def _add(self, product: Callable[..., Product | None], operands: Sequence[Any]) -> None:
        if not in_backward() and all(why_unseen(x) is None for x in operands):
            found = product(*outside(operands))
            if found is not None:
                self._by_hand.add_product(found)

    def _softmax(self, args: tuple[Any, ...], _kwargs: dict[str, Any], out: Any) -> None:
        z, dim = args[:2]
        if z.dim() >= 3 and not in_backward():
            reason = why_unseen(z)
            if reason is None:
                self._by_hand.add_softmax(outside(z), outside(out), dim, module_of_call)
            elif reason and z.dim() >= 4:
                self._say(module_of_call(), "eager", (z,), reason)

    def _found(self, softmax: SoftmaxCall, see: Callable[[], Seen]) -> None:
        self.hand_on(softmax.module, "eager", (softmax.z,), see)

    def _native(self, args: tuple[Any, ...], kwargs: dict[str, Any], _out: Any) -> None:
        """The fast path of nn.MultiheadAttention in evaluation."""
        self._look(lambda _: seen_native(*args, **kwargs), "fast path", args[:3])

    def _native_layer(self, args: tuple[Any, ...], kwargs: dict[str, Any], _out: Any) -> None:
        """The fast path of nn.TransformerEncoderLayer in evaluation."""
        self._look(lambda _: seen_native_layer(*args, **kwargs), "fast path", args[:1], "self_attn")

    def _look(
        self,
        seen: Callable[[nn.Module | None], Seen],
        backend: str,
        tensors: Sequence[Any],
        part: str = "",
    ) -> None:
        """Hand on a call of the module that is on the stack, or of a part of it."""
        if in_backward():
            return
        reasons = [why_unseen(x) for x in tensors if isinstance(x, Tensor)]
        if "" in reasons:
            return
        module = module_of_call()
        module = getattr(module, part, module) if part else module
        reason = next((each for each in reasons if each is not None), None)
        if reason is None:
            self.hand_on(module, backend, tensors, lambda: seen(module))
        else:
            self._say(module, backend, tensors, reason)

    def hand_on(self, module: nn.Module | None, backend: str, tensors: Sequence[Any], see: Callable[[], Seen]) -> None:
        """Hand on what is seen; whatever goes wrong in looking is said, and the script goes on."""
        try:
            with Unobserved():
                self._on_attention(module, see())
        except NotMeasuredError as error:
            reason = str(error)
        except Exception as error:
            # Whatever a strange tensor does to our arithmetic, it must not stop training.
            reason = error_in_a_line(error)
        else:
            return
        self._say(module, backend, tensors, reason)

    def _say(self, module: nn.Module | None, backend: str, tensors: Sequence[Any], reason: str) -> None:
        plain = [x for x in tensors if isinstance(x, Tensor) and why_unseen(x) is None]
        with Unobserved():
            self._on_unmeasured(module, backend, [list(x.shape) for x in plain], reason)


def _not_by_its_function(_module: nn.Module | None) -> Seen:
    raise NotMeasuredError("a kernel of scaled_dot_product_attention, not called by it")


def in_backward() -> bool:
    """Whether autograd runs: what is called then is a forward pass recomputed by checkpointing."""
    return torch._C._current_graph_task_id() != -1
