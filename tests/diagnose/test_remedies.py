"""What a rule advises works on the fault it is advised for: `pytest -m slow tests/diagnose/test_remedies.py`.

A rule is to find the fault by itself: beside its twin it would know the answer, so no member is the twin of another. Seeds of
a sound member end within 0.05 nats of each other; a remedy has to be better by more than twice that. Rules of what this lab
has no setting for are not here.
"""

from dataclasses import dataclass

import pytest

import attnscope
from attnscope.diagnose import diagnose
from attnscope.runs.events import Generated

pytestmark = pytest.mark.slow

NOISE = 0.1  # nats

PRE = {
    "model.d_model": 64, "model.n_layers": 2, "model.n_heads": 2, "model.norm": "pre", "init.embedding_std": 0.02,
    "optimizer.name": "adamw", "optimizer.lr": 3e-3, "optimizer.warmup_steps": 10, "train.steps": 120,
    "train.checkpoint_every": 0,
}  # fmt: skip
SGD = {**PRE, "optimizer.name": "sgd", "optimizer.lr": 0.1, "optimizer.warmup_steps": 0}
BARE = {
    **SGD, "model.norm": "none", "model.n_layers": 4, "optimizer.lr": 1e-3, "init.embedding_std": 1.0, "train.steps": 80,
}  # fmt: skip
DEEP = {
    **BARE, "model.d_model": 32, "model.n_layers": 8, "model.seq_len": 16, "data.batch_size": 4, "train.steps": 40,
}  # fmt: skip
POST = {**PRE, "model.norm": "post", "model.n_layers": 4, "optimizer.warmup_steps": 0, "train.steps": 80}
HALF = {**PRE, "precision.dtype": "float16", "init.qk_gain": 60.0, "train.steps": 40}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A fault, and what is advised.

    Attributes:
        rule: that finds it.
        fault: settings.
        remedies: what is changed, one thing after the other: each is tried alone.
    """

    rule: str
    fault: dict[str, object]
    remedies: tuple[dict[str, object], ...]


CASES = (
    Case(
        rule="applied_scale",
        fault={**PRE, "attention.scale": "none", "model.n_heads": 1},
        remedies=({"attention.scale": "inverse_sqrt"},),
    ),
    Case(
        rule="saturated_at_start",
        fault={**PRE, "init.qk_gain": 8.0},
        remedies=({"init.qk_gain": 1.0}, {"attention.qk_norm": True}),
    ),
    Case(rule="saturated_at_start", fault={**PRE, "init.gain": 3.0}, remedies=({"init.gain": 1.0},)),
    Case(
        rule="first_loss_too_high",
        fault={**PRE, "model.tie_embeddings": True, "init.embedding_std": 1.0, "optimizer.lr": 1e-3},
        remedies=({"init.embedding_std": 0.02},),
    ),
    Case(
        rule="learning_rate_too_high",
        fault={**PRE, "optimizer.lr": 3e-2},
        remedies=({"optimizer.lr": 3e-3},),
    ),
    Case(rule="learning_rate_too_high", fault={**SGD, "optimizer.lr": 1.0}, remedies=({"optimizer.lr": 0.1},)),
    Case(
        rule="learning_rate_too_low",
        fault={**PRE, "optimizer.lr": 3e-6},
        remedies=({"optimizer.lr": 3e-5}, {"optimizer.lr": 3e-4}, {"optimizer.lr": 3e-3}),
    ),
    Case(
        rule="missing_warmup",
        fault={**SGD, "optimizer.lr": 0.3, "train.steps": 60},
        remedies=({"optimizer.warmup_steps": 12},),
    ),
    Case(rule="adam_epsilon_too_large", fault={**PRE, "optimizer.eps": 1.0}, remedies=({"optimizer.eps": 1e-8},)),
    Case(
        rule="weight_decay_too_strong",
        fault={**PRE, "optimizer.weight_decay": 10.0},
        remedies=({"optimizer.weight_decay": 1.0},),
    ),
    Case(
        rule="clipping_always_on",
        fault={**SGD, "clip.threshold": 0.02},
        remedies=({"clip.threshold": 3.0},),
    ),
    Case(
        rule="half_precision_headroom",
        fault=HALF,
        remedies=({"precision.dtype": "bfloat16"}, {"attention.backend": "sdpa"}, {"attention.qk_norm": True}),
    ),
    Case(
        rule="loss_scale_collapse",
        fault={**HALF, "precision.loss_scaling": True, "init.qk_gain": 50.0, "train.steps": 60},
        remedies=({"init.qk_gain": 1.0}, {"precision.dtype": "bfloat16", "precision.loss_scaling": False}),
    ),
    # qk_clip and a soft-cap remove the finding, too, and hardly better the loss here: 2.96 and 2.90 after 2.97.
    Case(
        rule="logit_growth",
        fault={**PRE, "optimizer.lr": 3e-2},
        remedies=(
            {"optimizer.lr": 3e-3},
            {"attention.qk_norm": True},
        ),
    ),
    Case(
        rule="entropy_collapse",
        fault={**PRE, "optimizer.lr": 3e-2},
        remedies=({"optimizer.lr": 3e-3}, {"attention.qk_norm": True}),
    ),
    Case(
        rule="starved_queries_and_keys",
        fault={**PRE, "optimizer.lr": 0.3},
        remedies=({"optimizer.lr": 3e-3},),
    ),
    Case(
        rule="rank_collapse",
        fault={**POST, "optimizer.lr": 1e-2},
        remedies=({"optimizer.lr": 1e-3}, {"model.norm": "pre"}),
    ),
    Case(
        rule="uniform_attention",
        fault={**PRE, "attention.scale": 1e-4},
        remedies=({"attention.scale": "inverse_sqrt"},),
    ),
    Case(
        rule="gradients_vanish_with_depth",
        fault={**POST, "optimizer.lr": 1e-2},
        remedies=({"optimizer.lr": 1e-3}, {"model.norm": "pre"}),
    ),
    Case(
        rule="gradients_explode_with_depth",
        fault={**DEEP, "init.gain": 1.4},
        remedies=({"init.gain": 0.8}, {"model.norm": "pre"}),
    ),
    Case(
        rule="loss_explosion",
        fault={**BARE, "attention.scale": "none"},
        remedies=({"attention.scale": "inverse_sqrt"}, {"attention.qk_norm": True}, {"optimizer.lr": 1e-4}),
    ),
)


def nested(settings):
    config = {}
    for key, value in settings.items():
        section, name = key.split(".")
        config.setdefault(section, {})[name] = value
    return config


def trained(path, *several):
    """Members with these settings, none the twin of another: of what each begins with, one number that nothing uses differs."""
    arms = [{"name": f"{n}", **nested(each | {"init.std": 0.02 + n / 1000})} for n, each in enumerate(several)]
    run = attnscope.train_model({"arm": arms} if len(arms) > 1 else nested(several[0]), path=path)
    found = [{f.rule for f in diagnose(run) if record.name in f.members} for record in run.members]
    for settings, record, rules in zip(several, run.members, found, strict=True):
        print(f"{record.status} {record.final_loss:.3f} {sorted(rules)} {settings}")
    return run, list(zip(run.members, found, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule} {next(iter(case.remedies[0]))}")
def test_each_remedy_alone_removes_the_finding_and_betters_the_loss(tmp_path, case):
    _, ((fault, found), *others) = trained(tmp_path / "run", case.fault, *(case.fault | each for each in case.remedies))
    assert case.rule in found
    failed = []
    for change, (better, left) in zip(case.remedies, others, strict=True):
        broke = fault.status == "diverged"
        is_better = better.status != "diverged" and (broke or better.final_loss < fault.final_loss - NOISE)
        if case.rule in left or not is_better:
            failed.append((change, better.status, better.final_loss, sorted(left)))
    assert failed == []


def test_a_causal_mask_makes_what_is_generated_better(tmp_path):
    settings = {**PRE, "train.sample_tokens": 60}
    run, ((_, found), (_, left)) = trained(
        tmp_path / "run", settings | {"attention.mask": "none"}, settings | {"attention.mask": "causal"}
    )
    assert {"future_visible", "loss_too_low"} <= found and not {"future_visible", "loss_too_low"} & left
    alone = {member: generated.loss_from_prefixes for _, member, generated in run.happened(Generated)}
    assert alone["1"] < alone["0"] - 1


def test_a_padding_mask_leaves_no_finding(tmp_path):
    settings = {**PRE, "model.kind": "encoder", "data.objective": "masked", "train.steps": 20}
    _, ((_, found), (_, left)) = trained(
        tmp_path / "run", settings | {"attention.mask": "none"}, settings | {"attention.mask": "padding"}
    )
    assert "padding_attended" in found and "padding_attended" not in left
