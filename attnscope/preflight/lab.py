"""Preflight of a config: every member predicted, rehearsed on a throw-away copy, checked and judged."""

import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from attnscope.check.result import Checked
from attnscope.config import Config, Member, members_of, scale_of
from attnscope.data import Reference
from attnscope.diagnose import RULES, Diagnosis, examine
from attnscope.diagnose.products import FLOAT16_MAX
from attnscope.preflight import memory
from attnscope.preflight.rehearsal import Cost, Rehearsed, rehearse
from attnscope.preflight.result import Expected, GradNorm, LayerFacts, Needed, Preflight, Quantity
from attnscope.preflight.theory import TOLD, Theory, theory_of
from attnscope.preflight.wrapped import checks_of
from attnscope.train.run import by_part
from attnscope.train.schedule import lr_at

if TYPE_CHECKING:
    import pandas as pd

LARGEST_FLOAT16 = ("largest float16", FLOAT16_MAX)


def preflight_config(config: Config, *, target: str = "config", command: Sequence[str] = ()) -> Preflight:
    """Predict, measure and judge what `config` does before it is trained; nothing is left behind.

    Args:
        config: with its arms.
        target: what it is called.
        command: that asked for it.

    Raises:
        AttnscopeError: the config or the data cannot be used.
    """
    members = members_of(config)
    with tempfile.TemporaryDirectory(prefix="attnscope-") as folder:
        rehearsed = rehearse(config, Path(folder) / "rehearsal", command=command)
        diagnosis = examine(rehearsed.run)
        expected = tuple(_expected(member, rehearsed) for member in members)
    checks: list[tuple[str, Checked]] = []
    needs = []
    checked: set[tuple[object, ...]] = set()
    for index, part in by_part(members).items():
        first = part[0]
        what = _what_sees(first.config)
        if what not in checked:
            checked.add(what)
            batch, weights = rehearsed.batches[index], rehearsed.weights[index]
            checks += [(first.name, check) for check in checks_of(first.config, weights, 0, batch)]
        needs.append(_needed(part, rehearsed.costs[index], vocab_size=rehearsed.data[index].vocab_size))
    return Preflight(
        target=target,
        members=expected,
        needs=tuple(needs),
        checks=tuple(checks),
        diagnosis=diagnosis,
        rules=rules_that_looked(diagnosis),
    )


def _what_sees(config: Config) -> tuple[object, ...]:
    """What decides who sees whom: members that are alike in it are checked once."""
    return config.model, replace(config.attention, scale=1.0), config.data


def rules_that_looked(diagnosis: Diagnosis) -> tuple[int, int]:
    """How many could look at all, and how many there are."""
    blind = {each.rule for each in diagnosis.not_looked if not each.members}
    return sum(rule.__name__ not in blind for rule in RULES), len(RULES)


def _expected(member: Member, rehearsed: Rehearsed) -> Expected:
    config, data, run = member.config, rehearsed.data[member.part], rehearsed.run
    lr = _first_lr(config)
    theory = theory_of(config, rehearsed.batches[member.part], vocab_size=data.vocab_size, lr=lr)
    heads, layers, params, steps = (
        table[(table["member"] == member.name) & (table["step"] == 0)]
        for table in (run.heads, run.layers, run.params, run.steps)
    )
    by_layer = heads.groupby("layer")[list(TOLD)]
    means, most = by_layer.mean(), by_layer.max()
    rms = layers.set_index("layer")["activation_rms"]
    facts = []
    for layer, told in enumerate(theory.layers):
        measured = {name: float((most if name == "max_logit" else means)[name].loc[layer]) for name in TOLD}
        measured["activation_rms"] = float(rms.loc[layer])
        facts.append(
            LayerFacts(
                layer=layer,
                quantities=tuple(
                    Quantity(name=name, predicted=told[name], measured=measured[name]) for name in measured
                ),
            )
        )
    return Expected(
        member=member.name,
        layers=tuple(facts),
        quantities=(
            _first_loss(theory, steps, data.reference),
            *_headroom(config, theory, facts),
            _grad_norm(config, steps),
            *_updates(config, theory, params, lr),
        ),
        gradients=tuple(
            GradNorm(layer=layer, group=group, norm=float(norm))
            for layer, group, norm in zip(
                params["layer"].tolist(), params["group"].tolist(), params["grad_norm"].tolist(), strict=True
            )
        ),
    )


def _first_loss(theory: Theory, steps: "pd.DataFrame", reference: Reference) -> Quantity:
    return Quantity(
        name="first_loss",
        unit="nats",
        predicted=theory.first_loss,
        measured=float(steps["loss"].iloc[0]),
        compared=(("ln V", reference.uniform), ("unigram", reference.unigram)),
    )


def _headroom(config: Config, theory: Theory, layers: Sequence[LayerFacts]) -> tuple[Quantity, Quantity]:
    """The largest q.k before and after its scale; before it, only where nothing but the scale comes after it."""
    predicted = [_value(facts, "max_logit").predicted for facts in layers]
    measured = [_value(facts, "max_logit").measured or 0.0 for facts in layers]
    before = None
    if not config.attention.logit_softcap and config.model.position != "alibi":
        scales = [
            scale_of(config.attention.scale, d_head=config.d_head, layer=facts.layer) or config.d_head**-0.5
            for facts in layers
        ]
        before = max(logit / scale for logit, scale in zip(measured, scales, strict=True))
    known = [logit for logit in predicted if logit is not None]
    return (
        Quantity(name="largest q.k", predicted=theory.product, measured=before, compared=(LARGEST_FLOAT16,)),
        Quantity(
            name="max_logit",
            predicted=max(known) if len(known) == len(predicted) else None,
            measured=max(measured),
            compared=(LARGEST_FLOAT16,),
        ),
    )


def _grad_norm(config: Config, steps: "pd.DataFrame") -> Quantity:
    threshold = config.clip.threshold
    is_compared = config.clip.mode == "norm" and not isinstance(threshold, str)
    return Quantity(
        name="grad_norm",
        measured=float(steps["grad_norm"].iloc[0]),
        compared=(("clip.threshold", float(threshold)),) if is_compared else (),
    )


def _updates(config: Config, theory: Theory, params: "pd.DataFrame", lr: float) -> tuple[Quantity, ...]:
    """The first update over the weights: of the typical group, the largest, and the same once the learning rate has warmed up."""
    ratios = params["update_ratio"].to_numpy().astype(np.float64)
    predicted = [theory.update_ratio.get(group, math.nan) for group in params["group"]]
    known = bool(predicted) and not any(map(math.isnan, predicted))
    typical, most = float(np.median(ratios)), float(ratios.max())
    at = (("at lr", lr),)
    found = [
        Quantity(
            name="update_ratio, typical",
            predicted=statistics.median(predicted) if known else None,
            measured=typical,
            compared=at,
        ),
        Quantity(name="update_ratio, largest", predicted=max(predicted) if known else None, measured=most, compared=at),
    ]
    peak = config.optimizer.lr
    if lr and peak != lr:
        times = peak / lr
        found.append(
            Quantity(
                name="update_ratio, typical",
                predicted=statistics.median(predicted) * times if known else None,
                measured=typical * times,  # the first update of every optimizer here is proportional to it
                compared=(("at lr", peak),),
            )
        )
    return tuple(found)


def _needed(part: Sequence[Member], cost: Cost, *, vocab_size: int) -> Needed:
    configs = [member.config for member in part]
    steps = configs[0].train.steps
    quantities = [
        Quantity(
            name="weights, gradients, optimizer",
            unit="bytes",
            predicted=sum(memory.state_bytes(config, vocab_size=vocab_size) for config in configs),
            measured=cost.state_bytes * cost.n_members,
        ),
        Quantity(
            name="activations",
            unit="bytes",
            predicted=sum(memory.activation_bytes(config, vocab_size=vocab_size) for config in configs),
            measured=cost.activation_bytes * cost.n_members,
        ),
    ]
    if cost.peak_bytes is not None:
        both = sum(quantity.predicted or 0 for quantity in quantities)
        quantities.append(Quantity(name="peak", unit="bytes", predicted=both, measured=cost.peak_bytes))
    quantities += [
        Quantity(name="a step", unit="seconds", measured=cost.step_s),
        Quantity(name=f"{steps:,} {'step' if steps == 1 else 'steps'}", unit="seconds", measured=cost.step_s * steps),
    ]
    return Needed(members=tuple(member.name for member in part), quantities=tuple(quantities))


def _first_lr(config: Config) -> float:
    optimizer = config.optimizer
    lr_M = lr_at(
        0,
        lr_M=torch.tensor([optimizer.lr]),
        warmup_M=torch.tensor([float(optimizer.warmup_steps)]),
        schedule=optimizer.schedule,
        steps=config.train.steps,
    )
    return optimizer.lr if math.isclose(float(lr_M), optimizer.lr, rel_tol=1e-6) else float(lr_M)


def _value(facts: LayerFacts, name: str) -> Quantity:
    return next(quantity for quantity in facts.quantities if quantity.name == name)
