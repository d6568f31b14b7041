"""Attention inside graphs of torch.compile: a probe stands before each softmax and each fused call that Inductor is given.

The probe is an operator without a result that declares to write into a buffer, so that it is not removed as dead code. It
takes what the graph holds in memory anyway: q, k and the mask. Logits that the graph computes are computed again from
them, outside of the graph and at measured steps only, so that what Inductor fuses stays fused.

Shape key: B batch, H head, T query position, S key position, K d_head.
"""

import logging
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnscope.watch.attention import NotMeasuredError, Seen
from attnscope.watch.capture import seen_by_hand, seen_fused
from attnscope.watch.kernels import Blocks, flex_call
from attnscope.watch.names import module_with_id, n_heads_of
from attnscope.watch.products import Products

MOST_REPLAYED = 32  # nodes between q kᵀ and its softmax, those of masks included
DEPTH = 12  # nodes from a softmax back to q kᵀ, and from q back to what scaled it

FUSED, BY_HAND, FLEX = "compiled sdpa", "compiled eager", "compiled flex"
SINK = "_attnscope_sink"
EVERYTHING = 1 << 30  # size of the one block that FlexAttention makes where there is no mask
FOREIGN = ("flash_attn", "xformers")  # whose operators take what we cannot read
PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
VIEWS = ("view", "reshape", "transpose", "permute", "contiguous", "unsqueeze", "expand", "flatten", "unflatten", "to", "float")  # fmt: skip

# Called for each call of a probe, with the module, the backend, the tensors it was given, and how to see from them.
OnCall = Callable[[nn.Module | None, str, list[Tensor], Callable[[], Seen]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One attention call in a compiled graph.

    Attributes:
        module: whose forward it is in; None where there is none, or no more.
        backend: FUSED, BY_HAND or FLEX.
        see: what was seen, from the tensors that the probe was given.
    """

    module: Callable[[], nn.Module | None]
    backend: str
    see: Callable[[list[Tensor]], Seen]


class Probes:
    """Puts probes into every graph that is compiled while it is installed; one at a time.

    Invariant: graphs outlive us; their probes do nothing once `remove` was called.
    """

    def __init__(self, on_call: OnCall, on_failure: Callable[[str], object]) -> None:
        import torch._inductor.config as config  # heavy, and only scripts that compile need it

        self._config = config
        self._before = config.pre_grad_custom_pass
        self._log = logging.getLogger("torch._inductor.codecache")
        self._log.addFilter(_not_of_our_pass)
        _told.on_call, _told.on_failure = on_call, on_failure
        _told.passed_on = self._before if callable(self._before) else None
        config.pre_grad_custom_pass = _insert_probes

    def remove(self) -> None:
        """Leave Inductor as it was."""
        self._config.pre_grad_custom_pass = self._before
        self._log.removeFilter(_not_of_our_pass)
        _told.on_call = None


@dataclass(slots=True)
class _Told:
    """Who is told of calls, and the script's own pass over graphs. Inductor copies its settings: a pass is a plain function."""

    on_call: OnCall | None = None
    on_failure: Callable[[str], object] = lambda _reason: None
    passed_on: Callable[[fx.Graph], object] | None = None


_told = _Told()
_SITES: list[Site] = []


def _insert_probes(graph: fx.Graph) -> None:
    """What Inductor calls with each graph, before it is differentiated."""
    if _told.passed_on is not None:
        _told.passed_on(graph)
    for node in list(graph.nodes):
        if str(getattr(node.target, "namespace", "")).startswith(FOREIGN):
            _told.on_failure(
                f"{node.target} in a compiled graph: it can be watched in eager calls only"
            )
        try:
            found = _fused_at(node) or _flex_at(node) or _softmax_at(node)
            if found is not None:
                site, inputs = found
                _SITES.append(site)
                _insert(graph, node, len(_SITES) - 1, inputs)
        except Exception as error:
            # A graph that we do not understand must compile as it would without us.
            reason = f"{type(error).__name__}: {error}"[:200]
            _told.on_failure(f"a compiled graph with {node.format_node()}: {reason}"[:300])
    _say_where_sinks_come_from(graph.owning_module)


@torch.library.custom_op("attnscope::probe", mutates_args=("sink",))
def _probe(sink: Tensor, site: int, tensors: list[Tensor]) -> None:
    if _told.on_call is not None:
        at = _SITES[site]
        detached = [x.detach() for x in tensors]
        _told.on_call(at.module(), at.backend, detached, lambda: at.see(detached))


@_probe.register_fake
def _probe_fake(sink: Tensor, site: int, tensors: list[Tensor]) -> None:
    return None


def _insert(graph: fx.Graph, before: fx.Node, site: int, inputs: list[fx.Node]) -> None:
    owner = graph.owning_module
    assert owner is not None
    device = inputs[0].meta["example_value"].device
    if not hasattr(owner, SINK):
        owner.register_buffer(SINK, torch.zeros(1, device=device))
    with graph.inserting_before(before):
        sink = graph.get_attr(SINK)
        tensors = [_as_tensor(each, device) if _is_number(each) else each for each in inputs]
        graph.call_function(torch.ops.attnscope.probe.default, (sink, site, tensors))


def _say_where_sinks_come_from(owner: fx.GraphModule | None) -> None:
    """As Dynamo does of each buffer, also of those in the graphs that a checkpoint has of its own."""
    sources = getattr(owner, "_param_name_to_source", None)
    if owner is None or sources is None:
        return
    from torch._dynamo.source import ConstantSource

    for name, _ in owner.named_buffers():
        if name.endswith(SINK):
            sources[name] = ConstantSource(name)


def _as_tensor(number: fx.Node, device: torch.device) -> fx.Node:
    is_whole = isinstance(number.meta["example_value"], torch.SymInt | int)
    how: dict[str, Any] = {"dtype": torch.int64 if is_whole else torch.float64, "device": device}
    return number.graph.call_function(torch.scalar_tensor, (number,), how)


def _fused_at(node: fx.Node) -> tuple[Site, list[fx.Node]] | None:
    if _name(node) != "scaled_dot_product_attention":
        return None
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    given.pop("value", None)
    tensors = {name: x for name, x in given.items() if isinstance(x, fx.Node)}
    numbers: dict[str, Any] = {name: x for name, x in given.items() if name not in tensors}
    factor = _constant_factor(given["query"]) * _constant_factor(given["key"])

    def see(found: list[Tensor]) -> Seen:
        named: dict[str, Any] = dict(zip(tensors, found, strict=True))
        seen = seen_fused(value=named["key"], factor=factor, **named, **numbers)
        return replace(seen, backend=FUSED)

    return Site(module=_module_of(node), backend=FUSED, see=see), list(tensors.values())


def _flex_at(node: fx.Node) -> tuple[Site, list[fx.Node]] | None:
    """FlexAttention, whose functions of positions are graphs of their own here."""
    if _name(node) != "flex_attention":
        return None
    args: tuple[Any, ...] = node.args
    query, key, _, score, block_mask, scale, _, *more = args
    counts, indices, full_counts, full_indices = block_mask[2:6]
    *_, size_q, size_k, mask = block_mask
    taken: Any = (query, key, scale, *more, (counts, full_counts), (indices, full_indices))
    inputs: list[fx.Node] = []
    fx.map_arg(taken, lambda each: inputs.append(each) if each not in inputs else None)
    factor = _constant_factor(query) * _constant_factor(key)
    graphs = node.graph.owning_module
    score_graph, mask_graph = (getattr(graphs, each.target) for each in (score, mask))

    def see(found: list[Tensor]) -> Seen:
        values = {
            each: x.item() if _is_number(each) else x for each, x in zip(inputs, found, strict=True)
        }
        given: Any = fx.map_arg(taken, values.__getitem__)
        q, k, scale, score_more, mask_more, counts, indices = given
        size = (int(size_q), int(size_k))
        blocks = Blocks(counts=counts, indices=indices, size=size, n_keys=k.shape[-2])
        changes, masks = not _returns_first(score_graph.graph), size_k < EVERYTHING
        return flex_call(
            q,
            k,
            scale,
            (lambda *at: score_graph(*at, *score_more)) if changes else None,
            (lambda *at: mask_graph(*at, *mask_more)) if masks else None,
            blocks=blocks.of_rows if masks else None,
            factor=factor,
            backend=FLEX,
        )

    return Site(module=_module_of(node), backend=FLEX, see=see), inputs


def _softmax_at(node: fx.Node) -> tuple[Site, list[fx.Node]] | None:
    if _name(node) != "softmax":
        return None
    z = node.args[0] if node.args else node.kwargs.get("input")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if not isinstance(z, fx.Node):
        return None
    n_axes = z.meta["example_value"].dim()
    if n_axes < 3 or dim not in (-1, n_axes - 1):
        return None
    product = _product_behind(z)
    module = _module_of(node)
    if product is None:
        return None if n_axes < 4 else (_unseen(module), [z])
    order = {each: place for place, each in enumerate(node.graph.nodes)}
    cone = sorted(_between(product, z), key=order.__getitem__)
    operands = [each for each in product.all_input_nodes if each not in cone]
    inputs = list(dict.fromkeys(operands + [x for each in cone for x in each.all_input_nodes if x not in cone]))  # fmt: skip
    factor = 1.0
    for each in operands[-2:]:  # baddbmm has what it adds first
        factor *= _constant_factor(each)

    def see(found: list[Tensor]) -> Seen:
        z_value, products = _replay(cone, dict(zip(inputs, found, strict=True)), product, z)
        seen = products.behind(z_value)
        if seen is None:
            raise NotMeasuredError("the product before the softmax is not one of queries and keys")
        return replace(
            seen_by_hand(z_value, seen, n_heads_of(module()), factor=factor), backend=BY_HAND
        )

    return Site(module=module, backend=BY_HAND, see=see), inputs


def _unseen(module: Callable[[], nn.Module | None]) -> Site:
    def see(_found: list[Tensor]) -> Seen:
        raise NotMeasuredError(
            "softmax over 4 axes whose q and k were not seen: no product of activations before it"
        )

    return Site(module=module, backend=BY_HAND, see=see)


def _replay(
    cone: list[fx.Node], values: dict[fx.Node, Any], product: fx.Node, z: fx.Node
) -> tuple[Tensor, Products]:
    """Compute the logits again from what goes into them."""
    products = Products()
    for node in cone:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node is product:
            if _name(node) == "einsum":
                products.remember_einsum(args[0], tuple(args[1:]))
            else:
                products.remember(*args[-2:])
        if node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[z], products


def _product_behind(z: fx.Node) -> fx.Node | None:
    """The nearest product of two activations on the way back from z."""
    level = [z]
    for _ in range(DEPTH):
        for node in level:
            if _name(node) in PRODUCTS and len(_with_axes(node.all_input_nodes, 3)) >= 2:
                return node
        level = list(dict.fromkeys(x for node in level for x in node.all_input_nodes))
    return None


def _between(product: fx.Node, z: fx.Node) -> set[fx.Node]:
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
        if _name(node).endswith("_") or _name(node) in PRODUCTS:
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


def _constant_factor(node: object) -> float:
    """What a tensor was last multiplied by, through views."""
    factor = 1.0
    for _ in range(DEPTH):
        if not isinstance(node, fx.Node) or not node.args:
            break
        name, first = _name(node), node.args[0]
        other = node.args[1] if len(node.args) > 1 else None
        if name in ("mul", "imul", "mul_") and isinstance(other, int | float):
            factor *= other
        elif name in ("truediv", "itruediv", "div", "div_") and isinstance(other, int | float):
            factor /= other
        elif name not in VIEWS:
            break
        node = first
    return factor


def _module_of(node: fx.Node) -> Callable[[], nn.Module | None]:
    """The innermost module whose forward the node is in, that is no bare softmax."""
    for key in reversed(node.meta.get("nn_module_stack") or {}):
        number = str(key).partition("@")[0]
        module = module_with_id(int(number)) if number.isdecimal() else None
        if module is not None and not isinstance(module, nn.Softmax):
            return weakref.ref(module)
    return _caller


def _caller() -> nn.Module | None:
    """The module that calls the compiled function, or is it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_argcount:
            first: Any = frame.f_locals.get(frame.f_code.co_varnames[0])
            if isinstance(first, nn.Module) and not isinstance(first, fx.GraphModule):
                return getattr(first, "_orig_mod", first)
        frame = frame.f_back
    return None


def _returns_first(graph: fx.Graph) -> bool:
    """Whether a graph gives back its first input."""
    nodes = list(graph.nodes)
    return bool(nodes[-1].args[0] is nodes[0])


def _is_number(node: fx.Node) -> bool:
    """Whether it is a size or the like, which a graph of dynamic shapes takes as an input."""
    value = node.meta.get("example_value")
    return isinstance(value, int | float | torch.SymInt | torch.SymFloat)


def _with_axes(nodes: list[fx.Node], n: int) -> list[fx.Node]:
    values = [node.meta.get("example_value") for node in nodes]
    return [
        node
        for node, value in zip(nodes, values, strict=True)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.dim() >= n
    ]


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target).strip("_") if node.target == "__matmul__" else str(node.target)
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def _not_of_our_pass(record: logging.LogRecord) -> bool:
    """Inductor warns that a pass without uuid() is run before its cache is asked, which is what we want."""
    return "pre_grad_custom_pass" not in str(record.msg)
