"""From tasks as text to examples in tokens: of the length asked for, or ready prompts from a file.

A line of a JSONL file may be

    RULER's      {"input", "outputs"}, "answer_prefix" if there
    JSON pairs   {"context", "question", "answer", "demos"}: two demonstrations are shown
    passages     {"question", "answers", "ctxs": [{"title", "text"}]}
    re-ranking   {"query", "ctxs": [{"id", "text", "label"}]}

A `tokenizer` here is anything with `encode`, `decode` and `begin`, the tokens that begin a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .tasks import FILLER, KEY_PROMPT, KEY_TASK, TextExample, TextQuestion
from .texts import read_rows


class Encoded(NamedTuple):
    """An example in tokens; the fields of a question are those of eval.Question."""

    context_ids: np.ndarray
    questions: list[tuple[np.ndarray, tuple[str, ...], float | None, float, dict[str, int] | None]]
    budget: int  # tokens that an answer may have


def encode_example(tokenizer: Any, example: TextExample, spare: int = 0) -> Encoded:
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
    longest = max(len(tokenizer.encode(", ".join(q.answers))) for q in example.questions)
    return Encoded(ids.astype(np.uint32), questions, longest + longest // 4 + 4)


def spread_depths(n: int, questions: int) -> list[list[float]]:
    """A depth in 0..1 for each question about each of `n` contexts, spread evenly in any number."""
    golden_ratio = (math.sqrt(5) - 1) / 2
    return ((0.5 + np.arange(n * questions) * golden_ratio) % 1).reshape(n, questions).tolist()


def fit(name: str, draw: Callable[..., TextExample], make_rng: Callable[[], np.random.Generator],
        depths: list[float], tokenizer: Any, length: int) -> Encoded:
    """Draw the largest example that fits into `length` tokens, with a question and an answer.

    Every drawing starts from the same random numbers. We guess the next size from the tokens that
    one more unit of size has taken so far. If one more unit would be too much but over 3% of the
    length are still empty, idle sentences before the context fill them.
    Raises ValueError if even the size 1 is too long.
    """

    def make(size: int, spare: int = 0) -> tuple[Encoded, int]:
        made = encode_example(tokenizer, draw(make_rng(), size, depths), spare)
        longest = max(len(prompt) for prompt, *_ in made.questions)
        return made, len(made.context_ids) + longest + made.budget

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
def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file. Raises ValueError for a line that is none."""
    lines = []
    for where, row in read_rows(str(path), "jsonl"):
        if isinstance(row, ValueError):
            raise ValueError(f"{where} {row}")
        lines.append(row)
    if not lines:
        raise ValueError(f"{path} holds no JSON objects, one a line")
    return lines


def file_examples(path: Path, tokenizer: Any, lines: list[int]) -> list[Encoded]:
    """Some lines of a file as examples. Raises ValueError for a line that has no known format."""
    examples = []
    for i in lines:
        try:
            example = _parse(read_lines(path)[i])
            made = encode_example(tokenizer, example)
            longest = max(len(tokenizer.encode(a)) for a in example.questions[0].answers)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} entry {i + 1} is of no known format ({error!r}); "
                             "support/fitting.py lists them") from None
        examples.append(made._replace(budget=max(100, 2 * longest)))
    return examples


def _parse(row: dict[str, Any]) -> TextExample:
    """A line as a context, and the question about it."""
    relevance = None
    if "outputs" in row:
        context, prompt, answers = row["input"], row.get("answer_prefix") or "\n", row["outputs"]
    elif "query" in row:
        relevance = {str(c["id"]): int(c["label"]) for c in row["ctxs"]}
        answers = " > ".join(sorted(relevance, key=lambda i: -relevance[i])[:10])
        texts = [f"[ID: {c['id']}] Document: {c['text']}" for c in row["ctxs"]]
        context = ("Rank the documents by relevance to the query, in this form: "
                   "Ranking: ID3 > ID1 > ID2\n\n" + "\n\n".join(texts))
        prompt = f"\n\nQuery: {row['query']}\nRanking:"
    elif "ctxs" in row:
        texts = [f"Document (Title: {c['title']}): {c['text']}" for c in row["ctxs"]]
        task = "Answer the question by the documents below, in a few words.\n\n"
        context, answers = task + "\n\n".join(texts), row["answers"]
        prompt = f"\n\nQuestion: {row['question']}\nAnswer:"
    else:
        shown = [f"{KEY_PROMPT.format(key)} {value}" for key, value in row["demos"][:2]]
        context, answers = row["context"] + KEY_TASK + "".join(shown), row["answer"]
        prompt = KEY_PROMPT.format(row["question"])
    answers = (answers,) if isinstance(answers, str) else tuple(answers)
    return TextExample(context, [TextQuestion(prompt, answers, relevance=relevance)])
