"""Finding one's way in a graph of torch.compile: what stands before and after a node, and what it was multiplied by."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

MOST_REPLAYED = 32  # nodes between q kᵀ and its softmax, those of masks included
DEPTH = 12  # nodes from a softmax back to q kᵀ, and from q back to what scaled it
PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
OPERANDS = {"matmul": ("tensor1", "other"), "bmm": ("input", "mat2"), "baddbmm": ("batch1", "batch2")}
MULTIPLIES, DIVIDES = ("mul", "imul", "mul_"), ("truediv", "itruediv", "div", "div_")
VIEWS = ("view", "reshape", "transpose", "permute", "contiguous", "unsqueeze", "expand", "flatten", "unflatten", "to", "float")  # fmt: skip


def operands_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Both sides of a product, however they were given."""
    first, second = OPERANDS.get(name, ("", ""))
    given = list(args) + [kwargs[key] for key in (first, second) if key in kwargs]
    return given[-2], given[-1]


def is_multiplied(node: fx.Node) -> bool:
    """Whether a product of activations is made of what a softmax gives: values' product of attention."""
    level = [node]
    for _ in range(DEPTH):
        level = list(dict.fromkeys(user for each in level for user in each.users))
        if any(name_of(each) in PRODUCTS and len(with_axes(each.all_input_nodes, 3)) >= 2 for each in level):  # fmt: skip
            return True
    return False


def product_behind(z: fx.Node) -> fx.Node | None:
    """The nearest product of two activations on the way back from z."""
    level = [z]
    for _ in range(DEPTH):
        for node in level:
            if name_of(node) in PRODUCTS and len(with_axes(node.all_input_nodes, 3)) >= 2:
                return node
        level = list(dict.fromkeys(x for node in level for x in node.all_input_nodes))
    return None


def between(product: fx.Node, z: fx.Node) -> set[fx.Node]:
    """What must be computed again: all that z depends on, down to the product's operands and the graph's inputs.

    What would be more than MOST_REPLAYED nodes, or change something in place that we did not compute, is an input instead.
    """
    chain = _path(product, z)
    cone = set(chain)
    ahead = [x for node in chain if node is not product for x in node.all_input_nodes]
    while ahead and len(cone) < MOST_REPLAYED:
        node = ahead.pop(0)
        if node in cone or node.op not in ("call_function", "call_method"):
            continue
        if name_of(node).endswith("_") or name_of(node) in PRODUCTS:
            continue
        cone.add(node)
        ahead += node.all_input_nodes
    return cone


def _path(product: fx.Node, z: fx.Node) -> list[fx.Node]:
    """Nodes from the product to z."""
    reaches = {product: True}

    def from_product(node: fx.Node, depth: int) -> bool:
        if node not in reaches:
            reaches[node] = False
            below = [from_product(x, depth - 1) for x in node.all_input_nodes if depth > 0]
            reaches[node] = any(below)
        return reaches[node]

    from_product(z, DEPTH)
    return [node for node, reached in reaches.items() if reached]


def constant_factor(node: object) -> float:
    """What a tensor was last multiplied by, through views; NaN where that is learned."""
    factor = 1.0
    for _ in range(DEPTH):
        if not isinstance(node, fx.Node) or not node.args:
            break
        name, first = name_of(node), node.args[0]
        other = node.args[1] if len(node.args) > 1 else None
        if name in MULTIPLIES or name in DIVIDES:
            if name in MULTIPLIES and isinstance(first, int | float):
                first, other = other, first
            if isinstance(other, fx.Node):
                return math.nan if _is_temperature(other, node) else factor
            if not isinstance(other, int | float):
                break
            factor = factor * other if name in MULTIPLIES else factor / other
        elif name not in VIEWS:
            break
        node = first
    return factor


def _is_temperature(node: fx.Node, whole: fx.Node) -> bool:
    """Whether many queries or keys have all their numbers multiplied by the same one, as `seen.scalar_factor` has it."""
    value, product = node.meta.get("example_value"), whole.meta.get("example_value")
    if not isinstance(value, Tensor) or not isinstance(product, Tensor):
        return False
    return value.dim() == 0 or (value.shape[-1] == 1 and value.numel() < product[..., 0].numel())


def known_factor(*factors: float) -> float | None:
    """The product of factors; None where one is not known."""
    product = math.prod(factors)
    return None if math.isnan(product) else product


def is_number(node: fx.Node) -> bool:
    """Whether it is a size or the like, which a graph of dynamic shapes takes as an input."""
    value = node.meta.get("example_value")
    return isinstance(value, int | float | torch.SymInt | torch.SymFloat)


def with_axes(nodes: list[fx.Node], n: int) -> list[fx.Node]:
    """Those that stand for activations of at least n axes."""
    values = [node.meta.get("example_value") for node in nodes]
    return [
        node
        for node, value in zip(nodes, values, strict=True)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.dim() >= n
    ]


def name_of(node: fx.Node) -> str:
    """Of the function or method that it calls; empty where it calls none."""
    if node.op == "call_method":
        return str(node.target).strip("_") if node.target == "__matmul__" else str(node.target)
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def returns_first(graph: fx.Graph) -> bool:
    """Whether a graph gives back its first input."""
    nodes = list(graph.nodes)
    return bool(nodes[-1].args[0] is nodes[0])
