"""What is measured of the residual stream of foreign models where it passes from block to block.

Shape key: N calls, C column, B sequence, T position, D d_model.
"""

from dataclasses import dataclass

from torch import Tensor

from attnscope.metrics.activations import SEQUENCES, activation_rms, token_cosine, token_norms, token_total


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """The residual stream after the blocks that were called in one step.

    Attributes:
        layers: number of each block, (N,).
        trains: whether its module was in training mode, (N,).
        sizes: numbers in the stream, (N,).
        n_compared: sequences whose tokens were compared, (N,); 0 = it could not be told what tokens are.
        values_NC: activation_rms and token_cosine.
    """

    layers: tuple[int, ...]
    trains: tuple[bool, ...]
    sizes: tuple[int, ...]
    n_compared: tuple[int, ...]
    values_NC: Tensor


def measure_stream(x: Tensor, *, batch_first: bool | None) -> tuple[Tensor, Tensor, int]:
    """The size of a stream, and how alike its tokens are.

    Args:
        x: (B, T, D), (T, B, D), or with other axes before the last: it has a size only.
        batch_first: which of them; None = that is not known, and of tokens nothing is.

    Returns:
        `activation_rms` and `token_cosine` as in the layers table, and of how many sequences the latter is the mean: of 0 it
        is any number.
    """
    norm = token_norms(x)
    rms = activation_rms(norm.flatten(), d_model=x.shape[-1])
    if x.dim() != 3 or batch_first is None:
        return rms, rms, 0
    x_BTD, norm_BT = (x, norm) if batch_first else (x.transpose(0, 1), norm.mT)
    x_BTD, norm_BT = x_BTD[:SEQUENCES], norm_BT[:SEQUENCES]
    n_compared, seq_len = norm_BT.shape
    if seq_len < 2:
        return rms, rms, 0
    total_BD = token_total(x_BTD.flatten(0, 1), norm_BT.flatten(), seq_len=seq_len)
    return rms, token_cosine(total_BD, seq_len=seq_len), n_compared
