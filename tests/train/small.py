"""Configs small enough to train in a blink, for the tests of the loop."""

SMALL = {
    "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "seq_len": 12},
    "data": {"batch_size": 4},
    "train": {"steps": 12, "checkpoint_every": 5},
}


def small(**sections):
    """SMALL with these sections on top: small(train={"steps": 3})."""
    merged = {name: dict(section) for name, section in SMALL.items()}
    for name, section in sections.items():
        if isinstance(section, dict):
            merged.setdefault(name, {}).update(section)
        else:
            merged[name] = section
    return merged


PAIR = [
    {"name": "unscaled", "attention": {"scale": "none"}},
    {"name": "scaled", "attention": {"scale": "inverse_sqrt"}},
]
