"""Every config in configs/ loads, warns of nothing, says what it is, and trains two steps."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

import attnscope
from attnscope.config import Config, load_config, members_of, warnings_of

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))
EXPECTED = {
    "bert_padding",
    "d_head",
    "default",
    "depth_scale",
    "fp16_overflow",
    "hybrid_windows",
    "init_clip",
    "logit_growth",
    "lr_sensitivity",
    "missing_causal_mask",
    "post_ln_warmup",
    "rope_lengths",
    "scale_vs_norm",
    "silent_saturation",
    "sliding_window",
}


def shortened(config: Config) -> Config:
    """Two steps; of a sweep, one seed and two values of each setting."""
    sweep = config.sweep
    if sweep:
        axes = tuple(replace(axis, values=axis.values[:2]) for axis in sweep.vary)
        sweep = replace(sweep, vary=axes, seeds=sweep.seeds[:1])
    return replace(
        config,
        sweep=sweep,
        train=replace(config.train, steps=2, sample_tokens=min(4, config.train.sample_tokens)),
        optimizer=replace(config.optimizer, warmup_steps=0),
    )


def test_they_are_all_there():
    assert {path.stem for path in CONFIGS} == EXPECTED


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path, tmp_path):
    text = path.read_text()
    header = text[: text.index("\n[")]
    config = load_config(path)
    command = "sweep" if config.sweep else "train"
    assert f"attnscope {command} configs/{path.name}" in header
    assert re.search(r"^# Time: .*\d+ s", header, re.MULTILINE)
    assert re.search(r"^# You will see: .{40}", header, re.MULTILINE)
    for member in members_of(config):
        assert warnings_of(member.config) == ()
    run = attnscope.train_model(shortened(config), path=tmp_path / "run")
    assert run.status == "finished"
    assert [member.last_step for member in run.members] == [1] * len(run.members)
    assert run.steps["loss"].notna().all()
