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


def draw_needles(rng: Rng, size: int, depths: list[float], haystack: Callable[[], Sequence[str]],
                 n_keys: int = 1, n_values: int = 1, n_queries: int = 1) -> TextExample:
    """Sentences that give a key a secret number, between `size` other lines (RULER's niah).

    A question asks for `n_queries` keys, each with `n_values`; `n_keys` - 1 others lead astray.
    """
    n_asked = len(depths) * n_queries  # keys that are asked for
    n_others = n_keys - 1
    n_needles = n_others + n_asked * n_values
    first, second = (random_words(rng, n_asked + n_others, syllables) for syllables in (3, 2))
    keys = [f"{a}-{b}" for a, b in zip(first, second, strict=True)]
    values = random_numbers(rng, n_needles, 7)
    owners = keys[n_asked:] + np.repeat(keys[:n_asked], n_values).tolist()
    needles = [f"The secret number of {key} is {value}."
               for key, value in zip(owners, values, strict=True)]
    source = haystack()
    begin = int(rng.integers(len(source)))
    lines = [source[(begin + i) % len(source)] for i in range(size)]
    each = n_queries * n_values  # needles of a question: one at its depth, the others anywhere
    where = rng.random(n_needles)
    where[n_others::each] = depths
    ask = "\n\nWhat is the secret number of {0}? In the text, the secret number of {0} is"
    if each > 1:
        ask = "\n\nWhat are the secret numbers of {0}? In the text, all secret numbers of {0} are"
    questions = []
    for j, begin in enumerate(range(n_others, n_needles, each)):
        names = ", ".join(keys[j * n_queries:(j + 1) * n_queries])
        prompt = ask.format(" and ".join(names.rsplit(", ", 1)))
        questions.append(TextQuestion(prompt, tuple(values[begin:begin + each]), needles[begin]))
    head = "Secret numbers are hidden in the text below. Remember them.\n\n"
    return TextExample(head + "\n".join(scatter(lines, needles, where)), questions)


ICL_TEXTS = [hello + text for hello in ("", "Hello. ", "Sorry to bother you. ", "One more thing. ")
             for text in ("Where can I find a {}?", "Please send me two of your {}s.",
                          "How much is the {}?", "My {} has stopped working again.",
                          "Is there a {} for children, too?")]


def draw_icl(rng: Rng, size: int, depths: list[float], classes: int = 6) -> TextExample:
    """Labelled lines, in rounds that have each class once, then new lines to label (HELMET's ICL).

    Labels are dealt anew for every context: only examples tell them. A class speaks of one thing.
    """
    things = random_words(rng, classes, 3)
    texts = [rng.permutation([line.format(thing) for line in ICL_TEXTS]) for thing in things]
    label = rng.permutation(classes)
    shown: list[str] = []
    while len(shown) < size + classes:
        line = len(shown) // classes % (len(ICL_TEXTS) - 1)  # the last is for the question
        shown += [f"{texts[t][line]}\nlabel: {label[t]}" for t in rng.permutation(classes)]
    questions = [TextQuestion(f"\n\n{texts[t][-1]}\nlabel:", (f"{label[t]}",), chance=1 / classes)
                 for t in rng.choice(classes, len(depths), replace=len(depths) > classes)]
    head = "Label the last text as the examples are labelled. Write only its label, as they do.\n\n"
    return TextExample(head + "\n\n".join(shown[:size + classes]), questions)


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
