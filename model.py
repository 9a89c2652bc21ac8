"""The model: a Llama whose attention stops at document boundaries and can be shared by many ranks.

Long-context training feeds a model *packed* sequences: many documents laid end to end, or one that
fills everything. Nothing may leak from one document into the next, so three things follow from one
host-side tuple, `doc_lens`, and from nothing else (never from EOS tokens):

    doc_lens   = (3, 1, 4)                      S = 8 tokens, N = 3 documents
    tokens       a b c | d | e f g h
    positions    0 1 2 | 0 | 0 1 2 3            RoPE restarts with every document
    cu_seqlens   0       3   4         8        where documents begin, and the end

    who may look at whom (row looks at column)
        a b c d e f g h
      a x . . . . . . .
      b x x . . . . . .                         block-diagonal and causal. The reference draws this
      c x x x . . . . .                         mask; the fast backends never build it, because at
      d . . . x . . . .                         512K tokens it would have 275 billion entries.
      e . . . . x . . .
      f . . . . x x . .
      g . . . . x x x .
      h . . . . x x x x

Everything else in a Llama works on single tokens, so the model is *batch-free*: tensors are
(T, ...), T tokens of documents laid end to end, and only attention asks who belongs to whom. That
is also why one function, `ulysses_attention`, is enough to share a sequence among P ranks, and one
small class, `KVCache`, is enough to generate text.

Shapes: S tokens of the whole sequence, P seq_parallel_size, T = S/P tokens of this rank,
H query heads, H_kv key/value heads, D head dim, C model dim, V vocabulary, N documents, B batch.

Sources: ProLong (arXiv 2410.02660) section 6.1, B.1, B.2, A.3; RoPE (2104.09864); YaRN (2309.00071);
DeepSpeed-Ulysses (2309.14509); Hugging Face's folder layout for weights. Unlike ProLong's code,
positions restart at every document and KV heads are not expanded before they are exchanged.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100  # a label that is not trained on; the value PyTorch's cross_entropy skips

# --- 1. Configuration -----------------------------------------------------------------------------


class Family(NamedTuple):
    """What a family does differently from Llama, beyond its shape, and its class in transformers."""

    architecture: str
    qkv_bias: bool = False  # query, key and value projections add a bias
    qk_norm: bool = False  # every head's query and key pass an RMSNorm before RoPE


ARCHITECTURES = {  # by config.json's model_type
    "llama": Family("LlamaForCausalLM"),  # Llama-2, 3, 3.1, 3.2; SmolLM2
    "mistral": Family("MistralForCausalLM"),  # without its sliding window
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),  # Qwen2, Qwen2.5
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama, in Llama's own names. `rope_scaling` is Hugging Face's entry, as is."""

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_seq_len: int
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    family: str = "llama"
    bos_token_id: int | None = None  # passed on to whoever generates text with the saved model
    eos_token_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        if self.family not in ARCHITECTURES:
            raise ValueError(f"family {self.family!r} is unknown; choose one of {', '.join(ARCHITECTURES)}")
        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= largest:
                raise ValueError(f"{name}={value!r} must be a positive integer, {largest:,} at most")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not divisible by n_kv_heads="
                             f"{self.n_kv_heads}; query heads share KV heads in equal groups")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; RoPE rotates pairs, make it even")
        if not isinstance(self.norm_eps, float) or not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps={self.norm_eps!r} must be a number between 0 and 1")
        if type(self.tie_embeddings) is not bool:
            raise ValueError(f"tie_embeddings={self.tie_embeddings!r} must be true or false")
        rope_frequencies(self)  # an unknown kind of scaling is refused now, not at the first step


# No real model is larger; a config.json from a stranger could ask for more memory than there is.
_LARGEST = {"vocab_size": 2**24, "dim": 2**20, "n_layers": 2**10, "n_heads": 2**12, "n_kv_heads": 2**12,
            "head_dim": 2**12, "ffn_dim": 2**22, "max_seq_len": 2**40}

# Llama-3's scaling for its 3.1 and 3.2 models, from their released config.json.
_LLAMA32_ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                 "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# vocab_size 0 means: the tokenizer's. Shapes are those of the released checkpoints.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 0, "dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "head_dim": 16,
             "ffn_dim": 192, "max_seq_len": 256, "tie_embeddings": True},
    "smollm2-135m": {"vocab_size": 49_152, "dim": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3,
                     "head_dim": 64, "ffn_dim": 1536, "max_seq_len": 8192, "rope_theta": 1e5,
                     "tie_embeddings": True},
    "llama3.2-1b": {"vocab_size": 128_256, "dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8,
                    "head_dim": 64, "ffn_dim": 8192, "max_seq_len": 131_072, "rope_theta": 5e5,
                    "rope_scaling": _LLAMA32_ROPE, "tie_embeddings": True},
    "llama3.2-3b": {"vocab_size": 128_256, "dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8,
                    "head_dim": 128, "ffn_dim": 8192, "max_seq_len": 131_072, "rope_theta": 5e5,
                    "rope_scaling": _LLAMA32_ROPE, "tie_embeddings": True},
    "llama3-8b": {"vocab_size": 128_256, "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8,
                  "head_dim": 128, "ffn_dim": 14_336, "max_seq_len": 8192, "rope_theta": 5e5},
}


def preset_config(name: str, vocab_size: int) -> ModelConfig:
    """Look up a preset. `vocab_size` is the tokenizer's, used where the preset leaves it open.

    Raises ValueError for an unknown name or a vocabulary too small for the tokenizer.
    """
    if name not in PRESETS:
        raise ValueError(f"model {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if 0 < preset["vocab_size"] < vocab_size:
        raise ValueError(f"model {name!r} has {preset['vocab_size']} token ids, but the tokenizer "
                         f"uses {vocab_size}; choose the tokenizer that belongs to the model")
    return ModelConfig(**{**preset, "vocab_size": preset["vocab_size"] or vocab_size})


# --- 2. RoPE, and how to stretch it ---------------------------------------------------------------
#
# RoPE turns each pair of dimensions of a query or key by position * frequency, so that their product
# depends only on the distance between the two tokens. A larger base theta slows all rotations: the
# slow dimensions stay nearly still over the longer context, and what the model learned about content
# still matches. ProLong raises theta 5e5 -> 8e6 (64K) -> 1.28e8 (512K): section 6.1, B.1.


def ntk_rope_theta(theta: float, from_len: float, to_len: float, head_dim: int) -> float:
    """The base that dynamic NTK suggests for a longer context: theta * t^(d/(d-2)), t = to/from.

    Source: section B.1. The paper then goes about twice as far (8e6 where this says 4.1e6).
    """
    return theta * (to_len / from_len) ** (head_dim / (head_dim - 2))


_ROPE_KEYS = {"rope_type", "type", "factor", "original_max_position_embeddings", "low_freq_factor",
              "high_freq_factor", "beta_fast", "beta_slow", "truncate", "attention_factor"}


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Return the rotation per position of each dimension pair, and the factor on cos and sin.

    (D/2,) float64 radians per token, and a number that is 1 except for YaRN. Four ways to stretch,
    by `rope_scaling["rope_type"]`: default (theta alone), linear (position interpolation, 2306.15595:
    all frequencies divided), llama3 (Llama-3.1: only the slow ones divided, with a ramp between) and
    yarn (2309.00071: the same idea, its ramp linear in the dimension, and a temperature).

    Raises ValueError for any other kind, and for a missing or impossible number.
    """
    head_dim = config.head_dim
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim  # (D/2,)
    if not isinstance(config.rope_theta, int | float) or not 1 < config.rope_theta < math.inf:
        raise ValueError(f"rope_theta={config.rope_theta!r} must be greater than 1, and finite")
    inv_freq = config.rope_theta ** -exponents
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq, 1.0
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling={scaling!r} must be an object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ValueError(f"rope_scaling type {kind!r} is not supported; choose default, linear, llama3 or "
                         "yarn (or dynamic, in a config.json: read_config makes it a fixed theta)")
    if unknown := scaling.keys() - _ROPE_KEYS:
        raise ValueError(f"rope_scaling has an entry {min(unknown, key=str)!r}, which is not one of "
                         f"{', '.join(sorted(_ROPE_KEYS))}")
    if kind == "default":
        return inv_freq, 1.0
    factor = _number(scaling, "factor", minimum=1.0)
    if kind == "linear":
        return inv_freq / factor, 1.0

    original = _number(scaling, "original_max_position_embeddings", config.max_seq_len, minimum=1)
    if kind == "llama3":
        low = _number(scaling, "low_freq_factor", minimum=0.0)
        high = _number(scaling, "high_freq_factor", minimum=0.0)
        if high <= low:
            raise ValueError(f"high_freq_factor={high} must be above low_freq_factor={low}")
        turns = original * inv_freq / (2 * math.pi)  # full turns over the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast, untouched; 0: slow, divided
        return inv_freq * keep + inv_freq / factor * (1 - keep), 1.0

    # YaRN: dimensions that make more than beta_fast turns are kept, fewer than beta_slow divided.
    def dimension_with_turns(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (
            2 * math.log(config.rope_theta))

    fast, slow = _number(scaling, "beta_fast", 32.0), _number(scaling, "beta_slow", 1.0)
    if not fast > slow > 0:
        raise ValueError(f"beta_fast={fast} must be above beta_slow={slow}, and both above 0")
    first, last = dimension_with_turns(fast), dimension_with_turns(slow)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    last = last + 0.001 if last == first else last  # a ramp of no width would divide by zero
    dims = torch.arange(head_dim // 2, dtype=torch.float64)
    keep = 1 - ((dims - first) / (last - first)).clamp(0, 1)
    temperature = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0  # YaRN, equation 22
    return (inv_freq * keep + inv_freq / factor * (1 - keep),
            _number(scaling, "attention_factor", temperature))


def _number(entry: dict[str, Any], key: str, default: float | None = None,
            minimum: float = -math.inf) -> float:
    value = entry.get(key, default) if entry.get(key) is not None else default
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"rope_scaling needs a number for {key!r}, got {value!r}")
    if value < minimum:
        raise ValueError(f"rope_scaling {key!r} is {value}, the least allowed is {minimum}")
    return float(value)


def rope_cos_sin(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Turn positions (T,) into cos and sin, (T, 1, D/2) each, in float32 or better.

    In bfloat16 a position such as 15,962 would be rounded by up to 32 and its cosine would be noise,
    so the model's dtype only counts when it is wider than float32.
    """
    inv_freq, factor = rope_frequencies(config)
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions.double()[:, None] * inv_freq.to(positions.device)  # (T, D/2) float64
    return (angles.cos() * factor)[:, None].to(wide), (angles.sin() * factor)[:, None].to(wide)


class _Rotate(torch.autograd.Function):
    """Turn pairs of dimensions by an angle; the gradient is the output's, turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    halves = x.to(cos.dtype).unflatten(-1, (2, -1))  # (T, H, D) -> (T, H, 2, D/2)
    rotated = halves * cos[:, :, None]
    rotated[:, :, 0].addcmul_(halves[:, :, 1], sin, value=-1)  # in place: half the time of cat
    rotated[:, :, 1].addcmul_(halves[:, :, 0], sin)
    return rotated.flatten(-2).to(x.dtype)  # -> (T, H, D)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (T, H, D). Dimension i is paired with i + D/2: the layout of Hugging Face's weights."""
    return _Rotate.apply(x, cos, sin)


# --- 3. Attention within documents ----------------------------------------------------------------


def attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
                        max_seqlen: int) -> Tensor:
    """Attention with the mask of the file's picture written out: the explanation and the oracle.

    q (T, H, D), k and v (T, H_kv, D) -> (T, H, D). It builds (H, T, T): for tests and short texts.
    """
    T, H, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(H // k.shape[1], dim=1)  # (T, H_kv, D) -> (T, H, D)
    v = v.repeat_interleave(H // v.shape[1], dim=1)
    index = torch.arange(T, device=q.device)
    document = torch.bucketize(index, cu_seqlens[1:], right=True)  # (T,) which document
    allowed = (document[:, None] == document[None, :]) & (index[:, None] >= index[None, :])
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), k.to(wide)) / math.sqrt(D)  # (H, T, T)
    weights = scores.masked_fill(~allowed, -math.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v.to(wide)).to(q.dtype)


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """PyTorch's `scaled_dot_product_attention`, on documents of equal length as a batch: runs anywhere."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return _CpuBfloat16.apply(q, k, v, cu_seqlens)

    def causal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        # 4-D inputs matter: with 3-D ones PyTorch on a CPU quietly builds the whole score matrix.
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                               enable_gqa=q.shape[1] != k.shape[1]),)

    return _by_length(causal, q, k, v, cu_seqlens)[0]


def _by_length(kernel: Callable[..., tuple[Tensor, ...]], q: Tensor, k: Tensor, v: Tensor,
               cu_seqlens: Tensor) -> list[Tensor]:
    """Call `kernel` once for all documents of a length; its outputs (T, H, .) come in the pack's order.

    Documents are brought into order of length, so that each length is one slice that reshapes into a batch.
    """
    starts = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    in_order = by_length == list(range(len(lengths)))
    order = q.new_empty(0, dtype=torch.long)
    if not in_order:  # the token permutation that puts short documents first
        order = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in by_length]).to(q.device)
        q, k, v = q[order], k[order], v[order]
    runs = [run for run in _runs([lengths[i] for i in by_length]) if run[0]]
    parts = [x.split([length * count for length, count in runs]) for x in (q, k, v)]
    outputs = []
    for (length, count), *qkv in zip(runs, *parts, strict=True):
        batch = [x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv]
        #   (count*length, H, D) -> (count, length, H, D) -> (count, H, length, D)
        outputs.append([x.transpose(1, 2).flatten(0, 1) for x in kernel(*batch)])  # -> (count*length, H, .)
    whole = outputs[0] if len(outputs) == 1 else [torch.cat(x) for x in zip(*outputs, strict=True)]
    if in_order:
        return whole
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=q.device))
    return [x[back] for x in whole]


def _runs(values: list[int]) -> Iterator[tuple[int, int]]:
    """[2, 2, 5] -> (2, 2), (5, 1): each value with how often it is repeated in a row."""
    begin = 0
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i] != values[begin]:
            yield values[begin], i - begin
            begin = i


class _CpuBfloat16(torch.autograd.Function):
    """PyTorch's kernel for CPUs; but backward in tiles, for its matmuls are too small for Intel's AMX unit.

    Without that unit the tiles are computed in float32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]

        def causal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, *(x.repeat_interleave(groups, dim=1) for x in (k, v)), is_causal=True)
            return out, lse.unsqueeze(-1)  # lse (count, H, length): the log-sum-exp of each query's scores

        out, lse = _by_length(causal, q, k, v, cu_seqlens)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        work = torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
        grads = _tiled_backward(grad.to(work), q.to(work), k.to(work), v.to(work), out, lse, cu_seqlens)
        return *(x.to(grad.dtype) for x in grads), None


TILE_WEIGHTS = 2**21  # attention weights at a time, over all heads: 4 MiB in bfloat16


def _tiled_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                    cu_seqlens: Tensor) -> list[Tensor]:
    """Flash attention's backward (2205.14135) over a pack: gradients of q (T, H, D), k and v (T, H_kv, D).

        P  = exp(q k^T / sqrt(D) - lse)     the weights once more, by each query's log-sum-exp
        dv = P^T grad
        dS = P * (grad v^T - delta)         delta = sum of grad * out, a number per query
        dq = dS k / sqrt(D),  dk = dS^T q / sqrt(D)

    Nothing of size T x T: it is done for pairs of tiles that see each other, many in one batch of matmuls.
    Both subtractions happen inside a matmul, which adds up in float32 before it rounds: q has two more
    columns, -lse sqrt(D) and what bfloat16 rounds off it, against two ones of k; so has grad, with -delta,
    against v. What bfloat16 rounds is then an exponent: gradients are off by some 6e-3 of their norm.
    """
    (T, H, D), H_kv, dtype = q.shape, k.shape[1], q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    usual = float(cu_seqlens.diff().double().square().sum()) / T  # length of the average token's document
    # Large tiles see more in vain, small ones are many: 6 sqrt(length) was best (docs/LOG.md).
    tile = min(max(6 * math.isqrt(int(usual)), 64), 512)
    tile = 1 << (tile.bit_length() - 1)  # of few sizes: the matmul library makes a kernel for every new one
    start, i, j, partly = _tile_pairs(cu_seqlens, tile)
    n = len(start)

    def cut(x: Tensor, more: Tensor | float) -> Tensor:
        """(T, h, D) and two columns more -> (n, H_kv, rows, D + 2), rows = h/H_kv * tile, head after head."""
        y = x.new_zeros(n * tile, x.shape[1], D + 2)
        y[:T, :, :D], y[:T, :, D:] = x, more
        return y.view(n, tile, H_kv, -1, D + 2).permute(0, 2, 3, 1, 4).flatten(2, 3)

    def with_rest(x: Tensor) -> Tensor:
        """(T, H, 1) -> (T, H, 2): a number as bfloat16 has it, and the rest."""
        return torch.cat([x.to(dtype), (x - x.to(dtype)).to(dtype)], dim=-1)

    delta = torch.linalg.vecdot(grad.to(wide), out.to(wide)).unsqueeze(-1)  # (T, H, 1)
    sides = cut(q, with_rest(-lse * D**0.5)), cut(grad, with_rest(-delta)), cut(k, 1.0), cut(v, 1.0)
    totals = [torch.zeros(*x.shape[:3], D, dtype=wide) for x in (sides[0], *sides[2:])]  # of q, k and v
    at_once = max(TILE_WEIGHTS // (H * tile * tile), 1)
    buffers = [q.new_empty(at_once * H_kv, H // H_kv * tile, tile) for _ in "PS"]  # new ones are page faults

    for some in (partly, ~partly):
        for pairs in some.nonzero()[:, 0].split(at_once):
            at, to = i[pairs], j[pairs]
            P, dS = (x[:len(pairs) * H_kv] for x in buffers)  # (pairs*H_kv, rows, tile)
            q_, grad_, k_, v_ = (x.index_select(0, index).flatten(0, 1)  # (pairs*H_kv, rows or tile, D + 2)
                                 for x, index in zip(sides, (at, at, to, to), strict=True))
            torch.baddbmm(P, q_, k_.mT, beta=0, alpha=D**-0.5, out=P).exp_()
            if some is partly:
                query, key = (x[:, None] * tile + torch.arange(tile) for x in (at, to))  # (pairs, tile)
                hidden = (key[:, None] > query[:, :, None]) | (key[:, None] < start[at][:, :, None])
                P.view(len(pairs), H, tile, tile).masked_fill_(hidden[:, None], 0)
            torch.bmm(grad_, v_.mT, out=dS).mul_(P)
            for total, index, part in zip(totals, (at, to, to), (
                    dS @ k_[..., :D], dS.mT @ q_[..., :D], P.mT @ grad_[..., :D]), strict=True):
                total.index_add_(0, index, part.to(wide).view(len(pairs), *total.shape[1:]))

    totals[0] *= D**-0.5
    totals[1] *= D**-0.5
    return [x.to(dtype).unflatten(2, (-1, tile)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)[:T]
            for x in totals]  # (n, H_kv, h/H_kv * tile, D) -> (n, tile, H_kv, h/H_kv, D) -> (T, h, D)


def _tile_pairs(cu_seqlens: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where each token's document starts (tiles, tile); tiles i of queries and j of keys that see each other;
    and which of these pairs do so only partly. Documents of 5 and 3 tokens in tiles of 2:

        keys        0 1   2 3   4 5   6 7       i       0 1 1 2 2 2 3 3
        queries 0 1  p                          j       0 0 1 0 1 2 2 3
                2 3  x     p                    partly  p . p p p p p p     on the diagonal, or because the
                4 5  p     p     p                                          last query's document starts
                6 7              p     p                                    after the first key
    """
    starts, T = cu_seqlens[:-1], int(cu_seqlens[-1])
    start = starts.repeat_interleave(cu_seqlens.diff())  # (T,)
    start = F.pad(start, (0, -T % tile), value=T).view(-1, tile)  # padding: one more document, never seen
    tiles = torch.arange(len(start))
    count = tiles - start[:, 0] // tile + 1  # how many tiles of keys each tile of queries sees
    i = tiles.repeat_interleave(count)
    j = i + 1 - (count.cumsum(0).repeat_interleave(count) - torch.arange(len(i)))  # up to the diagonal
    return start, i, j, (j == i) | (j * tile < start[i, -1])


def attention_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """PyTorch's own variable-length flash attention: one kernel for all documents (CUDA, 16 bit)."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
                      window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(out, Tensor)  # it is a pair only when the log-sum-exp is asked for
    return out


Attention = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
BACKENDS: dict[str, Attention] = {"varlen": attention_varlen, "sdpa": attention_sdpa,
                                  "reference": attention_reference}


def backend_for(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Name the backend that `auto` means here, and say why (train.py prints it once)."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return "varlen", "one flash-attention kernel for all documents of the pack"
    return "sdpa", f"varlen needs CUDA and 16 bit, this is {device.type} and {str(dtype)[6:]}"


def document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                       backend: str = "auto") -> Tensor:
    """Causal attention inside each document of a pack: (T, H, D) and 2 x (T, H_kv, D) -> (T, H, D).

    `cu_seqlens` (N + 1,) int32 holds the documents' ends, from 0 to T; `max_seqlen` the longest.
    Source: ProLong section 6.1 and B.2 (Table 20: masks help both long and short tasks).
    """
    name = backend_for(q.device, q.dtype)[0] if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is unknown; choose auto or one of "
                         f"{', '.join(BACKENDS)}")
    return BACKENDS[name](q, k, v, cu_seqlens, max_seqlen)


# --- 4. Many ranks: Parallel and the Ulysses exchange ---------------------------------------------
#
# Ranks form a grid (dp, sp). The sp ranks of a row hold consecutive parts of one sequence; rows hold
# different sequences. Every layer but attention needs only its own tokens. For attention, Ulysses
# trades tokens for heads: before, each rank has all heads of its tokens; after, all tokens of its
# heads. With P = 2 ranks, H = 2 heads and S = 4 tokens (rank 0 holds a and b):
#
#            before              after                       before (T, H, D) on every rank
#          head 0  head 1      head 0  head 1                after  (S, H/P, D)
#      a   [ rank 0     ]      [  r  ][  r  ]
#      b   [ rank 0     ]      [  a  ][  a  ]                sent per rank and layer, forward:
#      c   [ rank 1     ]      [  n  ][  n  ]                T*D*(2H + 2*kv) * (P-1)/P elements,
#      d   [ rank 1     ]      [ k 0 ][ k 1 ]                kv = max(H_kv, P)


@dataclass(frozen=True)
class Parallel:
    """Which ranks exist, which one this is, and where it computes. Passed on, never a global."""

    mesh: DeviceMesh = field(repr=False)  # (dp, sp)
    world_mesh: DeviceMesh = field(repr=False)  # the same ranks in a row, for FSDP
    device: torch.device
    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    sp_rank: int
    sp_size: int

    @property
    def sp_group(self) -> dist.ProcessGroup:
        return self.mesh.get_group("sp")

    @property
    def main(self) -> bool:
        """Whether this rank is the one that prints and writes."""
        return self.rank == 0

    def all_sum(self, value: Tensor) -> Tensor:
        """Sum a number over all ranks, in float64 and on the device, so that nobody waits for it."""
        total = value.to(self.device, torch.float64)
        dist.all_reduce(total)
        return total


def init_parallel(seq_parallel_size: int | None = None) -> Parallel:
    """Start torch.distributed from torchrun's variables, or alone, and lay ranks out as (dp, sp).

    Ranks of one sp group are neighbours, so on a node with 8 GPUs the exchange stays inside the node.
    Raises ValueError when the world is not a multiple of `seq_parallel_size` (default 1).
    """
    sp_size = seq_parallel_size or 1
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if sp_size < 1 or world % sp_size:
        raise ValueError(f"{world} ranks cannot form groups of seq_parallel_size={sp_size}; "
                         f"choose a divisor of {world}")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if world == 1 and "MASTER_ADDR" not in os.environ:  # alone: no port, no network
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            # Others wait while rank 0 packs or evaluates. (Of a rank that dies, gloo or torchrun tells them.)
            dist.init_process_group(backend, timeout=timedelta(hours=6))
    mesh = init_device_mesh(device.type, (world // sp_size, sp_size), mesh_dim_names=("dp", "sp"))
    world_mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("world",))
    return Parallel(mesh, world_mesh, device, rank, world, dp_rank=rank // sp_size, dp_size=world // sp_size,
                    sp_rank=rank % sp_size, sp_size=sp_size)


def valid_seq_parallel_sizes(n_heads: int, n_kv_heads: int) -> list[int]:
    """The P that Ulysses can use: query heads divide by P, and KV heads divide by P or P by them."""
    return [p for p in range(1, n_heads + 1)
            if n_heads % p == 0 and (n_kv_heads % p == 0 or p % n_kv_heads == 0)]


def check_heads(P: int, n_heads: int, n_kv_heads: int) -> None:
    """Raise ValueError when P ranks cannot share the heads."""
    sizes = valid_seq_parallel_sizes(n_heads, n_kv_heads)
    if P not in sizes:
        raise ValueError(f"{n_heads} query heads and {n_kv_heads} KV heads cannot be shared by "
                         f"seq_parallel_size={P}; choose one of {sizes}")


def repeat_heads(x: Tensor, P: int) -> Tensor:
    """Repeat KV heads until there is one for each of P ranks: (T, H_kv, D) -> (T, max(H_kv, P), D)."""
    return x.repeat_interleave(max(1, P // x.shape[1]), dim=1)


class _Exchange(torch.autograd.Function):
    """Send x[j] to rank j; receive rank i's part as out[i]. Its own inverse, so its own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()  # before empty_like, which would copy strides that the exchange does not look at
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grad.contiguous(), ctx.group), None


def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                      group: dist.ProcessGroup, backend: str = "auto") -> Tensor:
    """Document attention over a sequence whose tokens are spread over the ranks of `group`.

    q (T, H, D), k and v (T, H_kv, D) -> (T, H, D), where T = S/P; `cu_seqlens` is that of all S
    tokens. K and V travel with their own head count (ProLong expands them first, which for Llama-3
    over 8 ranks is 1.6 times the traffic). Only if there are more ranks than KV heads is each KV
    head sent to the P/H_kv ranks whose query heads need it; its gradient is the sum over them.

    Raises ValueError when the heads cannot be shared by P ranks. Source: 2309.14509; ProLong A.3.
    """
    P = dist.get_world_size(group)
    T, H, H_kv = q.shape[0], q.shape[1], k.shape[1]
    check_heads(P, H, H_kv)
    k, v = repeat_heads(k, P), repeat_heads(v, P)  # (T, H_kv, D) -> (T, max(H_kv, P), D)
    heads = [x.shape[1] // P for x in (q, k, v)]
    qkv = torch.cat([x.unflatten(1, (P, -1)) for x in (q, k, v)], dim=2)  # (T, P, sum(heads), D)
    qkv = _Exchange.apply(qkv.transpose(0, 1), group)  # (P heads', T, ., D) -> (P tokens', T, ., D)
    q, k, v = qkv.flatten(0, 1).split(heads, dim=1)  # -> (S, H/P, D), 2 x (S, max(H_kv, P)/P, D)
    out = document_attention(q, k, v, cu_seqlens, max_seqlen, backend)  # (S, H/P, D)
    out = _Exchange.apply(out.unflatten(0, (P, T)), group)  # (P tokens', T, H/P, D) -> (P heads', ...)
    return out.transpose(0, 1).flatten(1, 2)  # (P, T, H/P, D) -> (T, P, H/P, D) -> (T, H, D)


@dataclass(frozen=True)
class PackLayout:
    """What one forward pass derives from `doc_lens`, once: this rank's positions, and who attends."""

    positions: Tensor  # (T,) int64, restarting at every document
    cu_seqlens: Tensor  # (N + 1,) int32: of the whole sequence if `group`, else of this rank's part
    max_seqlen: int
    group: dist.ProcessGroup | None  # the ranks to exchange with, if they must


def crosses_ranks(doc_lens: Sequence[int], sp_size: int) -> bool:
    """Whether any document lies on more than one of `sp_size` equal shares of the sequence.

    Only then is the Ulysses exchange needed. The tempting test, "no document is longer than a
    share", is wrong: in (6, 4, 6) over two ranks the 4 lies on both, though 6 < 8.
    """
    share = sum(doc_lens) // sp_size
    ends, total = set(), 0
    for length in doc_lens:
        ends.add(total := total + length)
    return any(share * r not in ends for r in range(1, sp_size))


def layout_pack(doc_lens: Sequence[int], n_tokens: int, device: torch.device,
                parallel: Parallel | None = None) -> PackLayout:
    """Derive positions and cu_seqlens for the `n_tokens` tokens that this rank holds.

    Raises ValueError when `doc_lens` does not add up to this rank's tokens times the sp ranks.
    """
    sp_size, sp_rank = (parallel.sp_size, parallel.sp_rank) if parallel else (1, 0)
    if min(doc_lens, default=0) < 1 or sum(doc_lens) != n_tokens * sp_size:
        raise ValueError(f"doc_lens adds up to {sum(doc_lens)} with shortest "
                         f"{min(doc_lens, default=0)}, but there are {sp_size} x {n_tokens} tokens; "
                         "documents must be non-empty and fill the sequence exactly")
    lens = np.array(doc_lens)  # on the host: nothing here waits for the device
    ends = lens.cumsum()
    mine = slice(sp_rank * n_tokens, (sp_rank + 1) * n_tokens)
    positions = (np.arange(ends[-1]) - np.repeat(ends - lens, lens))[mine]
    group = None
    if parallel and crosses_ranks(doc_lens, sp_size):
        group = parallel.sp_group
    elif sp_size > 1:  # every share begins and ends with a document: keep mine, exchange nothing
        inside = (ends > mine.start) & (ends <= mine.stop)
        lens, ends = lens[inside], ends[inside] - mine.start
    cu_seqlens = np.insert(ends, 0, 0).astype(np.int32)
    return PackLayout(to_device(torch.from_numpy(positions), device),
                      to_device(torch.from_numpy(cu_seqlens), device), int(lens.max()), group)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy from the host without waiting for the GPU's queue, which unpinned memory would do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


# --- 5. What is kept for backward -----------------------------------------------------------------
#
# Backward needs what forward computed. At 64K tokens a rank, keeping it all takes 20 times the memory of the
# weights (README works it out). Each lever below computes something twice instead; none changes a number.


@dataclass(frozen=True)
class MemoryOptions:
    """What to trade for memory, the cheapest first."""

    loss_chunk_tokens: int = 8192  # hold the logits of so many tokens at a time; 0: of all
    activations: str = "keep"  # "recompute": keep only a block's input; "offload": and that on the host
    mlp_tile_tokens: int = 0  # work off what follows attention in tiles of so many tokens; 0: in one

    def __post_init__(self) -> None:
        if self.activations not in ("keep", "recompute", "offload"):
            raise ValueError(f"activations={self.activations!r} is unknown; choose keep, recompute or "
                             "offload")


def _recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call a function whose inputs alone are kept: backward calls it again. (Nothing here is random.)"""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class HostOffload:
    """Keeps what autograd saves (here: the inputs of recomputed blocks) in pinned host memory.

    The copies run on a stream of their own, beside the computation:

        forward    compute   block 0 | block 1 | block 2 |   backward   block 2 | block 1 | block 0
                   copy                0 ->      1 ->   2 ->   <- 2      <- 1      <- 0

    Pinning is slow, so buffers are made once and used again by every step. Two orders must hold, or
    gradients are silently wrong: a copy starts after its tensor is computed, and nobody reuses its memory
    before the copy has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # a CPU copies in order
        self.buffers: list[Tensor] = []
        self.coming: dict[int, tuple[Tensor, Any]] = {}  # buffer -> its copy, and the event of its arrival
        self.used = 0

    def saving(self) -> AbstractContextManager[Any]:
        """For the time of a forward pass, autograd saves here."""
        self.used = 0
        self.coming.clear()
        return torch.autograd.graph.saved_tensors_hooks(self._store, self._fetch)

    def _store(self, x: Tensor) -> int:
        i, self.used = self.used, self.used + 1
        if i == len(self.buffers):
            self.buffers.append(torch.empty(0))
        if self.buffers[i].shape != x.shape or self.buffers[i].dtype != x.dtype:
            self.buffers[i] = torch.empty_like(x, device="cpu", pin_memory=self.stream is not None)
        with self._beside():
            self.buffers[i].copy_(x, non_blocking=True)
        if self.stream is not None:
            x.record_stream(self.stream)  # its memory is not reused before this copy has ended
        return i

    def _fetch(self, i: int) -> Tensor:
        self._start(i)
        x, arrived = self.coming.pop(i)
        if i:
            self._start(i - 1)  # the block that backward comes to next
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)
        return x

    def _start(self, i: int) -> None:
        if i not in self.coming:
            x = torch.empty_like(self.buffers[i], device=self.device)
            with self._beside():
                x.copy_(self.buffers[i], non_blocking=True)
            self.coming[i] = x, self.stream.record_event() if self.stream is not None else None

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream for copies, after all that has been asked for so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield


# --- 6. The Transformer ---------------------------------------------------------------------------
#
# Modules carry Hugging Face's names, so that a checkpoint needs no translation table.

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> (T, H, D)


class RMSNorm(nn.RMSNorm):
    """Scale every row to a root mean square of 1 (1910.07467). PyTorch's is one kernel on a GPU only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.is_cuda else _NormRows.apply(x, self.weight, self.eps)


class _NormRows(torch.autograd.Function):
    """Keeps x and a number per row, where autograd would keep two more copies of x, and takes a third."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]  # (T, 1)
        scale = (mean_square + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        unit, grad = x.to(scale.dtype) * scale, grad.to(scale.dtype)
        along = grad * unit
        weight_grad = along.flatten(0, -2).sum(0).to(weight.dtype)  # (T, C) -> (C,)
        # What goes along x is lost: the row's length does not matter to its unit vector.
        along = (along @ weight.to(scale.dtype) / x.shape[-1]).unsqueeze(-1)  # (T, C) @ (C,) -> (T, 1)
        x_grad = (grad * weight).sub_(unit.mul_(along)).mul_(scale)
        return x_grad.to(x.dtype), weight_grad, None


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        family = ARCHITECTURES[config.family]
        self.q_proj = nn.Linear(config.dim, q_dim, bias=family.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=family.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=family.qkv_bias)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if family.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, C) -> (T, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, C) -> (T, H_kv, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return apply_rope(self.q_norm(q), *rope), apply_rope(self.k_norm(k), *rope), v


class MLP(nn.Module):
    """SwiGLU (2002.05202): a gate decides, per hidden unit, how much of `up` passes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: what each token does alone, attention, what each token does alone.

    Only attention looks at other tokens. So it stays outside of what `torch.compile` sees (documents of other
    lengths would compile anew), and what follows it can be worked off in tiles of tokens.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.memory = layer, MemoryOptions()
        self.input_layernorm = RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """x (T, C) -> (T, C)."""
        if self.memory.activations == "keep":
            return self.compute(x, rope, attend)
        return _recomputed(self.compute, x, rope, attend)

    def compute(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        out = attend(self.layer, *self.before_attention(x, rope))  # (T, H, D)
        tile = self.memory.mlp_tile_tokens
        if tile == 0 or tile >= len(x):
            return self.after_attention(x, out)
        tiles = zip(x.split(tile), out.split(tile), strict=True)  # (tile, C) and (tile, H, D)
        return torch.cat([_recomputed(self.after_attention, *part) for part in tiles])

    def before_attention(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(self.input_layernorm(x), rope)

    def after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(out.flatten(1))  # (T, H, D) -> (T, H*D) -> (T, C)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """A Llama over packed documents. All methods take T tokens (T,) and the documents' lengths."""

    def __init__(self, config: ModelConfig, backend: str = "auto") -> None:
        super().__init__()
        self.config, self.backend, self.memory = config, backend, MemoryOptions()
        self.offload: HostOffload | None = None
        self.files: dict[str, bytes] = {}  # what lies beside the weights: tokenizer, generation settings
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def init_weights(self, seed: int) -> Transformer:
        """Draw all weights from `seed`, with a deviation of 1/sqrt(C), less for what adds to the residual.

        For Llama's widths that is about the usual 0.02; at width 64 a deviation of 0.02 would start so
        faint that some seeds never get past half of the recall task (docs/LOG.md).
        """
        generator = torch.Generator(self.embed_tokens.weight.device).manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(weight)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
            else:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = 2 * self.config.n_layers if into_residual else 1
                nn.init.normal_(weight, std=(self.config.dim * depth) ** -0.5, generator=generator)
        return self

    def set_memory_options(self, levers: MemoryOptions, device: torch.device) -> None:
        """Choose what is kept for backward: for the whole model and each of its blocks."""
        self.memory = levers
        self.offload = HostOffload(device) if levers.activations == "offload" else None
        for block in self.layers:
            assert isinstance(block, Block)
            block.memory = levers

    def compile_blocks(self) -> None:
        """Compile each block's two token-wise halves; other numbers of tokens compile nothing anew."""
        for block in self.layers:
            for half in ("before_attention", "after_attention"):
                setattr(block, half, torch.compile(getattr(block, half), dynamic=True))

    def set_rope(self, rope_theta: float, max_seq_len: int) -> None:
        """Move to another context: a stage of the curriculum changes theta, not a single weight."""
        self.config = replace(self.config, rope_theta=rope_theta, max_seq_len=max_seq_len)

    def run_layers(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Embed (T,) and pass through all blocks and the last norm -> (T, C)."""
        x = self.embed_tokens(input_ids)  # (T,) -> (T, C)
        rope = rope_cos_sin(self.config, positions, x.dtype)
        with self.offload.saving() if self.offload and torch.is_grad_enabled() else nullcontext():
            for block in self.layers:
                x = block(x, rope, attend)
        return self.norm(x)

    def forward(self, input_ids: Tensor, doc_lens: Sequence[int],
                parallel: Parallel | None = None) -> Tensor:
        """Hidden states (T, C) of this rank's T tokens; `doc_lens` is of the whole sequence."""
        pack = layout_pack(doc_lens, len(input_ids), input_ids.device, parallel)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if pack.group is None:
                return document_attention(q, k, v, pack.cu_seqlens, pack.max_seqlen, self.backend)
            return ulysses_attention(q, k, v, pack.cu_seqlens, pack.max_seqlen, pack.group, self.backend)

        return self.run_layers(input_ids, pack.positions, attend)

    def logits(self, input_ids: Tensor, doc_lens: Sequence[int],
               parallel: Parallel | None = None) -> Tensor:
        """Scores of the next token, (T, V)."""
        return self.lm_head(Transformer.forward(self, input_ids, doc_lens, parallel))

    def is_right(self, input_ids: Tensor, labels: Tensor, doc_lens: Sequence[int],
             parallel: Parallel | None = None) -> Tensor:
        """Whether the likeliest next token is the label, (T,) bool; logits only where there is a label."""
        hidden = Transformer.forward(self, input_ids, doc_lens, parallel)
        wanted, found = labels != IGNORE_INDEX, torch.zeros_like(labels, dtype=torch.bool)
        found[wanted] = self.lm_head(hidden[wanted]).argmax(dim=-1) == labels[wanted]
        return found

    def loss(self, input_ids: Tensor, labels: Tensor, doc_lens: Sequence[int],
             parallel: Parallel | None = None) -> tuple[Tensor, Tensor]:
        """Sum of this rank's cross-entropies (nats), and how many labels took part.

        `labels` (T,) are already shifted; IGNORE_INDEX takes no part. A sum, so that train.py can
        divide by the valid tokens of the whole step (section A.3).
        """
        hidden = Transformer.forward(self, input_ids, doc_lens, parallel)
        return chunked_cross_entropy(hidden, self.lm_head.weight, labels,
                                     self.memory.loss_chunk_tokens or len(labels))


def flops_per_step(config: ModelConfig, doc_lens: Sequence[int]) -> float:
    """Floating-point operations to train on these documents once, forward and backward.

    6 per weight and token (2 forward, 4 backward), without the embedding table, which is only looked
    up, and without gains and biases, which are no matmuls; and 6 * n_layers * n_heads * head_dim *
    length^2 for causal attention inside each document.
    No credit for recomputation. Source: PaLM (2204.02311) appendix B, with real document lengths.
    """
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    per_layer = config.dim * (2 * q_dim + 2 * kv_dim + 3 * config.ffn_dim)
    weights = config.n_layers * per_layer + config.dim * config.vocab_size
    return (6.0 * weights * sum(doc_lens)
            + 6.0 * config.n_layers * q_dim * sum(length * length for length in doc_lens))


# --- 7. The loss ----------------------------------------------------------------------------------


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor,
                          chunk_tokens: int = 8192) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropies without ever holding all logits: hidden (T, C), weight (V, C).

    64K tokens of Llama-3 have 33.6 GB of float32 logits. Here a chunk's logits live only while the
    chunk is worked on, and backward computes them again. The matmul is in the inputs' dtype, the
    softmax in float32. Returns (loss_sum, valid_tokens); chunks with no valid label add exactly 0.
    """
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for part, target in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True):
        if len(labels) <= chunk_tokens:  # a single chunk is the peak either way: don't recompute
            total = total + _cross_entropy_sum(part, weight, target)
        else:
            total = total + _recomputed(_cross_entropy_sum, part, weight, target)
    return total, (labels != IGNORE_INDEX).sum()


def _cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)  # (chunk, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


# --- 8. Generation --------------------------------------------------------------------------------
#
# A new token attends to all tokens before it, so we keep their keys and values (the KV cache) and
# compute only the new token's. Several questions about one long context need the context's keys and
# values once: read the context, remember the cache's length, and set the length back to it after
# each question.
#
#     read(model, context, cache)             cache.length == 5000
#     read(model, question + answer, cache)   cache.length == 5040
#     cache.length = 5000                     the next question overwrites this one's keys

CHUNK_TOKENS = 1024  # of a prompt at a time: the rest of a pass's memory does not grow with the prompt


class KVCache:
    """The keys and values of one text, for every layer. Read on with `read`, write on with `stream`."""

    def __init__(self) -> None:
        self._length = 0
        self.room = 0  # tokens there is memory for
        self.layers: dict[int, Tensor] = {}  # layer -> (2, H_kv, room, D): keys, and values
        self.pending: list[int] = []  # tokens of the text that the model has yet to read

    @property
    def length(self) -> int:
        """How many tokens of the text have been read. Setting it lower cuts the text back."""
        return self._length

    @length.setter
    def length(self, n_tokens: int) -> None:
        self._length = n_tokens
        self.pending = []

    def reserve(self, n_tokens: int) -> None:
        """Make sure that `n_tokens` more fit. Room grows by half, so that copying stays linear."""
        needed = self.length + n_tokens
        if needed > self.room:
            self.room = max(needed + 256, self.room + self.room // 2)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the keys and values of t new tokens; let their queries look at the whole text so far.

        q (t, H, D), k and v (t, H_kv, D) -> (t, H, D).
        """
        begin, end = self.length, self.length + len(q)
        kv = self.layers.get(layer)
        if kv is None or kv.shape[2] < end:
            grown = k.new_empty(2, k.shape[1], self.room, k.shape[2])  # (2, H_kv, room, D)
            if kv is not None:
                grown[:, :, :begin] = kv[:, :, :begin]
            self.layers[layer] = kv = grown
        kv[0, :, begin:end] = k.transpose(0, 1)  # (t, H_kv, D) -> (H_kv, t, D)
        kv[1, :, begin:end] = v.transpose(0, 1)
        keys, values = kv[:, None, :, :end]  # 2 x (1, H_kv, end, D)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys, values,  # (t, H, D) -> (1, H, t, D)
            # not is_causal, which would align the first query with the first key
            attn_mask=causal_lower_right(len(q), end), enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)  # (1, H, t, D) -> (t, H, D)


def attend_with_my_heads(cache: KVCache, parallel: Parallel | None, layer: int, q: Tensor, k: Tensor,
                         v: Tensor) -> Tensor:
    """Attention through `cache`, whose heads the sp ranks share: (t, H, D) on all -> (t, H, D) on all.

    Each rank works out, and keeps the keys and values of, H/P heads. That is what a long text costs.
    """
    if parallel is None or parallel.sp_size == 1:
        return cache.attend(layer, q, k, v)
    P, rank = parallel.sp_size, parallel.sp_rank
    check_heads(P, q.shape[1], k.shape[1])
    q, k, v = (x.chunk(P, dim=1)[rank] for x in (q, repeat_heads(k, P), repeat_heads(v, P)))
    out = cache.attend(layer, q, k, v).contiguous()  # (t, H/P, D)
    gathered = out.new_empty(P, *out.shape)
    dist.all_gather_into_tensor(gathered, out, group=parallel.sp_group)  # (P, t, H/P, D)
    return gathered.transpose(0, 1).flatten(1, 2)  # -> (t, P, H/P, D) -> (t, H, D)


@torch.no_grad()
def read(model: Transformer, ids: Sequence[int] | Tensor, cache: KVCache, last: int = 1,
         chunk_tokens: int = CHUNK_TOKENS, parallel: Parallel | None = None) -> Tensor:
    """Read what comes next in the text of `cache`. Returns the logits after its last tokens, (last, V).

    The ids pass through the model `chunk_tokens` at a time: a prompt of 64K tokens needs the memory of
    its keys and values, and of one chunk. With `parallel` all ranks of an sp group make the same call.

    Raises ValueError for an id outside of the vocabulary.
    """
    ids = torch.as_tensor(ids, dtype=torch.long, device="cpu")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < model.config.vocab_size:
        raise ValueError(f"token ids {int(ids.min())} to {int(ids.max())} are not all in the model's "
                         f"vocabulary of {model.config.vocab_size}; use the model's own tokenizer")
    device = model.embed_tokens.weight.device
    cache.reserve(len(ids))
    attend = partial(attend_with_my_heads, cache, parallel)
    hidden = []
    for chunk in ids.to(device).split(chunk_tokens):
        positions = torch.arange(cache.length, cache.length + len(chunk), device=device)
        hidden.append(model.run_layers(chunk, positions, attend)[-last:])  # (t, C) -> (<= last, C)
        cache.length += len(chunk)
    return model.lm_head(torch.cat(hidden)[-last:])


def choose_token(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """The likeliest token (V,), or at a temperature one drawn from the likeliest that hold `top_p`."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = logits.float().cpu().div(temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0)  # those before are already enough
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def stream(model: Transformer, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: Collection[int] = (),
           temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, cache: KVCache | None = None,
           chunk_tokens: int = CHUNK_TOKENS, parallel: Parallel | None = None) -> Iterator[int]:
    """Write on after a prompt, token by token, up to a stop token (which is given out too) or the limit.

    Greedy unless `temperature` is above 0. With `cache` a conversation goes on: `prompt_ids` are only what
    is new since its last answer. Raises ValueError for an empty prompt and for numbers that cannot be.
    """
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more, and finite; "
                         f"top_p={top_p} must be above 0 and at most 1")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must not be negative")
    text = KVCache() if cache is None else cache
    if not len(prompt_ids) and not text.pending:
        raise ValueError("the prompt is empty; generation needs at least one token to start from")
    text.pending += [int(i) for i in prompt_ids]
    generator = torch.Generator().manual_seed(seed)

    def write() -> Iterator[int]:
        for _ in range(max_new_tokens):
            logits = read(model, text.pending, text, chunk_tokens=chunk_tokens, parallel=parallel)
            token = choose_token(logits[-1], temperature, top_p, generator)
            text.pending = [token]  # the next call, or the next turn, reads it
            yield token
            if token in stop_ids:
                return

    return write()  # the checks above have run by now; a generator would run them at the first token


def generate(model: Transformer, prompt_ids: Sequence[int], max_new_tokens: int,
             stop_ids: Collection[int] = (), **options: Any) -> list[int]:
    """The whole answer of `stream`, which has the options."""
    return list(stream(model, prompt_ids, max_new_tokens, stop_ids, **options))


# --- 9. Weights in and out: a Hugging Face folder -------------------------------------------------
#
#     config.json           which family, which shape, which RoPE
#     *.safetensors         a header in JSON (every tensor's name, dtype, shape, place), then the bytes;
#                           if there are several, an index says which tensor lies where
#     tokenizer.json, ...   files that belong to the model, passed on as they are
#
# All headers are read first: whatever is missing, left over or of another shape is named before any memory
# is taken. Then one tensor after another is mapped, and only the rows that this rank keeps are touched.

_HF_NAMES = {"model_type": "family", "vocab_size": "vocab_size", "hidden_size": "dim",
             "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
             "num_key_value_heads": "n_kv_heads", "head_dim": "head_dim", "intermediate_size": "ffn_dim",
             "max_position_embeddings": "max_seq_len", "rope_theta": "rope_theta",
             "rope_scaling": "rope_scaling", "rms_norm_eps": "norm_eps",
             "tie_word_embeddings": "tie_embeddings", "bos_token_id": "bos_token_id",
             "eos_token_id": "eos_token_id"}  # config.json's name -> ours
_STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_COMPANIONS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
               "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
               "chat_template.jinja")  # files that belong to a model and pass through unchanged
_INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # of one weight file


def _hf_key(name: str) -> str:
    return name if name.startswith("lm_head") else "model." + name


def write_model(model: Transformer, folder: Path, main: bool = True, shard_bytes: int = SHARD_BYTES) -> None:
    """Write weights, config.json and the model's other files into an existing folder.

    More than `shard_bytes` of weights go into several files and an index of them. Only one file's tensors
    are ever gathered at a time. Under FSDP all ranks must call it (gathering is a collective); only `main`
    writes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    failure: Exception | None = None
    shards: list[list[tuple[str, Tensor]]] = [[]]
    for name, parameter in model.named_parameters():  # a tied table is one parameter, and stored once
        if shards[-1] and sum(weight.nbytes for _, weight in shards[-1]) + parameter.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append((_hf_key(name), parameter))
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for key, weight in shard:
            full = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if main:
                tensors[key] = full.detach().cpu().contiguous()
            weight_map[key] = file
        if main and not failure:
            try:
                save_file(tensors, folder / file, metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                failure = error  # the other ranks still wait for this one in the next gather
    if failure:
        raise failure
    if not main:
        return
    if len(shards) > 1:
        size = sum(weight.nbytes for weight in model.parameters())
        _write_json(folder / _INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    config, family = asdict(model.config), ARCHITECTURES[model.config.family]
    _write_json(folder / "config.json", {
        "architectures": [family.architecture], "hidden_act": "silu", "attention_bias": family.qkv_bias,
        "mlp_bias": False, "use_sliding_window": False, "sliding_window": None,
        "torch_dtype": str(next(model.parameters()).dtype)[6:],
        **{theirs: config[ours] for theirs, ours in _HF_NAMES.items()}})
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config[key] is not None}
    _write_json(folder / "generation_config.json", ids)
    for name, content in model.files.items():
        (folder / name).write_bytes(content)


def _write_json(path: Path, entry: dict[str, Any]) -> None:
    path.write_text(json.dumps(entry, indent=2) + "\n")


def save_pretrained(model: Transformer, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Save as a Hugging Face folder, whole or not at all: written aside, then renamed."""
    with replaced_folder(Path(folder)) as temporary:
        write_model(model, temporary, shard_bytes=shard_bytes)


class replaced_folder:
    """`with replaced_folder(path) as temporary:` fills a folder that appears only when complete.

    Files are fsynced before the rename, so that after a crash there is the old folder or the new one
    (a crash between the two renames leaves the old one as `.old`; the next writer puts it back).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder.with_name(folder.name + ".writing")
        self.old = folder.with_name(folder.name + ".old")

    def __enter__(self) -> Path:
        self.recover()
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def recover(self) -> None:
        """Put the old folder back if the last writer died between its two renames."""
        if self.old.exists() and not self.folder.exists():
            self.old.rename(self.folder)

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        for path in [*self.temporary.rglob("*"), self.temporary]:
            _fsync(path)
        if self.folder.exists():  # a folder can't be renamed over a full one: step aside first
            shutil.rmtree(self.old, ignore_errors=True)
            self.folder.rename(self.old)
            self.temporary.rename(self.folder)
            _fsync(self.folder.parent)
            shutil.rmtree(self.old)
        else:
            self.temporary.rename(self.folder)
            _fsync(self.folder.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def read_config(folder: str | Path) -> ModelConfig:
    """Read config.json. Raises ValueError, by name, for what this model cannot represent.

    RoPE of type "dynamic" becomes a fixed theta. There, transformers lets theta grow with every text beyond
    the trained context; weights that are to be trained on need one. It is the theta that transformers
    uses for a text of factor * max_position_embeddings tokens, which becomes the context: logits are
    theirs at that length, and at no other.
    """
    path = Path(folder) / "config.json"
    try:
        entry = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable model configuration: {error}") from None
    try:
        return _parse_config(entry)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{path} is not a model that nanolong can be: {error}") from None


def _parse_config(entry: dict[str, Any]) -> ModelConfig:
    kind = entry.get("model_type") if isinstance(entry, dict) else type(entry).__name__
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(f"model_type is {kind!r}, only {', '.join(ARCHITECTURES)} are supported")
    if "sliding_window" not in entry:
        entry["sliding_window"] = 4096  # what it means in transformers, like the 1e-6 below
    entry = {"rms_norm_eps": 1e-6, **{k: v for k, v in entry.items() if v is not None}}
    if missing := {"hidden_size", "num_attention_heads", "max_position_embeddings"} - entry.keys():
        raise ValueError(f"{min(missing)!r} is missing")
    for key, supported in {"hidden_act": "silu", "attention_bias": ARCHITECTURES[kind].qkv_bias, "mlp_bias": False,
                           "partial_rotary_factor": 1, "rope_interleaved": False, "num_experts": 0,
                           "num_local_experts": 0, "quantization_config": {}}.items():
        if entry.get(key, supported) != supported:
            raise ValueError(f"{key} is {entry[key]!r}, only {supported!r} is supported")
    if _slides(kind, entry) and entry.get("sliding_window", math.inf) < entry["max_position_embeddings"]:
        raise ValueError(f"sliding_window={entry['sliding_window']} is in use (max_position_embeddings is "
                         f"{entry['max_position_embeddings']}); this model only has full attention")
    entry.setdefault("num_key_value_heads", entry["num_attention_heads"])
    entry.setdefault("head_dim", 128 if kind == "qwen3" else
                     entry["hidden_size"] // entry["num_attention_heads"])
    _parse_rope(entry)
    return ModelConfig(**{ours: entry[theirs] for theirs, ours in _HF_NAMES.items() if theirs in entry})


def _slides(kind: str, entry: dict[str, Any]) -> bool:
    """Whether transformers would give any layer of this model a sliding window."""
    if kind in ("qwen2", "qwen3"):
        if "layer_types" in entry:
            return "sliding_attention" in entry["layer_types"]
        return bool(entry.get("use_sliding_window")) and (
            entry.get("max_window_layers", 28) < entry.get("num_hidden_layers", 0))
    return kind == "mistral"


def _parse_rope(entry: dict[str, Any]) -> None:
    """Bring both layouts to one: `rope_theta` beside `rope_scaling`, or (newer) in `rope_parameters`."""
    rope, newer = entry.pop("rope_scaling", {}), entry.pop("rope_parameters", {})
    if not isinstance(rope, dict) or not isinstance(newer, dict):
        raise ValueError(f"rope_scaling={rope!r} and rope_parameters={newer!r} must be objects")
    rope, newer = dict(rope), dict(newer)
    theta = newer.pop("rope_theta", rope.pop("rope_theta", entry.get("rope_theta", 10_000.0)))
    if rope and newer and rope != newer:
        raise ValueError(f"rope_scaling={rope} and rope_parameters={newer} contradict each other")
    rope = {key: value for key, value in (newer or rope).items() if value is not None}
    kind, context = rope.get("rope_type", rope.get("type", "default")), entry["max_position_embeddings"]
    if kind == "dynamic":
        if unknown := rope.keys() - {"rope_type", "type", "factor"}:
            raise ValueError(f"rope_scaling of type 'dynamic' has an unknown entry {min(unknown)!r}")
        factor = _number(rope, "factor", minimum=1.0)
        entry["max_position_embeddings"] = round(factor * context)
        theta = ntk_rope_theta(theta, 1, factor * factor - (factor - 1), entry["head_dim"])
    elif kind in ("llama3", "yarn"):  # written down, because the context may grow and this must not
        rope["original_max_position_embeddings"] = entry.get(
            "original_max_position_embeddings", rope.get("original_max_position_embeddings", context))
    entry["rope_theta"] = theta
    entry["rope_scaling"] = None if kind == "dynamic" or rope in ({}, {"rope_type": "default"}) else rope


def load_pretrained(folder: str | Path, dtype: torch.dtype | None = None,
                    device: torch.device | str = "cpu") -> Transformer:
    """Load a model from a Hugging Face folder of safetensors. `dtype` None keeps each tensor's own.

    Raises ValueError, naming file and tensor, before any weight is read: see `find_weights`.
    """
    return load_weights(empty_pretrained(folder, dtype), folder, device)


def empty_pretrained(folder: str | Path, dtype: torch.dtype | None = None) -> Transformer:
    """A folder's model with shapes and no memory (on the meta device), once its files are seen to fit.

    Between this and `load_weights` it can be sharded; each rank then reads only the rows that it keeps.
    """
    with torch.device("meta"):
        model = Transformer(read_config(folder))
    _, dtypes = find_weights(Path(folder), model)
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(dtype or dtypes[name])
    return model


def load_weights(model: Transformer, folder: str | Path, device: torch.device | str = "cpu") -> Transformer:
    """Give a model of this folder memory on `device`, and fill it, or under FSDP this rank's part of it.

    At its peak, host memory holds what the model keeps there and once more its part of one tensor.
    """
    from safetensors import safe_open

    folder = Path(folder)
    files, _ = find_weights(folder, model)
    model.to_empty(device=device)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight  # to_empty has made them two
    for name, weight in model.named_parameters():
        mine, rows = local_rows(weight)
        # opened anew each time: pages of a mapped file count as this process's memory until it is closed
        with safe_open(files[name], framework="pt") as file, torch.no_grad():
            mine.copy_(file.get_slice(_hf_key(name))[rows])
    model.files = {name: (folder / name).read_bytes() for name in _COMPANIONS if (folder / name).is_file()}
    return model


def local_rows(weight: Tensor) -> tuple[Tensor, slice]:
    """This rank's part of a weight, and which of its rows they are: FSDP2 deals ceil(n / ranks) to each."""
    if not isinstance(weight, DTensor):
        return weight, slice(0, weight.shape[0])
    share = -(-weight.shape[0] // weight.device_mesh.size())
    begin = min(share * weight.device_mesh.get_local_rank(), weight.shape[0])
    return weight.to_local(), slice(begin, begin + weight.to_local().shape[0])


def find_weights(folder: Path, model: Transformer) -> tuple[dict[str, Path], dict[str, torch.dtype]]:
    """For each parameter, the file that holds it and its dtype there. Reads the files' headers alone.

    Raises ValueError when a tensor is missing, left over, there twice, or of another shape or kind.
    """
    from safetensors import SafetensorError, safe_open

    tied = model.config.tie_embeddings
    names = {_hf_key(name): name for name, _ in model.named_parameters()}
    shapes = {_hf_key(name): list(weight.shape) for name, weight in model.named_parameters()}
    files: dict[str, Path] = {}
    dtypes: dict[str, torch.dtype] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                kinds = {key: (part.get_shape(), part.get_dtype()) for key, part in found.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
        for key, (shape, dtype) in kinds.items():
            if key.endswith("rotary_emb.inv_freq") or (key == "lm_head.weight" and tied):
                continue  # older writers store what config.json says, and a tied table twice
            if key not in names:
                raise ValueError(f"{path} holds {key!r}, which a model of this config.json does not have")
            if shape != shapes[key]:
                raise ValueError(f"{path}: {key!r} is {tuple(shape)}, config.json says {tuple(shapes[key])}")
            if dtype not in _STORED_DTYPES:
                raise ValueError(f"{path}: {key!r} is {dtype}, not one of {', '.join(_STORED_DTYPES)}")
            if names[key] in files:
                raise ValueError(f"{key!r} is in both {files[names[key]]} and {path}")
            files[names[key]], dtypes[names[key]] = path, _STORED_DTYPES[dtype]
    if missing := [key for key, name in names.items() if name not in files]:
        raise ValueError(f"{folder} lacks {len(missing)} tensors, the first is {min(missing)!r}")
    return files, dtypes


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names (which must lie in the folder)."""
    index = folder / _INDEX
    if not index.exists():
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
        if pickles and not (folder / "model.safetensors").exists():
            raise ValueError(f"{folder} holds weights as pickle alone ({pickles[0]}), which can run code "
                             "when read; get the model's safetensors, or convert it where that does no harm")
        return [folder / "model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not a readable index of shards: {error!r}") from None
    if bad := [name for name in names
               if not isinstance(name, str) or Path(name).name != name or name in ("", "..")]:
        raise ValueError(f"{index} names {bad[0]!r}, which is not a file of this folder")
    return [folder / name for name in names]


# --- 10. What the machine can do ------------------------------------------------------------------

_PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense, from the vendor's datasheets


@lru_cache
def device_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s for MFU: the datasheet's for known GPUs in 16 bit, else a matmul timed here."""
    import time

    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for known, peak in _PEAK_BF16.items():
            if known in name:
                return peak
    n = 4096 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    best = math.inf
    for _ in range(8):
        begin = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, by its capability flag (never by timing)."""
    capability = torch.backends.cpu.get_cpu_capability()
    return capability != "DEFAULT" and bool(torch.cpu._is_avx512_bf16_supported())


# --- 11. Look at a model, or hand it on -----------------------------------------------------------
#
#     python model.py info llama3-8b --length 512k       a preset or a folder: shape, RoPE, memory
#     python model.py export runs/tiny/checkpoints/ultra-100 exported --dtype bfloat16
#
# A checkpoint also holds Adam's moments, which programs that read every safetensors file of a folder would
# take for weights. `export` writes the model alone, in the dtype that it will be used in.


def describe(name: str, seq_len: int | None = None) -> str:
    """What `info` prints about a preset or a folder, whose files it checks but does not read."""
    files: set[Path] = set()
    if Path(name).is_dir():
        model = empty_pretrained(name)
        files = set(find_weights(Path(name), model)[0].values())
    else:
        with torch.device("meta"):
            model = Transformer(preset_config(name, vocab_size=295))  # tiny's: the embedded tokenizer's
    c, table = model.config, model.embed_tokens.weight.numel()
    seq_len, scaling = seq_len or c.max_seq_len, c.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "none"))
    keys = 2 * c.n_layers * c.n_kv_heads * c.head_dim * seq_len  # and values
    numel = sum(weight.numel() for weight in model.parameters())
    slowest = 2 * math.pi / float(rope_frequencies(c)[0].min())
    lines = [
        f"{name}: {c.family}, {numel:,} parameters, {table:,} of them the embedding table"
        + (", which is the output table too" if c.tie_embeddings else ""),
        f"  dim {c.dim}, n_layers {c.n_layers}, n_heads {c.n_heads}, n_kv_heads {c.n_kv_heads}, head_dim "
        f"{c.head_dim}, ffn_dim {c.ffn_dim}, vocab_size {c.vocab_size}",
        f"  context {c.max_seq_len:,}; rope_theta {c.rope_theta:,.0f}, rope_scaling {kind}"
        + (f" x {scaling['factor']:g}" if "factor" in scaling else "")
        + f"; the slowest pair of dimensions turns once in {slowest:,.0f} tokens",
        f"  GiB to read one text of {seq_len:,} tokens"]
    for dtype in (torch.float32, torch.bfloat16):
        gib = dtype.itemsize / 2**30
        lines.append(f"    {str(dtype)[6:]:<9} weights {numel * gib:8.3f}   "
                     f"keys and values {keys * gib:8.3f}")
    if files:
        dtypes = sorted({str(weight.dtype)[6:] for weight in model.parameters()})
        lines.append(f"  on disk: {', '.join(dtypes)}, {len(files)} files, "
                     f"{sum(path.stat().st_size for path in files) / 2**30:.2f} GiB; beside them: "
                     + (", ".join(f for f in _COMPANIONS if (Path(name) / f).is_file()) or "nothing"))
    return "\n".join(lines)


def export(folder: str, out: str, dtype: torch.dtype) -> None:
    """Write a checkpoint's model, and what belongs to it, into a new folder."""
    if Path(out).exists():
        raise ValueError(f"{out} exists already; name a new folder, or remove this one")
    save_pretrained(load_pretrained(folder, dtype), out)


def main() -> None:
    import argparse
    import sys

    parser = argparse.ArgumentParser(description="Look at a model, or hand it on.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("info", help="parameters, shape, RoPE and memory")
    look.add_argument("model", help=f"a model's folder, or one of {', '.join(PRESETS)}")
    look.add_argument("--length", help="tokens of the text whose memory is counted (default: the context)",
                      type=lambda text: int(text.rstrip("km")) << {"k": 10, "m": 20}.get(text[-1:], 0))
    hand = commands.add_parser("export", help="write the model alone, for transformers, vLLM and others")
    hand.add_argument("model", help="a model's folder, or a run's checkpoint")
    hand.add_argument("out", help="the new folder")
    hand.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    args = parser.parse_args()
    try:
        if args.command == "info":
            print(describe(args.model, args.length))
        else:
            export(args.model, args.out, getattr(torch, args.dtype))
            print(f"written: {args.out}")
    except (ValueError, OSError) as error:
        print(f"model.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
