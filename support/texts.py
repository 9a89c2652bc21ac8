"""Text from files and from the hub becomes tokenized documents, encoded once and packed often.

A row is a pair: its place ("web.jsonl:17"), and a dict of its columns. Where a row can't be read, a
ValueError that says why stands in place of the dict. Rows are read as streams, and written as

    documents/00000/input_ids.bin   uint32 (tokens,)      whole documents, one after another
              00000/doc_ends.bin    int64  (documents,)   where each ends
              00000/meta.json       sizes, and how many rows of the source this shard took
              job.json              the options that it was begun with
              meta.json             written last: with it, the folder is complete
"""

from __future__ import annotations

import glob
import importlib
import io
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from .cli import choose, option, parse_length
from .files import read_json, read_meta, whole_folder, write_json
from .installed import generator

Row = tuple[str, "dict[str, Any] | ValueError"]
Ids = np.ndarray | ValueError  # the ids of a document, uint32 (n,), or why there are none
SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".arrow": "arrow",
            ".txt": "text", ".md": "text"}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "pyarrow", ".zstd": "pyarrow"}
FORMAT = "nanolong-documents-1"
META = {"format": str, "tokenizer": str, "tokenizer_fingerprint": str, "vocab_size": int,
        "max_id": int, "shards": int, "documents": int, "tokens": int, "rows": int, "bad": int}
SHARD_META = {"rows": int, "documents": int, "tokens": int, "bad": int, "max_id": int}

# --- 1. Rows --------------------------------------------------------------------------------------


def read_rows(source: str, format: str = "auto", subset: str | None = None, split: str = "train",
              limit_bytes: int = 2**26, seed: int = 0) -> Iterator[Row]:
    """All rows of a source, in one order everywhere. Raises ValueError if it can't be read at all.

    `format` is auto (by the suffix), jsonl, parquet, arrow, text (a file is a row), repos (a folder
    of repositories) or hub (`source` names a data set, `subset` and `split` its part). Longer rows
    than `limit_bytes` are bad, longer repositories are cut. `seed` orders a repository's files.
    """
    root = Path(source)
    if format != "hub" and not (source and root.exists()):
        raise ValueError(f"{source!r} does not exist; a data set of the hub wants --format hub")
    paths = list_files(root) if root.is_dir() and format not in ("repos", "hub") else [root]
    if format == "auto":
        names = [path.stem if path.suffix in COMPRESSED else path.name for path in paths]
        kinds = {SUFFIXES.get(Path(name).suffix, "") for name in names} or {""}
        if len(kinds) != 1 or "" in kinds:
            raise ValueError(f"{root} does not hold one kind of file by its suffix; say which kind "
                             "with --format")
        format = kinds.pop()
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        "jsonl": lambda path: _jsonl_rows(path, limit_bytes),
        "parquet": lambda path: _dataset_rows(path, "parquet"),
        "arrow": lambda path: _dataset_rows(path, "arrow"),
        "text": lambda path: iter([(str(path), _text_row(path, limit_bytes))]),
        "repos": lambda path: _repository_rows(path, limit_bytes, seed),
        "hub": lambda path: _dataset_rows(None, source, name=subset, split=split)}
    read = choose("--format", format, readers)
    for path in paths:
        try:
            yield from read(path)
        except Exception as error:  # each format has errors of its own
            # A damaged file stops everything: nobody knows how many rows are missing.
            problem = " ".join(str(error).split())
            raise ValueError(f"{path} can't be read to its end: {problem}") from None


def list_files(folder: Path) -> list[Path]:
    """Regular files below a folder, sorted, without hidden files, hidden folders and links."""
    found = [Path(top, name) for top, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if path.is_file() and not path.is_symlink()
                  and not any(part.startswith(".") for part in path.relative_to(folder).parts))


def open_file(path: Path) -> BinaryIO:
    """Open a file, decompressed by its suffix."""
    if path.suffix not in COMPRESSED:
        return open(path, "rb")
    module = importlib.import_module(COMPRESSED[path.suffix])
    if path.suffix in (".zst", ".zstd"):  # zstandard's reader would take a cut file for a whole one
        return io.BufferedReader(module.input_stream(path, compression="zstd"))
    return module.open(path, "rb")


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
                yield f"{path}:{number}", ValueError(f"is longer than {limit_bytes:,} bytes")
            elif line.strip():
                yield f"{path}:{number}", _parse_object(line)


def _parse_object(line: bytes) -> dict[str, Any] | ValueError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"is not JSON ({error})")
    return row if isinstance(row, dict) else ValueError(f"is a {type(row).__name__}, not an object")


def _dataset_rows(path: Path | None, kind: str, split: str = "train",
                  name: str | None = None) -> Iterator[Row]:
    """A Parquet or Arrow file, or a data set by its name on the hub or from a local folder."""
    import datasets

    files = {} if path is None else {"data_files": glob.escape(str(path))}
    rows = datasets.load_dataset(kind, name, split=split, streaming=True, **files)
    for number, row in enumerate(rows, 1):
        yield f"{path or kind}:{number}", row


def _text_row(path: Path, limit_bytes: int) -> dict[str, Any] | ValueError:
    with open_file(path) as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        return ValueError(f"is longer than {limit_bytes:,} bytes")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return ValueError("is not UTF-8")
    return {"text": text} if "\0" not in text else ValueError("is binary")


def _repository_rows(root: Path, limit_bytes: int, seed: int) -> Iterator[Row]:
    """A row for each folder in `root`: its text files, in a seeded order, up to `limit_bytes`."""
    for entry in sorted(root.iterdir()):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        files = list_files(entry)
        text = bytearray()
        for i in generator(seed, entry.name).permutation(len(files)):
            row = _text_row(files[i], limit_bytes)
            if isinstance(row, ValueError) or not row["text"].strip():
                continue
            more = row["text"].encode()
            if text and len(text) + 1 + len(more) > limit_bytes:
                yield str(entry), {"text": text.decode()}
                text = bytearray()
            text += b"\n" + more if text else more
        if text:
            yield str(entry), {"text": text.decode()}


# --- 2. Tokenized documents -----------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizeConfig:
    input: str = option("", "a file, a folder, or with --format hub the name of a data set")
    format: str = option("auto", "auto, jsonl, parquet, arrow, text (a file a document), repos "
                                 "(a folder of repositories) or hub")
    text_column: str = option("text", "the column that holds the text")
    subset: str | None = option(None, "configuration of a hub data set, as in sample-10BT")
    split: str = option("train", "split of a hub data set")
    on_bad: str = option("stop", "at a row without usable text: stop, or skip (counted)")
    max_document_bytes: int = option(2**26, "longer rows are bad; longer repositories are cut",
                                     parse_length)
    shard_tokens: int = option(2**24, "tokens of a shard: a crash loses one", parse_length)
    workers: int = option(os.cpu_count() or 1, "threads that tokenize", parse_length)
    tokenizer: str = option("bytes", "bytes, tiktoken:NAME, or a tokenizer.json or tokenizer.model")
    out: str = option("documents", "the folder to write; run again, it goes on where it stopped")
    seed: int = option(0, "seed of the order of a repository's files", int)


def text_of(row: dict[str, Any] | ValueError, column: str, limit_bytes: int) -> str:
    """The text in a column of a row. Raises ValueError if there is none."""
    if isinstance(row, ValueError):
        raise row
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"has no text in column {column!r} but {text!r:.40}; its columns are "
                         f"{', '.join(map(repr, row))}")
    if len(text) > limit_bytes:
        raise ValueError(f"is longer than {limit_bytes:,} bytes")
    return text


def encode_all(rows: Iterable[Row], tokenizer: Any, config: TokenizeConfig) -> Iterator[Ids]:
    """Encode on threads (tiktoken works outside Python's lock), in order, a few rows ahead."""
    def encode(where: str, row: dict[str, Any] | ValueError) -> Ids:
        try:
            text = text_of(row, config.text_column, config.max_document_bytes)
            return tokenizer.document(text).input_ids
        except ValueError as error:  # also half a character, or a byte that the tokenizer lacks
            problem = "is not UTF-8" if isinstance(error, UnicodeError) else error
            return ValueError(f"{where} {problem}")

    waiting: deque[Future[Ids]] = deque()
    with ThreadPoolExecutor(config.workers) as pool:
        for where, row in rows:
            waiting.append(pool.submit(encode, where, row))
            if len(waiting) > 4 * config.workers:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def tokenize(config: TokenizeConfig, tokenizer: Any) -> None:
    """Tokenize a source into a folder, shard by shard. Run again after a crash, it goes on.

    Rows alone cut shards: the bytes are the same for any number of workers and crashes.
    """
    out = Path(config.out)
    job = asdict(config) | {"tokenizer": tokenizer.fingerprint}
    for option_that_may_change in ("workers", "on_bad", "out"):
        del job[option_that_may_change]
    if config.on_bad not in ("stop", "skip"):
        raise ValueError(f"--on-bad {config.on_bad!r} is neither stop nor skip")
    if (out / "meta.json").exists():
        raise ValueError(f"{out} is complete already; choose another --out, or remove it")
    if (out / "job.json").exists() and read_json(out / "job.json") != job:
        raise ValueError(f"{out} was begun with other settings, those in its job.json; "
                         "choose another --out")
    shards: list[dict[str, Any]] = []
    while (out / f"{len(shards):05d}" / "meta.json").is_file():
        shards.append(read_meta(out / f"{len(shards):05d}", SHARD_META))
    rows = read_rows(config.input, config.format, config.subset, config.split,
                     config.max_document_bytes, config.seed)
    done = sum(shard["rows"] for shard in shards)
    if sum(1 for _ in itertools.islice(rows, done)) < done:
        raise ValueError(f"{config.input} has fewer rows than {out} has of it; begin anew")
    encoded = encode_all(rows, tokenizer, config)
    documents = iter(tqdm(encoded, unit=" documents", disable=not sys.stderr.isatty()))
    for first in documents:  # is there one left? Then there is another shard
        out.mkdir(parents=True, exist_ok=True)
        if not shards:
            write_json(out / "job.json", job)
        with whole_folder(out / f"{len(shards):05d}") as folder:
            shards.append(_write_shard(folder, itertools.chain([first], documents), config))
    counts = {key: sum(shard[key] for shard in shards)
              for key in ("rows", "documents", "tokens", "bad")}
    if not counts["tokens"]:
        raise ValueError(f"{config.input} has no usable text in its {counts['rows']} rows")
    write_json(out / "meta.json", {
        "format": FORMAT, "tokenizer": tokenizer.spec, "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "max_id": max(shard["max_id"] for shard in shards), "shards": len(shards), **counts})
    for line in [line for shard in shards for line in shard["bad_rows"]][:9]:
        print(f"skipped: {line}")


def _write_shard(folder: Path, documents: Iterator[Ids], config: TokenizeConfig) -> dict[str, Any]:
    """Write documents until they have the tokens of a shard. Raises ValueError for a bad row."""
    ends, bad, max_id = [0], [], 0
    with open(folder / "input_ids.bin", "wb") as file:
        for ids in documents:
            if isinstance(ids, ValueError):
                if config.on_bad == "stop":
                    raise ValueError(f"{ids}; mend it, or pass over it with --on-bad skip")
                bad.append(str(ids))
                continue
            file.write(ids.data)
            ends.append(ends[-1] + len(ids))
            max_id = max(max_id, int(ids.max()))
            if ends[-1] >= config.shard_tokens:
                break
    (folder / "doc_ends.bin").write_bytes(np.array(ends[1:], np.int64).tobytes())
    meta = {"rows": len(ends) - 1 + len(bad), "documents": len(ends) - 1, "tokens": ends[-1],
            "bad": len(bad), "bad_rows": bad[:9], "max_id": max_id}
    write_json(folder / "meta.json", meta)
    return meta


def read_meta_of(folder: str | Path) -> dict[str, Any]:
    """What the meta.json of a folder of documents says."""
    return read_meta(Path(folder), META, FORMAT, "tokenize")


def read_shard(folder: Path) -> list[np.ndarray]:
    """The documents of a shard. Raises ValueError if its files do not agree."""
    meta = read_meta(folder, SHARD_META)
    ids = np.fromfile(folder / "input_ids.bin", np.uint32)
    bounds = np.append(0, np.fromfile(folder / "doc_ends.bin", np.int64))
    if ((len(ids), len(bounds)) != (meta["tokens"], meta["documents"] + 1)
            or (np.diff(bounds) <= 0).any() or bounds[-1] != len(ids)):
        raise ValueError(f"{folder}: its files and its meta.json do not agree; it is damaged, "
                         "remove the folder and tokenize again")
    return [ids[begin:end] for begin, end in itertools.pairwise(bounds)]
