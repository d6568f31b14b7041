"""The programs that faults are put into; each trains well as it is.

Every other one belongs to the half that thresholds may be chosen on, from the first on, and the rest to the half that is told
of. Each half has decoders and an encoder, norms before, after and nowhere, SGD, AdamW and Muon, rotary and learned positions,
and three sources of data.
"""

from attnscope.bench.faults.borrowed import has_transformers
from attnscope.bench.faults.recipe import Recipe

BASES: dict[str, Recipe] = {
    "written pre": Recipe(attention="written"),
    "sdpa rope": Recipe(position="rope", source="markov"),
    "encoder": Recipe(attention="mha", objective="masked", lr=3e-3, n_layers=2, batch_size=16, steps=200),
    "written post": Recipe(attention="written", norm="post", lr=1e-3, warmup=30),
    "no norm sgd": Recipe(attention="written", norm="none", optimizer="sgd", lr=0.02, embedding_std=0.3),
    # Muon's own iteration is slow on a CPU, so its matrices are small.
    "sdpa muon": Recipe(optimizer="muon", lr=0.01, d_model=32, n_layers=2),
    "sdpa pre": Recipe(source="recall", dropout=0.1),
    "pre sgd": Recipe(attention="written", optimizer="sgd", lr=0.1),
    "post swiglu": Recipe(
        attention="written", norm="post", position="rope", mlp="swiglu", source="markov", lr=1e-3, warmup=30
    ),
    "written encoder": Recipe(
        attention="written", objective="masked", position="rope", lr=3e-3, n_layers=2, batch_size=16, steps=200
    ),
    "rope muon": Recipe(
        attention="written", position="rope", mlp="swiglu", optimizer="muon", lr=0.01, d_model=32, n_layers=2
    ),
    "no norm adamw": Recipe(norm="none", source="recall", embedding_std=0.3),
    "gpt2": Recipe(attention="gpt2", source="markov"),
    "gpt2 dropout": Recipe(attention="gpt2", dropout=0.1),
}


def available() -> dict[str, Recipe]:
    """Those that can be built here: the rest needs transformers."""
    return {name: recipe for name, recipe in BASES.items() if recipe.attention != "gpt2" or has_transformers()}
