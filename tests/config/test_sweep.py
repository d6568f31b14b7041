"""A sweep in words: axes, seeds, baseline; and the members that it describes."""

import itertools
import math

import pytest

from attnscope.config import (
    PER_MEMBER,
    SETTINGS,
    Config,
    get_setting,
    load_config,
    make_sweep,
    members_of,
    parse_table,
    parse_vary,
    short_names,
    to_table,
    to_toml,
    value_text,
)
from attnscope.config.change import plain
from attnscope.config.sweep import MAX_NAME
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
    assert parse_vary("optimizer.warmup_steps=lin:0:100:3").values == (0, 50, 100)


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("optimizer.lr=log:1.23456e-4:0.1:3", 1.23456e-4, 0.1),
        ("optimizer.lr=lin:0.1:0.987654321:4", 0.1, 0.987654321),
        (
            "optimizer.momentum=lin:0.5:0.99999:3",
            0.5,
            0.99999,
        ),  # rounded it would be 1: not allowed
    ],
)
def test_the_ends_of_a_range_are_what_was_written(text, low, high):
    values = parse_vary(text).values
    assert (values[0], values[-1]) == (low, high)


@pytest.mark.parametrize("count", [2, 3, 100, 1000])
@pytest.mark.parametrize("kind", ["log", "lin"])
def test_a_range_has_as_many_values_as_it_says(kind, count):
    values = parse_vary(f"optimizer.lr={kind}:1e-4:1:{count}").values
    assert len(values) == count and list(values) == sorted(values)


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
        *(
            (
                f"optimizer.lr={wrong}",
                f'optimizer.lr is "{wrong}", but {reason}. Write log:LOW:HIGH:COUNT or lin:LOW:HIGH:COUNT.',
            )
            for wrong, reason in (
                ("log:0:1:3", "equal ratios need LOW above 0"),
                ("log:-1:1:3", "equal ratios need LOW above 0"),
                ("lin:1:1:3", "LOW must be below HIGH"),
                ("lin:nan:1:3", "LOW must be below HIGH"),
                ("lin:0:inf:3", "LOW must be below HIGH"),
                ("lin:0:1:0", "COUNT must be at least 2 and at most 1000"),
                ("lin:0:1:1001", "COUNT must be at least 2 and at most 1000"),
            )
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
        (
            "lr=1,2",
            'there is no section "lr". Did you mean optimizer.lr? Sections: model, attention, init, optimizer, clip, '
            "precision, data, train, record.",
        ),
        ("=1,2", "write section.setting=value,value,... for example init.gain=0.5,1,2."),
        (
            "attention.backend=eager,sdpaa",
            'attention.backend is "sdpaa", but must be one of eager, sdpa. Did you mean sdpa?',
        ),
        ("train.seed=1,2", "train.seed is what seeds are for. Use --seeds, or seeds in [sweep]."),
        (
            "optimizer.warmup_steps=log:1:10:4",
            "optimizer.warmup_steps is 2.154, but must be a whole number, at least 0.",
        ),
    ],
)
def test_a_wrong_axis_is_refused_in_words(text, said):
    with pytest.raises(ConfigError) as refused:
        parse_vary(text)
    assert str(refused.value) == f"--vary {text}: {said}"


@pytest.mark.parametrize(
    "text",
    [
        "init.gain=1,,2",
        "attention.window=[4,0",
        "attention.window=4]",
        'data.source="a,b',
        "init.gain=1,[2],]",
    ],
)
def test_a_list_that_cannot_be_read_is_not_guessed(text):
    with pytest.raises(ConfigError):
        parse_vary(text)


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
    members = members_of(swept("model.norm=none,pre", "init.gain=1,2", "attention.qk_norm=false,true"))
    by_part = {}
    for member in members:
        by_part.setdefault(member.part, set()).add((member.config.model.norm, member.config.attention.qk_norm))
    assert len(by_part) == 4 and all(len(graphs) == 1 for graphs in by_part.values())


# Another value for each setting, from which a member can be made.
OTHER = {
    "model.kind": "encoder", "model.d_model": 64, "model.n_layers": 2, "model.n_heads": 4, "model.d_head": 32,
    "model.d_ff": 64, "model.seq_len": 16, "model.norm": "pre", "model.norm_kind": "rmsnorm", "model.position": "rope",
    "model.activation": "relu", "model.tie_embeddings": True, "attention.scale": 0.5, "attention.mask": "none",
    "attention.window": 4, "attention.backend": "sdpa", "attention.qk_norm": True, "attention.logit_softcap": 50.0,
    "attention.qk_clip": 100.0, "attention.dropout": 0.1, "init.scheme": "normal", "init.gain": 2.0, "init.qk_gain": 2.0,
    "init.std": 0.1, "init.embedding_std": 0.1, "optimizer.name": "adamw", "optimizer.lr": 0.1, "optimizer.momentum": 0.5,
    "optimizer.betas": (0.9, 0.99), "optimizer.eps": 1e-6, "optimizer.weight_decay": 0.1, "optimizer.warmup_steps": 10,
    "optimizer.schedule": "cosine", "optimizer.z_loss": 1e-4, "clip.mode": "value", "clip.threshold": 1.0,
    "precision.dtype": "bfloat16", "precision.loss_scaling": True, "data.source": "markov", "data.batch_size": 4,
    "data.seed": 1, "data.objective": "masked", "train.steps": 10, "train.device": "cpu", "train.compile": True,
    "train.eval_every": 10, "train.eval_lengths": (1, 2), "train.sample_tokens": 10, "train.checkpoint_every": 10,
    "record.every": 2, "record.rows": "all",
}  # fmt: skip
SINGLE = sorted(SETTINGS.keys() - {"train.seed", "model.kind", "data.objective"})  # two go together


@pytest.mark.parametrize("key", SINGLE)
def test_a_setting_shares_a_part_if_it_is_a_number_to_the_code_that_trains(key):
    vary = {key: [plain(get_setting(Config(), key)), plain(OTHER[key])]}
    first, second = members_of(parse_table({"sweep": {"vary": vary}}))
    assert (second.part, second.index) == ((0, 1) if key in PER_MEMBER else (1, 0))
    assert (first.part, first.index) == (0, 0)


def test_a_trained_scale_is_no_number():
    parts = [m.part for m in members_of(swept("attention.scale=none,learned,0.5,inverse_sqrt"))]
    assert parts == [0, 1, 0, 0]


def test_indices_count_the_members_of_each_part():
    members = members_of(swept("model.norm=none,pre", "init.gain=1,2", seeds=2))
    assert [(m.part, m.index) for m in members] == [(p, i) for p in (0, 1) for i in range(4)]
    members = members_of(swept("init.gain=1,2", "model.norm=none,pre"))
    assert [(m.part, m.index) for m in members] == [(0, 0), (1, 0), (0, 1), (1, 1)]


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


@pytest.mark.parametrize(("length", "numbered"), [(MAX_NAME, False), (MAX_NAME + 1, True)])
def test_the_longest_name_that_stays_one(length, numbered):
    source = "x" * (length - len("source= gain=1 seed=0"))
    found = names(swept(f"data.source=a,{source}", "init.gain=1,2", seeds=2))
    assert max(map(len, found)) == (len("cell-3 seed=1") if numbered else length)
    assert all(name.startswith("cell-") == numbered for name in found)
    assert len(set(found)) == 8


@pytest.mark.parametrize("texts", [["init.gain=1.0000001,1.0000002"], ["init.gain=1234567,1234568", "init.std=1,2"]])
def test_members_have_names_of_their_own_even_where_values_are_close(texts):
    found = names(swept(*texts))
    assert len(set(found)) == len(found)


def test_short_names_are_short_where_that_leaves_no_doubt():
    assert short_names(["attention.scale", "optimizer.name", "init.std", "init.embedding_std"]) == {
        "attention.scale": "scale",
        "optimizer.name": "optimizer",
        "init.std": "std",
        "init.embedding_std": "embedding_std",
    }
    assert value_text(0.1 + 0.2) == "0.3" and value_text(True) == "true"


def test_seeds_count_on_from_the_seed_of_the_config():
    config = parse_table({"train": {"seed": 40}, "sweep": {"seeds": 3}})
    assert [(m.name, m.config.train.seed) for m in members_of(config)] == [
        ("seed=40", 40), ("seed=41", 41), ("seed=42", 42),
    ]  # fmt: skip


def test_a_single_seed_that_is_named_is_the_one_that_is_used():
    config = parse_table({"sweep": {"vary": {"init": {"gain": [1, 2]}}, "seeds": [7]}})
    assert [m.config.train.seed for m in members_of(config)] == [7, 7]


def test_the_baseline_is_the_config_where_nothing_else_is_said():
    sweep = swept("attention.scale=none,inverse_sqrt", "init.gain=2,3").sweep
    assert sweep.baseline == {"attention.scale": "inverse_sqrt", "init.gain": 2.0}
    sweep = swept("attention.scale=inverse_sqrt,none", **{"attention.scale": "none"}).sweep
    assert sweep.baseline == {"attention.scale": "none"}


GAINS = {"init": {"gain": [1, 2]}}
NOTHING = "nothing varies. Add settings, for example --vary attention.scale=inverse_sqrt,none, or --seeds 5."
SEEDS = "but must be a whole number, at least 1, or a list of different ones."
VALUES = 'but must be a list of values, or a range like "log:1e-4:1e-1:7".'


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, f": {NOTHING}"),
        ({"seeds": 1}, f": {NOTHING}"),
        ({"seeds": 0}, f": seeds is 0, {SEEDS}"),
        ({"seeds": -2}, f": seeds is -2, {SEEDS}"),
        ({"seeds": 10_001}, f": seeds is 10001, {SEEDS}"),
        ({"seeds": 1.5}, f": seeds is 1.5, {SEEDS}"),
        ({"seeds": True}, f": seeds is true, {SEEDS}"),
        ({"seeds": "3"}, f': seeds is "3", {SEEDS}'),
        ({"seeds": []}, f": seeds is [], {SEEDS}"),
        ({"seeds": [1, 1]}, f": seeds is [1, 1], {SEEDS}"),
        ({"seeds": [1, -1]}, f": seeds is [1, -1], {SEEDS}"),
        (
            {"seed": 3},
            ' has no setting "seed". Did you mean seeds? Settings: vary, seeds, baseline.',
        ),
        ({"vary": 5}, ".vary is 5, but must be a table of settings."),
        (
            {"vary": {"train": {"seed": [1, 2]}}},
            ".vary: train.seed is what seeds are for. Use --seeds, or seeds in [sweep].",
        ),
        ({"vary": {"init": {"gain": []}}}, f".vary: init.gain is [], {VALUES}"),
        ({"vary": {"init": {"gain": 1}}}, f".vary: init.gain is 1, {VALUES}"),
        (
            {"vary": {"init": {"gain": "loq:1:2:3"}}},
            '.vary: init.gain is "loq:1:2:3", which is no range. Write log:LOW:HIGH:COUNT or lin:LOW:HIGH:COUNT.',
        ),
        (
            {"vary": {"init": {"gain": [1] * 1001}}},
            ".vary: init.gain has 1001 values, but at most 1000 fit.",
        ),
        (
            {"vary": {"init": {"gian": [1, 2]}}},
            '.vary: [init] has no setting "gian". Did you mean gain? Settings: scheme, gain, qk_gain, std, embedding_std.',
        ),
        (
            {"vary": GAINS, "baseline": {"init.gain": 3}},
            ": the baseline has init.gain = 3, which is none of its values: 1, 2.",
        ),
        (
            {"vary": GAINS, "baseline": {"init.qk_gain": 3}},
            ': the baseline sets "init.qk_gain", which does not vary. Did you mean init.gain? Varied: init.gain.',
        ),
        (
            {"vary": GAINS, "baseline": {"init.gain": -1}},
            ": baseline: init.gain is -1, but must be a finite number above 0.",
        ),
        (
            {"vary": {"init.gain": "lin:1:2:200"}, "seeds": 51},
            ": 200 cells x 51 seeds are 10200 members, but at most 10000 fit a run. Vary less.",
        ),
        ("log", ' is "log", but must be a section. Write [sweep].'),
    ],
)
def test_a_wrong_table_is_refused_in_words(table, said):
    with pytest.raises(ConfigError) as refused:
        parse_table({"sweep": table}, where="c.toml")
    assert str(refused.value) == f"c.toml: sweep{said}"


def test_a_setting_that_stands_twice_in_a_table_is_not_half_ignored():
    vary = {"init": {"gain": [1, 2]}, "init.gain": [3, 4]}
    with pytest.raises(ConfigError):
        parse_table({"sweep": {"vary": vary}})


def test_exactly_as_many_members_as_fit_are_taken():
    sweep = parse_table({"sweep": {"vary": {"init.gain": "lin:1:2:100"}, "seeds": 100}}).sweep
    assert len(sweep.vary[0].values) * len(sweep.seeds) == 10_000


def test_a_setting_that_varies_twice_is_refused():
    with pytest.raises(ConfigError) as refused:
        swept("init.gain=1,2", "init.std=1,2", "init.gain=3,4")
    assert str(refused.value) == "sweep: init.gain varies twice. Put all its values into one list."


@pytest.mark.parametrize(
    ("arm", "sweep", "key"),
    [
        ({"init": {"gain": 2.0}}, {"vary": GAINS}, "init.gain"),
        ({"train": {"seed": 2}}, {"vary": {"init": {"std": [1, 2]}}, "seeds": 2}, "train.seed"),
    ],
)
def test_a_setting_of_an_arm_cannot_vary_too(arm, sweep, key):
    with pytest.raises(ConfigError) as refused:
        parse_table({"arm": [{"name": "a", **arm}], "sweep": sweep}, where="c.toml")
    assert str(refused.value) == (f"c.toml: sweep: {key} varies, but arm a sets it too. Drop one of them.")


def test_a_cell_that_cannot_be_is_named():
    with pytest.raises(ConfigError, match=r"d_model=65: model\.n_heads is 2, which does not divide"):
        members_of(swept("model.d_model=64,65"))


@pytest.mark.parametrize(
    "texts",
    [
        ["optimizer.lr=log:1e-3:1:3", "attention.qk_norm=false,true"],
        [
            "attention.window=[4,0,4,0],8",
            "clip.threshold=none,0.25",
            "optimizer.betas=[0.9,0.95],[0,0]",
        ],
        ["optimizer.lr=0.1,0.2", "attention.scale=none,0.5", "optimizer.momentum=0.5,0.9"],
    ],
)
def test_a_sweep_survives_its_way_through_toml_and_tables(texts, tmp_path):
    arms = parse_table({"arm": [{"name": "a b", "init": {"gain": 2}}, {"name": "c"}]})
    config = swept(*texts, seeds=[3, 1], config=arms)
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "c.toml") == config
    assert parse_table(to_table(config)) == config


def test_the_axes_keep_their_order_on_the_way_to_members():
    config = swept("optimizer.lr=0.1,0.2", "attention.scale=none,0.5", "optimizer.momentum=0.5,0.9")
    assert names(config)[:3] == [
        "lr=0.1 scale=none momentum=0.5",
        "lr=0.1 scale=none momentum=0.9",
        "lr=0.1 scale=0.5 momentum=0.5",
    ]
