"""What one CUDA GPU can do: tokens/s, MFU and memory of whole training steps, and no hidden waits.

    python experiments/gpu.py                  fifteen minutes on one H100 (not run on any yet)
    python experiments/gpu.py --device cpu     the same calls on a toy, to see that they run

1. Steps of train.py's own `train_step` on one GPU: llama3.2-3b at 64K (aim: 45% MFU), llama3.2-1b
   at 512K in one document (aim: it fits), each with the memory options of `--activations auto`.
2. `varlen` against full causal attention, and against `sdpa`, on 64K tokens of short documents.
3. No wait for the device inside a step (torch.cuda's sync debug mode names every one), and no
   compilation after the first steps, though document lengths change.

What each of eight GPUs would need for Llama-3-8B at 512K: experiments/simulate_ranks.py. Writes
docs/figures/gpu.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import PackedSequence, make_batch, option, parse_cli, run_main  # noqa: E402
from experiments.parallel_speed import sequence, short_documents  # noqa: E402
from model import (  # noqa: E402
    BACKENDS,
    Parallel,
    Transformer,
    device_peak_flops,
    flops_per_step,
    init_parallel,
    preset_config,
)
from train import (  # noqa: E402
    TrainConfig,
    make_optimizer,
    memory_options_for,
    memory_there,
    shard_model,
    train_step,
)


@dataclass(frozen=True)
class GpuConfig:
    device: str = option("cuda", "cuda, or cpu for a toy")
    steps: int = option(5, "steps to time, after two that warm up")


def one_training(
    name: str, packs: list[PackedSequence], parallel: Parallel, steps: int
) -> dict[str, Any]:
    """Train a preset on the packs in turn: seconds, MFU, peak GiB, late compilations."""
    device, gpu = parallel.device, parallel.device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    shape = preset_config(name, 295)
    model = Transformer(shape).to(device).init_weights(0)
    options, _ = memory_options_for(
        TrainConfig(),
        shape,
        len(packs[0].input_ids),
        1,
        dtype.itemsize,
        memory_there(device),
        device.type,
    )
    model.set_memory_options(options)
    model.compile_blocks()
    model = shard_model(model, parallel, dtype)
    optimizer = make_optimizer(model, 0.1)
    seconds, compiled = [], []
    for step in range(2 + steps):
        batch = make_batch([packs[step % len(packs)]])
        begin = time.perf_counter()
        # ends by reading the loss: the device is done
        train_step(model, optimizer, [batch], 1e-5, parallel)
        seconds.append(time.perf_counter() - begin)
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    median = statistics.median(seconds[2:])
    flops = np.mean([flops_per_step(shape, pack.doc_lens) for pack in packs])
    return {
        "model": name,
        "tokens": len(packs[0].input_ids),
        "options": str(options),
        "seconds": median,
        "tok_per_s": len(packs[0].input_ids) / median,
        "mfu": flops / median / device_peak_flops(device, dtype),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
        "compiled_after_warmup": compiled[-1] - compiled[1],
    }


def waits_inside_a_step(parallel: Parallel) -> int:
    """Whether forward and backward of a tiny model wait for the GPU: each wait is an error."""
    model = (
        Transformer(preset_config("tiny", 295)).to(parallel.device, torch.bfloat16).init_weights(0)
    )
    ids = torch.zeros(2048, dtype=torch.long, device=parallel.device)
    model.loss(ids, ids, (2048,))[0].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.loss(ids, ids, (1000, 1048))[0].backward()
    except RuntimeError:
        return 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0


def attention_speeds(parallel: Parallel, tokens: int) -> dict[str, float]:
    """Milliseconds of one Llama-3-8B attention, both ways: full, and over short documents."""
    gpu = parallel.device.type == "cuda"
    lens = short_documents(np.random.default_rng(0), tokens)
    times = {}
    for name, backend, doc_lens in (("full causal", "sdpa", (tokens,)), ("varlen", "varlen", lens),
                                    ("sdpa, a call per length", "sdpa", lens)):
        if backend == "varlen" and not gpu:
            continue
        q, k, v = (torch.randn(tokens, heads, 128, device=parallel.device,
                               dtype=torch.bfloat16 if gpu else torch.float32, requires_grad=True)
                   for heads in (32, 8, 8))
        cu_seqlens = torch.tensor(
            [0, *np.cumsum(doc_lens)], dtype=torch.int32, device=parallel.device
        )
        rounds = []
        for _ in range(4):
            begin = time.perf_counter()
            BACKENDS[backend](q, k, v, cu_seqlens, max(doc_lens)).sum().backward()
            if gpu:
                torch.cuda.synchronize()
            rounds.append(time.perf_counter() - begin)
        times[name] = statistics.median(rounds[1:]) * 1e3
    return times


def main() -> None:
    config = parse_cli(GpuConfig, __doc__)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA GPU here; --device cpu runs the same calls on a toy")
    gpu, rng = config.device == "cuda", np.random.default_rng(0)
    parallel = init_parallel()
    jobs = ([("llama3.2-3b", [sequence((65_536,))]),
             ("llama3.2-3b", [sequence(short_documents(rng, 65_536)) for _ in range(4)]),
             ("llama3.2-1b", [sequence((524_288,))])] if gpu else
            [("tiny", [sequence(short_documents(rng, 2048)) for _ in range(4)])])
    result: dict[str, Any] = {
        "command": "python experiments/gpu.py",
        "device": str(parallel.device),
        "name": torch.cuda.get_device_name() if gpu else "cpu",
        "training": [],
    }
    for name, packs in jobs:
        row = one_training(name, packs, parallel, config.steps)
        result["training"].append(row)
        print(json.dumps(row), flush=True)
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    result["attention_ms"] = attention_speeds(parallel, 65_536 if gpu else 2048)
    result["waits_inside_a_step"] = waits_inside_a_step(parallel) if gpu else None
    print(json.dumps({key: result[key] for key in ("attention_ms", "waits_inside_a_step")}))
    if gpu:
        (ROOT / "docs" / "figures" / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
