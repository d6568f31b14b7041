"""Half precision: products that come close to its largest number, loss scales, updates that are rounded away."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnscope
from attnscope.diagnose import examine
from attnscope.diagnose.blindness import NO_ATTENTION, NO_OPTIMIZER, NO_STEP
from attnscope.diagnose.products import FLOAT16_MAX, SOFT_CAPPED, UNKNOWN_SCALE
from attnscope.diagnose.rules.nonfinite import nonfinite
from attnscope.diagnose.rules.precision import (
    HALF_ULP,
    HEADROOM,
    half_precision_headroom,
    loss_scale_collapse,
    updates_round_away,
)
from tests.diagnose.synthetic import heads_table, params_of_one, run_of, steps_table, watched_run_of

HALF = {"precision": {"dtype": "float16"}}
D_HEAD = 64  # of the default model
LIMIT = HEADROOM * FLOAT16_MAX / D_HEAD**0.5  # of max_logit
LAYER = {"layer": 0, "name": "attn", "n_heads": 1, "d_head": 64, "scale": 0.125, "scale_after": 0.125, "mask": "causal", "dtype": "float16", "backend": "eager"}  # fmt: skip


def half(path, config=HALF, *, max_logit=LIMIT + 1, losses=3.0, events=()):
    heads = heads_table(1, range(0, 30, 10), n_layers=2, max_logit=max_logit)
    return run_of(path, config, steps=steps_table(np.broadcast_to(losses, 30)), heads=heads, events=events)


# -- half_precision_headroom --


@pytest.mark.parametrize(("max_logit", "is_found"), [(LIMIT - 1, False), (LIMIT + 1, True)])
def test_a_product_comes_close_to_the_largest_float16_from_a_share_of_it_on(tmp_path, max_logit, is_found):
    assert (half_precision_headroom(half(tmp_path / "r", max_logit=max_logit)) is not None) is is_found


@pytest.mark.parametrize(
    "changes", [{"precision": {"dtype": "bfloat16"}}, {}, HALF | {"attention": {"backend": "sdpa"}}]
)
def test_other_dtypes_and_fused_kernels_have_headroom(tmp_path, changes):
    assert half_precision_headroom(half(tmp_path / "r", changes, max_logit=1e6)) is None


def test_where_the_product_is_not_known_that_is_said(tmp_path):
    for name, changes, why in (("a", {"logit_softcap": 50.0}, SOFT_CAPPED), ("b", {"scale": "learned"}, UNKNOWN_SCALE)):
        assert half_precision_headroom(half(tmp_path / name, HALF | {"attention": changes})).why == why
    assert half_precision_headroom(half(tmp_path / "c", max_logit=np.nan)) is None


def test_products_before_they_overflow_are_an_error_and_why_numbers_broke(tmp_path):
    losses = np.full(30, 3.0)
    losses[15:] = np.nan
    max_logit = np.array([100.0, 7000.0, np.nan]).reshape(3, 1, 1, 1)
    events = [("nonfinite", 15, 0, {"tensor": "loss"})]
    run = half(tmp_path / "r", max_logit=max_logit, losses=losses, events=events)
    found = half_precision_headroom(run)
    assert (found.severity, found.step) == ("error", 10)
    assert found.summary == (
        f"From step 10 on, q.k of {run.entries[0].name} is above 16,376 before it is scaled: 56,000 at step 10 in layer 0, head 0; "
        "the largest float16 is 65,504. At step 15 its loss is not finite."
    )
    assert nonfinite(run).summary.endswith(
        "Before it is scaled, q.k of layer 0, head 0 was 56,000 at step 10, in float16, which ends at 65,504: it overflowed."
    )


def test_logits_that_are_too_large_from_the_start_are_why_they_overflow(tmp_path):
    losses = np.r_[np.full(15, 3.0), np.full(15, np.nan)]
    heads = heads_table(1, range(0, 30, 10), max_logit=LIMIT + 1, entropy_ratio=0.01)
    events = [("nonfinite", 15, 0, {"tensor": "attention logits", "where": ["layer 1"]})]
    (chain,) = examine(run_of(tmp_path / "r", HALF, steps=steps_table(losses), heads=heads, events=events)).chains
    assert [each.rule for each in chain][:2] == ["saturated_at_start", "half_precision_headroom"]
    assert chain[-1].kind == "symptom"


def test_of_a_watched_script_only_what_multiplies_the_product_counts(tmp_path):
    def found(name, **changes):
        heads = heads_table(1, [0, 10], max_logit=7000.0)
        events = [("attention", 0, LAYER | changes)]
        return half_precision_headroom(
            watched_run_of(tmp_path / name, steps=steps_table(np.full(30, 3.0)), heads=heads, events=events)
        )

    assert found("after").severity == "warning"
    assert found("before", scale_after=1.0) is None
    assert found("unknown", scale_after=None).why == UNKNOWN_SCALE
    assert found("fused", backend="sdpa") is None
    assert found("float32", dtype="float32") is None


# -- loss_scale_collapse --


@pytest.mark.parametrize(
    ("scales", "is_found"),
    [
        (2.0 ** (16 - np.arange(30).clip(max=16)), True),
        (2.0 ** (16 - np.arange(30).clip(max=15)), False),
        (np.ones(30), False),  # no scaling
        (np.full(30, np.nan), False),
    ],
)
def test_a_loss_scale_is_gone_at_one(tmp_path, scales, is_found):
    run = run_of(tmp_path / "r", steps=steps_table(np.full(30, 3.0), loss_scale=scales))
    found = loss_scale_collapse(run)
    assert (found is not None) is is_found
    if is_found:
        assert found.summary == (
            f"The loss scale of {run.entries[0].name} falls from 65536 to 1 at step 16: its gradients are not finite without any scale."
        )


def test_a_run_without_steps_has_no_loss_scale_to_look_at(tmp_path):
    assert loss_scale_collapse(run_of(tmp_path / "r")).why == NO_STEP


# -- updates_round_away --


def half_weights(path, ratio, *, dtypes=("bfloat16",), steps=30, lr=1e-4, first=5.5):
    optimizer = {"name": "AdamW"} | ({} if dtypes is None else {"dtypes": list(dtypes)})
    return watched_run_of(
        path,
        steps=steps_table(np.full(steps, 3.0), lr=np.broadcast_to(lr, steps)),
        params=params_of_one(range(steps), update_ratio=ratio),
        events=[("optimizer", 0, optimizer), ("cross_entropy", 0, {"classes": 256, "loss": first})],
    )


@pytest.mark.parametrize(("ratio", "is_found"), [(HALF_ULP * 0.99, True), (HALF_ULP * 1.01, False), (np.nan, False)])
def test_updates_round_away_below_half_a_unit_in_the_last_place(tmp_path, ratio, is_found):
    found = updates_round_away(half_weights(tmp_path / "r", ratio))
    assert (getattr(found, "severity", None) == "warning") is is_found


def test_a_model_that_was_trained_before_is_hurt_less(tmp_path):
    assert updates_round_away(half_weights(tmp_path / "r", 1e-4, first=2.0)).severity == "note"


def test_small_updates_of_a_warm_up_do_not_count(tmp_path):
    lr = np.linspace(0, 1e-3, 30)
    ratio = np.where(lr < 5e-4, 1e-5, 0.01)[:, None]
    assert updates_round_away(half_weights(tmp_path / "r", ratio, lr=lr)) is None


def test_float32_weights_beside_others_do_not_round_away_and_unknown_ones_are_said(tmp_path):
    assert updates_round_away(half_weights(tmp_path / "a", 1e-4, dtypes=("bfloat16", "float32"))) is None
    unknown = half_weights(tmp_path / "b", 1e-4, dtypes=None)
    assert updates_round_away(unknown).why == "the dtype of the weights was not recorded"
    few = half_weights(tmp_path / "c", 1e-4, steps=4)
    assert updates_round_away(few).why == "fewer than 5 updates were measured at a full learning rate"
    assert updates_round_away(watched_run_of(tmp_path / "d", steps=steps_table(np.full(30, 3.0)))).why == NO_OPTIMIZER


def trained(path, dtype, *, labels=True):
    torch.manual_seed(0)
    model = nn.Linear(16, 16).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    with attnscope.watch_model(model, optimizer, path):
        for step in range(25):
            y = torch.randint(0, 16, (8,))
            y = y if labels or step < 10 else torch.full_like(y, -100)
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 16, dtype=dtype)), y).backward()
            optimizer.step()
    return attnscope.open_run(path)


def test_bfloat16_weights_under_a_small_learning_rate_are_told_and_float32_ones_are_not(tmp_path):
    found = updates_round_away(trained(tmp_path / "half", torch.bfloat16))
    assert found.summary.startswith("The weights of watched are bfloat16, and the median of its updates is ")
    assert updates_round_away(trained(tmp_path / "full", torch.float32)) is None


def test_a_loss_over_no_label_is_why_numbers_broke(tmp_path):
    found = nonfinite(trained(tmp_path / "r", torch.float32, labels=False))
    assert found.step == 10 and found.summary.endswith(
        "No target of step 10 counts: its loss is a mean over nothing, 0 / 0."
    )


def test_members_without_attention_say_so_where_they_are_float16(tmp_path):
    run = watched_run_of(tmp_path / "r", steps=steps_table(np.full(30, 3.0)), events=[("attention", 0, LAYER)])
    assert half_precision_headroom(run) is None or half_precision_headroom(run).why == NO_ATTENTION
