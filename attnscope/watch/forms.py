"""Where W_q and W_k of watched attention layers are, and how far an update moves the form W_q W_kᵀ of their heads.

They are known where the module that attends, or the one that called it, has them as plain linear layers. Which rows of a fused
one (c_attn, qkv) are whose, the strides of q and k tell where those are views of its output; where they are not, only names
count that mean the same in all code. What is not known is not measured.

Shape key: L layer, H head, G key head, K d_head, D d_model.
"""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnscope.capture.names import module_calls
from attnscope.capture.seen import Seen
from attnscope.metrics.form import form_update_ratio
from attnscope.watch.parameters import MOST_COPIED, parameters_of
from attnscope.watch.step import Step

AROUND = 2  # modules that are looked into: the one that attends, and the one around it
# Fused layers whose outputs are q, k and v one after the other, head by head, in everybody's code: those of GPT-2, Phi-3 and
# flash-attention. (query_key_value is q, k and v of one head after the other in GPT-NeoX, and not in others.)
BLOCKS = ("c_attn", "qkv_proj", "Wqkv")
# One name for queries, another for keys.
PAIRS = (("query", "key"), ("Query", "Key"), ("q", "k"), ("Q", "K"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """The rows of a weight that make the queries, or the keys, of a layer.

    Attributes:
        owner: the module that has the weight.
        name: of the weight there.
        is_transposed: whether its outputs are columns.
        first: row of the first head.
        apart: rows from one head to the next.
        n_heads: of queries, or of keys.
        d_head: rows of one head.
    """

    owner: "weakref.ref[nn.Module]"
    name: str
    is_transposed: bool
    first: int
    apart: int
    n_heads: int
    d_head: int

    def weight(self) -> Tensor | None:
        """The parameter as it is now; None where it is gone, or not a plain matrix any more."""
        owner = self.owner()
        weight = None if owner is None else owner._parameters.get(self.name)
        return weight if weight is not None and _is_plain(weight, self.is_transposed, self.end) else None

    @property
    def end(self) -> int:
        """The row after the last one."""
        return self.first + (self.n_heads - 1) * self.apart + self.d_head

    def rows(self, weight: Tensor) -> Tensor:
        """What of the weight makes the heads, (H or G, K, D): a view."""
        x = weight.detach()
        x = x.mT if self.is_transposed else x
        x_HDK = x[self.first : self.end].unfold(0, self.d_head, max(self.apart, 1))
        return x_HDK.mT.expand(self.n_heads, -1, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """W_q and W_k of a layer."""

    q: Side
    k: Side


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """W_q and W_k of some layers that are alike, before an update.

    Attributes:
        forms: layer to where its weights are.
        q_LHKD: copies.
        k_LGKD: copies.
    """

    forms: Mapping[int, Form]
    q_LHKD: Tensor
    k_LGKD: Tensor


class Forms:
    """Measures the forms of all layers at once, before and after an update.

    Invariant: keeps no module and no parameter alive; copies of weights live as long as an update.
    """

    def __init__(self) -> None:
        self._forms: dict[int, Form | None] = {}
        self._before: dict[int, list[_Weights]] = {}

    def attention(self, layer: int, module: nn.Module | None, seen: Seen) -> None:
        """A layer attends in training; at its first call it is found out where its weights are."""
        if layer not in self._forms:
            self._forms[layer] = None
            if module is not None and not getattr(module, "_is_replica", False):
                self._forms[layer] = _form_around(module, seen)

    @torch.no_grad()
    def before_update(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        """Copy the weights that an optimizer is about to move, of layers whose attention was measured in this step."""
        forms = {layer: form for layer in sorted(step.heads) if (form := self._forms.get(layer)) is not None}
        if not step.measured or not forms:
            return
        moved = {id(p) for p in parameters_of(optimizer)}
        alike: dict[object, dict[int, tuple[Form, Tensor, Tensor]]] = {}
        for layer, form in forms.items():
            q, k = form.q.weight(), form.k.weight()
            if q is not None and k is not None and id(q) in moved and id(k) in moved:
                q_HKD, k_GKD = form.q.rows(q), form.k.rows(k)
                key = q_HKD.shape, k_GKD.shape, q.dtype, k.dtype, q.device, k.device
                alike.setdefault(key, {})[layer] = form, q_HKD, k_GKD
        total = sum(q.numel() + k.numel() for group in alike.values() for _, q, k in group.values())
        stride = max(1, -(-total // MOST_COPIED))
        found = []
        for group in alike.values():
            kept = dict(list(group.items())[::stride])
            found.append(
                _Weights(
                    forms={layer: form for layer, (form, _, _) in kept.items()},
                    q_LHKD=torch.stack([q for _, q, _ in kept.values()]),
                    k_LGKD=torch.stack([k for _, _, k in kept.values()]),
                )
            )
        self._before[id(optimizer)] = found

    @torch.no_grad()
    def after_update(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        """Measure how far the update moved them."""
        for before in self._before.pop(id(optimizer), ()):
            q_after = _together(form.q for form in before.forms.values())
            k_after = _together(form.k for form in before.forms.values())
            if q_after is None or k_after is None:
                continue
            with torch.autocast(q_after.device.type, enabled=False):
                ratio_LH = form_update_ratio(
                    q=before.q_LHKD.mT,
                    k=before.k_LGKD.mT,
                    q_update=q_after.sub_(before.q_LHKD).mT,
                    k_update=k_after.sub_(before.k_LGKD).mT,
                )
            step.forms |= dict(zip(before.forms, ratio_LH, strict=True))

    def end_step(self) -> None:
        """Let go of what no update came of."""
        self._before.clear()


def _together(sides: Iterable[Side]) -> Tensor | None:
    """Copies of the rows of several layers, (L, H or G, K, D); None where one of them is gone."""
    rows = []
    for side in sides:
        weight = side.weight()
        if weight is None:
            return None
        rows.append(side.rows(weight))
    return torch.stack(rows)


def _form_around(module: nn.Module, seen: Seen) -> Form | None:
    """In the module that attends, else in the one that called it."""
    around = [call.module for call in module_calls() if call.module is not module]
    for each in (module, *around)[:AROUND]:
        form = _form_in(each, seen)
        if form is not None:
            return form
    return None


def _form_in(module: nn.Module, seen: Seen) -> Form | None:
    n_heads, d_head = seen.shape[1], seen.d_head
    if isinstance(module, nn.MultiheadAttention):
        return _packed(module) if n_heads == module.num_heads else None
    if d_head is None:
        return None
    linear = {name: child for name, child in module.named_children() if _is_linear(child)}
    fused = _by_strides(linear, seen)
    pairs = [form for q, k in _pairs(linear) if (form := _apart(q, k, n_heads, d_head)) is not None]
    found = fused or pairs or [
        form for name in BLOCKS if name in linear and (form := _in_blocks(linear[name], n_heads, d_head)) is not None
    ]  # fmt: skip
    return found[0] if len(found) == 1 else None


def _packed(module: nn.MultiheadAttention) -> Form:
    """nn.MultiheadAttention: one matrix, or three where keys are of another width."""
    n_heads, d_head = module.num_heads, module.head_dim
    owner: weakref.ref[nn.Module] = weakref.ref(module)
    same = module.in_proj_weight is not None

    def side(name: str, first: int) -> Side:
        return Side(
            owner=owner, name=name, is_transposed=False, first=first, apart=d_head, n_heads=n_heads, d_head=d_head
        )

    if same:
        return Form(q=side("in_proj_weight", 0), k=side("in_proj_weight", n_heads * d_head))
    return Form(q=side("q_proj_weight", 0), k=side("k_proj_weight", 0))


def _by_strides(linear: Mapping[str, nn.Module], seen: Seen) -> list[Form]:
    """Fused layers whose output q and k are views of, if any."""
    q, k = seen.q, seen.k
    if q is None or k is None or q.untyped_storage().data_ptr() != k.untyped_storage().data_ptr():
        return []
    found = []
    for child in linear.values():
        n_out = _n_out(child)
        sides = [_viewed(child, x, n_out) for x in (q, k)]
        if all(_width(x) == n_out for x in (q, k)) and None not in sides:
            found += [Form(q=of_q, k=of_k) for of_q, of_k in [sides] if of_q is not None and of_k is not None]
    return found


def _width(x_BHTK: Tensor) -> int:
    """From one token to the next, whether those of a sequence or those of a batch stand side by side."""
    return min((x_BHTK.stride(axis) for axis in (0, 2) if x_BHTK.shape[axis] > 1), default=0)


def _viewed(child: nn.Module, x_BHTK: Tensor, n_out: int) -> Side | None:
    n_heads, d_head = x_BHTK.shape[1], x_BHTK.shape[-1]
    side = _side(
        child,
        first=int(x_BHTK.storage_offset()) % n_out,
        apart=x_BHTK.stride(1) if n_heads > 1 else d_head,
        n_heads=n_heads,
        d_head=d_head,
    )
    return side if x_BHTK.stride(-1) == 1 and side.end <= n_out and (side.apart >= d_head or not side.apart) else None


def _pairs(linear: Mapping[str, nn.Module]) -> list[tuple[nn.Module, nn.Module]]:
    """Layers whose names differ by query and key, or by q and k."""
    found: dict[tuple[str, str], None] = {}
    for name in linear:
        for query, key in PAIRS:
            other = name.replace(query, key, 1)
            if other != name and other in linear:
                found[name, other] = None
    return [(linear[q], linear[k]) for q, k in found]


def _apart(q: nn.Module, k: nn.Module, n_heads: int, d_head: int) -> Form | None:
    """Queries and keys each have a layer of their own; of keys there may be fewer heads."""
    n_keys, left = divmod(_n_out(k), d_head)
    if _n_out(q) != n_heads * d_head or left or not n_keys or n_heads % n_keys:
        return None
    return Form(
        q=_side(q, first=0, apart=d_head, n_heads=n_heads, d_head=d_head),
        k=_side(k, first=0, apart=d_head, n_heads=n_keys, d_head=d_head),
    )


def _in_blocks(child: nn.Module, n_heads: int, d_head: int) -> Form | None:
    """All queries, then all keys, then as many values."""
    n_keys, left = divmod(_n_out(child) - n_heads * d_head, 2 * d_head)
    if left or n_keys <= 0 or n_heads % n_keys:
        return None
    return Form(
        q=_side(child, first=0, apart=d_head, n_heads=n_heads, d_head=d_head),
        k=_side(child, first=n_heads * d_head, apart=d_head, n_heads=n_keys, d_head=d_head),
    )


def _side(child: nn.Module, *, first: int, apart: int, n_heads: int, d_head: int) -> Side:
    return Side(
        owner=weakref.ref(child),
        name="weight",
        is_transposed=_is_conv(child),
        first=first,
        apart=apart,
        n_heads=n_heads,
        d_head=d_head,
    )


def _is_conv(module: nn.Module) -> bool:
    """Hugging Face's linear layer of GPT-2, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"


def _is_linear(module: nn.Module) -> bool:
    """A linear layer that does nothing but multiply by its own weight: no adapter, no parametrization."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    weight = module._parameters.get("weight") if plain or _is_conv(module) else None
    return weight is not None and _is_plain(weight, is_transposed=False, n_rows=0)


def _n_out(module: nn.Module) -> int:
    weight = module._parameters["weight"]
    assert weight is not None
    return int(weight.shape[-1 if _is_conv(module) else 0])


def _is_plain(weight: Tensor, is_transposed: bool, n_rows: int) -> bool:
    """A real matrix, whole and on this device, with so many rows at least."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.dim() == 2
        and weight.layout == torch.strided
        and weight.is_floating_point()
        and not weight.is_meta
        and weight.shape[-1 if is_transposed else 0] >= n_rows
    )
