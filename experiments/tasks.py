"""eval.py with two more tasks, for the lab: recall from few pairs and from many.

    python experiments/tasks.py --model runs/tiny/checkpoints/ultra-120 --tasks few,recall,many --lengths 4k

`few` scatters 4 pairs in held-out code (as many keys as RULER's first multi-key needle task), `recall` 16, as
in training, `many` 32, twice as many as training ever showed and as many as there are keys. All other options
and results are eval.py's.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import eval as evaluation  # noqa: E402


def scattered_pairs(n_pairs: int, tokenizer: data.Tokenizer, length: int, n: int, questions: int,
                    seed: int) -> list[evaluation.Example]:
    """`recall` with another number of pairs: contexts of held-out code, and a question about every pair."""
    rng = np.random.default_rng((seed, length, n, n_pairs))
    room = length - 1 - (n_pairs + 1) * data.PAIR_LEN
    if room < 0:
        raise ValueError(f"{n_pairs} pairs need {length - room} tokens, got {length}; choose a longer one")
    haystack = data.haystack_windows(tokenizer, rng, n, room, seed, held_out=True)
    pairs = data.recall_pairs(rng, n, n_pairs)
    rows, starts = data.scatter_pairs(rng, pairs, haystack)
    chance = len(data.SYMBOLS) ** -data.VALUE_LEN
    return [evaluation.Example(np.concatenate(([tokenizer.bos_id], row)), tuple(
        evaluation.Question(np.array([data.QUESTION, pair[0]]), (tokenizer.decode(pair[1:]),),
                            float(start / len(row)), chance)
        for pair, start in zip(row_pairs, row_starts, strict=True)), data.VALUE_LEN)
        for row, row_pairs, row_starts in zip(rows, pairs, starts, strict=True)]


MORE_TASKS = {name: evaluation.Task(partial(scattered_pairs, n), evaluation.score_same, "recall", shared=n,
                                    exact=True) for name, n in (("few", 4), ("many", len(data.SYMBOLS)))}


def main() -> None:
    evaluation.TASKS.update(MORE_TASKS)
    evaluation.main()


if __name__ == "__main__":
    data.run_main(main)
