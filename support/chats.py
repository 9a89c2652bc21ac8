"""Conversations as messages, {"role": "user", "content": "..."}: of a file, or made of symbols.

Built-in questions hold symbols that no text can spell, so a content may also be an array of ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from support import toy
from support.cli import choose

Message = dict[str, Any]
ROLES = {"system": "system", "user": "user", "assistant": "assistant",
         "human": "user", "gpt": "assistant"}  # the last two are ShareGPT's names
FOLLOW_UPS = 8  # questions about one context, at most
FLAGS = {None: True, 1: True, 0: False}  # of an answer: is it trained?
UNSUPPORTED = ("tools", "functions", "tool_calls", "function_call", "reasoning_content")


def read_chats(rows: Iterable[tuple[str, Any]], on_bad: str, left_out: list[str],
               encode: Callable[[list[Message]], Any], seq_len: int) -> Iterator[Any]:
    """Encode each (where, row) that has an answer in `seq_len` tokens; others go to `left_out`.

    A damaged row raises ValueError, or is left out if `on_bad` is "skip".
    """
    choose("--on-bad", on_bad, dict.fromkeys(("stop", "skip")))
    kept = 0
    for where, row in rows:
        try:
            messages = to_messages(row)
            document = encode(messages)
        except ValueError as error:
            if on_bad == "stop":
                raise ValueError(f"{where} {error}; mend it, or choose --on-bad skip") from None
            left_out.append(f"{where} {error}")
            continue
        trained = [m["content"] for m in messages if m["role"] == "assistant" and m["train"]]
        if not trained or not all(map(str.strip, trained)):  # the end of turn alone is no answer
            left_out.append(f"{where} has {'an empty' if trained else 'no'} answer")
        elif not document.loss_mask[:seq_len].any():
            left_out.append(f"{where} has no answer in {seq_len:,} tokens; choose a longer --seq")
        else:
            kept += 1
            yield document
    if not kept:
        raise ValueError(f"none of {len(left_out)} conversations can be trained on; "
                         f"{', '.join(left_out[:1])}")


def to_messages(row: dict[str, Any] | ValueError) -> list[Message]:
    """Read Hugging Face's `messages` or ShareGPT's `conversations`; others raise ValueError."""
    if isinstance(row, ValueError):
        raise row
    key, role, text = ("conversations", "from", "value")
    if row.get("messages") is not None:
        key, role, text = ("messages", "role", "content")
    try:
        turns = list(row[key])
        if row.get("system"):  # beside the turns, as some files have it
            turns.insert(0, {role: "system", text: row["system"]})
        for name in UNSUPPORTED:
            if any(part.get(name) for part in (row, *turns)):
                raise ValueError(f"has {name!r}, which no template here writes; take it out")
        messages = [{"role": ROLES[turn[role]], "content": turn[text],
                     "train": all(FLAGS[turn.get(flag)] for flag in ("weight", "train", "loss"))}
                    for turn in turns]
        "".join(message["content"] for message in messages).encode()  # refuses half a character
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"needs {key!r}, a list of turns with {role!r}, one of {', '.join(ROLES)}"
                         f", and {text!r}, a text; weight, train, loss 0 or 1; {error}") from None
    return messages


def ask_about_context(kind: str, rng: np.random.Generator, encode: Callable[[str], np.ndarray],
                      window: Callable[[int], np.ndarray],
                      max_context: int) -> Iterator[tuple[Any, Any]]:
    """Up to eight (question, answer) pairs of ids; first comes a context, of `window(n)`."""
    if kind == "value":
        pairs = toy.recall_pairs(rng, 1, int(rng.integers(2, toy.N_PAIRS + 1)))
        length = int(16 * (max_context / 16) ** rng.random())  # 16 to 32 as often as 512 to 1,024
        context = toy.scatter_pairs(rng, pairs, window(length))[0][0]
        answers = np.insert(rng.permutation(pairs[0])[:FOLLOW_UPS], 0, toy.QUESTION, axis=1)
    else:
        lines = toy.icl_lines(rng, 1, int(rng.integers(12, 60)) + FOLLOW_UPS)[0]
        context, answers = lines[:-FOLLOW_UPS].reshape(-1), lines[-FOLLOW_UPS:]
    begin = np.append(context, encode(f"\n\nThe {kind} of "))
    for answer in answers:  # a mark, the symbol that is asked about, and what belongs to it
        yield np.concatenate((begin, answer[1:2], encode("?"))), answer
        begin = encode("And of ")
