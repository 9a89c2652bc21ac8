"""Tokenized documents on disk: text is encoded once, and packed as often as one likes.

    documents/00000/input_ids.bin   uint32 (tokens,)      whole documents, one after another
              00000/doc_ends.bin    int64  (documents,)   where each ends
              00000/meta.json       sizes, and how many rows of the source this shard took
              job.json              the options that it was begun with
              meta.json             written last: with it, the folder is complete
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .cli import option, parse_length
from .files import read_json, read_meta, whole_folder, write_json
from .texts import Text, read_rows, read_texts

Ids = np.ndarray | ValueError  # the ids of a document, uint32 (n,), or why there are none
FORMAT = "nanolong-documents-1"
META = {"format": str, "tokenizer": str, "tokenizer_fingerprint": str, "vocab_size": int,
        "max_id": int, "shards": int, "documents": int, "tokens": int, "rows": int, "bad": int}
SHARD_META = {"rows": int, "documents": int, "tokens": int, "bad": int, "max_id": int}


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


def encode_all(texts: Iterable[Text], tokenizer: Any, workers: int) -> Iterator[Ids]:
    """Encode on threads (tiktoken works outside Python's lock), in order, 4 MiB at a time."""
    def encode(batch: list[Text]) -> list[Ids]:
        return [_encode_row(where, text, tokenizer) for where, text in batch]

    with ThreadPoolExecutor(workers) as pool:
        for rows in _windows(texts):
            n = -(-len(rows) // (4 * workers))  # rows that one thread encodes in one go
            for batch in pool.map(encode, [rows[i:i + n] for i in range(0, len(rows), n)]):
                yield from batch


def _encode_row(where: str, text: str | ValueError, tokenizer: Any) -> Ids:
    try:
        if isinstance(text, ValueError):
            raise text
        return tokenizer.document(text).input_ids
    except ValueError as error:  # also half a character, or a byte that the tokenizer lacks
        problem = "is not UTF-8" if isinstance(error, UnicodeError) else error
        return ValueError(f"{where} {problem}")


def _windows(texts: Iterable[Text]) -> Iterator[list[Text]]:
    rows: list[Text] = []
    size = 0
    for where, text in texts:
        rows.append((where, text))
        size += len(str(text))
        if size > 2**22:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def tokenize(config: TokenizeConfig, tokenizer: Any) -> None:
    """Tokenize a source into a folder, shard by shard. Run again after a crash, it goes on.

    The order of rows alone cuts shards: the bytes are the same for any number of workers and
    crashes.
    """
    out = Path(config.out)
    rows = read_rows(config.input, config.format, config.subset, config.split,
                     config.max_document_bytes, config.seed)
    texts = read_texts(rows, config.text_column, config.max_document_bytes)
    job = asdict(config) | {"workers": 0, "out": "", "tokenizer": tokenizer.fingerprint}
    shards = _shards_there(config, job)
    done = sum(shard["rows"] for shard in shards)
    if sum(1 for _ in itertools.islice(texts, done)) < done:
        raise ValueError(f"{config.input} has fewer rows than {out} has of it; begin anew")
    encoded = encode_all(texts, tokenizer, config.workers)
    documents = iter(tqdm(encoded, unit=" documents", disable=not sys.stderr.isatty()))
    if config.on_bad == "stop":
        documents = map(_stop_if_bad, documents)
    for first in documents:  # is there one left? Then there is another shard
        out.mkdir(parents=True, exist_ok=True)
        if not shards:
            write_json(out / "job.json", job)
        with whole_folder(out / f"{len(shards):05d}") as folder:
            rest = itertools.chain([first], documents)
            shards.append(_write_shard(folder, rest, config.shard_tokens))
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


def _stop_if_bad(ids: Ids) -> np.ndarray:
    if isinstance(ids, ValueError):
        raise ValueError(f"{ids}; mend it, or pass over it with --on-bad skip")
    return ids


def _shards_there(config: TokenizeConfig, job: dict[str, Any]) -> list[dict[str, Any]]:
    """The meta.json of each shard that an interrupted job has written already."""
    out = Path(config.out)
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
    return shards


def _write_shard(folder: Path, documents: Iterator[Ids], enough: int) -> dict[str, Any]:
    """Write documents until they have `enough` tokens."""
    ends = [0]
    bad: list[str] = []
    max_id = 0
    with open(folder / "input_ids.bin", "wb") as file:
        for ids in documents:
            if isinstance(ids, ValueError):
                bad.append(str(ids))
                continue
            file.write(ids.data)
            ends.append(ends[-1] + len(ids))
            max_id = max(max_id, int(ids.max()))
            if ends[-1] >= enough:
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
    ends = np.fromfile(folder / "doc_ends.bin", np.int64)
    begins = np.append(0, ends)[:-1]
    if (len(ids), len(ends)) != (meta["tokens"], meta["documents"]) or (ends <= begins).any() or (
            len(ends) and ends[-1] != len(ids)):
        raise ValueError(f"{folder}: its files and its meta.json do not agree; it is damaged, "
                         "remove the folder and tokenize again")
    return [ids[begin:end] for begin, end in zip(begins, ends, strict=True)]
