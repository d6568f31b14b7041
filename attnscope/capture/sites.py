"""What is looked for in the graphs of torch.compile: fused attention, nn.MultiheadAttention, and what is written by hand.

A site says which tensors of the graph a probe must be given, and how to see the call from them. Which module a call is in
is asked anew at each call: Dynamo takes the graph of one block for the next one, if they are alike.

Shape key: B batch, H head, T query position, S key position, D d_model, K d_head.
"""

import inspect
import re
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attnscope.capture.by_hand import seen_by_hand
from attnscope.capture.flex import Blocks, flex_call
from attnscope.capture.fused import seen_fused
from attnscope.capture.graphs import (
    between,
    constant_factor,
    is_multiplied,
    is_number,
    known_factor,
    name_of,
    operands_of,
    product_behind,
    returns_first,
)
from attnscope.capture.names import module_with_id
from attnscope.capture.products import Product, einsum_product, matrix_product
from attnscope.capture.seen import NotMeasuredError, Scaled, Seen, split_mask

_ROOT = re.compile(r"([LG])\['(\w+)'\]")  # a local or global name of the frame that Dynamo compiles
_STEP = re.compile(r"\.([^.\[\]]+)|\[(?:['\"]([^'\"]*)['\"]|(\d+))\]")


FUSED, BY_HAND, FLEX = "compiled sdpa", "compiled eager", "compiled flex"
PROJECTED = "compiled mha"
EVERYTHING = 1 << 30  # size of the one block that FlexAttention makes where there is no mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One attention call in a compiled graph.

    Attributes:
        module: whose forward it is in; None where there is none, or no more. To be asked during the call.
        backend: FUSED, PROJECTED, BY_HAND or FLEX.
        see: what was seen, from the tensors that the probe was given.
    """

    module: Callable[[], nn.Module | None]
    backend: str
    see: Callable[[list[Tensor]], Seen]


def site_at(node: fx.Node) -> tuple[Site, list[fx.Node]] | None:
    """The attention call that a node of a graph is, and what a probe must be given of it; None where it is none."""
    return _fused_at(node) or _projected_at(node) or _flex_at(node) or _softmax_at(node)


def _fused_at(node: fx.Node) -> tuple[Site, list[fx.Node]] | None:
    if name_of(node) != "scaled_dot_product_attention":
        return None
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    given.pop("value", None)
    tensors = {name: x for name, x in given.items() if isinstance(x, fx.Node)}
    numbers: dict[str, Any] = {name: x for name, x in given.items() if name not in tensors}
    factor = known_factor(constant_factor(given["query"]), constant_factor(given["key"]))

    def see(found: list[Tensor]) -> Seen:
        named: dict[str, Any] = dict(zip(tensors, found, strict=True))
        seen = seen_fused(value=named["key"], factor=1.0, **named, **numbers)
        return replace(seen, factor=factor, backend=FUSED)

    return Site(module=_module_of(node), backend=FUSED, see=see), list(tensors.values())


def _projected_at(node: fx.Node) -> tuple[Site, list[fx.Node]] | None:
    """nn.MultiheadAttention, of which Dynamo makes one call: q and k are projected again."""
    if name_of(node) != "multi_head_attention_forward":
        return None
    bound = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    added = [name for name in ("bias_k", "static_k") if given[name] is not None]
    added += ["add_zero_attn"] * bool(given["add_zero_attn"])
    names = ["query", "key", "in_proj_bias", "attn_mask", "key_padding_mask"]
    names += ["q_proj_weight", "k_proj_weight"] if given["use_separate_proj_weight"] else ["in_proj_weight"]  # fmt: skip
    # As the function itself decides: where it can, it takes the word for the mask.
    causal = given["is_causal"] and given["key_padding_mask"] is None and not given["need_weights"]
    if causal:
        names.remove("attn_mask")
    tensors = {name: given[name] for name in names if isinstance(given[name], fx.Node)}
    n_heads = int(given["num_heads"])

    def see(found: list[Tensor]) -> Seen:
        if added:
            raise NotMeasuredError(f"nn.MultiheadAttention with {' and '.join(added)}, compiled")
        return _seen_projected(dict(zip(tensors, found, strict=True)), n_heads, causal=causal)

    return Site(module=_module_of(node), backend=PROJECTED, see=see), list(tensors.values())


def _seen_projected(given: dict[str, Tensor], n_heads: int, *, causal: bool) -> Seen:
    """A call of F.multi_head_attention_forward, of inputs (T, B, D) or (T, D)."""
    if "in_proj_weight" in given:
        w_q, w_k, _ = given["in_proj_weight"].chunk(3)
    else:
        w_q, w_k = given["q_proj_weight"], given["k_proj_weight"]
    b_q, b_k, _ = given["in_proj_bias"].chunk(3) if "in_proj_bias" in given else (None,) * 3
    q, k = (
        F.linear(x.to(w.dtype), w, b).reshape(len(x), -1, n_heads, len(w) // n_heads).permute(1, 2, 0, 3)
        for x, w, b in ((given["query"], w_q, b_q), (given["key"], w_k, b_k))
    )  # fmt: skip
    masks = []
    if causal:
        masks.append(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1))
    if "attn_mask" in given:  # (T, S) or (B H, T, S)
        mask = given["attn_mask"]
        masks.append(mask if mask.dim() == 2 else mask.unflatten(0, (len(q), n_heads)))
    if "key_padding_mask" in given:  # (B, S) or (S,)
        masks.append(given["key_padding_mask"].reshape(len(q), 1, 1, -1))
    visible, bias, kinds = None, None, []
    for mask in masks:
        seen, added, kind = split_mask(~mask if mask.dtype == torch.bool else mask)
        if seen is not None:
            visible = seen if visible is None else visible & seen
        if added is not None:
            bias = added if bias is None else bias + added
        kinds.append(kind)
    return Seen(
        logits=Scaled(q=q, k=k, scale=q.shape[-1] ** -0.5, visible=visible, bias=bias),
        factor=1.0,
        mask="causal" if causal else " and ".join(dict.fromkeys(kinds)) or "none",
        backend=PROJECTED,
    )


def _flex_at(node: fx.Node) -> tuple[Site, list[fx.Node]] | None:
    """FlexAttention, whose functions of positions are graphs of their own here."""
    if name_of(node) != "flex_attention":
        return None
    args: tuple[Any, ...] = node.args
    query, key, _, score, block_mask, scale, _, *more = args
    counts, indices, full_counts, full_indices = block_mask[2:6]
    *_, size_q, size_k, mask = block_mask
    taken: Any = (query, key, scale, *more, (counts, full_counts), (indices, full_indices))
    inputs: list[fx.Node] = []
    fx.map_arg(taken, lambda each: inputs.append(each) if each not in inputs else None)
    factor = known_factor(constant_factor(query), constant_factor(key))
    graphs = node.graph.owning_module
    score_graph, mask_graph = (getattr(graphs, each.target) for each in (score, mask))

    def see(found: list[Tensor]) -> Seen:
        values = {each: x.item() if is_number(each) else x for each, x in zip(inputs, found, strict=True)}
        given: Any = fx.map_arg(taken, values.__getitem__)
        q, k, scale, score_more, mask_more, counts, indices = given
        size = (int(size_q), int(size_k))
        blocks = Blocks(counts=counts, indices=indices, size=size, n_keys=k.shape[-2])
        changes, masks = not returns_first(score_graph.graph), size_k < EVERYTHING
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
    if name_of(node) != "softmax":
        return None
    z = node.args[0] if node.args else node.kwargs.get("input")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if not isinstance(z, fx.Node):
        return None
    n_axes = z.meta["example_value"].dim()
    if n_axes < 3 or dim not in (-1, n_axes - 1):
        return None
    if not is_multiplied(node):
        return None
    product = product_behind(z)
    module = _module_of(node)
    if product is None:
        return None if n_axes < 4 else (_unseen(module), [z])
    order = {each: place for place, each in enumerate(node.graph.nodes)}
    cone = sorted(between(product, z), key=order.__getitem__)
    operands = [each for each in product.all_input_nodes if each not in cone]
    inputs = list(dict.fromkeys(operands + [x for each in cone for x in each.all_input_nodes if x not in cone]))  # fmt: skip
    # baddbmm has what it adds first.
    factor = known_factor(*(constant_factor(each) for each in operands[-2:]))

    def see(found: list[Tensor]) -> Seen:
        z_value, found_product = _replay(cone, dict(zip(inputs, found, strict=True)), product, z)
        products = () if found_product is None else (found_product,)
        axes = (n_axes - 2, n_axes - 1)
        seen = seen_by_hand(z_value, products, module(), axes=axes, factor=1.0)
        return replace(seen, factor=factor, backend=BY_HAND)

    return Site(module=module, backend=BY_HAND, see=see), inputs


def _unseen(module: Callable[[], nn.Module | None]) -> Site:
    def see(_found: list[Tensor]) -> Seen:
        raise NotMeasuredError("softmax over 4 axes whose q and k were not seen: no product of activations before it")

    return Site(module=module, backend=BY_HAND, see=see)


def _replay(
    cone: list[fx.Node], values: dict[fx.Node, Any], product: fx.Node, z: fx.Node
) -> tuple[Tensor, Product | None]:
    """Compute the logits again from what goes into them."""
    found: Product | None = None
    for node in cone:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node is product:
            if name_of(node) == "einsum":
                found = einsum_product(str(args[0]), args[1:])
            else:
                found = matrix_product(*operands_of(name_of(node), args, kwargs))
        if node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[z], found


def _module_of(node: fx.Node) -> Callable[[], nn.Module | None]:
    """The innermost module whose forward the node is in, that is no bare softmax."""
    for key, (source, kind) in reversed((node.meta.get("nn_module_stack") or {}).items()):
        if not issubclass(kind, nn.Softmax):
            number = str(key).partition("@")[0]
            traced = module_with_id(int(number)) if number.isdecimal() else None
            at_first = (lambda: None) if traced is None else weakref.ref(traced)
            return partial(_module_at, source, kind, at_first)
    return _caller


def _module_at(source: str, kind: type[nn.Module], at_first: Callable[[], nn.Module | None]) -> nn.Module | None:
    """The module that is called now, from where Dynamo found it: L['self'].blocks.0, in the frame that it compiled.

    That frame is the nearest one where the path leads to a module of the same class. `at_first` stands for what it was when
    the graph was made, where no frame has it.
    """
    root = _ROOT.match(source)
    frame: FrameType | None = sys._getframe() if root else None
    while root and frame is not None:
        scope, name = root.groups()
        code, names = frame.f_code, frame.f_globals
        if scope == "L":  # of other frames no locals are touched
            is_here = name in (*code.co_varnames, *code.co_cellvars, *code.co_freevars)
            names = frame.f_locals if is_here else {}
        found = _follow(names.get(name), source[root.end() :])
        if type(found) is kind:
            return found
        frame = frame.f_back
    return at_first()


def _follow(found: Any, path: str) -> Any:
    """What a path of attributes, keys and indices leads to, without running code of the script; None where it does not."""
    while path and found is not None:
        step = _STEP.match(path)
        if step is None:
            return None
        name, key, index = step.groups()
        if name is not None:
            own = getattr(found, "__dict__", {})
            parts = own.get("_modules") if isinstance(found, nn.Module) else None
            found = (parts or {}).get(name, own.get(name))
        elif key is not None:
            found = found.get(key) if type(found) is dict else None
        else:
            is_there = type(found) in (list, tuple) and int(index) < len(found)
            found = found[int(index)] if is_there else None
        path = path[step.end() :]
    return found


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
