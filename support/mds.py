"""ProLong's own packed data: mosaicml-streaming folders (MDS), read by hand.

In such a folder index.json names shards. A shard holds

    uint32 samples, uint32 offsets (samples + 1)    where each sample begins, the last one ends
    samples                                         for each, the uint32 sizes of its columns of
                                                    variable size, then its columns

with columns input_ids, indices (where its documents begin and end) and, for SFT, mask. These are
arrays that say their dtype and shape in their first bytes, unless the column's encoding does
("ndarray:uint32").
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .files import read_json
from .texts import open_file

DTYPES = {8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 32: "uint32", 33: "int32",
          64: "uint64", 65: "int64"}
Packed = tuple[np.ndarray, tuple[int, ...], np.ndarray | None]  # ids, document lengths, loss mask


def read_mds(folder: str | Path, seq_len: int) -> Iterator[Packed]:
    """All packed sequences of a folder. Raises ValueError, naming shard and sample, for damage."""
    for shard in read_json(Path(folder) / "index.json").get("shards", []):
        path = Path(folder, (shard.get("zip_data") or shard["raw_data"])["basename"])
        names = shard.get("column_names", [])
        if shard.get("format") != "mds" or "input_ids" not in names or ".." in path.parts:
            raise ValueError(f"{folder}/index.json: {path}, a {shard.get('format')!r} shard with "
                             f"columns {names}, is no MDS shard with input_ids")
        with open_file(path) as file:
            content = file.read()
        for i in range(shard["samples"]):
            try:
                yield check_sequence(_read_sample(content, i, shard), seq_len)
            except (ValueError, IndexError) as error:
                raise ValueError(f"{path} sample {i}: {error}") from None


def _read_sample(content: bytes, i: int, shard: dict[str, Any]) -> dict[str, np.ndarray]:
    begin, end = np.frombuffer(content, np.uint32, 2, 4 * (i + 1)).tolist()
    sizes = shard["column_sizes"]
    n_variable = sum(size is None for size in sizes)
    variable = iter(np.frombuffer(content, np.uint32, n_variable, begin).tolist())
    begin += 4 * n_variable
    columns = {}
    names, encodings = shard["column_names"], shard["column_encodings"]
    for name, encoding, size in zip(names, encodings, sizes, strict=True):
        size = next(variable) if size is None else size
        if name in ("input_ids", "indices", "mask"):
            columns[name] = _read_array(content[begin:begin + size], encoding)
        begin += size
    if begin != end or end > len(content):
        raise ValueError(f"it ends at byte {begin} of {len(content)}, its index says {end}")
    return columns


def _read_array(content: bytes, encoding: str) -> np.ndarray:
    kind, dtype, shape, *_ = (*encoding.split(":"), "", "")
    if kind != "ndarray":
        raise ValueError(f"a column of encoding {encoding!r} where an ndarray is wanted")
    if not dtype:
        dtype, content = DTYPES.get(content[0], "object"), content[1:]
    if shape:
        return np.frombuffer(content, dtype).reshape([int(n) for n in shape.split(",")])
    rank, width = content[0] >> 2, 1 << (content[0] & 3)  # axes, and bytes of each one's length
    lengths = np.frombuffer(content, f"uint{8 * width}", rank, 1)
    return np.frombuffer(content, dtype, offset=1 + rank * width).reshape(lengths.tolist())


def check_sequence(columns: dict[str, np.ndarray], seq_len: int) -> Packed:
    """A sample as ids, document lengths and mask. Raises ValueError unless documents fill it."""
    ids, mask = columns["input_ids"], columns.get("mask")
    bounds = columns.get("indices", np.array([0, len(ids)])).astype(np.int64).reshape(-1, 2)
    begins, ends = bounds[:, 0], bounds[:, 1]
    if len(ids) != seq_len:
        raise ValueError(f"it has {len(ids):,} tokens, not {seq_len:,}; give their length as --seq")
    if (begins[0] != 0 or ends[-1] != seq_len or (begins[1:] != ends[:-1]).any()
            or (begins >= ends).any()):
        raise ValueError(f"its documents {bounds.tolist()[:4]} do not lie end to end in "
                         f"{seq_len:,} tokens")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"its mask is {mask.shape}, its tokens are {ids.shape}")
    doc_lens = tuple((ends - begins).tolist())
    return ids.astype(np.uint32), doc_lens, None if mask is None else mask.astype(bool)
