"""Whether the outputs of modules are finite: where NaN or Inf appears first in a forward pass, at every step.

Of each output that is looked at, one sum stays on the device, which is not finite if any of its terms is not (a sum of
numbers of 1e35 would overflow, too: nobody trains with those). The host looks at the sums once per block of steps.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnscope.capture.dispatch import Unobserved, outside, why_unseen
from attnscope.capture.eager import in_backward
from attnscope.capture.names import module_of_call
from attnscope.capture.patches import Patches

# What the modules of transformers are made of; what comes between them shows in the next one's output.
OPERATORS = ("linear", "embedding", "layer_norm", "rms_norm", "addmm")  # Conv1D of Hugging Face is an addmm
MOST = 4096  # outputs of one step


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Sums over the outputs of one step.

    Attributes:
        modules: who made them, in the order of the calls; None outside of modules or where the module is gone.
        total_N: (N,).
    """

    modules: tuple[Callable[[], nn.Module | None], ...]
    total_N: Tensor

    def broken(self) -> list[nn.Module | None]:
        """Who made the outputs that are not finite, in the order of the calls; waits for the device."""
        broken_N = (~self.total_N.isfinite()).cpu().tolist()
        return [made() for made, broken in zip(self.modules, broken_N, strict=True) if broken]


@dataclass(slots=True)
class _Step:
    """Who made the outputs, and where their sums stand in the buffer of a device."""

    modules: list[Callable[[], nn.Module | None]] = field(default_factory=list)
    devices: list[torch.device] = field(default_factory=list)


class Finite:
    """Collects the sums of the step that goes on.

    They stand in one buffer for each device: small tensors that are kept between large ones that come and go would leave the
    allocator no hole of the size that the next one needs, which costs the script more than the sums do.
    """

    def __init__(
        self,
        patches: Patches,
        *,
        on_call: Callable[[nn.Module | None], None],
        on_call_without_gradients: Callable[[Any], None],
    ) -> None:
        """`on_call` is told of each call in training before its output is looked at, the other one of any other's output."""
        self._on_call = on_call
        self._on_call_without_gradients = on_call_without_gradients
        self._step = _Step()
        self._sums: dict[torch.device, Tensor] = {}
        for name in OPERATORS:
            patches.listen(name, self._look)

    def end_step(self) -> Outputs | None:
        """What was collected; None where nothing was."""
        step, self._step = self._step, _Step()
        if not step.devices:
            return None
        first = step.devices[0]
        if all(device == first for device in step.devices):
            total_N = self._sums[first][: len(step.devices)].clone()
        else:
            total_N = torch.stack([self._sums[device][n].to(first) for n, device in enumerate(step.devices)])
        return Outputs(modules=tuple(step.modules), total_N=total_N)

    def _look(self, _args: tuple[Any, ...], _kwargs: dict[str, Any], out: Any) -> None:
        if not torch.is_grad_enabled():
            self._on_call_without_gradients(out)
        elif why_unseen(out) is None and not in_backward():
            module = module_of_call()
            with Unobserved():
                self._on_call(module)
                self._add(module, outside(out).detach())

    def _add(self, module: nn.Module | None, out: Tensor) -> None:
        n = len(self._step.devices)
        if n >= MOST:
            return
        if out.device not in self._sums:
            self._sums[out.device] = torch.zeros(MOST, device=out.device)
        dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
        self._sums[out.device][n] = out.sum(dtype=dtype)
        self._step.devices.append(out.device)
        self._step.modules.append(_nobody if module is None else weakref.ref(module))


def _nobody() -> None:
    return None
