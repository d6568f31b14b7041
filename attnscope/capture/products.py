"""Products of activations, remembered for a moment: the two that attention written by hand is made of.

q kᵀ gives the logits, and the weights times v the output. Which axis the second one sums over are the keys: a softmax along
any other one is a mistake, and a softmax that no such product follows is no attention.

Shape key: T query position, S key position, K d_head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """One side of a product.

    Attributes:
        x: as it was given.
        batch: where it has each batch axis of the product; None = it has it not.
        free: its axis that the product keeps beside those.
        summed: its axis that the product sums over.
    """

    x: Tensor
    batch: tuple[int | None, ...]
    free: int
    summed: int

    @property
    def sizes(self) -> torch.Size:
        """Of its batch axes; 1 where it has none."""
        return torch.Size(1 if axis is None else self.x.shape[axis] for axis in self.batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """Of two activations that have batch axes.

    Attributes:
        left: whose free axis comes first in the product.
        right: the other side.
        axes: where in the product the free axes of left and right are.
    """

    left: Operand
    right: Operand
    axes: tuple[int, int]

    @property
    def ends(self) -> tuple[int, int]:
        """Sizes of the free axes."""
        return self.left.x.shape[self.left.free], self.right.x.shape[self.right.free]

    @property
    def batch(self) -> torch.Size:
        """Sizes of the batch axes."""
        return torch.broadcast_shapes(self.left.sizes, self.right.sizes)

    def rows(self, side: Operand) -> Tensor:
        """An operand as (..., T or S, K), with all batch axes, cut from its graph."""
        there = [axis for axis in side.batch if axis is not None]
        x = side.x.detach().permute([*there, side.free, side.summed])
        for at, axis in enumerate(side.batch):
            if axis is None:
                x = x.unsqueeze(at)
        return x.expand(*self.batch, *x.shape[-2:])


def matrix_product(left: object, right: object) -> Product | None:
    """Left @ right, (..., T, K) and (..., K, S); None where one of them is no activation."""
    if not (is_activation(left) and is_activation(right)):
        return None
    n = max(left.dim(), right.dim())

    def operand(x: Tensor, free: int, summed: int) -> Operand:
        missing = n - x.dim()
        batch = (None,) * missing + tuple(range(x.dim() - 2))
        return Operand(x=x, batch=batch, free=x.dim() - free, summed=x.dim() - summed)

    return Product(left=operand(left, 2, 1), right=operand(right, 1, 2), axes=(n - 2, n - 1))


def einsum_product(equation: str, operands: Sequence[object]) -> Product | None:
    """An einsum of two activations that sums over one axis, as "b h i d, b h j d -> b h i j"; None where it is another."""
    if len(operands) != 2:
        return None
    first, second = operands
    if not (is_activation(first) and is_activation(second)):
        return None
    terms = _letters(equation, (first.dim(), second.dim()))
    if terms is None:
        return None
    of_first, of_second, out = terms
    summed = [axis for axis in of_first if axis in of_second and axis not in out]
    free = _free(of_first, of_second, out), _free(of_second, of_first, out)
    if len(summed) != 1 or free[0] is None or free[1] is None:
        return None
    batch = [axis for axis in out if axis not in free]
    if set(of_first + of_second) != {*batch, *free, *summed}:
        return None
    sides = []
    for x, term, kept in ((first, of_first, free[0]), (second, of_second, free[1])):
        at = tuple(term.index(axis) if axis in term else None for axis in batch)
        side = Operand(x=x, batch=at, free=term.index(kept), summed=term.index(summed[0]))
        sides.append((out.index(kept), side))
    (left_at, left), (right_at, right) = sorted(sides, key=lambda each: each[0])
    return Product(left=left, right=right, axes=(left_at, right_at))


def _free(term: str, other: str, out: str) -> str | None:
    """The axis that only this operand has; of several (groups of heads) the one among the last two of the result."""
    own = [axis for axis in term if axis not in other and axis in out]
    if len(own) > 1:
        own = [axis for axis in own if axis in out[-2:]]
    return own[0] if len(own) == 1 else None


def _letters(equation: str, n_axes: tuple[int, int]) -> tuple[str, str, str] | None:
    """The axes of both operands and of the result, a letter each, also where the equation has an ellipsis."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    n_unnamed = [n - len(each.replace("...", "")) for n, each in zip(n_axes, terms, strict=True)]
    unnamed = "".join(chr(0x100 + n) for n in range(max(n_unnamed)))  # no letters of an equation
    named = []
    for n, term in zip(n_unnamed, terms, strict=True):
        if n < 0 or (n > 0 and "..." not in term):
            return None
        named.append(term.replace("...", unnamed[len(unnamed) - n :]))
    if not arrow:  # what stands once, in alphabetical order
        every = "".join(terms).replace("...", "")
        out = "..." + "".join(sorted(axis for axis in every if every.count(axis) == 1))
    whole = named[0], named[1], out.replace("...", unnamed)
    if any(len(set(term)) != len(term) for term in whole):  # a diagonal
        return None
    return whole


def is_activation(x: object) -> TypeGuard[Tensor]:
    """Whether it has the axes of one, and is no parameter."""
    return isinstance(x, Tensor) and not isinstance(x, nn.Parameter) and x.dim() >= 3 and x.is_floating_point()
