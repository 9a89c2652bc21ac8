"""How long a step takes on H100s, by measured rates of their kernels (docs/512K.md)."""

from __future__ import annotations

from typing import Any

from support.cli import parse_length
from support.machine import PEAK_BF16, flops_per_step
from support.memory import count_weights

MATMULS = 600e12  # FLOP/s of an H100 SXM in bfloat16; a round number for large ones
# Attention forward (causal), backward (no mask), 16K tokens, head dim 128: 2407.08608, figures 5, 6
KERNELS = {"FlashAttention 2": (335e12, 322e12), "cuDNN": (539e12, 516e12),
           "FlashAttention 3": (616e12, 561e12)}


def kernel_for(length: int, stage: Any, sp_size: int, world_size: int) -> str:
    """What torch 2.13 runs on Hopper: a document that fills what a rank attends to is dense."""
    sequences = stage.batch_tokens // stage.seq_len * sp_size // world_size  # of a rank in a step
    alone = min(sequences, 65_536 * sp_size // stage.seq_len) <= 1  # in train.py's micro-batch
    dense = alone and length in (stage.seq_len, stage.seq_len // sp_size)
    return "cuDNN" if dense else "FlashAttention 2"  # see model.attention_varlen


def document_seconds(config: Any, length: int, kernel: str, options: Any) -> float:
    """Seconds that one H100 takes to train on a document, with what model.MemoryOptions repeat.

    A matmul runs once forward and twice backward; attention has two matmuls forward, five backward.
    """
    passes = 3 + (options.activations != "keep")
    tiled, chunked = options.mlp_tile_tokens > 0, options.loss_chunk_tokens > 0
    block = passes * count_weights(config)[0] + tiled * 3 * config.dim * config.ffn_dim
    head = (3 + chunked) * config.dim * config.vocab_size
    attention = 2 * config.n_layers * config.n_heads * config.head_dim * length**2  # forward
    forward, backward = KERNELS[kernel]
    forwards = 1 if options.activations in ("keep", "attention") else 2
    return (2 * length * (config.n_layers * block + head) / MATMULS
            + attention * (forwards / forward + 2.5 / backward))


def documents_of(stage: Any) -> list[tuple[int, float]]:
    """(length, how many in a step) of each domain, by its name; short documents have 900 tokens."""
    lengths = {name: parse_length(name.partition("-")[2] or 900) for name in stage.mixture}
    parts = stage.batch_tokens / sum(stage.mixture.values())
    return [(lengths[name], parts * share / lengths[name]) for name, share in stage.mixture.items()]


def format_time(config: Any, stage: Any, options: Any, sp_size: int, world_size: int) -> str:
    """One stage: the time of one document a sequence, of a step and of all steps."""
    S, dp = stage.seq_len, world_size // sp_size
    text = f"  on {world_size} H100s, none of which ever waits (support/speed.py):\n"
    for what, documents in ((f"{dp} x a document of {S:,} tokens", [(S, float(dp))]),
                            (f"a step of {stage.batch_tokens:,} tokens", documents_of(stage))):
        kernels = {n: kernel_for(n, stage, sp_size, world_size) for n, _ in documents}
        gpu_seconds = sum(count * document_seconds(config, n, kernels[n], options)
                          for n, count in documents)
        flops = sum(count * flops_per_step(config, (n,)) for n, count in documents)
        text += (f"  {what}, by {' and '.join(sorted(set(kernels.values())))}: {flops:.2e} FLOPs, "
                 f"{gpu_seconds / world_size:,.1f} s, "
                 f"{sum(count * n for n, count in documents) / gpu_seconds:,.0f} tok/s a GPU, "
                 f"MFU {flops / gpu_seconds / PEAK_BF16['H100']:.1%}\n")
    heads = 2 * config.n_heads + 2 * max(config.n_kv_heads, sp_size)  # q and out, k and v
    sent = 3 * 2 * config.n_layers * config.head_dim * heads * S * (sp_size - 1) / sp_size**2
    return text + (f"  {stage.steps:,} steps: {stage.steps * gpu_seconds / 3600:,.0f} GPU-hours; "
                   f"where a document lies on two ranks, each sends {sent / 1e9:.1f} GB a sequence")
