"""Rules of attention logits: at, just under and over their thresholds, and on training that has the fault."""

import numpy as np
import pytest

import attnscope
from attnscope.diagnose import NotLooked, diagnose
from attnscope.diagnose.courses import FEWEST_RECORDS_IN_ALL
from attnscope.diagnose.rules.collapse import entropy_collapse
from attnscope.diagnose.rules.logits import LARGE_STD, NO_GROUPS, STARVED, logit_growth, starved_queries_and_keys
from tests.diagnose.synthetic import heads_table, qkv_table, run_of, steps_table

STEPS = 60
AT = list(range(0, STEPS, 3))
ARMS = {"arm": [{"name": name, "init": {"gain": gain}} for name, gain in (("calm", 1.0), ("wild", 1.1))]}


@pytest.fixture(scope="module")
def fast_and_slow(tmp_path_factory):
    """A pre-norm decoder under AdamW at a learning rate that is too high, and its twin at one that is not."""
    config = {
        "model": {"d_model": 64, "n_layers": 2, "norm": "pre"},
        "optimizer": {"name": "adamw"},
        "train": {"steps": 120, "checkpoint_every": 0},
        "record": {"every": 2},
        "arm": [{"name": f"lr {lr}", "optimizer": {"lr": lr}} for lr in (0.03, 0.002)],
    }
    return attnscope.train_model(config, path=tmp_path_factory.mktemp("runs") / "r")


def growing(to, *, n_members=1, n_layers=1, member=0, layer=0, since=30):
    """One number per row of heads_table: 1, and in one layer of a member `to` from a step on."""
    values = np.ones((len(AT), n_members, n_layers, 2))
    values[np.asarray(AT) >= since, member, layer] = to
    return values


def grown_run(path, to, *, config=None, losses=4.0, bound=None, **places):
    std = growing(to, **places)
    n_members, n_layers = std.shape[1:3]
    columns = {"logit_std": std, "max_logit": 5 * std, "max_logit_bound": 10 * std if bound is None else bound}
    heads = heads_table(n_members, AT, n_layers=n_layers, n_heads=2, **columns)
    return run_of(path, config, steps=steps_table(np.full((n_members, STEPS), losses)), heads=heads)


@pytest.mark.parametrize(("to", "found"), [(LARGE_STD - 0.1, False), (LARGE_STD, True), (LARGE_STD + 0.1, True)])
def test_logits_grow_from_the_threshold_on(tmp_path, to, found):
    assert (logit_growth(grown_run(tmp_path / "r", to)) is not None) is found


def test_what_was_as_large_at_first_has_not_grown(tmp_path):
    assert logit_growth(grown_run(tmp_path / "a", 4.9 * 8, since=30)) is not None
    heads = heads_table(1, AT, logit_std=8 * growing(4.9)[..., :1], max_logit_bound=100 * growing(4.9)[..., :1])
    steps = steps_table(np.full(STEPS, 4.0))
    assert logit_growth(run_of(tmp_path / "b", steps=steps, heads=heads)) is None, "4.9 times 8"


def test_logits_that_spread_up_to_a_bound_of_old_do_not_grow(tmp_path):
    assert logit_growth(grown_run(tmp_path / "a", 50.0, bound=64.0)) is None
    assert logit_growth(grown_run(tmp_path / "b", 50.0, bound=np.nan)) is not None, (
        "a bound that was not seen says nothing"
    )


def test_the_layer_the_step_and_the_numbers_are_told(tmp_path):
    run = grown_run(tmp_path / "r", 40.0, config=ARMS, n_members=2, n_layers=3, member=1, layer=2)
    finding = logit_growth(run)
    assert (finding.members, finding.severity, finding.step) == (("wild",), "warning", 30)
    assert finding.summary == (
        "The attention logits of wild grow from step 30 on in layer 2: their standard deviation from 1 to 40 (at step 57), the "
        "largest from 5 to 200, its bound |q| |k| from 10 to 400. 1 of 3 layers end above 15."
    )
    first = finding.evidence[0]
    assert (first.layer, first.step, first.quantity, first.value) == (2, 30, "logit_std", 40.0)


def test_a_peak_that_comes_back_is_no_growth(tmp_path):
    std = growing(40.0)
    std[-5:] = 1.0
    heads = heads_table(1, AT, n_heads=2, logit_std=std, max_logit_bound=10 * std)
    assert logit_growth(run_of(tmp_path / "r", steps=steps_table(np.full(STEPS, 4.0)), heads=heads)) is None


def test_heads_that_are_not_numbers_do_not_count(tmp_path):
    std = growing(40.0)
    std[..., 1] = np.nan
    std[::4] = np.nan
    heads = heads_table(1, AT, n_heads=2, logit_std=std, max_logit_bound=10 * std)
    run = run_of(tmp_path / "a", steps=steps_table(np.full(STEPS, 4.0)), heads=heads)
    assert logit_growth(run).evidence[0].value == 40.0
    nothing = heads_table(1, AT, logit_std=np.nan, max_logit_bound=np.nan, entropy_ratio=np.nan)
    run = run_of(tmp_path / "b", steps=steps_table(np.full(STEPS, 4.0)), heads=nothing)
    assert logit_growth(run) is None and entropy_collapse(run) is None


def test_what_comes_after_divergence_is_no_growth_and_diverged_growth_is_an_error(tmp_path):
    losses = np.r_[np.full(30, 4.0), np.full(30, 500.0)]
    late, early = growing(40.0, since=33), growing(40.0, since=12)
    for name, std, severity in (("late", late, None), ("early", early, "error")):
        heads = heads_table(1, AT, n_heads=2, logit_std=std, max_logit_bound=10 * std)
        finding = logit_growth(run_of(tmp_path / name, steps=steps_table(losses), heads=heads))
        assert getattr(finding, "severity", None) == severity


def test_too_few_records_are_said(tmp_path):
    at = range(FEWEST_RECORDS_IN_ALL - 1)
    run = run_of(tmp_path / "r", steps=steps_table(np.full(9, 4.0)), heads=heads_table(1, at, logit_std=[[[[99.0]]]]))
    assert logit_growth(run) == NotLooked(
        rule="logit_growth", why="attention was measured at fewer than 10 steps before divergence"
    )
    assert logit_growth(run_of(tmp_path / "s", steps=steps_table([4.0]))).why == "no attention was measured"


def test_training_too_fast_grows_logits_and_then_collapses_and_its_twin_does_neither(fast_and_slow):
    growth, collapse = logit_growth(fast_and_slow), entropy_collapse(fast_and_slow)
    assert growth.members == collapse.members == ("lr 0.03",)
    assert growth.step < collapse.step
    names = [finding.rule for finding in diagnose(fast_and_slow)]
    assert names.index("logit_growth") < names.index("entropy_collapse")
    told = next(finding for finding in diagnose(fast_and_slow) if finding.rule == "logit_growth")
    assert "entropy_collapse" in told.explains
    heads = fast_and_slow.heads
    last = heads[(heads["member"] == "lr 0.03") & (heads["step"] > 96)].groupby("layer")["logit_std"]
    assert growth.evidence[0].value == pytest.approx(last.mean()[growth.evidence[0].layer], rel=0.3)


def starving(path, share, *, v=1.0, first=0.5, groups=("q", "k", "v"), losses=4.0):
    """q and k get `first` of the gradient of v, and `share` of it from step 30 on."""
    grad = np.ones((len(AT), 1, 1, 3))
    grad[..., :2] = first
    late = np.asarray(AT) >= 30
    grad[late, :, :, :2] = share * v
    grad[late, :, :, 2] = v
    params = qkv_table(1, AT, groups=groups, grad_norm=grad)
    return run_of(path, steps=steps_table(np.full(STEPS, losses)), params=params)


@pytest.mark.parametrize(("share", "found"), [(STARVED * 1.1, False), (STARVED * 0.9, True), (0.0, True)])
def test_q_and_k_starve_below_the_threshold(tmp_path, share, found):
    assert (starved_queries_and_keys(starving(tmp_path / "r", share)) is not None) is found


def test_starved_queries_are_told_with_their_layer_and_step(tmp_path):
    run = starving(tmp_path / "r", 1e-5)
    finding = starved_queries_and_keys(run)
    assert finding.summary == (
        f"In layer 0 of {run.entries[0].name} no gradient reaches q and k from step 30 on: the larger of theirs is 1e-05 of that of v at the end, "
        "0.5 at first."
    )
    assert finding.step == 30 and finding.severity == "warning"


def test_what_had_little_gradient_from_the_start_or_loses_it_with_v_is_not_starved(tmp_path):
    assert starved_queries_and_keys(starving(tmp_path / "a", 1e-5, first=5e-3)) is None, (
        "tiny q and k, as at small embeddings"
    )
    assert starved_queries_and_keys(starving(tmp_path / "b", 1e-5, v=0.05)) is None, "all gradients vanish"
    assert starved_queries_and_keys(starving(tmp_path / "c", 0.0, first=0.0)) is not None, "none at any time"


def test_parameters_are_known_by_the_names_of_others_and_fused_ones_are_said(tmp_path):
    llama = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert starved_queries_and_keys(starving(tmp_path / "a", 1e-5, groups=llama)) is not None
    lora = ("q_proj.lora_A", "k_proj.lora_A", "v_proj.lora_A")
    assert starved_queries_and_keys(starving(tmp_path / "b", 1e-5, groups=lora)).why == NO_GROUPS
    fused = ("attn.c_attn", "attn.c_proj", "mlp")
    assert starved_queries_and_keys(starving(tmp_path / "c", 1e-5, groups=fused)).why == NO_GROUPS
