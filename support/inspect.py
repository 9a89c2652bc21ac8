"""What `data.py inspect` prints of packed sequences and of tokenized documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .files import read_json
from .texts import read_meta_of


def folder(path: Path, format: str, open_packed: Callable[[Path], Any],
           load_tokenizer: Callable[[str], Any], check: bool) -> None:
    """Print what a folder holds: packed sequences, packed domains, or tokenized documents."""
    entries = [path, *sorted(path.iterdir())] if path.is_dir() else []
    packs = [open_packed(entry) for entry in entries if (entry / "meta.json").is_file()
             and read_json(entry / "meta.json").get("format") == format]
    for dataset in packs if check else []:
        dataset.check_content()
    if packs and packs[0].folder == path:
        packed(packs[0], load_tokenizer)
        return
    for dataset in packs:  # a line for each packed domain
        share = dataset.input_ids.size / sum(other.input_ids.size for other in packs)
        print(f"{share:>6.1%} {dataset.folder.name:<20} {summary(dataset)}")
    if not packs:
        meta = read_meta_of(path)
        print(f"{path}: {meta['documents']:,} documents, {meta['tokens']:,} tokens in "
              f"{meta['shards']} shards, tokenizer {meta['tokenizer']}; {meta['bad']:,} of "
              f"{meta['rows']:,} rows skipped")
        print(format_lengths(np.concatenate([np.diff(np.fromfile(ends, np.int64), prepend=0)
                                             for ends in sorted(path.glob("*/doc_ends.bin"))])))


def summary(dataset: Any) -> str:
    meta = dataset.meta
    return (f"{meta['domain']}, {len(dataset):,} sequences x {dataset.seq_len:,} tokens, "
            f"{meta['documents']:,} documents, tokenizer {meta['tokenizer']}, "
            f"sha256 {meta['sha256'][:12]}")


def packed(dataset: Any, load_tokenizer: Callable[[str], Any]) -> None:
    """Print counts, lengths, a picture of sequences and the text around a document's end."""
    meta, lens = dataset.meta, np.array(dataset.doc_lens, np.int64)
    print(f"{dataset.folder}: {summary(dataset)}\n{format_lengths(lens)}")
    print(f"trained tokens: {dataset.trained_share:.1%}; "
          f"dropped while packing: {meta['tokens_dropped']:,}")
    first = [dataset[i].doc_lens for i in range(min(16, len(dataset)))]
    for i, doc_lens in enumerate(first[:4]):
        print(f"  {i:>4} {picture(doc_lens)}")
    end = first[0][0]
    around = dataset[0].input_ids[max(0, end - 60):end + 60]
    try:
        tokenizer = load_tokenizer(meta["tokenizer"])
        dataset.check_tokenizer(tokenizer)
        shown = f":\n    {tokenizer.decode(around)!r}"
    except (ValueError, KeyError) as error:  # a folder may outlive its tokenizer's file
        shown = f", as ids ({error}):\n    {around.tolist()}"
    print(f"around the first document's end (token {end:,}){shown}")


def format_lengths(lens: np.ndarray) -> str:
    """Document lengths, and the share of *tokens* in long documents, as in the paper's Table 14.

    The table counts tokens: its ShortMix row is the mean of its parts' rows by shares of tokens.
    """
    parts = [f">{limit}K {lens[lens > limit * 1024].sum() / lens.sum():.1%}"
             for limit in (4, 8, 16, 32)]
    return (f"document lengths: shortest {lens.min():,}, median {int(np.median(lens)):,}, longest "
            f"{lens.max():,}; tokens in documents {'  '.join(parts)}")


def picture(doc_lens: Sequence[int], width: int = 96) -> str:
    """A packed sequence as a line, a letter a document: "aaabbbcc". The shortest do not show."""
    ends = np.cumsum(doc_lens)
    columns = (np.arange(width) + 0.5) * ends[-1] / width
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return "".join(letters[np.searchsorted(ends, columns, side="right") % 26])
