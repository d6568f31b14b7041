"""The loop to compare with: a GPT of the same shape as people write it with `nn.Module`, records nothing.

Shape key: B batch, T position, D d_model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnscope.config import Config
from attnscope.data import Corpus


class PlainBlock(nn.Module):
    """Attention and MLP around a residual stream, without normalization, like the default model."""

    mask: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        d_model = config.model.d_model
        self.n_heads = config.model.n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.mlp_in = nn.Linear(d_model, config.d_ff, bias=False)
        self.mlp_out = nn.Linear(config.d_ff, d_model, bias=False)
        seq_len = config.model.seq_len
        self.register_buffer("mask", torch.ones(seq_len, seq_len, dtype=torch.bool).tril())

    def forward(self, x_BTD: Tensor) -> Tensor:
        """One block."""
        n_batch, seq_len, d_model = x_BTD.shape
        q, k, v = (y.view(n_batch, seq_len, self.n_heads, -1).transpose(1, 2) for y in self.qkv(x_BTD).chunk(3, dim=-1))
        z = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        p = F.softmax(z.masked_fill(~self.mask, float("-inf")), dim=-1)
        x_BTD = x_BTD + self.out((p @ v).transpose(1, 2).reshape(n_batch, seq_len, d_model))
        return x_BTD + self.mlp_out(F.gelu(self.mlp_in(x_BTD)))


class PlainGPT(nn.Module):
    """Embeddings, blocks, LM head."""

    def __init__(self, config: Config, *, vocab_size: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, config.model.d_model)
        self.position = nn.Embedding(config.model.seq_len, config.model.d_model)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.model.n_layers))
        self.head = nn.Linear(config.model.d_model, vocab_size, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Output logits (B, T, V)."""
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.token(tokens_BT) + self.position(positions_T)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(x_BTD)


class PlainLoop:
    """Forward, cross-entropy, backward, SGD with momentum."""

    def __init__(self, config: Config, data: Corpus, *, weights: dict[str, Tensor]) -> None:
        """`weights` are those of a member, so that both loops compute with the same numbers."""
        self.model = PlainGPT(config, vocab_size=data.vocab_size)
        self._data = data
        self._step = 0
        self._copy(weights)
        self._optimizer = torch.optim.SGD(
            self.model.parameters(), lr=config.optimizer.lr, momentum=config.optimizer.momentum
        )

    @torch.no_grad()
    def _copy(self, weights: dict[str, Tensor]) -> None:
        model = self.model
        model.token.weight.copy_(weights["token_embedding"])
        model.position.weight.copy_(weights["position_embedding"])
        model.head.weight.copy_(weights["head"].T)
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, PlainBlock)
            block.qkv.weight.copy_(weights["qkv"][layer].flatten(-2).T)
            block.out.weight.copy_(weights["o"][layer].T)
            block.mlp_in.weight.copy_(weights["mlp_in"][layer].T)
            block.mlp_out.weight.copy_(weights["mlp_out"][layer].T)

    def step(self) -> Tensor:
        """One update; the loss before it."""
        batch = self._data.train_batch(self._step)
        logits_BTV = self.model(batch.tokens_BT)
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), batch.targets_BT.flatten())
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self._step += 1
        return loss.detach()
