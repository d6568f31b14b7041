"""What theory predicts, against what is measured and against what is known in closed form."""

import math

import pytest

import attnscope
from attnscope.config import parse_table
from attnscope.data import data_of
from attnscope.preflight import streams
from attnscope.preflight.theory import theory_of

SHAPE = {
    "model": {"d_model": 64, "n_layers": 3, "n_heads": 2, "seq_len": 32, "norm": "pre"},
    "data": {"source": "markov", "batch_size": 8},
    "train": {"steps": 1, "checkpoint_every": 0},
    "record": {"rows": "all"},
}
SEEDS = range(5)
CASES = {
    "pre norm, AdamW": {"optimizer": {"name": "adamw"}},
    "no norm, no scale": {"model": {"norm": "none"}, "attention": {"scale": "none"}},
    "post norm, soft-cap, ALiBi": {
        "model": {"norm": "post", "position": "alibi"},
        "attention": {"logit_softcap": 5.0},
        "init": {"scheme": "kaiming"},
    },
    "RoPE, qk-norm, RMSNorm, Muon": {
        "model": {"position": "rope", "norm_kind": "rmsnorm"},
        "attention": {"qk_norm": True, "scale": 1.0},
        "optimizer": {"name": "muon"},
    },
    "windows, depth, sinusoids, gpt2": {
        "model": {"position": "sinusoidal", "activation": "relu", "norm": "none"},
        "attention": {"window": 4, "scale": "depth"},
        "init": {"scheme": "gpt2", "std": 0.1},
    },
}


def config_with(*changes):
    """SHAPE with these sections on top."""
    merged = {name: dict(section) for name, section in SHAPE.items()}
    for change in changes:
        for name, section in change.items():
            merged.setdefault(name, {}).update(section)
    return merged


def predicted(table):
    config = parse_table(table)
    data = data_of(config)
    return theory_of(config, data.train_batch(0), vocab_size=data.vocab_size, lr=config.optimizer.lr)


@pytest.fixture(scope="module", params=CASES)
def both(request, tmp_path_factory):
    """Theory, and a run of several seeds."""
    table = config_with(CASES[request.param])
    arms = [{"name": f"seed {seed}", "train": {"seed": seed}} for seed in SEEDS]
    run = attnscope.train_model({**table, "arm": arms}, path=tmp_path_factory.mktemp("runs") / "run")
    return predicted(table), run


@pytest.mark.parametrize(
    ("column", "within", "nearly"),
    [("logit_std", 0.12, 0.0), ("softmax_gain", 0.12, 0.03), ("max_prob", 0.12, 0.0), ("entropy", 0.12, 0.07)],
)
def test_the_softmax_of_every_layer_is_as_predicted_over_seeds(both, column, within, nearly):
    theory, run = both
    measured = run.heads.groupby("layer")[column].mean()
    for layer, told in enumerate(theory.layers):
        assert told[column] == pytest.approx(measured[layer], rel=within, abs=nearly), (layer, column)


def test_the_residual_stream_grows_and_the_loss_begins_as_predicted(both):
    theory, run = both
    measured = run.layers.groupby("layer")["activation_rms"].mean()
    assert [told["activation_rms"] for told in theory.layers] == pytest.approx(list(measured), rel=0.1)
    assert theory.first_loss == pytest.approx(run.steps["loss"].mean(), rel=0.1)


def test_the_first_update_of_adam_is_as_predicted_and_that_of_muon_at_most():
    for name, low in (("adamw", 0.97), ("muon", 0.5)):
        table = config_with({"optimizer": {"name": name, "weight_decay": 0.1}})
        ratios = predicted(table).update_ratio
        assert set(ratios) == {"q", "k", "v", "o", "mlp_in", "mlp_out", "head", "norm", "embedding"}
        run = attnscope_params(table)
        for group, ratio in ratios.items():
            measured = run[run["group"] == group]["update_ratio"].mean()
            assert low * ratio <= measured <= 1.05 * ratio, (name, group, measured, ratio)


def attnscope_params(table):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        return attnscope.train_model(table, path=Path(folder) / "run").params


def test_what_theory_does_not_say_is_left_out():
    assert predicted(SHAPE).update_ratio == {}, "the step of SGD is as large as its gradient"
    assert predicted(config_with({"data": {"batch_size": 4096}})).layers[0]["max_logit"] is None


@pytest.mark.parametrize(("scale", "expected"), [("none", 8.0), ("inverse_sqrt", 1.0), ("inverse", 0.125), (0.5, 4.0)])
def test_unit_variance_gives_scale_times_the_root_of_d_head(scale, expected):
    table = config_with(
        {
            "model": {"d_model": 128, "d_head": 64, "seq_len": 256, "n_layers": 1},
            "attention": {"scale": scale, "mask": "none"},
            "data": {"batch_size": 2},
        }
    )
    told = predicted(table).layers[0]
    # Tokens that come again are alike in half of what they are: the token, not the position.
    shared = streams.embedded(parse_table(table), data_of(parse_table(table)).train_batch(0)).normed("layernorm").shared
    assert told["logit_std"] == pytest.approx(expected * math.sqrt(1 - shared), rel=0.03)


def test_moments_of_the_rectified_normal_are_those_of_the_arc_cosine_kernel():
    square, shared = streams._activated("relu", 3.0, 0.0)
    assert square == pytest.approx(1.5, rel=0.02) and shared == pytest.approx(3 / (2 * math.pi), rel=0.02)
    square, shared = streams._activated("relu", 3.0, 1.0)
    assert square == pytest.approx(shared)


def test_rows_overlap_as_much_as_their_keys():
    full = parse_table(config_with({"attention": {"mask": "none"}}))
    assert streams.overlap_of_rows(full, 0) == pytest.approx(1 / 32)
    causal = streams.overlap_of_rows(parse_table(SHAPE), 0)
    by_hand = [1 / max(a, b) for a in range(1, 33) for b in range(1, 33) if a != b]
    assert causal == pytest.approx(sum(by_hand) / len(by_hand))


def test_absurd_weights_are_predicted_without_an_error():
    theory = predicted(config_with({"init": {"gain": 1e30}, "model": {"norm": "none"}}))
    assert not math.isfinite(theory.layers[-1]["activation_rms"])
