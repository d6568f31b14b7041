"""Arms -> members -> parts: who is trained, and who shares one batched part.

A member is one model with one fully resolved config. Members that differ in per-member settings only are trained
together along the axis `M` of one part; any other difference makes a new part.
"""

from collections import Counter
from dataclasses import dataclass, replace

from attnscope.config.change import apply_changes, get_setting
from attnscope.config.parse import parse_table, to_table
from attnscope.config.schema import PER_MEMBER, SETTINGS, Arm, Config
from attnscope.config.sweep import arms_of
from attnscope.config.together import check_together
from attnscope.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One model of a run: `index` is its position along the axis `M` of part `part`."""

    name: str
    config: Config
    settings: dict[str, object]
    part: int
    index: int


def with_control(config: Config) -> Config:
    """The comparison behind `--no-scale`: an unscaled arm and its scaled twin, everything else equal."""
    _only_one_arm(config, "--no-scale")
    return replace(
        config,
        arms=(
            Arm(name="unscaled", changes={"attention.scale": "none"}),
            Arm(name="scaled", changes={"attention.scale": "inverse_sqrt"}),
        ),
    )


def without_control(config: Config) -> Config:
    """`--no-scale --no-control`: the unscaled arm alone."""
    _only_one_arm(config, "--no-scale")
    return apply_changes(config, {"attention.scale": "none"}, where="--no-scale")


def members_of(config: Config, *, where: str = "config") -> tuple[Member, ...]:
    """Resolve every arm and sort the members into parts.

    Raises:
        ConfigError: the config or one of its arms asks for something impossible.
    """
    # A config that was put together by hand is checked like a file.
    config = parse_table(to_table(config), where=where)
    arms = arms_of(config) or (Arm(name=_default_name(config), changes={}),)
    alone = replace(config, arms=(), sweep=None)
    parts: dict[Config, int] = {}
    counts: Counter[int] = Counter()
    members: list[Member] = []
    for arm in arms:
        where_it_stands = f"{where}: arm {arm.name}" if config.arms or config.sweep else where
        resolved = apply_changes(alone, arm.changes, where=where_it_stands)
        check_together(resolved, where=where_it_stands)
        part = parts.setdefault(_graph_of(resolved), len(parts))
        settings = {
            key: get_setting(resolved, key)
            for key in SETTINGS
            if get_setting(resolved, key) != get_setting(alone, key) or key in arm.changes
        }
        members.append(Member(name=arm.name, config=resolved, settings=settings, part=part, index=counts[part]))
        counts[part] += 1
    return tuple(members)


def _graph_of(config: Config) -> Config:
    """The config with every per-member setting set aside: equal for members that can share a part."""
    default = Config()
    neutral = {key: get_setting(default, key) for key in PER_MEMBER}
    if config.attention.scale == "learned":  # a trained scale is a parameter, not a number
        neutral["attention.scale"] = "learned"
    return apply_changes(config, neutral, where="config")


def _only_one_arm(config: Config, flag: str) -> None:
    if config.sweep:
        raise ConfigError(f"{flag} makes two arms, but the config has a [sweep]. Vary attention.scale in it.")
    if config.arms:
        names = ", ".join([*(arm.name for arm in config.arms[:3]), *["..."] * (len(config.arms) > 3)])
        raise ConfigError(
            f"{flag} makes its own two arms, but the config already has {len(config.arms)} ({names}). "
            "Drop the flag, or the [[arm]] tables."
        )


def _default_name(config: Config) -> str:
    scale = config.attention.scale
    words = {"inverse_sqrt": "scaled", "none": "unscaled"}
    return words.get(scale, f"scale-{scale}") if isinstance(scale, str) else f"scale-{scale:g}"
