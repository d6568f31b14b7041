"""Every config in configs/ loads, warns of nothing, says what it is, and trains two steps."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

import attnscope
from attnscope.config import load_config, members_of, warnings_of

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))
EXPECTED = {
    "bert_padding",
    "default",
    "depth_scale",
    "fp16_overflow",
    "hybrid_windows",
    "missing_causal_mask",
    "post_ln_warmup",
    "rope_lengths",
    "silent_saturation",
    "sliding_window",
}


def test_they_are_all_there():
    assert {path.stem for path in CONFIGS} >= EXPECTED


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path, tmp_path):
    text = path.read_text()
    header = text[: text.index("\n[")]
    assert f"attnscope train configs/{path.name}" in header
    assert re.search(r"^# Time: .*\d+ s", header, re.MULTILINE)
    assert "# You will see:" in header
    config = load_config(path)
    for member in members_of(config):
        assert warnings_of(member.config) == ()
    short = replace(
        config,
        train=replace(config.train, steps=2, sample_tokens=min(4, config.train.sample_tokens)),
    )
    run = attnscope.train_model(
        replace(short, optimizer=replace(short.optimizer, warmup_steps=0)), path=tmp_path / "run"
    )
    assert run.status == "finished"
    assert [member.last_step for member in run.members] == [1] * len(run.members)
    assert run.steps["loss"].notna().all()
