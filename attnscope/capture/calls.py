"""The attention calls of one forward pass, each with the name of its module: for who holds a model and wants to look once.

Shape key: B batch, H head, T query position, S key position.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attnscope.capture.eager import Capture
from attnscope.capture.names import Modules
from attnscope.capture.patches import Patches
from attnscope.capture.seen import Computed, Modified, Scaled, Seen, fit_scale, scale_of, visible_logits

# Called with the name of the module that made the call, the module (None outside of modules), and what was seen.
OnCall = Callable[[str, nn.Module | None, Seen], None]


@contextmanager
def attention_calls(model: nn.Module, on_call: OnCall) -> Iterator[list[str]]:
    """Hand each attention call that is made inside to `on_call`, while it is made.

    Args:
        model: gives the modules their names.
        on_call: what it raises becomes a line of what could not be seen.

    Yields:
        What could not be seen, one line a call; it grows.
    """
    modules = Modules()
    modules.add(model)
    unseen: list[str] = []

    def name_of(module: nn.Module | None) -> str:
        return "attention" if module is None else modules.name_of(module)

    def on_attention(module: nn.Module | None, seen: Seen) -> None:
        on_call(name_of(module), module, seen)

    def on_unmeasured(module: nn.Module | None, backend: str, shapes: list[list[int]], reason: str) -> None:
        unseen.append(f"{name_of(module)} ({backend}, {shapes}): {reason}")

    patches = Patches(lambda: True, lambda error: unseen.append(f"attention: {error}"))
    try:
        capture = Capture(patches, on_attention=on_attention, on_unmeasured=on_unmeasured)
        try:
            yield unseen
        finally:
            capture.forget()
    finally:
        patches.restore()


@torch.no_grad()
def visible_keys(seen: Seen) -> Tensor:
    """Which keys each query sees, boolean (B, H, T, S)."""
    match seen.logits:
        case Modified() as logits:
            return modified_logits(logits)[2]
        case Computed() as logits:
            return visible_logits(logits.z, logits.raw())
        case Scaled() as logits:
            if logits.visible is None:
                return torch.ones(seen.shape, dtype=torch.bool, device=logits.q.device)
            return logits.visible.expand(seen.shape)


@torch.no_grad()
def modified_logits(logits: Modified) -> tuple[Tensor, Tensor, Tensor]:
    """Of a call in which a function decides: q kᵀ, the logits, and which keys each query sees, (B, H, T, S) each."""
    raw = logits.q.float() @ logits.k.float().mT
    at = (torch.arange(n, device=raw.device) for n in raw.shape[:3])
    z, visible = logits.modify(raw * logits.scale, *at)
    everything = torch.ones((), dtype=torch.bool, device=raw.device)
    return raw, z.expand_as(raw), (everything if visible is None else visible).expand_as(raw)


@torch.no_grad()
def applied_scale(seen: Seen) -> float | None:
    """What multiplies q kᵀ altogether, before and in the call; None where it cannot be told.

    Of a call made without gradients, what q and k were multiplied by before cannot be seen.
    """
    scale, logits = seen.scale, seen.logits
    if isinstance(logits, Computed) and (raw := logits.raw()) is not None:
        scale = scale_of(tuple(fit_scale(raw, logits.z.float(), visible_keys(seen)).tolist()))
    return None if scale is None or seen.factor is None else scale * seen.factor
