"""The law behind 1/√d_head, measured: how wide q·k is, what is left of the gradient behind the softmax, and where attention freezes.

q and k are drawn with independent entries of mean 0 and variance 1, as a norm and a good initialization make them.

Shape key: B batch, R query row, T key position, K d_head.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Generator

from attnscope.metrics.attention import attention_stats, statistics_of_logits

D_HEADS = (8, 16, 32, 64, 128, 256, 512)
N_KEYS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BATCH, QUERIES = 8, 64  # query rows of a cell: their product
WIDE = 512  # d_head at which the spread of a row hardly depends on its query
RATIOS = tuple(2.0 ** (step / 4) for step in range(-8, 13))  # of the critical spread: 1/4 to 8
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Softmaxes of one d_head over so many keys, with the scale and without.

    Attributes:
        d_head: entries of q and k.
        n_keys: T.
        scaled: whether q·k was multiplied by 1/√d_head.
        predicted_std: √d_head, or 1.
        logit_std: measured.
        logits_over_5: share of logits further than 5 from their row's mean.
        softmax_gain: 1 - Σp², what is left of the gradient: the trace of the softmax's Jacobian.
        max_prob: mean largest weight of a query.
    """

    d_head: int
    n_keys: int
    scaled: bool
    predicted_std: float
    logit_std: float
    logits_over_5: float
    softmax_gain: float
    max_prob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Freezing:
    """Softmaxes of logits of one spread over so many keys.

    Attributes:
        n_keys: T.
        critical: √(2 ln T).
        logit_std: of the logits.
        predicted: mean Σp² for many keys (`frozen_share`).
        measured: mean Σp².
    """

    n_keys: int
    critical: float
    logit_std: float
    predicted: float
    measured: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VarianceLaw:
    """Everything that was measured."""

    cells: tuple[Cell, ...]
    freezing: tuple[Freezing, ...]


def critical_spread(n_keys: int) -> float:
    """Standard deviation of the logits above which a few of many keys take all, √(2 ln T) (Giorlandino and Goldt 2026)."""
    return math.sqrt(2 * math.log(n_keys))


def frozen_share(logit_std: float, n_keys: int) -> float:
    """Mean Σp² as T goes to infinity: 1 - √(2 ln T)/σ above the critical spread, 0 below; of finite T it is above that."""
    return max(0.0, 1 - critical_spread(n_keys) / logit_std)


def variance_law(d_heads: Sequence[int] = D_HEADS, n_keys: Sequence[int] = N_KEYS) -> VarianceLaw:
    """Measure it; the same numbers every time."""
    cells = tuple(cell for d_head in d_heads for n in n_keys for cell in _cells(d_head, n))
    return VarianceLaw(cells=cells, freezing=tuple(point for n in n_keys for point in _freezing(n)))


def law_as_table(law: VarianceLaw) -> dict[str, list[dict[str, float]]]:
    """As JSON and the figure have it."""
    return {
        "cells": [asdict(cell) for cell in law.cells],
        "freezing": [asdict(point) for point in law.freezing],
    }


def _cells(d_head: int, n_keys: int) -> tuple[Cell, Cell]:
    q_B1RK, k_B1TK = _drawn(d_head, n_keys)
    cells = []
    for scaled in (False, True):
        scale = d_head**-0.5 if scaled else 1.0
        stats = attention_stats(q_B1RK, k_B1TK, scale)
        told = {name: float(stats[name]) for name in ("logit_std", "logits_over_5", "softmax_gain", "max_prob")}
        predicted = 1.0 if scaled else math.sqrt(d_head)
        cells.append(Cell(d_head=d_head, n_keys=n_keys, scaled=scaled, predicted_std=predicted, **told))
    return cells[0], cells[1]


def _freezing(n_keys: int) -> list[Freezing]:
    q_B1RK, k_B1TK = _drawn(WIDE, n_keys)
    z_B1RT = q_B1RK @ k_B1TK.mT * WIDE**-0.5
    z_B1RT = z_B1RT / z_B1RT.std()
    seen, bound = torch.ones_like(z_B1RT, dtype=torch.bool), torch.full((1,), math.nan)
    critical = critical_spread(n_keys)
    points = []
    for ratio in RATIOS:
        spread = ratio * critical
        stats = statistics_of_logits(spread * z_B1RT, seen, bound)
        points.append(
            Freezing(
                n_keys=n_keys,
                critical=critical,
                logit_std=spread,
                predicted=frozen_share(spread, n_keys),
                measured=1 - float(stats["softmax_gain"]),
            )
        )
    return points


def _drawn(d_head: int, n_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = Generator().manual_seed(SEED)
    q_B1RK = torch.randn(BATCH, 1, QUERIES, d_head, generator=generator)
    return q_B1RK, torch.randn(BATCH, 1, n_keys, d_head, generator=generator)
