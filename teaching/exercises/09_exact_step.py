"""The exact loss over ranks and micro-batches.                                 about 60 minutes

The idea. A step is one big batch. It is dealt to ranks, and on each rank to micro-batches, only
because it does not fit in one. Its loss is the mean over *all* its trained tokens:

    rank 0    micro-batch 0: 1 trained token,  loss 8              sum 8
              micro-batch 1: 3 trained tokens, losses 2 2 2        sum 6
    rank 1    micro-batch 0: 4 trained tokens, losses 1 1 1 1      sum 4
              micro-batch 1: none                                  sum 0

    the step's loss         (8 + 6 + 4 + 0) / 8 = 2.25
    a mean of means         (8 + 2 + 1) / 3 = 3.67: the first token counts like four others

So the tokens are counted first, over all ranks, and each micro-batch divides the *sum* of its
losses by that number. Gradients are then summed over ranks (the grader does it, as FSDP would).

Three rules for ranks. All call all_sum equally often, or the others wait forever. All run backward
once for each micro-batch, even without a label, because the others wait for their part of the
gradients. And a step without any trained token has loss 0, not NaN.

Shapes. batches: this rank's, as many as every other rank's; each has input_ids (T,)
and labels (T,), -100 where there is none.
loss_of(input_ids, labels) -> (T,), 0 where there is no label. parallel.all_sum(x) sums a number or
tensor over all ranks and returns a float64 tensor without a graph.

Hints. Count, then loop, then sum the losses for the report. `detach` what is only reported.

Read: ProLong A.3. Grade: python teaching/grade.py 09
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from data import Batch

IGNORE_INDEX = -100  # the label of a token that has none


def train_on_step(loss_of: Callable[[Tensor, Tensor], Tensor], batches: Sequence[Batch],
                  parallel: Any) -> float:
    """Run backward on every micro-batch; return the loss of the whole step, the same on all ranks.

    Summed over ranks, the gradients must be those of the mean over the step's trained tokens.
    """
    raise NotImplementedError
