"""Corpora and tasks: token batches, and the losses that a model without attention would reach on them.

Reading order: batch (what everything here produces), text (bytes of files), tasks (generated, best loss known),
masking (the BERT-like objective), randomness (every draw is a pure function of seed and step).
"""

from attnscope.config.schema import Config, DataConfig
from attnscope.data.batch import IGNORE, Batch, Corpus, Reference
from attnscope.data.masking import Masked
from attnscope.data.tasks import Markov, Modular, Recall
from attnscope.data.text import read_text

__all__ = ["IGNORE", "Batch", "Corpus", "Reference", "data_of", "open_data"]

TASKS: dict[str, type[Markov] | type[Recall] | type[Modular]] = {"markov": Markov, "recall": Recall, "modular": Modular}


def open_data(config: DataConfig, *, seq_len: int) -> Corpus:
    """Open what `data.source` names.

    Args:
        config: the [data] section.
        seq_len: T of the training batches.

    Raises:
        DataError: the source is missing, empty, or too short for sequences of seq_len.
    """
    task = TASKS.get(config.source)
    corpus: Corpus = task(config, seq_len=seq_len) if task else read_text(config, seq_len=seq_len)
    return Masked(corpus, config) if config.objective == "masked" else corpus


def data_of(config: Config) -> Corpus:
    """Open what a member is trained on; members of one part share it.

    Raises:
        DataError: as in `open_data`.
    """
    return open_data(config.data, seq_len=config.model.seq_len)
