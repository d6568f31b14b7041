"""Where NaN and Inf appear first, at steps that are not measured too, and what is kept of the steps before."""

import contextlib
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import attnscope
from attnscope.diagnose import diagnose
from attnscope.errors import ConfigError, RunError
from attnscope.runs.reader import open_run
from attnscope.runs.snapshot import Snapshot, load_snapshot, save_snapshot, snapshots_of
from attnscope.watch.attach import watch_model
from tests.watch.test_training import Small, loss_of, plain_step, train

BREAKS_AT = 27  # beyond the first steps, which are all measured, and at none of every tenth
X = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(16), Small()
        self.attn.out = nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Stack(nn.Module):
    """Two blocks; `breaks` is called with the number of the forward pass and what passes between them."""

    def __init__(self, breaks=lambda number, x: x, dropout=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 4)
        self.blocks[1].mlp[0].weight = self.blocks[0].mlp[0].weight  # tied
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.breaks, self.number = breaks, 0

    def forward(self, x, *, targets=None, options=()):
        x = self.breaks(self.number, self.dropout(self.blocks[0](x)))
        self.number += 1
        y = self.head(self.blocks[1](x))
        return y if targets is None else F.mse_loss(y, targets)


def nonfinite_of(run):
    return [
        (step, fields["tensor"], fields["direction"], fields.get("where"))
        for step, kind, fields in zip(run.events["step"], run.events["kind"], run.events["fields"], strict=True)
        if kind == "nonfinite"
    ]


def test_the_first_module_whose_output_is_not_finite_is_named(tmp_path):
    model = Stack()

    def step(model, optimizer):
        if model.number == BREAKS_AT:
            model.blocks[1].mlp[0].bias.data[3] = float("inf")  # its output, not its input
        plain_step(model, optimizer)

    run = train(tmp_path / "run", step, steps=BREAKS_AT + 3, every=10, model=model)
    events = nonfinite_of(run)
    assert [each[:3] for each in events[:3]] == [
        (BREAKS_AT, "activation", "forward"),
        (BREAKS_AT, "loss", "forward"),
        (BREAKS_AT, "gradient", "backward"),
    ]
    assert events[0][3][0] == "blocks.1.mlp.0"
    finding = next(f for f in diagnose(run) if f.rule == "nonfinite")
    assert f"at step {BREAKS_AT}, in the forward pass: activation (blocks.1.mlp.0)" in finding.summary


def test_an_output_between_modules_shows_in_the_next_one(tmp_path):
    model = Stack(breaks=lambda number, x: x / (0.0 if number == BREAKS_AT else 1.0))
    run = train(tmp_path / "run", plain_step, steps=BREAKS_AT + 2, every=10, model=model)
    (step, tensor, direction, where), *_ = nonfinite_of(run)
    assert (step, tensor, direction) == (BREAKS_AT, "activation", "forward")
    assert where[0] == "blocks.1.norm"


class Root(torch.autograd.Function):
    """x in the forward pass, NaN in the backward pass of the chosen call."""

    @staticmethod
    def forward(ctx, x, breaks):
        ctx.breaks = breaks
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (float("nan") if ctx.breaks else 1.0), None


def test_a_gradient_that_breaks_in_the_backward_pass_is_named_with_its_parameters(tmp_path):
    model = Stack(breaks=lambda number, x: Root.apply(x, number == BREAKS_AT))

    def step(model, optimizer):
        optimizer.zero_grad()
        loss_of(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # makes all of it NaN
        optimizer.step()

    run = train(tmp_path / "run", step, steps=BREAKS_AT + 1, every=10, model=model)
    ((step, tensor, direction, where),) = nonfinite_of(run)
    assert (step, tensor, direction) == (BREAKS_AT, "gradient", "backward")
    assert where and all(place.startswith("layer 0 ") for place in where), where


def test_a_gradient_whose_norm_overflows_is_finite(tmp_path):
    def step(model, optimizer):
        optimizer.zero_grad()
        (loss_of(model) * 1e25).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()

    run = train(tmp_path / "run", step, steps=2)
    assert nonfinite_of(run) == []
    assert (run.params["nonfinite"] == 0).all()
    assert 1e20 < run.steps["grad_norm"][0] < 1e30


def test_an_update_that_grad_scaler_skips_says_why_and_the_next_one_is_measured(tmp_path):
    model = Small()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    overflow = iter([False, True, False])

    def step(model, optimizer):
        optimizer.zero_grad()
        loss = loss_of(model) * (float("inf") if next(overflow) else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    run = train(tmp_path / "run", step, model=model)
    (fields,) = run.events[run.events["kind"] == "skipped_update"]["fields"]
    assert fields["where"] == ["qkv", "out"]
    assert fields["places"][0] == {"group": "qkv", "path": "qkv.weight"}
    assert not any(tensor == "gradient" for _, tensor, _, _ in nonfinite_of(run))
    assert run.params["step"].unique().tolist() == [0, 1]
    assert run.steps["grad_norm"].notna().all()
    assert (run.params["grad_norm"] > 0).all() and (run.params["nonfinite"] == 0).all()


def test_outputs_are_looked_at_in_training_only_and_once_where_checkpointing_computes_them_again(
    tmp_path,
):
    model = Stack()

    def step(model, optimizer):
        with torch.no_grad():
            model(X * float("inf"))
        optimizer.zero_grad()
        x = torch.utils.checkpoint.checkpoint(model, X, use_reentrant=False)
        x.square().mean().backward()
        optimizer.step()

    assert nonfinite_of(train(tmp_path / "run", step, model=model)) == []


def test_only_layers_with_a_name_that_was_asked_for_are_measured(tmp_path):
    for layers, expected in ((["*.1.*"], ["blocks.1.attn"]), (["blocks.?.attn"], ["blocks.0.attn", "blocks.1.attn"])):  # fmt: skip
        model = Stack()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        path = tmp_path / expected[0]
        with watch_model(model, path=path, layers=layers) as watcher:
            plain_step(model, optimizer)
        assert list(watcher.layers) == expected
        assert set(watcher.left_out) == {"blocks.0.attn", "blocks.1.attn"} - set(expected)
        assert open_run(path).heads["layer"].nunique() == len(expected)
    with pytest.raises(ConfigError, match=r"layers and stop_on are lists"):
        watch_model(path=tmp_path / "text", layers="*")


def test_a_snapshot_shows_the_break_again(tmp_path):
    """Weights, batches and random numbers of the last two steps: their losses come out bit by bit."""
    model = Stack(breaks=lambda number, x: x / (0.0 if number == 2 * BREAKS_AT + 1 else 1.0), dropout=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(5)
    losses = []
    with watch_model(model, path=tmp_path / "run", snapshot=2) as watcher:
        with torch.no_grad():
            model.eval()(X)  # is no batch
        model.train().number = 0
        for _ in range(BREAKS_AT + 4):
            optimizer.zero_grad()
            for _ in range(2):  # micro-batches
                x, y = torch.randn(2, 6, 16, generator=generator), torch.zeros(2, 6, 4)
                loss = model(x, targets=y, options=[3, {"name": "b", "one": len}]) / 2
                loss.backward()
                losses.append(2 * loss.detach())
            optimizer.step()
    paths = snapshots_of(tmp_path / "run")
    assert [path.name for path in paths] == [f"snapshot-{step:08d}.safetensors" for step in (BREAKS_AT - 1, BREAKS_AT)]
    assert list(watcher.snapshots) == paths
    (fields,) = open_run(tmp_path / "run").events.set_index("kind").loc[["snapshot"], "fields"]
    assert fields == {
        "why": f"activation not finite at step {BREAKS_AT}",
        "files": [path.name for path in paths],
    }
    for path, broken in zip(paths, (False, True), strict=True):
        snapshot = attnscope.load_snapshot(path)
        assert len(snapshot.batches) == 2 and snapshot.left_out == ["options.1.one: builtin_function_or_method"]  # fmt: skip
        twin = Stack(model.breaks, dropout=0.5)
        twin.load_state_dict(snapshot.weights)
        for number, (batch, rng) in enumerate(zip(snapshot.batches, snapshot.rng, strict=True)):
            assert (batch["options.0"], batch["options.1.name"]) == (3, "b")
            twin.number = 2 * snapshot.step + number
            torch.set_rng_state(rng)
            loss = twin(batch["x"], targets=batch["targets"])
            expected = losses[2 * snapshot.step + number]
            assert torch.equal(loss, expected) or bool(loss.isnan() and expected.isnan())
            assert bool(loss.isfinite()) != (broken and number == 1)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # Inductor
@pytest.mark.parametrize("how", ["wrapped", "itself"])
def test_snapshots_of_a_compiled_model(tmp_path, how):
    class Inner(Small):
        def forward(self, x, halved=False):
            return super().forward(x) / (2 if halved else 1)

    def losses(**keep):
        torch._dynamo.reset()
        model = Inner()
        called = torch.compile(model) if how == "wrapped" else model
        if how == "itself":
            model.compile()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = []
        with watch_model(**keep) if keep else contextlib.nullcontext():
            for step in range(8):
                x = X * (float("inf") if step == 6 else 1)
                loss = called(x, halved=True).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        return found

    plain, watched = losses(), losses(path=tmp_path / "run", snapshot=2)
    assert str(watched) == str(plain), "NaN too"
    for path, step in zip(snapshots_of(tmp_path / "run"), (5, 6), strict=True):
        snapshot = load_snapshot(path)
        twin = Inner()
        twin.load_state_dict(snapshot.weights)
        (batch,) = snapshot.batches
        assert snapshot.step == step and batch["halved"] is True
        loss = twin(**batch).square().mean()
        assert bool(loss.isfinite()) == (step == 5)
        assert loss.item() == pytest.approx(plain[step], nan_ok=True)


@pytest.mark.parametrize("ends", ["exception", "condition", "explosion", "well"])
def test_snapshots_are_written_where_training_breaks_and_only_there(tmp_path, ends):
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e3 if ends == "explosion" else 0.1)
    stop_on = ["grad_norm>0"] if ends == "condition" else []
    try:
        with watch_model(model, path=tmp_path / "run", snapshot=3, stop_on=stop_on):
            for step in range(30):
                if ends == "exception" and step == 5:
                    raise ZeroDivisionError
                plain_step(model, optimizer)
    except (ZeroDivisionError, SystemExit):
        pass
    steps = [int(path.stem.partition("-")[2]) for path in snapshots_of(tmp_path / "run")]
    run = open_run(tmp_path / "run")
    if ends == "well":
        assert steps == []
    elif ends == "explosion":
        (first,) = run.events[run.events["kind"].isin(["diverged", "nonfinite"])]["step"].head(1)
        assert len(steps) == 3 and first <= steps[-1] <= first + 2
    else:
        assert steps == {"exception": [2, 3, 4], "condition": [0]}[ends]
    assert not model._forward_pre_hooks


def test_keeping_snapshots_changes_nothing(tmp_path):
    def losses(**how):
        model = Stack(dropout=0.3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(3)
        found = []

        def go_on():
            for _ in range(5):
                optimizer.zero_grad()
                loss = loss_of(model)
                loss.backward()
                optimizer.step()
                found.append(loss.item())

        if not how:
            go_on()
        else:
            with watch_model(model, **how):
                go_on()
        return found, [p.detach().clone() for p in model.parameters()]

    plain, watched = losses(), losses(path=tmp_path / "run", snapshot=2)
    assert plain[0] == watched[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], watched[1], strict=True))


def test_a_snapshot_that_cannot_be_written_is_said_and_the_record_goes_on(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("attnscope.runs.snapshot.save_file", full)
    model = Stack(breaks=lambda number, x: x / (0.0 if number == 3 else 1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch_model(model, path=tmp_path / "run", snapshot=1) as watcher:
        for _ in range(8):
            plain_step(model, optimizer)
    run = open_run(tmp_path / "run")
    (fields,) = run.events[run.events["kind"] == "snapshot_failed"]["fields"]
    assert "no space left on device. The records are kept." in fields["reason"]
    assert len(run.steps) == 8 and watcher.failure is None
    assert [path.name for path in (tmp_path / "run" / "part-0000").glob(".*")] == []


def test_files_that_are_no_snapshots_give_one_line(tmp_path):
    good = save_snapshot(
        tmp_path,
        Snapshot(
            step=3,
            weights={"w": torch.ones(2)},
            batches=[{"x": torch.ones(1), "n": float("inf"), "none": None}],
            rng=[torch.get_rng_state()],
        ),
    )
    back = load_snapshot(good)
    assert back.step == 3 and back.batches[0]["n"] == float("inf") and back.batches[0]["none"] is None  # fmt: skip
    assert torch.equal(back.weights["w"], torch.ones(2))
    with pytest.raises(RunError, match="there is no such file"):
        load_snapshot(tmp_path / "missing")
    (tmp_path / "link").symlink_to(good)
    with pytest.raises(RunError, match="there is no such file"):
        load_snapshot(tmp_path / "link")
    whole = good.read_bytes()
    bad = tmp_path / "bad.safetensors"
    for size in (0, 7, 8, 50, len(whole) - 1):
        bad.write_bytes(whole[:size])
        with pytest.raises(RunError, match=r"bad\.safetensors: is damaged: "):
            load_snapshot(bad)
    save_file({"weights/w": torch.ones(1)}, bad)
    with pytest.raises(RunError, match="is not a snapshot of attnscope"):
        load_snapshot(bad)
    for metadata in (
        {"step": "x", "batches": "[]", "left_out": "[]"},
        {"step": "1", "batches": "[" * 10_000, "left_out": "[]"},
        {"step": "1", "batches": json.dumps([3]), "left_out": "[]"},
        {"step": "1", "batches": "[]", "left_out": "3"},
    ):
        save_file({"batches/7/x": torch.ones(1)}, bad, {"format": "attnscope snapshot 1", **metadata})
        with pytest.raises(RunError, match="is damaged"):
            load_snapshot(bad)
