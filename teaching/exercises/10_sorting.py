"""Sorting a step.                                                              about 30 minutes

The idea. All sequences have the same number of tokens, but attention costs the sum of the *squared*
document lengths. At every micro-step all ranks wait for the slowest. So sequences of like cost
should be dealt to ranks side by side. Four sequences of 4 tokens, for 2 ranks, one at a time:

                       as drawn                    sorted by cost
    micro-step         0              1            0              1
    rank 0             (1, 1, 1, 1)   (4,)         (1, 1, 1, 1)   (3, 1)
    rank 1             (3, 1)         (2, 2)       (2, 2)         (4,)
    costs              4 and 10       16 and 8     4 and 8        10 and 16
    all wait for       10      +      16 = 26      8       +      16 = 24

The gradient of the step is a sum, so that the order changes nothing in it.

Shapes. doc_lens of each sequence -> dealt[micro-step][rank] = a list of per_batch sequences, by
their numbers. There are micro-steps * dp_size * per_batch sequences.

Hints. Sort the numbers 0, 1, 2, ... by cost; cut them into parts of per_batch; deal the parts out
like cards, one to each rank, before any gets a second.

Read: ProLong A.3 and Table 15 (11.7% faster). Grade: python teaching/grade.py 10
"""

from __future__ import annotations


def arrange(doc_lens: list[tuple[int, ...]], dp_size: int,
            per_batch: int) -> list[list[list[int]]]:
    """Deal the sequences 0, 1, 2, ... to [micro-step][rank], so that ranks wait little."""
    raise NotImplementedError
