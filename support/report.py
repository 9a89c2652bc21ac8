"""What is written down: answers as they are given, pictures of scores and of packed sequences.

    {"tasks": "recall", "seed": 0, ...}                      a record: first the settings,
    ["recall", 2048, 0, [{"written": "PLM3", ...}, ...]]     then a line for each key and its value

A function that draws returns False where matplotlib (the `plots` extra) is not installed.
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
import torch.distributed as dist

from .cli import format_length
from .scores import compare, format_comparison

Evaluation = dict[str, Any]  # what eval.py writes: "model", "results", "bits_per_byte"


class Record(dict[tuple[Any, ...], Any]):
    """A dict that appends each new entry to a file (on the main rank)."""

    path: Path | None = None

    def __setitem__(self, key: tuple[Any, ...], value: Any) -> None:
        super().__setitem__(key, value)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps([*key, value]) + "\n")


def open_record(path: Path | None, settings: dict[str, Any], parallel: Any = None) -> Record:
    """Open a record, or begin one. Raises ValueError if it was made with other settings.

    The main rank alone reads the file, and sends the others what it found, or its error.
    """
    path = path if parallel is None or parallel.main else None
    found: list[Any] = [{} if path is None else _read(path, settings)]
    if parallel is not None:
        dist.broadcast_object_list(found, device=parallel.device)
    if isinstance(found[0], ValueError):
        raise found[0]
    record = Record(found[0])
    record.path = path
    return record


def _read(path: Path, settings: dict[str, Any]) -> dict[tuple[Any, ...], Any] | ValueError:
    try:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # not a half written one
        before, *rows = [json.loads(line) for line in lines] or [settings]
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(f"other settings ({name} {before.get(name)!r}, now {value!r})")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(entry) + "\n" for entry in (before, *rows)))
        return {tuple(key): value for *key, value in rows}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        return ValueError(f"{path} can't be continued: {error}; choose another folder (--out), or "
                          "remove it")


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, or None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained", dpi=130)


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


def draw_evaluation(evaluation: Evaluation, folder: Path) -> bool:
    """Draw all tasks of an evaluation by length, and one that has depths by depth."""
    name = evaluation["model"]
    deep = [r["task"] for r in evaluation["results"] if any(s is not None for s in r["by_depth"])]
    if deep:
        task = "recall" if "recall" in deep else deep[0]
        draw_scores([evaluation], folder / f"{name}-depth.png", deep=task)
    return draw_scores([evaluation], folder / f"{name}.png")


def draw_recall(evaluations: Sequence[Evaluation], path: Path) -> bool:
    """Draw recall by length and depth, or all tasks by length if that is not among them."""
    tasks = [r["task"] for r in evaluations[0]["results"]]
    return draw_scores(evaluations, path, deep="recall" if "recall" in tasks else "")


def draw_scores(evaluations: Sequence[Evaluation], path: Path,
                real: Sequence[tuple[str, int]] = (), deep: str = "") -> bool:
    """Draw a panel for each task: score by length, a line a model, a star at those in `real`.

    With `deep` draw that task alone, and below it a panel a model by length and depth.
    """
    results = [r for r in evaluations[0]["results"] if deep in ("", r["task"])]
    names = list(dict.fromkeys(r["task"] for r in results))
    lengths = sorted({r["length"] for r in results})
    columns = len(evaluations) if deep else min(4, len(names))
    cells = names + ["."] * (-len(names) % columns)  # a dot is an empty cell
    if deep:
        cells = names * columns + [f"depth {i}" for i in range(columns)]
    mosaic = np.reshape(cells, (-1, columns)).tolist()
    figure = new_figure(max(4.5, 3.1 * columns), 0.8 + 2.5 * len(mosaic))
    if figure is None:
        return False
    panels = figure.subplot_mosaic(mosaic)
    for name in names:
        _draw_curves(panels[name], evaluations, name, lengths)
        for length in [length for task, length in real if task == name]:
            panels[name].text(lengths.index(length), 1.0, "*", ha="center", va="center")
    panels[names[0]].set_ylabel("score, with 95% interval")
    for i, evaluation in enumerate(evaluations if deep else []):
        rows = [r["by_depth"] for r in evaluation["results"] if r["task"] == deep]
        axes = panels[f"depth {i}"]
        image = axes.imshow(np.array(rows, float).T, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(f"{evaluation['model']}, by depth", fontsize=9)
        axes.set(yticks=range(5), yticklabels=("0-20%", "20-40%", "40-60%", "60-80%", "80-100%"))
    if deep:
        figure.colorbar(image, ax=axes, label="score")
    for axes in panels.values():
        axes.set(xticks=range(len(lengths)), xticklabels=map(format_length, lengths))
        axes.tick_params(labelsize=7)
    figure.supxlabel("length (tokens)", fontsize=9)
    figure.legend(*panels[names[0]].get_legend_handles_labels(), loc="outside upper center",
                  ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def _draw_curves(axes: Any, evaluations: Sequence[Evaluation], task: str,
                 lengths: list[int]) -> None:
    for evaluation in evaluations:
        rows = [r for r in evaluation["results"] if r["task"] == task]
        x = [lengths.index(r["length"]) for r in rows]
        scores = np.array([r["score"] for r in rows])
        ends = np.array([[r["low"], r["high"]] for r in rows])
        axes.errorbar(x, scores, np.abs(ends.T - scores), marker="o", markersize=4, capsize=3,
                      label=evaluation["model"])
    axes.plot(x, [r["chance"] for r in rows], "--", color="gray", linewidth=1, label="chance")
    counts = ", ".join(str(n) for n in sorted({r["n"] for r in rows}))
    axes.set_title(f"{Path(task).stem} (n = {counts})", fontsize=9)
    axes.set(ylim=(-0.03, 1.05))
    axes.grid(alpha=0.3)


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
    """Draw some sequences, and the histogram of all lengths, into `folder`/documents.png."""
    figure = new_figure(10, 5)
    if figure is None:
        return None
    rows, histogram = figure.subplots(2, 1, height_ratios=(3, 2))
    for i, doc_lens in enumerate(first):
        spans = list(zip(np.cumsum([0, *doc_lens]).tolist(), doc_lens, strict=False))
        colors = [f"C{k % 10}" for k in range(len(spans))]
        rows.broken_barh(spans, (i - 0.4, 0.8), facecolors=colors)
    rows.set(xlim=(0, seq_len), xlabel="token", ylabel="sequence", yticks=range(len(first)),
             title=f"{folder.name}: a color a document")
    rows.invert_yaxis()
    edges = 2.0 ** np.arange(np.floor(np.log2(lens.min())), np.log2(lens.max()) + 1.01)
    histogram.hist(lens, bins=edges.tolist(), weights=lens / lens.sum())
    histogram.set(xlabel="tokens of a document", ylabel="share of tokens")
    histogram.set_xscale("log", base=2)
    figure.savefig(folder / "documents.png")
    return folder / "documents.png"


def print_tokens(tokenizer: Any, ids: Iterable[int], stop: int, n_prompt: int) -> None:
    """Print the text of tokens as they come, but not `stop`; then to stderr how fast they came."""
    letters = codecs.getincrementaldecoder("utf-8")("replace")  # a letter may take several tokens
    times = [time.monotonic()]
    for i in ids:
        times.append(time.monotonic())
        if i < tokenizer.vocab_size and i != stop:  # a model's table may have more rows than that
            piece = tokenizer.encoding.decode_single_token_bytes(i)
            print(letters.decode(piece), end="", flush=True)
    print(letters.decode(b"", final=True))
    read_s, write_s, n = times[1] - times[0], times[-1] - times[1], len(times) - 1
    speed = f", {(n - 1) / write_s:,.1f} tok/s after the first" if n > 1 else ""
    print(f"{n_prompt:,} tokens read in {read_s:.2f} s, {n_prompt / read_s:,.0f} tok/s; "
          f"{n:,} written{speed}", file=sys.stderr)
