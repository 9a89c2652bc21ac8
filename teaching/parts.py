"""What an exercise's checks are made of: parts, cases, comparison, and drawing."""

from __future__ import annotations

import itertools
import random
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Function = Callable[..., Any]
Look = Callable[[Function, list[Any]], list[Any]]  # (answer, cases) -> what it did in each


class Raised(str):
    """The error that an answer raised, in words; `where` it did, if that is a student's file."""

    where = ""


def raised(error: BaseException) -> Raised:
    """An answer may raise anything, and even end the program."""
    told = Raised(f"{type(error).__name__}: {error}")
    for frame in traceback.extract_tb(error.__traceback__):
        if re.match(r"\d\d_", name := Path(frame.filename).name):
            told.where = f" ({name}, line {frame.lineno}: {frame.line})"
    return told


def equal(yours: Any, right: Any, tolerance: float = 1e-9) -> bool:
    """Whether two answers are the same: tensors, numbers, or lists and dicts of them."""
    if isinstance(yours, Raised | Exception) or isinstance(right, Raised | Exception):
        return type(yours) is type(right) and str(yours) == str(right)
    if isinstance(right, dict):
        return (isinstance(yours, dict) and yours.keys() == right.keys()
                and all(equal(yours[key], right[key], tolerance) for key in right))
    if isinstance(right, str) or right is None:
        return bool(type(yours) is type(right) and yours == right)
    try:
        ours, theirs = (torch.as_tensor(x).double() for x in (yours, right))
    except (TypeError, ValueError, RuntimeError):  # lists of lists of different lengths, of strings
        return (isinstance(yours, list | tuple) and isinstance(right, list | tuple)
                and len(yours) == len(right)
                and all(equal(a, b, tolerance) for a, b in zip(yours, right, strict=True)))
    same = ours.shape == theirs.shape
    return same and torch.allclose(ours, theirs, tolerance, tolerance, equal_nan=True)


def each(call: Callable[[Function, Any], Any]) -> Look:
    """Look at one case after another; what an answer raises is what it does."""
    def look(function: Function, cases: list[Any]) -> list[Any]:
        found: list[Any] = []
        for case in cases:
            try:
                found.append(call(function, case))
            except NotImplementedError as error:
                found.append(error)
            except (Exception, SystemExit) as error:
                found.append(raised(error))
        return found
    return look


def side_by_side(case: Any, yours: Any, right: Any) -> str:
    return f"yours  {show(yours)}\nright  {show(right)}"


def show(value: Any) -> str:
    """A value in one line, as short as it can be."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {show(x)}" for key, x in value.items())
    if isinstance(value, list | tuple):
        return "(" + ", ".join(show(x) for x in value) + ")"
    return f"{value:,}" if type(value) is int else str(value)


@dataclass(frozen=True, eq=False)
class Part:
    """One thing that an exercise asks for."""

    asks: str
    function: str
    points: int
    cases: Callable[[], list[Any]]  # the smallest first; always the same
    look: Look
    draw: Callable[[Any], str]  # a case
    compare: Callable[[Any, Any, Any], str] = side_by_side  # (case, yours, right)
    accept: Callable[[Any, Any, Any], bool] = lambda case, yours, right: equal(yours, right)
    right: Look | None = None  # None: what the reference does


@dataclass(frozen=True)
class Exercise:
    number: str
    title: str
    parts: tuple[Part, ...]


# --- Packs, small to large, and their pictures ------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz" * 4


def compositions(n: int) -> Iterator[tuple[int, ...]]:
    """All ways to fill n tokens with documents: (2,), (1, 1) for n = 2."""
    for cuts in range(n):
        for places in itertools.combinations(range(1, n), cuts):
            ends = (0, *places, n)
            yield tuple(b - a for a, b in itertools.pairwise(ends))


def random_doc_lens(rng: random.Random, tokens: int) -> tuple[int, ...]:
    """Documents of random lengths that fill `tokens`."""
    places = sorted(rng.sample(range(1, tokens), rng.randint(0, min(6, tokens - 1))))
    return tuple(b - a for a, b in itertools.pairwise((0, *places, tokens)))


def packs(largest: int = 6) -> list[tuple[int, ...]]:
    """Every pack of at most `largest` tokens, then some random ones."""
    rng = random.Random(0)
    small = [lens for n in range(1, largest + 1) for lens in compositions(n)]
    return small + [random_doc_lens(rng, rng.randint(10, 40)) for _ in range(10)]


def with_bars(cells: Sequence[Any], doc_lens: Sequence[int]) -> str:
    """Cells of two columns, with a bar where a document ends: a b c | d | e f g h."""
    ends, line = set(itertools.accumulate(doc_lens)), ""
    for i, cell in enumerate(cells, 1):
        line += f"{cell!s:>3}" + (" |" if i in ends and i < len(cells) else "  ")
    return line.rstrip()


def draw_documents(doc_lens: Sequence[int]) -> str:
    """The tokens of a pack as letters, a letter for each document."""
    letters = [LETTERS[i] for i, n in enumerate(doc_lens) for _ in range(n)]
    return f"doc_lens  {tuple(doc_lens)}\ntokens    {with_bars(letters, doc_lens)}"


def compare_rows(doc_lens: Sequence[int], yours: Any, right: Any) -> str:
    """Two rows with a cell for each token, and a mark below where they differ."""
    rows = [x.tolist() if isinstance(x, torch.Tensor) else x for x in (yours, right)]
    if not all(isinstance(row, list | tuple) and len(row) == sum(doc_lens) for row in rows):
        return side_by_side(None, *rows)
    cells = [["." if x == -100 else x for x in row] for row in rows]
    marks = ["^" if a != b else "" for a, b in zip(*cells, strict=True)]
    below = with_bars(marks, doc_lens).replace("|", " ").rstrip()
    return (f"yours     {with_bars(cells[0], doc_lens)}\n"
            f"right     {with_bars(cells[1], doc_lens)}\n          {below}")
