"""How much memory and time a training step takes: the arithmetic behind `train.py --plan`.

docs/512K.md goes through an example.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from support.cli import choose, parse_length

GPU_BYTES = 80e9  # an H100 80GB; CUDA and the allocator take some 5% of it
FLOPS = 0.4 * 989e12  # 40% of its bfloat16 peak, which is hopeful (docs/512K.md)


def count_weights(config: Any) -> tuple[int, int]:
    """Weights of one block, and of everything else (embedding, head and the last norm)."""
    heads = 2 * config.n_heads + 2 * config.n_kv_heads  # of q and out, k and v
    block = config.dim * (heads * config.head_dim + 3 * config.ffn_dim + 2)
    tables = 1 if config.tie_embeddings else 2
    return block, config.dim * (config.vocab_size * tables + 1)


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
    exchanged = 3 * b * (q_dim + 2 * kv_dim)
    in_attention = min(again, attention) + 4 * b * C + exchanged
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
                    itemsize: int, memory_bytes: float, device: str) -> tuple[Any, str]:
    """The first options that leave a tenth of the memory free, else the last; and why."""
    if device == "cpu" and (config.activations == "offload" or config.host_optimizer):
        raise ValueError("--activations offload and --host-optimizer move memory from a GPU to the "
                         "host, but this is the host; drop them")
    for chosen in choices:
        chosen = replace(chosen, loss_chunk_tokens=config.loss_chunk_tokens)
        if config.mlp_tile_tokens is not None:
            chosen = replace(chosen, mlp_tile_tokens=config.mlp_tile_tokens)
        needed = sum(memory_per_rank(shape, chosen, tokens, world_size, itemsize,
                                     config.host_optimizer).values())
        if needed < 0.9 * memory_bytes:
            break
    why = (f"{needed / 2**30:.2f} of {memory_bytes / 2**30:.1f} GiB a rank by plan; "
           f"{in_words(chosen)}")
    return chosen, why + ("; it may not fit, see --plan" if needed > memory_bytes else "")


def in_words(options: Any) -> str:
    """What model.MemoryOptions keeps for the backward pass."""
    words = {"keep": "activations kept", "recompute": "blocks computed again for backward",
             "attention": "blocks but for attention computed again for backward",
             "offload": "blocks computed again for backward, their inputs on the host"}
    logits, tiles = options.loss_chunk_tokens, options.mlp_tile_tokens
    return (words[options.activations] + (f", logits {logits:,} tokens at a time" if logits else "")
            + (f", MLPs {tiles:,} tokens at a time" if tiles else ""))


def format_plan(config: Any, shape: Any, stage: Any, options: Sequence[Any], chosen: Any,
                sp_size: int, world_size: int, document_flops: Callable[[int], float]) -> str:
    """One stage: what each memory option leaves a rank to hold, what `chosen` does; and the time.

    Documents are as long as the domains' names say; short ones have 900 tokens.
    """
    keep, attention, recompute, tiles, offload = options
    table = {"everything kept, all logits at once": replace(keep, loss_chunk_tokens=0),
             "recompute blocks, all logits at once": replace(recompute, loss_chunk_tokens=0),
             "everything kept, logits in chunks": keep,
             "recompute all but attention": attention,
             "recompute blocks": recompute,
             "and the MLP in tiles": tiles,
             "and block inputs on the host": offload,
             "and weights and Adam on the host": offload}
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
    lines += [f"    {'in all':<44} {total / 2**30:>8.1f}  {verdict}"]

    flops = 0.0  # of a step
    for domain, share in stage.mixture.items():
        length = parse_length(domain.partition("-")[2] or 900)
        documents = stage.batch_tokens / length * share / sum(stage.mixture.values())
        flops += documents * document_flops(length)
    seconds = flops / FLOPS / world_size
    hours = stage.steps * seconds * world_size / 3600
    heads = 2 * shape.n_heads + 2 * max(shape.n_kv_heads, sp_size)  # q and out, k and v
    elements = shape.n_layers * tokens * shape.head_dim * heads
    sent = 2 * 3 * elements * (sp_size - 1) / sp_size  # 2 bytes; forward, recomputed, backward
    lines += [f"  a step of {stage.batch_tokens:,} tokens: {flops:.2e} FLOPs, {seconds:,.1f} s at "
              f"{FLOPS / 1e12:.0f} TFLOP/s a GPU, "
              f"{stage.batch_tokens / seconds / world_size:,.0f} tok/s each;",
              f"  {stage.steps:,} steps: {hours:,.0f} GPU-hours; where a document lies on two "
              f"ranks, each sends {sent / 1e9:.1f} GB a sequence"]
    return "\n".join(lines)
