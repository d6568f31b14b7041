"""The residual stream: how large it grows, and how alike its tokens become.

Shape key: M member, N = B x T tokens, B batch, T position, D d_model.
"""

import torch
from torch import Tensor


def activation_norm(x_MND: Tensor) -> Tensor:
    """L2 norm of a residual stream, (M,) float32; √(N D) times its root mean square."""
    return torch.linalg.vector_norm(x_MND, dim=(1, 2), dtype=torch.float32)


def token_cosine(x_MND: Tensor, *, n_batch: int) -> Tensor:
    """Mean cosine similarity of two different tokens of a sequence, (M,) float32; 1 = rank collapse (Dong et al. 2021).

    With unit states u_t, the mean over pairs is (‖Σ u_t‖² - T) / (T (T - 1)), which needs no T x T matrix.
    """
    x_MBTD = x_MND.float().unflatten(1, (n_batch, -1))
    seq_len = x_MBTD.shape[2]
    length_MBT = torch.linalg.vector_norm(x_MBTD, dim=-1)
    # 1/‖x_t‖ as a row vector times x: the sum of unit states without writing them down.
    total_MB1D = length_MBT.clamp(min=1e-12).reciprocal()[:, :, None] @ x_MBTD
    square_MB = torch.linalg.vector_norm(total_MB1D, dim=(-2, -1)).square()
    return ((square_MB - seq_len) / (seq_len * (seq_len - 1))).mean(dim=-1)
