"""The README shows what the commands really print, and commands that exist."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from attnscope.cli import app

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
COMMANDS = get_command(app).commands
AS_TYPED = {"COLUMNS": "80", "TERMINAL_WIDTH": "80"}


def shown(*words):
    done = CliRunner().invoke(app, [*words, "--help"], prog_name="attnscope", env=AS_TYPED)
    assert done.exit_code == 0, done.output
    return done.output.strip()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_in_readme(name, golden):
    assert COMMANDS[name].help, f"{name} has no help text"
    assert f"<!-- help {name} -->" in README.read_text(), f"README.md does not mention {name}"
    block = f"```text\n{shown(name)}\n```"
    golden(README, block, between=(f"<!-- help {name} -->", "<!-- end -->"))


def test_the_table_of_configs_is_that_of_their_headers(golden):
    rows = ["| config | question | attnscope | time |", "| --- | --- | --- | ---: |"]
    for path in sorted((ROOT / "configs").glob("*.toml")):
        header = path.read_text().partition("\n[")[0]
        question = " ".join(re.findall(r"^# ?(.*)$", header.partition("\n#\n")[0], re.MULTILINE))
        time = re.search(r"^# Time: (\d+ s)", header, re.MULTILINE)
        command = re.search(rf"^#   attnscope (\w+) configs/{path.name}\b", header, re.MULTILINE)
        assert question.strip() and time and command, path.name
        cells = (f"[{path.stem}](configs/{path.name})", question.strip(), command[1], time[1])
        rows.append(f"| {' | '.join(cells)} |")
    golden(README, "\n".join(rows), between=("<!-- configs -->", "<!-- end -->"))


def test_every_command_in_the_readme_is_one():
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL)
    inline = re.findall(r"`(attnscope [^`]+)`", README.read_text())
    lines = [line.partition("&& ")[2] or line for block in blocks for line in block.splitlines()]
    commands = [line for line in [*lines, *inline] if line.startswith("attnscope ")]
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command)[1:]
        if words[0] == "watch":  # what comes after the script is the script's
            words = words[: next(at for at, word in enumerate(words) if word.endswith(".py"))]
        assert shown(*words).startswith("Usage: attnscope"), command


def test_files_that_the_readme_links_to_are_there():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text())
    assert len(links) > 3
    for link in links:
        assert (ROOT / link).is_file(), link
