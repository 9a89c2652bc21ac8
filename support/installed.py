"""Texts that every Python installation brings along: code, prose, and names to ask about.

A package of the standard library or of site-packages is what the paper calls a repository (section
3.1). One repository in eight is never trained on: validation and evaluation read only those.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


def generator(seed: int, *names: Any) -> np.random.Generator:
    """A random generator of its own for every use, so that no use disturbs another."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] < 32


def list_repositories(held_out: bool = False) -> dict[str, list[Path]]:
    """Packages to train on, or held out, with their Python files, in one order everywhere.

    Single-file modules of the standard library together are one more repository, "modules".
    """
    paths = sysconfig.get_paths()
    stdlib = Path(paths["stdlib"])
    found = {"modules": sorted(stdlib.glob("*.py"))}
    for root in dict.fromkeys([stdlib, Path(paths["purelib"]), Path(paths["platlib"])]):
        for entry in root.iterdir() if root.is_dir() else ():
            if entry.is_dir() and entry.name not in ("site-packages", "dist-packages"):
                found[entry.name] = sorted(entry.rglob("*.py"))
    names = [name for name in sorted(found) if found[name] and is_held_out(name) == held_out]
    return {name: found[name] for name in names}


def read_text(path: Path) -> str:
    """A source file's text; what is not UTF-8 (a few old test files) counts as empty."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def join_files(files: Iterable[Path], enough: int = 2**20) -> str:
    """Source files in one text, until it is long enough: a few packages are far too long."""
    texts: list[str] = []
    for path in files:
        texts.append(read_text(path))
        if sum(map(len, texts)) > enough:
            break
    return "\n".join(texts)


def parse(path: Path) -> ast.Module:
    """A Python file's syntax tree; an empty one where it can't be parsed."""
    with warnings.catch_warnings():  # old files use escapes that Python now warns about
        warnings.simplefilter("ignore")
        try:
            return ast.parse(read_text(path))
        except (SyntaxError, ValueError, RecursionError):
            return ast.Module([], [])


def functions_and_classes(path: Path) -> list[ast.FunctionDef | ast.ClassDef]:
    """Those at the top level of a file."""
    return [node for node in parse(path).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def source_texts(path: Path) -> Iterator[str]:
    """The source text of each function and class, decorators included."""
    lines = read_text(path).split("\n")  # as the parser counts: a form feed ends no line
    for node in functions_and_classes(path):
        begin = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        yield "\n".join(lines[begin - 1:node.end_lineno]) + "\n"


def books() -> Iterator[str]:
    """Prose: Python's language reference, then each package's docstrings, joined."""
    from pydoc_data.topics import topics

    yield "\n\n".join(topics[name] for name in sorted(topics))
    for files in list_repositories().values():
        chapters = [ast.get_docstring(parse(path)) or "" for path in files[:200]]
        yield "\n\n".join(text for text in chapters if len(text) > 200)


@cache
def standard_names(held_out: bool) -> tuple[tuple[str, bool, str], ...]:
    """The standard library's public (dotted name, is it a class?, first line of its docstring)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    others = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
    names = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if others & {*parts} or parts[0].startswith("_") or is_held_out(parts[0]) != held_out:
            continue
        module = ".".join(part for part in parts if part != "__init__")
        for node in functions_and_classes(path):
            if not node.name.startswith("_"):
                summary = (ast.get_docstring(node) or "").partition("\n")[0].strip()
                names.append((f"{module}.{node.name}", isinstance(node, ast.ClassDef), summary))
    return tuple(names)


def ask_about_name(kind: str, rng: np.random.Generator, held_out: bool) -> list[tuple[str, str]]:
    """A question about a standard library name, and the answer: "kind", "package" or "summary"."""
    wanted = bool(rng.integers(2))  # as many classes as functions, so that chance is a half
    names = [(name, is_class, summary) for name, is_class, summary in standard_names(held_out)
             if is_class == wanted and (summary or kind != "summary")]
    name, _, summary = names[int(rng.integers(len(names)))]
    return [{"kind": (f"{name}: a class or a function?", "class" if wanted else "function"),
             "package": (f"{name} is in which package?", name.partition(".")[0]),
             "summary": (f"What does {name} do?", summary)}[kind]]
