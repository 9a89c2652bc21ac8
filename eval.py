"""The evaluation: what a model can still do as its context grows.

Perplexity hardly notices whether a model finds one line in 16,000 tokens, so the paper measures abilities
instead (2410.02660, section 2): recall, retrieval and re-ranking of passages, learning from examples, at many
lengths, and by where in the text the answer stood. A task makes contexts and questions about them:

    context                                            question                       answer     depth
    {"58c1...": "f90a...", "07be...": "4d21...", ...}  Key: 07be... Corresponding value:  4d21...    0.2
    <begin> import os ~QX7KA def main(): ~CPLM3 ...    ?C                                 PLM3       0.7

The upper one is for any model with its own tokenizer. The lower one is the same in the special tokens of the
tokenizer "bytes", for models of a few layers, and `toy_...` are tasks in words just as short. A context
is read once, and each of its questions goes on from the same KV cache. Whatever the tokenizer, context,
question and answer together fill the length asked for, to 3%, by counting real tokens.

Every score comes with the number of questions, a 95% interval and what guessing would score. Questions that
share a context are not independent, and the interval knows it. Haystacks are code that training never sees.

    python eval.py --model runs/tiny/checkpoints/ultra-100 --tasks toy --lengths 1k,4k
    python eval.py --model DIR --tokenizer DIR --tasks text --lengths 8k,32k --samples 100
    python eval.py --compare runs/a/eval/long-900.json,runs/b/eval/long-900.json

The formats are those of HELMET (2410.02694: JSON pairs, many-shot ICL, passages, re-ranking) and RULER
(2404.06654: needles, variable tracking, common and frequent words); scores are computed as theirs are.
Words and instructions are our own: numbers compare models, not with their tables. `--data` reads their files.

Sources: sections 2.1-2.3, A.1, Table 13, where "Recall" is the JSON pairs alone; Wilson (1927); Holm (1979).
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
import re
import string
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
from data import Tokenizer, format_length, load_tokenizer, option, parse_length
from model import (
    KVCache,
    Parallel,
    Transformer,
    chunked_cross_entropy,
    decode,
    generate_batch,
    init_parallel,
    load_pretrained,
    stream,
)

# --- 1. What a task is ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What follows the context, and the answers wanted then."""

    prompt_ids: np.ndarray
    answers: tuple[str, ...]
    depth: float | None = None  # where in the context the first answer stands, 0 to 1
    chance: float = 0.0  # what guessing would score
    places: tuple[int, ...] = ()  # the character of Example.text at which each answer stands
    relevance: dict[str, int] | None = None  # re-ranking: how well each passage fits the query


@dataclass(frozen=True)
class Example:
    """A context, independent questions about it, and how many tokens an answer may have."""

    context_ids: np.ndarray
    questions: tuple[Question, ...]
    budget: int
    text: str = ""  # the context as text, where it was made from text


@dataclass(frozen=True)
class Task:
    """A way to make examples of a given length, and a score (0 to 1) for what a model writes."""

    examples: Callable[[Tokenizer, int, int, int, int], list[Example]]
    #                  (tokenizer, length, contexts, questions about each, seed)
    score: Callable[[str, Question], float]
    category: str  # the macro-average takes the mean of categories, not of tasks (section 2.1)
    shared: int = 7  # most questions about a context: to read a long one costs far more than to ask
    exact: bool = False  # right only if greedy decoding writes just the answer: teacher forcing will do
    only_length: int | None = None  # of a task with one length


# --- 2. Scores ------------------------------------------------------------------------------------


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, single blanks: how SQuAD and HELMET compare answers."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def score_same(written: str, question: Question) -> float:
    """Letter for letter: for answers in special tokens."""
    return float(written == question.answers[0])


def score_exact(written: str, question: Question) -> float:
    """HELMET's exact_match: the line after "label:" (or the first) equals a right answer, both normalized."""
    found = re.search(r"label:(.*)", written, re.IGNORECASE)
    line = found[1].strip() if found else written.partition("\n")[0]
    line = re.sub(r"^label:", "", line, flags=re.IGNORECASE)  # some models say it twice
    return float(normalize(line) in map(normalize, question.answers))


def score_contains(written: str, question: Question) -> float:
    """HELMET's substring_exact_match: one of the right answers occurs in what was written, normalized."""
    return float(any(normalize(answer) in normalize(written) for answer in question.answers))


def score_fraction(written: str, question: Question) -> float:
    """RULER's: the share of the right answers that occur in what was written, whatever their case."""
    return sum(answer.lower() in written.lower() for answer in question.answers) / len(question.answers)


def score_any(written: str, question: Question) -> float:
    """RULER's for its question answering: any of the right answers occurs, whatever its case."""
    return float(any(answer.lower() in written.lower() for answer in question.answers))


def score_ranking(written: str, question: Question) -> float:
    """HELMET's re-ranking score, nDCG@10."""
    assert question.relevance is not None
    return ndcg(parse_ranking(written), question.relevance)


def parse_ranking(written: str) -> list[str]:
    """ "[ID3] > ID1 > 2" -> 3, 1, 2: the longest chain of numbers, each passage where it first comes."""
    plain = re.sub(r"[\[\]:]", "", written).lower().replace("id", "")
    chain = max((m[0] for m in re.finditer(r"\d+(?:\s*>\s*\d+)*", plain)), key=len, default="")
    return list(dict.fromkeys(re.findall(r"\d+", chain)))


def ndcg(ranking: Sequence[str], relevance: dict[str, int], k: int = 10) -> float:
    """Normalized discounted cumulative gain as trec_eval has it: a gain is the relevance itself.

    A passage that does not exist takes up its rank and gains nothing. Equally relevant passages may stand
    in any order.
    """
    def dcg(gains: Sequence[int]) -> float:
        return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains[:k]))

    best = dcg(sorted(relevance.values(), reverse=True))
    return dcg([relevance.get(passage, 0) for passage in ranking]) / best if best else 0.0


# --- 3. Recall and ICL in special tokens, for tiny models -----------------------------------------


def is_tiny(tokenizer: Tokenizer) -> bool:
    """Whether it has the special tokens of the tiny models' tasks."""
    return "<|pair|>" in tokenizer.encoding._special_tokens


def recall_examples(tokenizer: Tokenizer, length: int, n: int, questions: int, seed: int) -> list[Example]:
    """16 pairs scattered in held-out code, and a question about each: all depths in equal numbers."""
    rng = np.random.default_rng((seed, length, n))
    haystack = data.haystack_windows(tokenizer, rng, n, _room(tokenizer, length), seed, held_out=True)
    return _ask_for_each(tokenizer, rng, haystack)


def bare_recall_examples(tokenizer: Tokenizer, length: int, n: int, questions: int,
                         seed: int) -> list[Example]:
    """16 pairs with nothing but blanks between them: the ability itself, without the haystack."""
    blanks = np.full((n, _room(tokenizer, length)), data.BLANK, np.uint32)
    return _ask_for_each(tokenizer, np.random.default_rng((seed, length, n)), blanks)


def _room(tokenizer: Tokenizer, length: int, n_pairs: int = data.N_PAIRS) -> int:
    """Tokens of haystack in a context: without begin of text, the pairs, one question and its answer."""
    if not is_tiny(tokenizer):
        raise ValueError(f"recall is written in special tokens of the tokenizer 'bytes', not of "
                         f"{tokenizer.spec!r}; choose --tasks text")
    room = length - 1 - (n_pairs + 1) * data.PAIR_LEN
    if room < 0:
        raise ValueError(f"recall of {n_pairs} pairs needs {length - room} tokens, got {length}")
    return room


def _ask_for_each(tokenizer: Tokenizer, rng: np.random.Generator, haystack: np.ndarray,
                  n_pairs: int = data.N_PAIRS) -> list[Example]:
    pairs = data.recall_pairs(rng, len(haystack), n_pairs)
    rows, starts = data.scatter_pairs(rng, pairs, haystack)
    chance = len(data.SYMBOLS) ** -data.VALUE_LEN
    return [Example(np.concatenate(([tokenizer.bos_id], row)), tuple(
        Question(np.array([data.QUESTION, pair[0]]), (tokenizer.decode(pair[1:]),), float(start / len(row)),
                 chance) for pair, start in zip(row_pairs, row_starts, strict=True)), data.VALUE_LEN)
        for row, row_pairs, row_starts in zip(rows, pairs, starts, strict=True)]


def icl_examples(tokenizer: Tokenizer, length: int, n: int, questions: int, seed: int) -> list[Example]:
    """As many labelled lines as fit; the questions are new lines, whose labels follow from the others."""
    rng = np.random.default_rng((seed, length, n))
    n_lines = (length - 1) // data.ICL_LINE - 1
    if n_lines < len(data.TOPICS) or not is_tiny(tokenizer):
        raise ValueError(f"icl needs the special tokens of the tokenizer 'bytes', and a line for each of "
                         f"{len(data.TOPICS)} topics; got {tokenizer.spec!r} and {length} tokens")
    chance, rows = 1 / len(data.TOPICS), data.icl_lines(rng, n, n_lines + questions)
    return [Example(np.concatenate(([tokenizer.bos_id], row[:n_lines].reshape(-1))), tuple(
        Question(line[:2], (tokenizer.decode(line[2:3]),), None, chance) for line in row[n_lines:]), 1)
        for row in rows]


# --- 4. Tasks in text, fitted to a length ---------------------------------------------------------


class Ask(NamedTuple):
    prompt: str
    answers: tuple[str, ...]
    where: tuple[int, ...]  # the item of the draft in which each answer stands
    chance: float = 0.0
    relevance: dict[str, int] | None = None


class Draft(NamedTuple):
    """A context of some size: a head, items and a tail, and what is asked about it."""

    head: str
    items: list[str]
    separator: str
    tail: str
    asks: list[Ask]

    @property
    def context(self) -> str:
        return self.head + self.separator.join(self.items) + self.tail


FILLER = "The wind is mild. A door falls shut. Rain drums on the roof. We walk on and on. "


Rng = np.random.Generator
Draw = Callable[[Rng, int, list[float], int], Draft]
#               (rng, size, a depth for each question, length) -> a draft with `size` units of haystack


def fitted_examples(name: str, draw: Draw, tokenizer: Tokenizer, length: int, n: int, questions: int,
                    seed: int, least: int = 1, deep: bool = True) -> list[Example]:
    """`n` contexts of a text task; the answers' depths are spread evenly, by the golden ratio.

    Raises ValueError if not even the `least` size fits.
    """
    spread = 0.5 + np.arange(n * questions) * (math.sqrt(5) - 1) / 2
    depths = (spread % 1).reshape(n, questions).tolist()
    examples = []
    for i in range(n):
        def attempt(size: int, i: int = i) -> tuple[int, Draft]:
            draft = draw(data._generator(seed, name, length, i), size, depths[i], length)
            return _count(tokenizer, draft), draft

        try:
            used, draft = _fit(attempt, length, least)
        except OverflowError as error:
            raise ValueError(f"task {name} needs {error} tokens at the least with this tokenizer, got "
                             f"{length}; choose longer lengths, or a toy_ task") from None
        examples.append(_lay_out(tokenizer, draft, length - used if used < 0.97 * length else 0, deep))
    return examples


def _fit(attempt: Callable[[int], tuple[int, Draft]], length: int, least: int) -> tuple[int, Draft]:
    """The largest size that fits, found by guessing from what a unit has taken so far: -> tokens, draft."""
    low, high, per_unit = least, None, 8.0
    used, draft = attempt(low)
    if used > length:
        raise OverflowError(used)
    while used < 0.99 * length and (high is None or high - low > 1):
        guess = low + max(1, int((length - used) / per_unit))
        guess = guess if high is None else min(guess, high - 1)
        tokens, tried = attempt(guess)
        per_unit = max(1e-3, (tokens - used) / (guess - low)) * 1.001
        if tokens <= length:
            low, used, draft = guess, tokens, tried
        else:
            high = guess
    return used, draft


def _count(tokenizer: Tokenizer, draft: Draft) -> int:
    """Tokens of begin of text, context, the longest question and its answer."""
    return (len(tokenizer.begin) + len(encode(tokenizer, draft.context)) + _budget(tokenizer, draft)
            + max(len(encode(tokenizer, ask.prompt)) for ask in draft.asks))


def _budget(tokenizer: Tokenizer, draft: Draft) -> int:
    """Tokens that an answer may have: a quarter more than the right one, and a few."""
    longest = max(len(encode(tokenizer, ", ".join(ask.answers))) for ask in draft.asks)
    return longest + longest // 4 + 4


def _lay_out(tokenizer: Tokenizer, draft: Draft, spare: int, deep: bool) -> Example:
    """Turn a draft into tokens. Where a whole unit was too much, idle sentences above it fill the length."""
    filler = tokenizer.encode(FILLER * (1 + spare))[:spare]
    text = tokenizer.decode(filler) + draft.context
    lengths = np.array([len(item) + len(draft.separator) for item in draft.items])
    starts = len(text) - len(draft.context) + len(draft.head) + np.cumsum(lengths) - lengths
    questions = []
    for ask in draft.asks:
        places = tuple(int(starts[i]) + draft.items[i].index(answer)
                       for i, answer in zip(ask.where, ask.answers, strict=True))
        depth = places[0] / len(text) if deep else None
        questions.append(Question(encode(tokenizer, ask.prompt), ask.answers, depth, ask.chance, places,
                                  ask.relevance))
    ids = np.concatenate((tokenizer.begin, filler, encode(tokenizer, draft.context)))
    return Example(ids.astype(np.uint32), tuple(questions), _budget(tokenizer, draft), text)


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Text to ids, where <|pair|>, <|ask|> and the symbols of toy tasks are special tokens."""
    parts = re.split(r"(<\|(?:pair|ask|[A-Z2-7])\|>)", text)
    return np.concatenate([np.array([tokenizer.special_id(part)], np.uint32) if i % 2 else
                           tokenizer.encode(part) for i, part in enumerate(parts)])


def _words(rng: Rng, n: int, syllables: int) -> list[str]:
    """`n` different pronounceable words that no model has seen; of equal length, so none contains another."""
    found: dict[str, None] = {}
    while n > 70**syllables // 4:  # there would soon be no new ones
        syllables += 1
    while len(found) < n:
        letters = np.stack((rng.choice(list("bdfgklmnprstvz"), (n, syllables)),
                            rng.choice(list("aeiou"), (n, syllables))), axis=2)
        found |= dict.fromkeys("".join(row) for row in letters.reshape(n, -1))
    return list(found)[:n]


def _numbers(rng: Rng, n: int, digits: int) -> list[str]:
    return [str(i) for i in 10 ** (digits - 1) + rng.choice(9 * 10 ** (digits - 1), n, replace=False)]


def _uuids(rng: Rng, n: int) -> list[str]:
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(n)]


def _codes(rng: Rng, n: int, length: int) -> np.ndarray:
    """`n` different strings of `length` random capital letters."""
    drawn = rng.choice(26**length, n, replace=False)[:, None] // 26 ** np.arange(length) % 26  # (n, length)
    return np.array(["".join(chr(65 + i) for i in row) for row in drawn])


def _symbols(rng: Rng, n: int, length: int) -> list[str]:
    """`n` different strings of `length` special tokens: keys and values as in `recall`."""
    drawn = rng.choice(len(data.SYMBOL_NAMES) ** length, n, replace=False)
    return ["".join(f"<|{data.SYMBOL_NAMES[i // 32**j % 32]}|>" for j in range(length)) for i in drawn]


@cache
def _code_lines() -> list[str]:
    """Lines of held-out code."""
    tokenizer = load_tokenizer()
    lines = tokenizer.decode(data._haystack_text(tokenizer, 0, True)).split("\n")
    return [line for line in lines if line.strip() and "<|" not in line and "\ufffd" not in line]


def _places(rng: Rng, depths: list[float], n: int) -> list[int]:
    """A different one of `n` items for each depth, as near to it as can be."""
    free = np.ones(n, bool)
    places = []
    for depth in depths:
        at = int(np.argmin(np.where(free, np.abs(np.arange(n) + 0.5 - depth * n), np.inf)))
        free[at] = False
        places.append(at)
    return places


def draw_json_kv(rng: Rng, size: int, depths: list[float], length: int, toy: bool = False) -> Draft:
    """A JSON object; two of its pairs as demonstrations, and others asked for (HELMET's json_kv)."""
    size += len(depths) + 2
    ids = [f"{i:04x}" for i in rng.choice(16**4, 2 * size, replace=False)] if toy else _uuids(rng, 2 * size)
    keys, values = ids[:size], ids[size:]
    asked = _places(rng, depths, size)
    shown = rng.choice(np.delete(np.arange(size), asked), 2, replace=False)
    cue = "\n{}:" if toy else "\n\nKey: {}\nCorresponding value:"
    task = "" if toy else "\n\nFind the value that belongs to a key of the JSON object above."
    demos = "".join(f"{cue.format(keys[i])} {values[i]}" for i in shown)
    items = [f'"{k}": "{v}"' for k, v in zip(keys, values, strict=True)]
    return Draft("{", items, ", " if toy else ",\n ", "}" + task + demos,
                 [Ask(cue.format(keys[i]), (values[i],), (i,)) for i in asked])


def draw_needles(rng: Rng, size: int, depths: list[float], length: int, haystack: str = "code",
                 n_keys: int = 1, n_values: int = 1, n_queries: int = 1, ids: bool = False,
                 toy: bool = False) -> Draft:
    """Sentences that give keys a secret number, hidden in a haystack; RULER's needle tasks by parameters.

    Each question asks for `n_queries` keys with `n_values` each; `n_keys` - 1 others lead astray. `haystack`
    is "noise" (the same sentences over and over), "code", or "needles" (nothing but others); with `ids` keys
    and values are UUIDs.
    """
    asked, others = len(depths) * n_queries, n_keys - 1 + (size if haystack == "needles" else 0)
    n = asked + others
    if toy:
        keys = _symbols(rng, n, 3 if haystack == "needles" else 1)
        values, kind = _symbols(rng, asked * n_values + others, 6 if ids else 4), ""
    elif ids:
        keys, values, kind = _uuids(rng, n), _uuids(rng, asked * n_values + others), "code"
    else:
        keys = [f"{a}-{b}" for a, b in zip(_words(rng, n, 3), _words(rng, n, 2), strict=True)]
        values, kind = _numbers(rng, asked * n_values + others, 7), "number"
    given = values[others:]
    owner = [*keys[asked:], *np.repeat(keys[:asked], n_values)]
    needles = [f"<|pair|>{k}{v}" if toy else f"The secret {kind} of {k} is {v}."
               for k, v in zip(owner, values, strict=True)]
    if haystack == "code":
        lines = _code_lines()
        begin = int(rng.integers(len(lines)))
        straw = [lines[(begin + i) % len(lines)] for i in range(size)]
    else:
        straw = [FILLER.strip()] * size if haystack == "noise" else []
    where = rng.random(len(needles))
    where[others::n_queries * n_values] = depths  # of each question's needles the first; the others anywhere
    items, at = _scatter(straw, needles, where)
    asks = []
    for j in range(len(depths)):
        mine = slice(j * n_queries, (j + 1) * n_queries)
        own = range(j * n_queries * n_values, (j + 1) * n_queries * n_values)
        asks.append(Ask(_needle_prompt(keys[mine], kind, n_queries * n_values > 1, toy),
                        tuple(given[i] for i in own), tuple(at[others + i] for i in own)))
    head = "" if toy else f"Secret {kind}s are hidden in the text below. Remember them.\n\n"
    return Draft(head, items, "" if toy else "\n", "", asks)


def _scatter(straw: list[str], needles: list[str], where: np.ndarray) -> tuple[list[str], list[int]]:
    """Put needles among straw at depths `where` -> the items in order, and the index of each needle."""
    evenly, both = (np.arange(len(straw)) + 0.5) / max(1, len(straw)), straw + needles
    order = np.argsort(np.concatenate((evenly, where)), kind="stable")
    return [both[i] for i in order], np.argsort(order)[len(straw):].tolist()


def _needle_prompt(keys: list[str], kind: str, several: bool, toy: bool) -> str:
    if toy:
        return "".join(f"<|ask|>{key}" for key in keys)
    names = ", ".join(keys[:-1]) + (" and " if len(keys) > 1 else "") + keys[-1]
    if several:
        return f"\n\nWhat are the secret {kind}s of {names}? In the text, all secret {kind}s of {names} are"
    return f"\n\nWhat is the secret {kind} of {names}? In the text, the secret {kind} of {names} is"


def draw_variables(rng: Rng, size: int, depths: list[float], length: int, hops: int = 4,
                   toy: bool = False) -> Draft:
    """A value is handed from variable to variable, far apart in noise: which have it? (RULER's vt)"""
    chain, chains = hops + 1, len(depths) + 1  # the last chain is the solved example
    names = _codes(rng, chain * chains, letters := 2 if toy else 5).tolist()
    numbers = _numbers(rng, chains, 3 if toy else 5)
    link, var = ("{}={};", "") if toy else ("VAR {} = {}.", "VAR ")
    steps = [link.format(name, numbers[i // chain] if i % chain == 0 else var + names[i - 1])
             for i, name in enumerate(names)]
    where = np.concatenate([np.sort(np.append(d + rng.random(hops) * (1 - d), d)) for d in depths])
    items, at = _scatter(["." if toy else FILLER.strip()] * size, steps[:-chain], where)
    cue = "\n?{0}:" if toy else ("\n\nWhich variables have the value {0}, directly or by way of others?\n"
                                f"Answer: {chain} variables have the value {{0}}, namely")
    example = " ".join(steps[-chain:]) + cue.format(numbers[-1]) + " " + " ".join(names[-chain:])
    return Draft("" if toy else f"{example}\n\nKeep track of the variables in the text below.\n\n", items,
                 "" if toy else " ", "", [
                     Ask(cue.format(numbers[j]), tuple(names[j * chain:(j + 1) * chain]),
                         tuple(at[j * chain:(j + 1) * chain]), chain / 26**letters)
                     for j in range(len(depths))])


def draw_common_words(rng: Rng, size: int, depths: list[float], length: int,
                      common: int = 10, toy: bool = False) -> Draft:
    """A numbered list in which some words come often and `size` others seldom (RULER's cwe)."""
    often, seldom = (30, 3) if length >= 4096 else (6, 1)
    common = 3 if toy else common

    def numbered(frequent: list[str], rare: list[str], often: int, seldom: int) -> list[str]:
        mixed = rng.permutation(frequent * often + rare * seldom)
        return [f"{i + 1}. {word}" for i, word in enumerate(mixed)]

    words = _words(rng, 2 * common + 5 + size, 2 if toy else 3)
    answers, shown, rare = words[:common], words[common:2 * common], words[2 * common:]
    items = numbered(answers, rare[5:], often, seldom)
    cue = "\n?" if toy else f"\nQuestion: Which {common} words come most often in the list?\nAnswer: They are"
    task = "" if toy else "In the list below some words come more often than others. Remember them.\n"
    solved = "" if toy else f"{task}{' '.join(numbered(shown, rare[:5], 3, 1))}{cue} {' '.join(shown)}\n\n"
    return Draft(solved + task, items, " ", "", [Ask(cue, tuple(answers), _first_places(items, answers))])


def draw_frequent_words(rng: Rng, size: int, depths: list[float], length: int,
                        toy: bool = False) -> Draft:
    """Coded words in Zipf's proportions: rank r about size * r^-2 / zeta(2) times (RULER's fwe, alpha 2).

    The most frequent of all is noise, dots. One more of each of the ranks 2 to 4, so that none ties with 5.
    """
    ranks = np.arange(1, max(8, length // 50) + 1)
    counts = (size * ranks**-2.0 / (math.pi**2 / 6)).astype(int) + (ranks <= 4)
    dots = "." if toy else "..."
    words = np.append(dots, np.char.lower(_codes(rng, len(ranks) - 1, letters := 2 if toy else 6)))
    items = rng.permutation(np.repeat(words, counts)).tolist()
    answers = words[1:4].tolist()
    head = "" if toy else "Count how often each coded word stands in the text below.\n"
    cue = "\n?" if toy else ("\nQuestion: Dots aside, which three coded words stand in the text most often?\n"
                             "Answer: They are")
    return Draft(head, items, " ", "", [
        Ask(cue, tuple(answers), _first_places(items, answers), len(answers) / 26**letters)])


def _first_places(items: list[str], words: list[str]) -> tuple[int, ...]:
    bare = [item.split()[-1] for item in items]
    return tuple(bare.index(word) for word in words)


_ICL_TEXTS = [hello + text for hello in ("", "Hello. ", "Sorry to bother you. ", "One more thing. ")
              for text in ("Where can I find a {}?", "Please send me two of your {}s.", "How much is the {}?",
                           "My {} has stopped working again.", "Is there a {} for children, too?")]


def draw_icl(rng: Rng, size: int, depths: list[float], length: int, classes: int = 6,
             rows: Sequence[dict[str, Any]] | None = None) -> Draft:
    """Many labelled lines in class-balanced rounds; the labels are integers dealt anew for every context, so
    only the examples can tell them (HELMET's ICL). Here every class speaks of one thing; `rows` are
    somebody's own {"text", "label"}.
    """
    by_class: dict[Any, list[str]] = {}
    if rows is None:
        by_class = {word: [line.format(word) for line in _ICL_TEXTS] for word in _words(rng, classes, 3)}
    for row in rows or ():
        by_class.setdefault(str(row["label"]), []).append(row["text"])
    texts = [rng.permutation(np.array(lines, object)).tolist() for lines in by_class.values()]
    asked = [lines.pop() for lines in texts]  # never among the examples
    label, n = rng.permutation(len(texts)), len(texts)
    rounds = -(-(size + n) // n)
    topics = np.concatenate([rng.permutation(n) for _ in range(rounds)])[:size + n]  # at least all
    shown = [f"{texts[t][i // n % len(texts[t])]}\nlabel: {label[t]}" for i, t in enumerate(topics)]
    tests = rng.choice(n, len(depths), replace=len(depths) > n)
    return Draft("Label the last text as the examples are labelled. Write only its label, as they do.\n\n",
                 shown, "\n\n", "", [Ask(f"\n\n{asked[t]}\nlabel:", (f"{label[t]}",),
                                         (topics.tolist().index(t),), 1 / n) for t in tests])


def draw_rerank(rng: Rng, size: int, depths: list[float], length: int, toy: bool = False) -> Draft:
    """Passages to be ranked by how many of a query's three words they share (HELMET's re-ranking, nDCG@10).

    Of each query's passages one shares all three, two share two, and three one; the rest share none.
    """
    pattern = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], bool)
    n = len(depths)
    total = size + n * len(pattern)
    words = np.array(_words(rng, 3 * (n + 20), 2))
    queries, pool = words[:3 * n].reshape(n, 3), words[3 * n:].reshape(20, 3)
    texts = pool[rng.integers(20, size=(total, 3)), np.arange(3)]  # (total, 3)
    relevance = np.zeros((n, total), int)
    spots = rng.permutation(total)[:n * len(pattern)].reshape(n, -1)
    for j in range(n):
        texts[spots[j]] = np.where(pattern, queries[j], texts[spots[j]])
        relevance[j, spots[j]] = pattern.sum(axis=1)
    names = [str(i + 1) for i in rng.permutation(total)]
    form, cue = (("[{}] {} {} {}", "\n? {} {} {}:") if toy else
                 ("[ID: {}] Document: Traders from {} sold {} at the fair of {}.",
                  "\n\nQuery: Who came from {} to sell {} at the fair of {}?\nRanking:"))
    head = "" if toy else ("Rank the passages below by how well they fit the query, the best first. Write "
                           "the IDs of the best ten in this form: Ranking: ID3 > ID1 > ID2\n\n")
    asks = []
    for j in range(n):
        best = sorted(spots[j].tolist(), key=lambda i: -relevance[j, i])
        gains = dict(zip(names, relevance[j].tolist(), strict=True))
        ideal = sum(g / math.log2(r + 2) for r, g in enumerate(sorted(gains.values(), reverse=True)[:10]))
        luck = relevance[j].mean() * sum(1 / math.log2(r + 2) for r in range(min(10, total))) / ideal
        asks.append(Ask(cue.format(*queries[j]), tuple(names[i] for i in best), tuple(best), luck, gains))
    items = [form.format(name, *text) for name, text in zip(names, texts, strict=True)]
    return Draft(head, items, "\n" if toy else "\n\n", "", asks)


_FACTS = (("was born in {}", "In which town was {} born?"),
          ("learned the trade of a {}", "Which trade did {} learn?"), ("married {}", "Whom did {} marry?"),
          ("is buried in {}", "In which town is {} buried?"))


def draw_qa(rng: Rng, size: int, depths: list[float], length: int, toy: bool = False) -> Draft:
    """Passages about people; a question that one of them answers (HELMET's RAG, substring match)."""
    size += len(depths)
    facts = 1 if toy else len(_FACTS)
    people, values = _words(rng, size, 3), _words(rng, size * facts, 2 if toy else 4)
    if not toy:
        people = [f"{a} {b}".title() for a, b in zip(_words(rng, size, 2), people, strict=True)]
    items, asks = [], []
    for i, person in enumerate(people):
        mine = values[i * facts:(i + 1) * facts]
        told = ". ".join(f"{person} {_FACTS[f][0].format(v.title())}" for f, v in enumerate(mine))
        items.append(f"{person}: {mine[0]}" if toy else f"Document (Title: {person}): {told}.")
    for i in _places(rng, depths, size):
        f = int(rng.integers(facts))
        value = values[i * facts + f] if toy else values[i * facts + f].title()
        cue = f"\n?{people[i]}:" if toy else f"\n\nQuestion: {_FACTS[f][1].format(people[i])}\nAnswer:"
        asks.append(Ask(cue, (value,), (i,)))
    head = "" if toy else "Answer the question by the documents below, in a few words.\n\n"
    return Draft(head, items, "\n" if toy else "\n\n", "", asks)


def _text(name: str, score: Callable[[str, Question], float], category: str, draw: Callable[..., Draft],
          shared: int = 7, deep: bool = True, least: int = 1, **options: Any) -> Task:
    return Task(partial(fitted_examples, name, partial(draw, **options), least=least, deep=deep), score,
                category, shared)


def _both(name: str, *args: Any, **options: Any) -> dict[str, Task]:
    """A task and its toy."""
    toy = f"toy_{name}"
    return {name: _text(name, *args, **options), toy: _text(toy, *args, **options, toy=True)}


_tokens = partial(Task, score=score_same, exact=True)
TASKS: dict[str, Task] = {
    "recall_bare": _tokens(bare_recall_examples, category="recall", shared=data.N_PAIRS, only_length=160),
    "recall": _tokens(recall_examples, category="recall", shared=data.N_PAIRS),
    "icl": _tokens(icl_examples, category="icl", shared=26),
    **_both("json_kv", score_contains, "recall", draw_json_kv),
    **_both("needle", score_fraction, "ruler", draw_needles),
    **_both("needle_noise", score_fraction, "ruler", draw_needles, haystack="noise"),
    **_both("multikey_1", score_fraction, "ruler", draw_needles, n_keys=4),
    **_both("multikey_2", score_fraction, "ruler", draw_needles, haystack="needles"),
    **_both("multikey_3", score_fraction, "ruler", draw_needles, haystack="needles", ids=True),
    **_both("multivalue", score_fraction, "ruler", draw_needles, n_values=4),
    **_both("multiquery", score_fraction, "ruler", draw_needles, n_queries=4),
    **_both("variables", score_fraction, "ruler", draw_variables),
    **_both("common_words", score_fraction, "ruler", draw_common_words, shared=1, deep=False),
    **_both("frequent_words", score_fraction, "ruler", draw_frequent_words, shared=1, deep=False, least=34),
    "icl_6": _text("icl_6", score_exact, "icl", draw_icl, deep=False),
    "icl_77": _text("icl_77", score_exact, "icl", draw_icl, deep=False, classes=77),
    **_both("rerank", score_ranking, "rerank", draw_rerank, deep=False),
    **_both("qa", score_contains, "rag", draw_qa),
}
GROUPS = {"toy": [name for name, task in TASKS.items() if task.exact or name.startswith("toy_")],
          "text": [name for name, task in TASKS.items() if not task.exact and not name.startswith("toy_")],
          "all": list(TASKS)}


# --- 5. Files in HELMET's, RULER's and plain formats ----------------------------------------------


# Ready prompts, of whatever length they are. A line of a file may be
#
#     RULER's      {"input", "outputs"}, "answer_prefix" if there         share of the outputs found (QA: any)
#     JSON pairs   {"context", "question", "answer", "demos"}             substring match, two demonstrations
#     passages     {"question", "answers", "ctxs": [{"title", "text"}]}   substring match
#     re-ranking   {"query", "ctxs": [{"id", "text", "label"}]}           nDCG@10
#     ICL          {"text", "label"}                                      exact match; fitted to every length


def file_task(path: Path) -> Task:
    """A task made of a local JSONL file. Raises ValueError for a file of no known format."""
    first = _read_jsonl(path)[0]
    if first.keys() >= {"text", "label"}:
        rows = _read_jsonl(path)
        lines = Counter(str(row.get("label")) for row in rows)
        if min(lines.values()) < 2 or not all(isinstance(row.get("text"), str) for row in rows):
            raise ValueError(f"{path}: each line needs a text and a label, and each label two lines, one to "
                             "ask about and one to learn from")
        return _text(path.stem, score_exact, "icl", draw_icl, deep=False, rows=rows)
    score = score_ranking if "query" in first and "ctxs" in first else score_contains
    if "outputs" in first:
        score = score_any if "qa" in path.stem else score_fraction
    return Task(partial(file_examples, path), score, "file", shared=1, only_length=0)


def file_examples(path: Path, tokenizer: Tokenizer, length: int, n: int, questions: int,
                  seed: int) -> list[Example]:
    rows, examples = _read_jsonl(path), []
    for i in sorted(data._generator(seed, path.name).permutation(len(rows))[:n].tolist()):
        try:
            context, prompt, answers, relevance = _prompt_of(rows[i])
            if not answers or not all(isinstance(answer, str) for answer in answers):
                raise TypeError("its answers must be text")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} entry {i + 1} is of no known format ({error!r}); eval.py, section 5, "
                             "lists them") from None
        ids = np.concatenate((tokenizer.begin, tokenizer.encode(context))).astype(np.uint32)
        budget = max(100, 2 * max(len(tokenizer.encode(answer)) for answer in answers))
        examples.append(Example(ids, (Question(tokenizer.encode(prompt), tuple(answers),
                                               relevance=relevance),), budget))
    return examples


@cache
def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} line {i + 1} is not JSON: {error}") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no JSON objects, one a line")
    return rows


def _prompt_of(row: dict[str, Any]) -> tuple[str, str, list[str], dict[str, int] | None]:
    """Context, the rest of the prompt, the answers and the relevances of a line."""
    if "outputs" in row:
        return row["input"], row.get("answer_prefix", "") or "\n", list(row["outputs"]), None
    if "query" in row:
        texts = [f"[ID: {c['id']}] Document: {c['text']}" for c in row["ctxs"]]
        relevance = {str(c["id"]): int(c["label"]) for c in row["ctxs"]}
        best = " > ".join(sorted(relevance, key=lambda i: -relevance[i])[:10])
        head = "Rank the documents by relevance to the query, in this form: Ranking: ID3 > ID1 > ID2\n\n"
        return head + "\n\n".join(texts), f"\n\nQuery: {row['query']}\nRanking:", [best], relevance
    answers = row["answers"] if "answers" in row else row["answer"]
    answers = [answers] if isinstance(answers, str) else list(answers)
    if "ctxs" in row:
        texts = [f"Document (Title: {c['title']}): {c['text']}" for c in row["ctxs"]]
        head = "Answer the question by the documents below, in a few words.\n\n"
        return head + "\n\n".join(texts), f"\n\nQuestion: {row['question']}\nAnswer:", answers, None
    demos = "".join(f"\n\nKey: {k}\nCorresponding value: {v}" for k, v in row["demos"][:2])
    task = "\n\nFind the value that belongs to a key of the JSON object above."
    return row["context"] + task + demos, f"\n\nKey: {row['question']}\nCorresponding value:", answers, None


# --- 6. Asking the model --------------------------------------------------------------------------


def answer_questions(model: Transformer, tokenizer: Tokenizer, examples: Sequence[Example], exact: bool,
                     parallel: Parallel | None = None) -> list[list[str]]:
    """What the model writes for each question of each example; all texts pass through it together.

    `exact` forces the right answer instead and writes down the likeliest token at each of its places: that
    is the right answer just when greedy decoding would have written it, and takes one pass.
    """
    caches = [KVCache() for _ in examples]
    decode(model, [e.context_ids.tolist() for e in examples], caches, parallel=parallel)
    texts = [text for e, c in zip(examples, caches, strict=True)
             for text in (c.repeat(len(e.questions)) if len(e.questions) > 1 else [c])]
    questions = [q for e in examples for q in e.questions]
    prompts = [q.prompt_ids.tolist() for q in questions]
    if exact:
        right = [encode(tokenizer, q.answers[0]).tolist() for q in questions]
        tails = [prompt + answer[:-1] for prompt, answer in zip(prompts, right, strict=True)]
        logits = decode(model, tails, texts, max(map(len, right)), parallel=parallel)
        ids = [rows[-len(a):].argmax(dim=-1).tolist() for rows, a in zip(logits, right, strict=True)]
    else:
        ids = generate_batch(model, prompts, max(e.budget for e in examples), _line_ends(tokenizer), texts,
                             parallel=parallel)
    written = iter(tokenizer.decode([i for i in row if i < tokenizer.vocab_size]) for row in ids)
    return [[next(written) for _ in e.questions] for e in examples]


@cache
def _line_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """All tokens with a line break in them, and end of text: every answer is a line."""
    return frozenset({tokenizer.eos_id} | {i for i in range(tokenizer.vocab_size)
                                           if "\n" in _token_text(tokenizer, i)})


def _token_text(tokenizer: Tokenizer, i: int) -> str:
    try:
        return tokenizer.decode([i])
    except KeyError:  # an id that the vocabulary leaves out
        return ""


def run_task(model: Transformer, tokenizer: Tokenizer, task: str, length: int, n: int, seed: int = 0,
             greedy_decode: bool = False, progress: Callable[[int], Any] = lambda n: None,
             per_context: int = 1, batch_tokens: int = 32_768, parallel: Parallel | None = None,
             record: Record | None = None) -> dict[str, Any]:
    """Score one task at one length over at least `n` questions: a row of the results, predictions and all.

    Contexts of together about `batch_tokens` pass through the model at a time. What `record` holds already
    is not asked again.
    """
    chosen, record = find_task(task), record or Record()
    questions = questions_each(chosen, length, per_context)
    examples = chosen.examples(tokenizer, length, -(-n // questions), questions, seed)
    length = length or max(len(e.context_ids) + len(e.questions[0].prompt_ids) + e.budget for e in examples)
    sizes = np.cumsum([len(e.context_ids) for e in examples])
    for _, group in groupby(range(len(examples)), key=lambda i: (sizes[i] - 1) // batch_tokens):
        batch = [i for i in group if (task, length, i) not in record.rows]
        written = answer_questions(model, tokenizer, [examples[i] for i in batch],
                                   chosen.exact and not greedy_decode, parallel) if batch else []
        for i, texts in zip(batch, written, strict=True):
            record.add(task, length, i, [
                {"context": i, "prompt": tokenizer.decode(q.prompt_ids), "answers": list(q.answers),
                 "written": text, "score": chosen.score(text, q), "chance": q.chance, "depth": q.depth}
                for q, text in zip(examples[i].questions, texts, strict=True)])
            progress(length)
    contexts = [record.rows[task, length, i] for i in range(len(examples))]
    predictions = [p for context in contexts for p in context]
    by_depth = _by_depth([(p["score"], p["depth"]) for p in predictions])
    low, high = interval([[p["score"] for p in context] for context in contexts])
    return {"task": task, "length": length, "category": chosen.category, "n": len(predictions),
            "score": float(np.mean([p["score"] for p in predictions])), "low": low, "high": high,
            "chance": float(np.mean([p["chance"] for p in predictions])),
            "by_depth": by_depth, "predictions": predictions}


def questions_each(task: Task, length: int, per_context: int) -> int:
    """Questions that share a context: in text `per_context`, if task and length (256 each) bear them."""
    return task.shared if task.exact else max(1, min(per_context, task.shared, length // 256))


class Record:
    """The predictions so far, kept in a file as they come, so that a stopped evaluation can go on."""

    def __init__(self, path: Path | None = None, settings: dict[str, Any] | None = None,
                 writes: bool = True) -> None:
        """Open a file, or begin it. Raises ValueError if it was made with other settings."""
        self.rows: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
        self.path = path if writes else None
        if path is None:
            return
        kept = [json.dumps(settings)]
        if path.exists():
            whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            now = settings or {}
            before = json.loads(whole[0]) if whole else now
            if changed := [f"{k} {before.get(k)!r}, now {now[k]!r}" for k in now if before.get(k) != now[k]]:
                raise ValueError(f"{path} was made with other settings ({'; '.join(changed)}); "
                                 "choose another --out, or remove it")
            for line in whole[1:]:
                task, length, i, predictions = json.loads(line)
                self.rows[task, length, i] = predictions
                kept.append(line.rstrip("\n"))
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(kept) + "\n")  # without a last line half written

    def add(self, task: str, length: int, i: int, predictions: list[dict[str, Any]]) -> None:
        self.rows[task, length, i] = predictions
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps([task, length, i, predictions]) + "\n")


# --- 7. Perplexity --------------------------------------------------------------------------------


@torch.no_grad()
def bits_per_byte(model: Transformer, tokenizer: Tokenizer, length: int, n: int, seed: int = 0,
                  parallel: Parallel | None = None) -> list[dict[str, Any]]:
    """Bits per byte of held-out code by position: how well a token is foreseen after so much context.

    `n` documents of `length` tokens; buckets 0-256, 256-512, 512-1024, ..., the last quarter, and "short":
    documents of 256 tokens that stand alone, which an extension of the context must not make worse.
    Source: Figure 1, whose point is that this number improves while abilities may not.
    """
    edges = [0, *(e for e in (2**i for i in range(8, 31)) if e < length), length]
    spans = [(f"{format_length(a) if a else 0}-{format_length(b)}", a, b) for a, b in pairwise(edges)]
    spans.append(("last 1/4", length * 3 // 4, length))
    few = min(length, 256)
    short = [("short", 0, few)]
    rows = (_bits_by_span(model, tokenizer, length, n, seed, spans, parallel)
            + _bits_by_span(model, tokenizer, few, n * length // few, seed, short, parallel))
    return [{"name": name, "from": begin, "to": end, "bits_per_byte": bits / size, "bytes": size}
            for (name, begin, end), (bits, size) in zip(spans + short, rows, strict=True)]


def _bits_by_span(model: Transformer, tokenizer: Tokenizer, length: int, n: int, seed: int,
                  spans: list[tuple[str, int, int]], parallel: Parallel | None) -> list[tuple[float, int]]:
    """Bits and bytes of each span of positions, summed over `n` documents (at most 1,024)."""
    device, (rank, size) = model.embed_tokens.weight.device, (
        (parallel.sp_rank, parallel.sp_size) if parallel else (0, 1))
    share = -(-length // size)  # of each rank; a document of no interest fills the last one's
    lens = (length, share * size - length) if share * size > length else (length,)
    mine = slice(rank * share, (rank + 1) * share)
    bits, sizes = np.zeros(len(spans)), np.zeros(len(spans))
    documents = data.pack_long(data.code_repos(tokenizer, seed, held_out=True), length)
    for _, sequence in zip(range(min(n, 1024)), documents, strict=False):
        ids = np.zeros(share * size, np.int64)
        ids[:length] = sequence.input_ids
        hidden = model(torch.from_numpy(ids[mine]).to(device), lens, parallel)  # (share, C)
        for s, (_, begin, end) in enumerate(spans):
            labels = np.full(share * size, data.IGNORE_INDEX)
            labels[max(begin, 1) - 1:end - 1] = ids[max(begin, 1):end]  # the first token is nobody's target
            nats, _ = chunked_cross_entropy(hidden, model.lm_head.weight,
                                            torch.from_numpy(labels[mine]).to(device))
            bits[s] += float(nats) / math.log(2)
            sizes[s] += len(tokenizer.decode(ids[max(begin, 1):end]).encode(errors="replace"))
    if parallel and parallel.sp_size > 1:
        bits = parallel.all_sum(torch.from_numpy(bits)).cpu().numpy() / parallel.dp_size
    return list(zip(bits.tolist(), sizes.astype(int).tolist(), strict=True))


# --- 8. Uncertainty -------------------------------------------------------------------------------


def wilson_interval(correct: float, n: float) -> tuple[float, float]:
    """95% interval for a proportion; unlike the normal one it stays inside 0..1 and works at the ends."""
    z, p = 1.96, correct / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, min(p, center - half)), min(1.0, max(p, center + half))  # rounding aside


def interval(contexts: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Wilson's interval of the mean score, for as many independent questions as these are worth.

    Questions about one context tend to be right or wrong together. Their mean then varies more than that of
    independent ones, p (1 - p) / n, and n shrinks by the ratio (the design effect; Kish, 1965).
    """
    n, m = sum(map(len, contexts)), len(contexts)
    p = sum(map(sum, contexts)) / n
    between = sum((sum(c) - p * len(c)) ** 2 for c in contexts) / n**2 * m / max(1, m - 1)
    worth = n * min(1.0, p * (1 - p) / n / between) if between > 0 else n
    return wilson_interval(p * worth, worth)


def paired_p_value(differences: Sequence[float], seed: int = 0) -> float:
    """How often chance alone gives a sum as far from 0, if each context's difference might as well have the
    other sign: exact for differences of one size (McNemar's test, for right or wrong), else 10,000 draws.
    """
    d = np.array([x for x in differences if x])
    if not len(d):
        return 1.0
    if np.ptp(np.abs(d)) < 1e-12:
        fewer = min((d > 0).sum(), (d < 0).sum())
        return min(1.0, 2 * sum(math.comb(len(d), k) for k in range(fewer + 1)) / 2 ** len(d))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (10_000, len(d)))
    return float(((np.abs(signs @ d) >= abs(d.sum()) - 1e-12).sum() + 1) / 10_001)


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """Score differences b - a of two evaluations by task and length, with 95% intervals (bootstrap over
    contexts), and which of them are real: those that survive Holm's correction for looking at so many.

    Raises ValueError unless both were asked the same questions.
    """
    rows = []
    for x, y in zip(a["results"], b["results"], strict=False):
        asked = [[r["task"], r["length"], [(p["context"], p["prompt"], p["answers"])
                                           for p in r["predictions"]]] for r in (x, y)]
        if asked[0] != asked[1] or len(a["results"]) != len(b["results"]):
            raise ValueError(f"{a['model']} and {b['model']} were not asked the same questions ({x['task']} "
                             f"at {x['length']}); give both the same tasks, lengths, samples and seed")
        contexts: dict[int, list[float]] = {}
        for p, q in zip(x["predictions"], y["predictions"], strict=True):
            contexts.setdefault(p["context"], []).append(q["score"] - p["score"])
        sums, counts = (np.array([f(c) for c in contexts.values()], float) for f in (sum, len))
        draws = np.random.default_rng(0).integers(len(sums), size=(2000, len(sums)))
        low, high = np.percentile(sums[draws].sum(1) / counts[draws].sum(1), [2.5, 97.5])
        rows.append({"task": x["task"], "length": x["length"], "a": x["score"], "b": y["score"],
                     "difference": float(sums.sum() / counts.sum()), "low": float(low), "high": float(high),
                     "p": paired_p_value(sums.tolist()), "contexts": len(sums)})
    alive = True
    for k, row in enumerate(sorted(rows, key=lambda row: row["p"])):  # Holm: the smallest p first
        alive = row["real"] = alive and row["p"] <= 0.05 / (len(rows) - k)
    return rows


def _by_depth(outcomes: Sequence[tuple[float, float | None]], bins: int = 5) -> list[float | None]:
    """Score of the questions whose answer stood in the first fifth of the context, the second, ..."""
    scores: list[float | None] = []
    for i in range(bins):
        part = [r for r, depth in outcomes if depth is not None and min(int(depth * bins), bins - 1) == i]
        scores.append(sum(part) / len(part) if part else None)
    return scores


# --- 9. A whole evaluation: every task at every length --------------------------------------------


@dataclass(frozen=True)
class EvalConfig:
    model: str = option("", "folder of the model to evaluate")
    tasks: str = option("", "tasks, with commas; toy, text and all are groups (default: for the tokenizer "
                            "bytes recall_bare,recall,icl, else text)")
    lengths: str = option("", "context lengths in tokens, with commas (default: 256,512,1k,2k,4k,8k,16k, "
                              "else 4k,8k,16k)")
    samples: int = option(200, "questions per task and length", parse_length)
    long_samples: int | None = option(None, "questions from 8k on (default: as --samples)", parse_length)
    per_context: int = option(1, "questions that may share a context, in text tasks", parse_length)
    data: str = option("", "JSONL files in HELMET's or RULER's formats, with commas: tasks of their own")
    bpb_length: int = option(2048, "context of bits per byte by position", parse_length)
    decode: bool = option(False, "write every answer greedily instead of teacher forcing")
    batch_tokens: int = option(32_768, "tokens of contexts that the model reads together", parse_length)
    dtype: str = option("", "float32, bfloat16 or float64 (default: as stored)")
    tokenizer: str = option("bytes", "tokenizer")
    out: str = option("", "folder for results and figures (default: beside the model)")
    compare: str = option("", "instead: two results, A.json,B.json, to be drawn together and tested")
    seed: int = option(0, "seed of the questions", int)
    prompt: str = option("", "instead: go on with the text in this file, and tell how fast")
    max_new_tokens: int = option(128, "tokens to write after --prompt", parse_length)
    temperature: float = option(0.0, "0 writes the likeliest token, above 0 draws one", float)
    top_p: float = option(1.0, "draw only from the likeliest tokens that together hold this share", float)


def find_task(name: str) -> Task:
    """A task by name, or a file's. Raises ValueError for one that is not known."""
    if name.endswith(".jsonl"):
        return file_task(Path(name))
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown; choose from {', '.join(GROUPS)}, {', '.join(TASKS)}")
    return TASKS[name]


def plan_jobs(config: EvalConfig, tokenizer: Tokenizer) -> list[tuple[str, int, int]]:
    """Every (task, length, questions), each tried once: what can't be is said before the work begins."""
    tasks, lengths_text = (("recall_bare,recall,icl", "256,512,1k,2k,4k,8k,16k") if is_tiny(tokenizer)
                           else ("text", "4k,8k,16k"))
    tasks = config.tasks or ("" if config.data else tasks)
    lengths = [parse_length(text) for text in (config.lengths or lengths_text).split(",")]
    names = [n for name in tasks.split(",") for n in GROUPS.get(name, [name])] + config.data.split(",")
    jobs = []
    for name in dict.fromkeys(name for name in names if name):
        task = find_task(name)
        own = lengths if task.only_length is None else [task.only_length]
        task.examples(tokenizer, min(own), 1, questions_each(task, min(own), config.per_context), config.seed)
        jobs += [(name, length, (length >= 8192 and config.long_samples) or config.samples) for length in own]
    return jobs


def evaluate(model: Transformer, config: EvalConfig, name: str, parallel: Parallel | None = None,
             predictions: Path | None = None) -> dict[str, Any]:
    """Run all tasks at all lengths, with a progress bar. Returns what eval/<name>.json holds.

    With a file for `predictions`, an evaluation that was stopped goes on where it was.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    jobs = plan_jobs(config, tokenizer)
    settings = asdict(config) | {"tokenizer_fingerprint": tokenizer.fingerprint}
    settings["weights"] = _weights_fingerprint(Path(config.model))
    writes = parallel is None or parallel.main
    if not writes:  # all must skip the same: read after the main rank has mended the file
        torch.distributed.barrier()
    record = Record(predictions, settings, writes)
    if parallel and writes:
        torch.distributed.barrier()
    total = sum(length * -(-n // questions_each(find_task(task), length, config.per_context))
                for task, length, n in jobs)
    model.eval()
    with tqdm(total=total, unit="tok", unit_scale=True, desc=f"evaluate {name}", leave=False,
              disable=None if writes else True) as bar:
        results = [run_task(model, tokenizer, task, length, n, config.seed, config.decode, bar.update,
                            config.per_context, config.batch_tokens, parallel, record)
                   for task, length, n in jobs]
        bpb = bits_per_byte(model, tokenizer, config.bpb_length, 16, config.seed, parallel)
    return {"model": name, "settings": settings, "results": results, "bits_per_byte": bpb}


def _weights_fingerprint(folder: Path) -> str:
    """Changes when the weights do: names, sizes and both ends of every weight file."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(2**20))
            file.seek(-min(2**20, path.stat().st_size), 2)
            digest.update(file.read())
    return digest.hexdigest()[:16]


@torch.no_grad()
def quick_scores(model: Transformer, tokenizer: Tokenizer, length: int, parallel: Parallel, n: int = 2,
                 seed: int = 0) -> dict[str, float]:
    """Recall and ICL during training: the share of right answers about `n` contexts of each dp rank.

    One forward pass a context, over its sp ranks, as in training: the questions stand one after another with
    their answers, so a question also sees those before it. All ranks must call it.
    """
    scores = {}
    for name in ("recall", "icl") if is_tiny(tokenizer) else ("json_kv", "icl_6"):
        task, total = TASKS[name], torch.zeros(2, dtype=torch.float64)
        examples = task.examples(tokenizer, length, n * parallel.dp_size, questions_each(task, length, 4),
                                 seed)
        for example in examples[parallel.dp_rank::parallel.dp_size]:
            text, answers = example.context_ids.tolist(), []
            for q in example.questions:
                answer = encode(tokenizer, q.answers[0] if task.exact else " " + q.answers[0]).tolist()
                text += q.prompt_ids.tolist()
                answers.append(slice(len(text) - 1, len(text) - 1 + len(answer)))  # predicted from one before
                text += answer
            share = -(-len(text) // parallel.sp_size)
            spare = share * parallel.sp_size - len(text)
            ids = torch.tensor(text + [0] * spare)
            labels = torch.full_like(ids, data.IGNORE_INDEX)
            for a in answers:
                labels[a] = ids[a.start + 1:a.stop + 1]
            mine = slice(parallel.sp_rank * share, (parallel.sp_rank + 1) * share)
            hits = torch.zeros_like(ids, device=parallel.device)
            hits[mine] = model.is_right(ids[mine].to(parallel.device), labels[mine].to(parallel.device),
                                    (len(text), spare) if spare else (len(text),), parallel).long()
            torch.distributed.all_reduce(hits, group=parallel.sp_group)
            total += torch.tensor([sum(bool(hits[a].all()) for a in answers), len(answers)])
        right, asked = parallel.all_sum(total).tolist()
        scores[f"{name}@{format_length(length)}"] = right / asked
    return scores


def macro_averages(results: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Mean over categories of the mean over their tasks, at every length that all the tasks share (2.1)."""
    tables: dict[int, dict[str, dict[str, float]]] = {}
    for row in results:
        tables.setdefault(row["length"], {}).setdefault(row["category"], {})[row["task"]] = row["score"]
    most = max(sum(map(len, table.values())) for table in tables.values())
    return {length: float(np.mean([np.mean(list(tasks.values())) for tasks in table.values()]))
            for length, table in sorted(tables.items()) if sum(map(len, table.values())) == most > 1}


# --- 10. Tables and pictures ----------------------------------------------------------------------


def format_table(evaluations: Sequence[dict[str, Any]]) -> str:
    """Score by task and length, one column a model, each with its interval."""
    names = [e["model"] for e in evaluations]
    wide = max(12, *(len(Path(r["task"]).stem) for r in evaluations[0]["results"]))
    lines = [f"{'task':<{wide}} {'length':>7} {'n':>4} {'chance':>7}" + "".join(f"{n:>22}" for n in names)]
    for rows in zip(*(e["results"] for e in evaluations), strict=True):
        row = rows[0]
        cells = "".join(f"{r['score']:>9.3f} [{r['low']:.2f}, {r['high']:.2f}]" for r in rows)
        lines.append(f"{Path(row['task']).stem:<{wide}} {format_length(row['length']):>7} {row['n']:>4} "
                     f"{row['chance']:>7.2g}{cells}")
    macros = [macro_averages(e["results"]) for e in evaluations]
    for length in macros[0]:
        cells = "".join(f"{macro[length]:>9.3f}{'':13}" for macro in macros)
        lines.append(f"{'macro avg':<{wide}} {format_length(length):>7} {'':>12}{cells}")
    for rows in zip(*(e["bits_per_byte"] for e in evaluations), strict=True):
        cells = "".join(f"{r['bits_per_byte']:>9.3f}{'':13}" for r in rows)
        lines.append(f"{'bits/byte':<{wide}} {rows[0]['name']:>8} {'':>11}{cells}")
    return "\n".join(lines)


def format_comparison(a: str, b: str, rows: Sequence[dict[str, Any]]) -> str:
    """The differences, with a star at those that are real."""
    wide = max(12, *(len(Path(row["task"]).stem) for row in rows))
    lines = [f"{'task':<{wide}} {'length':>7} {a:>10.10} {b:>10.10}  difference  95% interval        p"]
    for r in rows:
        lines.append(f"{Path(r['task']).stem:<{wide}} {format_length(r['length']):>7} {r['a']:>10.3f} "
                     f"{r['b']:>10.3f} {r['difference']:>+11.3f}  [{r['low']:+.2f}, {r['high']:+.2f}] "
                     f"{r['p']:>8.2g}{' *' if r['real'] else ''}")
    real = sum(row["real"] for row in rows)
    lines.append(f"* real: {real} of {len(rows)} differences, at 5% for all together (Holm)")
    if few := sum(row["contexts"] < 6 for row in rows):
        lines.append(f"{few} rest on fewer than 6 contexts, too few for any to be real; ask more (--samples)")
    return "\n".join(lines)


def _pyplot() -> Any:
    """matplotlib (the `plots` extra), or None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _curve(axes: Any, rows: Sequence[dict[str, Any]], i: int, label: str, labels: Sequence[str]) -> None:
    scores = [r["score"] for r in rows]
    error = [[max(0, r["score"] - r["low"]) for r in rows], [max(0, r["high"] - r["score"]) for r in rows]]
    at = [labels.index(format_length(r["length"])) for r in rows]
    axes.errorbar(at, scores, error, marker="o", markersize=4, capsize=3, label=label, color=f"C{i}")
    axes.set(xticks=range(len(labels)), xticklabels=labels, ylim=(-0.03, 1.05))
    axes.grid(alpha=0.3)


def draw_scores(evaluations: Sequence[dict[str, Any]], path: Path,
                real: Sequence[tuple[str, int]] = ()) -> bool:
    """Draw a panel for each task: score by length with its interval, a line a model, chance dashed, a star
    where a difference is real. Returns False where matplotlib is not installed.
    """
    if (pyplot := _pyplot()) is None:
        return False
    names = list(dict.fromkeys(r["task"] for r in evaluations[0]["results"]))
    labels = [format_length(n) for n in sorted({r["length"] for r in evaluations[0]["results"]})]
    columns = min(4, len(names))
    figure, grid = pyplot.subplots(-(-len(names) // columns), columns, squeeze=False, sharey=True,
                                   figsize=(max(4.5, 3.1 * columns), 0.8 + 2.3 * -(-len(names) // columns)),
                                   layout="constrained")
    for axes, name in zip(grid.flat, names, strict=False):
        for i, e in enumerate(evaluations):
            rows = [r for r in e["results"] if r["task"] == name]
            _curve(axes, rows, i, e["model"], labels)
        axes.plot([labels.index(format_length(r["length"])) for r in rows], [r["chance"] for r in rows], "--",
                  color="gray", linewidth=1, label="chance")
        for j, label in enumerate(labels):
            if (name, parse_length(label)) in real:
                axes.text(j, 1.0, "*", ha="center", va="center", fontsize=14)
        counts = sorted({r["n"] for r in rows})
        axes.set_title(f"{Path(name).stem} (n = {', '.join(map(str, counts))})", fontsize=9)
        axes.tick_params(labelsize=7)
    for axes in list(grid.flat)[len(names):]:
        axes.set_visible(False)
    figure.supxlabel("length (tokens)", fontsize=9)
    figure.supylabel("score, with 95% interval", fontsize=9)
    handles, texts = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=len(handles), fontsize=8)
    _save(figure, path)
    return True


def draw_recall(evaluations: Sequence[dict[str, Any]], path: Path, task: str = "recall") -> bool:
    """Draw a task by length, one line a model with its interval, and by length and depth below; if nobody was
    asked about it, all the others by length.

    Returns False where matplotlib (the `plots` extra) is not installed.
    """
    if (pyplot := _pyplot()) is None:
        return False
    rows = [[r for r in e["results"] if r["task"] == task] for e in evaluations]
    if not rows[0]:
        return draw_scores(evaluations, path)
    labels = [format_length(r["length"]) for r in rows[0]]
    figure = pyplot.figure(figsize=(3.2 * max(len(rows), 2), 6.2), layout="constrained")
    grid = figure.add_gridspec(2, len(rows), height_ratios=(3, 2))
    curve = figure.add_subplot(grid[0, :])
    title = "Recall of 16 pairs in held-out code" if task == "recall" else Path(task).stem
    for i, (e, row) in enumerate(zip(evaluations, rows, strict=True)):
        _curve(curve, row, i, e["model"], labels)
    curve.set(xlabel="context length (tokens)", ylabel=f"{Path(task).stem}, with 95% interval",
              title=f"{title}, n = {', '.join(map(str, sorted({r['n'] for r in rows[0]})))} each")
    curve.legend(title="model")
    for i, (e, row) in enumerate(zip(evaluations, rows, strict=True)):
        heat = figure.add_subplot(grid[1, i])
        depths = np.array([[np.nan if s is None else s for s in r["by_depth"]] for r in row]).T
        image = heat.imshow(depths, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        heat.set(title=e["model"], xticks=range(len(labels)), xticklabels=labels,
                 yticks=range(5), yticklabels=[f"{20 * b}-{20 * b + 20}%" for b in range(5)])
        heat.tick_params(labelsize=7)
        if i == 0:
            heat.set_ylabel("depth of the answer")
    figure.colorbar(image, ax=figure.axes[1:], label="score", fraction=0.02)
    _save(figure, path)
    return True


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    figure.clear()


def save_evaluation(evaluation: dict[str, Any], folder: Path) -> None:
    """Write eval/<model>.json, whole or not at all."""
    path = folder / f"{evaluation['model']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    temporary.write_text(json.dumps(evaluation, indent=1) + "\n")
    temporary.replace(path)


def compare_files(config: EvalConfig) -> None:
    """Print and draw two evaluations together, and say which differences are real."""
    paths = [Path(name) for name in config.compare.split(",")]
    if len(paths) != 2:
        raise ValueError(f"--compare {config.compare!r} must name two results, as A.json,B.json")
    try:
        a, b = (json.loads(path.read_text()) for path in paths)
        rows = compare(a, b)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"--compare {config.compare}: not two results of this program ({error!r})") from None
    if a["model"] == b["model"]:
        a, b = a | {"model": f"{a['model']} (A)"}, b | {"model": f"{b['model']} (B)"}
    print(format_comparison(a["model"], b["model"], rows))
    figure = Path(config.out or paths[1].parent) / f"{paths[0].stem}-{paths[1].stem}.png"
    drawn = draw_scores([a, b], figure, [(r["task"], r["length"]) for r in rows if r["real"]])
    print(f"figure: {figure}" if drawn else "no figure: install the `plots` extra")


def continue_text(model: Transformer, config: EvalConfig) -> None:
    """Print how the model goes on with a file's text, as it is written, and the speed to stderr."""
    tokenizer, text = load_tokenizer(config.tokenizer), codecs.getincrementaldecoder("utf-8")("replace")
    try:
        ids = [*tokenizer.begin, *tokenizer.encode(Path(config.prompt).read_text(encoding="utf-8"))]
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt {config.prompt} is not UTF-8 text: {error}") from None
    times = [time.monotonic()]
    for token in stream(model, ids, config.max_new_tokens, [tokenizer.eos_id], config.temperature,
                        config.top_p, config.seed):
        times.append(time.monotonic())
        if token >= tokenizer.vocab_size:  # the model's table may be longer, and its last rows untrained
            print("\ufffd", end="", flush=True)
        elif token != tokenizer.eos_id:  # a letter may be several tokens
            print(text.decode(tokenizer.encoding.decode_single_token_bytes(token)), end="", flush=True)
    print(text.decode(b"", final=True))
    read_s, write_s = times[1] - times[0], times[-1] - times[1]
    speed = f", {(len(times) - 2) / write_s:,.1f} tok/s after the first" if len(times) > 2 else ""
    print(f"{len(ids):,} tokens read in {read_s:.2f} s, {len(ids) / read_s:,.0f} tok/s; "
          f"{len(times) - 1:,} written{speed}", file=sys.stderr)


def main() -> None:
    config = data.parse_cli(EvalConfig, __doc__)
    if config.compare:
        return compare_files(config)
    if not config.model:
        raise ValueError("--model is missing; name a model's folder, as runs/tiny/checkpoints/long-900")
    if config.dtype not in ("", "float32", "bfloat16", "float64"):
        raise ValueError(f"--dtype {config.dtype!r} is unknown; choose float32, bfloat16 or float64")
    data.tokenizer_for(config.model, config.tokenizer)
    folder, world = Path(config.model), int(os.environ.get("WORLD_SIZE", 1))
    parallel = init_parallel(world) if world > 1 else None  # all ranks share every text
    device = parallel.device if parallel else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, config.dtype) if config.dtype else None
    model = load_pretrained(folder, dtype=dtype, device=device)
    if config.prompt:
        return continue_text(model, config)
    out = Path(config.out or folder / "eval")
    evaluation = evaluate(model, config, folder.name, parallel, out / f"{folder.name}.predictions.jsonl")
    if parallel is None or parallel.main:
        save_evaluation(evaluation, out)
        print(format_table([evaluation]))
        drawn = draw_scores([evaluation], out / f"{folder.name}.png")
        if deep := [r["task"] for r in evaluation["results"] if any(d is not None for d in r["by_depth"])]:
            task = "recall" if "recall" in deep else deep[0]
            draw_recall([evaluation], out / f"{folder.name}-depth.png", task)
        print(f"results in {out}" + ("" if drawn else "; no picture: install the `plots` extra"))
    if parallel:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    data.run_main(main)
