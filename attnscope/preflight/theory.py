"""What theory says of a config before anything is trained; None stands for what it does not say.

The softmax has no closed form, so its statistics are those of drawn queries and keys with the variances that `streams` gives, seeded,
under the mask, bias, cap and norm of the config, measured by the functions that measure training.

Shape key: B batch, H head, T query position, S key position, K d_head, V vocab, R row.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from attnscope.config import Config, scale_of
from attnscope.data import Batch
from attnscope.metrics.attention import attention_stats
from attnscope.model.masks import visible_keys, with_padding
from attnscope.model.position import alibi_bias, rope_angles, rotate
from attnscope.preflight.streams import (
    Stream,
    after_attention,
    after_mlp,
    embedded,
    overlap_of_rows,
    weight_variance,
)
from attnscope.train.optimizer import DECAYED, MATRICES, MUON_RMS

SEED = 0
MOST_LOGITS = 1 << 21  # drawn per layer
MOST_OUTPUTS = 1 << 22  # output logits drawn
ROWS = 64  # query positions drawn of a sequence that alone has more logits

# What is told of the softmax of a layer; the last is the largest of all heads, the others are means over heads.
TOLD = ("logit_std", "entropy", "entropy_ratio", "max_prob", "softmax_gain", "logits_over_5", "max_logit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Theory:
    """Of one member.

    Attributes:
        layers: column of the heads or layers table to its value, for each layer.
        first_loss: nats per token.
        product: the largest q.k before it is scaled, of all layers.
        update_ratio: group of parameters to its first update over its weights.
    """

    layers: tuple[dict[str, float | None], ...]
    first_loss: float | None
    product: float | None
    update_ratio: dict[str, float]


def theory_of(config: Config, batch: Batch, *, vocab_size: int, lr: float) -> Theory:
    """Predict a member at its initial weights.

    Args:
        config: of the member.
        batch: of the first step: how often tokens come again, and how often one is its own target, is a matter of the data.
        vocab_size: of the data.
        lr: of the first step.
    """
    model = config.model
    stream = embedded(config, batch)
    layers: list[dict[str, float | None]] = []
    products: list[float | None] = []
    for layer in range(model.n_layers):
        given = stream.normed(model.norm_kind) if model.norm == "pre" else stream
        told, concentration, product = _softmax(config, given, layer, batch, vocab_size=vocab_size)
        stream = after_attention(
            config,
            stream,
            given,
            concentration=concentration,
            overlap=overlap_of_rows(config, layer),
            vocab_size=vocab_size,
        )
        stream = stream.normed(model.norm_kind) if model.norm == "post" else stream
        given = stream.normed(model.norm_kind) if model.norm == "pre" else stream
        stream = after_mlp(config, stream, given, vocab_size=vocab_size)
        stream = stream.normed(model.norm_kind) if model.norm == "post" else stream
        layers.append({**told, "activation_rms": math.sqrt(stream.square)})
        products.append(product)
    known = [product for product in products if product is not None]
    return Theory(
        layers=tuple(layers),
        first_loss=_first_loss(config, stream, batch, vocab_size=vocab_size),
        product=max(known) if len(known) == len(products) else None,
        update_ratio=_update_ratios(config, batch, vocab_size=vocab_size, lr=lr),
    )


def _softmax(
    config: Config, given: Stream, layer: int, batch: Batch, *, vocab_size: int
) -> tuple[dict[str, float | None], float, float | None]:
    """Statistics of a layer's softmax, mean Σp² of all queries, and the largest q.k."""
    attention, n, n_heads = config.attention, config.model.seq_len, config.model.n_heads
    n_batch = min(config.data.batch_size, MOST_LOGITS // (n_heads * n * n))
    is_whole = n_batch == config.data.batch_size
    generator = Generator().manual_seed(SEED + layer)
    q, k = (
        _drawn(config, given, (max(1, n_batch), n_heads, n, config.d_head), name, generator, vocab_size=vocab_size)
        for name in ("q", "k")
    )
    cpu = torch.device("cpu")
    scale = (
        scale_of(attention.scale, d_head=config.d_head, layer=layer) or config.d_head**-0.5
    )  # a learned one begins so
    visible = visible_keys(mask=attention.mask, window=config.windows[layer], n_queries=n, n_keys=n, device=cpu)
    if batch.visible_BS is not None:
        real_BT = batch.visible_BS[: len(q)].cpu()
        visible = with_padding(visible, real_BT if attention.mask == "padding" else None)
        queries_B1T1 = real_BT[:, None, :, None]  # those of padding are left out, as in training
        visible = queries_B1T1 if visible is None else visible & queries_B1T1
    stats = attention_stats(
        q,
        k,
        scale,
        visible,
        bias=alibi_bias(n_heads, n, n, device=cpu) if config.model.position == "alibi" else None,
        softcap=attention.logit_softcap,
        rows="all" if n_batch else ROWS,
    )
    told: dict[str, float | None] = {name: float(stats[name].mean()) for name in TOLD}
    told["max_logit"] = float(stats["max_logit"].max()) if is_whole else None  # of fewer draws it is smaller
    rows, left_out = stats["rows"].sum(), stats["rows_left_out"].sum()
    concentration = float((rows * (1 - stats["softmax_gain"].mean()) + left_out) / (rows + left_out))
    product = None
    if is_whole:
        products = q @ k.mT
        product = float((products if visible is None else products.masked_fill(~visible, -torch.inf)).max())
    return told, concentration, product


def _drawn(
    config: Config,
    given: Stream,
    shape: tuple[int, int, int, int],
    name: str,
    generator: Generator,
    *,
    vocab_size: int,
) -> Tensor:
    """Queries or keys of one layer, (B, H, T, K): what tokens share, and what each has of its own."""
    n_batch, n_heads, n, d_head = shape
    passes = config.model.d_model * weight_variance(config, name, vocab_size=vocab_size)
    own, shared = max(0.0, given.square - given.shared), max(0.0, given.shared)
    x_BHTK = math.sqrt(passes * own) * torch.randn(shape, generator=generator)
    x_BHTK += math.sqrt(passes * shared) * torch.randn(n_batch, n_heads, 1, d_head, generator=generator)
    if config.attention.qk_norm:
        x_BHTK = F.rms_norm(x_BHTK, (d_head,))
    if config.model.position == "rope":
        x_BHTK = rotate(x_BHTK, *rope_angles(n, d_head, device=torch.device("cpu")))
    return x_BHTK


def _first_loss(config: Config, stream: Stream, batch: Batch, *, vocab_size: int) -> float:
    """Cross-entropy of normal output logits of the spread that the head gives them, mean of a seeded draw.

    A tied head knows the token that it was given again: its own logit is that much larger.
    """
    model = config.model
    given = stream.normed(model.norm_kind) if model.norm == "pre" else stream
    tied = model.tie_embeddings
    std = config.init.embedding_std
    variance = std * std if tied else weight_variance(config, "head", vocab_size=vocab_size)
    spread = math.sqrt(given.square * model.d_model * variance)
    rows = max(1, MOST_OUTPUTS // vocab_size)
    z_RV = spread * torch.randn(min(rows, 4096), vocab_size, generator=Generator().manual_seed(SEED))
    own = model.d_model * variance * math.sqrt(given.square / stream.square) if tied else 0.0
    z_RV[:, 0] += own
    scored_BT = batch.targets_BT >= 0
    itself = float((batch.targets_BT == batch.tokens_BT)[scored_BT].float().mean())
    return float(z_RV.logsumexp(dim=-1).mean()) - itself * own


def _update_ratios(config: Config, batch: Batch, *, vocab_size: int, lr: float) -> dict[str, float]:
    """Where the size of the first update does not depend on that of the gradient: Adam's is lr for each entry that has one.

    Muon's is that of an orthogonal direction; it is smaller where the gradient has few directions of any size.
    """
    optimizer, model = config.optimizer, config.model
    if optimizer.name == "sgd":
        return {}
    names = ("q", "k", "v", "o", "mlp_in", "mlp_out", "head")
    ratios = {}
    for name in names[: len(names) - model.tie_embeddings]:
        is_muons = optimizer.name == "muon" and (name in MATRICES or name in ("q", "k", "v"))
        size = lr * (MUON_RMS if is_muons else 1.0)
        decay = optimizer.weight_decay if name in DECAYED or name in ("q", "k", "v") else 0.0
        # The weights and the signs of their gradients have nothing to do with each other.
        ratios[name] = math.hypot(
            size / math.sqrt(weight_variance(config, name, vocab_size=vocab_size)),
            lr * decay,
        )
    if model.norm != "none":
        ratios["norm"] = lr
    if not model.tie_embeddings:  # a tied one has gradients of any size
        n_positions = model.seq_len if model.position == "learned" else 0
        touched = (len(batch.tokens_BT.unique()) + n_positions) / (vocab_size + n_positions)
        ratios["embedding"] = lr * math.sqrt(touched) / config.init.embedding_std
    return ratios
