"""A check leaves the model, the batch and random numbers exactly as they were, also after an exception."""

import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnscope import check_model
from attnscope.errors import AttnscopeError
from tests.check.models import TOKENS, BatchNorm, model_of


class Busy(nn.Module):
    """Does on its way whatever a forward pass can do to a module."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))
        self.codes = nn.Parameter(torch.ones(3))
        self.count, self.losses, self.cache, self.seen = 0, [], {}, {1}
        self.generator = torch.Generator().manual_seed(0)
        self.fails_at = fails_at

    def forward(self, x):
        self.calls += 1
        self.mean = self.mean + 1
        self.codes.data.mul_(2)
        self.count += 1
        self.losses.append(x.sum())
        self.cache["x"] = x
        self.seen.add(self.count)
        self.last = x
        torch.rand(3, generator=self.generator)
        if self.codes.grad is not None:
            self.codes.grad += 1
        if self.fails_at == float(self.calls):
            raise ValueError("enough")
        random.random()
        np.random.rand()
        x.mul_(1.0)
        return x


class Both(nn.Module):
    def __init__(self, **more):
        super().__init__()
        self.norm, self.busy = BatchNorm(), Busy(**more)

    def forward(self, x):
        return self.busy(self.norm(x) + F.dropout(x, 0.1, self.training))


def state_of(model):
    busy = model.norm.busy
    return {
        "weights": {name: x.clone() for name, x in model.state_dict().items()},
        "buffer": id(busy.mean),
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": (busy.count, list(busy.losses), dict(busy.cache), set(busy.seen), sorted(vars(busy))),
        "own generator": busy.generator.get_state(),
        "random": (random.getstate(), torch.get_rng_state(), repr(np.random.get_state())),
        "functions": (F.scaled_dot_product_attention, torch.softmax, torch.Tensor.__matmul__),
    }  # fmt: skip


def assert_same(one, two):
    """Bit by bit, whatever holds the tensors."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert_same(value, two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for mine, other in zip(one, two, strict=True):
            assert_same(mine, other)
    else:
        assert one == two


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(fails):
    model = model_of(between=Both())
    model(TOKENS).sum().backward()
    model.norm.norm.eval()
    model.head.bias.requires_grad_(False)
    model.head.bias.grad = None
    tokens = TOKENS.clone()
    model.norm.busy.fails_at = float(model.norm.busy.calls) + 1 if fails else None
    before = state_of(model)
    if fails:
        with pytest.raises(AttnscopeError, match="ValueError: enough"):
            check_model(model, tokens)
    else:
        check_model(model, tokens)
    assert_same(before, state_of(model))
    assert torch.equal(tokens, TOKENS)


def test_training_goes_on_as_if_nothing_had_happened():
    losses = []
    for looks in (False, True):
        model = model_of(between=BatchNorm())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(5)
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
            if looks:
                check_model(model, TOKENS)
            loss.backward()
            if looks:
                check_model(model, TOKENS)
            optimizer.step()
        losses.append((loss.item(), torch.rand(2).tolist()))
    assert losses[0] == losses[1]


def test_settings_of_torch_are_as_before():
    import torch.nn.attention.flex_attention as flex

    with warnings.catch_warnings():  # of PyTorch, which imports its compiler
        warnings.simplefilter("ignore")
        model = model_of(between=torch.compile(nn.LayerNorm(32), backend="eager"))
        compiled = model.norm.flex = torch.compile(flex.flex_attention)
    before = (
        flex._validate_device,
        flex.flex_attention,
        torch.backends.mha.get_fastpath_enabled(),
        list(warnings.filters),
        repr(torch._dynamo.eval_frame._stance),
    )
    check_model(model, TOKENS)
    assert model.norm.flex is compiled
    assert before == (
        flex._validate_device,
        flex.flex_attention,
        torch.backends.mha.get_fastpath_enabled(),
        list(warnings.filters),
        repr(torch._dynamo.eval_frame._stance),
    )
