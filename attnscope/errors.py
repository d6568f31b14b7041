"""The exception tree. Everything a user can cause is an `AttnscopeError`: one line, exit code 1.

AttnscopeError
├── ConfigError      a setting, a TOML file or a command line that cannot be used
├── DataError        a corpus that is missing, empty or too short
├── RunError         a run directory that cannot be opened, created or resumed
│   └── RunWriteError    the record could not be written (disk full, folder gone)
└── ShapeError       tensors handed to the public API that do not fit together

Below it, how any exception is put into words.
"""


class AttnscopeError(Exception):
    """What is wrong, with the value and the place; then the way out. One line."""


class ConfigError(AttnscopeError):
    """A setting, a TOML file or a command line that cannot be used."""


class DataError(AttnscopeError):
    """A corpus that is missing, empty or too short."""


class RunError(AttnscopeError):
    """A run directory that cannot be opened, created or resumed."""


class RunWriteError(RunError):
    """The record could not be written; what was written before is still good."""


class ShapeError(AttnscopeError):
    """Tensors handed to the public API that do not fit together."""


def error_in_words(error: BaseException) -> str:
    """An exception as the end of a traceback names it: its class, and what it says."""
    try:
        said = str(error).strip()
    except Exception:  # a class of somebody else's may fail at that, too
        said = ""
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def error_in_a_line(error: BaseException) -> str:
    """Its class, and the first line of what it says."""
    return error_in_words(error).splitlines()[0]
