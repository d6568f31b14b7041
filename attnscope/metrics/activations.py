"""The residual stream: how large it grows, and how alike its tokens become.

Shape key: M member, N = B x T tokens, B batch, T position, D d_model.
"""

import torch
from torch import Tensor


def activation_norm(x_MND: Tensor) -> Tensor:
    """L2 norm of a residual stream, (M,) float32; √(N D) times its root mean square."""
    return torch.linalg.vector_norm(x_MND, dim=(1, 2), dtype=torch.float32)


def token_total(x_MND: Tensor, *, n_batch: int) -> Tensor:
    """Sum of the unit states of each sequence's tokens, (M, B, D) float32, for `token_cosine`."""
    x_MBTD = x_MND.float().unflatten(1, (n_batch, -1))
    length_MBT = torch.linalg.vector_norm(x_MBTD, dim=-1)
    # 1/‖x_t‖ as a row vector times x: the unit states are never written down.
    return (length_MBT.clamp_(min=1e-12).reciprocal_()[:, :, None] @ x_MBTD).squeeze(2)


def token_cosine(total_MBD: Tensor, *, seq_len: int) -> Tensor:
    """Mean cosine similarity of two different tokens of a sequence; 1 = rank collapse (Dong et al. 2021).

    With unit states u_t, the mean over pairs is (‖Σ u_t‖² - T) / (T (T - 1)), which needs no T x T matrix.

    Args:
        total_MBD: `token_total` of the last layer's states, (..., B, D).
        seq_len: T, at least 2.

    Returns:
        (...), float32.
    """
    square_MB = torch.linalg.vector_norm(total_MBD, dim=-1).square()
    return ((square_MB - seq_len) / (seq_len * (seq_len - 1))).mean(dim=-1)
