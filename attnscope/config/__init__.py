"""What a run is asked to do. Reading order: schema (every setting), parse, together, members."""

from attnscope.config.members import Member, members_of, with_control, without_control
from attnscope.config.parse import (
    apply_changes,
    get_setting,
    load_config,
    parse_assignment,
    parse_table,
    parse_toml,
    to_table,
    to_toml,
)
from attnscope.config.schema import PER_MEMBER, SECTIONS, SETTINGS, Arm, Config, check_of
from attnscope.config.together import check_together, warnings_of
from attnscope.config.wording import nearest

__all__ = [
    "PER_MEMBER",
    "SECTIONS",
    "SETTINGS",
    "Arm",
    "Config",
    "Member",
    "apply_changes",
    "check_of",
    "check_together",
    "get_setting",
    "load_config",
    "members_of",
    "nearest",
    "parse_assignment",
    "parse_table",
    "parse_toml",
    "to_table",
    "to_toml",
    "warnings_of",
    "with_control",
    "without_control",
]
