"""The attention calls of one forward pass, and gradients between positions, in a few numbers each.

Shape key: B batch, T position, S key position, P rows of a sequence in the output, D features.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnscope.capture.calls import attention_calls
from attnscope.capture.seen import Seen
from attnscope.check.batch import CallBatch, changed_at, with_input
from attnscope.check.case import NOISE, SEED, Case, Mode, call, in_mode, rows_of
from attnscope.check.dropout import without_dropout
from attnscope.check.facts import Attention, attention_of
from attnscope.errors import AttnscopeError

PROBES = 4  # queries whose gradients are looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What one forward pass with gradients shows.

    Attributes:
        calls: in their order.
        why: why there are none.
        unseen: attention that could not be seen, one line a call: where, and why.
        reacts: query position to how strongly its output reacts to each input position, (T,), relative to the strongest; empty
            where gradients between positions cannot be had.
    """

    calls: tuple[Attention, ...]
    why: str
    unseen: tuple[str, ...]
    reacts: dict[int, Tensor]


def look(case: Case, mode: Mode = "evaluation", *, seed: int = SEED, dropout: bool = True) -> Observed:
    """Pass the batch through the model with gradients, and look at its attention; without them where it fails with them."""
    observed = _look(case, mode, seed=seed, dropout=dropout, gradients=True)
    if observed.why.startswith(_FAILED):
        without = _look(case, mode, seed=seed, dropout=dropout, gradients=False)
        observed = without if without.calls else observed
    if case.batch.source is None or not observed.calls or mode != "evaluation":
        return observed
    # Of an encoder-decoder: what does not react to the decoder's input is attention of the encoder, or over it.
    everywhere_BT = torch.ones_like(case.batch.real_BT)
    changed = replace(case, batch=changed_at(case.batch, everywhere_BT))
    others = _look(changed, mode, seed=seed, dropout=dropout, gradients=False).calls
    pairs = zip(observed.calls, others, strict=False)
    is_own = [one.layer != two.layer or abs(one.keys_sum - two.keys_sum) > NOISE for one, two in pairs]
    own = [*is_own, *[True] * (len(observed.calls) - len(is_own))]
    calls = [
        attention if of_input else replace(attention, direction=None, farthest=0, soft=None)
        for attention, of_input in zip(observed.calls, own, strict=True)
    ]
    return replace(observed, calls=tuple(calls))


def _look(case: Case, mode: Mode, *, seed: int, dropout: bool, gradients: bool) -> Observed:
    model, batch = case.model, case.batch
    calls: list[Attention] = []
    widths: dict[str, int] = {}
    registered = {id(p) for p in model.parameters()}

    def on_call(name: str, module: nn.Module | None, seen: Seen) -> None:
        calls.append(attention_of(case, name, module, seen, registered))

    with ExitStack() as stack:
        stack.enter_context(in_mode(model, mode, seed=seed))
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(nullcontext() if dropout else without_dropout())
        if gradients:
            for p in model.parameters():
                if p.is_floating_point() and p.is_leaf and not p.is_inference():
                    p.requires_grad_(True)  # the scale is read from the graph
        x = batch.input.detach()
        stack.enter_context(_widths(model, widths))
        is_alone = batch.source is None or not torch.equal(batch.source.raw, batch.raw)
        leaves = stack.enter_context(_leaf(model, batch.raw)) if gradients and is_alone else []
        if gradients and not batch.has_ids:
            leaves.append(x.clone().requires_grad_())
            x = leaves[0] * 1  # models may write into it
        try:
            with attention_calls(model, on_call) as unseen:
                called = with_input(batch, x)
                output = rows_of(call(model, called, keep=called.raw), batch, case.kind)
        except AttnscopeError as error:
            return Observed(calls=(), why=f"{_FAILED}{error}", unseen=(), reacts={})
        reacts = _reacts(case, output, leaves[0]) if leaves and case.kind == "positions" else {}
    with_width = tuple(replace(attention, d_model=_width_of(attention.layer, widths)) for attention in calls)
    why = "" if with_width else "; ".join(unseen[:1]) or "no call looked like attention"
    return Observed(calls=with_width, why=why, unseen=tuple(unseen), reacts=reacts)


@contextmanager
def _widths(model: nn.Module, widths: dict[str, int]) -> Iterator[None]:
    """Note the last axis of what each module is given first, (B, T, D)."""
    handles = []
    try:
        for name, module in model.named_modules():

            def note(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                for x in (*args, *kwargs.values()):
                    if isinstance(x, Tensor) and x.dim() == 3 and x.is_floating_point():
                        widths.setdefault(name, x.shape[-1])
                        return

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _width_of(layer: str, widths: dict[str, int]) -> int | None:
    """Of the nearest module that was given (B, T, D)."""
    while layer not in widths and "." in layer:
        layer = layer.rpartition(".")[0]
    return widths.get(layer, widths.get(""))


@contextmanager
def _leaf(model: nn.Module, ids: Tensor) -> Iterator[list[Tensor]]:
    """The output of the first module that turns the token ids into vectors, made a leaf of the graph."""
    leaves: list[Tensor] = []
    handles = []

    def swap(_: nn.Module, args: Any, out: Any) -> Any:
        given = args[0] if args else None
        if leaves or not isinstance(given, Tensor) or not isinstance(out, Tensor):
            return None
        same = given.shape == ids.shape and given.dtype == ids.dtype and torch.equal(given, ids)
        if not same or out.shape[:2] != ids.shape or not out.is_floating_point():
            return None
        leaves.append(out.detach().requires_grad_())
        return leaves[0] * 1  # models may write into it

    try:
        if not ids.is_floating_point():
            handles += [
                module.register_forward_hook(swap)
                for module in model.modules()
                if module is not model and next(module.children(), None) is None
            ]
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def _reacts(case: Case, output: Tensor, leaf: Tensor) -> dict[int, Tensor]:
    real_BT = case.batch.real_BT
    if not output.requires_grad:
        return {}
    generator = torch.Generator().manual_seed(SEED)
    direction_F = torch.randn(output.shape[-1], generator=generator).to(output)
    reacts: dict[int, Tensor] = {}
    for i in spread(real_BT.shape[1], PROBES):
        if not real_BT[:, i].any():
            continue
        try:
            (grad,) = torch.autograd.grad(
                (output[:, i] * direction_F).sum(), [leaf], retain_graph=True, allow_unused=True
            )
        except RuntimeError:  # an operation without a gradient
            return {}
        if grad is None:
            continue
        grad = _in_order(grad, case.batch)
        size_BT = torch.linalg.vector_norm(grad.flatten(2).float(), dim=-1)
        share_BT = (size_BT / size_BT.amax(dim=1, keepdim=True)).nan_to_num(0.0)
        share_BT = share_BT.masked_fill(~(real_BT & real_BT[:, i : i + 1]), 0.0)
        reacts[i] = share_BT.amax(dim=0)
    return reacts


def _in_order(grad: Tensor, batch: CallBatch) -> Tensor:
    """(B, T, D): the leaf behind token ids has the axes that the model is given."""
    return grad.transpose(0, 1) if batch.time_first and batch.has_ids else grad


def spread(n_positions: int, wanted: int) -> list[int]:
    """At most so many positions, from the first to the last at equal distances."""
    if n_positions <= wanted:
        return list(range(n_positions))
    return sorted({round(at * (n_positions - 1) / (wanted - 1)) for at in range(wanted)})


_FAILED = "with gradients, "
