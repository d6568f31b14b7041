"""The model of a program, as people write it by hand: nothing of it knows attnscope.

Shape key: B batch, H head, T query position, S key position, D d_model, K d_head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnscope.bench.faults.recipe import Recipe

HIDDEN = {"added": 1e4, "faint": -1e-12}  # what hidden keys get in place of -inf


class SelfAttention(nn.Module):
    """Self-attention with its own q, k and v."""

    def __init__(self, recipe: Recipe, layer: int) -> None:
        super().__init__()
        d_model = recipe.d_model
        self.recipe, self.layer, self.n_heads = recipe, layer, recipe.n_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, x_BTD: Tensor, padded_BS: Tensor | None) -> Tensor:
        recipe = self.recipe
        if recipe.over_batch:
            x_BTD = x_BTD.transpose(0, 1)
        q, k, v = (part(x_BTD).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if recipe.copies_heads:
            q, k = (x[:, :1].expand_as(x) for x in (q, k))
        if self.layer in recipe.dead_layers:
            q, k = q * 0.0, k * 0.0
        if recipe.position == "rope":
            q, k = rotated(q), rotated(k)
        if recipe.repeats_keys:
            k = k[:, :, :1].expand_as(k)
        y = self._attend(q, k, v, hidden_TT(recipe, x_BTD.shape[1], x_BTD.device), padded_BS)
        y = self.proj(y.transpose(1, 2).flatten(2))
        return y.transpose(0, 1) if recipe.over_batch else y

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, padded_BS: Tensor | None) -> Tensor:
        recipe = self.recipe
        scale = recipe.scale * q.shape[-1] ** -0.5 if recipe.scale else 1.0
        if recipe.attention == "sdpa" and recipe.softmax_axis == -1:
            given = None if recipe.scale == 1.0 else scale
            if padded_BS is not None:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=~padded_BS[:, None, None], scale=given)
            if hidden is None or recipe.mask == "causal":
                return F.scaled_dot_product_attention(q, k, v, is_causal=hidden is not None, scale=given)
            lowest = HIDDEN.get(recipe.mask, -torch.inf)
            added = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill(hidden, lowest)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=given)
        z = q @ k.transpose(-2, -1) * scale
        if padded_BS is not None:
            z = z.masked_fill(padded_BS[:, None, None], torch.finfo(z.dtype).min)
        if hidden is not None:
            other = HIDDEN.get(recipe.mask)
            z = z.masked_fill(hidden, -torch.inf) if other is None else z + hidden * other
        return F.softmax(z, dim=recipe.softmax_axis) @ v


class Packed(nn.Module):
    """nn.MultiheadAttention."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.attn = nn.MultiheadAttention(recipe.d_model, recipe.n_heads, batch_first=not recipe.over_batch)

    def forward(self, x_BTD: Tensor, padded_BS: Tensor | None) -> Tensor:
        hidden = hidden_TT(self.recipe, x_BTD.shape[1], x_BTD.device)
        y, _ = self.attn(x_BTD, x_BTD, x_BTD, attn_mask=hidden, key_padding_mask=padded_BS, need_weights=False)
        return y


class SwiGLU(nn.Module):
    """Shazeer 2020."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(d_model, 3 * d_model, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class NormOverOne(nn.Module):
    """A norm of each feature by itself, of which nothing is left."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.unsqueeze(-1)).squeeze(-1)


class TransformerBlock(nn.Module):
    """Attention and an MLP, with the norm before, after or nowhere."""

    def __init__(self, recipe: Recipe, layer: int) -> None:
        super().__init__()
        d_model = recipe.d_model
        self.recipe, self.layer = recipe, layer
        self.norm_1, self.norm_2 = (_norm(recipe) for _ in range(2))
        self.attn = Packed(recipe) if recipe.attention == "mha" else SelfAttention(recipe, layer)
        self.mlp = (
            SwiGLU(d_model)
            if recipe.mlp == "swiglu"
            else nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))
        )
        self.drop = nn.Dropout(recipe.dropout)

    def forward(self, x: Tensor, padded_BS: Tensor | None) -> Tensor:
        recipe = self.recipe
        is_post = recipe.norm == "post"
        for norm, branch in ((self.norm_1, self.attn), (self.norm_2, self.mlp)):
            read = x if is_post else norm(x)
            y = self.drop(branch(read, padded_BS) if branch is self.attn else branch(read))
            if self.layer in recipe.detached:
                y = y.detach()
            is_added = recipe.has_residual and (branch is self.mlp or recipe.has_attention_residual)
            x = x + y if is_added else y
            x = norm(x) if is_post else x
        return x


def _norm(recipe: Recipe) -> nn.Module:
    if recipe.norm == "none":
        return nn.Identity()
    return NormOverOne() if recipe.norm_over == "one" else nn.LayerNorm(recipe.d_model)


class GPT(nn.Module):
    """Token and position embeddings, blocks, and an output layer."""

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__()
        self.recipe = recipe
        # The objective's last id is that of the padding.
        self.padding = vocab_size - 1 if recipe.objective == "masked" else None
        self.wte = nn.Embedding(vocab_size, recipe.d_model, padding_idx=self.padding)
        self.wpe = nn.Embedding(recipe.seq_len, recipe.d_model) if recipe.position == "learned" else None
        self.h = nn.ModuleList(TransformerBlock(recipe, layer) for layer in range(recipe.n_layers))
        self.ln_f = nn.LayerNorm(recipe.d_model) if recipe.norm == "pre" else nn.Identity()
        self.head = nn.Linear(recipe.d_model, vocab_size, bias=False)
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        recipe = self.recipe
        nn.init.normal_(self.wte.weight, std=recipe.embedding_std)
        if self.padding is not None:
            self.wte.weight[self.padding] = 0.0
        if self.wpe is not None:
            nn.init.normal_(self.wpe.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        for name, weight in self.h.named_parameters():
            if weight.dim() == 2:
                of_qk = ".attn.q." in name or ".attn.k." in name
                nn.init.xavier_uniform_(weight, gain=recipe.gain * (recipe.qk_gain if of_qk else 1.0))
        if recipe.ties:
            self.head.weight = self.wte.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.wte(tokens_BT)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(tokens_BT.shape[1]))
        padded_BS = self._padded(tokens_BT)
        for block in self.h:
            x = block(x, padded_BS)
        return self.head(self.ln_f(x))

    def _padded(self, tokens_BT: Tensor) -> Tensor | None:
        """Which keys are hidden because they are padding, or so it was meant."""
        if self.padding is None or self.recipe.padding == "seen":
            return None
        is_padding_BS = tokens_BT == self.padding
        return ~is_padding_BS if self.recipe.padding == "inverted" else is_padding_BS


def hidden_TT(recipe: Recipe, n: int, device: torch.device) -> Tensor | None:
    """Which keys (columns) each query does not see; None = it sees all."""
    if recipe.objective == "masked" or recipe.mask == "none":
        return None
    ones = torch.ones(n, n, dtype=torch.bool, device=device)
    if recipe.mask == "transposed":
        return ones.tril(-1)
    return ones.triu({"off_by_one": 2, "strict": 0}.get(recipe.mask, 1))


def rotated(x_BHTK: Tensor) -> Tensor:
    """Rotary positions."""
    half = x_BHTK.shape[-1] // 2
    angle = torch.arange(x_BHTK.shape[-2])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    cos, sin = angle.cos().to(x_BHTK.dtype), angle.sin().to(x_BHTK.dtype)
    a, b = x_BHTK[..., :half], x_BHTK[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
