"""What a step is: an update that had gradients, with the losses whose gradients it had."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint

from attnscope.runs.reader import open_run
from attnscope.watch.attach import watch_model
from attnscope.watch.output import is_irregular
from attnscope.watch.trackers import moments_of
from tests.watch.test_training import Small, X, loss_of, plain_step, sizes, train


def events(run, kind):
    return run.events[run.events["kind"] == kind]["fields"].tolist()


def norm(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()


# -- losses add up as gradients do --


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.3), (1.0, 1.0)])
def test_the_loss_is_the_function_whose_gradient_the_optimizer_is_given(tmp_path, weights):
    """Divided evenly, by tokens, or not at all."""

    def step(model, optimizer):
        optimizer.zero_grad()
        for half, weight in zip(X.split(2), weights, strict=True):
            (loss_of(model, half) * weight).backward()
        optimizer.step()

    run = train(tmp_path / "run", step, steps=1)
    twin = Small()
    together = sum(loss_of(twin, half) * weight for half, weight in zip(X.split(2), weights, strict=True))
    together.backward()
    assert run.steps["loss"].tolist() == pytest.approx([together.item()])
    assert run.steps["grad_norm"].tolist() == pytest.approx([norm(twin)], rel=1e-5)


def test_two_losses_with_a_backward_each_are_one(tmp_path):
    def step(model, optimizer):
        optimizer.zero_grad()
        y = model(X)
        y.square().mean().backward(retain_graph=True)
        (3 * y.abs().mean()).backward()
        optimizer.step()

    y = Small()(X)
    run = train(tmp_path / "run", step, steps=1)
    assert run.steps["loss"][0] == pytest.approx((y.square().mean() + 3 * y.abs().mean()).item())


def test_a_weight_given_to_backward_counts(tmp_path):
    def step(model, optimizer):
        optimizer.zero_grad()
        loss_of(model).backward(torch.tensor(0.25))
        torch.autograd.backward([loss_of(model), loss_of(model)], [torch.tensor(0.5), None])
        optimizer.step()

    run = train(tmp_path / "run", step, steps=1)
    assert run.steps["loss"][0] == pytest.approx(1.75 * loss_of(Small()).item())


def test_a_loss_that_is_differentiated_for_some_parameters_after_others_counts_once(tmp_path):
    def step(model, optimizer):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward(inputs=list(model.qkv.parameters()), retain_graph=True)
        loss.backward(inputs=list(model.out.parameters()))
        optimizer.step()

    run = train(tmp_path / "run", step, steps=1)
    assert run.steps["loss"][0] == pytest.approx(loss_of(Small()).item())


@pytest.mark.parametrize("by", ["optimizer", "model"])
@pytest.mark.parametrize("to_none", [True, False])
def test_a_loss_whose_gradient_was_zeroed_is_not_in_the_step(tmp_path, by, to_none):
    """As in sharpness-aware minimization, whose first gradient only says where to look."""
    expected = []

    def step(model, optimizer):
        optimizer.zero_grad()
        loss_of(model, 5 * X).backward()
        (optimizer if by == "optimizer" else model).zero_grad(set_to_none=to_none)
        loss = loss_of(model)
        loss.backward()
        expected.append(loss.item())
        optimizer.step()

    run = train(tmp_path / "run", step)
    assert run.steps["loss"].tolist() == pytest.approx(expected)


def test_zeroing_one_of_two_optimizers_keeps_the_loss_of_the_other(tmp_path):
    model = Small()
    one, other = (SGD(part.parameters(), lr=0.1) for part in (model.qkv, model.out))

    def step(model, _):
        one.zero_grad()
        loss_of(model).backward()
        other.zero_grad()
        loss_of(model).backward()
        one.step()
        other.step()

    run = train(tmp_path / "run", step, steps=1, model=model)
    assert run.steps["loss"][0] == pytest.approx(2 * loss_of(Small()).item())


def test_roots_that_can_be_gone_through_once_only_are_still_differentiated(tmp_path):
    def step(model, optimizer):
        optimizer.zero_grad()
        torch.autograd.backward(loss for loss in [loss_of(model), loss_of(model)])
        torch.nn.utils.clip_grad_norm_((p for p in model.parameters()), 1e6)
        optimizer.step()

    run = train(tmp_path / "run", step, steps=1)
    loss = 2 * loss_of(Small()).item()
    assert run.steps["loss"][0] == pytest.approx(loss)
    assert run.steps["grad_norm"][0] > 0


def test_the_loss_of_lbfgs_is_the_first_of_its_step(tmp_path):
    model = Small()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    firsts, entropy_calls = [], []

    def step(model, optimizer):
        seen = []

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            seen.append(loss.item())
            return loss

        optimizer.step(closure)
        firsts.append(seen[0])
        entropy_calls.append(len(seen))

    run = train(tmp_path / "run", step, model=model, optimizer=optimizer)
    assert min(entropy_calls) > 1, "or there is nothing to see"
    assert run.steps["loss"].tolist() == pytest.approx(firsts)
    assert run.ends[0]["updates"] == 3
    assert set(run.heads["rows"]) == {24}, "one forward pass each"


def test_losses_that_grad_scaler_scaled_together_are_recorded_unscaled(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(model, optimizer):
        optimizer.zero_grad()
        a, b = scaler.scale([loss_of(model), loss_of(model, 2 * X)])
        a.backward()
        b.backward()
        scaler.step(optimizer)
        scaler.update()

    run = train(tmp_path / "run", step, steps=1)
    expected = loss_of(Small()).item() + loss_of(Small(), 2 * X).item()
    assert run.steps["loss"][0] == pytest.approx(expected)


def test_the_loss_of_a_skipped_update_is_not_in_the_next_one(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    numbers = iter(range(9))

    def step(model, optimizer):
        optimizer.zero_grad()
        loss = loss_of(model) * (float("inf") if next(numbers) == 1 else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    run = train(tmp_path / "run", step)
    assert run.steps["loss"].notna().all() and run.steps["loss"].max() < 10
    assert run.members[0].status == "trained"


# -- losses that cannot be seen --


def by_autograd_grad(model, optimizer):
    parameters = list(model.parameters())
    for p, g in zip(parameters, torch.autograd.grad(loss_of(model), parameters), strict=True):
        p.grad = g
    optimizer.step()


def by_func_grad(model, optimizer):
    weights = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.grad(lambda w: torch.func.functional_call(model, w, (X,)).square().mean())(weights)
    for name, p in model.named_parameters():
        p.grad = found[name]
    optimizer.step()


def by_vector(model, optimizer):
    optimizer.zero_grad()
    model(X).backward(torch.ones(4, 6, 4) / 96)
    optimizer.step()


@pytest.mark.parametrize("step", [by_autograd_grad, by_func_grad, by_vector])
def test_a_step_whose_loss_was_not_seen_is_recorded_and_that_is_said(tmp_path, step):
    run = train(tmp_path / "run", step)
    assert run.status == "finished" and run.ends[0]["losses_not_seen"] == 3
    assert run.steps["step"].tolist() == [0, 1, 2]
    assert run.steps["loss"].isna().all()
    assert (run.steps["grad_norm"] > 0).all()
    assert run.steps["lr"].tolist() == pytest.approx([0.1] * 3)
    assert run.heads["step"].tolist() == [0, 1, 2]
    assert set(run.params["group"]) == {"qkv", "out"} and len(run.params) == 6
    assert len(events(run, "loss_not_seen")) == 1 and not events(run, "nonfinite")
    assert "loss" in events(run, "not_recorded")[0]
    (member,) = run.members
    assert (member.status, member.diverged_at, member.last_step) == ("trained", None, 2)


def test_a_loss_that_is_not_a_number_is_no_loss_that_was_not_seen(tmp_path):
    numbers = iter(range(9))

    def step(model, optimizer):
        if next(numbers) < 2:
            by_autograd_grad(model, optimizer)
        else:
            optimizer.zero_grad()
            (loss_of(model) * float("nan")).backward()
            optimizer.step()

    run = train(tmp_path / "run", step, steps=4)
    assert run.ends[0]["losses_not_seen"] == 2
    assert (run.members[0].status, run.members[0].diverged_at) == ("diverged", 2)


def test_a_tracker_is_not_told_of_a_loss_that_was_not_seen():
    steps = {name: np.array([1.0, np.nan]) for name in ("loss", "grad_norm", "clip_factor")}
    steps |= {"step": np.arange(2), "loss_seen": np.array([True, False])}
    first, second = moments_of(steps, {})
    assert first.values["attnscope/loss"] == 1
    assert set(second.values) == {"attnscope/grad_norm", "attnscope/clip_factor"}


def test_a_run_is_not_stopped_for_a_loss_that_was_not_seen(tmp_path):
    model = Small()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watch_model(model, path=tmp_path / "run", stop_on=["nonfinite", "explosion"]):
        for _ in range(5):
            by_autograd_grad(model, optimizer)
    assert len(open_run(tmp_path / "run").steps) == 5


# -- what an update is --


def test_steps_without_gradients_before_training_count_for_nothing(tmp_path):
    dummy = Adam(nn.Linear(1, 1).parameters())

    def step(model, optimizer):
        for _ in range(10):
            dummy.step()
        plain_step(model, optimizer)
        dummy.step()

    run = train(tmp_path / "run", step)
    assert run.ends[0]["updates"] == 3 and run.ends[0]["steps_without_gradient"] == 33
    assert run.steps["step"].tolist() == [0, 1, 2]
    assert not events(run, "step_without_gradient")
    plain = train(tmp_path / "plain", plain_step)
    columns = ["loss", "grad_norm", "lr"]
    assert run.steps[columns].equals(plain.steps[columns])


def test_training_whose_gradients_are_zeroed_too_early_is_recorded_as_it_is(tmp_path):
    def step(model, optimizer):
        loss_of(model).backward()
        optimizer.zero_grad()
        optimizer.step()

    run = train(tmp_path / "run", step)
    assert run.ends[0]["updates"] == 0 and run.ends[0]["steps_without_gradient"] == 3
    loss = loss_of(Small()).item()
    assert run.steps["loss"].tolist() == pytest.approx([loss] * 3)
    assert run.steps["grad_norm"].isna().all()
    assert len(events(run, "step_without_gradient")) == 1


def test_an_optimizer_of_frozen_parameters_beside_another_is_no_fault(tmp_path):
    frozen = SGD([nn.Parameter(torch.ones(2))], lr=0.1)

    def step(model, optimizer):
        optimizer.zero_grad()
        loss_of(model).backward()
        frozen.step()
        optimizer.step()

    run = train(tmp_path / "run", step)
    plain = train(tmp_path / "plain", plain_step)
    columns = ["step", "loss", "grad_norm", "lr"]
    assert run.steps[columns].equals(plain.steps[columns]) and run.params.equals(plain.params)
    assert not events(run, "step_without_gradient")


@pytest.mark.parametrize("checkpointed", [True, False])
def test_a_closure_or_reentrant_checkpointing_changes_no_record(tmp_path, checkpointed):
    def with_closure(model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        optimizer.step(closure)

    def with_checkpoint(model, optimizer):
        optimizer.zero_grad()
        x = X.clone().requires_grad_()
        checkpoint(model, x, use_reentrant=True).square().mean().backward()
        optimizer.step()

    run = train(tmp_path / "run", with_checkpoint if checkpointed else with_closure)
    plain = train(tmp_path / "plain", plain_step)
    assert run.steps["loss"].equals(plain.steps["loss"]) and run.params.equals(plain.params)
    assert run.heads.equals(plain.heads)


class Lookahead(torch.optim.Optimizer):
    """Shares the groups of the one that it wraps, as timm's does."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, dict(inner.defaults))
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self, closure=None):
        return self.inner.step(closure)


class Container(torch.optim.Optimizer):
    """Steps several optimizers; what it calls its own has no gradient."""

    def __init__(self, parts):
        super().__init__([nn.Parameter(torch.zeros(1))], {})
        self.parts = parts

    def step(self):
        for each in self.parts:
            each.step()

    def zero_grad(self, set_to_none=True):
        for each in self.parts:
            each.zero_grad(set_to_none)


class Accelerated(torch.optim.Optimizer):
    """Never calls the constructor of Optimizer, as accelerate's does not."""

    def __init__(self, inner):
        self.inner = inner

    def step(self, closure=None):
        self.inner.step(closure)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)


class Subclass(SGD):
    """Steps as its parent does, whose step is watched, too."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("wrapped", ["lookahead", "twice", "container", "accelerated", "subclass"])
def test_an_optimizer_around_another_makes_one_update(tmp_path, wrapped):
    model = Small()
    SGD(model.parameters(), lr=0.1)  # SGD.step is watched from the first one on
    inner = SGD(model.parameters(), lr=0.1)
    optimizer = {
        "lookahead": lambda: Lookahead(inner),
        "twice": lambda: Lookahead(Lookahead(inner)),
        "container": lambda: Container([inner]),
        "accelerated": lambda: Accelerated(inner),
        "subclass": lambda: Subclass(model.parameters(), lr=0.1),
    }[wrapped]()
    run = train(tmp_path / "run", plain_step, model=model, optimizer=optimizer)
    plain = train(tmp_path / "plain", plain_step)
    assert run.ends[0]["updates"] == 3
    columns = ["step", "loss", "grad_norm", "lr"]
    assert run.steps[columns].equals(plain.steps[columns])
    assert run.params.equals(plain.params)


def test_a_step_that_raised_does_not_hide_the_next_one(tmp_path):
    numbers = iter(range(9))

    class Fails(SGD):
        def step(self, closure=None):
            if next(numbers) == 1:
                raise MemoryError
            return super().step(closure)

    model = Small()

    def step(model, optimizer):
        optimizer.zero_grad()
        loss_of(model).backward()
        try:
            optimizer.step()
        except MemoryError:
            optimizer.step()

    run = train(tmp_path / "run", step, model=model, optimizer=Fails(model.parameters(), lr=0.1))
    plain = train(tmp_path / "plain", plain_step)
    assert run.ends[0]["updates"] == 3 and run.params.equals(plain.params)


def test_sam_with_a_closure_is_one_update_with_its_second_loss(tmp_path):
    class Sam(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1})
            self.base = SGD(self.param_groups, lr=0.1)

        @torch.no_grad()
        def step(self, closure):
            moved = [(p, 0.05 * p.grad / p.grad.norm()) for p in self.param_groups[0]["params"]]
            for p, by in moved:
                p += by
            self.zero_grad()
            with torch.enable_grad():
                closure()
            for p, by in moved:
                p -= by
            self.base.step()

    model = Small()
    seconds = []

    def step(model, optimizer):
        def closure():
            loss = loss_of(model)
            loss.backward()
            seconds.append(loss.item())
            return loss

        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step(closure)

    run = train(tmp_path / "run", step, model=model, optimizer=Sam(model.parameters()))
    assert run.ends[0]["updates"] == 3
    assert run.steps["loss"].tolist() == pytest.approx(seconds)
    total = sum(float(x) ** 2 for x in sizes(run, "grad_norm").values()) ** 0.5
    assert total == pytest.approx(run.steps["grad_norm"][0], rel=1e-5)


def test_the_same_gradients_used_twice_are_two_updates(tmp_path):
    def step(model, optimizer):
        plain_step(model, optimizer)
        optimizer.step()

    run = train(tmp_path / "run", step, steps=2)
    assert run.ends[0]["updates"] == 4 and run.steps["step"].tolist() == [0, 1, 2, 3]
    assert run.steps["loss"].notna().tolist() == [True, False, True, False]
    norms = run.params.pivot(index="step", columns="group", values="grad_norm")
    assert norms.loc[0].tolist() == pytest.approx(norms.loc[1].tolist())


def test_optimizers_that_step_inside_backward_are_one_step(tmp_path):
    model = Small()
    optimizers = {p: SGD([p], lr=0.1) for p in model.parameters()}

    def update(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    hooks = [p.register_post_accumulate_grad_hook(update) for p in model.parameters()]
    run = train(tmp_path / "run", lambda model, _: loss_of(model).backward(), model=model)
    for hook in hooks:  # the garbage collector does not see them
        hook.remove()
    plain = train(tmp_path / "plain", plain_step)
    columns = ["step", "loss", "lr"]
    assert run.steps[columns].equals(plain.steps[columns])
    assert run.steps["grad_norm"].tolist() == pytest.approx(plain.steps["grad_norm"].tolist())


# -- cross-entropy --


class Classifies(Small):
    def loss(self, y, **how):
        return F.cross_entropy(self(X).mean(dim=1), y, **how)


def test_cross_entropy_tells_tokens_and_output_logits(tmp_path):
    y = torch.tensor([1, 3, -100, 0])
    model = Classifies()
    expected = []

    def step(model, optimizer):
        z = model(X).mean(dim=1).detach()
        expected.append((z.max().item(), z[y != -100].logsumexp(-1).mean().item()))
        optimizer.zero_grad()
        for _ in range(2):
            (model.loss(y) / 2).backward()
        optimizer.step()

    run = train(tmp_path / "run", step, model=model)
    assert run.steps["tokens"].tolist() == [6, 12, 18]
    assert run.steps["output_logit_max"].tolist() == pytest.approx([x for x, _ in expected])
    assert run.steps["log_z"].tolist() == pytest.approx([x for _, x in expected], rel=1e-5)
    assert not {"tokens", "log_z", "loss"} & set(events(run, "not_recorded")[0])


def test_cross_entropy_in_evaluation_is_not_counted(tmp_path):
    y = torch.tensor([1, 3, 2, 0])

    def step(model, optimizer):
        with torch.no_grad():
            F.cross_entropy(100 * model(X).mean(dim=1), y)
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(model(X).mean(dim=1), y).backward()
        optimizer.step()

    run = train(tmp_path / "run", step, steps=1)
    assert run.steps["tokens"].tolist() == [4] and run.steps["output_logit_max"][0] < 10


@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 5, 4), (2, 5, 4, 3)])
def test_log_z_of_any_shape_that_cross_entropy_takes(tmp_path, shape):
    z = nn.Parameter(torch.randn(shape))
    y = torch.randint(0, 5, shape[1:] if len(shape) == 1 else (shape[0], *shape[2:]))

    def step(_model, optimizer):
        optimizer.zero_grad()
        F.cross_entropy(z, y).backward()
        optimizer.step()

    expected = z.detach().logsumexp(0 if z.dim() == 1 else 1).mean().item()
    run = train(tmp_path / "run", step, steps=1, optimizer=SGD([z], lr=0.0))
    assert run.steps["log_z"][0] == pytest.approx(expected, rel=1e-5)
    assert run.steps["tokens"][0] == y.numel()


def test_the_first_targets_of_cross_entropy_are_looked_at(tmp_path):
    y_SN = torch.randint(0, 5, (30, 400), generator=torch.Generator().manual_seed(1))
    y_SN[:, 0] = -100
    y_SN[7] = y_SN[0]
    z = nn.Parameter(torch.randn(400, 5))
    first = []

    def step(_model, optimizer):
        y_N = y_SN[len(first)]
        loss = F.cross_entropy(z, y_N)
        first.append(loss.item())
        optimizer.zero_grad()
        (-3 * loss).backward()
        optimizer.step()

    run = train(tmp_path / "run", step, steps=30, optimizer=SGD([z], lr=0.01))
    assert events(run, "cross_entropy") == [{"classes": 5, "loss": pytest.approx(first[0]), "targets": 399}]
    (said,) = events(run, "first_targets")
    assert said == {
        "steps": 20,
        "same": 2,
        "irregular": True,
        "counted": 399 / 400,
        "entropy": pytest.approx(np.log(5), abs=0.01),
    }


@pytest.mark.parametrize(
    ("targets", "irregular"),
    [
        (torch.arange(64), False),
        (torch.arange(8).repeat_interleave(8), False),
        (torch.arange(8).repeat(8), False),
        (torch.zeros(64, dtype=torch.int64), False),
        (torch.randint(0, 100, (15,)), False),
        (torch.randint(0, 100, (64,), generator=torch.Generator().manual_seed(0)), True),
    ],
)
def test_targets_that_are_laid_out_by_hand_are_regular(targets, irregular):
    assert is_irregular(targets.numpy()) is irregular


def test_a_run_of_fewer_steps_than_are_looked_at_tells_its_targets_at_the_end(tmp_path):
    def step(model, optimizer):
        optimizer.zero_grad()
        model.loss(torch.tensor([1, 3, 2, 0])).backward()
        optimizer.step()

    run = train(tmp_path / "run", step, model=Classifies(), steps=3)
    assert events(run, "first_targets") == [{"steps": 3, "same": 3, "irregular": False, "counted": 1.0}]


def test_targets_that_are_probabilities_are_no_tokens(tmp_path):
    def step(model, optimizer):
        optimizer.zero_grad()
        F.cross_entropy(model(X).mean(dim=1), torch.full((4, 4), 0.25)).backward()
        optimizer.step()

    run = train(tmp_path / "run", step, steps=1)
    assert run.steps["tokens"][0] == 0 and run.steps["log_z"].isna().all()
    assert "tokens" in events(run, "not_recorded")[0]
