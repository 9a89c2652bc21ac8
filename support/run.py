"""A run folder: its log, its checkpoints, with which settings it may go on, and how it ends.

    config.json                   the command's options
    log.jsonl                     one JSON object a step
    checkpoints/long-700/         a Hugging Face folder: config.json, model.safetensors, ...
        optimizer/                Adam's moments: safetensors, a file from each rank
        state.json                stage, step, tokens, how far the data was read, file sizes
    lock                          empty, and held by the process that trains
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from support.cli import Stopped, warn
from support.files import read_json, write_json, write_lines
from support.report import WINDOW, draw_losses, format_losses, read_log

STATE = {"stage": str, "step": int, "steps": int, "tokens_seen": int, "drawn": dict,
         "fingerprint": dict, "files": dict}
# On --resume: these change rounding at most (data of another place must have the same sha256).
MAY_CHANGE = {"eval", "eval_every", "samples", "save_every", "keep", "seq_parallel_size", "reorder",
              "data", "micro_batch_tokens", "attention", "compile", "activations",
              "loss_chunk_tokens", "mlp_tile_tokens", "host_optimizer"}


def make_run_folder(config: Any, default: str, parallel: Any) -> Path:
    """Make the run folder: the one asked for, or the first free of runs/tiny, runs/tiny-2, ..."""
    if config.resume:
        return Path(config.resume)
    folder, number = Path(config.out or default), 2
    if config.out and (folder / "log.jsonl").exists():
        raise ValueError(f"--out {folder} holds a run already; choose another, or --resume it")
    while not config.out and folder.exists():
        folder = Path(f"{default}-{number}")
        number += 1
    dist.barrier()  # all ranks have looked before one of them makes it
    if parallel.main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", asdict(config) | {"resume": "", "out": ""})
    dist.barrier()
    return folder


class Log:
    """log.jsonl, a line for people now and then, a figure. Only the main rank writes."""

    def __init__(self, folder: Path, main: bool, tokens_seen: int = 0) -> None:
        """Begin a log, or go on after `tokens_seen`: steps logged later will be trained again."""
        self.path, self.main, self.printed_at = folder / "log.jsonl", main, 0.0
        self.recent: list[dict[str, Any]] = []  # the stage's last entries
        if main and self.path.exists():
            *lines, _half = self.path.read_text("ascii", "backslashreplace").split("\n")
            kept = [line for line in lines if _is_done(line, tokens_seen)]
            if (damaged := len(lines) - sum(_is_done(line, math.inf) for line in lines)):
                warn(f"{self.path}: left out {damaged} damaged lines")
            write_lines(self.path, kept)
            self.recent = read_log(self.path)[-WINDOW:]

    def write(self, entry: dict[str, Any], steps: int, ranks: int) -> None:
        """Log one step; print the first, the last, and one in ten seconds."""
        if not self.main:
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:  # a full disk may have room again before the checkpoint
            warn(f"a step is missing in {self.path}: {error}")
        of_stage = [each for each in self.recent if each["stage"] == entry["stage"]]
        self.recent = [*of_stage, entry][-WINDOW:]
        if "eval" in entry:
            draw_losses(self.path.parent)
        if entry["step"] in (1, steps) or time.monotonic() > self.printed_at + 10:
            self.printed_at = time.monotonic()
            each = f" ({entry['tok_per_s'] / ranks:,.0f} a rank)" if ranks > 1 else ""
            print(f"{entry['stage']} step {entry['step']}/{steps} | loss: "
                  f"{format_losses(self.recent)} | lr {entry['lr']:.1e} | "
                  f"norm {entry['grad_norm']:.2f} | {entry['valid_tokens']:,} tokens trained | "
                  f"tok/s {entry['tok_per_s']:,.0f}{each} | mfu {entry['mfu']:.1%} | "
                  f"mem {entry['mem_gib']:.2f} GiB | "
                  f"eta {entry['time_s'] * (steps - entry['step']):,.0f} s", flush=True)


def _is_done(line: str, tokens_seen: float) -> bool:
    """Whether a line of log.jsonl is whole, and of a step up to so many tokens."""
    try:
        return bool(json.loads(line)["tokens_seen"] <= tokens_seen)
    except (ValueError, LookupError, TypeError):
        return False


def list_files(folder: Path) -> dict[str, int]:
    """Sizes of all files below a folder: {"optimizer/a.safetensors": 4096, ...}."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*")) if path.is_file()}


def read_state(folder: Path) -> dict[str, Any]:
    """Read state.json. Raises ValueError if it is damaged, or a file has not the listed size."""
    state, found = read_json(folder / "state.json", STATE), list_files(folder)
    for name, size in state["files"].items():
        if found.get(name) != size:
            raise ValueError(f"{folder / name} has {found.get(name, 0):,} bytes, not {size}")
    if state["step"] > state["steps"]:
        raise ValueError(f"{folder} says that step {state['step']} of {state['steps']} is done")
    return state


def whole_checkpoints(run: Path, name_damaged: bool = False) -> list[tuple[Path, dict[str, Any]]]:
    """A run's checkpoints and their states, the newest first, without those that are damaged."""
    whole = []
    for folder in (run / "checkpoints").glob("*[0-9]"):  # not those that are being written
        try:
            whole.append((folder, read_state(folder)))
        except ValueError as error:
            if name_damaged:
                print(f"damaged checkpoint, looking for another: {error}", flush=True)
    return sorted(whole, key=lambda each: each[1]["tokens_seen"], reverse=True)


def newest_checkpoint(run: Path, main: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state, or None if the run has not written any yet."""
    whole = whole_checkpoints(run, name_damaged=main)
    if not whole and any((run / "checkpoints").glob("*[0-9]")):
        raise ValueError(f"{run} has no whole checkpoint; start a new run")
    return whole[0] if whole else None


def prune_checkpoints(run: Path, keep: int) -> None:
    """Keep the `keep` newest checkpoints (0: all), every stage's last, and no half-written one."""
    for folder, state in whole_checkpoints(run)[keep:] if keep else []:
        if state["step"] < state["steps"]:
            folder.rename(f"{folder}.writing")  # at once: half of it must never look whole
    for end in (".writing", ".old"):
        for left in (run / "checkpoints").glob(f"*{end}"):
            left.unlink() if left.is_symlink() else shutil.rmtree(left)


def check_unchanged(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError with a list of what is not as it was when the run began."""
    changes = [f"{key}: {then.get(key)} then, {now.get(key)} now"
               for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    if changes:
        raise ValueError(f"{folder} can't go on, something is not as it was: {'; '.join(changes)}; "
                         "put it back, or start a new run with --init")


def config_to_resume(config: Any) -> Any:
    """The interrupted run's own settings, and this command's where they can't alter its course.

    Given is what the command line named (in Python: what is no default). Else it is a ValueError.
    """
    kind, path = type(config), Path(config.resume) / "config.json"
    before, hints = read_json(path), get_type_hints(kind)
    for key, value in before.items():
        if not isinstance(value, hints.get(key, ())):
            raise ValueError(f"{path} is not the configuration of such a run: {key!r}")
    now, usual = asdict(config), asdict(kind())
    named = getattr(config, "named", {key for key in now if now[key] != usual[key]})
    given = {key: now[key] for key in named if key != "resume"}
    flags = {f"--{key.replace('_', '-')}": key for key in given.keys() - MAY_CHANGE}
    check_unchanged(path.parent, {flag: before.get(key) for flag, key in flags.items()},
                    {flag: given[key] for flag, key in flags.items()})
    return kind(**before | given | {"resume": config.resume, "out": config.resume})


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


@contextmanager
def fail_together(parallel: Any, what: str) -> Iterator[None]:
    """If any rank fails in this block, every rank raises OSError, so that none waits forever."""
    failed = False
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        failed = True
        print(f"rank {parallel.rank} could not {what}: {error}", file=sys.stderr, flush=True)
    if parallel.all_sum(torch.tensor(float(failed))):
        raise OSError(f"could not {what}")


@contextmanager
def alone_in(folder: Path, main: bool) -> Iterator[None]:
    """Raise ValueError on the main rank if another process trains in the folder."""
    with open(folder / "lock", "a") as file:
        try:
            if main:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process trains in {folder}; wait for it") from None
        yield


@contextmanager
def stop_on_signals(folder: Path) -> Iterator[SimpleNamespace]:
    """SIGTERM, SIGUSR1 or SIGHUP, as a cluster sends before it takes the machine, and Ctrl-C.

    While the run is `busy`, it ends after the step and a checkpoint. A second Ctrl-C waits no more.
    What the shell has us ignore stays ignored, as SIGHUP under nohup and SIGINT behind `&`.
    """
    request = SimpleNamespace(asked=False, busy=False)

    def on_signal(number: int, frame: Any) -> None:
        again, request.asked = request.asked, True
        if number == signal.SIGINT and (again or not request.busy):
            raise KeyboardInterrupt
        if not request.busy:  # packing or evaluating: there is nothing to save
            raise Stopped
        warn("ends after this step, and saves; Ctrl-C ends it at once")

    before = {number: signal.signal(number, on_signal) for number in SIGNALS
              if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield request
    except (Stopped, KeyboardInterrupt) as error:
        saved = any((folder / "checkpoints").glob("*[0-9]"))
        hint = f"go on with --resume {folder}" if saved else "it has no checkpoint yet"
        raise type(error)(hint) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
