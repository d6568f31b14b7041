"""Norms per parameter group, cross-entropy and what else is measured outside attention, against slow twins."""

import math

import pytest
import torch

from attnscope.data import IGNORE
from attnscope.metrics.activations import activation_rms, token_cosine, token_norms, token_total
from attnscope.metrics.gradients import (
    PARAMETER_STATISTICS,
    Sheet,
    global_norm,
    group_norms,
    group_parameters,
    parameter_stats,
)
from attnscope.metrics.loss import output_logit_max, token_losses
from tests import reference

M, L = 2, 3
GROUPS_OF = {
    "token_embedding": ("embedding",),
    "position_embedding": ("embedding",),
    "qkv": ("q", "k", "v"),
    "mlp_in": ("mlp_in",),
    "head": ("head",),
    "norm_attention": ("norm",),
    "norm_mlp": ("norm",),
    "norm_final": ("norm",),
}
LAYERED = frozenset({"qkv", "mlp_in", "norm_attention", "norm_mlp"})
SHAPES = {
    "token_embedding": (M, 5, 4), "position_embedding": (M, 3, 4), "qkv": (M, L, 4, 3, 4),
    "mlp_in": (M, L, 4, 6), "head": (M, 4, 5), "norm_attention": (M, L, 4), "norm_mlp": (M, L, 4),
    "norm_final": (M, 4),
}  # fmt: skip
GROUPING = group_parameters(GROUPS_OF, layered=LAYERED, n_layers=L)


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def numbers_of(tensors, member, layer, group):
    """Every number of one group of one member, as a flat list."""
    found = []
    for name, tensor in tensors.items():
        groups = GROUPS_OF[name]
        if group in groups and (name in LAYERED) == (layer >= 0):
            part = tensor[member, layer] if layer >= 0 else tensor[member]
            part = part[:, groups.index(group)] if len(groups) > 1 else part
            found += part.flatten().tolist()
    return found


def length(numbers):
    return math.sqrt(sum(x * x for x in numbers))


def test_groups_without_a_layer_come_first_and_then_every_layer_of_each_kind():
    assert GROUPING.rows == (
        (-1, "embedding"), (-1, "head"), (-1, "norm"),
        (0, "q"), (1, "q"), (2, "q"), (0, "k"), (1, "k"), (2, "k"), (0, "v"), (1, "v"), (2, "v"),
        (0, "mlp_in"), (1, "mlp_in"), (2, "mlp_in"),
        (0, "norm"), (1, "norm"), (2, "norm"),
    )  # fmt: skip


@pytest.mark.parametrize("reverse", [False, True])
def test_norms_per_group_equal_a_loop_whatever_the_order_of_the_tensors(reverse):
    tensors = drawn(0)
    given = dict(reversed(tensors.items())) if reverse else tensors
    norm_MG = group_norms(given, GROUPING)
    assert norm_MG.shape == (M, len(GROUPING.rows))
    for m in range(M):
        for g, (layer, group) in enumerate(GROUPING.rows):
            expected = length(numbers_of(tensors, m, layer, group))
            assert norm_MG[m, g].item() == pytest.approx(expected, rel=1e-5), (layer, group)


def test_the_global_norm_is_that_of_torch():
    tensors = drawn(0)
    norm_M = global_norm(group_norms(tensors, GROUPING))
    for m in range(M):
        own = [tensor[m] for tensor in tensors.values()]
        torch.testing.assert_close(norm_M[m], torch.nn.utils.get_total_norm(own))


def measured_in(order, gradients, weights, updates):
    sheet = Sheet(gradients, GROUPING)
    for name in order:
        sheet.measure(name, gradient=gradients[name], weight=weights[name], update=updates[name])
    counts = sheet.count_nonfinite(gradients)
    return {
        name: stats | {"nonfinite": counts.get(name, torch.zeros_like(stats["grad_norm"]))}
        for name, stats in sheet.read(sheet.values).items()
    }


@pytest.mark.parametrize("order", [list(SHAPES), list(reversed(SHAPES))])
def test_the_params_table_equals_a_loop_whatever_the_order_of_the_optimizer(order):
    gradients, weights, updates = drawn(0), drawn(1), drawn(2)
    gradients["qkv"][1, 2, 0, 1, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    gradients["norm_mlp"][0, 1, 0] = math.nan
    gradients["norm_attention"][0, 1, :2] = math.inf
    stats = parameter_stats(measured_in(order, gradients, weights, updates), GROUPING)
    assert tuple(stats) == PARAMETER_STATISTICS
    for m in range(M):
        for g, (layer, group) in enumerate(GROUPING.rows):
            gradient = numbers_of(gradients, m, layer, group)
            weight, update = (length(numbers_of(tensors, m, layer, group)) for tensors in (weights, updates))
            broken = sum(not math.isfinite(x) for x in gradient)
            expected = {
                "weight_norm": weight,
                "update_norm": update,
                "update_ratio": update / weight,
                "nonfinite": broken,
            }
            if not broken:
                expected["grad_norm"] = length(gradient)
                expected["grad_max"] = max(abs(x) for x in gradient)
            for name, value in expected.items():
                assert stats[name][m, g].item() == pytest.approx(value, rel=1e-5), (
                    name,
                    layer,
                    group,
                )
            assert math.isfinite(stats["grad_norm"][m, g]) == (broken == 0)
    assert stats["nonfinite"].sum() == 6


def test_steps_may_be_stacked_in_front_of_the_members():
    first, second = (measured_in(list(SHAPES), drawn(seed), drawn(seed + 1), drawn(seed + 2)) for seed in (0, 7))
    together = parameter_stats(
        {name: {what: torch.stack([first[name][what], second[name][what]]) for what in first[name]} for name in first},
        GROUPING,
    )
    for s, alone in enumerate((first, second)):
        for name, value in parameter_stats(alone, GROUPING).items():
            torch.testing.assert_close(together[name][s], value)


def output_logits(size=1.0):
    return torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0)) * size


TARGETS_N = torch.tensor([0, IGNORE, 5, 2, 2, IGNORE, 1, 3])


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_the_loss_of_every_member_equals_the_slow_cross_entropy(size):
    logits = output_logits(size)
    losses = token_losses(logits, TARGETS_N, ignore=IGNORE)
    for m in range(3):
        expected = reference.cross_entropy(logits[m], TARGETS_N)
        assert losses.loss_M[m].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_log_z_is_the_mean_log_partition_of_the_scored_tokens(size):
    logits = output_logits(size)
    losses = token_losses(logits, TARGETS_N, ignore=IGNORE)
    for m in range(3):
        log_z = [
            math.log(sum(math.exp(x) for x in row))
            for row, target in zip(logits[m].double().tolist(), TARGETS_N, strict=True)
            if target != IGNORE
        ]
        mean = reference.mean(log_z)
        assert losses.log_z_M[m].item() == pytest.approx(mean, rel=1e-4)
        square = reference.mean([x * x for x in log_z])
        assert losses.log_z_square_M[m].item() == pytest.approx(square, rel=1e-4)


def test_what_is_not_scored_has_neither_influence_nor_gradient():
    logits = output_logits().requires_grad_()
    losses = token_losses(logits, TARGETS_N, ignore=IGNORE)
    (gradient,) = torch.autograd.grad((losses.loss_M + losses.log_z_square_M).sum(), logits)
    ignored = TARGETS_N == IGNORE
    assert (gradient[:, ignored] == 0).all() and (gradient[:, ~ignored] != 0).all()
    changed = logits.detach().clone()
    changed[:, ignored] = 1e4
    torch.testing.assert_close(token_losses(changed, TARGETS_N, ignore=IGNORE).loss_M, losses.loss_M)


def test_where_everything_is_scored_nothing_need_be_looked_for():
    logits, targets_N = output_logits(), TARGETS_N.where(TARGETS_N != IGNORE, 4)
    known, searched = (token_losses(logits, targets_N, ignore=each) for each in (None, IGNORE))
    for name in ("loss_M", "log_z_M", "log_z_square_M"):
        assert torch.equal(getattr(known, name), getattr(searched, name)), name


def test_a_member_that_is_nan_leaves_the_loss_and_gradient_of_the_others():
    sound, broken = output_logits().requires_grad_(), output_logits()
    broken[1, 0, 0] = math.nan
    broken.requires_grad_()
    losses = [token_losses(x, TARGETS_N, ignore=IGNORE) for x in (sound, broken)]
    assert losses[1].loss_M[1].isnan()
    assert torch.equal(losses[0].loss_M[::2], losses[1].loss_M[::2])
    gradients = [
        torch.autograd.grad((each.loss_M + each.log_z_square_M).sum(), x)[0]
        for each, x in zip(losses, (sound, broken), strict=True)
    ]
    assert torch.equal(gradients[0][::2], gradients[1][::2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_half_precision_logits_is_computed_in_float32(dtype):
    half = output_logits(5.0).to(dtype)
    losses, expected = (token_losses(x, TARGETS_N, ignore=IGNORE) for x in (half, half.float()))
    assert losses.loss_M.dtype == torch.float32
    assert torch.equal(losses.loss_M, expected.loss_M)


def test_a_uniform_guess_costs_ln_vocab():
    losses = token_losses(torch.zeros(1, 8, 6), TARGETS_N, ignore=IGNORE)
    assert losses.loss_M.item() == pytest.approx(math.log(6))
    assert losses.log_z_M.item() == pytest.approx(math.log(6))


def test_output_logit_max_is_the_largest_of_each_member():
    logits = output_logits().to(torch.bfloat16)
    found = output_logit_max(logits)
    assert found.dtype == torch.float32
    assert found.tolist() == [max(x for row in member for x in row) for member in logits.tolist()]


def states(correlation=0.0):
    generator = torch.Generator().manual_seed(3)
    x_MBTD = torch.randn(2, 3, 5, 4, generator=generator)
    return x_MBTD + correlation * torch.randn(4, generator=generator)


def cosine(x_MBTD):
    x_MND, seq_len = x_MBTD.flatten(1, 2), x_MBTD.shape[2]
    total = token_total(x_MND, token_norms(x_MND), seq_len=seq_len)
    return token_cosine(total, seq_len=seq_len)


@pytest.mark.parametrize("correlation", [0.0, 3.0])
def test_token_cosine_equals_a_loop_over_all_pairs(correlation):
    x_MBTD = states(correlation)
    found = cosine(x_MBTD)
    for m in range(2):
        assert found[m].item() == pytest.approx(reference.token_cosine(x_MBTD[m]), abs=1e-5)


def test_token_cosine_is_one_for_equal_tokens_and_minus_one_for_opposite_ones():
    x_D = torch.tensor([3.0, -4.0])
    alike = torch.stack([x_D, 2 * x_D, x_D / 9])[None]
    assert cosine(alike[None]).item() == pytest.approx(1, abs=1e-6)
    opposite = torch.stack([x_D, -x_D])[None]
    assert cosine(opposite[None]).item() == pytest.approx(-1, abs=1e-6)


def rms(x_MND):
    return activation_rms(token_norms(x_MND), d_model=x_MND.shape[-1])


def test_activation_rms_is_the_root_of_the_mean_square():
    x_MND = states().flatten(1, 2)
    for m, found in enumerate(rms(x_MND)):
        numbers = x_MND[m].flatten().tolist()
        mean = sum(x * x for x in numbers) / len(numbers)
        assert found.item() == pytest.approx(math.sqrt(mean))


def test_a_token_of_zeros_is_like_no_other():
    x_MBTD = states()
    x_MBTD[:, :, 0] = 0
    assert cosine(x_MBTD).isfinite().all()


def test_activation_statistics_of_half_precision_do_not_overflow():
    large = torch.full((1, 2, 3, 4), 30_000.0, dtype=torch.float16)
    assert rms(large.flatten(1, 2)).item() == pytest.approx(30_000, rel=1e-3)
    assert cosine(large).item() == pytest.approx(1, abs=1e-5)
