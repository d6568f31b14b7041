"""Programs that are runs of the lab: a config, changed as `--set` changes it, trained by itself without a twin beside it."""

import math
from pathlib import Path

from attnscope.bench.faults.fault import Changes
from attnscope.bench.faults.loop import EVERY, Result
from attnscope.config import Config, apply_changes, check_together, get_setting
from attnscope.errors import AttnscopeError
from attnscope.runs.events import Evaluated
from attnscope.runs.reader import Run, open_run
from attnscope.train.run import train_run

LAB_RELATIVE = ("optimizer.lr",)  # settings of which a change says how many times those of the base

COMMON: Changes = {
    "model.d_model": 64,
    "model.n_layers": 3,
    "model.n_heads": 4,
    "model.norm": "pre",
    "init.embedding_std": 0.02,
    "optimizer.name": "adamw",
    "optimizer.lr": 2e-3,
    "optimizer.warmup_steps": 10,
    "train.steps": 150,
    "train.device": "cpu",
    "train.checkpoint_every": 0,
    "record.every": EVERY,
}
ENCODER: Changes = {
    "model.kind": "encoder",
    "model.n_layers": 2,
    "attention.mask": "padding",
    "data.objective": "masked",
    "data.batch_size": 16,
    "optimizer.lr": 3e-3,
    "train.steps": 200,
}

# Each trains well as it is. Halves as in `bases`.
LAB_BASES: dict[str, Changes] = {
    "lab pre": {},
    "lab pre sgd": {"optimizer.name": "sgd", "optimizer.lr": 0.1},
    "lab no norm sgd": {
        "model.norm": "none",
        "init.embedding_std": 0.3,
        "optimizer.name": "sgd",
        "optimizer.lr": 0.02,
        "clip.threshold": 1.0,
    },
    "lab post": {"model.norm": "post", "optimizer.lr": 1e-3, "optimizer.warmup_steps": 30},
    "lab rope": {"model.position": "rope", "model.norm_kind": "rmsnorm", "data.source": "markov"},
    "lab alibi": {"model.position": "alibi", "data.source": "markov"},
    "lab encoder": ENCODER,
    "lab encoder rope": {**ENCODER, "model.position": "rope"},
    "lab qk-norm": {"attention.qk_norm": True, "data.source": "recall"},
    "lab no norm": {"model.norm": "none", "init.embedding_std": 0.3, "optimizer.lr": 1e-3, "data.source": "recall"},
    "lab muon": {"optimizer.name": "muon", "optimizer.lr": 0.01},
    "lab muon rope": {"optimizer.name": "muon", "optimizer.lr": 0.01, "model.position": "rope"},
    "lab post markov": {
        "model.norm": "post",
        "optimizer.lr": 1e-3,
        "optimizer.warmup_steps": 30,
        "model.activation": "silu",
        "data.source": "markov",
    },
}


def config_of(base: str, changes: Changes, *, seed: int) -> Config:
    """The config of a base with changes; of LAB_RELATIVE settings, so many times what it has.

    Raises:
        ConfigError: they do not go together.
    """
    where = f"bench faults, {base}"
    config = apply_changes(Config(), {**COMMON, **LAB_BASES[base]}, where=where)
    times = {key: get_setting(config, key) * changes[key] for key in LAB_RELATIVE if key in changes}  # type: ignore[operator]
    seeded = {**changes, **times, "train.seed": seed, "data.seed": seed}
    config = apply_changes(config, seeded, where=where)
    check_together(config, where=where)
    return config


def train_lab(config: Config, path: Path) -> Result:
    """Train it into a new run directory, as `attnscope train` does."""
    try:
        train_run(config, path, command=("attnscope", "bench", "faults"))
    except (AttnscopeError, RuntimeError) as error:
        return Result(final_loss=math.nan, held_out_loss=math.nan, error=str(error).splitlines()[0])
    run = open_run(path)
    (member,) = run.members
    final = math.nan if member.final_loss is None or member.status == "diverged" else member.final_loss
    return Result(final_loss=final, held_out_loss=_held_out(run))


def _held_out(run: Run) -> float:
    """After training; NaN where nothing was left to evaluate."""
    losses = [evaluated.val_loss for _, _, evaluated in run.happened(Evaluated)]
    return losses[-1] if losses else math.nan
