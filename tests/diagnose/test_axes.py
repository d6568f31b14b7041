"""Rules of the axis that attention runs over."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnscope.diagnose.blindness import NO_ATTENTION, NO_STEP
from attnscope.diagnose.rules.axes import (
    FEWEST_FITTING,
    FITS,
    NO_LAYER,
    SQUARE,
    UNKNOWN_AXES,
    attention_over_batch,
    keys_repeated,
)
from attnscope.findings import NotLooked
from attnscope.runs.reader import open_run
from attnscope.watch.attach import watch_model
from tests.diagnose.probed import SIGHT, TARGETS, probed
from tests.diagnose.synthetic import run_of, steps_table

B, T, D, V = 6, 10, 8, 12
OVER_BATCH = SIGHT | {"layer": 0, "queries": B, "keys": B, "batch": T}
OVER_TOKENS = SIGHT | {"layer": 0, "queries": T, "keys": T, "batch": B}
INPUTS = {"given": [[B, T]], "inside": [], "positions": 0, "labels": 0}
REPEATED = {"layer": 0, "heads": 2, "of": 2, "times": 0, "looks": 3}


def found_in(path, layer, *, targets=None, **inputs):
    events = [("keys_seen", layer), ("inputs_seen", INPUTS | inputs)]
    if targets is not None:
        events.append(("targets", TARGETS | targets))
    answer = attention_over_batch(probed(path, *events))
    return answer.why if isinstance(answer, NotLooked) else answer and answer.severity


@pytest.mark.parametrize(
    ("inputs", "targets", "found"),
    [
        ({"labels": B}, None, "error"),
        ({"positions": T}, None, "error"),
        ({}, {"positions": T, "compared": 60, "equal_next": FITS}, "error"),
        ({}, {"positions": T, "compared": FEWEST_FITTING, "equal_next": 0.0, "equal_same": 1.0}, "error"),
        ({}, {"positions": T, "compared": FEWEST_FITTING - 1, "equal_next": 1.0}, UNKNOWN_AXES),
        ({}, {"positions": T, "compared": 60, "equal_next": FITS - 0.01}, UNKNOWN_AXES),
        ({"labels": B * T}, None, UNKNOWN_AXES),
        ({"labels": T}, None, None),  # the tokens come first, on purpose
        ({"positions": B}, None, None),
        ({"labels": B, "positions": B}, None, UNKNOWN_AXES),  # the one says this, the other that
        ({"labels": B, "given": []}, None, UNKNOWN_AXES),  # who knows what the attention is over
        ({"labels": B, "given": [], "inside": [[B, T]]}, None, "error"),
    ],
)
def test_what_tells_which_axis_is_that_of_the_batch(tmp_path, inputs, targets, found):
    assert found_in(tmp_path / "r", OVER_BATCH, targets=targets, **inputs) == found


def test_attention_over_tokens_is_no_finding_whatever_tells(tmp_path):
    assert found_in(tmp_path / "a", OVER_TOKENS, labels=B, positions=T) is None
    assert found_in(tmp_path / "b", OVER_TOKENS) == UNKNOWN_AXES


def test_rows_of_pictures_that_are_folded_into_the_batch_are_attended_on_purpose(tmp_path):
    folded = OVER_BATCH | {"batch": 3 * B}
    assert found_in(tmp_path / "a", folded, labels=B, given=[], inside=[[3 * B, B]]) == UNKNOWN_AXES
    assert found_in(tmp_path / "b", folded, labels=B, given=[[3 * B, B]]) == "error"


def test_layers_over_each_axis_mean_it_so_and_a_square_batch_tells_nothing(tmp_path):
    seen = ("inputs_seen", INPUTS | {"labels": B})
    both = [("keys_seen", OVER_BATCH), ("keys_seen", OVER_TOKENS | {"layer": 1}), seen]
    assert attention_over_batch(probed(tmp_path / "a", *both, attention=("a", "b"))) is None
    assert found_in(tmp_path / "b", OVER_BATCH | {"batch": B}, labels=B) == SQUARE


def test_the_sentence_names_the_layer_and_both_sizes(tmp_path):
    events = [("keys_seen", OVER_BATCH | {"layer": n}) for n in range(2)] + [("inputs_seen", INPUTS | {"labels": B})]
    finding = attention_over_batch(probed(tmp_path / "r", *events, attention=("a", "b")))
    assert finding.summary == (
        "The self-attention of attention layer 0 (a) runs over 6 sequences instead of their 10 tokens, as all 2 self-attention "
        "layers do: a token attends to those at its place in the other examples of the batch."
    )


@pytest.mark.parametrize("rule", [attention_over_batch, keys_repeated])
def test_without_attention_nobody_looks_and_in_this_lab_it_is_in_order(tmp_path, rule):
    assert rule(probed(tmp_path / "a", attention=())).why == NO_ATTENTION
    assert rule(probed(tmp_path / "b", steps=0, attention=())).why == NO_STEP
    assert rule(run_of(tmp_path / "c", steps=steps_table([4.0] * 3))) is None
    broken = np.full((1, 30), np.nan)
    answer = rule(probed(tmp_path / "d", losses=broken, grad_norm=np.nan))
    assert answer is None or answer.why == NO_LAYER


@pytest.mark.parametrize(
    ("fields", "severity", "said"),
    [
        (
            {},
            "error",
            "In all 2 heads of attention layer 0 (attn) the keys of all positions are the same, although its tokens differ: "
            "attention can only take the mean of what it sees.",
        ),
        (
            {"heads": 1},
            "warning",
            "In 1 of 2 heads of attention layer 0 (attn) the keys of all positions are the same,",
        ),
        ({"times": 2}, "warning", "In all 2 heads of attention layer 0 (attn) each key stands there 2 times, and"),
        ({"heads": 0}, None, ""),
    ],
)
def test_repeated_keys_are_told(tmp_path, fields, severity, said):
    finding = keys_repeated(probed(tmp_path / "r", ("keys_repeated", REPEATED | fields)))
    assert getattr(finding, "severity", None) == severity
    assert severity is None or finding.summary.startswith(said)


# -- with real programs --


class Encoder(nn.Module):
    def __init__(self, *, batch_first, flip=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.positions = nn.Embedding(V, D), nn.Embedding(T, D)
        layer = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=batch_first)
        self.encoder, self.out, self.flip = (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.Linear(D, V),
            flip,
        )

    def forward(self, ids):
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1])) if ids.dim() == 2 else ids
        x = self.encoder(x.transpose(0, 1)).transpose(0, 1) if self.flip else self.encoder(x)
        return self.out(x)


IDS = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1))
FEATURES = torch.randn(B, T, D, generator=torch.Generator().manual_seed(2))


def of_classes(model):
    return F.cross_entropy(model(IDS[:, :-1])[:, 0], IDS[:, 0])


def of_next_tokens(model):
    return F.cross_entropy(model(IDS[:, :-1]).reshape(-1, V), IDS[:, 1:].reshape(-1))


def of_features(model):
    return F.cross_entropy(model(FEATURES).mean(1), IDS[:, 0])


def of_values(model):
    return model(FEATURES).square().mean()


def watched(path, model, loss_of, steps=2):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with watch_model(model, path=path):
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    return open_run(path)


@pytest.mark.parametrize("loss_of", [of_classes, of_next_tokens, of_features])
def test_a_real_encoder_over_the_batch_and_its_healthy_twins(tmp_path, loss_of):
    wrong = attention_over_batch(watched(tmp_path / "a", Encoder(batch_first=False), loss_of))
    assert wrong.severity == "error"
    assert attention_over_batch(watched(tmp_path / "b", Encoder(batch_first=True), loss_of)) is None
    assert attention_over_batch(watched(tmp_path / "c", Encoder(batch_first=False, flip=True), loss_of)) is None


def test_a_real_encoder_of_which_nothing_tells(tmp_path):
    answer = attention_over_batch(watched(tmp_path / "r", Encoder(batch_first=False), of_values))
    assert answer.why == UNKNOWN_AXES
