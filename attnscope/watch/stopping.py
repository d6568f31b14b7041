"""Stops a watched script where a condition is met (`attnscope.signals.conditions`).

A condition is looked at after every step, which waits for the device: that is what stopping at the step costs.
"""

from typing import NoReturn

from attnscope.signals.conditions import Condition

STOPPED = 3  # exit code


class StoppedError(SystemExit):
    """Raised in the watched script where a condition is met; a script that catches every Exception does not catch it."""


def stop(condition: Condition, found: str) -> NoReturn:
    """End the script from where it is."""
    error = StoppedError(STOPPED)
    error.add_note(f"attnscope: stopped on {condition.text}: {found}")
    raise error
