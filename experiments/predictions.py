"""What support/speed.py says of training steps that others have measured, beside their numbers.

    python experiments/predictions.py            the table of docs/512K.md

All rows are of bfloat16 on H100s. Models are given by what costs time: their matrices.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import MemoryOptions, ModelConfig, preset_config
from support.speed import document_seconds, documents_of
from train import RECIPES

LLAMA3_8B = preset_config("llama3-8b", 256)
QWEN3_8B = replace(LLAMA3_8B, vocab_size=151_936, n_layers=36, ffn_dim=12_288)
QWEN3_4B = replace(QWEN3_8B, dim=2560, ffn_dim=9728)
RECOMPUTE = MemoryOptions(activations="recompute")  # as in all rows, with logits in chunks
FA2, CUDNN, FA3 = "FlashAttention 2", "cuDNN", "FlashAttention 3"


@dataclass(frozen=True)
class Measured:
    """One row: who measured, what, and its tokens per second and GPU."""

    source: str
    what: str
    shape: ModelConfig
    kernel: str
    rate: float
    length: int = 0  # one document a sequence; 0: a step of ProLong's mixture, no. `stage`
    stage: int = 0

    @property
    def predicted(self) -> float:
        if self.length:
            return self.length / document_seconds(self.shape, self.length, self.kernel, RECOMPUTE)
        stage = RECIPES["prolong"][self.stage]
        return stage.batch_tokens / sum(
            count * document_seconds(self.shape, length, self.kernel, RECOMPUTE)
            for length, count in documents_of(stage))


def per_gpu(length: int, gpus: int, seconds: float) -> float:
    return length / gpus / seconds


M = 2**20
ROWS = (
    Measured("transformers PR 48324", "Qwen3-8B, 1M, 8 GPUs: 606 s", QWEN3_8B, FA2,
             per_gpu(M, 8, 606), M),
    Measured("transformers PR 48324", "the same: 373 s", QWEN3_8B, CUDNN, per_gpu(M, 8, 373), M),
    Measured("TRL PR 6845", "the same: 364 s", QWEN3_8B, CUDNN, per_gpu(M, 8, 364), M),
    Measured("TRL PR 6845", "2M, 16 GPUs: 696 s", QWEN3_8B, CUDNN, per_gpu(2 * M, 16, 696), 2 * M),
    Measured("TRL PR 6845", "4M, 32 GPUs: 1,346 s", QWEN3_8B, CUDNN, per_gpu(4 * M, 32, 1346),
             4 * M),
    Measured("ProLong, Table 15", "Llama-3-8B, 64K, no mask", LLAMA3_8B, FA2, 2770, 65_536),
    Measured("UPipe, 2602.21196", "Llama-3-8B, 128K, 8 GPUs", LLAMA3_8B, FA3, 2280, 131_072),
    Measured("prime-rl, BENCHMARKS", "Qwen3-4B, 64K, 8 GPUs", QWEN3_4B, FA3, 28_970 / 8, 65_536),
    Measured("ProLong, Table 15", "its 64K mixture, masked, sorted", LLAMA3_8B, FA2, 3095),
    Measured("ProLong, Table 9", "its 512K mixture: 12.2K hours", LLAMA3_8B, FA2,
             20 * 2**30 / 12_200 / 3600, stage=1),
)


def table() -> str:
    lines = ["| measured by | what | kernel | tok/s a GPU | predicted | off by |",
             "|---|---|---|---|---|---|"]
    return "\n".join(lines + [
        f"| {row.source} | {row.what} | {row.kernel} | {row.rate:,.0f} | {row.predicted:,.0f} | "
        f"{row.predicted / row.rate - 1:+.0%} |" for row in ROWS])


if __name__ == "__main__":
    print(table())
