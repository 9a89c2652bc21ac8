"""Training: a curriculum of stages, each with longer sequences than the last, and one exact step.

    python train.py                                   the tiny recipe, on a laptop
    torchrun --nproc-per-node 2 train.py              the same numbers from two processes
    torchrun --nproc-per-node 8 train.py --seq 512k   eight ranks share every sequence
    torchrun --nproc-per-node 8 train.py --recipe prolong --stage 64k --init DIR --data DIR

A recipe is a list of stages, and a stage is data: its length, RoPE base, mixture, learning rate.
Weights and Adam's moments go on from stage to stage; the learning rate starts over (Table 9).

    base  256 tokens  ->  long  2,048          ->  ultra  16,384          tiny (paper's / 32)
    8K (Llama-3)      ->  64k  theta 8e6       ->  512k  theta 1.28e8     prolong

One step is one big batch, exactly, however many ranks and micro-batches it is dealt to:

    valid  = number of trained tokens in the whole step       counted first, over all ranks
    loss   = sum over ranks and micro-batches of loss_sum / valid
    grad   = sum over ranks of its gradient                   FSDP must sum here, not average

With a mean of micro-batch means, a token among 3 trained tokens would count as much as a hundred
among 300 (section A.3).

To follow a run, begin with `train` and `run_stage` in section 7. Sources: ProLong Table 9, 4, 6.1,
A.3, A.4; the authors' scripts where they differ.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

import data
import eval as evaluation  # `eval` is a function of Python's
import model as llama  # most functions here are given a `model`
from data import Batch, Mixture, PackedDataset, PackedSequence, Tokenizer
from model import MemoryOptions, ModelConfig, Parallel, Transformer
from support import memory, scores, speed
from support import run as runs
from support.cli import Diverged, Stopped, choose, format_length, parse_cli, run_main, warn
from support.files import whole_folder, write_json
from support.memory import dtype_for, memory_per_rank, memory_there  # noqa: F401
from support.options import RunConfig, TrainConfig, usual_recipe
from support.report import by_domain, draw_losses, draw_scores
from support.run import config_to_resume, fail_together, read_state

# --- 1. Recipes -------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum."""

    name: str
    seq_len: int
    rope_theta: float | None  # None: the model keeps its own, and its context length
    mixture: dict[str, float]  # each domain's share of the tokens; "books-2k": of documents of 2K
    tokens: int
    batch_tokens: int  # per step, over all ranks
    lr: float
    min_lr: float
    warmup: float = 0.1  # share of the steps

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens


# Short documents keep short-context abilities. In parts: ShortMix (Table 9; in ablations, Table 5)
# and the mixes that it was compared with (Table 6).
SHORT_MIX = {"fineweb_edu": 27, "fineweb": 27, "tulu_v2": 11, "stackexchange": 11, "wikipedia": 8,
             "openwebmath": 8, "arxiv": 8}
SHORT_MIXES = {
    "shortmix": SHORT_MIX,
    "shortmix-ablation": dict.fromkeys(SHORT_MIX, 10) | {"fineweb_edu": 25, "fineweb": 25},
    "slimpajama": {"slimpajama": 1},
    "fineweb-edu": {"fineweb_edu": 1},
    "dclm": {"dclm": 1},
}


def with_short_mix(mixture: dict[str, float], name: str = "shortmix") -> dict[str, float]:
    """Fill a mixture's long domains up to 1 with a short mix."""
    short = choose("short mix", name, SHORT_MIXES)
    known = {domain for mix in SHORT_MIXES.values() for domain in mix}
    long = {domain: share for domain, share in mixture.items() if domain not in known}
    rest = 1 - sum(long.values())
    if rest < 1e-6:
        raise ValueError(f"the mixture of {', '.join(long)} leaves no share for a short mix")
    return long | {domain: rest * parts / sum(short.values()) for domain, parts in short.items()}


TINY = [
    # Without the smallest documents, some seeds learn a blurred lookup (docs/LOG.md).
    Stage("base", 256, 1e4, {"recall_bare-64": 0.3, "recall_bare-256": 0.3, "recall-256": 0.4},
          tokens=2500 * 1024, batch_tokens=1024, lr=3e-3, min_lr=3e-4),
    Stage("long", 2048, 1.6e5,
          {"recall_bare-256": 0.06, "recall-256": 0.08, "recall-2k": 0.64, "code_repos-2k": 0.06,
           "textbooks-2k": 0.02, "short": 0.04, "icl-2k": 0.10},
          tokens=700 * 2048, batch_tokens=2048, lr=3e-3, min_lr=3e-5),
    Stage("ultra", 16_384, 1e7,
          {"recall_bare-256": 0.10, "recall-2k": 0.14, "recall-16k": 0.52, "code_repos-16k": 0.03,
           "textbooks-16k": 0.02, "short": 0.04, "icl-16k": 0.15},
          tokens=56 * 16_384, batch_tokens=16_384, lr=3e-3, min_lr=3e-5),
]
PROLONG = [
    Stage("64k", 65_536, 8e6,
          with_short_mix({"code_repos-64k": 0.30, "books-64k": 0.30, "textbooks-64k": 0.03}),
          tokens=20 * 2**30, batch_tokens=4 * 2**20, lr=1e-5, min_lr=1e-6),
    # Table 9 says 1e-5 for both; we take the 5e-6 of the authors' train_512K.sh.
    Stage("512k", 524_288, 1.28e8,
          with_short_mix({"code_repos-512k": 0.15, "code_repos-64k": 0.15, "textbooks-512k": 0.03,
                          "books-512k": 0.30 * 0.17, "books-64k": 0.30 * 0.83}),
          tokens=20 * 2**30, batch_tokens=8 * 2**20, lr=5e-6, min_lr=5e-7),
]
# The paper's ablations (A.4): Llama-3-8B, not its Instruct, and no textbooks.
ABLATION = [replace(PROLONG[0], tokens=5 * 2**30, mixture=with_short_mix(
    {"code_repos-64k": 0.30, "books-64k": 0.30}, "shortmix-ablation"))]
RECIPES = {"tiny": TINY, "prolong": PROLONG, "ablation": ABLATION}


def stage_at_length(stage: Stage, seq_len: int, theta: float | None) -> Stage:
    """The stage and its longest documents at another length and theta."""
    mixture: dict[str, float] = {}
    for domain, share in stage.mixture.items():
        kind = data.parse_domain(domain)
        if kind.length:
            length = seq_len if kind.length == stage.seq_len else min(kind.length, seq_len)
            domain = f"{kind.name}-{format_length(length)}"
        mixture[domain] = mixture.get(domain, 0) + share
    batch_tokens = math.ceil(stage.batch_tokens / seq_len) * seq_len
    return replace(stage, seq_len=seq_len, mixture=mixture, rope_theta=theta,
                   batch_tokens=batch_tokens, tokens=stage.steps * batch_tokens)


# --- 2. Which stages a command runs -----------------------------------------------------


def choose_stages(config: TrainConfig, shape: ModelConfig) -> list[Stage]:
    """The recipe's stages, changed as the command says; with `--seq` its last one alone."""
    stages = choose("recipe", config.recipe, RECIPES)
    if config.stage:
        by_name = {stage.name: stage for stage in stages}
        stages = [choose(f"stage of recipe {config.recipe}:", config.stage, by_name)]
    if config.seq and config.seq != stages[-1].seq_len:
        own, context = shape.rope_theta, shape.max_seq_len  # of the model, not of the recipe
        theta = llama.ntk_rope_theta(own, context, config.seq, shape.head_dim)
        stages = [stage_at_length(stages[-1], config.seq, theta)]
        if theta != own and not config.rope_theta:
            warn(f"theta for {config.seq:,} tokens by the NTK rule: {own:,.0f} -> {theta:,.0f}")
    elif config.seq:
        stages = stages[-1:]
    if config.mix and config.short_mix:
        raise ValueError("--mix gives the whole mixture; drop --short-mix")
    chosen = []
    for stage in stages:
        if config.mix:
            stage = replace(stage, mixture=data.parse_mixture(config.mix))
        if config.short_mix:
            stage = replace(stage, mixture=with_short_mix(stage.mixture, config.short_mix))
        if config.rope_theta is not None:
            stage = replace(stage, rope_theta=config.rope_theta)
        chosen.append(scheduled(stage, config))
    return chosen


def scheduled(stage: Stage, config: RunConfig) -> Stage:
    """The stage with the command's steps, batch and learning rate."""
    if config.lr is not None:
        stage = replace(stage, lr=config.lr, min_lr=config.lr * stage.min_lr / stage.lr)
    batch_tokens = config.batch_tokens or stage.batch_tokens
    tokens = config.steps * batch_tokens if config.steps else stage.tokens
    if tokens < batch_tokens:
        raise ValueError(f"stage {stage.name} has {tokens:,} tokens, less than a step of "
                         f"{batch_tokens:,}; choose a smaller --batch-tokens, or --steps")
    return replace(stage, batch_tokens=batch_tokens, tokens=tokens)


# --- 3. From a stage to each rank's micro-batches ---------------------------------------


@dataclass(frozen=True)
class StepLayout:
    """How a step's sequences are dealt to ranks and micro-batches."""

    sequences: int  # per step, over all ranks
    per_batch: int  # sequences of one micro-batch
    grad_accum_steps: int


def step_layout(stage: Stage, parallel: Parallel, micro_batch_tokens: int | None) -> StepLayout:
    """Deal a step, by default with as many sequences a micro-batch as fit in 64K tokens a rank."""
    seq_len, dp, sp = stage.seq_len, parallel.dp_size, parallel.sp_size
    sequences = stage.batch_tokens // seq_len
    if stage.batch_tokens % seq_len or sequences % dp:
        raise ValueError(f"batch_tokens={stage.batch_tokens:,} is not a whole number of sequences "
                         f"for {dp} data-parallel ranks; choose a multiple of {seq_len * dp:,}")
    per_rank, micro = sequences // dp, micro_batch_tokens
    if not micro:
        limit = max(1, 65_536 * sp // seq_len)
        micro = seq_len * max(n for n in range(1, limit + 1) if per_rank % n == 0)
    if micro % seq_len or per_rank * seq_len % micro or micro % sp:
        raise ValueError(f"micro_batch_tokens={micro:,} does not divide {per_rank} sequences of "
                         f"{seq_len:,} tokens, or cannot be cut into {sp} equal shares")
    return StepLayout(sequences, micro // seq_len, per_rank * seq_len // micro)


def default_seq_parallel_size(config: ModelConfig, stage: Stage, world_size: int) -> int:
    """The smallest P for at most 64K tokens of a sequence a rank (or all), a sequence for each."""
    sizes = llama.valid_seq_parallel_sizes(config.n_heads, config.n_kv_heads)
    sequences = stage.batch_tokens // stage.seq_len
    for P in sizes:
        fits = world_size == P or stage.seq_len <= 65_536 * P
        if fits and world_size % P == 0 and sequences % (world_size // P) == 0:
            return P
    raise ValueError(f"no seq_parallel_size fits {world_size} ranks, {sequences} sequences a step "
                     f"and heads that allow {sizes}; change --batch-tokens or --seq-parallel-size")


def prepare_data(run: Run, stage: Stage, packs: str) -> tuple[Path, Stage]:
    """The folder of packed domains, and the stage without the domains that could not be packed."""
    if packs:
        return Path(packs), stage
    folder = run.folder / "data" / stage.name
    if run.parallel.main:
        pack_domains(stage, folder, run.tokenizer, run.config.seed)
    dist.barrier()  # now all ranks see which domains there are
    packed = {name: share for name, share in stage.mixture.items() if (folder / name).exists()}
    return folder, replace(stage, mixture=packed)


def pack_domains(stage: Stage, folder: Path, tokenizer: Tokenizer, seed: int) -> None:
    """Pack as many sequences of each embedded domain as the stage will draw.

    A domain without documents of the stage's length is left out, and said; others fill its share.
    Raises ValueError if none is left.
    """
    shares = {name: share for name, share in stage.mixture.items() if share > 0}
    left_out = []
    for name, share in shares.items():
        wanted = math.ceil(stage.tokens / stage.seq_len * share / sum(shares.values())) + 1
        try:
            if not (folder / name).exists():
                data.pack_domain(folder / name, name, wanted, tokenizer, stage.seq_len, seed)
        except data.NothingPacked as error:
            left_out.append(error)
            print(f"left out of the mixture: {error}", flush=True)
    if len(left_out) == len(shares):
        raise left_out[0]


LoadedStep = tuple[list[PackedSequence], list[Batch], dict[str, int]]


def load_steps(mixture: Mixture, steps: int, layout: StepLayout, parallel: Parallel,
               reorder: bool) -> Iterator[LoadedStep]:
    """Each step's sequences as dealt, this rank's share, and how far domains were read.

    A thread loads the next step while this one is trained.
    """
    def load() -> LoadedStep:
        dealt = data.arrange_step(mixture.draw(layout.sequences), parallel.dp_size,
                                  layout.per_batch, reorder)
        batches = [data.make_batch(ranks[parallel.dp_rank]) for ranks in dealt]
        sequences = [s for ranks in dealt for part in ranks for s in part]
        return sequences, batches, dict(mixture.drawn)

    with ThreadPoolExecutor(1) as loader:
        following = loader.submit(load)
        for left in reversed(range(steps)):
            loaded = following.result()
            if left:
                following = loader.submit(load)
            yield loaded


# --- 4. Memory, and the model over the ranks --------------------------------------------

MEMORY_OPTIONS = (  # from the fastest to the smallest
    MemoryOptions(),
    MemoryOptions(activations="attention"),
    MemoryOptions(activations="recompute"),
    MemoryOptions(activations="recompute", mlp_tile_tokens=8192),
    MemoryOptions(activations="offload", mlp_tile_tokens=8192),
    MemoryOptions(activations="offload", mlp_tile_tokens=8192, head_chunks=4),
)


# What the command asks for, or the fastest that fit (they change no number); and why.
memory_options_for = partial(memory.first_that_fits, MEMORY_OPTIONS)


def shard_model(model: Transformer, parallel: Parallel, dtype: torch.dtype,
                host_optimizer: bool = False) -> Transformer:
    """Spread weights, gradients and optimizer over all ranks (FSDP2), and compute in `dtype`.

    FSDP gathers a block's weights just before use and sums its gradients just after. We use it on
    one rank too, so that precision is decided in one place. Three settings are easy to get wrong:
    gradients must be summed, not averaged, since the loss is already divided by the step's count;
    the setters are not recursive; and inputs must not be cast, or RoPE's angles become bfloat16.
    """
    sum_dtype = torch.promote_types(dtype, torch.float32)
    policy = fsdp.MixedPrecisionPolicy(dtype, reduce_dtype=sum_dtype, cast_forward_inputs=False)
    offload = fsdp.CPUOffloadPolicy() if host_optimizer else fsdp.OffloadPolicy()
    for module in [*model.layers, model]:
        fsdp.fully_shard(module, mesh=parallel.world_mesh, mp_policy=policy, offload_policy=offload)
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for method in ("loss", "logits", "is_right"):  # any but `forward` would miss FSDP's hooks
        fsdp.register_fsdp_forward_method(model, method)
    return model


def make_optimizer(model: Transformer, weight_decay: float) -> AdamW:
    """AdamW 0.9/0.95 (Table 9). Norm gains are not decayed: they have no reason to go to zero."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    gains = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": gains, "weight_decay": 0.0}]
    return AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def learning_rate(stage: Stage, step: int) -> float:
    """Rate of step 0 .. steps-1: linear over the warmup, then a cosine down to `min_lr`."""
    warmup = max(1, round(stage.steps * stage.warmup))
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, stage.steps - warmup)
    return stage.min_lr + 0.5 * (stage.lr - stage.min_lr) * (1 + math.cos(math.pi * done))


# --- 5. The step ------------------------------------------------------------------------


@dataclass(frozen=True)
class StepResult:
    loss: float  # nats per trained token, over the whole step
    grad_norm: float  # before clipping
    valid_tokens: int
    by_sequence: list[tuple[float, float]]  # in the order dealt: sum of losses, trained tokens


def train_step(model: Transformer, optimizer: Optimizer, batches: Sequence[Batch],
               lr: float, parallel: Parallel, clip: float = 1.0) -> StepResult:
    """One optimizer step over this rank's micro-batches and those of all other ranks.

    Raises Diverged on all ranks, before any weight changes, if loss or gradient is not finite.
    """
    shards = [batch.shard(parallel.sp_rank, parallel.sp_size) for batch in batches]
    trained = [labels != data.IGNORE_INDEX for _, labels in shards]
    counts = sum_by_sequence(trained, batches[0], parallel)
    valid, losses = counts.sum(), []
    for shard, batch in zip(shards, batches, strict=True):
        input_ids, labels = (llama.to_device(tensor, parallel.device) for tensor in shard)
        loss, _ = model.loss(input_ids, labels, batch.doc_lens, parallel, by_token=True)  # (T / P,)
        # Even a rank with no valid token runs backward: others wait for its part of each sum.
        (loss.sum() / valid.clamp(min=1).to(loss.dtype)).backward()
        losses.append(loss.detach())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    loss_sums = sum_by_sequence(losses, batches[0], parallel)  # (sequences of the step,)
    rows = loss_sums, counts, norm.to(counts).expand_as(counts)
    sums, tokens, norms = torch.stack(rows).tolist()  # the only wait for the device
    result = StepResult(sum(sums) / max(1, sum(tokens)), norms[0], int(sum(tokens)),
                        list(zip(sums, tokens, strict=True)))
    if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
        optimizer.zero_grad()
        raise Diverged(f"loss is {result.loss}, the gradient's norm {result.grad_norm}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return result


def sum_by_sequence(values: list[Tensor], batch: Batch, parallel: Parallel) -> Tensor:
    """Sums over each sequence of the step, on all ranks: (sequences,) float64, in the order dealt.

    `values` holds this rank's number for each of its tokens, (T / P,) of each micro-batch.
    """
    mine = torch.stack(values)  # (micro-batches, T / P)
    whole = mine.new_zeros(len(mine), parallel.dp_size, parallel.sp_size, mine.shape[1])
    whole[:, parallel.dp_rank, parallel.sp_rank] = mine  # 0 where other ranks have theirs
    seq_len = len(batch.input_ids) // len(batch.sources)
    # (micro-batches, dp, P, T / P) -> (sequences, seq_len) -> (sequences,)
    return parallel.all_sum(whole.view(-1, seq_len).sum(dim=1, dtype=torch.float64))


# --- 6. Checkpoints ---------------------------------------------------------------------
#
# A checkpoint is a Hugging Face folder with Adam's moments in optimizer/ and with state.json (see
# support/run.py). There is no random state to save: the seed and `drawn`, how far each domain was
# read, tell which data come next. A resumed run is the same, bit for bit.


def moments(model: Transformer, optimizer: Optimizer) -> dict[str, Tensor]:
    """Adam's state under the names of the weights. Raises RuntimeError if a weight has none."""
    tensors: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        state = optimizer.state.get(weight, {})
        if state.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise RuntimeError(f"{name} has no Adam moments: the optimizer has not stepped it")
        tensors |= {f"{name}/{key}": state[key] for key in state}
    return tensors


def save_checkpoint(folder: Path, model: Transformer, optimizer: Optimizer,
                    state: dict[str, Any], parallel: Parallel) -> None:
    """Write a checkpoint; every rank calls it. The folder gets its name when it is whole.

    Raises OSError on all ranks if one can't write.
    """
    tensors, what = moments(model, optimizer), f"write {folder}"
    with ExitStack() as stack:
        with fail_together(parallel, what):
            if parallel.main:
                stack.enter_context(whole_folder(folder))
        aside = folder.with_name(folder.name + ".writing")  # which whole_folder has made
        with fail_together(parallel, what):
            llama.write_model(model, aside, parallel.main)
        with fail_together(parallel, what):
            dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(
                str(aside / "optimizer"), save_distributed=True))
        with fail_together(parallel, what):
            if parallel.main:
                write_json(aside / "state.json", state | {"files": runs.list_files(aside)})
                stack.close()  # fsync and rename


def load_checkpoint(folder: Path, model: Transformer,
                    optimizer: Optimizer) -> dict[str, Any]:
    """Read Adam's moments into a sharded model's optimizer, and return the state.

    Any number of ranks may have written them; each reads the rows that it keeps now.
    Raises ValueError for damaged ones and another model's.
    """
    state = read_state(folder)
    for weight in model.parameters():
        optimizer.state[weight] = {"step": torch.zeros((), device=weight.device),
                                   "exp_avg": torch.zeros_like(weight),
                                   "exp_avg_sq": torch.zeros_like(weight)}
    tensors, path = moments(model, optimizer), folder / "optimizer"
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except dcp.api.CheckpointException as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return state


def initial_weights(config: RunConfig) -> tuple[Path | None, dict[str, Any] | None]:
    """The folder whose weights to start from, and its state if we wrote it. Starts the ranks."""
    parallel = llama.init_parallel()
    for folder in filter(None, (config.resume, config.init)):
        found = runs.newest_checkpoint(Path(folder), parallel.main)  # if it is the folder of a run
        if found:
            return found
    if not config.init:
        return None, None
    source = Path(config.init)
    return source, read_state(source) if (source / "state.json").exists() else None


# --- 7. The run: for each stage, for each step ------------------------------------------

SAVE_SECONDS = 1800  # between checkpoints, without --save-every


@dataclass
class Run:
    """What lasts through all stages."""

    config: RunConfig
    folder: Path
    parallel: Parallel
    tokenizer: Tokenizer
    model: Transformer
    optimizer: Optimizer
    dtype: torch.dtype
    log: runs.Log
    stop: SimpleNamespace  # asked, busy: see runs.stop_on_signals
    tokens_seen: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def checkpoint(self, stage: Stage, step: int) -> Path:
        return self.folder / "checkpoints" / f"{stage.name}-{step}"

    def print0(self, text: str) -> None:
        if self.parallel.main:
            print(text, flush=True)


def train(config: TrainConfig) -> Path:
    """Run the chosen stages, or what is left of a run to resume; return the run folder."""
    config = config_to_resume(config) if config.resume else config
    source, state = initial_weights(config)
    tokenizer = data.tokenizer_for(source, config.tokenizer)
    config = replace(config, recipe=config.recipe or usual_recipe(tokenizer))
    if source:
        model = llama.empty_pretrained(source, torch.float32)
    else:
        shape = llama.preset_config(config.model, tokenizer.vocab_size)
        model = Transformer(shape).init_weights(config.seed)
    stages = choose_stages(config, model.config)
    resumed = state if config.resume else None  # of its stage resumed["step"] steps are done
    first = [stage.name for stage in stages].index(resumed["stage"]) if resumed else 0
    out = f"runs/{config.recipe}"
    with start_run(config, out, model, tokenizer, stages, source, state) as run:
        for i, stage in enumerate(stages):
            if i >= first:
                folder, packed = prepare_data(run, stage, config.data)
                run_stage(run, packed, folder, resumed if i == first else None)
            if config.eval:
                evaluate_checkpoint(run, stage.name, run.checkpoint(stage, stage.steps))
        if run.evaluations:
            print(scores.format_recall(run.evaluations[-1]), flush=True)
    return run.folder


def run_stage(run: Run, stage: Stage, folder: Path,
              resumed: dict[str, Any] | None = None) -> None:
    """Train one stage on the packed domains in `folder`, or what `resumed` leaves of it."""
    config, parallel, model = run.config, run.parallel, run.model
    layout = step_layout(stage, parallel, config.micro_batch_tokens)
    mixture, fingerprint = open_mixture(run, stage, folder, resumed)
    if stage.rope_theta is not None:  # a context never becomes shorter
        model.set_rope(stage.rope_theta, max(stage.seq_len, model.config.max_seq_len))
    set_memory_and_announce(run, stage, layout, mixture)

    first = resumed["step"] if resumed else 0
    steps = load_steps(mixture, stage.steps - first, layout, parallel, config.reorder)
    run.stop.busy = True
    begin = saved_at = time.monotonic()
    for step, (sequences, batches, drawn) in enumerate(steps, start=first):
        lr = learning_rate(stage, step)
        try:
            result = train_step(model, run.optimizer, batches, lr, parallel, config.clip)
        except Diverged as error:
            sources = ", ".join(sequence.source for sequence in sequences)
            what = f"stage {stage.name} step {step + 1}: {error} at {sources}"
            raise Diverged(what) from None
        run.tokens_seen += stage.batch_tokens
        log_step(run, stage, step, lr, result, sequences, batches, time.monotonic() - begin)

        due = time.monotonic() - saved_at > SAVE_SECONDS
        if config.save_every:
            due = (step + 1) % config.save_every == 0
        wishes = torch.tensor([due, run.stop.asked], dtype=torch.float64)
        due, stop = parallel.all_sum(wishes).tolist()  # if one rank wants to, all do
        if due or stop or step + 1 == stage.steps:
            state = {"stage": stage.name, "step": step + 1, "steps": stage.steps, "drawn": drawn,
                     "tokens_seen": run.tokens_seen, "fingerprint": fingerprint}
            save_checkpoint(run.checkpoint(stage, step + 1), model, run.optimizer, state, parallel)
            saved_at = time.monotonic()
            if parallel.main:
                runs.prune_checkpoints(run.folder, config.keep)
        if stop:
            raise Stopped
        begin = time.monotonic()  # a step's time includes loading, but no checkpoint
    run.stop.busy = False
    if parallel.all_sum(torch.tensor(float(run.stop.asked))):  # during the last checkpoint
        raise Stopped


def open_mixture(run: Run, stage: Stage, folder: Path,
                 resumed: dict[str, Any] | None) -> tuple[Mixture, dict[str, Any]]:
    """The stage's mixture, from where `resumed` left it, and a fingerprint of stage and data.

    Raises ValueError for damaged data, and for what is not as it was when the run began.
    """
    parallel, names = run.parallel, [name for name, share in stage.mixture.items() if share]
    datasets = {name: PackedDataset(folder / name) for name in names}
    for i, dataset in enumerate(datasets.values()):
        if dataset.seq_len != stage.seq_len:
            raise ValueError(f"{dataset.folder} holds sequences of {dataset.seq_len:,} tokens, "
                             f"the stage wants {stage.seq_len:,}; pack it at that length")
        dataset.check_tokenizer(run.tokenizer)
        dataset.check_ids(run.model.config.vocab_size)
        if i % parallel.world_size == parallel.rank:  # a second per GB, shared by the ranks
            dataset.check_content()
    dist.barrier()
    mixture = Mixture(datasets, stage.mixture, run.config.seed)
    hashes = {f"data {name}": dataset.meta["sha256"] for name, dataset in datasets.items()}
    fingerprint = {**asdict(stage), **hashes, "seed": run.config.seed,
                   "tokenizer": run.tokenizer.fingerprint}
    if resumed:
        runs.check_unchanged(run.folder, resumed["fingerprint"], fingerprint)
        mixture.resume(resumed["drawn"])
    return mixture, fingerprint


def set_memory_and_announce(run: Run, stage: Stage, layout: StepLayout, mixture: Mixture) -> None:
    """Choose the memory options (`memory_options_for`), and print what runs."""
    parallel, model, micro = run.parallel, run.model, layout.per_batch * stage.seq_len
    options, why = memory_options_for(
        run.config, model.config, micro // parallel.sp_size, parallel.world_size,
        run.dtype.itemsize, memory_there(parallel.device), parallel.device.type, parallel.sp_size)
    model.set_memory_options(options)
    flops = layout.sequences * sum(  # of each domain's first sequence, by its share
        share * llama.flops_per_step(model.config, mixture.datasets[name][0].doc_lens)
        for name, share in mixture.shares.items())
    peak = parallel.world_size * llama.device_peak_flops(parallel.device, run.dtype)
    run.print0(f"\nstage {stage.name}: {stage.steps:,} steps of {stage.batch_tokens:,} tokens, in "
               f"sequences of {stage.seq_len:,}; RoPE's theta {model.config.rope_theta:,.0f}\n"
               f"  ranks: {parallel.world_size}, {parallel.sp_size} to a sequence; micro-batches a "
               f"step: {layout.grad_accum_steps}, of {micro:,} tokens\n  a step: {flops:.1e} "
               f"FLOPs, at least {flops / peak:,.2f} s at {peak:.1e} FLOP/s\n  memory: {why}")
    for name, packs in mixture.datasets.items():
        run.print0(f"  {mixture.shares[name]:>6.1%} {name:<16} {len(packs):>6,} sequences, sha256 "
                   f"{packs.meta['sha256'][:12]}, {packs.trained_share:.0%} of tokens trained")


def log_step(run: Run, stage: Stage, step: int, lr: float, result: StepResult,
             sequences: list[PackedSequence], batches: list[Batch], seconds: float) -> None:
    """Log a step, and a small evaluation where --eval-every says so."""
    parallel, model = run.parallel, run.model
    quick = {}
    if run.config.eval_every and (step + 1) % run.config.eval_every == 0:
        quick = {"eval": evaluation.quick_scores(model, run.tokenizer, stage.seq_len, parallel)}
        assert isinstance(model, fsdp.FSDPModule)
        model.reshard()  # as a backward pass would: else the embedding stays gathered
    flops = sum(llama.flops_per_step(model.config, s.doc_lens) for s in sequences)
    peak = parallel.world_size * llama.device_peak_flops(parallel.device, run.dtype)
    crossing = [llama.crosses_ranks(batch.doc_lens, parallel.sp_size) for batch in batches]
    run.log.write({"stage": stage.name, "step": step + 1, "seq_len": stage.seq_len,
                   "loss": result.loss, "grad_norm": result.grad_norm,
                   "valid_tokens": result.valid_tokens,
                   "domains": by_domain(sequences, result.by_sequence), "lr": lr,
                   "tokens_seen": run.tokens_seen, "sp_exchanged": sum(crossing) / len(crossing),
                   "tok_per_s": stage.batch_tokens / seconds, "mfu": flops / seconds / peak,
                   "mem_gib": memory.memory_gib(parallel.device), "time_s": seconds, **quick},
                  stage.steps, parallel.world_size)


def evaluate_checkpoint(run: Run, name: str, checkpoint: Path,
                        more: Callable[[Transformer], list[dict[str, Any]]] | None = None) -> None:
    """Evaluate a checkpoint as a user would load it; print and draw it beside the run's others.

    `more` gives rows of which eval.py does not know.
    """
    if run.parallel.main:
        path = run.folder / "eval" / f"{name}.json"
        if not path.exists():  # else the run that we resume has done it
            model = llama.load_pretrained(checkpoint, device=run.parallel.device)
            settings = evaluation.EvalConfig(model=str(checkpoint), samples=run.config.samples,
                                             tokenizer=run.config.tokenizer)
            result = evaluation.evaluate(model, settings, name)
            result["results"] += more(model) if more else []
            write_json(path, result, indent=1)
        run.evaluations.append(json.loads(path.read_text()))
        figures = run.folder / "figures"
        drawn = draw_scores(run.evaluations, figures / "recall_by_length.png", by_depth=True)
        draw_losses(run.folder)
        print(evaluation.format_table(run.evaluations))
        print(f"figures: {figures}" if drawn else "no figures without matplotlib", flush=True)
    dist.barrier()


# --- 8. How a run begins, and the command -----------------------------------------------


@contextmanager
def start_run(config: RunConfig, default_out: str, model: Transformer, tokenizer: Tokenizer,
              stages: Sequence[Stage], source: Path | None,
              state: dict[str, Any] | None) -> Iterator[Run]:
    """Start ranks, model, folder and Adam, with weights from `source`, moments if `state`."""
    shape = model.config
    longest = max(stages, key=lambda stage: stage.seq_len)
    world = int(os.environ.get("WORLD_SIZE", 1))
    sp_size = config.seq_parallel_size or default_seq_parallel_size(shape, longest, world)
    llama.check_heads(sp_size, shape.n_heads, shape.n_kv_heads, config.head_chunks or 1)
    parallel = llama.init_parallel(sp_size)
    dtype, why = dtype_for(config.dtype, parallel.device, shape.dim)

    auto = config.attention == "auto"
    model.backend = llama.backend_for(parallel.device, dtype) if auto else config.attention
    if config.compile == "on" or (config.compile == "auto" and parallel.device.type == "cuda"):
        model.compile_blocks()  # on a CPU only if asked: it needs a C++ compiler
    if not source:
        model = model.to(parallel.device)
        model.config = replace(shape, bos_token_id=next(iter(tokenizer.begin), None),
                               eos_token_id=tokenizer.eos_id)
    shard_model(model, parallel, dtype, config.host_optimizer)
    if source:  # after sharding: each rank reads only the rows that it keeps
        llama.load_weights(model, source, parallel.device)
    model.files |= data.tokenizer_files(tokenizer)
    optimizer = make_optimizer(model, config.weight_decay)

    folder = runs.make_run_folder(config, default_out, parallel)
    seen = state["tokens_seen"] if config.resume and state else 0
    with runs.alone_in(folder, parallel.main), runs.stop_on_signals(folder) as stop:
        log = runs.Log(folder, parallel.main, seen)
        run = Run(config, folder, parallel, tokenizer, model, optimizer, dtype, log, stop, seen)
        run.print0(f"run folder: {folder}; torch {torch.__version__}; {parallel.device}\n"
                   f"compute in {str(dtype)[6:]} ({why}), attention by {model.backend}")
        if source and state:
            load_checkpoint(source, model, optimizer)
        how = "with Adam's moments" if state else "weights alone"
        run.print0(f"start: {source}, {how}" if source else "start: from the beginning")
        yield run


def print_plan(config: TrainConfig) -> None:
    """Whether each stage fits the ranks, and how long it takes."""
    world = config.world_size or 1
    tokenizer = data.tokenizer_for(None, config.tokenizer)
    config = replace(config, recipe=config.recipe or usual_recipe(tokenizer))
    shape = llama.preset_config(config.model, tokenizer.vocab_size)
    for stage in choose_stages(config, shape):
        sp = config.seq_parallel_size or default_seq_parallel_size(shape, stage, world)
        llama.check_heads(sp, shape.n_heads, shape.n_kv_heads, config.head_chunks or 1)
        chosen, _ = memory_options_for(config, shape, stage.seq_len // sp, world, 2,
                                       memory.GPU_BYTES, "cuda", sp)
        print(memory.format_plan(config, shape, stage, MEMORY_OPTIONS, chosen, sp, world))
        print(speed.format_time(shape, stage, chosen, sp, world))


def main() -> None:
    config = parse_cli(TrainConfig, __doc__)
    if config.plan:
        return print_plan(config)
    if config.world_size:
        raise ValueError("--world-size is for --plan; to train on several, use torchrun")
    train(config)


if __name__ == "__main__":
    run_main(main)
