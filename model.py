"""The model: a Llama whose attention stops at document boundaries and can be shared by many ranks.

Long-context training feeds a model *packed* sequences: many documents laid end to end, or one that
fills everything. Nothing may leak from one document into the next. What that takes is derived from
one tuple on the host, `doc_lens`, and never from end-of-text tokens:

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

All else in a Llama works on single tokens. So the model is *batch-free*: tensors are (T, ...), T
tokens of documents laid end to end, and only attention asks which of them belong together.

Shapes: S tokens of the whole sequence, P seq_parallel_size, T = S/P tokens of this rank,
H query heads, H_kv key/value heads, D head dim, C model dim, V vocabulary, N documents.

    python model.py info llama3-8b --length 512k       a preset or a folder: shape, RoPE, memory
    python model.py export runs/tiny/checkpoints/ultra-56 exported --dtype bfloat16

Sources: ProLong (arXiv 2410.02660) section 6.1, B.1, B.2, A.3; RoPE (2104.09864); Ulysses
(2309.14509). Unlike in ProLong's code, positions restart at every document.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention.bias import causal_lower_right
from torch.utils import checkpoint as remat  # rematerialization: activation checkpointing

from support import card, hf
from support.cli import choose, parse_length, run_main
from support.files import read_json, whole_folder
from support.hf import ARCHITECTURES
from support.machine import PRESETS, format_shape, start_distributed, to_device
from support.machine import device_peak_flops as device_peak_flops
from support.machine import flops_per_step as flops_per_step
from support.memory import valid_seq_parallel_sizes as valid_seq_parallel_sizes

IGNORE_INDEX = -100  # a label that is not trained on; the value PyTorch's cross_entropy skips

# --- 1. Configuration -------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama, in Llama's own names."""

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_seq_len: int
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None  # as in config.json
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    family: str = "llama"
    bos_token_id: int | None = None  # passed on to whoever generates text with the saved model
    eos_token_id: int | list[int] | None = None


def preset_config(name: str, vocab_size: int) -> ModelConfig:
    """Look up a preset. `vocab_size` is the tokenizer's; a preset may leave it open."""
    preset = choose("model", name, PRESETS)
    if 0 < preset["vocab_size"] < vocab_size:
        raise ValueError(f"model {name!r} has {preset['vocab_size']} token ids, but the tokenizer "
                         f"uses {vocab_size}; choose the tokenizer that belongs to the model")
    return ModelConfig(**{**preset, "vocab_size": preset["vocab_size"] or vocab_size})


# --- 2. RoPE, and how to stretch it -----------------------------------------------------
#
# RoPE turns each pair of dimensions of a query or key by position * frequency, so that their
# product depends only on the distance between the two tokens. A larger base theta slows all
# rotations: the slow pairs stay nearly still over the longer context, and what the model learned
# about content still matches. ProLong raises theta 5e5 -> 8e6 (64K) -> 1.28e8 (512K): 6.1, B.1.


def ntk_rope_theta(theta: float, from_len: float, to_len: float, head_dim: int) -> float:
    """The base that dynamic NTK suggests for a longer context: theta * t^(d/(d-2)), t = to/from.

    A shorter one keeps theta. The paper goes about twice as far (8e6 where this says 4.1e6): B.1.
    """
    return theta * max(1, to_len / from_len) ** (head_dim / (head_dim - 2))


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Return the rotation per position of each dimension pair, and a factor on cos and sin.

    (D/2,) float64 radians per token, and a number that is 1 except for YaRN.
    """
    head_dim, theta = config.head_dim, config.rope_theta
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim  # (D/2,)
    inv_freq = theta ** -exponents
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "default":
        return inv_freq, 1.0
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":  # position interpolation (2306.15595)
        return inv_freq / factor, 1.0

    # Both others divide only the slow pairs. `keep` is 1 for fast ones, 0 for slow ones.
    original = scaling["original_max_position_embeddings"]
    if scaling["rope_type"] == "llama3":  # a ramp in the turns made over the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * inv_freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return inv_freq * keep + inv_freq / factor * (1 - keep), 1.0

    def pair_with_turns(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    # YaRN (2309.00071): a ramp in the pair's index, and a temperature.
    first = pair_with_turns(scaling.get("beta_fast") or 32.0)
    last = pair_with_turns(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = (last - first) or 0.001  # a ramp of no width would divide by zero
    keep = 1 - ((torch.arange(head_dim // 2).double() - first) / width).clamp(0, 1)
    temperature = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0  # equation 22
    attention_factor = scaling.get("attention_factor") or temperature
    return inv_freq * keep + inv_freq / factor * (1 - keep), attention_factor


def rope_cos_sin(config: ModelConfig, positions: Tensor,
                 dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Turn positions (T,) into cos and sin, (T, 1, D/2) each, in float32 or wider.

    bfloat16 would round a position such as 15,962 by up to 32, and its cosine would be noise.
    """
    inv_freq, factor = rope_frequencies(config)
    inv_freq = to_device(inv_freq, positions.device)
    angles = positions.double()[:, None, None] * inv_freq  # (T, 1, D/2)
    wide = torch.promote_types(dtype, torch.float32)
    return (angles.cos() * factor).to(wide), (angles.sin() * factor).to(wide)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (T, H, D). Dimensions i and i + D/2 are a pair, as in Hugging Face's weights."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)  # 2 x (T, H, D/2)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


# --- 3. Attention within documents ------------------------------------------------------


def attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
                        max_seqlen: int) -> Tensor:
    """Attention with the mask of the file's picture written out: the explanation and the oracle.

    q (T, H, D), k and v (T, H_kv, D) -> (T, H, D). It builds (H, T, T): for short texts.
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
    """PyTorch's `scaled_dot_product_attention`, once for all documents of a length. Runs anywhere.

    Of documents of 5, 3 and 5 tokens, one is a batch of its own; the others are a batch of two.
    """
    lens = [end - start for start, end in pairwise(cu_seqlens.tolist())]
    documents = torch.arange(len(q)).split(lens)  # the rows of each
    rows = torch.cat(sorted(documents, key=len)).to(q.device)  # (T,) a permutation
    counts = Counter(length for length in sorted(lens) if length > 0)
    sizes = [length * count for length, count in counts.items()]
    groups = zip(*(x[rows].split(sizes) for x in (q, k, v)), strict=True)
    outputs = []
    for (length, count), qkv in zip(counts.items(), groups, strict=True):
        # (count*length, H, D) -> (count, length, H, D) -> (count, H, length, D). Inputs must be
        # 4-D: with 3-D ones PyTorch on a CPU quietly builds the whole matrix of scores.
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # -> (count*length, H, D)
    return torch.cat(outputs)[rows.argsort()]  # (T, H, D), in the pack's order again


def attention_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
                     max_seqlen: int) -> Tensor:
    """PyTorch's flash attention for documents of any lengths in one kernel (CUDA, 16 bit)."""
    from torch.nn.attention.varlen import varlen_attn

    if max_seqlen == len(q):  # one document: dense kernels are faster (cuDNN's on Hopper)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (T, H, D) -> (1, H, T, D)
        dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return dense[0].transpose(0, 1)  # (1, H, T, D) -> (T, H, D)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
                      window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(out, Tensor)  # it is a pair only when the log-sum-exp is asked for
    return out


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]] = {
    "varlen": attention_varlen, "sdpa": attention_sdpa, "reference": attention_reference}


def backend_for(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that `auto` means here: varlen needs CUDA and 16 bit."""
    fits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "varlen" if fits else "sdpa"


def document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                       backend: str = "auto") -> Tensor:
    """Causal attention inside each document: (T, H, D) and 2 x (T, H_kv, D) -> (T, H, D).

    `cu_seqlens` (N + 1,) int32 holds the documents' ends, from 0 to T; `max_seqlen` the longest.
    Source: ProLong section 6.1 and B.2 (Table 20: masks help both long and short tasks).
    """
    if backend == "auto":
        backend = backend_for(q.device, q.dtype)
    return choose("attention backend", backend, BACKENDS)(q, k, v, cu_seqlens, max_seqlen)


# --- 4. The Transformer -----------------------------------------------------------------
#
# Modules have Hugging Face's names, so that a checkpoint needs no translation.

Rope = tuple[Tensor, Tensor]  # cos and sin, (T, 1, D/2) each
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> (T, H, D)


class SelfAttention(nn.Module):
    """The projections; attention itself is called by the block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_dim = config.n_heads * config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        architecture = ARCHITECTURES[config.family]
        self.q_proj = nn.Linear(config.dim, q_dim, bias=architecture.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=architecture.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=architecture.qkv_bias)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        norm = nn.RMSNorm if architecture.qk_norm else nn.Identity  # which ignores its arguments
        self.q_norm = norm(config.head_dim, eps=config.norm_eps)
        self.k_norm = norm(config.head_dim, eps=config.norm_eps)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, C) -> (T, H*D) -> (T, H, D)
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
    """One layer. Only attention mixes tokens. The parts before and after it treat every token
    separately, so they can be compiled, and the second can be computed in tiles of tokens.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.memory = layer, MemoryOptions()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = MLP(config)

    def before_attention(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(self.input_layernorm(x), rope)

    def after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(out.flatten(1))  # (T, H, D) -> (T, H*D) -> (T, C)
        return x + self.mlp(self.post_attention_layernorm(x))

    def compute(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """x (T, C) -> (T, C)."""
        q, k, v = self.before_attention(x, rope)
        out = attend(self.layer, q, k, v)  # (T, H, D)
        x = x[-len(out):]  # from `read` the last layer gets the last tokens' outputs alone
        tile = self.memory.mlp_tile_tokens
        if tile == 0 or tile >= len(x):
            return self.after_attention(x, out)
        tiles = zip(x.split(tile), out.split(tile), strict=True)  # (tile, C) and (tile, H, D)
        return torch.cat([recomputed(self.after_attention, *pair) for pair in tiles])

    def forward(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        # We recompute inside of forward, so that FSDP gathers the weights around it.
        if self.memory.activations == "keep":
            return self.compute(x, rope, attend)
        kept = attention_kept if self.memory.activations == "attention" else remat.noop_context_fn
        return recomputed(self.compute, x, rope, attend, context_fn=kept)


class Transformer(nn.Module):
    """A Llama over packed documents: methods take tokens (T,) and the documents' lengths."""

    def __init__(self, config: ModelConfig, backend: str = "auto") -> None:
        super().__init__()
        self.config, self.backend, self.memory = config, backend, MemoryOptions()
        self.files: dict[str, bytes] = {}  # what lies beside the weights: tokenizer, settings
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def run_layers(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Embed (T,) and pass through all blocks and the last norm -> (T, C)."""
        x = self.embed_tokens(input_ids)  # (T,) -> (T, C)
        rope = rope_cos_sin(self.config, positions, x.dtype)
        offload = self.memory.activations == "offload" and torch.is_grad_enabled()
        with save_on_cpu(pin_memory=x.is_cuda) if offload else nullcontext():
            for block in self.layers:
                x = block(x, rope, attend)
        return self.norm(x)

    def forward(self, input_ids: Tensor, doc_lens: Sequence[int],
                parallel: Parallel | None = None) -> Tensor:
        """Hidden states (T, C) of this rank's T tokens; `doc_lens` is of the whole sequence."""
        pack = layout_pack(doc_lens, len(input_ids), input_ids.device, parallel)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ulysses_attention(q, k, v, pack.cu_seqlens, pack.max_seqlen, pack.group,
                                     self.backend, self.memory.head_chunks)

        return self.run_layers(input_ids, pack.positions, attend)

    def logits(self, input_ids: Tensor, doc_lens: Sequence[int],
               parallel: Parallel | None = None) -> Tensor:
        """Scores of the next token, (T, V)."""
        return self.lm_head(Transformer.forward(self, input_ids, doc_lens, parallel))

    def loss(self, input_ids: Tensor, labels: Tensor, doc_lens: Sequence[int],
             parallel: Parallel | None = None, by_token: bool = False) -> tuple[Tensor, Tensor]:
        """Sum of this rank's cross-entropies (nats), and how many labels took part.

        `labels` (T,) are already shifted. With `by_token` we return each token's loss (T,) instead
        of their sum. train.py divides by the valid tokens of the whole step (section A.3).
        """
        hidden = Transformer.forward(self, input_ids, doc_lens, parallel)
        chunk_tokens = self.memory.loss_chunk_tokens or len(labels)
        losses = chunked_cross_entropy(hidden, self.lm_head.weight, labels, chunk_tokens)
        return losses if by_token else losses.sum(), (labels != IGNORE_INDEX).sum()

    def is_right(self, input_ids: Tensor, labels: Tensor, doc_lens: Sequence[int],
                 parallel: Parallel | None = None) -> Tensor:
        """Whether the likeliest next token is the label, (T,) bool. Without a label it is not."""
        hidden = Transformer.forward(self, input_ids, doc_lens, parallel)
        asked = labels != IGNORE_INDEX
        right = self.lm_head(hidden[asked]).argmax(dim=-1) == labels[asked]
        return asked.masked_scatter(asked, right)

    def init_weights(self, seed: int) -> Transformer:
        """Draw all weights with a deviation of 1/sqrt(C), less for what adds to the residual.

        For Llama's widths that is about the usual 0.02. At width 64, with 0.02 some seeds never get
        past half of the recall task (docs/LOG.md).
        """
        generator = torch.Generator(self.embed_tokens.weight.device).manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(weight)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
            else:
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))  # twice in each layer
                variance = 1 / (self.config.dim * (2 * self.config.n_layers if adds else 1))
                nn.init.normal_(weight, std=variance ** 0.5, generator=generator)
        return self

    def set_rope(self, rope_theta: float, max_seq_len: int) -> None:
        """Move to another context: a stage changes theta, and no weight."""
        self.config = replace(self.config, rope_theta=rope_theta, max_seq_len=max_seq_len)

    def set_memory_options(self, options: MemoryOptions) -> None:
        """Set what is kept for backward, here and in each block; train.py chooses it."""
        for module in (self, *self.layers):
            module.memory = options

    def compile_blocks(self) -> None:
        """Compile all but attention, which other document lengths would compile anew."""
        for block in self.layers:
            for half in ("before_attention", "after_attention"):
                setattr(block, half, torch.compile(getattr(block, half), dynamic=True))


# --- 5. The loss, and what is kept for backward -----------------------------------------
#
# Backward needs what forward computed. At 64K tokens a rank, keeping it all takes 20 times the
# memory of the weights (docs/512K.md). Each option computes some twice, and none changes a number.


@dataclass(frozen=True)
class MemoryOptions:
    """What to trade for memory, the cheapest first."""

    loss_chunk_tokens: int = 2048  # hold the logits of so many tokens at a time; 0: of all
    # Of a block keep all, or its input and what attention gave, or its input, or that on the host.
    activations: str = "keep"  # or "attention", "recompute", "offload"
    mlp_tile_tokens: int = 0  # compute what follows attention in tiles of so many tokens; 0: in one
    head_chunks: int = 1  # exchange and attend to a rank's heads in so many parts

    def __post_init__(self) -> None:
        ways = ("keep", "attention", "recompute", "offload")
        choose("activations", self.activations, dict.fromkeys(ways))


def recomputed(function: Callable[..., Tensor], *args: Any,
               context_fn: Callable[[], Any] = remat.noop_context_fn) -> Tensor:
    """Activation checkpointing: keep only inputs; backward calls the function again."""
    return remat.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False,
                            context_fn=context_fn)


def attention_kept() -> Any:
    """Keep what attention's kernels give, too: in long documents it is the dearest to compute."""
    save, recompute = remat.CheckpointPolicy.MUST_SAVE, remat.CheckpointPolicy.PREFER_RECOMPUTE

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> remat.CheckpointPolicy:
        return save if "_attention" in str(op) or "_varlen_attn" in str(op) else recompute

    return remat.create_selective_checkpoint_contexts(policy)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor,
                          chunk_tokens: int = 2048) -> Tensor:
    """Each label's cross-entropy without ever holding all logits: hidden (T, C), weight (V, C).

    64K tokens of Llama-3 have 33.6 GB of float32 logits. We hold those of a chunk at a time, and
    backward computes them again. The matmul is in the inputs' dtype, the softmax in float32.
    Returns (T,), exactly 0 where there is no label.
    """
    if len(labels) <= chunk_tokens:  # a single chunk: to compute it twice would save nothing
        return cross_entropy(hidden, weight, labels)
    chunks = zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
    return torch.cat([recomputed(cross_entropy, part, weight, target) for part, target in chunks])


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)  # (chunk, C) -> (chunk, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")


# --- 6. Many ranks: Parallel and the Ulysses exchange -----------------------------------
#
# Ranks form a grid (dp, sp). The sp ranks of a row hold consecutive parts of one sequence; rows
# hold different sequences. Every layer but attention needs only its own tokens. For attention,
# Ulysses trades tokens for heads: before, each rank has all heads of its tokens; after, all tokens
# of its heads. With P = 2 ranks, H = 2 heads and S = 4 tokens:
#
#            before              after
#          head 0  head 1      head 0  head 1            before (T, H, D), after (S, H/P, D)
#      a   [ rank 0     ]      [  r  ][  r  ]
#      b   [ rank 0     ]      [  a  ][  a  ]            sent per rank and layer, forward:
#      c   [ rank 1     ]      [  n  ][  n  ]            T*D*(2H + 2*kv) * (P-1)/P elements,
#      d   [ rank 1     ]      [ k 0 ][ k 1 ]            kv = max(H_kv, P)


@dataclass(frozen=True)
class Parallel:
    """Which ranks exist, which one this is, and where it computes."""

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
        """This rank prints and writes."""
        return self.rank == 0

    def all_sum(self, value: Tensor) -> Tensor:
        """Sum a number over all ranks, in float64. It stays on the device: nobody waits."""
        total = value.to(self.device, torch.float64)
        dist.all_reduce(total)
        return total


def init_parallel(seq_parallel_size: int | None = None) -> Parallel:
    """Start torch.distributed from torchrun's variables, or alone, and lay ranks out as (dp, sp).

    Ranks of one sp group are neighbours: on a node with 8 GPUs the exchange stays inside the node.
    """
    sp_size = seq_parallel_size or 1
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if sp_size < 1 or world % sp_size:
        raise ValueError(f"{world} ranks cannot form groups of seq_parallel_size={sp_size}; "
                         f"choose a divisor of {world}")
    device = start_distributed(world)
    dp_size = world // sp_size
    mesh = init_device_mesh(device.type, (dp_size, sp_size), mesh_dim_names=("dp", "sp"))
    world_mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("world",))
    return Parallel(mesh, world_mesh, device, rank, world, dp_rank=rank // sp_size, dp_size=dp_size,
                    sp_rank=rank % sp_size, sp_size=sp_size)


def check_heads(P: int, n_heads: int, n_kv_heads: int, chunks: int = 1) -> None:
    """Raise ValueError if P ranks cannot share the heads, or not in so many chunks each."""
    sizes = valid_seq_parallel_sizes(n_heads, n_kv_heads)
    if P * chunks not in sizes:
        times = f" times head_chunks={chunks}" if chunks > 1 else ""
        raise ValueError(f"{n_heads} query heads and {n_kv_heads} KV heads cannot be shared by "
                         f"seq_parallel_size={P}{times}; choose one of {sizes}")


class Exchange(torch.autograd.Function):
    """Send x[j] to rank j and receive rank i's part as out[i]. Its backward is itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()  # before empty_like, which would copy x's strides
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Exchange.apply(grad, ctx.group), None


def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                      group: dist.ProcessGroup | None, backend: str = "auto",
                      chunks: int = 1) -> Tensor:
    """Document attention over a sequence whose tokens are spread over the ranks of a group.

    q (T, H, D), k and v (T, H_kv, D) -> (T, H, D); `cu_seqlens` is that of all S tokens. K and V
    travel with their own heads, unless these are fewer than the ranks. A rank's query heads go in
    `chunks`, one after another. Source: 2309.14509; ProLong A.3; for the chunks 2602.21196.
    """
    P = dist.get_world_size(group) if group else 1
    T, H, H_kv = q.shape[0], q.shape[1], k.shape[1]
    check_heads(P, H, H_kv, chunks)
    if P * chunks == 1:
        return document_attention(q, k, v, cu_seqlens, max_seqlen, backend)
    if H_kv < P:  # each KV head goes to all ranks whose query heads need it
        k, v = (x.repeat_interleave(P // H_kv, dim=1) for x in (k, v))  # (T, H_kv, D) -> (T, P, D)
    q, k, v = (x.unflatten(1, (P, -1)) for x in (q, k, v))  # (T, P, heads of a rank, D)
    h, kv, outs = H // P // chunks, k.shape[2], []
    exchange = (lambda x: Exchange.apply(x, group)) if group else (lambda x: x)
    for i, x in enumerate(q.split(h, dim=2)):
        if i == 0:  # keys and values travel once, with the first queries
            x = torch.cat([x, k, v], dim=2)
        x = exchange(x.transpose(0, 1)).flatten(0, 1)  # (P, T, ., D): P by head -> by token -> S
        if i == 0:
            x, k, v = x.split([h, kv, kv], dim=1)
        own = slice(i * kv // chunks, -(-(i + 1) * kv // chunks))  # this chunk's KV heads
        out = document_attention(x, k[:, own], v[:, own], cu_seqlens, max_seqlen, backend)
        outs.append(exchange(out.unflatten(0, (P, T))).transpose(0, 1))  # by token -> (T, P, h, D)
    return torch.cat(outs, dim=2).flatten(1, 2)  # (T, P, heads of a rank, D) -> (T, H, D)


class PackLayout(NamedTuple):
    """What one forward pass derives from `doc_lens`, once."""

    positions: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (N + 1,) int32: of the whole sequence if `group`, else of this rank's part
    max_seqlen: int
    group: dist.ProcessGroup | None  # the ranks to exchange with, if they must


def crosses_ranks(doc_lens: Sequence[int], sp_size: int) -> bool:
    """Whether any document lies on more than one of `sp_size` equal shares of the sequence.

    Only then is the Ulysses exchange needed. The tempting test, "no document is longer than a
    share", is wrong: in (6, 4, 6) over two ranks the 4 lies on both, though 6 < 8.
    """
    share = sum(doc_lens) // sp_size
    ends = set(accumulate(doc_lens))
    return any(share * rank not in ends for rank in range(1, sp_size))


def layout_pack(doc_lens: Sequence[int], n_tokens: int, device: torch.device,
                parallel: Parallel | None = None) -> PackLayout:
    """Derive positions and cu_seqlens for the `n_tokens` tokens of this rank."""
    sp_size, sp_rank = (parallel.sp_size, parallel.sp_rank) if parallel else (1, 0)
    if min(doc_lens, default=0) < 1 or sum(doc_lens) != n_tokens * sp_size:
        raise ValueError(f"doc_lens adds up to {sum(doc_lens)}, but there are {sp_size} x "
                         f"{n_tokens} tokens; documents must be non-empty and fill the sequence")
    lens = np.array(doc_lens)  # on the host: nothing here waits for the device
    ends = lens.cumsum()
    begin, end = sp_rank * n_tokens, (sp_rank + 1) * n_tokens  # this rank's share
    positions = (np.arange(ends[-1]) - np.repeat(ends - lens, lens))[begin:end]
    group = None
    if parallel and crosses_ranks(doc_lens, sp_size):
        group = parallel.sp_group
    elif sp_size > 1:  # every share begins and ends with a document: keep mine, exchange nothing
        mine = (ends > begin) & (ends <= end)
        lens, ends = lens[mine], ends[mine] - begin
    cu_seqlens = np.insert(ends, 0, 0).astype(np.int32)
    return PackLayout(to_device(torch.from_numpy(positions), device),
                      to_device(torch.from_numpy(cu_seqlens), device), int(lens.max()), group)


# --- 7. Generation ----------------------------------------------------------------------
#
# A new token attends to all tokens before it, so we keep their keys and values (the KV cache).
# Several questions about one context share its part:
#
#     read(model, context, cache)             cache.length == 5000
#     read(model, question, cache)            cache.length == 5040
#     cache.length = 5000                     the next question overwrites this one

CHUNK_TOKENS = 1024  # tokens of a prompt that pass through the model at a time


class KVCache:
    """The keys and values of one text in all layers."""

    def __init__(self) -> None:
        self._length = 0
        self.room = 0  # tokens to make room for at the next allocation; `read` sets it
        self.layers: dict[int, Tensor] = {}  # layer -> (2, H_kv, room, D): keys, values
        self.pending: list[int] = []  # the text's last tokens, which nobody has read yet

    @property
    def length(self) -> int:
        """How many tokens have been read. To assign cuts the text back, `pending` included."""
        return self._length

    @length.setter
    def length(self, n_tokens: int) -> None:
        self._length, self.pending = n_tokens, []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v (t, H_kv, D) of new tokens; let the last of q look at the text so far."""
        begin, end = self.length, self.length + len(k)
        old = self.layers.get(layer)
        if old is None or old.shape[2] < end:
            self.layers[layer] = k.new_empty(2, k.shape[1], self.room, k.shape[2])
            if old is not None:
                self.layers[layer][:, :, :begin] = old[:, :, :begin]
        kv = self.layers[layer][:, :, :end]  # (2, H_kv, end, D)
        kv[:, :, begin:] = torch.stack([k, v]).transpose(1, 2)  # (2, t, H_kv, D) -> (2, H_kv, t, D)
        q = q.transpose(0, 1)[None]  # (t, H, D) -> (1, H, t, D)
        # The last query belongs to the last key; `is_causal` would align the first ones.
        mask = causal_lower_right(q.shape[2], end)
        out = F.scaled_dot_product_attention(q, kv[:1], kv[1:], attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)  # (1, H, t, D) -> (t, H, D)


def attend_with_my_heads(cache: KVCache, parallel: Parallel | None, layer: int, q: Tensor,
                         k: Tensor, v: Tensor) -> Tensor:
    """Attention through the cache, (t, H, D) -> (t, H, D), of which each sp rank does H/P heads."""
    if parallel is None or parallel.sp_size == 1:
        return cache.attend(layer, q, k, v)
    P, rank = parallel.sp_size, parallel.sp_rank
    check_heads(P, q.shape[1], k.shape[1])
    copies = max(1, P // k.shape[1])  # with more ranks than KV heads, several ranks keep the same
    k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)
    q, k, v = (x.chunk(P, dim=1)[rank] for x in (q, k, v))  # (t, H, D) -> (t, H/P, D)
    out = cache.attend(layer, q, k, v).contiguous()
    parts = [torch.empty_like(out) for _ in range(P)]
    dist.all_gather(parts, out, group=parallel.sp_group)
    return torch.cat(parts, dim=1)  # P x (t, H/P, D) -> (t, H, D)


@torch.no_grad()
def read(model: Transformer, ids: Sequence[int] | Tensor, cache: KVCache, last: int = 1,
         chunk_tokens: int = CHUNK_TOKENS, parallel: Parallel | None = None) -> Tensor:
    """Read what comes next in the cache's text; return the logits of the last tokens, (last, V).

    A prompt of 64K tokens needs the memory of its keys and values, and of one chunk. With
    `parallel` all ranks of an sp group make the same call.
    """
    ids = torch.as_tensor(ids, dtype=torch.long, device="cpu")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < model.config.vocab_size:
        raise ValueError(f"token ids {int(ids.min())} to {int(ids.max())} are not all in the "
                         f"model's vocabulary of {model.config.vocab_size}; use its own tokenizer")
    device = model.embed_tokens.weight.device
    # Some room to spare: while text is written, the cache is copied only every 256 tokens.
    cache.room = max(cache.room, cache.length + len(ids) + 256)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Later tokens need keys and values of all, but of the last layer only `last` outputs.
        q = q[-last:] if layer == model.config.n_layers - 1 else q
        return attend_with_my_heads(cache, parallel, layer, q, k, v)

    if cache.length == 0 and len(ids) <= 2**14:  # one causal chunk needs no mask: faster on a CPU
        chunk_tokens = max(chunk_tokens, len(ids))
    hidden = []
    for chunk in ids.to(device).split(chunk_tokens):
        positions = torch.arange(cache.length, cache.length + len(chunk), device=device)
        hidden.append(model.run_layers(chunk, positions, attend))  # (at most last, C)
        cache.length += len(chunk)
    return model.lm_head(torch.cat(hidden)[-last:])


def choose_token(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """The likeliest token of (V,), or one drawn with the model's probabilities."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = logits.float().cpu().div(temperature).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def stream(model: Transformer, prompt_ids: Sequence[int], max_new_tokens: int,
           stop_ids: Collection[int] = (), temperature: float = 0.0, seed: int = 0,
           cache: KVCache | None = None, chunk_tokens: int = CHUNK_TOKENS,
           parallel: Parallel | None = None) -> Iterator[int]:
    """Write on after a prompt, token by token, up to a stop token (inclusive) or the limit.

    Greedy unless `temperature` is above 0. With `cache` a conversation goes on, and `prompt_ids`
    are only what is new since its last answer.
    """
    if not 0 <= temperature < math.inf or max_new_tokens < 0:
        raise ValueError(f"{temperature=} and {max_new_tokens=} must be finite, and not negative")
    text = KVCache() if cache is None else cache
    text.pending += [int(i) for i in prompt_ids]
    if not text.pending:
        raise ValueError("the prompt is empty; generation needs at least one token to start from")
    generator = torch.Generator().manual_seed(seed)

    def write() -> Iterator[int]:
        for _ in range(max_new_tokens):
            logits = read(model, text.pending, text, chunk_tokens=chunk_tokens, parallel=parallel)
            token = choose_token(logits[-1], temperature, generator)
            text.pending = [token]
            yield token
            if token in stop_ids:
                return

    return write()  # a function of its own, so that the checks above run at once


def generate(model: Transformer, prompt_ids: Sequence[int], max_new_tokens: int,
             stop_ids: Collection[int] = (), **options: Any) -> list[int]:
    """The whole answer of `stream`, which has the options."""
    return list(stream(model, prompt_ids, max_new_tokens, stop_ids, **options))


# --- 8. Weights in and out: a Hugging Face folder ---------------------------------------


def read_config(folder: str | Path) -> ModelConfig:
    """Read config.json. Raises ValueError for what this model cannot represent."""
    path = Path(folder) / "config.json"
    entry = read_json(path)
    try:
        config = ModelConfig(**hf.parse_config(entry))
        with torch.device("cpu"):  # whatever device the model is being built on
            frequencies, factor = rope_frequencies(config)
        if not (frequencies.min() > 0 and frequencies.max() < math.inf and 0 < factor < math.inf):
            raise ValueError("its RoPE frequencies are not all positive and finite")
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a model that nanolong can be: {error}") from None
    return config


def stored_parameters(model: Transformer) -> dict[str, Tensor]:
    """All parameters by their names in the files. A tied table is one parameter, stored once."""
    return {name if name.startswith("lm_head") else "model." + name: weight
            for name, weight in model.named_parameters()}


def empty_pretrained(folder: str | Path, dtype: torch.dtype | None = None) -> Transformer:
    """A folder's model without memory (on the meta device), once its files are seen to fit.

    It can be sharded before `load_weights`; each rank then reads only its own rows.
    """
    with torch.device("meta"):
        model = Transformer(read_config(folder))
    parameters = stored_parameters(model)
    for key, (_, stored_dtype) in hf.check_weights(Path(folder), parameters).items():
        parameters[key].data = parameters[key].data.to(dtype or stored_dtype)
    return model


def load_weights(model: Transformer, folder: str | Path,
                 device: torch.device | str = "cpu") -> Transformer:
    """Give a model memory on `device` and fill it, under FSDP this rank's rows, from the folder."""
    model.to_empty(device=device)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight  # to_empty has made them two
    hf.load_tensors(Path(folder), stored_parameters(model))
    model.files = hf.read_companions(Path(folder))
    return model


def load_pretrained(folder: str | Path, dtype: torch.dtype | None = None,
                    device: torch.device | str = "cpu") -> Transformer:
    """Load a model from a Hugging Face folder. `dtype` None keeps each tensor's own."""
    return load_weights(empty_pretrained(folder, dtype), folder, device)


def write_model(model: Transformer, folder: Path, main: bool = True) -> None:
    """Write weights, config.json and the files beside them into an existing folder.

    Under FSDP all ranks call it, because gathering weights is a collective; only `main` writes.
    """
    hf.write_tensors(folder, stored_parameters(model), main)
    if main:
        hf.write_config(folder, asdict(model.config), next(model.parameters()).dtype)
        for name, content in model.files.items():
            (folder / name).write_bytes(content)


def save_pretrained(model: Transformer, folder: str | Path) -> None:
    """Save a Hugging Face folder, whole or not at all."""
    with whole_folder(folder) as aside:
        write_model(model, aside)


# --- 9. Command line --------------------------------------------------------------------


def info(name: str, length: int = 8192) -> None:
    """Print the shape and memory of a preset, or of a folder whose files we check."""
    with torch.device("meta"):
        model = Transformer(preset_config(name, 256)) if name in PRESETS else empty_pretrained(name)
    print(format_shape(name, model, length))


def export(folder: str, out: str, dtype: str = "bfloat16") -> None:
    """Write a checkpoint's model, without what training needs, into a new folder."""
    if Path(out).exists():
        raise ValueError(f"{out} exists already; name a new folder, or remove this one")
    model = load_pretrained(folder, choose("dtype", dtype, hf.BY_NAME))
    save_pretrained(card.add_card(model, folder), out)
    print(f"written: {out}")


def main() -> None:
    match sys.argv[1:]:
        case [*_, "-h" | "--help"]:
            print(__doc__)
        case ["info", name]:
            info(name)
        case ["info", name, "--length", length]:
            info(name, parse_length(length))
        case ["export", folder, out]:
            export(folder, out)
        case ["export", folder, out, "--dtype", dtype]:
            export(folder, out, dtype)
        case _:
            raise ValueError("write `model.py info PRESET-OR-FOLDER [--length 512k]` or "
                             "`model.py export FOLDER OUT [--dtype bfloat16]`")


if __name__ == "__main__":
    run_main(main)
