"""From tasks as text to examples in tokens: of the length asked for, or ready prompts from a file.

The lines of a JSONL file may be

    RULER's      {"input", "outputs"}, "answer_prefix" if there
    HELMET's     {"context", "query" or "question", "outputs" or "answer"}, with "demos" of pairs
    passages     {"question", "answers", "ctxs": [{"title", "text"}]}
    re-ranking   {"query", "ctxs": [{"id", "title", "text", "label"}]}

A `tokenizer` here is anything with `encode`, `decode` and `begin`, the tokens that begin a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .scores import RAG, RERANK, Rule, contains, for_file, normalize
from .tasks import FILLER, KEY_PROMPT, KEY_TASK, TextExample, TextQuestion
from .texts import read_rows


class Encoded(NamedTuple):
    """An example in tokens; the fields of a question are those of eval.Question."""

    context_ids: np.ndarray
    questions: list[tuple[np.ndarray, tuple[str, ...], float | None, float, dict[str, int] | None]]
    rule: Rule


def encode_example(tokenizer: Any, example: TextExample, rule: Rule, spare: int = 0) -> Encoded:
    """Turn text into tokens, behind `spare` idle ones, and an answer's place into its depth."""
    filler = tokenizer.encode(FILLER * (1 + spare))[:spare]
    before = len(tokenizer.decode(filler))  # in characters
    questions = []
    for q in example.questions:
        depth = None
        if q.item is not None:
            place = before + example.context.index(q.item) + q.item.index(q.answers[0])
            depth = place / (before + len(example.context))
        questions.append((tokenizer.encode(q.prompt), q.answers, depth, q.chance, q.relevance))
    ids = np.concatenate((tokenizer.begin, filler, tokenizer.encode(example.context)))
    return Encoded(ids.astype(np.uint32), questions, rule)


def spread_depths(n: int, questions: int) -> list[list[float]]:
    """A depth in 0..1 for each question about each of `n` contexts, spread evenly in any number."""
    golden_ratio = (math.sqrt(5) - 1) / 2
    return ((0.5 + np.arange(n * questions) * golden_ratio) % 1).reshape(n, questions).tolist()


def fit(name: str, draw: Callable[..., TextExample], make_rng: Callable[[], np.random.Generator],
        depths: list[float], tokenizer: Any, length: int, rule: Rule) -> Encoded:
    """Draw the largest example that fits into `length` tokens, with a question and an answer.

    Every drawing starts from the same random numbers. We guess the next size from the tokens that
    one more unit of size has taken so far. If one more unit would be too much but over 3% of the
    length are still empty, idle sentences fill them. Raises ValueError if size 1 is too long.
    """

    def make(size: int, spare: int = 0) -> tuple[Encoded, int]:
        made = encode_example(tokenizer, draw(make_rng(), size, depths), rule, spare)
        longest = max(len(prompt) for prompt, *_ in made.questions)
        return made, len(made.context_ids) + longest + rule.budget

    low, high, per_unit = 1, math.inf, 8.0  # the size `low` fits, `high` does not
    best, used = make(low)
    if used > length:
        raise ValueError(f"task {name} needs {used} tokens at the least with this tokenizer, "
                         f"got {length}; choose longer lengths")
    while used < 0.99 * length and high - low > 1:
        size = int(min(low + max(1, int((length - used) / per_unit)), high - 1))
        made, tokens = make(size)
        per_unit = max(1e-3, (tokens - used) / (size - low)) * 1.001
        if tokens <= length:
            low, used, best = size, tokens, made
        else:
            high = size
    return best if used >= 0.97 * length else make(low, length - used)[0]


@cache
def read_prompts(path: Path) -> tuple[Rule, list[TextExample]]:
    """How a JSONL file is judged, and what it asks. Raises ValueError for a line of no format."""
    rules, prompts = set(), []
    for where, row in read_rows(str(path), "jsonl"):
        try:
            if isinstance(row, ValueError):
                raise row
            rules.add(rule := for_file(path, row))
            prompts.append(_parse(row, rule))
        except ValueError as error:
            raise ValueError(f"{where} {error}") from None
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{where} is of no known format ({error!r}); support/fitting.py "
                             "lists them") from None
    if len(rules) != 1:
        raise ValueError(f"{path} holds no JSON objects of one format, one a line")
    return rules.pop(), prompts


def encode_prompt(tokenizer: Any, example: TextExample, rule: Rule) -> Encoded:
    """A ready prompt in tokens, encoded as a whole. Its last ones stand for the question."""
    made = encode_example(tokenizer, example, rule)
    ids, cut = made.context_ids, max(1, len(made.context_ids) - 64)
    return made._replace(context_ids=ids[:cut], questions=[(ids[cut:], *made.questions[0][1:])])


def _parse(row: Any, rule: Rule) -> TextExample:
    """A line as a prompt, and a question that adds only the answers."""
    answers, relevance = row.get("outputs", row.get("answers", row.get("answer"))), None
    question, documents = row.get("query", row.get("question")), ""
    for c in row.get("ctxs", []):
        documents += f"[ID: {c.get('id')}] " * (rule is RERANK) + "Document"
        documents += f" (Title: {c.get('title')})" * bool(c.get("title")) + f": {c['text']}\n\n"
    if rule is RERANK:
        relevance = {str(c["id"]): int(c["label"]) for c in row["ctxs"]}
        answers = " > ".join(sorted(relevance, key=lambda i: -relevance[i])[:10])
        text = ("Rank the documents by relevance to the query, in this form: "
                "Ranking: ID3 > ID1 > ID2\n\n" + documents + "Query: " + question + "\nRanking:")
    elif rule is RAG:
        text = ("Answer the question by the documents below, in a few words.\n\n" + documents
                + "Question: " + question + "\nAnswer:")
    elif "input" in row and "outputs" in row:
        text = row["input"] + (row.get("answer_prefix") or "")
    elif "demos" in row:
        shown = [f"{KEY_PROMPT.format(key)} {value}" for key, value in row["demos"][:2]]
        text = row["context"] + KEY_TASK + "".join(shown) + KEY_PROMPT.format(question)
    elif "type_needle_v" in row:
        text = row["context"] + f"\n\nWhich {row['type_needle_v']} belong to {question}? They are"
    else:
        text = row["context"] + "\n\nQuestion: " + question + "\nAnswer:"
    flat = answers if isinstance(answers, list) else [answers]
    flat = [a for each in flat for a in (each if isinstance(each, list) else [each])]
    compared = normalize if rule.score is contains else str.strip
    if not all(isinstance(a, str) and a.strip() for a in flat) or not any(map(compared, flat)):
        raise ValueError(f"has the answers {answers!r}; give one or more texts, none of them empty")
    return TextExample(text, [TextQuestion("", tuple(flat), relevance=relevance)])
