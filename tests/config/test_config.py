"""Defaults, TOML in and out, members and parts, warnings."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnscope.config import (
    PER_MEMBER,
    SETTINGS,
    Config,
    apply_changes,
    check_of,
    get_setting,
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
from attnscope.config.checks import Choice, Flag, Number, Several, Text, Whole


def values_of(check):
    """Values that a check accepts."""
    if isinstance(check, Choice):
        return st.sampled_from(check.options)
    if isinstance(check, Flag):
        return st.booleans()
    if isinstance(check, Text):
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
        )
        return numbers | st.sampled_from(check.words) if check.words else numbers
    assert isinstance(check, Several)
    size = {"min_size": check.length or 1, "max_size": check.length or 5}
    several = st.lists(values_of(check.each), **size).map(tuple)
    return several | values_of(check.each) if check.or_one else several


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


def test_every_default_passes_its_own_check_and_has_a_meaning():
    for key, entry in SETTINGS.items():
        assert check_of(entry)(entry.default) == entry.default, key
        assert entry.metadata["meaning"] and "\n" not in entry.metadata["meaning"], key


def test_the_default_model_is_the_measured_one():
    config = Config()
    assert (config.model.d_model, config.model.n_heads, config.d_head) == (128, 2, 64)
    assert (config.model.n_layers, config.d_ff, config.model.seq_len) == (4, 512, 32)
    assert (config.model.norm, config.attention.scale) == ("none", "inverse_sqrt")
    assert (config.optimizer.name, config.optimizer.lr) == ("sgd", 1e-3)
    assert (config.data.source, config.data.batch_size, config.train.steps) == ("stdlib", 8, 300)


def test_what_members_of_one_part_may_differ_in():
    sections = {key.split(".")[0] for key in PER_MEMBER}
    assert sections == {"attention", "init", "optimizer", "clip", "train"}
    assert {
        "attention.scale",
        "init.gain",
        "optimizer.lr",
        "clip.threshold",
        "train.seed",
    } <= PER_MEMBER
    assert not {"model.d_model", "optimizer.name", "clip.mode", "data.seed"} & PER_MEMBER


def test_changes_make_a_copy():
    config = Config()
    changed = apply_changes(config, {"model.d_model": 64}, where="test")
    assert changed.model.d_model == 64 and config == Config()


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
    ],
)
def test_assignments_on_the_command_line(text, expected):
    assert parse_assignment(text) == expected


def arms(*changes):
    return parse_table(
        {"arm": [{"name": f"arm {i}", **change} for i, change in enumerate(changes)]}
    )


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


@pytest.mark.parametrize(
    ("scale", "name"),
    [
        ("inverse_sqrt", "scaled"),
        ("none", "unscaled"),
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
    "optimizer.warmup_steps = 300 lasts the whole run: lr is never reached": {
        "optimizer.warmup_steps": 300
    },
    "attention.window reaches over the whole seq_len: it hides nothing": {"attention.window": 32},
    "attention.qk_clip has no effect with attention.qk_norm: the norm undoes it": {
        "attention.qk_clip": 50,
        "attention.qk_norm": True,
    },
}


@pytest.mark.parametrize("warning", IDLE)
def test_a_setting_without_effect_warns(warning):
    assert warning in warnings_of(apply_changes(Config(), IDLE[warning], where="test"))


def test_the_default_config_warns_of_nothing():
    assert warnings_of(Config()) == ()
