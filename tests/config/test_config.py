"""Defaults, TOML in and out, members and parts, warnings."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnscope.config import (
    PER_MEMBER,
    SETTINGS,
    Config,
    apply_changes,
    check_of,
    get_setting,
    load_config,
    members_of,
    parse_assignment,
    parse_table,
    parse_toml,
    to_table,
    to_toml,
    warnings_of,
    with_control,
    without_control,
)
from attnscope.config.checks import Choice, Flag, Number, OneLine, Several, Whole


def values_of(check):
    """Values that a check accepts."""
    if isinstance(check, Choice):
        return st.sampled_from(check.options)
    if isinstance(check, Flag):
        return st.booleans()
    if isinstance(check, OneLine):
        return st.text(min_size=1, max_size=20).filter(lambda x: x.strip() and x.isprintable())
    if isinstance(check, Whole):
        numbers = st.integers(check.low, check.high)
        return numbers | st.sampled_from(check.words) if check.words else numbers
    if isinstance(check, Number):
        low = check.low if check.low is not None else check.above
        numbers = st.floats(
            min_value=low,
            max_value=check.below,
            exclude_min=check.above is not None,
            exclude_max=check.below is not None,
            allow_nan=False,
            allow_infinity=False,
            width=32,
        )
        return numbers | st.sampled_from(check.words) if check.words else numbers
    assert isinstance(check, Several)
    size = {"min_size": check.length or 1, "max_size": check.length or 5}
    several = st.lists(values_of(check.entry), **size).map(tuple)
    return several | values_of(check.entry) if check.or_one else several


changes = st.sampled_from(sorted(SETTINGS)).flatmap(
    lambda key: values_of(check_of(SETTINGS[key])).map(lambda value: {key: value})
)


@given(change=changes, arm=changes)
def test_toml_and_json_bring_every_setting_back(change, arm):
    config = apply_changes(Config(), change, where="test")
    nested = {}
    for key, value in arm.items():
        section, name = key.split(".")
        nested.setdefault(section, {})[name] = value
    config = parse_table({**to_table(config), "arm": [{"name": "an arm, “quoted”", **nested}]})
    assert parse_toml(to_toml(config)) == config
    assert parse_table(json.loads(json.dumps(to_table(config)))) == config
    (key,) = change
    assert get_setting(config, key) == change[key]


@pytest.mark.parametrize("key", SETTINGS)
@settings(max_examples=20)
@given(data=st.data())
def test_every_value_of_every_setting_survives_toml_and_json(key, data):
    config = apply_changes(Config(), {key: data.draw(values_of(check_of(SETTINGS[key])))}, where="test")
    assert parse_toml(to_toml(config)) == config
    assert parse_table(json.loads(json.dumps(to_table(config)))) == config


def test_toml_of_arms_keeps_their_order_and_settings():
    config = parse_toml(
        """
        [[arm]]
        name = "b"
        model.d_model = 64.0
        attention.window = [1, 2, 3, 4]
        model.n_heads = 4
        [[arm]]
        name = "a [[arm]] 'x' = \\"y\\" # ∀"
        """
    )
    assert parse_toml(to_toml(config)) == config
    assert config.arms[0].changes == {
        "model.d_model": 64,
        "model.n_heads": 4,
        "attention.window": (1, 2, 3, 4),
    }
    assert [arm.name for arm in config.arms] == ["b", "a [[arm]] 'x' = \"y\" # ∀"]


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf[train]\r\nsteps = 7\r\n")
    assert load_config(tmp_path / "a.toml").train.steps == 7


def test_every_default_passes_its_own_check_and_has_a_meaning():
    for key, entry in SETTINGS.items():
        assert check_of(entry)(entry.default) == entry.default, key
        assert entry.metadata["meaning"] and "\n" not in entry.metadata["meaning"], key


MEASURED = {
    "model.kind": "decoder",
    "model.d_model": 128,
    "model.n_layers": 4,
    "model.n_heads": 2,
    "model.seq_len": 32,
    "model.norm": "none",
    "model.position": "learned",
    "attention.scale": "inverse_sqrt",
    "attention.mask": "causal",
    "attention.backend": "eager",
    "init.scheme": "xavier_uniform",
    "init.gain": 1.0,
    "init.qk_gain": 1.0,
    "init.embedding_std": 1.0,
    "optimizer.name": "sgd",
    "optimizer.lr": 1e-3,
    "optimizer.momentum": 0.9,
    "optimizer.schedule": "constant",
    "clip.threshold": "none",
    "precision.dtype": "float32",
    "data.source": "stdlib",
    "data.batch_size": 8,
    "data.objective": "next_token",
    "train.steps": 300,
    "train.eval_lengths": (1,),
    "record.every": 1,
}
OFF = (
    "model.tie_embeddings",
    "attention.window",
    "attention.qk_norm",
    "attention.logit_softcap",
    "attention.qk_clip",
    "attention.dropout",
    "optimizer.weight_decay",
    "optimizer.warmup_steps",
    "optimizer.z_loss",
    "precision.loss_scaling",
    "train.compile",
    "train.eval_every",
    "train.sample_tokens",
)


def test_the_default_model_is_the_measured_one():
    config = Config()
    assert {key: get_setting(config, key) for key in MEASURED} == MEASURED
    assert (config.d_head, config.d_ff, config.windows) == (64, 512, (0, 0, 0, 0))
    assert config.arms == ()


def test_settings_that_are_off_unless_asked_for():
    off = {key: get_setting(Config(), key) for key in OFF}
    assert off == dict.fromkeys(OFF, 0), "0 and False are equal"


def test_members_of_one_part_may_differ_in_every_number_of_these_sections():
    """That is all of init, attention.scale and train.seed, and what is a number in optimizer and clip."""
    words = {"optimizer.name", "optimizer.schedule", "clip.mode"}
    numeric = {key for key in SETTINGS if key.split(".")[0] in ("init", "optimizer", "clip")}
    assert numeric - words | {"attention.scale", "train.seed"} == PER_MEMBER


def test_changes_make_a_copy():
    config = Config()
    changed = apply_changes(config, {"model.d_model": 64}, where="test")
    assert changed.model.d_model == 64 and config == Config()
    assert apply_changes(config, {}, where="test") == config


def test_a_whole_number_may_be_written_as_a_float_and_a_number_as_a_whole_one():
    config = apply_changes(Config(), {"train.steps": 1e3, "optimizer.lr": 1}, where="test")
    assert (type(config.train.steps), config.train.steps) == (int, 1000)
    assert (type(config.optimizer.lr), config.optimizer.lr) == (float, 1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.d_model=64", ("model.d_model", 64)),
        ("optimizer.lr = 1e-4", ("optimizer.lr", 1e-4)),
        ("attention.scale=none", ("attention.scale", "none")),
        ('attention.scale="none"', ("attention.scale", "none")),
        ("attention.window=[4, 0]", ("attention.window", [4, 0])),
        ("data.source=a=b.txt", ("data.source", "a=b.txt")),
        ("attention.qk_norm=true", ("attention.qk_norm", True)),
        ("train.seed = 3 # a comment", ("train.seed", 3)),
        ("data.source=2024", ("data.source", "2024")),
        ("data.source=true", ("data.source", "true")),
        (r"data.source=C:\texts\new.txt", ("data.source", r"C:\texts\new.txt")),
        ('data.source="2024"', ("data.source", "2024")),
    ],
)
def test_assignments_on_the_command_line(text, expected):
    assert parse_assignment(text) == expected


def arms(*changes):
    return parse_table({"arm": [{"name": f"arm {i}", **change} for i, change in enumerate(changes)]})


def test_members_that_differ_in_numbers_share_a_part():
    members = members_of(
        arms(
            {},
            {"attention": {"scale": "none"}},
            {"optimizer": {"lr": 0.1}, "init": {"scheme": "orthogonal"}, "train": {"seed": 3}},
            {"clip": {"threshold": 1.0}},
        )
    )
    assert [(member.part, member.index) for member in members] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert members[1].settings == {"attention.scale": "none"}


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"d_model": 64}},
        {"attention": {"mask": "none"}},
        {"attention": {"scale": "learned"}},
        {"optimizer": {"name": "adamw"}},
        {"clip": {"mode": "value"}},
        {"precision": {"dtype": "bfloat16"}},
        {"data": {"seed": 1}},
    ],
)
def test_any_other_difference_makes_a_new_part(change):
    members = members_of(arms({}, change, {"train": {"seed": 1}}, change))
    assert [(member.part, member.index) for member in members] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_no_scale_trains_a_twin_that_differs_in_the_scale_alone():
    unscaled, scaled = members_of(with_control(Config()))
    assert (unscaled.name, scaled.name) == ("unscaled", "scaled")
    assert unscaled.config == without_control(Config())
    assert apply_changes(unscaled.config, scaled.settings, where="test") == scaled.config
    assert [(each.part, each.index) for each in (unscaled, scaled)] == [(0, 0), (0, 1)]


def test_members_with_a_trained_scale_share_a_part_of_their_own():
    learned = {"attention": {"scale": "learned"}}
    members = members_of(arms({}, learned, {"optimizer": {"lr": 0.1}}, learned | {"init": {"gain": 2}}))
    assert [(member.part, member.index) for member in members] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_a_member_has_its_whole_config_and_what_its_arm_changes():
    base = parse_toml("[train]\nsteps = 7\n[[arm]]\nname = 'a'\nattention.scale = 'inverse_sqrt'")
    (member,) = members_of(base)
    assert member.config == replace(base, arms=())
    assert member.settings == {"attention.scale": "inverse_sqrt"}, "named, though it is the default"


@pytest.mark.parametrize(
    ("scale", "name"),
    [
        ("inverse_sqrt", "scaled"),
        ("none", "unscaled"),
        ("learned", "scale-learned"),
        ("depth", "scale-depth"),
        (0.5, "scale-0.5"),
    ],
)
def test_a_single_member_is_named_after_its_scale(scale, name):
    config = apply_changes(Config(), {"attention.scale": scale}, where="test")
    assert members_of(config)[0].name == name


IDLE = {
    "clip.threshold has no effect with clip.mode = none": {
        "clip.mode": "none",
        "clip.threshold": 1.0,
    },
    "clip.mode = value has no effect while clip.threshold is none": {"clip.mode": "value"},
    "optimizer.momentum has no effect with adamw (use betas)": {
        "optimizer.name": "adamw",
        "optimizer.momentum": 0.5,
    },
    "optimizer.betas has no effect with sgd (use momentum)": {"optimizer.betas": [0.5, 0.5]},
    "optimizer.eps has no effect with sgd": {"optimizer.eps": 1e-6},
    "init.std has no effect with init.scheme = xavier_uniform": {"init.std": 0.1},
    "precision.loss_scaling has no effect with dtype float32": {"precision.loss_scaling": True},
    "model.norm_kind has no effect with model.norm = none": {"model.norm_kind": "rmsnorm"},
    "optimizer.lr is 0: nothing will be learned": {"optimizer.lr": 0},
    "clip.mode = adaptive has no effect while clip.threshold is none": {"clip.mode": "adaptive"},
    "optimizer.warmup_steps = 301 is more than train.steps = 300: lr is never reached": {"optimizer.warmup_steps": 301},
    "attention.qk_clip = 50 has no effect: attention.logit_softcap = 30 keeps logits below it": {
        "attention.qk_clip": 50,
        "attention.logit_softcap": 30,
    },
    "attention.window = 1 shows a query nothing but itself: there is no attention to measure": {
        "attention.window": [1, 0, 0, 0]
    },
    "attention.window reaches over the whole seq_len: it hides nothing": {"attention.window": 32},
    "attention.qk_clip has no effect with attention.qk_norm: the norm undoes it": {
        "attention.qk_clip": 50,
        "attention.qk_norm": True,
    },
}


@pytest.mark.parametrize("warning", IDLE)
def test_a_setting_without_effect_warns_of_nothing_else(warning):
    assert warnings_of(apply_changes(Config(), IDLE[warning], where="test")) == (warning,)


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer.name": "muon", "optimizer.momentum": 0.5, "optimizer.betas": [0.5, 0.5]},
        {"optimizer.name": "adamw", "optimizer.eps": 1e-6},
        {"init.scheme": "gpt2", "init.std": 0.1},
        {"precision.dtype": "float16", "precision.loss_scaling": True},
        {"model.norm": "pre", "model.norm_kind": "rmsnorm"},
        {"optimizer.warmup_steps": 300},
        {"attention.qk_clip": 20, "attention.logit_softcap": 30},
        {"attention.window": 31},
        {"attention.window": 32, "model.position": "rope", "train.eval_lengths": [1, 2]},
        {"clip.mode": "value", "clip.threshold": 1.0},
    ],
)
def test_a_setting_with_an_effect_does_not_warn(change):
    assert warnings_of(apply_changes(Config(), change, where="test")) == ()


def test_the_default_config_warns_of_nothing():
    assert warnings_of(Config()) == ()
