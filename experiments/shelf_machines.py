"""Machines on paper: who waits for whom in the paper's 512K stage, and who sends how much.

    python experiments/shelf_machines.py        a minute, no training; docs/figures/machines.png

All is arithmetic for Llama-3-8B. A step is 8M tokens: 16 sequences of 512K, drawn from the stage's
mixture (train.py). Eight GPUs share a sequence, and as many groups of eight as there are take one
each at a time. Then all wait for the slowest. The useful share is the work over (GPUs x time): a
step with one hard and fifteen easy sequences wastes most of what it pays for.

Ways to share the work, from what ProLong did to what others propose:

    drawn      group g takes sequences g, g + groups, ... as they were drawn
    own        each group sorts its own by cost (ProLong's code, A.3)
    sorted     the step's sequences are sorted, then dealt (ours: data.arrange_step)
    degrees    each document gets its own number of GPUs (FlexSP 2412.01523, ByteScale
               2502.21231): one of 512K takes 8 or more, eight of 64K take one each
    equal      attention's work is cut up and spread evenly (Core Attention Disaggregation
               2510.18121): nobody waits; what travels is counted instead
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import model as llama  # noqa: E402
from support.machine import flops_per_step  # noqa: E402
from support.report import new_figure  # noqa: E402
from train import PROLONG  # noqa: E402

SHAPE, STAGE, GROUP = llama.preset_config("llama3-8b", 128_256), PROLONG[-1], 8
GPUS = (8, 16, 32, 64, 128)
STEPS = 500  # steps that are drawn
SHORT = 1024  # tokens of a short document, about


def draw_step(rng: np.random.Generator) -> list[data.PackedSequence]:
    """The 16 sequences of a step: one document of 512K, or eight of 64K, or 512 short ones."""
    names, shares = list(STAGE.mixture), np.array(list(STAGE.mixture.values()))
    drawn = rng.choice(len(names), STAGE.batch_tokens // STAGE.seq_len, p=shares / shares.sum())
    lens = [data.parse_domain(names[i]).length or SHORT for i in drawn]
    return [data.PackedSequence(np.empty(0, np.uint32), (n,) * (STAGE.seq_len // n)) for n in lens]


def cost(doc_lens: Sequence[int]) -> float:
    return flops_per_step(SHAPE, doc_lens)


def waiting(steps: list[list[data.PackedSequence]]) -> float:
    """Time of micro-steps in which every group has a sequence, in FLOPs of one GPU."""
    return sum(max(cost(sequence.doc_lens) for sequence in step) / GROUP for step in steps)


def time_as_drawn(sequences: list[data.PackedSequence], gpus: int) -> float:
    groups = gpus // GROUP
    return waiting([sequences[i:i + groups] for i in range(0, len(sequences), groups)])


def time_own(sequences: list[data.PackedSequence], gpus: int) -> float:
    groups = gpus // GROUP
    own = [sorted(sequences[g::groups], key=lambda s: cost(s.doc_lens)) for g in range(groups)]
    return waiting([list(step) for step in zip(*own, strict=True)])


def time_sorted(sequences: list[data.PackedSequence], gpus: int) -> float:
    dealt = data.arrange_step(sequences, gpus // GROUP, 1)
    return waiting([[ranks[0] for ranks in step] for step in dealt])


def time_of_degrees(sequences: list[data.PackedSequence], gpus: int) -> float:
    """The best of all degrees for long documents: 8, 16, ... GPUs, then short ones fill the rest.

    GPUs are free at some time each. The longest documents go first, to the GPUs that are free
    first; a document begins when the last of its GPUs is free. Documents of up to 64K, which one
    GPU can hold, are put together to pieces of 64K.
    """
    share = STAGE.seq_len // GROUP  # tokens that a GPU can hold
    lens = [s.doc_lens[0] for s in sequences]  # a sequence's documents are all as long
    long = [n for n in lens if n > share]
    pieces = [cost((n,) * (share // n)) for n in lens for _ in range(GROUP) if n <= share]
    times, degree = [], GROUP
    while degree <= gpus:
        free = [0.0] * gpus
        for n in sorted(long, reverse=True):
            begin = free.copy()
            heapq.heapify(begin)
            first = [heapq.heappop(begin) for _ in range(degree)]
            free = [*begin, *[first[-1] + cost((n,)) / degree] * degree]
        heapq.heapify(free)
        for work in sorted(pieces, reverse=True):
            heapq.heappush(free, heapq.heappop(free) + work)
        times.append(max(free))
        degree *= 2
    return min(times)


def time_if_equal(sequences: list[data.PackedSequence], gpus: int) -> float:
    return sum(cost(s.doc_lens) for s in sequences) / gpus


WAYS = {"drawn": time_as_drawn, "own": time_own, "sorted": time_sorted, "degrees": time_of_degrees,
        "equal": time_if_equal}


def useful_shares(steps: int = STEPS, seed: int = 0) -> dict[str, list[float]]:
    """The share of the GPUs' time that is work, {way: one for each of GPUS}."""
    rng = np.random.default_rng(seed)
    drawn = [draw_step(rng) for _ in range(steps)]
    work = sum(time_if_equal(sequences, 1) for sequences in drawn)
    return {name: [work / sum(gpus * way(sequences, gpus) for sequences in drawn) for gpus in GPUS]
            for name, way in WAYS.items()}


def gib_sent(method: str, ranks: int, tokens: int) -> float:
    """GiB that a rank sends for one layer's forward, of a sequence of `tokens` in bfloat16.

    Ulysses sends q, k, v and the output, all but the rank's own part; with more ranks than KV
    heads, these are repeated. Rings send keys and values on, P - 1 times. Core attention on a pool
    of servers sends q, k, v there and the output back.
    """
    mine, heads, kv = tokens / ranks, SHAPE.n_heads, SHAPE.n_kv_heads
    numbers = {"ulysses": (2 * heads + 2 * max(kv, ranks)) * mine * (ranks - 1) / ranks,
               "ring": 2 * kv * mine * (ranks - 1), "zigzag": 2 * kv * mine * (ranks - 1),
               "pool": (2 * heads + 2 * kv) * mine}[method]
    return numbers * SHAPE.head_dim * 2 / 2**30


def idle(method: str, ranks: int) -> float:
    """The share of attention's time that a rank waits, for one causal document over all ranks.

    In a ring rank 0 sees only its own share and rank P-1 sees all. Each of P rounds takes as long
    as a full block: (P + 1) / 2 of them have work, on average. Zigzag gives each rank a piece from
    the begin and one from the end, so that all have alike; in Ulysses all have whole heads.
    """
    return (ranks - 1) / (2 * ranks) if method == "ring" else 0.0


def main() -> None:
    shares = useful_shares()
    print("| GPUs | " + " | ".join(WAYS) + " |\n|---|" + "---|" * len(WAYS))
    for i, gpus in enumerate(GPUS):
        print(f"| {gpus} | " + " | ".join(f"{share[i]:.0%}" for share in shares.values()) + " |")
    methods = ("ulysses", "ring", "zigzag", "pool")
    print("\n| ranks | " + " | ".join(f"{m}: GiB sent, idle" for m in methods) + " |\n|---|"
          + "---|" * len(methods))
    for ranks in (2, 4, 8, 16, 32):
        cells = [f"{gib_sent(m, ranks, STAGE.seq_len):.2f}, {idle(m, ranks):.0%}" for m in methods]
        print(f"| {ranks} | " + " | ".join(cells) + " |")
    figure = new_figure(6, 3.4)
    if figure is None:
        print("no figure: install the `plots` extra")
        return
    axes = figure.subplots()
    for name, share in shares.items():
        axes.plot(range(len(GPUS)), share, "o-", label=name)
    axes.set(xticks=range(len(GPUS)), xticklabels=GPUS, ylim=(0, 1.05), xlabel="GPUs",
             ylabel="useful share of their time", title="The 512K stage of Llama-3-8B, on paper")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "figures" / "machines.png")


if __name__ == "__main__":
    main()
