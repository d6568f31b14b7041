"""The rule `attention.scale` as a number."""


def scale_of(rule: str | float, *, d_head: int, layer: int = 0) -> float | None:
    """What multiplies q.k in a layer; None where it is trained, and begins at 1.

    inverse_sqrt: 1/√d_head (Vaswani et al. 2017) · none: 1 · inverse: 1/d_head (Yang et al. 2022, µP) · depth:
    1/((layer + 1) √d_head) (Karamcheti et al. 2021, Mistral) · a number: itself · learned: None.
    """
    if not isinstance(rule, str):
        return float(rule)
    return {
        "inverse_sqrt": d_head**-0.5,
        "none": 1.0,
        "inverse": 1 / d_head,
        "depth": d_head**-0.5 / (layer + 1),
        "learned": None,
    }[rule]
