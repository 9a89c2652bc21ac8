"""Scores of answers in text, their averages, and tests of their differences.

A score (0 to 1) compares what a model wrote with a question's right `answers`, as HELMET
(2410.02694) and RULER (2404.06654) do. An evaluation is the dict that eval.py writes as JSON: its
"results" are a row for each task and length. Sources of the tests: McNemar (1947), Holm (1979).
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Collection, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize as unicode_form

import numpy as np

from .cli import format_length


def same(written: str, question: Any) -> float:
    """Letter for letter: for answers in special tokens."""
    return float(written == question.answers[0])


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, single blanks: how SQuAD and HELMET compare."""
    text = "".join(c for c in unicode_form("NFC", text.lower()) if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def contains(written: str, question: Any) -> float:
    """HELMET's substring_exact_match, both normalized; an answer that is empty then is wrong."""
    return float(any(a in normalize(written) for a in map(normalize, question.answers) if a))


def exact_line(written: str, question: Any) -> float:
    """HELMET's exact_match: what follows "label:", or else the first line, is a right answer."""
    found = re.search(r"label:(.*)", written, re.IGNORECASE)
    line = found[1].strip() if found else written.partition("\n")[0]
    line = re.sub(r"^label:", "", line, flags=re.IGNORECASE)  # some models say it twice
    return float(normalize(line) in map(normalize, question.answers))


def fraction(written: str, question: Any) -> float:
    """RULER's score: the share of the right answers that occur in what was written, in any case."""
    text, *answers = (unicode_form("NFC", each.lower()) for each in (written, *question.answers))
    return sum(answer in text for answer in answers) / len(answers)


def any_answer(written: str, question: Any) -> float:
    """RULER's score for question answering: any of the right answers occurs."""
    return float(fraction(written, question) > 0)


def ranking(written: str, question: Any) -> float:
    """HELMET's score for re-ranking, nDCG@10."""
    return ndcg(parse_ranking(written, question.relevance), question.relevance)


class Rule(NamedTuple):
    """How an answer is judged, how many tokens it may have, and whether it ends with its line."""

    score: Callable[[str, Any], float]
    budget: int
    one_line: bool = False


ICL, RAG, RERANK = Rule(exact_line, 20, True), Rule(contains, 20, True), Rule(ranking, 200, True)
RECALL, NEEDLES = Rule(contains, 100), Rule(fraction, 128)
RULER_BUDGETS = {"qa": 32, "vt": 30, "cwe": 120, "fwe": 50}  # of its other tasks


def for_file(path: Path, row: dict[str, Any]) -> Rule:
    """The rule for a file of such rows. RULER's goes by the task, as in qa_1/validation.jsonl."""
    folder = re.match("validation|test|train|dev", path.stem) and path.absolute().parent.name
    name = f"{folder or ''}{path.stem}".lower()
    if "ctxs" in row:
        return RERANK if "query" in row else RAG
    if "input" in row and "outputs" in row:
        budget = next((n for task, n in RULER_BUDGETS.items() if task in name), NEEDLES.budget)
        return Rule(any_answer if "qa" in name else fraction, budget)
    kept = not {"outputs", "type_needle_v"}.isdisjoint(row)  # HELMET's own form of RULER's tasks
    budget = 50 if kept and not re.search("multikey_3|multiquery|cwe", name) else RECALL.budget
    return Rule(fraction if kept and "qa" not in name else contains, budget)


def parse_ranking(written: str, passages: Collection[str] = ()) -> list[str]:
    """'[ID3] > ID1 > 2' -> 3, 1, 2: the longest chain of numbers, or of words if ids are words."""
    plain, *ids = (re.sub(r"[\[\]:]", "", text).lower().replace("id", "")
                   for text in (written, *passages))
    numbers, known = all(map(str.isdigit, ids)), dict(zip(ids, passages, strict=True))
    one = r"\d+" if numbers else r"[^\s>]*\w"
    chains = re.findall(rf"{one}(?:\s*>\s*{one})*", plain)
    longest = max(chains, key=len if numbers else lambda chain: chain.count(">"), default="")
    return list(dict.fromkeys(known.get(name, name) for name in re.findall(one, longest)))


def ndcg(order: Sequence[str], relevance: dict[str, int], k: int = 10) -> float:
    """Normalized discounted cumulative gain, as trec_eval has it: a gain is the relevance itself.

    A passage that does not exist takes up its rank and gains nothing.
    """
    found = [relevance.get(passage, 0) for passage in order]
    ideal = sorted(relevance.values(), reverse=True)
    dcg, best = (sum(gain / math.log2(rank) for rank, gain in enumerate(gains[:k], 2))
                 for gains in (found, ideal))
    return dcg / best if best else 0.0


def by_depth(predictions: Sequence[dict[str, Any]]) -> list[float | None]:
    """Mean score where the answer stood in the first fifth of the context, the second, ..."""
    parts: list[list[float]] = [[] for _ in range(5)]
    for p in predictions:
        if p["depth"] is not None:
            parts[min(int(p["depth"] * 5), 4)].append(p["score"])
    return [sum(part) / len(part) if part else None for part in parts]


def macro_averages(results: Sequence[dict[str, Any]]) -> dict[int, float]:
    """The mean over categories of their tasks' means, by each length that all tasks have (2.1)."""
    tables: dict[int, dict[str, list[float]]] = {}  # length -> category -> scores
    for row in results:
        tables.setdefault(row["length"], {}).setdefault(row["category"], []).append(row["score"])
    counts = {length: sum(map(len, table.values())) for length, table in tables.items()}
    return {length: float(np.mean([np.mean(each) for each in tables[length].values()]))
            for length in sorted(tables) if counts[length] == max(counts.values()) > 1}


def align(rows: Sequence[Sequence[str]]) -> str:
    """Cells as a table: the first column stands to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])])
                     for first, *others in rows)


def format_table(evaluations: Sequence[dict[str, Any]]) -> str:
    """Score by task and length, one column a model, each with its interval."""
    table = [["task", "length", "n", "chance", *(e["model"] for e in evaluations)]]
    for rows in zip(*(e["results"] for e in evaluations), strict=True):
        r = rows[0]
        table.append([r["task"], format_length(r["length"]), str(r["n"]), f"{r['chance']:.2g}"])
        table[-1] += [f"{r['score']:.3f} [{r['low']:.2f}, {r['high']:.2f}]" for r in rows]
    means = [macro_averages(e["results"]) for e in evaluations]
    more = [("macro avg", format_length(n), [mean[n] for mean in means]) for n in means[0]]
    for parts in zip(*(e["bits_per_byte"] for e in evaluations), strict=True):
        more.append(("bits/byte", parts[0]["name"], [part["bits_per_byte"] for part in parts]))
    for name, where, values in more:
        table.append([name, where, "", "", *(f"{value:.3f}".ljust(18) for value in values)])
    return align(table)


def cut_around(ids: np.ndarray, depth: float | None) -> np.ndarray:
    """The part of a context to show with a question: what stands around the answer."""
    at = int((depth or 0) * len(ids))
    return ids[max(0, at - 30):at + 40]


def format_recall(evaluation: dict[str, Any]) -> str:
    """One question at recall's shortest length and one at its longest, and what the model wrote."""

    def plain(text: str) -> str:  # "a<|pair|><|Q|><|X|>b" -> "a ~QX b"
        text = re.sub(r"<\|pair\|>((<\|\S\|>)*)", r" ~\1 ", text).replace("<|ask|>", "?")
        return " ".join(re.sub(r"<\|(\S)\|>", r"\1", text).split())

    rows = [row for row in evaluation["results"] if row["task"] == "recall"]
    lines = ["\nIn the context ~KABCD is a pair of key K and value ABCD; ?K asks for the value."]
    for row in rows[:1] + rows[-1:]:
        asked = row["predictions"][len(row["predictions"]) // 2]
        verdict = "right" if asked["score"] == 1 else f"wrong, it is {plain(asked['answers'][0])}"
        lines += [f"{row['length']:>6,} tokens: ... {plain(asked.get('around', ''))} ...",
                  f"     question: {plain(asked['prompt'])}",
                  f"       answer: {plain(asked['written'])}  {verdict}"]
    return "\n".join(lines) if rows else ""


def wilson_interval(correct: float, n: float) -> tuple[float, float]:
    """95% interval of a proportion. Unlike the normal one it stays inside 0..1 (Wilson, 1927)."""
    z, p = 1.96, correct / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, min(p, center - half)), min(1.0, max(p, center + half))  # rounding aside


def interval(contexts: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Wilson's interval of the mean score, from the scores of each context.

    Questions about one context tend to be right or wrong together, so n of them tell less than n
    independent ones. We estimate how many independent questions they equal: their mean varies by
    p (1 - p) / n, so n shrinks by the ratio of this to the variance between contexts (Kish, 1965).
    """
    n, m = sum(map(len, contexts)), len(contexts)
    p = sum(map(sum, contexts)) / n
    variance = sum((sum(c) - p * len(c)) ** 2 for c in contexts) / n**2 * m / max(1, m - 1)
    independent = n * min(1.0, p * (1 - p) / n / variance) if variance > 0 else n
    return wilson_interval(p * independent, independent)


def paired_p_value(differences: Sequence[float], seed: int = 0) -> float:
    """The p-value of a sign-flip test on the score differences, one for each context.

    If the two models were equal, each context's difference could as well have the opposite sign.
    How often is the sum then at least this large? We count exactly where all differences have one
    size (McNemar's test) or are few, and by 10,000 random flips otherwise.
    """
    d = np.array([x for x in differences if x])
    if len(d) == 0:
        return 1.0
    if np.ptp(np.abs(d)) < 1e-12:
        fewer = min((d > 0).sum(), (d < 0).sum())
        tail = sum(math.comb(len(d), k) for k in range(fewer + 1)) / 2 ** len(d)
        return min(1.0, 2 * tail)
    few = len(d) <= 12
    signs = (np.array(list(product((-1.0, 1.0), repeat=len(d)))) if few else
             np.random.default_rng(seed).choice([-1.0, 1.0], (10_000, len(d))))
    at_least = np.abs(signs @ d) >= abs(d.sum()) - 1e-12
    return float(at_least.mean() if few else (at_least.sum() + 1) / 10_001)


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """Score differences b - a of two evaluations, a row for each task and length.

    A row has the difference, its 95% interval (bootstrap over contexts), its p-value, and whether
    it is `real`: whether it survives Holm's correction for looking at so many at once.
    Raises ValueError unless both models were asked the same questions.
    """

    def asked(row: dict[str, Any]) -> tuple[Any, ...]:
        questions = [(p["context"], p["prompt"], p["answers"]) for p in row["predictions"]]
        return row["task"], row["length"], questions

    rows = []
    for x, y in zip(a["results"], b["results"], strict=False):
        if asked(x) != asked(y) or len(a["results"]) != len(b["results"]):
            raise ValueError(f"{a['model']} and {b['model']} were not asked the same questions "
                             f"({x['task']} at {x['length']}); give both the same tasks, lengths, "
                             "samples and seed")
        by_context: dict[int, list[float]] = {}
        for p, q in zip(x["predictions"], y["predictions"], strict=True):
            by_context.setdefault(p["context"], []).append(q["score"] - p["score"])
        sums = np.array([[sum(context), len(context)] for context in by_context.values()])
        draws = np.random.default_rng(0).integers(len(sums), size=(2000, len(sums)))
        totals, counts = sums[draws].sum(1).T
        low, high = np.percentile(totals / counts, [2.5, 97.5]).tolist()
        rows.append({"task": x["task"], "length": x["length"], "a": x["score"], "b": y["score"],
                     "difference": y["score"] - x["score"], "low": low, "high": high,
                     "p": paired_p_value(sums[:, 0].tolist())})
    real = True
    for k, row in enumerate(sorted(rows, key=lambda row: row["p"])):  # Holm: the smallest p first
        real = real and row["p"] <= 0.05 / (len(rows) - k)
        row["real"] = real
    return rows


def format_comparison(a: str, b: str, rows: Sequence[dict[str, Any]]) -> str:
    """The differences as a table, with a star at those that are real."""
    table = [["task", "length", a[:10], b[:10], "difference", "95% interval", "p", ""]]
    for r in rows:
        table.append([r["task"], format_length(r["length"]), f"{r['a']:.3f}",
                      f"{r['b']:.3f}", f"{r['difference']:+.3f}",
                      f"[{r['low']:+.2f}, {r['high']:+.2f}]", f"{r['p']:.2g}", "*" * r["real"]])
    real = sum(row["real"] for row in rows)
    return (f"{align(table)}\n* real: {real} of {len(rows)} differences, at 5% for all together "
            "(Holm); fewer than 6 contexts are too few for any")
