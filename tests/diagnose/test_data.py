"""What the level of a loss says of data, targets and sign."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnscope
from attnscope.diagnose import NotLooked, examine
from attnscope.diagnose.blindness import NO_LOSS
from attnscope.diagnose.levels import NO_CLASSES, NOT_THE_LOSS
from attnscope.diagnose.rules.data import (
    ABOVE,
    BELOW,
    BELOW_OPTIMUM,
    TOO_HIGH,
    UNKNOWN_OPTIMUM,
    first_loss_too_high,
    loss_too_low,
    plateau,
)
from attnscope.diagnose.rules.descent import loss_rises
from tests.diagnose.synthetic import params_of_one, run_of, steps_table, watched_run_of

UNIFORM = math.log(256)
TEXT = {"uniform": UNIFORM}
TWO = {"arm": [{"name": "a", "train": {"seed": 1}}, {"name": "b", "train": {"seed": 2}}]}
LEAKS = {"attention": {"mask": "none"}}


def cross_entropy(loss=5.5, *, classes=256, entropy=3.0, steps=20, same=1, irregular=True, counted=1.0):
    """The events of a watched run that tell what cross-entropy was given."""
    targets = {"steps": steps, "same": same, "irregular": irregular, "counted": counted, "entropy": entropy}
    return [("cross_entropy", 0, {"classes": classes, "loss": loss}), ("first_targets", 19, targets)]


# -- first_loss_too_high --


@pytest.mark.parametrize(("above", "is_found"), [(TOO_HIGH - 0.01, False), (TOO_HIGH + 0.01, True)])
def test_a_first_loss_is_too_high_from_its_threshold_on(tmp_path, above, is_found):
    losses = np.full(30, 4.0)
    losses[0] = UNIFORM + above
    found = first_loss_too_high(run_of(tmp_path / "r", steps=steps_table(losses), reference=TEXT))
    assert (found is not None) is is_found


def test_of_two_members_the_one_that_begins_higher_is_told(tmp_path):
    losses = np.full((2, 30), 4.0)
    losses[:, 0] = 9.0, 32.1
    found = first_loss_too_high(run_of(tmp_path / "r", TWO, steps=steps_table(losses), reference=TEXT))
    assert found.severity == "note" and found.members == ("a", "b") and found.evidence[0].member == "b"
    assert found.summary == (
        "a and b begin far above guessing. The first loss of b is 32.1, where guessing has ln(256) = 5.55: its output logits have "
        "a standard deviation of about 7.3 before anything is learned."
    )


@pytest.mark.parametrize(("first", "lost", "severity"), [(25.6, 20, "warning"), (25.6, 19, "note"), (25.5, 20, "note")])
def test_a_first_loss_did_harm_where_it_takes_long_to_take_it_back(tmp_path, first, lost, severity):
    losses = np.full(40, 4.0)
    losses[:lost] = np.linspace(first, 6.0, lost)
    found = first_loss_too_high(run_of(tmp_path / "r", steps=steps_table(losses), reference=TEXT))
    assert found.severity == severity and ("Its first 20 losses" in found.summary) is (severity == "warning")


def test_of_a_watched_script_the_cross_entropy_counts_and_not_what_it_makes_of_it(tmp_path):
    summed = steps_table(np.full(30, 5.5 * 512))
    assert first_loss_too_high(watched_run_of(tmp_path / "a", steps=summed, events=cross_entropy())) is None
    found = first_loss_too_high(watched_run_of(tmp_path / "b", steps=summed, events=cross_entropy(9.0)))
    assert found.evidence[0].value == 9.0
    assert first_loss_too_high(watched_run_of(tmp_path / "c", steps=summed)).why == NO_CLASSES


# -- loss_too_low --


def evaluated(path, *, held_out, alone, losses=3.0, config=LEAKS):
    events = [("evaluation", 30, 0, {"seq_len": 32, "val_loss": held_out})]
    events += [] if alone is None else [("generation", 30, 0, {"loss_from_prefixes": alone})]
    return run_of(path, config, steps=steps_table(np.full(30, losses)), events=events, planned=30, reference=TEXT)


def test_a_loss_that_is_low_only_where_the_answer_is_seen_is_too_low(tmp_path):
    found = loss_too_low(evaluated(tmp_path / "r", held_out=0.1, alone=9.1))
    assert (found.kind, found.severity, found.evidence[0].threshold) == ("symptom", "error", 9.1)
    assert found.summary == (
        "The held-out loss of run is 0.1, but 9.1 where it does not see the token that it predicts, above the 5 of token "
        "frequencies alone: it has learned to read the answer."
    ).replace("run is", f"{found.members[0]} is")


@pytest.mark.parametrize(("held_out", "alone"), [(4.9, 4.9), (5.1, 9.1), (0.1, 4.9)])
def test_a_loss_that_is_no_better_with_the_answer_is_not_too_low(tmp_path, held_out, alone):
    assert loss_too_low(evaluated(tmp_path / "r", held_out=held_out, alone=alone)) is None


@pytest.mark.parametrize(("below", "is_found"), [(BELOW_OPTIMUM - 0.01, False), (BELOW_OPTIMUM + 0.01, True)])
def test_a_loss_below_the_best_of_all_models_is_too_low(tmp_path, below, is_found):
    reference = TEXT | {"optimum": 2.0}
    run = run_of(tmp_path / "r", LEAKS, steps=steps_table(np.full(30, 2.0 - below)), planned=30, reference=reference)
    assert (loss_too_low(run) is not None) is is_found


def test_where_nothing_tells_a_leak_that_is_said_and_a_causal_mask_has_none(tmp_path):
    assert loss_too_low(evaluated(tmp_path / "a", held_out=0.1, alone=None)).why == UNKNOWN_OPTIMUM
    assert loss_too_low(evaluated(tmp_path / "b", held_out=0.1, alone=9.1, config={})) is None
    watched = watched_run_of(tmp_path / "c", steps=steps_table(np.full(30, 0.1)), events=cross_entropy())
    assert loss_too_low(watched).why == UNKNOWN_OPTIMUM


# -- loss_rises --


def rising(share, lowest=1.0):
    """21 losses from 5.5 of which this share of steps rises, and what follows; the lowest is so much of the first."""
    steps = np.where(np.arange(20) < round(20 * share), 0.2, -0.01)
    losses = 5.5 + np.r_[0.0, np.cumsum(steps), np.cumsum(steps)[-1] + 0.1 * np.arange(20)]
    losses[1] = 5.5 * lowest if lowest < 1 else losses[1]
    return losses


@pytest.mark.parametrize(
    ("losses", "ratio", "is_found"),
    [
        (rising(0.8), 0.01, True),
        (rising(0.75), 0.01, False),
        (rising(0.9, lowest=0.97), 0.01, False),
        (rising(1.0), 0.029, True),
        (rising(1.0), 0.031, False),  # left to learning rates
        (np.r_[rising(1.0), np.full(30, 5.0)], 0.01, False),
    ],
)
def test_a_loss_rises_where_nearly_every_small_step_raises_it(tmp_path, losses, ratio, is_found):
    params = params_of_one(range(20), update_ratio=ratio)
    run = watched_run_of(tmp_path / "r", steps=steps_table(losses), params=params, events=cross_entropy())
    assert (loss_rises(run) is not None) is is_found


def test_what_loss_rises_cannot_look_at_is_said(tmp_path):
    steps = steps_table(rising(1.0))
    assert loss_rises(watched_run_of(tmp_path / "a", steps=steps)).why == NO_CLASSES
    other = watched_run_of(tmp_path / "b", steps=steps, events=cross_entropy(1.0))
    assert loss_rises(other).why == NOT_THE_LOSS
    no_params = watched_run_of(tmp_path / "c", steps=steps, events=cross_entropy())
    assert loss_rises(no_params).why == "update_ratio was not recorded"
    short = watched_run_of(tmp_path / "d", steps=steps_table(np.full(20, 5.5)), events=cross_entropy())
    assert loss_rises(short).why == "fewer than 21 losses"
    unseen = watched_run_of(tmp_path / "e", steps=steps_table(np.full(20, np.nan)))
    assert loss_rises(unseen).why.startswith(NO_LOSS)
    assert loss_rises(run_of(tmp_path / "f", steps=steps)) is None


@pytest.mark.parametrize(("first", "is_found"), [(0.71 * math.log(256), True), (0.69 * math.log(256), False)])
def test_a_model_that_was_trained_before_may_unlearn_on_purpose(tmp_path, first, is_found):
    losses = -np.linspace(first, first + 3, 60)
    run = watched_run_of(tmp_path / "r", steps=steps_table(losses), events=cross_entropy(first))
    assert (loss_rises(run) is not None) is is_found


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)).mean(dim=1))


def trained(path, *, sign=1.0, maximize=False, shuffles=False, steps=130):
    """16 classes, told by the first token of 8."""
    torch.manual_seed(0)
    model, centres = Classifier(), torch.randn(16, 16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, maximize=maximize)
    with attnscope.watch_model(model, optimizer, path):
        for _ in range(steps):
            y = torch.randint(0, 16, (512,))
            x = 0.1 * torch.randn(512, 8, 16) + 2 * centres[y][:, None]
            y = y[torch.randperm(512)] if shuffles else y
            optimizer.zero_grad()
            (sign * F.cross_entropy(model(x), y)).backward()
            optimizer.step()
    return attnscope.open_run(path)


def test_a_script_with_the_wrong_sign_is_told_so_and_its_healthy_twin_nothing(tmp_path):
    healthy = trained(tmp_path / "healthy")
    assert [rule(healthy) for rule in (first_loss_too_high, loss_rises, plateau)] == [None] * 3
    found = loss_rises(trained(tmp_path / "sign", sign=-1.0))
    assert found.severity == "error" and found.step == 0
    assert found.summary.startswith("The loss that watched differentiates is minus its cross-entropy: -2.97 at step 0")
    found = loss_rises(trained(tmp_path / "maximize", maximize=True))
    assert "though updates are small" in found.summary


# -- plateau --


@pytest.mark.parametrize(
    ("times", "is_found"), [(1 - BELOW - 0.01, False), (1 - BELOW + 0.01, True), (1 + ABOVE - 0.01, True), (1 + ABOVE + 0.01, False)]
)  # fmt: skip
def test_a_loss_is_on_a_plateau_near_the_unigram_loss(tmp_path, times, is_found):
    losses = np.r_[np.linspace(5.5, 5.0 * times, 60), np.full(60, 5.0 * times)]
    found = plateau(run_of(tmp_path / "r", steps=steps_table(losses), reference={"uniform": 9.0}))
    assert (found is not None) is is_found


def test_a_loss_that_passes_a_level_is_not_on_it(tmp_path):
    noise = 0.05 * np.random.default_rng(0).normal(size=120)
    for name, fall, is_found in (("slow", 0.3, False), ("none", 0.0, True)):
        losses = np.linspace(5.0 + fall, 5.0 - fall / 2, 120) + noise
        run = run_of(tmp_path / name, steps=steps_table(losses), reference={"uniform": 9.0})
        assert (plateau(run) is not None) is is_found


def test_a_plateau_is_a_note_where_classes_are_alike_likely_or_few_targets_count(tmp_path):
    losses = np.r_[5.5, np.full(119, 5.0)]
    near, far = (run_of(tmp_path / f"{u}", steps=steps_table(losses), reference={"uniform": u}) for u in (5.05, 6.0))
    assert (plateau(near).severity, plateau(far).severity) == ("note", "warning")
    for counted, severity in ((0.15, "note"), (1.0, "warning")):
        events = cross_entropy(entropy=5.0, counted=counted)
        run = watched_run_of(tmp_path / f"counted {counted}", steps=steps_table(losses), events=events)
        assert plateau(run).severity == severity
    assert plateau(far).summary == (
        f"From step 60 to 119 the loss of {far.entries[0].name} stays at 5, the unigram loss of 5: nothing is learned from the inputs."
    )


def test_what_plateau_cannot_look_at_is_said(tmp_path):
    short = run_of(tmp_path / "a", steps=steps_table(np.full(90, 5.0)))
    assert plateau(short) == NotLooked(rule="plateau", why="fewer than 100 losses")
    other = watched_run_of(tmp_path / "b", steps=steps_table(np.full(120, 50.0)), events=cross_entropy())
    assert plateau(other).why == NOT_THE_LOSS
    gaps = np.full(200, np.nan)
    gaps[::2] = 3.0
    run = watched_run_of(tmp_path / "c", steps=steps_table(gaps), events=cross_entropy(3.0))
    assert plateau(run).evidence[0].value == 3.0


def test_targets_shuffled_apart_from_their_inputs_are_a_plateau(tmp_path):
    found = plateau(trained(tmp_path / "r", shuffles=True))
    assert found.severity == "note" and "the unigram loss of 2.77" in found.summary


def test_a_decoder_that_sees_the_answer_is_told_so(tmp_path):
    config = {
        "model": {"d_model": 32, "n_layers": 1, "norm": "pre", "seq_len": 8},
        "init": {"embedding_std": 0.02},
        "data": {"source": "markov", "batch_size": 32},
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "train": {"steps": 150, "device": "cpu"},
        "arm": [{"name": "leaks", "attention": {"mask": "none"}}, {"name": "causal"}],
    }
    found = loss_too_low(attnscope.train_model(config, path=tmp_path / "r"))
    assert found.members == ("leaks",) and "on its data: it sees the answer." in found.summary


def test_a_plateau_explains_that_training_stalled(tmp_path):
    losses = np.r_[5.6, np.full(119, 5.2)]
    run = run_of(tmp_path / "r", steps=steps_table(losses), planned=120, reference={"uniform": 9.0})
    told = examine(run)
    assert [[each.rule for each in chain] for chain in told.chains] == [["plateau", "stalled"]]
