"""The weights at step 0: the formula of every scheme, gains, seeds, and what multiplies q.k."""

import math

import pytest
import torch

from attnscope.config import apply_changes, parse_table
from attnscope.model import apart, attn_scales, initial_parameters

MATRICES = ("q", "k", "v", "o", "mlp_in", "mlp_out", "head")
D, F, VOCAB, LAYERS = 96, 160, 80, 3


def make(**changes):
    config = parse_table({"model": {"d_model": D, "d_ff": F, "n_layers": LAYERS, "n_heads": 4, "seq_len": 16}})
    return apply_changes(config, {key.replace("__", "."): v for key, v in changes.items()}, where="")


def draw(**changes):
    found = initial_parameters([make(**changes)], vocab_size=VOCAB)
    return {name: value[0] for name, value in apart(found).items()}


@pytest.mark.parametrize("scheme", ["xavier_uniform", "xavier_normal"])
def test_xavier_takes_q_k_and_v_as_separate_matrices(scheme):
    weights = draw(init__scheme=scheme)
    fans = dict.fromkeys("qkvo", 2 * D) | {"mlp_in": D + F, "mlp_out": F + D, "head": D + VOCAB}
    for name, fan in fans.items():
        expected = math.sqrt(2 / fan)
        assert weights[name].std().item() == pytest.approx(expected, rel=0.02), name
        if scheme == "xavier_uniform":
            bound = math.sqrt(6 / fan)
            assert 0.99 * bound < weights[name].abs().max() <= bound
        else:
            assert weights[name].abs().max() > 3 * expected


def test_kaiming_depends_on_fan_in_alone():
    weights = draw(init__scheme="kaiming")
    for name in MATRICES:
        fan_in = F if name == "mlp_out" else D
        assert weights[name].std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.02), name


def test_normal_has_the_configured_standard_deviation():
    weights = draw(init__scheme="normal", init__std=0.05)
    for name in MATRICES:
        assert weights[name].std().item() == pytest.approx(0.05, rel=0.02), name


def test_gpt2_scales_down_what_writes_into_the_residual_stream():
    plain, scaled = draw(init__scheme="normal"), draw(init__scheme="gpt2")
    for name in MATRICES:
        factor = 1 / math.sqrt(2 * LAYERS) if name in ("o", "mlp_out") else 1
        torch.testing.assert_close(scaled[name], plain[name] * factor)


def test_orthogonal_matrices_have_orthonormal_rows_or_columns():
    weights = draw(init__scheme="orthogonal")
    for name in MATRICES[:-1]:
        for matrix in weights[name]:
            rows, columns = matrix.shape
            gram = matrix.T @ matrix if rows >= columns else matrix @ matrix.T
            torch.testing.assert_close(gram, torch.eye(min(rows, columns)), rtol=0, atol=1e-5)
    torch.testing.assert_close(weights["head"].T @ weights["head"], torch.eye(VOCAB), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", ["xavier_uniform", "normal", "orthogonal", "gpt2"])
def test_gains_multiply_exactly(scheme):
    plain = draw(init__scheme=scheme)
    gained = draw(init__scheme=scheme, init__gain=2.0, init__qk_gain=4.0)
    for name, value in plain.items():
        factor = {"q": 8, "k": 8}.get(name, 2 if name in MATRICES else 1)
        assert torch.equal(gained[name], value * factor), name


def test_embeddings_have_their_own_standard_deviation():
    weights = draw(init__embedding_std=0.3, init__gain=5.0)
    assert weights["token_embedding"].std().item() == pytest.approx(0.3, rel=0.03)
    assert weights["position_embedding"].std().item() == pytest.approx(0.3, rel=0.05)


def test_norm_gains_start_at_one_and_exist_where_there_is_a_norm():
    assert not any(name.startswith("norm") for name in draw())
    pre = draw(model__norm="pre", attention__qk_norm=True)
    assert {n for n in pre if n.startswith("norm")} == {
        "norm_attention", "norm_mlp", "norm_final", "norm_q", "norm_k",
    }  # fmt: skip
    assert all((value == 1).all() for name, value in pre.items() if name.startswith("norm"))
    assert pre["norm_q"].shape == (LAYERS, D // 4)
    assert "norm_final" not in draw(model__norm="post")


def test_weights_depend_on_the_seed_and_not_on_the_neighbours():
    first, second = make(train__seed=1), make(train__seed=2, init__scheme="orthogonal")
    members = [second, first, make(train__seed=3), second]
    together = apart(initial_parameters(members, vocab_size=VOCAB))
    alone = apart(initial_parameters([first], vocab_size=VOCAB))
    for name, value in alone.items():
        assert torch.equal(together[name][1], value[0]), name
        assert torch.equal(together[name][0], together[name][3]), name
    for name in ("token_embedding", "position_embedding", *MATRICES):
        assert not torch.equal(together[name][1], together[name][2]), name


def test_layers_and_matrices_are_drawn_independently():
    weights = draw()
    drawn = [weights[name][layer] for name in "qkvo" for layer in range(LAYERS)]
    for i, one in enumerate(drawn):
        for other in drawn[i + 1 :]:
            correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
            assert abs(correlation) < 0.06


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    draw(init__scheme="orthogonal")
    assert torch.equal(before, torch.get_rng_state())


def test_attn_scales_by_rule():
    members = [
        parse_table({"model": {"d_model": 64, "n_heads": 4, "n_layers": 3}, "attention": {"scale": rule}})
        for rule in ("inverse_sqrt", "none", "inverse", "depth", "learned", 0.75)
    ]
    scales = attn_scales(members)
    assert scales.dtype == torch.float32
    expected = [
        [1 / 4] * 3, [1] * 3, [1 / 16] * 3, [1 / 4, 1 / 8, 1 / 12], [1] * 3, [0.75] * 3,
    ]  # fmt: skip
    torch.testing.assert_close(scales, torch.tensor(expected))


def test_tied_embeddings_have_no_head():
    tied = draw(model__tie_embeddings=True)
    assert "head" not in tied
    assert torch.equal(tied["q"], draw()["q"])


def test_a_learned_scale_starts_as_the_usual_one_in_every_head():
    weights = draw(attention__scale="learned")
    assert weights["scale"].shape == (LAYERS, 4)
    torch.testing.assert_close(weights["scale"], torch.full((LAYERS, 4), (D / 4) ** -0.5))
    assert "scale" not in draw()


def test_d_head_may_differ_from_d_model_over_n_heads():
    weights = draw(model__d_head=10)
    assert weights["q"].shape == (LAYERS, D, 40)
    assert weights["o"].shape == (LAYERS, 40, D)
