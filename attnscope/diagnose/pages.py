"""A page for each rule, made of its docstring, with the values of the thresholds that it names.

`README.md` beside this file is what `pages` returns; `pytest --overwrite tests/diagnose` writes it anew.
"""

import inspect
import re
from types import ModuleType

from attnscope.diagnose import applied_scale, courses, harm, levels, products
from attnscope.diagnose.confidence import measured
from attnscope.diagnose.diagnosis import RULES, Rule
from attnscope.diagnose.rules import logits, saturation
from attnscope.findings import confidence_in_words
from attnscope.runs import divergence, outcome
from attnscope.signals import spikes

SECTIONS = ("What it looks at", "Why it matters", "What to try", "Known limits", "Source")

# Where a threshold stands that the module of the rule does not have.
ELSEWHERE: tuple[ModuleType, ...] = (
    applied_scale,
    courses,
    harm,
    levels,
    products,
    saturation,
    logits,
    spikes,
    divergence,
    outcome,
)

INTRODUCTION = """\
# The rules of `attnscope diagnose`

Each rule looks at one run directory and answers with a finding, with nothing, or that it could not look, and why. A **cause** is
a setting or a state that training starts from or gets into; a **symptom** is what became of training. An **error** broke training
or made what it learned worthless, a **warning** did harm that was measured, or does as a rule; a **note** is odd, may be on
purpose, and no harm of it was measured. **Confidence** is the share of the errors and warnings of a rule that were right in
`attnscope bench faults` ([how it is counted](../bench/faults/README.md)). Generated from the docstrings of [rules/](rules)."""


def pages() -> str:
    """The index and the pages, in the order of RULES."""
    rows = [f"| [`{_name(rule)}`](#{_name(rule)}) | {title_of(rule)} |" for rule in RULES]
    index = ["| rule | what it says |", "| --- | --- |", *rows]
    return "\n\n".join([INTRODUCTION, "\n".join(index), *map(_page, RULES)]) + "\n"


def title_of(rule: Rule) -> str:
    """What it says, in a sentence."""
    return _doc(rule).partition("\n")[0]


def sections_of(rule: Rule) -> dict[str, str]:
    """Each section of its docstring on a line, with the values of the thresholds named."""
    heading = re.compile(rf"^({'|'.join(SECTIONS)}): ", re.MULTILINE)
    _, *pieces = heading.split(_doc(rule))
    texts = zip(pieces[::2], pieces[1::2], strict=True)
    return {name: _with_values(rule, " ".join(text.split()).replace("*", r"\*")) for name, text in texts}


def _page(rule: Rule) -> str:
    said = [f"**{name}.** {_begun(text)}" for name, text in sections_of(rule).items()]
    word, _, share = confidence_in_words(measured().get(_name(rule))).partition(": ")
    return "\n\n".join([f"## {_name(rule)}", title_of(rule), *said, f"**{word}.** {_begun(share)}."])


def _begun(text: str) -> str:
    """With a capital letter, unless it begins with a name of the code."""
    return text if re.match(r"\w+[._]\w", text) else text[0].upper() + text[1:]


def _with_values(rule: Rule, text: str) -> str:
    return re.sub(r"\b[A-Z][A-Z_]{4,}\b", lambda found: _value_of(rule, found.group()), text)


def _value_of(rule: Rule, name: str) -> str:
    """A number beside its name; a sentence in its place.

    Raises:
        KeyError: there is no such threshold.
    """
    values = [vars(module) for module in (inspect.getmodule(rule), *ELSEWHERE) if module]
    value = next((each[name] for each in values if name in each), None)
    if isinstance(value, str):
        return value
    if not isinstance(value, int | float):
        raise KeyError(f"{_name(rule)} names {name}, which is no threshold")
    return f"`{name}` ({value:g})"


def _name(rule: Rule) -> str:
    return rule.__name__


def _doc(rule: Rule) -> str:
    return inspect.getdoc(rule) or ""
