"""Gradient clipping, per member: what it multiplies the gradients by.

Shape key: M member, ... the axes of one parameter.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from attnscope.train.broadcast import fit

ZCLIP_ALPHA = 0.97  # ZClip (Kumar et al. 2025): smoothing of the norm's mean and variance
ZCLIP_WARMUP = 25  # steps that only fill mean and variance


def clip_state(mode: str, n_members: int, device: torch.device) -> dict[str, Tensor]:
    """What adaptive clipping remembers: mean and variance of the gradient norm and how many it has seen, (M,)."""
    if mode != "adaptive":
        return {}
    return {name: torch.zeros(n_members, device=device) for name in ("clip_mean", "clip_variance", "clip_count")}


def clip_gradients(
    gradients: Mapping[str, Tensor],
    *,
    mode: str,
    threshold_M: Tensor,
    grad_norm_M: Tensor,
    state: Mapping[str, Tensor],
    step: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Clip.

    norm: to an L2 norm of at most the threshold (Pascanu et al. 2013). value: every entry to ±threshold. adaptive:
    ZClip, where the threshold is a z-score of the norm among its past.

    Returns:
        The clipped gradients, and what clipping multiplied by, (M,): 1 where it did nothing; for `value`, norm after
        over norm before.
    """
    if mode == "value":
        clipped = {
            name: torch.clamp(gradient, -fit(threshold_M, gradient), fit(threshold_M, gradient))
            for name, gradient in gradients.items()
        }
        squares_M = [gradient.flatten(1).square().sum(dim=-1) for gradient in clipped.values()]
        factor_M = torch.stack(squares_M).sum(dim=0).sqrt() / grad_norm_M
        peaks_M = [gradient.flatten(1).abs().amax(dim=-1) for gradient in gradients.values()]
        untouched_M = (torch.stack(peaks_M).amax(dim=0) <= threshold_M) | threshold_M.isinf()
        return clipped, torch.where(untouched_M, 1.0, factor_M)
    if mode == "adaptive":
        factor_M = _zclip(threshold_M, grad_norm_M, state, step)
    else:
        factor_M = (threshold_M / (grad_norm_M + 1e-6)).clamp(max=1)
        factor_M = factor_M.where(threshold_M.isfinite(), 1.0)
    clipped = {name: gradient * fit(factor_M, gradient) for name, gradient in gradients.items()}
    return clipped, factor_M


def _zclip(threshold_M: Tensor, grad_norm_M: Tensor, state: Mapping[str, Tensor], step: int) -> Tensor:
    mean_M, variance_M = state["clip_mean"], state["clip_variance"]
    deviation_M = grad_norm_M - mean_M
    if step < ZCLIP_WARMUP:  # plain running mean and variance (Welford)
        # Not step + 1: steps that overflow under loss scaling are taken back.
        count_M = state["clip_count"].add_(1)
        mean_M += deviation_M / count_M
        variance_M += (deviation_M * (grad_norm_M - mean_M) - variance_M) / count_M
        return torch.ones_like(grad_norm_M)
    std_M = variance_M.sqrt()
    z_M = deviation_M / std_M
    # The further out, the harder it is pulled back: z becomes threshold² / z.
    target_M = (mean_M + threshold_M.square() / z_M * std_M).where(z_M > threshold_M, grad_norm_M)
    mean_M.lerp_(target_M, 1 - ZCLIP_ALPHA)
    variance_M.lerp_((target_M - mean_M).square(), 1 - ZCLIP_ALPHA)
    return (target_M / grad_norm_M).where(z_M > threshold_M, 1.0)
