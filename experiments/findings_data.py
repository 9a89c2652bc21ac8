"""Findings about data: how much of it is long, its source, its layout; and about fine-tuning.

What is *long* and what is *short* here. The start handles documents of up to 2K tokens; its arms go
to 8K.

    long    recall-8k    pairs in 2K, 4K or 8K tokens of code, a third of the tokens each
            code_repos   whole repositories, in pieces of 8K
            icl-8k       lines to learn labels from, 2K to 8K tokens of them
    short   recall-256, recall_bare-256, icl-256    the same abilities in at most 256 tokens
            short        functions and classes, of their own length

Both halves teach the same three things; what differs is over how long a distance. A model of
140,000 parameters has few abilities to lose, so "short-context performance" is recall and ICL at
256 tokens and bits per byte of short documents, where the paper has HellaSwag and MMLU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import neighbours
import numpy as np
import synthetic
from findings_context import NTK, STEPS, THETA, TWICE_NTK
from lab import Arm, Finding, Measured, Point, bars, curve, fit_to_dots, less

import data
import sft
from data import PackedDataset, PackedSequence

LONG = {"recall-8k": 0.70, "code_repos-8k": 0.15, "icl-8k": 0.15}
SHORT = {"recall-256": 0.40, "recall_bare-256": 0.25, "short": 0.15, "icl-256": 0.20}
EVAL = "experiments/tasks.py --bpb-length 8k"  # the same for all, so that arms can be shared
TASKS, LENGTHS = "recall_bare,recall,recall_prose,icl", "256,2k,8k"

# --- 1. Arms --------------------------------------------------------------------------------------


def mix(*parts: tuple[float, dict[str, float]]) -> str:
    """A mixture as train.py reads it: (share, domains) of each part."""
    shares: dict[str, float] = {}
    for share, domains in parts:
        for domain, of_part in domains.items():
            shares[domain] = shares.get(domain, 0.0) + share * of_part
    return ",".join(f"{domain}={share:.6g}" for domain, share in shares.items() if share > 0)


def extend(mixture: str, program: str = "train.py", **changes: Any) -> Arm:
    """The start, trained on at 8K with another mixture, or in another way."""
    theta = 2 * NTK * THETA
    return Arm(f"{program} --stage ultra --seq 8k --batch-tokens 8k --rope-theta {theta:g} "
               f"--mix {mixture}", STEPS, **changes)


def long_share(percent: int) -> Arm:
    return extend(mix((percent / 100, LONG), (1 - percent / 100, SHORT)))


SHARES = {f"{percent}%": long_share(percent) for percent in (0, 25, 50, 75, 100)}


def short_ability(point: Point) -> float:
    """What a context of 256 tokens shows: recall bare and in code, and ICL."""
    return (point["recall_bare@160"] + point["recall@256"] + point["icl@256"]) / 3


def long_ability(point: Point) -> float:
    return (point["recall@8k"] + point["icl@8k"]) / 2


# --- 2. The share of long data (Figure 3), and what perplexity says of it (Figure 1) --------------


def by_share(panels: dict[str, dict[str, Any]]) -> Any:
    """A picture: metrics against the share of long data, a panel for each group of them."""

    def paint(figure: Any, result: dict[str, Any]) -> None:
        arms = list(result["arms"])
        x = [float(label.rstrip("%")) for label in arms]
        all_axes = figure.subplots(1, len(panels))
        for axes, (title, metrics) in zip(all_axes, panels.items(), strict=True):
            dots: list[float] = []
            for i, (name, metric) in enumerate(metrics.items()):
                value = metric if callable(metric) else lambda point, key=metric: point[key]
                seeds = [[value(result["arms"][label]["points"][str(seed)][-1]) for label in arms]
                         for seed in result["seeds"]]
                curve(axes, x, seeds, name, i)
                dots += [value for seed in seeds for value in seed]
            fit_to_dots(axes, dots)
            axes.set(xlabel="% of tokens in long documents", xticks=x)
            axes.set_title(title, fontsize=9)
            axes.legend(fontsize=7)

    return paint


long_share_finding = Finding(
    "long-share", "The share of long data", "Figure 3",
    "more long data first helps long ability, then hurts it; short ability falls all the way",
    SHARES,
    {"long ability (recall, ICL at 8K), 50% less 0%": less("50%", "0%", long_ability),
     "long ability, mean of 50% and 75% less 100%": lambda m: (
         less("50%", "100%", long_ability)(m) + less("75%", "100%", long_ability)(m)) / 2,
     "short ability (recall, ICL at 256), 0% less 100%": less("0%", "100%", short_ability),
     "bits/byte of short documents, 100% less 0%": less("100%", "0%", "bits/byte short")},
    by_share({"long ability": {"recall at 8K": "recall@8k", "ICL at 8K": "icl@8k"},
              "short ability": {"recall bare": "recall_bare@160", "recall at 256": "recall@256",
                                "ICL at 256": "icl@256"},
              "bits per byte": {"short documents": "bits/byte short"}}),
    why="dose: 40 steps are enough for recall at 8K to rise with real long documents, and few "
        "enough for arms to differ. Here both halves teach the same abilities, so long data are no "
        "strangers to it",
    tasks=TASKS, lengths=LENGTHS, samples=112, evaluator=EVAL,
    shown=("recall_bare@160", "recall@256", "icl@256", "recall@8k", "icl@8k", "bits/byte short"))

perplexity_misleads = Finding(
    "perplexity-misleads", "Perplexity does not choose the data that abilities choose", "Figure 1",
    "perplexity on long documents improves up to 100% long data, while abilities are best before "
    "that",
    SHARES,
    {"bits/byte, last 2K of 8K of code, 75% less 100%": less("75%", "100%", "bits/byte last 1/4"),
     "bits/byte, last 2K of 8K of code, 0% less 50%": less("0%", "50%", "bits/byte last 1/4"),
     "long ability (recall, ICL at 8K), 75% less 100%": less("75%", "100%", long_ability)},
    by_share({"bits per byte, last 2K of 8K of code": {"held-out code": "bits/byte last 1/4"},
              "abilities at 8K": {"recall": "recall@8k", "ICL": "icl@8k"}}),
    why="the arms are those of long-share; only what is looked at differs",
    tasks=TASKS, lengths=LENGTHS, samples=112, evaluator=EVAL,
    shown=("bits/byte last 1/4", "recall@8k", "icl@8k"))


# --- 3. The source of long data (Table 4) ---------------------------------------------------------


def language_reference() -> np.ndarray:
    """Prose to train on, 0.7 million tokens: the first document of data.textbooks."""
    return next(iter(data.textbooks(data.load_tokenizer(), 0))).input_ids[1:-1]


def prose_haystack(dataset: PackedDataset, seed: int,
                   share: float = 1.0) -> Iterator[PackedSequence]:
    """recall-8k with prose for code in a `share` of its sequences; pairs and questions stay."""
    prose = language_reference() if dataset.domain == "recall-8k" else None
    for i in range(len(dataset)):
        sequence = dataset[i]
        if prose is not None and int((i + 1) * share) > int(i * share):
            rng, ids = data.generator(seed, "prose", i), sequence.input_ids.copy()
            code = ids < 256  # bytes; all else are special tokens
            begin = int(rng.integers(len(prose) - code.sum() + 1))
            ids[code] = prose[begin:begin + int(code.sum())]
            sequence = PackedSequence(ids, sequence.doc_lens, sequence.loss_mask)
        yield sequence


def half_prose_haystack(dataset: PackedDataset, seed: int) -> Iterator[PackedSequence]:
    return prose_haystack(dataset, seed, share=0.5)


PROSE = {"recall-8k": 0.70, "textbooks-8k": 0.15, "icl-8k": 0.15}
BOTH = {"recall-8k": 0.70, "code_repos-8k": 0.075, "textbooks-8k": 0.075, "icl-8k": 0.15}


def recall_of_both(point: Point) -> float:
    """Recall at 8K, the mean of the two haystacks."""
    return (point["recall@8k"] + point["recall_prose@8k"]) / 2


long_source = Finding(
    "long-source", "Where long data come from", "Table 4",
    "code recalls best; code and prose together are best on average",
    {"code": SHARES["50%"],
     "prose": extend(mix((0.5, PROSE), (0.5, SHORT)), transform=prose_haystack),
     "both": extend(mix((0.5, BOTH), (0.5, SHORT)), transform=half_prose_haystack)},
    {"recall at 8K in both haystacks, code less prose": less("code", "prose", recall_of_both),
     "recall at 8K in both haystacks, both less the mean of code and prose": lambda m: (
         less("both", "code", recall_of_both)(m) + less("both", "prose", recall_of_both)(m)) / 2,
     "recall at 8K in code, code less prose": less("code", "prose", "recall@8k"),
     "recall at 8K in prose, prose less code": less("prose", "code", "recall_prose@8k")},
    bars(("recall@8k", "recall_prose@8k", "icl@8k", "bits/byte last 1/4")),
    why="the source is the haystack of the recall documents and the plain text of 8K; half of the "
        "tokens are long, the short half is always the same. Asked in held-out code and in "
        "held-out prose. To a model this small, which reads neither well, both may be no more than "
        "bytes between the pairs",
    tasks=TASKS, lengths=LENGTHS, samples=112, evaluator=EVAL,
    shown=("recall@8k", "recall_prose@8k", "icl@8k", "bits/byte last 1/4"))


# --- 4. Neighbours: other ways to the same length -------------------------------------------------

# 75% long, and the same with what is long replaced by what the start could read already.
TO_2K = {"recall-2k": 0.70, "short": 0.15, "icl-2k": 0.15}
REAL, UP_TO_2K = mix((0.75, LONG), (0.25, SHORT)), mix((0.75, TO_2K), (0.25, SHORT))


def tie_knots(dataset: PackedDataset, seed: int) -> Iterable[PackedSequence]:
    """recall-2k as knots of 8K, each of one recall document and the short functions around it."""
    if dataset.domain != "recall-2k":
        return (dataset[i] for i in range(len(dataset)))
    return neighbours.make_knots(data.load_tokenizer(), dataset.seq_len, len(dataset), seed)


def decompose(dataset: PackedDataset, seed: int) -> Iterable[PackedSequence]:
    """The documents of the mixture REAL, decomposed and in the order of a length curriculum."""
    made = neighbours.make_decomposed(data.load_tokenizer(), dataset.seq_len, len(dataset), seed,
                                      data.parse_mixture(REAL))
    return neighbours.in_drawing_order(made, dataset.domain, seed)


ways = Finding(
    "neighbours", "Other papers' ways to a longer context", "2409.04774, 2405.13226, 2309.10400",
    "short documents teach a length that they don't have, tied into knots or with skipped "
    "positions; a curriculum of lengths does no harm",
    {"long": SHARES["75%"], "up to 2K": extend(UP_TO_2K),
     "knots": extend(UP_TO_2K, transform=tie_knots),
     "skipped": extend(UP_TO_2K, "experiments/neighbours.py train --skip-to 8k"),
     "decomposed": extend("recall-8k=1", transform=decompose)},
    {"Untie the Knots: recall at 8K, knots less up to 2K": less("knots", "up to 2K", "recall@8k"),
     "PoSE: recall at 8K, skipped less up to 2K": less("skipped", "up to 2K", "recall@8k"),
     "Dataset Decomposition: recall at 8K, decomposed less long":
         less("decomposed", "long", "recall@8k"),
     "ProLong: recall at 8K, long less up to 2K": less("long", "up to 2K", "recall@8k")},
    bars(("recall@256", "recall@2k", "recall@8k", "icl@8k")),
    why="documents of at most 2K tokens (what the start can read) but for the arms long and "
        "decomposed; everywhere as many tokens, and the same quarter of short ones",
    tasks=TASKS, lengths=LENGTHS, samples=112, evaluator=EVAL,
    shown=("recall@256", "recall@2k", "recall@8k", "icl@8k"))


# --- 5. Fine-tuning -------------------------------------------------------------------------------

SFT_STEPS, SFT_EVAL = 60, "experiments/tasks.py"
SFT_TASKS, SFT_LENGTHS = "chat_value,chat_label,recall,icl", "256,2k"


def fine_tune(options: str = "", start: str | Arm = "long") -> Arm:
    command = f"experiments/neighbours.py sft --seq 2k --batch-tokens 16k {options}"
    return Arm(command.strip(), SFT_STEPS, start)


def fine_tune_with_synthetic(share: float) -> Arm:
    """Long synthetic conversations take the place of chat; recall keeps its third."""
    mixture = f"chat={0.67 - share:.2g},{{folder}}/synthetic.jsonl={share},recall-2k=0.33"
    before = "experiments/synthetic.py --seq 2k --out {folder}/synthetic.jsonl"
    return replace(fine_tune(f"--mix {mixture}"), before=before)


def chat(point: Point) -> float:
    return (point["chat_value@1k"] + point["chat_label@1k"]) / 2


def loss_weights(seed: int, quick: bool) -> Measured:
    """What each domain of a fine-tuning step weighs in the loss, by what the loss averages over.

    A trained token's weight is 1 / (groups x trained tokens of its group), the groups being one for
    all tokens, or the sequences, or the documents. Exact: packs are counted, nothing is trained.
    """
    mixture, tokenizer = {"chat": 0.57, "synthetic": 0.1, "recall-2k": 0.33}, data.load_tokenizer()
    asked = sft.builtin_conversations(tokenizer, seed, sft.question_kinds(tokenizer), 1024)
    made = synthetic.conversations(tokenizer, "llama3", 2048, seed, synthetic.write_by_rule)
    encode = partial(sft.encode_chat, tokenizer)
    recall = data.pack_builtin("recall-2k", tokenizer, 2048, seed, data.PackReport())
    streams = {"chat": data.pack_sft(map(encode, asked), 2048),
               "synthetic": data.pack_sft(map(encode, made), 2048), "recall-2k": recall}
    groups: dict[str, list[tuple[str, int]]] = {"tokens": [], "sequences": [], "documents": []}
    for domain, share in mixture.items():
        for sequence in islice(streams[domain], round(share * (32 if quick else 256))):
            assert sequence.loss_mask is not None
            begins = np.cumsum((0, *sequence.doc_lens[:-1]))
            trained = np.add.reduceat(sequence.loss_mask.astype(int), begins)
            groups["documents"] += [(domain, int(n)) for n in trained if n]
            groups["sequences"].append((domain, int(trained.sum())))
    points = {}
    for way, parts in groups.items():
        parts = parts or groups["sequences"]
        sizes = [n for _, n in parts]
        weights = [n / sum(sizes) if way == "tokens" else 1 / len(parts) for n in sizes]
        weight, trained_of = dict.fromkeys(mixture, 0.0), dict.fromkeys(mixture, 0)
        for (domain, n), w in zip(parts, weights, strict=True):
            weight[domain] += w
            trained_of[domain] += n
        of_token = {domain: weight[domain] / trained_of[domain] for domain in mixture}
        ratio = of_token["synthetic"] / of_token["chat"]
        points[way] = [{"step": 0, "synthetic token / chat token": ratio}
                       | {f"weight of {domain}": weight[domain] for domain in mixture}]
    return points


sft_weights = Finding(
    "sft-weights", "What a trained token weighs in fine-tuning", "A.3",
    "averaging over sequences skews the optimization: tokens with few trained ones beside them "
    "weigh more",
    {}, {"a synthetic conversation's token over chat's, averaged over sequences, less 1":
         lambda m: m["sequences"][-1]["synthetic token / chat token"] - 1,
         "weight of recall (33% of all tokens), sequences less tokens":
             less("sequences", "tokens", "weight of recall-2k"),
         "weight of synthetic conversations (10% of all tokens), sequences less tokens":
             less("sequences", "tokens", "weight of synthetic")},
    bars(("weight of "
          "chat", "weight of recall-2k", "weight of synthetic", "synthetic token / chat token")),
    why="counted in packs of 2K: 57% chat, 33% recall, 10% synthetic long conversations, of all "
        "tokens. Packed sequences are equally long, so averaging over them gives a domain its "
        "share of all tokens, averaging over tokens its share of the trained ones",
    shown=("weight of "
           "chat", "weight of recall-2k", "weight of synthetic", "synthetic token / chat token"),
    compute=loss_weights)

sft_loss = Finding(
    "sft-loss", "What the loss of fine-tuning averages over", "A.3",
    "averaged over sequences, few trained tokens weigh as much as many, which skews what is learnt",
    {"tokens": fine_tune(), "sequences": fine_tune("--average sequences"),
     "documents": fine_tune("--average documents")},
    {"questions in chat, tokens less sequences": less("tokens", "sequences", chat),
     "recall at 2K, sequences less tokens": less("sequences", "tokens", "recall@2k"),
     "questions in chat, documents (LongAlign) less tokens": less("documents", "tokens", chat)},
    bars(("chat_value@1k", "chat_label@1k", "recall@2k")),
    why="60 steps end in the midst of learning, and where depends on the start: 64%, 2% and 14% of "
        "the values are found. Within a start tokens and sequences differ by little. Averaged over "
        "documents, where recall weighs about a tenth (sft-weights), recall at 2K is lower in two "
        "seeds of three and plain code is read worse in all",
    tasks=SFT_TASKS, lengths=SFT_LENGTHS, samples=200, evaluator=SFT_EVAL,
    shown=("chat_value@1k", "chat_label@1k", "recall@256", "recall@2k"))

sft_synthetic = Finding(
    "sft-synthetic", "The share of synthetic long conversations", "Table 8",
    "synthetic long conversations don't help; half of them hurts",
    {"0%": fine_tune(), "10%": fine_tune_with_synthetic(0.1), "50%": fine_tune_with_synthetic(0.5)},
    {"recall at 2K, 0% less 50%": less("0%", "50%", "recall@2k"),
     "recall at 2K, 0% less 10%": less("0%", "10%", "recall@2k"),
     "questions in chat, 0% less 50%": less("0%", "50%", chat)},
    bars(("chat_value@1k", "chat_label@1k", "recall@2k", "icl@2k")),
    why="every arm rehearses recall at 2K with a third of its tokens, and keeps it; synthetic "
        "conversations take the place of chat, and fewer questions in chat are answered in each "
        "seed, by amounts from 0.02 to 0.35",
    tasks=SFT_TASKS, lengths=SFT_LENGTHS, samples=200, evaluator=SFT_EVAL,
    shown=("chat_value@1k", "chat_label@1k", "recall@256", "recall@2k"))

BRIEF = Arm(TWICE_NTK.command, steps=8)


def gain(point: str) -> Callable[[Measured], float]:
    """What the full training has over the brief one at `point`, after fine-tuning less before."""
    before = less(f"{STEPS} steps", "8 steps", point)
    after = less(f"{STEPS} steps, SFT", "8 steps, SFT", point)
    return lambda arms: after(arms) - before(arms)


before_after_sft = Finding(
    "before-after-sft", "Asked before fine-tuning, and after it", "Figure 2",
    "what more long training gains shows in some tasks (RAG, re-ranking) only after fine-tuning",
    {"8 steps": BRIEF, f"{STEPS} steps": TWICE_NTK, "8 steps, SFT": fine_tune(start=BRIEF),
     f"{STEPS} steps, SFT": fine_tune(start=TWICE_NTK)},
    {f"recall at 8K, gain of {STEPS} steps over 8: after less before": gain("recall@8k"),
     f"ICL at 8K, gain of {STEPS} steps over 8: after less before": gain("icl@8k"),
     f"questions in chat, gain of {STEPS} steps over 8, after":
         less(f"{STEPS} steps, SFT", "8 steps, SFT", chat),
     f"questions in chat, {STEPS} steps: after less before":
         less(f"{STEPS} steps, SFT", f"{STEPS} steps", chat)},
    bars(("recall@8k", "icl@8k", "chat_value@1k", "chat_label@1k")),
    why="no base model here answers a question in chat, so that task tells nothing before "
        "fine-tuning. In recall the longer training's lead is 0.03 before it and 0.11 after, in "
        "the mean. Fine-tuning at 2K costs more at 8K (0.87 to 0.48) than the longer training had "
        "gained, where the paper's 8B models keep their long abilities",
    tasks=SFT_TASKS, lengths="256,8k", samples=200, evaluator=SFT_EVAL,
    shown=("recall@8k", "icl@8k", "chat_value@1k", "chat_label@1k"))

FINDINGS = [long_share_finding, perplexity_misleads, long_source, ways, sft_weights, sft_loss,
            sft_synthetic, before_after_sft]
