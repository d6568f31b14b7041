"""Jumps of the learning rate, and warm-ups that are missing or too long."""

import numpy as np
import pytest

import attnscope
from attnscope.diagnose import examine
from attnscope.diagnose.rules.schedule import (
    BEFORE,
    EARLY_RISE,
    FEWEST_STEPS,
    JUMP_TIMES,
    MARGIN,
    NO_RATE,
    STAYS_ABOVE,
    learning_rate_jump,
    missing_warmup,
)
from tests.diagnose.synthetic import params_table, run_of, steps_table

N = 120


def jumping(path, times, *, losses=None, at=60, **other):
    """A run whose learning rate is so many times what it was from step `at` on."""
    losses = np.full(N, 4.0) if losses is None else losses
    lr = np.where(np.arange(len(losses)) < at, 1e-3, times * 1e-3)
    return run_of(path, steps=steps_table(losses, lr=lr), params=params_table(1, range(len(losses))), **other)


def stepped(height, at=60):
    return np.where(np.arange(N) > at, 4.0 + height, 4.0)


@pytest.mark.parametrize(("times", "is_named"), [(1.01 * JUMP_TIMES, True), (0.99 * JUMP_TIMES, False), (0.1, False)])
def test_a_jump_is_a_note_from_its_threshold_on(tmp_path, times, is_named):
    finding = learning_rate_jump(jumping(tmp_path / "r", times))
    assert (finding is not None) is is_named
    if finding is not None:
        assert finding.severity == "note" and finding.step == 60
        assert finding.summary == (
            "At step 60 the learning rate of scaled jumps from 0.001 to 0.00303, 3.03 times as much. No lasting harm of it was measured."
        )


@pytest.mark.parametrize(
    ("rise", "severity"), [(1.02 * STAYS_ABOVE * 4.0, "warning"), (0.98 * STAYS_ABOVE * 4.0, "note"), (4000.0, "error")]
)
def test_a_loss_that_does_not_come_back_makes_it_more_than_a_note(tmp_path, rise, severity):
    finding = learning_rate_jump(jumping(tmp_path / "r", 10.0, losses=stepped(rise)))
    assert finding.severity == severity
    assert ("diverges at step 61" in finding.summary) is (severity == "error")


def test_a_loss_that_comes_back_within_some_steps_is_no_harm(tmp_path):
    losses = np.where((np.arange(N) > 60) & (np.arange(N) < 90), 6.0, 4.0)
    assert learning_rate_jump(jumping(tmp_path / "r", 10.0, losses=losses)).severity == "note"


def test_warm_ups_and_optimizers_that_take_turns_do_not_jump(tmp_path):
    step = np.arange(N)
    courses = {
        "warm-up": np.minimum(step / 50, 1.0),  # from 0
        "by epoch": np.minimum((1 + step // 20) / 5, 1.0),
        "in turns": np.where(step % 6 == 5, 4e-4, 1e-4),
        "zero": np.zeros(N),
    }
    for name, lr in courses.items():
        run = run_of(tmp_path / name, steps=steps_table(np.full(N, 4.0), lr=lr))
        assert learning_rate_jump(run) is None, name


def test_a_jump_in_the_first_steps_is_a_warm_up(tmp_path):
    assert learning_rate_jump(jumping(tmp_path / "a", 10.0, at=BEFORE - 1)) is None
    assert learning_rate_jump(jumping(tmp_path / "b", 10.0, at=BEFORE)) is not None


def test_of_two_members_each_is_judged_alone(tmp_path):
    lr = np.full((N, 2), 1e-3)
    lr[60:, 1] = 1.0
    arms = {"arm": [{"name": "a"}, {"name": "b", "train": {"seed": 1}}]}
    run = run_of(tmp_path / "r", arms, steps=steps_table(np.full((2, N), 4.0), lr=lr))
    finding = learning_rate_jump(run)
    assert finding.members == ("b",) and finding.evidence[0].value == 1.0


def test_a_run_without_learning_rates_says_so_and_one_with_holes_is_read(tmp_path):
    run = run_of(tmp_path / "a", steps=steps_table(np.full(N, 4.0), lr=np.full(N, np.nan)))
    assert learning_rate_jump(run).why == NO_RATE and missing_warmup(run).why == NO_RATE
    lr = np.where(np.arange(N) < 60, 1e-3, 1e-2)
    lr[::3] = np.nan
    losses = np.full(N, 4.0)
    losses[1::3] = np.nan
    run = run_of(tmp_path / "b", steps=steps_table(losses, lr=lr))
    assert learning_rate_jump(run).step == 61


def rising_early(path, share, *, lr=None, tail=2.0):
    losses = np.r_[4.0, np.full(3, 4.0 * (1 + share)), np.linspace(4.0, tail, N - 4)]
    return run_of(path, steps=steps_table(losses, lr=np.full(N, 0.01) if lr is None else lr), planned=N)


@pytest.mark.parametrize(("share", "is_named"), [(1.02 * EARLY_RISE, True), (0.98 * EARLY_RISE, False)])
def test_losses_that_rise_at_once_are_a_missing_warm_up(tmp_path, share, is_named):
    finding = missing_warmup(rising_early(tmp_path / "r", share))
    assert (finding is not None) is is_named
    if finding is not None:
        assert finding.severity == "warning" and finding.step == 0
        assert finding.summary == (
            "scaled begins at a learning rate of 0.01 without a warm-up: its loss rises from 4 to 4.41 at step 1 before it falls."
        )


def test_with_a_warm_up_or_without_an_end_below_the_beginning_it_is_not(tmp_path):
    warm = np.minimum((1 + np.arange(N)) / 20, 1.0)
    assert missing_warmup(rising_early(tmp_path / "a", 0.5, lr=warm)) is None
    assert missing_warmup(rising_early(tmp_path / "b", 0.5, tail=4.2)) is None
    short = np.where(np.arange(N) == 0, 0.001, 0.01)
    assert (
        "with a warm-up that is over after 1 step"
        in missing_warmup(rising_early(tmp_path / "c", 0.5, lr=short)).summary
    )


def test_one_odd_batch_and_noise_are_no_missing_warm_up(tmp_path):
    one = np.r_[4.0, 9.0, np.linspace(4.0, 2.0, N - 2)]
    assert missing_warmup(run_of(tmp_path / "a", steps=steps_table(one))) is None
    noisy = 0.5 + 0.3 * np.random.default_rng(0).random(N)
    noisy[0] = 0.6
    assert missing_warmup(run_of(tmp_path / "b", steps=steps_table(noisy))) is None


@pytest.mark.parametrize(("gap", "is_named"), [(1.1 * MARGIN, True), (0.9 * MARGIN, False)])
def test_a_member_with_a_longer_warm_up_that_ends_better_shows_harm(tmp_path, gap, is_named):
    arms = {"arm": [{"name": f"w{n}", "optimizer": {"warmup_steps": n}} for n in (20, 0)]}
    losses = np.linspace(5.0, 3.0, N) + np.array([[0.0], [gap]])
    finding = missing_warmup(run_of(tmp_path / "r", arms, steps=steps_table(losses), planned=N))
    assert (finding is not None) is is_named
    if finding is not None:
        assert finding.members == ("w0",) and "while w20 ended at 3.16 with 20 steps" in finding.summary


def test_a_warm_up_that_is_longer_than_the_run_is_a_note_and_a_range_test_is_none(tmp_path):
    rising = np.linspace(1e-5, 1e-3, N)
    finding = missing_warmup(run_of(tmp_path / "a", steps=steps_table(np.full(N, 4.0), lr=rising), planned=N))
    assert finding.severity == "note" and "the warm-up is longer than the run" in finding.summary
    tested = np.geomspace(1e-5, 1.0, N)
    assert missing_warmup(run_of(tmp_path / "b", steps=steps_table(np.full(N, 4.0), lr=tested), planned=N)) is None
    short = steps_table(np.full(FEWEST_STEPS - 1, 4.0), lr=np.linspace(1e-5, 1e-3, FEWEST_STEPS - 1))
    assert missing_warmup(run_of(tmp_path / "c", steps=short, planned=FEWEST_STEPS - 1)) is None


def test_a_learning_rate_that_starts_anew_in_a_watched_loop_is_named_before_what_it_led_to(tmp_path):
    import torch
    from torch import nn

    def trained(path, times):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        x, y = torch.randn(256, 16), torch.randint(8, (256,))
        with attnscope.watch_model(model, optimizer, path):
            for step in range(90):
                optimizer.param_groups[0]["lr"] = 0.05 * (times if step >= 40 else 1)
                optimizer.zero_grad()
                rows = torch.randint(256, (64,))
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
        return attnscope.open_run(path)

    said = {f.rule: f for f in examine(trained(tmp_path / "a", 1000)).findings}
    assert said["learning_rate_jump"].step == 40 and said["learning_rate_jump"].severity in ("error", "warning")
    assert learning_rate_jump(trained(tmp_path / "b", 1)) is None
