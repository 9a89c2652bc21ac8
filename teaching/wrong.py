"""Wrong answers: mistakes that public code made, each with the words that its failure shows.

The grader uses them to name a mistake (grade.py), and the tests to grade the grader. They are no
place to look for an answer: each is only nearly one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import model as llama
from model import IGNORE_INDEX
from teaching import reference
from teaching.reference import Shift


@dataclass(frozen=True)
class Wrong:
    """A wrong answer to one function of an exercise."""

    exercise: str
    function: str
    says: str  # after "it looks as if"
    answer: Callable[..., Any]


WRONG: list[Wrong] = []


def wrong(exercise: str, function: str, says: str) -> Callable[[Any], Any]:
    """Add the function below to the list."""
    def add(answer: Any) -> Any:
        WRONG.append(Wrong(exercise, function, says, answer))
        return answer
    return add


# --- 01: layout -------------------------------------------------------------------------


@wrong("01", "layout", "positions run on over documents")
def positions_run_on(input_ids: Tensor, doc_lens: Any, loss_mask: Any) -> Any:
    _, labels, ends = reference.layout(input_ids, doc_lens, loss_mask)
    return torch.arange(len(input_ids)), labels, ends


@wrong("01", "layout", "a document's last token is asked for the next document's first")
def labels_cross(input_ids: Tensor, doc_lens: Any, loss_mask: Any) -> Any:
    positions, _, ends = reference.layout(input_ids, doc_lens, loss_mask)
    return positions, reference.layout(input_ids, (len(input_ids),), loss_mask)[1], ends


@wrong("01", "layout", "the loss mask is laid on the token that asks, not on its target")
def mask_not_shifted(input_ids: Tensor, doc_lens: Any, loss_mask: Any) -> Any:
    positions, labels, ends = reference.layout(input_ids, doc_lens, None)
    if loss_mask is not None:
        labels = labels.masked_fill(~loss_mask, IGNORE_INDEX)
    return positions, labels, ends


@wrong("01", "layout", "labels are not shifted: each token is asked for itself")
def labels_not_shifted(input_ids: Tensor, doc_lens: Any, loss_mask: Any) -> Any:
    positions, _, ends = reference.layout(input_ids, doc_lens, loss_mask)
    labels = input_ids if loss_mask is None else input_ids.masked_fill(~loss_mask, IGNORE_INDEX)
    return positions, labels, ends


@wrong("01", "layout", "cu_seqlens lacks its leading 0")
def ends_without_zero(input_ids: Tensor, doc_lens: Any, loss_mask: Any) -> Any:
    positions, labels, ends = reference.layout(input_ids, doc_lens, loss_mask)
    return positions, labels, ends[1:]


@wrong("01", "share", "labels are shifted after the cut, so a share's last token loses its target")
def shifted_after_the_cut(input_ids: Tensor, doc_lens: Any, rank: int, ranks: int) -> Any:
    ids, labels, positions = reference.share(input_ids, doc_lens, rank, ranks)
    return ids, torch.cat([labels[:-1], torch.tensor([IGNORE_INDEX])]), positions


@wrong("01", "share", "positions begin at 0 in every share")
def positions_of_the_share(input_ids: Tensor, doc_lens: Any, rank: int, ranks: int) -> Any:
    ids, labels, positions = reference.share(input_ids, doc_lens, rank, ranks)
    return ids, labels, torch.arange(len(positions))


# --- 02: the mask -----------------------------------------------------------------------


@wrong("02", "document_mask", "the mask is causal, but documents see those before them")
def causal_only(cu_seqlens: Tensor) -> Tensor:
    return torch.ones(int(cu_seqlens[-1]), int(cu_seqlens[-1])).tril()


@wrong("02", "document_mask", "tokens see what comes after them in their document")
def not_causal(cu_seqlens: Tensor) -> Tensor:
    mask = reference.document_mask(cu_seqlens)
    return mask | mask.T


@wrong("02", "document_mask", "a token does not see itself, so a document's first one sees nothing")
def not_itself(cu_seqlens: Tensor) -> Tensor:
    return reference.document_mask(cu_seqlens).tril(-1)


@wrong("02", "document_mask", "a document's first token still belongs to the document before")
def border_one_late(cu_seqlens: Tensor) -> Tensor:
    later = cu_seqlens.clone()
    later[1:-1] += 1
    return reference.document_mask(later.clamp(max=int(cu_seqlens[-1])))


# --- 03: RoPE ---------------------------------------------------------------------------


@wrong("03", "ntk_theta", "theta grows in proportion to the length, without the exponent d/(d-2)")
def theta_in_proportion(theta: float, from_len: float, to_len: float, head_dim: int) -> float:
    return theta * max(1, to_len / from_len)


@wrong("03", "ntk_theta", "a shorter context makes theta smaller")
def theta_shrinks(theta: float, from_len: float, to_len: float, head_dim: int) -> float:
    return theta * (to_len / from_len) ** (head_dim / (head_dim - 2))


@wrong("03", "rope", "neighbours (2i, 2i + 1) are pairs; in Llama's weights i and i + D/2 are")
def neighbours_are_pairs(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    D = x.shape[-1]
    order = torch.cat([torch.arange(0, D, 2), torch.arange(1, D, 2)])
    return reference.rope(x[..., order], positions, theta)[..., order.argsort()]


@wrong("03", "rope", "angles are computed in x's own dtype: bfloat16 rounds far positions")
def angles_in_bfloat16(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    exponents = torch.arange(0, x.shape[-1], 2, dtype=torch.float64) / x.shape[-1]  # (D/2,)
    angles = positions.to(x.dtype)[:, None, None] * (theta ** -exponents).to(x.dtype)
    return llama.apply_rope(x, angles.cos(), angles.sin())


@wrong("03", "rope", "the pairs turn backwards")
def backwards(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    return reference.rope(x, -positions, theta)


# --- 04: packing ------------------------------------------------------------------------

Documents = list[list[int]]


@wrong("04", "pack_long", "only the first piece of each document is kept")
def first_piece_only(documents: Documents, seq_len: int) -> Any:
    return reference.pack_long([document[:seq_len] for document in documents], seq_len)


@wrong("04", "pack_long", "the rest of a long document is laid before the next one")
def rest_is_kept(documents: Documents, seq_len: int) -> Any:
    return reference.pack_short([d for d in documents if len(d) >= seq_len], seq_len)


@wrong("04", "pack_long", "the rest of a long document becomes a sequence of its own")
def rest_is_a_sequence(documents: Documents, seq_len: int) -> Any:
    pieces = [d[i:i + seq_len] for d in documents if len(d) >= seq_len
              for i in range(0, len(d), seq_len)]
    return [(piece, (len(piece),)) for piece in pieces]


@wrong("04", "pack_long", "all documents are laid end to end, and then cut")
def one_stream(documents: Documents, seq_len: int) -> Any:
    return [(ids, (seq_len,)) for ids, _ in reference.pack_short(documents, seq_len)]


@wrong("04", "pack_long", "a document that is exactly as long as a sequence is dropped")
def exact_fit_is_dropped(documents: Documents, seq_len: int) -> Any:
    return reference.pack_long([d for d in documents if len(d) > seq_len], seq_len)


@wrong("04", "pack_short", "the tail of a cut document is dropped")
def tail_is_dropped(documents: Documents, seq_len: int) -> Any:
    ids: list[int] = []
    for document in documents:
        ids += document[:seq_len - len(ids) % seq_len]
    return _cut(ids, seq_len)


@wrong("04", "pack_short", "a carried tail loses its first token, as if that were a BOS")
def tail_loses_a_token(documents: Documents, seq_len: int) -> Any:
    ids: list[int] = []
    for document in documents:
        while document:
            piece = document[:seq_len - len(ids) % seq_len]
            ids += piece
            document = document[len(piece) + 1:]
    return _cut(ids, seq_len)


@wrong("04", "pack_short", "doc_lens are counted from BOS to BOS, and a carried tail has none")
def lens_from_bos(documents: Documents, seq_len: int) -> Any:
    sequences = []
    for ids, _ in reference.pack_short(documents, seq_len):
        begins = [i for i, token in enumerate(ids) if token % 100 == 0]
        ends = [*begins[1:], seq_len]
        sequences.append((ids, tuple(b - a for a, b in zip(begins, ends, strict=True))
                          if begins else (seq_len,)))
    return sequences


@wrong("04", "pack_short", "a sequence counts as one document")
def one_document(documents: Documents, seq_len: int) -> Any:
    return [(ids, (seq_len,)) for ids, _ in reference.pack_short(documents, seq_len)]


def _cut(ids: list[int], seq_len: int) -> Any:
    """Whole sequences of `ids`; a document ends where its tokens do not count on."""
    sequences = []
    for begin in range(0, len(ids) - seq_len + 1, seq_len):
        part, lens = ids[begin:begin + seq_len], [1]
        for before, token in pairwise(part):
            if token == before + 1:
                lens[-1] += 1
            else:
                lens.append(1)
        sequences.append((part, tuple(lens)))
    return sequences


# --- 05: the mixture --------------------------------------------------------------------


@wrong("05", "next_domains", "domains are drawn at random, so that shares hold only on average")
def at_random(shares: dict[str, float], drawn: dict[str, int], n: int) -> list[str]:
    return random.Random(0).choices(list(shares), list(shares.values()), k=n)


@wrong("05", "next_domains", "the order begins anew, whatever was drawn before")
def begins_anew(shares: dict[str, float], drawn: dict[str, int], n: int) -> list[str]:
    return reference.next_domains(shares, dict.fromkeys(shares, 0), n)


@wrong("05", "next_domains", "domains take turns, and shares do not count")
def in_turns(shares: dict[str, float], drawn: dict[str, int], n: int) -> list[str]:
    begun = sum(drawn.values())
    return [list(shares)[(begun + i) % len(shares)] for i in range(n)]


# --- 06: the loss -----------------------------------------------------------------------


@wrong("06", "chunked_loss", "a chunk's mean is multiplied by its labels: without any, NaN * 0")
def nan_times_zero(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
    def part(h: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(h @ weight.T, target) * (target != IGNORE_INDEX).sum()
    return _sum_of_chunks(part, hidden, labels, chunk_tokens)


@wrong("06", "chunked_loss", "all logits are computed first, and then cut into chunks")
def all_logits_first(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
    logits = hidden @ weight.T  # (T, V)
    losses = [F.cross_entropy(part, target, reduction="sum") for part, target in
              zip(logits.split(chunk_tokens), labels.split(chunk_tokens), strict=True)]
    return torch.stack(losses).sum()


@wrong("06", "chunked_loss", "logits are computed outside of what is checkpointed, and so are kept")
def logits_outside(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
    def part(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, reduction="sum")
    parts = zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
    return torch.stack([llama.recomputed(part, h @ weight.T, target) for h, target in parts]).sum()


@wrong("06", "chunked_loss", "every chunk's logits are kept for backward, and so all of them")
def chunks_are_kept(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
    parts = zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
    return torch.stack([llama.cross_entropy(h, weight, target).sum() for h, target in parts]).sum()


@wrong("06", "chunked_loss", "the last tokens, which do not fill a chunk, are left out")
def last_chunk_is_lost(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
    n = len(labels) // chunk_tokens * chunk_tokens
    return reference.chunked_loss(hidden[:n], weight, labels[:n], chunk_tokens)


@wrong("06", "chunked_loss", "the chunks' means are added, so that labels count unequally")
def means_are_added(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
    def part(h: Tensor, target: Tensor) -> Tensor:
        n = (target != IGNORE_INDEX).sum().clamp(min=1)
        return llama.cross_entropy(h, weight, target).sum() / n
    return _sum_of_chunks(part, hidden, labels, chunk_tokens)


def _sum_of_chunks(part: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, labels: Tensor,
                   chunk_tokens: int) -> Tensor:
    parts = zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
    return torch.stack([llama.recomputed(part, *each) for each in parts]).sum()


# --- 07: Ulysses ------------------------------------------------------------------------

Group = dist.ProcessGroup


@wrong("07", "exchange", "autograd does not know the exchange, so no gradient comes back")
def exchange_without_gradient(x: Tensor, group: Group) -> Tensor:
    sent = x.detach().contiguous()
    out = torch.empty_like(sent)
    dist.all_to_all_single(out, sent, group=group)
    return out


class Strided(torch.autograd.Function):
    """An exchange into a tensor with the strides of x, which gloo fills as if it were flat."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, out = group, torch.empty_like(x)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return llama.Exchange.apply(grad, ctx.group), None


@wrong("07", "exchange", "empty_like(x) keeps the strides of x, which is not contiguous")
def exchange_keeps_strides(x: Tensor, group: Group) -> Tensor:
    return Strided.apply(x, group)


class Averaged(torch.autograd.Function):
    """An exchange whose backward divides by the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return llama.Exchange.apply(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return llama.Exchange.apply(grad, ctx.group) / dist.get_world_size(ctx.group), None


@wrong("07", "exchange", "gradients are averaged over the ranks")
def exchange_averages(x: Tensor, group: Group) -> Tensor:
    return Averaged.apply(x, group)


@wrong("07", "ulysses_attention", "K and V are expanded to all heads before the exchange")
def expanded_first(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                   group: Group) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return llama.ulysses_attention(q, k, v, cu_seqlens, max_seqlen, group)


@wrong("07", "ulysses_attention", "a rank attends to its own tokens alone: nothing is exchanged")
def own_tokens_alone(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                     group: Group) -> Tensor:
    T, rank = len(q), dist.get_rank(group)
    inside = (cu_seqlens - rank * T).clamp(0, T)  # the ends in my share, and its borders
    ends = torch.cat([inside, inside.new_tensor([0, T])]).unique()
    return llama.document_attention(q, k, v, ends, max_seqlen)


@wrong("07", "ulysses_attention", "the mask of documents is lost: all S tokens are one document")
def one_long_document(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                      group: Group) -> Tensor:
    ends = cu_seqlens[[0, -1]]
    return llama.ulysses_attention(q, k, v, ends, int(ends[-1]), group)


@wrong("07", "ulysses_attention", "repeated KV heads come as 0 1 0 1, queries need 0 0 1 1")
def heads_in_turns(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                   group: Group) -> Tensor:
    copies = max(1, dist.get_world_size(group) // k.shape[1])
    k, v = k.repeat(1, copies, 1), v.repeat(1, copies, 1)  # (T, H_kv * copies, D)
    return llama.ulysses_attention(q, k, v, cu_seqlens, max_seqlen, group)


@wrong("07", "ulysses_attention", "the way back mixes heads and ranks: (T, H/P, P) for (T, P, H/P)")
def heads_mixed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                group: Group) -> Tensor:
    out = llama.ulysses_attention(q, k, v, cu_seqlens, max_seqlen, group)  # (T, H, D)
    P = dist.get_world_size(group)
    return out.unflatten(1, (P, -1)).transpose(1, 2).flatten(1, 2)  # (T, H, D), heads permuted


def _ulysses(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, group: Group,
             there: bool, back: bool) -> Tensor:
    """Right, but for a transpose that is left out on the way there or on the way back."""
    P = dist.get_world_size(group)
    copies = max(1, P // k.shape[1])
    k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)
    qkv = []
    for x in (q, k, v):
        x = x.unflatten(1, (P, -1))  # (T, H, D) -> (T, P, H/P, D)
        x = x.transpose(0, 1) if there else x.reshape(P, len(x), *x.shape[2:])
        qkv.append(llama.Exchange.apply(x.contiguous(), group).flatten(0, 1))  # (S, H/P, D)
    out = llama.document_attention(*qkv, cu_seqlens, max_seqlen)
    out = llama.Exchange.apply(out.unflatten(0, (P, -1)).contiguous(), group)  # (P, T, H/P, D)
    out = out.transpose(0, 1) if back else out
    return out.reshape(q.shape)


@wrong("07", "ulysses_attention", "on the way there (T, P, H/P, D) is read as (P, T, H/P, D)")
def no_transpose_there(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                       group: Group) -> Tensor:
    return _ulysses(q, k, v, cu_seqlens, max_seqlen, group, False, True)


@wrong("07", "ulysses_attention", "on the way back (P, T, H/P, D) is read as (T, P, H/P, D)")
def no_transpose_back(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                      group: Group) -> Tensor:
    return _ulysses(q, k, v, cu_seqlens, max_seqlen, group, True, False)


# --- 08: no exchange --------------------------------------------------------------------


@wrong("08", "needs_exchange", "no document longer than a share is taken for no document on two")
def longest_document(doc_lens: Any, ranks: int) -> bool:
    return max(doc_lens) > sum(doc_lens) // ranks


@wrong("08", "needs_exchange", "the exchange is always made")
def always(doc_lens: Any, ranks: int) -> bool:
    return ranks > 1


@wrong("08", "needs_exchange", "only the first border between ranks is looked at")
def first_border(doc_lens: Any, ranks: int) -> bool:
    return ranks > 1 and sum(doc_lens) // ranks not in set(accumulate(doc_lens))


@wrong("08", "needs_exchange", "at least as many documents as ranks is taken for enough")
def enough_documents(doc_lens: Any, ranks: int) -> bool:
    return len(doc_lens) < ranks


# --- 09: the exact step -----------------------------------------------------------------


def _step(loss_of: Any, batches: Any, parallel: Any, divisor_of: Callable[[Tensor], Any],
          skip_empty: bool = False) -> float:
    total = 0.0
    for batch in batches:
        loss = loss_of(batch.input_ids, batch.labels).sum() / divisor_of(batch.labels)
        if not skip_empty or (batch.labels != IGNORE_INDEX).any():
            loss.backward()
        total += loss.detach()
    return float(parallel.all_sum(total))


def _trained(labels: Tensor) -> Tensor:
    return (labels != IGNORE_INDEX).sum()


def _of_step(batches: Any, parallel: Any) -> Tensor:
    return parallel.all_sum(sum(_trained(batch.labels) for batch in batches)).clamp(min=1)


@wrong("09", "train_on_step", "the loss is a mean of micro-batch means")
def mean_of_means(loss_of: Any, batches: Any, parallel: Any) -> float:
    n = len(batches) * parallel.dp_size
    return _step(loss_of, batches, parallel, lambda labels: n * _trained(labels).clamp(min=1))


@wrong("09", "train_on_step", "the ranks' means are averaged, each over its own tokens")
def mean_over_ranks(loss_of: Any, batches: Any, parallel: Any) -> float:
    mine = sum(_trained(batch.labels) for batch in batches)
    return _step(loss_of, batches, parallel, lambda labels: parallel.dp_size * mine.clamp(min=1))


@wrong("09", "train_on_step", "tokens without a label are counted too")
def all_tokens_count(loss_of: Any, batches: Any, parallel: Any) -> float:
    n = parallel.all_sum(sum(len(batch.labels) for batch in batches))
    return _step(loss_of, batches, parallel, lambda labels: n)


@wrong("09", "train_on_step", "without a trained token in the step, 0 is divided by 0")
def nothing_trained(loss_of: Any, batches: Any, parallel: Any) -> float:
    n = parallel.all_sum(sum(_trained(batch.labels) for batch in batches))
    return _step(loss_of, batches, parallel, lambda labels: n)


@wrong("09", "train_on_step", "a micro-batch without labels skips backward, and others wait for it")
def skips_backward(loss_of: Any, batches: Any, parallel: Any) -> float:
    n = _of_step(batches, parallel)
    return _step(loss_of, batches, parallel, lambda labels: n, skip_empty=True)


@wrong("09", "train_on_step", "without a trained token in the step, no rank runs backward")
def returns_early(loss_of: Any, batches: Any, parallel: Any) -> float:
    n = parallel.all_sum(sum(_trained(batch.labels) for batch in batches))
    return _step(loss_of, batches, parallel, lambda labels: n) if n else 0.0


@wrong("09", "train_on_step", "gradients are averaged over ranks where they must be summed")
def averaged_gradients(loss_of: Any, batches: Any, parallel: Any) -> float:
    n = _of_step(batches, parallel) * parallel.dp_size
    return _step(loss_of, batches, parallel, lambda labels: n) * parallel.dp_size


@wrong("09", "train_on_step", "every rank returns the loss of its own tokens")
def own_loss(loss_of: Any, batches: Any, parallel: Any) -> float:
    n = _of_step(batches, parallel)
    mine = sum(loss_of(batch.input_ids, batch.labels).sum().detach() for batch in batches)
    _step(loss_of, batches, parallel, lambda labels: n)
    return float(mine / max(1, sum(_trained(batch.labels) for batch in batches)))


# --- 10: sorting ------------------------------------------------------------------------

Dealt = list[list[list[int]]]


def _deal(order: list[int], dp_size: int, per_batch: int) -> Dealt:
    parts = [order[i:i + per_batch] for i in range(0, len(order), per_batch)]
    return [parts[i:i + dp_size] for i in range(0, len(parts), dp_size)]


@wrong("10", "arrange", "nothing is sorted")
def unsorted(doc_lens: Any, dp_size: int, per_batch: int) -> Dealt:
    return _deal(list(range(len(doc_lens))), dp_size, per_batch)


@wrong("10", "arrange", "sequences are sorted by their length, which is the same for all")
def by_length(doc_lens: Any, dp_size: int, per_batch: int) -> Dealt:
    order = sorted(range(len(doc_lens)), key=lambda i: -sum(doc_lens[i]))
    return _deal(order[::-1], dp_size, per_batch)


@wrong("10", "arrange", "sequences are sorted by how many documents they have")
def by_documents(doc_lens: Any, dp_size: int, per_batch: int) -> Dealt:
    order = sorted(range(len(doc_lens)), key=lambda i: len(doc_lens[i]))
    return _deal(order, dp_size, per_batch)


@wrong("10", "arrange", "a rank gets neighbours in the order, and ranks side by side do not")
def rank_by_rank(doc_lens: Any, dp_size: int, per_batch: int) -> Dealt:
    order = sorted(range(len(doc_lens)), key=lambda i: sum(n * n for n in doc_lens[i]))
    micro = len(order) // (dp_size * per_batch)
    dealt = _deal(order, micro, per_batch)  # [rank][micro-step]
    return [[dealt[rank][step] for rank in range(dp_size)] for step in range(micro)]


# --- 11: memory -------------------------------------------------------------------------


@wrong("11", "count_weights", "an embedding that is the head too is counted twice")
def tied_counted_twice(shape: Any) -> int:
    return reference.count_weights(replace(shape, tie_embeddings=False))


@wrong("11", "count_weights", "keys and values are as wide as queries")
def as_many_kv_heads(shape: Any) -> int:
    return reference.count_weights(replace(shape, n_kv_heads=shape.n_heads))


@wrong("11", "rank_memory", "Adam has one moment where it has two")
def one_moment(shape: Any, tokens: int, ranks: int) -> dict[str, int]:
    right = reference.rank_memory(shape, tokens, ranks)
    return right | {"state": right["state"] * 3 // 4}


@wrong("11", "rank_memory", "every rank holds all weights, gradients and moments")
def not_sharded(shape: Any, tokens: int, ranks: int) -> dict[str, int]:
    return reference.rank_memory(shape, tokens, 1)


@wrong("11", "rank_memory", "what is kept is counted for the whole sequence, not for one rank")
def whole_sequence(shape: Any, tokens: int, ranks: int) -> dict[str, int]:
    return reference.rank_memory(shape, tokens * ranks, ranks)


# --- 12 and 13: a ring, a window --------------------------------------------------------


@wrong("12", "ring_attention", "the parts' outputs are averaged, each with a softmax of its own")
def averaged_parts(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                   group: Group) -> Tensor:
    P, rank, (T, H, D) = dist.get_world_size(group), dist.get_rank(group), q.shape
    outputs = []
    place = torch.arange(len(q))
    for step in range(P):
        mine, theirs = rank * T + place, (rank - step) % P * T + place
        document = [torch.bucketize(x, cu_seqlens[1:], right=True) for x in (mine, theirs)]
        allowed = (document[0][:, None] == document[1]) & (mine[:, None] >= theirs)  # (T, T)
        keys, values = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))  # (T, H, D)
        scores = torch.einsum("qhd,khd->hqk", q, keys) / math.sqrt(D)  # (H, T, T)
        weights = scores.masked_fill(~allowed, -1e9).softmax(dim=-1) * allowed
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))  # (T, H, D)
        k, v = Shift.apply(torch.stack([k, v]), group)  # (2, T, H_kv, D)
    return torch.stack(outputs).sum(dim=0) / P


@wrong("12", "ring_attention", "all keys and values are gathered first, so that nothing is saved")
def gathered_keys(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                  group: Group) -> Tensor:
    P, rank, T = dist.get_world_size(group), dist.get_rank(group), len(q)
    shares, kv = [], torch.stack([k, v])  # (2, T, H_kv, D)
    for step in range(P):
        shares.append(((rank - step) % P, kv))
        kv = Shift.apply(kv, group)
    k, v = torch.cat([kv for _, kv in sorted(shares, key=lambda pair: pair[0])], dim=1)  # (S, ., D)
    padding = q.new_zeros(len(k), *q.shape[1:])  # (S, H, D)
    whole = torch.cat([padding[:rank * T], q, padding[(rank + 1) * T:]])  # (S, H, D)
    return llama.attention_reference(whole, k, v, cu_seqlens, max_seqlen)[rank * T:(rank + 1) * T]


@wrong("12", "ring_attention", "keys and values travel detached, so they get no gradient")
def ring_without_gradient(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                          group: Group) -> Tensor:
    return reference.ring_attention(q, k.detach(), v.detach(), cu_seqlens, max_seqlen, group)


@wrong("13", "window_attention", "the window holds one token more: itself, and `window` before it")
def one_more(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int) -> Tensor:
    return reference.window_attention(q, k, v, cu_seqlens, window + 1)


@wrong("13", "window_attention", "the window looks over the document's begin")
def over_the_begin(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int) -> Tensor:
    return reference.window_attention(q, k, v, cu_seqlens[[0, -1]], window)


@wrong("13", "window_attention", "documents are cut into blocks of `window`, which do not slide")
def blocks(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int) -> Tensor:
    ends = {i for a, b in pairwise(cu_seqlens.tolist())
            for i in (*range(a, b, window), b)}
    return llama.attention_reference(q, k, v, torch.tensor(sorted(ends)), window)
