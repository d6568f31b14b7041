"""The pages of the rules are those of their docstrings."""

from pathlib import Path

import pytest

import attnscope.diagnose
from attnscope.diagnose import RULES
from attnscope.diagnose.pages import SECTIONS, pages, sections_of, title_of
from attnscope.diagnose.rules.clipping import clipping_always_on

README = Path(attnscope.diagnose.__file__).parent / "README.md"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_has_a_title_and_every_section_in_order(rule):
    assert title_of(rule).endswith(".")
    assert tuple(sections_of(rule)) == SECTIONS
    assert all(len(text) > 8 and text.endswith(".") for text in sections_of(rule).values())


def test_the_readme_is_what_the_docstrings_say(golden):
    golden(README, pages())


def test_there_is_a_page_for_each_rule_in_their_order():
    titles = [line[3:] for line in pages().splitlines() if line.startswith("## ")]
    assert titles == [rule.__name__ for rule in RULES]


def test_thresholds_stand_with_the_values_that_the_rules_use():
    looked = sections_of(clipping_always_on)["What it looks at"]
    assert "`HARMLESS_FACTOR` (0.5)" in looked and "`FEWEST_STEPS` (20)" in looked


def test_a_threshold_that_does_not_exist_is_refused():
    def rule(_):
        """Nothing.

        What it looks at: NO_SUCH_LIMIT.
        """

    with pytest.raises(KeyError, match="rule names NO_SUCH_LIMIT, which is no threshold"):
        sections_of(rule)
