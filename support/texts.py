"""Text from files, from folders of repositories and from the Hugging Face hub.

A row is a pair: its place ("web.jsonl:17"), and a dict of its columns. Where a row can't be read, a
ValueError that says why stands in place of the dict. Sources of any size are read as streams.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .installed import generator

Row = tuple[str, "dict[str, Any] | ValueError"]
SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".arrow": "arrow",
            ".txt": "text", ".md": "text"}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "zstandard",
              ".zstd": "zstandard"}

# --- 1. Rows --------------------------------------------------------------------------------------


def read_rows(source: str, format: str = "auto", subset: str | None = None, split: str = "train",
              limit_bytes: int = 2**26, seed: int = 0) -> Iterator[Row]:
    """All rows of a source, in one order everywhere. Raises ValueError if it can't be read at all.

    `format` is auto (by the suffix), jsonl, parquet, arrow, text (a file is a row), repos (a folder
    of repositories) or hub (`source` names a data set, `subset` and `split` its part). Longer rows
    than `limit_bytes` are bad, longer repositories are cut. `seed` orders a repository's files.
    """
    if format == "hub":
        yield from _hub_rows(source, subset, split)
        return
    root = Path(source)
    if not source or not root.exists():
        raise ValueError(f"{source!r} does not exist; a data set of the hub wants --format hub")
    files = list_files(root) if root.is_dir() else [root]
    format = _format_by_suffix(root, files) if format == "auto" else format
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        "jsonl": lambda path: _jsonl_rows(path, limit_bytes),
        "parquet": _table_rows, "arrow": _table_rows,
        "text": lambda path: iter([(str(path), _text_row(path, limit_bytes))]),
        "repos": lambda path: _repository_rows(path, limit_bytes, seed)}
    if format not in readers:
        known = ", ".join(readers)
        raise ValueError(f"--format {format!r} is unknown; choose auto, {known} or hub")
    for path in [root] if format == "repos" else files:
        try:
            yield from readers[format](path)
        except Exception as error:  # each format has errors of its own
            # A damaged file stops everything: nobody knows how many rows are missing.
            raise ValueError(f"{path} can't be read to its end: {error}") from None


def list_files(folder: Path) -> list[Path]:
    """Regular files below a folder, sorted, without hidden files, hidden folders and links."""
    found = [Path(top, name) for top, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if path.is_file() and not path.is_symlink()
                  and not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _format_by_suffix(root: Path, files: list[Path]) -> str:
    plain = [Path(path.stem) if path.suffix in COMPRESSED else path for path in files]
    kinds = {SUFFIXES.get(path.suffix, "") for path in plain}
    if len(kinds) != 1 or "" in kinds:
        suffixes = ", ".join(sorted({path.suffix or path.name for path in files})[:9])
        raise ValueError(f"{root} holds {suffixes or 'nothing'}: not one kind of file by its "
                         "suffix; say which with --format")
    return kinds.pop()


def open_file(path: Path) -> BinaryIO:
    """Open a file, decompressed by its suffix. Raises ValueError if that needs a package."""
    if path.suffix not in COMPRESSED:
        return open(path, "rb")
    try:
        return importlib.import_module(COMPRESSED[path.suffix]).open(path, "rb")
    except ImportError:
        raise ValueError("reading it needs `pip install zstandard`") from None


def _jsonl_rows(path: Path, limit_bytes: int) -> Iterator[Row]:
    """JSON objects, one a line. A library's reader would lose the good rows before a bad one."""
    with open_file(path) as file:
        for number in itertools.count(1):
            line = file.readline(limit_bytes)
            if not line:
                return
            if len(line) == limit_bytes:
                while line and not line.endswith(b"\n"):  # go on to the end of this line
                    line = file.readline(limit_bytes)
                yield f"{path}:{number}", _too_long(limit_bytes)
            elif line.strip():
                yield f"{path}:{number}", _parse_object(line)


def _too_long(limit_bytes: int) -> ValueError:
    return ValueError(f"is longer than {limit_bytes:,} bytes")


def _parse_object(line: bytes) -> dict[str, Any] | ValueError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"is not JSON ({error})")
    return row if isinstance(row, dict) else ValueError(f"is a {type(row).__name__}, not an object")


def _table_rows(path: Path) -> Iterator[Row]:
    """A Parquet file, or an Arrow file as `datasets` writes them, a batch of rows at a time."""
    import pyarrow
    import pyarrow.parquet

    with open(path, "rb") as file:
        if path.suffix == ".arrow":
            batches = iter(pyarrow.ipc.open_stream(file))
        else:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=64)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows, 1):
            yield f"{path}:{number}", row


def _hub_rows(name: str, subset: str | None, split: str) -> Iterator[Row]:
    """Any data set that `datasets` can stream, by its name on the hub or from a local folder."""
    import datasets

    try:
        rows = datasets.load_dataset(name, subset, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{name}:{number}", row
    except Exception as error:  # the library and the network have many kinds of them
        raise ValueError(f"data set {name!r} can't be read: {error}") from None


def _text_row(path: Path, limit_bytes: int) -> dict[str, Any] | ValueError:
    with open_file(path) as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        return _too_long(limit_bytes)
    if b"\0" in content:
        return ValueError("is binary")
    try:
        return {"text": content.decode()}
    except UnicodeDecodeError:
        return ValueError("is not UTF-8")


def _repository_rows(root: Path, limit_bytes: int, seed: int) -> Iterator[Row]:
    """Each folder in `root` is a repository: its text files, joined in a seeded order, are a row.

    Beyond `limit_bytes`, another row begins.
    """
    for entry in sorted(root.iterdir()):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        files = list_files(entry)
        texts: list[str] = []
        size = 0
        for i in generator(seed, entry.name).permutation(len(files)):
            row = _text_row(files[i], limit_bytes)
            if isinstance(row, ValueError) or not row["text"].strip():
                continue
            n = len(row["text"].encode())
            if texts and size + n > limit_bytes:
                yield str(entry), {"text": "\n".join(texts)}
                texts, size = [], 0
            texts.append(row["text"])
            size += n + 1
        if texts:
            yield str(entry), {"text": "\n".join(texts)}


# --- 2. Texts -------------------------------------------------------------------------------------

Text = tuple[str, "str | ValueError"]  # where it stands, and a document's text or what is wrong


def read_texts(rows: Iterable[Row], column: str, limit_bytes: int = 2**26) -> Iterator[Text]:
    """The text in a column of each row, or what is wrong with it."""
    for where, row in rows:
        if isinstance(row, ValueError):
            yield where, row
        elif column not in row:
            yield where, ValueError(f"has no column {column!r}, only {', '.join(map(repr, row))}; "
                                    "choose one with --text-column")
        elif not isinstance(row[column], str):
            kind = "nothing" if row[column] is None else type(row[column]).__name__
            yield where, ValueError(f"holds {kind}, not text")
        elif len(row[column]) > limit_bytes:
            yield where, _too_long(limit_bytes)
        else:
            yield where, row[column] if row[column].strip() else ValueError("is empty")
