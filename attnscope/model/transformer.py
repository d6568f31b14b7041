"""The forward pass on one page: M transformers at once, as a function of their parameters.

Every parameter has a leading member axis M and nothing mixes members, so each follows the same numbers as it would
alone. An `Observer` sees each layer's attention inputs and residual stream as they pass.

Shape key: M member, L layer, H head, B batch, T query position, S key position, N = B x T tokens, D d_model,
E = n_heads x d_head, J = 3 x E (q, k and v side by side), K d_head, F d_ff, V vocab.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from attnscope.config import Config
from attnscope.model.attention import BACKENDS, AttentionInputs, Dropout
from attnscope.model.masks import visible_keys, with_padding
from attnscope.model.position import alibi_bias, rope_angles, rotate, sinusoids

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class Observer(Protocol):
    """Looks at a forward pass while its numbers are still in the cache, and changes nothing."""

    def attention(self, layer: int, inputs: AttentionInputs) -> None:
        """Called with what decides the attention weights of each layer."""

    def residual(self, layer: int, x_MND: Tensor) -> None:
        """Called with the residual stream after each layer, before a final norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What depends on the config and the sequence length alone; computed once, used every step."""

    seq_len: int
    visible_TS: tuple[Tensor | None, ...]
    mask_TS: tuple[Tensor | None, ...]
    positions_TD: Tensor | None
    rope_TK: tuple[Tensor, Tensor] | None
    bias_HTS: Tensor | None


def geometry_of(config: Config, *, seq_len: int, device: torch.device) -> Geometry:
    """Masks of every layer and position encodings for sequences of `seq_len` tokens."""
    model = config.model
    seen = {
        window: visible_keys(
            mask=config.attention.mask,
            window=window,
            n_queries=seq_len,
            n_keys=seq_len,
            device=device,
        )
        for window in set(config.windows)
    }
    added = {
        window: (
            None
            if visible_TS is None or model.position == "alibi"
            else torch.zeros(seq_len, seq_len, device=device).masked_fill(~visible_TS, float("-inf"))
        )
        for window, visible_TS in seen.items()
    }
    return Geometry(
        seq_len=seq_len,
        visible_TS=tuple(seen[window] for window in config.windows),
        mask_TS=tuple(added[window] for window in config.windows),
        positions_TD=(sinusoids(seq_len, model.d_model, device=device) if model.position == "sinusoidal" else None),
        rope_TK=(rope_angles(seq_len, config.d_head, device=device) if model.position == "rope" else None),
        bias_HTS=(alibi_bias(model.n_heads, seq_len, seq_len, device=device) if model.position == "alibi" else None),
    )


def forward(
    parameters: Mapping[str, Tensor],
    config: Config,
    geometry: Geometry,
    tokens_BT: Tensor,
    *,
    attn_scale_ML: Tensor,
    real_BS: Tensor | None = None,
    dropout_seeds_LM: Sequence[Sequence[int]] | None = None,
    observer: Observer | None = None,
) -> Tensor:
    """Run every member on the same tokens.

    Args:
        parameters: as `initial_parameters` gives them, in the compute dtype.
        config: any member's; per-member settings are not read here.
        geometry: `geometry_of(config, seq_len=T)`.
        tokens_BT: token ids, the same for every member, or (M, B, T) with each member's own; T may differ from the
            configured seq_len, but learned positions end there.
        attn_scale_ML: what multiplies q.k in every layer.
        real_BS: False on padding; None = no padding.
        dropout_seeds_LM: one seed per layer and member while training with dropout; None = no dropout.
        observer: sees what passes; None = nobody.

    Returns:
        Output logits (M, N, V) in the compute dtype.
    """
    model, attention = config.model, config.attention
    embedding_MVD = parameters["token_embedding"]
    n_members, vocab_size, _ = embedding_MVD.shape
    n_batch, seq_len = tokens_BT.shape[-2:]
    dtype = embedding_MVD.dtype
    attn_scale_ML = attn_scale_ML.to(dtype)

    # One lookup in the members' stacked tables: member m's rows start at m x vocab_size.
    row_MBT = tokens_BT.expand(n_members, n_batch, seq_len)
    if n_members > 1:
        first_row_M = torch.arange(n_members, device=tokens_BT.device) * vocab_size
        row_MBT = row_MBT + first_row_M[:, None, None]
    x_MBTD = F.embedding(row_MBT, embedding_MVD.flatten(0, 1))
    if model.position == "learned":
        x_MBTD = x_MBTD + parameters["position_embedding"][:, None, :seq_len]
    elif geometry.positions_TD is not None:
        x_MBTD = x_MBTD + geometry.positions_TD.to(dtype)
    x_MND = x_MBTD.flatten(1, 2)

    def norm(x_MND: Tensor, gain_MD: Tensor) -> Tensor:
        normalized = (
            F.layer_norm(x_MND, x_MND.shape[-1:])
            if model.norm_kind == "layernorm"
            else F.rms_norm(x_MND, x_MND.shape[-1:])
        )
        return normalized * gain_MD[:, None]

    def heads(qkv_MNJ: Tensor) -> tuple[Tensor, ...]:
        """Split into q, k and v, each (M, B, H, T, K) and contiguous."""
        qkv_MBT3HK = qkv_MNJ.view(n_members, n_batch, seq_len, 3, model.n_heads, -1)
        return tuple(x_MBTHK.transpose(2, 3).contiguous() for x_MBTHK in qkv_MBT3HK.unbind(3))

    qkv_MLDJ = parameters["qkv"].flatten(-2)  # one product instead of three
    others = (parameters[name] for name in ("o", "mlp_in", "mlp_out"))
    layers = zip(*(x.unbind(1) for x in (qkv_MLDJ, *others)), strict=True)
    padding_BS = real_BS if attention.mask == "padding" else None
    for layer, (qkv_MDJ, o_MED, mlp_in_MDF, mlp_out_MFD) in enumerate(layers):
        y_MND = norm(x_MND, parameters["norm_attention"][:, layer]) if model.norm == "pre" else x_MND
        q_MBHTK, k_MBHTK, v_MBHTK = heads(torch.bmm(y_MND, qkv_MDJ))
        if attention.qk_norm:  # Henry et al. 2020; RMSNorm with a gain, as in OLMo 2
            gains = (parameters["norm_q"][:, layer], parameters["norm_k"][:, layer])
            q_MBHTK, k_MBHTK = (
                F.rms_norm(x, x.shape[-1:]) * gain_MK[:, None, None, None]
                for x, gain_MK in zip((q_MBHTK, k_MBHTK), gains, strict=True)
            )
        if geometry.rope_TK is not None:
            q_MBHTK, k_MBHTK = rotate(q_MBHTK, *geometry.rope_TK), rotate(k_MBHTK, *geometry.rope_TK)
        scale_MBHTS = (
            parameters["scale"][:, layer, None, :, None, None]
            if attention.scale == "learned"
            else attn_scale_ML[:, layer, None, None, None, None]
        )
        inputs = AttentionInputs(
            q_MBHTK=q_MBHTK,
            k_MBHSK=k_MBHTK,
            attn_scale=scale_MBHTS,
            visible=with_padding(geometry.visible_TS[layer], padding_BS),
            bias_HTS=geometry.bias_HTS,
            softcap=attention.logit_softcap,
            mask_TS=geometry.mask_TS[layer] if padding_BS is None else None,
            is_causal=(attention.mask == "causal" and not config.windows[layer] and geometry.bias_HTS is None),
        )
        if observer is not None:
            observer.attention(layer, inputs)
        dropout = Dropout(p=attention.dropout, seeds=dropout_seeds_LM[layer]) if dropout_seeds_LM is not None else None
        out_MBHTK = BACKENDS[attention.backend](inputs, v_MBHTK, dropout)
        out_MNE = out_MBHTK.transpose(2, 3).reshape(n_members, -1, o_MED.shape[1])
        x_MND = torch.baddbmm(x_MND, out_MNE, o_MED)
        if model.norm == "post":
            x_MND = norm(x_MND, parameters["norm_attention"][:, layer])

        y_MND = norm(x_MND, parameters["norm_mlp"][:, layer]) if model.norm == "pre" else x_MND
        hidden_MNF = ACTIVATIONS[model.activation](torch.bmm(y_MND, mlp_in_MDF))
        x_MND = torch.baddbmm(x_MND, hidden_MNF, mlp_out_MFD)
        if model.norm == "post":
            x_MND = norm(x_MND, parameters["norm_mlp"][:, layer])
        if observer is not None:
            observer.residual(layer, x_MND)

    if model.norm == "pre":
        x_MND = norm(x_MND, parameters["norm_final"])
    head_MDV = embedding_MVD.mT if model.tie_embeddings else parameters["head"]
    return torch.bmm(x_MND, head_MDV)
