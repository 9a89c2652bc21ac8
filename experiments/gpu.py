"""What one CUDA GPU can do: right numbers, tokens/s, MFU and memory of whole steps, no hidden waits.

    python experiments/gpu.py --jobs check,attention --out checks.json       (not run on a GPU yet)
    python experiments/gpu.py --jobs 3b-64k,3b-short --steps 3 --activations attention
    python experiments/gpu.py --tiny              the same jobs on a toy, without a GPU on the CPU

check      each attention backend against the reference; each memory lever, and compiled blocks,
           against none; a step that waits for the device only where it reads the loss
attention  forward and backward of one layer of Llama-3-8B, by kernel and by kind of documents
3b-64k     steps of llama3.2-3b on one document of 64K tokens; 3b-short: on short documents
1b-512k    steps of llama3.2-1b on one document of 512K: minutes each, so with --steps 1

The JSON is written again after each job; a job that fails leaves its error there, and the next one
runs. Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True. What each of eight GPUs would need for
Llama-3-8B: experiments/simulate_ranks.py.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model as llama  # noqa: E402
import train  # noqa: E402
from experiments.parallel_speed import sequence, short_documents  # noqa: E402
from model import MemoryOptions, Parallel, Transformer, preset_config  # noqa: E402
from support.cli import choose, option, parse_cli, parse_length, run_main  # noqa: E402
from support.files import write_json  # noqa: E402
from support.memory import memory_per_rank, memory_there  # noqa: E402

NOT_RUN = "not run here"  # stands where a number would, if what it takes is missing
SEVERAL, ONE = (5, 700, 1, 318), (1024,)  # the documents of a check


@dataclass(frozen=True)
class GpuConfig:
    jobs: str = option("check,attention,3b-64k,3b-short", "what to run, in this order")
    steps: int = option(3, "steps to time, after those that warm up", parse_length)
    activations: str = option("auto", "as in train.py")
    tiny: bool = option(False, "the tiny model on 1K tokens")
    out: str = option("", "JSON (default: docs/figures/gpu.json, of a toy runs/gpu.json)")


# --- 1. Measuring, here and in simulate_ranks.py --------------------------------------------------


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def begin_json(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"command": " ".join(sys.argv), "device": name, "torch": torch.__version__}


def free() -> None:
    """Give back the memory that nothing refers to, and measure its peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def tried(function: Callable[[], Any], runs: bool = True) -> Any:
    """What the function returns, or why there is nothing; what comes after it runs anyway."""
    try:
        return function() if runs else NOT_RUN
    except Exception as error:
        traceback.print_exc()
        return f"failed: {type(error).__name__}: {error}"


def time_steps(step: Callable[[], Any], warmup: int, steps: int,
               device: torch.device) -> dict[str, Any]:
    """The median step's seconds; the most memory; what was compiled after the warm-up."""
    gpu, seconds, compiled = device.type == "cuda", [], []
    for i in range(warmup + steps):
        begin = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize()
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        seconds.append(time.perf_counter() - begin)
        print(f"  {seconds[-1]:.4f} s{' to warm up' * (i < warmup)}", flush=True)
    return {"seconds": statistics.median(seconds[warmup:]), "steps": seconds[warmup:],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else NOT_RUN,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if gpu else NOT_RUN,
            "compiled_after_warmup": compiled[-1] - compiled[warmup - 1] if gpu else NOT_RUN}


# --- 2. The jobs ----------------------------------------------------------------------------------


def sharded(shape: Any, parallel: Parallel, options: MemoryOptions) -> tuple[Transformer, Any]:
    """Model and optimizer as train.py has them, the weights drawn on the device."""
    with parallel.device:
        model = Transformer(shape).init_weights(0)
    model.set_memory_options(options)
    train.shard_model(model, parallel, dtype_of(parallel.device))
    return model, train.make_optimizer(model, 0.1)


def training(config: GpuConfig, parallel: Parallel, job: str) -> dict[str, Any]:
    """Steps of train.py's own `train_step`, with the memory options that it would choose."""
    device, size = parallel.device, dtype_of(parallel.device).itemsize
    shape = preset_config("tiny" if config.tiny else f"llama3.2-{job[:2]}", 295)
    tokens = 1024 if config.tiny else 2**19 if job == "1b-512k" else 2**16
    rng = np.random.default_rng(0)
    packs = [sequence(short_documents(rng, tokens) if job == "3b-short" else (tokens,))
             for _ in range(4)]
    options, _ = train.memory_options_for(train.TrainConfig(activations=config.activations), shape,
                                          tokens, 1, size, memory_there(device), device.type)
    model, optimizer = sharded(shape, parallel, options)
    if device.type == "cuda":
        model.compile_blocks()
    batches = cycle([train.data.make_batch([pack])] for pack in packs)
    row = time_steps(lambda: train.train_step(model, optimizer, next(batches), 1e-5, parallel),
                     1 if job == "1b-512k" else 2, config.steps, device)
    flops = np.mean([llama.flops_per_step(shape, pack.doc_lens) for pack in packs])
    return {"tokens": tokens, "options": str(options), **row,
            "planned_gib": sum(memory_per_rank(shape, options, tokens, 1, size).values()) / 2**30,
            "tok_per_s": tokens / row["seconds"],
            "mfu": flops / row["seconds"] / llama.device_peak_flops(device, dtype_of(device))}


def draw_heads(config: GpuConfig, device: torch.device, tokens: int) -> list[Tensor]:
    """q, k, v of one layer, and the gradient of what attention makes of them."""
    shape = preset_config("tiny" if config.tiny else "llama3-8b", 295)
    draw = torch.Generator(device).manual_seed(0)
    return [torch.randn(tokens, heads, shape.head_dim, generator=draw, device=device,
                        dtype=dtype_of(device), requires_grad=True)
            for heads in (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads, shape.n_heads)]


def attend(heads: list[Tensor], backend: str, doc_lens: Sequence[int]) -> list[Tensor]:
    """One layer's attention: its output, and the gradients of q, k and v."""
    *qkv, grad = heads
    ends = torch.tensor([0, *np.cumsum(doc_lens)], dtype=torch.int32, device=grad.device)
    out = llama.document_attention(*qkv, ends, max(doc_lens), backend)
    return [out, *torch.autograd.grad(out, qkv, grad)]


def attention(config: GpuConfig, parallel: Parallel, job: str) -> dict[str, Any]:
    """Seconds, and TFLOP/s as `flops_per_step` counts them, of each kernel that runs here."""
    gpu, tokens = parallel.device.type == "cuda", 1024 if config.tiny else 2**16
    heads = draw_heads(config, parallel.device, tokens)
    short, found = short_documents(np.random.default_rng(0), tokens), {}

    def measure(backend: str, doc_lens: Sequence[int], kernel: SDPBackend | None) -> dict[str, Any]:
        with sdpa_kernel(kernel) if kernel else nullcontext():
            row = time_steps(lambda: attend(heads, backend, doc_lens), 1, 3, parallel.device)
        flops = 6 * heads[0][0].numel() * sum(n * n for n in doc_lens)
        return {"seconds": row["seconds"], "tflops": flops / row["seconds"] / 1e12}

    for name, backend, doc_lens, kernel, runs in (
            ("one document", "varlen", (tokens,), None, True),
            ("one document, flash", "varlen", (tokens,), SDPBackend.FLASH_ATTENTION, True),
            ("one document, cuDNN", "varlen", (tokens,), SDPBackend.CUDNN_ATTENTION, gpu),
            ("two documents, varlen", "varlen", (tokens // 2,) * 2, None, gpu),
            ("short documents, varlen", "varlen", short, None, gpu),
            ("short documents, sdpa", "sdpa", short, None, True)):
        found[name] = tried(partial(measure, backend, doc_lens, kernel), runs)
        print(f"  {name}: {found[name]}", flush=True)
    return found


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference of two tensors, each in shares of the wanted one's norm."""
    return max(float((x.double() - y.double()).norm() / y.double().norm())
               for x, y in zip(found, wanted, strict=True))


def check(config: GpuConfig, parallel: Parallel, job: str) -> dict[str, Any]:
    """Attention backends, memory levers, compiled blocks and waits: each with its limit."""
    device, gpu, found = parallel.device, parallel.device.type == "cuda", {}

    def row(name: str, limit: float, measure: Callable[[], float], runs: bool) -> None:
        error = tried(measure, runs)
        ok = not runs or (isinstance(error, float) and error <= limit)
        found[name] = {"error": error, "limit": limit, "ok": ok}
        print(f"  {name}: {error}, {'ok' if ok else 'WRONG'}", flush=True)

    heads, limit = draw_heads(config, device, 1024), 1e-2 if gpu else 1e-5
    for backend, lens in (("varlen", SEVERAL), ("varlen", ONE), ("sdpa", SEVERAL), ("sdpa", ONE)):
        row(f"{backend}, documents: {len(lens)}", limit, partial(
            lambda *case: apart(attend(heads, *case), attend(heads, "reference", case[1])),
            backend, lens), gpu or backend == "sdpa" or lens == ONE)

    shape = preset_config("tiny" if config.tiny else "llama3.2-1b", 295)
    model, optimizer = sharded(replace(shape, n_layers=2), parallel, MemoryOptions())
    batches = [[train.data.make_batch([sequence(lens)])] for lens in (SEVERAL, ONE, SEVERAL[::-1])]

    def gradients(*options: Any) -> list[Tensor]:
        model.set_memory_options(MemoryOptions(*options))
        ids, labels = (x.to(device) for x in batches[0][0].shard(0, 1))
        loss, valid = model.loss(ids, labels, SEVERAL, parallel)
        (loss / valid).backward()
        found = [loss.detach(), *(weight.grad.to_local() for weight in model.parameters())]
        optimizer.zero_grad()
        return found

    none, limit = gradients(0), 3e-2 if gpu else 1e-5
    for options in ((0, "keep"), (0, "attention"), (0, "recompute"), (0, "offload"),
                    (0, "keep", 100), (100, "keep"), (100, "attention", 100)):
        row(str(MemoryOptions(*options)), limit, partial(
            lambda *options: apart(gradients(*options), none), *options),
            gpu or "offload" not in options)
    if gpu:
        model.compile_blocks()
    row("compiled blocks", limit, lambda: apart(gradients(0), none), gpu)
    steps = [partial(train.train_step, model, optimizer, batch, 1e-5, parallel)
             for batch in batches]
    row("waits inside a step", 0, partial(waits, steps), gpu)
    return found


def waits(steps: list[Callable[[], Any]]) -> float:
    """0 if the last step waits only where it reads the loss. Raises where it waits elsewhere."""
    mode, read = torch.cuda.set_sync_debug_mode, Tensor.tolist

    def reading(x: Tensor) -> Any:
        mode("default" if x.dtype == torch.float64 else "error")
        numbers = read(x)
        mode("error")
        return numbers

    for step in steps[:-1]:
        step()
    with patch.object(Tensor, "tolist", reading):
        try:
            mode("error")
            steps[-1]()
        finally:
            mode("default")
    return 0.0


JOBS = {"check": check, "attention": attention,
        "3b-64k": training, "3b-short": training, "1b-512k": training}


def main() -> None:
    config = parse_cli(GpuConfig, __doc__)
    jobs = {name: choose("job", name, JOBS) for name in config.jobs.split(",")}
    if config.activations != "auto":
        MemoryOptions(activations=config.activations)  # raises ValueError if it is unknown
    if not (config.tiny or torch.cuda.is_available()):
        raise ValueError("no CUDA GPU here; --tiny runs the same jobs on a toy")
    out = Path(config.out or ROOT / ("runs" if config.tiny else "docs/figures") / "gpu.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    parallel = llama.init_parallel()
    result = {**begin_json(parallel.device), "tiny": config.tiny, "jobs": {}}
    for name, job in jobs.items():
        print(name, flush=True)
        free()  # the model of the job before
        row = result["jobs"][name] = tried(partial(job, config, parallel, name))
        write_json(out, result)
        print(f"{name}: {row}", flush=True)
    dist.destroy_process_group()
    raise SystemExit('"failed: ' in (text := str(result)) or "'ok': False" in text)


if __name__ == "__main__":
    run_main(main)
