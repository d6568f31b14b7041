"""The BERT-like objective on top of any corpus (Devlin et al. 2019): predict masked tokens, reading both ways.

Sequences differ in length; the rest is padding. Two ids are added behind the vocabulary: the mask and the padding.

Shape key: B batch, T position.
"""

import torch
from torch import Tensor

from attnscope.config.schema import DataConfig
from attnscope.data.batch import IGNORE, Batch, Corpus, Reference
from attnscope.data.randomness import MASK, generator

CHOSEN = 0.15  # of the real positions; of these,
MASKED = 0.8  # become the mask token,
REPLACED = 0.1  # become a random token, and the rest stays as it is
SHORTEST = 4  # a sequence has at least seq_len / 4 tokens


class Masked:
    """Masks what another corpus gives."""

    def __init__(self, corpus: Corpus, config: DataConfig) -> None:
        self._corpus = corpus
        self._seed = config.seed
        self._base = corpus.vocab_size
        self.vocab_size = self._base + 2
        reference = corpus.reference
        self.reference = Reference(uniform=reference.uniform, unigram=reference.unigram, bigram=None, optimum=None)
        self.fingerprint = {**corpus.fingerprint, "objective": "masked"}

    def train_batch(self, step: int) -> Batch:
        """The corpus' batch, masked and padded."""
        return self._mask(self._corpus.train_batch(step), step, f"{MASK} train")

    def val_batches(self, *, seq_len: int, count: int) -> list[Batch]:
        """The corpus' held-out batches, masked and padded."""
        batches = self._corpus.val_batches(seq_len=seq_len, count=count)
        return [self._mask(batch, i, f"{MASK} held out") for i, batch in enumerate(batches)]

    def prompt(self, length: int) -> Tensor:
        """As the corpus has it, unmasked."""
        return self._corpus.prompt(length)

    def decode(self, tokens: Tensor) -> str:
        """As the corpus does; in text, mask and padding show as replacement characters, elsewhere as their ids."""
        return self._corpus.decode(tokens)

    def _mask(self, batch: Batch, step: int, stream: str) -> Batch:
        draw = generator(self._seed, stream, step)
        original_BT = batch.tokens_BT
        n_batch, seq_len = original_BT.shape
        shortest = max(2, seq_len // SHORTEST)
        length_B1 = torch.randint(shortest, seq_len + 1, (n_batch, 1), generator=draw)
        real_BT = torch.arange(seq_len) < length_B1
        chosen_BT = (torch.rand(n_batch, seq_len, generator=draw) < CHOSEN) & real_BT
        chosen_BT[0, 0] |= ~chosen_BT.any()  # a batch without a target has no loss
        fate_BT = torch.rand(n_batch, seq_len, generator=draw)
        random_BT = torch.randint(self._base, (n_batch, seq_len), generator=draw)
        tokens_BT = original_BT.where(~(chosen_BT & (fate_BT < MASKED)), self._base)
        replaced_BT = chosen_BT & (fate_BT >= MASKED) & (fate_BT < MASKED + REPLACED)
        tokens_BT = tokens_BT.where(~replaced_BT, random_BT)
        return Batch(
            tokens_BT=tokens_BT.where(real_BT, self._base + 1),
            targets_BT=original_BT.where(chosen_BT, IGNORE),
            scores_all=False,
            visible_BS=real_BT,
        )
