"""Sizes of parameters, their gradients and updates.

Shape key: P parameter.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from attnscope.capture.names import Modules, places
from attnscope.watch.guard import one_line
from attnscope.watch.numbers import UnreadableError, why_without_numbers
from attnscope.watch.step import ParameterPlace, Step
from attnscope.watch.tables import PARAMETER_COLUMNS

# Copies of weights, which updates are measured against, hold at most so many numbers; of more, every n-th is copied.
MOST_COPIED = 8 << 20
# What sums of squares can be taken of; everything else is made float32 first.
PLAIN = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Called with the name of a parameter and why it is left out.
OnLeftOut = Callable[[str, str], None]

_T = TypeVar("_T")


def parameters_of(optimizer: torch.optim.Optimizer, *, with_gradient: bool = True) -> list[Tensor]:
    """What an optimizer moves; by default only what has a gradient."""
    return [p for group in optimizer.param_groups for p in group["params"] if not with_gradient or p.grad is not None]


class Parameters:
    """What becomes of the parameters in the step that goes on: gradients before clipping, weights, updates.

    Invariants: keeps no parameter alive longer than its update. A parameter that cannot be measured is left out from then on,
    and costs the others nothing.
    """

    def __init__(self, modules: Modules, on_left_out: OnLeftOut) -> None:
        self._modules = modules
        self._on_left_out = on_left_out
        # By tensor and not by its id, which one made later may have again.
        self._names = WeakTensorKeyDictionary()
        self._places = WeakTensorKeyDictionary()
        self._left_out = WeakTensorKeyDictionary()
        self._gradients: list[tuple[list[int], dict[str, Tensor]]] = []
        self._before: dict[int, tuple[list[Tensor], Before]] = {}

    def see_gradients(self, step: Step, parameters: Sequence[Tensor]) -> None:
        """Measure gradients, once per step and parameter: the first time is before clipping."""
        known = {key for keys, _ in self._gradients for key in keys}
        new = [p for p in parameters if p.grad is not None and id(p) not in known]
        measure = gradient_sizes if step.measured else _gradient_norms_alone
        new, sizes = self._of_those_that_can_be(new, measure)
        if sizes is None:
            return
        self._gradients.append(([id(p) for p in new], sizes))
        step.gradients.append((self.places_of(new), sizes["grad_norm"]))

    def before_update(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        """Remember what the update will be measured against."""
        parameters = parameters_of(optimizer)
        self.see_gradients(step, parameters)
        if step.measured:
            parameters, before = self._of_those_that_can_be(parameters, Before)
            if before is not None:
                self._before[id(optimizer)] = parameters, before

    def after_update(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        """Measure the update."""
        if id(optimizer) not in self._before:
            return
        parameters, before = self._before.pop(id(optimizer))
        weight_norm_P, update_norm_P = before.weight_norm_P, before.update_norm_P()
        device = weight_norm_P.device
        ids = [key for keys, _ in self._gradients for key in keys]
        at = {key: place for place, key in enumerate(ids)}
        known = [n for n, p in enumerate(parameters) if id(p) in at]
        if not known:
            return
        if len(known) < len(parameters):
            parameters = [parameters[n] for n in known]
            known_P = torch.tensor(known, device=device)
            weight_norm_P, update_norm_P = weight_norm_P[known_P], update_norm_P[known_P]
        index_P = torch.tensor([at[id(p)] for p in parameters], device=device)
        sizes = {
            name: torch.cat([each[name].to(device) for _, each in self._gradients])[index_P]
            for name in ("grad_norm", "grad_max", "nonfinite")
        }
        sizes |= {"weight_norm": weight_norm_P, "update_norm": update_norm_P}
        step.parameters += [(place.layer, place.group) for place in self.places_of(parameters)]
        for name in PARAMETER_COLUMNS:
            step.sizes.setdefault(name, []).append(sizes[name])

    def skip(self, step: Step) -> None:
        """No update comes of these gradients; others of the same step will."""
        self._gradients.clear()
        step.gradients.clear()

    def end_step(self, step: Step) -> None:
        """All gradients of the step have been seen."""
        if step.grad_norm is None and step.gradients:
            device = step.gradients[0][1].device
            step.grad_norm = _total(torch.cat([norm_P.to(device) for _, norm_P in step.gradients]))
        self._gradients.clear()
        self._before.clear()

    def _of_those_that_can_be(
        self, parameters: Sequence[Tensor], measure: Callable[[Sequence[Tensor]], _T]
    ) -> tuple[list[Tensor], _T | None]:
        """What measures all at once, of as many as can be; those that fail alone, too, are left out and said."""
        if self._left_out:
            parameters = [p for p in parameters if p not in self._left_out]
        if not parameters:
            return [], None
        try:
            return list(parameters), _measured(parameters, measure)
        except Exception as error:
            reason = one_line(error)
        good = []
        for p in parameters:
            try:
                _measured([p], measure)
            except Exception as error:
                self._left_out[p] = True
                self._on_left_out(self._name_of(p), one_line(error))
            else:
                good.append(p)
        if not good:
            return [], None
        if len(good) == len(parameters):  # it is not one of them alone
            raise NotMeasuredTogetherError(reason)
        return good, _measured(good, measure)

    def _name_of(self, parameter: Tensor) -> str:
        (found,) = self._modules.names_of_parameters([parameter])
        return f"parameter {found}" if not found.startswith("parameter ") else found

    def places_of(self, parameters: Sequence[Tensor]) -> list[ParameterPlace]:
        """Layer and group of each, see `places`, and its path."""
        found = [self._places.get(p) for p in parameters]
        if None in found:
            for p, name in zip(parameters, self._modules.names_of_parameters(parameters), strict=True):
                self._names[p] = name
            at = places({id(p): name for p, name in self._names.items()})
            for p, name in self._names.items():
                self._places[p] = ParameterPlace(*at[id(p)], path=name)
            found = [self._places[p] for p in parameters]
        return found


class NotMeasuredTogetherError(Exception):
    """Each parameter can be measured, but not all together; says why."""


def _measured(parameters: Sequence[Tensor], measure: Callable[[Sequence[Tensor]], _T]) -> _T:
    """What `measure` says; what it says of tensors without numbers would fail only when it is read.

    Raises:
        UnreadableError: a parameter has no numbers.
    """
    first = parameters[0]
    if len(parameters) == 1 or type(first) not in (Tensor, torch.nn.Parameter) or first.is_meta:
        for p in parameters:
            for x in (p, p.grad):
                why = None if x is None else why_without_numbers(x)
                if why is not None:
                    raise UnreadableError(why)
    return measure(parameters)


def _gradient_norms_alone(parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    return {"grad_norm": gradient_norms(parameters)}


@torch.no_grad()
def gradient_sizes(parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """grad_norm, grad_max and nonfinite, (P,) each; 0 where there is no gradient."""
    gradients = _gradients_of(parameters)
    norm_P = gradient_norms(parameters)
    largest_P = _lined_up([p.new_zeros(()) if p.grad is None else _largest(p.grad) for p in parameters])
    if norm_P.device.type == "cpu" and bool(norm_P.isfinite().all()):
        nonfinite_P = torch.zeros_like(norm_P)  # nobody to wait for: a finite norm has finite terms
    else:
        nonfinite_P = _lined_up([(~g.isfinite()).sum() for g in gradients])
    return {"grad_norm": norm_P, "grad_max": largest_P, "nonfinite": nonfinite_P}


@torch.no_grad()
def gradient_norms(parameters: Sequence[Tensor]) -> Tensor:
    """L2 norm of each gradient, (P,) float32; 0 where there is none.

    On the CPU it is finite where the gradient is, for there is nobody to wait for in a second look at what overflowed.
    """
    gradients = _gradients_of(parameters)
    norm_P = _norms(gradients)
    if norm_P.device.type == "cpu" and not bool(norm_P.isfinite().all()):
        norm_P = _lined_up([torch.linalg.vector_norm(g.double()) for g in gradients])
    return norm_P


@torch.no_grad()
def total_norm(parameters: Sequence[Tensor]) -> Tensor | None:
    """L2 norm of all gradients together, (); None where there are none."""
    found = [p for p in parameters if p.grad is not None]
    return _total(gradient_norms(found)) if found else None


class Before:
    """Weights as they stood before an optimizer step."""

    @torch.no_grad()
    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        weights = [_dense(p) for p in self._parameters]
        self.weight_norm_P = _norms(weights)
        total = sum(w.numel() for w in weights)
        self.stride = max(1, -(-total // MOST_COPIED))
        self._copies = [self._cut(w).clone() for w in weights]

    @torch.no_grad()
    def update_norm_P(self) -> Tensor:
        """Norm of what the step added, (P,); from every n-th entry where `stride` is above 1."""
        moved = [self._cut(_dense(p)) for p in self._parameters]
        torch._foreach_sub_(self._copies, moved)
        return _norms(self._copies) * self.stride**0.5

    def _cut(self, x: Tensor) -> Tensor:
        return x if self.stride == 1 else x.reshape(-1)[:: self.stride]


def _gradients_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [_dense(p.grad) if p.grad is not None else p.new_zeros(1) for p in parameters]


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    return _lined_up(torch._foreach_norm(list(tensors)))


def _total(norm_P: Tensor) -> Tensor:
    wide = torch.float64 if norm_P.device.type == "cpu" else torch.float32  # not every device has it
    return torch.linalg.vector_norm(norm_P, dtype=wide).float()


def _lined_up(numbers: Sequence[Tensor]) -> Tensor:
    """Scalars as one tensor, float32, where the first is."""
    return torch.stack([x.float().to(numbers[0].device) for x in numbers])


def _largest(gradient: Tensor) -> Tensor:
    """Largest absolute entry, (); of a complex one that of |g|."""
    g = _local(gradient)
    g = g.abs() if g.is_complex() else _plain(g)
    if not g.numel():
        return g.new_zeros(())
    least, most = g.aminmax()
    return torch.maximum(most, -least)


def _dense(x: Tensor) -> Tensor:
    """What is on this rank, without the zeros of a sparse gradient, as real numbers: |z|² is the sum of two squares."""
    local = _local(x)
    return torch.view_as_real(local.resolve_conj()) if local.is_complex() else _plain(local)


def _plain(x: Tensor) -> Tensor:
    return x if x.dtype in PLAIN else x.float()


def _local(x: Tensor) -> Tensor:
    if x.layout != torch.strided:
        return (x.detach().coalesce() if x.is_sparse else x.detach()).values()
    local = x.detach()
    return local.to_local() if hasattr(local, "to_local") else local
