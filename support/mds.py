"""ProLong's own packed data: mosaicml-streaming folders (MDS), read by hand.

In such a folder index.json names shards. A shard holds

    uint32 samples, uint32 offsets (samples + 1)    where each sample begins, the last one ends
    samples                                         for each, the uint32 sizes of its columns of
                                                    variable size, then its columns

with columns input_ids, indices (where its documents begin and end) and, for SFT, mask. Their
encoding, as in "ndarray:uint32", says the dtype, and their first bytes say the shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .files import is_link, read_json
from .texts import open_file

Packed = tuple[np.ndarray, tuple[int, ...], np.ndarray | None]  # ids, document lengths, loss mask


def read_mds(folder: str | Path, seq_len: int) -> Iterator[Packed]:
    """All packed sequences of a folder. Raises ValueError, naming shard and sample, for damage."""
    for shard in read_json(Path(folder) / "index.json").get("shards", []):
        path, i = Path(folder) / "index.json", 0
        try:
            path = Path(folder, (shard.get("zip_data") or shard["raw_data"])["basename"])
            if shard.get("format") != "mds" or path.parent != Path(folder) or is_link(path):
                raise ValueError("it is no MDS shard of this folder")
            with open_file(path) as file:
                content = file.read(2**32)  # its offsets have 32 bits
            for i in range(shard["samples"]):
                yield check_sequence(_read_sample(content, i, shard), seq_len)
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            raise ValueError(f"{path} sample {i}: {error!r}") from None


def _read_sample(content: bytes, i: int, shard: dict[str, Any]) -> dict[str, np.ndarray]:
    begin, end = np.frombuffer(content, np.uint32, 2, 4 * (i + 1)).tolist()
    sizes = shard["column_sizes"]
    variable = np.frombuffer(content, np.uint32, sizes.count(None), begin).tolist()
    begin += 4 * len(variable)
    columns = {}
    for name, kind, size in zip(shard["column_names"], shard["column_encodings"], sizes,
                                strict=True):
        size = variable.pop(0) if size is None else size
        if name in ("input_ids", "indices", "mask"):
            columns[name] = _read_array(content[begin:begin + size], kind)
        begin += size
    if begin != end or end > len(content):
        raise ValueError(f"it ends at byte {begin} of {len(content)}, its index says {end}")
    return columns


def _read_array(content: bytes, encoding: str) -> np.ndarray:
    kind, _, dtype = encoding.partition(":")
    if kind != "ndarray" or not dtype or ":" in dtype:  # ":64" would be a shape
        raise ValueError(f"a column has encoding {encoding!r}, ProLong's have ndarray:DTYPE; "
                         "write it again with that")
    rank, width = content[0] >> 2, 1 << (content[0] & 3)  # axes, and bytes of each one's length
    lengths = np.frombuffer(content, f"uint{8 * width}", rank, 1)
    return np.frombuffer(content, dtype, offset=1 + rank * width).reshape(lengths.tolist())


def check_sequence(columns: dict[str, np.ndarray], seq_len: int) -> Packed:
    """A sample as ids, document lengths and mask. Raises ValueError unless documents fill it."""
    ids, mask = columns["input_ids"], columns.get("mask")
    bounds = columns.get("indices", np.array([0, len(ids)])).astype(np.int64).reshape(-1, 2)
    ends = np.append(0, bounds[:, 1])
    if (ids.shape != (seq_len,) or (mask is not None and mask.shape != ids.shape)
            or ends[-1] != seq_len or (ends[:-1] != bounds[:, 0]).any()
            or (np.diff(ends) <= 0).any()):
        raise ValueError(f"its {len(ids):,} tokens, documents {bounds.tolist()[:4]} or mask do not "
                         f"fill {seq_len:,} tokens end to end; is --seq right?")
    doc_lens = tuple(np.diff(ends).tolist())
    return ids.astype(np.uint32), doc_lens, None if mask is None else mask.astype(bool)
