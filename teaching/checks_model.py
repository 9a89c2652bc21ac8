"""The checks of the model and the step: exercises 03, 06, 07, 09, 11, 12 and 13."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import model as llama
from data import Batch
from model import IGNORE_INDEX, ModelConfig
from teaching import ranks
from teaching.checks_data import ends_of
from teaching.parts import (
    Exercise,
    Function,
    Look,
    Part,
    Raised,
    compare_rows,
    draw_documents,
    each,
    equal,
    packs,
    show,
    side_by_side,
    with_bars,
)

# --- 03: RoPE, and how to stretch it ----------------------------------------------------


def theta_cases() -> list[tuple[float, float, float, int]]:
    rng = random.Random(3)
    by_hand = [(100.0, 10, 20, 4), (1e4, 256, 2048, 16), (5e5, 8192, 65_536, 128),
               (5e5, 8192, 524_288, 128), (5e5, 8192, 4096, 128)]
    return by_hand + [(10 ** rng.uniform(2, 7), rng.randint(100, 9999), rng.randint(100, 99_999),
                       2 * rng.randint(2, 64)) for _ in range(6)]


def draw_theta(case: tuple[float, float, float, int]) -> str:
    theta, from_len, to_len, head_dim = case
    return (f"theta {theta:,.0f}, trained on {from_len:,} tokens, wanted for {to_len:,}, "
            f"head_dim {head_dim}")


Turn = tuple[tuple[int, ...], int, int, float, torch.dtype]  # positions, heads, D, theta, dtype


def rope_cases() -> list[Turn]:
    wide = torch.float64
    return [((0,), 1, 2, 100.0, wide), ((1,), 1, 2, 100.0, wide), ((1,), 1, 4, 100.0, wide),
            ((0, 1, 2, 0), 1, 4, 1e4, wide), ((0, 1, 0, 5), 2, 8, 1.6e5, wide)]


def far_cases() -> list[Turn]:
    half = torch.bfloat16
    return [((15_962,), 1, 2, 1e4, half), ((65_535, 3), 1, 4, 8e6, half),
            ((524_287, 131_071), 2, 8, 1.28e8, half)]


def call_rope(function: Function, case: Turn) -> Tensor:
    positions, heads, head_dim, theta, dtype = case
    x = torch.linspace(1, 2, len(positions) * heads * head_dim)
    x = x.view(len(positions), heads, head_dim).to(dtype)  # (T, H, D)
    return function(x, torch.tensor(positions), theta).double()


def draw_rope(case: Turn) -> str:
    positions, heads, head_dim, theta, dtype = case
    shape = len(positions), heads, head_dim
    return (f"x of shape {shape}, {str(dtype)[6:]}, from 1 up to 2; theta {theta:,.0f}\n"
            f"positions {positions}")


ROPE = Exercise("03", "NTK's theta, and RoPE", (
    Part("theta for a longer context; a shorter one keeps it", "ntk_theta", 3, theta_cases,
         each(lambda function, case: float(function(*case))), draw_theta),
    Part("each pair (i, i + D/2) is turned by position * frequency", "rope", 4, rope_cases,
         each(call_rope), draw_rope),
    Part("far positions keep their angle, whatever the dtype of x", "rope", 3, far_cases,
         each(call_rope), draw_rope,
         accept=lambda case, yours, right: equal(yours, right, 0.05))))

# --- 06: chunked cross-entropy ----------------------------------------------------------

C, V = 3, 64  # few dimensions and a large vocabulary: logits outweigh all else
Chunks = tuple[tuple[int, ...], int]  # which tokens have a label; chunk_tokens


def labelled_cases() -> list[Chunks]:
    return [((1,), 4), ((1, 1), 1), ((1, 0, 1, 1), 2), ((1,) * 7, 3), ((1,) * 6 + (0,) * 3, 4),
            ((1, 0, 1, 1) * 6, 5), ((1,) * 24, 4)]


def hole_cases() -> list[Chunks]:
    return [((0,), 1), ((0, 1), 1), ((1, 1, 0, 0), 2), ((1, 0, 0, 0, 0, 1, 1), 3), ((0,) * 8, 4)]


def long_cases() -> list[Chunks]:
    return [((1,) * 24, 4), ((1,) * 22, 5)]


class WidestLogits(TorchDispatchMode):
    """Sees every operation, and keeps how many rows of logits (., V) the largest result has."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.ndim > 1 and V in x.shape:
                self.rows = max(self.rows, x.numel() // V)
        return out


def run_chunks(function: Function, case: Chunks) -> dict[str, Any]:
    """Loss, gradients, the most rows of logits at once, and how many of them are kept."""
    labelled, chunk_tokens = case
    generator = torch.Generator().manual_seed(len(labelled))
    hidden = torch.randn(len(labelled), C, generator=generator, dtype=torch.float64)  # (T, C)
    weight = torch.randn(V, C, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (len(labelled),), generator=generator)
    labels[~torch.tensor(labelled, dtype=torch.bool)] = IGNORE_INDEX
    hidden, weight, kept = hidden.requires_grad_(), weight.requires_grad_(), []
    inputs = {x.untyped_storage().data_ptr() for x in (hidden, weight, labels)}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in inputs and x.numel() >= V * C:
            kept.append(x.numel() / V)
        return x

    with WidestLogits() as widest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = function(hidden, weight, labels, chunk_tokens)
        try:
            loss.backward()
        except RuntimeError as error:
            raise RuntimeError(f"backward() on your result failed: {error}") from None
    return {"loss": loss.detach(), "gradients": [hidden.grad, weight.grad], "rows": widest.rows,
            "kept": sum(kept)}


def draw_chunks(case: Chunks) -> str:
    labelled, chunk_tokens = case
    lens = [min(chunk_tokens, len(labelled) - i) for i in range(0, len(labelled), chunk_tokens)]
    cells = ["x" if x else "." for x in labelled]
    return (f"hidden ({len(labelled)}, {C}), weight ({V}, {C}), chunk_tokens {chunk_tokens}\n"
            f"labels {with_bars(cells, lens)}      (x: has a label)")


def chunk_part(asks: str, points: int, cases: Any, *keys: str, **options: Any) -> Part:
    def look(function: Function, case: Chunks) -> Any:
        found = run_chunks(function, case)
        return found[keys[0]] if len(keys) == 1 else {key: found[key] for key in keys}
    return Part(asks, "chunked_loss", points, cases, each(look), draw_chunks, **options)


def compare_logits(case: Chunks, yours: float, right: Any) -> str:
    return f"yours  {yours:g} rows of V numbers (logits, or made of them)\nright  at most {case[1]}"


def compare_chunks(case: Chunks, yours: Any, right: Any) -> str:
    """Loss and gradients, or gradients alone: of these only which rows are wrong."""
    lines = []
    if isinstance(right, dict):
        lines = [f"yours     loss {show(yours['loss'])}", f"right     loss {show(right['loss'])}"]
        yours, right = yours["gradients"], right["gradients"]
    for name, mine, theirs in zip(("hidden", "weight"), yours, right, strict=True):
        state = "none"
        if mine is not None:
            bad = [i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if not equal(a, b)]
            state = f"wrong in {len(bad)} of {len(theirs)} rows, first {bad[0]}" if bad else "ok"
        lines.append(f"gradient of {name}: {state}")
    return "\n".join(lines)


def few_rows(case: Chunks, yours: Any, right: Any) -> bool:
    return not isinstance(yours, Raised | Exception) and yours <= case[1]


CHUNKED = Exercise("06", "cross-entropy in chunks, computed twice", (
    chunk_part("the sum of all labels' cross-entropies", 2, labelled_cases, "loss"),
    chunk_part("its gradients", 2, labelled_cases, "gradients", compare=compare_chunks),
    chunk_part("a chunk without any label adds 0", 2, hole_cases, "loss", "gradients",
               compare=compare_chunks),
    chunk_part("forward and backward never hold more logits than a chunk's", 2, long_cases, "rows",
               compare=compare_logits, accept=few_rows),
    chunk_part("between forward and backward no logits are kept", 2, long_cases, "kept",
               compare=compare_logits,
               accept=lambda case, yours, right: few_rows(case, yours, right))))

# --- 07 and 12: attention over ranks ----------------------------------------------------

D = 6
Spread = tuple[int, tuple[int, ...], int, int]  # ranks, doc_lens, heads, KV heads


def ulysses_cases() -> list[Spread]:
    return [(2, (4,), 2, 2), (2, (1, 2, 1), 2, 2), (2, (3, 5), 4, 2), (4, (3, 4, 1), 4, 4),
            (4, (8,), 8, 4), (4, (5, 3), 8, 2), (4, (7, 1, 4, 12), 12, 4)]


def ring_cases() -> list[Spread]:
    return [(2, (4,), 1, 1), (2, (1, 2, 1), 2, 1), (2, (21, 23), 3, 3), (4, (3, 4, 1), 2, 2),
            (4, (7, 30, 7), 3, 1)]


def whole_qkv(case: Spread) -> list[Tensor]:
    """q (S, H, D), k and v (S, H_kv, D) of the whole sequence, the same on all ranks."""
    _, doc_lens, heads, kv_heads = case
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(sum(doc_lens), h, D, dtype=torch.float64, generator=generator)
            for h in (heads, kv_heads, kv_heads)]


def weigh(out: Tensor, case: Spread, begin: int = 0) -> Tensor:
    """A loss that asks something else of every output."""
    return (out * torch.arange(begin, begin + out.numel()).view_as(out).sin()).sum()


def spread_right(case: Spread) -> dict[str, Any]:
    """What one process computes with the mask written out, and each of four ranks' share of it."""
    P, doc_lens, heads, kv_heads = case
    qkv = [x.requires_grad_() for x in whole_qkv(case)]
    out = llama.attention_reference(*qkv, ends_of(doc_lens), max(doc_lens))
    weigh(out, case).backward()
    T = sum(doc_lens) // P
    sent = T * D * (2 * heads + 2 * max(kv_heads, P)) * (P - 1) // P  # model.py, section 6
    mine = [slice(rank % P * T, (rank % P + 1) * T) for rank in range(ranks.WORLD)]
    return {"out": [out[part].tolist() for part in mine], "sent": [sent] * ranks.WORLD,
            "whole": [False] * ranks.WORLD,
            "gradients": [[x.grad[part].tolist() for x in qkv] for part in mine]}


@contextmanager
def counting(P: int) -> Iterator[list[int]]:
    """Count the elements that collectives send to other ranks."""
    sent: list[int] = []

    def counted(name: str, place: int, copies: int) -> Any:
        real = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            x = args[place] if len(args) > place else kwargs.get("input", kwargs.get("tensor"))
            n = sum(t.numel() for t in x) if isinstance(x, list) else x.numel()
            sent.append(n * copies * (P - 1) // P)
            return real(*args, **kwargs)
        return mock.patch.object(dist, name, call)

    with ExitStack() as stack:
        for name, copies in (("all_to_all_single", 1), ("all_to_all", 1), ("all_gather", P),
                             ("all_gather_into_tensor", P)):
            stack.enter_context(counted(name, 1, copies))
        yield sent


class LargestRows(TorchDispatchMode):
    """Sees every operation, and whether a result has as many rows or columns as the sequence."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.seen = tokens, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.ndim > 1 and self.tokens in x.shape:
                self.seen = True
        return out


def attention_job(function: Function, case: Spread, group: dist.ProcessGroup) -> dict[str, Any]:
    """On one rank: its share of q, k and v through an answer, and back."""
    P, doc_lens, *_ = case
    T = sum(doc_lens) // P
    rank = dist.get_rank(group)
    mine = slice(rank * T, (rank + 1) * T)
    qkv = [x[mine].clone().requires_grad_() for x in whole_qkv(case)]
    rows = LargestRows(sum(doc_lens))
    with counting(P) as sent, rows:
        out = function(*qkv, ends_of(doc_lens), max(doc_lens), group)
    sent_forward = sum(sent)
    if out.requires_grad:
        weigh(out, case, rank * out.numel()).backward()
    return {"out": out.tolist(), "sent": sent_forward, "whole": rows.seen and sum(doc_lens) == 44,
            "gradients": [[] if x.grad is None else x.grad.tolist() for x in qkv]}


def exchange_job(function: Function, case: Spread, group: dist.ProcessGroup) -> dict[str, Any]:
    """On one rank: x (P, 2), whose numbers say from where to where; and back."""
    P, _, transposed, _ = case
    rank = dist.get_rank(group)
    x = torch.tensor([[100.0 * rank + 10 * j + i for i in range(2)] for j in range(P)])  # (P, 2)
    x = x.T.contiguous().T if transposed == 2 else x  # the same numbers, in other strides
    x.requires_grad_()
    out = function(x, group)
    if out.requires_grad:
        (out * (1000 + 100 * rank + 10 * torch.arange(P)[:, None])).sum().backward()
    return {"out": out.tolist(), "gradients": [] if x.grad is None else x.grad.tolist()}


@cache  # the parts of an exercise look at one run
def world_found(job: ranks.Job, function: Function, cases: tuple[Spread, ...]) -> list[Any]:
    return ranks.run_world(job, function, [(case[0], case) for case in cases])


def over_ranks(job: ranks.Job, key: str) -> Look:
    """Look at one thing that the four ranks of a world found."""
    def look(function: Function, cases: list[Spread]) -> list[Any]:
        return [[of_rank[key] for of_rank in found] if isinstance(found, list) else found
                for found in world_found(job, function, tuple(cases))]
    return look


def on_one(key: str) -> Look:
    """The same from one process, whatever the answer."""
    return each(lambda function, case: spread_right(case)[key])


def draw_spread(case: Spread) -> str:
    P, doc_lens, heads, kv_heads = case
    owner = [i * P // sum(doc_lens) for i in range(sum(doc_lens))]
    return (f"{P} ranks, H {heads}, H_kv {kv_heads}\n{draw_documents(doc_lens)}\n"
            f"rank      {with_bars(owner, doc_lens)}")


def compare_spread(case: Spread, yours: Any, right: Any) -> str:
    """Which tokens of each rank differ from one process's."""
    P, T, names = case[0], sum(case[1]) // case[0], []
    for rank in range(P):
        pairs = list(zip(yours[rank], right[rank], strict=False))
        if len(pairs) == len(right[rank]) == T:
            names += ["ok" if equal(a, b) else "no" for a, b in pairs]
        else:
            names += ["?"] * T
    return f"as on one {with_bars(names, case[1])}"


def compare_gradients(case: Spread, yours: Any, right: Any) -> str:
    lines = []
    for rank in range(case[0]):
        states = ["none" if not mine else "ok" if equal(mine, theirs) else "wrong"
                  for mine, theirs in zip(yours[rank], right[rank], strict=True)]
        lines.append(f"rank {rank}    gradient of q {states[0]}, k {states[1]}, v {states[2]}")
    return "\n".join(lines)


def compare_sent(case: Spread, yours: Any, right: Any) -> str:
    return (f"yours     {yours[0]:,} numbers sent to other ranks, forward\n"
            f"right     at most {right[0]:,}: T*D*(2H + 2*max(H_kv, P)) * (P-1)/P")


def few_sent(case: Spread, yours: Any, right: Any) -> bool:
    return isinstance(yours, list) and max(yours) <= max(right)


def exchange_cases() -> list[Spread]:
    """Ranks; a 2 in the third place: x is a transposed tensor."""
    return [(2, (2,), 1, 1), (2, (2,), 2, 1), (4, (4,), 1, 1), (4, (4,), 2, 1)]


def draw_exchange(case: Spread) -> str:
    transposed = "; x is a transposed tensor, not contiguous" if case[2] == 2 else ""
    return (f"{case[0]} ranks; x (P, 2) on rank r has 100 r + 10 j + i at x[j, i]{transposed}\n"
            "the gradient of out[j] on rank r is 1000 + 100 r + 10 j")


def exchange_right(key: str) -> Look:
    def call(function: Function, case: Spread) -> list[Any]:
        P, world = case[0], range(ranks.WORLD)
        if key == "out":  # row j comes from rank j
            return [[[100.0 * j + 10 * (r % P) + i for i in range(2)] for j in range(P)]
                    for r in world]
        return [[[1000.0 + 100 * j + 10 * (r % P)] * 2 for j in range(P)] for r in world]
    return each(call)


def exchange_part(asks: str, points: int, key: str) -> Part:
    return Part(f"exchange: {asks}", "exchange", points, exchange_cases,
                over_ranks(exchange_job, key),
                draw_exchange,
                lambda case, yours, right: f"rank 1 has  {show(yours[1]) if yours[1] else 'none'}\n"
                                           f"right       {show(right[1])}",
                right=exchange_right(key))


def spread_part(function: str, asks: str, points: int, cases: Any, key: str, compare: Any,
                **options: Any) -> Part:
    return Part(asks, function, points, cases, over_ranks(attention_job, key), draw_spread, compare,
                right=on_one(key), **options)


AS_ONE = "attention over 2 and 4 ranks equals that of one process"
ULYSSES = Exercise("07", "Ulysses: tokens for heads", (
    exchange_part("rank j receives x[j] of every rank", 1, "out"),
    exchange_part("gradients find their way back", 2, "gradients"),
    spread_part("ulysses_attention", AS_ONE, 3, ulysses_cases, "out", compare_spread),
    spread_part("ulysses_attention", "and so do its gradients", 2, ulysses_cases, "gradients",
                compare_gradients),
    spread_part("ulysses_attention", "no more is sent than must be", 2, ulysses_cases, "sent",
                compare_sent, accept=few_sent)))

RING = Exercise("12", "ring attention (starred)", (
    spread_part("ring_attention", AS_ONE, 10, ring_cases, "out", compare_spread),
    spread_part("ring_attention", "and so do its gradients", 6, ring_cases, "gradients",
                compare_gradients),
    spread_part("ring_attention", "no rank holds the keys of the whole sequence", 4, ring_cases,
                "whole", lambda *_: "a result has as many rows as the sequence has tokens",
                accept=lambda case, yours, right: isinstance(yours, list) and not any(yours))))

# --- 09: the exact step -----------------------------------------------------------------

Counts = tuple[tuple[int, ...], ...]  # [rank][micro-batch]: how many of 4 tokens have a label


def step_counts() -> list[Counts]:
    return [((4,),), ((1, 3),), ((3,), (1,)), ((4, 1), (2, 2)), ((0, 3),), ((0,), (3,)),
            ((0,), (0,)), ((4, 0), (1, 3), (2, 2), (0, 0))]


@cache  # all parts look at one run
def run_step(function: Function, counts: Counts) -> dict[str, Any] | Exception:
    """The step on threads: loss of each rank, the gradients' sum, how often backward ran."""
    torch.manual_seed(0)
    weight = torch.randn(8, dtype=torch.float64)
    gradients = torch.zeros(len(counts), 8, dtype=torch.float64)  # (ranks, weights)
    backwards = [0] * len(counts)

    def job(parallel: Any) -> float:
        rank, mine = parallel.rank, weight.clone().requires_grad_()

        def count(grad: Tensor) -> None:
            backwards[rank] += 1

        def loss_of(ids: Tensor, labels: Tensor) -> Tensor:
            losses = F.cross_entropy(mine[ids][:, None] * torch.arange(8), labels,
                                     ignore_index=IGNORE_INDEX, reduction="none")  # (T,)
            losses.register_hook(count)
            return losses

        loss = function(loss_of, [make_micro(rank, i, n) for i, n in enumerate(counts[rank])],
                        parallel)
        gradients[rank] = 0 if mine.grad is None else mine.grad
        return float(loss)

    losses = ranks.run_threads(job, len(counts))
    errors = [x for x in losses if isinstance(x, Exception)]
    own = [x for x in errors if str(x) != ranks.UNEQUAL]
    if errors:
        return (own or errors)[0]
    return {"loss": losses, "gradient": gradients.sum(dim=0), "backwards": backwards}


def make_micro(rank: int, i: int, n: int) -> Batch:
    """A micro-batch of 4 tokens, of which n have a label."""
    generator = torch.Generator().manual_seed(10 * rank + i)
    ids, labels = torch.randint(8, (2, 4), generator=generator)  # (4,) each
    labels[n:] = IGNORE_INDEX
    return Batch(ids, labels, (4,), ("",))


def draw_counts(counts: Counts) -> str:
    rows = ["  |  ".join(" ".join("x" if i < n else "." for i in range(4)) for n in micro)
            for micro in counts]
    return "\n".join(f"rank {rank}  {row}" for rank, row in enumerate(rows)) + "\n(x: has a label)"


def compare_steps(counts: Counts, yours: Any, right: Any) -> str:
    """One number for the step, or a rank's; what rows of numbers are stands in what is asked."""
    names = [f"rank {rank} " for rank in range(len(counts))] if len(yours) == len(counts) else [""]
    pairs = zip(names, yours, right, strict=False) if names != [""] else [("", yours, right)]
    return "\n".join(f"{name}yours {show(a)}, right {show(b)}" for name, a, b in pairs)


def step_part(asks: str, points: int, key: str) -> Part:
    def look(function: Function, counts: Counts) -> Any:
        found = run_step(function, counts)
        if isinstance(found, Exception):
            raise found
        return found[key]
    return Part(asks, "train_on_step", points, step_counts, each(look), draw_counts, compare_steps)


EXACT = Exercise("09", "the exact loss over ranks and micro-batches", (
    step_part("every rank returns the mean over all trained tokens of the step", 3, "loss"),
    step_part("summed over ranks, the gradient is that mean's", 4, "gradient"),
    step_part("every rank runs backward once for each micro-batch", 3, "backwards")))

# --- 11: the memory of one rank ---------------------------------------------------------


def shape_cases() -> list[ModelConfig]:
    small = ModelConfig(10, 4, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=2, ffn_dim=6,
                        max_seq_len=8)
    return [small, replace(small, n_layers=3), replace(small, tie_embeddings=True),
            llama.preset_config("llama3.2-3b", 1), llama.preset_config("llama3-8b", 1)]


Held = tuple[ModelConfig, int, int]  # shape, tokens of this rank, ranks


def memory_cases() -> list[Held]:
    small, deep, tied, llama3b, llama8b = shape_cases()
    return [(small, 16, 1), (small, 16, 2), (deep, 16, 4), (tied, 16, 1), (llama3b, 32_768, 8),
            (llama8b, 65_536, 8)]


def draw_shape(shape: ModelConfig) -> str:
    tied = ", one table" if shape.tie_embeddings else ""
    return (f"C {shape.dim:,}, F {shape.ffn_dim:,}, {shape.n_layers} layers, "
            f"{shape.n_heads} heads, {shape.n_kv_heads} KV heads, D {shape.head_dim}, "
            f"V {shape.vocab_size:,}{tied}")


def memory_part(asks: str, key: str) -> Part:
    def close(case: Any, yours: Any, right: Any) -> bool:
        return equal(yours, right, 1e-3)  # rounding is yours
    return Part(f"{key}: {asks}", "rank_memory", 2, memory_cases,
                each(lambda function, case: function(*case)[key]),
                lambda case: f"{draw_shape(case[0])}\n{case[1]:,} tokens a rank, {case[2]} ranks",
                lambda _, yours, right: f"yours  {show(yours)} bytes\nright  {show(right)} bytes",
                close)


MEMORY = Exercise("11", "the memory of one rank at 512K", (
    Part("the number of weights", "count_weights", 2, shape_cases,
         each(lambda function, shape: int(function(shape))), draw_shape),
    memory_part("weights, gradients and Adam's moments in float32", "state"),
    memory_part("what a rank gathers to compute", "gathered"),
    memory_part("the blocks' inputs, if blocks are computed again", "inputs"),
    memory_part("what all blocks keep, if nothing is computed again", "everything")))

# --- 13: a window -----------------------------------------------------------------------

Window = tuple[tuple[int, ...], int, int, int]  # doc_lens, window, heads, KV heads


def window_cases() -> list[Window]:
    return [(lens, window, heads, kv) for lens in packs(4) for window in (1, 2, 3, 100)
            for heads, kv in ((1, 1), (4, 2))]


def call_window(function: Function, case: Window) -> Tensor:
    doc_lens, window, heads, kv_heads = case
    return function(*whole_qkv((1, doc_lens, heads, kv_heads)), ends_of(doc_lens), window)


def compare_window(case: Window, yours: Tensor, right: Tensor) -> str:
    if yours.shape != right.shape:
        return side_by_side(case, tuple(yours.shape), tuple(right.shape))
    values = [[f"{float(token.flatten()[0]):.2f}" for token in x] for x in (yours, right)]
    return compare_rows(case[0], *values)


WINDOW = Exercise("13", "a sliding window (starred)", (
    Part("a token sees the last `window` tokens of its document, itself among them",
         "window_attention", 20, window_cases, each(call_window),
         lambda case: f"{draw_documents(case[0])}\nwindow {case[1]}, H {case[2]}, H_kv {case[3]}",
         compare_window),))

EXERCISES = [ROPE, CHUNKED, ULYSSES, EXACT, MEMORY, RING, WINDOW]
