"""Findings about data: how much of it is long, its source, its layout; and about fine-tuning.

packs.py says what is *long* and what is *short* here. A model that is asked at 8K after fine-tuning
was fine-tuned on short conversations, as the paper's: with a third of recall documents of 2K, as
sft.py's own recipe has it, or without, where the finding says so.
"""

from __future__ import annotations

from functools import cache, partial
from itertools import islice
from typing import Any

import numpy as np
import packs
import synthetic
from findings_context import AT_8K, NTK, STEPS, TWICE_NTK, extend
from lab import STAGES, Arm, Difference, Finding, Measured, Painter, bars, less, paint_panels
from lab import values_of as values
from packs import LONG, SHORT, UP_TO_2K, mix

import data
import sft

# --- 1. Arms --------------------------------------------------------------------------------------


SFT_STEPS = 40


def at_8k(mixture: str, **changes: Any) -> Arm:
    return extend(2 * NTK, mix=mixture, **changes)


def fine_tune(start: Arm, options: str = "", steps: int = SFT_STEPS, seq: str = "2k",
              **changes: Any) -> Arm:
    command = f"experiments/neighbours.py sft --seq {seq} --batch-tokens 16k {options}"
    return Arm(command.strip(), steps, start, **changes)


PERCENTS = (0, 50, 75, 100)
SHARES = {f"{percent}%": at_8k(mix((percent / 100, LONG), (1 - percent / 100, SHORT)))
          for percent in PERCENTS}
TUNED = {f"{label}, SFT": fine_tune(arm) for label, arm in SHARES.items()}

# --- 2. The share of long data (Figure 3), and what perplexity says of it (Figure 1) --------------


def by_share(panels: dict[str, tuple[str, dict[str, str]]]) -> Painter:
    """Metrics by the share of long data: a panel for each (end of the arms' names, metrics)."""
    return lambda figure, result: paint_panels(figure, {title: (PERCENTS, {
        name: list(zip(*(values(result, f"{percent}%{suffix}", metric)
                         for percent in PERCENTS), strict=True))
        for name, metric in metrics.items()})
        for title, (suffix, metrics) in panels.items()}, "% of tokens in long documents")


MIDDLE = ("50%, SFT", "75%, SFT")
LONG_TASKS = {"recall at 8K": "recall@8k", "ICL at 8K": "icl@8k"}

long_share_finding = Finding(
    "long-share", "The share of long data", "Figure 3",
    "more long data first helps long ability, then hurts it; short ability falls all the way",
    SHARES | TUNED,
    {"recall and ICL at 8K after SFT, mean of 50% and 75% less mean of 0% and 100%":
         less(MIDDLE, ("0%, SFT", "100%, SFT"), *AT_8K)},
    {"the same less 0% alone: more long data first helps": less(MIDDLE, "0%, SFT", *AT_8K),
     "the same less 100% alone: then it hurts": less(MIDDLE, "100%, SFT", *AT_8K),
     "recall and ICL at 8K before SFT, 100% less 0%": less("100%", "0%", *AT_8K),
     "short ability (recall, ICL at 256), 0% less 100%":
         less("0%", "100%", "recall_bare@160", "recall@256", "icl@256"),
     "bits/byte of short documents, 100% less 0%": less("100%", "0%", "bits/byte short")},
    by_share({"at 8K before SFT": ("", LONG_TASKS), "at 8K after SFT": (", SFT", LONG_TASKS),
              "short ability": ("", {"recall bare": "recall_bare@160",
                                     "recall at 256": "recall@256", "ICL at 256": "icl@256"})}),
    why="as in the paper, long tasks are asked after fine-tuning on short conversations and short "
        "ones before it. The primary contrast is the curvature within a seed: how far the middle "
        "lies above the line between the ends; the next two say on which side. Both halves of the "
        "data teach the same abilities, over other distances",
    shown=("recall_bare@160", "recall@256", "icl@256", "recall@8k", "icl@8k", "bits/byte short"))


def misled(measured: Measured) -> float:
    """What the arm that bits/byte pick lacks to the one that half of the questions picks."""
    def ability(label: str, half: str) -> float:
        point = measured[f"{label}, SFT"][-1]
        return (point[f"recall@8k {half}"] + point[f"icl@8k {half}"]) / 2

    by_bits = min(SHARES, key=lambda label: measured[label][-1]["bits/byte last 1/4"])
    lost = []
    for asked, judge in (("even", "odd"), ("odd", "even")):
        best = max(SHARES, key=lambda label, half=asked: ability(label, half))  # type: ignore[misc]
        lost.append(ability(best, judge) - ability(by_bits, judge))
    return sum(lost) / 2


def recall_without_bits(measured: Measured) -> float:
    """From `long` to `ultra`: recall gained at 16K, less the share of bits per byte saved."""
    before, after = measured["tiny: long"][-1], measured["tiny: ultra"][-1]
    saved = 1 - after["bits/byte last 1/4"] / before["bits/byte last 1/4"]
    return after["recall@16k"] - before["recall@16k"] - saved


ULTRA = STAGES["ultra"]
perplexity_misleads = Finding(
    "perplexity-misleads", "Perplexity does not choose the data that abilities choose", "Figure 1",
    "perplexity on long documents improves up to 100% long data, while abilities are best before "
    "that",
    SHARES | TUNED | {
        "tiny: long": Arm(lengths="16k"),
        "tiny: ultra": Arm(f"train.py --stage ultra --seq {ULTRA.seq_len} --batch-tokens "
                           f"{ULTRA.batch_tokens}", ULTRA.steps, lengths="16k")},
    {"recall and ICL at 8K after SFT, the arm that half of the questions picks less the one that "
     "bits/byte pick": misled},
    {"bits/byte, last 2K of 8K of code, 0% less 100%": less("0%", "100%", "bits/byte last 1/4"),
     "bits/byte, last 2K of 8K of code, 75% less 100%": less("75%", "100%", "bits/byte last 1/4"),
     "recall and ICL at 8K after SFT, 75% less 100%": less("75%, SFT", "100%, SFT", *AT_8K),
     "tiny recipe, long to ultra: recall gained at 16K less the share of bits/byte saved":
         recall_without_bits},
    by_share({"bits per byte, last 2K of 8K of code": ("", {"held-out code": "bits/byte last 1/4"}),
              "at 8K after SFT": (", SFT", LONG_TASKS)}),
    why="as in the paper, perplexity is of the last part of long documents, and abilities are "
        "asked after fine-tuning. One half of the contexts picks an arm, the other half judges it "
        "and the one of the lowest bits/byte, and the halves change places. It is 0 where both "
        "are one arm. The arms are long-share's, and the tiny recipe's own last stage",
    shown=("bits/byte last 1/4", "recall@8k", "icl@8k", "recall@16k"))

# --- 3. The source of long data (Table 4) ---------------------------------------------------------

PROSE = {"recall-8k": 0.70, "textbooks-8k": 0.15, "icl-8k": 0.15}
BOTH = {"recall-8k": 0.70, "code_repos-8k": 0.075, "textbooks-8k": 0.075, "icl-8k": 0.15}

long_source = Finding(
    "long-source", "Where long data come from", "Table 4",
    "code recalls best; code and prose together are best on average",
    {"code": SHARES["50%"],
     "prose": at_8k(mix((0.5, PROSE), (0.5, SHORT)), transform=packs.prose_haystack),
     "both": at_8k(mix((0.5, BOTH), (0.5, SHORT)), transform=packs.half_prose_haystack)},
    {"recall at 8K in both haystacks, code less prose":
         less("code", "prose", "recall@8k", "recall_prose@8k")},
    {"recall at 8K in both haystacks, both less the mean of code and prose":
         less("both", ("code", "prose"), "recall@8k", "recall_prose@8k"),
     "recall at 8K in code, code less prose": less("code", "prose", "recall@8k"),
     "recall at 8K in prose, prose less code": less("prose", "code", "recall_prose@8k")},
    bars(("recall@8k", "recall_prose@8k", "icl@8k", "bits/byte last 1/4")),
    why="the source is the haystack of the recall documents and the plain text of 8K; the short "
        "half of the tokens is always the same. Asked in held-out code and prose. To a model that "
        "reads neither well, both may be no more than bytes between the pairs",
    tasks="recall,recall_prose,icl", lengths="8k",
    shown=("recall@8k", "recall_prose@8k", "icl@8k", "bits/byte last 1/4"))

# --- 4. Neighbours: other ways to the same length -------------------------------------------------

ways = Finding(
    "neighbours", "Short documents for a long context", "2409.04774, 2309.10400",
    "short documents teach a longer context, tied into knots or with skipped positions",
    {"up to 2K": at_8k(UP_TO_2K), "knots": at_8k(UP_TO_2K, transform=packs.tie_knots),
     "skipped": at_8k(UP_TO_2K, program="experiments/neighbours.py train --skip-to 8k"),
     "long": SHARES["75%"]},
    {"Untie the Knots: recall at 8K, knots less up to 2K": less("knots", "up to 2K", "recall@8k")},
    {"PoSE: recall at 8K, skipped less up to 2K": less("skipped", "up to 2K", "recall@8k"),
     "ProLong: recall at 8K, long less up to 2K": less("long", "up to 2K", "recall@8k")},
    bars(("recall@256", "recall@2k", "recall@8k", "icl@8k")),
    why="documents of at most 2K tokens (what the start can read) but for the arm long; everywhere "
        "as many tokens, and the same quarter of short ones",
    shown=("recall@256", "recall@2k", "recall@8k", "icl@8k"))

decomposition = Finding(
    "decomposition", "A curriculum of lengths does no harm", "2405.13226",
    "documents cut to powers of two, short ones first, teach no less than packed ones",
    {"long": SHARES["75%"], "decomposed": at_8k("recall-8k=1", transform=packs.decompose)},
    {"recall and ICL at 8K, decomposed less long": less("decomposed", "long", *AT_8K)},
    {"recall at 256, decomposed less long": less("decomposed", "long", "recall@256")},
    bars(("recall@256", "recall@2k", "recall@8k", "icl@8k")), floor=-0.05,
    why="both arms see the same documents, 75% long. Dataset Decomposition promises speed, and no "
        "harm; so we agree if the whole interval lies above a loss of 0.05",
    shown=("recall@256", "recall@2k", "recall@8k", "icl@8k"))

# --- 5. Fine-tuning -------------------------------------------------------------------------------

SFT_TASKS = "chat_value,chat_label,recall,icl"
CHAT = ("chat_value@1k", "chat_label@1k")  # questions in chat: their mean


def with_synthetic(share: float, options: str = "") -> Arm:
    """The 8K model, fine-tuned on chat and long synthetic conversations, without rehearsal.

    The chat tokens are those of SFT_STEPS steps of chat alone, whatever the share.
    """
    mixture = f"chat={1 - share:g},{{folder}}/synthetic.jsonl={share:g}" if share else "chat=1"
    before = ("experiments/synthetic.py --seq 8k --conversations 100 --out "
              "{folder}/synthetic.jsonl" if share else "")
    return fine_tune(TWICE_NTK, f"{options} --mix {mixture}".strip(),
                     round(SFT_STEPS / (1 - share)), "8k", before=before)


@cache
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


WEIGHTS = ("weight of chat", "weight of recall-2k", "weight of synthetic",
           "synthetic token / chat token")

sft_weights = Finding(
    "sft-weights", "What a trained token weighs in fine-tuning", "A.3",
    "averaging over sequences skews the optimization: tokens with few trained ones beside them "
    "weigh more",
    {}, {"a synthetic conversation's token over chat's, averaged over sequences, less 1":
         lambda m: m["sequences"][-1]["synthetic token / chat token"] - 1},
    {"weight of recall (33% of all tokens), sequences less tokens":
         less("sequences", "tokens", "weight of recall-2k"),
     "weight of synthetic conversations (10% of all tokens), sequences less tokens":
         less("sequences", "tokens", "weight of synthetic")},
    bars(WEIGHTS),
    why="counted in packs of 2K: 57% chat, 33% recall, 10% synthetic long conversations, of all "
        "tokens. Packed sequences are equally long, so averaging over them gives a domain its "
        "share of all tokens, averaging over tokens its share of the trained ones",
    shown=WEIGHTS, compute=loss_weights)

HALF = with_synthetic(0.5)

sft_loss = Finding(
    "sft-loss", "What the loss of fine-tuning averages over", "A.3",
    "averaged over sequences, few trained tokens weigh as much as many, which skews what is learnt",
    {"tokens": HALF, "sequences": with_synthetic(0.5, "--average sequences")},
    {"bits per held-out answer token: what chat loses and synthetic gains, sequences less tokens":
         lambda m: less("sequences", "tokens", "answer bits chat")(m)
         + less("tokens", "sequences", "answer bits synthetic")(m)},
    {"bits per answer token in chat, sequences less tokens":
         less("sequences", "tokens", "answer bits chat"),
     "bits per answer token in synthetic conversations, tokens less sequences":
         less("tokens", "sequences", "answer bits synthetic")},
    bars(("answer bits chat", "answer bits synthetic", "chat_value@1k")),
    why="half of the tokens are synthetic conversations of 8K, with a short answer each. The loss "
        "on held-out answers says what was learnt of each domain",
    tasks="chat_value,chat_label", lengths="256",
    shown=("answer bits chat", "answer bits synthetic", "chat_value@1k", "chat_label@1k"))

sft_synthetic = Finding(
    "sft-synthetic", "The share of synthetic long conversations", "Table 8",
    "synthetic long conversations don't help; half of them hurts",
    {"0%": with_synthetic(0), "10%": with_synthetic(0.1), "50%": HALF},
    {"recall and ICL at 8K, 0% less 50%": less("0%", "50%", *AT_8K)},
    {"recall and ICL at 8K, 0% less 10%": less("0%", "10%", *AT_8K),
     "questions in chat, 0% less 50%": less("0%", "50%", *CHAT),
     "recall at 256, 0% less 50%": less("0%", "50%", "recall@256")},
    bars((*AT_8K, *CHAT)),
    why="as in the paper, a long-context model is fine-tuned on short conversations and a share of "
        "long synthetic ones, and asked at its full length; nothing is rehearsed. All arms see as "
        "much chat: with half synthetic the training is twice as long",
    tasks=SFT_TASKS, lengths="256,8k", shown=("recall@256", *AT_8K, *CHAT))

BRIEF = Arm(TWICE_NTK.command, steps=8)
BEFORE_AFTER = {"8 steps": BRIEF, f"{STEPS} steps": TWICE_NTK, "8 steps, SFT": fine_tune(BRIEF),
                f"{STEPS} steps, SFT": fine_tune(TWICE_NTK)}


def gain(metric: str) -> Difference:
    """What the full training has over the brief one, after fine-tuning less before."""
    before = less(f"{STEPS} steps", "8 steps", metric)
    after = less(f"{STEPS} steps, SFT", "8 steps, SFT", metric)
    return lambda arms: after(arms) - before(arms)


before_after_sft = Finding(
    "before-after-sft", "Asked before fine-tuning, and after it", "Figure 2",
    "what more long training gains shows in some tasks (RAG, re-ranking) only after fine-tuning",
    BEFORE_AFTER,
    {f"recall at 8K, gain of {STEPS} steps over 8: after less before": gain("recall@8k")},
    {f"ICL at 8K, gain of {STEPS} steps over 8: after less before": gain("icl@8k"),
     f"questions in chat, {STEPS} steps: after less before":
         less(f"{STEPS} steps, SFT", f"{STEPS} steps", *CHAT)},
    bars(("recall@8k", "icl@8k", "chat_value@1k", "chat_label@1k")),
    why="no base model here answers a question in chat, so that task tells nothing before "
        "fine-tuning",
    tasks=SFT_TASKS, lengths="256,8k", shown=(*AT_8K, *CHAT))

sft_cost = Finding(
    "sft-cost", "What fine-tuning costs at the full length", "section 5, Table 8",
    "short conversations are enough: a long-context model keeps its abilities",
    BEFORE_AFTER,
    {f"recall and ICL at 8K, {STEPS} steps: after SFT less before":
         less(f"{STEPS} steps, SFT", f"{STEPS} steps", *AT_8K)},
    {f"{metric}: after SFT less before": less(f"{STEPS} steps, SFT", f"{STEPS} steps", metric)
     for metric in ("recall@8k", "icl@8k", "recall@256")},
    bars(("recall@256", "recall@8k", "icl@8k")), floor=-0.05,
    why="the arms of before-after-sft: 40 steps on chat, and on recall of 2K for a third of the "
        "tokens. We agree if less than 0.05 is lost, surely. The paper's 8B parameters have room "
        "for both; 140,000 may not",
    tasks=SFT_TASKS, lengths="256,8k", shown=("recall@256", "recall@8k", "icl@8k"))

FINDINGS = [long_share_finding, perplexity_misleads, long_source, ways, decomposition, sft_weights,
            sft_loss, sft_synthetic, before_after_sft, sft_cost]
