"""Settings by name: looked up, changed, refused with the nearest name, nested and flattened."""

import pytest

from attnscope.config import SECTIONS, SETTINGS, Config, apply_changes, get_setting
from attnscope.config.change import check_name, flatten, nest, plain
from attnscope.errors import ConfigError

OPTIMIZER = "name, lr, momentum, betas, eps, weight_decay, warmup_steps, schedule, z_loss"  # its settings


def test_a_change_touches_what_it_names_and_nothing_else():
    before = Config()
    after = apply_changes(before, {"init.gain": 2, "train.seed": 7.0}, where="test")
    changed = {key for key in SETTINGS if get_setting(before, key) != get_setting(after, key)}
    assert changed == {"init.gain", "train.seed"}
    assert isinstance(get_setting(after, "init.gain"), float)
    assert isinstance(get_setting(after, "train.seed"), int)
    assert before == Config(), "the config that was given stays as it was"


def test_two_changes_of_one_section_are_both_applied():
    changes = {"optimizer.lr": 0.5, "model.d_model": 64, "optimizer.momentum": 0.0}
    after = apply_changes(Config(), changes, where="test")
    assert {key: get_setting(after, key) for key in changes} == changes


def test_every_setting_has_a_value_that_it_accepts():
    config = Config()
    changes = {key: plain(get_setting(config, key)) for key in SETTINGS}
    assert apply_changes(config, changes, where="test") == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"optimizer.lrr": 1},
            f'[optimizer] has no setting "lrr". Did you mean lr? Settings: {OPTIMIZER}.',
        ),
        (
            {"optimizer.dropout": 1},
            f'[optimizer] has no setting "dropout". Did you mean attention.dropout? Settings: {OPTIMIZER}.',
        ),
        (
            {"optimizer.xyz": 1},
            f'[optimizer] has no setting "xyz". Settings: {OPTIMIZER}.',
        ),
        (
            {"optimiser.lr": 1},
            f'there is no section "optimiser". Did you mean optimizer? Sections: {", ".join(SECTIONS)}.',
        ),
        (
            {"lr": 1},
            f'there is no section "lr". Did you mean optimizer.lr? Sections: {", ".join(SECTIONS)}.',
        ),
        ({"": 1}, f'there is no section "". Sections: {", ".join(SECTIONS)}.'),
        (
            {"optimizer": 1},
            f'[optimizer] has no setting "". Settings: {OPTIMIZER}.',
        ),
        (
            {"optimizer.lr": "fast"},
            'optimizer.lr is "fast", but must be a finite number at least 0.',
        ),
        (
            {"attention.scale": "inverse_sqr"},
            'attention.scale is "inverse_sqr", but must be a finite number above 0 or inverse_sqrt, none, inverse, depth, '
            "learned. Did you mean inverse_sqrt?",
        ),
        (
            {"model.norm": "pree"},
            'model.norm is "pree", but must be one of pre, post, none. Did you mean pre?',
        ),
        (
            {"optimizer.momentum": 0.999999999},
            "optimizer.momentum is 0.999999999, but must be a finite number at least 0 and below 1. In float32, which "
            "training computes in, 0.999999999 is 1.",
        ),
    ],
)
def test_a_wrong_change_is_refused_in_words(changes, said):
    with pytest.raises(ConfigError) as refused:
        apply_changes(Config(), changes, where="here")
    assert str(refused.value) == f"here: {said}"


def test_one_wrong_change_among_right_ones_is_the_one_that_is_named():
    with pytest.raises(ConfigError) as refused:
        apply_changes(Config(), {"init.gain": 2, "init.std": 0, "init.qk_gain": 1}, where="here")
    assert str(refused.value) == "here: init.std is 0, but must be a finite number above 0."


def test_a_place_and_a_value_stay_on_one_line():
    with pytest.raises(ConfigError) as refused:
        apply_changes(Config(), {"model.norm": "p\nre\x1b[31m"}, where="a\nb")
    assert str(refused.value).startswith('a\\u000ab: model.norm is "p\\nre\\u001b[31m"')
    assert str(refused.value).isprintable()


def test_names_are_checked_without_a_value():
    for key in SETTINGS:
        check_name(key, "here")
    with pytest.raises(ConfigError, match=r"^here: \[init\] has no setting \"gian\"\. Did you mean gain\?"):
        check_name("init.gian", "here")


def test_nesting_and_flattening_undo_each_other():
    changes = {"optimizer.lr": 0.5, "init.gain": 2.0, "optimizer.betas": [0.9, 0.99]}
    table = nest(changes)
    assert table == {"optimizer": {"lr": 0.5, "betas": [0.9, 0.99]}, "init": {"gain": 2.0}}
    assert flatten(table, "here") == changes
    assert flatten({}, "here") == {} == nest({})


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"init": 5}, "init is 5, but must be a section. Write [init]."),
        ({"init": [1]}, "init is [1], but must be a section. Write [init]."),
        (
            {"arms": [{"name": "a"}]},
            '"arms" is a list of tables, but only [[arm]] may be one.',
        ),
        (
            {"init.gain": 2},
            "init.gain must stand in its section. Write it without quotes.",
        ),
        (
            {"gain": 2},
            f'there is no section "gain". Did you mean init.gain? Sections: {", ".join(SECTIONS)}.',
        ),
    ],
)
def test_a_table_that_is_no_config_is_refused_in_words(table, said):
    with pytest.raises(ConfigError) as refused:
        flatten(table, "here")
    assert str(refused.value) == f"here: {said}"


def test_tuples_become_lists_and_the_rest_stays():
    assert plain((0.9, 0.95)) == [0.9, 0.95] and isinstance(plain((1,)), list)
    assert plain("none") == "none" and plain(True) is True
