"""Sizes of parameters, their gradients and updates, at the steps that are measured.

Shape key: P parameter.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

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


@torch.no_grad()
def gradient_sizes(parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """grad_norm, grad_max and nonfinite, (P,) each; 0 where there is no gradient."""
    gradients = [_dense(p.grad) if p.grad is not None else p.new_zeros(1) for p in parameters]
    norm_P = _norms(gradients)
    largest_P = torch.stack(
        [torch.maximum(g.amax(), -g.amin()) if g.numel() else g.new_zeros(()) for g in gradients]
    ).float()
    if norm_P.device.type == "cpu" and bool(norm_P.isfinite().all()):
        nonfinite_P = torch.zeros_like(norm_P)  # nobody to wait for: a finite norm has finite terms
    else:
        nonfinite_P = torch.stack([(~g.isfinite()).sum() for g in gradients]).float()
    return {"grad_norm": norm_P, "grad_max": largest_P, "nonfinite": nonfinite_P}


@torch.no_grad()
def total_norm(parameters: Sequence[Tensor]) -> Tensor | None:
    """L2 norm of all gradients together, (); None where there are none."""
    gradients = [_dense(p.grad) for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(_norms(gradients)) if gradients else None


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


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors))])


def _dense(x: Tensor) -> Tensor:
    """What is on this rank, without the zeros of a sparse gradient."""
    if x.is_sparse:
        return x.detach().coalesce().values()
    local = x.detach()
    return local.to_local() if hasattr(local, "to_local") else local
