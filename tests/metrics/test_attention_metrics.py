"""Statistics of attention logits: hand-computed cases, the slow twin, known limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnscope.errors import ShapeError
from attnscope.metrics import attention as metrics
from attnscope.metrics import rows
from attnscope.metrics.attention import attention_stats
from tests import reference


def qk(shape_q, shape_k=None, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(shape_q, generator=generator) * size
    return q, torch.randn(shape_k or shape_q, generator=generator) * size


def causal(t, s):
    return torch.ones(t, s, dtype=torch.bool).tril()


@pytest.mark.parametrize("size", [0.3, 3.0])
@pytest.mark.parametrize("masking", ["none", "causal", "padding", "fully masked rows"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("biased", [False, True])
def test_every_statistic_equals_its_slow_twin(size, masking, softcap, biased):
    q, k = qk((2, 3, 5, 4), size=size)
    visible = None
    if masking != "none":
        visible = causal(5, 5).expand(2, 3, 5, 5).clone()
    if masking == "padding":
        visible[1, :, :, 3:] = False
    if masking == "fully masked rows":
        visible[0, :, 4] = False
    bias = -torch.rand(2, 3, 5, 5) if biased else None
    got = attention_stats(q, k, 0.7, visible, bias=bias, softcap=softcap)
    expected = reference.attention_stats(q, k, scale=0.7, visible=visible, bias=bias, softcap=softcap)
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name].double(), value, rtol=2e-5, atol=2e-5, msg=name)


def test_entropy_of_uniform_attention_is_ln_s():
    q, k = torch.zeros(1, 1, 3, 2), torch.randn(1, 1, 7, 2)
    stats = attention_stats(q, k)
    assert stats["entropy"].item() == pytest.approx(math.log(7), abs=1e-6)
    assert stats["entropy_ratio"].item() == pytest.approx(1, abs=1e-6)
    assert stats["max_prob"].item() == pytest.approx(1 / 7, abs=1e-6)
    assert stats["softmax_gain"].item() == pytest.approx(1 - 1 / 7, abs=1e-6)
    assert stats["sink"].item() == pytest.approx(1 / 7, abs=1e-6)
    assert stats["logit_std"].item() == 0


@pytest.mark.parametrize("size", [1e4, 1e9, 1e15])
@pytest.mark.parametrize("masked", [False, True])
def test_the_entropy_of_an_exploding_head_does_not_drown_in_its_logits(size, masked):
    """Two keys tie at `size`, which float32 holds to 1e-7 of it, and the others are far below: exactly ln 2."""
    q = torch.full((1, 1, 4, 1), size)
    k = torch.tensor([1.0, 1.0, -1.0, -1.0]).reshape(1, 1, 4, 1)
    visible = torch.tensor([True, True, True, False]).expand(4, 4) if masked else None
    stats = attention_stats(q, k, 1.0, visible)
    assert stats["entropy"].item() == pytest.approx(math.log(2), abs=1e-6)
    assert stats["max_prob"].item() == 0.5 and stats["max_logit"].item() == pytest.approx(size)
    values = [size, size, -size] if masked else [size, size, -size, -size]
    spread = reference.variance(values) ** 0.5
    assert stats["logit_std"].item() == pytest.approx(spread, rel=1e-5)


def test_two_keys_by_hand():
    # z = (ln 3, 0): p = (3/4, 1/4)
    q, k = torch.tensor([[[[1.0]]]]), torch.tensor([[[[math.log(3)], [0.0]]]])
    stats = attention_stats(q, k, 1.0)
    assert stats["max_prob"].item() == pytest.approx(0.75)
    assert stats["entropy"].item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert stats["softmax_gain"].item() == pytest.approx(1 - 9 / 16 - 1 / 16)
    assert stats["logit_std"].item() == pytest.approx(math.log(3) / 2)
    assert stats["max_logit"].item() == pytest.approx(math.log(3))
    assert stats["max_logit_bound"].item() == pytest.approx(math.log(3))


def test_one_hot_attention_is_saturated_and_has_no_gradient_left():
    q, k = torch.full((1, 1, 4, 8), 10.0), torch.randn(1, 1, 6, 8) * 100
    stats = attention_stats(q, k, 1.0)
    assert stats["saturated"].item() == 1
    assert stats["entropy"].item() == pytest.approx(0, abs=1e-6)
    assert stats["softmax_gain"].item() == pytest.approx(0, abs=1e-6)
    assert stats["logits_over_5"].item() > 0.5


def test_the_first_query_of_a_causal_mask_is_left_out_and_counted():
    q, k = qk((3, 2, 5, 4))
    stats = attention_stats(q, k, mask=causal(5, 5))
    assert stats["rows"].tolist() == [12, 12]
    assert stats["rows_left_out"].tolist() == [3, 3]


def test_a_head_without_a_measurable_row_is_nan():
    q, k = qk((1, 1, 1, 4))
    stats = attention_stats(q, k)
    assert stats["rows"].item() == 0
    assert all(math.isnan(stats[name].item()) for name in ("entropy", "max_logit", "sink"))


def test_blocks_do_not_change_the_result(monkeypatch):
    q, k = qk((2, 2, 33, 8))
    whole = attention_stats(q, k, mask=causal(33, 33))
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 500)
    for name, value in attention_stats(q, k, mask=causal(33, 33)).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6, msg=name)


def test_all_rows_sampled_means_exact():
    q, k = qk((2, 2, 9, 4))
    exact = attention_stats(q, k, mask=causal(9, 9))
    sampled = attention_stats(q, k, mask=causal(9, 9), rows=16)
    assert all(torch.equal(sampled[name], value) for name, value in exact.items())


def test_sampled_rows_estimate_the_mean():
    q, k = qk((16, 2, 128, 16))
    exact = attention_stats(q, k, mask=causal(128, 128))
    estimates = torch.stack(
        [attention_stats(q, k, mask=causal(128, 128), rows=64, seed=s)["entropy"] for s in range(50)]
    )
    error = estimates.std(dim=0) / 50**0.5
    assert ((estimates.mean(dim=0) - exact["entropy"]).abs() < 5 * error).all()


def calls_of(number, *, shape=(2, 6, 2, 9, 4), dtype=torch.float32):
    """Attention calls (M, B, H, T, K), of which every third has no mask and the rest causal ones."""
    for i in range(number):
        q, k = qk(shape, seed=i)
        yield rows.Call(
            q=q.to(dtype), k=k.to(dtype), attn_scale=torch.tensor([0.5, 0.7]).view(2, 1, 1, 1, 1),
            visible=causal(9, 9) if i % 3 else None, bias=None, softcap=0.0,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_measured_together_are_those_measured_one_by_one(monkeypatch, dtype):
    monkeypatch.setattr(rows, "LOGITS_AT_ONCE", 4 * 2 * 4 * 2 * 3 * 9)  # four calls in a piece
    shelf, device = rows.Shelf(), torch.device("cpu")
    for turn in range(2):  # the second time over the memory of the first
        samples = [rows.sample_rows(n_batch=6, n_queries=9, rows=12, seed=i + turn, device=device) for i in range(10)]
        calls = list(calls_of(10, dtype=dtype))
        for call, sample in zip(calls, samples, strict=True):
            shelf.put(call, sample)
        pieces = list(shelf.pieces(9))  # the tenth is of a step that did not end
        assert [len(piece.call.q) for piece in pieces] == [4, 4, 1]
        found = [metrics.statistics_of(piece) for piece in pieces]
        shelf.clear()
        for name in metrics.STATISTICS:
            together = torch.cat([each[name] for each in found])
            alone = [
                metrics.statistics_of(rows.rows_of(call, sample))[name]
                for call, sample in zip(calls[:9], samples[:9], strict=True)
            ]
            torch.testing.assert_close(together, torch.stack(alone), msg=name)


def test_a_shelf_for_few_rows_of_a_large_batch_takes_little_memory(monkeypatch):
    monkeypatch.setattr(rows, "PIECE_BYTES", 1 << 20)
    q, k = qk((1, 4096, 2, 8, 4))
    scale = torch.tensor(0.5).view(1, 1, 1, 1, 1)
    call = rows.Call(q=q, k=k, attn_scale=scale, visible=None, bias=None, softcap=0.0)
    sample = rows.sample_rows(n_batch=4096, n_queries=8, rows=1, seed=0, device=q.device)
    shelf = rows.Shelf()
    for _ in range(9):
        shelf.put(call, sample)
        (*_, last) = shelf.pieces(9)
        assert last.q_norm.shape == (len(last.call.q), 1, 2)
    assert shelf.nbytes > 4 * rows.PIECE_BYTES
    assert [len(piece.call.q) for piece in shelf.pieces(9)] == [1] * 9


def test_sampling_leaves_the_global_generator_alone():
    q, k = qk((4, 2, 16, 4))
    before = torch.get_rng_state()
    attention_stats(q, k, rows=8)
    assert torch.equal(before, torch.get_rng_state())


def test_leading_axes_are_members():
    q, k = qk((3, 2, 2, 6, 4))
    together = attention_stats(q, k, mask=causal(6, 6))
    for m in range(3):
        alone = attention_stats(q[m], k[m], mask=causal(6, 6))
        for name, value in alone.items():
            torch.testing.assert_close(together[name][m], value, msg=name)


def test_grouped_queries_share_a_key_head():
    q, k = qk((2, 4, 5, 8), (2, 2, 5, 8))
    grouped = attention_stats(q, k)
    repeated = attention_stats(q, k.repeat_interleave(2, dim=1))
    assert all(torch.equal(grouped[name], value) for name, value in repeated.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast(dtype):
    q, k = qk((2, 2, 8, 16), size=6.0)
    half = attention_stats(q.to(dtype), k.to(dtype), 1.0)
    single = attention_stats(q.to(dtype).float(), k.to(dtype).float(), 1.0)
    assert all(torch.equal(half[name], value) for name, value in single.items())


def test_nan_in_q_is_recorded_not_raised():
    q, k = qk((1, 2, 4, 4))
    q[0, 1, 2, 0] = math.nan
    stats = attention_stats(q, k)
    assert math.isfinite(stats["entropy"][0]) and math.isnan(stats["entropy"][1])
    assert math.isnan(stats["max_logit_bound"][1])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    n_keys=st.integers(2, 40),
    d_head=st.integers(1, 16),
    size=st.floats(0.05, 4),
)
def test_entropy_stays_above_the_bound_of_theorem_3_1(seed, n_keys, d_head, size):
    """Zhai et al. 2023: attention logits X W Xᵀ with spectral norm σ cannot have less entropy than this."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(n_keys, d_head, generator=generator, dtype=torch.float64), dim=-1)
    w = torch.randn(d_head, d_head, generator=generator, dtype=torch.float64) * size
    q, k = (x @ w)[None, None], x[None, None]
    # The proof needs rows of norm at most σ; as the rows of X are unit vectors, ‖W‖ ‖X‖ is such a σ.
    t = n_keys
    sigma = float(torch.linalg.matrix_norm(w, 2) * torch.linalg.matrix_norm(x, 2))
    beta = math.exp(-sigma * math.sqrt(t / (t - 1)))
    bound = math.log(1 + (t - 1) * beta) + sigma * math.sqrt(t * (t - 1)) * beta / (1 + (t - 1) * beta)
    for row in range(t):
        entropy = attention_stats(q[:, :, row : row + 1], k, 1.0)["entropy"].item()
        assert entropy >= bound - 1e-9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: attention_stats(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5)),
            "q is (1, 2, 3, 4) and k is (1, 2, 3, 5), but they must be (..., batch, heads, positions, d_head) "
            "with the same d_head.",
        ),
        (
            lambda: attention_stats(torch.ones(1, 3, 3, 4), torch.ones(1, 2, 3, 4)),
            "q is (1, 3, 3, 4) and k is (1, 2, 3, 4), but batches must be equal and the heads of k must divide "
            "those of q.",
        ),
        (
            lambda: attention_stats(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), mask=torch.ones(3, 3)),
            "mask is torch.float32, but must be boolean, True = visible. Use bias= for a float mask.",
        ),
        (
            lambda: attention_stats(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), mask=torch.ones(4, 4) > 0),
            "mask, bias or scale does not broadcast to (1, 2, 3, 3), the shape of q kᵀ.",
        ),
        (
            lambda: attention_stats(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), rows="some"),
            "rows is 'some', but must be a whole number, at least 1, or \"all\".",
        ),
    ],
)
def test_tensors_that_do_not_fit_give_one_line(make, message):
    with pytest.raises(ShapeError) as caught:
        make()
    assert str(caught.value) == message
