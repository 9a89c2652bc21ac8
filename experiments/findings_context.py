"""Findings about position and length: what RoPE, masks and training do to a longer context.

All start from the tiny recipe's `long` stage, sure to 2K tokens, and go on to 8K: the paper's 8K ->
64K in small (there eight times as far, here four). An extension is 40 steps of one 8K sequence, a
third of a million tokens: enough for recall at 8K to come near its end, too few for every arm to
arrive there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from functools import cache
from typing import Any

import packs
from lab import STAGES, Arm, Finding, Measured, bars, by_length, by_step, less
from parallel_speed import model_step_times

from model import PRESETS, ntk_rope_theta

# The length and the RoPE base that the start was trained with.
OLD_LEN, THETA = STAGES["long"].seq_len, STAGES["long"].rope_theta or 0.0
HEAD_DIM = PRESETS["tiny"]["head_dim"]
NTK = ntk_rope_theta(1, OLD_LEN, 8192, HEAD_DIM)  # dynamic NTK's factor for the new length
LENGTHS = "256,2k,8k"
STEPS = 40


def extend(times: float, length: str = "8k", steps: int = STEPS, batch: str = "",
           start: str | Arm = "long", stage: str = "ultra", mix: str = "",
           program: str = "train.py", **changes: Any) -> Arm:
    """The start, trained on at a longer length with so many times its RoPE base."""
    return Arm(f"{program} --stage {stage} --seq {length} --batch-tokens {batch or length} "
               f"--rope-theta {times * THETA:g}" + f" --mix {mix}" * bool(mix),
               steps, start, **changes)


AT_8K = ("recall@8k", "icl@8k")  # long ability: their mean
OLD_BASE = extend(1, every=8)
TWICE_NTK = extend(2 * NTK, every=8)  # the paper's choice, and the usual extension of this page

# --- RoPE's base ----------------------------------------------------------------------------------

BASES = {"x1": (1.0, OLD_BASE), f"x{NTK:.1f} (NTK)": (NTK, extend(NTK)),
         "twice NTK": (2 * NTK, TWICE_NTK), "x64": (64.0, extend(64))}
WITH_FEW = "recall_bare,few,recall,icl"


def slope(measured: Measured) -> float:
    """What long ability gains for ten times the base: the least squares line over the arms."""
    x = [math.log10(times) for times, _ in BASES.values()]
    y = [statistics.fmean(measured[label][-1][metric] for metric in AT_8K) for label in BASES]
    return statistics.linear_regression(x, y).slope


def spread(measured: Measured, metric: str, labels: Iterable[str]) -> float:
    """Best less worst of some arms."""
    scores = [measured[label][-1][metric] for label in labels]
    return max(scores) - min(scores)


rope_base = Finding(
    "rope-base", "The RoPE base for a context four times as long", "Tables 18 and 19",
    "the old base recalls far less at the new length; twice what dynamic NTK says is better than "
    "NTK's",
    {label: arm for label, (_, arm) in BASES.items()},
    {"recall and ICL at 8K: gain for ten times the base, over four arms": slope},
    {"recall at 8K, twice NTK less x1": less("twice NTK", "x1", "recall@8k"),
     "recall at 8K, twice NTK less NTK": less("twice NTK", f"x{NTK:.1f} (NTK)", "recall@8k")},
    by_length(LENGTHS, {"recall": ("recall", None), "icl": ("icl", None)}),
    why="the slope uses all four arms. A base far above the paper's can only win here: to look up "
        "a pair a model needs far positions, and hardly fine ones",
    tasks=WITH_FEW, shown=("recall@256", "recall@2k", "recall@8k", "icl@8k"))

theta_zero_shot = Finding(
    "theta-zero-shot", "Another RoPE base without training", "Table 2",
    "position extrapolation without training costs some short-context ability",
    {"x1": Arm(), "twice NTK": Arm(config={"rope_theta": 2 * NTK * THETA}),
     "x64": Arm(config={"rope_theta": 64 * THETA})},
    {"recall at 256, x1 less x64": less("x1", "x64", "recall@256")},
    {"recall at 256, x1 less twice NTK": less("x1", "twice NTK", "recall@256"),
     "recall at 8K, x64 less x1": less("x64", "x1", "recall@8k"),
     "bits per byte of short code, x64 less x1": less("x64", "x1", "bits/byte short")},
    by_length(LENGTHS, {"recall": ("recall", None), "icl": ("icl", None)}),
    why="dose: x64, because twice NTK cost nothing in two of three seeds of an older recipe. What "
        "the paper does not promise: at 8K another base alone may do most of what training does",
    shown=("recall_bare@160", "recall@256", "recall@2k", "recall@8k", "bits/byte short"))

# --- Ways to stretch the positions ----------------------------------------------------------------

_ROPES: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 8192 / OLD_LEN}},
    "NTK": {"rope_theta": NTK * THETA},
    "YaRN": {"rope_scaling": {"rope_type": "yarn", "factor": 8192 / OLD_LEN,
                              "original_max_position_embeddings": OLD_LEN}},
    "Llama-3.1": {"rope_scaling": {"rope_type": "llama3", "factor": 8192 / OLD_LEN,
                                   "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                   "original_max_position_embeddings": OLD_LEN}},
}

STRETCHED = [name for name in _ROPES if name != "none"]

position_methods = Finding(
    "position-methods", "Five ways to stretch RoPE, before and after 20 steps",
    "B.1; 2306.15595, 2309.00071",
    "without training, stretching by frequency bands (YaRN) beats doing nothing at 4x the length, "
    "and linear interpolation at the old one; after training they differ little",
    {**{name: Arm(config=rope) for name, rope in _ROPES.items()},
     **{f"{name}, trained": extend(NTK if name == "NTK" else 1, steps=20, config=rope)
        for name, rope in _ROPES.items()}},
    {"recall at 8K without training, YaRN less none": less("YaRN", "none", "recall@8k")},
    {"recall at 2K without training, YaRN less linear": less("YaRN", "linear", "recall@2k"),
     "spread of the four at 8K, without training less after":
         lambda a: spread(a, "recall@8k", STRETCHED)
         - spread(a, "recall@8k", [f"{name}, trained" for name in STRETCHED])},
    by_length(LENGTHS, {"without training": ("recall", list(_ROPES)),
                        "after 20 steps at 8K":
                            ("recall", [f"{name}, trained" for name in _ROPES])}),
    why="linear interpolation squeezes the fast pairs too, by which attention tells a token from "
        "its neighbour. Adam's moments are not taken over, so these arms compare with each other",
    tasks="recall")


# --- Masks between documents ----------------------------------------------------------------------

document_masks = Finding(
    "document-masks", "Attention within documents, or across the pack", "Table 20",
    "masks are better on average over long tasks, and at short ones; though not for recall and ICL "
    "(97.4 and 76.6 without, 96.0 and 73.9 with)",
    {"masks": extend(2 * NTK, transform=packs.unrelated),
     "no masks": extend(2 * NTK, transform=packs.unrelated_unmasked),
     "no masks, related": extend(2 * NTK, transform=packs.related_unmasked)},
    {"recall and ICL at 8K, none less masks": less("no masks", "masks", *AT_8K)},
    {"recall and ICL at 256, masks less none": less("masks", "no masks", "recall@256", "icl@256"),
     "bits per byte of short code, none less masks": less("no masks", "masks", "bits/byte short"),
     "recall and ICL at 8K without masks, related less unrelated neighbours":
         less("no masks, related", "no masks", *AT_8K)},
    bars(("recall@256", "recall@8k", "icl@8k", "bits/byte short")),
    why="as in the paper, what differs is whether tokens see the other documents of their pack, "
        "and those are irrelevant: every other recall sequence is two documents of 4K with 8 pairs "
        "each and no symbol in common (there are 85, a pair takes 5). The others are one document "
        "of 8K. In the third arm the two have the same pairs (In-Context Pretraining, 2310.10638). "
        "Re-ranking, where the paper's masks gain most, is beyond a model of this size",
    shown=("recall@256", "icl@256", "recall@8k", "icl@8k", "bits/byte short"))

# --- Training longer than the evaluation ----------------------------------------------------------

FOR_16K = 2 * NTK * 2 * ntk_rope_theta(1, 8192, 16_384, HEAD_DIM)

train_longer = Finding(
    "train-longer", "Training beyond the length that is evaluated", "Table 7",
    "after 64K training, going on at 512K is better at 64K than going on at 64K, with equally many "
    "tokens",
    {"8K training": TWICE_NTK,
     "+ 20 steps at 8K": extend(2 * NTK, steps=20, batch="16k", start=TWICE_NTK),
     "+ at 8K, 16K's base": extend(FOR_16K, steps=20, batch="16k", start=TWICE_NTK),
     "+ 20 steps at 16K": extend(FOR_16K, "16k", 20, start=TWICE_NTK)},
    {"recall and ICL at 8K, going on at 16K less at 8K":
         less("+ 20 steps at 16K", "+ 20 steps at 8K", *AT_8K)},
    {"the same with one base: of the length alone":
         less("+ 20 steps at 16K", "+ at 8K, 16K's base", *AT_8K),
     "the same at 8K: of the base alone":
         less("+ at 8K, 16K's base", "+ 20 steps at 8K", *AT_8K)},
    by_length(LENGTHS, {"recall": ("recall", None), "icl": ("icl", None)}),
    why="20 steps of two sequences of 8K, or of one of 16K. The paper changes length and base "
        "together; one arm more tells them apart",
    shown=("recall@256", "recall@8k", "icl@8k"))

# --- What a needle tells --------------------------------------------------------------------------

needle_first = Finding(
    "needle-first", "Few needles do not tell models apart", "Table 1",
    "the needle is found by every model; recall, and more so the other tasks, still tell the "
    "models apart",
    rope_base.arms,
    {"spread over four models at 8K, 16 pairs less 4 pairs":
         lambda a: spread(a, "recall@8k", a) - spread(a, "few@8k", a)},
    {"spread over four models at 8K, ICL less 4 pairs":
         lambda a: spread(a, "icl@8k", a) - spread(a, "few@8k", a)},
    bars(("few@8k", "recall@8k", "icl@8k")),
    why="Table 1 compares models, so we do: the four of rope-base, best less worst in each task. A "
        "needle in plain letters is beyond a model of this size; 4 pairs stand for it, and 16 for "
        "recall (85 symbols are enough for 17)",
    tasks=WITH_FEW, shown=("few@8k", "recall@8k", "icl@8k"))

# --- Along the training ---------------------------------------------------------------------------


def dip(label: str, metric: str = "recall@256") -> Any:
    """What the first checkpoint, after 8 steps, has lost."""
    return lambda a: a[label][0][metric] - a[label][1][metric]


short_dips = Finding(
    "short-dips", "Short-context ability when length and base change, and after", "Figure 4",
    "the short tasks fall when the length changes, and recover as training goes on",
    {"2K -> 8K": TWICE_NTK, "8K, old base": OLD_BASE,
     "2K, rate restarted": extend(1, "2k", batch="8k", stage="long", every=8)},
    {"recall at 256, start less the first checkpoint": dip("2K -> 8K")},
    {"recall at 256, end less the first checkpoint":
         lambda a: a["2K -> 8K"][-1]["recall@256"] - a["2K -> 8K"][1]["recall@256"],
     "the first fall, beyond that with the old base":
         lambda a: dip("2K -> 8K")(a) - dip("8K, old base")(a),
     "the first fall with the old base, beyond that of the rate alone at 2K":
         lambda a: dip("8K, old base")(a) - dip("2K, rate restarted")(a)},
    by_step(("recall@256", "icl@256")),
    why="the first checkpoint is after 8 of 40 steps. Two more arms change less: one keeps the "
        "base, one stays at 2K in the `long` stage and only restarts the rate, with as many tokens",
    tasks="recall,icl", lengths="256", evaluator="experiments/tasks.py", along=True,
    shown=("recall@256", "icl@256"))

# --- Reordering -----------------------------------------------------------------------------------

GPUS = (8, 16, 32, 64)


@cache
def throughput(seed: int, quick: bool) -> Measured:
    """Tokens per second, as drawn 1, if each micro-step is as slow as its costliest rank."""
    points: Measured = {}
    for gpus in GPUS:
        times = model_step_times(gpus, steps=2 if quick else 50, seed=seed, recipe="ablation")
        for name, time in times.items():
            point = points.setdefault(name, [{"step": 0}])[0]
            point[f"throughput@{gpus}"] = times["as drawn"] / time
    return points


def gain(way: str, gpus: int) -> Any:
    return lambda a: a[way][-1][f"throughput@{gpus}"] - 1


reordering = Finding(
    "reordering", "Sorted minibatches, modelled: 64K, Llama-3-8B", "Table 15",
    "on 8 GPUs variable-length attention alone gains 0.4%, with minibatches sorted by cost 11.7%; "
    "with more GPUs the gain diminishes",
    {},
    {"throughput gained on 8 GPUs, each rank sorting its own": gain("each rank sorts", 8)},
    {f"throughput gained on {gpus} GPUs, {text}": gain(way, gpus)
     for way, text in (("each rank sorts", "each rank sorting its own"),
                       ("sorted, then dealt", "sorted before dealing (ours)")) for gpus in GPUS},
    by_length("8,16,32,64", {"throughput, as drawn 1": ("throughput", None)}, "GPUs"),
    why="a model of waiting, on the ablations' mixture (40% short) as Table 15: at every "
        "micro-step all ranks wait for the costliest one. The authors' ranks sort their own "
        "minibatches; ours are sorted together and then dealt, which leaves less to wait for",
    shown=tuple(f"throughput@{gpus}" for gpus in GPUS), compute=throughput)

FINDINGS = [rope_base, theta_zero_shot, position_methods, document_masks, train_longer,
            needle_first, short_dips, reordering]
