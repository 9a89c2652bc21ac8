"""Pictures of scores and of packed sequences, and text as it is written.

    draw_scores, draw_recall, compare_files      evaluations, as eval.py writes them
    format_lengths, picture, draw_packed         document lengths of packed sequences
    print_tokens                                 what a model writes, as it comes

A function that draws returns False, or None, where matplotlib (the `plots` extra) is not installed.
"""

from __future__ import annotations

import codecs
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .cli import format_length
from .scores import compare, format_comparison

# --- 1. Scores ------------------------------------------------------------------------------------


def _pyplot() -> Any:
    """matplotlib's pyplot, drawing to files, or None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    figure.clear()


def _draw_curves(axes: Any, evaluations: Sequence[dict[str, Any]], task: str, lengths: list[int],
                 real: Sequence[tuple[str, int]] = ()) -> str:
    """Draw one task: score by length with its interval, a line a model; returns the counts as text.

    The dashed line is chance, and a star marks each (task, length) in `real`.
    """
    for i, evaluation in enumerate(evaluations):
        rows = [r for r in evaluation["results"] if r["task"] == task]
        x = [lengths.index(r["length"]) for r in rows]
        below = [max(0, r["score"] - r["low"]) for r in rows]
        above = [max(0, r["high"] - r["score"]) for r in rows]
        axes.errorbar(x, [r["score"] for r in rows], [below, above], marker="o", markersize=4,
                      capsize=3, label=evaluation["model"], color=f"C{i}")
    axes.plot(x, [r["chance"] for r in rows], "--", color="gray", linewidth=1, label="chance")
    for j, length in enumerate(lengths):
        if (task, length) in real:
            axes.text(j, 1.0, "*", ha="center", va="center", fontsize=14)
    axes.set(xticks=range(len(lengths)), xticklabels=map(format_length, lengths),
             ylim=(-0.03, 1.05))
    axes.grid(alpha=0.3)
    return ", ".join(str(n) for n in sorted({r["n"] for r in rows}))


def draw_scores(evaluations: Sequence[dict[str, Any]], path: Path,
                real: Sequence[tuple[str, int]] = ()) -> bool:
    """Draw a panel for each task: score by length, a line a model."""
    pyplot = _pyplot()
    if pyplot is None:
        return False
    results = evaluations[0]["results"]
    names = list(dict.fromkeys(r["task"] for r in results))
    lengths = sorted({r["length"] for r in results})
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, grid = pyplot.subplots(lines, columns, squeeze=False, sharey=True, layout="constrained",
                                   figsize=(max(4.5, 3.1 * columns), 0.8 + 2.3 * lines))
    for axes, name in zip(grid.flat, names, strict=False):
        counts = _draw_curves(axes, evaluations, name, lengths, real)
        axes.set_title(f"{Path(name).stem} (n = {counts})", fontsize=9)
        axes.tick_params(labelsize=7)
    for axes in list(grid.flat)[len(names):]:
        axes.set_visible(False)
    figure.supxlabel("length (tokens)", fontsize=9)
    figure.supylabel("score, with 95% interval", fontsize=9)
    handles, texts = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=len(handles), fontsize=8)
    _save(figure, path)
    return True


def draw_recall(evaluations: Sequence[dict[str, Any]], path: Path, task: str = "recall") -> bool:
    """Draw a task by length, one line a model, and below it a panel a model by length and depth.

    If the models were not asked about that task, draw all the others by length.
    """
    pyplot = _pyplot()
    if pyplot is None:
        return False
    lengths = [r["length"] for r in evaluations[0]["results"] if r["task"] == task]
    if not lengths:
        return draw_scores(evaluations, path)
    columns = len(evaluations)
    figure = pyplot.figure(figsize=(3.2 * max(columns, 2), 6.2), layout="constrained")
    grid = figure.add_gridspec(2, columns, height_ratios=(3, 2))
    curve = figure.add_subplot(grid[0, :])
    counts = _draw_curves(curve, evaluations, task, lengths)
    title = "Recall of 16 pairs in held-out code" if task == "recall" else Path(task).stem
    curve.set(xlabel="context length (tokens)", ylabel=f"{Path(task).stem}, with 95% interval",
              title=f"{title}, n = {counts} each")
    curve.legend(title="model")
    for i, evaluation in enumerate(evaluations):
        rows = [r["by_depth"] for r in evaluation["results"] if r["task"] == task]
        depths = np.array(rows, float).T  # None -> nan; (length, depth) -> (depth, length)
        heat = figure.add_subplot(grid[1, i])
        image = heat.imshow(depths, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        heat.set(title=evaluation["model"], xticks=range(len(lengths)),
                 xticklabels=map(format_length, lengths),
                 yticks=range(5), yticklabels=[f"{20 * b}-{20 * b + 20}%" for b in range(5)])
        heat.tick_params(labelsize=7)
        if i == 0:
            heat.set_ylabel("depth of the answer")
    figure.colorbar(image, ax=figure.axes[1:], label="score", fraction=0.02)
    _save(figure, path)
    return True


def draw_evaluation(evaluation: dict[str, Any], folder: Path) -> bool:
    """Draw all tasks of an evaluation by length, and one that has depths by depth."""
    deep = [r["task"] for r in evaluation["results"] if any(s is not None for s in r["by_depth"])]
    if deep:
        task = "recall" if "recall" in deep else deep[0]
        draw_recall([evaluation], folder / f"{evaluation['model']}-depth.png", task)
    return draw_scores([evaluation], folder / f"{evaluation['model']}.png")


def compare_files(names: str, out: str = "") -> None:
    """Print and draw two evaluations, "A.json,B.json", and say which differences are real."""
    paths = [Path(name) for name in names.split(",")]
    if len(paths) != 2:
        raise ValueError(f"--compare {names!r} must name two results, as A.json,B.json")
    try:
        a, b = (json.loads(path.read_text()) for path in paths)
        rows = compare(a, b)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"--compare {names}: not two results of eval.py ({error!r})") from None
    if a["model"] == b["model"]:
        a, b = a | {"model": f"{a['model']} (A)"}, b | {"model": f"{b['model']} (B)"}
    print(format_comparison(a["model"], b["model"], rows))
    figure = Path(out or paths[1].parent) / f"{paths[0].stem}-{paths[1].stem}.png"
    drawn = draw_scores([a, b], figure, [(r["task"], r["length"]) for r in rows if r["real"]])
    print(f"figure: {figure}" if drawn else "no figure: install the `plots` extra")


# --- 2. Packed sequences --------------------------------------------------------------------------


def format_lengths(lens: np.ndarray) -> str:
    """Document lengths, and the share of *tokens* in long documents, as in the paper's Table 14.

    The table counts tokens: its ShortMix row is the mean of its parts' rows by shares of tokens.
    """
    parts = [f">{limit}K {lens[lens > limit * 1024].sum() / lens.sum():.1%}"
             for limit in (4, 8, 16, 32)]
    return (f"document lengths: shortest {lens.min():,}, median {int(np.median(lens)):,}, longest "
            f"{lens.max():,}; tokens in documents {'  '.join(parts)}")


def picture(doc_lens: Sequence[int], width: int = 96) -> str:
    """A packed sequence as a line, a letter a document: "aaabbbcc". The shortest do not show."""
    ends = np.cumsum(doc_lens)
    columns = (np.arange(width) + 0.5) * ends[-1] / width
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return "".join(letters[np.searchsorted(ends, columns, side="right") % 26])


def draw_packed(folder: Path, seq_len: int, first: Sequence[Sequence[int]],
                lens: np.ndarray) -> Path | None:
    """Draw packed sequences and the histogram of document lengths into `folder`/documents.png.

    `first` holds the document lengths of the first sequences (16 fit well), `lens` those of all.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(10, 5), layout="constrained")
    rows, histogram = figure.subplots(2, 1, height_ratios=(3, 2))
    for i, doc_lens in enumerate(first):
        starts = np.cumsum(doc_lens) - np.array(doc_lens)
        spans = list(zip(starts.tolist(), doc_lens, strict=True))
        colors = [f"C{k % 10}" for k in range(len(spans))]
        rows.broken_barh(spans, (i - 0.4, 0.8), facecolors=colors)
    rows.set(xlim=(0, seq_len), xlabel="token", ylabel="sequence",
             title=f"{folder.name}: a color a document")
    rows.set_yticks(range(len(first)))
    rows.invert_yaxis()
    edges = 2.0 ** np.arange(np.floor(np.log2(lens.min())), np.log2(lens.max()) + 1.01)
    histogram.hist(lens, bins=edges.tolist(), weights=lens / lens.sum())
    histogram.set(xscale="log", xlabel="tokens of a document", ylabel="share of tokens")
    histogram.set_xscale("log", base=2)
    path = folder / "documents.png"
    figure.savefig(path, dpi=110)
    return path


# --- 3. Text as it is written ---------------------------------------------------------------------


def print_tokens(tokenizer: Any, ids: Iterable[int], stop: int, n_prompt: int) -> None:
    """Print the text of tokens as they come, but not `stop`; then to stderr how fast they came."""
    letters = codecs.getincrementaldecoder("utf-8")("replace")  # a letter may take several tokens
    times = [time.monotonic()]
    for i in ids:
        times.append(time.monotonic())
        if i >= tokenizer.vocab_size:  # a model's table may have more rows than there are tokens
            print("\ufffd", end="", flush=True)
        elif i != stop:
            piece = tokenizer.encoding.decode_single_token_bytes(i)
            print(letters.decode(piece), end="", flush=True)
    print(letters.decode(b"", final=True))
    read_s, write_s, n = times[1] - times[0], times[-1] - times[1], len(times) - 1
    speed = f", {(n - 1) / write_s:,.1f} tok/s after the first" if n > 1 else ""
    print(f"{n_prompt:,} tokens read in {read_s:.2f} s, {n_prompt / read_s:,.0f} tok/s; "
          f"{n:,} written{speed}", file=sys.stderr)
