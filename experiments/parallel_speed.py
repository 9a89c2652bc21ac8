"""What sharing costs and what sorting saves, on two CPU cores, with nothing but gloo.

    python experiments/parallel_speed.py            about three minutes on two cores

1. Minibatch reordering, modelled: the 64k stage on 8 data-parallel ranks, every micro-step as slow
as its
   costliest rank (FLOPs of Llama-3-8B by `flops_per_step`). Table 15: +11.7%.
2. Minibatch reordering, measured: two ranks of one thread, steps sorted and as drawn in turn. 3.
Ulysses, measured: two ranks of one thread share one 16K document (and 32 short ones), against one
   process of two threads on the same tokens.

Rounds alternate between what is compared, and the ratio is the median over rounds: timings on a
shared machine drift. Writes docs/figures/parallel_speed.json and .png, and prints a table.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import PackedSequence, arrange_step, make_batch  # noqa: E402
from model import Transformer, flops_per_step, init_parallel, preset_config  # noqa: E402
from train import RECIPES, SHORT_MIX, make_optimizer, shard_model, train_step  # noqa: E402

VOCAB, ROUNDS = 261, 5


def sequence(doc_lens: Sequence[int], seed: int = 0) -> PackedSequence:
    """A packed sequence of random tokens."""
    ids = np.random.default_rng(seed).integers(VOCAB, size=sum(doc_lens)).astype(np.uint32)
    return PackedSequence(ids, tuple(doc_lens))


# --- 1. Reordering, modelled ----------------------------------------------------------------------


def short_documents(rng: np.random.Generator, seq_len: int) -> tuple[int, ...]:
    """Lengths like ShortMix's: log-normal, with a mean near 900 tokens, cut where it is full."""
    lens: list[int] = []
    while (room := seq_len - sum(lens)) > 0:
        lens.append(min(room, max(16, int(rng.lognormal(6.3, 1.0)))))
    return tuple(lens)


def model_step_times(dp_size: int = 8, steps: int = 50, seed: int = 0,
                     recipe: str = "prolong") -> dict[str, float]:
    """FLOPs of the costliest ranks, for a recipe's 64k stage and Llama-3-8B: Table 15's rows.

    A step is sorted by each rank for itself (the authors), or before it is dealt to ranks (ours).
    """
    stage, config = RECIPES[recipe][0], preset_config("llama3-8b", VOCAB)
    rng = np.random.default_rng(seed)
    short_share = sum(stage.mixture[name] for name in SHORT_MIX)
    ways = ("full attention", "as drawn", "each rank sorts", "sorted, then dealt")
    times = dict.fromkeys(ways, 0.0)
    for _ in range(steps):
        drawn = []
        for _ in range(stage.batch_tokens // stage.seq_len):
            is_short = rng.random() < short_share
            lens = short_documents(rng, stage.seq_len) if is_short else (stage.seq_len,)
            drawn.append(PackedSequence(np.empty(0, np.uint32), lens))
        for way, reorder in (("as drawn", False), ("sorted, then dealt", True)):
            dealt = arrange_step(drawn, dp_size, per_batch=1, reorder=reorder)
            costs = np.array([[flops_per_step(config, part[0].doc_lens) for part in ranks]
                              for ranks in dealt])  # (micro-steps, ranks)
            times[way] += costs.max(axis=1).sum()  # at each micro-step all wait for the costliest
            if not reorder:
                times["each rank sorts"] += np.sort(costs, axis=0).max(axis=1).sum()
        times["full attention"] += len(drawn) / dp_size * flops_per_step(config, (stage.seq_len,))
    return times


# --- 2. and 3. Measured: what each process does ---------------------------------------------------


def worker(rank: int, world: int, threads: int, sp_size: int, jobs: list[dict[str, Any]],
           store: str) -> None:
    """Run every job's steps in turn, ROUNDS times; rank 0 writes the seconds of each."""
    torch.set_num_threads(threads)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    parallel = init_parallel(sp_size)
    model = Transformer(preset_config("tiny", VOCAB)).init_weights(0)
    model = shard_model(model, parallel, torch.float32)
    optimizer = make_optimizer(model, 0.1)
    seconds: dict[str, list[float]] = {job["name"]: [] for job in jobs}
    for round in range(ROUNDS + 1):  # the first one warms up
        for job in jobs:
            sequences = [sequence(lens, i) for i, lens in enumerate(job["packs"])]
            dealt = arrange_step(sequences, parallel.dp_size, 1, job["reorder"])
            batches = [make_batch(ranks[parallel.dp_rank]) for ranks in dealt]
            dist.barrier()
            begin = time.perf_counter()
            train_step(model, optimizer, batches, 1e-4, parallel)
            dist.barrier()
            if round:
                seconds[job["name"]].append(time.perf_counter() - begin)
    if rank == 0:
        Path(store + ".json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def measure(world: int, threads: int, sp_size: int,
            jobs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Spawn the processes; return {job: seconds of each round}."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        mp.spawn(worker, (world, threads, sp_size, jobs, store), nprocs=world)
        return json.loads(Path(store + ".json").read_text())


def measure_reordering() -> dict[str, Any]:
    """Eight sequences of 4K a step over two ranks, half of one document, half of 64 short ones."""
    packs = [(4096,), (64,) * 64, (64,) * 64, (4096,), (4096,), (64,) * 64, (64,) * 64, (4096,)]
    seconds = measure(2, 1, 1, [{"name": "sorted", "packs": packs, "reorder": True},
                                {"name": "drawn", "packs": packs, "reorder": False}])
    ratios = [b / a for a, b in zip(seconds["sorted"], seconds["drawn"], strict=True)]
    return {"seconds": seconds, "ratio": statistics.median(ratios)}


def measure_ulysses() -> dict[str, Any]:
    """Speed of two ranks that share a sequence, over that of one process of two threads."""
    jobs = [{"name": "one document of 16K", "packs": [(16_384,)], "reorder": True},
            {"name": "32 documents of 512", "packs": [(512,) * 32], "reorder": True}]
    pairs = [(measure(1, 2, 1, jobs), measure(2, 1, 2, jobs)) for _ in range(3)]
    result: dict[str, Any] = {}
    for job in (job["name"] for job in jobs):
        ratios = [a / b for one, two in pairs for a, b in zip(one[job], two[job], strict=True)]
        result[job] = {"one_process_s": [one[job] for one, _ in pairs],
                       "two_ranks_s": [two[job] for _, two in pairs],
                       "ratio": statistics.median(ratios)}
    return result


# --- 4. Table and picture -------------------------------------------------------------------------


def main() -> None:
    times, reordering, ulysses = model_step_times(), measure_reordering(), measure_ulysses()
    modelled = times["as drawn"] / times["sorted, then dealt"]
    rows = {"reordering, modelled, 8 ranks": modelled,
            "reordering, measured, 2 ranks": reordering["ratio"],
            **{f"Ulysses, {name}": job["ratio"] for name, job in ulysses.items()}}
    for name, ratio in rows.items():
        print(f"{name:<34} {ratio:6.3f} x throughput")
    out = ROOT / "docs" / "figures"
    (out / "parallel_speed.json").write_text(json.dumps(
        {"command": "python experiments/parallel_speed.py", "modelled_reordering": modelled,
         "reordering": reordering, "ulysses": ulysses}, indent=1) + "\n")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    axes.barh(list(rows)[::-1], list(rows.values())[::-1], color=["C1", "C1", "C0", "C0"])
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xlabel="throughput: sorted / as drawn, two ranks / one process",
             xlim=(0, 1.15 * max(rows.values())))
    for i, ratio in enumerate(list(rows.values())[::-1]):
        axes.text(ratio, i, f" {ratio:.2f}", va="center")
    figure.savefig(out / "parallel_speed.png", dpi=130)


if __name__ == "__main__":
    main()
