"""The command line: options are fields of a dataclass, lengths are "512k", errors take one line.

    seq: int = option(2048, "tokens of a packed sequence", parse_length)      ->  --seq 2k
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import math
import os
import signal
import sys
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist


class BadLength(ValueError, argparse.ArgumentTypeError):
    """Of an ArgumentTypeError argparse shows the text; of a ValueError, "invalid value"."""


Entry = TypeVar("Entry")
Config = TypeVar("Config")
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "b": 2**30}
GROUPS = {  # of --help, for all commands: their options, what most people need first
    "what to run": "recipe stage domain from_ from_mds input format seq sequences init model tasks "
                   "lengths prompt compare chat resume out",
    "data": "data mix short_mix template rule ranks text_column where group_by subset split on_bad "
            "tokenizer seed",
    "the step": "steps batch_tokens micro_batch_tokens lr rope_theta weight_decay clip reorder",
    "memory and speed": "dtype seq_parallel_size attention compile activations loss_chunk_tokens "
                        "mlp_tile_tokens head_chunks host_optimizer workers shard_tokens",
    "evaluation and checkpoints": "eval eval_every samples per_context bpb_length save_every keep",
    "answers": "max_new_tokens temperature",
    "plan": "plan world_size",
}
METAVARS = {int: "N", float: "X", str: "TEXT"}


def parse_length(text: str | int) -> int:
    """Read a number of tokens: "512k" is 524,288; k, m, b are 2^10, 2^20, 2^30 (paper, footnote 2).

    Raises ValueError for anything else, and for less than one token.
    """
    digits = str(text).lower().rstrip("kmb")
    unit = str(text).lower()[len(digits):]
    if not digits.isdecimal() or unit not in _UNITS or int(digits) == 0:
        raise BadLength(f"length {text!r} is not a positive whole number with an optional k, m or "
                        "b; write for example 2048, 2k or 20b")
    return int(digits) * _UNITS[unit]


def printable(text: str) -> str:
    """Text for a terminal: what would move its cursor or change its colors becomes "?"."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def warn(text: str) -> None:
    """One line on standard error, from the first rank alone."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(text), file=sys.stderr, flush=True)


def format_length(tokens: int) -> str:
    """The shortest way to write a length: 2048 -> "2k"."""
    unit, size = next(item for item in reversed(_UNITS.items()) if tokens % item[1] == 0)
    return f"{tokens // size}{unit}"


def check_shares(shares: dict[str, float]) -> None:
    """Raise ValueError unless all shares are finite, none negative, and some positive."""
    if not all(share >= 0 for share in shares.values()) or not 0 < sum(shares.values()) < math.inf:
        raise ValueError(f"mixture shares {shares} must be finite, none negative and not all 0")


def parse_mixture(text: str) -> dict[str, float]:
    """Read "recall-2k=0.6,code_repos-2k=0.4". Raises ValueError for anything else."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = (field.strip() for field in part.partition("="))
        try:
            if not name or name in shares:
                raise ValueError
            shares[name] = float(share)
        except ValueError:
            raise ValueError(f"mixture part {part!r} is not NAME=SHARE, each name once; write for "
                             "example recall-2k=0.6,code_repos-2k=0.4") from None
    check_shares(shares)
    return shares


def choose(what: str, name: str, table: Mapping[str, Entry]) -> Entry:
    """Look up `name`, as in choose("recipe", "tiny", RECIPES). An error lists the choices."""
    if name not in table:
        raise ValueError(f"{what} {name!r} is unknown; choose one of {', '.join(table)}")
    return table[name]


def option(default: Any, help: str, parse: Callable[[str], Any] | None = None) -> Any:
    """A dataclass field that is also a command-line option, with its help and its parser."""
    return dataclasses.field(default=default, metadata={"help": help, "parse": parse})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def add_config_args(parser: argparse.ArgumentParser, config: type) -> None:
    """Add an option for each field of a config: `seq_len` becomes `--seq-len`, `from_` `--from`."""
    hints = typing.get_type_hints(config)
    fields = {field.name: field for field in dataclasses.fields(config)}
    for title, names in [*GROUPS.items(), ("options", " ".join(fields))]:
        group = parser.add_argument_group(title)  # an empty one is not shown
        for field in [fields.pop(name) for name in names.split() if name in fields]:
            flag = "--" + field.name.strip("_").replace("_", "-")
            kind, *_ = typing.get_args(hints[field.name]) or [hints[field.name]]  # int | None: int
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
            if kind is not bool:
                how = {"type": field.metadata["parse"] or kind, "metavar": METAVARS[kind]}
            help, default = field.metadata["help"], field.default
            if default not in (None, "") and default is not False:
                help += " (default: %(default)s)"
            group.add_argument(flag, dest=field.name, default=default, help=help, **how)


def parse_cli(config: type[Config], doc: str | None, argv: Sequence[str] | None = None) -> Config:
    """A config of the command line, and which fields it `named`. Unknown flags end in code 2."""
    command = sys.argv[1:2] if argv == sys.argv[2:] else []  # as in "data.py pack"
    parser = _Parser(" ".join([Path(sys.argv[0]).name, *command]), "%(prog)s [OPTION ...]", doc,
                     formatter_class=partial(argparse.RawDescriptionHelpFormatter,
                                             max_help_position=28),
                     add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    add_config_args(parser, config)
    unset = object()  # argparse puts defaults only where there is nothing yet
    found = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    named = {key: value for key, value in vars(parser.parse_args(argv, found)).items()
             if value is not unset}
    built = config(**named)
    object.__setattr__(built, "named", frozenset(named))
    return built


class Diverged(RuntimeError):
    """The loss or the gradient is no longer a number."""


class Stopped(Exception):
    """The run was asked to end, and has saved what it had."""


ENDS: dict[type[BaseException], tuple[int, str]] = {  # exit code, and what is said of it
    Stopped: (0, "stopped as asked"), Diverged: (1, "diverged"),
    KeyboardInterrupt: (130, "interrupted"), ValueError: (2, "error"), OSError: (2, "error")}


class Unbreakable:
    """A stream whose reader may go away, as in `| head`: the rest is lost, and the run goes on."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        stream.reconfigure(errors="replace")  # not every terminal has every letter

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def run_main(main: Callable[[], Any]) -> None:
    """Run a script and exit; SIGTERM and SIGHUP end it, too. Rank 0 says how, in one line."""
    def end(number: int, frame: Any) -> None:
        warn(f"{name}: ended by {signal.Signals(number).name}")
        raise SystemExit(128 + number)

    code, name, first = 0, Path(sys.argv[0]).name, os.environ.get("RANK", "0") == "0"
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)
              if signal.getsignal(number) == signal.SIG_DFL}  # else the shell has us ignore it
    try:
        with (redirect_stdout(Unbreakable(sys.stdout)),  # type: ignore
              redirect_stderr(Unbreakable(sys.stderr))):  # type: ignore
            main()
    except tuple(ENDS) as error:
        code, what = next(ENDS[kind] for kind in ENDS if isinstance(error, kind))
        said = printable(" ".join(f"{name}: {what}: {error}".split()).removesuffix(":"))
        if code == 2 and not first:
            time.sleep(2)  # rank 0 usually says the same; torchrun then ends this rank
        if code == 2 or first:
            print(said if len(said) < 2000 else said[:2000] + " ...", file=sys.stderr)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for number, handler in before.items():
            signal.signal(number, handler)
    raise SystemExit(code)


def print_tokens(tokenizer: Any, ids: Iterable[int], stop: int) -> Iterator[int]:
    """Print the text of tokens as they come, but not of `stop`, and pass the tokens on."""
    letters = codecs.getincrementaldecoder("utf-8")("replace")  # a letter may take several tokens
    for i in ids:
        if i < tokenizer.vocab_size and i != stop:  # a model's table may have more rows than that
            piece = tokenizer.encoding.decode_single_token_bytes(i)
            print(printable(letters.decode(piece)), end="", flush=True)
        yield i
    print(letters.decode(b"", final=True), end="")


def print_timed(tokenizer: Any, ids: Iterable[int], stop: int, n_prompt: int) -> None:
    """Print the text of tokens as they come; then to stderr how fast they came."""
    times = [time.monotonic()]
    for _ in print_tokens(tokenizer, ids, stop):
        times.append(time.monotonic())
    print()
    read_s, write_s, n = times[1] - times[0], times[-1] - times[1], len(times) - 1
    speed = f", {(n - 1) / write_s:,.1f} tok/s after the first" if n > 1 else ""
    print(f"{n_prompt:,} tokens read in {read_s:.2f} s, {n_prompt / read_s:,.0f} tok/s; "
          f"{n:,} written{speed}", file=sys.stderr)
