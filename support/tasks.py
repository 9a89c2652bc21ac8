"""Long-context tasks as text.

A task draws an example of some size. The size counts what makes the example long: pairs of a JSON
object, lines around a hidden sentence, passages, labelled lines. support/fitting.py finds the size.

    head      Secret numbers are hidden in the text below. Remember them.
    items     import os | The secret number of mado-pi is 4817726. | def main(): | ...
    question  What is the secret number of mado-pi? In the text, the secret number of mado-pi is
    answer    4817726                                                     it stands in item 1

The formats are HELMET's (2410.02694: JSON pairs, many-shot ICL, passages, re-ranking) and RULER's
(2404.06654: needles, variables, common and frequent words). Words and instructions are our own.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# --- 1. An example as text ------------------------------------------------------------------------


class TextQuestion(NamedTuple):
    prompt: str
    answers: tuple[str, ...]
    item: int | None = None  # in which item the first answer stands, if it stands in one
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

    def place(self, question: TextQuestion) -> int:
        """The character of the context at which the first answer begins."""
        assert question.item is not None
        before = self.head + self.separator.join([*self.items[:question.item], ""])
        return len(before) + self.items[question.item].index(question.answers[0])


Rng = np.random.Generator
FILLER = "The wind is mild. A door falls shut. Rain drums on the roof. We walk on and on. "

# --- 2. Words, numbers and where they stand -------------------------------------------------------


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


def random_codes(rng: Rng, n: int, letters: int) -> list[str]:
    """`n` different strings of random capital letters."""
    numbers = rng.choice(26**letters, n, replace=False)
    digits = numbers[:, None] // 26 ** np.arange(letters) % 26  # (n, letters), in base 26
    return ["".join(chr(65 + i) for i in row) for row in digits]


def items_at(depths: Sequence[float], n: int) -> list[int]:
    """For each depth (0 the first of `n` items, 1 the last) the nearest item that is still free."""
    chosen: list[int] = []
    for depth in depths:
        distance = np.abs(np.arange(n) + 0.5 - depth * n)
        distance[chosen] = np.inf
        chosen.append(int(distance.argmin()))
    return chosen


def scatter(lines: list[str], needles: list[str],
            depths: np.ndarray) -> tuple[list[str], list[int]]:
    """Put each needle between the lines at its depth. Returns all, and where each needle stands."""
    evenly = (np.arange(len(lines)) + 0.5) / max(1, len(lines))
    order = np.argsort(np.concatenate((evenly, depths)), kind="stable")
    both = lines + needles
    return [both[i] for i in order], np.argsort(order)[len(lines):].tolist()


# --- 3. The tasks ---------------------------------------------------------------------------------
#
# Each draws from (rng, size, a depth for each question, length in tokens) and options of its own.
# The order of the random draws is part of a task: another order makes other questions.

KEY_TASK = "\n\nFind the value that belongs to a key of the JSON object above."
KEY_PROMPT = "\n\nKey: {}\nCorresponding value:"


def draw_json_kv(rng: Rng, size: int, depths: list[float], length: int) -> TextExample:
    """A JSON object; we show two of its pairs and ask for others (HELMET's json_kv)."""
    size += len(depths) + 2
    ids = random_uuids(rng, 2 * size)
    keys, values = ids[:size], ids[size:]
    asked = items_at(depths, size)
    shown = rng.choice(np.delete(np.arange(size), asked), 2, replace=False)
    items = [f'"{key}": "{value}"' for key, value in zip(keys, values, strict=True)]
    tail = KEY_TASK + "".join(f"{KEY_PROMPT.format(keys[i])} {values[i]}" for i in shown)
    questions = [TextQuestion(KEY_PROMPT.format(keys[i]), (values[i],), i) for i in asked]
    return TextExample("{", items, ",\n ", "}" + tail, questions)


def draw_needles(rng: Rng, size: int, depths: list[float], length: int,
                 haystack: Callable[[], Sequence[str]] | None = None, n_keys: int = 1,
                 n_values: int = 1, n_queries: int = 1, ids: bool = False) -> TextExample:
    """Needles, sentences that give a key a secret number, between other lines (RULER's niah).

    A question asks for `n_queries` keys with `n_values` values each; `n_keys` - 1 more needles lead
    astray. `haystack` gives the lines between them; without it there are only more needles. With
    `ids` keys and values are UUIDs.
    """
    n_asked = len(depths) * n_queries  # keys that are asked for
    n_others = n_keys - 1 + (0 if haystack else size)
    if ids:
        kind, keys = "code", random_uuids(rng, n_asked + n_others)
        values = random_uuids(rng, n_asked * n_values + n_others)
    else:
        kind, first = "number", random_words(rng, n_asked + n_others, 3)
        second = random_words(rng, n_asked + n_others, 2)
        keys = [f"{a}-{b}" for a, b in zip(first, second, strict=True)]
        values = random_numbers(rng, n_asked * n_values + n_others, 7)
    owners = keys[n_asked:] + np.repeat(keys[:n_asked], n_values).tolist()
    needles = [f"The secret {kind} of {key} is {value}."
               for key, value in zip(owners, values, strict=True)]
    lines: list[str] = []
    if haystack:
        source = haystack()
        begin = int(rng.integers(len(source)))
        lines = [source[(begin + i) % len(source)] for i in range(size)]
    each = n_queries * n_values  # needles of a question: one at its depth, the others anywhere
    where = rng.random(len(needles))
    where[n_others::each] = depths
    items, index = scatter(lines, needles, where)
    questions = []
    for j in range(len(depths)):
        begin = n_others + j * each
        prompt = needle_prompt(keys[j * n_queries:(j + 1) * n_queries], kind, each > 1)
        questions.append(TextQuestion(prompt, tuple(values[begin:begin + each]), index[begin]))
    head = f"Secret {kind}s are hidden in the text below. Remember them.\n\n"
    return TextExample(head, items, "\n", "", questions)


def needle_prompt(keys: list[str], kind: str, several: bool) -> str:
    names = ", ".join(keys[:-1]) + (" and " if len(keys) > 1 else "") + keys[-1]
    if several:
        return (f"\n\nWhat are the secret {kind}s of {names}? "
                f"In the text, all secret {kind}s of {names} are")
    return f"\n\nWhat is the secret {kind} of {names}? In the text, the secret {kind} of {names} is"


def draw_variables(rng: Rng, size: int, depths: list[float], length: int,
                   hops: int = 4) -> TextExample:
    """A value is handed from variable to variable in noise: which ones have it? (RULER's vt)"""
    chain = hops + 1  # variables that have one value
    names = random_codes(rng, chain * (len(depths) + 1), 5)  # the last chain is shown solved
    numbers = random_numbers(rng, len(depths) + 1, 5)
    steps = []
    for i, name in enumerate(names):
        value = f"VAR {names[i - 1]}" if i % chain else numbers[i // chain]
        steps.append(f"VAR {name} = {value}.")
    where = [np.sort(np.append(d + rng.random(hops) * (1 - d), d)) for d in depths]
    items, index = scatter([FILLER.strip()] * size, steps[:-chain], np.concatenate(where))
    prompt = ("\n\nWhich variables have the value {0}, directly or by way of others?\n"
              f"Answer: {chain} variables have the value {{0}}, namely")
    solved = f"{' '.join(steps[-chain:])}{prompt.format(numbers[-1])} {' '.join(names[-chain:])}"
    questions = [TextQuestion(prompt.format(numbers[i // chain]), tuple(names[i:i + chain]),
                              index[i], chain / 26**5) for i in range(0, len(index), chain)]
    head = f"{solved}\n\nKeep track of the variables in the text below.\n\n"
    return TextExample(head, items, " ", "", questions)


def draw_common_words(rng: Rng, size: int, depths: list[float], length: int) -> TextExample:
    """A numbered list in which ten words come often and `size` others seldom (RULER's cwe)."""
    often, seldom = (30, 3) if length >= 4096 else (6, 1)

    def numbered(frequent: list[str], rare: list[str], often: int, seldom: int) -> list[str]:
        mixed = rng.permutation(frequent * often + rare * seldom)
        return [f"{i + 1}. {word}" for i, word in enumerate(mixed)]

    words = random_words(rng, 25 + size, 3)
    answers, shown, rare = words[:10], words[10:20], words[20:]
    items = numbered(answers, rare[5:], often, seldom)
    task = "In the list below some words come more often than others. Remember them.\n"
    prompt = "\nQuestion: Which 10 words come most often in the list?\nAnswer: They are"
    solved = f"{task}{' '.join(numbered(shown, rare[:5], 3, 1))}{prompt} {' '.join(shown)}\n\n"
    return TextExample(solved + task, items, " ", "", [TextQuestion(prompt, tuple(answers))])


def draw_frequent_words(rng: Rng, size: int, depths: list[float], length: int) -> TextExample:
    """Coded words in Zipf's proportions: rank r about size * r^-2 / zeta(2) times (RULER's fwe).

    The most frequent is noise, dots. The ranks 2 to 4 come once more, so that none ties with 5.
    """
    ranks = np.arange(1, max(8, length // 50) + 1)
    counts = (size * ranks**-2.0 / (math.pi**2 / 6)).astype(int) + (ranks <= 4)
    words = ["...", *(code.lower() for code in random_codes(rng, len(ranks) - 1, 6))]
    items = rng.permutation(np.repeat(words, counts)).tolist()
    head = "Count how often each coded word stands in the text below.\n"
    prompt = ("\nQuestion: Dots aside, which three coded words stand in the text most often?\n"
              "Answer: They are")
    question = TextQuestion(prompt, tuple(words[1:4]), chance=3 / 26**6)
    return TextExample(head, items, " ", "", [question])


ICL_TEXTS = [hello + text for hello in ("", "Hello. ", "Sorry to bother you. ", "One more thing. ")
             for text in ("Where can I find a {}?", "Please send me two of your {}s.",
                          "How much is the {}?", "My {} has stopped working again.",
                          "Is there a {} for children, too?")]


def draw_icl(rng: Rng, size: int, depths: list[float], length: int, classes: int = 6,
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
    return TextExample(head, shown, "\n\n", "", questions)


def draw_rerank(rng: Rng, size: int, depths: list[float], length: int) -> TextExample:
    """Passages to rank by how many of a query's three words they share (HELMET's re-ranking).

    Of each query's passages one shares all three words, two share two, and three one.
    """
    shares = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], bool)
    n = len(depths)
    total = size + n * len(shares)
    words = np.array(random_words(rng, 3 * (n + 20), 2))
    queries, others = words[:3 * n].reshape(n, 3), words[3 * n:].reshape(20, 3)
    texts = others[rng.integers(20, size=(total, 3)), np.arange(3)]  # (total, 3)
    spots = rng.permutation(total)[:n * len(shares)].reshape(n, -1)
    names = np.array([str(i + 1) for i in rng.permutation(total)])
    discounts = [1 / math.log2(rank + 2) for rank in range(min(10, total))]  # as in nDCG@10
    questions = []
    for query, spot in zip(queries, spots, strict=True):
        texts[spot] = np.where(shares, query, texts[spot])
        relevance = np.zeros(total, int)
        relevance[spot] = shares.sum(axis=1)
        best = np.sort(relevance)[::-1]
        chance = relevance.mean() * sum(discounts) / np.dot(best[:len(discounts)], discounts)
        prompt = "\n\nQuery: Who came from {} to sell {} at the fair of {}?\nRanking:"
        by_name = dict(zip(names.tolist(), relevance.tolist(), strict=True))
        questions.append(TextQuestion(prompt.format(*query), tuple(names[spot].tolist()), None,
                                      float(chance), by_name))
    items = ["[ID: {}] Document: Traders from {} sold {} at the fair of {}.".format(name, *text)
             for name, text in zip(names, texts, strict=True)]
    head = ("Rank the passages below by how well they fit the query, the best first. Write the IDs "
            "of the best ten in this form: Ranking: ID3 > ID1 > ID2\n\n")
    return TextExample(head, items, "\n\n", "", questions)


QA_TASK = "Answer the question by the documents below, in a few words.\n\n"
FACTS = (("was born in {}", "In which town was {} born?"),
         ("learned the trade of a {}", "Which trade did {} learn?"),
         ("married {}", "Whom did {} marry?"),
         ("is buried in {}", "In which town is {} buried?"))


def draw_qa(rng: Rng, size: int, depths: list[float], length: int) -> TextExample:
    """Passages about people; a question that one of them answers (HELMET's RAG)."""
    size += len(depths)
    second = random_words(rng, size, 3)
    values = np.array(random_words(rng, size * len(FACTS), 4)).reshape(size, len(FACTS))
    people = [f"{a} {b}".title() for a, b in zip(random_words(rng, size, 2), second, strict=True)]
    items = []
    for person, row in zip(people, values, strict=True):
        told = [f"{person} {fact.format(value.title())}"
                for (fact, _), value in zip(FACTS, row, strict=True)]
        items.append(f"Document (Title: {person}): {'. '.join(told)}.")
    questions = []
    for i in items_at(depths, size):
        f = int(rng.integers(len(FACTS)))
        prompt = f"\n\nQuestion: {FACTS[f][1].format(people[i])}\nAnswer:"
        questions.append(TextQuestion(prompt, (values[i, f].title(),), i))
    return TextExample(QA_TASK, items, "\n\n", "", questions)
