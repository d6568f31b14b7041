"""Counter-based randomness: a generator per (seed, stream, step), so that any step can be drawn without the others."""

import hashlib

from torch import Generator

TRAIN, HELD_OUT, STRUCTURE, MASK = "train", "held out", "structure", "mask"


def generator(seed: int, stream: str, step: int = 0) -> Generator:
    """A CPU generator that depends on nothing but its arguments; different arguments give unrelated draws."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}".encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
