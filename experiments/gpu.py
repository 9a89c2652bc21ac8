"""What one CUDA GPU does: right numbers; tokens/s, MFU and memory of steps; no hidden waits.

    python experiments/gpu.py --jobs check,attention --out checks.json       (not run on a GPU yet)
    python experiments/gpu.py --jobs 3b-64k,3b-short --steps 3 --activations recompute
    python experiments/gpu.py --tiny              the same jobs on a toy, without a GPU on the CPU

check      attention backends against the reference; memory levers and compiled blocks against none;
           a step that waits for the device only where it reads the loss
attention  forward and backward of one layer of Llama-3-8B, by kernel and by kind of documents
3b-64k     steps of llama3.2-3b on one document of 64K tokens; 3b-short: on short documents

The JSON is written again after each job; one that fails leaves its error there. For 3b set
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True. Eight GPUs: experiments/simulate_ranks.py.
"""

from __future__ import annotations

import gc
import json
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
from support.memory import memory_there  # noqa: E402

NOT_RUN = "not run here"  # stands where a number would, if what it takes is missing
GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
SEVERAL, ONE = (5, 700, 1, 318), (1024,)  # the documents of a check


@dataclass(frozen=True)
class GpuConfig:
    jobs: str = option("check,attention,3b-64k,3b-short", "what to run, in this order")
    steps: int = option(3, "steps to time, after two that warm up", parse_length)
    activations: str = option("auto", "as in train.py")
    tiny: bool = option(False, "the tiny model on 1K tokens")
    out: str = option("", "JSON (default: docs/figures/gpu.json, of a toy runs/gpu.json)")


def tried(function: Callable[[], Any], runs: bool = True) -> Any:
    """What the function returns, or why there is nothing; what comes after it runs anyway."""
    try:
        return function() if runs else NOT_RUN
    except Exception as error:
        traceback.print_exc()
        return f"failed: {type(error).__name__}: {error}"


def free() -> None:
    """Give back the memory that nothing refers to any more, and measure the peak anew."""
    gc.collect()
    if GPU:
        torch.cuda.set_sync_debug_mode("default")  # a check that failed has left it at "error"
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run_jobs(jobs: dict[str, Callable[[], Any]], out: Path, **about: Any) -> None:
    """Run one after the other, write the JSON after each. Code 1 if any has failed."""
    result = {"command": " ".join(sys.argv), "torch": torch.__version__, **about,
              "device": torch.cuda.get_device_name() if GPU else "cpu", "jobs": {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, job in jobs.items():
        print(name, flush=True)
        free()  # what the job before has left
        result["jobs"][name] = tried(job)
        write_json(out, result)
        print(json.dumps(result["jobs"][name], indent=1), flush=True)
    raise SystemExit("'failed: " in str(result))


def time_steps(step: Callable[[], Any], warmup: int, steps: int) -> dict[str, Any]:
    """The median step's seconds; the most memory; what was compiled after the warm-up."""
    seconds, compiled = [], []
    for i in range(warmup + steps):
        begin = time.perf_counter()
        step()
        if GPU:
            torch.cuda.synchronize()
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        seconds.append(time.perf_counter() - begin)
        print(f"  {seconds[-1]:.4f} s{' to warm up' * (i < warmup)}", flush=True)
    return {"seconds": statistics.median(seconds[warmup:]), "steps": seconds[warmup:],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if GPU else NOT_RUN,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if GPU else NOT_RUN,
            "compiled_after_warmup": compiled[-1] - compiled[warmup - 1] if GPU else NOT_RUN}


def sharded(shape: Any, parallel: Parallel, options: MemoryOptions) -> tuple[Transformer, Any]:
    """Model and optimizer as train.py has them, the weights drawn on the device."""
    with parallel.device:
        model = Transformer(shape).init_weights(0)
    model.set_memory_options(options)
    train.shard_model(model, parallel, DTYPE)
    return model, train.make_optimizer(model, 0.1)


def training(config: GpuConfig, parallel: Parallel, short: bool) -> dict[str, Any]:
    """Steps of train.py's own `train_step`, with the memory options that it would choose."""
    device, tokens = parallel.device, 1024 if config.tiny else 65_536
    shape = preset_config("tiny" if config.tiny else "llama3.2-3b", 295)
    rng = np.random.default_rng(0)
    packs = [short_documents(rng, tokens) if short else (tokens,) for _ in range(4)]
    options, plan = train.memory_options_for(
        train.TrainConfig(activations=config.activations), shape, tokens, 1, DTYPE.itemsize,
        memory_there(device), device.type)
    model, optimizer = sharded(shape, parallel, options)
    if GPU:
        model.compile_blocks()
    batches = cycle([train.data.make_batch([sequence(lens)])] for lens in packs)
    row = time_steps(lambda: train.train_step(model, optimizer, next(batches), 1e-5, parallel),
                     2, config.steps)
    flops = sum(llama.flops_per_step(shape, lens) for lens in packs) / len(packs) / row["seconds"]
    return {"tokens": tokens, "plan": plan, **row, "tok_per_s": tokens / row["seconds"],
            "mfu": flops / llama.device_peak_flops(device, DTYPE)}


def draw_heads(config: GpuConfig, device: torch.device, tokens: int) -> list[Tensor]:
    """q, k, v of one layer, and the gradient of what attention makes of them."""
    shape = preset_config("tiny" if config.tiny else "llama3-8b", 295)
    draw = {"device": device, "dtype": DTYPE, "requires_grad": True}
    kv = shape.n_kv_heads
    return [torch.randn(tokens, heads, shape.head_dim, **draw)
            for heads in (shape.n_heads, kv, kv, shape.n_heads)]


def attend(heads: list[Tensor], backend: str, doc_lens: Sequence[int]) -> list[Tensor]:
    """One layer's attention: its output, and the gradients of q, k and v."""
    *qkv, grad = heads
    ends = torch.tensor([0, *np.cumsum(doc_lens)], dtype=torch.int32, device=grad.device)
    out = llama.document_attention(*qkv, ends, max(doc_lens), backend)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def attention(config: GpuConfig, parallel: Parallel) -> dict[str, Any]:
    """Seconds, and TFLOP/s as `flops_per_step` counts them, of each kernel that runs here."""
    tokens = 1024 if config.tiny else 65_536
    heads = draw_heads(config, parallel.device, tokens)
    short = short_documents(np.random.default_rng(0), tokens)

    def measure(backend: str, lens: Sequence[int], kernel: Any = None) -> dict[str, Any]:
        with sdpa_kernel(kernel) if kernel else nullcontext():
            seconds = time_steps(lambda: attend(heads, backend, lens), 1, 3)["seconds"]
        flops = 6 * heads[0][0].numel() * sum(n * n for n in lens)
        return {"seconds": seconds, "tflops": flops / seconds / 1e12}

    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    return {"one document": tried(lambda: measure("varlen", (tokens,))),
            "one document, flash": tried(lambda: measure("varlen", (tokens,), flash)),
            "one document, cuDNN": tried(lambda: measure("varlen", (tokens,), cudnn), GPU),
            "short documents, varlen": tried(lambda: measure("varlen", short), GPU),
            "short documents, sdpa": tried(lambda: measure("sdpa", short))}


def check(config: GpuConfig, parallel: Parallel) -> dict[str, Any]:
    """Each check's largest difference, or how it failed."""
    found, limit = {}, 1e-2 if GPU else 1e-5

    def compare(name: str, wanted: list[Tensor], measure: Callable[..., list[Tensor]], *case: Any,
                runs: bool = GPU) -> None:
        """The largest difference of two tensors, each in shares of the wanted one's norm."""
        found[name] = tried(lambda: max(float((x - y).norm() / y.norm()) for x, y in zip(
            measure(*case), wanted, strict=True)), runs)
        if runs and not (isinstance(found[name], float) and found[name] <= limit):
            found[name] = f"failed: {found[name]}, at most {limit}"
        print(f"  {name}: {found[name]}", flush=True)

    heads = draw_heads(config, parallel.device, 1024)
    for backend, lens in (("varlen", SEVERAL), ("varlen", ONE), ("sdpa", SEVERAL), ("sdpa", ONE)):
        compare(f"{backend}, documents: {len(lens)}", attend(heads, "reference", lens), attend,
                heads, backend, lens, runs=GPU or backend == "sdpa" or lens == ONE)
    shape = replace(preset_config("tiny" if config.tiny else "llama3.2-1b", 295), n_layers=2)
    model, optimizer = sharded(shape, parallel, MemoryOptions())
    several, one = ([train.data.make_batch([sequence(lens)])] for lens in (SEVERAL, ONE))

    def gradients(*options: Any) -> list[Tensor]:
        model.set_memory_options(MemoryOptions(*options))
        ids, labels = (x.to(parallel.device) for x in several[0].shard(0, 1))
        loss, valid = model.loss(ids, labels, SEVERAL, parallel)
        (loss / valid).backward()
        found = [loss.detach(), *(weight.grad.to_local() for weight in model.parameters())]
        optimizer.zero_grad()
        return found

    none, limit = gradients(0), 3e-2 if GPU else 1e-5
    for case in ((0, "keep"), (0, "attention"), (0, "recompute"), (0, "offload"), (0, "keep", 100),
                 (100, "keep"), (100, "attention", 100)):
        runs = GPU or "offload" not in case  # which train.py refuses on a CPU
        compare(str(MemoryOptions(*case)), none, gradients, *case, runs=runs)
    if GPU:
        model.compile_blocks()
    compare("compiled blocks", none, gradients, 0)
    step = partial(train.train_step, model, optimizer, lr=1e-5, parallel=parallel)
    found["waits inside a step"] = tried(partial(count_waits, step, (one, one, several)), GPU)
    return found


def count_waits(step: Callable[..., Any], batches: Sequence[Any]) -> int:
    """0 if the last step waits for nothing until it reads the loss; raises where it waits."""
    mode, read = torch.cuda.set_sync_debug_mode, Tensor.tolist

    def reading(x: Tensor) -> Any:
        if x.dtype == torch.float64:  # the losses; to read cu_seqlens would be a wait as well
            mode("default")
        return read(x)

    with patch.object(Tensor, "tolist", reading):
        for batch in batches:
            mode("error" if batch is batches[-1] else "default")
            step(batches=batch)
    return 0


JOBS = {"check": check, "attention": attention, "3b-64k": partial(training, short=False),
        "3b-short": partial(training, short=True)}


def main() -> None:
    config = parse_cli(GpuConfig, __doc__)
    jobs = {name: choose("job", name, JOBS) for name in config.jobs.split(",")}
    if not (config.tiny or GPU):
        raise ValueError("no CUDA GPU here; --tiny runs the same jobs on a toy")
    if config.activations != "auto":
        MemoryOptions(activations=config.activations)  # raises ValueError if it is unknown
    out = Path(config.out or ROOT / ("runs" if config.tiny else "docs/figures") / "gpu.json")
    parallel = llama.init_parallel()
    run_jobs({name: partial(job, config, parallel) for name, job in jobs.items()}, out,
             tiny=config.tiny)


if __name__ == "__main__":
    run_main(main)
