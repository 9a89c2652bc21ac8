"""The README's commands are real: each is run here with fewer steps, or checked against the parser."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import data
import model
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.strip() for line in README.splitlines()
            if line.startswith("    ") and re.match(r"\s+(torchrun|python|python3|\.venv/bin/python) ", line)]


def python_part(command: str) -> list[str]:
    """The script and its arguments, without comment and launcher."""
    words = shlex.split(command, comments=True)
    return words[next(i for i, word in enumerate(words) if word.endswith(".py")):]


def test_there_are_exactly_two_setup_commands():
    """One line runs the main job, one passes the tests; both set up by themselves."""
    setups = [command for command in COMMANDS if "-m venv" in command]
    assert len(setups) == 2
    assert setups[0].endswith("train.py") and setups[1].endswith("pytest")


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c and "-m venv" not in c])
def test_train_commands_parse_and_name_what_exists(command):
    """Every option exists, and recipe, stage and lengths are known."""
    config = data.parse_cli(train.TrainConfig, None, python_part(command)[1:])
    if not config.resume:
        stages = train.choose_stages(config, head_dim=16)
        assert stages and all(stage.steps > 0 for stage in stages)
    assert config.model in model.PRESETS


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python data.py")])
def test_data_commands_run(command, tmp_path):
    """They are small: run as they stand, one after another, in an empty folder."""
    for each in COMMANDS:
        if each.startswith("python data.py"):
            script, *arguments = python_part(each)
            done = subprocess.run([sys.executable, str(ROOT / script), *arguments], cwd=tmp_path,
                                  capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        if each == command:
            break


def test_every_function_that_the_readme_links_exists():
    """`name` in a link to a file is defined in that file."""
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", README)
    assert len(links) >= 15
    for name, file in links:
        source = (ROOT / file).read_text()
        assert re.search(rf"^(def|class) {name}\b|^{name}\b.*=", source, re.M), (name, file)


def test_figures_exist():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).stat().st_size > 10_000
