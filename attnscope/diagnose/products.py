"""How large q.k became before it was scaled, in members that compute it in float16.

A fused kernel sums the product in float32; written by hand, the product itself is float16, and above FLOAT16_MAX it is infinite
however small the scale is that follows.

Shape key: N rows of the heads table, M member in the order of run.json, L layer.
"""

import math

import numpy as np
from numpy.typing import NDArray

from attnscope.config import Config, scale_of
from attnscope.runs.by_member import configs_of, members_of_rows
from attnscope.runs.reader import Run
from attnscope.runs.watched import attention_layers

FLOAT16_MAX = 65_504.0

UNKNOWN_SCALE = "what multiplied q.k after the product is not known"
SOFT_CAPPED = "logits were recorded after their soft-cap"


def products_of(run: Run) -> tuple[NDArray[np.float64], dict[str, str]]:
    """The largest q.k of each row of the heads table, (N,), NaN where it is not computed in float16; and why not where it is.

    max_logit is the largest logit: over the scale, it is the largest product.
    """
    n_layers = 1 + int(run.heads["layer"].max()) if len(run.heads) else 0
    scale_ML, blind = np.full((len(run.entries), n_layers), math.nan), {}
    if run.kind == "watch":
        number = {entry.name: m for m, entry in enumerate(run.entries)}
        for layer in attention_layers(run):
            if layer.dtype != "float16" or layer.backend != "eager" or layer.layer >= n_layers:
                continue
            if not layer.scale_after or layer.member not in number:
                blind[layer.member] = UNKNOWN_SCALE
            else:
                scale_ML[number[layer.member], layer.layer] = abs(layer.scale_after)
    else:
        for m, config in enumerate(configs_of(run)):
            if config is None or config.precision.dtype != "float16" or config.attention.backend != "eager":
                continue
            why = _why_unknown(config)
            if why:
                blind[run.entries[m].name] = why
                continue
            for at in range(min(n_layers, config.model.n_layers)):
                scale = scale_of(config.attention.scale, d_head=config.d_head, layer=at)
                scale_ML[m, at] = math.nan if scale is None else scale
    if np.isnan(scale_ML).all():
        return np.full(len(run.heads), math.nan), blind
    with np.errstate(all="ignore"):
        product_N: NDArray[np.float64] = (
            run.heads["max_logit"].to_numpy() / scale_ML[members_of_rows(run.heads), run.heads["layer"].to_numpy()]
        )
    return product_N, blind


def _why_unknown(config: Config) -> str:
    if config.attention.logit_softcap > 0:
        return SOFT_CAPPED
    return UNKNOWN_SCALE if config.attention.scale == "learned" else ""
