"""The rule for blocks that do not add to the residual stream."""

import numpy as np
import pytest
from torch import nn

from attnscope.diagnose import diagnose
from attnscope.diagnose.blindness import NO_STEP
from attnscope.diagnose.rules.residual import LEARNED_NOTHING, NOT_FOLLOWED, residual_missing
from attnscope.runs.reader import open_run
from tests.diagnose.probed import probed
from tests.diagnose.synthetic import run_of, steps_table
from tests.watch.test_carried import block_of, without_attentions
from tests.watch.test_residual import GPT, Block, train


def blocks(*carried):
    """Events of blocks; of each, whether attention and the MLP are added."""
    return [("input_carried", {"layer": n, "attention": a, "mlp": m}, 0) for n, (a, m) in enumerate(carried)]


FALLING = np.linspace(4.0, 1.0, 30)[None]


def test_the_first_block_that_does_not_add_is_named(tmp_path):
    run = probed(tmp_path / "r", *blocks((True, True), (False, True), (False, False)), losses=FALLING)
    found = residual_missing(run)
    assert (found.severity, found.step, found.members) == ("warning", 0, ("watched",))
    assert found.summary == (
        "In 2 of 3 blocks of watched that were followed, no path of additions leads from what they are given to what they put out: "
        "in block 1 the output of attention stands in place of the stream."
    )
    assert [each.layer for each in found.evidence] == [1, 2]


@pytest.mark.parametrize("carried", [(True, True), (True, None), (None, None)])
def test_silent_where_blocks_add_or_nobody_knows(tmp_path, carried):
    assert residual_missing(probed(tmp_path / "r", *blocks(carried), losses=FALLING)) is None


@pytest.mark.parametrize(("share", "severity"), [(-0.01, "warning"), (0.0, "warning"), (0.01, "error")])
def test_it_is_an_error_where_next_to_nothing_was_learned(tmp_path, share, severity):
    losses = np.full((1, 60), (LEARNED_NOTHING + share) * 4.0)
    losses[0, 0] = 4.0
    run = probed(tmp_path / "r", *blocks((True, False)), losses=losses, steps=60)
    assert residual_missing(run).severity == severity


def test_it_is_an_error_where_training_broke(tmp_path):
    losses = np.r_[np.full(15, 4.0), np.full(15, np.nan)][None]
    found = residual_missing(probed(tmp_path / "r", *blocks((False, False)), losses=losses, grad_norm=np.nan))
    assert found.severity == "error"


def test_where_no_block_was_followed_it_has_not_looked(tmp_path):
    assert residual_missing(probed(tmp_path / "a")).why == NOT_FOLLOWED
    assert residual_missing(probed(tmp_path / "b", steps=0)).why == NO_STEP
    assert residual_missing(run_of(tmp_path / "c", steps=steps_table([4.0] * 3))) is None


@pytest.mark.parametrize("rightly", [True, False])
def test_a_real_model(tmp_path, rightly):
    block = Block if rightly else block_of(without_attentions)
    train(GPT(lambda: nn.LayerNorm(16), block=block), tmp_path / "r", steps=8)
    found = [each.rule for each in diagnose(open_run(tmp_path / "r")) if each.severity != "note"]
    assert ("residual_missing" in found) == (not rightly)
