"""Every rule's words for what it is there for: `texts.md` is read by a person, and refreshed by `pytest --overwrite`."""

from pathlib import Path

import pytest

from attnscope.diagnose import RULES
from attnscope.findings import Finding, label
from tests.diagnose.canonical import RUNS

TEXTS = Path(__file__).parent / "texts.md"


def test_there_is_a_run_for_each_rule_in_their_order():
    assert set(RUNS) == {rule.__name__ for rule in RULES}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rule says of its run."""
    where = tmp_path_factory.mktemp("runs")
    return {rule.__name__: rule(RUNS[rule.__name__](where / rule.__name__)) for rule in RULES}


def test_each_rule_finds_what_it_is_there_for(found):
    assert [name for name, answer in found.items() if not isinstance(answer, Finding)] == []


def test_the_words_of_each_rule(found, golden):
    parts = ["What every rule says, of one run each that has what it is there for.\n"]
    parts += [
        f"## {name}\n\n{each.title}: {label(each)}{'' if each.step is None else f', step {each.step}'}\n\n"
        f"{each.summary}\n\nTry: {each.remedy}\n\nSource: {each.source}\n"
        for name, each in found.items()
    ]
    golden(TEXTS, "\n".join(parts))


def test_evidence_is_of_a_member_that_the_finding_concerns(found):
    for name, each in found.items():
        assert each.evidence and each.members, name
        for piece in each.evidence:
            assert piece.member in each.members and piece.quantity, name
        assert each.rule == name and each.title[-1] not in ".!", name
