"""What is looked at once in the first steps of a script, in its own words; and that nothing of it disturbs the script."""

import copy
import gc
import weakref
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint

from attnscope.runs import probed
from attnscope.runs.probe_events import (
    DropoutInEvaluation,
    EvaluationInTraining,
    KeysSeen,
    RowsWithoutKeys,
    TargetsSeen,
)
from attnscope.runs.reader import open_run
from attnscope.watch import sights as watch_sights
from attnscope.watch.attach import watch_model

V, T, D = 20, 8, 16
TEXT = torch.randint(1, V, (4, T + 1), generator=torch.Generator().manual_seed(0))


class Decoder(nn.Module):
    """One attention layer between an embedding and its output."""

    def __init__(self, *, causal=True, dropout=0.0, padding=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.positions = nn.Embedding(V, D, padding_idx=padding), nn.Embedding(T, D)
        self.qkv, self.norm, self.out = nn.Linear(D, 3 * D), nn.LayerNorm(D), nn.Linear(D, V)
        self.causal, self.dropout = causal, nn.Dropout(dropout)

    def forward(self, ids, mask=None):
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1]))
        q, k, v = (y[:, None] for y in self.qkv(self.norm(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(x + self.dropout(y[:, 0]))


def loss_of(model, text=TEXT, mask=None):
    return F.cross_entropy(model(text[:, :-1], mask).reshape(-1, V), text[:, 1:].reshape(-1))


def plain_step(model, optimizer):
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def train(path, step=plain_step, *, model=None, optimizer=None, steps=7, given=True):
    """Call step(model, optimizer) so often, watched; the run."""
    model = model or Decoder()
    optimizer = optimizer or Adam(model.parameters(), 1e-3)
    with watch_model(model if given else None, path=path):
        for _ in range(steps):
            step(model, optimizer)
    return open_run(path)


def said(kind, run):
    return [SimpleNamespace(step=each.step, **asdict(each.what)) for each in probed.told(run, kind)]


def last(read, run):
    return [SimpleNamespace(step=each.step, **asdict(each.what)) for each in read(run)]


# -- attention and targets --


@pytest.mark.parametrize("causal", [True, False])
def test_sight_and_targets_of_a_language_model(tmp_path, causal):
    run = train(tmp_path / "run", model=Decoder(causal=causal))
    (sight,) = said(KeysSeen, run)
    assert (sight.layer, sight.queries, sight.keys, sight.step) == (0, T, T, 0)
    assert (sight.later, sight.later_rows) == (0, 0) if causal else sight.later > 0.3 and sight.later_rows == 1
    first, second = said(TargetsSeen, run)
    assert (first.step, second.step) == (0, 1), "and no later step"
    assert first.equal_next == 1.0 and first.equal_same < 0.3
    assert (first.positions, first.compared, first.sequences) == (T, TEXT[:, 1:].numel(), 1)


def test_a_batch_that_is_given_with_padding_is_seen_with_it(tmp_path):
    padded = TEXT.clone()
    padded[::2, 5:] = 0

    def step(model, optimizer):
        optimizer.zero_grad()
        loss_of(model, padded, hidden).backward()
        optimizer.step()

    hidden = None
    (seen,) = said(KeysSeen, train(tmp_path / "seen", step, model=Decoder(causal=False, padding=0)))
    hidden = (padded[:, :-1] != 0)[:, None, None]
    (unseen,) = said(KeysSeen, train(tmp_path / "hidden", step, model=Decoder(causal=False, padding=0)))
    hidden = ~hidden
    (wrong,) = said(KeysSeen, train(tmp_path / "wrong", step, model=Decoder(causal=False, padding=0)))
    assert seen.padded > 0.2 and unseen.padded == 0
    assert (unseen.inverted_rows, seen.inverted_rows, wrong.inverted_rows) == (0, None, 1)


def test_rows_without_a_key_are_told_with_the_step_at_which_they_come(tmp_path):
    step_now = iter(range(9))

    def step(model, optimizer):
        mask = torch.ones(4, 1, T, T, dtype=torch.bool).tril()
        mask[0, :, 5:] = next(step_now) < 4
        optimizer.zero_grad()
        loss_of(model, mask=mask).backward()
        optimizer.step()

    (found,) = said(RowsWithoutKeys, train(tmp_path / "run", step, model=Decoder(causal=False)))
    assert (found.step, found.rows, found.of) == (4, 3, 4 * T)


# -- optimizers --


def upkeep(path, step=plain_step, **how):
    (found,) = last(probed.upkeep_of, train(path, step, **how))
    return found


def backward_without(*, zero):
    def step(model, optimizer):
        loss_of(model).backward()
        optimizer.step()
        zero(model, optimizer)

    return step


ZEROING = {
    "never": (lambda *_: None, True),
    "optimizer": (lambda _, optimizer: optimizer.zero_grad(), False),
    "filled": (lambda _, optimizer: optimizer.zero_grad(set_to_none=False), False),
    "model": (lambda model, _: model.zero_grad(), False),
    "by hand": (lambda model, _: [p.grad.zero_() for p in model.parameters()], False),
}


@pytest.mark.parametrize("how", ZEROING)
def test_gradients_that_stay_are_those_that_nobody_zeroed(tmp_path, how):
    zero, stays = ZEROING[how]
    found = upkeep(tmp_path / "run", backward_without(zero=zero))
    assert (found.updates, found.compared) == (7, 4)
    assert found.gradients_kept == (4 if stays else 0)


def test_gradients_of_micro_batches_add_up_within_an_update(tmp_path):
    def step(model, optimizer):
        for _ in range(3):
            (loss_of(model) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert upkeep(tmp_path / "run", step).gradients_kept == 0


def test_gradients_of_a_critic_from_the_generators_loss_are_zeroed_before_its_own(tmp_path):
    model = Decoder()
    one, other = Adam(model.qkv.parameters(), 1e-3), Adam(model.out.parameters(), 1e-3)

    def step(*_):
        one.zero_grad()
        loss_of(model).backward()
        one.step()
        other.zero_grad()
        loss_of(model).backward()  # adds to what `one` has just used
        other.step()

    found = last(probed.upkeep_of, train(tmp_path / "run", step, model=model))
    assert [each.gradients_kept for each in found] == [0, 0] and len(found) == 2


def test_parameters_that_compute_and_never_get_a_gradient_are_not_those_that_do_nothing(tmp_path):
    model = Decoder()
    model.pooler = nn.Linear(D, D)
    whole = model.embedding.forward
    model.embedding.forward = lambda ids: whole(ids).detach()
    found = upkeep(tmp_path / "run", model=model)
    assert (found.detached, found.detached_names) == (1, ("embedding.weight",))
    assert (found.unused, found.unused_names) == (2, ("pooler.weight", "pooler.bias"))


def test_what_gets_a_gradient_later_is_not_told_at_the_end(tmp_path):
    model = Decoder()
    model.extra = nn.Linear(V, V)
    steps = iter(range(99))

    def step(model, optimizer):
        optimizer.zero_grad()
        late = next(steps) > 5
        out = model(TEXT[:, :-1])
        F.cross_entropy((model.extra(out) if late else out).reshape(-1, V), TEXT[:, 1:].reshape(-1)).backward()
        optimizer.step()

    assert upkeep(tmp_path / "run", step, model=model).unused == 0


def test_a_group_without_a_learning_rate_is_told_until_it_has_one(tmp_path):
    model = Decoder()
    groups = [{"params": [*model.qkv.parameters()], "lr": 0.0}, {"params": [*model.out.parameters()]}]
    optimizer = Adam(groups, 1e-3)
    found = upkeep(tmp_path / "a", model=model, optimizer=optimizer)
    assert found.lr_zero_names == ("qkv.weight", "qkv.bias") and found.parameters == 4
    steps = iter(range(99))

    def warm_up(model, optimizer):
        optimizer.param_groups[0]["lr"] = 1e-4 * next(steps)
        plain_step(model, optimizer)

    assert upkeep(tmp_path / "b", warm_up, model=model, optimizer=optimizer).lr_zero == 0


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_zeroed_before_the_step_leave_an_optimizer_without_any(tmp_path, to_none):
    def step(model, optimizer):
        loss_of(model).backward()
        optimizer.zero_grad(set_to_none=to_none)
        optimizer.step()

    run = train(tmp_path / "run", step)
    (found,) = last(probed.upkeep_of, run)
    if to_none:
        assert (found.updates, found.steps_without_gradient, found.steps_zeroed) == (0, 7, 7)
    else:
        assert run.steps["grad_norm"].tolist() == [0.0] * 7


def test_an_optimizer_that_is_gone_at_the_end_is_told_all_the_same(tmp_path):
    with watch_model(path=tmp_path / "run"):
        model = Decoder()
        optimizer = Adam([*model.qkv.parameters()], 1e-3)
        for _ in range(8):
            plain_step(model, optimizer)
        del model, optimizer
        gc.collect()
    run = open_run(tmp_path / "run")
    assert last(probed.upkeep_of, run)[0].updates == 8
    assert last(probed.without_optimizer_of, run)[0].parameters == 6


# -- parameters that no optimizer has --


def test_modules_in_a_list_are_found_where_they_stand(tmp_path):
    model = Decoder()
    heads = [nn.Linear(V, V), nn.Linear(V, V)]
    model.heads = {"all": heads}

    def step(model, optimizer):
        optimizer.zero_grad()
        out = heads[1](heads[0](model(TEXT[:, :-1])))
        F.cross_entropy(out.reshape(-1, V), TEXT[:, 1:].reshape(-1)).backward()
        optimizer.step()

    (found,) = last(probed.without_optimizer_of, train(tmp_path / "run", step, model=model))
    assert found.hidden == 4 and found.containers == ("heads",) and found.parameters == 4 and found.left_out == 0


@pytest.mark.parametrize("given", [True, False])
def test_parameters_left_out_of_the_optimizer_are_named(tmp_path, given):
    model = Decoder()
    optimizer = Adam([p for name, p in model.named_parameters() if "norm" not in name], 1e-3)
    (found,) = last(probed.without_optimizer_of, train(tmp_path / "run", model=model, optimizer=optimizer, given=given))
    assert found.names == ("norm.weight", "norm.bias") and found.left_out == 2
    assert found.share_left_out == pytest.approx(2 * D / sum(p.numel() for p in model.parameters()))


def test_an_optimizer_of_a_copy_has_none_of_what_is_trained(tmp_path):
    optimizer = Adam(copy.deepcopy(Decoder()).parameters(), 1e-3)
    run = train(tmp_path / "run", optimizer=optimizer)
    (found,) = last(probed.without_optimizer_of, run)
    assert found.parameters == len([*Decoder().parameters()])
    assert last(probed.upkeep_of, run)[0].steps_without_gradient == 7


def test_nothing_is_said_of_what_something_else_moves_or_another_optimizer_has(tmp_path):
    model = Decoder()
    rest = [*model.embedding.parameters(), *model.positions.parameters()]

    def step(model, optimizer):
        model.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        with torch.no_grad():
            for p in rest:
                p.sub_(0.1 * p.grad)

    mine = [p for p in model.parameters() if all(p is not q for q in rest)]
    assert last(probed.without_optimizer_of, train(tmp_path / "a", step, model=model, optimizer=Adam(mine))) == []
    model = Decoder()
    waiting = SGD(model.out.parameters(), lr=0.1)  # steps later, perhaps
    optimizer = Adam([p for name, p in model.named_parameters() if "out" not in name])
    assert last(probed.without_optimizer_of, train(tmp_path / "b", model=model, optimizer=optimizer)) == []
    assert waiting.param_groups


def test_what_needs_no_gradient_is_nobodys_orphan(tmp_path):
    model = Decoder()
    model.embedding.requires_grad_(False)
    optimizer = Adam([p for p in model.parameters() if p.requires_grad])
    assert last(probed.without_optimizer_of, train(tmp_path / "run", model=model, optimizer=optimizer)) == []


# -- modes --


@torch.no_grad()
def evaluate(model):
    loss_of(model)


def test_a_loss_that_is_evaluated_with_dropout_on(tmp_path):
    def step(model, optimizer):
        plain_step(model, optimizer)
        evaluate(model)

    (found,) = said(DropoutInEvaluation, train(tmp_path / "run", step, model=Decoder(dropout=0.3)))
    assert (found.step, found.model, found.dropouts) == (1, "Decoder", 1) and found.dropout == pytest.approx(0.3)
    assert said(DropoutInEvaluation, train(tmp_path / "none", step)) == []


def test_no_loss_is_evaluated_before_training_in_evaluation_mode_or_while_checkpointing(tmp_path):
    def rightly(model, optimizer):
        plain_step(model, optimizer)
        evaluate(model.eval())
        model.train()

    def checkpointing(model, optimizer):
        optimizer.zero_grad()
        x = torch.zeros((), requires_grad=True)
        checkpoint(lambda x: x + loss_of(model), x, use_reentrant=True).backward()
        optimizer.step()

    def logging(model, optimizer):
        optimizer.zero_grad()
        out = model(TEXT[:, :-1]).reshape(-1, V)
        with torch.no_grad():
            F.cross_entropy(out, TEXT[:, 1:].reshape(-1))
            F.cross_entropy(out.detach(), TEXT[:, 1:].reshape(-1))
        F.cross_entropy(out, TEXT[:, 1:].reshape(-1)).backward()
        optimizer.step()

    for step in (rightly, checkpointing, logging):
        run = train(tmp_path / step.__name__, step, model=Decoder(dropout=0.3))
        assert said(DropoutInEvaluation, run) == [], step.__name__
    model = Decoder(dropout=0.3)
    with watch_model(model, path=tmp_path / "before"):
        evaluate(model)
    assert said(DropoutInEvaluation, open_run(tmp_path / "before")) == []


@pytest.mark.parametrize("begins", ["training", "evaluation"])
def test_a_model_that_is_left_in_evaluation_mode(tmp_path, begins):
    steps = iter(range(99))

    def step(model, optimizer):
        if next(steps) == 3 or begins == "evaluation":
            model.eval()
        plain_step(model, optimizer)

    (found,) = said(EvaluationInTraining, train(tmp_path / "run", step, model=Decoder(dropout=0.3)))
    assert (found.step, found.losses_before) == ((3, 3) if begins == "training" else (1, 0))
    assert (found.dropouts, found.batch_norms) == (1, 0)


def test_a_part_in_evaluation_mode_or_a_judge_that_is_not_trained_is_none(tmp_path):
    judge = nn.Sequential(nn.Linear(V, V), nn.Dropout(0.5)).eval()

    def judged(model, optimizer):
        optimizer.zero_grad()
        judge(model(TEXT[:, :-1])).square().mean().backward()
        optimizer.step()

    model = Decoder(dropout=0.3)
    model.norm.eval()
    for name, step in (("part", plain_step), ("judge", judged)):
        assert said(EvaluationInTraining, train(tmp_path / name, step, model=model)) == []


# -- what it leaves alone --


def test_losses_weights_and_random_numbers_are_those_of_the_unwatched_script(tmp_path):
    def trained(path):
        model = Decoder(dropout=0.2, causal=False, padding=0)
        optimizer = Adam([*model.qkv.parameters(), *model.out.parameters()], 1e-2)
        losses = []

        def step(model, optimizer):
            optimizer.zero_grad()
            loss = loss_of(model)
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            evaluate(model)

        if path is None:
            for _ in range(7):
                step(model, optimizer)
        else:
            train(path, step, model=model, optimizer=optimizer)
        return losses, torch.cat([p.detach().flatten() for p in model.parameters()]), torch.rand(3)

    (losses, weights, drawn), (losses_watched, weights_watched, drawn_watched) = trained(None), trained(tmp_path / "r")
    assert losses == losses_watched
    assert torch.equal(weights, weights_watched) and torch.equal(drawn, drawn_watched)


def test_nothing_of_the_script_is_kept_alive(tmp_path):
    model = Decoder()
    optimizer = Adam([*model.qkv.parameters()], 1e-3)
    ids = TEXT.clone()
    kept = [weakref.ref(each) for each in (model, optimizer, model.out.weight, ids)]
    with watch_model(path=tmp_path / "run"):
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(ids[:, :-1]).reshape(-1, V), ids[:, 1:].reshape(-1)).backward()
            optimizer.step()
        del model, optimizer, ids
        gc.collect()
        assert [each() for each in kept] == [None] * 4


def test_a_probe_that_fails_costs_itself_alone(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("no sight")

    monkeypatch.setattr(watch_sights, "sight_of", broken)
    run = train(tmp_path / "run")
    assert run.status == "finished" and len(run.steps) == 7 and said(KeysSeen, run) == []
    assert said(TargetsSeen, run) and last(probed.upkeep_of, run) and len(run.heads)
    failed = [
        fields for kind, fields in zip(run.events["kind"], run.events["fields"], strict=True) if kind == "not_measured"
    ]
    assert [each["reason"] for each in failed] == ["ZeroDivisionError: no sight"]
