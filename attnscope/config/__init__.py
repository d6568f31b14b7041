"""What a run is asked to do. Reading order: schema (every setting), scale, change, parse, sweep, together, members."""

from attnscope.config.change import apply_changes, get_setting
from attnscope.config.members import Member, members_of, with_control, without_control
from attnscope.config.parse import load_config, parse_assignment, parse_table, parse_toml, to_table, to_toml
from attnscope.config.scale import scale_of
from attnscope.config.schema import PER_MEMBER, SECTIONS, SETTINGS, Arm, Axis, Config, DataConfig, Sweep, check_of
from attnscope.config.sweep import SEED, make_sweep, parse_vary, short_names, value_text
from attnscope.config.together import check_together, warnings_of
from attnscope.config.wording import nearest

__all__ = [
    "PER_MEMBER",
    "SECTIONS",
    "SEED",
    "SETTINGS",
    "Arm",
    "Axis",
    "Config",
    "DataConfig",
    "Member",
    "Sweep",
    "apply_changes",
    "check_of",
    "check_together",
    "get_setting",
    "load_config",
    "make_sweep",
    "members_of",
    "nearest",
    "parse_assignment",
    "parse_table",
    "parse_toml",
    "parse_vary",
    "scale_of",
    "short_names",
    "to_table",
    "to_toml",
    "value_text",
    "warnings_of",
    "with_control",
    "without_control",
]
