"""Whether the input of a block reaches its output without passing a weight: residual connections, read from the autograd graph.

From the output of a block a path of additions, norms, gates and views leads back to its input where that is carried on. Where
each path ends at a matrix of weights, what that puts out stands in place of the stream. Functions that are not known to be
one or the other tell nothing, and then nothing is said. Only Python objects are looked at, and none is kept.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attnscope.runs.probe_events import InputCarried

FIRST_STEPS = 2  # in which blocks are looked at
MOST_FUNCTIONS = 2000  # of a block
MOST_VIEWS = 6  # between a matrix of weights and its product

# What a stream may pass on its way through a block; it is carried on by whatever does not mix its features with weights.
_VIEWS = {
    "View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "T", "Expand", "Unsqueeze", "Squeeze", "Clone", "ToCopy",
    "Contiguous", "Alias", "Slice", "Select", "Split", "SplitWithSizes", "Unbind",
}  # fmt: skip
_JOINS = {"Add", "Sub", "Lerp", "Cat", "Stack", "Addcmul"}
_OTHERS = {
    "Mul", "Div", "Neg", "Pow", "Rsqrt", "Sqrt", "Mean", "Var", "VarMean", "Sum", "Exp", "MaskedFill", "Where",
    "NativeLayerNorm", "FusedRmsNorm", "NativeDropout", "FusedDropout",
    "Relu", "Gelu", "Silu", "Tanh", "Sigmoid", "Softplus",
}  # fmt: skip
_PASSES = _VIEWS | _JOINS | _OTHERS
_PRODUCTS = {"Addmm", "Mm", "Linear"}
_KIND = re.compile(r"Backward\d*$")


class Carriers:
    """Looks at each block once, in the first steps.

    Invariant: nothing of the script's graph is kept.
    """

    def __init__(self, on_event: Callable[..., None]) -> None:
        self._on_event = on_event
        self._looked: set[int] = set()

    def look(self, step: int, layer: int, x: Tensor, places: Sequence[int]) -> None:
        """A block has put out `x`, and was given streams of its shape, made at these places in the graph."""
        if step >= FIRST_STEPS or layer in self._looked or not places or min(places) < 0:
            return
        self._looked.add(layer)
        found = carried(x, places)
        if found is not None:
            self._on_event(InputCarried(layer=layer, attention=found[0], mlp=found[1]), step=step)


def place_in_graph(x: Tensor) -> int:
    """The number of the function that made it: later ones have larger numbers; -1 where there is none."""
    function: Any = x.grad_fn
    return -1 if function is None else int(function._sequence_nr())


def carried(x: Tensor, places: Sequence[int]) -> tuple[bool, bool | None] | None:
    """Whether attention, and what comes after it, are added to the stream of a block.

    Args:
        x: what the block put out.
        places: in the graph, of what it was given.

    Returns:
        Of attention, and of the MLP, None for it where there is none; None where it cannot be told.
    """
    if x.grad_fn is None:
        return None
    inputs, oldest, size = frozenset(places), min(places), x.shape[-1]
    ends: list[Any] = []  # matrices of weights at which paths end
    is_clear = True
    passed = 0
    for function in _walk(x.grad_fn, lambda function: _kind(function) in _PASSES and _place(function) not in inputs):
        passed += 1
        kind, place = _kind(function), _place(function)
        if place in inputs:
            return True, True
        if kind == "AccumulateGrad":
            continue
        if place < oldest:
            is_clear = False
        elif kind in _PASSES:
            is_clear &= not _may_join(function, size)
        elif _has_weights(function, size):
            ends.append(function)
        else:
            is_clear = False
    if not is_clear or not ends or passed >= MOST_FUNCTIONS:
        return None
    return _which(x.grad_fn, ends, inputs, oldest)


def _which(start: Any, ends: Sequence[Any], inputs: frozenset[int], oldest: int) -> tuple[bool, bool | None] | None:
    """Of a block that does not carry its input on: whether attention does, and the MLP."""

    def is_within(function: Any) -> bool:
        return _place(function) > oldest and _place(function) not in inputs

    within = [*_walk(start, is_within)]
    products = [function for function in within if _kind(function) in _PRODUCTS and _has_weights(function)]
    projections = [function for function in products if _follows_attention(function, oldest)]
    if len(within) >= MOST_FUNCTIONS or len(projections) != 1:
        return None
    (projection,) = projections
    if projection in ends:
        return False, True if any(_place(each) > _place(projection) for each in products) else None
    around = _walk(start, lambda function: function is not projection and is_within(function))
    return any(_place(function) in inputs for function in around), False


def _may_join(function: Any, size: int) -> bool:
    """Whether it joins streams of which one has no gradient, and may be the input."""
    is_stream = tuple(function._input_metadata[0].shape)[-1:] == (size,)
    return is_stream and _kind(function) in _JOINS and any(before is None for before, _ in function.next_functions)


def _follows_attention(product: Any, oldest: int) -> bool:
    """Whether it projects what attention puts out: nothing with weights stands between them."""

    def goes_on(function: Any) -> bool:
        is_other = function is not product and _kind(function) in _PRODUCTS and _has_weights(function)
        return not is_other and not _attends(function) and _place(function) > oldest

    return any(_attends(function) for function in _walk(product, goes_on))


def _attends(function: Any) -> bool:
    kind = _kind(function)
    return "Softmax" in kind or "Attention" in kind


def _walk(start: Any, goes_on: Callable[[Any], bool]) -> Iterator[Any]:
    """The functions before `start`, and itself, and those before each that `goes_on`; at most MOST_FUNCTIONS."""
    seen = {start}
    waiting = [start]
    while waiting and len(seen) < MOST_FUNCTIONS:
        function = waiting.pop()
        yield function
        if goes_on(function):
            new = {before for before, _ in function.next_functions if before is not None} - seen
            seen |= new
            waiting += new


def _has_weights(function: Any, size: int | None = None) -> bool:
    """Whether it multiplies by a matrix that is a parameter, and has `size` rows or columns."""
    if _kind(function) not in _PRODUCTS:
        return False
    for before, _ in function.next_functions:
        for _ in range(MOST_VIEWS):
            if before is None or _kind(before) not in _VIEWS:
                break
            before = before.next_functions[0][0]
        if before is not None and _kind(before) == "AccumulateGrad":
            shape: torch.Size = before.variable.shape
            if len(shape) == 2 and (size is None or size in shape):
                return True
    return False


def _kind(function: Any) -> str:
    name = function.name().rpartition("::")[2]
    return name if name == "AccumulateGrad" else _KIND.sub("", name)


def _place(function: Any) -> int:
    return int(function._sequence_nr())
