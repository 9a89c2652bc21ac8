"""Conversations as messages: read from rows of files, or made from contexts of symbols.

A message is {"role": "user", "content": "..."}. Built-in questions hold symbols that no text can
spell, so a content may also be token ids, an array of uint32.

`ask_about_context` asks about the contexts of recall and ICL documents (support/toy.py). Here ~ and
? stand for the marks before a pair and before an answer, and A ... 7 for the symbols:

    value     ~QX7KA def main(): ~CPLM3 ... The value of C?        ?CPLM3    And of Q?    ?QX7KA
    label     ~A3~N7~X5~C3 ... The label of N?                     ~N7       And of B?    ~B3

The answers have the form that the model knows from those documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from support import toy

Message = dict[str, Any]
ROLES = {"system": "system", "user": "user", "assistant": "assistant",
         "human": "user", "gpt": "assistant"}  # these two are ShareGPT's names
FOLLOW_UPS = 8  # questions about one context, at most


@dataclass
class ChatReport:
    """What became of the rows of a file."""

    read: int = 0
    without_answer: int = 0  # left out: there is nothing to train on
    bad: list[str] = field(default_factory=list)  # where a damaged row stands, and what is wrong

    def __str__(self) -> str:
        if not self.read:
            return ""
        examples = "".join(f"\n  {bad}" for bad in self.bad[:5])
        return (f"; left out {self.without_answer:,} without an answer and {len(self.bad):,} "
                f"damaged{examples}")


def read_chats(rows: Iterable[tuple[str, Any]], on_bad: str,
               report: ChatReport) -> Iterator[list[Message]]:
    """The conversations of (where, row) that have an answer.

    A damaged row raises ValueError, or is counted and left out if `on_bad` is "skip".
    """
    if on_bad not in ("stop", "skip"):
        raise ValueError(f"on_bad={on_bad!r} is unknown; choose stop or skip")
    for where, row in rows:
        report.read += 1
        try:
            if isinstance(row, ValueError):
                raise row
            messages = to_messages(row)
        except ValueError as error:
            if on_bad == "stop":
                raise ValueError(f"{where} {error}; mend it, or choose --on-bad skip") from None
            report.bad.append(f"{where} {error}")
            continue
        if any(m["role"] == "assistant" and m["content"].strip() for m in messages):
            yield messages
        else:
            report.without_answer += 1
    if report.read == report.without_answer + len(report.bad):
        raise ValueError(f"none of {report.read} conversations can be trained on: "
                         f"{report.without_answer} have no answer, {len(report.bad)} are damaged")


def to_messages(row: dict[str, Any]) -> list[Message]:
    """Read Hugging Face's `messages` or ShareGPT's `conversations`; others raise ValueError."""
    key, role_key, text_key = "messages", "role", "content"
    if row.get(key) is None:
        key, role_key, text_key = "conversations", "from", "value"
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise ValueError("has no list of turns as 'messages' or 'conversations'; its keys are "
                         f"{', '.join(row) or 'none'}")
    messages = []
    for i, turn in enumerate(turns):
        turn = turn if isinstance(turn, dict) else {}
        role, text = turn.get(role_key), turn.get(text_key)
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
            raise ValueError(f"{key}[{i}] needs {role_key!r}, one of {', '.join(ROLES)}, "
                             f"and {text_key!r}, a text")
        text.encode()  # raises for half a character, which JSON can spell
        messages.append({"role": ROLES[role], "content": text})
    return messages


def ask_about_context(kind: str, rng: np.random.Generator, encode: Callable[[str], np.ndarray],
                      window: Callable[[int], np.ndarray],
                      max_context: int) -> list[tuple[Any, Any]]:
    """Up to eight (question, answer) pairs of ids; the first question begins with the context.

    `window(n)` gives n tokens of text, (1, n), in which the pairs of a "value" context are hidden.
    """
    if kind == "value":
        pairs = toy.recall_pairs(rng, 1, int(rng.integers(2, toy.N_PAIRS + 1)))
        length = int(16 * (max_context / 16) ** rng.random())  # 16 to 32 as often as 512 to 1,024
        contexts, _ = toy.scatter_pairs(rng, pairs, window(length))
        context = contexts[0]
        asked = rng.permutation(pairs[0])[:FOLLOW_UPS]
        answers = [np.append([toy.QUESTION], pair) for pair in asked]
    else:
        lines = toy.icl_lines(rng, 1, int(rng.integers(12, 60)) + FOLLOW_UPS)[0]
        context = lines[:-FOLLOW_UPS].reshape(-1)
        answers = list(lines[-FOLLOW_UPS:])
    turns = []
    begin = np.append(context, encode(f"\n\nThe {kind} of "))
    for answer in answers:  # a mark, the symbol that is asked about, and what belongs to it
        turns.append((np.concatenate((begin, answer[1:2], encode("?"))), answer))
        begin = encode("And of ")
    return turns
