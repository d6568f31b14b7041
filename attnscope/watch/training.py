"""Sees where a training step begins and ends in foreign code: losses, clipping, loss scaling, optimizer steps."""

import functools
import sys
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from attnscope.capture.dispatch import Original, outside, why_unseen
from attnscope.capture.dynamo import not_compiled
from attnscope.capture.eager import in_backward
from attnscope.capture.patches import Patches
from attnscope.watch.parameters import parameters_of, total_norm

# Stands on the stack, with the optimizer among its variables, while an optimizer steps.
_STEP = getattr(torch.optim.Optimizer.profile_hook_step(lambda *_, **__: None), "__code__", None)

_MEAN = 1  # the operator's number for reduction="mean"


class OnTraining(Protocol):
    """What is told of a step, in the order in which things happen."""

    repeats: bool  # whether a loss is computed again and again within one update (L-BFGS)

    def trying(self, what: str) -> AbstractContextManager[None]:
        """A context: what fails inside is said, and goes no further."""

    def loss(self, loss: Tensor, weight: Tensor | None) -> None:
        """A scalar is about to be differentiated, without what GradScaler multiplied it by; its gradient gets this weight."""

    def zeroed(self, owner: torch.optim.Optimizer | torch.nn.Module) -> None:
        """The gradients of its parameters are about to be thrown away."""

    def cross_entropy(self, logits: Tensor, targets: Tensor, ignore_index: int, *, loss: Tensor, is_mean: bool) -> None:
        """Cross-entropy is computed in training: with this result, which is the mean over the targets that count, or not."""

    def evaluated(self) -> None:
        """Cross-entropy is computed without gradients, of what was computed without them."""

    def before_clipping(self, parameters: list[Tensor]) -> None:
        """Gradients are about to be clipped."""

    def clipped(
        self,
        factor: Tensor | None,
        total_norm: Tensor | None,
        parameters: list[Tensor],
        threshold: float | Tensor | None,
    ) -> None:
        """Gradients of these have been clipped: by this factor, from this L2 norm and at this, where the call tells."""

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer is about to step."""

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has stepped."""

    def scaled(self, loss_scale: Tensor) -> None:
        """GradScaler is about to step, with this scale."""

    def unscaling(self, optimizer: torch.optim.Optimizer, loss_scale: Tensor) -> None:
        """GradScaler is about to divide gradients that have its scale in them, for the first time since the last step."""

    def skipped(self, optimizer: torch.optim.Optimizer) -> None:
        """GradScaler kept the optimizer from stepping."""


class Training:
    """What is done at each of these moments."""

    def __init__(self, patches: Patches, told: OnTraining) -> None:
        self._told = told
        self._scaled = WeakIdKeyDictionary()  # what GradScaler gave to what it was given
        self._scalers: weakref.WeakSet[Any] = weakref.WeakSet()  # that have multiplied something
        self._last_root: Any = None
        self._stepped = False
        replace = patches.replace
        # What Tensor.backward and torch.autograd.backward call: these are functions that scripts look up and compare.
        replace([torch.autograd, torch.autograd.graph], "_engine_run_backward", self._backward)
        utils = torch.nn.utils
        replace([utils, utils.clip_grad], "clip_grad_norm_", self._clip_norm)
        replace([utils, utils.clip_grad], "clip_grad_value_", self._clip_value)
        replace([torch.amp.GradScaler], "scale", self._scale)
        replace([torch.amp.GradScaler], "step", self._scaler_step)
        replace([torch.amp.GradScaler], "unscale_", self._unscale)
        replace([torch.optim.Optimizer], "zero_grad", self._zero_grad)
        replace([torch.nn.Module], "zero_grad", self._zero_grad)
        patches.listen("cross_entropy_loss", self._cross_entropy)
        self._hooks = [register_optimizer_step_pre_hook(self._before), register_optimizer_step_post_hook(self._after)]

    def remove(self) -> None:
        """Take the hooks of optimizers away; patches are restored by their owner."""
        for hook in self._hooks:
            hook.remove()

    @not_compiled
    def _before(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Where the step has a closure, the gradients of the update are there when that first returns."""
        if _is_inside_another(optimizer):
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            self._told.before_update(optimizer)
            return None
        told = self._told
        has_returned = False

        @functools.wraps(closure)
        def watched() -> Any:
            nonlocal has_returned
            before, told.repeats = told.repeats, has_returned
            try:
                result = closure()
            finally:
                told.repeats = before
            if not has_returned:
                has_returned = True
                told.before_update(optimizer)
            return result

        if len(args) > 1:
            return (args[0], watched, *args[2:]), kwargs
        return args, {**kwargs, "closure": watched}

    @not_compiled
    def _after(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        self._stepped = True
        self._told.after_update(optimizer)

    def _backward(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Without accumulating it is torch.autograd.grad, of whatever it is; inside of another one, checkpointing
        # differentiates what it has computed again.
        if kwargs.get("accumulate_grad") and not in_backward():
            with self._told.trying("loss"):
                roots, weights, _, _, inputs = args[:5]
                for root, weight in zip(roots, weights, strict=False):
                    if isinstance(root, Tensor) and root.numel() == 1:
                        again = len(inputs) > 0 and self._was_last(root)
                        if not again:  # the same loss, for other parameters
                            self._told.loss(self._without_scale(root), weight)
        return original(*args, **kwargs)

    def _was_last(self, root: Tensor) -> bool:
        before, self._last_root = self._last_root, WeakIdKeyDictionary({root: True})
        return before is not None and root in before

    def _scale(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = _kept(args, kwargs, "outputs", at=1)
        scaled = original(*args, **kwargs)
        with self._told.trying("loss"):
            self._scalers.add(args[0])
            given = args[1] if len(args) > 1 else kwargs.get("outputs")
            for one, made in zip(_listed(given), _listed(scaled), strict=False):
                if isinstance(one, Tensor) and isinstance(made, Tensor) and made is not one:
                    self._scaled[made] = one.detach()
        return scaled

    def _without_scale(self, root: Tensor) -> Tensor:
        found: Tensor = self._scaled.get(root, root)
        return found

    def _zero_grad(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._told.zeroed(args[0])
        return original(*args, **kwargs)

    def _cross_entropy(self, args: tuple[Any, ...], _kwargs: dict[str, Any], loss: Any) -> None:
        if why_unseen(args[0]) is not None or in_backward():
            return
        if not torch.is_grad_enabled() and not args[0].requires_grad:
            self._told.evaluated()
        if loss.requires_grad:
            with self._told.trying("cross-entropy"):
                logits, targets, result = outside((*args[:2], loss))
                self._told.cross_entropy(
                    logits,
                    targets,
                    args[4] if len(args) > 4 else -100,
                    loss=result,
                    is_mean=len(args) < 4 or args[3] == _MEAN,
                )

    def _unscale(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._told.trying("loss scale"):
            self._about_to_unscale(args, kwargs)
        return original(*args, **kwargs)

    def _about_to_unscale(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scaler, optimizer = args[0], args[1] if len(args) > 1 else kwargs.get("optimizer")
        value = getattr(scaler, "_scale", None) if scaler.is_enabled() else None
        state = getattr(scaler, "_per_optimizer_states", {}).get(id(optimizer)) or {}
        is_scaled = getattr(state.get("stage"), "name", "READY") == "READY"
        if value is not None and is_scaled and scaler in self._scalers and isinstance(optimizer, torch.optim.Optimizer):
            self._told.unscaling(optimizer, value)

    def _scaler_step(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._stepped = False
        with self._told.trying("loss scale"):
            self._about_to_unscale(args, kwargs)
        scaler = args[0]
        value = getattr(scaler, "_scale", None) if scaler.is_enabled() else None
        if value is not None:
            with self._told.trying("loss scale"):
                self._told.scaled(value.detach().clone())
        result = original(*args, **kwargs)
        if not self._stepped:
            self._told.skipped(args[1] if len(args) > 1 else kwargs["optimizer"])
        return result

    def _clip_norm(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = _kept(args, kwargs, "parameters")
        parameters: list[Tensor] = []
        with self._told.trying("clipping"):
            parameters = _tensors(args[0] if args else kwargs["parameters"])
            self._told.before_clipping(parameters)
        total = original(*args, **kwargs)
        with self._told.trying("clipping"):
            max_norm = args[1] if len(args) > 1 else kwargs.get("max_norm")
            norm_type = args[2] if len(args) > 2 else kwargs.get("norm_type", 2.0)
            norm = total.detach()
            if hasattr(norm, "full_tensor"):  # all ranks are here: clipping waits for all of them
                norm = norm.full_tensor()
            most = max_norm.detach() if isinstance(max_norm, Tensor) else float(max_norm or 0.0)
            factor = (most / (norm + 1e-6)).clamp(max=1.0)
            self._told.clipped(factor, norm if float(norm_type) == 2.0 else None, parameters, most)
        return total

    def _clip_value(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = _kept(args, kwargs, "parameters")
        parameters: list[Tensor] = []
        before = None
        with self._told.trying("clipping"):
            parameters = _tensors(args[0] if args else kwargs["parameters"])
            self._told.before_clipping(parameters)
            before = total_norm(parameters)
        result = original(*args, **kwargs)
        with self._told.trying("clipping"):
            after = None if before is None else total_norm(parameters)
            factor = None if before is None or after is None else after / before
            most = args[1] if len(args) > 1 else kwargs.get("clip_value")
            threshold = most.detach() if isinstance(most, Tensor) else float(most or 0.0)
            self._told.clipped(factor, before, parameters, threshold)
        return result


def _is_inside_another(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step of an optimizer around this one goes on, which is measured: an update counts once.

    One around it that has no gradients of its own (a container of optimizers) counts for nothing.
    """
    frame: FrameType | None = sys._getframe(1)
    found = []
    while frame is not None:
        if frame.f_code is _STEP:
            found.append(frame)
        frame = frame.f_back
    for outer in found[1:]:
        owner = outer.f_locals.get("self")
        if isinstance(owner, torch.optim.Optimizer) and parameters_of(owner):
            return True
    return False


def _listed(given: Any) -> list[Any]:
    if given is None or isinstance(given, Tensor):
        return [given]
    return list(given)


def _tensors(given: Any) -> list[Tensor]:
    return [p for p in _listed(given) if isinstance(p, Tensor)]


def _kept(
    args: tuple[Any, ...], kwargs: dict[str, Any], name: str, *, at: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments; what can be gone through only once is given on as a list."""
    given = args[at] if len(args) > at else kwargs.get(name)
    if isinstance(given, Tensor | list | tuple) or not isinstance(given, Iterable):
        return args, kwargs
    if len(args) > at:
        return (*args[:at], list(given), *args[at + 1 :]), kwargs
    return args, {**kwargs, name: list(given)}
