"""For every rule a run in which it finds what it is there for, made to order: no training, the same on every machine."""

import numpy as np

from tests.diagnose.probed import ORPHANS, SIGHT, TARGETS, UPKEEP, probed
from tests.diagnose.synthetic import heads_table, params_of_one, params_table, run_of, steps_table, watched_run_of
from tests.diagnose.test_axes import INPUTS, OVER_BATCH, REPEATED, B
from tests.diagnose.test_batches import curves
from tests.diagnose.test_clipping import SCALED
from tests.diagnose.test_collapse import alike, collapsing
from tests.diagnose.test_data import TEXT, cross_entropy, evaluated, rising
from tests.diagnose.test_depth import layered
from tests.diagnose.test_heads import AT, run_with
from tests.diagnose.test_learning_rate import overshooting
from tests.diagnose.test_logits import grown_run, starving
from tests.diagnose.test_modes import DROPOUT, MODE, OTHER
from tests.diagnose.test_norms import NORMS
from tests.diagnose.test_optimizer import adam_steps, shrinking, stepping
from tests.diagnose.test_precision import half, half_weights
from tests.diagnose.test_residual_missing import FALLING, blocks
from tests.diagnose.test_schedule import jumping, rising_early, stepped
from tests.diagnose.test_sums import added, summed

QUERIES = "softmax over the queries' axis: weights of one query do not sum to 1 over its keys (axis 3)"
CALL = {"name": "h.0.attn", "backend": "eager", "shapes": [], "reason": QUERIES}
UNSCALED = {"attention": {"scale": "none"}}


def unscaled_and_saturated(path):
    heads = heads_table(1, [0], n_layers=2, entropy_ratio=0.1, logit_std=7.9, max_prob=0.9, softmax_gain=0.05)
    return run_of(path, UNSCALED, steps=steps_table(np.full(30, 4.0)), heads=heads, planned=30)


def unusual(path):
    heads = heads_table(1, [0], n_layers=4, logit_std=0.125)
    return run_of(path, {"attention": {"scale": "inverse"}}, steps=steps_table(np.full(30, 4.0)), heads=heads)


def above_guessing(path):
    losses = np.r_[np.linspace(26.0, 6.0, 22), np.full(20, 4.0)]
    return run_of(path, steps=steps_table(losses), reference=TEXT)


def nothing_moves(path):
    params = params_table(1, range(120), update_norm=1e-5)
    return run_of(path, steps=steps_table(np.full(120, 4.0)), params=params)


def always_clipped(path):
    return run_of(path, steps=steps_table(np.full(40, 4.0), clip_factor=np.full(40, 0.1)))


def copied_heads(path):
    draw = np.random.default_rng(0)
    columns = {
        name: draw.uniform(0.5, 1.0, (len(AT), 1, 1, 4)) for name in ("logit_std", "entropy", "max_prob", "sink")
    }
    for values in columns.values():
        values[..., 2] = values[..., 1]
    return run_with(path, **columns)


def one_sink(path):
    sink = np.full((len(AT), 1, 1, 4), 0.05)
    sink[8:, ..., 3] = 0.6
    return run_with(path, entropy=1.5, sink=sink)


def one_odd_batch(path):
    losses, norms = curves()
    return run_of(path, steps=steps_table(losses.round(2), grad_norm=norms))


def broken(path):
    losses = np.r_[np.full(15, 4.0), np.full(15, np.nan)]
    events = [("nonfinite", 15, 0, {"tensor": "attention logits", "where": ["layer 1"]})]
    return run_of(path, steps=steps_table(losses), events=events)


def passed(path):
    losses = np.full(30, 4.0)
    losses[14] = np.nan
    return run_of(
        path, steps=steps_table(losses, grad_norm=np.ones(30)), events=[("nonfinite", 14, 0, {"tensor": "loss"})]
    )


def skipping(path):
    skipped = {"why": "GradScaler found NaN or Inf in the gradient", "where": ["layer 0 qkv", "out"]}
    return run_of(path, steps=steps_table(np.full(5, 4.0)), events=[("skipped_update", 3, 0, skipped)] * 17)


def exploding(path):
    losses = np.r_[np.full(20, 4.0), np.full(20, 4000.0)]
    heads = heads_table(1, [0, 10, 15], max_logit=np.array([10.0, 2000.0, 5000.0]).reshape(3, 1, 1, 1))
    return run_of(path, steps=steps_table(losses), heads=heads)


def spiking(path):
    losses = 4.0 + 0.1 * np.sin(np.arange(100))
    losses[60] = 9.0
    return run_of(path, steps=steps_table(losses))


def flat(path, level=5.0, planned=None):
    return run_of(path, steps=steps_table(np.full(120, level)), reference=TEXT | {"unigram": 5.0}, planned=planned)


RUNS = {
    "wrong_softmax_axis": lambda p: probed(p, ("not_measured", CALL), attention=()),
    "attention_over_batch": lambda p: probed(p, ("keys_seen", OVER_BATCH), ("inputs_seen", INPUTS | {"labels": B})),
    "norm_over_one_feature": lambda p: probed(p, ("norms_over_one", NORMS)),
    "keys_repeated": lambda p: probed(p, ("keys_repeated", REPEATED)),
    "future_visible": lambda p: probed(
        p, ("keys_seen", SIGHT | {"layer": 0, "later": 0.45, "later_rows": 1.0}), ("targets", TARGETS)
    ),
    "labels_shifted_wrong": lambda p: probed(
        p, ("keys_seen", SIGHT | {"layer": 0}), ("targets", TARGETS | {"equal_same": 1.0, "equal_next": 0.05})
    ),
    "rows_fully_masked": lambda p: probed(p, ("rows_without_keys", {"layer": 0, "rows": 48, "of": 512}, 8)),
    "padding_attended": lambda p: probed(p, ("keys_seen", SIGHT | {"layer": 0, "padded": 0.4})),
    "parameters_without_optimizer": lambda p: probed(p, ("upkeep", UPKEEP), ("without_optimizer", ORPHANS)),
    "parameters_without_gradient": lambda p: probed(
        p, ("upkeep", UPKEEP | {"detached": 2, "detached_names": ["h.0.q", "h.0.k"]})
    ),
    "parameters_frozen": lambda p: probed(p, ("upkeep", UPKEEP | {"lr_zero": 2, "lr_zero_names": ["h.0.q", "h.0.k"]})),
    "gradients_accumulate": lambda p: probed(p, ("upkeep", UPKEEP | {"gradients_kept": 4}), grad_norm=np.arange(1, 31)),
    "clipped_before_unscaling": lambda p: probed(p, ("clipped_scaled", SCALED, 3)),
    "clipped_after_step": lambda p: probed(p, ("upkeep", UPKEEP | {"clipped_after": 20})),
    "evaluation_in_training": lambda p: probed(p, ("evaluation_in_training", MODE | {"losses_before": 9}, 1)),
    "dropout_in_evaluation": lambda p: probed(p, ("dropout_in_evaluation", DROPOUT, 10)),
    "evaluation_scales_otherwise": lambda p: probed(p, ("attention_in_other_mode", OTHER | {"scale_ratio": 0.25}, 10)),
    "residual_missing": lambda p: probed(p, *blocks((True, True), (False, True)), losses=FALLING),
    "repeated_batch": lambda p: watched_run_of(
        p, steps=steps_table(np.r_[5.5, np.full(60, 0.02)]), events=cross_entropy(same=20)
    ),
    "loss_rises": lambda p: watched_run_of(
        p, steps=steps_table(rising(1.0)), params=params_of_one(range(20), update_ratio=0.01), events=cross_entropy()
    ),
    "applied_scale": unscaled_and_saturated,
    "saturated_at_start": unscaled_and_saturated,
    "first_loss_too_high": above_guessing,
    "half_precision_headroom": half,
    "updates_round_away": lambda p: half_weights(p, 1e-4),
    "loss_summed": lambda p: summed(p, 1.0),
    "accumulation_not_divided": added,
    "adam_epsilon_too_large": lambda p: run_of(
        p, {"optimizer": {"name": "adamw", "eps": 1.0}}, steps=adam_steps(), params=stepping(0.1, ratio=1e-5)
    ),
    "weight_decay_too_strong": lambda p: shrinking(p, left=0.1),
    "learning_rate_jump": lambda p: jumping(p, 100.0, losses=stepped(2.0)),
    "missing_warmup": lambda p: rising_early(p, 0.5),
    "learning_rate_too_high": lambda p: overshooting(p, 10.0),
    "learning_rate_too_low": nothing_moves,
    "gradients_explode_with_depth": lambda p: layered(p, 1000.0),
    "gradients_vanish_with_depth": lambda p: layered(p, 1e-5),
    "clipping_always_on": always_clipped,
    "logit_growth": lambda p: grown_run(p, 40.0, n_layers=3, layer=2),
    "entropy_collapse": lambda p: collapsing(p, [0.02, 0.04], n_layers=2, layer=1),
    "rank_collapse": lambda p: alike(p, 0.999),
    "uniform_attention": lambda p: run_with(p, logit_std=0.0),
    "starved_queries_and_keys": lambda p: starving(p, 1e-5),
    "identical_heads": copied_heads,
    "attention_sink": one_sink,
    "unusual_scale": unusual,
    "poisoned_batch": one_odd_batch,
    "nonfinite": broken,
    "nonfinite_loss_passed": passed,
    "loss_scale_collapse": lambda p: run_of(
        p, steps=steps_table(np.full(30, 3.0), loss_scale=2.0 ** (16 - np.arange(30).clip(max=16)))
    ),
    "updates_skipped": skipping,
    "loss_explosion": exploding,
    "loss_spike": spiking,
    "loss_too_low": lambda p: evaluated(p, held_out=0.1, alone=9.1),
    "plateau": flat,
    "stalled": lambda p: flat(p, 5.2, planned=120),
    "failed": lambda p: run_of(p, steps=steps_table([4.0, 4.0]), end="failed", error="ValueError: no data", planned=9),
}
