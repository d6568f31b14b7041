"""Every check: a model that passes it, and a broken twin that fails it and no other."""

import pytest
import torch
from torch import nn

from tests.check.models import (
    FLOATS,
    TOKENS,
    Attention,
    BatchNorm,
    D,
    K,
    MixesTheBatch,
    OwnNoise,
    built,
    checked,
    model_of,
    statuses,
)

PADDED = torch.ones_like(TOKENS)
PADDED[0, 8:] = 0
WITH_MASK = (TOKENS, PADDED)
NAMES = [
    "future leak", "padding leak", "batch leak", "dropout in evaluation", "repeatable training", "training and evaluation",
    "masked rows", "softmax axis", "attention scale", "head shapes", "registered layers", "dtypes",
]  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_sound_model_passes_every_check(fused, training):
    model = model_of(Attention(fused=fused), Attention(fused=fused)).train(training)
    assert statuses(model, WITH_MASK) == dict.fromkeys(NAMES, "passed")


@pytest.mark.parametrize("batch", [TOKENS, FLOATS, (FLOATS,), {"tokens": TOKENS}, [TOKENS]],
                         ids=["ids", "floats", "tuple", "dict", "list"])  # fmt: skip
def test_forms_of_batches(batch):
    found = checked(model_of(), batch)
    assert {each.status for each in found.values()} == {"passed", "not looked"}
    assert found["future leak"].finding.startswith("Looks causal: none of 51 pairs")
    assert "gradients of 4" in found["future leak"].finding


def fails_only(name, model, batch=WITH_MASK, **more):
    found = checked(model, batch, **more)
    assert [each for each in found if found[each].status in ("failed", "not looked")] == [name]
    assert found[name].status == "failed"
    return found[name]


# -- future leak --


def test_without_any_mask_it_attends_to_the_future_which_fails_only_what_is_meant_to_be_causal():
    model = model_of(Attention(hidden=None), Attention(hidden=None))
    found = checked(model)["future leak"]
    assert found.status == "stated" and found.remedy == ""
    assert found.finding.startswith("Attends to the future: 51 of 51 pairs")
    found = checked(model, causal=True)["future leak"]
    assert found.status == "failed" and "is_causal=True" in found.remedy
    assert "though it is meant to be causal" in found.finding
    assert "first module whose output changes is layers.0.out" in found.finding
    assert statuses(model, causal=False)["future leak"] == "passed"


def test_a_causal_model_that_is_meant_to_see_the_future_fails():
    assert statuses(model_of(), causal=True)["future leak"] == "passed"
    found = checked(model_of(), causal=False)["future leak"]
    assert found.status == "failed" and "though it is meant to see the future" in found.finding


@pytest.mark.parametrize("fused", [False, True])
def test_a_mask_shifted_by_one_lets_one_future_position_through(fused):
    found = fails_only("future leak", model_of(Attention(hidden=2, fused=fused)))
    assert "in part: layers.0 sees up to 1 position ahead" in found.finding
    assert {"layer": "layers.0", "sees": "partly", "ahead": 1} in found.evidence
    pair = found.evidence[0]
    assert pair["reacts to"] == pair["output"] + 1 and pair["change"] > 100 * pair["compared with"]


def test_a_shifted_mask_is_found_where_no_attention_is_seen():
    class Unseen(nn.Module):
        """Weights without a softmax: mean over what is visible."""

        def __init__(self, hidden):
            super().__init__()
            self.hidden = hidden

        def forward(self, x, _):
            p = torch.ones(x.shape[1], x.shape[1]).tril(self.hidden - 1)
            return p / p.sum(dim=-1, keepdim=True) @ x

    assert statuses(model_of(Unseen(1)))["future leak"] == "passed"
    assert "Attends to the future: 51 of" in checked(model_of(Unseen(99)))["future leak"].finding
    found = checked(model_of(Unseen(2)))
    assert found["future leak"].status == "failed"
    assert "of what outputs see behind them they see at the same distance ahead" in found["future leak"].finding  # fmt: skip
    for name in ("masked rows", "attention scale", "head shapes"):
        assert found[name].status == "not looked" and found[name].remedy


def test_one_layer_without_a_mask_is_named():
    found = fails_only("future leak", model_of(Attention(), Attention(hidden=None), Attention()))
    assert "in 1 of 3 attention layers (layers.1)" in found.finding
    assert found.evidence[0]["first module"] == "layers.1.out"


def test_what_else_mixes_positions_is_told_from_attention():
    class Averages(nn.Module):
        def forward(self, x):
            return x - x.mean(dim=1, keepdim=True)

    found = checked(model_of(between=Averages()))["future leak"]
    assert found.status == "failed"
    assert "masks of 2 attention layers are causal: something else mixes" in found.finding
    assert found.evidence[0]["first module"] == "norm"


def test_a_mask_the_wrong_way_round():
    class Backwards(Attention):
        def forward(self, x, padding=None):
            return super().forward(x.flip(1)).flip(1)

    found = checked(model_of(Backwards()))["future leak"]
    assert found.status == "failed" and "the mask is the wrong way round" in found.finding


def test_a_window_that_looks_both_ways_is_an_encoder():
    class Window(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv1d(D, D, 5, padding=2)

        def forward(self, x, _):
            return self.convolution(x.mT).mT

    found = checked(model_of(Window()))["future leak"]
    assert found.status == "stated" and "up to 2 positions ahead" in found.finding


def test_outputs_that_know_only_themselves_say_nothing_about_leaks():
    model = model_of()
    for layer in model.layers:
        nn.init.zeros_(layer.out.weight)
    found = checked(model)["future leak"]
    assert found.status == "not looked" and "start at zero" in found.remedy


@pytest.mark.parametrize("n_positions", [2, 3])
def test_short_sequences(n_positions):
    tokens = TOKENS[:, :n_positions]
    assert statuses(model_of(), tokens)["future leak"] == "passed"
    assert statuses(model_of(Attention(hidden=None)), tokens)["future leak"] == "stated"
    assert statuses(model_of(Attention(), Attention(hidden=None)), tokens)["future leak"] == "failed"  # fmt: skip


def test_a_single_position_and_a_single_sequence_are_skipped():
    found = statuses(model_of(), FLOATS[:1, :1])
    assert (found["future leak"], found["batch leak"]) == ("not looked", "not looked")


# -- padding leak, batch leak --


def test_padding_that_is_ignored():
    bidirectional = (Attention(hidden=None), Attention(hidden=None))
    assert statuses(model_of(*bidirectional), WITH_MASK)["padding leak"] == "passed"
    model = model_of(*bidirectional, ignores_mask=True)
    found = fails_only("padding leak", model)
    assert found.finding.startswith(
        "Other contents at 4 padded positions (attention_mask) change 8 of 32 outputs that are not padded in evaluation and 8 of"
    )
    assert found.evidence[0]["first module"] == "layers.0.out"


def test_padding_on_the_left_matters_to_a_causal_model():
    left = PADDED.flip(1)
    assert statuses(model_of(Attention(fused=True)), (TOKENS, left))["padding leak"] == "passed"
    model = model_of(Attention(fused=True), ignores_mask=True)
    assert statuses(model, (TOKENS, left))["padding leak"] == "failed"


def test_padding_is_skipped_without_a_mask_or_padding():
    found = checked(model_of())["padding leak"]
    assert found.status == "not looked" and found.finding == "The batch has no padding mask."
    found = checked(model_of(), (TOKENS, torch.ones_like(TOKENS)))["padding leak"]
    assert found.status == "not looked" and "marks 0 of 36 positions" in found.finding


def test_batch_norm_leaks_between_sequences_and_positions_in_training():
    found = checked(model_of(between=BatchNorm()))
    assert [name for name in found if found[name].status == "failed"] == ["future leak", "batch leak"]  # fmt: skip
    assert "in training only" in found["future leak"].finding
    assert "first in norm" in found["future leak"].finding
    assert "in evaluation" not in found["batch leak"].finding
    assert found["batch leak"].evidence[0]["first module"] == "norm.norm"


def test_a_reshape_that_mixes_the_batch():
    found = checked(model_of(between=MixesTheBatch()))["batch leak"]
    assert found.status == "failed" and "in evaluation and" in found.finding
    assert "first in norm" in found.finding


def test_batch_first_that_was_forgotten():
    for batch_first, status in ((True, "passed"), (False, "failed")):
        layer = nn.TransformerEncoderLayer(D, 4, 64, batch_first=batch_first)
        model = built(nn.TransformerEncoder, layer, 2, enable_nested_tensor=False)
        assert statuses(model, FLOATS)["batch leak"] == status


# -- what cannot be repeated --


def test_dropout_that_does_not_know_of_evaluation():
    found = fails_only("dropout in evaluation", model_of(Attention(drop=0.1)))
    assert "training=self.training" in found.remedy
    assert "from layers.0.out on" in found.finding


def test_random_numbers_that_no_seed_reaches():
    found = checked(model_of(between=OwnNoise()), WITH_MASK)
    assert found["repeatable training"].status == "failed"
    assert found["repeatable training"].evidence[0]["first module"] == "norm"
    assert found["padding leak"].status == found["batch leak"].status == "passed"
    assert "two passes in training with one seed differ" in found["batch leak"].finding


# -- masked rows --


@pytest.mark.parametrize("fused", [False, True])
def test_a_row_that_sees_no_key(fused):
    found = checked(model_of(Attention(hidden=0, fused=fused)))["masked rows"]
    assert found.status == "failed"
    assert found.finding.startswith("12 of 144 query rows in 1 attention call see no key")
    if not fused:
        assert "NaN or infinite at 3 of 36 positions" in found.finding


def test_padded_queries_may_see_no_key_as_long_as_outputs_are_finite():
    left = PADDED.flip(1)
    found = checked(model_of(Attention(fused=True)), (TOKENS, left))["masked rows"]
    assert found.status == "passed"
    assert "16 of 144 query rows" in found.finding and "(0 of them at" in found.finding
    found = checked(model_of(Attention()), (TOKENS, left))["masked rows"]
    assert found.status == "failed" and "at 4 of 36 positions (0 not padded)" in found.finding


def test_outputs_that_are_not_finite_without_any_masked_row():
    model = model_of()
    with torch.no_grad():
        model.head.bias[3] = torch.nan
    found = checked(model)
    assert found["masked rows"].status == "failed"
    assert "division by zero" in found["masked rows"].remedy
    assert found["future leak"].status == "passed", "the other outputs tell"
    with torch.no_grad():
        model.head.bias[:] = torch.nan
    found = checked(model)
    assert found["future leak"].status == found["batch leak"].status == "not looked"


# -- scale, heads --


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("scale", "words"),
    [(1.0, "1 (no scale at all)"), (1 / K, "0.125 (1/d_head, unlike 1 other call)"), (D**-0.5, "0.177 (1/sqrt(d_model))"),
     (12**-0.5, "0.289 (1/sqrt of the number of keys)"), (0.2, "0.2 (unlike 1 other call), which")],
)  # fmt: skip
def test_a_wrong_scale_is_said_in_words(scale, words, fused):
    model = model_of(Attention(fused=fused), Attention(fused=fused, scale=scale))
    found = fails_only("attention scale", model)
    assert found.finding.startswith("1 of 2 attention calls does not multiply q.k by 1/sqrt(d_head)")  # fmt: skip
    assert f"layers.1 multiplies by {words}" in found.finding
    assert found.evidence[0]["scale"] == pytest.approx(scale, rel=1e-3)


def test_a_scale_applied_twice_is_seen_before_the_call():
    class Twice(Attention):
        def forward(self, x, padding=None):
            q, k, v = (y.view(*x.shape[:2], 4, K).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            y = nn.functional.scaled_dot_product_attention(q * K**-0.5, k, v, is_causal=True)
            return self.out(y.transpose(1, 2).reshape(x.shape))

    for frozen in (False, True):
        model = model_of(Twice()).requires_grad_(not frozen)
        found = checked(model)["attention scale"]
        assert (
            found.status == "failed" and "0.125 (1/d_head: 1/sqrt(d_head) before the call and in it)" in found.finding
        )
        assert all(p.requires_grad is not frozen for p in model.parameters())


def test_attention_over_heads_instead_of_positions():
    found = checked(model_of(Attention(hidden=None, heads_first=False)))["head shapes"]
    assert found.status == "failed"
    assert "attends over 4 heads instead of 12 positions: q is (batch, 12, 4, 8)" in found.finding


def test_heads_that_do_not_divide_the_width():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.n_head = 3
            self.qkv, self.out = nn.Linear(D, 90), nn.Linear(30, D)

        def forward(self, x, _):
            q, k, v = (y.unflatten(-1, (3, 10)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(y.transpose(1, 2).flatten(2))

    found = fails_only("head shapes", model_of(Odd(), ignores_mask=True))
    assert "uses 30 of 32 dimensions: 3 heads do not divide d_model = 32" in found.finding
