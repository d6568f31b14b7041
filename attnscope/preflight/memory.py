"""How much memory a member takes, from the shapes of its config: what stays, and what a forward pass keeps for the backward pass."""

from attnscope.config import Config

FLOAT32 = 4  # bytes: weights, gradients and the optimizer's memory, whatever the precision
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


def state_bytes(config: Config, *, vocab_size: int) -> int:
    """Weights, gradients and optimizer."""
    matrices, rest = _counts(config, vocab_size)
    kept = {"sgd": (1, 1), "adamw": (2, 2), "muon": (1, 2)}[config.optimizer.name]
    return FLOAT32 * (matrices * (2 + kept[0]) + rest * (2 + kept[1]))


def activation_bytes(config: Config, *, vocab_size: int) -> int:
    """Kept for the backward pass, as in Korthikanti et al. 2022, section 4, without dropout and for this model.

    A layer keeps what each product, norm, softmax and nonlinearity was given: the stream and its norms, q, k, v and what attention
    gives, the attention weights (a fused kernel keeps none), the MLP before and after its nonlinearity.
    """
    model, attention = config.model, config.attention
    d_model, d_attn = model.d_model, model.n_heads * config.d_head
    n_tokens = config.data.batch_size * model.seq_len
    streams = {"none": 2, "pre": 6, "post": 6}[model.norm]
    weights = 0 if attention.backend == "sdpa" else model.n_heads * model.seq_len
    weights *= 1 + bool(attention.logit_softcap)
    q_and_k = (4 if attention.qk_norm else 2) * d_attn
    layer = streams * d_model + q_and_k + 2 * d_attn + weights + 2 * config.d_ff
    width = WIDTH[config.precision.dtype]
    output = n_tokens * ((3 if model.norm == "pre" else 1) * d_model * width + vocab_size * FLOAT32)
    # In half precision each step casts the weights.
    cast = 0 if width == FLOAT32 else width * sum(_counts(config, vocab_size))
    return model.n_layers * n_tokens * layer * width + output + cast


def _counts(config: Config, vocab_size: int) -> tuple[int, int]:
    """Parameters in the matrices inside layers, and all others."""
    model = config.model
    d_attn = model.n_heads * config.d_head
    matrices = model.n_layers * (4 * model.d_model * d_attn + 2 * model.d_model * config.d_ff)
    rest = vocab_size * model.d_model * (1 if model.tie_embeddings else 2)
    rest += model.seq_len * model.d_model if model.position == "learned" else 0
    rest += {"none": 0, "pre": 2 * model.n_layers + 1, "post": 2 * model.n_layers}[model.norm] * model.d_model
    rest += 2 * model.n_layers * config.d_head if config.attention.qk_norm else 0
    rest += model.n_layers * model.n_heads if config.attention.scale == "learned" else 0
    return matrices, rest
