"""A layer is a module object: which calls are one layer, and what layers are called."""

import copy

import pytest
import torch
from torch import nn

from attnscope.runs.reader import open_run
from attnscope.watch.attach import watch_model
from tests.watch.foreign import layers_of
from tests.watch.test_training import Small, X, loss_of, plain_step, train


class Attention(nn.Module):
    """By hand; tells the mean entropy of each of its calls."""

    def __init__(self, heads=2, gain=0.5):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(16, 48)
        nn.init.normal_(self.qkv.weight, std=gain)
        self.entropies = []

    def forward(self, x, heads=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, heads or self.heads, -1)).permute(2, 0, 3, 1, 4)
        p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        self.entropies.append(-torch.special.xlogy(p, p).sum(-1).mean().item())
        return (p @ v).transpose(1, 2).flatten(2)


class Generator(nn.Module):
    def __init__(self, heads=2, gain=0.02):
        super().__init__()
        self.block = nn.ModuleDict({"attn": Attention(heads, gain)})

    def forward(self, x):
        return x + self.block["attn"](x)


class Critic(Generator):
    def __init__(self, heads=2):
        super().__init__(heads, gain=0.8)


def entropy_of(run, layer):
    return run.heads[run.heads["layer"] == layer]["entropy"].mean()


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize(("second", "name"), [(Critic, "Critic.block.attn"), (Generator, "block.attn (2)")])
def test_two_models_with_the_same_paths_are_two_layers(tmp_path, heads, second, name):
    torch.manual_seed(0)
    models = Generator(), second(heads)
    parameters = [p for model in models for p in model.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    with watch_model(path=tmp_path / "run", every=1, rows="all") as watcher:
        for _ in range(2):
            optimizer.zero_grad()
            sum(loss_of(model) for model in models).backward()
            optimizer.step()
    run = open_run(tmp_path / "run")
    assert watcher.layers == ("block.attn", name)
    assert [layer["n_heads"] for layer in layers_of(run)] == [2, heads]
    for number, model in enumerate(models):
        expected = sum(model.block["attn"].entropies) / 2
        assert entropy_of(run, number) == pytest.approx(expected, rel=1e-5)


def test_modules_in_a_python_list_are_layers_of_their_own(tmp_path):
    class InList(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Generator(gain=gain) for gain in (0.1, 0.5, 1.0)]
            self.out = nn.Linear(16, 16)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.out(x)

    torch.manual_seed(0)
    model = InList()
    run = train(tmp_path / "run", plain_step, model=model)
    assert [layer["name"] for layer in layers_of(run)] == [f"block.attn{n}" for n in ("", " (2)", " (3)")]  # fmt: skip
    for number, layer in enumerate(model.layers):
        expected = sum(layer.block["attn"].entropies) / 3
        assert entropy_of(run, number) == pytest.approx(expected, rel=1e-5)


def test_a_teacher_is_not_its_student(tmp_path):
    student = Generator(gain=0.5)
    teacher = copy.deepcopy(student)

    def step(model, optimizer):
        with torch.no_grad():
            target = teacher(10 * X)
        optimizer.zero_grad()
        (model(X) - target).square().mean().backward()
        optimizer.step()

    run = train(tmp_path / "run", step, model=student)
    assert sorted(layer["name"] for layer in layers_of(run)) == ["block.attn", "block.attn (2)"]
    assert len(run.heads) == 3 * 2 * 2


def test_a_module_put_in_the_place_of_another_is_a_new_layer(tmp_path):
    def step(model, optimizer):
        plain_step(model, optimizer)
        model.block["attn"] = Attention()

    run = train(tmp_path / "run", step, model=Generator())
    assert len(layers_of(run)) == 3


def test_what_wraps_a_model_makes_no_new_layer(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.module = model

        def forward(self, x):
            return self.module(x)

    model = Generator()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch_model(path=tmp_path / "run") as watcher:
        for each in (model, Wrapper(model), Wrapper(Wrapper(model)), model.forward):
            optimizer.zero_grad()
            each(X).square().mean().backward()
            optimizer.step()
    assert watcher.layers == ("block.attn",)


def test_calls_with_another_number_of_heads_are_another_layer_and_not_lost(tmp_path):
    attention = Attention(heads=4)

    def step(model, optimizer):
        optimizer.zero_grad()
        (model(X).square().mean() + model(X, heads=2).square().mean()).backward()
        optimizer.step()

    run = train(tmp_path / "run", step, model=attention)
    assert [(each["name"], each["n_heads"]) for each in layers_of(run)] == [("Attention", 4), ("Attention (2 heads)", 2)]  # fmt: skip
    assert run.heads.groupby("layer").size().tolist() == [3 * 4, 3 * 2]


def test_modules_that_call_themselves_equal_are_two_layers(tmp_path):
    class Equal(Attention):
        def __eq__(self, other):
            return isinstance(other, Equal)

        def __hash__(self):
            return 1

    model = nn.Sequential(Equal(), Equal())
    run = train(tmp_path / "run", plain_step, model=model)
    assert len(layers_of(run)) == 2


def test_a_layer_whose_first_call_could_not_be_measured_does_not_join_another(tmp_path):
    first, second = Attention(), Attention()
    with watch_model(path=tmp_path / "run") as watcher:
        first.to("meta")
        with pytest.raises(RuntimeError):  # of .item(), after the attention
            first(X.to("meta"))
        loss_of(second).backward()
        first.to_empty(device="cpu")
        nn.init.normal_(first.qkv.weight)
        nn.init.zeros_(first.qkv.bias)
        loss_of(first).backward()
    assert watcher.unmeasured == 0, "what is on the meta device computes nothing"
    assert watcher.layers == ("Attention", "Attention (2)")


def test_layers_are_asked_for_by_path_or_by_name(tmp_path):
    models = Generator(), Critic()
    for pattern, names in [("block.*", 2), ("Critic.*", 1), ("nothing", 0)]:
        path = tmp_path / pattern.partition(".")[0]
        with watch_model(path=path, layers=[pattern]) as watcher:
            for model in models:
                loss_of(model).backward()
        assert len(watcher.layers) == names, pattern


def test_a_script_that_makes_modules_at_every_call_fills_no_table(tmp_path, monkeypatch):
    monkeypatch.setattr("attnscope.watch.layers.MOST_LAYERS", 5)
    with watch_model(path=tmp_path / "run") as watcher:
        for _ in range(8):
            loss_of(Attention()).backward()
    assert len(watcher.layers) == 5 and watcher.unmeasured == 1


def test_several_calls_of_a_layer_in_a_step_are_as_one_call(tmp_path):
    """Sequences of other lengths and one without a second key, which has no row that can be measured."""

    def step(model, optimizer):
        optimizer.zero_grad()
        for x in (X, X[:, :1], 3 * X[:2, :4]):
            loss_of(model, x).backward()
        optimizer.step()

    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch_model(model, path=tmp_path / "run", every=1, rows="all"):
        step(model, optimizer)
    run = open_run(tmp_path / "run")
    (row,) = run.heads.to_dict("records")
    assert (row["rows"], row["rows_left_out"]) == (24 + 8, 4)
    entropy, squares, most, n_flat, n_logits = 0.0, 0.0, -1e9, 0, 0
    for x in (X, 3 * X[:2, :4]):
        q, k, _ = model.qkv(x).detach().double().chunk(3, dim=-1)
        z = q @ k.mT / 4
        entropy += -(z.softmax(-1) * z.log_softmax(-1)).sum().item()
        off = z - z.mean(-1, keepdim=True)
        squares += off.square().mean(-1).sum().item()
        n_flat, n_logits = n_flat + (off.abs() > 5).sum().item(), n_logits + z.numel()
        most = max(most, z.max().item())
    assert row["entropy"] == pytest.approx(entropy / 32, rel=1e-5)
    assert row["logit_std"] == pytest.approx((squares / 32) ** 0.5, rel=1e-5)
    assert row["logits_over_5"] == pytest.approx(n_flat / n_logits)
    assert row["max_logit"] == pytest.approx(most, rel=1e-5)
