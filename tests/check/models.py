"""A small transformer with one switch for everything that people get wrong."""

import torch
import torch.nn.functional as F
from torch import nn

from attnscope.check.model import check_model

D, H, K, V = 32, 4, 8, 50
TOKENS = torch.randint(0, V, (3, 12), generator=torch.Generator().manual_seed(1))
FLOATS = torch.randn(3, 12, D, generator=torch.Generator().manual_seed(1))


PADDED = torch.ones_like(TOKENS)
PADDED[:, 9:] = 0
PADDED[0, 7:] = 0
LATER = torch.ones(12, 12, dtype=torch.bool).triu(1)


class Attention(nn.Module):
    """`hidden`: the first diagonal that is hidden, None = none; `drop`: dropout that no mode switches off."""

    def __init__(self, hidden=1, scale=K**-0.5, fused=False, drop=0.0, heads_first=True):
        super().__init__()
        self.n_head, self.hidden, self.scale = H, hidden, scale
        self.fused, self.drop, self.heads_first = fused, drop, heads_first
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x, padding=None):
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, H, K) for y in self.qkv(x).chunk(3, dim=-1))
        if self.heads_first:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        hidden = torch.zeros(B, 1, q.shape[2], q.shape[2], dtype=torch.bool)
        if self.hidden is not None:
            hidden = hidden | torch.ones_like(hidden[0, 0]).triu(self.hidden)
        if padding is not None:
            hidden = hidden | padding[:, None, None, :]
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden, scale=self.scale)
        else:
            z = (q @ k.transpose(-2, -1) * self.scale).masked_fill(hidden, -torch.inf)
            y = F.dropout(F.softmax(z, dim=-1), self.drop) @ v
        if self.heads_first:
            y = y.transpose(1, 2)
        return self.out(y.reshape(B, T, D))


class BatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class MixesTheBatch(nn.Module):
    """view where transpose was meant."""

    def forward(self, x):
        B, T, _ = x.shape
        return x.reshape(T, B, D).transpose(0, 1)


class OwnNoise(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return x + torch.randn(x.shape, generator=self.generator) if self.training else x


class Model(nn.Module):
    """Token ids or floats, with a padding mask (1 = real) that may be ignored."""

    def __init__(self, *layers, between=None, ignores_mask=False):
        super().__init__()
        self.embedding, self.drop, self.head = nn.Embedding(V, D), nn.Dropout(0.1), nn.Linear(D, V)
        self.positions = nn.Embedding(64, D)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(D) if between is None else between
        self.ignores_mask = ignores_mask

    def forward(self, tokens, attention_mask=None):
        x = tokens if tokens.is_floating_point() else self.embedding(tokens)
        x = self.drop(x + self.positions(torch.arange(x.shape[1])))
        padding = None if attention_mask is None or self.ignores_mask else attention_mask == 0
        for layer in self.layers:
            x = x + layer(self.norm(x), padding)
        return self.head(x)


class By(nn.Module):
    """Attention whose core is given: core(self, q, k, v, padding) -> (B, H, T, K)."""

    def __init__(self, core):
        super().__init__()
        self.n_head, self.core = H, core
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x, padding=None):
        q, k, v = (y.unflatten(-1, (H, K)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        return self.out(self.core(self, q, k, v, padding).transpose(1, 2).flatten(2))


class Pooled(nn.Module):
    """The first position of another model, as a classifier returns it."""

    def __init__(self, model, pool=lambda y, _: y[:, 0]):
        super().__init__()
        self.model, self.pool = model, pool

    def forward(self, tokens, attention_mask=None):
        return self.pool(self.model(tokens, attention_mask), attention_mask)


def by_hand(q, k, v, hidden, fill=-torch.inf):
    return (q @ k.mT * K**-0.5).masked_fill(hidden, fill).softmax(dim=-1) @ v


class Encoder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, attention_mask=None):
        hidden = None if attention_mask is None else attention_mask == 0
        return self.encoder(x, src_key_padding_mask=hidden)


def model_of(*layers, **more):
    torch.manual_seed(0)
    return Model(*(layers or (Attention(), Attention())), **more)


def built(build, *args, **kwargs):
    torch.manual_seed(0)
    return build(*args, **kwargs)


def checked(model, batch=TOKENS, **more):
    """Result by name."""
    return {each.name: each for each in check_model(model, batch, **more)}


def statuses(model, batch=TOKENS, **more):
    return {name: each.status for name, each in checked(model, batch, **more).items()}


def failed(found):
    return [name for name, each in found.items() if each.status == "failed"]


def only(name, found):
    assert failed(found) == [name], {each: found[each].finding for each in failed(found)}
    return found[name].finding


def sound(model, batch, **expected):
    """No check failed, and these have these statuses."""
    found = checked(model, batch)
    assert {name: each.finding for name, each in found.items() if each.status == "failed"} == {}
    got = {name: found[name.replace("_", " ")].status for name in expected}
    assert got == {name: status.replace("_", " ") for name, status in expected.items()}
    return found
