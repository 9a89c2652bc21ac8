"""What `data.py inspect` prints of packed sequences and of tokenized documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .cli import printable
from .files import read_json
from .texts import read_meta_of


def folder(path: Path, format: str, open_packed: Callable[[Path], Any],
           load_tokenizer: Callable[[str], Any], check: bool) -> None:
    """Print what a folder holds: packed sequences, packed domains, or tokenized documents."""
    metas = [path / "meta.json", *sorted(path.glob("*/meta.json"))]
    packs = [open_packed(meta.parent) for meta in metas
             if meta.is_file() and read_json(meta).get("format") == format]
    for dataset in packs:
        if check:
            dataset.check_content()
        share = dataset.input_ids.size / sum(other.input_ids.size for other in packs)
        meta = dataset.meta
        print(printable(
            f"{share:>6.1%} {dataset.folder.name:<20} {meta['domain']}, {len(dataset):,} sequences "
            f"x {dataset.seq_len:,} tokens, {meta['documents']:,} documents, tokenizer "
            f"{meta['tokenizer']}, sha256 {meta['sha256'][:12]}"))
    if len(packs) == 1:
        details(packs[0], load_tokenizer)
    if not packs:
        meta = read_meta_of(path)
        print(f"{path}: {meta['documents']:,} documents, {meta['tokens']:,} tokens in "
              f"{meta['shards']} shards, tokenizer {meta['tokenizer']}; {meta['bad']:,} of "
              f"{meta['rows']:,} rows skipped")
        ends = [np.fromfile(file, np.int64) for file in sorted(path.glob("*/doc_ends.bin"))]
        print(format_lengths(np.concatenate([np.diff(each, prepend=0) for each in ends])))


def details(dataset: Any, load_tokenizer: Callable[[str], Any]) -> None:
    """Print counts, document lengths, and the text around the first document's end."""
    print(format_lengths(np.array(dataset.doc_lens, np.int64)))
    print(f"trained tokens: {dataset.trained_share:.1%}; "
          f"dropped while packing: {dataset.meta['tokens_dropped']:,}")
    end = dataset[0].doc_lens[0]
    tokenizer = load_tokenizer(dataset.meta["tokenizer"])
    dataset.check_tokenizer(tokenizer)
    around = dataset[0].input_ids[max(0, end - 60):end + 60]
    try:
        shown = repr(tokenizer.decode(around))
    except KeyError:  # someone else's pack may hold ids that are no tokens
        shown = str(around.tolist())
    print(f"around the first document's end (token {end:,}): {shown}")


def format_lengths(lens: np.ndarray) -> str:
    """Document lengths, and the share of *tokens* in long documents, as in the paper's Table 14."""
    parts = [f">{limit}K {lens[lens > limit * 1024].sum() / lens.sum():.1%}"
             for limit in (4, 8, 16, 32)]
    return (f"document lengths: shortest {lens.min():,}, median {int(np.median(lens)):,}, longest "
            f"{lens.max():,}; tokens in documents {'  '.join(parts)}")
