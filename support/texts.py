"""Text from files and from the hub becomes tokenized documents, encoded once and packed often.

A row is a pair: its place ("web.jsonl:17"), and a dict of its columns. Where a row can't be read, a
ValueError that says why stands in place of the dict. Rows are read as streams, and written as

    documents/00000/input_ids.bin   uint32 (tokens,)      whole documents, one after another
              00000/doc_ends.bin    int64  (documents,)   where each ends
              00000/meta.json       sizes, checksum, options, and how many rows this shard took
              meta.json             written last: with it, the folder is complete
"""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from .cli import choose, option, parse_length, warn
from .files import check_parquet, is_link, read_meta, sha256_of, whole_folder, write_json
from .installed import generator

Row = tuple[str, "dict[str, Any] | ValueError"]
Ids = np.ndarray | ValueError  # the ids of a document, uint32 (n,), or why there are none
SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "text",
            ".md": "text"}
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
MAX_CHARS = 2**26  # of a document: the tokens of a longer one would need gigabytes
MAX_BYTES = 6 * MAX_CHARS + 2**20  # of its row: a character may be written as \\u0041
FORMAT = "nanolong-documents-2"
META = {"format": str, "tokenizer": str, "tokenizer_fingerprint": str, "vocab_size": int,
        "max_id": int, "shards": int, "documents": int, "tokens": int, "rows": int, "bad": int}
COUNTS = ("rows", "documents", "tokens", "bad")
SHARD_META = dict.fromkeys((*COUNTS, "max_id"), int) | {"sha256": str}

# --- 1. Rows --------------------------------------------------------------------------------------


def read_rows(source: str, format: str = "auto", subset: str | None = None, split: str = "train",
              seed: int = 0) -> Iterator[Row]:
    """All rows of a source, in one order everywhere. Raises ValueError if it can't be read at all.

    `format` is auto (by the suffix), jsonl, parquet, text (a file is a row), repos (a folder of
    folders, whose files `seed` orders) or hub (a data set, `subset` and `split` its part).
    """
    root = Path(source)
    files, left_out = list_files(source) if format != "hub" else ([], [])
    if left_out:
        warn(f"{root}: {len(left_out):,} links or unreadable are left out, as {left_out[0]}")
    if format == "auto":
        formats = {format_of(path) for path in files}
        if len(formats) != 1:
            raise ValueError(f"{root} does not hold one kind of file; say which with --format")
        format = formats.pop()
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        "jsonl": _jsonl_rows, "parquet": _parquet_rows, "text": _text_rows,
        "repos": lambda _: _repository_rows(root, files, seed),
        "hub": lambda _: _dataset_rows(source, subset, split)}
    read = choose("--format", format, readers)
    for path in [root] if format in ("repos", "hub") else files:
        try:
            yield from read(path)
        except Exception as error:  # each format has errors of its own
            # A damaged file stops everything: nobody knows how many rows are missing.
            problem = " ".join(str(error).split())
            raise ValueError(f"{path} can't be read to its end: {problem}") from None


def list_files(source: str) -> tuple[list[Path], list[Path]]:
    """A file, or all below a folder but hidden ones; and what is not read: links, closed ones."""
    if not source or not Path(source).exists():
        raise ValueError(f"{source!r} does not exist; of the hub? --format hub, in sft.py hub:NAME")
    if not Path(source).is_dir():
        return [Path(source)], []
    failed: set[Path] = set()
    walk = os.walk(source, onerror=lambda error: failed.add(Path(error.filename)))  # no links
    found = sorted(Path(at, name) for at, folders, names in walk for name in folders + names)
    shown = [path for path in found if "/." not in f"/{path.relative_to(source).as_posix()}"]
    closed = {path for path in shown if is_link(path) or not os.access(path, os.R_OK)} | failed
    return [path for path in shown if path.is_file() and path not in closed], sorted(closed)


def format_of(path: Path) -> str:
    """The format that a file's suffix says, as in "web.jsonl.gz". Raises ValueError for others."""
    plain = path.with_suffix("") if path.suffix in COMPRESSED else path
    if plain.suffix not in SUFFIXES:
        raise ValueError(f"{path} is not {', '.join(SUFFIXES)}, or one of them in .gz or .zst; "
                         "say what it is with --format, or convert it to JSONL or Parquet")
    return SUFFIXES[plain.suffix]


def open_file(path: Path) -> BinaryIO:
    """Open a file, decompressed by its suffix. Reading one that was cut raises OSError."""
    if path.suffix not in COMPRESSED:
        return open(path, "rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(path, compression=COMPRESSED[path.suffix]))


def _jsonl_rows(path: Path) -> Iterator[Row]:
    """JSON objects, one a line. A library's reader would lose the good rows before a bad one."""
    with open_file(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_BYTES), b""), 1):
            if line.strip():
                yield f"{path}:{number}", _parse_object(line)


def _parse_object(line: bytes) -> dict[str, Any] | ValueError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"is not JSON ({error})")
    return row if isinstance(row, dict) else ValueError(f"is a {type(row).__name__}, not an object")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    check_parquet(file.metadata)
    batches = file.iter_batches(64)  # rows, not all of a group
    rows = (row.as_py() for batch in batches for row in batch.to_struct_array())
    yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))


def _dataset_rows(name: str, subset: str | None, split: str) -> Iterator[Row]:
    """What `datasets` reads: a set of the hub, or a set in a local folder."""
    import datasets

    rows = datasets.load_dataset(name, subset, split=split, streaming=True)
    yield from ((f"{name}:{number}", row) for number, row in enumerate(rows, 1))


def _text_rows(path: Path) -> Iterator[Row]:
    with open_file(path) as file:
        yield str(path), _decode(file.read(MAX_BYTES))


def _decode(content: bytes) -> dict[str, Any] | ValueError:
    try:
        text = content.decode("utf-8-sig")  # without the mark that some editors put first
    except UnicodeDecodeError:
        return ValueError("is not UTF-8")
    return {"text": text} if "\0" not in text else ValueError("is binary")


def _repository_rows(root: Path, all_files: list[Path], seed: int) -> Iterator[Row]:
    """A row for each folder in `root`: its text files in a seeded order."""
    for name, group in itertools.groupby(all_files, lambda file: file.relative_to(root).parts[0]):
        files = [file for file in group if file.parent != root]
        order = generator(seed, name).permutation(len(files))
        rows = (_decode(files[i].read_bytes()) for i in order
                if files[i].stat().st_size <= MAX_CHARS)
        yield from _joined(str(root / name), "text", (
            row["text"] for row in rows if isinstance(row, dict) and row["text"].strip()))


def _joined(place: str, column: str, texts: Iterable[str]) -> Iterator[Row]:
    """The texts one after another, in rows of at most MAX_CHARS."""
    parts, length = list[str](), 0
    for text in texts:
        length += len(text) + 1
        if parts and length > MAX_CHARS:
            yield place, {column: "\n".join(parts)}
            parts, length = [], len(text) + 1
        parts.append(text)
    if parts:
        yield place, {column: "\n".join(parts)}


# --- 2. Tokenized documents -----------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizeConfig:
    input: str = option("", "a file, a folder, or with --format hub the name of a data set")
    format: str = option("auto", "auto, jsonl, parquet, text (a file a row), repos or hub")
    text_column: str = option("text", "the column that holds the text, or messages")
    where: str = option("", "keep only such rows, as in meta.redpajama_set_name=RedPajamaBook")
    group_by: str = option("", "join rows that follow each other with the same, as in repo_name")
    subset: str | None = option(None, "configuration of a hub data set, as in sample-10BT")
    split: str = option("train", "split of a hub data set")
    on_bad: str = option("stop", "at a row without usable text: stop, or skip (counted)")
    shard_tokens: int = option(2**24, "tokens of a shard: a crash loses one", parse_length)
    workers: int = option(os.cpu_count() or 1, "threads that tokenize", parse_length)
    tokenizer: str = option("bytes", "bytes, tiktoken:NAME, or a tokenizer.json or its folder")
    out: str = option("documents", "the folder to write; run again, it goes on where it stopped")
    seed: int = option(0, "seed of the order of a repository's files", int)


def text_of(row: dict[str, Any] | ValueError, column: str) -> str:
    """The text in a column of a row. Raises ValueError if there is none."""
    if isinstance(row, ValueError):
        raise row
    text = row.get(column)
    if column == "messages":  # a conversation as plain text, all of which is trained on
        try:
            text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in row[column])
        except (LookupError, TypeError):
            raise ValueError("has no list of turns with 'role' and 'content'") from None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"has no text in column {column!r} but {text!r:.40}; its columns are "
                         f"{', '.join(map(repr, row))}")
    if len(text) > MAX_CHARS:
        raise ValueError(f"is longer than {MAX_CHARS:,} characters; split it")
    return text


def select_rows(rows: Iterator[Row], where: str) -> Iterator[Row]:
    """Rows in which a column, or a field in one, is what `where` says; and damaged ones."""
    path, equals, wanted = where.partition("=")
    if not path or not equals:
        raise ValueError(f"--where {where!r} is not COLUMN=VALUE; write for example meta.set=Book")
    for place, row in rows:
        value: Any = row
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(row, ValueError) or str(value) == wanted:
            yield place, row


def join_rows(rows: Iterator[Row], config: TokenizeConfig) -> Iterator[Row]:
    """One row of those that follow each other with the same repository, its files in any order."""
    def name_of(each: Row) -> str:
        place, row = each
        name = row.get(config.group_by) if isinstance(row, dict) else None
        return place if name is None else str(name)  # alone, if it has none

    for name, group in itertools.groupby(rows, name_of):
        (place, first), *others = group
        if isinstance(first, ValueError):
            yield place, first
        elif first.get(config.group_by) is None:
            yield place, ValueError(f"has no {config.group_by!r} to join by")
        else:
            found = [first, *(row for _, row in others)]
            order = generator(config.seed, name).permutation(len(found))
            texts = (found[i].get(config.text_column) for i in order)
            yield from _joined(place, config.text_column,
                               (text for text in texts if isinstance(text, str)))


def encode_all(rows: Iterator[Row], tokenizer: Any, config: TokenizeConfig) -> Iterator[Ids]:
    """Encode in order, a few rows at a time on threads (tiktoken works outside Python's lock)."""
    def encode(where_and_row: Row) -> Ids:
        where, row = where_and_row
        try:
            return tokenizer.document(text_of(row, config.text_column)).input_ids
        except ValueError as error:  # also half a character, or a byte that the tokenizer lacks
            problem = "is not UTF-8" if isinstance(error, UnicodeError) else error
            return ValueError(f"{where} {problem}")

    with ThreadPoolExecutor(config.workers) as pool:
        while some := list(itertools.islice(rows, 8 * config.workers)):
            yield from pool.map(encode, some)


def tokenize(config: TokenizeConfig, tokenizer: Any) -> None:
    """Tokenize a source, shard by shard. Run again after a crash, it goes on, to the same bytes."""
    out = Path(config.out)
    choose("--on-bad", config.on_bad, dict.fromkeys(("stop", "skip")))
    if (out / "meta.json").exists():
        raise ValueError(f"{out} is complete already; choose another --out, or remove it")
    files = list_files(config.input)[0] if config.format != "hub" else []
    state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    may_change = {"workers": 0, "on_bad": "", "out": ""}
    job = asdict(config) | may_change | {"tokenizer": tokenizer.fingerprint,
                                         "files": sha256(json.dumps(state).encode()).hexdigest()}
    shards: list[dict[str, Any]] = []
    while (folder := out / f"{len(shards):05d}").is_dir():
        shards.append(read_meta(folder, SHARD_META))
        if shards[-1].get("job") != job:
            raise ValueError(f"{folder} was made with other settings, those in its meta.json, or "
                             "from files of other names, sizes or times; choose another --out")
    rows = read_rows(config.input, config.format, config.subset, config.split, config.seed)
    rows = select_rows(rows, config.where) if config.where else rows
    rows = join_rows(rows, config) if config.group_by else rows
    done = sum(shard["rows"] for shard in shards)
    if sum(1 for _ in itertools.islice(rows, done)) < done:
        raise ValueError(f"{config.input} has fewer rows than {out} has of it; begin anew")
    encoded = encode_all(rows, tokenizer, config)
    documents = iter(tqdm(encoded, unit=" documents", disable=not sys.stderr.isatty()))
    for first in documents:  # is there one left? Then there is another shard
        with whole_folder(out / f"{len(shards):05d}") as folder:
            shard = _write_shard(folder, itertools.chain([first], documents), config)
            write_json(folder / "meta.json",
                       shard | {"job": job, "sha256": sha256_of(folder, "*.bin")})
        shards.append(shard)
    counts = {key: sum(shard[key] for shard in shards) for key in COUNTS}
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
    return {"rows": len(ends) - 1 + len(bad), "documents": len(ends) - 1, "tokens": ends[-1],
            "bad": len(bad), "bad_rows": bad[:9], "max_id": max_id}


def read_meta_of(folder: str | Path) -> dict[str, Any]:
    """What the meta.json of a folder of documents says. Raises ValueError if its shards do not."""
    meta = read_meta(Path(folder), META, FORMAT, "tokenize")
    shards = [read_meta(Path(folder, f"{i:05d}"), SHARD_META) for i in range(meta["shards"])]
    if any(sum(shard[key] for shard in shards) != meta[key] for key in COUNTS):
        raise ValueError(f"{folder}: its shards and its meta.json do not agree; tokenize it again")
    return meta


def read_shard(folder: Path) -> list[np.ndarray]:
    """The documents of a shard. Raises ValueError if its files do not agree."""
    meta = read_meta(folder, SHARD_META)
    ids = np.fromfile(folder / "input_ids.bin", np.uint32)
    bounds = np.append(0, np.fromfile(folder / "doc_ends.bin", np.int64))
    if ((len(ids), len(bounds)) != (meta["tokens"], meta["documents"] + 1)
            or (np.diff(bounds) <= 0).any() or bounds[-1] != len(ids)
            or sha256_of(folder, "*.bin") != meta["sha256"]):
        raise ValueError(f"{folder}: its files and its meta.json do not agree; it is damaged, "
                         "remove the folder and tokenize again")
    return [ids[begin:end] for begin, end in itertools.pairwise(bounds)]
