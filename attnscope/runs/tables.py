"""The tables of a run, for who reads them one or several at a time."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import pandas as pd


class RunTables(Protocol):
    """What was recorded: of one run, or of several that are compared."""

    @property
    def steps(self) -> "pd.DataFrame": ...

    @property
    def heads(self) -> "pd.DataFrame": ...

    @property
    def layers(self) -> "pd.DataFrame": ...

    @property
    def params(self) -> "pd.DataFrame": ...
