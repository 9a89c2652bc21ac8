"""Files that appear whole or not at all, and JSON that a stranger may have written.

A writer that dies leaves a folder `x.writing` (half written, deleted by the next writer), and
between its two renames `x.old` (whole, put back by `recover`). Nobody ever sees half a folder under
its own name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """`with whole_folder(path) as aside:` fills `aside`, which becomes `path` at the end.

    Files are fsynced before the rename. A folder that was there before is replaced.
    """
    folder = Path(folder)
    aside, old = folder.with_name(folder.name + ".writing"), folder.with_name(folder.name + ".old")
    recover(folder)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            fsync(path)
        if folder.exists():  # a folder can't be renamed over a full one: it steps aside first
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        aside.rename(folder)
        fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        recover(folder)
        raise


def recover(folder: Path) -> None:
    """Put the old folder back if the last writer died between its two renames."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)


def fsync(path: Path) -> None:
    """Wait until the disk has a file, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_json(path: Path, entry: Any, indent: int = 2) -> None:
    """Write a JSON file whole or not at all."""
    aside = path.with_name(path.name + ".writing")
    aside.write_text(json.dumps(entry, indent=indent) + "\n")
    fsync(aside)
    aside.replace(path)


def read_json(path: Path, limit_bytes: int = 2**26) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError, naming the file, for everything else.

    Also for what Python's reader lets through: a key given twice, NaN, endless nesting, gigabytes.
    """
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entry = dict(pairs)
        if len(pairs) != len(entry):
            raise ValueError("a key is given twice")
        return entry

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no number")

    try:
        size = path.stat().st_size
        if size > limit_bytes:
            raise ValueError(f"{size:,} bytes are too many")
        entry = json.loads(path.read_text(), object_pairs_hook=unique, parse_constant=refuse)
        if not isinstance(entry, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    return entry


def read_meta(folder: Path, kinds: Mapping[str, type], format: str = "",
              command: str = "") -> dict[str, Any]:
    """Read a folder's meta.json. Raises ValueError unless it has `kinds` of values, and the format.

    `command` is what makes such a folder: "pack" or "tokenize".
    """
    path = folder / "meta.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a {command.rstrip('e')}ed data folder: it has no "
                         f"meta.json; make one with `python data.py {command}`")
    meta = read_json(path)
    if meta.get("format", "") != format:
        raise ValueError(f"{path} does not say format {format!r}; make the folder again")
    for key, kind in kinds.items():
        value = meta.get(key)
        if type(value) is not kind or (isinstance(value, int) and value < 0 and key != "seed"):
            raise ValueError(f"{path}: {key!r} is {value!r}, no {kind.__name__} that can be")
    return meta


def map_file(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A file of numbers as a memory map. Raises ValueError unless it has exactly that size."""
    wanted = math.prod(shape) * np.dtype(dtype).itemsize
    size = path.stat().st_size if path.is_file() else 0
    if size != wanted:
        raise ValueError(f"{path} has {size:,} bytes where meta.json says {wanted:,}; the "
                         "folder is damaged, make it again")
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)


def sha256_of(folder: Path, pattern: str) -> str:
    """One checksum of a folder's files, from the checksum of each."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_ids(folder: str | Path, max_id: int, vocab_size: int) -> None:
    """Raise ValueError if a packed set has a token with no place in a vocabulary."""
    if max_id >= vocab_size:
        raise ValueError(f"{folder} has token id {max_id:,}, but there are only {vocab_size:,}; "
                         "use the tokenizer and the model that belong together")


def check_tokenizer(folder: str | Path, meta: dict[str, Any], tokenizer: Any) -> None:
    """Raise ValueError if a folder, packed or tokenized, was made with another tokenizer."""
    if meta["tokenizer_fingerprint"] != tokenizer.fingerprint:
        raise ValueError(f"{folder} was made with tokenizer {meta['tokenizer']!r} "
                         f"({meta['tokenizer_fingerprint']}), this is {tokenizer.spec!r} "
                         f"({tokenizer.fingerprint}); make it again with this one")
