"""The training: a curriculum of stages, each longer than the last, and one exact step.

    python train.py                                            the tiny recipe: three stages on a laptop
    torchrun --nproc-per-node 2 train.py                       the same numbers from two processes
    torchrun --nproc-per-node 8 train.py --seq 512k            eight ranks share every sequence
    torchrun --nproc-per-node 8 train.py --recipe prolong --stage 64k --init DIR --data DIR

A recipe is a list of stages, and a stage is data: how long, which RoPE base, which mixture, which rate.
Between stages the weights and Adam's moments stay; the learning rate starts over (Figure 4, Table 9).

    base  256 tokens  ->  long  2,048          ->  ultra  16,384          tiny (1/32 of the paper's lengths)
    8K (Llama-3)      ->  64k  theta 8e6       ->  512k  theta 1.28e8     prolong

One step, over dp x sp ranks and several micro-batches, is one big batch, exactly:

    valid  = number of trained tokens in the whole step          counted first, summed over all ranks
    loss   = sum over ranks and micro-batches of loss_sum / valid
    grad   = sum over ranks of its gradient                      FSDP sums; it must not average

(a mean of means would let a rank with 3 trained tokens weigh as much as one with 500: section A.3. The
authors' code divides by a running mean over the training; this is exact.)

A run folder holds config.json, log.jsonl, data/, checkpoints/<stage>-<step>/, eval/*.json, figures/*.png.
Sources: ProLong Table 9, sections 4, 6.1, A.3, A.4; the authors' scripts where they differ.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import eval as evaluation
from data import (
    REAL_TEXT,
    SYNTHETIC_DOMAINS,
    Batch,
    Mixture,
    PackedDataset,
    PackedSequence,
    PackReport,
    Tokenizer,
    arrange_step,
    format_length,
    load_tokenizer,
    make_batch,
    option,
    pack_builtin,
    parse_cli,
    parse_length,
    parse_mixture,
    read_json,
    run_main,
    tokenizer_files,
    tokenizer_for,
    write_packed,
)
from model import (
    MemoryOptions,
    ModelConfig,
    Parallel,
    Transformer,
    backend_for,
    cpu_has_bf16,
    crosses_ranks,
    device_peak_flops,
    empty_pretrained,
    flops_per_step,
    init_parallel,
    load_pretrained,
    load_weights,
    local_rows,
    ntk_rope_theta,
    preset_config,
    replaced_folder,
    to_device,
    valid_seq_parallel_sizes,
    write_model,
)

# --- 1. Recipes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum. Shares are of tokens; "code_repos-2k" is packed code of 2K documents."""

    name: str
    seq_len: int
    rope_theta: float | None  # None: the model keeps its own, and its context length
    mixture: dict[str, float]
    tokens: int
    batch_tokens: int  # per optimizer step, over all ranks
    lr: float
    min_lr: float
    warmup: float = 0.1  # share of the steps

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens


# What keeps short-context abilities, in parts of itself: ShortMix, as in the final recipe (Table 9) and as in
# the ablations (Table 5), and what it was compared with (Table 6).
SHORT_MIX = {"fineweb_edu": 27, "fineweb": 27, "tulu_v2": 11, "stackexchange": 11, "wikipedia": 8,
             "openwebmath": 8, "arxiv": 8}
SHORT_MIXES = {
    "shortmix": SHORT_MIX,
    "shortmix-ablation": {"fineweb_edu": 25, "fineweb": 25, "tulu_v2": 10, "stackexchange": 10,
                          "wikipedia": 10, "openwebmath": 10, "arxiv": 10},
    "slimpajama": {"slimpajama": 1}, "fineweb-edu": {"fineweb_edu": 1}, "dclm": {"dclm": 1},
}


def with_short_mix(mixture: dict[str, float], name: str = "shortmix") -> dict[str, float]:
    """Fill a mixture's long domains (shares of 1) up with a short mix, in place of one that it may have.

    Raises ValueError for an unknown mix, and for a mixture that leaves no room.
    """
    if name not in SHORT_MIXES:
        raise ValueError(f"short mix {name!r} is unknown; choose one of {', '.join(SHORT_MIXES)}")
    short, known = SHORT_MIXES[name], {domain for mix in SHORT_MIXES.values() for domain in mix}
    long = {domain: share for domain, share in mixture.items() if domain not in known}
    rest = 1 - sum(long.values())
    if rest < 1e-6:
        raise ValueError(f"the mixture of {', '.join(long)} leaves no share for the short mix {name!r}")
    return long | {domain: rest * share / sum(short.values()) for domain, share in short.items()}


def _tiny(name: str, seq_len: int, rope_theta: float, steps: int, batch_tokens: int,
          mixture: dict[str, float]) -> Stage:
    """A stage of the tiny recipe; what the stages share is said once."""
    return Stage(name, seq_len, rope_theta, mixture, tokens=steps * batch_tokens, batch_tokens=batch_tokens,
                 lr=3e-3, min_lr=3e-4)


RECIPES: dict[str, list[Stage]] = {
    "tiny": [
        _tiny("base", 256, 1e4, 3000, 1024, {"recall_bare-256": 1.0}),
        _tiny("long", 2048, 1.6e5, 900, 2048,
              {"recall_bare-256": 0.13, "recall-256": 0.20, "recall-2k": 0.45, "code_repos-2k": 0.06,
               "textbooks-2k": 0.02, "short": 0.04, "icl-2k": 0.10}),
        _tiny("ultra", 16_384, 1e7, 100, 16_384,
              {"recall_bare-256": 0.03, "recall-2k": 0.13, "recall-16k": 0.64, "code_repos-16k": 0.08,
               "textbooks-16k": 0.02, "short": 0.03, "icl-2k": 0.07}),
    ],
    "prolong": [
        Stage("64k", 65_536, 8e6, with_short_mix({"code_repos-64k": 0.30, "books-64k": 0.30,
                                                  "textbooks-64k": 0.03}),
              tokens=20 * 2**30, batch_tokens=4 * 2**20, lr=1e-5, min_lr=1e-6),
        # Table 9 gives 1e-5 for each stage; the authors' train_512K.sh says 5e-6, and that made the model.
        Stage("512k", 524_288, 1.28e8,
              with_short_mix({"code_repos-512k": 0.15, "code_repos-64k": 0.15, "books-512k": 0.30 * 0.17,
                              "books-64k": 0.30 * 0.83, "textbooks-512k": 0.03}),
              tokens=20 * 2**30, batch_tokens=8 * 2**20, lr=5e-6, min_lr=5e-7),
    ],
    # What the paper compares its choices in (A.4): Llama-3-8B, not Instruct, and no textbooks.
    "ablation": [
        Stage("64k", 65_536, 8e6, with_short_mix({"code_repos-64k": 0.30, "books-64k": 0.30},
                                                 "shortmix-ablation"),
              tokens=5 * 2**30, batch_tokens=4 * 2**20, lr=1e-5, min_lr=1e-6),
    ],
}


def stage_at_length(stage: Stage, seq_len: int, head_dim: int) -> Stage:
    """The same stage at another length: its longest documents follow, theta by the NTK rule if longer."""
    mixture: dict[str, float] = {}
    for domain, share in stage.mixture.items():
        name, dash, length = domain.partition("-")
        if dash:
            doc_len = seq_len if parse_length(length) == stage.seq_len else min(parse_length(length), seq_len)
            domain = f"{name}-{format_length(doc_len)}"
        mixture[domain] = mixture.get(domain, 0) + share
    theta = stage.rope_theta
    if theta is not None and seq_len > stage.seq_len:
        theta = ntk_rope_theta(theta, stage.seq_len, seq_len, head_dim)
    batch_tokens = -(-stage.batch_tokens // seq_len) * seq_len
    return replace(stage, seq_len=seq_len, mixture=mixture, rope_theta=theta, batch_tokens=batch_tokens,
                   tokens=stage.steps * batch_tokens)


# --- 2. Configuration -----------------------------------------------------------------------------


@dataclass(frozen=True)
class RunConfig:
    """What every run of stages can be told; TrainConfig and sft.py's SftConfig add what is their own."""

    init: str = option("", "start from this model folder, or from a run's newest checkpoint")
    steps: int | None = option(None, "optimizer steps per stage", parse_length)
    batch_tokens: int | None = option(None, "tokens per optimizer step", parse_length)
    micro_batch_tokens: int | None = option(None, "tokens of a forward pass, over its sp ranks", parse_length)
    lr: float | None = option(None, "peak learning rate", float)
    reorder: bool = option(True, "sort a step's sequences by cost, so that ranks wait less")
    seq_parallel_size: int | None = option(None, "ranks that share a sequence", parse_length)
    dtype: str = option("auto", "compute in auto, float32, bfloat16 or float64")
    attention: str = option("auto", "attention backend: auto, varlen, sdpa or reference")
    compile: str = option("auto", "torch.compile each block: on, off, or auto (on a GPU)")
    activations: str = option("auto", "for backward keep all, recompute each block, offload its input to the "
                              "host, or auto: the first of these that fits")
    loss_chunk_tokens: int = option(8192, "hold the logits of so many tokens at a time; 0: of all", int)
    mlp_tile_tokens: int | None = option(None, "work off MLPs in tiles of so many tokens; 0: in one "
                                         "(default: only where nothing else fits)", int)
    host_optimizer: bool = option(False, "keep weights, gradients and Adam's moments in host memory (GPU)")
    master: str = option("float32", "keep weights and Adam's moments in float32 or bfloat16 (half the "
                         "memory, but small updates are lost)")
    weight_decay: float = option(0.1, "AdamW's weight decay, on matrices", float)
    clip: float = option(1.0, "largest norm of the gradient", float)
    eval: bool = option(True, "evaluate and draw after each stage")
    eval_every: int | None = option(None, "steps between small evaluations, noted in the log", parse_length)
    samples: int = option(200, "questions per task and length in the evaluation", parse_length)
    save_every: int | None = option(None, "steps between checkpoints (default: half an hour, or longer where "
                                    "saving would take more than 5%% of the time)", parse_length)
    keep: int = option(2, "newest checkpoints to keep, besides every stage's last; 0 keeps all", int)
    on_save_error: str = option("continue", "if a checkpoint can't be written: continue to the next, or stop")
    on_diverge: str = option("stop", "at a step whose loss or gradient is no number: stop, or skip it")
    resume: str = option("", "go on with this run, from its newest checkpoint")
    out: str = option("", "run folder (default: runs/RECIPE, numbered if taken)")
    tokenizer: str = option("bytes", "tokenizer")
    seed: int = option(0, "seed of weights, data and order", int)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    recipe: str = option("tiny", f"one of {', '.join(RECIPES)}")
    stage: str = option("", "run this stage of the recipe alone")
    seq: int | None = option(None, "run the recipe's last stage (or --stage) at this length", parse_length)
    model: str = option("tiny", "model preset, where there is no --init")
    data: str = option("", "folder of packed domains; without it the embedded ones are packed")
    mix: str = option("", "other mixture: recall-2k=0.6,code_repos-2k=0.4")
    short_mix: str = option("", f"the mixture with another short part: {', '.join(SHORT_MIXES)}")
    rope_theta: float | None = option(None, "RoPE base of the stage", float)
    plan: bool = option(False, "print what a step needs in memory and time, and train nothing")
    world_size: int | None = option(None, "ranks that --plan is for", parse_length)


def choose_stages(config: TrainConfig, head_dim: int) -> list[Stage]:
    """The recipe's stages that this command runs, with the command's changes.

    Raises ValueError for an unknown recipe or stage, and for a setting that cannot be.
    """
    if config.recipe not in RECIPES:
        raise ValueError(f"recipe {config.recipe!r} is unknown; choose one of {', '.join(RECIPES)}")
    stages = RECIPES[config.recipe]
    if config.stage:
        names = [stage.name for stage in stages]
        if config.stage not in names:
            raise ValueError(f"recipe {config.recipe!r} has no stage {config.stage!r}; "
                             f"choose one of {', '.join(names)}")
        stages = [stages[names.index(config.stage)]]
    if config.seq:
        stages = [stage_at_length(stages[-1], config.seq, head_dim)]
    changes: dict[str, Any] = {}
    if config.short_mix:
        if config.mix:
            raise ValueError("--mix gives the whole mixture; drop --short-mix")
        stages = [replace(stage, mixture=with_short_mix(stage.mixture, config.short_mix)) for stage in stages]
    if config.mix:
        changes["mixture"] = parse_mixture(config.mix)
    if config.rope_theta is not None:
        changes["rope_theta"] = config.rope_theta
    return [replace(scheduled(stage, config), **changes) for stage in stages]


def scheduled(stage: Stage, config: RunConfig) -> Stage:
    """The stage with the command's steps, batch and rate, where it names them."""
    batch_tokens = config.batch_tokens or stage.batch_tokens
    if config.lr is not None:
        stage = replace(stage, lr=config.lr, min_lr=config.lr * stage.min_lr / stage.lr)
    return replace(stage, batch_tokens=batch_tokens,
                   tokens=config.steps * batch_tokens if config.steps else stage.tokens)


@dataclass(frozen=True)
class StepLayout:
    """How a step's sequences are dealt: derived once from stage and ranks."""

    sequences: int  # per step, over all ranks
    per_batch: int  # sequences of one micro-batch
    grad_accum_steps: int


def step_layout(stage: Stage, parallel: Parallel, micro_batch_tokens: int | None) -> StepLayout:
    """Raises ValueError, with the numbers, when they don't divide."""
    seq_len, dp = stage.seq_len, parallel.dp_size
    sequences = stage.batch_tokens // seq_len
    if stage.batch_tokens % seq_len or sequences % dp:
        raise ValueError(f"batch_tokens={stage.batch_tokens:,} is not a whole number of sequences of "
                         f"{seq_len:,} for {dp} data-parallel ranks; choose a multiple of "
                         f"{seq_len * dp:,}")
    per_rank = sequences // dp
    micro = micro_batch_tokens or _default_per_batch(per_rank, seq_len, parallel) * seq_len
    per_batch = micro // seq_len
    if micro % seq_len or per_batch < 1 or per_rank % per_batch:
        raise ValueError(f"micro_batch_tokens={micro:,} does not divide a rank's {per_rank} sequences "
                         f"of {seq_len:,} tokens; choose a multiple of {seq_len:,} that does")
    if per_batch * seq_len % parallel.sp_size:
        raise ValueError(f"micro-batches of {per_batch * seq_len:,} tokens cannot be cut into "
                         f"{parallel.sp_size} equal shares; choose another seq_parallel_size")
    return StepLayout(sequences, per_batch, per_rank // per_batch)


def _default_per_batch(per_rank: int, seq_len: int, parallel: Parallel) -> int:
    """As many sequences as fit in 64K tokens per rank: the most that the recipe's memory allows."""
    limit = max(1, 65_536 * parallel.sp_size // seq_len)
    return max(n for n in range(1, per_rank + 1) if per_rank % n == 0 and n <= limit)


def default_seq_parallel_size(n_heads: int, n_kv_heads: int, stage: Stage, world_size: int) -> int:
    """The smallest P that the heads allow, at which a rank holds at most 64K tokens of a sequence and no
    data-parallel rank is without one. Raises ValueError if none is.
    """
    sizes = [p for p in valid_seq_parallel_sizes(n_heads, n_kv_heads) if world_size % p == 0]
    for p in sizes:
        sequences = stage.batch_tokens // stage.seq_len
        if (stage.seq_len <= 65_536 * p or world_size == 1) and sequences % (world_size // p) == 0:
            return p
    raise ValueError(
        f"no seq_parallel_size fits: {world_size} ranks, {n_heads}/{n_kv_heads} heads (which allow "
        f"{valid_seq_parallel_sizes(n_heads, n_kv_heads)}), sequences of {stage.seq_len:,} tokens and "
        f"{stage.batch_tokens // stage.seq_len} of them a step; change the number of ranks or "
        "--batch-tokens, or let a rank hold more than 64K of a sequence's tokens with --seq-parallel-size")


def dtype_for(name: str, device: torch.device, dim: int) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why. Weights and the sums of their gradients stay in float32.

    By what the device is, never by timing, so that runs repeat. Between its matmuls a CPU widens bfloat16 to
    float32 and back; in a narrow model that costs as much as its unit for bfloat16 gains.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name in known:
        return known[name], "as asked"
    if name != "auto":
        raise ValueError(f"dtype {name!r} is unknown; choose auto, {', '.join(known)}")
    if not (torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()):
        return torch.float32, f"auto: this {device.type} has no bfloat16 matmuls"
    if device.type == "cpu" and dim < 128:
        return torch.float32, f"auto: on a CPU a model of width {dim} is no faster in bfloat16"
    return torch.bfloat16, f"auto: this {device.type} has bfloat16 matmuls"


MASTER = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# --- 3. Data of a stage ---------------------------------------------------------------------------


def prepare_data(stage: Stage, config: TrainConfig, tokenizer: Tokenizer, run: Path,
                 parallel: Parallel) -> Path:
    """The folder of the mixture's packed domains: the user's, or the embedded ones packed into the run."""
    if config.data:
        if not Path(config.data).is_dir():
            raise ValueError(f"--data {config.data} is not a folder; make one with `python data.py pack`")
        return Path(config.data)
    root = run / "data" / stage.name
    if parallel.main:
        pack_domains(stage, root, tokenizer, config.seed)
    dist.barrier()
    return root


def open_domains(stage: Stage, root: Path, tokenizer: Tokenizer) -> dict[str, PackedDataset]:
    """Open the mixture's packed folders in `root`.

    Raises ValueError for a folder that is missing, damaged, of another length or another tokenizer.
    """
    domains = {}
    for name in (name for name, share in stage.mixture.items() if share > 0):
        dataset = domains[name] = PackedDataset(root / name)
        dataset.check_tokenizer(tokenizer)
        if dataset.seq_len != stage.seq_len:
            raise ValueError(f"{dataset.folder} holds sequences of {dataset.seq_len:,} tokens, stage "
                             f"{stage.name!r} wants {stage.seq_len:,}; pack it at that length")
    return domains


def pack_domains(stage: Stage, root: Path, tokenizer: Tokenizer, seed: int) -> None:
    """Pack as many sequences of each embedded domain as the stage will draw."""
    total = sum(stage.mixture.values())
    for name, share in stage.mixture.items():
        if share > 0 and not (root / name).exists():
            wanted = math.ceil(stage.tokens / stage.seq_len * share / total) + 1
            report = PackReport()
            sequences = pack_builtin(name, tokenizer, stage.seq_len, seed, report)
            write_packed(root / name, islice(sequences, wanted), tokenizer, stage.seq_len, name, seed, report)


@dataclass(frozen=True)
class LoadedStep:
    """The data of one step: what this rank trains on, and what is said of all ranks."""

    sequences: list[PackedSequence]
    batches: list[Batch]  # this rank's micro-batches
    drawn: dict[str, int]  # the mixture's cursor after this step
    sp_exchanged: float  # share of micro-batches in which a document lies on two ranks


def load_steps(mixture: Mixture, steps: int, plan: StepLayout, parallel: Parallel,
               reorder: bool) -> Iterator[LoadedStep]:
    """Draw and join `steps` steps, each in another thread while the one before it is trained."""

    def load() -> LoadedStep:
        sequences = mixture.draw(plan.sequences)
        dealt = arrange_step(sequences, parallel.dp_size, plan.per_batch, reorder)
        crossing = [crosses_ranks([n for s in part for n in s.doc_lens], parallel.sp_size)
                    for ranks in dealt for part in ranks]
        return LoadedStep(sequences, [make_batch(ranks[parallel.dp_rank]) for ranks in dealt],
                          dict(mixture.drawn), sum(crossing) / len(crossing))

    with ThreadPoolExecutor(1) as loader:
        coming = loader.submit(load)
        for left in reversed(range(steps)):
            loaded = coming.result()
            if left:
                coming = loader.submit(load)
            yield loaded


# --- 4. What a rank must hold, and which lever to pull ----------------------------------------------


def count_weights(config: ModelConfig) -> tuple[int, int]:
    """Weights of one block, and of everything else (embedding, head and the last norm)."""
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    block = config.dim * (2 * q_dim + 2 * kv_dim + 3 * config.ffn_dim + 2)
    return block, config.dim * (config.vocab_size * (1 if config.tie_embeddings else 2) + 1)


def memory_per_rank(config: ModelConfig, levers: MemoryOptions, tokens: int, world_size: int, itemsize: int = 2,
                    master_bytes: int = 4, host_optimizer: bool = False) -> dict[str, int]:
    """Bytes that a rank with `tokens` tokens needs at the worst moment of a step, part by part.

    `itemsize` is that of the compute dtype, `master_bytes` of a weight where it lives. An inventory of what
    autograd keeps, checked against counted tensors (tests/test_plan.py). The worst moment is either the
    logits, when no gradient is there yet, or a block's backward, while gradients take the place of what was
    kept.
    """
    C, F, b = config.dim, config.ffn_dim, itemsize
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    block, rest = count_weights(config)
    sharded = 0 if host_optimizer else master_bytes * (config.n_layers * block + rest) // world_size
    norm = 2 * b * C  # its input and its output
    attention = norm + b * (2 * q_dim + 2 * kv_dim) + 4 * config.n_heads  # q, k, v, out, log-sum-exp
    mlp = norm + b * 4 * F  # gate, silu(gate), up, their product
    tile = min(levers.mlp_tile_tokens or tokens, tokens) / tokens
    saved = attention + (mlp if tile == 1 else b * 2 * C)  # of a block; tiles keep their inputs
    kept = tokens * {"keep": saved * config.n_layers, "recompute": b * C * config.n_layers,
                     "offload": 2 * b * C}[levers.activations]
    again = 0 if levers.activations == "keep" else saved
    in_mlp = again + 2 * b * C + tile * (3 * b * F + (mlp if tile < 1 else 0))
    in_attention = min(again, attention) + b * (4 * C + 3 * (q_dim + 2 * kv_dim))  # with the exchange
    in_block = int(tokens * max(in_mlp, in_attention))
    chunk = min(levers.loss_chunk_tokens or tokens, tokens)
    in_loss = chunk * config.vocab_size * (8 + 2 * b) + b * C * (3 * tokens + config.vocab_size)
    parts = {"weights and Adam's moments, over all ranks": 3 * sharded,
             "gathered: embedding, head and two blocks": b * (rest + 2 * block) + 4 * block}
    if kept + in_loss > max(kept, sharded) + in_block:
        return parts | {"kept for backward": kept, "at work: the logits": in_loss}
    return parts | {"kept for backward, then gradients": max(kept, sharded),
                    f"at work: a block's {'MLP' if in_mlp > in_attention else 'attention'}": in_block}


MEMORY_OPTIONS = (MemoryOptions(), MemoryOptions(activations="recompute"), MemoryOptions(activations="recompute", mlp_tile_tokens=8192),
          MemoryOptions(activations="offload", mlp_tile_tokens=8192))  # from the fastest to the smallest


def memory_options_for(config: RunConfig, shape: ModelConfig, tokens: int, world_size: int, itemsize: int,
                  memory_bytes: float, device: str) -> tuple[MemoryOptions, str]:
    """What the command asks for, and where it says auto the fastest that fits; and why.

    No lever changes a number, so the choice may depend on the machine's memory. A tenth of it stays free.
    Raises ValueError for offloading to where the activations are already.
    """
    if device == "cpu" and (config.activations == "offload" or config.host_optimizer):
        raise ValueError("--activations offload and --host-optimizer move memory from a GPU to the host, but "
                         "this is the host; drop them")
    tile, master = config.mlp_tile_tokens, MASTER[config.master].itemsize

    def needs(levers: MemoryOptions) -> float:
        return sum(memory_per_rank(shape, levers, tokens, world_size, itemsize, master,
                                   config.host_optimizer).values())

    ladder = [replace(levers, loss_chunk_tokens=config.loss_chunk_tokens,
                      mlp_tile_tokens=levers.mlp_tile_tokens if tile is None else tile)
              for levers in MEMORY_OPTIONS if (levers.activations != "offload" or device != "cpu")]
    if config.activations != "auto":
        return (replace(ladder[0], activations=config.activations),
                f"{needs(replace(ladder[0], activations=config.activations)) / 2**30:.2f} GiB planned")
    chosen = next((levers for levers in ladder if needs(levers) < 0.9 * memory_bytes), ladder[-1])
    return chosen, (f"auto: {needs(chosen) / 2**30:.2f} GiB planned a rank, {memory_bytes / 2**30:.1f} there"
                    + ("; it may not fit: --plan shows what would" if needs(chosen) > memory_bytes else ""))


def memory_there(device: torch.device) -> float:
    """Bytes that one rank may use: its GPU's, or its part of this machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# --- 5. Model and optimizer over the ranks --------------------------------------------------------


def shard_model(model: Transformer, parallel: Parallel, dtype: torch.dtype,
                host_optimizer: bool = False) -> Transformer:
    """Spread weights, gradients and optimizer over all ranks (FSDP2), and compute in `dtype`.

    A block's weights are gathered just before use and its gradients summed just after. The same at one
    rank: there is one way in which precision is chosen. Three settings are easy to get wrong:
    gradients are summed, not averaged, since the loss is already divided by the step's global count;
    the setters are not recursive; and inputs are not cast, or RoPE's float32 angles would become bfloat16.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False,
                                  reduce_dtype=torch.promote_types(dtype, torch.float32))
    where = CPUOffloadPolicy() if host_optimizer else OffloadPolicy()  # of sharded weights, and so of Adam
    for module in [*model.layers, model]:
        fully_shard(module, mesh=parallel.world_mesh, mp_policy=policy, offload_policy=where)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "loss")
    register_fsdp_forward_method(model, "logits")
    register_fsdp_forward_method(model, "is_right")
    return model


def make_optimizer(model: Transformer, weight_decay: float) -> torch.optim.AdamW:
    """AdamW 0.9/0.95 (Table 9). Norm gains are not decayed: they have no reason to go to zero."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def learning_rate(stage: Stage, step: int) -> float:
    """Rate of step 0 .. steps-1: up in a line over the warmup, then a cosine down to `min_lr`."""
    warmup = max(1, round(stage.steps * stage.warmup))
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, stage.steps - warmup)
    return stage.min_lr + 0.5 * (stage.lr - stage.min_lr) * (1 + math.cos(math.pi * done))


# --- 6. The step ----------------------------------------------------------------------------------


class Diverged(RuntimeError):
    """The loss or the gradient is no longer a number."""


@dataclass(frozen=True)
class StepResult:
    loss: float  # nats per trained token, over the whole step
    grad_norm: float  # before clipping
    valid_tokens: int


def train_step(model: Transformer, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], lr: float,
               parallel: Parallel, clip: float = 1.0) -> StepResult:
    """One optimizer step over this rank's micro-batches and everybody else's.

    Raises Diverged before the weights are touched, on all ranks alike, if loss or gradient is not finite.
    """
    shards = [batch.shard(parallel.sp_rank, parallel.sp_size) for batch in batches]
    valid = parallel.all_sum(torch.stack([(labels >= 0).sum() for _, labels in shards]).sum())
    total = torch.zeros((), dtype=torch.float64, device=parallel.device)
    for (input_ids, labels), batch in zip(shards, batches, strict=True):
        loss_sum, _ = model.loss(to_device(input_ids, parallel.device), to_device(labels, parallel.device),
                                 batch.doc_lens, parallel)
        # Even a rank with no valid token runs backward: others wait for its part of each sum.
        (loss_sum / valid.clamp(min=1).to(loss_sum.dtype)).backward()
        total += loss_sum.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    loss = parallel.all_sum(total) / valid.clamp(min=1)
    found = StepResult(*torch.stack((loss, norm.double(), valid)).tolist())  # the step's only wait
    if not math.isfinite(found.loss) or not math.isfinite(found.grad_norm):
        optimizer.zero_grad()
        raise Diverged(f"loss is {found.loss}, the gradient's norm {found.grad_norm}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return replace(found, valid_tokens=int(found.valid_tokens))


# --- 7. Checkpoints -------------------------------------------------------------------------------
#
#     runs/tiny/checkpoints/long-900/
#         config.json, model.safetensors          a Hugging Face folder, as model.py writes it
#         optimizer-00001-of-00002.safetensors    Adam's moments: the rows of each rank
#         state.json                              where the run is, what made it, every file's size and sha256
#
# No pickle anywhere. A folder gets its name only when it is whole: it is written aside, fsynced, renamed.
# What a disk does to it later, the sums show. There is no random state to save: a step's data follow from the
# seed and from `drawn`, how far each domain has been read, and nothing else is random.


@contextmanager
def fail_together(parallel: Parallel, what: str) -> Iterator[None]:
    """Around what counts only if all ranks manage it: if one can't write, OSError on all, and none waits."""
    from safetensors import SafetensorError

    failed = False
    try:
        yield
    except (OSError, SafetensorError) as error:
        failed = True
        print(f"rank {parallel.rank} could not {what}: {error}", file=sys.stderr, flush=True)
    if parallel.all_sum(torch.tensor(float(failed))):
        raise OSError(f"could not {what}")


def save_checkpoint(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer,
                    state: dict[str, Any], parallel: Parallel) -> None:
    """Write a checkpoint; every rank calls it. `state` is stage, step, tokens and the data's cursor.

    Raises OSError, on all ranks, if one of them can't write. What was there before is there still.
    """
    from safetensors.torch import save_file

    aside, what = replaced_folder(folder), f"write {folder}"
    shards = [_optimizer_file(rank, parallel.world_size) for rank in range(parallel.world_size)]
    try:
        with fail_together(parallel, what):
            if parallel.main:
                aside.__enter__()
                wanted = 3 * sum(p.numel() * p.element_size() for p in model.parameters())  # and two moments
                if (free := shutil.disk_usage(aside.temporary).free) < wanted:
                    raise OSError(f"it takes {wanted / 2**30:.2f} GiB, and {free / 2**30:.2f} are free")
        with fail_together(parallel, what):
            write_model(model, aside.temporary, parallel.main)  # first: gathering takes all ranks
            tensors: dict[str, Tensor] = {}
            for name, weight in model.named_parameters():
                for key, value in optimizer.state[weight].items():
                    local = value.to_local() if isinstance(value, DTensor) else value
                    tensors[f"{name}/{key}"] = local.detach().cpu().contiguous()
            save_file(tensors, aside.temporary / shards[parallel.rank])
        sums = hash_files(aside.temporary, shards, parallel)
        with fail_together(parallel, what):
            if unread := [name for name, known in sums.items() if not known.strip("0")]:
                raise OSError(f"{unread[0]} can't be read again")
            if parallel.main:
                files = {path.name: {"bytes": path.stat().st_size,
                                     "sha256": sums.get(path.name) or _sha256(path)}
                         for path in sorted(aside.temporary.iterdir())}
                state = state | {"world_size": parallel.world_size, "files": files}
                state["sha256"] = _sum_of_state(state)
                (aside.temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n")
                aside.__exit__(None)
    except OSError:
        if parallel.main:
            aside.__exit__(OSError)  # what is half written gives its room back
        raise


def _optimizer_file(rank: int, world_size: int) -> str:
    return f"optimizer-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sum_of_state(state: dict[str, Any]) -> str:
    rest = {key: value for key, value in state.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def hash_files(folder: Path, names: Sequence[str], parallel: Parallel) -> dict[str, str]:
    """The sha256 of each file, known to all ranks, which share the work; zeros if it can't be read."""
    sums = torch.zeros(len(names), 32, dtype=torch.float64)
    for i in range(parallel.rank, len(names), parallel.world_size):
        with suppress(OSError):
            sums[i] = torch.tensor(list(bytes.fromhex(_sha256(folder / names[i]))))
    rows = parallel.all_sum(sums).to(torch.uint8).tolist()
    return {name: bytes(row).hex() for name, row in zip(names, rows, strict=True)}


def load_checkpoint(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read Adam's moments back into a sharded model's optimizer, and return the state.

    Any number of ranks may have written it: the parts, one after another, are the whole tensors, and each
    rank takes its own part anew. (The weights are load_pretrained's to read, before sharding.)
    Raises ValueError for moments that aren't this model's.
    """
    from safetensors import SafetensorError, safe_open

    state = read_state(folder)
    try:
        files = [safe_open(folder / _optimizer_file(rank, state["world_size"]), framework="pt")
                 for rank in range(state["world_size"])]
        for name, weight in model.named_parameters():
            moments: dict[str, Tensor] = {"step": files[0].get_tensor(f"{name}/step")}
            for key in ("exp_avg", "exp_avg_sq"):
                whole = torch.cat([file.get_tensor(f"{name}/{key}") for file in files])
                if (whole.shape, whole.dtype, moments["step"].ndim) != (weight.shape, weight.dtype, 0):
                    raise ValueError(f"{folder}: {name}/{key} is {whole.dtype} {tuple(whole.shape)}, the "
                                     f"model's weight {weight.dtype} {tuple(weight.shape)}")
                moments[key] = torch.zeros_like(weight)
                mine, rows = local_rows(moments[key])
                mine.copy_(whole[rows])
            optimizer.state[weight] = moments
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: parts that don't fit together
        raise ValueError(f"{folder} does not hold the Adam moments of this model: {error}") from None
    return state


_STATE = {"stage": str, "step": int, "tokens_seen": int, "drawn": dict, "world_size": int, "files": dict,
          "sha256": str}


def read_state(folder: Path, parallel: Parallel | None = None) -> dict[str, Any]:
    """Read state.json and check that all files are there, by their sizes; with `parallel`, by their sha256.

    Raises ValueError, on all ranks that share the check, for a folder that is not whole.
    """
    path = folder / "state.json"
    state = read_json(path)
    for key, kind in _STATE.items():
        if type(state.get(key)) is not kind:
            raise ValueError(f"{path}: {key!r} is {state.get(key)!r}, a {kind.__name__} is wanted")
    if state["sha256"] != _sum_of_state(state):
        raise ValueError(f"{path} is not as it was written: its own sha256 differs")
    names, world = sorted(state["files"]), state["world_size"]
    if not 0 < world <= len(names) or {_optimizer_file(rank, world) for rank in range(world)} - set(names):
        raise ValueError(f"{path} does not list the optimizer files of {world} ranks")
    for name, entry in state["files"].items():
        if Path(name).name != name or not isinstance(entry, dict):
            raise ValueError(f"{path} names {name!r}, which is no file of this folder")
        size = (folder / name).stat().st_size if (folder / name).is_file() else -1
        if size != entry.get("bytes"):
            raise ValueError(f"{folder / name} has {max(size, 0):,} bytes, not {entry.get('bytes')}")
    if parallel:
        for name, found in hash_files(folder, names, parallel).items():
            if found != state["files"][name].get("sha256"):
                raise ValueError(f"{folder / name} is not as it was written: its sha256 differs")
    return state


def list_checkpoints(run: Path) -> list[tuple[Path, dict[str, Any] | str]]:
    """A run's checkpoints, the newest first: folder and state, or what is wrong with it (these first)."""
    found: dict[Path, dict[str, Any] | str] = {}
    for folder in sorted(path.parent for path in (run / "checkpoints").glob("*/state.json")):
        if folder.suffix != ".writing":
            try:
                found[folder] = read_state(folder)
            except ValueError as error:
                found[folder] = str(error)
    return sorted(found.items(), reverse=True,
                  key=lambda item: math.inf if isinstance(item[1], str) else item[1]["tokens_seen"])


def newest_checkpoint(run: Path, parallel: Parallel) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state; damaged ones before it are named. None if none was written.

    Raises ValueError if there are some and none is whole.
    """
    damaged = 0
    for folder, found in list_checkpoints(run):
        try:
            if isinstance(found, str):
                raise ValueError(found)
            return folder, read_state(folder, parallel)
        except ValueError as error:
            damaged += 1
            if parallel.main:
                print(f"damaged checkpoint, looking for the one before it: {error}", flush=True)
    if damaged:
        raise ValueError(f"{run} has no whole checkpoint; start a new run")
    return None


def prune_checkpoints(run: Path, keep: int) -> None:
    """Delete what is older than the `keep` newest whole checkpoints, save the last of every stage."""
    whole = [(folder, state) for folder, state in list_checkpoints(run) if isinstance(state, dict)]
    for folder, state in whole[keep:] if keep else ():
        if state["step"] < state["steps"]:
            trash = folder.with_name(folder.name + ".writing")
            shutil.rmtree(trash, ignore_errors=True)
            folder.rename(trash)  # at once, so that no half of it is ever taken for a checkpoint
            shutil.rmtree(trash)


# --- 8. The log -----------------------------------------------------------------------------------


class Log:
    """log.jsonl, one object a step, and a progress bar on a terminal or a line now and then elsewhere."""

    def __init__(self, run: Path, parallel: Parallel, tokens_seen: int = 0) -> None:
        """Begin a log, or go on after `tokens_seen`: what was logged later will be trained again."""
        self.parallel = parallel
        path = run / "log.jsonl"
        if parallel.main and path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True)
                    if line.endswith("\n") and json.loads(line)["tokens_seen"] <= tokens_seen]
            aside = path.with_suffix(".writing")
            aside.write_text("".join(kept))
            aside.replace(path)
        self.file = open(path, "a", buffering=1) if parallel.main else None  # noqa: SIM115
        self.bar: Any = None
        self.printed = 0.0

    def start(self, stage: Stage, step: int) -> None:
        if self.parallel.main and sys.stderr.isatty():
            self.bar = tqdm(total=stage.steps, initial=step, desc=stage.name, unit="step")

    def write(self, entry: dict[str, Any], steps: int, eta_s: float) -> None:
        if self.file is None:
            return
        self.file.write(json.dumps(entry) + "\n")
        ranks = self.parallel.world_size
        line = (f"loss {entry['loss']:.4f} | lr {entry['lr']:.1e} | norm {entry['grad_norm']:.2f} | "
                f"valid_tokens {entry['valid_tokens']:,} | tok/s {entry['tok_per_s']:,.0f}"
                + (f" ({entry['tok_per_s'] / ranks:,.0f} a rank)" if ranks > 1 else "")
                + f" | mfu {entry['mfu']:.1%} | mem {entry['mem_gib']:.2f} GiB")
        if self.bar is not None:
            self.bar.set_postfix_str(line, refresh=False)
            self.bar.update()
        elif time.monotonic() - self.printed > 10 or entry["step"] in (1, steps):
            self.printed = time.monotonic()
            print(f"{entry['stage']} step {entry['step']}/{steps} | {line} | eta {eta_s:,.0f} s", flush=True)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: the GPU's, or the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# --- 9. A stage, and a run of stages --------------------------------------------------------------


SAVE_SECONDS = 1800  # between checkpoints, unless --save-every says otherwise
SAVE_SHARE = 0.05  # of the training time may go into them
MAX_SKIPPED = 10  # diverging steps in a row, with --on-diverge skip


class Stopped(Exception):
    """The run has been asked to end, and has saved what it had."""


@dataclass
class Run:
    """What lives through all stages of a run, from start_run to the end of its `with` block.

    However it ends, it ends in one line. SIGTERM and SIGUSR1 (a cluster wants its machine back) let the step
    end and save it; Ctrl-C ends at once; and the ranks that a lost one leaves behind do not wait for it.
    """

    config: RunConfig
    folder: Path
    parallel: Parallel
    tokenizer: Tokenizer
    model: Transformer
    optimizer: torch.optim.Optimizer
    log: Log
    tokens_seen: int = 0
    stepping: bool = False  # between a step's begin and its checkpoint a signal has to wait
    asked_to_stop: bool = False
    saves: list[float] = field(default_factory=list)  # seconds that each of this stage's checkpoints took
    saved_at: float = 0.0
    handlers: dict[int, Any] = field(default_factory=dict)

    def checkpoint(self, stage: Stage, step: int) -> Path:
        return self.folder / "checkpoints" / f"{stage.name}-{step}"

    def print0(self, text: str) -> None:
        if self.parallel.main:
            print(text, flush=True)

    def __enter__(self) -> Run:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self.handlers[number] = signal.signal(number, self.ask_to_stop)
        return self

    def ask_to_stop(self, number: int, frame: Any) -> None:
        self.asked_to_stop = True
        if not self.stepping:  # packing or evaluating: nothing to save
            raise Stopped

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.log.stop()
        saved = any((self.folder / "checkpoints").glob("*/state.json"))
        hint = f"go on with --resume {self.folder}" if saved else "it has no checkpoint yet"
        if isinstance(error, Stopped):
            self.print0(f"stopped as asked; {hint}")
            raise SystemExit(0)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C doesn't wait for anything
            raise KeyboardInterrupt(hint)
        if isinstance(error, RuntimeError) and ("gloo" in str(error) or isinstance(error, dist.DistError)):
            time.sleep(0 if self.parallel.main else 1)  # time for rank 0 to say it for all
            print(f"rank {self.parallel.rank}: another rank has ended, see its message; {hint} "
                  f"({str(error).partition('. ')[0]})", file=sys.stderr, flush=True)
            time.sleep(3)  # time for the lost rank's own message: once a rank ends, torchrun ends the others
            raise SystemExit(2)

    def save(self, stage: Stage, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint and delete old ones. Without room, a run can go on; a stage's last is needed."""
        begin = time.monotonic()
        folder = self.checkpoint(stage, step)
        try:
            save_checkpoint(folder, self.model, self.optimizer, state, self.parallel)
            if self.parallel.main:
                prune_checkpoints(self.folder, self.config.keep)
        except OSError as error:
            if self.config.on_save_error == "stop" or step == stage.steps or self.asked_to_stop:
                raise
            self.print0(f"{error}; going on without. The checkpoints before it are whole")
        self.saved_at = time.monotonic()
        self.saves.append(self.saved_at - begin)

    def due(self, step: int) -> bool:
        """Whether it is time for a checkpoint, by steps or by this rank's clock."""
        if self.config.save_every:
            return step % self.config.save_every == 0
        longest = max(self.saves, default=0.0)
        return time.monotonic() - self.saved_at > max(SAVE_SECONDS, longest * (1 / SAVE_SHARE - 1))


def open_mixture(run: Run, stage: Stage, data: Path,
                 resumed: dict[str, Any] | None) -> tuple[Mixture, dict[str, Any]]:
    """The stage's mixture, at the place where `resumed` left it, and what this stage is made of.

    Reads all data once (a second for each GB, shared by the ranks). Raises ValueError for data that are not
    as they were packed, and with a list of what is not as it was when the run began.
    """
    parallel, datasets = run.parallel, open_domains(stage, data, run.tokenizer)
    for dataset in datasets.values():
        dataset.check_ids(run.model.config.vocab_size)
    for dataset in list(datasets.values())[parallel.rank::parallel.world_size]:
        dataset.check_content()
    dist.barrier()
    mixture = Mixture(datasets, stage.mixture, run.config.seed)
    made_of = {"stage": asdict(stage), "seed": run.config.seed, "tokenizer": run.tokenizer.fingerprint,
               "data": {name: dataset.meta["sha256"] for name, dataset in mixture.datasets.items()}}
    if resumed:
        if changes := list_changes(resumed.get("made_of"), made_of):
            raise ValueError(f"{run.folder} can't go on, something is not as it was: {'; '.join(changes)}; "
                             "put it back, or start a new run with --init")
        mixture.resume(resumed["drawn"])
    return mixture, made_of


def run_stage(run: Run, stage: Stage, data: Path, resumed: dict[str, Any] | None = None) -> None:
    """Train one stage on the packed domains in `data`, or what `resumed` leaves of it, and save it."""
    config, parallel = run.config, run.parallel
    plan = step_layout(stage, parallel, config.micro_batch_tokens)
    mixture, made_of = open_mixture(run, stage, data, resumed)
    if stage.rope_theta is not None:
        run.model.set_rope(stage.rope_theta, stage.seq_len)
    dtype, _ = dtype_for(config.dtype, parallel.device, run.model.config.dim)
    levers, why = memory_options_for(config, run.model.config, plan.per_batch * stage.seq_len // parallel.sp_size,
                                parallel.world_size, dtype.itemsize, memory_there(parallel.device),
                                parallel.device.type)
    run.model.set_memory_options(levers, parallel.device)
    announce_stage(run, stage, plan, mixture, why)
    first, skipped = resumed["step"] if resumed else 0, 0
    peak = device_peak_flops(parallel.device, dtype) * parallel.world_size
    begin = run.saved_at = time.monotonic()
    run.saves, run.stepping = [], True
    run.log.start(stage, first)
    loaded_steps = load_steps(mixture, stage.steps - first, plan, parallel, config.reorder)
    step_begin = time.monotonic()
    for step, loaded in enumerate(loaded_steps, start=first):
        lr = learning_rate(stage, step)
        run.tokens_seen += stage.batch_tokens
        try:
            result = train_step(run.model, run.optimizer, loaded.batches, lr, parallel, config.clip)
        except Diverged as error:
            skipped += 1
            report = (f"stage {stage.name} step {step + 1}: {error}. The weights are those of step {step}. "
                      f"Its sequences: {', '.join(s.source for s in loaded.sequences)}")
            if config.on_diverge == "stop" or skipped > MAX_SKIPPED:
                raise Diverged(report) from None
            run.print0(f"skipped: {report}")
        else:
            skipped = 0
            seconds = time.monotonic() - step_begin
            flops = sum(flops_per_step(run.model.config, s.doc_lens) for s in loaded.sequences)
            scores = {}
            if config.eval_every and (step + 1) % config.eval_every == 0:
                scores = {"eval": evaluation.quick_scores(run.model, run.tokenizer, stage.seq_len, parallel)}
            run.log.write({"stage": stage.name, "step": step + 1, **asdict(result), "lr": lr,
                           "tokens_seen": run.tokens_seen, "sp_exchanged": loaded.sp_exchanged,
                           "tok_per_s": stage.batch_tokens / seconds, "mfu": flops / seconds / peak,
                           "mem_gib": memory_gib(parallel.device), "time_s": seconds, **scores}, stage.steps,
                          (time.monotonic() - begin) / (step + 1 - first) * (stage.steps - step - 1))
        step_begin = time.monotonic()
        wishes = torch.tensor([run.asked_to_stop, run.due(step + 1)], dtype=torch.float64)
        asked, due = parallel.all_sum(wishes).tolist()  # if one rank wants it, all do it
        if due or asked or step + 1 == stage.steps:
            run.save(stage, step + 1, {"stage": stage.name, "step": step + 1, "steps": stage.steps,
                                       "tokens_seen": run.tokens_seen, "drawn": loaded.drawn,
                                       "made_of": made_of})
            step_begin = time.monotonic()  # saving is no part of a step
        if asked:
            raise Stopped
    run.stepping = False
    run.log.stop()
    if run.saves:
        run.print0(f"checkpoints: {len(run.saves)} saved in {sum(run.saves):.1f} s, "
                f"{sum(run.saves) / (time.monotonic() - begin):.1%} of the time")
    for name, epochs in mixture.epochs().items():
        if epochs > 1:
            run.print0(f"note: {name} was seen {epochs:.1f} times; its sequences repeated")


def announce_stage(run: Run, stage: Stage, plan: StepLayout, mixture: Mixture, memory: str) -> None:
    """Say what runs, with the sum that makes a step, and which choices were made and why."""
    parallel = run.parallel
    dtype, why = dtype_for(run.config.dtype, parallel.device, run.model.config.dim)
    backend, backend_why = run.model.backend, "as asked"
    if backend == "auto":
        backend, backend_why = backend_for(parallel.device, dtype)
    trained = {name: share * mixture.datasets[name].trained_share for name, share in mixture.shares.items()}
    real = sum(share for name, share in trained.items() if name.partition("-")[0] in REAL_TEXT)
    embedded = all(name.partition("-")[0] in REAL_TEXT | SYNTHETIC_DOMAINS.keys() for name in trained)
    run.print0(f"\nstage {stage.name}: {stage.steps:,} steps, rope_theta {run.model.config.rope_theta:g}, "
            f"{sum(trained.values()):.1%} of its tokens are trained"
            + (f", {real / sum(trained.values()):.0%} of those are real text\n" if embedded else "\n") +
            f"  {parallel.world_size} ranks / {parallel.sp_size} sp = {parallel.dp_size} dp x "
            f"{plan.per_batch * stage.seq_len:,} x {plan.grad_accum_steps} accum = "
            f"{stage.batch_tokens:,} tokens/step; sequences of {stage.seq_len:,}\n"
            f"  compute {str(dtype)[6:]} ({why}), attention {backend} ({backend_why}), {parallel.device}\n"
            f"  memory: {run.model.memory} ({memory})")
    for name, share in mixture.shares.items():
        meta = mixture.datasets[name].meta
        run.print0(f"  {share:>6.1%} {name:<16} {meta['sequences']:>6,} sequences, {meta['documents']:>7,} "
                f"documents, sha256 {meta['sha256'][:12]}")


def evaluate_checkpoint(run: Run, name: str, checkpoint: Path, done: list[dict[str, Any]],
                        more: Callable[[Transformer], list[dict[str, Any]]] = lambda model: []) -> None:
    """Evaluate a checkpoint as anybody would load it; print the table and draw all that are `done`.

    `more` scores what eval.py does not know of: rows for the table.
    """
    path = run.folder / "eval" / f"{name}.json"
    if run.parallel.main and path.exists():  # a resumed run has done this one
        done.append(json.loads(path.read_text()))
    elif run.parallel.main:
        settings = evaluation.EvalConfig(model=str(checkpoint), samples=run.config.samples,
                                         tokenizer=run.config.tokenizer)
        model = load_pretrained(checkpoint, device=run.parallel.device)
        result = evaluation.evaluate(model, settings, name)
        result["results"] += more(model)
        evaluation.save_evaluation(result, path.parent)
        done.append(result)
        print(evaluation.format_table(done))
        figure = run.folder / "figures" / "recall_by_length.png"
        drawn = evaluation.draw_recall(done, figure)
        print(f"figure: {figure}" if drawn else "no figure: matplotlib, the `plots` extra, is not installed",
              flush=True)
    dist.barrier()


def start_run(config: RunConfig, default_out: str, model: Transformer, stages: Sequence[Stage],
              source: Path | None, state: dict[str, Any] | None) -> Run:
    """Start ranks, model, run folder and Adam: weights from `source` if there is one, moments if `state`."""
    for name, choices in (("on_save_error", ("continue", "stop")), ("on_diverge", ("stop", "skip")),
                          ("compile", ("auto", "on", "off")), ("master", tuple(MASTER))):
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}={getattr(config, name)!r} is unknown; choose {' or '.join(choices)}")
    if config.keep < 0:
        raise ValueError(f"keep={config.keep} is less than none; choose 0 to keep all checkpoints")
    tokenizer = tokenizer_for(source, config.tokenizer) if source else load_tokenizer(config.tokenizer)
    parallel = start_parallel(config, model, stages)
    model.backend = config.attention
    dtype, _ = dtype_for(config.dtype, parallel.device, model.config.dim)
    if config.compile == "on" or (config.compile == "auto" and parallel.device.type == "cuda"):
        model.compile_blocks()  # not on a CPU unless asked: it needs a C++ compiler, and a while
    model = model if source else model.to(parallel.device, MASTER[config.master])
    model = shard_model(model, parallel, dtype, config.host_optimizer)
    if source:  # after sharding, so that each rank reads its own part
        load_weights(model, source, parallel.device)
    model.files |= tokenizer_files(tokenizer)  # so that every checkpoint is complete for transformers
    if not source:
        model.config = replace(model.config, bos_token_id=next(iter(tokenizer.begin), None),
                               eos_token_id=tokenizer.eos_id)
    folder = make_run_folder(config, default_out, parallel)
    seen = state["tokens_seen"] if config.resume and state else 0
    run = Run(config, folder, parallel, tokenizer, model,
              make_optimizer(model, config.weight_decay), Log(folder, parallel, seen), seen)
    run.print0(f"run folder: {folder}; torch {torch.__version__}; "
            f"{sum(p.numel() for p in model.parameters()):,} parameters")
    if source and state:
        load_checkpoint(source, model, run.optimizer)
    if source:
        run.print0(f"start: {source}, " + ("with Adam's moments" if state else "weights alone"))
    return run


def train(config: TrainConfig) -> Path:
    """Run the chosen stages, or what is left of them; return the run folder."""
    config = config_to_resume(config) if config.resume else config
    tokenizer = load_tokenizer(config.tokenizer)
    source, state = initial_weights(config)
    if source:
        model = empty_pretrained(source, MASTER[config.master])
    else:
        model = Transformer(preset_config(config.model, tokenizer.vocab_size)).init_weights(config.seed)
    stages = choose_stages(config, model.config.head_dim)
    done: list[dict[str, Any]] = []
    with start_run(config, f"runs/{config.recipe}", model, stages, source, state) as run:
        first = 0
        if config.resume and state:  # stages before this one are done, and of this one state["step"] steps
            first = [s.name for s in stages].index(state["stage"])
        for i, stage in enumerate(stages):
            if i >= first:
                data = prepare_data(stage, config, tokenizer, run.folder, run.parallel)
                run_stage(run, stage, data, state if config.resume and i == first else None)
            if config.eval:
                evaluate_checkpoint(run, stage.name, run.checkpoint(stage, stage.steps), done)
    return run.folder


def list_changes(then: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two nested dictionaries, for people: ["data short: ab12 then, cd34 now"]."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [change for key in sorted(then.keys() | now.keys())
                for change in list_changes(then.get(key), now.get(key), f"{name} {key}".strip())]
    return [] if then == now else [f"{name}: {then} then, {now} now".removeprefix(": ")]


Config = TypeVar("Config", bound=RunConfig)
MAY_CHANGE = {  # on --resume: these change rounding at most
    "eval", "eval_every", "samples", "save_every", "keep", "on_save_error", "on_diverge", "seq_parallel_size",
    "micro_batch_tokens", "attention", "reorder", "compile", "activations", "loss_chunk_tokens",
    "mlp_tile_tokens", "host_optimizer"}


def config_to_resume(config: Config) -> Config:
    """The interrupted run's own settings, and this command's where they can't alter its course.

    An option at its default counts as not given. Raises ValueError with all that differs otherwise.
    """
    path, kind = Path(config.resume) / "config.json", type(config)
    given = dict(asdict(config).items() - asdict(kind(resume=config.resume)).items())
    hints, before = get_type_hints(kind), read_json(path)
    if strange := [key for key, value in before.items() if not isinstance(value, hints.get(key, ()))]:
        raise ValueError(f"{path} is not the configuration of such a run: {strange[0]!r}")
    if changes := [f"--{key.replace('_', '-')} ({change})" for key in sorted(given.keys() - MAY_CHANGE)
                   for change in list_changes(before.get(key), given[key])]:
        raise ValueError(f"--resume {config.resume} goes on with its own settings; drop {', '.join(changes)} "
                         "or start a new run with --init")
    return kind(**before | given | {"resume": config.resume, "out": config.resume})


def initial_weights(config: RunConfig) -> tuple[Path | None, dict[str, Any] | None]:
    """The folder whose weights to start from, and its training state if it is one of our checkpoints.

    Its files are checked by their sums. A run to resume that has no checkpoint yet begins as it did before.
    """
    if config.resume:
        parallel = init_parallel()
        if parallel.main:  # what a writer that died has left
            for old in (Path(config.resume) / "checkpoints").glob("*.old"):
                replaced_folder(old.with_suffix("")).recover()
            for half in (Path(config.resume) / "checkpoints").glob("*.writing"):
                shutil.rmtree(half)
        dist.barrier()
        if found := newest_checkpoint(Path(config.resume), parallel):
            return found
        if parallel.main:
            print(f"{config.resume} has no checkpoint yet: from its beginning", flush=True)
    if not config.init:
        return None, None
    source = Path(config.init)
    if (source / "checkpoints").is_dir():
        if found := newest_checkpoint(source, init_parallel()):
            return found
        raise ValueError(f"{source} has no checkpoint to start from; it needs checkpoints/STAGE-STEP/")
    return source, read_state(source, init_parallel()) if (source / "state.json").exists() else None


def start_parallel(config: RunConfig, model: Transformer, stages: Sequence[Stage]) -> Parallel:
    """Start the ranks with the seq_parallel_size asked for, or the default for the longest stage."""
    heads = model.config.n_heads, model.config.n_kv_heads
    world = int(os.environ.get("WORLD_SIZE", 1))
    longest = max(stages, key=lambda stage: stage.seq_len)
    size = config.seq_parallel_size or default_seq_parallel_size(*heads, longest, world)
    if size not in valid_seq_parallel_sizes(*heads):
        raise ValueError(f"seq_parallel_size={size} cannot share {heads[0]} query and {heads[1]} KV heads; "
                         f"choose one of {valid_seq_parallel_sizes(*heads)}")
    return init_parallel(size)


def make_run_folder(config: RunConfig, default: str, parallel: Parallel) -> Path:
    """Make the run folder: the one asked for, or the first free of runs/tiny, runs/tiny-2, ..."""
    base = Path(config.out or default)
    if config.resume:
        return base
    if config.out and (base / "log.jsonl").exists():
        raise ValueError(f"--out {base} holds a run already; choose another, or go on with --resume {base}")
    folder, n = base, 1
    while not config.out and folder.exists():
        n += 1
        folder = base.with_name(f"{base.name}-{n}")
    dist.barrier()  # all ranks have looked before one of them makes it
    if parallel.main:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / "config.json.writing"
        aside.write_text(json.dumps(asdict(config) | {"resume": "", "out": ""}, indent=2) + "\n")
        aside.replace(folder / "config.json")
    dist.barrier()
    return folder


def run_and_exit(name: str, work: Callable[[], Any]) -> None:
    """Run `work`. However it ends, the ranks' group ends with it, and rank 0 says it for all."""
    code, report = 0, ""
    try:
        work()
    except Diverged as error:
        code, report = 1, f"{name}: diverged: {error}"
    except KeyboardInterrupt as error:
        code, report = 130, f"{name}: interrupted; {error or 'nothing is lost'}"  # 128 + SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if report and os.environ.get("RANK", "0") == "0":
        print(report, file=sys.stderr, flush=True)
    raise SystemExit(code)


# --- 10. The plan: will it fit, and how long will it take? ------------------------------------------

PLAN_GPU_BYTES = 80e9  # H100 80GB, of which CUDA and the allocator take some 5%
PLAN_FLOPS = 0.4 * 989e12  # 40% of its bf16 peak, what a well-tuned 8B model reaches at these lengths


def print_plan(config: TrainConfig) -> None:
    """Memory by part and by lever, and time, for the ranks asked for: arithmetic, nothing is trained."""
    world = config.world_size or 1
    shape = preset_config(config.model, load_tokenizer(config.tokenizer).vocab_size)
    for stage in choose_stages(config, shape.head_dim):
        sp = (config.seq_parallel_size
              or default_seq_parallel_size(shape.n_heads, shape.n_kv_heads, stage, world))
        print(f"\n{config.model}, stage {stage.name}: {stage.seq_len:,} tokens over {sp} of {world} ranks, "
              f"{stage.seq_len // sp:,} each; bfloat16, {PLAN_GPU_BYTES / 2**30:.1f} GiB a GPU")
        print_memory_plan(config, shape, stage.seq_len // sp, world)
        print_time_plan(shape, stage, sp, world)


def print_memory_plan(config: TrainConfig, shape: ModelConfig, tokens: int, world: int) -> None:
    """What each lever leaves a rank to hold, then the parts of what this command would take."""

    def parts(levers: MemoryOptions, host_optimizer: bool) -> dict[str, int]:
        return memory_per_rank(shape, levers, tokens, world, 2, MASTER[config.master].itemsize,
                               host_optimizer)

    rungs = {"everything kept, all logits at once": (replace(MEMORY_OPTIONS[0], loss_chunk_tokens=0), False),
             "recompute blocks, all logits at once": (replace(MEMORY_OPTIONS[1], loss_chunk_tokens=0), False),
             "everything kept, logits in chunks": (MEMORY_OPTIONS[0], False), "recompute blocks": (MEMORY_OPTIONS[1], False),
             "and the MLP in tiles": (MEMORY_OPTIONS[2], False), "and block inputs on the host": (MEMORY_OPTIONS[3], False),
             "and weights and Adam on the host": (MEMORY_OPTIONS[3], True)}
    fitting = []
    print(f"  {'what each lever leaves a rank to hold':<46} {'GiB':>8}")
    for name, rung in rungs.items():
        size = sum(parts(*rung).values())
        fitting += [name] if size < 0.95 * PLAN_GPU_BYTES else []
        print(f"  {name:<46} {size / 2**30:>8.1f}  {'fits' if name in fitting else '-'}")
    levers, _ = memory_options_for(config, shape, tokens, world, 2, PLAN_GPU_BYTES, "cuda")
    mine = parts(levers, config.host_optimizer)
    total = sum(mine.values())
    print(f"  this command: {levers}")
    for name, part in mine.items():
        print(f"    {name:<44} {part / 2**30:>8.1f}")
    print(f"    {'in all':<44} {total / 2**30:>8.1f}  " + (
        "it fits" if total < 0.95 * PLAN_GPU_BYTES
        else f"it does not fit; what would: {', '.join(fitting[:1]) or 'more ranks'}"))


def print_time_plan(shape: ModelConfig, stage: Stage, sp: int, world: int) -> None:
    """FLOPs of a step from the document lengths that the domains' names promise (short ones: 900 tokens)."""
    flops = 0.0  # of an average sequence
    for domain, share in stage.mixture.items():
        length = parse_length(domain.partition("-")[2] or 900)
        flops += (share / sum(stage.mixture.values()) * stage.seq_len / length
                  * flops_per_step(shape, (length,)))
    sequences = stage.batch_tokens // stage.seq_len
    seconds = sequences * flops / PLAN_FLOPS / world
    heads = 2 * shape.n_heads + 2 * max(shape.n_kv_heads, sp)
    sent = 2 * 3 * shape.n_layers * stage.seq_len // sp * shape.head_dim * heads * (sp - 1) / sp
    print(f"  a step of {stage.batch_tokens:,} tokens: {sequences * flops:.2e} FLOPs, {seconds:,.1f} s at "
          f"{PLAN_FLOPS / 1e12:.0f} TFLOP/s a GPU, {stage.batch_tokens / seconds / world:,.0f} tok/s each;\n"
          f"  {stage.steps:,} steps: {stage.steps * seconds * world / 3600:,.0f} GPU-hours; where a document "
          f"lies on two ranks, each sends {sent / 1e9:.1f} GB a sequence")


def main() -> None:
    config = parse_cli(TrainConfig, __doc__)
    if config.plan:
        return print_plan(config)
    if config.world_size:
        raise ValueError("--world-size is for --plan; to train on several ranks, start with torchrun")
    run_and_exit("train.py", lambda: train(config))


if __name__ == "__main__":
    run_main(main)
