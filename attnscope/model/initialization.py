"""The weights at step 0: one scheme per function, SCHEMES lists them, and every member draws from its own seed.

Matrices are stored as (fan_in, fan_out). q, k and v are drawn as separate matrices: Xavier's fan-out taken over a
fused one is smaller by √2 and hides the explosion that attnscope is about. They are stored side by side in one
parameter, `qkv` (fan_in, 3, fan_out), so that one product makes all three.

Shape key: M member, L layer, H head, D d_model, E n_heads x d_head, K d_head, F d_ff, T position, V vocab.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Generator, Tensor

from attnscope.config import Config, scale_of

Shape = tuple[int, int]

QKV = ("q", "k", "v")  # along the axis before the last of the parameter `qkv`


def xavier_uniform(shape: Shape, *, std: float, generator: Generator) -> Tensor:
    """U(-a, a) with a = √(6 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""
    bound = math.sqrt(6 / sum(shape))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def xavier_normal(shape: Shape, *, std: float, generator: Generator) -> Tensor:
    """N(0, 2 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""
    return torch.empty(shape).normal_(0, math.sqrt(2 / sum(shape)), generator=generator)


def kaiming(shape: Shape, *, std: float, generator: Generator) -> Tensor:
    """N(0, 2 / fan_in) (He et al. 2015)."""
    return torch.empty(shape).normal_(0, math.sqrt(2 / shape[0]), generator=generator)


def normal(shape: Shape, *, std: float, generator: Generator) -> Tensor:
    """N(0, std²) with `init.std`."""
    return torch.empty(shape).normal_(0, std, generator=generator)


def orthogonal(shape: Shape, *, std: float, generator: Generator) -> Tensor:
    """A random (semi-)orthogonal matrix (Saxe et al. 2014)."""
    tall = torch.empty(max(shape), min(shape)).normal_(generator=generator)
    q, r = torch.linalg.qr(tall)
    q = q * r.diagonal().sign()  # makes the distribution uniform (Mezzadri 2007)
    return q if shape[0] >= shape[1] else q.T


SCHEMES: dict[str, Callable[..., Tensor]] = {
    "xavier_uniform": xavier_uniform,
    "xavier_normal": xavier_normal,
    "kaiming": kaiming,
    "normal": normal,
    "orthogonal": orthogonal,
    "gpt2": normal,  # and the matrices that write into the residual stream / √(2 n_layers), see below
}


def initial_parameters(members: Sequence[Config], *, vocab_size: int) -> dict[str, Tensor]:
    """Draw the parameters of every member of one part.

    Args:
        members: configs that differ in per-member settings only.
        vocab_size: tokens the data knows.

    Returns:
        Name to float32 tensor with leading axis M, then L for what every layer has. The same seed gives the same
        weights whoever the neighbours are and whichever device they move to.
    """
    drawn = [_draw(config, vocab_size) for config in members]
    return {name: torch.stack([parameters[name] for parameters in drawn]) for name in drawn[0]}


def _draw(config: Config, vocab_size: int) -> dict[str, Tensor]:
    model, init = config.model, config.init
    generator = Generator().manual_seed(config.train.seed)
    scheme = SCHEMES[init.scheme]

    def matrix(shape: Shape, gain: float) -> Tensor:
        return gain * scheme(shape, std=init.std, generator=generator)

    d_model, d_attn, d_ff = model.d_model, model.n_heads * config.d_head, config.d_ff
    # GPT-2 (Radford et al. 2019): 1 / √(residual writes), so that depth does not grow the stream.
    write_gain = init.gain / (math.sqrt(2 * model.n_layers) if init.scheme == "gpt2" else 1)
    shapes: dict[str, tuple[Shape, float]] = {
        "q": ((d_model, d_attn), init.gain * init.qk_gain),
        "k": ((d_model, d_attn), init.gain * init.qk_gain),
        "v": ((d_model, d_attn), init.gain),
        "o": ((d_attn, d_model), write_gain),
        "mlp_in": ((d_model, d_ff), init.gain),
        "mlp_out": ((d_ff, d_model), write_gain),
    }
    parameters = {
        "token_embedding": torch.empty(vocab_size, d_model).normal_(0, init.embedding_std, generator=generator)
    }
    if model.position == "learned":
        parameters["position_embedding"] = torch.empty(model.seq_len, d_model).normal_(
            0, init.embedding_std, generator=generator
        )
    layers = [{name: matrix(shape, gain) for name, (shape, gain) in shapes.items()} for _ in range(model.n_layers)]
    for layer in layers:
        layer["qkv"] = torch.stack([layer.pop(name) for name in QKV], dim=-2)
    for name in ("qkv", "o", "mlp_in", "mlp_out"):
        parameters[name] = torch.stack([layer[name] for layer in layers])
    if not model.tie_embeddings:
        parameters["head"] = matrix((d_model, vocab_size), init.gain)
    if model.norm != "none":
        parameters["norm_attention"] = torch.ones(model.n_layers, d_model)
        parameters["norm_mlp"] = torch.ones(model.n_layers, d_model)
    if model.norm == "pre":
        parameters["norm_final"] = torch.ones(d_model)
    if config.attention.qk_norm:
        parameters["norm_q"] = torch.ones(model.n_layers, config.d_head)
        parameters["norm_k"] = torch.ones(model.n_layers, config.d_head)
    if config.attention.scale == "learned":
        parameters["scale"] = torch.full((model.n_layers, model.n_heads), 1 / math.sqrt(config.d_head))
    return parameters


def apart(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with q, k and v as matrices of their own: views of `qkv`, (..., D, 3, E), each (..., D, E)."""
    parts: dict[str, Tensor] = {}
    for name, value in parameters.items():
        parts |= zip(QKV, value.unbind(-2), strict=True) if name == "qkv" else {name: value}
    return parts


def attn_scales(members: Sequence[Config]) -> Tensor:
    """What multiplies q.k in every layer, (M, L) float32; 1 where it is learned: the parameter `scale` takes its place."""
    rows = []
    for config in members:
        rule, layers = config.attention.scale, range(config.model.n_layers)
        scales = [scale_of(rule, d_head=config.d_head, layer=layer) for layer in layers]
        rows.append([1.0 if scale is None else scale for scale in scales])
    return torch.tensor(rows)
