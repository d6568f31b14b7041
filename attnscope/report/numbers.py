"""How numbers are written for people: the same in tables, sentences and figures."""

import math


def number(value: float | None) -> str:
    """At most five characters or so: 0.02, 3.02, 18.1, 1083, 7.3e9, nan; - where there is none."""
    if value is None:
        return "-"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if 0.01 <= abs(value) < 9999.5:
        return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"
