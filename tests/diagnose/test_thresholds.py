"""Rules at, just under and just over thresholds that no other test goes to; what a rule is mainly about stands in its own tests."""

import numpy as np
import pytest

from attnscope.diagnose import Finding, NotLooked
from attnscope.diagnose.rules.batches import CALM, FLAT_LOGITS, MOST_POISONED
from attnscope.diagnose.rules.clipping import ALWAYS, clipping_always_on
from attnscope.diagnose.rules.data import FAR_TOO_HIGH, FEWEST_ON_PLATEAU, STEPS_LOST, first_loss_too_high, plateau
from attnscope.diagnose.rules.depth import LEARNED, gradients_explode_with_depth
from attnscope.diagnose.rules.heads import (
    FEWEST_STEPS_TO_LEARN,
    NO_STD,
    TIMES_UNIFORM,
    attention_sink,
    uniform_attention,
)
from attnscope.diagnose.rules.learning_rate import ENDED_ABOVE, learning_rate_too_high
from attnscope.diagnose.rules.logits import (
    BEGUN,
    FADED,
    GROWN,
    LARGE_STD,
    LEARNING,
    logit_growth,
    starved_queries_and_keys,
)
from attnscope.diagnose.rules.loss import FEWEST_LOSSES, loss_explosion
from attnscope.diagnose.rules.precision import FIRST_SCALE, LEAST_SCALE, loss_scale_collapse
from attnscope.diagnose.rules.saturation import SATURATED_RATIO, saturated_at_start
from attnscope.diagnose.rules.scale import EXPLAINS, FEWEST_STEPS, SHARP_RATIO, WORSE, applied_scale, unusual_scale
from attnscope.diagnose.rules.schedule import EARLY, NEARLY, RECOVERY, SHORT_WARMUP, learning_rate_jump, missing_warmup
from tests.diagnose.synthetic import heads_table, run_of, steps_table
from tests.diagnose.test_batches import poisoned
from tests.diagnose.test_data import TEXT
from tests.diagnose.test_depth import layered
from tests.diagnose.test_heads import run_with
from tests.diagnose.test_learning_rate import overshooting
from tests.diagnose.test_logits import AT as LOGITS_AT
from tests.diagnose.test_logits import growing, grown_run, starving
from tests.diagnose.test_schedule import N, jumping, stepped

UNSCALED = {"attention": {"scale": "none"}}
STEPS = 40


def sharp(path, ratio, config=UNSCALED):
    heads = heads_table(1, [0], entropy_ratio=ratio)
    return run_of(path, config, steps=steps_table(np.full(STEPS, 4.0)), heads=heads, planned=STEPS)


@pytest.mark.parametrize(("ratio", "found"), [(SHARP_RATIO - 0.01, True), (SHARP_RATIO, False), (0.8, False)])
def test_a_scale_does_harm_where_attention_begins_sharper_than_a_ratio(tmp_path, ratio, found):
    run = sharp(tmp_path / "r", ratio)
    assert (applied_scale(run) is not None) is found and (unusual_scale(run) is None) is found


@pytest.mark.parametrize(("times", "found"), [(EXPLAINS - 0.01, False), (EXPLAINS, True), (EXPLAINS + 0.01, True)])
def test_a_scale_explains_sharp_attention_from_so_many_times_on(tmp_path, times, found):
    assert (applied_scale(sharp(tmp_path / "r", 0.1, {"attention": {"scale": times / 8}})) is not None) is found


@pytest.mark.parametrize(
    ("worse", "n", "answer"),
    [
        (WORSE + 0.01, STEPS, Finding),
        (WORSE - 0.01, STEPS, type(None)),
        (WORSE + 0.01, FEWEST_STEPS, Finding),
        (WORSE + 0.01, FEWEST_STEPS - 1, NotLooked),
    ],
)
def test_a_twin_shows_harm_of_a_scale_after_some_steps_by_some_nats(tmp_path, worse, n, answer):
    arms = [{"name": "unscaled", **UNSCALED}, {"name": "scaled"}]
    losses = np.full((2, n), 4.0) + np.array([[worse], [0.0]])
    run = run_of(tmp_path / "r", {"arm": arms}, steps=steps_table(losses), heads=heads_table(2, [0]), planned=n)
    assert type(applied_scale(run)) is answer


def test_a_mean_ratio_at_the_threshold_is_not_saturated(tmp_path):
    assert saturated_at_start(sharp(tmp_path / "a", SATURATED_RATIO)) is None
    assert saturated_at_start(sharp(tmp_path / "b", SATURATED_RATIO - 1e-6)) is not None


@pytest.mark.parametrize(
    ("first", "above", "found"),
    [
        (1.0, ENDED_ABOVE + 0.01, True),
        (1.0, ENDED_ABOVE, False),
        (8.0, 4.01, True),  # half of the first loss
        (8.0, 4.0, False),
    ],
)
def test_a_loss_has_to_end_far_above_the_first_to_be_harm(tmp_path, first, above, found):
    losses = np.r_[np.full(5, first), np.full(25, first + above)]
    run = overshooting(tmp_path / "r", 100.0, losses=losses, planned=30)
    assert run.members[0].status != "diverged"
    assert (getattr(learning_rate_too_high(run), "severity", None) == "error") is found


@pytest.mark.parametrize(
    ("share", "severity"), [(LEARNED + 0.01, "warning"), (LEARNED, "note"), (LEARNED - 0.01, "note")]
)
def test_exploding_gradients_are_a_note_where_something_was_learned(tmp_path, share, severity):
    losses = np.r_[5.0, np.full(59, 5.0 * share)]
    assert gradients_explode_with_depth(layered(tmp_path / "r", 100.0, losses=losses)).severity == severity


@pytest.mark.parametrize(("within", "severity"), [(RECOVERY, "note"), (RECOVERY + 1, "warning")])
def test_a_jump_is_forgiven_if_the_loss_is_back_in_time(tmp_path, within, severity):
    losses = stepped(2.0)
    losses[61 + within - 6 :] = 4.0  # the median of ten losses is back with six of them
    assert learning_rate_jump(jumping(tmp_path / "r", 10.0, losses=losses)).severity == severity


@pytest.mark.parametrize(("warmup", "found"), [(SHORT_WARMUP, True), (SHORT_WARMUP + 1, False)])
@pytest.mark.parametrize("rate", [NEARLY - 0.01, 0.1])
def test_a_warm_up_of_some_steps_is_one(tmp_path, warmup, found, rate):
    losses = np.r_[4.0, np.full(5, 6.0), np.linspace(4.0, 2.0, N - 6)]
    lr = np.where(np.arange(N) < warmup, 0.01 * rate, 0.01)
    run = run_of(tmp_path / "r", steps=steps_table(losses, lr=lr), planned=N)
    assert (missing_warmup(run) is not None) is found


@pytest.mark.parametrize(("at", "found"), [(EARLY - 2, True), (EARLY - 1, False)])
def test_a_loss_has_to_rise_early_to_miss_a_warm_up(tmp_path, at, found):
    losses = np.r_[4.0, np.linspace(4.0, 3.9, at - 1), 6.0, 6.0, np.linspace(3.9, 2.0, N - at - 2)]
    run = run_of(tmp_path / "r", steps=steps_table(losses, lr=np.full(N, 0.01)), planned=N)
    assert (missing_warmup(run) is not None) is found


@pytest.mark.parametrize(("times", "found"), [(BEGUN, True), (BEGUN - 0.01, False)])
def test_a_bound_has_to_grow_with_the_logits(tmp_path, times, found):
    bound = np.where(growing(2.0) > 1, 64.0 * times, 64.0)
    assert (logit_growth(grown_run(tmp_path / "r", 50.0, bound=bound)) is not None) is found


@pytest.mark.parametrize(("times", "found"), [(GROWN, True), (GROWN - 0.01, False)])
def test_logits_have_to_grow_by_as_many_times(tmp_path, times, found):
    std = np.where(growing(2.0) > 1, LARGE_STD * times, LARGE_STD)
    heads = heads_table(1, LOGITS_AT, n_heads=2, logit_std=std, max_logit_bound=10 * std)
    assert (logit_growth(run_of(tmp_path / "r", steps=steps_table(np.full(60, 4.0)), heads=heads)) is not None) is found


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ({"first": 1.01 * LEARNING}, True),
        ({"first": 0.9 * LEARNING}, False),
        ({"v": FADED}, True),
        ({"v": 0.9 * FADED}, False),
    ],
)
def test_q_and_k_starve_only_where_they_had_gradients_and_v_has(tmp_path, how, found):
    assert (starved_queries_and_keys(starving(tmp_path / "r", 1e-5, **how)) is not None) is found


@pytest.mark.parametrize(("times", "found"), [(TIMES_UNIFORM + 0.01, True), (TIMES_UNIFORM - 0.01, False)])
def test_a_sink_is_more_than_uniform_attention_would_give(tmp_path, times, found):
    run = run_with(tmp_path / "r", sink=0.25 * times, entropy=np.log(4.0), entropy_ratio=1.0)
    assert (attention_sink(run) is not None) is found


@pytest.mark.parametrize(("std", "severity"), [(0.9 * NO_STD, "warning"), (1.01 * NO_STD, "note")])
def test_a_layer_whose_logits_never_differ_is_a_warning(tmp_path, std, severity):
    assert uniform_attention(run_with(tmp_path / "r", logit_std=std)).severity == severity


@pytest.mark.parametrize(("n", "answer"), [(FEWEST_STEPS_TO_LEARN, Finding), (FEWEST_STEPS_TO_LEARN - 1, NotLooked)])
def test_heads_are_given_time_to_learn(tmp_path, n, answer):
    run = run_of(tmp_path / "r", steps=steps_table(np.full(n, 4.0)), heads=heads_table(1, range(n), logit_std=0.0))
    assert type(uniform_attention(run)) is answer


@pytest.mark.parametrize(
    ("first", "last", "found"),
    [(FIRST_SCALE, LEAST_SCALE, True), (FIRST_SCALE - 0.5, LEAST_SCALE, False), (65536.0, LEAST_SCALE + 0.1, False)],
)
def test_a_loss_scale_begins_high_and_ends_at_nothing(tmp_path, first, last, found):
    run = run_of(
        tmp_path / "r", steps=steps_table(np.full(30, 3.0), loss_scale=np.r_[np.full(20, first), np.full(10, last)])
    )
    assert (loss_scale_collapse(run) is not None) is found


def batches(n_odd=1, before=0.0, log_z=0.0):
    """Losses of 3 +- 0.05 with some batches that are odd, a step before the first, and log_z at it."""
    losses = 3.0 + 0.05 * np.where(np.arange(160) % 2, 1, -1)
    norms, moved = np.ones(160), np.full(160, 5.0)
    odd = 40 + 30 * np.arange(n_odd)
    losses[odd], norms[odd], moved[odd] = 6.0, 5.0, 5.0 + log_z
    losses[39] += before
    return losses, norms, moved


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ({"n_odd": MOST_POISONED}, True),
        ({"n_odd": MOST_POISONED + 1}, False),
        ({"log_z": FLAT_LOGITS - 0.01}, True),
        ({"log_z": FLAT_LOGITS + 0.01}, False),
        ({"before": (CALM - 0.1) * 1.4826 * 0.05 - 0.05}, True),
        ({"before": (CALM + 0.1) * 1.4826 * 0.05 - 0.05}, False),
    ],
)
def test_an_odd_batch_is_rare_and_comes_out_of_calm(tmp_path, how, found):
    losses, norms, log_z = batches(**how)
    assert (poisoned(tmp_path / "r", losses, norms, log_z=log_z) is not None) is found


@pytest.mark.parametrize(
    ("above", "lost", "severity"),
    [
        (FAR_TOO_HIGH + 0.01, STEPS_LOST, "warning"),
        (FAR_TOO_HIGH - 0.01, STEPS_LOST, "note"),
        (FAR_TOO_HIGH + 0.01, STEPS_LOST - 1, "note"),
    ],
)
def test_a_first_loss_does_harm_if_it_is_far_too_high_for_long(tmp_path, above, lost, severity):
    guessing = TEXT["uniform"]
    losses = np.full(40, 4.0)
    losses[:lost] = np.linspace(guessing + above, guessing + 1, lost)
    assert first_loss_too_high(run_of(tmp_path / "r", steps=steps_table(losses), reference=TEXT)).severity == severity


@pytest.mark.parametrize(("n", "answer"), [(2 * FEWEST_ON_PLATEAU, Finding), (2 * FEWEST_ON_PLATEAU - 2, NotLooked)])
def test_a_plateau_takes_some_losses(tmp_path, n, answer):
    run = run_of(tmp_path / "r", steps=steps_table(np.full(n, 5.0)), reference={"uniform": 9.0})
    assert type(plateau(run)) is answer


@pytest.mark.parametrize(("n", "answer"), [(FEWEST_LOSSES, type(None)), (FEWEST_LOSSES - 1, NotLooked)])
def test_an_explosion_takes_some_losses(tmp_path, n, answer):
    assert type(loss_explosion(run_of(tmp_path / "r", steps=steps_table(np.full(n, 4.0))))) is answer


@pytest.mark.parametrize(("share", "found"), [(ALWAYS, True), (ALWAYS - 0.01, False)])
def test_clipping_is_always_on_from_a_share_of_the_steps_on(tmp_path, share, found):
    factors = np.where(np.arange(100) < round(100 * share), 0.1, 1.0)
    run = run_of(tmp_path / "r", steps=steps_table(np.full(100, 4.0), clip_factor=factors))
    assert (clipping_always_on(run) is not None) is found
