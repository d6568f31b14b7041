"""How a member was trained and what became of it, as a tracker shows it beside the curves."""

from attnscope.config import SETTINGS, get_setting
from attnscope.errors import RunError
from attnscope.runs.foreign import printable
from attnscope.runs.layout import to_json
from attnscope.runs.members import MemberRecord
from attnscope.runs.reader import Run

LONGEST_TEXT = 500  # characters; trackers refuse or cut longer ones
OUTCOME = ("status", "error", "diverged_at", "nonfinite_at", "first_loss", "best_loss", "final_loss")

Setting = bool | int | float | str


def settings_of(run: Run, member: MemberRecord, lost: list[str]) -> dict[str, Setting]:
    """Every setting of a member by its whole name, like attention.scale; of a watched run, its command.

    Args:
        run: of the member.
        member: whose settings go before those of the run.
        lost: takes one line if the config of the run cannot be understood.
    """
    settings: dict[str, object] = {}
    if run.kind == "watch":
        settings["command"] = " ".join(run.command)
    else:
        try:
            settings |= {key: get_setting(run.config, key) for key in SETTINGS}
        except RunError as error:
            lost += {str(error)} - set(lost)
    settings |= member.settings
    return {printable(key): _shown(value) for key, value in settings.items()}


def outcome_of(member: MemberRecord) -> dict[str, Setting]:
    """How a member ended, without what is not known."""
    outcome = {name: getattr(member, name) for name in OUTCOME}
    return {name: value for name, value in outcome.items() if value is not None}


def _shown(value: object) -> Setting:
    if isinstance(value, bool | int | float):
        return value
    return printable(value if isinstance(value, str) else to_json(value), LONGEST_TEXT)
