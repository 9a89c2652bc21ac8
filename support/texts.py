"""Text from files, from folders of repositories and from the Hugging Face hub; tokenized documents on disk.

A row is a pair: its place ("web.jsonl:17"), and a dict of its columns. Where a row can't be read, a
ValueError that says why stands in place of the dict. Sources of any size are read as streams.

    documents/00000/input_ids.bin   uint32 (tokens,)      whole documents, one after another
              00000/doc_ends.bin    int64  (documents,)   where each ends
              00000/meta.json       sizes, and how many rows of the source this shard took
              job.json              the options that it was begun with
              meta.json             written last: with it, the folder is complete
"""

from __future__ import annotations

import importlib
import itertools
import json
import lzma
import os
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from .files import read_json, read_meta, whole_folder, write_json
from .installed import generator

Row = tuple[str, "dict[str, Any] | ValueError"]
SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".arrow": "arrow",
            ".txt": "text", ".md": "text"}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "zstandard", ".zstd": "zstandard"}

# --- 1. Rows --------------------------------------------------------------------------------------


def read_rows(source: str, format: str = "auto", subset: str | None = None, split: str = "train",
              limit_bytes: int = 2**26, seed: int = 0) -> Iterator[Row]:
    """All rows of a source, in one order everywhere. Raises ValueError for what can't be read at all.

    `format` is auto (by the suffix), jsonl, parquet, arrow, text (a file is a row), repos (a folder of
    repositories) or hub (`source` names a data set, `subset` and `split` its part). Rows longer than
    `limit_bytes` are bad, longer repositories are cut. `seed` orders the files of a repository.
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
        raise ValueError(f"--format {format!r} is unknown; choose auto, {', '.join(readers)} or hub")
    for path in [root] if format == "repos" else files:
        try:
            yield from readers[format](path)
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            # A damaged file stops everything: nobody knows how many rows are missing.
            raise ValueError(f"{path} can't be read to its end: {error}") from None


def list_files(folder: Path) -> list[Path]:
    """Regular files below a folder, sorted; hidden files, hidden folders and links are passed over."""
    found = [Path(top, name) for top, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if path.is_file() and not path.is_symlink()
                  and not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _format_by_suffix(root: Path, files: list[Path]) -> str:
    plain = [Path(path.stem) if path.suffix in COMPRESSED else path for path in files]
    kinds = {SUFFIXES.get(path.suffix, "") for path in plain}
    if len(kinds) != 1 or "" in kinds:
        suffixes = ", ".join(sorted({path.suffix or path.name for path in files})[:9])
        raise ValueError(f"{root} holds {suffixes or 'nothing'}: not one kind of file by its suffix; "
                         "say which with --format")
    return kinds.pop()


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed by its suffix. Raises ValueError if that needs a package."""
    if path.suffix not in COMPRESSED:
        return open(path, "rb")
    try:
        return importlib.import_module(COMPRESSED[path.suffix]).open(path, "rb")
    except ImportError:
        raise ValueError("reading it needs `pip install zstandard`") from None


def _jsonl_rows(path: Path, limit_bytes: int) -> Iterator[Row]:
    """JSON objects, one a line. By hand: a library's reader loses the good rows before a bad one."""
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
    """Each folder in `root` is a repository. Its text files, joined in a seeded order, are one row, or
    several rows if they are longer than `limit_bytes`."""
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


# --- 2. Texts, encoded ----------------------------------------------------------------------------

Text = tuple[str, "str | ValueError"]  # where it stands, and a document's text or what is wrong
Ids = np.ndarray | ValueError  # the ids of a document, uint32 (n,), or where there is none and why


def read_texts(rows: Iterable[Row], column: str) -> Iterator[Text]:
    """The text in a column of each row, or what is wrong with it."""
    for where, row in rows:
        text = row if isinstance(row, ValueError) else row.get(column)
        if isinstance(text, ValueError):
            yield where, text
        elif column not in row:
            yield where, ValueError(f"has no column {column!r}, only {', '.join(map(repr, row))}; "
                                    "choose one with --text-column")
        elif not isinstance(text, str):
            yield where, ValueError(f"holds {'nothing' if text is None else type(text).__name__}, not text")
        else:
            yield where, text if text.strip() else ValueError("is empty")


def encode_all(texts: Iterable[Text], encode: Callable[[str], np.ndarray],
               workers: int) -> Iterator[Ids]:
    """Encode on threads (tiktoken works outside Python's lock), in order, a bounded way ahead."""
    def encode_batch(batch: list[Text]) -> list[Ids]:
        return [_encode_row(where, text, encode) for where, text in batch]

    ahead: deque[tuple[int, Future[list[Ids]]]] = deque()
    waiting = 0  # characters that were read, and are not encoded yet
    with ThreadPoolExecutor(workers) as pool:
        for size, batch in itertools.chain(_batches(texts), [(0, [])]):  # the empty batch is the last
            ahead.append((size, pool.submit(encode_batch, batch)))
            waiting += size
            while ahead and (len(ahead) > 4 * workers or waiting > 2**25 or not batch):
                size, future = ahead.popleft()
                waiting -= size
                yield from future.result()


def _encode_row(where: str, text: str | ValueError, encode: Callable[[str], np.ndarray]) -> Ids:
    try:
        if isinstance(text, ValueError):
            raise text
        return encode(text)
    except ValueError as error:  # also half a character, or a byte that the tokenizer lacks
        problem = "is not UTF-8" if isinstance(error, UnicodeError) else error
        return ValueError(f"{where} {problem}")


def _batches(texts: Iterable[Text]) -> Iterator[tuple[int, list[Text]]]:
    """(size, texts): many short texts are one task for a thread."""
    batch: list[Text] = []
    size = 0
    for where, text in texts:
        batch.append((where, text))
        size += len(str(text))
        if size > 2**18:
            yield size, batch
            batch, size = [], 0
    if batch:
        yield size, batch


# --- 3. Tokenized documents on disk ---------------------------------------------------------------

FORMAT = "nanolong-documents-1"
META = {"format": str, "tokenizer": str, "tokenizer_fingerprint": str, "vocab_size": int, "max_id": int,
        "shards": int, "documents": int, "tokens": int}
SHARD_META = {"rows": int, "documents": int, "tokens": int, "bad": int, "max_id": int}


def write_documents(out: Path, job: dict[str, Any], about: dict[str, Any], texts: Iterator[Text],
                    encode: Callable[[str], np.ndarray]) -> None:
    """Encode texts into a folder of documents, shard by shard. Run again after a crash, it goes on.

    The order of rows alone cuts shards, so the bytes are the same for any number of workers and of
    crashes. `job` holds the options, `about` what the folder's meta.json says of the tokenizer.
    """
    shards = _shards_there(out, job)
    done = sum(shard["rows"] for shard in shards)
    if sum(1 for _ in itertools.islice(texts, done)) < done:
        raise ValueError(f"{job['input']} has fewer rows than {out} has of it; begin anew")
    encoded = encode_all(texts, encode, job["workers"])
    documents = iter(tqdm(encoded, unit=" documents", disable=not sys.stderr.isatty()))
    for first in documents:  # is there one left? Then there is another shard
        if isinstance(first, ValueError) and job["on_bad"] == "stop":
            raise ValueError(f"{first}; mend it, or pass over it with --on-bad skip")
        out.mkdir(parents=True, exist_ok=True)
        if not shards:
            write_json(out / "job.json", job | _CHANGEABLE)
        with whole_folder(out / f"{len(shards):05d}") as folder:
            shards.append(_write_shard(folder, itertools.chain([first], documents), job))
    counts = {key: sum(shard[key] for shard in shards) for key in ("rows", "documents", "tokens", "bad")}
    if not counts["tokens"]:
        raise ValueError(f"{job['input']} has no usable text in its {counts['rows']} rows")
    max_id = max(shard["max_id"] for shard in shards)
    write_json(out / "meta.json",
               {"format": FORMAT, **about, "max_id": max_id, "shards": len(shards), **counts})
    for line in [line for shard in shards for line in shard["bad_rows"]][:9]:
        print(f"skipped: {line}")


_CHANGEABLE = {"workers": 0, "out": ""}  # options that may change when an interrupted job goes on


def _shards_there(out: Path, job: dict[str, Any]) -> list[dict[str, Any]]:
    """The meta.json of each shard that an interrupted job has written already."""
    if job["on_bad"] not in ("stop", "skip"):
        raise ValueError(f"--on-bad {job['on_bad']!r} is neither stop nor skip")
    if (out / "meta.json").exists():
        raise ValueError(f"{out} is complete already; choose another --out, or remove it")
    if (out / "job.json").exists() and read_json(out / "job.json") != job | _CHANGEABLE:
        raise ValueError(f"{out} was begun with other settings, those in its job.json; choose another --out")
    shards: list[dict[str, Any]] = []
    while (out / f"{len(shards):05d}" / "meta.json").is_file():
        shards.append(read_meta(out / f"{len(shards):05d}", SHARD_META))
    return shards


def _write_shard(folder: Path, documents: Iterator[Ids], job: dict[str, Any]) -> dict[str, Any]:
    """Write documents until they have enough tokens."""
    ends: list[int] = []
    bad: list[str] = []
    tokens = max_id = 0
    with open(folder / "input_ids.bin", "wb") as file:
        for ids in documents:
            if isinstance(ids, ValueError):
                if job["on_bad"] == "stop":
                    raise ValueError(f"{ids}; mend it, or pass over it with --on-bad skip")
                bad.append(str(ids))
                continue
            file.write(ids.data)
            tokens, max_id = tokens + len(ids), max(max_id, int(ids.max()))
            ends.append(tokens)
            if tokens >= job["shard_tokens"]:
                break
    (folder / "doc_ends.bin").write_bytes(np.array(ends, np.int64).tobytes())
    meta = {"rows": len(ends) + len(bad), "documents": len(ends), "tokens": tokens, "bad": len(bad),
            "bad_rows": bad[:9], "max_id": max_id}
    write_json(folder / "meta.json", meta)
    return meta


def read_shard(folder: Path) -> list[np.ndarray]:
    """The documents of a shard. Raises ValueError if its files do not agree."""
    meta = read_meta(folder, SHARD_META)
    ids = np.fromfile(folder / "input_ids.bin", np.uint32)
    ends = np.fromfile(folder / "doc_ends.bin", np.int64)
    sizes = np.diff(ends, prepend=0)
    found = (len(ids), len(ends), int(sizes.sum()))
    if found != (meta["tokens"], meta["documents"], meta["tokens"]) or (sizes <= 0).any():
        raise ValueError(f"{folder}: its files and its meta.json do not agree; it is damaged, remove the "
                         "folder and tokenize again")
    return np.split(ids, ends[:-1])
