"""The pictures of lesson.ipynb. What they show is computed by the five files, not here."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from IPython.display import Image
from matplotlib.figure import Figure
from matplotlib.patches import Wedge
from torch import Tensor

import model as llama
from data import PackedSequence
from model import ModelConfig
from support.report import draw_scores
from teaching import ranks

COLORS = [f"C{i}" for i in (0, 1, 2, 4, 5, 6, 7, 8, 9)]  # red is for what goes wrong


def small(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure of so many inches, and its axes, (rows, columns)."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=80)
    return figure, figure.subplots(rows, columns, squeeze=False)


def show(figure: Figure) -> Image:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return Image(png.getvalue())


def packs(sequences: Sequence[PackedSequence], names: str) -> Image:
    """Each sequence is a bar. A token of document i holds the number i; its letter is names[i]."""
    figure, [[axes]] = small(7.5, 0.5 + 0.42 * len(sequences))
    for row, sequence in enumerate(sequences):
        begin = 0
        for n in sequence.doc_lens:
            document = int(sequence.input_ids[begin])
            axes.barh(row, n, left=begin, color=COLORS[document % len(COLORS)], edgecolor="white")
            axes.text(begin + n / 2, row, names[document], ha="center", va="center", color="white")
            begin += n
    axes.set(yticks=range(len(sequences)), xlabel="token of the sequence")
    axes.set_yticklabels([f"sequence {row}" for row in range(len(sequences))])
    axes.invert_yaxis()
    return show(figure)


def mask(allowed: Tensor, names: Sequence[str]) -> Image:
    """Who looks at whom, (T, T) bool: a row is the token that looks."""
    figure, [[axes]] = small(3.4, 3.4)
    axes.imshow(allowed, cmap="Blues", vmin=0, vmax=1.4)
    axes.set(xticks=range(len(names)), yticks=range(len(names)), ylabel="this token",
             xlabel="looks at these")
    axes.set_xticklabels(names)
    axes.set_yticklabels(names)
    return show(figure)


def clocks(rows: dict[str, tuple[ModelConfig, int]], trained: tuple[ModelConfig, int],
           pairs: Sequence[int]) -> Image:
    """The angles of some RoPE pairs; a row is a model and its context.

    Blue are angles that `trained` has met in its context, red are those that it never has.
    """
    known = llama.rope_frequencies(trained[0])[0] * trained[1]  # (D/2,) the largest angles
    figure, axes = small(1.15 * len(pairs) + 1, 1.3 * len(rows) + 0.3, len(rows), len(pairs))
    for row, (name, (config, length)) in enumerate(rows.items()):
        farthest = llama.rope_frequencies(config)[0] * length
        for column, pair in enumerate(pairs):
            clock, far = axes[row][column], min(math.tau, float(farthest[pair]))
            seen = min(far, float(known[pair]))
            for begin, end, color in ((0, math.tau, "0.93"), (seen, far, "tab:red"),
                                      (0, seen, "tab:blue")):
                if end > begin:  # a hand's width at least: slow pairs move less than one can see
                    ends = math.degrees(begin), min(360, math.degrees(end) + 2)
                    clock.add_patch(Wedge((0, 0), 1, *ends, color=color))
            clock.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", xticks=[], yticks=[])
            clock.set_frame_on(False)
            if row == 0:
                clock.set_title(f"pair {pair}", fontsize=9)
        axes[row][0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return show(figure)


def trade(answer: Callable[..., Any], case: tuple[int, int, int], group: Any) -> list[Any]:
    """On each rank: exchange a tensor of which every number says whose token and head it is.

    As `ulysses_attention` does: (T, H) -> (P, T, H/P) -> exchange -> (S, H/P).
    """
    P, T, H = case
    rank = dist.get_rank(group)
    mine = torch.arange(T * H).view(T, H) + rank * T * H  # (T, H): token * H + head
    parts = mine.view(T, P, H // P).transpose(0, 1).contiguous()  # (P, T, H/P)
    return [mine.tolist(), answer(parts, group).flatten(0, 1).tolist()]  # (S, H/P)


def ulysses(P: int, T: int, H: int) -> Image:
    """What each of P processes holds before and after the exchange. A color is a head."""
    found = ranks.run_world(trade, llama.Exchange.apply, [(P, (P, T, H))])[0][:P]
    figure, axes = small(1.3 * P + 1, 4.2, 2, P)
    for row, when in enumerate(("before", "after")):
        for rank in range(P):
            cells = torch.tensor(found[rank][row])  # (tokens, heads)
            axes[row][rank].imshow(cells % H, cmap="tab10", vmin=0, vmax=9, aspect="auto")
            for (y, x), cell in zip(torch.cartesian_prod(*map(torch.arange, cells.shape)).tolist(),
                                    cells.flatten().tolist(), strict=True):
                axes[row][rank].text(x, y, cell // H, ha="center", va="center", fontsize=8)
            axes[row][rank].set(xticks=[], yticks=[], title=f"rank {rank}, {when}")
            axes[row][rank].title.set_fontsize(9)
    return show(figure)


def recall(evaluations: Sequence[dict[str, Any]]) -> Image:
    """The figure that train.py draws after each stage."""
    with TemporaryDirectory() as folder:
        draw_scores(evaluations, path := Path(folder) / "recall.png", by_depth=True)
        return Image(path.read_bytes(), width=640)


def curves(scores: dict[str, dict[str, float]], trained: str, xlabel: str) -> Image:
    """Lines of recall, {line: {x: score}}, and a dotted one at the x of the model's training."""
    figure, [[axes]] = small(5.5, 2.8)
    for name, line in scores.items():
        axes.plot(list(line), list(line.values()), "o-", label=name)
    axes.axvline(trained, color="gray", linestyle=":")
    axes.set(ylim=(-0.03, 1.05), xlabel=xlabel, ylabel="recall")
    axes.legend(fontsize=8)
    return show(figure)
