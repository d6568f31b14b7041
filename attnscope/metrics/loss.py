"""Cross-entropy per member, and what the output logits say about it.

Shape key: M member, N tokens of a batch, V vocab.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLosses:
    """Mean over the scored tokens of a batch.

    Attributes:
        loss_M: cross-entropy, nats per token.
        log_z_M: log-partition of the output softmax.
        log_z_square_M: mean of its square (z-loss, Chowdhery et al. 2022, section 5); None where nobody regularizes.
    """

    loss_M: Tensor
    log_z_M: Tensor
    log_z_square_M: Tensor | None


def token_losses(
    output_logits_MNV: Tensor, targets_N: Tensor, *, ignore: int | None, regularizes: bool = True
) -> TokenLosses:
    """Cross-entropy of every member on the same targets.

    Args:
        output_logits_MNV: any floating dtype.
        targets_N: token ids; positions equal to `ignore` are not scored.
        ignore: see there; None = every position is scored, and need not be looked at.
        regularizes: whether anybody needs gradients of log_z.
    """
    output_logits_MNV = output_logits_MNV.float()
    targets_MN = targets_N.expand(len(output_logits_MNV), -1)
    loss_MN = F.cross_entropy(
        output_logits_MNV.flatten(0, 1),
        targets_MN.flatten(),
        ignore_index=-1 if ignore is None else ignore,
        reduction="none",
    ).view(targets_MN.shape)
    scored_N = None if ignore is None else targets_N != ignore
    n_scored = len(targets_N) if scored_N is None else scored_N.sum()
    with torch.set_grad_enabled(regularizes and torch.is_grad_enabled()):
        # loss = log_z - target logit, so log_z needs no second pass over the vocabulary.
        index_MN = targets_MN if scored_N is None else targets_MN.where(scored_N, 0)
        log_z_MN = loss_MN + output_logits_MNV.gather(-1, index_MN[..., None]).squeeze(-1)
        if scored_N is not None:
            log_z_MN = log_z_MN.where(scored_N, 0)
        log_z_M = log_z_MN.sum(dim=-1) / n_scored
        log_z_square_M = log_z_MN.square().sum(dim=-1) / n_scored if regularizes else None
    return TokenLosses(loss_M=loss_MN.sum(dim=-1) / n_scored, log_z_M=log_z_M, log_z_square_M=log_z_square_M)


def output_logit_max(output_logits_MNV: Tensor) -> Tensor:
    """Largest LM-head logit, (M,) float32; output-logit divergence shows here (Wortsman et al. 2023)."""
    return output_logits_MNV.flatten(1).amax(dim=-1).float()
