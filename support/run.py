"""A run folder: its log, its checkpoints, with which settings it may go on, and how it ends.

    runs/tiny/
        config.json                   the command's options
        log.jsonl                     one JSON object a step
        checkpoints/long-900/         a Hugging Face folder: config.json, model.safetensors, ...
            optimizer/                Adam's moments: safetensors, a file from each rank
            state.json                stage, step, tokens, how far the data was read, file sizes

A checkpoint gets its name when it is whole, and nothing here is ever read by pickle. `config` and
`parallel` are duck-typed: train.py's options, and model.py's ranks.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from support.files import read_json, recover, write_json

# --- 1. The folder and its log --------------------------------------------------------------------


def make_run_folder(config: Any, default: str, parallel: Any) -> Path:
    """Make the run folder: the one asked for, or the first free of runs/tiny, runs/tiny-2, ..."""
    folder = Path(config.resume or config.out or default)
    if config.resume:
        return folder
    if config.out and (folder / "log.jsonl").exists():
        raise ValueError(f"--out {folder} holds a run already; choose another, or --resume it")
    number = 1
    while not config.out and folder.exists():
        number += 1
        folder = Path(f"{default}-{number}")
    dist.barrier()  # all ranks have looked before one of them makes it
    if parallel.main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", asdict(config) | {"resume": "", "out": ""})
    dist.barrier()
    return folder


class Log:
    """log.jsonl, and beside it a progress bar on a terminal, or a line now and then elsewhere."""

    def __init__(self, folder: Path, main: bool, tokens_seen: int = 0) -> None:
        """Begin a log, or go on after `tokens_seen`: steps logged later will be trained again."""
        self.path, self.main, self.printed_at = folder / "log.jsonl", main, 0.0
        self.bar = tqdm(unit="step", disable=not (main and sys.stderr.isatty()))
        if main and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["tokens_seen"] <= tokens_seen]
            self.path.with_suffix(".writing").write_text("".join(kept))
            self.path.with_suffix(".writing").replace(self.path)

    def start(self, stage: str, step: int, steps: int) -> None:
        self.bar.reset(steps)
        self.bar.update(step)
        self.bar.set_description(stage)

    def write(self, entry: dict[str, Any], steps: int, ranks: int) -> None:
        """Log one step: to the file, and for people. Only the main rank does."""
        if not self.main:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")
        each = f" ({entry['tok_per_s'] / ranks:,.0f} a rank)" if ranks > 1 else ""
        line = (f"loss {entry['loss']:.4f} | lr {entry['lr']:.1e} | norm {entry['grad_norm']:.2f} "
                f"| valid_tokens {entry['valid_tokens']:,} | tok/s {entry['tok_per_s']:,.0f}{each} "
                f"| mfu {entry['mfu']:.1%} | mem {entry['mem_gib']:.2f} GiB")
        self.bar.update()
        self.bar.set_postfix_str(line, refresh=False)
        waited = time.monotonic() > self.printed_at + 10
        if self.bar.disable and (waited or entry["step"] in (1, steps)):
            self.printed_at = time.monotonic()
            eta_s = entry["time_s"] * (steps - entry["step"])
            where = f"{entry['stage']} step {entry['step']}/{steps}"
            print(f"{where} | {line} | eta {eta_s:,.0f} s", flush=True)


# --- 2. Checkpoints on disk -----------------------------------------------------------------------

STATE = {"stage": str, "step": int, "steps": int, "tokens_seen": int, "drawn": dict,
         "fingerprint": dict, "files": dict}


def list_files(folder: Path) -> dict[str, int]:
    """Sizes of all files below a folder: {"optimizer/a.safetensors": 4096, ...}."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*")) if path.is_file()}


def read_state(folder: Path) -> dict[str, Any]:
    """Read state.json. Raises ValueError if it is damaged, or a file has not the size it lists."""
    path = folder / "state.json"
    state, found = read_json(path), list_files(folder)
    for key, kind in STATE.items():
        if type(state.get(key)) is not kind:
            raise ValueError(f"{path}: {key!r} is no {kind.__name__}; the file is damaged or older "
                             "than this train.py. Without it, --init starts from the weights alone")
    for name, size in state["files"].items():
        if found.get(name) != size:
            raise ValueError(f"{folder / name} has {found.get(name, 0):,} bytes, not {size}")
    return state


def whole_checkpoints(run: Path, name_damaged: bool = False) -> list[tuple[Path, dict[str, Any]]]:
    """A run's checkpoints and their states, the newest first, without those that are damaged."""
    whole = []
    for folder in sorted((run / "checkpoints").glob("*")):
        try:
            if folder.suffix not in (".writing", ".old"):
                whole.append((folder, read_state(folder)))
        except ValueError as error:
            if name_damaged:
                print(f"damaged checkpoint, looking for another: {error}", flush=True)
    return sorted(whole, key=lambda each: each[1]["tokens_seen"], reverse=True)


def newest_checkpoint(run: Path, main: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state; the main rank names the damaged ones.

    None if the run has not written any yet. Raises ValueError if all that it has are damaged.
    """
    whole = whole_checkpoints(run, name_damaged=main)
    if not whole and any((run / "checkpoints").glob("*")):
        raise ValueError(f"{run} has no whole checkpoint; start a new run")
    return whole[0] if whole else None


def prune_checkpoints(run: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints and the last one of every stage; 0 keeps all."""
    for folder, state in whole_checkpoints(run)[keep:] if keep else []:
        if state["step"] < state["steps"]:
            aside = folder.with_name(folder.name + ".writing")
            folder.rename(aside)  # at once, so that half of it is never taken for a checkpoint
            shutil.rmtree(aside)


def checkpoint_to_resume(run: Path, parallel: Any) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint; a run that has not written any yet begins as it did before."""
    if parallel.main:
        clean_checkpoints(run)
    dist.barrier()
    found = newest_checkpoint(run, parallel.main)
    if not found and parallel.main:
        print(f"{run} has no checkpoint yet: from its beginning", flush=True)
    return found


def clean_checkpoints(run: Path) -> None:
    """Put right what a writer that died has left: a folder half written, or one stepped aside."""
    for old in (run / "checkpoints").glob("*.old"):
        recover(old.with_suffix(""))
    for half in (run / "checkpoints").glob("*.writing"):
        shutil.rmtree(half)


def check_pieces(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless the pieces that all ranks wrote make up each tensor, once."""
    try:
        stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:  # of a damaged header: any of a dozen
        raise ValueError(f"{folder} is not as it was written: {error!r}") from None
    for name, tensor in tensors.items():
        entry: Any = stored.get(name)
        if entry is None or (entry.properties.dtype, entry.size) != (tensor.dtype, tensor.shape):
            raise ValueError(f"{folder} lacks {name}, {tensor.dtype} {tuple(tensor.shape)}")
        row, others = 0, (0,) * (tensor.ndim - 1)
        for piece in sorted(entry.chunks, key=lambda piece: (*piece.offsets, *piece.sizes)):
            if piece.offsets != (row, *others)[:tensor.ndim] or piece.sizes[1:] != tensor.shape[1:]:
                raise ValueError(f"{folder}: the pieces of {name} do not fit together")
            row += math.prod(piece.sizes[:1])
        if row != math.prod(tensor.shape[:1]):
            raise ValueError(f"{folder}: the pieces of {name} end at row {row}")


# --- 3. Going on ----------------------------------------------------------------------------------

MAY_CHANGE = {"eval", "eval_every", "samples", "save_every", "keep", "seq_parallel_size", "reorder",
              "micro_batch_tokens", "attention", "compile", "activations", "loss_chunk_tokens",
              "mlp_tile_tokens", "host_optimizer"}  # on --resume: these change rounding at most


def list_changes(then: Any, now: Any, name: str = "") -> list[str]:
    """What differs between nested dictionaries, for people: ["data short: ab12 then, cd34 now"]."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return [] if then == now else [f"{name}: {then} then, {now} now"]
    changes = []
    for key in sorted(then.keys() | now.keys()):
        changes += list_changes(then.get(key), now.get(key), f"{name} {key}".strip())
    return changes


def check_unchanged(folder: Path, then: Any, now: Any) -> None:
    """Raise ValueError with a list of what is not as it was when the run began."""
    changes = list_changes(then, now)
    if changes:
        raise ValueError(f"{folder} can't go on, something is not as it was: {'; '.join(changes)}; "
                         "put it back, or start a new run with --init")


Config = TypeVar("Config")


def config_to_resume(config: Config) -> Config:
    """The interrupted run's own settings, and this command's where they can't alter its course.

    An option at its default counts as not given. Raises ValueError with all that differs otherwise.
    """
    kind, resume = type(config), config.resume  # type: ignore[attr-defined]
    path, hints = Path(resume) / "config.json", get_type_hints(kind)
    before = read_json(path)
    for key, value in before.items():
        if not isinstance(value, hints.get(key, ())):
            raise ValueError(f"{path} is not the configuration of such a run: {key!r}")
    given = dict(asdict(config).items() - asdict(kind(resume=resume)).items())  # type: ignore
    fixed = {f"--{key.replace('_', '-')}": key for key in sorted(given.keys() - MAY_CHANGE)}
    changes = list_changes({flag: before.get(key) for flag, key in fixed.items()},
                           {flag: given[key] for flag, key in fixed.items()})
    if changes:
        raise ValueError(f"--resume {resume} goes on with its own settings; start a new run with "
                         f"--init, or drop {'; '.join(changes)}")
    return kind(**before | given | {"resume": resume, "out": resume})


# --- 4. How it ends -------------------------------------------------------------------------------


class Stopped(Exception):
    """The run was asked to end, and has saved what it had."""


class Diverged(RuntimeError):
    """The loss or the gradient is no longer a number."""


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


@dataclass
class StopRequest:
    """What a signal has asked for. While `busy` it waits for the step and its checkpoint."""

    asked: bool = False
    busy: bool = False

    def on_signal(self, number: int, frame: Any) -> None:
        self.asked = True
        if not self.busy:  # packing or evaluating: there is nothing to save
            raise Stopped


@contextmanager
def stop_on_signals(folder: Path, parallel: Any) -> Iterator[StopRequest]:
    """SIGTERM and SIGUSR1 (sent by a cluster before it takes the machine back) finish the current
    step, save a checkpoint and exit. Ctrl-C exits at once.
    """
    request, numbers = StopRequest(), (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, request.on_signal) for number in numbers]
    try:
        yield request
    except (Stopped, KeyboardInterrupt) as error:
        saved = any((folder / "checkpoints").glob("*/state.json"))
        hint = f"go on with --resume {folder}" if saved else "it has no checkpoint yet"
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one doesn't wait for anything
            raise KeyboardInterrupt(hint) from None
        if parallel.main:
            print(f"stopped as asked; {hint}", flush=True)
        raise SystemExit(0) from None
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def run_and_exit(name: str, work: Callable[[], Any]) -> None:
    """Run `work` and exit. However it ends, the process group ends, and rank 0 says it for all."""
    code, report = 0, ""
    try:
        work()
    except Diverged as error:
        code, report = 1, f"{name}: diverged: {error}"
    except KeyboardInterrupt as error:
        code, report = 130, f"{name}: interrupted; {error or 'nothing is lost'}"  # 128 + SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if report and os.environ.get("RANK", "0") == "0":
        print(report, file=sys.stderr, flush=True)
    raise SystemExit(code)
