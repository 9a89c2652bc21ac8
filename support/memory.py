"""How much memory a training step takes: the arithmetic of `train.py --plan` (docs/512K.md)."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from support.cli import choose

GPU_BYTES = 80e9  # an H100 80GB; CUDA and the allocator take some 5% of it


def count_weights(config: Any) -> tuple[int, int]:
    """Weights of one block, and of everything else (embedding, head and the last norm)."""
    heads = 2 * config.n_heads + 2 * config.n_kv_heads  # of q and out, k and v
    block = config.dim * (heads * config.head_dim + 3 * config.ffn_dim + 2)
    tables = 1 if config.tie_embeddings else 2
    return block, config.dim * (config.vocab_size * tables + 1)


def valid_seq_parallel_sizes(n_heads: int, n_kv_heads: int) -> list[int]:
    """The P that Ulysses can use: query heads divide by P, and KV heads by P or P by them."""
    return [p for p in range(1, n_heads + 1)
            if n_heads % p == 0 and (n_kv_heads % p == 0 or p % n_kv_heads == 0)]


def memory_per_rank(config: Any, options: Any, tokens: int, world_size: int, itemsize: int = 2,
                    host_optimizer: bool = False) -> dict[str, int]:
    """Bytes that a rank with `tokens` tokens needs at the worst moment of a step, part by part.

    `itemsize` is that of the compute dtype; weights, gradients and moments are float32. Memory
    peaks either at the loss (all activations kept, no gradients yet) or in the backward pass of a
    block (gradients have replaced activations that were freed).
    """
    C, F, b = config.dim, config.ffn_dim, itemsize
    q_dim = config.n_heads * config.head_dim
    kv_dim = config.n_kv_heads * config.head_dim
    block, rest = count_weights(config)
    sharded = 0 if host_optimizer else 4 * (config.n_layers * block + rest) // world_size

    # What one block keeps for backward, per token.
    norm = 2 * b * C  # its input and its output
    attention = norm + 2 * b * (q_dim + kv_dim) + 4 * config.n_heads  # q, k, v, out, log-sum-exp
    mlp = norm + b * 4 * F  # gate, silu(gate), up, their product
    tile = min(options.mlp_tile_tokens or tokens, tokens) / tokens
    saved = attention + (mlp if tile == 1 else 2 * b * C)  # tiles keep their inputs alone
    kept = tokens * {"keep": saved * config.n_layers,
                     "attention": (b * (C + q_dim) + 4 * config.n_heads) * config.n_layers,
                     "recompute": b * C * config.n_layers,
                     "offload": 2 * b * C}[options.activations]

    # What is in memory besides while a block's backward runs, and while the loss does.
    again = 0 if options.activations == "keep" else saved  # computed a second time
    in_mlp = again + 2 * b * C + tile * (3 * b * F + (mlp if tile < 1 else 0))
    # Gradients of out, q, k, v, and FlashAttention 2's sums: float32 dq, dk and dv of each q head.
    chunk_of_heads = (2 * b * (q_dim + kv_dim) + (4 + 2 * b) * q_dim) / options.head_chunks
    in_attention = min(again, attention) + 2 * b * C + chunk_of_heads
    in_block = int(tokens * max(in_mlp, in_attention))
    chunk = min(options.loss_chunk_tokens or tokens, tokens)
    in_loss = chunk * config.vocab_size * (8 + 2 * b) + b * C * (3 * tokens + config.vocab_size)

    parts = {"weights and Adam's moments, over all ranks": 3 * sharded,
             "gathered: embedding, head and two blocks": b * (rest + 2 * block) + 4 * block}
    if kept + in_loss > max(kept, sharded) + in_block:
        return parts | {"kept for backward": kept, "at work: the logits": in_loss}
    half = "MLP" if in_mlp > in_attention else "attention"
    return parts | {"kept for backward, then gradients": max(kept, sharded),
                    f"at work: a block's {half}": in_block}


def dtype_for(name: str, device: torch.device, dim: int) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why: by what the device is, never by timing, so runs repeat."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name != "auto":
        return choose("dtype", name, dtypes), "as asked"
    on_gpu = device.type == "cuda"
    if not (torch.cuda.is_bf16_supported() if on_gpu else torch.cpu._is_avx512_bf16_supported()):
        return torch.float32, f"auto: this {device.type} has no bfloat16 matmuls"
    if not on_gpu and dim < 128:  # widening between matmuls costs as much as they gain
        return torch.float32, f"auto: on a CPU a model of width {dim} is no faster in bfloat16"
    return torch.bfloat16, f"auto: this {device.type} has bfloat16 matmuls"


def memory_there(device: torch.device) -> float:
    """Bytes that one rank may use: those of its GPU, or its share of this machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def memory_gib(device: torch.device) -> float:
    """The most memory that was in use so far, on the GPU or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def first_that_fits(choices: Sequence[Any], config: Any, shape: Any, tokens: int, world_size: int,
                    itemsize: int, memory_bytes: float, device: str,
                    sp_size: int = 1) -> tuple[Any, str]:
    """What is asked for, else the first options that leave a tenth free, or the last; and why."""
    if device == "cpu" and (config.activations == "offload" or config.host_optimizer):
        raise ValueError("--activations offload and --host-optimizer move memory from a GPU to the "
                         "host, but this is the host; drop them")
    if config.activations != "auto":
        choices = [replace(choices[0], activations=config.activations)]
    elif device == "cpu":
        choices = [option for option in choices if option.activations != "offload"]
    asked = {"loss_chunk_tokens": config.loss_chunk_tokens, "head_chunks": config.head_chunks,
             "mlp_tile_tokens": config.mlp_tile_tokens}
    for chosen in allowed(choices, shape, sp_size):
        chosen = replace(chosen, **{k: v for k, v in asked.items() if v is not None})
        needed = sum(memory_per_rank(shape, chosen, tokens, world_size, itemsize,
                                     config.host_optimizer).values())
        if needed < 0.9 * memory_bytes:
            break
    why = (f"{needed / 2**30:.2f} of {memory_bytes / 2**30:.1f} GiB a rank by plan; "
           f"{in_words(chosen)}")
    return chosen, why + ("; it may not fit, see --plan" if needed > memory_bytes else "")


def allowed(choices: Sequence[Any], shape: Any, sp_size: int) -> list[Any]:
    """The options whose chunks of heads the model has, with an exchange and without."""
    sizes = valid_seq_parallel_sizes(shape.n_heads, shape.n_kv_heads)
    return [o for o in choices if {o.head_chunks, o.head_chunks * sp_size} <= set(sizes)]


def in_words(options: Any) -> str:
    """What model.MemoryOptions keeps for the backward pass."""
    words = {"keep": "activations kept", "recompute": "blocks computed again for backward",
             "attention": "blocks but for attention computed again for backward",
             "offload": "blocks computed again for backward, their inputs on the host"}
    logits, tiles, chunks = options.loss_chunk_tokens, options.mlp_tile_tokens, options.head_chunks
    return (words[options.activations] + (f", logits {logits:,} tokens at a time" if logits else "")
            + (f", MLPs {tiles:,} tokens at a time" if tiles else "")
            + (f", attention in {chunks} chunks of heads" if chunks > 1 else ""))


def format_plan(config: Any, shape: Any, stage: Any, options: Sequence[Any], chosen: Any,
                sp_size: int, world_size: int) -> str:
    """One stage: what each memory option leaves a rank to hold, and what `chosen` does."""
    options = allowed(options, shape, sp_size)
    names = ("everything kept, logits in chunks", "recompute all but attention", "recompute blocks",
             "and the MLP in tiles", "and block inputs on the host",
             f"and attention in {options[-1].head_chunks} chunks of heads")
    table = {"everything kept, all logits at once": replace(options[0], loss_chunk_tokens=0),
             "recompute blocks, all logits at once": replace(options[2], loss_chunk_tokens=0),
             **dict(zip(names, options, strict=False)),
             "and weights and Adam on the host": options[-1]}
    tokens, most = stage.seq_len // sp_size, 0.95 * GPU_BYTES
    held = {name: sum(memory_per_rank(shape, option, tokens, world_size,
                                      host_optimizer="Adam" in name).values())
            for name, option in table.items()}
    fitting = [name for name, size in held.items() if size < most] or ["more ranks"]
    parts = memory_per_rank(shape, chosen, tokens, world_size, host_optimizer=config.host_optimizer)
    total = sum(parts.values())
    verdict = "it fits" if total < most else f"it does not fit; what would: {fitting[0]}"
    lines = [f"\n{config.model}, stage {stage.name}: {stage.seq_len:,} tokens over {sp_size} of "
             f"{world_size} ranks, {tokens:,} each; bfloat16, {GPU_BYTES / 2**30:.1f} GiB a GPU",
             f"  {'what each lever leaves a rank to hold':<46} {'GiB':>8}"]
    lines += [f"  {name:<46} {size / 2**30:>8.1f}  {'fits' if size < most else '-'}"
              for name, size in held.items()]
    lines += [f"  this command: {in_words(chosen)}"]
    lines += [f"    {name:<44} {size / 2**30:>8.1f}" for name, size in parts.items()]
    return "\n".join([*lines, f"    {'in all':<44} {total / 2**30:>8.1f}  {verdict}"])
