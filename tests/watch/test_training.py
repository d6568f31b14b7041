"""What is seen of training: losses, clipping, loss scaling, optimizers, non-finite numbers; and that nothing stays behind."""

import gc
import os
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnscope.errors import ConfigError, RunError
from attnscope.runs.reader import open_run
from attnscope.watch.attach import watch_model
from attnscope.watch.watcher import watching
from tests.watch.foreign import layers_of

X = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """One attention layer and an output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 4)

    def forward(self, x):
        q, k, v = (y[:, None] for y in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])


def loss_of(model, x=X):
    return model(x).square().mean()


def train(path, each_step, *, steps=3, every=1, optimizer=None, model=None):
    """Call each_step(model, optimizer) so often, watched; the run."""
    model = model or Small()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    with watch_model(model, path=path, every=every):
        for _ in range(steps):
            each_step(model, optimizer)
    return open_run(path)


def plain_step(model, optimizer):
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def sizes(run, column, step=0):
    rows = run.params[run.params["step"] == step]
    return dict(zip(rows["group"].astype(str), rows[column], strict=True))


def test_gradients_weights_and_updates_are_those_of_the_optimizer(tmp_path):
    model, twin = Small(), Small()
    run = train(tmp_path / "run", plain_step, steps=1, model=model)
    loss = loss_of(twin)
    loss.backward()
    assert run.steps["loss"][0] == pytest.approx(loss.item())
    for name, module in (("qkv", twin.qkv), ("out", twin.out)):
        gradients = torch.cat([p.grad.flatten() for p in module.parameters()])
        weights = torch.cat([p.detach().flatten() for p in module.parameters()])
        assert sizes(run, "grad_norm")[name] == pytest.approx(gradients.norm().item(), rel=1e-5)
        assert sizes(run, "grad_max")[name] == pytest.approx(gradients.abs().max().item(), rel=1e-5)
        assert sizes(run, "weight_norm")[name] == pytest.approx(weights.norm().item(), rel=1e-5)
        assert sizes(run, "update_norm")[name] == pytest.approx(0.1 * gradients.norm().item(), rel=1e-4)
    assert run.steps["lr"].tolist() == [pytest.approx(0.1)]
    assert run.events.set_index("kind").loc["optimizer", "fields"]["name"] == "SGD"


def test_layers_that_are_skipped_at_first_keep_their_own_numbers(tmp_path):
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Small() for _ in range(3))
            for n, layer in enumerate(self.layers):
                layer.qkv.weight.data *= 2.0 * n + 1
            self.skips = 1

        def forward(self, x):
            for n, layer in enumerate(self.layers):
                if n != self.skips:
                    x = x + layer(x).mean()
            self.skips = -1
            return x

    def step(model, optimizer):
        optimizer.zero_grad()
        loss_of(model).backward()  # no update: weights, and with them entropies, stay
        optimizer.step()

    model = Dropped()
    run = train(tmp_path / "run", step, steps=2, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))  # fmt: skip
    order = [layer["name"] for layer in layers_of(run)]
    assert order == ["layers.0", "layers.2", "layers.1"]
    entropy = run.heads.pivot(index="step", columns="layer", values="entropy")
    assert entropy.loc[1, 0] > entropy.loc[1, 2] > entropy.loc[1, 1], "sharper with every layer"


def test_without_an_optimizer_each_loss_is_a_step(tmp_path):
    def by_hand(model, _optimizer):
        model.zero_grad()
        loss_of(model).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad

    model, twin = Small(), Small()
    gc.collect()  # the optimizers of other tests
    with watch_model(model, path=tmp_path / "run", every=1) as watcher:
        for _ in range(4):
            by_hand(model, None)
    expected = []
    for _ in range(4):
        expected.append(loss_of(twin).item())
        by_hand(twin, None)
    run = open_run(tmp_path / "run")
    assert watcher.took_losses_for_steps and watcher.updates == 0
    assert run.steps["loss"].tolist() == pytest.approx(expected)
    assert run.heads["step"].tolist() == list(range(4))


def test_updates_that_cannot_be_seen_do_not_pile_up_in_one_step(tmp_path, monkeypatch):
    monkeypatch.setattr("attnscope.watch.steps.MOST_LOSSES", 10)
    model = Small()
    hidden = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch_model(model, path=tmp_path / "run") as watcher:
        for _ in range(30):
            loss_of(model).backward()
    assert hidden is not None and watcher.took_losses_for_steps
    assert open_run(tmp_path / "run").steps["step"].tolist() == list(range(20))


def test_a_text_generated_token_by_token_is_not_measured_at_every_token(tmp_path):
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch_model(model, path=tmp_path / "run", every=1):
        model.eval()
        with torch.no_grad():
            for _ in range(100):
                model(X)
        model.train()
        plain_step(model, optimizer)
    run = open_run(tmp_path / "run")
    assert run.ends[0]["attention_calls"] == 9
    assert run.heads["rows"].tolist() == [24], "training alone counts"


def test_clipping_by_norm_and_by_value_is_measured_before(tmp_path):
    def by_norm(model, optimizer):
        optimizer.zero_grad()
        loss_of(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()

    def by_value(model, optimizer):
        optimizer.zero_grad()
        loss_of(model).backward()
        torch.nn.utils.clip_grad_value_(list(model.parameters()), 1e-4)
        optimizer.step()

    model = Small()
    loss_of(model).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    for name, step in (("norm", by_norm), ("value", by_value)):
        run = train(tmp_path / name, step, steps=1)
        first = run.steps.iloc[0]
        assert first["grad_norm"] == pytest.approx(norm, rel=1e-5), name
        total = sum(float(x) ** 2 for x in sizes(run, "grad_norm").values()) ** 0.5
        assert total == pytest.approx(norm, rel=1e-5), name
        after = sum(float(x) ** 2 for x in sizes(run, "update_norm").values()) ** 0.5 / 0.1
        assert first["clip_factor"] == pytest.approx(after / norm, rel=1e-2), name


def test_grad_scaler_its_loss_its_scale_and_its_skipped_updates(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    steps = iter(range(10))

    def step(model, optimizer):
        optimizer.zero_grad()
        loss = loss_of(model)
        if next(steps) == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    run = train(tmp_path / "run", step, steps=3)
    assert run.steps["loss"][0] == pytest.approx(loss_of(Small()).item())
    assert run.steps["loss_scale"].tolist() == [1024.0, 512.0], "two updates: one was skipped"
    (skipped,) = run.events[run.events["kind"] == "skipped_update"]["step"]
    assert skipped == 1
    model = Small()
    loss_of(model).backward()
    assert sizes(run, "grad_norm")["out"] == pytest.approx(
        torch.cat([p.grad.flatten() for p in model.out.parameters()]).norm().item(), rel=1e-4
    )


def test_two_optimizers_after_one_backward_are_one_step(tmp_path):
    model = Small()
    both = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model.qkv, model.out)]

    def step(model, _):
        for optimizer in both:
            optimizer.zero_grad()
        loss_of(model).backward()
        for optimizer in both:
            optimizer.step()

    run = train(tmp_path / "run", step, model=model)
    assert run.steps["step"].tolist() == [0, 1, 2]
    assert set(sizes(run, "grad_norm", step=2)) == {"qkv", "out"}
    assert run.ends[0]["updates"] == 6


def test_autocast_is_measured_in_float32(tmp_path):
    def step(model, optimizer):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model)
        loss.backward()
        optimizer.step()

    run = train(tmp_path / "run", step, steps=1)
    (fields,) = run.events[run.events["kind"] == "attention"]["fields"]
    assert fields["dtype"] == "bfloat16"
    exact = train(tmp_path / "exact", plain_step, steps=1)
    assert run.heads["entropy"][0] == pytest.approx(exact.heads["entropy"][0], abs=1e-3)


def test_the_first_numbers_that_are_not_finite_are_said_with_their_place(tmp_path):
    model = Small()
    numbers = iter(range(10))

    def step(model, optimizer):
        plain_step(model, optimizer)
        if next(numbers) == 1:
            with torch.no_grad():
                model.qkv.weight[[0, 40], 0] = float("nan")  # of q and v

    run = train(tmp_path / "run", step, steps=4, model=model)
    found = run.events[run.events["kind"] == "nonfinite"]
    said = {fields["tensor"]: (step, fields.get("where")) for step, fields in zip(found["step"], found["fields"], strict=True)}  # fmt: skip
    assert said["loss"] == (2, None)
    assert said["attention logits"] == (2, ["Small"])
    assert said["gradient"] == (2, ["qkv", "out"])
    assert run.members[0].status == "diverged" and run.members[0].diverged_at == 2


def test_evaluation_between_steps_does_not_mix_with_training(tmp_path):
    def step(model, optimizer):
        model.eval()
        with torch.no_grad():
            model(10 * X)
        model.train()
        plain_step(model, optimizer)
        model.eval()
        model(10 * X)
        model.train()

    run = train(tmp_path / "run", step, steps=2)
    plain = train(tmp_path / "plain", plain_step, steps=2)
    assert run.heads.equals(plain.heads)


def test_attention_is_measured_at_the_first_20_steps_and_at_every_so_many(tmp_path):
    run = train(tmp_path / "run", plain_step, steps=33, every=5)
    assert run.heads["step"].tolist() == [*range(20), 20, 25, 30]
    assert sorted(set(run.params["step"])) == [*range(20), 20, 25, 30]
    assert run.steps["step"].tolist() == list(range(33))


@pytest.mark.parametrize("every", [1, 3])
def test_losses_weights_and_random_numbers_are_bit_equal(tmp_path, every):
    def run(watched):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        optimizer = torch.optim.AdamW(model.parameters())
        losses = []

        def go():
            for _ in range(27):
                loss = loss_of(model)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())

        if watched:
            with watch_model(model, optimizer, tmp_path / "run", every=every):
                go()
        else:
            go()
        return losses, [p.detach().clone() for p in model.parameters()], torch.rand(3)

    plain, watched = run(False), run(True)
    assert plain[0] == watched[0]
    assert all(map(torch.equal, plain[1], watched[1])) and torch.equal(plain[2], watched[2])


PATCHED = [
    (F, "scaled_dot_product_attention"), (F, "softmax"), (torch, "softmax"), (torch, "matmul"), (torch, "bmm"),
    (torch, "einsum"), (torch, "compile"), (torch.Tensor, "softmax"), (torch.Tensor, "__matmul__"),
    (torch.Tensor, "backward"), (torch.autograd, "backward"), (torch.nn.utils, "clip_grad_norm_"),
    (torch.amp.GradScaler, "step"),
]  # fmt: skip


def test_functions_imported_while_watching_are_put_back_too(tmp_path, monkeypatch):
    late = types.ModuleType("late")
    monkeypatch.setitem(sys.modules, "late", late)
    clip = torch.nn.utils.clip_grad_norm_
    with watch_model(Small(), path=tmp_path / "run"):
        exec("from torch.nn.utils import clip_grad_norm_", vars(late))
        assert late.clip_grad_norm_ is not clip
    assert late.clip_grad_norm_ is clip


def test_nothing_is_left_behind_after_an_exception(tmp_path):
    before = [getattr(owner, name) for owner, name in PATCHED]
    own = {name: vars(torch.Tensor).get(name) for name in ("softmax", "__matmul__", "backward")}

    def step(model, optimizer):
        plain_step(model, optimizer)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        train(tmp_path / "run", step)
    assert [getattr(owner, name) for owner, name in PATCHED] == before
    assert {name: vars(torch.Tensor).get(name) for name in own} == own
    hooks = sys.modules["torch.optim.optimizer"]
    assert not hooks._global_optimizer_pre_hooks and not hooks._global_optimizer_post_hooks
    assert watching() is None
    found = open_run(tmp_path / "run")
    assert found.status == "failed" and found.ends[0]["error"] == "RuntimeError: no"
    assert len(found.steps) == 1


def test_a_model_made_after_another_was_freed_is_another_one(tmp_path):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Small()

        def forward(self, x):
            return self.inner(x)

    with watch_model(path=tmp_path / "run") as watcher:
        for kind in (Small, Inner, Small, Inner):
            model = kind()
            plain_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
            del model
    assert watcher.layers == ("Small", "inner", "Small (2)", "inner (2)")


def test_a_child_process_records_nothing(tmp_path):
    model = Small()
    with watch_model(model, path=tmp_path / "run") as watcher:
        child = os.fork()
        if child == 0:
            plain_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
            watcher.stop()
            os._exit(0)
        os.waitpid(child, 0)
    found = open_run(tmp_path / "run")
    assert found.status == "finished" and len(found.steps) == 0


def test_processes_that_cannot_agree_on_a_place_must_be_given_one(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"Give watch_model a path, or call it after"):
        watch_model(Small())
    assert watching() is None


def test_wrong_uses_give_one_line(tmp_path):
    model = Small()
    with watch_model(path=tmp_path / "run"), pytest.raises(RunError, match=r"being watched already, into .*run\. Stop that one first\."):  # fmt: skip
        watch_model(path=tmp_path / "second")
    assert not (tmp_path / "second").exists()
    with pytest.raises(RunError, match=r"already exists\. Choose another --name\."):
        watch_model(path=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"every is 0, but must be at least 1\."):
        watch_model(path=tmp_path / "second", every=0)
    other = torch.optim.SGD(Small().parameters(), lr=0.1)
    with pytest.raises(RunError, match=r"4 parameters of the optimizer are not the model's\."):
        watch_model(model, other, tmp_path / "second")
    assert watching() is None
