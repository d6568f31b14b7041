"""Sweeps that take seconds, and what is left when they end."""

import attnscope
from attnscope.config import members_of, parse_table

TINY = {
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "seq_len": 8},
    "data": {"source": "markov", "batch_size": 2},
    "train": {"steps": 40},
    "optimizer": {"lr": 0.05},
}
GRID = {
    "vary": {
        "attention": {"scale": ["inverse_sqrt", "none"]},
        "model": {"norm": ["none", "pre"]},
        "init": {"gain": [0.5, 4.0]},
    },
    "seeds": 2,
}


def tiny(*, sweep=GRID, **changes):
    """A config with a sweep of 16 members in two parts."""
    table = {key: {**TINY.get(key, {}), **changes.get(key, {})} for key in {*TINY, *changes}}
    return parse_table({**table, "sweep": sweep})


def members(**changes):
    return members_of(tiny(**changes))


def table_of(path):
    """What a sweep comes to: outcome, steps and losses of every member, as texts, in which nan equals nan."""
    run = attnscope.open_run(path)
    return {
        member.name: (
            member.status,
            member.diverged_at,
            member.last_step,
            repr(member.first_loss),
            repr(member.final_loss),
        )
        for member in run.members
    }
