"""A GPT-2 of transformers, from a config: what the programs are that call a model which others wrote.

Shape key: B batch, T position, V vocabulary, D d_model.
"""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from attnscope.bench.faults.recipe import Recipe


def has_transformers() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("transformers") is not None


class BorrowedGPT(nn.Module):
    """GPT2LMHeadModel; gives output logits, as the other programs' models do."""

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__()
        transformers: Any = importlib.import_module("transformers")
        config = transformers.GPT2Config(
            vocab_size=vocab_size,
            n_positions=recipe.seq_len,
            n_embd=recipe.d_model,
            n_layer=recipe.n_layers,
            n_head=recipe.n_heads,
            resid_pdrop=recipe.dropout,
            embd_pdrop=recipe.dropout,
            attn_pdrop=0.0,
            scale_attn_weights=recipe.scale > 0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.recipe = recipe
        self.model: Any = transformers.GPT2LMHeadModel(config)
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        recipe = self.recipe
        nn.init.normal_(self.model.transformer.wte.weight, std=recipe.embedding_std)
        for name, weight in self.model.transformer.h.named_parameters():
            if weight.dim() == 2:
                weight *= recipe.gain
            if name.endswith("attn.c_attn.weight"):  # (D, 3 D): q, k and v side by side
                weight[:, : 2 * recipe.d_model] *= recipe.qk_gain

    def forward(self, tokens_BT: Tensor) -> Tensor:
        logits_BTV: Tensor = self.model(tokens_BT).logits
        return logits_BTV
