"""Losses that are sums, over tokens and over the batches of an update: at their thresholds, and in real loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnscope
from attnscope.diagnose import diagnose
from attnscope.diagnose.blindness import NO_OPTIMIZER, NO_STEP
from attnscope.diagnose.rules.sums import (
    FEWEST_CLASSES,
    FEWEST_TOKENS,
    NEARLY_EQUAL,
    NO_PASSES,
    UNDIVIDED,
    accumulation_not_divided,
    loss_summed,
)
from attnscope.runs.probe_events import PassesSeen
from attnscope.runs.probed import told
from tests.diagnose.synthetic import run_of, steps_table, watched_run_of
from tests.diagnose.test_optimizer import watched
from tests.watch.test_probes import TEXT, Decoder, V, loss_of, train

PASSES = {"steps": 20, "fewest": 4, "most": 4, "weight": 1.0}


def summed(path, times, *, tokens=64, log_z=4.0, optimizer="SGD", losses=None):
    losses = np.r_[times * log_z * tokens, np.full(39, 50.0)] if losses is None else losses
    steps = steps_table(losses, log_z=np.full(len(losses), log_z), tokens=tokens * (1 + np.arange(len(losses))))
    return watched(path, steps=steps, optimizer=optimizer)


@pytest.mark.parametrize(
    ("times", "is_named"),
    [
        (1 + 0.98 * NEARLY_EQUAL, True),
        (1 + 1.02 * NEARLY_EQUAL, False),
        (1 - 1.02 * NEARLY_EQUAL, False),
        (1 / 64, False),
    ],
)
def test_a_first_loss_of_as_many_log_partitions_as_tokens_is_a_sum(tmp_path, times, is_named):
    assert (loss_summed(summed(tmp_path / "r", times)) is not None) is is_named


def test_a_sum_is_as_bad_as_its_optimizer_and_its_end(tmp_path):
    assert loss_summed(summed(tmp_path / "a", 1.0)).severity == "warning"
    assert loss_summed(summed(tmp_path / "b", 1.0, optimizer="AdamW")).severity == "note"
    losses = np.r_[256.0, np.full(20, 250.0), np.full(40, 1e6)]
    assert loss_summed(summed(tmp_path / "c", 1.0, losses=losses)).severity == "error"
    assert loss_summed(summed(tmp_path / "d", 1.0, tokens=FEWEST_TOKENS - 1)) is None
    assert loss_summed(summed(tmp_path / "e", 1.0, log_z=np.nan)).why == "log_z was not seen at the first step"


@pytest.mark.parametrize(("reduction", "is_named"), [("sum", True), ("mean", False)])
def test_a_watched_loop_that_sums_its_loss_is_told_from_one_that_averages_it(tmp_path, reduction, is_named):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with attnscope.watch_model(model, optimizer, tmp_path / "r"):
        for _ in range(5):
            x = torch.randint(32, (4, 16))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten(), reduction=reduction).backward()
            optimizer.step()
    finding = loss_summed(attnscope.open_run(tmp_path / "r"))
    assert (finding is not None) is is_named
    if finding is not None:
        assert "and the step has 64 tokens: it is their sum." in finding.summary


def added(path, *, optimizer="SGD", losses=None, clip_factor=1.0, classes=11, steps=40, **fields):
    losses = np.full(steps, 2.0) if losses is None else losses
    table = steps_table(losses, clip_factor=np.full(len(losses), clip_factor)) if steps else None
    events = [
        ("cross_entropy", 0, {"classes": classes, "loss": 2.4}),
        ("passes", 19, PASSES | fields),
        *([("optimizer", 0, {"name": optimizer})] if optimizer else []),
    ]
    return watched_run_of(path, steps=table, events=events)


@pytest.mark.parametrize(
    ("fields", "is_named"),
    [
        ({}, True),
        ({"weight": UNDIVIDED + 0.01}, True),
        ({"weight": UNDIVIDED - 0.01}, False),
        ({"weight": 0.25}, False),
        ({"fewest": 2}, True),
        ({"fewest": 1}, False),  # a step with one loss
        ({"classes": FEWEST_CLASSES}, True),
        ({"classes": FEWEST_CLASSES - 1}, False),
    ],
)
def test_losses_that_are_added_up_are_named_from_two_on(tmp_path, fields, is_named):
    found = accumulation_not_divided(added(tmp_path / "r", **fields))
    assert (found is not None) is is_named


def test_what_is_said_of_losses_that_are_added_up(tmp_path):
    found = accumulation_not_divided(added(tmp_path / "r"))
    assert found.summary == (
        "For each update of rank 0, 4 losses are differentiated (of 20 steps looked at), and each is 1 times the mean cross-entropy "
        "that it comes from, not 1/4 of it: the gradient is their sum."
    )
    assert "loss_explosion" in found.explains and found.step == 0


def test_it_is_as_bad_as_what_the_size_of_the_gradient_does(tmp_path):
    def severity(name, **how):
        return accumulation_not_divided(added(tmp_path / name, **how)).severity

    assert severity("sgd") == "warning"
    assert severity("adam", optimizer="AdamW") == "note"
    assert severity("clipped", clip_factor=0.4) == "note"
    assert severity("diverged", losses=np.r_[np.full(20, 2.0), np.full(60, 1e6)]) == "error"


def test_where_nobody_saw_the_losses_it_has_not_looked(tmp_path):
    assert accumulation_not_divided(added(tmp_path / "a", weight=None)).why == NO_PASSES
    assert accumulation_not_divided(watched(tmp_path / "b", steps=steps_table([2.0] * 30))).why == NO_PASSES
    assert accumulation_not_divided(added(tmp_path / "c", optimizer=None, fewest=1)).why == NO_OPTIMIZER
    assert accumulation_not_divided(added(tmp_path / "d", steps=0, fewest=1)).why == NO_STEP
    assert accumulation_not_divided(run_of(tmp_path / "e", steps=steps_table([4.0] * 3))) is None


def passes_in(run):
    (each,) = told(run, PassesSeen)
    return each.what


def accumulating(n, weigh):
    def step(model, optimizer):
        optimizer.zero_grad()
        for part in TEXT.chunk(n):
            weigh(loss_of(model, part))
        optimizer.step()

    return step


@pytest.mark.parametrize(
    ("weigh", "weight"),
    [
        (lambda loss: loss.backward(), 1.0),
        (lambda loss: (loss / 4).backward(), 0.25),
        (lambda loss: loss.backward(torch.tensor(0.25)), 0.25),
    ],
)
def test_real_loops_with_micro_batches(tmp_path, weigh, weight):
    model = Decoder()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    run = train(tmp_path / "r", accumulating(4, weigh), model=model, optimizer=optimizer)
    seen = passes_in(run)
    assert (seen.fewest, seen.most) == (4, 4) and seen.weight == pytest.approx(weight)
    found = [each.rule for each in diagnose(run)]
    assert ("accumulation_not_divided" in found) == (weight == 1)


def test_a_scaler_does_not_hide_what_a_loss_is(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def step(model, optimizer):
        optimizer.zero_grad()
        for part in TEXT.chunk(2):
            scaler.scale(loss_of(model, part) / 2).backward()
        scaler.step(optimizer)
        scaler.update()

    assert passes_in(train(tmp_path / "r", step)).weight == pytest.approx(0.5)


def test_losses_that_are_no_mean_of_one_cross_entropy_tell_nothing(tmp_path):
    def two(model, optimizer):
        optimizer.zero_grad()
        for _ in range(2):
            (loss_of(model) + loss_of(model)).backward()
        optimizer.step()

    def summed_up(model, optimizer):
        optimizer.zero_grad()
        for part in TEXT.chunk(2):
            out = model(part[:, :-1]).reshape(-1, V)
            (F.cross_entropy(out, part[:, 1:].reshape(-1), reduction="sum") / TEXT[:, 1:].numel()).backward()
        optimizer.step()

    for name, step in (("two", two), ("sum", summed_up)):
        run = train(tmp_path / name, step)
        assert passes_in(run).weight is None and passes_in(run).fewest == 2
        assert accumulation_not_divided(run).why == NO_PASSES


def test_one_loss_for_each_update_is_well(tmp_path):
    run = train(tmp_path / "r")
    assert (passes_in(run).fewest, passes_in(run).weight) == (1, 1.0)
    assert accumulation_not_divided(run) is None


def test_gradients_of_a_loss_that_were_thrown_away_do_not_count(tmp_path):
    def step(model, optimizer):
        loss_of(model).backward()
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert passes_in(train(tmp_path / "r", step)).most == 1
