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
    output_logits_MNV: Tensor, targets_N: Tensor, *, ignore: int, regularizes: bool = True
) -> TokenLosses:
    """Cross-entropy of every member on the same targets.

    Args:
        output_logits_MNV: any floating dtype.
        targets_N: token ids; positions equal to `ignore` are not scored.
        ignore: see there.
        regularizes: whether anybody needs gradients of log_z.
    """
    output_logits_MNV = output_logits_MNV.float()
    n_members = len(output_logits_MNV)
    scored_N = targets_N != ignore
    n_scored = scored_N.sum()
    loss_MN = F.cross_entropy(
        output_logits_MNV.flatten(0, 1),
        targets_N.expand(n_members, -1).flatten(),
        ignore_index=ignore,
        reduction="none",
    ).unflatten(0, (n_members, -1))
    with torch.set_grad_enabled(regularizes and torch.is_grad_enabled()):
        # loss = log_z - target logit, so log_z needs no second pass over the vocabulary.
        index_MN1 = targets_N.where(scored_N, 0).expand(n_members, -1)[..., None]
        target_logit_MN = output_logits_MNV.gather(-1, index_MN1).squeeze(-1)
        log_z_MN = (loss_MN + target_logit_MN).where(scored_N, 0)
        log_z_M = log_z_MN.sum(dim=-1) / n_scored
        log_z_square_M = log_z_MN.square().sum(dim=-1) / n_scored if regularizes else None
    return TokenLosses(
        loss_M=loss_MN.sum(dim=-1) / n_scored, log_z_M=log_z_M, log_z_square_M=log_z_square_M
    )


def output_logit_max(output_logits_MNV: Tensor) -> Tensor:
    """Largest LM-head logit, (M,) float32; output-logit divergence shows here (Wortsman et al. 2023)."""
    return output_logits_MNV.flatten(1).amax(dim=-1).float()
