"""Sizes of parameters, their gradients and updates.

Shape key: P parameter.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from attnscope.capture.names import parameter_names, places
from attnscope.watch.recording import PARAMETER_COLUMNS, Step

# Copies of weights, which updates are measured against, hold at most so many numbers; of more, every n-th is copied.
MOST_COPIED = 8 << 20


def parameters_of(optimizer: torch.optim.Optimizer, *, with_gradient: bool = True) -> list[Tensor]:
    """What an optimizer moves; by default only what has a gradient."""
    return [
        p
        for group in optimizer.param_groups
        for p in group["params"]
        if not with_gradient or p.grad is not None
    ]


class Parameters:
    """What becomes of the parameters in the step that goes on: gradients before clipping, weights, updates.

    Invariant: keeps no parameter alive longer than its update.
    """

    def __init__(self) -> None:
        # By tensor and not by its id, which one made later may have again.
        self._names = WeakTensorKeyDictionary()
        self._places = WeakTensorKeyDictionary()
        self._gradients: list[tuple[list[int], dict[str, Tensor]]] = []
        self._before: dict[int, tuple[list[Tensor], Before]] = {}

    def see_gradients(self, step: Step, parameters: Sequence[Tensor]) -> None:
        """Measure gradients, once per step and parameter: the first time is before clipping."""
        known = {key for keys, _ in self._gradients for key in keys}
        new = [p for p in parameters if p.grad is not None and id(p) not in known]
        if not new:
            return
        sizes = gradient_sizes(new) if step.measured else {"grad_norm": gradient_norms(new)}
        self._gradients.append(([id(p) for p in new], sizes))
        step.gradients.append((self.places_of(new), sizes["grad_norm"]))

    def before_update(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        """Remember what the update will be measured against."""
        parameters = parameters_of(optimizer)
        self.see_gradients(step, parameters)
        if step.measured and parameters:
            self._before[id(optimizer)] = parameters, Before(parameters)

    def after_update(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        """Measure the update."""
        if id(optimizer) not in self._before:
            return
        parameters, before = self._before.pop(id(optimizer))
        ids = [key for keys, _ in self._gradients for key in keys]
        at = {key: place for place, key in enumerate(ids)}
        index_P = torch.tensor([at[id(p)] for p in parameters], device=before.weight_norm_P.device)
        sizes = {
            name: torch.cat([sizes[name] for _, sizes in self._gradients]).index_select(0, index_P)
            for name in ("grad_norm", "grad_max", "nonfinite")
        }
        sizes |= {"weight_norm": before.weight_norm_P, "update_norm": before.update_norm_P()}
        step.parameters += self.places_of(parameters)
        for name in PARAMETER_COLUMNS:
            step.sizes.setdefault(name, []).append(sizes[name])

    def skip(self, step: Step) -> None:
        """No update comes of these gradients; others of the same step will."""
        self._gradients.clear()
        step.gradients.clear()

    def end_step(self, step: Step) -> None:
        """All gradients of the step have been seen."""
        if step.grad_norm is None and step.gradients:
            step.grad_norm = _total(torch.cat([norm_P for _, norm_P in step.gradients]))
        self._gradients.clear()
        self._before.clear()

    def places_of(self, parameters: Sequence[Tensor]) -> list[tuple[int, str]]:
        """Layer and group of each, see `places`."""
        if any(p not in self._places for p in parameters):
            found = parameter_names(list(parameters))
            for p in parameters:
                self._names[p] = found[id(p)]
            at = places({id(p): name for p, name in self._names.items()})
            for p in self._names:
                self._places[p] = at[id(p)]
        return [self._places[p] for p in parameters]


@torch.no_grad()
def gradient_sizes(parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """grad_norm, grad_max and nonfinite, (P,) each; 0 where there is no gradient."""
    gradients = _gradients_of(parameters)
    norm_P = gradient_norms(parameters)
    largest_P = _lined_up(
        [torch.maximum(g.amax(), -g.amin()) if g.numel() else g.new_zeros(()) for g in gradients]
    )
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
    wide = (
        torch.float64 if norm_P.device.type == "cpu" else torch.float32
    )  # not every device has it
    return torch.linalg.vector_norm(norm_P, dtype=wide).float()


def _lined_up(numbers: Sequence[Tensor]) -> Tensor:
    """Scalars as one tensor, float32, where the first is."""
    return torch.stack([x.float().to(numbers[0].device) for x in numbers])


def _dense(x: Tensor) -> Tensor:
    """What is on this rank, without the zeros of a sparse gradient."""
    if x.is_sparse:
        return x.detach().coalesce().values()
    local = x.detach()
    return local.to_local() if hasattr(local, "to_local") else local
