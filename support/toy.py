"""Made-up documents that teach a tiny model to look things up and to learn from examples.

Recall. A pair is a mark, a key and its value of four symbols; a question is another mark and a key.
All are special tokens (<|pair|>, <|ask|>, <|A|>, ...), so no real text has one. As ~ and ?:

    <begin> import os ~QX7KA def main(): ~CPLM3 return 0 ?CPLM3?QX7KA <end>
            a haystack of real code, with pairs scattered in it    only the answers are trained

ICL (in-context learning). A line is a mark, a symbol of one of six topics, and the topic's number,
dealt anew for every document: only the examples tell which topic has which (A.1).

    <begin>~A3~N1~X5~C3 ... <end>       A and C are one topic, which has number 3 in this document
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable

import numpy as np

SYMBOL_NAMES = string.ascii_uppercase + string.digits + string.ascii_lowercase
SYMBOL_NAMES += "!#$%&()*+,-./:;=@[]^_{}"  # 85 in all
PAIR, QUESTION, BLANK = 261, 262, ord("\n")  # token ids of the tokenizer "bytes"
SYMBOLS = np.arange(263, 263 + len(SYMBOL_NAMES), dtype=np.uint32)
N_PAIRS = 16  # of a recall document from 256 tokens on, and of every context in eval.py
VALUE_LEN = 4
PAIR_LEN = 2 + VALUE_LEN  # of a pair, and of a question with its answer
TOPICS = SYMBOLS[:24].reshape(6, 4)  # A-D, E-H, ... U-X
LABELS = SYMBOLS[26:32]  # 0-5
ICL_LINE = 3  # "~A3"


def check_symbols(specials: dict[str, int], what: str) -> None:
    """Raise ValueError where a tokenizer has no symbols for made-up documents."""
    if "<|pair|>" not in specials:
        raise ValueError(f"{what} needs special tokens of the tokenizer 'bytes'; leave it out")


def recall_pairs(rng: np.random.Generator, batch: int, n_pairs: int) -> np.ndarray:
    """Draw keys and values: (batch, n_pairs, 1 + VALUE_LEN) tokens.

    In a document every symbol stands in one pair only, once. So one symbol tells which one follows.
    Otherwise the model would have to compare two symbols, or a symbol and its place, and models
    this small learn that late, imprecisely or never (docs/LOG.md).
    """
    n_symbols = n_pairs * (1 + VALUE_LEN)
    if n_symbols > len(SYMBOLS):
        raise ValueError(f"{n_pairs} pairs need {n_symbols} symbols, and there are {len(SYMBOLS)}")
    dealt = rng.permuted(np.tile(SYMBOLS, (batch, 1)), axis=1)  # each row in another order
    return dealt[:, :n_symbols].reshape(batch, n_pairs, 1 + VALUE_LEN)


def scatter_pairs(rng: np.random.Generator, pairs: np.ndarray,
                  haystack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scatter pairs (B, n, 5), in order, in haystacks (B, m) -> (B, m + 6n), starts (B, n)."""
    batch, n_pairs, _ = pairs.shape
    gaps = np.sort(rng.integers(haystack.shape[1] + 1, size=(batch, n_pairs)), axis=1)
    marked = np.concatenate((np.full((batch, n_pairs, 1), PAIR, np.uint32), pairs), axis=2)
    contexts = [np.insert(row, np.repeat(gap, PAIR_LEN), inserted.reshape(-1))
                for row, gap, inserted in zip(haystack, gaps, marked, strict=True)]
    return np.stack(contexts), gaps + PAIR_LEN * np.arange(n_pairs)


def pairs_and_room(rng: np.random.Generator, batch: int, length: int) -> tuple[np.ndarray, int]:
    """A pair to every 16 tokens, up to 16 pairs, and the tokens left for a haystack."""
    n_pairs = min(length // 16, N_PAIRS)
    return recall_pairs(rng, batch, n_pairs), length - 2 - 2 * n_pairs * PAIR_LEN


def recall_rows(rng: np.random.Generator, pairs: np.ndarray, haystack: np.ndarray, bos: int,
                eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents: ids (B, length), and the loss mask (length,) that they share: answers alone."""
    batch, n_pairs, _ = pairs.shape
    contexts, _ = scatter_pairs(rng, pairs, haystack)
    order = rng.permuted(np.tile(np.arange(n_pairs), (batch, 1)), axis=1)
    asked = np.take_along_axis(pairs, order[:, :, None], axis=1)
    questions = np.concatenate((np.full((batch, n_pairs, 1), QUESTION, np.uint32), asked), axis=2)
    edge = np.ones((batch, 1), dtype=np.uint32)
    ids = np.concatenate((edge * bos, contexts, questions.reshape(batch, -1), edge * eos), axis=1)
    is_answer = np.tile(np.arange(PAIR_LEN) >= 2, n_pairs)
    return ids, np.concatenate((np.zeros(1 + contexts.shape[1], bool), is_answer, [False]))


def icl_lines(rng: np.random.Generator, batch: int, n_lines: int) -> np.ndarray:
    """Labelled examples, (batch, n_lines, ICL_LINE), in rounds that have every topic once."""
    n = len(TOPICS)
    rounds = -(-n_lines // n)
    topics = rng.permuted(np.tile(np.arange(n), (batch, rounds, 1)), axis=2)
    topics = topics.reshape(batch, -1)[:, :n_lines]  # (batch, rounds, n) -> (batch, n_lines)
    labels = rng.permuted(np.tile(LABELS, (batch, 1)), axis=1)
    symbols = TOPICS[topics[:, :, None], rng.integers(TOPICS.shape[1], size=(batch, n_lines, 1))]
    label = np.take_along_axis(labels, topics, axis=1)[:, :, None]
    return np.concatenate((np.full_like(label, PAIR), symbols, label), axis=2)


def icl_rows(rng: np.random.Generator, batch: int, length: int, bos: int,
             eos: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for ICL. In the first round labels can't be known yet: they are not trained."""
    n_lines, spare = divmod(length - 2, ICL_LINE)
    lines = icl_lines(rng, batch, n_lines).reshape(batch, -1)
    edge = np.ones((batch, 1), dtype=np.uint32)
    ids = np.concatenate((edge * bos, lines, np.tile(edge * BLANK, spare), edge * eos), axis=1)
    position = np.arange(length) - 1
    is_label = position % ICL_LINE == 2
    return ids, is_label & (position >= len(TOPICS) * ICL_LINE) & (position < n_lines * ICL_LINE)


def read_typed(text: str, encode: Callable[[str], np.ndarray]) -> str | np.ndarray:
    """Somebody's line in a chat: "~KABCD" is a pair, "value of K?" asks for K, all else is text."""
    pieces = re.split(r"(~[A-Za-z0-9]{5}\b|(?<=value of )[A-Za-z0-9](?=\?))", text)
    if len(pieces) == 1:
        return text
    ids = [encode(pieces[0])]
    for found, behind in zip(pieces[1::2], pieces[2::2], strict=True):
        symbols = [SYMBOLS[SYMBOL_NAMES.index(name)] for name in found.lstrip("~")]
        ids += [np.array([PAIR] * (found[0] == "~") + symbols, np.uint32), encode(behind)]
    return np.concatenate(ids)
