"""The last few batches of a model and the weights that met them, kept until training breaks.

Opt-in: it costs a copy of the weights per step, and as many copies in the memory of the device as steps are kept.
"""

import inspect
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from attnscope.capture.eager import in_backward
from attnscope.capture.names import unwrapped, without_wrappers
from attnscope.runs.snapshot import Argument, Snapshot, save_snapshot

MOST_DEEP = 6  # levels of lists and dictionaries in an argument
PLAIN = (int, float, bool, str, type(None))


class Snapshots:
    """A ring of steps of one model: the outermost one that is called when training is first seen."""

    def __init__(self, keep: int, step_now: Callable[[], int]) -> None:
        """`step_now` is asked at every forward call in training, after which the step before is over."""
        self._step_now = step_now
        self._steps: deque[Snapshot] = deque(maxlen=keep)
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def attach(self) -> None:
        """Find the model on the stack, if that has not been done, and keep its batches from this one on."""
        if self._hook is not None:
            return
        found = _outermost_call()
        if found is None:
            return
        model, args, kwargs = found
        if not (model.training or torch.is_grad_enabled()):
            return  # evaluation
        if model._compiled_call_impl is None:
            self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        elif self._steps and self._steps[-1].step == self._step_now():
            return  # a hook would be compiled with the model: only the first batch of a step is kept
        self._keep(model, _named(model, args, kwargs))

    def remove(self) -> None:
        """Leave the model as it was."""
        if self._hook is not None:
            self._hook.remove()
        self._steps.clear()

    def write(self, part_dir: Path) -> list[Path]:
        """Put what is kept on disk, and forget it.

        Raises:
            RunWriteError: the disk did not take it.
        """
        steps = list(self._steps)
        self._steps.clear()
        return [save_snapshot(part_dir, each) for each in steps]

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not in_backward():
            self._keep(model, _named(model, args, kwargs))

    @torch.no_grad()
    def _keep(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        step = self._step_now()
        batch: dict[str, Argument] = {}
        left_out: list[str] = []
        _flatten(arguments, "", batch, left_out, MOST_DEEP)
        rng = torch.get_rng_state()
        if self._steps and self._steps[-1].step == step:
            last = self._steps.pop()  # one more micro-batch
            batches, rngs = [*last.batches, batch], [*last.rng, rng]
            weights = last.weights
        else:
            batches, rngs, weights = [batch], [rng], _weights_of(model)
        self._steps.append(Snapshot(step=step, weights=weights, batches=batches, rng=rngs, left_out=left_out))


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What `load_state_dict` takes, copied, without asking other processes: of what is sharded, the part of this rank."""
    found = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        passing = module._non_persistent_buffers_set
        kept = {k: x for k, x in module._buffers.items() if k not in passing}
        for name, x in {**module._parameters, **kept}.items():
            if x is not None:
                local = x.to_local() if hasattr(x, "to_local") else x
                full = f"{prefix}.{name}" if prefix else name
                found[without_wrappers(full)] = local.detach().clone()
    return found


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names that forward gives them; by their numbers where it takes them otherwise."""
    try:
        return dict(inspect.signature(unwrapped(model).forward).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        return {**{str(number): x for number, x in enumerate(args)}, **kwargs}


def _flatten(value: object, name: str, batch: dict[str, Argument], left_out: list[str], depth: int) -> None:
    if isinstance(value, Tensor):
        batch[name] = value.detach().clone()
    elif isinstance(value, PLAIN):
        batch[name] = value
    elif isinstance(value, Mapping) and depth:
        for key, each in value.items():
            _flatten(each, f"{name}.{key}" if name else str(key), batch, left_out, depth - 1)
    elif isinstance(value, list | tuple) and depth:
        for number, each in enumerate(value):
            _flatten(each, f"{name}.{number}", batch, left_out, depth - 1)
    else:
        left_out.append(f"{name}: {type(value).__name__}")


def _outermost_call() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None:
    """The outermost module that is being called, and with what."""
    found = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_wrapped_call_impl":  # nn.Module.__call__
            values = frame.f_locals
            found = values["self"], values["args"], values["kwargs"]
        frame = frame.f_back
    return found
