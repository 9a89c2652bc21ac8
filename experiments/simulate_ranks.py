"""One process runs the share of rank 0 in a step of N ranks: what would each of eight GPUs need?

    python experiments/simulate_ranks.py --world-size 8 --model llama3-8b --seq 512k --fake-tensors
    python experiments/simulate_ranks.py --world-size 8 --model llama3-8b --seq 512k   (a CUDA GPU)

PyTorch's fake process group says "done" to every collective without sending anything. So one GPU
holds and computes just what rank 0 of N would: its part of weights and optimizer, its tokens, its
heads in attention. Numbers are then meaningless; shapes, memory and time without communication are
real.

With --fake-tensors nothing is computed either: tensors have shapes and no memory, operations only
work out shapes, and we add up all live tensors. That runs Llama-3-8B at 512K on a laptop in half a
minute; the plan of `train.py --plan` is checked against it (tests/test_plan.py).
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import option, parse_cli, parse_length, run_main
from model import (
    BACKENDS,
    MemoryOptions,
    Transformer,
    flops_per_step,
    init_parallel,
    preset_config,
)
from train import make_optimizer, memory_per_rank, shard_model


@dataclass(frozen=True)
class SimulateConfig:
    model: str = option("llama3-8b", "model preset")
    seq: int = option(524_288, "tokens of the sequence", parse_length)
    documents: int = option(1, "equal documents in it", parse_length)
    world_size: int = option(8, "ranks to simulate; all of them share the sequence", parse_length)
    activations: str = option("recompute", "keep, recompute or offload")
    loss_chunk_tokens: int = option(2048, "logits at a time; 0: all")
    mlp_tile_tokens: int = option(0, "tokens of a tile of the MLP; 0: no tiles")
    fake_tensors: bool = option(False, "compute nothing, only work out shapes and memory")
    steps: int = option(3, "steps to time (one more warms up)", parse_length)


# A GPU computes attention and a norm in one kernel each. With fake tensors a CPU would take several
# steps, and we would count what lives between. These two keep for backward what the kernels do.


class OneKernelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)  # (T, H, D)
        log_sum_exp = q.new_empty(q.shape[:2], dtype=torch.float32)  # (T, H)
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class OneKernelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = x.new_empty(x.shape[:-1], dtype=torch.float32)  # (T,)
        ctx.save_for_backward(x, weight, scale)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def simulate(config: SimulateConfig, **changes: Any) -> dict[str, Any]:
    """Run rank 0's steps; return seconds and peak bytes, and the plan's bytes beside them."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    options = MemoryOptions(config.loss_chunk_tokens, config.activations, config.mlp_tile_tokens)
    shape = replace(preset_config(config.model, 295), max_seq_len=config.seq, **changes)
    doc_lens = (config.seq // config.documents,) * config.documents
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(config.world_size)}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.world_size)
    try:
        parallel = init_parallel(config.world_size)
        device = torch.device("cpu") if config.fake_tensors else parallel.device
        with ExitStack() as stack:
            if config.fake_tensors:
                stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            with device:
                model = Transformer(shape)
            model.set_memory_options(options)
            if config.fake_tensors:
                BACKENDS["shapes"] = lambda q, k, v, *_: OneKernelAttention.apply(q, k, v)
                model.backend = "shapes"
                norm = patch.object(nn.RMSNorm, "forward",
                                    lambda self, x: OneKernelNorm.apply(x, self.weight))
                stack.enter_context(norm)
            model = shard_model(model, parallel, torch.bfloat16)
            optimizer = make_optimizer(model, 0.1)
            ids = torch.zeros(config.seq // config.world_size, dtype=torch.long, device=device)

            def forward_backward() -> None:
                loss, _ = model.loss(ids, ids, doc_lens, parallel)
                loss.backward()

            for _ in range(1 if config.fake_tensors else config.steps):
                forward_backward()
                optimizer.step()  # the first one makes Adam's moments
                optimizer.zero_grad()
            begin = time.perf_counter()
            if device.type == "cpu":  # what lives on between steps, then what comes and goes in one
                tracker = MemTracker()
                moments = [x for state in optimizer.state.values() for x in state.values()]
                tracker.track_external(*(x.to_local() for x in [*model.parameters(), *moments]
                                         if isinstance(x, DTensor)))
                with tracker:
                    forward_backward()
                peak = tracker.get_tracker_snapshot("peak")[device]["Total"]
            else:
                torch.cuda.synchronize()
                begin = time.perf_counter()
                forward_backward()
                optimizer.step()
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated(device)
            seconds = time.perf_counter() - begin
    finally:
        dist.destroy_process_group()
    plan = memory_per_rank(shape, options, config.seq // config.world_size, config.world_size)
    return {**asdict(config), "seconds": seconds, "peak_bytes": peak, "plan": plan,
            "flops": flops_per_step(shape, doc_lens) / config.world_size}


def main() -> None:
    config = parse_cli(SimulateConfig, __doc__)
    found = simulate(config)
    for part, size in found["plan"].items():
        print(f"  {part:<44} {size / 2**30:8.2f} GiB")
    print(f"peak of rank 0 of {config.world_size}: {found['peak_bytes'] / 2**30:.2f} GiB")
    if not config.fake_tensors:
        tokens = config.seq / config.world_size
        print(f"{tokens / found['seconds']:,.0f} tok/s a rank without communication, "
              f"{found['flops'] / found['seconds'] / 1e12:.0f} TFLOP/s")


if __name__ == "__main__":
    run_main(main)
