"""Long-context tasks as text: drawing them, fitting them to a length, and reading them from files.

A task draws a text example of some size. The size counts what makes the example long: pairs of a JSON object,
lines around a hidden sentence, passages, labelled lines.

    head         Secret numbers are hidden in the text below. Remember them.
    items        import os / The secret number of mado-pi is 4817726. / def main(): / ...
    tail
    question     What is the secret number of mado-pi? In the text, the secret number of mado-pi is
    answer       4817726          in the second item, so its depth is small

`fit` draws with growing sizes until the example has the number of tokens wanted, whatever the tokenizer.
Everything is a string here; only `fit` is given a function that turns text into tokens.

The formats are those of HELMET (2410.02694: JSON pairs, many-shot ICL, passages, re-ranking) and RULER
(2404.06654: needles, variable tracking, common and frequent words). Words and instructions are our own.
"""

from __future__ import annotations

import json
import math
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# --- 1. An example as text ------------------------------------------------------------------------


class TextQuestion(NamedTuple):
    """What follows the context, and the answers wanted then."""

    prompt: str
    answers: tuple[str, ...]
    items: tuple[int, ...]  # for each answer the item of the example in which it stands
    chance: float = 0.0  # the score of a guess
    relevance: dict[str, int] | None = None  # re-ranking: how well each passage fits the query


class TextExample(NamedTuple):
    """A context, made of a head, items and a tail, and independent questions about it."""

    head: str
    items: list[str]
    separator: str
    tail: str
    questions: list[TextQuestion]

    @property
    def context(self) -> str:
        return self.head + self.separator.join(self.items) + self.tail

    def places(self, question: TextQuestion) -> tuple[int, ...]:
        """The character of the context at which each answer of a question begins."""
        lengths = np.array([len(item) + len(self.separator) for item in self.items])
        starts = len(self.head) + np.cumsum(lengths) - lengths
        return tuple(int(starts[i]) + self.items[i].index(answer)
                     for i, answer in zip(question.items, question.answers, strict=True))


Rng = np.random.Generator
Encode = Callable[[str], np.ndarray]
FILLER = "The wind is mild. A door falls shut. Rain drums on the roof. We walk on and on. "


# --- 2. Fitting an example to a length ------------------------------------------------------------


def fit(name: str, draw: Callable[[int], TextExample], encode: Encode, length: int, least: int = 1,
        begin: int = 1) -> tuple[TextExample, int]:
    """Draw the largest example that fits into `length` tokens -> the example, the tokens that it takes.

    `begin` counts the tokens before the text. We guess the next size from the tokens that one more unit of
    size has taken so far; four or five draws are enough.
    Raises ValueError if an example of the size `least` is already too long.
    """
    low, high, per_unit = least, None, 8.0
    best = draw(low)
    used = count_tokens(best, encode, begin)
    if used > length:
        raise ValueError(f"task {name} needs {used} tokens at the least with this tokenizer, got {length}; "
                         "choose longer lengths")
    while used < 0.99 * length and (high is None or high - low > 1):
        size = low + max(1, int((length - used) / per_unit))
        if high is not None:
            size = min(size, high - 1)
        example = draw(size)
        tokens = count_tokens(example, encode, begin)
        per_unit = max(1e-3, (tokens - used) / (size - low)) * 1.001
        if tokens <= length:
            low, used, best = size, tokens, example
        else:
            high = size
    return best, used


def count_tokens(example: TextExample, encode: Encode, begin: int) -> int:
    """Tokens of the context, its longest question and an answer."""
    longest = max(len(encode(question.prompt)) for question in example.questions)
    return begin + len(encode(example.context)) + longest + answer_budget(example, encode)


def answer_budget(example: TextExample, encode: Encode) -> int:
    """Tokens that an answer may have: a quarter more than the right one, and a few."""
    longest = max(len(encode(", ".join(question.answers))) for question in example.questions)
    return longest + longest // 4 + 4


# --- 3. Words, numbers and places -----------------------------------------------------------------


def random_words(rng: Rng, n: int, syllables: int) -> list[str]:
    """`n` different pronounceable words that no model has seen. They have one length: none contains another."""
    found: dict[str, None] = {}
    while n > 70**syllables // 4:  # there are 70 syllables; near the limit new words are hard to find
        syllables += 1
    while len(found) < n:
        letters = np.stack((rng.choice(list("bdfgklmnprstvz"), (n, syllables)),
                            rng.choice(list("aeiou"), (n, syllables))), axis=2)
        found |= dict.fromkeys("".join(row) for row in letters.reshape(n, -1))
    return list(found)[:n]


def random_numbers(rng: Rng, n: int, digits: int) -> list[str]:
    return [str(i) for i in 10 ** (digits - 1) + rng.choice(9 * 10 ** (digits - 1), n, replace=False)]


def random_uuids(rng: Rng, n: int) -> list[str]:
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(n)]


def random_codes(rng: Rng, n: int, letters: int) -> np.ndarray:
    """`n` different strings of random capital letters."""
    drawn = rng.choice(26**letters, n, replace=False)[:, None] // 26 ** np.arange(letters) % 26
    return np.array(["".join(chr(65 + i) for i in row) for row in drawn])  # from (n, letters)


def items_at(depths: Sequence[float], n: int) -> list[int]:
    """For each depth (0 the first, 1 the last of `n` items) a different item, as near to it as can be."""
    free = np.ones(n, bool)
    chosen = []
    for depth in depths:
        distance = np.abs(np.arange(n) + 0.5 - depth * n)
        nearest = int(np.argmin(np.where(free, distance, np.inf)))
        free[nearest] = False
        chosen.append(nearest)
    return chosen


def scatter(lines: list[str], needles: list[str], depths: np.ndarray) -> tuple[list[str], list[int]]:
    """Insert each needle between the lines at its depth -> all in order, and the index of each needle."""
    evenly = (np.arange(len(lines)) + 0.5) / max(1, len(lines))
    both = lines + needles
    order = np.argsort(np.concatenate((evenly, depths)), kind="stable")
    return [both[i] for i in order], np.argsort(order)[len(lines):].tolist()


# --- 4. The tasks ---------------------------------------------------------------------------------
#
# Every draw_ takes (rng, size, a depth for each question, length in tokens) and options of its own. The
# order in which it draws random numbers is part of the task: another order makes other questions.


def draw_json_kv(rng: Rng, size: int, depths: list[float], length: int) -> TextExample:
    """A JSON object; two of its pairs as demonstrations, and others asked for (HELMET's json_kv)."""
    size += len(depths) + 2
    ids = random_uuids(rng, 2 * size)
    keys, values = ids[:size], ids[size:]
    asked = items_at(depths, size)
    shown = rng.choice(np.delete(np.arange(size), asked), 2, replace=False)
    items = [f'"{key}": "{value}"' for key, value in zip(keys, values, strict=True)]
    tail = KEY_TASK + "".join(f"{KEY_PROMPT.format(keys[i])} {values[i]}" for i in shown)
    questions = [TextQuestion(KEY_PROMPT.format(keys[i]), (values[i],), (i,)) for i in asked]
    return TextExample("{", items, ",\n ", "}" + tail, questions)


KEY_TASK = "\n\nFind the value that belongs to a key of the JSON object above."
KEY_PROMPT = "\n\nKey: {}\nCorresponding value:"


def draw_needles(rng: Rng, size: int, depths: list[float], length: int,
                 haystack: Callable[[], Sequence[str]] | None = None, n_keys: int = 1, n_values: int = 1,
                 n_queries: int = 1, ids: bool = False) -> TextExample:
    """Needles: sentences that give a key a secret number, hidden in a haystack (RULER's needle tasks).

    Each question asks for `n_queries` keys, which have `n_values` values each; `n_keys` - 1 other needles
    lead astray. `haystack` gives the lines between; without one there are only more needles. With `ids`,
    keys and values are UUIDs.
    """
    n_asked = len(depths) * n_queries  # keys that are asked for
    n_others = n_keys - 1 + (0 if haystack else size)
    n_given = n_asked * n_values
    if ids:
        kind = "code"
        keys, values = random_uuids(rng, n_asked + n_others), random_uuids(rng, n_given + n_others)
    else:
        kind = "number"
        first, second = (random_words(rng, n_asked + n_others, syllables) for syllables in (3, 2))
        keys = [f"{a}-{b}" for a, b in zip(first, second, strict=True)]
        values = random_numbers(rng, n_given + n_others, 7)
    owners = [*keys[n_asked:], *(key for key in keys[:n_asked] for _ in range(n_values))]
    needles = [f"The secret {kind} of {key} is {value}." for key, value in zip(owners, values, strict=True)]
    lines: list[str] = []
    if haystack:
        source = haystack()
        begin = int(rng.integers(len(source)))
        lines = [source[(begin + i) % len(source)] for i in range(size)]
    each = n_queries * n_values  # needles of a question
    where = rng.random(len(needles))
    where[n_others::each] = depths  # of each question's needles the first; the others lie anywhere
    items, index = scatter(lines, needles, where)
    questions = []
    for j in range(len(depths)):
        own = slice(n_others + j * each, n_others + (j + 1) * each)
        prompt = needle_prompt(keys[j * n_queries:(j + 1) * n_queries], kind, each > 1)
        questions.append(TextQuestion(prompt, tuple(values[own]), tuple(index[own])))
    head = f"Secret {kind}s are hidden in the text below. Remember them.\n\n"
    return TextExample(head, items, "\n", "", questions)


def needle_prompt(keys: list[str], kind: str, several: bool) -> str:
    names = ", ".join(keys[:-1]) + (" and " if len(keys) > 1 else "") + keys[-1]
    if several:
        return f"\n\nWhat are the secret {kind}s of {names}? In the text, all secret {kind}s of {names} are"
    return f"\n\nWhat is the secret {kind} of {names}? In the text, the secret {kind} of {names} is"


def draw_variables(rng: Rng, size: int, depths: list[float], length: int, hops: int = 4) -> TextExample:
    """A value is handed from variable to variable, far apart in noise: which have it? (RULER's vt)"""
    chain = hops + 1  # variables that have one value
    chains = len(depths) + 1  # the last one is shown solved
    names = random_codes(rng, chain * chains, 5).tolist()
    numbers = random_numbers(rng, chains, 5)
    steps = []
    for i, name in enumerate(names):
        value = f"VAR {names[i - 1]}" if i % chain else numbers[i // chain]
        steps.append(f"VAR {name} = {value}.")
    where = [np.sort(np.append(d + rng.random(hops) * (1 - d), d)) for d in depths]
    items, index = scatter([FILLER.strip()] * size, steps[:-chain], np.concatenate(where))
    prompt = ("\n\nWhich variables have the value {0}, directly or by way of others?\n"
              f"Answer: {chain} variables have the value {{0}}, namely")
    solved = " ".join(steps[-chain:]) + prompt.format(numbers[-1]) + " " + " ".join(names[-chain:])
    questions = []
    for j in range(len(depths)):
        own = slice(j * chain, (j + 1) * chain)
        questions.append(TextQuestion(prompt.format(numbers[j]), tuple(names[own]), tuple(index[own]),
                                      chain / 26**5))
    head = f"{solved}\n\nKeep track of the variables in the text below.\n\n"
    return TextExample(head, items, " ", "", questions)


def draw_common_words(rng: Rng, size: int, depths: list[float], length: int,
                      common: int = 10) -> TextExample:
    """A numbered list in which some words come often and `size` others seldom (RULER's cwe)."""
    often, seldom = (30, 3) if length >= 4096 else (6, 1)

    def numbered(frequent: list[str], rare: list[str], often: int, seldom: int) -> list[str]:
        mixed = rng.permutation(frequent * often + rare * seldom)
        return [f"{i + 1}. {word}" for i, word in enumerate(mixed)]

    words = random_words(rng, 2 * common + 5 + size, 3)
    answers, shown, rare = words[:common], words[common:2 * common], words[2 * common:]
    items = numbered(answers, rare[5:], often, seldom)
    prompt = f"\nQuestion: Which {common} words come most often in the list?\nAnswer: They are"
    task = "In the list below some words come more often than others. Remember them.\n"
    solved = f"{task}{' '.join(numbered(shown, rare[:5], 3, 1))}{prompt} {' '.join(shown)}\n\n"
    question = TextQuestion(prompt, tuple(answers), first_items(items, answers))
    return TextExample(solved + task, items, " ", "", [question])


def draw_frequent_words(rng: Rng, size: int, depths: list[float], length: int) -> TextExample:
    """Coded words in Zipf's proportions: rank r about size * r^-2 / zeta(2) times (RULER's fwe, alpha 2).

    The most frequent of all is noise, dots. One more of each of the ranks 2 to 4, so that none ties with 5.
    """
    ranks = np.arange(1, max(8, length // 50) + 1)
    counts = (size * ranks**-2.0 / (math.pi**2 / 6)).astype(int) + (ranks <= 4)
    words = np.append("...", np.char.lower(random_codes(rng, len(ranks) - 1, 6)))
    items = rng.permutation(np.repeat(words, counts)).tolist()
    answers = words[1:4].tolist()
    head = "Count how often each coded word stands in the text below.\n"
    prompt = ("\nQuestion: Dots aside, which three coded words stand in the text most often?\n"
              "Answer: They are")
    question = TextQuestion(prompt, tuple(answers), first_items(items, answers), len(answers) / 26**6)
    return TextExample(head, items, " ", "", [question])


def first_items(items: list[str], words: list[str]) -> tuple[int, ...]:
    bare = [item.split()[-1] for item in items]
    return tuple(bare.index(word) for word in words)


ICL_TEXTS = [hello + text for hello in ("", "Hello. ", "Sorry to bother you. ", "One more thing. ")
             for text in ("Where can I find a {}?", "Please send me two of your {}s.", "How much is the {}?",
                          "My {} has stopped working again.", "Is there a {} for children, too?")]


def draw_icl(rng: Rng, size: int, depths: list[float], length: int, classes: int = 6,
             rows: Sequence[dict[str, Any]] = ()) -> TextExample:
    """Many labelled lines in rounds that have each class once; new lines are to be labelled (HELMET's ICL).

    Labels are integers dealt anew for every context, so that only the examples can tell them. Lines of a
    class speak of one thing; `rows` are somebody's own {"text", "label"} instead.
    """
    by_class: dict[str, list[str]] = {}
    if not rows:
        by_class = {word: [line.format(word) for line in ICL_TEXTS] for word in random_words(rng, classes, 3)}
    for row in rows:
        by_class.setdefault(str(row["label"]), []).append(row["text"])
    texts = [rng.permutation(np.array(lines, object)).tolist() for lines in by_class.values()]
    asked = [lines.pop() for lines in texts]  # never among the examples
    n = len(texts)
    label = rng.permutation(n)
    rounds = -(-(size + n) // n)
    topics = np.concatenate([rng.permutation(n) for _ in range(rounds)])[:size + n].tolist()  # at least all
    shown = [f"{texts[t][i // n % len(texts[t])]}\nlabel: {label[t]}" for i, t in enumerate(topics)]
    questions = [TextQuestion(f"\n\n{asked[t]}\nlabel:", (f"{label[t]}",), (topics.index(t),), 1 / n)
                 for t in rng.choice(n, len(depths), replace=len(depths) > n)]
    head = "Label the last text as the examples are labelled. Write only its label, as they do.\n\n"
    return TextExample(head, shown, "\n\n", "", questions)


def draw_rerank(rng: Rng, size: int, depths: list[float], length: int) -> TextExample:
    """Passages to be ranked by how many of a query's three words they share (HELMET's re-ranking).

    Of each query's passages one shares all three words, two share two, and three one; the rest share none.
    """
    shares = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], bool)
    n = len(depths)
    total = size + n * len(shares)
    words = np.array(random_words(rng, 3 * (n + 20), 2))
    queries, pool = words[:3 * n].reshape(n, 3), words[3 * n:].reshape(20, 3)
    texts = pool[rng.integers(20, size=(total, 3)), np.arange(3)]  # (total, 3)
    relevance = np.zeros((n, total), int)
    spots = rng.permutation(total)[:n * len(shares)].reshape(n, -1)
    for j in range(n):
        texts[spots[j]] = np.where(shares, queries[j], texts[spots[j]])
        relevance[j, spots[j]] = shares.sum(axis=1)
    names = [str(i + 1) for i in rng.permutation(total)]
    discounts = [1 / math.log2(rank + 2) for rank in range(min(10, total))]
    questions = []
    for j in range(n):
        best = sorted(spots[j].tolist(), key=lambda i: -relevance[j, i])
        ideal = sum(relevance[j, i] * d for i, d in zip(best, discounts, strict=False))
        questions.append(TextQuestion(
            "\n\nQuery: Who came from {} to sell {} at the fair of {}?\nRanking:".format(*queries[j]),
            tuple(names[i] for i in best), tuple(best), relevance[j].mean() * sum(discounts) / ideal,
            dict(zip(names, relevance[j].tolist(), strict=True))))
    items = ["[ID: {}] Document: Traders from {} sold {} at the fair of {}.".format(name, *text)
             for name, text in zip(names, texts, strict=True)]
    head = ("Rank the passages below by how well they fit the query, the best first. Write the IDs of the "
            "best ten in this form: Ranking: ID3 > ID1 > ID2\n\n")
    return TextExample(head, items, "\n\n", "", questions)


FACTS = (("was born in {}", "In which town was {} born?"),
         ("learned the trade of a {}", "Which trade did {} learn?"), ("married {}", "Whom did {} marry?"),
         ("is buried in {}", "In which town is {} buried?"))
QA_TASK = "Answer the question by the documents below, in a few words.\n\n"


def draw_qa(rng: Rng, size: int, depths: list[float], length: int) -> TextExample:
    """Passages about people; a question that one of them answers (HELMET's RAG)."""
    size += len(depths)
    surnames = random_words(rng, size, 3)
    values = [value.title() for value in random_words(rng, size * len(FACTS), 4)]
    people = [f"{a} {b}".title() for a, b in zip(random_words(rng, size, 2), surnames, strict=True)]
    items = []
    for i, person in enumerate(people):
        told = [f"{person} {fact.format(values[i * len(FACTS) + f])}" for f, (fact, _) in enumerate(FACTS)]
        items.append(f"Document (Title: {person}): {'. '.join(told)}.")
    questions = []
    for i in items_at(depths, size):
        f = int(rng.integers(len(FACTS)))
        prompt = f"\n\nQuestion: {FACTS[f][1].format(people[i])}\nAnswer:"
        questions.append(TextQuestion(prompt, (values[i * len(FACTS) + f],), (i,)))
    return TextExample(QA_TASK, items, "\n\n", "", questions)


# --- 5. Files in HELMET's, RULER's and plain formats ----------------------------------------------
#
# Ready prompts, of whatever length they are. A line of a file may be
#
#     RULER's      {"input", "outputs"}, "answer_prefix" if there
#     JSON pairs   {"context", "question", "answer", "demos"}: two demonstrations are shown
#     passages     {"question", "answers", "ctxs": [{"title", "text"}]}
#     re-ranking   {"query", "ctxs": [{"id", "text", "label"}]}
#     ICL          {"text", "label"}: drawn by draw_icl, and fitted to every length


@cache
def read_jsonl(path: Path) -> list[dict[str, Any]]:
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


def check_labels(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError unless every row has a text and every label two rows: one to ask, one to learn from."""
    lines = Counter(str(row.get("label")) for row in rows)
    if min(lines.values()) < 2 or not all(isinstance(row.get("text"), str) for row in rows):
        raise ValueError(f"{path}: each line needs a text and a label, and each label two lines, one to "
                         "ask about and one to learn from")


def file_prompt(path: Path, i: int) -> tuple[str, str, list[str], dict[str, int] | None]:
    """Context, the rest of the prompt, the answers and the relevances of a file's row `i`.

    Raises ValueError if the row has none of the formats above.
    """
    try:
        context, prompt, answers, relevance = _prompt_of(read_jsonl(path)[i])
        if not answers or not all(isinstance(answer, str) for answer in answers):
            raise TypeError("its answers must be text")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} entry {i + 1} is of no known format ({error!r}); support/tasks.py, "
                         "section 5, lists them") from None
    return context, prompt, answers, relevance


def _prompt_of(row: dict[str, Any]) -> tuple[str, str, list[str], dict[str, int] | None]:
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
        return QA_TASK + "\n\n".join(texts), f"\n\nQuestion: {row['question']}\nAnswer:", answers, None
    demos = "".join(f"{KEY_PROMPT.format(key)} {value}" for key, value in row["demos"][:2])
    return row["context"] + KEY_TASK + demos, KEY_PROMPT.format(row["question"]), answers, None
