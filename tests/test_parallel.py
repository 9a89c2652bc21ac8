"""Many ranks compute what one rank computes: losses, gradients, steps, checkpoints and refusals.

The reference is one process without FSDP and with attention's mask written out. It sees the whole
batch; the ranks see it dealt over a grid (dp, sp). In float64 agreement means 1e-12.

A world of P ranks is spawned once, works through its checks and leaves what it measured in a JSON
file per rank, which the tests read. Worlds run in the order 2, 4, 1, 8: each reads a checkpoint of
one before it. P = 8 is marked slow.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from test_train import read_log
from torch import Tensor

import model as llama
import train
from data import Batch, PackedSequence, arrange_step, make_batch
from model import ModelConfig, Parallel, Transformer

S, VOCAB, DIM = 48, 37, 9  # 37 and 9 rows leave uneven parts: over 4 ranks 10 10 10 7 and 3 3 3 0
SAME = 1e-12  # relative difference that float64 rounding may cause
GRIDS = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2), (1, 4)],
         8: [(8, 1), (4, 2), (2, 4), (1, 8)]}
WORLDS = [2, 4, pytest.param(8, marks=pytest.mark.slow)]

# --- 1. What is tried -----------------------------------------------------------------------------

PACKS = {  # of 48 tokens; shares end at 24 (P = 2), at 12, 24, 36 (P = 4), at 6, 12, ... (P = 8)
    "fills_all": (48,),
    "over_three": (7, 29, 12),  # at P = 4 the 29 lies on ranks 0, 1 and 2
    "over_two": (5,) * 9 + (3,),  # every document is shorter than a share, and yet they cross
    "odd": (5, 7, 13, 9, 11, 3),
    "ones": (1, 25, 1, 1, 1, 19),
    "local": (5, 1, 6, 6, 6, 4, 2, 1, 5, 3, 3, 2, 4),  # every share ends with a document
}


@dataclass(frozen=True)
class Case:
    """One step: which packs its sequences have in turn, the model's heads, and what is trained."""

    packs: tuple[str, ...] = ("odd",)
    heads: tuple[int, int] = (8, 2)
    tied: bool = False
    micro_batches: int = 1
    trained: Callable[[int], slice] = lambda i: slice(None)  # sequence i -> its trained tokens
    chunks: int = 1  # of heads


CASES = {
    **{f"pack_{name}": Case((name,)) for name in PACKS},
    **{f"heads_{h}_{kv}": Case(("over_three",), heads=(h, kv))
       for h, kv in ((8, 8), (8, 4), (8, 1), (16, 8), (12, 2))},
    **{f"chunks_{n}_{pack}": Case((pack,), heads=(16, 4), chunks=n)
       for pack in ("over_three", "local") for n in (2, 4)},
    "tied": Case(tied=True),
    "three_micro_batches": Case(("odd", "local", "fills_all"), micro_batches=3, tied=True),
    "only_last_tokens_train": Case(trained=lambda i: slice(S - 6, S)),  # ranks without any label
    "only_first_sequence_trains": Case(micro_batches=2, trained=lambda i: slice(0, 0 if i else S)),
    "nothing_trains": Case(trained=lambda i: slice(0, 0)),
}


def grid_cases(world: int) -> list[tuple[str, str]]:
    """All (grid, case) of a world whose heads that many ranks can share."""
    return [(f"{dp}x{sp}", name) for dp, sp in GRIDS[world] for name, case in CASES.items()
            if sp * case.chunks in llama.valid_seq_parallel_sizes(*case.heads)]


def make_model(heads: tuple[int, int] = (8, 2), tied: bool = False,
               dtype: torch.dtype = torch.float64, backend: str = "auto") -> Transformer:
    """A small Llama with weights large enough for attention to choose, and gains that differ."""
    config = ModelConfig(VOCAB, DIM, n_layers=2, n_heads=heads[0], n_kv_heads=heads[1], head_dim=4,
                         ffn_dim=14, max_seq_len=S, tie_embeddings=tied)
    model = Transformer(config, backend).to(torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.4, generator=generator)
            else:
                weight.copy_(torch.linspace(0.5, 1.5, DIM))
    return model.to(dtype)


def make_sequences(packs: tuple[str, ...], n: int, seed: int = 0,
                   trained: Callable[[int], slice] = lambda i: slice(None)) -> list[PackedSequence]:
    """`n` sequences of random tokens, with the packs in turn."""
    rng = np.random.default_rng(seed)
    sequences = []
    for i in range(n):
        mask = np.zeros(S, bool)
        mask[trained(i)] = True
        sequences.append(PackedSequence(rng.integers(VOCAB, size=S).astype(np.uint32),
                                        PACKS[packs[i % len(packs)]], mask, f"{seed}[{i}]"))
    return sequences


def deal(sequences: list[PackedSequence], parallel: Parallel, per_batch: int = 1) -> list[Batch]:
    """This rank's micro-batches, dealt as in training."""
    return [make_batch(ranks[parallel.dp_rank])
            for ranks in arrange_step(sequences, parallel.dp_size, per_batch)]


# --- 2. One process, and how the ranks are compared with it ---------------------------------------

def reference_step(case: Case, sequences: list[PackedSequence]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the step on one process: no FSDP, no ranks, the mask written out."""
    model = make_model(case.heads, case.tied, backend="reference")
    batches = [make_batch([sequence]) for sequence in sequences]
    sums = [model.loss(batch.input_ids, batch.labels, batch.doc_lens) for batch in batches]
    loss = sum(loss_sum for loss_sum, _ in sums) / max(1, sum(int(valid) for _, valid in sums))
    loss.backward()
    return float(loss.detach()), {name: weight.grad for name, weight in model.named_parameters()}


class Catcher:
    """Stands in for the optimizer of train_step: keeps the whole gradients, changes nothing."""

    param_groups = ()

    def __init__(self, model: Transformer) -> None:
        self.model, self.gradients = model, {}

    def step(self) -> None:
        self.gradients = {name: weight.grad.full_tensor()
                          for name, weight in self.model.named_parameters()}

    def zero_grad(self) -> None:
        self.model.zero_grad()


def difference(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, in Euclidean norms; the plain difference where theirs is 0."""
    return float((ours - theirs).norm() / (theirs.norm() or 1.0))


def compare_with_reference(case: Case, parallel: Parallel, per_batch: int = 1) -> dict[str, float]:
    """Relative differences of loss, norm and each gradient between train_step and reference."""
    n = parallel.dp_size * case.micro_batches * per_batch
    sequences = make_sequences(case.packs, n, trained=case.trained)
    loss, gradients = reference_step(case, sequences)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()

    model = train.shard_model(make_model(case.heads, case.tied), parallel, torch.float64)
    model.set_memory_options(llama.MemoryOptions(head_chunks=case.chunks))
    catcher = Catcher(model)
    batches = deal(sequences, parallel, per_batch)
    dealt = [s for ranks in arrange_step(sequences, parallel.dp_size, per_batch)
             for part in ranks for s in part]
    result = train.train_step(model, catcher, batches, 0.0, parallel, math.inf)
    plain, of_each = make_model(case.heads, case.tied, backend="reference"), {}
    for sequence, (loss_sum, n) in zip(dealt, result.by_sequence, strict=True):
        batch = make_batch([sequence])
        wanted, trained = plain.loss(batch.input_ids, batch.labels, batch.doc_lens)
        of_each[f"loss of {sequence.source}"] = abs(loss_sum - float(wanted)) / (wanted.item() or 1)
        assert n == trained
    return {"loss": abs(result.loss - loss) / (loss or 1.0), **of_each,
            "grad_norm": abs(result.grad_norm - float(norm)) / (float(norm) or 1.0),
            **{name: difference(catcher.gradients[name], g) for name, g in gradients.items()}}


# --- 3. The checks that need ranks ----------------------------------------------------------------

def random_qkv(heads: int, kv_heads: int, tokens: int = S) -> list[Tensor]:
    """The same q, k and v on all ranks: (tokens, H, D), 2 x (tokens, H_kv, D)."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(tokens, h, 4, dtype=torch.float64, generator=generator)
            for h in (heads, kv_heads, kv_heads)]


def check_tempting_rule(parallel: Parallel) -> dict[str, float | bool]:
    """Attention under the rule "no document exceeds a share, so don't exchange", and ours."""
    doc_lens, share = PACKS["over_two"], S // parallel.sp_size
    mine = slice(parallel.sp_rank * share, (parallel.sp_rank + 1) * share)
    ends = torch.tensor((0, *doc_lens)).cumsum(0)
    q, k, v = random_qkv(8, 8)
    right = llama.attention_reference(q, k, v, ends, max(doc_lens))[mine]
    q, k, v = q[mine], k[mine], v[mine]
    inside = ends[(ends > mine.start) & (ends < mine.stop)] - mine.start
    cut = torch.cat((inside, torch.tensor([0, share])))
    wrong = llama.document_attention(q, k, v, cut.sort().values.int(), max(doc_lens))
    ours = llama.ulysses_attention(q, k, v, ends.int(), max(doc_lens), parallel.sp_group)
    return {"rule_holds": max(doc_lens) <= share,
            "crosses": llama.crosses_ranks(doc_lens, parallel.sp_size),
            "wrong": difference(wrong, right), "ours": difference(ours, right)}


@contextmanager
def counting(parallel: Parallel) -> Iterator[list[int]]:
    """Count the bytes that all_to_all_single sends to *other* ranks, call by call."""
    real, calls = dist.all_to_all_single, []

    def counted(output: Tensor, input: Tensor, *args, **kwargs):
        parts = input.chunk(parallel.sp_size)
        calls.append(sum(part.numel() * part.element_size() for rank, part in enumerate(parts)
                         if rank != parallel.sp_rank))
        return real(output, input, *args, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", counted):
        yield calls


def count_exchanged(parallel: Parallel, heads: int, kv_heads: int) -> list[int]:
    """Bytes that one layer's attention sends to other ranks: [forward, backward]."""
    share, ends = S // parallel.sp_size, torch.tensor([0, S], dtype=torch.int32)
    q, k, v = (x[:share].requires_grad_() for x in random_qkv(heads, kv_heads))
    with counting(parallel) as calls:
        out = llama.ulysses_attention(q, k, v, ends, S, parallel.sp_group)
        forward = sum(calls)
        out.sum().backward()
    return [forward, sum(calls) - forward]


def count_model_exchanges(parallel: Parallel, pack: str) -> int:
    """How often a whole forward pass exchanges."""
    (batch,) = deal(make_sequences((pack,), parallel.dp_size), parallel)
    model = train.shard_model(make_model(), parallel, torch.float64)
    input_ids, labels = batch.shard(parallel.sp_rank, parallel.sp_size)
    with counting(parallel) as calls, torch.no_grad():
        model.loss(input_ids, labels, batch.doc_lens, parallel)
    return len(calls)


def message_of(call: Callable[..., object], *args: object) -> str:
    """The message of the ValueError that the call must raise."""
    with pytest.raises(ValueError) as error:
        call(*args)
    return str(error.value)


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names that only one has, or whose bits differ."""
    return [name for name in one.keys() | other.keys() if name not in one or name not in other
            or not torch.equal(one[name], other[name])]


def whole_state(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All weights and Adam's moments, gathered: what every rank count must agree on."""
    whole = {}
    for name, weight in model.named_parameters():
        for key, value in {"weight": weight.detach(), **optimizer.state[weight]}.items():
            whole[f"{name}/{key}"] = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole


def take_steps(model: Transformer, optimizer: torch.optim.Optimizer, parallel: Parallel, first: int,
               n: int) -> dict[str, Tensor]:
    """Optimizer steps `first` ... of a training that all grids share; return the whole state."""
    for step in range(first, first + n):
        sequences = make_sequences(("odd", "local", "over_three", "ones"), 4, seed=step)
        train.train_step(model, optimizer, deal(sequences, parallel), 1e-2, parallel)
    return whole_state(model, optimizer)


def check_ten_steps(parallel: Parallel, folder: Path) -> None:
    """Ten steps in float64 and float32; the weights go to a file, float64 to a checkpoint."""
    grid = f"{parallel.dp_size}x{parallel.sp_size}"
    for dtype in (torch.float32, torch.float64):
        model = train.shard_model(make_model(tied=True, dtype=dtype), parallel, dtype)
        optimizer = train.make_optimizer(model, weight_decay=0.1)
        whole = take_steps(model, optimizer, parallel, first=0, n=10)
        if parallel.main:
            save_file(whole, folder / f"ten-{grid}-{str(dtype)[6:]}.safetensors")
    state = {"stage": "long", "step": 10, "steps": 20, "tokens_seen": 40 * S, "drawn": {},
             "fingerprint": {}}
    train.save_checkpoint(folder / f"checkpoint-{grid}", model, optimizer, state, parallel)
    whole = take_steps(model, optimizer, parallel, first=10, n=1)
    if parallel.main:
        save_file(whole, folder / f"eleven-{grid}.safetensors")


def check_checkpoint(written_by: str, parallel: Parallel, folder: Path) -> dict[str, object]:
    """Read another world's checkpoint: which bits differ, and where the next step leads."""
    model = llama.load_pretrained(folder / f"checkpoint-{written_by}")
    train.shard_model(model, parallel, torch.float64)
    optimizer = train.make_optimizer(model, weight_decay=0.1)
    state = train.load_checkpoint(folder / f"checkpoint-{written_by}", model, optimizer)
    whole = whole_state(model, optimizer)
    originals = load_file(folder / f"ten-{written_by}-float64.safetensors")
    differ = differing(whole, originals)
    next_step = take_steps(model, optimizer, parallel, first=10, n=1)
    theirs = load_file(folder / f"eleven-{written_by}.safetensors")
    return {"differ": differ, "tensors": len(originals), "step": state["step"],
            "parts": sorted({weight.to_local().shape[0] for weight in model.parameters()}),
            "next_step": max(difference(next_step[name], theirs[name]) for name in theirs)}


POISONS = {"loss_inf": math.inf, "loss_nan": math.nan, "gradient_inf": None}


def check_divergence(poison: str, parallel: Parallel) -> dict[str, object]:
    """The last rank's second micro-batch goes wrong: who notices, what changed, what follows."""
    def start() -> tuple[Transformer, torch.optim.Optimizer]:
        model = train.shard_model(make_model(tied=True), parallel, torch.float64)
        return model, train.make_optimizer(model, weight_decay=0.1)

    def step(model: Transformer, optimizer: torch.optim.Optimizer) -> str:
        sequences = make_sequences(("odd", "fills_all"), 2 * parallel.dp_size)
        try:
            train.train_step(model, optimizer, deal(sequences, parallel), 1e-2, parallel)
        except train.Diverged as error:
            return str(error)
        return ""

    model, optimizer = start()
    before = whole_state(model, optimizer)
    real, calls = model.loss, []

    def poisoned(*args: object, **options: object) -> tuple[Tensor, Tensor]:
        loss, valid = real(*args, **options)
        calls.append(loss)
        if len(calls) == 2 and parallel.rank == parallel.world_size - 1:
            if POISONS[poison] is None:  # the loss stays a number
                loss.register_hook(lambda gradient: gradient * math.inf)
            else:
                loss = loss * POISONS[poison]
        return loss, valid

    with mock.patch.object(model, "loss", poisoned):
        message = step(model, optimizer)
    found = {"message": message, "untouched": not differing(before, whole_state(model, optimizer)),
             "cleared": all(weight.grad is None for weight in model.parameters())}
    clean = start()
    found["messages_after"] = step(model, optimizer) + step(*clean)
    found["recovered"] = not differing(whole_state(model, optimizer), whole_state(*clean))
    return found


# --- 4. The worlds --------------------------------------------------------------------------------

BEFORE = {2: None, 4: 2, 1: 4, 8: 4}  # which world's checkpoints must exist
READS = {2: [], 4: ["1x2"], 1: ["1x2", "2x2"], 8: ["2x2"]}  # which world reads whose checkpoint
TEN_STEPS = ["1x1", "2x1", "1x2", "2x2"]  # grids that train for ten steps and leave a checkpoint
EXCHANGED_HEADS = [(8, 8), (8, 4), (8, 2), (8, 1), (12, 2), (32, 8)]


def join_world(rank: int, world: int, folder: Path) -> None:
    """Become rank `rank` of a world that meets in a file of `folder`."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        store = dist.FileStore(str(folder / f"store-{world}"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world,
                                timeout=timedelta(minutes=10))


def spawn_world(worker: Callable[[int, int, Path], None], world: int, folder: Path) -> list[dict]:
    """Run worker(rank, world, folder) in `world` processes; what each left in its JSON file."""
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"):
        mp.spawn(worker, (world, folder), nprocs=world)
    return [json.loads((folder / f"found-{world}-{rank}.json").read_text())
            for rank in range(world)]


def worker(rank: int, world: int, folder: Path) -> None:
    """One rank: all checks of its world, then its JSON file."""
    join_world(rank, world, folder)
    found: dict[str, object] = {"init_error": message_of(llama.init_parallel, world + 1)}
    for dp, sp in GRIDS[world]:
        parallel, grid = llama.init_parallel(sp), f"{dp}x{sp}"
        for name in (name for g, name in grid_cases(world) if g == grid):
            found[f"{grid}/{name}"] = compare_with_reference(CASES[name], parallel)
        if grid in TEN_STEPS:
            check_ten_steps(parallel, folder)
    found["divergence"] = {poison: check_divergence(poison, parallel) for poison in POISONS}
    found["checkpoints"] = {writer: check_checkpoint(writer, parallel, folder)
                            for writer in READS[world]}
    if world == 1:
        for per_batch in (1, 2, 4):
            found[f"accumulation_{per_batch}"] = compare_with_reference(
                Case(("odd", "ones"), micro_batches=4 // per_batch), parallel, per_batch)
    else:  # `parallel` is now 1 x P
        found["tempting_rule"] = check_tempting_rule(parallel)
        found["exchanged"] = {f"{h}/{kv}": count_exchanged(parallel, h, kv)
                              for h, kv in EXCHANGED_HEADS
                              if world in llama.valid_seq_parallel_sizes(h, kv)}
        found["exchanges"] = {pack: count_model_exchanges(parallel, pack) for pack in PACKS}
        found["heads_error"] = message_of(
            llama.ulysses_attention, *random_qkv(9, 3, 4), torch.tensor([0, 4 * world]), 4 * world,
            parallel.sp_group)
    (folder / f"found-{world}-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict]]:
    """found(P): what each rank of a world of P found, in order of rank. A world is spawned once."""
    folder = tmp_path_factory.mktemp("worlds")

    @cache  # of failures too: a second attempt would find the first one's store, and wait
    def spawn(world: int) -> list[dict] | str:
        if BEFORE[world] and isinstance(before := spawn(BEFORE[world]), str):
            return before
        try:
            return spawn_world(worker, world, folder)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            return f"the world of {world} ranks ended early: {error}"

    def results(world: int) -> list[dict]:
        outcome = spawn(world)
        return pytest.fail(outcome, pytrace=False) if isinstance(outcome, str) else outcome

    results.folder = folder
    return results


# --- 5. The tests ---------------------------------------------------------------------------------

def slow_if(world: int) -> list[pytest.MarkDecorator]:
    """Eight processes are too many for the everyday run."""
    return [pytest.mark.slow] if world == 8 else []


def too_large(differences: dict[str, float], tolerance: float = SAME) -> dict[str, float]:
    """Those that are not within the tolerance (NaN is not)."""
    return {name: value for name, value in differences.items() if not value <= tolerance}


@pytest.mark.parametrize(("world", "grid", "case"), [
    pytest.param(world, grid, case, marks=slow_if(world), id=f"{grid}-{case}")
    for world in (1, 2, 4, 8) for grid, case in grid_cases(world)])
def test_loss_and_gradients_equal_one_process(found, world, grid, case):
    """Loss, gradient norm and the gradient of each parameter are those of one process, to 1e-12."""
    for rank in found(world):
        assert len(rank[f"{grid}/{case}"]) >= 20
        assert not too_large(rank[f"{grid}/{case}"])


def test_packs_straddle_what_their_names_say():
    """The packs really hold documents on 1, 2, 3 and all of four ranks, and of one token."""
    def most_ranks(doc_lens: tuple[int, ...], sp_size: int) -> int:
        ends, share = np.cumsum(doc_lens), S // sp_size
        return int(((ends - 1) // share - (ends - doc_lens) // share).max()) + 1

    spans = {name: most_ranks(doc_lens, 4) for name, doc_lens in PACKS.items()}
    assert all(sum(doc_lens) == S for doc_lens in PACKS.values())
    assert spans == {"fills_all": 4, "over_three": 3, "over_two": 2, "odd": 2, "ones": 3,
                     "local": 1}
    for sp_size in (1, 2, 4, 8):
        for doc_lens in PACKS.values():
            assert llama.crosses_ranks(doc_lens, sp_size) == (most_ranks(doc_lens, sp_size) > 1)


@pytest.mark.parametrize("world", WORLDS)
def test_no_exchange_for_short_documents_would_be_wrong(found, world):
    """No document exceeds a share, yet without an exchange some rank is off by more than 10%."""
    results = [rank["tempting_rule"] for rank in found(world)]
    assert all(result["rule_holds"] and result["crosses"] for result in results)
    assert max(result["wrong"] for result in results) > 0.1
    assert max(result["ours"] for result in results) <= SAME


@pytest.mark.parametrize("grid", TEN_STEPS[1:])
def test_ten_steps_are_those_of_one_rank(found, grid):
    """Ten clipped AdamW steps end in the same weights: 1e-10 in float64, 1e-3 in float32."""
    found(1)  # the last of the default worlds: all files exist
    for dtype, tolerance in (("float64", 1e-10), ("float32", 1e-3)):
        one, many = (load_file(found.folder / f"ten-{g}-{dtype}.safetensors")
                     for g in ("1x1", grid))
        worst = {name: float((one[name] - many[name]).abs().max())
                 for name in one if "/weight" in name}
        assert one.keys() == many.keys()
        assert not too_large(worst, tolerance)
        moved = one["embed_tokens.weight/weight"] - make_model(tied=True).embed_tokens.weight
        assert moved.abs().max() > 0.05  # ten steps at a rate of 0.01


@pytest.mark.parametrize("world", WORLDS)
def test_exchanged_bytes_are_the_formula(found, world):
    """A layer sends T*D*(2H + 2*max(H_kv, P)) * (P-1)/P elements to others, and as many back."""
    T, D = S // world, 4
    for rank in found(world):
        assert len(rank["exchanged"]) >= 5
        for heads, (forward, backward) in rank["exchanged"].items():
            H, H_kv = map(int, heads.split("/"))
            elements = T * D * (2 * H + 2 * max(H_kv, world)) * (world - 1) // world
            assert forward == backward == 8 * elements, heads
        # Llama-3's 32/8 heads with K and V as wide as Q:
        expanded = 8 * T * D * 4 * 32 * (world - 1) // world
        assert expanded == 1.6 * rank["exchanged"]["32/8"][0]


@pytest.mark.parametrize("world", WORLDS)
def test_exchanges_happen_only_where_documents_cross(found, world):
    """Two exchanges a layer if any document crosses ranks, none at all otherwise."""
    wanted = {name: 4 * llama.crosses_ranks(doc_lens, world) for name, doc_lens in PACKS.items()}
    assert wanted["local"] == 0 and wanted["odd"] == 4
    assert all(rank["exchanges"] == wanted for rank in found(world))


@pytest.mark.parametrize("world", [1, *WORLDS])
def test_refusals_name_what_would_work(found, world):
    """Heads that P ranks can't share, and a world that can't be cut: refused with the choices."""
    for rank in found(world):
        assert f"seq_parallel_size={world + 1}" in rank["init_error"]
        assert f"choose a divisor of {world}" in rank["init_error"]
        if world > 1:
            assert "9 query heads and 3 KV heads" in rank["heads_error"]
            assert f"seq_parallel_size={world}; choose one of [1, 3, 9]" in rank["heads_error"]


@pytest.mark.parametrize(("world", "writer"), [
    pytest.param(world, writer, marks=slow_if(world), id=f"{writer}-read-by-{world}")
    for world, writers in READS.items() for writer in writers])
def test_checkpoints_move_between_rank_counts(found, world, writer):
    """Weights and moments come back bit for bit on other ranks, and training goes on."""
    results = [rank["checkpoints"][writer] for rank in found(world)]
    assert (0 if world > 2 else DIM) in results[-1]["parts"]  # of four, the last has no gain's row
    for result in results:
        assert (result["differ"], result["step"]) == ([], 10)
        assert result["tensors"] == 4 * 20  # weight, exp_avg, exp_avg_sq and step of each parameter
        assert result["next_step"] <= 1e-10


@pytest.mark.parametrize("world", [1, *WORLDS])
@pytest.mark.parametrize("poison", POISONS)
def test_one_bad_rank_stops_all_before_the_weights_change(found, world, poison):
    """If a micro-batch of one rank diverges, all ranks say the same and can leave the step out."""
    results = [rank["divergence"][poison] for rank in found(world)]
    assert len({result["message"] for result in results}) == 1
    assert "nan" in results[0]["message"] or "inf" in results[0]["message"]
    for result in results:
        assert result["untouched"] and result["cleared"]
        assert result["recovered"] and result["messages_after"] == ""


def test_accumulation_is_one_big_batch(found):
    """Four sequences in 4, 2 or 1 micro-batches give one and the same gradient, to 1e-12."""
    (rank,) = found(1)
    for per_batch in (1, 2, 4):
        assert not too_large(rank[f"accumulation_{per_batch}"])


@pytest.mark.slow
def test_two_nodes_train_as_one_process(tmp_path):
    """Two torchrun agents that meet on the loopback share every sequence, as one process would."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    node = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    run = [train.__file__, "--seq", "1k", "--batch-tokens", "1k", "--steps", "2", "--no-eval",
           "--dtype", "float64"]
    shared = ["--seq-parallel-size", "2", "--out", str(tmp_path / "two")]
    nodes = [subprocess.Popen([*node, *run, *shared], stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [each.wait(timeout=120) for each in nodes] == [0, 0]
    subprocess.run([sys.executable, *run, "--out", str(tmp_path / "one")], check=True,
                   stdout=subprocess.DEVNULL)
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert [e["loss"] for e in two] == pytest.approx([e["loss"] for e in one], rel=1e-9)
    assert any(e["sp_exchanged"] for e in two) and len(two) == 2
