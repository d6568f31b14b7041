"""Attention written by hand: a softmax between two products of activations.

The softmax alone does not tell what it is: a classifier has one, too. It is kept until a product sums over it, which then
says where its keys are. What sums over it is the values' product; what made the logits, if it was seen, that of q and k.

Shape key: B batch, H head, T query position, S key position, K d_head.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from attnscope.capture.names import batch_and_heads
from attnscope.capture.products import Operand, Product
from attnscope.capture.seen import Computed, NotMeasuredError, Seen, factor_of_both

KEPT = 6  # products; scores, and perhaps relative positions, stand between q kᵀ and its softmax
WAITING = 4  # softmaxes; attention may subtract one from another
SUMS_TO_ONE = 1e-3  # how exactly weights do that were normalized again


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxCall:
    """A call of softmax that may turn out to be one of attention.

    Attributes:
        module: whose method called it.
        z: its input.
        p: its output.
        dim: its axis, from the front.
        products: those before it, the latest last.
    """

    module: nn.Module | None
    z: Tensor
    p: Tensor
    dim: int
    products: tuple[Product, ...]


ModuleOf = Callable[[], nn.Module | None]
# Called with a softmax that was found to be one of attention and how to see it.
OnFound = Callable[[SoftmaxCall, Callable[[], Seen]], None]


class ByHand:
    """Puts products and softmaxes together.

    Invariant: `forget` leaves no reference to a tensor of the script.
    """

    def __init__(self, on_found: OnFound) -> None:
        self._on_found = on_found
        self._products: deque[Product] = deque(maxlen=KEPT)
        self._waiting: deque[SoftmaxCall] = deque(maxlen=WAITING)

    def add_product(self, product: Product) -> None:
        """A product was computed: it may be one of weights and values, or one of queries and keys."""
        for side in (product.left, product.right) if self._waiting else ():
            found = [(each, at) for each in self._waiting if (at := _weights_in(each, side))]
            if found:
                self.forget()
                for softmax, (queries, keys) in found:
                    self._on_found(softmax, partial(_seen, softmax, side, queries, keys))
                return
        self._products.append(product)

    def add_softmax(self, z: Tensor, p: Tensor, dim: int, module_of: ModuleOf) -> None:
        """A softmax of z along an axis was computed: it may be one of attention, if so, then of this module."""
        products = tuple(each for each in self._products if _may_give(each, z))
        if products or z.dim() >= 4:
            self._waiting.append(SoftmaxCall(module=module_of(), z=z, p=p, dim=dim % z.dim(), products=products))

    def forget(self) -> list[SoftmaxCall]:
        """Let go of them; the softmaxes that no product summed over."""
        waiting = list(self._waiting)
        self._products.clear()
        self._waiting.clear()
        return waiting


def _may_give(product: Product, z: Tensor) -> bool:
    """Whether z has as many numbers as the product, or more of them in as many rows (sinks, other keys beside these)."""
    n_rows, n_columns = product.batch.numel() * product.ends[0], product.ends[1]
    is_part = z.shape[-1] > n_columns and z[..., 0].numel() == n_rows
    return is_part or n_rows * n_columns == z.numel()


def _weights_in(softmax: SoftmaxCall, side: Operand) -> tuple[int, int] | None:
    """Axes of queries and keys in the weights, if this operand is them, or some of their columns; None if it is not."""
    p, x = softmax.p, side.x
    n, n_x = p.dim(), x.dim()
    ends = {n_x - 2, n_x - 1}
    axes = side.free - n_x + n, side.summed - n_x + n
    if n == n_x and p.shape == x.shape and not _is_transposed(p, x):
        return axes
    # Axes before the last two may have been joined or parted since.
    if {side.free, side.summed} != ends or p[..., 0, 0].numel() != x[..., 0, 0].numel():
        return None
    if p.shape[-2:] == x.shape[-2:]:
        return axes[::-1] if _is_transposed(p, x) else axes
    if p.shape[-2:] == x.shape[-2:][::-1]:
        return axes[::-1]
    # Sinks and the like are cut off: as many columns are left as q kᵀ gave.
    n_keys = {product.ends[1] for product in softmax.products}
    is_cut = axes == (n - 2, n - 1) and softmax.dim == n - 1 and x.shape[-2] == p.shape[-2]
    return axes if is_cut and x.shape[-1] in n_keys else None


def _is_transposed(p: Tensor, x: Tensor) -> bool:
    """Of square weights only their memory tells which axis is which; a copy of them (dropout) keeps its layout."""
    if p.shape[-1] != p.shape[-2]:
        return False
    return (p.stride(-1) > p.stride(-2)) != (x.stride(-1) > x.stride(-2))


def _seen(softmax: SoftmaxCall, side: Operand, queries: int, keys: int) -> Seen:
    """What is seen of attention whose weights are an operand of the values' product."""
    if softmax.dim != keys:
        sums = side.x.detach().sum(side.summed)
        if bool((sums - 1).abs().max() < SUMS_TO_ONE):
            raise NotMeasuredError(
                f"softmax over axis {softmax.dim} of {softmax.p.dim()}, normalized over the keys after it"
            )
        which = "the queries' axis" if softmax.dim == queries else f"axis {softmax.dim} of {softmax.p.dim()}"  # fmt: skip
        raise NotMeasuredError(
            f"softmax over {which}: weights of one query do not sum to 1 over its keys (axis {keys})"
        )
    return seen_by_hand(softmax.z, softmax.products, softmax.module, axes=(queries, keys))


def seen_by_hand(
    logits: Tensor,
    products: Sequence[Product],
    module: nn.Module | None,
    *,
    axes: tuple[int, int],
    factor: float | None = None,
) -> Seen:
    """Attention whose logits the code computed itself.

    Args:
        logits: what the softmax was given.
        products: those that may have made it.
        module: whose call it is.
        axes: of queries and keys, from the front.
        factor: what q and k were multiplied by before, where that is known.
    """
    n_axes = logits.dim()
    z = logits.detach().permute([*sorted(set(range(n_axes)) - set(axes)), *axes])
    found = _queries_and_keys(products, z, (axes[0] - n_axes, axes[1] - n_axes))
    d_head = None if found is None else found[1].x.shape[found[1].summed]
    grid = batch_and_heads(z.shape[:-2], module, d_head)
    q = k = None
    if found is not None:
        product, left, right = found
        q = product.rows(left).reshape(*grid, z.shape[-2], -1)
        k = product.rows(right).reshape(*grid, z.shape[-1], -1)
        factor = factor_of_both(left.x, right.x) if factor is None else factor
    return Seen(
        logits=Computed(z=z.reshape(*grid, *z.shape[-2:]), q=q, k=k),
        factor=factor,
        mask="in the logits",
        backend="eager",
    )


def _queries_and_keys(
    products: Sequence[Product], z: Tensor, axes: tuple[int, int]
) -> tuple[Product, Operand, Operand] | None:
    """The latest product that gives as many numbers as z (..., T, S), with its sides of queries and keys.

    `axes` are those of queries and keys in the logits, from the end.
    """
    for product in reversed(products):
        n_axes = len(product.batch) + 2
        sides = dict(zip((at - n_axes for at in product.axes), (product.left, product.right), strict=True))  # fmt: skip
        if sides.keys() != set(axes) or product.batch.numel() != z[..., 0, 0].numel():
            continue
        queries, keys = sides[axes[0]], sides[axes[1]]
        if (queries.x.shape[queries.free], keys.x.shape[keys.free]) == z.shape[-2:]:
            return product, queries, keys
    return None
