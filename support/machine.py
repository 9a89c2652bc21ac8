"""Devices and processes, the shapes of released models, and what a training step asks of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from support.memory import count_weights

PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense, from the vendor's datasheets
LLAMA32 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
COLUMNS = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim",
           "max_seq_len", "rope_theta", "rope_scaling", "tie_embeddings")
SHAPES = {  # tiny has enough heads for 8 ranks; its vocabulary of 0 means the tokenizer's
    "tiny":         (0,         64,  2,  8, 4,  16,    192,     256, 1e4, None,    True),
    "smollm2-135m": (49_152,   576, 30,  9, 3,  64,   1536,    8192, 1e5, None,    True),
    "llama3.2-1b":  (128_256, 2048, 16, 32, 8,  64,   8192, 131_072, 5e5, LLAMA32, True),
    "llama3.2-3b":  (128_256, 3072, 28, 24, 8, 128,   8192, 131_072, 5e5, LLAMA32, True),
    "llama3-8b":    (128_256, 4096, 32, 32, 8, 128, 14_336,    8192, 5e5, None,    False),
}
PRESETS: dict[str, dict[str, Any]] = {
    name: dict(zip(COLUMNS, row, strict=True)) for name, row in SHAPES.items()}


def start_distributed(world_size: int) -> torch.device:
    """Start torch.distributed, unless it runs already. Returns the device of this rank."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # hours, because the others wait while rank 0 packs data
        options: dict[str, Any] = {"timeout": timedelta(hours=6)}
        if world_size == 1:  # alone: no port, no network
            options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        # gloo beside nccl: with --host-optimizer norms and sums are on the host.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, **options)
    return device


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy from the host without waiting for the GPU's queue, which unpinned memory would do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def flops_per_step(config: Any, doc_lens: Sequence[int]) -> float:
    """Floating-point operations to train a model of this shape on these documents once.

    6 per weight of a matmul and token (2 forward, 4 backward), and for attention
    6 * n_layers * n_heads * head_dim * length^2 per document. Source: PaLM (2204.02311) appendix B.
    """
    block, _ = count_weights(config)  # without its two norms, without the embedding's lookup:
    weights = config.n_layers * (block - 2 * config.dim) + config.dim * config.vocab_size
    squares = sum(length * length for length in doc_lens)
    attention = config.n_layers * config.n_heads * config.head_dim * squares
    return 6.0 * weights * sum(doc_lens) + 6.0 * attention


@lru_cache
def device_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s: the datasheet's for known GPUs in 16 bit, else a matmul timed here."""
    from torch.utils.benchmark import Timer

    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        for name, peak in PEAK_BF16.items():
            if name in torch.cuda.get_device_name(device):
                return peak
    n = 4096 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * n**3 / min(timer.blocked_autorange(min_run_time=0.2).times)


def format_shape(name: str, model: Any, length: int) -> str:
    """A model's shape, and what it needs to read one text of `length` tokens."""
    config, table = model.config, model.embed_tokens.weight.numel()
    count = sum(weight.numel() for weight in model.parameters())
    cache = 4 * config.n_layers * config.n_kv_heads * config.head_dim * length
    return (f"{name}: {count:,} parameters, {table:,} of them the embedding table\n{config}\n"
            f"GiB to read a text of {length:,} tokens in bfloat16: weights {count / 2**29:.3f}, "
            f"keys and values {cache / 2**30:.3f}")
