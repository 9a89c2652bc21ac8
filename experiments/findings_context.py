"""Findings about position and length: what RoPE, masks and training do to a longer context.

All start from the tiny recipe's `long` stage, sure to 2K tokens, and go on to 8K: the paper's 8K ->
64K in small (there eight times as far, here four). An extension is 40 steps of one 8K sequence, a
third of a million tokens: enough for recall at 8K to come near its end, too few for every arm to
arrive there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from lab import STAGES, Arm, Finding, Measured, bars, by_length, by_step, less
from parallel_speed import model_step_times

from data import PackedDataset, PackedSequence
from model import PRESETS, ntk_rope_theta

# The length and the RoPE base that the start was trained with.
OLD_LEN, THETA = STAGES["long"].seq_len, STAGES["long"].rope_theta or 0.0
HEAD_DIM = PRESETS["tiny"]["head_dim"]
NTK = ntk_rope_theta(1, OLD_LEN, 8192, HEAD_DIM)  # dynamic NTK's factor for the new length
LENGTHS = "256,2k,4k,8k"
STEPS = 40


def extend(times: float, length: str = "8k", steps: int = STEPS, batch: str = "",
           start: str | Arm = "long", **changes: Any) -> Arm:
    """The start, trained on at a longer length with so many times its RoPE base."""
    return Arm(f"train.py --stage ultra --seq {length} --batch-tokens {batch or length} "
               f"--rope-theta {times * THETA:g}", steps, start, **changes)


TWICE_NTK = extend(2 * NTK, every=8)  # the paper's choice, and the usual extension of this page

# --- RoPE's base ----------------------------------------------------------------------------------

rope_base = Finding(
    "rope-base", "The RoPE base for a context four times as long", "Tables 18 and 19",
    "the old base recalls far less at the new length; twice what dynamic NTK says is better than "
    "NTK's",
    {"x1": extend(1), f"x{NTK:.1f} (NTK)": extend(NTK), "twice NTK": TWICE_NTK, "x64": extend(64)},
    {"recall at 8K, twice NTK less x1": less("twice NTK", "x1", "recall@8k"),
     "recall at 8K, twice NTK less NTK": less("twice NTK", f"x{NTK:.1f} (NTK)", "recall@8k")},
    by_length(LENGTHS, {"recall": ("recall", None), "icl": ("icl", None)}),
    why="dose: chosen before any result was seen. Every seed has the old base last, but by amounts "
        "that differ, because the starts do: hence the wide interval. That 64 times the base is "
        "better still may be the small world's: looking up a pair needs far positions, and hardly "
        "fine ones",
    lengths=LENGTHS)

theta_zero_shot = Finding(
    "theta-zero-shot", "Another RoPE base without training", "Table 2",
    "position extrapolation without training costs some short-context ability",
    {"x1": Arm(), "twice NTK": Arm(config={"rope_theta": 2 * NTK * THETA}),
     "x64": Arm(config={"rope_theta": 64 * THETA})},
    {"recall at 256, x1 less twice NTK": less("x1", "twice NTK", "recall@256"),
     "recall at 256, x1 less x64": less("x1", "x64", "recall@256"),
     "bits per byte of short code, twice NTK less x1": less("twice NTK", "x1", "bits/byte short")},
    by_length("256,512,1k,2k,4k,8k", {"recall": ("recall", None), "icl": ("icl", None)}),
    why="the cost is there in the mean and grows with the base, mostly in bare lists, which the "
        "start learnt at the shortest lengths of all. What the paper does not promise: at 8K the "
        "base alone does nearly all that training with it does in 40 steps (rope-base)",
    lengths="256,512,1k,2k,4k,8k", shown=("recall_bare@160", "recall@256", "recall@2k", "recall@8k",
                                          "bits/byte short"))

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

position_methods = Finding(
    "position-methods", "Five ways to stretch RoPE, before and after 20 steps",
    "B.1; 2306.15595, 2309.00071",
    "without training, stretching by frequency bands (YaRN) beats doing nothing at 4x the length, "
    "and linear interpolation at the old one; after training they differ little",
    {**{name: Arm(config=rope) for name, rope in _ROPES.items()},
     **{f"{name}, trained": extend(NTK if name == "NTK" else 1, steps=20, config=rope)
        for name, rope in _ROPES.items()}},
    {"recall at 8K without training, YaRN less none": less("YaRN", "none", "recall@8k"),
     "recall at 2K without training, YaRN less linear": less("YaRN", "linear", "recall@2k"),
     "spread of the four at 8K, without training less after":
         lambda a: _spread(a, "") - _spread(a, ", trained")},
    by_length(LENGTHS, {"without training": ("recall", list(_ROPES)),
                        "after 20 steps at 8K":
                            ("recall", [f"{name}, trained" for name in _ROPES])}),
    why="linear interpolation squeezes the fast pairs too, which here must tell a symbol from its "
        "neighbour: it recalls nothing, and 20 steps don't mend it, so the spread with training is "
        "its own. Weights alone are taken over, not Adam's moments: these arms compare with each "
        "other, not with rope-base's",
    tasks="recall", lengths=LENGTHS)


def _spread(arms: Measured, suffix: str) -> float:
    """Best less worst recall at 8K among the methods that stretch."""
    scores = [arms[name + suffix][-1]["recall@8k"] for name in _ROPES if name != "none"]
    return max(scores) - min(scores)


# --- Masks between documents ----------------------------------------------------------------------


def without_masks(packed: PackedDataset, seed: int) -> Iterator[PackedSequence]:
    """The same tokens and labels, but a sequence is one document: all its tokens see each other.

    A document's first token is no target, as it was none while it began a document of its own.
    """
    for i in range(len(packed)):
        sequence = packed[i]
        trained = (np.ones(packed.seq_len, bool) if sequence.loss_mask is None
                   else np.array(sequence.loss_mask))
        trained[np.cumsum((0, *sequence.doc_lens[:-1]))] = False
        yield PackedSequence(np.array(sequence.input_ids), (packed.seq_len,), trained)


document_masks = Finding(
    "document-masks", "Attention within documents, or across the pack", "Table 20",
    "masks are better on average over long tasks, and at short ones; though not for recall and ICL "
    "(97.4 and 76.6 without, 96.0 and 73.9 with)",
    {"masks": TWICE_NTK, "no masks": extend(2 * NTK, transform=without_masks)},
    {"recall and ICL at 8K, none less masks": less("no masks", "masks", "recall@8k", "icl@8k"),
     "recall and ICL at 256, masks less none": less("masks", "no masks", "recall@256", "icl@256"),
     "bits per byte of short code, none less masks": less("no masks", "masks", "bits/byte short")},
    bars(("recall@256", "recall@8k", "icl@8k", "bits/byte short")),
    why="the lab asks for recall and ICL alone, the two tasks that the paper's masks do not help; "
        "they do not help here either. Re-ranking, where masks gain most, is beyond a model of "
        "this size",
    lengths=LENGTHS, shown=("recall@256", "icl@256", "recall@8k", "icl@8k", "bits/byte short"))


# --- Training longer than the evaluation ----------------------------------------------------------

train_longer = Finding(
    "train-longer", "Training beyond the length that is evaluated", "Table 7",
    "after 64K training, going on at 512K is better at 64K than going on at 64K, with equally many "
    "tokens",
    {"8K training": TWICE_NTK,
     "+ 20 steps at 8K": extend(2 * NTK, steps=20, batch="16k", start=TWICE_NTK),
     "+ 20 steps at 16K": extend(2 * NTK * 2 * ntk_rope_theta(1, 8192, 16_384, HEAD_DIM), "16k", 20,
                                 start=TWICE_NTK)},
    {"recall at 8K, going on at 16K less at 8K":
         less("+ 20 steps at 16K", "+ 20 steps at 8K", "recall@8k"),
     "ICL at 8K, going on at 16K less at 8K":
         less("+ 20 steps at 16K", "+ 20 steps at 8K", "icl@8k")},
    by_length(LENGTHS, {"recall": ("recall", None), "icl": ("icl", None)}),
    why="as many tokens either way: 20 steps of two sequences of 8K, or of one of 16K. Both "
        "contrasts have the paper's sign in every seed, and ICL at 8K is 1.00 in all three after "
        "16K",
    lengths=LENGTHS, shown=("recall@256", "recall@8k", "icl@8k"))

# --- Along the training ---------------------------------------------------------------------------

_ALONG = {"tasks": "few,recall,icl", "lengths": "256,4k", "evaluator": "experiments/tasks.py",
          "along": True}

needle_first = Finding(
    "needle-first", "Few needles are found first", "Table 1",
    "the needle is found by every model; recall, and more so the other tasks, still tell the "
    "models apart",
    {"2K -> 8K": TWICE_NTK},
    {"what 16 pairs gain at 4K after 4 pairs are at 90% of their end":
         lambda a: _later_gain(a, "recall@4k"),
     "what ICL gains at 4K after that": lambda a: _later_gain(a, "icl@4k"),
     "4 pairs less 16 pairs at 4K, mean of the checkpoints":
         lambda a: sum(p["few@4k"] - p["recall@4k"] for p in a["2K -> 8K"]) / len(a["2K -> 8K"])},
    by_step(("few@4k", "recall@4k", "icl@4k")),
    why="a needle in plain letters is beyond a model of this size; few pairs stand for it. The "
        "start finds 70 to 90% of 4 pairs at twice its length: most is learnt in eight steps",
    **_ALONG,  # type: ignore[arg-type]
    shown=("few@4k", "recall@4k", "icl@4k"))


def _later_gain(arms: Measured, metric: str) -> float:
    """What a metric still gains after the checkpoint at which four pairs are as good as found."""
    points = arms["2K -> 8K"]
    found = next(i for i, p in enumerate(points) if p["few@4k"] >= 0.9 * points[-1]["few@4k"])
    return points[-1][metric] - points[found][metric]


short_dips = Finding(
    "short-dips", "Short-context ability when the base changes, and after", "Figure 4",
    "the short tasks fall when the length changes, and recover as training goes on",
    {"2K -> 8K": TWICE_NTK},
    {"recall at 256, start less the first checkpoint":
         lambda a: a["2K -> 8K"][0]["recall@256"] - a["2K -> 8K"][1]["recall@256"],
     "recall at 256, end less the first checkpoint":
         lambda a: a["2K -> 8K"][-1]["recall@256"] - a["2K -> 8K"][1]["recall@256"],
     "bits per byte of short code, first checkpoint less start":
         lambda a: a["2K -> 8K"][1]["bits/byte short"] - a["2K -> 8K"][0]["bits/byte short"],
     "bits per byte of short code, first checkpoint less end":
         lambda a: a["2K -> 8K"][1]["bits/byte short"] - a["2K -> 8K"][-1]["bits/byte short"]},
    by_step(("recall@256", "icl@256", "recall@4k")),
    why="the first checkpoint is after 8 of 40 steps. Recall falls there in all seeds and comes "
        "back to within 0.05 of the start; bits per byte move more by chance than by either",
    **_ALONG,  # type: ignore[arg-type]
    shown=("recall@256", "icl@256", "recall@4k", "bits/byte short"))

# --- Reordering -----------------------------------------------------------------------------------


def throughput(seed: int, quick: bool) -> Measured:
    """Tokens per second, full attention 1, if each micro-step is as slow as its costliest rank."""
    times = model_step_times(steps=2 if quick else 50, seed=seed)
    return {name: [{"step": 0, "throughput": times["full attention"] / time}]
            for name, time in times.items()}


reordering = Finding(
    "reordering", "Sorted minibatches, modelled: 64K stage, Llama-3-8B, 8 ranks", "Table 15",
    "variable-length attention alone gains 0.4%, with minibatches sorted by cost 11.7%",
    {},
    {"throughput, sorted less full attention": lambda a: a["sorted"][-1]["throughput"] - 1,
     "what sorting adds, less what variable-length attention adds alone":
         lambda a: a["sorted"][-1]["throughput"] - 2 * a["as drawn"][-1]["throughput"] + 1},
    bars(("throughput",)),
    why="a model of waiting: all ranks wait for the costliest one at every micro-step, and nothing "
        "else costs time. Nearly every unsorted micro-step has a full 64K document on some rank, "
        "so that the others' short documents save nothing; the paper's 0.4% says the same",
    shown=("throughput",), compute=throughput)

FINDINGS = [rope_base, theta_zero_shot, position_methods, document_masks, train_longer,
            needle_first, short_dips, reordering]
