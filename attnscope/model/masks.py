"""Which keys a query may see, as boolean tensors: True = visible. Same convention as PyTorch's SDPA.

Shape key: B batch, T query position, S key position.
"""

import torch
from torch import Tensor


def visible_keys(*, mask: str, window: int, n_queries: int, n_keys: int, device: torch.device) -> Tensor | None:
    """Visibility of every key for every query, from `attention.mask` and one layer's window.

    A window of n shows n keys, the query's own position included: the last n under a causal mask, those less than n
    away on both sides otherwise (Beltagy et al. 2020). 0 shows all.

    Returns:
        Boolean (T, S), or None where nothing is hidden.
    """
    query_T1 = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    key_1S = torch.arange(n_keys, device=device)[None, :]
    distance_TS = query_T1 - key_1S
    if mask == "causal":
        visible_TS = distance_TS >= 0
        return visible_TS & (distance_TS < window) if window else visible_TS
    return distance_TS.abs() < window if window else None


def with_padding(visible_TS: Tensor | None, real_BS: Tensor | None) -> Tensor | None:
    """Hide padded keys as well: (T, S) and (B, S) to (B, 1, T, S); the 1 stands for the heads."""
    if real_BS is None:
        return visible_TS
    real_B11S = real_BS[:, None, None, :]
    if visible_TS is None:
        return real_B11S
    # A padded query whose window holds padding only sees itself: a row without keys is NaN, and 0 x NaN, in the next
    # layer, reaches every other row.
    last = visible_TS.shape[1] - visible_TS.shape[0]
    itself_TS = torch.ones_like(visible_TS).tril(last).triu(last)
    return visible_TS & real_B11S | itself_TS
