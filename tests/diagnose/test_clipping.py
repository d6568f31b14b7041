"""Rules of clipping at the wrong moment."""

import numpy as np
import pytest
import torch
from torch import nn

from attnscope.diagnose.blindness import NO_OPTIMIZER, NO_STEP
from attnscope.diagnose.rules.clipping import (
    FEWEST_LATE,
    LEAST_THRESHOLD,
    clipped_after_step,
    clipped_before_unscaling,
)
from attnscope.runs.reader import open_run
from attnscope.watch.attach import watch_model
from tests.diagnose.probed import UPKEEP, probed
from tests.diagnose.synthetic import run_of, steps_table, watched_run_of

SCALED = {"optimizer": "SGD", "loss_scale": 65536.0, "threshold": 1.0, "kept": 1e-5}


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, True),
        ({"loss_scale": 128.0, "threshold": 128 * LEAST_THRESHOLD - 0.01}, True),
        ({"loss_scale": 128.0, "threshold": 128 * LEAST_THRESHOLD}, False),
        ({"loss_scale": 1024.0, "threshold": 1024.0, "kept": 0.3}, False),  # scaled like the gradients
        ({"loss_scale": 1.0, "threshold": 1e-3}, False),
        ({"kept": 1.0}, False),  # nothing was clipped
        ({"kept": float("nan")}, False),
    ],
)
def test_clipping_before_unscaling(tmp_path, fields, found):
    finding = clipped_before_unscaling(probed(tmp_path / "r", ("clipped_scaled", SCALED | fields, 3)))
    assert (finding is not None) is found
    if not fields:
        assert (finding.severity, finding.step) == ("warning", 3)
        assert finding.summary == (
            "At step 3 the gradients of SGD are clipped at 1 while they are multiplied by a loss scale of 65,536: 1e-05 of them is "
            "left, as if they were clipped at 1.5e-05."
        )


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"clipped_after": FEWEST_LATE}, True),
        ({"clipped_after": FEWEST_LATE - 1}, False),
        ({"clipped_after": 20, "clipped": 1}, False),
        ({"clipped_after": 20, "gradients_kept": 4}, False),  # they are added to the next ones
        ({"clipped": 30}, False),
    ],
)
def test_clipping_after_the_step(tmp_path, fields, found):
    finding = clipped_after_step(probed(tmp_path / "r", ("upkeep", UPKEEP | fields)))
    assert (finding is not None) is found
    assert not found or finding.severity == "warning"


@pytest.mark.parametrize("rule", [clipped_before_unscaling, clipped_after_step])
def test_nobody_looks_where_no_optimizer_was_seen(tmp_path, rule):
    steps = steps_table(np.full(30, np.nan))
    assert rule(watched_run_of(tmp_path / "a", steps=steps)).why == NO_OPTIMIZER
    assert rule(probed(tmp_path / "b", steps=0, losses=None)).why in (NO_STEP, NO_OPTIMIZER)
    assert rule(run_of(tmp_path / "c", steps=steps)) is None


def train(path, step, *, steps=8, lr=1e-3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr)
    x = torch.randn(16, 4)

    def backward(scale=lambda loss: loss):
        scale((model(x) - 10).square().mean()).backward()

    with watch_model(model, path=path):
        for _ in range(steps):
            optimizer.zero_grad()
            step(model, optimizer, backward)
    return open_run(path)


def scaled(*, unscale=False, threshold=lambda _: 1.0, by_value=False, **options):
    scaler = torch.amp.GradScaler("cpu", **options)

    def step(model, optimizer, backward):
        backward(scaler.scale)
        if unscale:
            scaler.unscale_(optimizer)
        clip = nn.utils.clip_grad_value_ if by_value else nn.utils.clip_grad_norm_
        clip(model.parameters(), threshold(scaler))
        scaler.step(optimizer)
        scaler.update()

    return step


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, True),
        ({"by_value": True}, True),
        ({"unscale": True}, False),
        ({"enabled": False}, False),
        ({"init_scale": 1.0}, False),
        ({"threshold": lambda scaler: 0.1 * scaler.get_scale()}, False),
    ],
)
def test_real_clipping_of_scaled_gradients(tmp_path, options, found):
    run = train(tmp_path / "r", scaled(**options))
    finding = clipped_before_unscaling(run)
    assert (finding is not None) is found
    assert clipped_after_step(run) is None


def clipping(*, before=None, after=None):
    def step(model, optimizer, backward):
        backward()
        if before is not None:
            nn.utils.clip_grad_norm_(model.parameters(), before)
        optimizer.step()
        if after is not None:
            nn.utils.clip_grad_norm_(model.parameters(), after)

    return step


@pytest.mark.parametrize(
    ("when", "found"),
    [
        ({"after": 0.1}, True),
        ({"before": 0.1}, False),
        ({"before": 0.1, "after": 0.1}, False),
        ({"after": float("inf")}, False),  # who wants to know the norm
        ({"after": 1e6}, False),
    ],
)
def test_real_clipping_after_the_step(tmp_path, when, found):
    run = train(tmp_path / "r", clipping(**when))
    assert (clipped_after_step(run) is not None) is found
    assert clipped_before_unscaling(run) is None
    assert ("before" in when) is bool((run.steps["clip_factor"] < 1).any()), "what comes too late clips nothing"
