"""The machine: its devices and processes, and how much a training step asks of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense, from the vendor's datasheets


def start_distributed(world_size: int) -> torch.device:
    """Start torch.distributed, unless it runs already. Returns the device of this rank."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if world_size == 1 and "MASTER_ADDR" not in os.environ:  # alone: no port, no network
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:  # hours, because the others wait while rank 0 packs data
            dist.init_process_group(backend, timeout=timedelta(hours=6))
    return device


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy from the host without waiting for the GPU's queue, which unpinned memory would do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def flops_per_step(config: Any, doc_lens: Sequence[int]) -> float:
    """Floating-point operations to train a model of this shape on these documents once.

        weights     6 per weight of a matmul and token (2 forward, 4 backward)
        attention   6 * n_layers * n_heads * head_dim * length^2 for each document

    Recomputation gets no credit. Source: PaLM (2204.02311) appendix B, with real document lengths.
    """
    q_dim = config.n_heads * config.head_dim
    kv_dim = config.n_kv_heads * config.head_dim
    per_layer = config.dim * (2 * q_dim + 2 * kv_dim + 3 * config.ffn_dim)
    weights = config.n_layers * per_layer + config.dim * config.vocab_size  # no embedding lookup
    squares = sum(length * length for length in doc_lens)
    return 6.0 * weights * sum(doc_lens) + 6.0 * config.n_layers * q_dim * squares


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
    """What a model needs to read one text of `length` tokens, and its shape."""
    config, table = model.config, model.embed_tokens.weight.numel()
    n_weights = sum(weight.numel() for weight in model.parameters())
    weights = 2 * n_weights / 2**30
    cache = 2 * 2 * config.n_layers * config.n_kv_heads * config.head_dim * length / 2**30
    return (f"{name}: {n_weights:,} parameters, {table:,} of them the embedding table\n{config}\n"
            f"GiB to read a text of {length:,} tokens in bfloat16: weights {weights:.3f}, "
            f"keys and values {cache:.3f}")
