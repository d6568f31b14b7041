"""Where a token stands: sinusoids that are added, RoPE that rotates q and k, ALiBi that biases the attention logits.

Shape key: B batch, H head, T query position, S key position, D d_model, K d_head.
"""

import math

import torch
from torch import Tensor

BASE = 10_000.0  # of sinusoids and RoPE: Vaswani et al. 2017, Su et al. 2021


def sinusoids(seq_len: int, d_model: int, *, device: torch.device) -> Tensor:
    """Sine and cosine of geometric frequencies, (T, D); Vaswani et al. 2017, section 3.5."""
    angle_TD = _angles(seq_len, d_model, device=device)
    return torch.stack([angle_TD.sin(), angle_TD.cos()], dim=-1).flatten(-2)


def rope_angles(seq_len: int, d_head: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotation, each (T, K / 2)."""
    angle_TK = _angles(seq_len, d_head, device=device)
    return angle_TK.cos(), angle_TK.sin()


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """RoPE: rotate the pair (i, i + K/2) of every position by its angle (Su et al. 2021; the layout of GPT-NeoX)."""
    first, second = x_BHTK.chunk(2, dim=-1)
    cos_TK, sin_TK = cos_TK.to(x_BHTK.dtype), sin_TK.to(x_BHTK.dtype)
    return torch.cat([first * cos_TK - second * sin_TK, second * cos_TK + first * sin_TK], dim=-1)


def alibi_slopes(n_heads: int, *, device: torch.device) -> Tensor:
    """One slope per head, (H,): a geometric sequence that ends at 2^-8 (Press et al. 2022).

    For head counts that are not a power of two, the paper's rule: every other slope of the next power of two fills up.
    """
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(n_heads - power)]
    return torch.tensor(slopes, device=device)


def alibi_bias(n_heads: int, n_queries: int, n_keys: int, *, device: torch.device) -> Tensor:
    """What ALiBi adds to the attention logits, (H, T, S): minus slope times distance."""
    query_T1 = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    distance_TS = (query_T1 - torch.arange(n_keys, device=device)[None, :]).abs()
    return -alibi_slopes(n_heads, device=device)[:, None, None] * distance_TS


def _angles(seq_len: int, width: int, *, device: torch.device) -> Tensor:
    frequency = BASE ** (-torch.arange(0, width, 2, device=device).float() / width)
    return torch.arange(seq_len, device=device).float()[:, None] * frequency
