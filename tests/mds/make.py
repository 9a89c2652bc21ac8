"""Writes the folders beside it, with mosaicml-streaming itself: ProLong's published schema, small.

    pip install mosaicml-streaming zstandard && python tests/mds/make.py

`samples` is also what the tests compare with, so that no second copy of the content is kept.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LEN, SAMPLES = 64, 7
FOLDERS = {"gz": 1, "sft": 2, "static": 4, "zstd": 5}  # each with the seed of its numbers


def samples(folder: str) -> Iterator[dict[str, Any]]:
    """Random tokens; 1 to 5 documents; a mask for SFT. The same whatever NumPy's version."""
    rng = np.random.RandomState(FOLDERS[folder])
    for _ in range(SAMPLES):
        cuts = np.sort(rng.permutation(np.arange(1, SEQ_LEN))[:rng.randint(5)])
        bounds = np.stack([np.append(0, cuts), np.append(cuts, SEQ_LEN)], axis=1).astype(np.uint32)
        ids = rng.randint(128_256, size=SEQ_LEN).astype(np.uint32)
        sample = {"input_ids": ids, "indices": bounds, "length": SEQ_LEN, "domain": "books"}
        if folder == "sft":
            sample["mask"] = rng.randint(2, size=SEQ_LEN).astype(np.uint8)
        yield sample


def main() -> None:
    from streaming import MDSWriter

    for folder in FOLDERS:
        columns = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "length": "int",
                   "domain": "str"}
        if folder == "sft":
            columns["mask"] = "ndarray:uint8"
        compression = {"gz": "gz", "zstd": "zstd:3"}.get(folder)
        out = str(Path(__file__).parent / folder)
        with MDSWriter(out=out, columns=columns, compression=compression,
                       size_limit=1600) as writer:
            for sample in samples(folder):
                writer.write(sample)


if __name__ == "__main__":
    main()
