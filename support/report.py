"""Tables, tests and pictures of what was measured. Everything here takes plain dicts, arrays and strings.

    compare([A's evaluation, B's evaluation]) -> rows      which differences are real (paired, corrected)
    draw_scores, draw_recall                               score by length, score by length and depth
    format_lengths, picture, draw_packed                   document lengths of packed sequences

A function that draws returns False, or None, where matplotlib (the `plots` extra) is not installed.
Sources: McNemar (1947), Holm (1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from support.cli import format_length

# --- 1. Is a difference real? ---------------------------------------------------------------------


def paired_p_value(differences: Sequence[float], seed: int = 0) -> float:
    """The p-value of a sign-flip test on the score differences, one for each context.

    If the two models were equal, each context's difference could as well have the opposite sign. How often
    is the sum then at least this large? We count exactly where all differences have one size (for answers
    that are right or wrong this is McNemar's test) and by 10,000 random flips otherwise.
    """
    d = np.array([x for x in differences if x])
    if len(d) == 0:
        return 1.0
    if np.ptp(np.abs(d)) < 1e-12:
        fewer = min((d > 0).sum(), (d < 0).sum())
        tail = sum(math.comb(len(d), k) for k in range(fewer + 1)) / 2 ** len(d)
        return min(1.0, 2 * tail)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (10_000, len(d)))
    at_least = np.abs(signs @ d) >= abs(d.sum()) - 1e-12
    return float((at_least.sum() + 1) / 10_001)


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """Score differences b - a of two evaluations, a row for each task and length.

    A row has the difference, its 95% interval (bootstrap over contexts), its p-value, and whether it is
    `real`: whether it survives Holm's correction for looking at so many differences at once.
    Raises ValueError unless both models were asked the same questions.
    """
    rows = []
    for x, y in zip(a["results"], b["results"], strict=False):
        if _asked(x) != _asked(y) or len(a["results"]) != len(b["results"]):
            raise ValueError(f"{a['model']} and {b['model']} were not asked the same questions ({x['task']} "
                             f"at {x['length']}); give both the same tasks, lengths, samples and seed")
        by_context: dict[int, list[float]] = {}
        for p, q in zip(x["predictions"], y["predictions"], strict=True):
            by_context.setdefault(p["context"], []).append(q["score"] - p["score"])
        sums = np.array([sum(context) for context in by_context.values()], float)
        counts = np.array([len(context) for context in by_context.values()], float)
        draws = np.random.default_rng(0).integers(len(sums), size=(2000, len(sums)))
        low, high = np.percentile(sums[draws].sum(1) / counts[draws].sum(1), [2.5, 97.5])
        rows.append({"task": x["task"], "length": x["length"], "a": x["score"], "b": y["score"],
                     "difference": float(sums.sum() / counts.sum()), "low": float(low),
                     "high": float(high), "p": paired_p_value(sums.tolist()), "contexts": len(sums)})
    real = True
    for k, row in enumerate(sorted(rows, key=lambda row: row["p"])):  # Holm: the smallest p first
        real = real and row["p"] <= 0.05 / (len(rows) - k)
        row["real"] = real
    return rows


def _asked(row: dict[str, Any]) -> tuple[Any, ...]:
    questions = [(p["context"], p["prompt"], p["answers"]) for p in row["predictions"]]
    return row["task"], row["length"], questions


def format_comparison(a: str, b: str, rows: Sequence[dict[str, Any]]) -> str:
    """The differences as a table, with a star at those that are real."""
    wide = max(12, *(len(Path(row["task"]).stem) for row in rows))
    lines = [f"{'task':<{wide}} {'length':>7} {a:>10.10} {b:>10.10}  difference  95% interval        p"]
    for r in rows:
        lines.append(f"{Path(r['task']).stem:<{wide}} {format_length(r['length']):>7} {r['a']:>10.3f} "
                     f"{r['b']:>10.3f} {r['difference']:>+11.3f}  [{r['low']:+.2f}, {r['high']:+.2f}] "
                     f"{r['p']:>8.2g}{' *' if r['real'] else ''}")
    real = sum(row["real"] for row in rows)
    lines.append(f"* real: {real} of {len(rows)} differences, at 5% for all together (Holm)")
    few = sum(row["contexts"] < 6 for row in rows)
    if few:
        lines.append(f"{few} rest on fewer than 6 contexts, too few for any to be real; ask more (--samples)")
    return "\n".join(lines)


# --- 2. Pictures of scores ------------------------------------------------------------------------


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


def _curve(axes: Any, rows: Sequence[dict[str, Any]], i: int, label: str, labels: Sequence[str]) -> None:
    """Draw one model's scores by length, with their intervals."""
    scores = [r["score"] for r in rows]
    below = [max(0, r["score"] - r["low"]) for r in rows]
    above = [max(0, r["high"] - r["score"]) for r in rows]
    x = [labels.index(format_length(r["length"])) for r in rows]
    axes.errorbar(x, scores, [below, above], marker="o", markersize=4, capsize=3, label=label,
                  color=f"C{i}")
    axes.set(xticks=range(len(labels)), xticklabels=labels, ylim=(-0.03, 1.05))
    axes.grid(alpha=0.3)


def draw_scores(evaluations: Sequence[dict[str, Any]], path: Path,
                real: Sequence[tuple[str, int]] = ()) -> bool:
    """Draw a panel for each task: score by length, a line a model, chance dashed.

    A star marks each (task, length) in `real`.
    """
    pyplot = _pyplot()
    if pyplot is None:
        return False
    names = list(dict.fromkeys(r["task"] for r in evaluations[0]["results"]))
    lengths = sorted({r["length"] for r in evaluations[0]["results"]})
    labels = [format_length(n) for n in lengths]
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, grid = pyplot.subplots(lines, columns, squeeze=False, sharey=True, layout="constrained",
                                   figsize=(max(4.5, 3.1 * columns), 0.8 + 2.3 * lines))
    for axes, name in zip(grid.flat, names, strict=False):
        for i, evaluation in enumerate(evaluations):
            rows = [r for r in evaluation["results"] if r["task"] == name]
            _curve(axes, rows, i, evaluation["model"], labels)
        axes.plot([lengths.index(r["length"]) for r in rows], [r["chance"] for r in rows], "--",
                  color="gray", linewidth=1, label="chance")
        for j, length in enumerate(lengths):
            if (name, length) in real:
                axes.text(j, 1.0, "*", ha="center", va="center", fontsize=14)
        counts = sorted({r["n"] for r in rows})
        axes.set_title(f"{Path(name).stem} (n = {', '.join(map(str, counts))})", fontsize=9)
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
    by_model = [[r for r in e["results"] if r["task"] == task] for e in evaluations]
    if not by_model[0]:
        return draw_scores(evaluations, path)
    labels = [format_length(r["length"]) for r in by_model[0]]
    figure = pyplot.figure(figsize=(3.2 * max(len(by_model), 2), 6.2), layout="constrained")
    grid = figure.add_gridspec(2, len(by_model), height_ratios=(3, 2))
    curve = figure.add_subplot(grid[0, :])
    for i, (evaluation, rows) in enumerate(zip(evaluations, by_model, strict=True)):
        _curve(curve, rows, i, evaluation["model"], labels)
        heat = figure.add_subplot(grid[1, i])
        depths = np.array([[np.nan if s is None else s for s in r["by_depth"]] for r in rows]).T
        image = heat.imshow(depths, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        heat.set(title=evaluation["model"], xticks=range(len(labels)), xticklabels=labels,
                 yticks=range(5), yticklabels=[f"{20 * b}-{20 * b + 20}%" for b in range(5)])
        heat.tick_params(labelsize=7)
        if i == 0:
            heat.set_ylabel("depth of the answer")
    title = "Recall of 16 pairs in held-out code" if task == "recall" else Path(task).stem
    counts = sorted({r["n"] for r in by_model[0]})
    curve.set(xlabel="context length (tokens)", ylabel=f"{Path(task).stem}, with 95% interval",
              title=f"{title}, n = {', '.join(map(str, counts))} each")
    curve.legend(title="model")
    figure.colorbar(image, ax=figure.axes[1:], label="score", fraction=0.02)
    _save(figure, path)
    return True


# --- 3. Packed sequences --------------------------------------------------------------------------


def format_lengths(lens: np.ndarray) -> str:
    """Document lengths, and the share of *tokens* in long documents, as in the paper's Table 14.

    The table counts tokens, not documents: its ShortMix row is the mean of its components' rows, weighted
    by their shares of tokens.
    """
    parts = [f">{limit}K {lens[lens > limit * 1024].sum() / lens.sum():.1%}" for limit in (4, 8, 16, 32)]
    return (f"document lengths: shortest {lens.min():,}, median {int(np.median(lens)):,}, longest "
            f"{lens.max():,}; tokens in documents {'  '.join(parts)}")


def picture(doc_lens: Sequence[int], width: int = 96) -> str:
    """A packed sequence as a line of text, a letter a document: "aaabbbcc". The shortest do not show."""
    ends = np.cumsum(doc_lens)
    columns = (np.arange(width) + 0.5) * ends[-1] / width
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return "".join(letters[np.searchsorted(ends, columns, side="right") % 26])


def draw_packed(folder: Path, seq_len: int, first: Sequence[Sequence[int]], lens: np.ndarray) -> Path | None:
    """Draw packed sequences and the histogram of document lengths into `folder`/documents.png.

    `first` holds the document lengths of the first sequences (16 fit well), `lens` those of all documents.
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
        rows.broken_barh(spans, (i - 0.4, 0.8), facecolors=[f"C{k % 10}" for k in range(len(spans))])
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
