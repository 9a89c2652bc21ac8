"""Files that appear whole or not at all, and JSON that a stranger may have written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """`with whole_folder(path) as aside:` fills `aside`, which replaces `path` at the end."""
    folder = Path(folder)
    aside, old = Path(f"{folder}.writing"), Path(f"{folder}.old")

    def recover() -> None:  # from a writer that died, now or earlier
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

    recover()
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            fsync(path)
        if folder.exists():  # a folder can't be renamed over a full one: it steps aside first
            folder.rename(old)
        aside.rename(folder)
        fsync(folder.parent)
    finally:
        recover()


def fsync(path: Path) -> None:
    """Wait until the disk has a file, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_json(path: Path, entry: Any, indent: int = 2) -> None:
    """Write a JSON file, and its folder, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, [json.dumps(entry, indent=indent)])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file whole or not at all."""
    aside = Path(f"{path}.writing")
    aside.write_text("".join(f"{line}\n" for line in lines))
    fsync(aside)
    aside.replace(path)


def read_json(path: Path, kinds: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Read a JSON object, with `kinds` of values. Raises ValueError for everything else."""
    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no number")

    try:
        if path.stat().st_size > 2**26:  # twice as many bytes as the largest tokenizer's
            raise ValueError("it has more than 64 MiB")
        entry = json.loads(path.read_bytes(), parse_constant=refuse)  # UTF-8 in any locale
        if not isinstance(entry, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    for key, kind in (kinds or {}).items():
        value = entry.get(key)
        if type(value) is not kind or (isinstance(value, int) and value < 0 and key != "seed"):
            raise ValueError(f"{path}: {key!r} is {value!r}, no {kind.__name__} that can be")
    return entry


def read_meta(folder: Path, kinds: Mapping[str, type], format: str = "",
              command: str = "") -> dict[str, Any]:
    """Read the meta.json of a folder that `python data.py command` makes, of this format."""
    path, made = folder / "meta.json", command.rstrip("e") + "ed"
    if not path.is_file():
        raise ValueError(f"{folder} is not a {made} data folder: it has no meta.json; make one "
                         f"with `python data.py {command}`")
    if read_json(path).get("format", "") != format:
        raise ValueError(f"{path} does not say format {format!r}; make the folder again")
    return read_json(path, kinds)


def map_file(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A file of numbers as a memory map. Raises ValueError unless it has exactly that size."""
    wanted = math.prod(shape) * np.dtype(dtype).itemsize
    size = path.stat().st_size if path.is_file() else 0
    if size != wanted:
        raise ValueError(f"{path} has {size:,} bytes, meta.json says {wanted:,}; make it again")
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)


def check_maps(*maps: Any) -> None:
    """Raise ValueError for a file that was cut while it is mapped: reading it would be SIGBUS."""
    for array in maps:
        if array is not None and os.path.getsize(array.filename) != array.nbytes:
            raise ValueError(f"{array.filename} was cut while it is in use; make the folder again")


def is_link(path: Path) -> bool:
    """Whether a path is a link; but not one of the hub's, snapshots/REVISION/... -> blobs/NAME."""
    return path.is_symlink() and (
        path.resolve().parent.parent / "snapshots" not in path.parent.resolve().parents)


def sha256_of(folder: Path, pattern: str) -> str:
    """One checksum of a folder's files, from the checksum of each."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_parquet(metadata: Any) -> None:
    """Raise ValueError for a Parquet column that unpacks to 16 MiB + a thousand times its size."""
    for column in (metadata.row_group(i).column(j) for i in range(metadata.num_row_groups)
                   for j in range(metadata.num_columns)):
        most = max(column.num_values, column.total_uncompressed_size)
        if most > 2**24 + 1000 * column.total_compressed_size:
            raise ValueError(f"{column.path_in_schema!r} unpacks to {most:,} bytes or values")


def check_ids(folder: str | Path, max_id: int, vocab_size: int) -> None:
    """Raise ValueError if a packed set has a token with no place in a vocabulary."""
    if max_id >= vocab_size:
        raise ValueError(f"{folder} has token id {max_id:,}, but there are only {vocab_size:,}; "
                         "use the model that belongs to the tokenizer")


def check_tokenizer(folder: str | Path, meta: dict[str, Any], tokenizer: Any) -> None:
    """Raise ValueError if a folder, packed or tokenized, was made with another tokenizer."""
    if meta["tokenizer_fingerprint"] != tokenizer.fingerprint:
        raise ValueError(f"{folder} was made with tokenizer {meta['tokenizer']!r} "
                         f"({meta['tokenizer_fingerprint']}), this is {tokenizer.spec!r} "
                         f"({tokenizer.fingerprint}); make it again with this one")


class Record(dict[tuple[Any, ...], Any]):
    """A dict that appends each new entry to a file (on the main rank).

        {"tasks": "recall", "seed": 0, ...}                      first the settings,
        ["recall", 2048, 0, [{"written": "PLM3", ...}, ...]]     then a line for each key and value
    """

    path: Path | None = None

    def __setitem__(self, key: tuple[Any, ...], value: Any) -> None:
        super().__setitem__(key, value)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps([*key, value]) + "\n")


def open_record(path: Path | None, settings: dict[str, Any], parallel: Any = None) -> Record:
    """Open or begin a record, on the main rank for all. Raises ValueError for other settings."""
    path = path if parallel is None or parallel.main else None
    found: list[Any] = [{} if path is None else _read(path, settings)]
    if parallel is not None:
        dist.broadcast_object_list(found, device=parallel.device)
    if isinstance(found[0], ValueError):
        raise found[0]
    record = Record(found[0])
    record.path = path
    return record


def _read(path: Path, settings: dict[str, Any]) -> dict[tuple[Any, ...], Any] | ValueError:
    try:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # not a half written one
        lines = lines or [json.dumps(settings)]
        before, *rows = map(json.loads, lines)
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(f"other settings ({name} {before.get(name)!r}, now {value!r})")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, lines)
        return {tuple(key): value for *key, value in rows}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        return ValueError(f"{path} can't be continued: {error}; choose another folder (--out), or "
                          "remove it")
