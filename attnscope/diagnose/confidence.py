"""How often each rule was right in `attnscope bench faults`: what `evidence.json` beside this file says.

`pytest --overwrite tests/bench/test_published.py` writes that file, from the published answers.
"""

import json
from pathlib import Path

from attnscope.findings import Confidence

FILE = Path(__file__).with_name("evidence.json")
FEWEST = 5  # errors and warnings: a share of fewer is no measurement


def measured(file: Path = FILE) -> dict[str, Confidence]:
    """Rule to how often it was right, of those that said something FEWEST times."""
    said: dict[str, dict[str, int]] = json.loads(file.read_text())
    return {
        rule: Confidence(right=counts["right"], said=counts["said"])
        for rule, counts in said.items()
        if counts["said"] >= FEWEST
    }
