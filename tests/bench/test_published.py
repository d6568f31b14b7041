"""What is published of `attnscope bench faults`: tables, pages and confidence are those of the answers that attnscope comes with."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import attnscope.bench.faults
from attnscope.bench.faults.answered import PUBLISHED, read_answers
from attnscope.bench.faults.kinds import FAULTS
from attnscope.bench.faults.population import HEALTHY, REPORTED, TUNED
from attnscope.bench.faults.publish import TITLE
from attnscope.bench.faults.score import TWIN, answers, score
from attnscope.bench.faults.sections import HOW, figures_of, goals_table, leads_table, sections_of
from attnscope.cli import app
from attnscope.diagnose import RULES, confidence
from attnscope.findings import confidence_in_words
from attnscope.report.markdown import table_to_markdown, to_markdown

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGE = Path(attnscope.bench.faults.__file__).parent / "README.md"
FIGURES = ROOT / "examples/bench-faults"
LARGEST = 2 << 20  # bytes of the data: everybody who installs attnscope has them


@pytest.fixture(scope="module")
def published():
    return read_answers()


@pytest.fixture(scope="module")
def scored(published):
    return score(answers(published))


def test_the_published_answers_are_of_known_faults_and_rules_and_of_both_halves(published):
    assert PUBLISHED.stat().st_size < LARGEST
    assert {each.done.half for each in published} == {TUNED, REPORTED}
    assert {each.done.fault for each in published} <= {TWIN, HEALTHY, *(fault.name for fault in FAULTS)}
    rules = {rule.__name__ for rule in RULES}
    assert {said.rule for each in published for said in each.findings} <= rules
    assert len({each.done.case for each in published}) == len(published)


def test_confidence_is_what_the_published_answers_say(scored, golden):
    said = {rule: {"right": each.right, "said": each.said} for rule, each in scored.confidence.items()}
    golden(confidence.FILE, json.dumps(said, indent=1) + "\n")


def test_the_page_of_the_bench_is_what_the_published_answers_say(scored, golden, request):
    figures = figures_of(scored)
    if request.config.getoption("--overwrite"):
        FIGURES.mkdir(exist_ok=True)
        for figure in figures:
            (FIGURES / f"{figure.name}.png").write_bytes(figure.png)
    assert {path.stem for path in FIGURES.glob("*.png")} >= {figure.name for figure in figures}
    folder = "../../../examples/bench-faults"
    golden(PAGE, to_markdown(TITLE, (HOW,), sections_of(scored, figures=figures), folder=folder))


def test_the_tables_of_the_readme_are_what_the_published_answers_say(scored, golden):
    golden(README, table_to_markdown(goals_table(scored)), between=("<!-- bench faults goals -->", "<!-- end -->"))
    if scored.leads is not None:
        leads = table_to_markdown(leads_table(scored.leads))
        golden(README, leads, between=("<!-- bench faults leads -->", "<!-- end -->"))


def test_the_confidence_in_the_readme_is_that_of_its_rule(golden):
    line = f"  {confidence_in_words(confidence.measured().get('clipping_always_on'))}"
    text = README.read_text()
    pattern = re.compile(r"(?<=  that without clipping\n).*")
    assert pattern.search(text), "README.md shows no finding of clipping_always_on"
    golden(README, pattern.sub(line, text))


def test_published_answers_are_scored_without_training(scored):
    shown = CliRunner().invoke(app, ["bench", "faults", "--published"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert f"{scored.healthy} healthy programs: {scored.errors_per_healthy:.3f} errors" in shown.output
    as_json = CliRunner().invoke(app, ["bench", "faults", "--published", "--json"])
    said = json.loads(as_json.output)
    assert said["harmful"] == scored.harmful and len(said["goals"]) == 6
    refused = CliRunner().invoke(app, ["bench", "faults", "--published", "--small"])
    assert refused.exit_code == 2


def test_the_data_are_part_of_the_package():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert not [pattern for pattern in ignored if PUBLISHED.match(pattern) or confidence.FILE.match(pattern)]
