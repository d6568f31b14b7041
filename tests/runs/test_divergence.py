"""When a loss left for good: real trainings that do and that do not, case by case, and that blocks do not matter."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from attnscope.runs.divergence import (
    GUESSES,
    LAST,
    NOT_FINITE,
    NOT_FINITE_IN_A_ROW,
    TOO_HIGH,
    Guessing,
    LossWatch,
)

NAN, INF = math.nan, math.inf


def verdict(losses, grad_norms=None, *, ended=True):
    watch = LossWatch()
    watch.feed(range(len(losses)), losses, grad_norms)
    if ended:
        watch.end()
    return watch.diverged_at, watch.why


# The classical explosion: attention without its scale, no normalization, SGD (the default config, seeds 0 to 3).
CLASSICAL = {
    7: [21.09, 20.47, 19.22, 19.46, 23.81, 21.88, 24.47, 39.08, 60.27, 70.91, 68.43, 148.6, 91.1, 122, 322, 2289, 6.9e6, NAN],
    8: [22.4, 21.4, 24.8, 28.1, 30.6, 30.8, 35.6, 42.1, 70.4, 49.5, 68.2, 82.3, 92.8, 114.6, 2074, 7e4, 1e24, NAN],
    5: [23.8, 17.8, 21.0, 26.9, 31.3, 46.4, 76.4, 387, 186, 487, 4126, 2.1e6, NAN, NAN],
    2: [24.9, 40.9, 81.4, 155, 465, 2874, 1.9e5, NAN, NAN],
}  # fmt: skip


@pytest.mark.parametrize("at", CLASSICAL)
def test_the_classical_explosion_is_dated_to_where_the_loss_doubles(at):
    assert verdict(CLASSICAL[at]) == (at, TOO_HIGH)
    finite = [loss for loss in CLASSICAL[at] if math.isfinite(loss)]
    assert verdict(finite) == (at, TOO_HIGH), "NaN is not what tells"


def test_an_explosion_is_known_before_it_is_not_finite():
    watch = LossWatch()
    for step, loss in enumerate([22.6, 18.1, 38.9, 647.0, 5.3e3, 7.3e9]):
        watch.feed([step], [loss])
    assert (watch.diverged_at, watch.why) == (2, TOO_HIGH)
    assert watch.limit == pytest.approx(2 * 18.1)


@pytest.mark.parametrize(
    ("losses", "at", "why"),
    [
        ([4, 3, 2, 1], None, None),
        ([4, 3, NAN, NAN], 2, NOT_FINITE),
        ([4, INF], 1, NOT_FINITE),
        ([NAN, NAN], 0, NOT_FINITE),
        ([4, 3, NAN, 2, 1], None, None),  # training went on
        ([4, 3, 2, NAN], 3, NOT_FINITE),
        ([NAN, 4, 3, 2], None, None),
        ([4, 9, 9, NAN], 1, TOO_HIGH),
        ([4.0] * 70 + [8.0, 8.0, 8.0], 70, TOO_HIGH),
        ([4.0] * 70 + [7.9] * 100, None, None),
        ([4.0] * 70 + [8.0, 8.0, 7.0] * 20, None, None),
        ([4.0] * 70 + [50.0, 60.0] + [4.0] * 50, None, None),  # a spike
        ([4.0] * 10 + [90.0] * 3, 10, TOO_HIGH),
        ([4.0, 4.4, 3.6, 4.2] + [9.0] * 12, None, None),  # after few losses it takes more of them
        ([4.0, 4.4, 3.6, 4.2] + [9.0] * 70, 4, TOO_HIGH),
        ([1.0, 9.0, 2.0, 12.0, 11.0, 13.0, 4.0, 8.0], None, None),  # one small first loss
        ([0.0] * 50 + [0.5] * 50, None, None),
        ([0.0] * 50 + [80.0] * 50, None, None),  # it had no level yet
        ([-3.0, -3.1, -2.9] * 30 + [2.0, 1.0] * 30, 90, TOO_HIGH),
        ([-3.0, -3.1, -2.9] * 30 + [-1.0] * 60, None, None),
        ([-50.0, 40.0, 20.0, -30.0] * 20 + [45.0, 50.0, 60.0], None, None),
        ([-50.0, 40.0, 20.0, -30.0] * 20 + [500.0, 900.0, 600.0], 80, TOO_HIGH),
        ([], None, None),
    ],
)
def test_divergence_is_seen_at_its_first_step(losses, at, why):
    assert verdict(losses) == (at, why)


def test_a_loss_that_is_not_finite_for_long_has_diverged_though_the_run_goes_on():
    losses = [4.0, 3.0, *[NAN] * NOT_FINITE_IN_A_ROW, 2.0]
    assert verdict(losses) == (2, NOT_FINITE)
    assert verdict(losses[:-2], ended=False) == (None, None)
    assert verdict(losses[:-1], ended=False) == (2, NOT_FINITE)


def test_at_the_end_a_loss_that_did_no_harm_is_no_divergence():
    assert verdict([4.0, 3.0, NAN], [1.0, 1.0, 1.0]) == (None, None)
    assert verdict([4.0, 3.0, NAN], [1.0, 1.0, NAN]) == (2, NOT_FINITE)
    assert verdict([4.0, 3.0, NAN, NAN], [1.0, 1.0, NAN, 1.0]) == (2, NOT_FINITE)
    assert verdict([NAN, NAN], [1.0, 1.0]) == (0, NOT_FINITE), "nothing was ever finite"


@given(
    st.lists(
        st.sampled_from([-40.0, 0.0, 0.001, 1.0, 4.0, 8.0, 9.0, 30.0, 1e3, 1e30, NAN, INF]),
        max_size=160,
    ),
    st.lists(st.integers(0, 160), max_size=8),
    st.integers(0, 2**32),
)
def test_the_answer_does_not_depend_on_the_blocks(losses, cuts, seed):
    steps = np.arange(len(losses)) + 7
    norms = np.random.default_rng(seed).choice([1.0, NAN], size=len(losses))
    whole, pieces = LossWatch(), LossWatch()
    whole.feed(steps, losses, norms)
    edges = [0, *sorted(min(cut, len(losses)) for cut in cuts), len(losses)]
    for low, high in itertools.pairwise(edges):
        pieces.feed(steps[low:high], losses[low:high], norms[low:high])
    for _ in range(2):
        assert (whole.diverged_at, whole.why) == (pieces.diverged_at, pieces.why)
        whole.end()
        pieces.end()


@pytest.mark.parametrize("seed", range(20))
def test_what_is_found_early_is_found_at_the_same_step_as_a_whole(seed):
    """Random walks and noise, long enough that old losses are forgotten: one loss at a time, odd blocks, all at once."""
    rng = np.random.default_rng(seed)
    losses = 10 + np.cumsum(rng.normal(size=600)) * rng.choice([0.1, 1, 10])
    losses[400:] += rng.choice([0.0, 100.0, 1000.0])
    verdicts = set()
    for size in (1, 7, 64, 600):
        watch = LossWatch()
        for start in range(0, 600, size):
            block = losses[start : start + size]
            watch.feed(np.arange(start, start + len(block)), block)
        verdicts.add((watch.diverged_at, watch.why))
    assert len(verdicts) == 1


def test_after_divergence_nothing_changes():
    watch = LossWatch()
    watch.feed(range(20), [4.0] * 10 + [90.0] * 10)
    watch.feed([20, 21, 22], [NAN, 9.0, 9.0])
    watch.end()
    assert (watch.diverged_at, watch.why) == (10, TOO_HIGH)


def mlp(n_in, n_out):
    return nn.Sequential(nn.Linear(n_in, 32), nn.Tanh(), nn.Linear(32, n_out))


def on_policy(lr, *, reduce=torch.mean):
    """GRPO: normalized advantages, whose mean is 0 but for rounding, and beta times the KL from the reference."""
    policy = nn.Sequential(nn.Embedding(20, 16), mlp(16, 20), nn.LogSoftmax(-1))
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr)
    while True:
        x = torch.randint(0, 20, (8, 12))
        now = policy(x)
        act = torch.distributions.Categorical(logits=now.detach()).sample()
        reward = (act == x).float()
        advantage = (reward - reward.mean()) / (reward.std() + 1e-4)
        log_p = now.gather(-1, act[..., None])[..., 0]
        far = reference(x).detach().gather(-1, act[..., None])[..., 0] - log_p
        kl = far.exp() - far - 1
        yield reduce(-(log_p - log_p.detach()).exp() * advantage + 0.04 * kl), optimizer


def reinforce(lr):
    """Returns that are not normalized: noise of fifty around zero."""
    policy = mlp(4, 3)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    while True:
        x = torch.randn(4, 4)
        log_p = policy(x).log_softmax(-1)
        act = torch.distributions.Categorical(logits=log_p.detach()).sample()
        gain = 50 * (torch.randn(4) + (act == x[:, :3].argmax(-1)).float() - 0.5)
        yield -(log_p.gather(1, act[:, None])[:, 0] * gain).mean(), optimizer


def distillation(lr, *, task=0.3):
    """From a copy of itself, beside a task of its own that pulls it away."""
    teacher = mlp(8, 10)
    student, labels = copy.deepcopy(teacher), torch.randn(8, 10)
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    while True:
        x = torch.randn(16, 8)
        kl = F.kl_div(student(x).log_softmax(-1), teacher(x).softmax(-1), reduction="batchmean")
        other = F.cross_entropy(student(x), (x @ labels).argmax(-1)).detach()
        aside = F.cross_entropy(student(x), (x @ labels).argmax(-1)) - other
        yield kl + task * aside, optimizer


def wasserstein(lr, *, critics=True):
    """WGAN with clipped weights: losses of either sign that drift."""
    critic, maker = mlp(2, 1), mlp(2, 2)
    optimizer = torch.optim.RMSprop([*critic.parameters()], lr=lr)
    other = torch.optim.RMSprop([*maker.parameters()], lr=lr)
    while True:
        real, z = 0.3 * torch.randn(32, 2) + torch.tensor([4.0, -3.0]), torch.randn(32, 2)
        loss = critic(maker(z).detach()).mean() - critic(real).mean()
        made = -critic(maker(z)).mean()
        other.zero_grad()
        made.backward()
        yield (loss if critics else loss - loss.detach() + made.detach()), optimizer
        other.step()
        with torch.no_grad():
            for weight in critic.parameters():
                weight.clamp_(-0.3, 0.3)


def density(lr, *, sgd=False, width=0.01):
    """Negative log-likelihood of a narrow Gaussian: from thousands to below zero."""
    model, target = mlp(3, 8), torch.randn(3, 4)
    optimizer = (torch.optim.SGD if sgd else torch.optim.Adam)(model.parameters(), lr=lr)
    while True:
        x = torch.randn(16, 3)
        y = width * torch.sin(x @ target) + 0.01 * torch.randn(16, 4)
        mean, log_std = model(x).chunk(2, -1)
        yield (0.5 * ((y - mean) / log_std.exp()) ** 2 + log_std).sum(-1).mean(), optimizer


def classes(lr, *, batch=1, n=10):
    """A batch of one: each loss is another sample's."""
    model, target = mlp(8, n), torch.randn(8, n)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    while True:
        x = torch.randn(batch, 8)
        yield F.cross_entropy(model(x), (x @ target).argmax(-1)), optimizer


def regression(lr, *, size=1.0):
    model, target = mlp(4, 1), torch.randn(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    while True:
        x = torch.randn(8, 4)
        yield F.mse_loss(model(x), size * (x @ target)), optimizer


def losses_of(training, steps=200):
    losses = []
    for loss, optimizer in itertools.islice(training, steps):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


HEALTHY = {
    "on policy": lambda: on_policy(3e-3),
    "on policy, fast": lambda: on_policy(1e-2),
    "on policy, summed": lambda: on_policy(3e-3, reduce=torch.sum),
    "reinforce": lambda: reinforce(1e-3),
    "distillation": lambda: distillation(1e-3),
    "distillation, fast": lambda: distillation(1e-2),
    "critic": lambda: wasserstein(5e-3),
    "generator": lambda: wasserstein(5e-3, critics=False),
    "density": lambda: density(3e-3),
    "density, from near": lambda: density(1e-3, width=1.0),
    "batch of one": lambda: classes(0.05),
    "batch of one, two classes": lambda: classes(0.1, n=2),
    "regression": lambda: regression(1e-2),
    "regression, tiny": lambda: regression(1e-2, size=1e-2),
    "regression, large": lambda: regression(1e-3, size=100.0),
}
WILD = {
    "density, at once": lambda: density(3.0, sgd=True, width=1.0),
    "classes": lambda: classes(300.0, batch=4),
    "regression": lambda: regression(1.0),
    "regression, tiny": lambda: regression(3.0, size=1e-2),
    "regression, large": lambda: regression(1.0, size=100.0),
}


@pytest.mark.parametrize("seed", [101, 102, 103])
@pytest.mark.parametrize("name", HEALTHY)
def test_trainings_that_are_well_do_not_diverge(name, seed):
    torch.manual_seed(seed)
    losses = losses_of(HEALTHY[name]())
    assert verdict(losses) == (None, None), losses[:12]


@pytest.mark.parametrize("seed", [101, 102, 103])
@pytest.mark.parametrize("name", WILD)
def test_trainings_with_far_too_large_a_step_diverge_soon(name, seed):
    torch.manual_seed(seed)
    losses = losses_of(WILD[name]())
    at, _ = verdict(losses)
    assert at is not None and at <= 60, losses[:12]


def test_noise_alone_seldom_looks_like_divergence():
    """At most 2 in 100 runs of 300 losses that are nothing but noise, even far larger than any nats."""
    rng = np.random.default_rng(0)
    kinds = {
        "of either sign": lambda: 50 * rng.normal(size=300),
        "heavy tails": lambda: 20 * rng.standard_t(3, size=300),
        "positive": lambda: 100 * rng.exponential(size=300),
        "one sample's nats": lambda: rng.exponential(size=300),
    }
    for kind, noise in kinds.items():
        found = sum(verdict(noise())[0] is not None for _ in range(1000))
        assert found <= 20, kind


def climbing(to, *, steps=400, first=4.0):
    """From a first loss to a last one, by the same share at each step."""
    return (first * (to / first) ** np.linspace(0, 1, steps)).tolist()


FAR = GUESSES * math.log(50)


def after(losses, guessing):
    watch = LossWatch()
    watch.feed(range(len(losses)), losses)
    watch.end(guessing)
    return watch.diverged_at, watch.why, watch.limit


def test_a_cross_entropy_that_climbs_slowly_to_the_end_has_diverged():
    losses = climbing(5000.0, steps=290)
    assert after(losses, None) == (None, None, None), "its range grew along"
    at, why, limit = after(losses, Guessing(level=math.log(50)))
    assert why == TOO_HIGH and limit == 2 * 4.0 and losses[at] >= limit > losses[at - 1]
    assert after(losses, Guessing(level=math.log(50), first=4.1))[0] == at
    assert after(losses, Guessing(level=math.log(50), first=6.0))[0] is None, "it is another loss"
    assert after(losses, Guessing(level=0.0))[0] is None, "there is nothing to guess"


@pytest.mark.parametrize(
    ("losses", "is_found"),
    [
        ([*climbing(FAR * 1.3)[:-LAST], *[FAR * 1.01] * LAST], True),
        ([*climbing(FAR * 1.3)[:-LAST], *[FAR * 0.99] * LAST], False),
        (climbing(FAR * 1.3)[:-LAST] + [FAR * 0.99] + [FAR * 1.3] * (LAST - 1), False),
        (climbing(2.1 * FAR, first=FAR), True),
        (climbing(1.9 * FAR, first=FAR), False),  # it began far above guessing
        (climbing(20.0, first=19.0), False),
        (climbing(2.5, first=40.0), False),  # large weights, and it comes down
        ([40.0, *climbing(45.0, first=19.0)], False),
        (climbing(5000.0)[:200] + climbing(2.0, steps=200, first=100.0), False),
        ([NAN] * 3, None),
    ],
)
def test_it_takes_the_last_losses_far_above_guessing_and_the_first(losses, is_found):
    at, why, _ = after(losses, Guessing(level=math.log(50)))
    assert (at is not None) == (is_found is not False)
    assert is_found is not True or why == TOO_HIGH


@pytest.mark.parametrize("size", [1, 7, 64, 700])
def test_a_climb_is_dated_alike_however_it_is_cut(size):
    losses = climbing(5000.0, steps=1500)
    watch = LossWatch()
    for start in range(0, len(losses), size):
        block = losses[start : start + size]
        watch.feed(range(start, start + len(block)), block)
    watch.end(Guessing(level=math.log(50)))
    assert watch.diverged_at == after(losses, Guessing(level=math.log(50)))[0]
