"""Rules for attention that sees nothing, padding, or keys along the wrong axis."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnscope
from attnscope.diagnose import diagnose
from attnscope.diagnose.blindness import NO_ATTENTION, NO_STEP
from attnscope.diagnose.rules.masks import (
    INVERTED,
    PADDING,
    padding_attended,
    rows_fully_masked,
    wrong_softmax_axis,
)
from tests.diagnose.probed import SIGHT, probed
from tests.diagnose.synthetic import run_of, steps_table
from tests.watch.test_probes import TEXT, D, Decoder, T, V, loss_of, train

EMPTY = {"layer": 0, "rows": 48, "of": 512}
QUERIES = "softmax over the queries' axis: weights of one query do not sum to 1 over its keys (axis 3)"


def test_rows_that_see_nothing_are_a_note_until_something_breaks(tmp_path):
    found = rows_fully_masked(probed(tmp_path / "a", ("rows_without_keys", EMPTY, 8)))
    assert (found.severity, found.step) == ("note", 8)
    assert found.summary == (
        "At step 8, 48 of 512 query rows of attention layer 0 (attn) see no key at all; what they read means nothing."
    )
    broken = ("nonfinite", {"tensor": "gradient", "where": ["layer 0 q"]}, 8)
    found = rows_fully_masked(probed(tmp_path / "b", ("rows_without_keys", EMPTY, 8), broken))
    assert found.severity == "error" and found.summary.endswith("and in the same step numbers are not finite.")
    assert "nonfinite" in found.explains
    later = ("nonfinite", {"tensor": "gradient", "where": ["layer 0 q"]}, 9)
    assert rows_fully_masked(probed(tmp_path / "c", ("rows_without_keys", EMPTY, 8), later)).severity == "note"
    assert rows_fully_masked(probed(tmp_path / "d")) is None


@pytest.mark.parametrize(("share", "is_found"), [(PADDING * 1.01, True), (PADDING, False), (None, False)])
def test_padding_that_is_attended_to_is_a_note(tmp_path, share, is_found):
    found = padding_attended(probed(tmp_path / "r", ("keys_seen", SIGHT | {"layer": 0, "padded": share})))
    assert (found is not None and found.severity == "note") is is_found


def test_the_worst_layer_is_named(tmp_path):
    layers = [("keys_seen", SIGHT | {"layer": n, "padded": share}) for n, share in enumerate((0.1, 0.51))]
    found = padding_attended(probed(tmp_path / "r", *layers, attention=("a", "b")))
    assert found.summary == "At step 0 real queries of attention layer 1 (b) give 0.51 of their attention to padding."


@pytest.mark.parametrize(("share", "severity"), [(INVERTED, "error"), (INVERTED - 0.01, None)])
def test_a_mask_the_wrong_way_round_is_an_error(tmp_path, share, severity):
    found = padding_attended(probed(tmp_path / "r", ("keys_seen", SIGHT | {"layer": 0, "inverted_rows": share})))
    assert getattr(found, "severity", None) == severity


def test_the_axis_of_a_softmax_is_an_error_and_a_normalized_one_is_none(tmp_path):
    calls = [
        ("not_measured", {"name": f"h.{n}.attn", "backend": "eager", "shapes": [], "reason": QUERIES}) for n in (0, 1)
    ]
    found = wrong_softmax_axis(probed(tmp_path / "a", *calls, attention=()))
    assert found.severity == "error" and len(found.evidence) == 2
    assert found.summary == (
        "In h.0.attn and 1 more the softmax runs over the queries' axis, and the product with the values sums over another one: "
        "the weights of a query do not sum to 1 over its keys."
    )
    slots = "softmax over axis 2 of 4, normalized over the keys after it"
    call = ("not_measured", {"name": "slots", "backend": "eager", "shapes": [], "reason": slots})
    assert wrong_softmax_axis(probed(tmp_path / "b", call)) is None


@pytest.mark.parametrize("rule", [rows_fully_masked, padding_attended, wrong_softmax_axis])
def test_without_attention_nobody_looked(tmp_path, rule):
    assert rule(probed(tmp_path / "a", attention=())).why == NO_ATTENTION
    assert rule(probed(tmp_path / "b", attention=(), steps=0)).why == NO_STEP
    assert rule(run_of(tmp_path / "c", steps=steps_table([4.0] * 3))) is None, "this lab's own attention is tested"


def test_an_encoder_of_this_lab_that_reads_padding_is_a_note(tmp_path):
    config = {
        "model": {"kind": "encoder", "d_model": 16, "n_layers": 1, "n_heads": 1, "seq_len": 8},
        "data": {"objective": "masked"},
        "train": {"steps": 2, "checkpoint_every": 0},
        "arm": [{"name": n, "attention": {"mask": n}} for n in ("padding", "none")],
    }
    found = padding_attended(attnscope.train_model(config, path=tmp_path / "r"))
    assert (found.members, found.severity) == (("none",), "note")
    assert found.summary == "none is given padded sequences with attention.mask = none: padding is read like any token."


class ByHand(nn.Module):
    """Attention whose softmax is over an axis of choice."""

    def __init__(self, axis, low=float("-inf")):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.qkv, self.out = nn.Embedding(V, D), nn.Linear(D, 3 * D), nn.Linear(D, V)
        self.axis, self.low = axis, low

    def forward(self, ids, visible=None):
        q, k, v = (x[:, None] for x in self.qkv(self.embedding(ids)).chunk(3, dim=-1))
        z = q @ k.mT * D**-0.5
        visible = torch.ones(T, T, dtype=torch.bool).tril() if visible is None else visible
        return self.out((z.masked_fill(~visible, self.low).softmax(self.axis) @ v)[:, 0])


@pytest.mark.parametrize(("axis", "rules"), [(-1, []), (-2, ["wrong_softmax_axis"])])
def test_a_real_softmax_over_queries_and_its_healthy_twin(tmp_path, axis, rules):
    run = train(tmp_path / "r", model=ByHand(axis, low=-1e9), steps=30)
    assert [found.rule for found in diagnose(run) if found.severity == "error"] == rules


def test_a_real_row_without_a_key_leads_to_what_is_not_finite(tmp_path):
    steps = iter(range(99))

    def step(model, optimizer):
        visible = torch.ones(4, 1, T, T, dtype=torch.bool).tril()
        visible[0, :, 5:] = next(steps) < 4
        optimizer.zero_grad()
        loss = F.cross_entropy(model(TEXT[:, :-1], visible)[:, :5].flatten(0, 1), TEXT[:, 1:6].flatten())
        loss.backward()
        optimizer.step()

    run = train(tmp_path / "r", step, model=ByHand(-1), steps=8)
    found = next(each for each in diagnose(run) if each.rule == "rows_fully_masked")
    assert (found.severity, found.step) == ("error", 4) and "nonfinite" in found.explains
    steps = iter(range(99))
    run = train(tmp_path / "large numbers", step, model=ByHand(-1, low=-1e9), steps=8)
    assert [each.severity for each in diagnose(run) if each.rule == "rows_fully_masked"] == ["note"]


def test_a_real_mask_the_wrong_way_round(tmp_path):
    padded = TEXT.clone()
    padded[:, 4:] = 0

    def step(model, optimizer):
        optimizer.zero_grad()
        loss_of(model, padded, (padded[:, :-1] == 0)[:, None, None]).backward()
        optimizer.step()

    run = train(tmp_path / "r", step, model=Decoder(causal=False))
    assert padding_attended(run).severity == "error"
