"""The right answers: those of the five files, in the words of the exercises.

Most functions here only rename what data.py, model.py and train.py have. Two things are not in
them, and stand here: the ring of exercise 12, and the window of exercise 13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import data
import model as llama
import train
from data import Batch, Document, PackedSequence
from model import MemoryOptions, ModelConfig
from support import memory

CPU = torch.device("cpu")
SHAPE = llama.preset_config("tiny", 295)
Packed = tuple[list[int], tuple[int, ...]]  # a sequence's ids, and its doc_lens


# --- 01 to 03: layout, mask, RoPE -------------------------------------------------------


def layout(input_ids: Tensor, doc_lens: Sequence[int],
           loss_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    mask = None if loss_mask is None else loss_mask.numpy()
    batch = data.make_batch([PackedSequence(input_ids.numpy(), tuple(doc_lens), mask)])
    pack = llama.layout_pack(doc_lens, len(input_ids), CPU)
    return pack.positions, batch.labels, pack.cu_seqlens


def share(input_ids: Tensor, doc_lens: Sequence[int], rank: int,
          ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = data.make_batch([PackedSequence(input_ids.numpy(), tuple(doc_lens))])
    ids, labels = batch.shard(rank, ranks)
    parallel: Any = SimpleNamespace(sp_rank=rank, sp_size=ranks, sp_group=None)
    return ids, labels, llama.layout_pack(doc_lens, len(ids), CPU, parallel).positions


def document_mask(cu_seqlens: Tensor) -> Tensor:
    """A query of zeros looks equally at all that it may: we ask attention_reference for that."""
    T = int(cu_seqlens[-1])
    zeros, rows = torch.zeros(T, 1, T), torch.eye(T)[:, None]  # (T, 1, T): row k shows token k
    return llama.attention_reference(zeros, zeros, rows, cu_seqlens, T)[:, 0] > 0


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    config = replace(SHAPE, head_dim=x.shape[-1], rope_theta=theta)
    return llama.apply_rope(x, *llama.rope_cos_sin(config, positions, x.dtype))


# --- 04 and 05: packing and mixing ------------------------------------------------------


def pack_long(documents: list[list[int]], seq_len: int) -> list[Packed]:
    return _plain(data.pack_long(_documents(documents), seq_len))


def pack_short(documents: list[list[int]], seq_len: int) -> list[Packed]:
    return _plain(data.pack_short(_documents(documents), seq_len))


def _documents(documents: list[list[int]]) -> list[Document]:
    return [Document(np.array(ids, np.uint32)) for ids in documents]


def _plain(sequences: Any) -> list[Packed]:
    return [(sequence.input_ids.tolist(), sequence.doc_lens) for sequence in sequences]


def next_domains(shares: dict[str, float], drawn: dict[str, int], n: int) -> list[str]:
    datasets: Any = {name: [name] for name in shares}  # each holds one sequence: its own name
    mixture = data.Mixture(datasets, shares, seed=0)
    mixture.resume({name: drawn[name] for name in mixture.shares})
    names: list[Any] = mixture.draw(n)
    return names


# --- 06, 09, 10, 11: the loss, the step, memory -----------------------------------------


def chunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
    return llama.chunked_cross_entropy(hidden, weight, labels, chunk_tokens).sum()


def train_on_step(loss_of: Callable[[Tensor, Tensor], Tensor], batches: list[Batch],
                  parallel: Any) -> float:
    """train_step with a model that only has a loss, and an optimizer that does nothing."""
    model: Any = SimpleNamespace(
        loss=lambda ids, labels, *_, **options: (loss_of(ids, labels), None),
        parameters=lambda: [])
    optimizer: Any = SimpleNamespace(param_groups=[], step=lambda: None, zero_grad=lambda: None)
    return train.train_step(model, optimizer, batches, 0.0, parallel).loss


def arrange(doc_lens: list[tuple[int, ...]], dp_size: int,
            per_batch: int) -> list[list[list[int]]]:
    sequences = [PackedSequence(np.zeros(sum(lens), np.uint32), lens, source=str(i))
                 for i, lens in enumerate(doc_lens)]
    dealt = data.arrange_step(sequences, dp_size, per_batch)
    return [[[int(s.source) for s in part] for part in ranks] for ranks in dealt]


def count_weights(shape: ModelConfig) -> int:
    block, rest = memory.count_weights(shape)
    return shape.n_layers * block + rest


def rank_memory(shape: ModelConfig, tokens: int, ranks: int) -> dict[str, int]:
    def parts(activations: str, world_size: int) -> list[int]:
        options = MemoryOptions(activations=activations)
        return list(train.memory_per_rank(shape, options, tokens, world_size).values())

    weights_and_moments, gathered, *_ = parts("recompute", ranks)
    endless = 10**15  # over so many ranks gradients are nothing, and what is kept stands alone
    return {"state": weights_and_moments // 3 * 4, "gathered": gathered,
            "inputs": parts("recompute", endless)[2], "everything": parts("keep", endless)[2]}


# --- 12 and 13: what the five files do not have -----------------------------------------


class Shift(torch.autograd.Function):
    """Send x to the next rank of a ring, receive the one before's. Backward goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, step: int = 1) -> Tensor:
        ctx.group, ctx.step = group, step
        P, rank = dist.get_world_size(group), dist.get_rank(group)
        following = dist.get_global_rank(group, (rank + step) % P)
        previous = dist.get_global_rank(group, (rank - step) % P)
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        ops = [dist.P2POp(dist.isend, x, following, group),
               dist.P2POp(dist.irecv, out, previous, group)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return Shift.apply(grad, ctx.group, -ctx.step), None, None


def ring_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                   group: dist.ProcessGroup) -> Tensor:
    """Keys and values go around the ring, and each rank adds the part that it sees.

    q (T, H, D), k and v (T, H_kv, D) -> (T, H, D). For each query we keep the largest score so
    far, the sum of exponentials above it, and the sum of values that these weigh.
    """
    P, rank = dist.get_world_size(group), dist.get_rank(group)
    T, H, D = q.shape
    mine = rank * T + torch.arange(T)  # places in the whole sequence
    top = q.new_full((H, T), -1e30)
    total, out = q.new_zeros(H, T), q.new_zeros(H, T, D)
    for step in range(P):
        theirs = (rank - step) % P * T + torch.arange(T)
        document = [torch.bucketize(x, cu_seqlens[1:], right=True) for x in (mine, theirs)]
        allowed = ((document[0][:, None] == document[1]) & (mine[:, None] >= theirs))  # (T, T)
        keys, values = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))  # (T, H, D)
        scores = torch.einsum("qhd,khd->hqk", q, keys) / math.sqrt(D)  # (H, T, T)
        scores = scores.masked_fill(~allowed, -math.inf)
        new_top = torch.maximum(top, scores.amax(dim=-1).detach())  # (H, T)
        weights, shrink = (scores - new_top[..., None]).exp(), (top - new_top).exp()
        total = total * shrink + weights.sum(dim=-1)
        out = out * shrink[..., None] + torch.einsum("hqk,khd->hqd", weights, values)
        top = new_top
        if step < P - 1:
            k, v = Shift.apply(torch.stack([k, v]), group)  # (2, T, H_kv, D)
    return (out / total[..., None]).transpose(0, 1)  # (H, T, D) -> (T, H, D)


def window_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int) -> Tensor:
    """Each token on its own: what it may see is a document that ends with it."""
    out = []
    for begin, end in pairwise(cu_seqlens.tolist()):
        for i in range(begin, end):
            seen = slice(max(begin, i - window + 1), i + 1)
            n = seen.stop - seen.start
            ends = torch.tensor([0, n])
            out.append(llama.attention_reference(q[seen], k[seen], v[seen], ends, n)[-1])  # (H, D)
    return torch.stack(out)  # (T, H, D)


# --- All of them ------------------------------------------------------------------------

ANSWERS: dict[str, dict[str, Callable[..., Any]]] = {
    "01": {"layout": layout, "share": share},
    "02": {"document_mask": document_mask},
    "03": {"ntk_theta": llama.ntk_rope_theta, "rope": rope},
    "04": {"pack_long": pack_long, "pack_short": pack_short},
    "05": {"next_domains": next_domains},
    "06": {"chunked_loss": chunked_loss},
    "07": {"exchange": llama.Exchange.apply, "ulysses_attention": llama.ulysses_attention},
    "08": {"needs_exchange": llama.crosses_ranks},
    "09": {"train_on_step": train_on_step},
    "10": {"arrange": arrange},
    "11": {"count_weights": count_weights, "rank_memory": rank_memory},
    "12": {"ring_attention": ring_attention},
    "13": {"window_attention": window_attention},
}
