"""Bytes of real files: the running Python's own standard library, or any text file or folder.

The first 90 % of the bytes are trained on, the last 10 % are held out; no window crosses the border.

Shape key: B batch, T position, N bytes, V vocab.
"""

import contextlib
import hashlib
import os
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from attnscope.config import nearest
from attnscope.config.schema import DataConfig
from attnscope.config.wording import one_line
from attnscope.data.batch import Batch, Reference
from attnscope.data.randomness import HELD_OUT, TRAIN, generator
from attnscope.errors import DataError

VOCAB_SIZE = 256
TRAIN_PART = 0.9
MAX_BYTES = 1 << 30  # of text in all


class Text:
    """Windows of bytes, drawn uniformly from the train part or the held-out part."""

    vocab_size = VOCAB_SIZE

    def __init__(self, data: bytes, config: DataConfig, *, seq_len: int, fingerprint: dict[str, object]) -> None:
        """Use `read_text`."""
        tokens_N = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        cut = int(TRAIN_PART * len(tokens_N))
        self._train_N, self._held_out_N = tokens_N[:cut], tokens_N[cut:]
        self._config = config
        self._seq_len = seq_len
        self.reference = reference_losses(self._train_N, self._held_out_N)
        self.fingerprint = {
            **fingerprint,
            "sha256": hashlib.sha256(data).hexdigest(),
            "train_tokens": len(self._train_N),
            "held_out_tokens": len(self._held_out_N),
            "seed": config.seed,
        }

    def train_batch(self, step: int) -> Batch:
        """Windows of the train part."""
        return self._batch(self._train_N, TRAIN, step, self._seq_len)

    def val_batches(self, *, seq_len: int, count: int) -> list[Batch]:
        """Windows of the held-out part."""
        self._check_held_out(seq_len + 1, seq_len)  # the target of the last token, too
        return [self._batch(self._held_out_N, HELD_OUT, step, seq_len) for step in range(count)]

    def prompt(self, length: int) -> Tensor:
        """The first bytes of the held-out part."""
        self._check_held_out(length, length)
        return self._held_out_N[:length].long()

    def decode(self, tokens: Tensor) -> str:
        """UTF-8; whatever is not, ids beyond bytes included, becomes a replacement character."""
        return bytes(min(token, VOCAB_SIZE - 1) for token in tokens.tolist()).decode(errors="replace")

    def _check_held_out(self, needed: int, length: int) -> None:
        if len(self._held_out_N) < needed:
            raise DataError(
                f"data.source = {one_line(self._config.source)} holds out {len(self._held_out_N)} bytes, but a "
                f"sequence of {length} tokens needs {needed}. Use more text, or smaller train.eval_lengths."
            )

    def _batch(self, part_N: Tensor, stream: str, step: int, seq_len: int) -> Batch:
        starts_B1 = torch.randint(
            len(part_N) - seq_len,
            (self._config.batch_size, 1),
            generator=generator(self._config.seed, stream, step),
        )
        window_BT = part_N[starts_B1 + torch.arange(seq_len + 1)].long()
        return Batch(
            tokens_BT=window_BT[:, :-1].contiguous(),
            targets_BT=window_BT[:, 1:].contiguous(),
            scores_all=True,
            visible_BS=None,
        )


def read_text(config: DataConfig, *, seq_len: int) -> Text:
    """Read the files that `data.source` names.

    Raises:
        DataError: nothing is there, it cannot be read, it is no text, too much, or too short for seq_len.
    """
    source = config.source
    if source == "stdlib":
        folder = Path(sysconfig.get_paths()["stdlib"])
        paths = sorted(folder.glob("*.py"), key=lambda path: path.name)
    else:
        paths = _files_of(source)
    pieces = _read(paths, source)
    data = b"".join(pieces)
    if not data:
        raise DataError(f"data.source = {one_line(source)} has no text in it. Give a file or folder with text.")
    needed = 10 * (seq_len + 2)  # the held-out tenth must hold a window too
    if len(data) < needed:
        raise DataError(
            f"data.source = {one_line(source)} has {len(data)} bytes, but model.seq_len = {seq_len} needs at "
            f"least {needed}: a tenth is held out and must hold a sequence. Use more text or a shorter seq_len."
        )
    return Text(data, config, seq_len=seq_len, fingerprint={"source": source, "files": len(pieces)})


def reference_losses(train_N: Tensor, held_out_N: Tensor) -> Reference:
    """Cross-entropy of the held-out bytes under counts of the train part with add-one smoothing.

    unigram: -mean ln (c(b) + 1) / (N + 256); bigram: -mean ln (c(a, b) + 1) / (c(a) + 256).
    """
    counts_V = torch.bincount(train_N, minlength=VOCAB_SIZE).double()
    log_p_V = ((counts_V + 1) / (counts_V.sum() + VOCAB_SIZE)).log()
    pairs_VV = _pair_counts(train_N)
    log_p_VV = ((pairs_VV + 1) / (pairs_VV.sum(dim=1, keepdim=True) + VOCAB_SIZE)).log()
    held_V = torch.bincount(held_out_N, minlength=VOCAB_SIZE).double()
    held_VV = _pair_counts(held_out_N)
    return Reference(
        uniform=float(torch.tensor(VOCAB_SIZE).double().log()),
        unigram=float(-(held_V * log_p_V).sum() / held_V.sum()),
        bigram=float(-(held_VV * log_p_VV).sum() / held_VV.sum()),
        optimum=None,
    )


def _pair_counts(tokens_N: Tensor) -> Tensor:
    # int32 is enough for 256 x 256 pairs and half as slow as int64.
    pairs_N = tokens_N[:-1].int() * VOCAB_SIZE + tokens_N[1:]
    counts = torch.bincount(pairs_N, minlength=VOCAB_SIZE**2)
    return counts.view(VOCAB_SIZE, VOCAB_SIZE).double()


def _files_of(source: str) -> list[Path]:
    """The file named, or all files below the folder by relative path; links and what is hidden are left out."""
    path = Path(source)
    try:
        if path.is_dir():
            files = []
            for folder, folders, names in os.walk(path, onerror=_refuse):
                folders[:] = [name for name in folders if not name.startswith(".")]
                visible = [Path(folder, name) for name in names if not name.startswith(".")]
                files += [file for file in visible if file.is_file() and not file.is_symlink()]
            return sorted(files, key=lambda file: file.relative_to(path).as_posix())
        if path.is_file():
            return [path]
        exists = path.exists()
    except OSError as error:
        raise _unreadable(source, error) from None
    if exists:
        raise DataError(f"data.source = {one_line(source)} is neither a file nor a folder. Give a text file.")
    beside: list[str] = []
    with contextlib.suppress(OSError):  # no hint from a folder that is missing or cannot be listed
        beside = [neighbour.name for neighbour in path.parent.iterdir() if neighbour.name != path.name]
    hint = nearest(path.name, [*beside, "stdlib", "markov", "recall", "modular"])
    raise DataError(
        f"data.source = {one_line(source)}: no such file or folder.{hint} Sources: stdlib, markov, recall, "
        "modular, or a path."
    )


def _read(paths: list[Path], source: str) -> list[bytes]:
    """What stands in the files, without the binary ones."""
    pieces, room = [], MAX_BYTES
    try:
        for path in paths:
            if path.stat().st_size > room:
                raise DataError(f"data.source = {one_line(source)} has more than {MAX_BYTES} bytes. Use less text.")
            piece = path.read_bytes()
            if b"\0" not in piece:
                pieces.append(piece)
                room -= len(piece)
    except OSError as error:
        raise _unreadable(source, error) from None
    return pieces


def _refuse(error: OSError) -> None:
    """For os.walk, which would pass over a folder that it cannot list."""
    raise error


def _unreadable(source: str, error: OSError) -> DataError:
    unreadable = Path(error.filename or source)  # a failing read names no file
    inside = "" if unreadable == Path(source) else f": {one_line(unreadable)}"
    return DataError(
        f"data.source = {one_line(source)}{inside} cannot be read: {error.strerror}. Give text that can be."
    )
