"""Adapters for nanolong: its own training step, on one rank, and with two that share each pack.

    python teaching/conformance/check.py --adapter teaching/conformance/ours.py
    python teaching/conformance/check.py --adapter teaching/conformance/ours.py:over_two_ranks
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import model as llama
import train
from data import PackedSequence, make_batch
from model import MemoryOptions, ModelConfig, Parallel, Transformer
from teaching.conformance.packs import Pack, Weights, load_packs, load_weights


class Catcher:
    """Stands in for the optimizer of train_step: keeps the gradients, changes nothing."""

    param_groups = ()

    def __init__(self, model: Transformer) -> None:
        self.model, self.gradients = model, dict[str, Tensor]()

    def step(self) -> None:
        for name, weight in self.model.named_parameters():
            theirs = name if name.startswith("lm_head") else f"model.{name}"
            self.gradients[theirs] = cast(Any, weight.grad).full_tensor()

    def zero_grad(self) -> None:
        self.model.zero_grad()


def make_model(weights: Weights) -> Transformer:
    """A Transformer in float64 with the pack's weights."""
    c = weights.config
    config = ModelConfig(
        c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"],
        c["num_key_value_heads"], c["head_dim"], c["intermediate_size"],
        c["max_position_embeddings"], c["rope_theta"], norm_eps=c["rms_norm_eps"])
    model = Transformer(config).to(torch.float64)
    model.load_state_dict({name.removeprefix("model."): t for name, t in weights.tensors.items()})
    return model


def step(weights: Weights, pack: Pack, parallel: Parallel) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of train.py's step; the pack's chunks are the loss's."""
    model = train.shard_model(make_model(weights), parallel, torch.float64)
    model.set_memory_options(MemoryOptions(loss_chunk_tokens=pack.chunk_tokens))
    catcher = Catcher(model)
    batches = [make_batch([PackedSequence(ids.numpy(), tuple(doc_lens), mask.numpy())])
               for ids, mask, doc_lens in zip(pack.input_ids, pack.loss_mask, pack.doc_lens,
                                              strict=True)]
    result = train.train_step(model, cast(Optimizer, catcher), batches, 0.0, parallel, math.inf)
    return result.loss, catcher.gradients


def run(weights: dict[str, Weights],
        packs: list[Pack]) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
    """All packs on one rank."""
    parallel = llama.init_parallel()
    steps = {pack.name: step(weights[pack.weights], pack, parallel) for pack in packs}
    return ({name: loss for name, (loss, _) in steps.items()},
            {name: gradients for name, (_, gradients) in steps.items()})


def over_two_ranks(weights: dict[str, Weights],
                   packs: list[Pack]) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
    """All packs on two gloo ranks, each of which has half of every row."""
    from teaching.conformance import ours  # by the name under which the ranks can import it

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(ours.rank_of_two, ([pack.name for pack in packs], Path(folder)), nprocs=2)
        found = load_file(Path(folder) / "found.safetensors")
    losses = {pack.name: float(found.pop(pack.name)) for pack in packs}
    gradients: dict[str, dict[str, Tensor]] = {name: {} for name in losses}
    for key, gradient in found.items():
        name, _, parameter = key.partition("/")
        gradients[name][parameter] = gradient
    return losses, gradients


def rank_of_two(rank: int, names: list[str], folder: Path) -> None:
    """One rank: it reads the packs for itself; the first writes what came out."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2,
                            timeout=timedelta(minutes=30))
    parallel, weights, found = llama.init_parallel(2), load_weights(), dict[str, Tensor]()
    for pack in load_packs()[0]:
        if pack.name in names:
            loss, gradients = step(weights[pack.weights], pack, parallel)
            found[pack.name] = torch.tensor(loss, dtype=torch.float64)
            found |= {f"{pack.name}/{key}": g.contiguous() for key, g in gradients.items()}
    if rank == 0:
        save_file(found, folder / "found.safetensors")
    dist.barrier()
    dist.destroy_process_group()
