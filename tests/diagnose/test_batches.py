"""A batch that comes again and again, and one that is not like the others."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnscope
from attnscope.diagnose.blindness import NO_LOSS
from attnscope.diagnose.levels import NO_CLASSES
from attnscope.diagnose.rules.batches import LEAST_JUMP, STEEP, poisoned_batch, repeated_batch
from tests.diagnose.synthetic import run_of, steps_table, watched_run_of
from tests.diagnose.test_data import cross_entropy

TWO = {"arm": [{"name": "a", "train": {"seed": 1}}, {"name": "b", "train": {"seed": 2}}]}


# -- repeated_batch --


@pytest.mark.parametrize(
    ("steps", "same", "irregular", "is_found"),
    [(20, 20, True, True), (20, 19, True, False), (20, 20, False, False), (10, 10, True, True)],
)
def test_a_batch_is_repeated_where_all_targets_are_the_same_and_not_laid_out_by_hand(
    tmp_path, steps, same, irregular, is_found
):
    events = cross_entropy(steps=steps, same=same, irregular=irregular)
    run = watched_run_of(tmp_path / "r", steps=steps_table(np.full(60, 5.5)), events=events)
    assert (repeated_batch(run) is not None) is is_found


def test_a_repeated_batch_is_a_warning_once_it_is_learned_by_heart(tmp_path):
    for last, severity in ((0.56, "note"), (0.54, "warning")):
        losses = np.r_[5.5, np.full(60, last)]
        run = watched_run_of(tmp_path / f"{last}", steps=steps_table(losses), events=cross_entropy(same=20))
        assert repeated_batch(run).severity == severity
    assert repeated_batch(run).summary == (
        "The first 20 steps of rank 0 have the same targets, one by one, and its loss has fallen from 5.5 to 0.54: it learns "
        "one batch by heart."
    )


def test_what_repeated_batch_cannot_look_at_is_said(tmp_path):
    steps = steps_table(np.full(60, 5.5))
    assert repeated_batch(watched_run_of(tmp_path / "a", steps=steps)).why == NO_CLASSES
    short = watched_run_of(tmp_path / "b", steps=steps, events=cross_entropy(steps=9, same=9))
    assert repeated_batch(short).why == "the targets of fewer than 10 steps were seen"
    assert repeated_batch(run_of(tmp_path / "c", steps=steps)) is None


def trained(path, *, repeats):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-2)
    first = torch.randint(0, 64, (2, 40))
    with attnscope.watch_model(model, optimizer, path):
        for _ in range(40):
            x, y = first if repeats else torch.randint(0, 64, (2, 40))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return attnscope.open_run(path)


def test_a_script_that_trains_on_one_batch_is_told_so_and_its_healthy_twin_nothing(tmp_path):
    found = repeated_batch(trained(tmp_path / "same", repeats=True))
    assert found.summary.startswith("The first 20 steps of watched have the same targets")
    assert repeated_batch(trained(tmp_path / "other", repeats=False)) is None


# -- poisoned_batch --


def curves(jump=3.0, steep=5.0, *, at=40, after=0.0):
    """Losses around 3 and gradient norms around 1, with one step out of line."""
    losses = 3.0 + 0.05 * np.random.default_rng(0).normal(size=80)
    norms = np.ones(80)
    losses[at], norms[at] = np.median(losses[at - 20 : at]) + jump, steep
    losses[at + 1 : at + 4] += after
    return losses, norms


def poisoned(path, losses, norms, **columns):
    return poisoned_batch(run_of(path, steps=steps_table(losses, grad_norm=norms, **columns)))


@pytest.mark.parametrize(
    ("jump", "steep", "after", "is_found"),
    [
        (LEAST_JUMP + 0.01, 5.0, 0.0, True),
        (LEAST_JUMP - 0.01, 5.0, 0.0, False),
        (3.0, STEEP + 0.01, 0.0, True),
        (3.0, STEEP - 0.01, 0.0, False),
        (3.0, 5.0, 1.2, True),
        (3.0, 5.0, 1.8, False),  # it came back slowly: the weights were thrown off
    ],
)
def test_a_batch_is_unlike_the_others_where_loss_and_gradient_jump_and_are_back(tmp_path, jump, steep, after, is_found):
    assert (poisoned(tmp_path / "r", *curves(jump, steep, after=after)) is not None) is is_found


def test_a_run_that_spikes_in_other_ways_too_has_no_poisoned_batch(tmp_path):
    losses, norms = curves()
    losses[60:70] += 3.0
    assert poisoned(tmp_path / "r", losses, norms) is None


def test_logits_that_move_with_the_loss_are_no_matter_of_the_batch(tmp_path):
    log_z = np.full(80, 5.0)
    log_z[40] = 5.9
    assert poisoned(tmp_path / "a", *curves(), log_z=log_z) is not None
    log_z[40] = 7.7
    assert poisoned(tmp_path / "b", *curves(), log_z=log_z) is None
    log_z[1::2] = np.nan  # recorded at every second step
    assert poisoned(tmp_path / "c", *curves(), log_z=log_z) is None


def test_the_poisoned_batch_of_one_member_is_told_with_its_step(tmp_path):
    losses, norms = curves()
    both = np.stack([np.full(80, 3.0), losses])
    run = run_of(tmp_path / "r", TWO, steps=steps_table(both, grad_norm=np.stack([np.ones(80), norms]).T))
    found = poisoned_batch(run)
    assert found.members == ("b",) and found.step == 40 and found.severity == "note"
    assert found.summary == (
        "At step 40 the loss of b is 6 (a median of 3 before) and its gradient norm 5 times the usual; one step later the "
        f"loss is {losses[41]:.3g}."
    )


def test_what_poisoned_batch_cannot_look_at_is_said(tmp_path):
    losses, norms = curves()
    assert poisoned(tmp_path / "a", losses[:23], norms[:23]).why == "fewer than 24 steps before divergence"
    assert poisoned(tmp_path / "b", losses, np.full(80, np.nan)).why == "grad_norm was not recorded"
    assert poisoned_batch(watched_run_of(tmp_path / "c", steps=steps_table(np.full(30, np.nan)))).why.startswith(
        NO_LOSS
    )
    losses[::3] = np.nan
    assert poisoned(tmp_path / "d", losses, norms) is None
