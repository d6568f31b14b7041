"""Where W_q and W_k of watched layers are found, and what an update does to W_q W_kᵀ; what is not known is NaN."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnscope.runs.reader import open_run
from attnscope.watch import forms
from attnscope.watch.attach import watch_model
from tests import reference
from tests.watch.test_training import X

N_HEADS, D_HEAD = 4, 4
HEADS = [slice(D_HEAD * h, D_HEAD * (h + 1)) for h in range(N_HEADS)]


def attend(q, k, v, *, copies=False):
    """Of (B, T, heads, K); `copies` makes q and k tensors of their own, as rotary positions do."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if copies:
        q, k = q * 1.0, k * 1.0
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2).flatten(2)


class Apart(nn.Module):
    def __init__(self, names=("q_proj", "k_proj"), n_keys=N_HEADS):
        super().__init__()
        self.names = names
        setattr(self, names[0], nn.Linear(16, 16))
        setattr(self, names[1], nn.Linear(16, n_keys * D_HEAD))
        self.v, self.out = nn.Linear(16, n_keys * D_HEAD), nn.Linear(16, 16)

    def forward(self, x):
        q, k = (getattr(self, name)(x) for name in self.names)
        return self.out(attend(*(y.unflatten(-1, (-1, D_HEAD)) for y in (q, k, self.v(x))), copies=True))

    def sides(self):
        q, k = (getattr(self, name).weight for name in self.names)
        return q, k


class Fused(nn.Module):
    """`order`: which of q, k and v come first; "heads" has the three of one head after the other."""

    def __init__(self, name="qkv", order="qkv", copies=False):
        super().__init__()
        self.name, self.order, self.copies = name, order, copies
        setattr(self, name, nn.Linear(16, 48))
        self.fc = nn.Linear(16, 16)

    def forward(self, x):
        y = getattr(self, self.name)(x)
        if self.order == "heads":
            q, k, v = y.unflatten(-1, (N_HEADS, 3 * D_HEAD)).chunk(3, dim=-1)
        else:
            parts = dict(zip(self.order, y.unflatten(-1, (3, N_HEADS, D_HEAD)).unbind(-3), strict=True))
            q, k, v = (parts[each] for each in "qkv")
        return self.fc(attend(q, k, v, copies=self.copies))

    def sides(self):
        weight = getattr(self, self.name).weight
        if self.order == "heads":
            by_head = weight.unflatten(0, (N_HEADS, 3, D_HEAD))
            return by_head[:, 0].flatten(0, 1), by_head[:, 1].flatten(0, 1)
        parts = dict(zip(self.order, weight.chunk(3), strict=True))
        return parts["q"], parts["k"]


class Packed(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, N_HEADS, kdim=width, vdim=width, batch_first=True)
        self.width = width

    def forward(self, x):
        keys = F.pad(x, (0, self.width - 16), value=0.5)
        return self.attn(x, keys, keys, need_weights=False)[0]

    def sides(self):
        if self.width == 16:
            return self.attn.in_proj_weight[:16], self.attn.in_proj_weight[16:32]
        return self.attn.q_proj_weight, self.attn.k_proj_weight


class Core(nn.Module):
    """Attends, and has no weights."""

    def forward(self, q, k, v):
        return attend(q, k, v)


class Around(Apart):
    def __init__(self):
        super().__init__(("wq", "wk"))
        self.core = Core()

    def forward(self, x):
        return self.out(self.core(*(y.unflatten(-1, (-1, D_HEAD)) for y in (self.wq(x), self.wk(x), self.v(x)))))


class Adapted(nn.Linear):
    """Its weight is not all that it multiplies by."""

    def __init__(self):
        super().__init__(16, 16)
        self.low = nn.Linear(16, 16)

    def forward(self, x):
        return super().forward(x) + self.low(x)


def adapted():
    layer = Apart()
    layer.k_proj = Adapted()
    return layer


def parametrized():
    layer = Apart()
    nn.utils.parametrizations.weight_norm(layer.q_proj)
    return layer


def two_pairs():
    layer = Apart()
    layer.q, layer.k = nn.Linear(16, 16), nn.Linear(16, 16)
    return layer


def train(path, layers, *, steps=2, lr=0.1, every=1, parameters=None):
    """Of a stack of layers; the recorded ratios, (step, layer, head), and what they should be."""
    torch.manual_seed(0)
    model = nn.ModuleList(layers)
    optimizer = torch.optim.Adam(list(model.parameters()) if parameters is None else parameters(model), lr=lr)
    expected = []
    with watch_model(model, optimizer, path, every=every):
        for _ in range(steps):
            before = [[side.detach().clone() for side in layer.sides()] for layer in model]
            optimizer.zero_grad()
            x = X
            for layer in model:
                x = x + layer(x)
            x.square().mean().backward()
            optimizer.step()
            expected.append([ratios(*sides, *layer.sides()) for sides, layer in zip(before, model, strict=True)])
    heads = open_run(path).heads.sort_values(["step", "layer", "head"])
    found = heads["attn_form_update_ratio"].to_numpy().reshape(-1, len(layers), N_HEADS)
    return torch.tensor(found), torch.tensor(expected)


def ratios(q, k, q_after, k_after):
    def heads(w):
        return w.detach().unflatten(0, (-1, D_HEAD)).mT

    return reference.form_update_ratio(heads(q), heads(k), heads(q_after - q), heads(k_after - k))


@pytest.mark.parametrize(
    "build",
    [
        Apart,
        lambda: Apart(("query", "key")),
        lambda: Apart(("W_q", "W_k")),
        lambda: Apart(("to_q", "to_k")),
        lambda: Apart(n_keys=2),
        lambda: Apart(n_keys=1),
        Fused,
        lambda: Fused(order="vkq"),
        lambda: Fused(order="heads"),
        lambda: Fused("anything", order="kqv"),
        lambda: Fused("c_attn", copies=True),
        Packed,
        lambda: Packed(width=20),
        Around,
    ],
)
def test_weights_are_found_and_the_update_of_their_form_measured(tmp_path, build):
    found, expected = train(tmp_path / "run", [build(), build()])
    assert torch.allclose(found.double(), expected.double(), rtol=1e-3)


@pytest.mark.parametrize(
    "build", [lambda: Fused(copies=True), lambda: Fused("query_key_value", "heads", True), adapted, two_pairs]
)
def test_what_is_not_surely_known_is_not_measured(tmp_path, build):
    layer = build()
    layer.sides = lambda: (torch.ones(16, 16), torch.ones(16, 16))
    found, _ = train(tmp_path / "run", [layer])
    assert found.isnan().all()


def test_weights_that_are_computed_are_not_measured(tmp_path):
    layer = parametrized()
    layer.sides = lambda: (torch.ones(16, 16), torch.ones(16, 16))
    found, _ = train(tmp_path / "run", [layer])
    assert found.isnan().all()


def test_layers_of_different_kinds_stand_beside_each_other(tmp_path):
    layers = [Apart(), Fused(copies=True), Fused(), Apart(n_keys=2)]
    found, expected = train(tmp_path / "run", layers)
    assert found[:, 1].isnan().all()
    known = [0, 2, 3]
    assert torch.allclose(found[:, known].double(), expected[:, known].double(), rtol=1e-3)


def test_weights_that_no_optimizer_moves_are_not_measured(tmp_path):
    def second(model):
        return [*model[1].parameters(), *model[0].v.parameters()]

    found, expected = train(tmp_path / "run", [Apart(), Apart()], parameters=second)
    assert found[:, 0].isnan().all()
    assert torch.allclose(found[:, 1].double(), expected[:, 1].double(), rtol=1e-3)


def test_of_large_models_only_some_layers_are_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "MOST_COPIED", 1024)  # of 4 x 512
    found, _ = train(tmp_path / "run", [Apart() for _ in range(4)])
    assert found.isnan().all(dim=-1)[0].tolist() == [False, True, False, True]


def test_it_is_measured_where_updates_are(tmp_path):
    found, _ = train(tmp_path / "run", [Apart()], steps=24, every=4)
    assert len(found) == 21
    assert not found.isnan().any()


def test_training_under_autocast_and_in_half_precision_is_measured_in_float32(tmp_path):
    with torch.autocast("cpu"):
        found, expected = train(tmp_path / "run", [Apart(), Fused()])
    assert torch.allclose(found.double(), expected.double(), rtol=1e-3)


def test_nothing_of_the_model_is_kept_alive(tmp_path):
    import gc
    import weakref

    model = nn.ModuleList([Apart()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alive = weakref.ref(model[0].q_proj)
    with watch_model(path=tmp_path / "run", every=1):
        model[0](X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        del model, optimizer
        torch.nn.functional.linear(X, torch.ones(2, 16))
        gc.collect()
        assert alive() is None
    assert math.isfinite(open_run(tmp_path / "run").heads["attn_form_update_ratio"].iloc[0])
