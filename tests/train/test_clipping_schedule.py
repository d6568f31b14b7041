"""Clipping against torch and a scalar ZClip; learning-rate schedules by hand."""

import math

import pytest
import torch

from attnscope.train.clipping import clip_gradients, clip_state
from attnscope.train.schedule import lr_at
from tests import reference

CPU = torch.device("cpu")
INF = math.inf


def drawn(n_members=3, seed=0):
    """Gradients of two parameters, larger from member to member, and their norms."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.arange(1, n_members + 1).float()
    gradients = {
        "a": torch.randn(n_members, 4, 5, generator=generator) * size[:, None, None],
        "b": torch.randn(n_members, 7, generator=generator) * size[:, None],
    }
    return gradients, norms_of(gradients)


def norms_of(gradients):
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1).norm(dim=1)


def clip(gradients, norm_M, *, mode, thresholds, step=0, state=None):
    return clip_gradients(
        gradients,
        mode=mode,
        threshold_M=torch.tensor(thresholds),
        grad_norm_M=norm_M,
        state=clip_state(mode, len(norm_M), CPU) if state is None else state,
        step=step,
    )


def clip_with_torch(gradients, member, clip_in_place):
    leaves = [torch.zeros_like(value[member]) for value in gradients.values()]
    for leaf, value in zip(leaves, gradients.values(), strict=True):
        leaf.grad = value[member].clone()
    clip_in_place(leaves)
    return [leaf.grad for leaf in leaves]


def test_norm_clipping_is_that_of_torch_with_a_threshold_per_member():
    gradients, norm_M = drawn()
    thresholds = [1.0, 100.0, 2.5]
    clipped, factor_M = clip(gradients, norm_M, mode="norm", thresholds=thresholds)
    for m, threshold in enumerate(thresholds):
        expected = clip_with_torch(gradients, m, lambda leaves, t=threshold: torch.nn.utils.clip_grad_norm_(leaves, t))
        for value, twin in zip(clipped.values(), expected, strict=True):
            torch.testing.assert_close(value[m], twin)
    assert factor_M[1] == 1
    torch.testing.assert_close(norms_of(clipped)[[0, 2]], torch.tensor([1.0, 2.5]))
    torch.testing.assert_close(factor_M, norms_of(clipped) / norm_M)


def test_value_clipping_is_that_of_torch_with_a_threshold_per_member():
    gradients, norm_M = drawn()
    thresholds = [0.5, 100.0, 2.0]
    clipped, factor_M = clip(gradients, norm_M, mode="value", thresholds=thresholds)
    for m, threshold in enumerate(thresholds):
        expected = clip_with_torch(gradients, m, lambda leaves, t=threshold: torch.nn.utils.clip_grad_value_(leaves, t))
        for value, twin in zip(clipped.values(), expected, strict=True):
            assert torch.equal(value[m], twin)
    # The factor of value clipping is the norm after over the norm before.
    torch.testing.assert_close(factor_M, norms_of(clipped) / norm_M)
    assert factor_M[0] < 1 and factor_M[1] == 1 and factor_M[2] < 1


@pytest.mark.parametrize("mode", ["none", "norm", "value", "adaptive"])
@pytest.mark.parametrize("step", [0, 30])
def test_without_a_threshold_nothing_is_clipped_whatever_the_gradients(mode, step):
    gradients, _ = drawn()
    gradients["a"][1, 0, 0] = INF
    gradients["b"] = gradients["b"] * torch.tensor([1.0, 1.0, 0.0])[:, None]
    gradients["a"][2] = 0
    clipped, factor_M = clip(gradients, norms_of(gradients), mode=mode, thresholds=[INF] * 3, step=step)
    assert factor_M.tolist() == [1, 1, 1]
    assert all(torch.equal(clipped[name], value) for name, value in gradients.items())


@pytest.mark.parametrize("mode", ["norm", "value", "adaptive"])
def test_a_broken_member_leaves_the_clipping_of_its_neighbours(mode):
    gradients, norm_M = drawn()
    sound, sound_factor_M = clip(gradients, norm_M, mode=mode, thresholds=[1.0] * 3)
    gradients["a"][2, 1] = math.nan
    broken, factor_M = clip(gradients, norms_of(gradients), mode=mode, thresholds=[1.0] * 3)
    assert torch.equal(factor_M[:2], sound_factor_M[:2])
    for name, value in sound.items():
        assert torch.equal(broken[name][:2], value[:2])


def series(seed):
    """60 gradient norms around 5 with a spike at step 40 and a smaller one at 50."""
    generator = torch.Generator().manual_seed(seed)
    norms = 5 + torch.rand(60, generator=generator)
    norms[40], norms[50] = 80.0, 8.0
    return norms


def test_adaptive_clipping_is_zclip_with_a_threshold_per_member():
    thresholds = [2.5, 4.0, INF]
    norms_MS = torch.stack([series(seed) for seed in range(3)])
    state = clip_state("adaptive", 3, CPU)
    factors = []
    for step in range(60):
        norm_M = norms_MS[:, step]
        gradients = {"a": norm_M[:, None].clone()}
        clipped, factor_M = clip(gradients, norm_M, mode="adaptive", thresholds=thresholds, step=step, state=state)
        torch.testing.assert_close(clipped["a"][:, 0], norm_M * factor_M)
        factors.append(factor_M)
    found_MS = torch.stack(factors, dim=1)
    for m, threshold in enumerate(thresholds):
        expected = reference.zclip(norms_MS[m].double().tolist(), threshold)
        torch.testing.assert_close(found_MS[m], torch.tensor(expected), rtol=1e-3, atol=1e-5)
    assert found_MS[0, 40] < 0.1 and found_MS[1, 40] < 0.1  # pulled back to about 6 of 80
    assert (found_MS[0, :25] == 1).all() and (found_MS[2] == 1).all()


def test_only_adaptive_clipping_remembers():
    assert clip_state("norm", 2, CPU) == {}
    assert {value.shape for value in clip_state("adaptive", 2, CPU).values()} == {(2,)}


def lrs(schedule, steps, *, lr=(1.0,), warmup=(0,), at=None):
    lr_M, warmup_M = torch.tensor(lr), torch.tensor(warmup).float()
    return torch.stack(
        [
            lr_at(step, lr_M=lr_M, warmup_M=warmup_M, schedule=schedule, steps=steps)
            for step in (range(steps) if at is None else at)
        ]
    )


def test_constant_is_the_peak_after_a_warm_up_that_starts_at_lr_over_its_length():
    rates = lrs("constant", 6, lr=(0.8,), warmup=(4,))[:, 0]
    torch.testing.assert_close(rates, torch.tensor([0.2, 0.4, 0.6, 0.8, 0.8, 0.8]))


def test_cosine_falls_from_the_peak_to_a_tenth():
    rates = lrs("cosine", 100, lr=(2.0,), at=[0, 25, 50, 75, 99])[:, 0]
    by_hand = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2) for p in (0, 0.25, 0.5, 0.75, 0.99)]
    torch.testing.assert_close(rates, torch.tensor(by_hand))
    assert rates[0] == 2 and rates[2].item() == pytest.approx(1.1)
    assert 0.2 <= rates[-1] < 0.201


def test_cosine_starts_to_fall_after_the_warm_up():
    rates = lrs("cosine", 30, warmup=(10,))[:, 0]
    torch.testing.assert_close(rates[:10], torch.arange(1, 11) / 10)
    assert rates[10] == 1
    assert (rates[10:].diff() < 0).all()
    assert rates[20].item() == pytest.approx(0.55)  # half-way between 10 and 30


def test_wsd_is_stable_and_falls_linearly_in_the_last_fifth():
    rates = lrs("wsd", 50, warmup=(5,))[:, 0]
    torch.testing.assert_close(rates[:5], torch.arange(1, 6) / 5)
    assert (rates[5:41] == 1).all()
    torch.testing.assert_close(rates[40:], torch.arange(10, 0, -1) / 10)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_every_member_has_its_own_peak_and_warm_up(schedule):
    together = lrs(schedule, 40, lr=(1.0, 0.5, 3.0), warmup=(0, 10, 3))
    for member, (lr, warmup) in enumerate([(1.0, 0), (0.5, 10), (3.0, 3)]):
        alone = lrs(schedule, 40, lr=(lr,), warmup=(warmup,))
        torch.testing.assert_close(together[:, member], alone[:, 0])
    torch.testing.assert_close(together[0], torch.tensor([1.0, 0.05, 1.0]))
