"""Rules for the mode that a model is in."""

import pytest
import torch
import torch.nn.functional as F

from attnscope.diagnose import diagnose
from attnscope.diagnose.blindness import NO_STEP
from attnscope.diagnose.rules.modes import (
    NEARLY_ALL_ROWS,
    NO_EVALUATION,
    OTHER_SCALE,
    dropout_in_evaluation,
    evaluation_in_training,
    evaluation_scales_otherwise,
)
from tests.diagnose.probed import probed
from tests.diagnose.synthetic import run_of, steps_table
from tests.watch.test_probes import TEXT, Decoder, T, loss_of, plain_step, train

DROPOUT = {"model": "GPT", "dropouts": 3, "dropout": 0.2}
MODE = {"model": "GPT", "dropouts": 2, "batch_norms": 0, "losses_before": 0}


def test_dropout_in_evaluation_is_a_warning_of_the_first_time(tmp_path):
    run = probed(tmp_path / "r", ("dropout_in_evaluation", DROPOUT, 10), ("dropout_in_evaluation", DROPOUT, 20))
    found = dropout_in_evaluation(run)
    assert (found.severity, found.step) == ("warning", 10)
    assert found.summary == (
        "At step 10, GPT computes a loss without gradients while it is in training mode: 3 modules drop up to 0.2 of what they "
        "are given."
    )


@pytest.mark.parametrize(
    ("fields", "severity", "said"),
    [
        ({}, "note", "At step 1, GPT is trained in evaluation mode: it has 2 modules that drop something."),
        (
            {"losses_before": 9},
            "warning",
            "At step 1, GPT is trained in evaluation mode, and was in training mode before: it has 2 modules that drop something.",
        ),
        (
            {"dropouts": 0, "batch_norms": 1},
            "warning",
            "At step 1, GPT is trained in evaluation mode: it has 1 batch norms.",
        ),
        ({"dropouts": 0}, None, ""),  # the mode changes nothing
    ],
)
def test_evaluation_in_training(tmp_path, fields, severity, said):
    found = evaluation_in_training(probed(tmp_path / "r", ("evaluation_in_training", MODE | fields, 1)))
    assert getattr(found, "severity", None) == severity
    assert severity is None or found.summary == said


@pytest.mark.parametrize("rule", [dropout_in_evaluation, evaluation_in_training])
def test_silent_where_nothing_is_told(tmp_path, rule):
    assert rule(probed(tmp_path / "a")) is None
    assert rule(probed(tmp_path / "b", steps=0)).why == NO_STEP
    assert rule(run_of(tmp_path / "c", steps=steps_table([4.0] * 3))) is None


@pytest.mark.parametrize("rightly", [True, False])
def test_a_real_evaluation_with_dropout_on_and_its_healthy_twin(tmp_path, rightly):
    def step(model, optimizer):
        plain_step(model, optimizer)
        model.train(not rightly)
        with torch.no_grad():
            loss_of(model)
        model.train()

    run = train(tmp_path / "r", step, model=Decoder(dropout=0.2), steps=30)
    found = [each.rule for each in diagnose(run) if each.severity != "note"]
    assert found == ([] if rightly else ["dropout_in_evaluation"])


def test_a_real_model_that_is_left_in_evaluation_mode(tmp_path):
    def step(model, optimizer):
        plain_step(model, optimizer)
        model.eval()

    run = train(tmp_path / "r", step, model=Decoder(dropout=0.2))
    assert evaluation_in_training(run).severity == "warning"


OTHER = {
    "layer": 0,
    "queries": 16,
    "scale_ratio": 1.0,
    "is_larger": False,
    "later_rows": 0.0,
    "later_rows_trained": 0.0,
}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, None),
        ({"scale_ratio": 0.25, "is_larger": True}, "multiplies q.k by 4 times what it does in training."),
        ({"scale_ratio": 0.25}, "multiplies q.k by 1/4 of what it does in training."),
        ({"scale_ratio": OTHER_SCALE - 0.01}, "multiplies q.k by 1/1.27 of what it does in training."),
        ({"scale_ratio": OTHER_SCALE}, None),
        ({"scale_ratio": None}, None),
        ({"later_rows": NEARLY_ALL_ROWS}, "lets queries see the keys after them, which training hides."),
        ({"later_rows": NEARLY_ALL_ROWS - 0.01}, None),
        ({"later_rows": 1.0, "later_rows_trained": 0.3}, None),
        ({"later_rows": 1.0, "later_rows_trained": None}, None),
    ],
)
def test_what_evaluation_does_otherwise(tmp_path, fields, said):
    found = evaluation_scales_otherwise(probed(tmp_path / "r", ("attention_in_other_mode", OTHER | fields, 10)))
    assert (found is None) == (said is None)
    if said is not None:
        assert (found.severity, found.step) == ("warning", 10)
        assert found.summary == (
            "At step 10, in 1 of 1 attention layers that were compared, evaluation attends otherwise than training: "
            "attention layer 0 (attn) " + said
        )


def test_where_no_evaluation_was_compared_it_has_not_looked(tmp_path):
    assert evaluation_scales_otherwise(probed(tmp_path / "a")).why == NO_EVALUATION
    assert evaluation_scales_otherwise(run_of(tmp_path / "b", steps=steps_table([4.0] * 3))) is None


class Branching(Decoder):
    """Evaluates by hand: with another scale, or without a mask."""

    def __init__(self, *, scale=1.0, mask=True):
        super().__init__()
        self.scale, self.mask = scale, mask

    def forward(self, ids, mask=None):
        if self.training:
            return super().forward(ids, mask)
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1]))
        q, k, v = (y[:, None] for y in self.qkv(self.norm(x)).chunk(3, dim=-1))
        logits = q @ k.mT * (self.scale / q.shape[-1] ** 0.5)
        if self.mask:
            n = ids.shape[1]
            logits = logits.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        return self.out(x + (logits.softmax(-1) @ v)[:, 0])


class WithoutMask(Decoder):
    """Masks in training alone."""

    def forward(self, ids, mask=None):
        self.causal = self.training
        return super().forward(ids, mask)


@pytest.mark.parametrize(
    ("make", "length", "said"),
    [
        (Decoder, T, None),
        (Branching, T, None),
        (lambda: Branching(scale=4.0), T, "multiplies q.k by 4 times"),
        (lambda: Branching(scale=0.25), T, "multiplies q.k by 1/4 of"),
        (lambda: Branching(scale=4.0), T - 2, None),
        (lambda: Branching(mask=False), T, "lets queries see"),
        (WithoutMask, T, "lets queries see"),
    ],
)
def test_real_models_that_evaluate_otherwise(tmp_path, make, length, said):
    def step(model, optimizer):
        plain_step(model, optimizer)
        model.eval()
        with torch.no_grad():
            loss_of(model, TEXT[:, : length + 1])
        model.train()

    found = evaluation_scales_otherwise(train(tmp_path / "r", step, model=make()))
    assert said is None or said in found.summary
    assert said is not None or found is None or found.why == NO_EVALUATION


def test_the_attention_of_one_query_with_a_cache_is_no_other_attention(tmp_path):
    def step(model, optimizer):
        plain_step(model, optimizer)
        model.eval()
        with torch.no_grad():
            x = model.embedding(TEXT[:, :T])
            q, k, v = (y[:, None] for y in model.qkv(x).chunk(3, dim=-1))
            F.scaled_dot_product_attention(q[:, :, -1:], k, v, scale=1.0)
        model.train()

    assert evaluation_scales_otherwise(train(tmp_path / "r", step)).why == NO_EVALUATION
