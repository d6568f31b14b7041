"""What is told first of each config in configs/ is its story, and arms that are sound in its header have no error.

Trainings are cut to where the story shows, and to the arms that it needs: `pytest -m slow tests/diagnose/test_configs.py`.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import attnscope
from attnscope.cli import app
from attnscope.config import Config, apply_changes, load_config
from attnscope.diagnose.diagnosis import examine

CONFIGS = Path(attnscope.__file__).parent.parent / "configs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What a config shows.

    Attributes:
        steps: after which it shows.
        arms: that are trained; none = all.
        vary: of a sweep, the values along axes that are trained; others are trained in full, with one seed.
        broken: member to rules of which one is to be the cause that is told first.
        sound: members of which no error is told.
    """

    steps: int
    arms: tuple[str, ...] = ()
    vary: dict[str, tuple[object, ...]] = field(default_factory=dict)
    broken: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sound: tuple[str, ...] = ()


STORIES = {
    # The mask is a setting. That it is no error is the story: "very little" becomes of it.
    "bert_padding": Story(
        steps=24, broken={"padding visible": ("padding_attended",)}, sound=("padding masked", "padding visible")
    ),
    # Of the widths, the narrowest and one that diverges at steps 7 to 12.
    "d_head": Story(
        steps=40,
        arms=("d_head 8", "d_head 256"),
        broken={"d_head 256 scale=none": ("applied_scale",)},
        sound=("d_head 8 scale=inverse_sqrt", "d_head 256 scale=inverse_sqrt"),
    ),
    # Diverged by step 9; the others only have to stay calm. Smaller logits help, and so would a lower learning rate.
    "depth_scale": Story(
        steps=40,
        broken={"1/sqrt(d_head)": ("learning_rate_too_high",)},
        sound=("1/((layer + 1) sqrt(d_head))", "1/d_head"),
    ),
    # float16 is not finite from step 6 on. All arms begin with one-hot attention, of logits that overflow there.
    "fp16_overflow": Story(
        steps=24,
        arms=("float32", "float16", "float16 + scaling"),
        broken={
            "float32": ("saturated_at_start",),
            "float16": ("half_precision_headroom", "saturated_at_start"),
            "float16 + scaling": ("half_precision_headroom", "saturated_at_start"),
        },
    ),
    # A task that is learned late: no arm is broken, whether it can be solved or not.
    "hybrid_windows": Story(steps=60, sound=("full", "window 4", "window 4 + full")),
    # Of 144 members, those of Xavier weights that diverge, that hide it, and that rescue it.
    "init_clip": Story(
        steps=60,
        arms=("unclipped", "norm 1"),
        vary={"init.scheme": ("xavier_uniform",), "init.gain": (0.5, 1.0)},
        broken={
            "unclipped scale=none scheme=xavier_uniform gain=1": ("applied_scale",),
            "norm 1 scale=none scheme=xavier_uniform gain=1": ("applied_scale", "clipping_always_on"),
        },
        sound=(
            "unclipped scale=inverse_sqrt scheme=xavier_uniform gain=1",
            "unclipped scale=inverse_sqrt scheme=xavier_uniform gain=0.5",
        ),
    ),
    # The largest logit passes 20 at steps 18 to 22.
    "logit_growth": Story(
        steps=100,
        arms=("plain", "qk_norm", "low lr, qk_norm"),
        broken={"plain": ("learning_rate_too_high", "logit_growth", "entropy_collapse")},
        sound=("qk_norm", "low lr, qk_norm"),
    ),
    # A good learning rate and one that is too high.
    "lr_sensitivity": Story(
        steps=100,
        vary={"attention.scale": ("inverse_sqrt",), "optimizer.lr": (1e-3, 1e-1)},
        broken={"scale=inverse_sqrt qk_norm=false lr=0.1": ("learning_rate_too_high",)},
        sound=("scale=inverse_sqrt qk_norm=false lr=0.001", "scale=inverse_sqrt qk_norm=true lr=0.001"),
    ),
    # The loss is below what token frequencies alone give after 60 to 100 steps.
    "missing_causal_mask": Story(steps=100, broken={"no mask": ("future_visible",)}, sound=("causal",)),
    # 100 of them are the warm-up. Without it, tokens are alike from the first steps on: it is the warm-up that is told.
    "post_ln_warmup": Story(
        steps=160, broken={"no warm-up": ("missing_warmup",)}, sound=("100 steps of warm-up",)
    ),
    "rope_lengths": Story(steps=40, sound=("rope", "alibi", "sinusoidal", "learned")),
    # Diverged by step 10.
    "scale_vs_norm": Story(
        steps=40,
        broken={
            "scale=none norm=none": ("applied_scale",),
            "scale=none norm=pre": ("applied_scale",),
            "scale=none norm=post": ("applied_scale",),
        },
        sound=("scale=inverse_sqrt norm=none", "scale=inverse_sqrt norm=pre", "scale=inverse_sqrt norm=post"),
    ),
    # Attention tells them apart from step 0.
    "silent_saturation": Story(steps=60, broken={"unscaled": ("applied_scale",)}, sound=("scaled",)),
    "sliding_window": Story(steps=40, sound=("full", "window 8", "window 2")),
}  # fmt: skip


def shortened(config: Config, story: Story) -> Config:
    sweep = config.sweep
    if sweep:
        axes = tuple(replace(axis, values=story.vary.get(axis.key, axis.values)) for axis in sweep.vary)
        sweep = replace(sweep, vary=axes, seeds=sweep.seeds[:1])
    arms = tuple(arm for arm in config.arms if not story.arms or arm.name in story.arms)
    config = replace(config, arms=arms, sweep=sweep)
    return apply_changes(config, {"train.steps": story.steps}, where="a test")


def test_every_config_has_a_story():
    assert {*STORIES, "default"} == {path.stem for path in CONFIGS.glob("*.toml")}


@pytest.mark.slow
@pytest.mark.parametrize("name", STORIES)
def test_what_is_told_first_is_the_story_and_sound_arms_have_no_error(tmp_path, name):
    story = STORIES[name]
    run = attnscope.train_model(shortened(load_config(CONFIGS / f"{name}.toml"), story), path=tmp_path / "run")
    said = examine(run).findings
    for finding in said:
        print(f"{finding.severity} {finding.rule} of {finding.members}: {finding.summary}")
    causes = [finding for finding in said if finding.kind == "cause"]
    first = {entry.name: next((f.rule for f in causes if entry.name in f.members), None) for entry in run.entries}
    assert {*story.broken, *story.sound} <= set(first)
    wrong = {name: first[name] for name, right in story.broken.items() if first[name] not in right}
    assert not wrong, "another cause is told first"
    errors = {name: [f.rule for f in said if f.severity == "error" and name in f.members] for name in story.sound}
    assert not any(errors.values()), errors


@pytest.mark.slow
def test_the_default_without_a_scale_is_one_chain_from_there_to_the_nan(tmp_path):
    where = tmp_path / "run"
    command = ["train", "--no-scale", "--set", "train.steps=40", "--out", str(tmp_path), "--name", "run"]
    assert CliRunner().invoke(app, command).exit_code == 0
    diagnosis = examine(attnscope.open_run(where))
    (chain,) = diagnosis.chains
    rules = [finding.rule for finding in chain]
    assert rules[0] == diagnosis.findings[0].rule == "applied_scale"
    assert rules[-2:] == ["loss_explosion", "nonfinite"]
    assert [finding.step for finding in chain] == sorted(finding.step for finding in chain)
    assert all("unscaled" in finding.members for finding in chain)
    assert not [f for f in diagnosis.findings if f.severity == "error" and "scaled" in f.members]
