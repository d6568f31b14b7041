"""Preflight of a model in hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnscope.preflight.foreign import preflight_model
from tests.check.models import TOKENS, Attention, V, model_of


class WithLoss(nn.Module):
    """Logits and the loss, as nanoGPT returns them."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, targets=None):
        logits = self.inner(x)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def quantities(expected):
    return {quantity.name: quantity for quantity in expected.quantities}


def wide(model):
    """Queries and keys three times as large."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.qkv.weight.data *= 3
    return model


def test_a_sound_model_is_ready_and_its_softmax_is_as_its_q_and_k_say():
    said = preflight_model(WithLoss(model_of()), (TOKENS, TOKENS.roll(-1, 1)))
    assert said.ready and not said.diagnosis.findings
    assert {check.status for _, check in said.checks} == {"passed", "not looked"}
    (member,) = said.members
    assert [layer.name for layer in member.layers] == [f"inner.layers.{n}" for n in range(len(member.layers))]
    for layer in member.layers:
        for quantity in layer.quantities:
            assert quantity.predicted == pytest.approx(quantity.measured, rel=0.3, abs=0.05), quantity.name
    loss = quantities(member)["first_loss"]
    assert loss.compared == (("ln V", math.log(V)),) and loss.measured == pytest.approx(math.log(V), rel=0.3)
    assert {each.layer for each in member.gradients} == {-1, *range(len(member.layers))}
    total = math.hypot(*(each.norm for each in member.gradients))
    assert quantities(member)["grad_norm"].measured == pytest.approx(total) and total > 0


def test_without_the_scale_rules_and_checks_object():
    said = preflight_model(wide(model_of(Attention(scale=1.0))), TOKENS)
    assert not said.ready and [check.name for check in said.failed] == ["attention scale"]
    assert {finding.rule for finding in said.diagnosis.findings} & {"applied_scale", "unusual_scale"}


def test_without_a_loss_there_are_no_gradients_and_that_is_no_number():
    (member,) = preflight_model(model_of(), TOKENS).members
    assert quantities(member)["first_loss"].measured is None and "grad_norm" not in quantities(member)
    assert member.gradients == ()


def test_the_model_and_random_numbers_are_left_as_they_were():
    model = WithLoss(model_of())
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    preflight_model(model, (TOKENS, TOKENS))
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in model.named_parameters())
    assert not model.training and torch.equal(before, torch.get_rng_state())


def test_a_model_without_attention_is_looked_at_all_the_same():
    said = preflight_model(nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50)), TOKENS)
    (member,) = said.members
    assert member.layers == () and said.ready


def test_half_precision_is_measured_before_and_after_the_scale():
    model = wide(model_of()).to(torch.bfloat16)
    (member,) = preflight_model(model, TOKENS).members
    found = quantities(member)
    assert found["largest q.k"].measured == pytest.approx(found["max_logit"].measured * math.sqrt(8), rel=0.02)
