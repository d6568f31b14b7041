"""THE loop: members do not know of each other, the recorder changes nothing, a resumed run is the same run."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attnscope
from attnscope.config import parse_table
from attnscope.config.members import members_of
from attnscope.data import open_data
from attnscope.diagnose import diagnose
from attnscope.model import apart
from attnscope.runs.reader import open_run
from attnscope.signals.alarms import Alarms
from attnscope.train import evaluation, loop
from attnscope.train.recording import Recorder
from attnscope.train.run import resume_run, train_run
from tests import reference
from tests.train.small import PAIR, small

EVERYTHING = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": {"name": "adamw"}, "model": {"norm": "pre", "position": "rope"}},
        {"optimizer": {"name": "muon", "weight_decay": 0.1, "z_loss": 1e-4}},
        {"clip": {"threshold": 1.0}, "attention": {"qk_clip": 5.0, "dropout": 0.1}},
        {"clip": {"mode": "adaptive", "threshold": 2.5}, "optimizer": {"schedule": "cosine"}},
        {"precision": {"dtype": "float16", "loss_scaling": True}},
        {"precision": {"dtype": "bfloat16"}, "attention": {"backend": "sdpa"}},
        {
            "model": {"kind": "encoder"},
            "attention": {"mask": "padding"},
            "data": {"objective": "masked"},
        },
        {"attention": {"scale": "learned", "qk_norm": True, "logit_softcap": 20.0}},
    ],
    ids=lambda changes: "+".join(changes) or "default",
)


def losses_of(config, *, records=False, steps=None):
    """Train without a run directory: the loss of every step, (S, M)."""
    members = members_of(parse_table(config))
    part = loop.Part(
        [member.config for member in members],
        vocab_size=_data(members[0].config).vocab_size,
    )
    data = _data(members[0].config)
    recorder = Recorder(members[0].config) if records else None
    losses = []
    original = loop.run_step

    def spy(*args, **kwargs):
        losses.append(original(*args, **kwargs))
        return losses[-1]

    loop.run_step = spy
    try:
        for _ in range(steps or members[0].config.train.steps):
            loop.train_step(part, part.setup, data, recorder)
    finally:
        loop.run_step = original
    return torch.stack(losses)


def _data(config):
    return open_data(config.data, seq_len=config.model.seq_len)


@pytest.mark.parametrize("rows", [1, 8, "all"])
@EVERYTHING
def test_the_recorder_never_changes_training(rows, changes):
    config = small(**changes, train={"steps": 6, "seed": 3}, record={"rows": rows})
    with_recorder = losses_of(config, records=True)
    assert torch.equal(with_recorder, losses_of(config))


@EVERYTHING
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, changes):
    config = parse_table(small(**changes, train={"steps": 14, "checkpoint_every": 5, "seed": 1}))
    train_run(config, tmp_path / "whole")
    stopped_after = iter(range(100))
    status = train_run(config, tmp_path / "cut", should_stop=lambda: next(stopped_after) == 8)
    assert status == "interrupted"
    assert resume_run(tmp_path / "cut") == "finished"
    whole, cut = open_run(tmp_path / "whole"), open_run(tmp_path / "cut")
    assert list(cut.steps["step"]) == list(range(14))
    for column in ("loss", "grad_norm", "clip_factor", "lr", "loss_scale", "tokens", "log_z"):
        assert np.array_equal(whole.steps[column], cut.steps[column], equal_nan=True), column
    last = "part-0000/checkpoint-00000010.safetensors"
    assert (tmp_path / "whole" / last).read_bytes() == (tmp_path / "cut" / last).read_bytes()
    # What is derived from a block of records at once may differ in its last bit, as blocks begin at other steps.
    for table in ("heads", "layers", "params"):
        pd.testing.assert_frame_equal(getattr(whole, table), getattr(cut, table), rtol=1e-5)


def test_members_follow_their_solo_runs_also_beside_one_that_explodes():
    arms = [*PAIR, {"name": "other seed", "train": {"seed": 5}}]
    together = losses_of({"arm": arms, "train": {"steps": 20}})
    assert not together[:, 0].isfinite().all(), "the neighbour was meant to explode"
    for position, seed in ((1, 0), (2, 5)):
        alone = losses_of({"train": {"steps": 20, "seed": seed}})[:, 0]
        assert ((together[:, position] - alone).abs() / alone).max() < 1e-4


def test_a_member_that_is_lost_is_dropped_and_the_others_go_on(tmp_path):
    run = attnscope.train_model({"arm": PAIR, "train": {"steps": 40}, "model": {"seq_len": 16}}, path=tmp_path / "run")
    unscaled, scaled = run.members
    assert unscaled.status == "diverged" and scaled.last_step == 39
    dropped = run.events[run.events["kind"] == "dropped"]
    assert list(dropped["member"]) == ["unscaled"]
    recorded = run.steps[run.steps["member"] == "unscaled"]["step"]
    assert recorded.max() == dropped["step"].iloc[0] < unscaled.nonfinite_at + loop.CHECK_EVERY
    assert len(run.steps[run.steps["member"] == "scaled"]) == 40


def test_when_all_are_gone_the_run_ends_early(tmp_path):
    run = attnscope.train_model(small(optimizer={"lr": 1e6}, train={"steps": 1000}), path=tmp_path / "run")
    assert run.status == "finished"
    assert run.members[0].status == "diverged"
    assert run.steps["step"].max() < 50


def test_events_name_the_first_tensor_that_broke(tmp_path):
    run = attnscope.train_model(small(optimizer={"lr": 1e6}), path=tmp_path / "run")
    broken = run.events[run.events["kind"] == "nonfinite"]
    tensors = {fields["tensor"] for fields in broken["fields"]}
    assert {"loss", "gradient"} <= tensors
    where = next(f["where"] for f in broken["fields"] if f["tensor"] == "gradient")
    assert where and all(isinstance(name, str) for name in where)
    assert (run.events["kind"] == "diverged").sum() == 1


def test_one_step_of_the_default_model_gives_the_reference_numbers(tmp_path):
    """If a change of the model, the data or the seeds is meant, replace the numbers; otherwise it is a bug."""
    run = attnscope.train_model(
        {"data": {"source": "markov"}, "train": {"steps": 1}, "record": {"rows": "all"}},
        path=tmp_path / "run",
    )
    step = run.steps.iloc[0]
    measured = {
        "loss": step["loss"],
        "grad_norm": step["grad_norm"],
        "log_z": step["log_z"],
        "activation_rms_max": step["activation_rms_max"],
        "token_cosine": step["token_cosine"],
        "entropy": run.heads["entropy"].mean(),
        "max_prob": run.heads["max_prob"].mean(),
        "logit_std": run.heads["logit_std"].mean(),
    }
    assert measured == pytest.approx(REFERENCE_STEP, rel=2e-3)


REFERENCE_STEP = {
    "loss": 20.735,
    "grad_norm": 168.64,
    "log_z": 20.137,
    "activation_rms_max": 7.3773,
    "token_cosine": 0.40800,  # over four of the sixteen sequences
    "entropy": 0.81448,
    "max_prob": 0.72113,
    "logit_std": 6.9038,
}


class HostReads(TorchDispatchMode):
    """Counts operations that make the host wait for a number."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        ):
            self.count += 1
        return function(*args, **(kwargs or {}))


@EVERYTHING
def test_no_host_sync_inside_the_step(changes):
    members = members_of(parse_table(small(**changes)))
    data = _data(members[0].config)
    part = loop.Part([member.config for member in members], vocab_size=data.vocab_size)
    recorder = Recorder(members[0].config)
    batch = data.train_batch(0)
    with HostReads() as reads:
        recorder.begin(0, batch, part.setup.grouping)
        loop.run_step(part.setup, part.parameters, part.state, batch, step=0, observer=recorder)
        recorder.end()
    assert reads.count == 0


def test_the_host_sync_test_can_fail():
    with HostReads() as reads:
        torch.ones(1).item()
    assert reads.count == 1


def test_a_step_that_was_broken_off_leaves_no_half_row():
    members = members_of(parse_table(small()))
    data = _data(members[0].config)
    part = loop.Part([members[0].config], vocab_size=data.vocab_size)
    recorder = Recorder(members[0].config)
    loop.train_step(part, part.setup, data, recorder)
    recorder.begin(1, data.train_batch(1), part.setup.grouping)  # and never ends
    block, tables = recorder.flush([0])
    assert block.steps.tolist() == [0]
    assert tables["steps"]["step"].tolist() == [0]


def test_records_of_a_crash_are_kept(tmp_path, monkeypatch):
    original = loop.run_step

    def crash(*args, step, **kwargs):
        if step == 7:
            raise ZeroDivisionError("boom")
        return original(*args, step=step, **kwargs)

    monkeypatch.setattr(loop, "run_step", crash)
    with pytest.raises(ZeroDivisionError):
        attnscope.train_model(small(), path=tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run.status == "failed"
    assert run.steps["step"].tolist() == list(range(7))


def test_record_every_n_steps_thins_heads_and_params_only(tmp_path):
    run = attnscope.train_model(small(record={"every": 4}), path=tmp_path / "run")
    assert run.steps["step"].tolist() == list(range(12))
    for table in (run.heads, run.layers, run.params):
        assert sorted(set(table["step"])) == [0, 4, 8]
    assert run.steps["grad_norm"].notna().all()


def test_tables_are_what_the_metrics_say(tmp_path):
    """One step, looked at by hand: the recorded numbers are those of the step's own tensors."""
    config = small(arm=PAIR, train={"steps": 1}, record={"rows": "all"})
    run = attnscope.train_model(config, path=tmp_path / "run")
    members = members_of(parse_table(config))
    data = _data(members[0].config)
    part = loop.Part([member.config for member in members], vocab_size=data.vocab_size)
    weights = {name: value.detach().clone() for name, value in part.parameters.items()}
    loop.train_step(part, part.setup, data, None)
    moved = {name: part.parameters[name].detach() - weights[name] for name in weights}
    weights, moved = apart(weights), apart(moved)
    for m, name in enumerate(("unscaled", "scaled")):
        table = run.params[run.params["member"] == name].set_index(["layer", "group"])
        for layer in range(2):
            for group in ("q", "mlp_out"):
                row = table.loc[layer, group]
                assert row["weight_norm"] == pytest.approx(float(weights[group][m, layer].norm()))
                assert row["update_norm"] == pytest.approx(float(moved[group][m, layer].norm()), rel=1e-3)
                assert row["grad_norm"] * 1e-3 == pytest.approx(row["update_norm"], rel=1e-3)
        total = math.sqrt((table["grad_norm"] ** 2).sum())
        step = run.steps[run.steps["member"] == name].iloc[0]
        assert step["grad_norm"] == pytest.approx(total, rel=1e-5)
        heads = run.heads[run.heads["member"] == name]
        assert len(heads) == 2 * 2
        forms = [
            reference.form_update_ratio(
                *(x[part][m, layer].unflatten(-1, (2, -1)).transpose(0, 1) for x in (weights, moved) for part in "qk")
            )
            for layer in range(2)
        ]
        assert heads["attn_form_update_ratio"].tolist() == pytest.approx([x for each in forms for x in each], rel=1e-3)
        assert (heads["rows"] == 4 * 11).all() and (heads["rows_left_out"] == 4).all()


def test_the_layers_table_is_the_residual_stream_after_each_layer():
    config = small(arm=PAIR, data={"batch_size": 6})
    members = members_of(parse_table(config))
    data = _data(members[0].config)
    part = loop.Part([member.config for member in members], vocab_size=data.vocab_size)
    passed = []

    class Keeping(Recorder):
        def residual(self, layer, x_MND):
            passed.append(x_MND.detach().clone())
            super().residual(layer, x_MND)

    recorder = Keeping(members[0].config)
    loop.train_step(part, part.setup, data, recorder)
    _, tables = recorder.flush([0, 1])
    table = pd.DataFrame(tables["layers"]).set_index(["member", "layer"])
    assert len(table) == 4 and len(passed) == 2
    steps = pd.DataFrame(tables["steps"]).set_index("member")
    for layer, x_MND in enumerate(passed):
        for m, x_ND in enumerate(x_MND):
            row = table.loc[m, layer]
            assert row["activation_rms"] == pytest.approx(float(x_ND.square().mean().sqrt()))
            four_BTD = x_ND.unflatten(0, (6, -1))[:4]
            expected = reference.token_cosine(four_BTD)
            assert row["token_cosine"] == pytest.approx(expected, abs=1e-5)
    largest = table["activation_rms"].groupby("member").max()
    assert largest.tolist() == steps["activation_rms_max"].tolist()
    last = table.xs(1, level="layer")["token_cosine"]
    assert last.tolist() == steps["token_cosine"].tolist()


def test_padded_queries_are_left_out_with_and_without_a_padding_mask(tmp_path):
    for mask in ("padding", "none"):
        config = small(
            model={"kind": "encoder"},
            attention={"mask": mask},
            data={"objective": "masked"},
            train={"steps": 2},
            record={"rows": "all"},
        )
        run = attnscope.train_model(config, path=tmp_path / mask)
        assert (run.heads["rows_left_out"] > 0).all()
        assert (run.heads["rows"] + run.heads["rows_left_out"] == 4 * 12).all()
        assert run.heads["entropy_ratio"].between(0, 1).all()


def test_evaluation_does_not_touch_training(tmp_path):
    plain = losses_of(small())
    config = small(train={"eval_every": 3, "eval_lengths": [1, 2]}, model={"position": "rope"})
    run = attnscope.train_model(config, path=tmp_path / "run")
    assert run.steps["val_loss"].notna().tolist() == [s % 3 == 0 for s in range(12)]
    twin = losses_of(small(model={"position": "rope"}))
    assert np.array_equal(run.steps["loss"], twin[:, 0].numpy())
    assert not torch.equal(plain, twin)
    evaluations = run.events[run.events["kind"] == "evaluation"]
    assert [fields["seq_len"] for fields in evaluations["fields"]] == [12, 24]


def test_learned_positions_are_not_asked_beyond_their_table(tmp_path):
    config = small(train={"eval_lengths": [1, 2, 4]})
    run = attnscope.train_model(config, path=tmp_path / "run")
    evaluations = run.events[run.events["kind"] == "evaluation"]
    assert [fields["seq_len"] for fields in evaluations["fields"]] == [12]


def test_loss_from_prefixes_is_the_held_out_loss_under_a_causal_mask_and_not_without():
    found = {}
    for mask in ("causal", "none"):
        config = members_of(parse_table(small(attention={"mask": mask})))[0].config
        data = _data(config)
        part = loop.Part([config], vocab_size=data.vocab_size)
        whole = evaluation.held_out_loss(part.setup, part.parameters, data, seq_len=12)
        found[mask] = (
            evaluation.loss_from_prefixes(part.setup, part.parameters, data).item(),
            whole.item(),
        )
    assert found["causal"][0] == pytest.approx(found["causal"][1], rel=1e-4)
    assert abs(found["none"][0] - found["none"][1]) > 1e-3


def test_generation_is_deterministic_and_differs_between_members(tmp_path):
    texts = []
    for name in ("a", "b"):
        config = small(
            train={"sample_tokens": 20, "steps": 2},
            arm=[{"name": "one"}, {"name": "two", "train": {"seed": 9}}],
        )
        run = attnscope.train_model(config, path=tmp_path / name)
        made = run.events[run.events["kind"] == "generation"]["fields"].tolist()
        texts.append([fields["text"] for fields in made])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_a_run_on_disk_is_small():
    config = small(
        model={"d_model": 128, "n_layers": 4, "n_heads": 4, "seq_len": 64, "d_ff": 32},
        data={"batch_size": 2},
        train={"steps": 20},
    )
    members = members_of(parse_table(config))
    data = _data(members[0].config)
    part = loop.Part([members[0].config], vocab_size=data.vocab_size)
    recorder = Recorder(members[0].config)
    for _ in range(20):
        loop.train_step(part, part.setup, data, recorder)
    _, tables = recorder.flush([0])
    from attnscope.runs.streams import encode_batch, encode_schema

    size = sum(len(encode_schema(table)) + len(encode_batch(table, each)) for table, each in tables.items())
    assert size / 20 * 1000 < 3_000_000


def test_alarms_do_not_depend_on_how_steps_are_cut_into_blocks():
    alarms = Alarms()
    ones = np.ones(1), np.ones(1)
    losses = [5.0, 4.0, 110.0, 1200.0, 13e3, math.nan]
    events = []
    for step, loss in enumerate(losses):
        events += alarms.feed(0, np.array([step]), np.array([loss]), *ones)
    assert [(event.step, event.kind) for event in events] == [(2, "diverged")]


OVERFLOWING = {  # large weights in float16: now and then the forward pass of a batch overflows
    "model": {"d_model": 64, "n_layers": 2, "n_heads": 2, "seq_len": 12},
    "data": {"batch_size": 4},
    "attention": {"scale": "none"},
    "init": {"gain": 2.1},
    "optimizer": {"lr": 3e-4},
    "precision": {"dtype": "float16", "loss_scaling": True},
    "train": {"steps": 45, "checkpoint_every": 20},
}


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A run, and a member of it that overflows now and then: which one does depends on the last bit of the machine's sums."""
    arms = [
        {"name": f"gain {gain} seed {seed}", "init": {"gain": gain}, "train": {"seed": seed}}
        for gain in (2.2, 2.3)
        for seed in range(5)
    ]
    run = attnscope.train_model(OVERFLOWING | {"arm": arms}, path=tmp_path_factory.mktemp("runs") / "run")
    for member in run.members:
        losses = run.steps["loss"].to_numpy()[(run.steps["member"] == member.name).to_numpy()]
        if member.status == "stalled" and len(breaks_of(losses)) > 1:
            return run, member
    raise AssertionError("some of the steps were meant to overflow")


def breaks_of(losses):
    """Steps at which a loss stops being finite."""
    bad = ~np.isfinite(losses)
    return np.flatnonzero(bad & ~np.r_[False, bad[:-1]])


def test_a_step_that_loss_scaling_skips_is_no_divergence(overflowing):
    run, member = overflowing
    losses = run.steps["loss"].to_numpy()[(run.steps["member"] == member.name).to_numpy()]
    skipped = np.flatnonzero(~np.isfinite(losses))
    assert (member.status, member.diverged_at, member.last_step) == ("stalled", None, 44)
    assert math.isfinite(member.final_loss) and member.nonfinite_at == skipped[0]
    assert not set(run.events["kind"][run.events["member"] == member.name]) & {"diverged", "dropped"}
    finite = losses[np.isfinite(losses)]
    assert finite[-5:].mean() < finite[0], "it went on to learn"
    rules = {finding.rule for finding in diagnose(run) if member.name in finding.members}
    assert "nonfinite_loss_passed" in rules and not rules & {"nonfinite", "loss_explosion"}


def test_each_time_that_numbers_break_is_an_event(overflowing):
    run, member = overflowing
    losses = run.steps["loss"].to_numpy()[(run.steps["member"] == member.name).to_numpy()]
    events = run.events[(run.events["kind"] == "nonfinite") & (run.events["member"] == member.name)]
    said = events[[fields["tensor"] == "loss" for fields in events["fields"]]]
    assert said["step"].tolist() == breaks_of(losses).tolist()


def test_losses_that_overflow_for_good_are_dropped_with_finite_weights(tmp_path):
    config = OVERFLOWING | {"init": {"gain": 8.0}, "train": {"steps": 100}}
    run = attnscope.train_model(config, path=tmp_path / "run")
    (member,) = run.members
    assert (member.status, member.diverged_at, member.last_step) == ("diverged", 0, 9)
    assert np.isfinite(run.params["weight_norm"]).all()
    assert (run.events["kind"] == "diverged").sum() == (run.events["kind"] == "dropped").sum() == 1


def test_an_error_in_training_is_told_by_name(tmp_path, monkeypatch):
    real, calls = loop.run_step, []

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise ValueError("the data is broken")
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "run_step", broken)
    with pytest.raises(ValueError, match="the data is broken"):
        attnscope.train_model(small(), path=tmp_path / "run")
    run = open_run(tmp_path / "run")
    (member,) = run.members
    assert (run.status, member.status, member.last_step) == ("failed", "failed", 2)
    assert member.error == "ValueError: the data is broken"
    assert [f.summary for f in diagnose(run) if f.rule == "failed"] == [
        f"{member.name} failed after step 2: ValueError: the data is broken"
    ]


def test_the_run_directory_repeats_the_config(tmp_path):
    config = parse_table(small(arm=PAIR))
    train_run(config, tmp_path / "run", command=("attnscope", "train"))
    run = open_run(tmp_path / "run")
    assert run.config == config
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["fingerprint"]["sha256"]
    again = attnscope.train_model(tmp_path / "run" / "config.toml", path=tmp_path / "again")
    assert np.array_equal(run.steps["loss"], again.steps["loss"])
