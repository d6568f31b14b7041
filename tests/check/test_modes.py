"""Training that computes something else than evaluation, and layers that differ from their twins."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.check.models import (
    FLOATS,
    LATER,
    Attention,
    By,
    D,
    Encoder,
    H,
    K,
    built,
    by_hand,
    checked,
    failed,
    model_of,
    only,
)

# -- training and evaluation --


def in_modes(training, evaluation):
    return By(lambda self, *given: (training if self.training else evaluation)(self, *given))


def sdpa(scale=None, is_causal=True, dropout=0.1):
    def core(self, q, k, v, _):
        p = dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, dropout_p=p)

    return core


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        (sdpa(scale=1.0), "scale of layers.0 is 1 in evaluation and 0.354 in training"),
        (lambda _, q, k, v, __: (q @ k.mT).masked_fill(LATER, -torch.inf).softmax(-1) @ v, "scale of layers.0 is 1 in"),
        (sdpa(is_causal=False), "visible pairs of layers.0 is 1,728 in evaluation and 936 in training"),
        (lambda _, q, k, v, __: by_hand(q, k, v, LATER.mT), "mask of layers.0 is in the logits, 936 pairs in evaluation"),
    ],
    ids=["scale", "eager without scale", "is_causal", "other way round"],
)  # fmt: skip
def test_a_path_of_evaluation_that_computes_something_else(evaluation, words):
    model = model_of(in_modes(sdpa(), evaluation), By(sdpa()))
    found = checked(model)
    assert "training and evaluation" in failed(found)
    assert words in found["training and evaluation"].finding
    assert "layers.1" not in found["training and evaluation"].finding


def test_layers_that_evaluation_leaves_out():
    class Skipped(Attention):
        def forward(self, x, padding=None):
            return super().forward(x, padding) if self.training else x

    said = only("training and evaluation", checked(model_of(Attention(), Skipped())))
    assert said == "1 attention call in evaluation and 2 in training, without anything random."


def test_dropout_and_backends_may_differ():
    eager = By(lambda self, q, k, v, _: F.dropout((q @ k.mT * K**-0.5).masked_fill(LATER, -torch.inf).softmax(-1), 0.2, self.training) @ v)  # fmt: skip
    model = model_of(eager, in_modes(eager.core, sdpa()), Attention(fused=True))
    found = checked(model)
    assert not failed(found)
    assert found["training and evaluation"].status == "passed"
    layer = nn.TransformerEncoderLayer(D, H, 64, batch_first=True, dropout=0.3)
    assert checked(built(Encoder, layer), FLOATS)["training and evaluation"].status == "passed"


def test_layers_that_are_dropped_at_random_are_no_fault():
    class Dropped(Attention):
        def forward(self, x, padding=None):
            y = super().forward(x, padding)
            return torch.zeros_like(y) if self.training and torch.rand(()) < 0.5 else y

    found = checked(model_of(Dropped(), Dropped(), Dropped()))
    assert not failed(found) and found["training and evaluation"].status == "stated"


def test_what_else_differs_in_training_is_stated_with_its_place():
    class Halved(nn.Module):
        def forward(self, x):
            return x / 2 if self.training else x

    found = checked(model_of(between=Halved()))["training and evaluation"]
    assert found.status == "stated" and "first in norm (2 attention calls" in found.finding


# -- dtypes, layers that nobody knows --


def test_a_layer_of_another_dtype_than_its_twins():
    class Cast(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.inner = Attention().to(dtype)

        def forward(self, x, padding=None):
            return self.inner(x.to(self.inner.out.weight.dtype), padding).to(x.dtype)

    model = model_of(*map(Cast, (torch.float32, torch.bfloat16, torch.float32)))
    said = only("dtypes", checked(model))
    assert said.startswith("4 parameters have another dtype than the same part of other layers: layers.1.inner.qkv.weight is bfloat16")  # fmt: skip

    class Alone(Attention):
        def forward(self, x, padding=None):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x, padding).to(x.dtype)

    said = only("dtypes", checked(model_of(Attention(), Alone(), Attention())))
    assert said.startswith("1 attention call has another dtype than the same part of other layers: layers.1 is bfloat16, float32")  # fmt: skip


def test_norms_of_another_dtype_are_stated():
    model = model_of(Attention(), Attention()).bfloat16()
    model.embedding.float(), model.positions.float()
    model.norm.float().register_forward_hook(lambda _, __, out: out.bfloat16())
    model.head.float().register_forward_pre_hook(lambda _, args: args[0].float())
    found = checked(model)["dtypes"]
    assert found.status == "stated" and "8 bfloat16" in found.finding and "float32" in found.finding


def test_layers_in_a_list_are_not_registered():
    model = model_of()
    layers = [Attention(), Attention()]
    del model.layers
    model.layers = layers
    said = only("registered layers", checked(model))
    assert said.startswith("The parameters of 2 of 2 attention calls are not among those of the model")
    for layer in layers:
        layer.requires_grad_(False)  # as of a teacher
    assert not failed(checked(model))
