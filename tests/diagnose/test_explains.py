"""What rules say that they may explain."""

import ast
from pathlib import Path

import attnscope.diagnose.rules
from attnscope.diagnose import RULES

NAMES = {rule.__name__ for rule in RULES}
FILES = sorted(Path(attnscope.diagnose.rules.__file__).parent.glob("*.py"))


def explained_in(path):
    """Texts in what is given as `explains`, or is named so."""
    for node in ast.walk(ast.parse(path.read_text())):
        targets = node.targets if isinstance(node, ast.Assign) else []
        is_named = any(isinstance(target, ast.Name) and target.id.startswith("EXPLAIN") for target in targets)
        if is_named or (isinstance(node, ast.keyword) and node.arg == "explains"):
            for part in ast.walk(node.value):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


def test_rules_explain_only_rules_that_there_are():
    explained = {(path.name, name) for path in FILES for name in explained_in(path)}
    assert len(explained) > 50
    assert {each for each in explained if each[1] not in NAMES} == set()


def test_everything_that_becomes_of_training_is_explained_by_something():
    explained = {name for path in FILES for name in explained_in(path)}
    assert explained >= {"loss_explosion", "nonfinite", "stalled", "entropy_collapse", "logit_growth", "plateau"}
