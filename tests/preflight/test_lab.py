"""Preflight of a config: what it says before training, and that it leaves nothing behind."""

import tempfile
from pathlib import Path

import pytest
import torch

import attnscope
from attnscope.config import Config, load_config, parse_table, with_control
from attnscope.preflight import memory
from attnscope.preflight.lab import preflight_config
from attnscope.preflight.rehearsal import rehearse
from attnscope.preflight.theory import TOLD
from tests.train.small import PAIR, small

CONFIGS = Path(__file__).parent.parent.parent / "configs"
MARKOV = {"source": "markov", "batch_size": 4}


def of(**sections):
    return preflight_config(parse_table(small(data=MARKOV, **sections)))


def rules(said):
    return {finding.rule: finding.severity for finding in said.diagnosis.findings}


def quantities(expected):
    return {quantity.name: quantity for quantity in expected.quantities}


def test_the_default_without_its_scale_is_called_out_before_training():
    said = preflight_config(with_control(Config()))
    assert not said.ready and not said.failed
    assert rules(said) == {"applied_scale": "warning", "saturated_at_start": "warning", "first_loss_too_high": "note"}
    by_rule = {finding.rule: finding for finding in said.diagnosis.findings}
    assert by_rule["applied_scale"].members == by_rule["saturated_at_start"].members == ("unscaled",)
    assert [[finding.rule for finding in chain] for chain in said.diagnosis.chains] == [
        ["applied_scale", "saturated_at_start"]
    ]
    unscaled, scaled = said.members
    for member in said.members:
        loss = quantities(member)["first_loss"]
        assert loss.predicted == pytest.approx(loss.measured, rel=0.15)
        assert loss.measured > 3 * dict(loss.compared)["ln V"]
    spreads = [member.layers[0].quantities[0] for member in (unscaled, scaled)]
    assert [spread.name for spread in spreads] == ["logit_std"] * 2
    assert spreads[0].measured / spreads[1].measured == pytest.approx(8)
    assert spreads[0].predicted / spreads[1].predicted == pytest.approx(8)


def test_a_healthy_config_that_ships_is_ready():
    said = preflight_config(load_config(CONFIGS / "hybrid_windows.toml"))
    assert said.ready and not rules(said)
    assert {check.status for _, check in said.checks} == {"passed"}


def test_float16_that_comes_close_to_its_largest_number_is_named():
    config = load_config(CONFIGS / "fp16_overflow.toml")
    arms = tuple(arm for arm in config.arms if arm.name in ("float32", "float16"))
    table = {**attnscope_table(config), "arm": [{"name": a.name, **nested(a.changes)} for a in arms]}
    config = parse_table({**table, "model": {**table["model"], "n_layers": 2}})
    said = preflight_config(config)
    found = {finding.rule: finding for finding in said.diagnosis.findings}
    assert found["half_precision_headroom"].members == ("float16",)
    product = quantities(said.members[1])["largest q.k"]
    assert product.compared == (("largest float16", 65_504.0),)
    assert product.measured > 0.5 * 65_504 and product.predicted == pytest.approx(product.measured, rel=0.3)
    assert quantities(said.members[1])["max_logit"].measured == pytest.approx(product.measured / 8, rel=1e-3)


def attnscope_table(config):
    from attnscope.config import to_table

    return {name: section for name, section in to_table(config).items() if name != "arm"}


def nested(changes):
    table = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        table.setdefault(section, {})[name] = value
    return table


def test_a_decoder_that_sees_the_future_is_not_ready():
    said = of(attention={"mask": "none"}, model={"norm": "pre"})
    assert not said.ready and [check.name for check in said.failed] == ["future leak"]
    assert rules(said)["future_visible"] == "error"


def test_padding_that_is_attended_fails_its_check():
    arms = [{"name": "hidden", "attention": {"mask": "padding"}}, {"name": "seen", "attention": {"mask": "none"}}]
    config = load_config(CONFIGS / "bert_padding.toml")
    table = {**attnscope_table(config), "arm": arms}
    table["model"] = {**table["model"], "d_model": 16, "n_layers": 1}
    said = preflight_config(parse_table(table))
    status = {(member, check.name): check.status for member, check in said.checks}
    assert status["hidden", "padding leak"] == "passed" and status["seen", "padding leak"] == "failed"
    assert status["hidden", "future leak"] == "stated", "an encoder may look ahead"


def test_what_is_measured_is_what_training_records_first(tmp_path):
    table = small(data=MARKOV, arm=PAIR, record={"rows": "all"}, train={"steps": 2, "checkpoint_every": 0})
    run = attnscope.train_model(table, path=tmp_path / "run")
    said = preflight_config(parse_table(table))
    for member in said.members:
        heads = run.heads[(run.heads["member"] == member.member) & (run.heads["step"] == 0)]
        for layer in member.layers:
            for quantity in layer.quantities[: len(TOLD)]:
                column = heads[heads["layer"] == layer.layer][quantity.name]
                expected = column.max() if quantity.name == "max_logit" else column.mean()
                assert quantity.measured == pytest.approx(expected, rel=1e-5), quantity.name
        params = run.params[(run.params["member"] == member.member) & (run.params["step"] == 0)]
        by_place = {(row.layer, row.group): row.grad_norm for row in params.itertuples()}
        told = {(each.layer, each.group): each.norm for each in member.gradients}
        assert told == pytest.approx(by_place)


def test_while_the_learning_rate_warms_up_both_updates_are_told():
    said = of(model={"norm": "pre"}, optimizer={"name": "adamw", "lr": 1e-2, "warmup_steps": 10})
    ratios = [each for each in said.members[0].quantities if each.name == "update_ratio, typical"]
    (_, first), (_, peak) = (ratio.compared[0] for ratio in ratios)
    assert (first, peak) == (pytest.approx(1e-3), 1e-2)
    assert ratios[1].measured == pytest.approx(10 * ratios[0].measured, rel=1e-4)
    for ratio in ratios:
        assert ratio.predicted == pytest.approx(ratio.measured, rel=0.05)


SHAPES = {
    "no norm": {},
    "pre norm, AdamW": {"model": {"norm": "pre"}, "optimizer": {"name": "adamw"}},
    "post norm, Muon, tied": {"model": {"norm": "post", "tie_embeddings": True}, "optimizer": {"name": "muon"}},
    "fused": {"attention": {"backend": "sdpa"}},
    "bfloat16, qk-norm": {"precision": {"dtype": "bfloat16"}, "attention": {"qk_norm": True}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_memory_is_as_the_shapes_say(shape, tmp_path):
    table = small(data=MARKOV, **SHAPES[shape])
    table["model"] = {**table["model"], "d_model": 64, "seq_len": 32}
    config = parse_table(table)
    done = rehearse(config, tmp_path / "run")
    vocab_size = done.data[0].vocab_size
    assert done.costs[0].state_bytes == pytest.approx(memory.state_bytes(config, vocab_size=vocab_size), rel=0.01)
    expected = memory.activation_bytes(config, vocab_size=vocab_size)
    assert done.costs[0].activation_bytes == pytest.approx(expected, rel=0.2)


def test_a_run_of_one_step_is_not_judged_by_its_end():
    said = of(model={"norm": "pre"}, train={"steps": 1})
    assert said.ready and said.needs[0].quantities[-1].name == "1 step"


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = torch.get_rng_state()
    of(model={"norm": "pre"})
    assert list(tmp_path.iterdir()) == [] and torch.equal(before, torch.get_rng_state())
