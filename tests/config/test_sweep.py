"""A sweep in words: axes, seeds, baseline; and the members that it describes."""

import itertools
import math

import pytest

from attnscope.config import (
    Config,
    load_config,
    make_sweep,
    members_of,
    parse_table,
    parse_vary,
    short_names,
    value_text,
)
from attnscope.errors import ConfigError


def swept(*texts, seeds=1, config=None, **baseline):
    axes = [parse_vary(text) for text in texts]
    return make_sweep(config or Config(), axes, seeds=seeds, baseline=baseline, where="sweep")


def names(config):
    return [member.name for member in members_of(config)]


def test_values_are_what_their_setting_is():
    assert parse_vary("init.gain=0.5,1,2").values == (0.5, 1.0, 2.0)
    assert parse_vary("attention.scale=inverse_sqrt, none,0.3").values == (
        "inverse_sqrt",
        "none",
        0.3,
    )
    assert parse_vary("attention.qk_norm=false,true").values == (False, True)
    assert parse_vary("clip.threshold=none,0.25").values == ("none", 0.25)
    assert parse_vary("attention.window=[4,0,4,0],8").values == ((4, 0, 4, 0), 8)
    assert parse_vary("optimizer.betas=[0.9,0.95],[0.9,0.999]").values == (
        (0.9, 0.95),
        (0.9, 0.999),
    )


def test_ranges_hit_both_ends_at_equal_steps():
    logs = parse_vary("optimizer.lr=log:1e-4:1e-1:7").values
    assert (logs[0], logs[3], logs[-1], len(logs)) == (
        1e-4,
        pytest.approx(10**-2.5, rel=1e-3),
        0.1,
        7,
    )
    ratios = [math.log(b / a) for a, b in itertools.pairwise(logs)]
    assert max(ratios) - min(ratios) < 1e-3
    assert parse_vary("init.gain=lin:0.5:2:4").values == (0.5, 1.0, 1.5, 2.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("init.gain", "write section.setting=value,value,... for example init.gain=0.5,1,2."),
        ("init.gain=", "init.gain has no values. Write them after =, with commas between."),
        ("init.gain=1,1.0", "init.gain has the value 1.0 twice. Name each once."),
        (
            "init.gain=1,-1",
            "init.gain is -1, but must be a finite number above 0.",
        ),
        (
            "optimizer.lr=log:1:0.1:3",
            'optimizer.lr is "log:1:0.1:3", but LOW must be below HIGH. Write log:LOW:HIGH:COUNT or lin:LOW:HIGH:COUNT.',
        ),
        (
            "optimizer.lr=log:0.1:1:1",
            'optimizer.lr is "log:0.1:1:1", but COUNT must be at least 2 and at most 1000. Write log:LOW:HIGH:COUNT or '
            "lin:LOW:HIGH:COUNT.",
        ),
        (
            "optimizer.lr=log:0.1:x:3",
            'optimizer.lr is "log:0.1:x:3", whose numbers cannot be read. Write log:LOW:HIGH:COUNT or '
            "lin:LOW:HIGH:COUNT.",
        ),
        (
            "optimizer.lrr=1",
            '[optimizer] has no setting "lrr". Did you mean lr? Settings: name, lr, momentum, betas, eps, weight_decay, '
            "warmup_steps, schedule, z_loss.",
        ),
    ],
)
def test_a_wrong_axis_is_refused_in_words(text, said):
    with pytest.raises(ConfigError) as refused:
        parse_vary(text)
    assert str(refused.value) == f"--vary {text}: {said}"


def test_the_grid_has_every_combination_the_first_axis_slowest_and_seeds_fastest():
    config = swept("attention.scale=none,inverse_sqrt", "init.gain=1,2", seeds=2)
    assert names(config)[:5] == [
        "scale=none gain=1 seed=0",
        "scale=none gain=1 seed=1",
        "scale=none gain=2 seed=0",
        "scale=none gain=2 seed=1",
        "scale=inverse_sqrt gain=1 seed=0",
    ]
    members = members_of(config)
    assert len(members) == 8 == len({m.name for m in members})
    assert [m.config.train.seed for m in members] == [0, 1] * 4
    assert {m.part for m in members} == {0}, "numbers alone differ: one batched part"


def test_settings_that_change_the_graph_make_parts():
    members = members_of(
        swept("model.norm=none,pre", "init.gain=1,2", "attention.qk_norm=false,true")
    )
    by_part = {}
    for member in members:
        by_part.setdefault(member.part, set()).add(
            (member.config.model.norm, member.config.attention.qk_norm)
        )
    assert len(by_part) == 4 and all(len(graphs) == 1 for graphs in by_part.values())


def test_arms_are_crossed_with_the_axes():
    config = parse_table(
        {
            "arm": [{"name": "a"}, {"name": "b", "clip": {"threshold": 1.0}}],
            "sweep": {"vary": {"init": {"gain": [1, 2]}}, "seeds": [3, 5]},
        }
    )
    members = members_of(config)
    assert names(config)[:3] == ["a gain=1 seed=3", "a gain=1 seed=5", "a gain=2 seed=3"]
    assert [m.config.clip.threshold for m in members] == ["none"] * 4 + [1.0] * 4


def test_long_names_become_numbers_that_sort():
    config = swept(
        "init.gain=lin:1:2:11", "init.scheme=xavier_uniform,kaiming", "clip.threshold=0.25,1",
        "optimizer.lr=0.001,0.002", "optimizer.weight_decay=0.1,0.2", "optimizer.momentum=0.5,0.9", seeds=2,
    )  # fmt: skip
    found = names(config)
    assert found[0] == "cell-000 seed=0" and found[-1] == "cell-351 seed=1"
    assert len(set(found)) == len(found) == 704 and sorted(found) == found


def test_short_names_are_short_where_that_leaves_no_doubt():
    assert short_names(["attention.scale", "optimizer.name", "init.std", "init.embedding_std"]) == {
        "attention.scale": "scale",
        "optimizer.name": "optimizer",
        "init.std": "std",
        "init.embedding_std": "embedding_std",
    }
    assert value_text(0.1 + 0.2) == "0.3" and value_text(True) == "true"


def test_the_baseline_is_the_config_where_nothing_else_is_said():
    sweep = swept("attention.scale=none,inverse_sqrt", "init.gain=2,3").sweep
    assert sweep.baseline == {"attention.scale": "inverse_sqrt", "init.gain": 2.0}
    sweep = swept("attention.scale=inverse_sqrt,none", **{"attention.scale": "none"}).sweep
    assert sweep.baseline == {"attention.scale": "none"}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "nothing varies."),
        ({"seeds": 1}, "nothing varies."),
        ({"seeds": [1, 1]}, "seeds is [1, 1], but must be a whole number, at least 1, or a list of different ones."),
        ({"seeds": -2}, "seeds is -2, but must be"),
        ({"seed": 3}, 'has no setting "seed". Did you mean seeds? Settings: vary, seeds, baseline.'),
        ({"vary": {"train": {"seed": [1, 2]}}}, "train.seed is what seeds are for."),
        ({"vary": {"init": {"gain": []}}}, "init.gain is [], but must be a list of values, or a range"),
        ({"vary": {"init": {"gain": 1}}}, "init.gain is 1, but must be a list of values, or a range"),
        ({"vary": {"init.gain": [1, 2]}, "baseline": {"init.gain": 3}}, "which is none of its values: 1, 2."),
        (
            {"vary": {"init.gain": "lin:1:2:200"}, "seeds": 51},
            "200 cells x 51 seeds are 10200 members, but at most 10000 fit a run. Vary less.",
        ),
        ("log", 'sweep is "log", but must be a section. Write [sweep].'),
    ],
)  # fmt: skip
def test_a_wrong_table_is_refused_in_words(table, said):
    with pytest.raises(ConfigError) as refused:
        parse_table({"sweep": table})
    assert said in str(refused.value)


def test_a_setting_of_an_arm_cannot_vary_too():
    arms = [{"name": "a", "init": {"gain": 2.0}}]
    with pytest.raises(
        ConfigError, match=r"init\.gain varies, but arm a sets it too\. Drop one of them\."
    ):
        parse_table({"arm": arms, "sweep": {"vary": {"init": {"gain": [1, 2]}}}})


def test_a_cell_that_cannot_be_is_named():
    with pytest.raises(
        ConfigError, match=r"d_model=65: model\.n_heads is 2, which does not divide"
    ):
        members_of(swept("model.d_model=64,65"))


def test_a_sweep_survives_its_way_through_toml(tmp_path):
    from attnscope.config import to_toml

    config = swept(
        "optimizer.lr=log:1e-3:1:3",
        "attention.qk_norm=false,true",
        seeds=3,
        **{"optimizer.lr": 1.0},
    )
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "c.toml") == config
