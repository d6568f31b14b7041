"""Sees where a training step begins and ends in foreign code: losses, clipping, loss scaling, optimizer steps."""

import functools
import sys
import weakref
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from attnscope.capture.dispatch import Original, unobserved, why_unseen
from attnscope.capture.dynamo import not_compiled
from attnscope.capture.patches import Patches
from attnscope.watch.parameters import total_norm

FRAMES = 16  # looked through for who calls backward


class OnTraining(Protocol):
    """What is told of a step, in the order in which things happen."""

    def loss(self, loss: Tensor, *, adds_up: bool) -> None:
        """A scalar is about to be differentiated; without what GradScaler multiplied it by.

        With `adds_up` the losses of a step's micro-batches add up to its mean; else they must be looked at.
        """

    def before_clipping(self, parameters: list[Tensor]) -> None:
        """Gradients are about to be clipped."""

    def clipped(self, factor: Tensor | None, total_norm: Tensor | None) -> None:
        """Gradients have been clipped: by this factor and from this L2 norm, where the call tells."""

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer is about to step."""

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has stepped."""

    def scaled(self, loss_scale: Tensor) -> None:
        """GradScaler is about to step, with this scale."""

    def skipped(self, optimizer: torch.optim.Optimizer) -> None:
        """GradScaler kept the optimizer from stepping."""


class Training:
    """What is done at each of these moments."""

    def __init__(self, patches: Patches, told: OnTraining) -> None:
        self._told = told
        self._scaled: tuple[weakref.ref[Tensor], Tensor] | None = None
        self._stepped = False
        # What Tensor.backward and torch.autograd.backward call: these are functions that scripts look up and compare.
        patches.replace(
            [torch.autograd, torch.autograd.graph], "_engine_run_backward", self._backward
        )
        utils = torch.nn.utils
        patches.replace([utils, utils.clip_grad], "clip_grad_norm_", self._clip_norm)
        patches.replace([utils, utils.clip_grad], "clip_grad_value_", self._clip_value)
        patches.replace([torch.amp.GradScaler], "scale", self._scale)
        patches.replace([torch.amp.GradScaler], "step", self._scaler_step)
        self._hooks = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Take the hooks of optimizers away; patches are restored by their owner."""
        for hook in self._hooks:
            hook.remove()

    @not_compiled
    def _before(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Where the step has a closure, the gradients of the update are there when that first returns."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            self._told.before_update(optimizer)
            return None
        told = iter((False, True))

        @functools.wraps(closure)
        def watched() -> Any:
            result = closure()
            if not next(told, True):
                self._told.before_update(optimizer)
            return result

        if len(args) > 1:
            return (args[0], watched, *args[2:]), kwargs
        return args, {**kwargs, "closure": watched}

    @not_compiled
    def _after(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        self._stepped = True
        self._told.after_update(optimizer)

    def _backward(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("accumulate_grad"):  # else it is torch.autograd.grad, of whatever it is
            adds_up = _is_trainer_of_hugging_face()
            for root in args[0]:
                with unobserved():
                    is_loss = why_unseen(root) is None and root.numel() == 1
                if is_loss:
                    self._told.loss(self._without_scale(root), adds_up=adds_up)
        return original(*args, **kwargs)

    def _scale(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scaled = original(*args, **kwargs)
        given = args[1] if len(args) > 1 else kwargs.get("outputs")
        if isinstance(given, Tensor) and isinstance(scaled, Tensor):
            self._scaled = weakref.ref(scaled), given
        return scaled

    def _without_scale(self, root: Tensor) -> Tensor:
        if self._scaled is None or self._scaled[0]() is not root:
            return root
        given = self._scaled[1]
        self._scaled = None
        return given

    def _scaler_step(
        self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._stepped = False
        scaler = args[0]
        value = getattr(scaler, "_scale", None) if scaler.is_enabled() else None
        if value is not None:
            with unobserved():
                scale = value.detach().clone()
            self._told.scaled(scale)
        result = original(*args, **kwargs)
        if not self._stepped:
            self._told.skipped(args[1] if len(args) > 1 else kwargs["optimizer"])
        return result

    def _clip_norm(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        parameters, args = _kept(args, kwargs)
        max_norm = args[1] if len(args) > 1 else kwargs.get("max_norm")
        norm_type = args[2] if len(args) > 2 else kwargs.get("norm_type", 2.0)
        self._told.before_clipping(parameters)
        total = original(*args, **kwargs)
        with unobserved():
            norm = total.detach()
            if hasattr(norm, "full_tensor"):  # all ranks are here: clipping waits for all of them
                norm = norm.full_tensor()
            factor = (float(max_norm or 0.0) / (norm + 1e-6)).clamp(max=1.0)
        self._told.clipped(factor, norm if float(norm_type) == 2.0 else None)
        return total

    def _clip_value(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        parameters, args = _kept(args, kwargs)
        self._told.before_clipping(parameters)
        with unobserved():
            before = total_norm(parameters)
        result = original(*args, **kwargs)
        with unobserved():
            after = total_norm(parameters)
            factor = None if before is None or after is None else after / before
        self._told.clipped(factor, before)
        return result


def _is_trainer_of_hugging_face() -> bool:
    """Whether transformers.Trainer calls backward: it, or the model, divides the loss of every micro-batch in one of several ways."""
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    frame: FrameType | None = sys._getframe(1) if trainer is not None else None
    for _ in range(FRAMES):
        if frame is None:
            return False
        if frame.f_code.co_name == "training_step":
            return isinstance(frame.f_locals.get("self"), trainer)  # type: ignore[arg-type]
        frame = frame.f_back
    return False


def _kept(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The parameters given to clipping; what can be gone through only once is given on as a list."""
    given = args[0] if args else kwargs["parameters"]
    parameters = [given] if isinstance(given, Tensor) else list(given)
    if args:
        args = (parameters, *args[1:])
    else:
        kwargs["parameters"] = parameters
    return [p for p in parameters if isinstance(p, Tensor)], args
