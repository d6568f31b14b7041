"""The attention scales that members apply, where they are not 1/sqrt(d_head)."""

import math
from dataclasses import dataclass

from attnscope.config import Config, scale_of
from attnscope.diagnose.blindness import without_attention, without_config
from attnscope.findings import Evidence
from attnscope.runs.by_member import configs_of
from attnscope.runs.reader import Run
from attnscope.runs.watched import attention_layers

FITTED_TOLERANCE = 0.03  # of a scale that was fitted to logits: what the fit may leave unexplained, and a digit
SCALE_TOLERANCE = 0.01  # a scale typed with two digits is meant to be 1/sqrt(d_head)


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """The scale of one layer of a member, the one furthest from 1/sqrt(d_head).

    Attributes:
        member: its name.
        layer: its number.
        name: of the layer in a watched run.
        scale: what multiplies q.k.
        d_head: size of a query.
        layers: all layers of the member that are off.
        of: how many layers it has.
        is_normed: whether q and k are normalized before.
    """

    member: str
    layer: int
    name: str | None
    scale: float
    d_head: int
    layers: tuple[int, ...]
    of: int
    is_normed: bool = False

    @property
    def times(self) -> float:
        """Of 1/sqrt(d_head)."""
        return abs(self.scale) * math.sqrt(self.d_head)

    @property
    def evidence(self) -> Evidence:
        """As a finding has it."""
        return Evidence(
            member=self.member,
            layer=self.layer,
            group=self.name,
            quantity="attention.scale" if self.name is None else "scale",
            value=self.scale,
            threshold=self.d_head**-0.5,
        )


def odd_scales(run: Run) -> list[Applied]:
    """Each member whose scale is not 1/sqrt(d_head), once."""
    return _seen(run) if run.kind == "watch" else _configured(run)


def unseen_scales(run: Run) -> dict[str, str]:
    """Members of which not every scale is known, and why."""
    if run.kind != "watch":
        return without_config(run)
    unseen: dict[str, list[bool]] = {}
    for layer in attention_layers(run):
        unseen.setdefault(layer.member, []).append(layer.scale is None)
    found = without_attention(run)
    for entry in run.entries:
        layers = unseen.get(entry.name, [])
        if not layers:
            found.setdefault(entry.name, "no attention layer was seen")
        elif any(layers):
            found[entry.name] = (
                f"the scale of {sum(layers)} of {len(layers)} attention layers could not be seen, or is no single number"
            )
        else:
            found.pop(entry.name, None)
    return found


def _configured(run: Run) -> list[Applied]:
    found = []
    for entry, config in zip(run.entries, configs_of(run), strict=True):
        odd = None if config is None else _odd_scale(config)
        if config is None or odd is None:
            continue
        n_layers, by_depth = config.model.n_layers, config.attention.scale == "depth"
        found.append(
            Applied(
                member=entry.name,
                layer=odd[0],
                name=None,
                scale=odd[1],
                d_head=config.d_head,
                layers=tuple(range(int(by_depth), n_layers)),  # depth leaves layer 0 as it is
                of=n_layers,
                is_normed=config.attention.qk_norm,
            )
        )
    return found


def _seen(run: Run) -> list[Applied]:
    found = []
    by_member: dict[str, list[Applied]] = {}
    counts: dict[str, int] = {}
    for layer in attention_layers(run):
        if not layer.scale:
            continue
        counts[layer.member] = counts.get(layer.member, 0) + 1
        if not math.isclose(abs(layer.scale), layer.d_head**-0.5, rel_tol=FITTED_TOLERANCE):
            by_member.setdefault(layer.member, []).append(
                Applied(
                    member=layer.member,
                    layer=layer.layer,
                    name=layer.name,
                    scale=layer.scale,
                    d_head=layer.d_head,
                    layers=(layer.layer,),
                    of=1,
                )
            )
    for member, layers in by_member.items():
        worst = max(layers, key=lambda each: abs(math.log(each.times)))
        found.append(
            Applied(
                member=member,
                layer=worst.layer,
                name=worst.name,
                scale=worst.scale,
                d_head=worst.d_head,
                layers=tuple(each.layer for each in layers),
                of=counts[member],
            )
        )
    return found


def _odd_scale(config: Config) -> tuple[int, float] | None:
    """The layer in which the scale is furthest from 1/sqrt(d_head), and the scale there; None where it is that."""
    rule, d_head = config.attention.scale, config.d_head
    if d_head < 1:
        return None
    layer = config.model.n_layers - 1 if rule == "depth" else 0
    scale = scale_of(rule, d_head=d_head, layer=layer)
    if scale is None or math.isclose(scale, d_head**-0.5, rel_tol=SCALE_TOLERANCE):
        return None
    return layer, scale
