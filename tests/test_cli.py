"""Tests of support/cli.py: lengths are exact, a mistake ends in one line and exit code 2."""

import os
import re
import signal
from dataclasses import dataclass, fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import PackConfig, format_length, option, parse_cli, parse_length
from data import run_main as run
from support import cli
from support.files import whole_folder

property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(("text", "tokens"), [
    ("512k", 524_288), ("64K", 65_536), ("4m", 4 * 2**20), ("20B", 20 * 2**30), (2048, 2048),
    ("1", 1), ("03k", 3072),
])
def test_parse_length_is_binary(text, tokens):
    """k, m and b are powers of two, in either case; a plain number is itself."""
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["12q", "", "-1", "0", "0k", "1.5k", "k", "2kk", "2km", "k2",
                                  "2 k", "1e3", "0x10", "1_000", "+1", 0, -1, 2.5, None, True])
def test_parse_length_refuses_what_is_no_length(text):
    """Anything but a positive whole number with one unit is refused, and shown in the message."""
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_length(text)


@property_test
@given(st.integers(1, 2**45) | st.integers(1, 2**10).map(lambda n: n * 2**20))
def test_format_length_is_parse_lengths_inverse(tokens):
    """A length survives being written and read, and is never written longer than plainly."""
    text = format_length(tokens)
    assert parse_length(text) == tokens
    assert len(text) <= max(2, len(str(tokens)))
    assert [format_length(n) for n in (1000, 1536, 524_288)] == ["1000", "1536", "512k"]


@dataclass(frozen=True)
class Options:
    """One field of each kind that a config may have."""

    seq_len: int = option(2048, "tokens", parse_length)
    lr: float | None = option(None, "learning rate", float)
    name: str = option("tiny", "a name")
    reorder: bool = option(True, "sort a step's sequences")
    plan: bool = option(False, "only say what would be done")


@pytest.mark.parametrize(("argv", "config"), [
    ([], Options()),
    (["--seq-len", "2k", "--lr", "1e-5"], Options(seq_len=2048, lr=1e-5)),
    (["--seq-len=64k", "--name=", "--no-reorder"], Options(seq_len=65_536, name="", reorder=False)),
    (["--no-reorder", "--reorder", "--plan"], Options(reorder=True, plan=True)),
    (["--plan", "--no-plan", "--lr", "-1"], Options(lr=-1.0)),
])
def test_parse_cli_fills_the_config(argv, config):
    """Dashes become underscores, a bool has its --no- twin; the later of two wins."""
    assert parse_cli(Options, "doc", argv) == config
    assert parse_cli(PackConfig, "doc", ["--from", "documents"]).from_ == "documents"


@pytest.mark.parametrize(("argv", "named"), [
    (["--unknown", "1"], "--unknown"), (["--seq", "2k"], "--seq"), (["--no-lr"], "--no-lr"),
    (["--seq-len", "12q"], "'12q' is not a positive whole number"), (["--seq-len"], "--seq-len"),
    (["--lr", "fast"], "fast"), (["--reorder=yes"], "yes"), (["stray"], "stray"),
])
def test_a_wrong_command_line_ends_in_one_line(argv, named, capsys):
    """Unknown, abbreviated, valueless or badly valued: exit code 2, one line with the culprit."""
    with pytest.raises(SystemExit) as exit:
        parse_cli(Options, "doc", argv)
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert (out, err.count("\n"), err[-1]) == ("", 1, "\n")
    assert named in err


def test_help_shows_every_option_with_its_default(capsys):
    """One line of usage, then groups; each field's flag, its help, its default."""
    with pytest.raises(SystemExit) as exit:
        parse_cli(PackConfig, "What it does.", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    groups = r"What it does\. what to run: --domain TEXT NAME.* --seq N .* data: --rule TEXT long"
    assert re.match(rf"usage: [\w. -]+ \[OPTION \.\.\.\] {groups}", text)
    for field in fields(PackConfig):
        shown = "" if field.default in (None, "") else f" (default: {field.default})"
        assert f"{field.metadata['help']}{shown}" in text


def test_a_terminal_gets_printable_text():
    """Letters of any script, line breaks and tabs pass; escape and control characters do not."""
    said = "naïve 中文\n\tx\x1b[2J\x07\x9b\u202e"
    assert cli.printable(said) == "naïve 中文\n\tx?[2J???"


@pytest.mark.parametrize(("error", "raised"), [(ValueError, SystemExit), (OSError, SystemExit),
                                               (KeyError, KeyError)])
def test_run_main_makes_the_users_mistake_one_line(error, raised, capsys):
    """A wrong value or file ends in one line and code 2; any other exception is a bug."""
    def main():
        raise error("seq is too long")

    with pytest.raises(raised) as exit:
        run(main)
    if raised is SystemExit:
        assert exit.value.code == 2
        assert re.fullmatch(r"\S+: error: seq is too long\n", capsys.readouterr().err)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_run_main_ends_by_a_signal(tmp_path, capsys, number):
    """In one line, with a shell's code for it; what is half written is taken away."""
    def main():
        with whole_folder(tmp_path / "packs"):
            os.kill(os.getpid(), number)

    before = signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
    with pytest.raises(SystemExit) as exit:
        run(main)
    signal.signal(number, before)
    assert exit.value.code == 128 + number and not [*tmp_path.iterdir()]
    said = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    assert re.fullmatch(rf"\S+: {said}\n", capsys.readouterr().err)
