"""Losses by groups of domains, and pictures of losses and of scores.

A function that draws returns False where matplotlib (the `plots` extra) is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from .cli import format_length, parse_length
from .scores import compare, format_comparison

Evaluation = dict[str, Any]  # what eval.py writes: "model", "results", "bits_per_byte"
Entry = dict[str, Any]  # a line of log.jsonl
GROUPS = "recall", "icl", "chat", "text", "long", "short"  # of domains, in losses that people see
WINDOW = 50  # steps that such a loss is a mean of


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
        a, b = (json.loads(path.read_bytes()) for path in paths)
        rows = compare(a, b)
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--compare {names}: not two results of eval.py ({error!r})") from None
    if a["model"] == b["model"]:
        a, b = a | {"model": f"{a['model']} (A)"}, b | {"model": f"{b['model']} (B)"}
    print(format_comparison(a["model"], b["model"], rows))
    figure = Path(out or paths[1].parent) / f"{paths[0].stem}-{paths[1].stem}.png"
    drawn = draw_scores([a, b], figure)
    print(f"figure: {figure}" if drawn else "no figure: install the `plots` extra")


def draw_scores(evaluations: Sequence[Evaluation], path: Path, by_depth: bool = False) -> bool:
    """Draw a panel for each task: score by length, a line a model.

    `by_depth` draws recall alone, or what else has depths, and below it a panel a model by length
    and depth; nothing if no task has depths.
    """
    results = evaluations[0]["results"]
    if by_depth:
        deep = [r["task"] for r in results if any(s is not None for s in r["by_depth"])]
        chosen = "recall" if "recall" in deep else next(iter(deep), "")
        results = [r for r in results if r["task"] == chosen]
    names = list(dict.fromkeys(r["task"] for r in results))
    if not names:
        return False
    lengths = sorted({r["length"] for r in results})
    columns = len(evaluations) if by_depth else min(4, len(names))
    cells = names + ["."] * (-len(names) % columns)  # a dot is an empty cell
    if by_depth:
        cells = names * columns + [f"depth {i}" for i in range(columns)]
    mosaic = np.reshape(cells, (-1, columns)).tolist()
    figure = new_figure(max(4.5, 3.1 * columns), 0.8 + 2.5 * len(mosaic))
    if figure is None:
        return False
    panels = figure.subplot_mosaic(mosaic)
    for name in names:
        _draw_curves(panels[name], evaluations, name, lengths)
    panels[names[0]].set_ylabel("score, with 95% interval")
    for i, evaluation in enumerate(evaluations if by_depth else []):
        rows = [r["by_depth"] for r in evaluation["results"] if r["task"] == names[0]]
        axes = panels[f"depth {i}"]
        image = axes.imshow(np.array(rows, float).T, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(f"{evaluation['model']}, by depth", fontsize=9)
        axes.set(yticks=range(5), yticklabels=("0-20%", "20-40%", "40-60%", "60-80%", "80-100%"))
    if by_depth:
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
    axes.set_title(f"{task} (n = {counts})", fontsize=9)
    axes.set(ylim=(-0.03, 1.05))
    axes.grid(alpha=0.3)


def group_losses(entries: Sequence[Entry]) -> dict[str, np.ndarray]:
    """The loss of each group of domains at each entry, per trained token of the last WINDOW steps.

    A single step may hold one domain alone. The groups: recall, icl, chat, and the rest, which is
    "text" beside one of these, else "long" or "short" documents. NaN where nothing was trained.
    """
    totals: dict[str, np.ndarray] = {}  # (entries, 2): sum of losses, trained tokens
    made_up = any(name.startswith(GROUPS[:3]) for entry in entries for name in entry["domains"])
    for i, entry in enumerate(entries):
        for name, numbers in entry["domains"].items():
            rest = "text" if made_up else "long" if "-" in name else "short"
            group = next((group for group in GROUPS[:3] if name.startswith(group)), rest)
            totals.setdefault(group, np.zeros((len(entries), 2)))[i] += numbers
    for group, total in totals.items():
        so_far = total.cumsum(axis=0)
        so_far[WINDOW:] -= so_far[:-WINDOW].copy()
        totals[group] = so_far[:, 0] / np.where(so_far[:, 1], so_far[:, 1], np.nan)
    return {group: totals[group] for group in GROUPS if group in totals}


def format_losses(entries: Sequence[Entry]) -> str:
    """The last of `group_losses`: "recall 0.012, icl 1.31"."""
    last = {group: losses[-1] for group, losses in group_losses(entries).items()}
    return ", ".join(f"{group} {loss:.3g}" for group, loss in last.items() if loss == loss)


def by_domain(sequences: Sequence[Any],
              sums: Sequence[tuple[float, float]]) -> dict[str, tuple[float, int]]:
    """Add up each domain's loss and trained tokens: the sequence "short[3]" is of domain short."""
    domains: dict[str, tuple[float, int]] = {}
    for sequence, (loss_sum, n) in zip(sequences, sums, strict=True):
        name = sequence.source.rpartition("[")[0]
        loss_before, n_before = domains.get(name, (0.0, 0))
        domains[name] = loss_before + loss_sum, n_before + int(n)
    return domains


def read_log(path: Path) -> list[Entry]:
    """The entries of a log.jsonl. Those of older code have no `domains` and no `seq_len`."""
    return [{"domains": {}, "seq_len": 0, **json.loads(line)}
            for line in path.read_bytes().splitlines()]


def draw_losses(folder: Path) -> bool:
    """Draw a run's figures/loss.png: the groups' losses, and recall at the stages' lengths.

    Recall is that of eval/*.json and of --eval-every, of json_kv in text. It is drawn at all
    lengths that were evaluated if no stage's is among them.
    """
    figure, path = new_figure(9, 6), folder / "log.jsonl"
    if figure is None or not path.exists():  # nothing is trained yet
        return False
    log = read_log(path)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    curves, ends = {}, {}
    for stage, of_stage in groupby(log, lambda entry: entry["stage"]):
        entries = list(of_stage)
        x = [entry["tokens_seen"] for entry in entries]
        for group, losses in group_losses(entries).items():
            curves[group], = above.plot(x, losses, color=f"C{GROUPS.index(group)}")
        above.annotate(stage, (x[0], 1.02), xycoords=above.get_xaxis_transform())
        for axes in (above, below):
            axes.axvline(x[-1], color="gray", linewidth=1)
        ends[stage] = x[-1]

    points: list[tuple[int, str, int, float]] = []  # length, task, tokens seen, score
    for path in (folder / "eval").glob("*.json"):
        evaluation = json.loads(path.read_bytes())
        points += [(r["length"], r["task"], ends.get(evaluation["model"], 0), r["score"])
                   for r in evaluation["results"]]
    for entry in log:
        for name, score in entry.get("eval", {}).items():
            task, length = name.split("@")
            points.append((parse_length(length), task, entry["tokens_seen"], score))
    points = sorted(point for point in points if point[1] in ("recall", "json_kv"))
    trained = {entry["seq_len"] for entry in log} & {length for length, *_ in points}
    below.set_prop_cycle(color=("black", "gray", "teal", "olive"))  # not those of the groups
    for length, of_length in groupby(points, lambda point: point[0]):
        if length in trained or not trained:
            seen, scores = zip(*(point[2:] for point in of_length), strict=True)
            below.plot(seen, scores, "o-", markersize=4, label=f"at {format_length(length)}")
    above.set(yscale="log", ylabel=f"loss (mean of {WINDOW} steps)")
    above.legend(curves.values(), curves.keys(), fontsize=8)
    below.set(ylim=(-0.03, 1.05), ylabel="recall", xlabel="tokens trained on (millions)")
    below.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g}")
    below.legend(fontsize=8)
    (folder / "figures").mkdir(exist_ok=True)
    figure.savefig(folder / "figures" / "loss.png")
    return True
