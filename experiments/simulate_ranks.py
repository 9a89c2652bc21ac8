"""One process runs the share of rank 0 in steps of N ranks: what would each of eight GPUs need?

    python experiments/simulate_ranks.py --fake-tensors           Llama-3-8B, 512K over eight ranks
    python experiments/simulate_ranks.py --activations attention --mlp-tile-tokens 8192 --steps 1
    python experiments/simulate_ranks.py --seq-parallel-size 1 --seq 64k --activations \
        recompute,attention                      two cases; each rank its own sequence, as Table 15
    python experiments/simulate_ranks.py --seq 64k --tiny         a toy, without a GPU on the CPU

PyTorch's fake process group says "done" to every collective without sending anything. So one GPU
holds and computes just what rank 0 of N would: its part of weights and optimizer, its tokens, its
heads in attention. Numbers are then meaningless; shapes, memory and time without communication are
real. The JSON is written again after each case.

With --fake-tensors nothing is computed either: tensors have shapes and no memory, operations only
work out shapes, and we add up all live tensors. That runs Llama-3-8B at 512K on a laptop in half a
minute; the plan of `train.py --plan` is checked against it (tests/test_plan.py).
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as llama
from eval import length_or_0
from experiments.gpu import DTYPE, GPU, free, run_jobs, time_steps
from model import MemoryOptions
from support.cli import option, parse_cli, parse_length, run_main
from train import make_optimizer, memory_per_rank, shard_model


@dataclass(frozen=True)
class SimulateConfig:
    model: str = option("llama3-8b", "model preset")
    seq: int = option(524_288, "tokens of a sequence", parse_length)
    documents: int = option(1, "equal documents in it", parse_length)
    world_size: int = option(8, "ranks to simulate", parse_length)
    seq_parallel_size: int = option(0, "ranks that share a sequence; 0: all", length_or_0)
    activations: str = option("recompute", "keep, attention, recompute or offload, or a list")
    loss_chunk_tokens: int = option(2048, "logits at a time; 0: all", length_or_0)
    mlp_tile_tokens: int = option(0, "tokens of a tile of the MLP; 0: no tiles", length_or_0)
    head_chunks: int = option(1, "attend to a rank's heads in so many parts", parse_length)
    layers: int = option(0, "so many layers; 0: all", length_or_0)
    fake_tensors: bool = option(False, "compute nothing, only work out shapes and memory")
    steps: int = option(3, "steps to time (one more warms up)", parse_length)
    tiny: bool = option(False, "the tiny model, and a 64th of the tokens")
    out: str = option("runs/simulate_ranks.json", "JSON")


class OneKernel(torch.autograd.Function):
    """A GPU computes attention, a norm and RoPE in one kernel each (the latter two compiled). With
    fake tensors a CPU would take several steps, and we would count what lives between. Kept for
    backward is what those keep: inputs, a number for each row (log-sum-exp, or scale), and from
    attention its output; RoPE keeps nothing. Attention's backward needs room to work, as
    FlashAttention 2's: a float32 sum for dq, and dk and dv for every query head.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        out = torch.empty_like(inputs[0])  # (T, H, D) from q, k, v; (T, C) from x, weight; or x
        rows = out.new_empty(out.shape[:-1], dtype=torch.float32)  # (T, H) or (T,)
        if len(inputs) > 1:
            ctx.save_for_backward(*inputs, rows, *([out] if len(inputs) == 3 else []))
        ctx.inputs = len(inputs)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors
        if len(saved) == 5:  # attention's: q, k, v, rows, out
            _room = [grad.new_empty(grad.shape, dtype=dtype)
                     for dtype in (torch.float32, grad.dtype, grad.dtype)]
        gradients = tuple(map(torch.empty_like, saved[:ctx.inputs] or [grad]))
        return gradients


def simulate(config: SimulateConfig, **changes: Any) -> dict[str, Any]:
    """Run rank 0's steps; return what they took, and the plan's bytes beside it."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    options = MemoryOptions(config.loss_chunk_tokens, config.activations, config.mlp_tile_tokens,
                            config.head_chunks)
    sp_size, dtype = config.seq_parallel_size or config.world_size, DTYPE
    shape = replace(llama.preset_config(config.model, 295), max_seq_len=config.seq, **changes)
    doc_lens = (config.seq // config.documents,) * config.documents
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.world_size)
    ranks = {"RANK": "0", "WORLD_SIZE": str(config.world_size)}
    with patch.dict(os.environ, ranks), ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        parallel = llama.init_parallel(sp_size)
        device = torch.device("cpu") if config.fake_tensors else parallel.device
        if config.fake_tensors:
            dtype = torch.bfloat16
            llama.BACKENDS["shapes"] = lambda q, k, v, *_: OneKernel.apply(q, k, v)
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(patch.object(
                nn.RMSNorm, "forward", lambda self, x: OneKernel.apply(x, self.weight)))
            stack.enter_context(patch.object(llama, "apply_rope", lambda x, *_: OneKernel.apply(x)))
        with device:
            model = llama.Transformer(shape, "shapes" if config.fake_tensors else "auto")
        model.set_memory_options(options)
        if device.type == "cuda":
            model.compile_blocks()
        shard_model(model, parallel, dtype)
        free()  # the whole weights, of which rank 0 keeps its part
        optimizer = make_optimizer(model, 0.1)
        ids = torch.zeros(config.seq // sp_size, dtype=torch.long, device=device)

        def forward_backward() -> None:
            model.loss(ids, ids, doc_lens, parallel)[0].backward()

        def step() -> None:
            forward_backward()
            optimizer.step()  # the first one makes Adam's moments
            optimizer.zero_grad()

        if config.fake_tensors:
            step()
            moments = [x for state in optimizer.state.values() for x in state.values()]
            tracker = MemTracker()  # of what lives on between steps, and what comes and goes in one
            tracker.track_external(*(x.to_local() for x in (*model.parameters(), *moments)
                                     if isinstance(x, DTensor)))
            with tracker:
                forward_backward()
            peak = tracker.get_tracker_snapshot("peak")[device]["Total"]
            found = {"peak_bytes": peak, "peak_gib": peak / 2**30}
        else:
            found = time_steps(step, 1, config.steps)
            flops = llama.flops_per_step(shape, doc_lens) / sp_size / found["seconds"]
            found |= {"tok_per_s_without_communication": len(ids) / found["seconds"],
                      "mfu": flops / llama.device_peak_flops(device, dtype)}
    plan = memory_per_rank(shape, options, len(ids), config.world_size, dtype.itemsize)
    return {**asdict(config), **found, "plan": plan, "plan_gib": sum(plan.values()) / 2**30}


def main() -> None:
    config = parse_cli(SimulateConfig, __doc__)
    if config.tiny:
        config = replace(config, model="tiny", seq=max(1024, config.seq // 64))
    elif not (config.fake_tensors or GPU):
        raise ValueError("no CUDA GPU here; --fake-tensors counts memory, --tiny runs a toy")
    cases = {way: replace(config, activations=way) for way in config.activations.split(",")}
    for way in cases:
        MemoryOptions(activations=way)  # raises ValueError if it is unknown
    changes = {"n_layers": config.layers} if config.layers else {}
    run_jobs({way: partial(simulate, case, **changes) for way, case in cases.items()},
             Path(config.out), communication="faked")


if __name__ == "__main__":
    run_main(main)
