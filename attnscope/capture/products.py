"""Products of activations, remembered for a moment: where the logits of hand-written attention came from.

Shape key: B batch, H head, T query position, S key position, K d_head.
"""

from collections import deque
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

KEPT = 6  # products; scores, and perhaps relative positions, stand between q kᵀ and its softmax


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """left @ right, both with at least one batch axis: (..., T, K) and (..., K, S)."""

    left: Tensor
    right: Tensor

    @property
    def batch(self) -> torch.Size:
        """The batch axes of the product."""
        return torch.broadcast_shapes(self.left.shape[:-2], self.right.shape[:-2])

    def q(self) -> Tensor:
        """(..., T, K) with all batch axes."""
        return self.left.detach().expand(*self.batch, *self.left.shape[-2:])

    def k(self) -> Tensor:
        """(..., S, K) with all batch axes."""
        keys = self.right.detach().mT
        return keys.expand(*self.batch, *keys.shape[-2:])


class Products:
    """The last few products.

    Invariant: `forget` leaves no reference to a tensor of the script.
    """

    def __init__(self) -> None:
        self._last: deque[Product] = deque(maxlen=KEPT)

    def remember(self, left: object, right: object) -> None:
        """Keep left @ right if both are activations."""
        if _is_activation(left) and _is_activation(right):
            self._last.append(Product(left=left, right=right))

    def remember_einsum(self, equation: object, operands: tuple[object, ...]) -> None:
        """Keep an einsum of two activations over one axis, as in "b h i d, b h j d -> b h i j"."""
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = tuple(operands[0])
        if not isinstance(equation, str) or len(operands) != 2 or "..." in equation:
            return
        inputs, _, out = equation.replace(" ", "").partition("->")
        first, _, second = inputs.partition(",")
        if len(out) < 3 or not all(map(_is_activation, operands)):
            return
        t, s = out[-2], out[-1]
        if t in second or s in first:
            first, second, operands = second, first, operands[::-1]
        summed = [axis for axis in first if axis in second and axis not in out]
        if len(summed) != 1 or t not in first or s not in second:
            return
        batch = out[:-2]
        left, right = operands
        assert isinstance(left, Tensor) and isinstance(right, Tensor)
        if set(first) - set(batch) - {t, *summed} or set(second) - set(batch) - {s, *summed}:
            return
        self._last.append(
            Product(
                left=_arranged(left, first, [*batch, t, *summed]),
                right=_arranged(right, second, [*batch, *summed, s]),
            )
        )

    def behind(self, z: Tensor) -> Product | None:
        """The latest product that gives as many numbers as `z`, row by row; None if there is none."""
        for product in reversed(self._last):
            n_rows = product.batch.numel() * product.left.shape[-2]
            ends = (product.left.shape[-2], product.right.shape[-1])
            if ends == z.shape[-2:] and n_rows == z[..., 0].numel():
                return product
        return None

    def forget(self) -> None:
        """Let go of them."""
        self._last.clear()


def _is_activation(x: object) -> TypeGuard[Tensor]:
    return (
        isinstance(x, Tensor)
        and not isinstance(x, nn.Parameter)
        and x.dim() >= 3
        and x.is_floating_point()
    )


def _arranged(x: Tensor, axes: str, wanted: list[str]) -> Tensor:
    """Axes in this order; one that is absent has size 1."""
    there = [axis for axis in wanted if axis in axes]
    x = x.permute([axes.index(axis) for axis in there])
    for at, axis in enumerate(wanted):
        if axis not in axes:
            x = x.unsqueeze(at)
    return x
