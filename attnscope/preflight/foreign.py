"""Preflight of a model in hand with one batch: its checks, its attention, its gradients where it returns a loss, and the rules.

Shape key: B batch, H head, T query position, S key position, K d_head, V vocab.
"""

import contextlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from attnscope.capture.calls import applied_scale, attention_calls, visible_keys
from attnscope.capture.names import places, unwrapped, without_wrappers
from attnscope.capture.seen import Scaled, Seen, measure
from attnscope.check.batch import read_batch
from attnscope.check.case import SEED, call, in_mode
from attnscope.check.eager import eagerly
from attnscope.check.model import check_model
from attnscope.check.output import rows_in
from attnscope.check.undisturbed import undisturbed
from attnscope.diagnose import Diagnosis, examine
from attnscope.diagnose.products import FLOAT16_MAX
from attnscope.metrics.attention import attention_stats
from attnscope.metrics.totals import HEAD_COLUMNS, add, finish
from attnscope.preflight.lab import rules_that_looked
from attnscope.preflight.result import Expected, GradNorm, LayerFacts, Needed, Preflight, Quantity
from attnscope.preflight.theory import MOST_LOGITS, ROWS, TOLD
from attnscope.runs.environment import environment
from attnscope.runs.events import AttentionSeen, Event
from attnscope.runs.layout import COLUMNS, MemberEntry
from attnscope.runs.reader import open_run
from attnscope.runs.writer import RunWriter

MEMBER = "model"
MEASURED_LOGITS = 1 << 27  # of a call; of a larger one ROWS query positions are measured


@dataclass(slots=True, kw_only=True)
class SeenLayer:
    """One attention layer of the forward pass.

    Attributes:
        seen: how its first call is described in a run.
        totals: of all its calls, TOTALS to (H,).
        predicted: column to what independent entries of the size of its q and k give; empty where they are not known.
    """

    seen: AttentionSeen
    totals: dict[str, Tensor]
    predicted: dict[str, float | None]


@dataclass(slots=True, kw_only=True)
class Passed:
    """What one forward and one backward pass have shown.

    Attributes:
        layers: in the order of their first calls.
        loss: that the model returned; None = it returned none.
        n_classes: of its output logits.
        gradients: layer and group of parameters to the norm, the largest entry and how many are not finite.
        weights: the same to the norm of the weights.
    """

    layers: list[SeenLayer]
    loss: float | None
    n_classes: int | None
    gradients: dict[tuple[int, str], tuple[float, float, int]]
    weights: dict[tuple[int, str], float]


def preflight_model(
    model: nn.Module, batch: object, *, causal: bool | None = None, target: str = "model", command: Sequence[str] = ()
) -> Preflight:
    """Check, measure and judge a model before it is trained; it is left exactly as it was, as are random numbers.

    Args:
        model: any module.
        batch: as `attnscope.check_model` takes it; with labels, if the model computes its loss.
        causal: whether the model is meant to be causal; None = say what it is.
        target: what it is called.
        command: that asked for it.

    Raises:
        AttnscopeError: as `attnscope.check_model`.
    """
    checks = check_model(model, batch, causal=causal)
    model = unwrapped(model)
    with eagerly(model), undisturbed(model):
        passed = _pass(model, batch)
        n_bytes = 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
        n_bytes += sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    diagnosis = _judged(passed, command)
    return Preflight(
        target=target,
        members=(_expected(passed),),
        needs=(
            Needed(
                members=(MEMBER,),
                quantities=(Quantity(name="weights and gradients", unit="bytes", measured=n_bytes),),
            ),
        ),
        checks=tuple(("", check) for check in checks),
        diagnosis=diagnosis,
        rules=rules_that_looked(diagnosis),
    )


def _pass(model: nn.Module, batch: object) -> Passed:
    layers: dict[tuple[str, int], SeenLayer] = {}

    def on_call(name: str, _: nn.Module | None, seen: Seen) -> None:
        n_batch, n_heads, n_queries, n_keys = seen.shape
        rows: int | str = "all" if n_batch * n_heads * n_queries * n_keys <= MEASURED_LOGITS else ROWS
        totals = measure(seen, rows=rows, seed=0).totals
        layer = layers.get((name, n_heads))
        if layer is None:
            described = _described(len(layers), name, seen)
            predicted = _predicted(seen, described.scale_after)
            layers[name, n_heads] = SeenLayer(seen=described, totals=totals, predicted=predicted)
        else:
            layer.totals = add(layer.totals, totals)

    read = read_batch(model, batch)
    loss, gradients, n_classes = None, {}, None
    with in_mode(model, "training", seed=SEED), torch.enable_grad():
        with attention_calls(model, on_call):
            output = call(model, read, keep=read.raw)
        found = _loss_in(output)
        if found is not None:
            loss = float(found.detach())
            with contextlib.suppress(RuntimeError):  # an operation without a gradient
                found.backward()
        rows = rows_in(output, len(read.real_BT), read.n_positions, "positions")
        if rows is not None and rows.shape[-1] > 1:
            n_classes = rows.shape[-1]
        gradients = _gradients(model)
    return Passed(
        layers=list(layers.values()),
        loss=loss,
        n_classes=n_classes,
        gradients=gradients,
        weights=_by_group(model, lambda p: float(p.detach().float().square().sum())),
    )


def _described(number: int, name: str, seen: Seen) -> AttentionSeen:
    scale = applied_scale(seen)
    after = None if scale is None or not seen.factor else scale / seen.factor
    return AttentionSeen(
        layer=number,
        name=name,
        n_heads=seen.shape[1],
        d_head=seen.d_head,
        scale=scale,
        scale_after=after,
        mask=seen.mask,
        dtype=str(seen.dtype).removeprefix("torch."),
        backend=seen.backend,
    )


@torch.no_grad()
def _predicted(seen: Seen, scale: float | None) -> dict[str, float | None]:
    """The softmax of drawn q and k whose entries are independent and as large as those of the call."""
    if seen.q is None or seen.k is None or scale is None:
        return {}
    generator = Generator().manual_seed(SEED)
    n_batch, n_heads, n_queries, n_keys = seen.shape
    most = MOST_LOGITS // (n_heads * n_queries * n_keys)
    n_drawn = max(1, min(n_batch, most))
    q, k = (
        float(x.detach().float().square().mean().sqrt()) * torch.randn((n_drawn, *x.shape[1:]), generator=generator)
        for x in (seen.q, seen.k)
    )
    bias = seen.logits.bias if isinstance(seen.logits, Scaled) else None
    stats = attention_stats(
        q,
        k,
        scale,
        visible_keys(seen)[:n_drawn].cpu(),
        bias=None if bias is None else bias.expand(seen.shape)[:n_drawn].float().cpu(),
        rows="all" if most else ROWS,
    )
    told: dict[str, float | None] = {name: float(stats[name].mean()) for name in TOLD}
    told["max_logit"] = float(stats["max_logit"].max()) if most >= n_batch else None
    return told


def _loss_in(output: Any) -> Tensor | None:
    """The first number with a gradient that is called loss, or stands alone among what the model returns."""
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    several = list(output) if isinstance(output, tuple | list) else [output]
    for x in (named, *several):
        if isinstance(x, Tensor) and x.numel() == 1 and x.is_floating_point() and x.requires_grad:
            return x.reshape(())
    return None


def _gradients(model: nn.Module) -> dict[tuple[int, str], tuple[float, float, int]]:
    found: dict[tuple[int, str], tuple[float, float, int]] = {}
    for place, p in _placed(model):
        if p.grad is None:
            continue
        grad = p.grad.to_dense().float()
        norm, most, broken = found.get(place, (0.0, 0.0, 0))
        found[place] = (
            math.hypot(norm, float(torch.linalg.vector_norm(grad))),
            max(most, float(grad.abs().max())) if grad.numel() else most,
            broken + int((~grad.isfinite()).sum()),
        )
    return found


def _by_group(model: nn.Module, square: Any) -> dict[tuple[int, str], float]:
    found: dict[tuple[int, str], float] = {}
    for place, p in _placed(model):
        found[place] = found.get(place, 0.0) + square(p)
    return {place: math.sqrt(total) for place, total in found.items()}


def _placed(model: nn.Module) -> list[tuple[tuple[int, str], nn.Parameter]]:
    """Every parameter with its layer and group."""
    named = [(without_wrappers(name), p) for name, p in model.named_parameters()]
    at = places(dict(enumerate(name for name, _ in named)))
    return [(at[number], p) for number, (_, p) in enumerate(named)]


def _judged(passed: Passed, command: Sequence[str]) -> Diagnosis:
    """What the rules say of a watched run of this one step."""
    with tempfile.TemporaryDirectory(prefix="attnscope-") as folder:
        path = Path(folder) / "rehearsal"
        RunWriter.create(
            path,
            command=command,
            config=None,
            members=[MemberEntry(name=MEMBER, part=0, index=0, settings={})],
            environment=environment(),
            data={"watched": {"every": 1, "rows": "all", "layers": []}},
        )
        writer = RunWriter(path).part(0)
        for layer in passed.layers:
            writer.event(Event(step=0, member=0, what=layer.seen))
            _append_heads(writer, layer)
        if passed.loss is not None:
            _append_step(writer, passed)
        writer.finish("interrupted")
        return examine(open_run(path))


def _append_heads(writer: Any, layer: SeenLayer) -> None:
    stats = finish(layer.totals)
    columns = {name: stats[name].detach().float().cpu().numpy() for name in HEAD_COLUMNS}
    n_heads = len(columns["entropy"])
    keys = {"step": 0, "member": 0, "layer": layer.seen.layer}
    columns |= {name: np.full(n_heads, value) for name, value in keys.items()}
    no_update = np.full(n_heads, np.nan)
    writer.append("heads", {**columns, "head": np.arange(n_heads), "attn_form_update_ratio": no_update})


def _append_step(writer: Any, passed: Passed) -> None:
    step = {name: np.full(1, np.nan) for name in COLUMNS["steps"]}
    step |= {name: np.zeros(1, dtype=np.int64) for name in ("step", "member", "tokens")}
    step |= {"clip_factor": np.ones(1), "loss_scale": np.ones(1)}
    step["loss"] = np.array([passed.loss])
    step["grad_norm"] = np.array([_total(passed)])
    writer.append("steps", step)
    places = list(passed.gradients)
    if not places:
        return
    n = len(places)
    unknown = np.full(n, np.nan)
    writer.append(
        "params",
        {
            "step": np.zeros(n, dtype=np.int64),
            "member": np.zeros(n, dtype=np.int64),
            "layer": np.array([layer for layer, _ in places]),
            "group": np.array([group for _, group in places], dtype=object),
            "grad_norm": np.array([passed.gradients[place][0] for place in places]),
            "grad_max": np.array([passed.gradients[place][1] for place in places]),
            "nonfinite": np.array([passed.gradients[place][2] for place in places]),
            "weight_norm": np.array([passed.weights[place] for place in places]),
            "update_norm": unknown,
            "update_ratio": unknown,
        },
    )


def _total(passed: Passed) -> float:
    return math.hypot(*(norm for norm, _, _ in passed.gradients.values())) if passed.gradients else math.nan


def _expected(passed: Passed) -> Expected:
    layers = []
    for layer in passed.layers:
        stats = finish(layer.totals)
        measured = {name: float(stats[name].max() if name == "max_logit" else stats[name].mean()) for name in TOLD}
        layers.append(
            LayerFacts(
                layer=layer.seen.layer,
                name=layer.seen.name,
                quantities=tuple(
                    Quantity(name=name, predicted=layer.predicted.get(name), measured=measured[name]) for name in TOLD
                ),
            )
        )
    compared = () if passed.n_classes is None else (("ln V", math.log(passed.n_classes)),)
    quantities = [Quantity(name="first_loss", unit="nats", measured=passed.loss, compared=compared)]
    products = [
        float(finish(layer.totals)["max_logit"].max()) / layer.seen.scale_after if layer.seen.scale_after else None
        for layer in passed.layers
    ]
    known = [product for product in products if product is not None]
    limit = ("largest float16", FLOAT16_MAX)
    if passed.layers:
        most = max(float(finish(layer.totals)["max_logit"].max()) for layer in passed.layers)
        before = max(known) if len(known) == len(products) else None
        quantities.append(Quantity(name="largest q.k", measured=before, compared=(limit,)))
        quantities.append(Quantity(name="max_logit", measured=most, compared=(limit,)))
    if passed.gradients:
        quantities.append(Quantity(name="grad_norm", measured=_total(passed)))
    return Expected(
        member=MEMBER,
        layers=tuple(layers),
        quantities=tuple(quantities),
        gradients=tuple(
            GradNorm(layer=layer, group=group, norm=norm)
            for (layer, group), (norm, _, _) in sorted(passed.gradients.items(), key=lambda item: item[0][0])
        ),
    )
