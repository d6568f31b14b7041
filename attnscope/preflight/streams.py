"""How large the residual stream is after each layer at initialization, and how alike its tokens are, by mean-field theory.

Weights are drawn independently of what passes through them, so two numbers say all that the next layer needs: the mean square of an
entry, and the mean product of the same entry of two tokens of a sequence. What is shared by all tokens moves no logit against another.

Shape key: T query position, S key position, D d_model, X node of a quadrature.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attnscope.config import Config
from attnscope.data import Batch
from attnscope.model.masks import visible_keys
from attnscope.model.position import sinusoids
from attnscope.model.transformer import ACTIVATIONS

NORM_EPS = {"layernorm": 1e-5, "rmsnorm": torch.finfo(torch.float32).eps}  # the defaults of torch, which the model uses
NODES = 64  # of Gauss-Hermite quadrature along each axis
MOST_POSITIONS = 2048  # of a longer sequence the first so many tell how two rows overlap


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Entries of token vectors.

    Attributes:
        square: mean square of an entry.
        shared: mean product of the same entry of two tokens of one sequence.
    """

    square: float
    shared: float

    def normed(self, norm_kind: str) -> "Stream":
        """After a norm whose gain is 1."""
        size = self.square + NORM_EPS[norm_kind]
        return Stream(square=self.square / size, shared=self.shared / size)

    def plus(self, square: float, shared: float) -> "Stream":
        """With something added that fresh weights made, which has nothing to do with it."""
        return Stream(square=self.square + square, shared=self.shared + shared)


def weight_variance(config: Config, name: str, *, vocab_size: int) -> float:
    """Variance of an entry of a weight matrix at initialization: q, k, v, o, mlp_in, mlp_out or head."""
    init, model = config.init, config.model
    d_attn = model.n_heads * config.d_head
    shape = {
        "o": (d_attn, model.d_model),
        "mlp_in": (model.d_model, config.d_ff),
        "mlp_out": (config.d_ff, model.d_model),
        "head": (model.d_model, vocab_size),
    }.get(name, (model.d_model, d_attn))
    gain = init.gain * (init.qk_gain if name in ("q", "k") else 1.0)
    if init.scheme == "gpt2" and name in ("o", "mlp_out"):
        gain /= math.sqrt(2 * model.n_layers)
    variance = {
        "xavier_uniform": 2 / sum(shape),
        "xavier_normal": 2 / sum(shape),
        "kaiming": 2 / shape[0],
        "orthogonal": 1 / max(shape),
    }.get(init.scheme, init.std * init.std)
    return gain * gain * variance


def embedded(config: Config, batch: Batch) -> Stream:
    """What the first layer is given; how often a token comes again in a sequence is counted in the batch."""
    variance = config.init.embedding_std * config.init.embedding_std
    square, shared = variance, variance * _same_token(batch.tokens_BT)
    if config.model.position == "learned":
        square += variance
    elif config.model.position == "sinusoidal":
        positions_TD = sinusoids(config.model.seq_len, config.model.d_model, device=torch.device("cpu"))
        square += float(positions_TD.square().mean())
        shared += _mean_off_diagonal(positions_TD @ positions_TD.T) / config.model.d_model
    return Stream(square=square, shared=shared)


def after_attention(
    config: Config, stream: Stream, given: Stream, *, concentration: float, overlap: float, vocab_size: int
) -> Stream:
    """The residual stream after the attention of a layer.

    Args:
        config: of the member.
        stream: before it.
        given: what attention reads: the stream, or its norm.
        concentration: mean Σp² of a query.
        overlap: mean Σ p p' of two queries.
        vocab_size: of the data.
    """
    passes = config.model.d_model * weight_variance(config, "v", vocab_size=vocab_size)
    passes *= config.model.n_heads * config.d_head * weight_variance(config, "o", vocab_size=vocab_size)
    own = given.square - given.shared
    return stream.plus(passes * (concentration * own + given.shared), passes * (overlap * own + given.shared))


def after_mlp(config: Config, stream: Stream, given: Stream, *, vocab_size: int) -> Stream:
    """The residual stream after the MLP of a layer, which reads `given`."""
    spread = config.model.d_model * weight_variance(config, "mlp_in", vocab_size=vocab_size)
    square, shared = _activated(config.model.activation, spread * given.square, given.shared / given.square)
    passes = config.d_ff * weight_variance(config, "mlp_out", vocab_size=vocab_size)
    return stream.plus(passes * square, passes * shared)


def overlap_of_rows(config: Config, layer: int) -> float:
    """Mean Σ p p' of two queries of one sequence that look at their keys without preference."""
    n = min(config.model.seq_len, MOST_POSITIONS)
    visible_TS = visible_keys(
        mask=config.attention.mask,
        window=config.windows[layer],
        n_queries=n,
        n_keys=n,
        device=torch.device("cpu"),
    )
    p_TS = torch.ones(n, n) if visible_TS is None else visible_TS.float()
    p_TS = p_TS / p_TS.sum(dim=-1, keepdim=True)
    return _mean_off_diagonal(p_TS @ p_TS.T)


def _activated(activation: str, variance: float, correlation: float) -> tuple[float, float]:
    """E[f(u)²] and E[f(u) f(v)] for normal u, v of this variance and correlation (Poole et al. 2016), by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    x_X, weight_X = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    f, size = ACTIVATIONS[activation], math.sqrt(variance)
    other = math.sqrt(max(0.0, 1 - correlation**2))
    f_X = f(size * x_X)
    f_XX = f(size * (correlation * x_X[:, None] + other * x_X))
    return float(weight_X @ f_X.square()), float((weight_X * f_X) @ f_XX @ weight_X)


def _same_token(tokens_BT: Tensor) -> float:
    """How often two positions of a sequence have the same token."""
    n = tokens_BT.shape[1]
    counts = [sequence_T.unique(return_counts=True)[1].double() for sequence_T in tokens_BT.cpu()]
    pairs = sum(float((count * (count - 1)).sum()) for count in counts)
    return pairs / (len(counts) * n * (n - 1))


def _mean_off_diagonal(x_TS: Tensor) -> float:
    n = len(x_TS)
    return float((x_TS.sum() - x_TS.diagonal().sum()) / (n * (n - 1)))
