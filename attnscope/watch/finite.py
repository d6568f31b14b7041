"""Whether the outputs of modules are finite: where NaN or Inf appears first in a forward pass, at every step.

Of each output that is looked at, one sum stays on the device, which is not finite if any of its terms is not (a sum of
numbers of 1e35 would overflow, too: nobody trains with those). The host looks at the sums once per block of steps.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnscope.capture.dispatch import Unobserved, outside, why_unseen
from attnscope.capture.eager import in_backward
from attnscope.capture.names import module_of_call
from attnscope.capture.patches import Patches
from attnscope.watch.kept import Kept

# What the modules of transformers are made of; what comes between them shows in the next one's output.
OPERATORS = ("linear", "embedding", "layer_norm", "rms_norm", "addmm")  # Conv1D of Hugging Face is an addmm
NORMS = ("layer_norm", "rms_norm")  # of them
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


class Finite:
    """Collects the sums of the step that goes on."""

    def __init__(
        self,
        patches: Patches,
        *,
        on_call: Callable[[nn.Module | None], None],
        on_call_without_gradients: Callable[[Any], None],
        on_norm: Callable[[nn.Module | None, str, tuple[Any, ...]], None],
    ) -> None:
        """What is told.

        Args:
            patches: that listen.
            on_call: each call in training, before its output is looked at.
            on_call_without_gradients: the output of any other.
            on_norm: each norm in training, by its operator and what that was given.
        """
        self._on_call = on_call
        self._on_call_without_gradients = on_call_without_gradients
        self._on_norm = on_norm
        self._modules: list[Callable[[], nn.Module | None]] = []
        self._sums = Kept(columns=1, most=MOST)
        for name in OPERATORS:
            patches.listen(name, partial(self._look, name if name in NORMS else ""))
        patches.listen("group_norm", self._look_at_groups)

    def end_step(self) -> Outputs | None:
        """What was collected; None where nothing was."""
        modules, self._modules = self._modules, []
        total_N1 = self._sums.take()
        return None if total_N1 is None else Outputs(modules=tuple(modules), total_N=total_N1[:, 0])

    def _look(self, norm: str, args: tuple[Any, ...], _kwargs: dict[str, Any], out: Any) -> None:
        if not torch.is_grad_enabled():
            self._on_call_without_gradients(out)
        elif why_unseen(out) is None and not in_backward():
            module = module_of_call()
            with Unobserved():
                self._on_call(module)
                self._add(module, outside(out).detach())
                if norm:
                    self._on_norm(module, norm, args)

    def _look_at_groups(self, args: tuple[Any, ...], _kwargs: dict[str, Any], out: Any) -> None:
        if torch.is_grad_enabled() and why_unseen(out) is None and not in_backward():
            with Unobserved():
                self._on_norm(module_of_call(), "group_norm", args)

    def _add(self, module: nn.Module | None, out: Tensor) -> None:
        if self._sums.is_full:
            return
        dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
        self._sums.add(out.sum(dtype=dtype))
        self._modules.append(_nobody if module is None else weakref.ref(module))


def _nobody() -> None:
    return None
