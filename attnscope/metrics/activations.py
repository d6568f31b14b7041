"""The residual stream: how large it grows, and how alike its tokens become.

Shape key: M member, N = B x T tokens, B sequence, T position, D d_model, P = all axes before T at once.
"""

import torch
from torch import Tensor

SEQUENCES = 4  # of a batch, whose tokens are compared; all of them would cost as much as the rest of the recording


def token_norms(x_MND: Tensor) -> Tensor:
    """L2 norm of the state of every token, (M, N) float32: what the two statistics below have in common."""
    return torch.linalg.vector_norm(x_MND, dim=-1, dtype=torch.float32)


def activation_rms(norm_MN: Tensor, *, d_model: int) -> Tensor:
    """Root mean square of a residual stream, (...), from the norms of its tokens, (..., N)."""
    size = norm_MN.shape[-1] * d_model
    return torch.linalg.vector_norm(norm_MN, dim=-1) / size**0.5


def token_total(x_MND: Tensor, norm_MN: Tensor, *, seq_len: int) -> Tensor:
    """Sum of the unit states of the tokens of each sequence, for `token_cosine`.

    Args:
        x_MND: residual streams, (..., N, D).
        norm_MN: their `token_norms`, (..., N).
        seq_len: T.

    Returns:
        (..., B, D), float32.
    """
    # 1/‖x_t‖ as a row vector times x: the unit states are never written down.
    share_P1T = norm_MN.clamp(min=1e-12).reciprocal_().reshape(-1, 1, seq_len)
    total_P1D = torch.bmm(share_P1T, x_MND.float().reshape(-1, seq_len, x_MND.shape[-1]))
    return total_P1D.view(*norm_MN.shape[:-1], -1, x_MND.shape[-1])


def token_cosine(total_MBD: Tensor, *, seq_len: int) -> Tensor:
    """Mean cosine similarity of two different tokens of a sequence; 1 = rank collapse (Dong et al. 2021).

    With unit states u_t, the mean over pairs is (‖Σ u_t‖² - T) / (T (T - 1)), which needs no T x T matrix.

    Args:
        total_MBD: `token_total` of a layer's states, (..., B, D).
        seq_len: T, at least 2.

    Returns:
        (...), float32.
    """
    square_MB = torch.linalg.vector_norm(total_MBD, dim=-1).square()
    return ((square_MB - seq_len) / (seq_len * (seq_len - 1))).mean(dim=-1)
