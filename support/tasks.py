"""Long-context tasks as text, in the formats of HELMET (2410.02694) and RULER (2404.06654).

A task draws an example of some size, which counts what makes it long: pairs of a JSON object, lines
around a hidden sentence, passages, labelled lines. Words and instructions are our own.

    head      Secret numbers are hidden in the text below. Remember them.
    items     import os | The secret number of mado-pi is 4817726. | def main(): | ...
    question  What is the secret number of mado-pi? In the text, the secret number of mado-pi is
    answer    4817726                                                     it stands in item 1

Each draws from (rng, size, a depth for each question) and options of its own. The order of the
random draws is part of a task: another order makes other questions.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class TextQuestion(NamedTuple):
    prompt: str
    answers: tuple[str, ...]
    item: str | None = None  # the part of the context in which the first answer stands
    chance: float = 0.0  # the score of a guess
    relevance: dict[str, int] | None = None  # re-ranking: how well each passage fits the query


class TextExample(NamedTuple):
    """A context, and independent questions about it."""

    context: str
    questions: list[TextQuestion]


Rng = np.random.Generator
FILLER = "The wind is mild. A door falls shut. Rain drums on the roof. We walk on and on. "


def random_words(rng: Rng, n: int, syllables: int) -> list[str]:
    """`n` different words that no model has seen, of one length, so that none contains another."""
    found: dict[str, None] = {}
    while n > 70**syllables // 4:  # of 70 syllables: near the limit, new words are hard to find
        syllables += 1
    while len(found) < n:
        letters = np.stack((rng.choice(list("bdfgklmnprstvz"), (n, syllables)),
                            rng.choice(list("aeiou"), (n, syllables))), axis=2)
        found |= dict.fromkeys("".join(row) for row in letters.reshape(n, -1))
    return list(found)[:n]


def random_numbers(rng: Rng, n: int, digits: int) -> list[str]:
    least = 10 ** (digits - 1)
    return [str(least + i) for i in rng.choice(9 * least, n, replace=False)]


def random_uuids(rng: Rng, n: int) -> list[str]:
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(n)]


def items_at(depths: Sequence[float], n: int) -> list[int]:
    """For each depth (0 the first of `n` items, 1 the last) the nearest item that is still free."""
    chosen: list[int] = []
    for depth in depths:
        distance = np.abs(np.arange(n) + 0.5 - depth * n)
        distance[chosen] = np.inf
        chosen.append(int(distance.argmin()))
    return chosen


def scatter(lines: list[str], needles: list[str], depths: np.ndarray) -> list[str]:
    """Put each needle between the lines at its depth."""
    evenly = (np.arange(len(lines)) + 0.5) / max(1, len(lines))
    both = lines + needles
    return [both[i] for i in np.argsort(np.concatenate((evenly, depths)), kind="stable")]


KEY_TASK = "\n\nFind the value that belongs to a key of the JSON object above."
KEY_PROMPT = "\n\nKey: {}\nCorresponding value:"


def draw_json_kv(rng: Rng, size: int, depths: list[float]) -> TextExample:
    """A JSON object; we show two of its pairs and ask for others (HELMET's json_kv)."""
    size += len(depths) + 2
    keys, values = random_uuids(rng, size), random_uuids(rng, size)
    items = [f'"{key}": "{value}"' for key, value in zip(keys, values, strict=True)]
    asked = items_at(depths, size)
    shown = rng.choice(np.delete(np.arange(size), asked), 2, replace=False)
    demos = "".join(f"{KEY_PROMPT.format(keys[i])} {values[i]}" for i in shown)
    questions = [TextQuestion(KEY_PROMPT.format(keys[i]), (values[i],), items[i]) for i in asked]
    return TextExample("{" + ",\n ".join(items) + "}" + KEY_TASK + demos, questions)


def draw_needles(rng: Rng, size: int, depths: list[float],
                 haystack: Callable[[], Sequence[str]] | None = None, n_keys: int = 1,
                 n_values: int = 1, n_queries: int = 1, ids: bool = False) -> TextExample:
    """Sentences that give a key a secret number, between other lines (RULER's niah).

    A question asks for `n_queries` keys with `n_values` values each; `n_keys` - 1 more needles lead
    astray. Without a haystack there are only more needles. With `ids` all are UUIDs.
    """
    n_asked = len(depths) * n_queries  # keys that are asked for
    n_others = n_keys - 1 + (0 if haystack else size)
    n_needles = n_others + n_asked * n_values
    if ids:
        secret, keys = "secret code", random_uuids(rng, n_asked + n_others)
        values = random_uuids(rng, n_needles)
    else:
        parts = [random_words(rng, n_asked + n_others, syllables) for syllables in (3, 2)]
        secret, keys = "secret number", list(map("-".join, zip(*parts, strict=True)))
        values = random_numbers(rng, n_needles, 7)
    owners = keys[n_asked:] + np.repeat(keys[:n_asked], n_values).tolist()
    needles = [f"The {secret} of {key} is {value}."
               for key, value in zip(owners, values, strict=True)]
    lines: list[str] = []
    if haystack:
        source = haystack()
        begin = int(rng.integers(len(source)))
        lines = [source[(begin + i) % len(source)] for i in range(size)]
    each = n_queries * n_values  # needles of a question: one at its depth, the others anywhere
    where = rng.random(n_needles)
    where[n_others::each] = depths
    ask = "\n\nWhat is the {0} of {1}? In the text, the {0} of {1} is"
    if each > 1:
        ask = "\n\nWhat are the {0}s of {1}? In the text, all {0}s of {1} are"
    questions = []
    for j, begin in enumerate(range(n_others, n_needles, each)):
        names = ", ".join(keys[j * n_queries:(j + 1) * n_queries])
        prompt = ask.format(secret, " and ".join(names.rsplit(", ", 1)))
        questions.append(TextQuestion(prompt, tuple(values[begin:begin + each]), needles[begin]))
    head = f"{secret.capitalize()}s are hidden in the text below. Remember them.\n\n"
    return TextExample(head + "\n".join(scatter(lines, needles, where)), questions)


ICL_TEXTS = [hello + text for hello in ("", "Hello. ", "Sorry to bother you. ", "One more thing. ")
             for text in ("Where can I find a {}?", "Please send me two of your {}s.",
                          "How much is the {}?", "My {} has stopped working again.",
                          "Is there a {} for children, too?")]


def draw_icl(rng: Rng, size: int, depths: list[float], classes: int = 6,
             by_class: dict[str, list[str]] | None = None) -> TextExample:
    """Labelled lines, in rounds that have each class once, then new lines to label (HELMET's ICL).

    Labels are integers dealt anew for every context, so that only the examples tell them. All lines
    of a class speak of one thing; `by_class` are somebody's own lines.
    """
    if by_class is None:
        things = random_words(rng, classes, 3)
        by_class = {thing: [line.format(thing) for line in ICL_TEXTS] for thing in things}
    texts = [rng.permutation(np.array(lines, object)).tolist() for lines in by_class.values()]
    asked = [lines.pop() for lines in texts]  # never among the examples
    n = len(texts)
    label = rng.permutation(n)
    rounds = -(-(size + n) // n)  # at least one
    topics = np.concatenate([rng.permutation(n) for _ in range(rounds)])[:size + n].tolist()
    shown = [f"{texts[t][i // n % len(texts[t])]}\nlabel: {label[t]}" for i, t in enumerate(topics)]
    questions = [TextQuestion(f"\n\n{asked[t]}\nlabel:", (f"{label[t]}",), chance=1 / n)
                 for t in rng.choice(n, len(depths), replace=len(depths) > n)]
    head = "Label the last text as the examples are labelled. Write only its label, as they do.\n\n"
    return TextExample(head + "\n\n".join(shown), questions)


def draw_rerank(rng: Rng, size: int, depths: list[float]) -> TextExample:
    """Passages to rank by how many of a query's three words they share (HELMET's re-ranking).

    Of each query's passages one shares all three words, two share two, and three one.
    """
    shares = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], bool)
    gains = shares.sum(axis=1)
    n = len(depths)
    total = size + n * len(shares)
    words = np.array(random_words(rng, 3 * (n + 20), 2)).reshape(n + 20, 3)
    texts = words[n:][rng.integers(20, size=(total, 3)), np.arange(3)]  # (total, 3)
    spots = rng.permutation(total)[:n * len(shares)].reshape(n, -1)
    names = [str(i + 1) for i in rng.permutation(total)]
    discounts = [1 / math.log2(rank + 2) for rank in range(min(10, total))]  # as in nDCG@10
    ideal = np.dot(gains, discounts[:len(gains)])
    chance = float(gains.sum() / total * sum(discounts) / ideal)
    questions = []
    for query, spot in zip(words[:n], spots, strict=True):
        texts[spot] = np.where(shares, query, texts[spot])
        prompt = "\n\nQuery: Who came from {} to sell {} at the fair of {}?\nRanking:"
        answers = tuple(names[i] for i in spot)
        relevance = dict.fromkeys(names, 0) | dict(zip(answers, gains.tolist(), strict=True))
        questions.append(TextQuestion(prompt.format(*query), answers, None, chance, relevance))
    form = "[ID: {}] Document: Traders from {} sold {} at the fair of {}."
    items = [form.format(name, *text) for name, text in zip(names, texts, strict=True)]
    head = ("Rank the passages below by how well they fit the query, the best first. Write the IDs "
            "of the best ten in this form: Ranking: ID3 > ID1 > ID2\n\n")
    return TextExample(head + "\n\n".join(items), questions)


QA_TASK = "Answer the question by the documents below, in a few words.\n\n"
FACTS = (("was born in {}", "In which town was {} born?"),
         ("learned the trade of a {}", "Which trade did {} learn?"),
         ("married {}", "Whom did {} marry?"),
         ("is buried in {}", "In which town is {} buried?"))


def draw_qa(rng: Rng, size: int, depths: list[float]) -> TextExample:
    """Passages about people; a question that one of them answers (HELMET's RAG)."""
    size += len(depths)
    second = random_words(rng, size, 3)
    values = np.char.title(random_words(rng, 4 * size, 4)).reshape(size, 4)  # one for each fact
    people = [f"{a} {b}".title() for a, b in zip(random_words(rng, size, 2), second, strict=True)]
    items = []
    for person, row in zip(people, values, strict=True):
        told = [f"{person} {fact.format(value)}"
                for (fact, _), value in zip(FACTS, row, strict=True)]
        items.append(f"Document (Title: {person}): {'. '.join(told)}.")
    questions = []
    for i in items_at(depths, size):
        f = int(rng.integers(len(FACTS)))
        prompt = f"\n\nQuestion: {FACTS[f][1].format(people[i])}\nAnswer:"
        questions.append(TextQuestion(prompt, (str(values[i, f]),), items[i]))
    return TextExample(QA_TASK + "\n\n".join(items), questions)
