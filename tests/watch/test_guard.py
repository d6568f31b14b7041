"""What goes wrong in watching costs one measurement, is said once, and keeps nothing of the script alive."""

import gc
import shutil
import subprocess
import sys
import textwrap
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD

from attnscope.errors import RunWriteError
from attnscope.runs.reader import open_run
from attnscope.watch.attach import watch_model
from tests.watch.test_training import Small, X, loss_of, plain_step, train


def not_measured(run):
    found = run.events[run.events["kind"] == "not_measured"]["fields"]
    return {fields["name"]: fields["reason"] for fields in found}


@pytest.fixture
def plain(tmp_path):
    return train(tmp_path / "plain", plain_step)


COLUMNS = ["step", "loss", "grad_norm", "lr"]


@pytest.mark.parametrize(
    ("broken", "lost"),
    [
        ("attnscope.watch.layers.measure", "heads"),
        ("attnscope.watch.steps.copy_of_scalar", "loss"),
        ("attnscope.watch.parameters.gradient_sizes", "params"),
        ("attnscope.watch.parameters.places", "params"),
        ("attnscope.watch.parameters._norms", "grad_norm"),
        ("attnscope.watch.recording.heads_of", "heads"),
        ("attnscope.watch.recording.params_of", "params"),
        ("attnscope.watch.recording.steps_of", "steps"),
        ("attnscope.signals.alarms.Alarms.look", "nothing"),
        ("attnscope.watch.recording.Layer.described", "names"),
        ("attnscope.watch.finite.Finite._add", "nothing"),
        ("attnscope.watch.finite.Outputs.broken", "nothing"),
    ],
)
@pytest.mark.parametrize("kind", [ValueError, MemoryError])
def test_one_thing_that_fails_costs_the_others_nothing(tmp_path, monkeypatch, plain, broken, lost, kind):
    def fails(*_args, **_kwargs):
        raise kind("broken\nin two lines")

    monkeypatch.setattr(broken, fails)
    run = train(tmp_path / "run", plain_step)
    assert run.status == "finished" and run.ends[0]["updates"] == 3
    assert f"{kind.__name__}: broken" in " ".join(not_measured(run).values())
    assert "two lines" not in " ".join(not_measured(run).values())
    assert sum(run.ends[0].get("measurements_failed", {"attention": 1}).values()) >= 1
    if lost != "steps":
        columns = [name for name in COLUMNS if lost not in (name, "params") or name == "step"]
        columns = [name for name in columns if name != "grad_norm" or lost not in ("params", "grad_norm")]  # fmt: skip
        assert run.steps[columns].equals(plain.steps[columns])
    assert lost == "heads" or run.heads.equals(plain.heads)
    assert lost in ("params", "grad_norm") or run.params.equals(plain.params)
    assert bool(run.lost) == (lost == "steps"), "a table that is not there is missed when the run is read"


def test_a_failure_that_comes_again_is_said_once_and_counted(tmp_path, monkeypatch):
    def fails(*_args, **_kwargs):
        raise ValueError("no")

    monkeypatch.setattr("attnscope.watch.steps.copy_of_scalar", fails)
    run = train(tmp_path / "run", plain_step, steps=50)
    assert not_measured(run) == {"loss": "ValueError: no"}
    assert run.ends[0]["measurements_failed"] == {"loss": 50}


# -- parameters of every kind --


class Odd(Small):
    """Small, with one more parameter that takes part."""

    def __init__(self, odd):
        super().__init__()
        self.odd = odd

    def forward(self, x):
        y = super().forward(x)
        return y + self.odd.abs().sum() * 1e-3 if self.odd.requires_grad else y


def test_norms_of_a_complex_parameter_are_those_of_its_absolute_values(tmp_path):
    odd = nn.Parameter(torch.tensor([3 + 4j, 1j]))
    model = Odd(odd)
    run = train(tmp_path / "run", plain_step, steps=1, model=model)
    row = run.params.set_index("group").loc["odd"]
    assert row["weight_norm"] == pytest.approx(26**0.5)
    gradient = odd.grad.abs()
    assert row["grad_norm"] == pytest.approx(gradient.norm().item())
    assert row["grad_max"] == pytest.approx(gradient.max().item())
    assert row["update_norm"] == pytest.approx(0.1 * gradient.norm().item(), rel=1e-2)
    assert not not_measured(run)


@pytest.mark.parametrize(
    "odd",
    [
        nn.Parameter(torch.zeros(0, 3)),
        nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False),
        nn.Parameter(torch.ones(2, dtype=torch.float64)),
        nn.Parameter(torch.ones(2, dtype=torch.float16)),
        nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False),
    ],
    ids=["empty", "int8", "float64", "float16", "float8"],
)
def test_parameters_of_all_kinds_are_measured_or_have_no_gradient(tmp_path, plain, odd):
    run = train(tmp_path / "run", plain_step, model=Odd(odd))
    assert not not_measured(run) and run.ends[0]["updates"] == 3
    mine = run.params[run.params["group"] != "odd"].reset_index(drop=True)
    assert len(mine) == len(plain.params)
    if odd.requires_grad and odd.numel():
        assert (run.params.set_index("group").loc["odd", "grad_norm"] > 0).all()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_sparse_gradient_and_one_without_entries_are_measured(tmp_path):
    class Embeds(Small):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 16, sparse=True)

        def forward(self, ids):
            return super().forward(self.table(ids))

    def step(model, optimizer):
        optimizer.zero_grad()
        loss_of(model, torch.tensor([[1, 2, 2, 5]])).backward()
        optimizer.step()

    model = Embeds()
    run = train(tmp_path / "run", step, steps=1, model=model)
    row = run.params.set_index("group").loc["table"]
    dense = model.table.weight.grad.to_dense()
    assert row["grad_norm"] == pytest.approx(dense.norm().item(), rel=1e-5)
    assert row["grad_max"] == pytest.approx(dense.abs().max().item(), rel=1e-5)

    def empty(model, optimizer):
        optimizer.zero_grad()
        loss_of(model, torch.tensor([[1, 2]])).backward()
        model.table.weight.grad = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 16), (9, 16))  # fmt: skip
        optimizer.step()

    run = train(tmp_path / "empty", empty, steps=1, model=Embeds())
    assert run.params.set_index("group").loc["table", "grad_norm"] == 0
    assert not not_measured(run)


def test_a_parameter_that_cannot_be_measured_is_left_out_and_named(tmp_path, plain):
    model = Small()
    model.far = nn.Parameter(torch.ones(3, device="meta"))

    def step(model, optimizer):
        optimizer.zero_grad()
        loss_of(model).backward()
        model.far.grad = torch.ones(3, device="meta")
        optimizer.step()

    optimizer = SGD([model.far, *model.qkv.parameters(), *model.out.parameters()], lr=0.1)
    run = train(tmp_path / "run", step, model=model, optimizer=optimizer)
    assert run.steps[COLUMNS].equals(plain.steps[COLUMNS]) and run.params.equals(plain.params)
    assert not_measured(run) == {"parameter far": "it is on the meta device and has no numbers"}


def test_a_model_on_the_meta_device_is_no_training(tmp_path, plain):
    with torch.device("meta"):
        copy = Small()
        far = SGD(copy.parameters(), lr=0.1)

    def step(model, optimizer):
        far.zero_grad()
        loss_of(copy, X.to("meta")).backward()
        far.step()
        plain_step(model, optimizer)

    run = train(tmp_path / "run", step)
    assert run.steps[COLUMNS].equals(plain.steps[COLUMNS]) and run.params.equals(plain.params)
    assert run.heads.drop(columns="layer").equals(plain.heads.drop(columns="layer"))
    assert run.ends[0]["updates"] == 3
    assert set(not_measured(run).values()) == {"it is on the meta device and has no numbers"}


def test_fake_tensors_are_no_training(tmp_path, plain):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def step(model, optimizer):
        with FakeTensorMode():
            copy = Small()
            loss_of(copy, torch.randn(4, 6, 16)).backward()
            SGD(copy.parameters(), lr=0.1).step()
        plain_step(model, optimizer)

    run = train(tmp_path / "run", step)
    assert run.status == "finished" and run.ends[0]["updates"] == 3
    assert run.steps[COLUMNS].equals(plain.steps[COLUMNS]) and run.params.equals(plain.params)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_attention_inside_torch_func_is_measured_or_said(tmp_path, plain):
    def step(model, optimizer):
        weights = {name: p.detach() for name, p in model.named_parameters()}

        def loss(w, x):
            return torch.func.functional_call(model, w, (x,)).square().mean()

        torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, X[:, None])
        found = torch.func.grad(loss)(weights, X)
        for name, p in model.named_parameters():
            p.grad = found[name]
        optimizer.step()

    run = train(tmp_path / "run", step)
    assert run.status == "finished" and len(run.steps) == 3
    assert run.heads["entropy"].tolist() == pytest.approx(plain.heads["entropy"].tolist(), rel=1e-5)
    assert "vmap" in not_measured(run)["Small"]


def test_a_default_device_and_modes_of_the_script_do_not_reach_what_is_computed(tmp_path, plain):
    from torch.utils.flop_counter import FlopCounterMode

    counts = []

    def step(model, optimizer):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            plain_step(model, optimizer)
        counts.append(counter.get_total_flops())

    alone = Small()
    step(alone, SGD(alone.parameters(), lr=0.1))
    run = train(tmp_path / "run", step)
    assert counts == [counts[0]] * 4
    assert run.steps[COLUMNS].equals(plain.steps[COLUMNS]) and run.params.equals(plain.params)
    assert run.heads.equals(plain.heads) and not not_measured(run)


# -- what is written --


def test_a_size_that_is_a_symbol_is_written_as_text(tmp_path):
    x = torch.nested.nested_tensor([torch.randn(n, 4) for n in (5, 3)], layout=torch.jagged)
    with watch_model(path=tmp_path / "run") as watcher:
        watcher._on_unmeasured(None, "sdpa", [list(x.shape)], "nested tensors")
    (fields,) = open_run(tmp_path / "run").events.query("kind == 'not_measured'")["fields"]
    assert fields["shapes"] == [[2, str(x.shape[1]), 4]]


def test_after_the_disk_refused_something_training_goes_on_and_nothing_is_kept_alive(tmp_path, monkeypatch):
    monkeypatch.setattr("attnscope.watch.watcher.FLUSH_SECONDS", 0.0)

    class Batch:
        pass

    def go():
        batch = Batch()
        model = Small()
        optimizer = SGD(model.parameters(), lr=0.1)
        for n in range(4):
            if n == 2:
                shutil.rmtree(tmp_path / "run")
            plain_step(model, optimizer)
        return weakref.ref(batch), weakref.ref(model)

    with watch_model(path=tmp_path / "run") as watcher:
        with pytest.warns(RuntimeWarning, match="no longer watches: .* run directory was taken away"):
            refs = go()
        gc.collect()
    assert isinstance(watcher.failure, RunWriteError)
    assert [ref() for ref in refs] == [None, None]


def test_a_failure_keeps_no_frame_of_the_script_alive(tmp_path, monkeypatch):
    def fails(*_args, **_kwargs):
        raise ValueError("no")

    monkeypatch.setattr("attnscope.watch.layers.measure", fails)
    monkeypatch.setattr("attnscope.watch.steps.copy_of_scalar", fails)

    class Batch:
        pass

    def go():
        batch, model = Batch(), Small()
        plain_step(model, SGD(model.parameters(), lr=0.1))
        return weakref.ref(batch), weakref.ref(model)

    with watch_model(path=tmp_path / "run") as watcher:
        refs = go()
        gc.collect()
        assert [ref() for ref in refs] == [None, None]
    assert watcher.failure is None and watcher.failed == ("loss: ValueError: no",)


# -- threads --


def test_of_two_threads_that_train_at_once_one_is_recorded_and_that_is_said(tmp_path):
    steps = 30
    results = {}
    turn = threading.Barrier(2)

    def train_one(name):
        torch.manual_seed(ord(name))
        model = Small()
        optimizer = SGD(model.parameters(), lr=0.1 if name == "a" else 0.2)
        losses = []
        for _ in range(steps):
            turn.wait()
            optimizer.zero_grad()
            loss = loss_of(model)
            turn.wait()  # both have computed, none has updated
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results[name] = losses, optimizer.param_groups[0]["lr"]

    with watch_model(path=tmp_path / "run") as watcher:
        threads = [threading.Thread(target=train_one, args=name) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    run = open_run(tmp_path / "run")
    assert watcher.failure is None and run.ends[0]["updates"] == steps
    (name,) = [name for name, (_, lr) in results.items() if lr == pytest.approx(run.steps["lr"][0])]
    assert run.steps["loss"].tolist() == pytest.approx(results[name][0], rel=1e-6)
    assert run.steps["lr"].nunique() == 1
    assert "another thread trains" in not_measured(run)["training"]


def test_a_training_that_moves_from_thread_to_thread_is_one(tmp_path):
    model = Small()
    optimizer = SGD(model.parameters(), lr=0.1)
    stay = threading.Event()

    def some():
        for _ in range(3):
            plain_step(model, optimizer)

    def some_and_stay(done):
        some()
        done.set()
        stay.wait(60)

    with watch_model(model, path=tmp_path / "run") as watcher:
        some()
        threads = []
        for _ in range(2):
            done = threading.Event()
            threads.append(threading.Thread(target=some_and_stay, args=(done,)))
            threads[-1].start()
            assert done.wait(60)
        some()
        stay.set()
        for thread in threads:
            thread.join()
    assert watcher.updates == 12 and watcher.failed == ()
    assert len(open_run(tmp_path / "run").steps) == 12


def test_trainings_in_threads_one_after_another_are_all_recorded(tmp_path):
    def train_one():
        model = Small()
        optimizer = SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            plain_step(model, optimizer)

    with watch_model(path=tmp_path / "run") as watcher:
        for _ in range(3):
            thread = threading.Thread(target=train_one)
            thread.start()
            thread.join()
    assert watcher.updates == 9 and watcher.failed == ()
    assert len(watcher.layers) == 3


# -- the end --


@pytest.mark.parametrize(
    ("ending", "status", "code"),
    [("", "finished", 0), ("raise ValueError('no data')", "failed", 1), ("raise SystemExit(3)", "finished", 3)],
)  # fmt: skip
def test_a_watcher_that_nobody_stopped_says_how_the_process_ended(tmp_path, ending, status, code):
    program = f"""
        import torch
        import attnscope
        from torch import nn

        attn = nn.MultiheadAttention(16, 2)
        optimizer = torch.optim.SGD(attn.parameters(), lr=0.1)
        attnscope.watch_model(attn, optimizer, "run")
        x = torch.randn(5, 2, 16)
        attn(x, x, x)[0].sum().backward()
        optimizer.step()
        {ending}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, timeout=300, check=False, capture_output=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr.decode()
    run = open_run(tmp_path / "run")
    assert run.status == status and len(run.steps) == 1
    assert run.ends[0].get("error") == ("ValueError: no data" if status == "failed" else None)


def test_the_device_is_the_one_that_is_trained_on(tmp_path):
    run = train(tmp_path / "run", plain_step, steps=1)
    (fields,) = run.events[run.events["kind"] == "optimizer"]["fields"]
    assert fields["devices"] == ["cpu"] and "device" not in run.environment


def test_columns_that_stay_empty_are_listed_with_their_reasons(tmp_path):
    run = train(tmp_path / "run", plain_step)
    (fields,) = run.events[run.events["kind"] == "not_recorded"]["fields"]
    empty = {name for name in run.steps if run.steps[name].isna().all()}
    assert empty == {"val_loss", "output_logit_max", "log_z", "activation_rms_max", "token_cosine"}
    assert set(fields) == {*empty, "tokens", "table layers"}
    assert all(reason for reason in fields.values())
