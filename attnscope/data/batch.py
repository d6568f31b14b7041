"""What every source of data produces.

Shape key: B batch, T query position, S key position.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

IGNORE = -100  # in targets: nothing is scored here


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Sequences and what is to be predicted.

    Attributes:
        tokens_BT: int64 ids.
        targets_BT: int64 ids; IGNORE where nothing is scored.
        scores_all: no target is IGNORE.
        visible_BS: False on padding; None where there is none.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    scores_all: bool
    visible_BS: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Losses to compare with, nats per scored token on held-out data; None = unknown.

    Attributes:
        uniform: ln of the number of possible answers.
        unigram: predicting from token frequencies alone: below it, something was learned from context.
        bigram: predicting from the token before.
        optimum: the best loss any model can have.
    """

    uniform: float
    unigram: float
    bigram: float | None
    optimum: float | None


class Corpus(Protocol):
    """A source of batches. Everything is a pure function of the config and the step, so nothing needs saving."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def reference(self) -> Reference:
        """Losses to compare with."""

    @property
    def fingerprint(self) -> dict[str, object]:
        """What identifies the data, as JSON understands it."""

    def train_batch(self, step: int) -> Batch:
        """The batch of a step, on the CPU."""

    def val_batches(self, *, seq_len: int, count: int) -> list[Batch]:
        """The same held-out batches every time, never trained on.

        Raises:
            DataError: too little is held out for sequences of seq_len.
        """

    def prompt(self, length: int) -> Tensor:
        """The beginning of a held-out sequence, int64 (length,)."""

    def decode(self, tokens: Tensor) -> str:
        """Token ids (T,) as text to look at."""
