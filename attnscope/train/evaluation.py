"""Held-out loss, longer sequences, and generation, for all members of a part.

Shape key: M member, B batch, T position, N = B x T tokens, V vocab.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attnscope.data import IGNORE, Batch, Corpus
from attnscope.metrics.loss import token_losses
from attnscope.model import geometry_of
from attnscope.train.step import Setup

BATCHES = 8  # of held-out data per evaluation
PREFIX_SEQUENCES = 32  # of held-out data for the loss from prefixes


def reachable_lengths(setup: Setup) -> tuple[int, ...]:
    """The sequence lengths of `train.eval_lengths` that the model has positions for.

    A learned position table ends at the trained seq_len; nothing sensible can be read beyond it.
    """
    model = setup.config.model
    return tuple(
        factor * model.seq_len
        for factor in setup.config.train.eval_lengths
        if factor == 1 or model.position != "learned"
    )


@torch.no_grad()
def held_out_loss(setup: Setup, parameters: Mapping[str, Tensor], data: Corpus, *, seq_len: int) -> Tensor:
    """Mean cross-entropy on the same held-out batches every time, (M,), nats per token."""
    losses_M = []
    for batch in data.val_batches(seq_len=seq_len, count=BATCHES):
        on_device = to_device(batch, setup.device)
        logits_MNV = _forward(setup, parameters, on_device.tokens_BT, on_device.visible_BS)
        targets_N = on_device.targets_BT.flatten()
        losses_M.append(token_losses(logits_MNV, targets_N, ignore=IGNORE).loss_M)
    return torch.stack(losses_M).mean(dim=0)


@torch.no_grad()
def loss_from_prefixes(setup: Setup, parameters: Mapping[str, Tensor], data: Corpus) -> Tensor:
    """Mean cross-entropy when every token is predicted from its prefix alone, as in generation; (M,), nats per token.

    With a causal mask this is the held-out loss. Without one it is not: the model has learned to read the answer from
    the next position, which generation does not have.
    """
    seq_len = setup.config.model.seq_len
    batches = data.val_batches(seq_len=seq_len, count=BATCHES)
    tokens_BT = torch.cat([batch.tokens_BT for batch in batches])[:PREFIX_SEQUENCES].to(setup.device)
    targets_BT = torch.cat([batch.targets_BT for batch in batches])[:PREFIX_SEQUENCES].to(setup.device)
    last_logits_MBV = []
    for length in range(1, seq_len + 1):
        logits_MNV = _forward(setup, parameters, tokens_BT[:, :length], None)
        logits_MBTV = logits_MNV.unflatten(1, (len(tokens_BT), length))
        last_logits_MBV.append(logits_MBTV[:, :, -1])
    logits_MNV = torch.stack(last_logits_MBV, dim=2).flatten(1, 2)
    return token_losses(logits_MNV, targets_BT.flatten(), ignore=IGNORE).loss_M


@torch.no_grad()
def generate(setup: Setup, parameters: Mapping[str, Tensor], prompt_T: Tensor, *, n_tokens: int) -> Tensor:
    """Sample n_tokens tokens per member after a prompt, at temperature 1, each member with its own generator.

    The model sees the last seq_len tokens. A member whose logits are not finite goes on with token 0.

    Returns:
        Token ids (M, n_tokens) on the CPU, without the prompt.
    """
    n_members = len(setup.configs)
    generators = [torch.Generator().manual_seed(config.train.seed) for config in setup.configs]
    tokens_M1T = prompt_T.to(setup.device).expand(n_members, 1, -1)
    for _ in range(n_tokens):
        seen_M1T = tokens_M1T[..., -setup.config.model.seq_len :]
        logits_MNV = _forward(setup, parameters, seen_M1T, None)
        probabilities_MV = logits_MNV[:, -1].float().softmax(dim=-1).cpu()
        next_M = [
            torch.multinomial(p_V, 1, generator=generator)
            if p_V.isfinite().all()
            else torch.zeros(1, dtype=torch.int64)
            for p_V, generator in zip(probabilities_MV, generators, strict=True)
        ]
        next_M11 = torch.stack(next_M)[:, None].to(setup.device)
        tokens_M1T = torch.cat([tokens_M1T, next_M11], dim=-1)
    return tokens_M1T[:, 0, len(prompt_T) :].cpu()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch on another device, without waiting for the copy."""
    if device.type == "cpu":
        return batch
    return replace(
        batch,
        tokens_BT=batch.tokens_BT.to(device, non_blocking=True),
        targets_BT=batch.targets_BT.to(device, non_blocking=True),
        visible_BS=(None if batch.visible_BS is None else batch.visible_BS.to(device, non_blocking=True)),
    )


def _forward(setup: Setup, parameters: Mapping[str, Tensor], tokens: Tensor, real_BS: Tensor | None) -> Tensor:
    seq_len = tokens.shape[-1]
    geometry = (
        setup.geometry
        if seq_len == setup.geometry.seq_len
        else geometry_of(setup.config, seq_len=seq_len, device=setup.device)
    )
    return setup.forward(
        {name: value.to(setup.dtype) for name, value in parameters.items()},
        setup.config,
        geometry,
        tokens,
        attn_scale_ML=setup.attn_scale_ML,
        real_BS=real_BS,
    )
